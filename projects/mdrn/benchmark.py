"""Quality against speed on a processor, MDRN beside its peers, in one run: `make benchmark PROJECT=mdrn`.

    python -m projects.mdrn.benchmark --threads 2 [--ffdnet FILE]
    python -m projects.mdrn.benchmark --quick --output /tmp/results     a small picture, few turns: does it run?

First the folded networks, in torch and in ONNX Runtime, are compared with the trained ones; if they differ no speed is
printed. Then all methods take turns on one gray picture, and the median of their turns counts; PSNR is that of the
held-out photographs. Writes results/benchmark_cpu-<cpu>_<date>.json and results/pictures/frontier.png.
"""

import argparse
import copy
import dataclasses
import datetime
import importlib.util
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from shared.experiment import cpu_name, run_or_exit
from shared.io.files import atomic_path, write_json
from shared.io.packed import rgb_to_gray
from shared.io.photographs import load_photographs
from shared.io.sampling import to_tensor
from shared.metrics import psnr
from shared.turns import headline, measure

from .baselines import DnCNN, FFDNet
from .checkpoints import load_published
from .classic import PEERS
from .export import write_onnx
from .fold import FoldedMDRN, fold
from .inference import SIZES, shipped_weights
from .loss import reconstruction_loss
from .model import MDRN
from .noise import protocol_noise

FOLDER = Path(__file__).parent
DNCNN = FOLDER / "weights" / "dncnn_gray.safetensors"
LEVELS = (25, 50)
PARITY_LIMIT = 1e-5
SLOW_TURNS = 1  # of classical methods, which take many seconds and compile nothing
BASE = {"width": 48, "num_blocks": 4, "attention": "none", "noise_map": True}
CLASSICAL = {"non_local_means": "non-local means", "wavelet_shrinkage": "wavelet shrinkage", "bm3d": "BM3D"}
Denoiser = Callable[[Tensor, float], Tensor]


@dataclasses.dataclass
class Method:
    """What is measured.

    Attributes:
        name: of the method and its weights.
        form: how it is run.
        run: (1, H, W) and the noise's standard deviation on [0, 1] -> (1, H, W), not clamped.
        parameters: of the network; None for a classical method.
        scored: whether its PSNR means something.
        seconds: of its turns.
        scores: PSNR in dB for each of `LEVELS`.
    """

    name: str
    form: str
    run: Denoiser
    parameters: int | None = None
    scored: bool = True
    seconds: list[float] = dataclasses.field(default_factory=list)
    scores: list[float] = dataclasses.field(default_factory=list)


def in_torch(net: nn.Module, memory_format: torch.memory_format = torch.channels_last) -> Denoiser:
    """Make a function of a network in eval mode."""
    net = net.eval().requires_grad_(False).to(memory_format=memory_format)

    def run(noisy: Tensor, noise_std: float) -> Tensor:
        with torch.inference_mode():
            return net(noisy[None].contiguous(memory_format=memory_format), torch.tensor([noise_std]))[0]

    return run


def in_onnx_runtime(net: FoldedMDRN, threads: int) -> Denoiser:
    """Make a function of a folded network run by ONNX Runtime; sides are multiples of 2^L."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    with tempfile.TemporaryDirectory() as folder:
        model = write_onnx(net, Path(folder, "net.onnx")).read_bytes()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def run(noisy: Tensor, noise_std: float) -> Tensor:
        given = {"noisy": noisy[None].numpy(), "noise_std": np.array([noise_std], np.float32)}
        return torch.from_numpy(session.run(None, given)[0][0])

    return run


def all_methods(threads: int, dncnn: Path | None, ffdnet: Path | None, noisy: Tensor) -> list[Method]:
    """Build everything that is measured, in the order of the table; the forms of one network follow one another."""
    nets = [(f"MDRN {size}", load_published(shipped_weights(size, 1)), True) for size in SIZES]
    torch.manual_seed(0)
    nets.append(("MDRN base", MDRN(**BASE), False))
    methods = []
    for name, net, trained in nets:
        folded, count = fold(net), number_of_parameters(net)
        methods.append(Method(name, "as trained", faster_format(net, noisy), count, trained))
        methods.append(Method(name, "folded", in_torch(folded), count, trained))
        if trained and importlib.util.find_spec("onnxruntime"):
            methods.append(Method(name, "folded, ONNX Runtime", in_onnx_runtime(folded, threads), count))
    for name, net, file in (("DnCNN-17", DnCNN(), dncnn), ("FFDNet", FFDNet(), ffdnet)):
        net = load_published(file) if file else net
        run = faster_format(net, noisy)
        methods.append(Method(name, "as trained", run, number_of_parameters(net), file is not None))
    methods += [Method(CLASSICAL.get(name, name), "classical", run) for name, run in PEERS.items()]
    return methods


def number_of_parameters(net: nn.Module) -> int:
    """Count what a network has learnt."""
    return sum(parameter.numel() for parameter in net.parameters())


def faster_format(net: nn.Module, noisy: Tensor) -> Denoiser:
    """Run a network in the memory format in which it is faster here."""
    best = None
    for memory_format in (torch.contiguous_format, torch.channels_last):
        run = in_torch(net, memory_format)
        taken = min(seconds(run, noisy) for _ in range(3))
        if best is None or taken < best[0]:
            best = taken, memory_format
    return in_torch(net, best[1])


def check_parity(methods: list[Method], noisy: Tensor) -> float:
    """Compare every form of a network with the network as trained.

    Returns:
        The largest difference.

    Raises:
        SystemExit: one of them is wrong.
    """
    worst = 0.0
    for method in methods:
        trained = next(other for other in methods if other.name == method.name)
        if trained is method:
            continue
        for level in LEVELS:
            error = (method.run(noisy, level / 255) - trained.run(noisy, level / 255)).abs().max().item()
            if not error < PARITY_LIMIT:
                raise SystemExit(
                    f"{method.name} {method.form} differs from the trained form by {error:.1e}; no speed is printed"
                )
            worst = max(worst, error)
    return worst


def seconds(run: Denoiser, noisy: Tensor) -> float:
    """Time one call at noise level 25."""
    start = time.perf_counter()
    run(noisy, 25 / 255)
    return time.perf_counter() - start


def measure_speed(methods: list[Method], noisy: Tensor, rounds: int) -> None:
    """Let all methods take turns, networks after one call each that does not count."""
    for method in methods:
        if method.form != "classical":
            seconds(method.run, noisy)
    for turn in track(range(rounds), description="speed"):
        for method in methods:
            if turn < SLOW_TURNS or method.form != "classical":
                method.seconds.append(seconds(method.run, noisy))


def measure_quality(methods: list[Method], pictures: list[Tensor]) -> None:
    """Score what is trained on (1, H, W) pictures, once for all forms of a network."""
    scored = {method.name: method for method in reversed(methods) if method.scored and "ONNX" not in method.form}
    for method in track(list(scored.values()), description="quality"):
        for level in LEVELS:
            values = []
            for clean in pictures:
                made = method.run(protocol_noise(clean[None], level)[0], level / 255)
                values.append(psnr(made[None].float(), clean[None], crop_border=0, channel="gray").item())
            method.scores.append(statistics.fmean(values))
    for method in methods:
        method.scores = scored[method.name].scores if method.scored else []


def held_out(quick: bool) -> list[Tensor]:
    """Give the held-out photographs in gray, (1, H, W); quick: a part of two."""
    pictures = [to_tensor(rgb_to_gray(photograph.pixels)) for photograph in load_photographs("test")]
    return [picture[:, :64, :64] for picture in pictures[:2]] if quick else pictures


def square(pictures: list[Tensor], side: int) -> Tensor:
    """Give a clean (1, side, side), the largest photograph mirrored on until it is large enough."""
    picture = max(pictures, key=Tensor.numel)
    while min(picture.shape[1:]) < side:
        picture = torch.cat([picture, picture.flip(1)], 1)
        picture = torch.cat([picture, picture.flip(2)], 2)
    return picture[:, :side, :side].contiguous()


def training_times(crop: int, rounds: int) -> dict:
    """Time a forward and backward pass of the small network on 8 crops, as we train and in torch's own memory layout.

    Raises:
        SystemExit: their gradients differ.
    """
    ours = load_published(shipped_weights("tiny", 1)).train()
    plain = copy.deepcopy(ours)
    ours.to(memory_format=torch.channels_last)
    clean = torch.rand(8, 1, crop, crop, generator=torch.Generator().manual_seed(0))
    noisy, noise_std = protocol_noise(clean, 25), torch.full((8,), 25 / 255)

    def step(net: nn.Module) -> Tensor:
        loss = reconstruction_loss(net(noisy, noise_std), clean)
        return torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, list(net.parameters()))])

    found, expected = step(ours), step(plain)
    error = ((found - expected).abs().max() / expected.abs().max()).item()
    if not error < 1e-3:
        raise SystemExit(f"gradients in the two memory layouts differ by {error:.1e}; no speed is printed")
    times = measure({"ours": lambda: step(ours), "plain": lambda: step(plain)}, torch.device("cpu"), rounds)
    return headline(f"training step, tiny, 8 of {crop}x{crop}", times["ours"], "torch's own layout", times["plain"])


def inference_times(methods: list[Method], side: int) -> list[dict]:
    """Give what the table of all speeds says of folded networks: beside torch as trained, and ONNX Runtime."""
    lines = []
    for method in (method for method in methods if method.form == "folded"):
        for peer in (peer for peer in methods if peer.name == method.name and peer is not method):
            ours, theirs = ([1e3 * value for value in turns] for turns in (method.seconds, peer.seconds))
            lines.append(headline(f"inference, {method.name}, {side}x{side}", ours, peer.form, theirs))
    return lines


def table(methods: list[Method], side: int, threads: int, rounds: int, worst: float, command: str) -> dict:
    """Give the plain table of a results file."""
    rows = []
    for method in methods:
        trained = next(other for other in methods if other.name == method.name)
        speed = side**2 / 1e6 / statistics.median(method.seconds)
        gain = statistics.median(trained.seconds) / statistics.median(method.seconds)
        count = "" if method.parameters is None else f"{method.parameters:,}"
        gain = f"{gain:.2f}" if method is not trained else ""
        scores = [round(score, 2) for score in method.scores] or [""] * len(LEVELS)
        rows.append([method.name, method.form, count, f"{speed:.3g}", gain, *scores])
    return {
        "title": "PSNR on the 9 held-out photographs, gray, against speed",
        "command": command,
        "device": f"{cpu_name()}, {threads} threads",
        "date": datetime.date.today().isoformat(),
        "columns": ["method", "form", "parameters", "megapixels/s", "times as trained"]
        + [f"σ {x} (dB)" for x in LEVELS],
        "rows": rows,
        "note": f"Speed on one {side}x{side} picture, float32, median of {rounds} turns (classical methods "
        f"{min(rounds, SLOW_TURNS)}); networks as trained run in torch {torch.__version__}, in whichever memory format "
        f"is faster. Folded networks differ from them by at most {worst:.0e}. No PSNR: weights not trained.",
    }


def draw(methods: list[Method], side: int, path: Path) -> None:
    """Draw PSNR against speed, one panel a noise level."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = list(dict.fromkeys(method.name for method in methods if method.scores))
    markers = dict(zip(("as trained", "folded", "folded, ONNX Runtime", "classical"), "osD^", strict=True))
    figure, axes = plt.subplots(1, len(LEVELS), figsize=(5.5 * len(LEVELS), 4), layout="constrained")
    for i, (axis, level) in enumerate(zip(axes, LEVELS, strict=True)):
        for color, name in enumerate(names):
            forms = [method for method in methods if method.name == name]
            speeds = [side**2 / 1e6 / statistics.median(method.seconds) for method in forms]
            axis.plot(speeds, [forms[0].scores[i]] * len(forms), color=f"C{color}", linewidth=1)
            for speed, method in zip(speeds, forms, strict=True):
                axis.plot(speed, method.scores[i], markers[method.form], color=f"C{color}")
            middle = statistics.geometric_mean(speeds), forms[0].scores[i]
            axis.annotate(name, middle, xytext=(0, 6), textcoords="offset points", ha="center", fontsize=8)
        axis.set(xscale="log", xlabel="megapixels per second", ylabel="PSNR (dB)", title=f"σ {level}")
        axis.margins(0.15)
        axis.grid(alpha=0.3)
    handles = [plt.Line2D([], [], marker=m, linestyle="", color="gray", label=form) for form, m in markers.items()]
    axes[0].legend(handles=handles, fontsize=7, loc="lower right")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120)
    plt.close(figure)


def run(arguments: argparse.Namespace) -> Path:
    """Measure and write; return the results file."""
    torch.set_num_threads(arguments.threads)
    side, rounds = (64, 2) if arguments.quick else (512, arguments.rounds)
    pictures = held_out(arguments.quick)
    noisy = protocol_noise(square(pictures, side)[None], 25)[0]
    methods = all_methods(arguments.threads, arguments.dncnn, arguments.ffdnet, noisy)
    worst = check_parity(methods, noisy)
    measure_speed(methods, noisy, rounds)
    measure_quality(methods, pictures)
    given = {"dncnn": arguments.dncnn, "ffdnet": arguments.ffdnet}
    options = "".join(f" --{name} {file}" for name, file in given.items() if file not in (None, DNCNN))
    command = f"python -m projects.mdrn.benchmark --threads {arguments.threads} --rounds {rounds}{options}"
    result = table(methods, side, arguments.threads, rounds, worst, command)
    training = training_times(16 if arguments.quick else 64, rounds)
    result["headline"] = [training, *inference_times(methods, side)]
    shown = Table(title=f"{result['title']}; {result['device']}")
    for column in result["columns"]:
        shown.add_column(column)
    for row in result["rows"]:
        shown.add_row(*map(str, row))
    Console(width=120).print(shown)
    slug = re.sub(r"[^a-z0-9]+", "-", f"cpu {cpu_name()}".lower()).strip("-")
    path = arguments.output / f"benchmark_{slug}_{result['date']}.json"
    write_json(path, result)
    draw(methods, side, arguments.output / "pictures" / "frontier.png")
    print(f"wrote {path}")
    return path


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9, help="turns of every network")
    parser.add_argument("--dncnn", type=Path, default=DNCNN, help="trained weights (default: the shipped ones)")
    parser.add_argument("--ffdnet", type=Path, help="trained weights; without them only the speed is measured")
    parser.add_argument("--quick", action="store_true", help="a small picture and two turns, to see that it runs")
    parser.add_argument("--output", type=Path, default=FOLDER / "results", help="folder of the results")
    run_or_exit(run, parser.parse_args())


if __name__ == "__main__":
    main()
