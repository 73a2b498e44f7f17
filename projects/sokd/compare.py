"""What a finished run is shown beside: the same host without the plug-in, the student alone; and its pictures."""

import copy
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from omegaconf import DictConfig, OmegaConf

from shared.experiment import config_hash, train
from shared.io.files import atomic_path
from shared.recorded import find_recorded, read_curves

from .module import Distillation, Shown


def finish(config: DictConfig, record: dict, module: Distillation, run_dir: Path) -> None:
    """Add the student alone as baseline, the host without the plug-in as a peer and the policy found; draw.

    The host is trained here, in `<run_dir>/without`, unless a run of this machine or a recorded one has the same
    configuration; the student alone is only looked up.

    Args:
        config: of the finished run.
        record: of the finished run; "baseline", "peers" and "policy" are added to.
        module: tested, so that it holds what its areas were on the first pictures.
        run_dir: folder of the run.
    """
    curves = {"this run": read_curves(run_dir).get("val/top1", [])}
    distill = config.model.distill
    if distill and distill.host:
        if (found := find_recorded("sokd", config_hash(changed(config, host=None, plugin=None)))) is not None:
            record["baseline"] = scores(found, record)
            curves["student alone"] = found["curve"].get("val/top1", [])
        else:
            print("no recorded run of host=alone under this configuration; run it so, and it will stand beside")
    if distill and distill.host and distill.plugin and config.without:
        name = distill.host.name
        found, curve = without_plugin(config, module, run_dir)
        if found is not None:
            record["peers"][name] = scores(found, record)
            curves[f"{name} without the plug-in"] = curve
    if module.oriented is not None and module.oriented.policy is not None:
        record["policy"] = {"favourites": module.oriented.policy.favourites(), "history": module.policy_history}
    draw_training(run_dir / "pictures" / "training.png", curves, module.policy_history, record)
    if module.shown is not None:
        draw_areas(run_dir / "pictures" / "areas.png", module.shown)


def without_plugin(config: DictConfig, module: Distillation, run_dir: Path) -> tuple[dict | None, list[float]]:
    """Find or train the host of a configuration as it is -> its record and validation accuracies."""
    bare = changed(config, plugin=None)
    if (found := find_recorded("sokd", config_hash(bare))) is not None:
        return found, found["curve"].get("val/top1", [])
    if module.trainer.world_size > 1:
        print("the host without the plug-in is not trained beside several processes; run it with plugin=none")
        return None, []
    print(f"now {config.model.distill.host.name} without the plug-in, to stand beside")
    bare.run_dir, bare.resume = str(run_dir / "without"), "auto"
    return train(bare), read_curves(run_dir / "without").get("val/top1", [])


def changed(config: DictConfig, **distill: object) -> DictConfig:
    """Give the configuration with other values under model.distill."""
    other = copy.deepcopy(config)
    OmegaConf.set_struct(other, False)
    other.model.distill = {**config.model.distill, **distill}
    return other


def scores(found: dict, record: dict) -> dict[str, float]:
    """Pick the scores that both records have."""
    return {name: value for name, value in found["metrics"].items() if name in record["metrics"]}


def draw_training(path: Path, curves: dict[str, list[float]], history: list[dict], record: dict) -> None:
    """Draw accuracies over the epochs and, of a search, how likely each operation was over its steps.

    Args:
        path: of the PNG.
        curves: validation accuracies by the name of the run.
        history: of the search, see `Distillation.policy_history`.
        record: of the run, for the teacher's score.
    """
    panels = [draw for draw, there in ((draw_accuracy, any(curves.values())), (draw_policy, history)) if there]
    figure = Figure(figsize=(5.5 * max(1, len(panels)), 4), dpi=100, layout="constrained")
    for axes, draw in zip(figure.subplots(1, max(1, len(panels)), squeeze=False)[0], panels, strict=False):
        draw(axes, curves, history, record)
        axes.grid(alpha=0.3)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")


def draw_accuracy(axes: Axes, curves: dict[str, list[float]], history: list[dict], record: dict) -> None:
    """Draw the left panel of `draw_training`."""
    for name, values in curves.items():
        axes.plot(range(1, len(values) + 1), values, label=name, linewidth=2 if name == "this run" else 1.2)
    for name, value in record["peers"].get("teacher", {}).items():
        if name.endswith("/top1"):
            axes.axhline(value, color="gray", linestyle="--", linewidth=1, label="teacher (test)")
    axes.set(xlabel="epoch", ylabel="top-1 on validation (%)", title="accuracy")
    axes.legend()


def draw_policy(axes: Axes, curves: dict[str, list[float]], history: list[dict], record: dict) -> None:
    """Draw the right panel of `draw_training`."""
    steps = [row["step"] for row in history]
    for name in history[0]["probabilities"]:
        axes.plot(steps, [row["probabilities"][name] for row in history], label=name)
    axes.set(xlabel="step of the search", ylabel="probability in a step", title="the policy")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize="small", ncols=2)


def draw_areas(path: Path, shown: Shown) -> None:
    """Draw pictures with the student's areas (orange), the teacher's (blue), and a veil off what both cover."""
    columns = len(shown.images)
    figure = Figure(figsize=(1.6 * columns, 1.9), dpi=100, layout="constrained")
    size, side = shown.images.shape[-1], shown.agreed.shape[-1]
    cell = size / side
    for axes, picture, student, teacher, agreed in zip(
        figure.subplots(1, columns, squeeze=False)[0], *(part.cpu() for part in shown), strict=True
    ):
        axes.imshow(picture.permute(1, 2, 0).numpy(), extent=(0, size, size, 0))
        veil = torch.zeros(side, side, 4)
        veil[..., 3] = 0.55 * (1 - agreed.float())
        axes.imshow(veil.numpy(), extent=(0, size, size, 0), interpolation="nearest")
        for boxes, color in ((teacher, "tab:blue"), (student, "tab:orange")):
            for x0, y0, x1, y1 in (cell * (boxes + torch.tensor([0, 0, 1, 1]))).tolist():
                axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=color, linewidth=1))
        axes.axis("off")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")
