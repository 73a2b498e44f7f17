"""What several test files need."""

import pytest

pytest.register_assert_rewrite("shared.testing.project")

from shared.testing.project import project_fixtures  # noqa: E402

composed, smoke, command_line = project_fixtures("hybrid_atlas")
