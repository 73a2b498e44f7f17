"""The README's plain torch lines run as they stand there."""

import re
from pathlib import Path

import torch

ROOT = Path(__file__).parents[3]
README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_plain_torch_lines_of_the_readme_restore_frames_of_any_size(monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    monkeypatch.chdir(ROOT)
    names = {"frames": torch.rand(1, 4, 3, 37, 50, generator=torch.Generator().manual_seed(0))}
    exec(code, names)
    assert names["sharp"].shape == (1, 4, 3, 37, 50)
