"""Speed of VoteNet by stage, and of its training alone and guided: `make benchmark PROJECT=lg3d`.

    python -m projects.lg3d.benchmark --threads 2 --rounds 3
    python -m projects.lg3d.benchmark --networks votenet_smoke --points 300 --batch 2 --boxes 100 --output results

On generated rooms, with our kernels and with the reference ones, which take turns: sampling and neighbours, features of
the seeds, votes and head, decoding and suppression, all of these; a step of training without guidance and with it,
update excluded. Then the intersection over union of oriented boxes, all with all. First every stage is compared; if two
forms differ no speed is printed. Writes results/benchmark_<device>_<date>.json.
"""

import argparse
import datetime
import math
import os
import statistics
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from torch import Tensor, nn

from shared.errors import InputError
from shared.experiment import build, choose_device, run_or_exit
from shared.io.procroom import generate
from shared.metrics.boxes import axis_aligned_iou_3d, envelopes, iou_3d
from shared.turns import device_name, headline, measure, ratio, show_and_write

from . import schema  # noqa: F401  (registers the configuration's types)
from .data import Augmentation, Labelled, SceneBatches
from .detection import detect
from .model import Geometry, Seeds
from .module import PointDetector

FOLDER = Path(__file__).parent
SIZES = {"votenet_tiny": (4096, 8), "votenet": (20000, 2)}  # points of a scene and scenes of a batch
DECODING, ALL = "decoding and suppression", "all of it"
STAGES = ("sampling and neighbours", "features of the seeds", "votes and head", DECODING, ALL)
UNCOMPARED = (DECODING, ALL)  # the one calls no kernel, the other is made of what is compared
STEPS = {"training step alone": "none", "training step guided": "lg3d"}
OURS, REFERENCE = "ours", "plain torch kernels"
RATIO = "ratio"
PARITY_LIMIT = 1e-4  # of the largest value; places must be equal


@contextmanager
def kernels(form: str) -> Iterator[None]:
    """Let the point operations run on the kernels of a form."""
    before = os.environ.pop("TENFOLD_KERNELS", None)
    if form == REFERENCE:
        os.environ["TENFOLD_KERNELS"] = "reference"
    try:
        yield
    finally:
        os.environ.pop("TENFOLD_KERNELS", None)
        if before is not None:
            os.environ["TENFOLD_KERNELS"] = before


def make_module(name: str, guidance: str) -> PointDetector:
    """Build a network of configs/model with a form of guidance of configs/guidance, the same random weights each time.

    Raises:
        InputError: there is no such network.
    """
    known = sorted(path.stem for path in (FOLDER / "configs" / "model").glob("votenet*.yaml"))
    if name not in known:
        raise InputError(f"unknown network {name!r}; choose of {', '.join(known)}")
    with initialize_config_dir(str(FOLDER / "configs"), version_base="1.3"):
        config = compose("train", overrides=[f"model={name}", "head=sunrgbd", f"guidance={guidance}"])
    torch.manual_seed(0)
    return build(config.model, "model")


def make_batch(num_scenes: int, num_points: int, device: torch.device) -> dict[str, Tensor]:
    """Generate labelled rooms as data.py gives them."""
    rooms = generate(num_scenes, "sun", num_points, 0, "test")

    def read(i: int) -> Labelled:
        is_box = rooms["labels"][i] >= 0
        return Labelled(rooms["points"][i], rooms["boxes"][i][is_box], rooms["labels"][i][is_box])

    source = SceneBatches(read, num_scenes, num_points, Augmentation(), False, 0)
    batch = source.batch(np.arange(num_scenes), None)
    return {key: torch.from_numpy(value).to(device) for key, value in batch.items()}


def stages(net: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Callable[[], object]]:
    """Give the stages of a detector in eval mode, each on what the stage before gave once."""
    xyz, features = batch["xyz"], batch["features"]
    net.eval()
    geometry = net.backbone.geometry(xyz)
    with torch.inference_mode():
        seeds = net.backbone(features, geometry)
        outputs = net.head(seeds, "seed")
    calls = (
        lambda: net.backbone.geometry(xyz),
        lambda: net.backbone(features, geometry),
        lambda: net.head(seeds, "seed"),
        lambda: detect(outputs, xyz, net.head.coder),
        lambda: detect(net(xyz, features, "seed"), xyz, net.head.coder),
    )
    return {name: torch.inference_mode()(call) for name, call in zip(STAGES, calls, strict=True)}


def training_step(module: PointDetector, batch: Mapping[str, Tensor]) -> Callable[[], Tensor]:
    """Give a forward and backward pass in training mode, whose result is the loss."""

    def run() -> Tensor:
        module.zero_grad(set_to_none=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # no trainer keeps its logs
            loss = module.training_step(batch, 0)
        loss.backward()
        return loss.detach()

    module.train()
    return run


def runner(call: Callable[[], object], form: str) -> Callable[[], object]:
    """Give a call on the kernels of a form."""

    def run() -> object:
        with kernels(form):
            return call()

    return run


def tensors(found: object) -> list[Tensor]:
    """List the tensors of what a stage gives."""
    if isinstance(found, Tensor):
        return [found]
    if isinstance(found, (Geometry, Seeds)):
        found = vars(found)
    if isinstance(found, Mapping):
        found = list(found.values())
    return [value for part in found for value in tensors(part)]


def difference(found: object, expected: object) -> float:
    """Give the largest difference, as a share of a tensor's largest value.

    Infinite where places or shapes differ, or a number is none.
    """
    shares = [0.0]
    for one, other in zip(tensors(found), tensors(expected), strict=True):
        if one.shape != other.shape or (not one.is_floating_point() and not torch.equal(one, other)):
            return math.inf
        if one.is_floating_point() and one.numel():
            share = float((one - other).abs().max() / other.abs().max().clamp(min=1e-6))
            shares.append(math.inf if math.isnan(share) else share)
    return max(shares)


def check_parity(calls: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Compare what each call gives with our kernels and with the reference ones.

    Raises:
        InputError: they differ.
    """
    found = {name: difference(runner(call, OURS)(), runner(call, REFERENCE)()) for name, call in calls.items()}
    for name, value in found.items():
        if not value <= PARITY_LIMIT:
            raise InputError(f"{name} differs by {value:.1e}, above {PARITY_LIMIT:.0e}: no speed is measured")
    return found


def make_boxes(count: int, device: torch.device) -> Tensor:
    """Draw boxes (count, 7) of a large hall, many of which overlap."""
    random = torch.rand(count, 7, generator=torch.Generator().manual_seed(0))
    low = torch.tensor([0, 0, 0, 0.3, 0.3, 0.3, -math.pi])
    high = torch.tensor([10, 10, 2, 2, 2, 2, math.pi])
    return (low + (high - low) * random).to(device)


def check_iou(device: torch.device) -> float:
    """Compare the IoU of boxes turned by quarters with that of their hulls, which they fill.

    Raises:
        InputError: they differ.
    """
    boxes = make_boxes(100, device)
    boxes[:, 6] = (torch.arange(100, device=device) % 4 - 1) * (math.pi / 2)
    hulls = envelopes(boxes)
    value = float((iou_3d(boxes, boxes) - axis_aligned_iou_3d(hulls, hulls)).abs().max())
    if not value <= PARITY_LIMIT:
        raise InputError(f"iou_3d differs by {value:.1e}, above {PARITY_LIMIT:.0e}: no speed is measured")
    return value


def said(value: float) -> str:
    """Give a speed in three digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def main(arguments: list[str] | None = None) -> Path:
    """Measure as the command line says, print and write the result.

    Raises:
        InputError: a number that nothing can be measured with, an unknown network, or forms that differ.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(SIZES), help="of configs/model")
    parser.add_argument("--points", type=int, help="of a scene; else 4,096 of votenet_tiny, 20,000 of votenet")
    parser.add_argument("--batch", type=int, help="scenes of a call; else 8 and 2")
    parser.add_argument("--boxes", type=int, default=5000, help="of the intersection over union, on both sides")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path, default=FOLDER / "results")
    options = parser.parse_args(arguments)
    given = [value for value in (options.points, options.batch) if value is not None]
    if min(options.boxes, options.rounds, options.threads, *given) < 1:
        raise InputError("points, batch, boxes, rounds and threads are at least 1")
    torch.set_num_threads(options.threads)
    device = choose_device(options.device)
    parity, setups = {"iou_3d": check_iou(device)}, {}
    for name in options.networks:
        usual = SIZES.get(name, SIZES["votenet_tiny"])
        num_points, num_scenes = options.points or usual[0], options.batch or usual[1]
        title = f"{name}, {num_points:,} points"
        batch = make_batch(num_scenes, num_points, device)
        calls = stages(make_module(name, "none").net.to(device), batch)
        for step, guidance in STEPS.items():
            calls[step] = training_step(make_module(name, guidance).to(device), batch)
        parity |= check_parity({f"{title}: {what}": call for what, call in calls.items() if what not in UNCOMPARED})
        setups[title] = num_scenes, calls
    rows, headlines, values = [], [], {"parity": parity}
    for title, (num_scenes, calls) in setups.items():
        runs = {}
        for what, call in calls.items():
            for form in (OURS,) if what == DECODING else (OURS, REFERENCE):
                runs[what, form] = runner(call, form)
        times = measure(runs, device, options.rounds)
        for what in calls:
            ours, reference = times[what, OURS], times.get((what, REFERENCE))
            speeds = {OURS: 1e3 * num_scenes / statistics.median(ours)}
            if reference is not None:
                speeds |= {REFERENCE: 1e3 * num_scenes / statistics.median(reference), RATIO: ratio(reference, ours)}
            cells = [said(speeds[key]) if key in speeds else "" for key in (OURS, REFERENCE, RATIO)]
            rows.append([f"{title}: {what}", *cells])
            values[f"{title}: {what}"] = speeds
            if what == ALL or what in STEPS:
                words = f"{'inference' if what == ALL else what}, {num_scenes} scenes, {title}"
                headlines.append(headline(words, ours, REFERENCE, reference))
    boxes = make_boxes(options.boxes, device)
    (times,) = measure({"iou_3d": lambda: iou_3d(boxes, boxes)}, device, options.rounds).values()
    values["iou_3d"] = {"milliseconds": statistics.median(times), "pairs": options.boxes**2}
    note = (
        f"Scenes per second, medians of {options.rounds} turns; ratios within a turn. IoU of {options.boxes:,} x "
        f"{options.boxes:,} oriented boxes: {statistics.median(times):.0f} ms."
    )
    result = {
        "title": "VoteNet and its training on generated rooms, scenes per second",
        "columns": ["what", OURS, REFERENCE, RATIO],
        "rows": rows,
        "headline": headlines,
        "note": note,
        "device": device_name(device, options.threads),
        "date": datetime.date.today().isoformat(),
        "command": f'make benchmark PROJECT=lg3d ARGS="--threads {options.threads}"',
        "values": values,
    }
    return show_and_write(result, device, options.output)


if __name__ == "__main__":
    run_or_exit(main)
