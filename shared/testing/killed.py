"""Run a command that kills itself while it writes a file, as a power cut would end it.

    python -m shared.testing.killed half 2 projects.fssm.train experiment=smoke run_dir=...

ends with SIGKILL when half of the second checkpoint is written; with `before` or `after` around the renaming by which a
file, of any kind, gets its final name.
"""

import io
import os
import signal
import sys
from pathlib import Path
from runpy import run_module

import torch

from shared.io import files

WHAT = ("half", "before", "after")


def main(what: str, number: int, module: str, *arguments: str) -> None:
    """Run `module` as the shell would, and die at the moment `what` of its write `number`, from 1.

    Raises:
        ValueError: no such moment.
    """
    if what not in WHAT:
        raise ValueError(f"the moment is one of {', '.join(WHAT)}, not {what!r}")
    save, replace, left = torch.save, os.replace, number

    def is_time() -> bool:
        nonlocal left
        left -= 1
        return left == 0

    def saving(content: object, path: Path) -> None:
        if not is_time():
            return save(content, path)
        whole = io.BytesIO()
        save(content, whole)
        Path(path).write_bytes(whole.getbuffer()[: len(whole.getbuffer()) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    def replacing(source: str | os.PathLike, target: str | os.PathLike) -> None:
        if not str(source).endswith(f".part{Path(target).suffix}"):  # of a compiler's cache, say
            return replace(source, target)
        now = is_time()
        if not now or what == "after":
            replace(source, target)
        if now:
            os.kill(os.getpid(), signal.SIGKILL)

    if what == "half":
        torch.save = saving
    else:
        files.os.replace = replacing
    sys.argv = [module, *arguments]
    run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
