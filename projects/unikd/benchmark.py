"""Time of a training step of UniKD beside its peers, and of the frozen teacher: `make benchmark PROJECT=unikd`.

    python -m projects.unikd.benchmark --threads 2 --rounds 3
    python -m projects.unikd.benchmark --teacher resnet14 --student resnet8 --batch 4 --output results    in seconds

First the folded teacher is compared with the teacher as trained; if they differ no speed is printed. Then the steps of
all methods and all forms of the teacher take turns; medians of the turns count, and of the ratios within a turn. A step
is what one of the training does without its data: the teacher, the student, the losses, the gradients and SGD, on one
batch of noise.
Writes results/benchmark_<device>_<date>.json.
"""

import argparse
import datetime
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from shared.errors import InputError
from shared.experiment import choose_device, run_or_exit
from shared.turns import device_name, headline, measure, ratio, show_and_write

from . import distill, schema  # noqa: F401  (schema registers the configuration's types)
from .checkpoints import load_published, save_network
from .distill import Distiller
from .fold import folded
from .networks import build_network
from .taps import TappedNetwork, Taps

FOLDER = Path(__file__).parent
NUM_CLASSES, SIDE = 100, 32
EPOCH = 240  # after every warm-up
STEPS = {
    "CE alone": ["distill=alone"],
    "KD": ["distill=kd"],
    "ReviewKD": ["distill=review"],
    "UniKD": ["distill=unikd"],
    "UniKD, teacher_features=shallow": ["distill=unikd", "model.distill.methods.unikd.teacher_features=shallow"],
}
UNFOLDED = "UniKD, teacher not folded"
TRAINED, FOLDED, LAID_OUT = "as trained", "folded", "folded, channels_last"
TRAINED_HALF, HALF = f"{TRAINED}, bfloat16", f"{LAID_OUT}, bfloat16"
FORMS = (TRAINED, FOLDED, LAID_OUT, TRAINED_HALF, HALF)
PARITY_LIMIT = 1e-4  # of the largest value of a tap; in bfloat16 twice what rounding costs the teacher as trained
TARGET = 1.15  # UniKD's step in units of ReviewKD's
PRECISIONS = ("32-true", "bf16-mixed")


def make_teacher(name: str, path: Path, device: torch.device) -> TappedNetwork:
    """Write a network of random weights, whose batch norms hold the statistics of noise, and load it."""
    torch.manual_seed(0)
    arguments = {"name": name, "num_classes": NUM_CLASSES}
    net = build_network(arguments)
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        net.train()(torch.randn(16, 3, SIDE, SIDE))
    save_network(net, arguments, path)
    return load_published(path).requires_grad_(False).to(device)


def teacher_forms(net: TappedNetwork, images: Tensor) -> dict[str, Callable[[], Taps]]:
    """Give the forward pass of the teacher on (B, 3, H, H) in every form."""
    laid_out = images.contiguous(memory_format=torch.channels_last)
    plain, fast = folded(net, preact=True), folded(net, preact=True).to(memory_format=torch.channels_last)
    half = torch.autocast(images.device.type, torch.bfloat16)
    forms = {
        TRAINED: lambda: net.taps(images, preact=True),
        FOLDED: lambda: plain(images),
        LAID_OUT: lambda: fast(laid_out),
    }
    forms |= {TRAINED_HALF: half(forms[TRAINED]), HALF: half(forms[LAID_OUT])}
    return {name: torch.no_grad()(form) for name, form in forms.items()}


def training_step(
    config: DictConfig, teacher: Path, student: str, images: Tensor, labels: Tensor, precision: str
) -> Callable[[], None]:
    """Give a step of the training that a composed configuration describes, on one batch.

    Args:
        config: of a training, as `projects.unikd.train` takes it.
        teacher: checkpoint.
        student: name of the network.
        images: (B, 3, H, H).
        labels: (B,).
        precision: one of `PRECISIONS`.

    Raises:
        InputError: the method asks for what a network does not have.
    """
    torch.manual_seed(0)
    net = build_network({"name": student, "num_classes": NUM_CLASSES})
    net = net.to(images.device, memory_format=torch.channels_last).train()
    options = OmegaConf.to_container(config.model.distill, resolve=True)
    distiller = Distiller(net, SIDE, **{**options, "teacher": str(teacher)}).to(images.device)
    optimizer = torch.optim.SGD([*net.parameters(), *distiller.parameters()], **config.model.optimizer)
    images = images.contiguous(memory_format=torch.channels_last)
    batch = {"label": labels}

    def step() -> None:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16-mixed"):
            terms = distiller(distiller.taps(net, images), images, batch, EPOCH)
            loss = torch.stack(list(terms.values())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


class Unfolded(nn.Module):
    """A frozen teacher as torch runs it, with its batch norms; arguments as of `folded`."""

    def __init__(self, net: TappedNetwork, preact: bool):
        super().__init__()
        self.net, self.preact = net.eval().requires_grad_(False), preact

    def forward(self, images: Tensor) -> Taps:
        """See `TappedNetwork.taps`."""
        return self.net.taps(images, self.preact)


def check_parity(forms: dict[str, Callable[[], Taps]]) -> dict[str, float]:
    """Compare every form of the teacher with the teacher as trained.

    Returns:
        The largest difference of each form in units of the tap's largest value.

    Raises:
        SystemExit: a folded one is wrong.
    """
    rounded = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        taps = {name: form() for name, form in forms.items()}
    finally:
        torch.backends.cudnn.allow_tf32 = rounded
    found = {name: difference(taps[TRAINED], taps[name]) for name in FORMS}
    for name, limit in ((FOLDED, PARITY_LIMIT), (LAID_OUT, PARITY_LIMIT), (HALF, 2 * found[TRAINED_HALF])):
        if not found[name] < limit:
            raise SystemExit(
                f"the teacher {name} differs from the teacher as trained by {found[name]:.1e} of its values; "
                f"no speed is printed"
            )
    return found


def difference(trained: Taps, made: Taps) -> float:
    """Give the largest difference of any tap in units of the tap's largest value."""
    pairs = zip((trained.logits, *trained.feats), (made.logits, *made.feats), strict=True)
    return max(((b.float() - a).abs().max() / a.abs().max()).item() for a, b in pairs)


def table(
    arguments: argparse.Namespace, device: torch.device, times: dict[str, list[float]], parity: dict[str, float]
) -> dict:  # fmt: skip
    """Give the plain table of a results file from the milliseconds of each turn."""
    in_training = LAID_OUT if arguments.precision == "32-true" else HALF
    rows = []
    for name in STEPS:
        share = "" if name == "CE alone" else f"{100 * ratio(times[in_training], times[name]):.0f} %"
        relative = f"{ratio(times[name], times['ReviewKD']):.2f}"
        rows.append([f"step, {name}", f"{statistics.median(times[name]):.4g}", relative, share, "", ""])
    for name in FORMS:
        compared = [f"{ratio(times[TRAINED], times[name]):.2f}", f"{parity[name]:.0e}"] if name != TRAINED else ["", ""]
        rows.append([f"teacher, {name}", f"{statistics.median(times[name]):.4g}", "", "", *compared])
    return {
        "title": f"A training step, {arguments.teacher} to {arguments.student}, {NUM_CLASSES} classes, batch "
        f"{arguments.batch}, {SIDE}x{SIDE}, {arguments.precision}",
        "command": command(arguments),
        "device": device_name(device, arguments.threads),
        "date": datetime.date.today().isoformat(),
        "columns": ["what", "ms", "times ReviewKD", "frozen teacher", "speed as trained = 1", "difference"],
        "rows": rows,
        "headline": [
            headline(
                f"training step, batch {arguments.batch}", times["UniKD"], "the teacher not folded", times[UNFOLDED]
            ),
            headline(
                f"inference, {arguments.teacher}, batch {arguments.batch}",
                times[LAID_OUT],
                "torch as trained",
                times[TRAINED],
            ),
        ],
        "note": f"UniKD takes {ratio(times['UniKD'], times['ReviewKD']):.2f} times ReviewKD's step; the target is at "
        f"most {TARGET}. Medians of {arguments.rounds} turns in one run, torch {torch.__version__}, random weights. In "
        f"a step the teacher runs {in_training}; its differences are in units of the largest value.",
    }


def command(arguments: argparse.Namespace) -> str:
    """Say how to repeat the run."""
    options = {
        key: getattr(arguments, key) for key in ("threads", "rounds", "batch", "teacher", "student", "precision")
    }
    words = "".join(f" --{key} {value}" for key, value in options.items())
    return f"python -m projects.unikd.benchmark{words}"


def run(arguments: argparse.Namespace) -> Path:
    """Measure and write; return the results file."""
    for key in ("threads", "rounds", "batch"):
        if getattr(arguments, key) < 1:
            raise InputError(f"--{key} is at least 1, not {getattr(arguments, key)}")
    torch.set_num_threads(arguments.threads)
    device = choose_device(arguments.device)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(arguments.batch, 3, SIDE, SIDE, generator=generator).to(device)
    labels = torch.randint(NUM_CLASSES, (arguments.batch,), generator=generator).to(device)
    with tempfile.TemporaryDirectory() as folder, initialize_config_dir(str(FOLDER / "configs"), version_base="1.3"):
        file = Path(folder, "teacher.safetensors")
        forms = teacher_forms(make_teacher(arguments.teacher, file, device), images)
        parity = check_parity(forms)
        steps = {
            name: training_step(compose("train", chosen), file, arguments.student, images, labels, arguments.precision)
            for name, chosen in STEPS.items()
        }
        with patch.object(distill, "folded", Unfolded):
            steps[UNFOLDED] = training_step(
                compose("train", STEPS["UniKD"]), file, arguments.student, images, labels, arguments.precision
            )
    result = table(arguments, device, measure({**steps, **forms}, device, arguments.rounds), parity)
    kind = "" if arguments.precision == "32-true" else "bf16"
    return show_and_write(result, device, arguments.output, kind)


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3, help="turns of everything that is measured")
    parser.add_argument("--batch", type=int, default=16, help="pictures of a step; the papers train on 64")
    parser.add_argument("--teacher", default="resnet32x4", help="name of a network, see networks.py")
    parser.add_argument("--student", default="resnet8x4", help="name of a network")
    parser.add_argument("--precision", choices=PRECISIONS, default="32-true", help="of the steps")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:<n>")
    parser.add_argument("--output", type=Path, default=FOLDER / "results", help="folder of the results")
    run_or_exit(run, parser.parse_args())


if __name__ == "__main__":
    main()
