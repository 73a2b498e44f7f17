"""The idea on one equation: orders of accuracy and the error bounds."""

import json

import numpy as np
import pytest

from projects.fssm import order_of_accuracy
from projects.fssm.hold import EXPECTED_ORDER, Waves, endpoint_errors, error_bound, observed_order, scan_states

PROBLEM = Waves(np.array([[1.0, 0.3]]), np.array([[1.7, 5.0]]), np.array([[0.0, np.pi / 2]]))
RATE = np.array([-2.0])


def test_closed_form_solves_the_equation():
    t = np.linspace(0, 3, 30001)
    h = PROBLEM.solve(RATE, 1.5, t)[0]
    assert h[0] == pytest.approx(0, abs=1e-15)
    residual = np.gradient(h, t) - (RATE[0] * h + 1.5 * PROBLEM(t)[0])
    assert np.abs(residual[1:-1]).max() < 1e-7


@pytest.mark.parametrize(
    ("hold", "error"),
    [("zoh_euler", 1.33e-3), ("zoh_exact", 1.27e-3), ("foh_0", 6.3e-5), ("foh_1", 1.35e-6), ("foh_exact", 1.51e-6),
     ("exp_trap", 1.70e-6)],
)  # fmt: skip
def test_endpoint_errors_are_the_surveys(hold, error):
    assert endpoint_errors(PROBLEM, RATE, 1.0, 4.0, [1024], hold)[0] == pytest.approx(error, rel=0.01)


@pytest.mark.parametrize("hold", EXPECTED_ORDER)
def test_order_and_bound(hold):
    deltas = 2.0 ** -np.arange(5, 9)
    errors = endpoint_errors(PROBLEM, RATE, 1.0, 4.0, [round(4 / d) for d in deltas], hold)
    assert observed_order(deltas, errors) == pytest.approx(EXPECTED_ORDER[hold], abs=0.25)
    states = scan_states(PROBLEM, RATE, 1.0, 1 / 32, 128, hold)
    error = np.abs(states - PROBLEM.solve(RATE, 1.0, np.arange(1, 129) / 32)).max()
    bound = error_bound(PROBLEM, RATE, 1.0, 1 / 32, hold)[0]
    assert bound / 20 < error < bound


@pytest.mark.slow
def test_program_reports_what_it_measured(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["order_of_accuracy", "--output", str(tmp_path / "order.json")])
    order_of_accuracy.main()
    result = json.loads((tmp_path / "order.json").read_text())
    assert result["passed"] is True
    assert result["values"]["foh_exact/order"] == pytest.approx(2, abs=0.05)
