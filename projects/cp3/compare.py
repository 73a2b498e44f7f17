"""What a finished run is shown beside: the dense network, other criteria at its rate, costs; tables and pictures."""

import copy
import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from matplotlib.figure import Figure
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from shared.experiment import config_hash, train
from shared.io.files import atomic_path, write_text
from shared.io.images import write_image
from shared.io.points import picture_of_clouds
from shared.recorded import RUNS, find_recorded
from shared.turns import measure, ratio

from .cost import cost_table, measure_cost
from .module import PointNetwork, load_module, scores_of
from .pruner import Pruned
from .pruning import save_plan

BESIDE = ("base", "random", "l1")
LATENCY_CLOUDS = 32
SHOWN = 24  # clouds in the picture


def finish(config: DictConfig, record: dict, module: PointNetwork, run_dir: Path) -> None:
    """Add costs, the dense network and what `config.beside` names; write plan.json, table.md and pictures.

    Pruned at random is the baseline, the others are peers. They are trained here, in `<run_dir>/<name>`, unless a run
    of this machine, one that another run trained for itself, or a recorded one has the same configuration.

    Args:
        config: of the finished run.
        record: of the finished run; added to.
        module: tested.
        run_dir: folder of the run.
    """
    data = module.trainer.datamodule
    prefix = f"test/{data.name}/"
    draw_test(module, run_dir / "pictures")
    if module.hparams.prune is None:
        record["metrics"] |= costs_of(module, prefix)
        return
    dense = dense_module(module)
    dense_costs, own_costs = latencies(dense, module, prefix)
    record["metrics"] |= own_costs
    arms = [name for name in config.beside if differs(config, name)]
    if arms and module.trainer.world_size > 1:
        print("nothing is trained beside several processes; say beside=[]")
        arms = []
    record["peers"]["dense"] = tested(dense, module, prefix) | dense_costs
    for name in arms:
        found = run_beside(config, name, run_dir)
        scores = {key: value for key, value in found["metrics"].items() if key in record["metrics"]}
        if name == "random":
            record["baseline"] = scores
        else:
            record["peers"][name] = scores
    spent = tuple(found[f"{prefix}latency_ms"] for found in (dense_costs, own_costs))
    write_plan(module, run_dir, spent)
    draw_importance(run_dir / "pictures" / "importance.png", module.pruned)


def finish_evaluation(record: dict, module: PointNetwork, run_dir: Path) -> None:
    """Add the costs and a picture to an evaluation."""
    prefix = f"test/{module.trainer.datamodule.name}/"
    record["metrics"] |= costs_of(module, prefix)
    draw_test(module, run_dir / "pictures")


# --- What stands beside -----------------------------------------------------------------------------------------------


def differs(config: DictConfig, name: str) -> bool:
    """Say whether another criterion is another run: not where a plan is followed, or there is no base to take alone."""
    prune = config.model.prune
    if prune.plan is not None or (name == "base" and prune.criterion.get("base") == "none"):
        return False
    return config_hash(with_criterion(config, name)) != config_hash(with_criterion(config, None))


def with_criterion(config: DictConfig, name: str | None) -> DictConfig:
    """Give the configuration with the criterion's base alone, random or l1; with nothing beside and no logger."""
    other = copy.deepcopy(config)
    OmegaConf.set_struct(other, False)
    other.beside, other.logger = [], {}
    if name is not None:
        criterion = other.model.prune.criterion
        criterion.ce, criterion.kr = "none", "none"
        criterion.base = criterion.base if name == "base" else name
    return other


def run_beside(config: DictConfig, name: str, run_dir: Path) -> dict:
    """Find or train the run of another criterion; give its record."""
    other = with_criterion(config, name)
    fingerprint = config_hash(other)
    found = find_recorded("cp3", fingerprint)
    for file in () if found else sorted((RUNS / "cp3").glob(f"*/{name}/metrics.json"), reverse=True):
        try:
            kept = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:  # a damaged one is no reason to lose the run that asks
            continue
        if kept.get("config_hash") == fingerprint:
            found = kept
            break
    if found is None:
        criterion = other.model.prune.criterion
        print(f"now {criterion.base} alone at the same rate, to stand beside")
        other.run_dir, other.resume = str(run_dir / name), "auto"
        found = train(other, add_costs)
    return found


def add_costs(record: dict, module: PointNetwork, run_dir: Path) -> None:
    """Add what a run beside costs; its latency would not be measured in turn with the others."""
    prefix = f"test/{module.trainer.datamodule.name}/"
    record["metrics"] |= counted(module, example_inputs(module), prefix)


def dense_module(module: PointNetwork) -> PointNetwork:
    """Load the network that was pruned."""
    dense = load_module(module.hparams.init_from, **module.hparams.net)
    return dense.to(module.device).eval()


@torch.no_grad()
def tested(dense: PointNetwork, module: PointNetwork, prefix: str) -> dict[str, float]:
    """Score the dense network on the test set of the run, in this process alone."""
    data, trainer = module.trainer.datamodule, module.trainer
    loader = itertools.islice(data.test_dataloader(), trainer.num_test_batches[0])
    batches = (
        {key: value.to(module.device) for key, value in batch.items()} for batch in loader
    )  # fmt: skip
    found = scores_of([dense.outputs(batch) for batch in batches], data)
    return {f"{prefix}{name}": value for name, value in found.items()}


# --- Costs ------------------------------------------------------------------------------------------------------------


def example_inputs(module: PointNetwork) -> tuple[Tensor, ...]:
    """Give 32 clouds of the test set, repeated where a batch has fewer, or a part of a room, on the module's device."""
    data = module.trainer.datamodule
    inputs = module.inputs(next(iter(data.test_dataloader())))
    index = torch.arange(1 if data.task == "segmentation" else LATENCY_CLOUDS) % len(inputs[0])
    return tuple(part[index].to(module.device) for part in inputs)


def costs_of(module: PointNetwork, prefix: str) -> dict[str, float]:
    """Count parameters (M), MACs (G) and FLOPs (G) of one cloud, and measure the latency of a batch (ms a cloud)."""
    inputs = example_inputs(module)
    times = measure({"net": lambda: call(module, inputs)}, module.device, 5)["net"]
    return counted(module, inputs, prefix) | {f"{prefix}latency_ms": sorted(times)[2] / len(inputs[0])}


def latencies(dense: PointNetwork, module: PointNetwork, prefix: str) -> tuple[dict[str, float], dict[str, float]]:
    """Give costs of the dense and of the pruned network, whose latencies take turns."""
    inputs = example_inputs(module)
    runs = {"dense": lambda: call(dense, inputs), "pruned": lambda: call(module, inputs)}
    times = measure(runs, module.device, 5)
    found = []
    for name, one in (("dense", dense), ("pruned", module)):
        found.append(counted(one, inputs, prefix) | {f"{prefix}latency_ms": sorted(times[name])[2] / len(inputs[0])})
    found[1][f"{prefix}relative_latency"] = ratio(times["pruned"], times["dense"])
    found[1][f"{prefix}flops_cut"] = 100 * (1 - found[1][f"{prefix}gflops"] / found[0][f"{prefix}gflops"])
    return found[0], found[1]


def counted(module: PointNetwork, inputs: Sequence[Tensor], prefix: str) -> dict[str, float]:
    """Count the cost of one cloud."""
    cost = measure_cost(module.net, *(part[:1] for part in inputs))
    return {
        f"{prefix}params_m": cost.params / 1e6,
        f"{prefix}gmacs": cost.macs / 1e9,
        f"{prefix}gflops": cost.flops / 1e9,
    }


@torch.no_grad()
def call(module: PointNetwork, inputs: Sequence[Tensor]) -> Tensor:
    """Run a network as a user does."""
    module.net.eval()
    return module.net(*inputs)


# --- Files ------------------------------------------------------------------------------------------------------------


def write_plan(module: PointNetwork, run_dir: Path, latency_ms: tuple[float, float]) -> None:
    """Write plan.json (channels of the dense network that stay) and table.md (before and after)."""
    groups = [replace(group, width=module.dense_widths[group.name]) for group in module.pruned.groups]
    before, after = module.costs
    facts = {"net": module.hparams.net, "before": vars(before), "after": vars(after)}
    save_plan(run_dir / "plan.json", groups, module.kept, **facts)
    kept = {name: len(channels) for name, channels in module.kept.items()}
    write_text(run_dir / "table.md", cost_table(groups, kept, before, after, latency_ms))


def draw_test(module: PointNetwork, folder: Path) -> None:
    """Draw clouds of the test set with what they are and were taken for, right and wrong ones in turn."""
    data = module.trainer.datamodule
    if data.task != "classification" or not module.test_outputs:
        return
    probabilities, label = module.test_outputs["probabilities"], module.test_outputs["label"]
    guess = probabilities.argmax(1)
    wrong, right = (guess != label).nonzero()[:, 0], (guess == label).nonzero()[:, 0]
    chosen = torch.cat([right[: SHOWN - min(len(wrong), SHOWN // 3)], wrong[: SHOWN // 3]])
    clouds = torch.cat([batch["xyz"] for batch in data.test_dataloader()])[chosen]
    titles = []
    for i in chosen.tolist():
        name = data.class_names[guess[i]]
        titles.append(name if guess[i] == label[i] else f"{name}? {data.class_names[label[i]]}")
    sheet = torch.from_numpy(picture_of_clouds(list(clouds.numpy()), titles=titles, columns=8))
    write_image(folder / "predictions.png", sheet.permute(2, 0, 1) / 255)


def draw_importance(path: Path, pruned: Pruned) -> None:
    """Draw the parts of each channel's score, channels in the order of their sum, and where the cut is."""
    groups = [group for group in pruned.groups if group.name in pruned.scores]
    if not groups:
        return
    columns = 4
    rows = -(-len(groups) // columns)
    figure = Figure(figsize=(3.4 * columns, 2.2 * rows), dpi=90, layout="constrained")
    for axes, group in zip(figure.subplots(rows, columns, squeeze=False).flat, groups, strict=False):
        found = pruned.scores[group.name]
        order = found.total.argsort(descending=True, stable=True)
        bottom = torch.zeros(group.width, dtype=torch.float64)
        for name in ("base", "ce", "kr"):
            top = bottom + getattr(found, name)[order]
            axes.stairs(
                top.numpy(), torch.arange(group.width + 1) - 0.5, baseline=bottom.numpy(), fill=True, label=name
            )
            bottom = top
        axes.axvline(len(pruned.plan[group.name]) - 0.5, color="black", linewidth=1)
        axes.set_title(group.name.removeprefix("encoder.").replace("scales.0.", ""), fontsize=8)
        axes.tick_params(labelsize=6)
    figure.axes[0].legend(fontsize=7)
    for axes in figure.axes[len(groups) :]:
        axes.set_axis_off()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")
