"""Claim 1, orders and error bounds: `python -m projects.fssm.order_of_accuracy --output order.json`."""

import argparse

import numpy as np

from shared.io.files import write_json

from .hold import EXPECTED_ORDER, Waves, endpoint_errors, error_bound, observed_order, scan_states

TOLERANCE = 0.25  # of the slope; fixed before the run
DELTAS = 2.0 ** -np.arange(5, 11)


def smooth_inputs(count: int, seed: int) -> tuple[Waves, np.ndarray]:
    """Draw inputs of three waves each and decay rates a in [-8, -0.5]."""
    generator = np.random.default_rng(seed)
    shape = (count, 3)
    waves = Waves(
        generator.normal(size=shape), generator.uniform(0.2, 6, shape), generator.uniform(0, 2 * np.pi, shape)
    )
    return waves, generator.uniform(-8, -0.5, count)


def measure() -> dict:
    """Return {"passed", "values", "statement"}."""
    # the survey's test problem: h' = -2h + x, x = sin 1.7t + 0.3 cos 5t, up to T = 4
    problem = Waves(np.array([[1.0, 0.3]]), np.array([[1.7, 5.0]]), np.array([[0.0, np.pi / 2]]))
    inputs, rates = smooth_inputs(100, seed=0)
    values, passed = {}, True
    for hold, expected in EXPECTED_ORDER.items():
        errors = endpoint_errors(problem, np.array([-2.0]), 1.0, 4.0, [round(4 / d) for d in DELTAS], hold)
        slope = observed_order(DELTAS, errors)
        worst = 0.0
        for delta in DELTAS:
            steps = round(2 / delta)
            error = np.abs(scan_states(inputs, rates, 1.0, delta, steps, hold)
                           - inputs.solve(rates, 1.0, delta * np.arange(1, steps + 1))).max(1)  # fmt: skip
            worst = max(worst, float((error / error_bound(inputs, rates, 1.0, delta, hold)).max()))
        values |= {
            f"{hold}/order": slope,
            f"{hold}/error_at_2^-8": float(errors[3]),
            f"{hold}/worst_share_of_bound": worst,
        }
        passed &= abs(slope - expected) <= TOLERANCE and worst <= 1
    orders = ", ".join(f"{hold} {values[f'{hold}/order']:.2f}" for hold in EXPECTED_ORDER)
    within = max(value for name, value in values.items() if name.endswith("bound"))
    statement = f"orders {orders}; the largest error is {within:.2f} of its bound on 100 smooth inputs"
    return {"passed": passed, "values": values, "statement": statement}


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", required=True, help="JSON file to write")
    result = measure()
    write_json(parser.parse_args().output, result)
    print(result["statement"])


if __name__ == "__main__":
    main()
