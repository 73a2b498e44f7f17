"""What the plug-in costs a training step, part by part: `make benchmark PROJECT=sokd`.

    python -m projects.sokd.benchmark --threads 2 --rounds 5
    python -m projects.sokd.benchmark --teacher resnet14 --student resnet8 --batch 4 --output results    in seconds

First the masks of DAM are compared with masks made box by box in Python, as the published development code makes them,
and the refined features of the search with those of the step after it; if they differ no speed is printed. Then all
steps and parts take turns; medians of the turns count, and of the ratios within a turn. A step is what one of the
training does without its data: the teacher once, the student, the losses, the gradients, SGD and the next draw, on one
batch of noise; both operations of the drawn sub-policy fire in every step, which is the most that a step can cost.
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
from .dam import DAM, box_counts
from .distill import build_distiller
from .networks import build_network
from .policy import SMALLEST
from .student_oriented import StudentOriented
from .taps import TappedNetwork, Taps

FOLDER = Path(__file__).parent
NUM_CLASSES, SIDE = 100, 32
SEARCHING = "FitNet + SoKD, while searching"
STEPS = {
    "FitNet": ["plugin=none"],
    "FitNet + DAM": ["plugin=dam"],
    "FitNet + DAFA, after the search": ["plugin=dafa"],
    "FitNet + SoKD, after the search": ["plugin=sokd"],
    SEARCHING: ["plugin=sokd"],
    f"{SEARCHING}, finite differences": ["plugin=sokd", "model.distill.plugin.search.hypergrad=finite_diff"],
}
HOST, AFTER = "FitNet", "FitNet + SoKD, after the search"
UNFOLDED, TEACHER, TRAINED = f"{AFTER}, teacher not folded", "frozen teacher", "teacher as trained"
PARITY_LIMIT = 1e-4  # of the largest value of a tap
PRECISIONS = ("32-true", "bf16-mixed")


class Unfolded(nn.Module):
    """A frozen teacher as torch runs it, with its batch norms; arguments as of `fold.folded`."""

    def __init__(self, net: TappedNetwork, preact: bool):
        super().__init__()
        self.net, self.preact = net.eval().requires_grad_(False), preact

    def forward(self, images: Tensor) -> Taps:
        """See `TappedNetwork.taps`."""
        return self.net.taps(images, self.preact)


class Step:
    """A step of a training that a composed configuration describes, on one batch.

    Args:
        config: of a training, as `projects.sokd.train` takes it.
        teacher: checkpoint.
        student: name of the network.
        images: (B, 3, H, H).
        labels: (B,).
        precision: one of `PRECISIONS`.
        searching: the policy takes a step too.
    """

    def __init__(
        self, config: DictConfig, teacher: Path, student: str, images: Tensor, labels: Tensor, precision: str,
        searching: bool,
    ):  # fmt: skip
        torch.manual_seed(0)
        net = build_network({"name": student, "num_classes": NUM_CLASSES})
        self.net = net.to(images.device, memory_format=torch.channels_last).train()
        options = OmegaConf.to_container(config.model.distill, resolve=True) | {"teacher": str(teacher)}
        oriented, _ = build_distiller(net, SIDE, None, **options)
        self.oriented: StudentOriented = oriented.to(images.device)
        if self.oriented.policy is not None:
            self.oriented.policy.beta.fill_(1 - SMALLEST)
        trained = [parameter for parameter in oriented.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.SGD([*net.parameters(), *trained], **config.model.optimizer)
        self.images, self.labels = images.contiguous(memory_format=torch.channels_last), labels
        self.half, self.searching = precision == "bf16-mixed", searching

    def __call__(self) -> None:
        """Take the step."""
        with torch.autocast(self.images.device.type, torch.bfloat16, enabled=self.half):
            taught = self.oriented.teach(self.images)
            if self.searching:
                self.oriented.search(self.net, self.images, taught, self.labels)
            student = self.net.taps(self.images)
            loss = nn.functional.cross_entropy(student.logits.float(), self.labels)
            loss = loss + torch.stack(list(self.oriented(student, taught, self.labels).values())).sum()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.oriented.draw()


def parts(step: Step) -> dict[str, Callable[[], object]]:
    """Give what the plug-in adds to a step, part by part, and the masks as the development code makes them."""
    oriented = step.oriented
    taught = oriented.teach(step.images)
    feat = taught.feats[oriented.hint].float()
    with torch.no_grad():
        found = oriented.dam(feat)
        boxes = oriented.dam.areas(found)
    height, width = feat.shape[2:]

    def heads() -> None:
        both = torch.stack([part.square().mean() for x in (feat, 0.5 * feat) for part in oriented.dam(x)])
        torch.autograd.grad(both.sum(), list(oriented.dam.parameters()))

    def refine() -> None:
        oriented.policy(feat)
        oriented.draw()

    half = torch.autocast(step.images.device.type, torch.bfloat16, enabled=step.half)
    return {
        TEACHER: half(lambda: oriented.teach(step.images)),
        "refining one tap": half(refine),
        "DAM's heads on both networks, with gradients": half(heads),
        "areas": lambda: oriented.dam.areas(found),
        "masks": lambda: box_counts(boxes, height, width),
        "masks, box by box in Python": lambda: masks_in_loops(boxes, height, width),
    }


def masks_in_loops(boxes: Tensor, height: int, width: int) -> Tensor:
    """Count the boxes over each cell, one box after the other: (B, P, 4) -> (B, H, W)."""
    counts = torch.zeros(len(boxes), height, width, device=boxes.device)
    for count, areas in zip(counts, boxes, strict=True):
        for area in areas:
            left, top, right, bottom = (int(edge) for edge in area)
            count[top : bottom + 1, left : right + 1] += 1
    return counts


def check_parity(step: Step, plain: Unfolded) -> None:
    """Compare fast and plain forms.

    Args:
        step: after the search.
        plain: the teacher as trained.

    Raises:
        SystemExit: they differ.
    """
    oriented = step.oriented
    for trained, made in zip(plain(step.images).feats, oriented.teach(step.images).feats, strict=True):
        error = ((made.float() - trained).abs().max() / trained.abs().max()).item()
        if not (error < PARITY_LIMIT or step.half):
            raise SystemExit(
                f"the folded teacher differs from the teacher as trained by {error:.1e}; no speed is printed"
            )
    feat = oriented.teach(step.images).feats[oriented.hint].float()
    with torch.no_grad():
        dam: DAM = oriented.dam
        boxes = dam.areas(dam(feat))
    plain = masks_in_loops(boxes, *feat.shape[2:])
    if not torch.equal(box_counts(boxes, *feat.shape[2:]), plain):
        raise SystemExit("the masks differ from those made box by box; no speed is printed")
    for _ in range(10):
        if not torch.equal(oriented.policy(feat), oriented.policy(feat, oriented.policy.leaves()).detach()):
            raise SystemExit("refined features differ between the search and the step after it; no speed is printed")
        oriented.draw()


def table(
    arguments: argparse.Namespace, device: torch.device, times: dict[str, list[float]], share: float
) -> dict:  # fmt: skip
    """Give the plain table of a results file from the milliseconds of each turn."""
    rows = []
    for name, milliseconds in times.items():
        if name in (UNFOLDED, TRAINED):
            continue  # peers, of the headline
        kind = "step" if name in STEPS else "part"
        relative = f"{ratio(milliseconds, times[HOST]):.2f}"
        rows.append([f"{kind}, {name}", f"{statistics.median(milliseconds):.4g}", relative])
    later, searching = ratio(times[AFTER], times[HOST]), ratio(times[SEARCHING], times[HOST])
    whole = share * searching + (1 - share) * later
    return {
        "title": f"A training step, {arguments.teacher} to {arguments.student}, {NUM_CLASSES} classes, batch "
        f"{arguments.batch}, {SIDE}x{SIDE}, {arguments.precision}",
        "command": command(arguments),
        "device": device_name(device, arguments.threads),
        "date": datetime.date.today().isoformat(),
        "columns": ["what", "ms", "times FitNet"],
        "rows": rows,
        "headline": [
            headline(
                f"training step, batch {arguments.batch}", times[AFTER], "the teacher not folded", times[UNFOLDED]
            ),
            headline(
                f"inference, {arguments.teacher}, batch {arguments.batch}",
                times[TEACHER],
                "torch as trained",
                times[TRAINED],
            ),
        ],
        "note": f"Over a training that searches in {100 * share:.3g} % of its steps SoKD takes {whole:.2f} times "
        f"FitNet's time ({searching:.2f} times while it searches, {later:.2f} after); nothing of it is left when the "
        f"student is used. Medians of {arguments.rounds} turns in one run, torch {torch.__version__}, random weights.",
    }


def command(arguments: argparse.Namespace) -> str:
    """Say how to repeat the run."""
    options = {
        key: getattr(arguments, key) for key in ("threads", "rounds", "batch", "teacher", "student", "precision")
    }
    words = "".join(f" --{key} {value}" for key, value in options.items())
    return f"python -m projects.sokd.benchmark{words}"


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
        torch.manual_seed(0)
        network = {"name": arguments.teacher, "num_classes": NUM_CLASSES}
        save_network(build_network(network), network, file)
        steps = {
            name: Step(
                config := compose("train", chosen), file, arguments.student, images, labels, arguments.precision,
                "searching" in name,
            )
            for name, chosen in STEPS.items()
        }  # fmt: skip
        with patch.object(distill, "folded", Unfolded):
            steps[UNFOLDED] = Step(
                compose("train", STEPS[AFTER]), file, arguments.student, images, labels, arguments.precision, False
            )
        plain = Unfolded(load_published(file).to(device), preact=False)
    check_parity(steps[AFTER], plain)
    half = torch.autocast(device.type, torch.bfloat16, enabled=arguments.precision == "bf16-mixed")
    peer = {TRAINED: half(torch.no_grad()(lambda: plain(images)))}
    times = measure({**steps, **parts(steps[AFTER]), **peer}, device, arguments.rounds)
    result = table(arguments, device, times, config.model.search_share)
    kind = "" if arguments.precision == "32-true" else "bf16"
    return show_and_write(result, device, arguments.output, kind)


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3, help="turns of everything that is measured")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--teacher", default="resnet32x4", help="name of a network, see networks.py")
    parser.add_argument("--student", default="resnet8x4", help="name of a network")
    parser.add_argument("--precision", choices=PRECISIONS, default="32-true", help="of the steps")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:<n>")
    parser.add_argument("--output", type=Path, default=FOLDER / "results", help="folder of the results")
    run_or_exit(run, parser.parse_args())


if __name__ == "__main__":
    main()
