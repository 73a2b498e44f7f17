"""The README's plain torch loop runs as it stands there."""

import re
from pathlib import Path

import torch
from torch import nn

from projects.sokd.networks import build_network

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_plain_torch_loop_of_the_readme_searches_and_trains_in_ten_lines(tmp_path, monkeypatch):
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", README, re.S) if "StudentOriented" in block)
    loop = code[code.index("oriented = ") :].strip().splitlines()
    assert len(loop) <= 10
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "resnet14_vanilla" / "ckpt_epoch_240.pth"
    file.parent.mkdir()
    torch.manual_seed(0)
    torch.save({"model": build_network({"name": "resnet14", "num_classes": 100}).state_dict()}, file)
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8)
    names = {
        "my_loss": lambda student, teacher: nn.functional.mse_loss(student.feats[3], teacher.feats[3]),
        "batches": [(images, labels)] * 6,
        "search_steps": 2,
    }
    seen, search = [], "projects.sokd.student_oriented.StudentOriented.search"
    from projects.sokd.student_oriented import StudentOriented

    original = StudentOriented.search
    monkeypatch.setattr(search, lambda self, *rest: seen.append(original(self, *rest)))
    exec(code.replace("resnet32x4", "resnet14").replace("resnet8x4", "resnet8"), names)
    assert seen == [True, True]
    assert names["step"] == 5
    assert bool(torch.isfinite(names["loss"]))
    start = torch.full_like(names["oriented"].policy.alpha, 1e-3)
    assert not torch.equal(names["oriented"].policy.alpha, start)
