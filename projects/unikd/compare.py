"""What a finished run is shown beside: recorded runs of other methods under the same configuration; its picture."""

import copy
from pathlib import Path

import torch
from matplotlib.figure import Figure
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from shared.experiment import config_hash
from shared.io.files import atomic_path
from shared.recorded import find_recorded, read_curves

from .correlation import class_correlation
from .module import Distillation

CONFIGS = Path(__file__).parent / "configs"
BASELINE, PEERS = "alone", ("kd",)  # choices of the group distill


def finish(config: DictConfig, record: dict, module: Distillation, run_dir: Path) -> None:
    """Add the student alone as baseline and KD as a peer, where they were run under this configuration, and draw.

    Args:
        config: of the finished run.
        record: of the finished run; "baseline" and "peers" are added to.
        module: tested, so that it holds the logits of the test set.
        run_dir: folder of the run.
    """
    curves = {"this run": read_curves(run_dir).get("val/top1", [])}
    for method in (BASELINE, *PEERS) if config.model.distill else ():
        fingerprint = config_hash(with_method(config, method))
        if fingerprint == record["config_hash"]:
            continue
        found = find_recorded("unikd", fingerprint)
        if found is None:
            print(f"no recorded run of distill={method} under this configuration; run it so, and it will stand beside")
            continue
        scores = {name: value for name, value in found["metrics"].items() if name in record["metrics"]}
        if method == BASELINE:
            record["baseline"] = scores
        else:
            record["peers"][method] = scores
        curves[f"distill={method}"] = found["curve"].get("val/top1", [])
    draw(run_dir / "pictures" / "distillation.png", curves, module.test_logits, record)


def with_method(config: DictConfig, method: str) -> DictConfig:
    """Give the configuration with what another file of the group distill says of the methods, and the same teacher."""
    chosen = OmegaConf.load(CONFIGS / "distill" / f"{method}.yaml")
    other = copy.deepcopy(config)
    OmegaConf.set_struct(other, False)
    other.model.distill = {**config.model.distill, "ce_weight": chosen.ce_weight, "methods": chosen.methods}
    return other


def draw(path: Path, curves: dict[str, list[float]], logits: dict[str, Tensor], record: dict) -> None:
    """Draw accuracies over the epochs and, with a teacher, by how much the class correlations differ from its own.

    Args:
        path: of the PNG.
        curves: validation accuracies by the name of the run.
        logits: (N, K) of "student" and "teacher" on the test set.
        record: of the run, for the teacher's score.
    """
    with_teacher = "teacher" in logits
    figure = Figure(figsize=(10 if with_teacher else 5, 4), dpi=100, layout="constrained")
    left, *right = figure.subplots(1, 2 if with_teacher else 1, squeeze=False)[0]
    for name, values in curves.items():
        left.plot(range(1, len(values) + 1), values, label=name, linewidth=2 if name == "this run" else 1.2)
    for name, value in record["peers"].get("teacher", {}).items():
        if name.endswith("/top1"):
            left.axhline(value, color="gray", linestyle="--", linewidth=1, label="teacher (test)")
    left.set(xlabel="epoch", ylabel="top-1 on validation (%)", title="accuracy")
    left.legend()
    left.grid(alpha=0.3)
    for axes in right:
        difference = class_correlation(logits["student"].double()) - class_correlation(logits["teacher"].double())
        shown = axes.imshow(difference.abs().cpu().numpy(), vmin=0, vmax=0.5, cmap="magma")
        mean = difference.abs()[~torch.eye(len(difference), dtype=torch.bool)].mean()
        axes.set(xlabel="class", ylabel="class", title=f"|class correlation - teacher's|, mean {mean:.3f}")
        figure.colorbar(shown, ax=axes)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")
