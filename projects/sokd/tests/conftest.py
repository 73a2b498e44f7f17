"""What several test files need."""

import pytest

pytest.register_assert_rewrite("shared.testing.project")

from shared import recorded  # noqa: E402
from shared.testing.project import project_fixtures  # noqa: E402

composed, smoke, command_line = project_fixtures("sokd")


@pytest.fixture(autouse=True)
def recorded_runs(tmp_path, monkeypatch):
    """Look for recorded runs in a folder of the test instead of this machine's -> that folder."""
    monkeypatch.setattr(recorded, "ROOT", tmp_path / "recorded")
    monkeypatch.setattr(recorded, "RUNS", tmp_path / "recorded" / "runs")
    return tmp_path / "recorded" / "runs" / "sokd"
