"""Ship a run's best weights, or write a network for other programs.

python -m projects.mdrn.export --run runs/mdrn/<run>                  weights/mdrn_<size>_<gray|color>.safetensors
python -m projects.mdrn.export --ckpt <file> --onnx denoiser.onnx     the folded network for ONNX runtimes
python -m projects.mdrn.export --ckpt <file> --program denoiser.pt2   the same for torch.export.load
"""

import argparse
import json
import logging
import warnings
from pathlib import Path

import torch

from shared.errors import InputError
from shared.experiment import run_or_exit
from shared.io.checkpoints import read_metadata
from shared.io.files import atomic_path, write_json

from .checkpoints import load_published, read_network, save_network
from .fold import FoldedMDRN, fold
from .inference import trained_levels
from .model import MDRN

FOLDER = Path(__file__).parent
SIZES = {(16, 2): "tiny", (32, 3): "small", (48, 4): "base", (64, 4): "wide", (64, 6): "large"}
SMALLEST_SIDE = 8  # of pictures that a written network takes


def export(run_dir: Path, name: str | None = None, folder: Path = FOLDER) -> Path:
    """Write the best weights of a finished run with the network's arguments and the run's scores; renew the table.

    Args:
        run_dir: of the run.
        name: of the file without suffix; None makes it mdrn_<size>_<gray or color>.
        folder: holds weights/ and results/.

    Returns:
        The file written.

    Raises:
        InputError: the run is not finished, its checkpoint cannot be used, or a name has to be given.
    """
    try:
        record = json.loads((run_dir / "metrics.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{run_dir} holds no finished run (no whole metrics.json)") from error
    checkpoint = run_dir / "checkpoints" / "best.ckpt"
    arguments, _ = read_network(checkpoint)
    output = folder / "weights" / f"{name or shipped_name(arguments)}.safetensors"
    facts = {"noise_levels": trained_levels(checkpoint)}
    facts |= {key: record[key] for key in ("metrics", "baseline", "seed", "config_hash", "device", "seconds")}
    net = load_published(checkpoint)
    save_network(net, arguments, output, **{key: json.dumps(value) for key, value in facts.items()})
    write_json(folder / "results" / "weights.json", table(sorted((folder / "weights").glob("*.safetensors"))))
    return output


def shipped_name(arguments: dict) -> str:
    """Name the weights of an MDRN by its size and channels."""
    size = SIZES.get((arguments.get("width"), arguments.get("num_blocks")))
    if arguments.get("name") != "mdrn" or size is None:
        raise InputError("the network is none of MDRN's sizes; say how to call its weights with --name")
    return f"mdrn_{size}_{'gray' if arguments.get('in_channels', 1) == 1 else 'color'}"


def table(files: list[Path]) -> dict:
    """Say what shipped weights scored in the run that made them, as a table for the README."""
    facts = {file.name: {key: json.loads(text) for key, text in read_metadata(file).items()} for file in files}
    # "test/photographs_25/psnr" -> 25
    scores = {
        name: {
            float(key.split("/")[1].rsplit("_", 1)[1]): (value, fact["baseline"].get(key))
            for key, value in fact["metrics"].items()
            if key.startswith("test/photographs_") and key.endswith("/psnr")
        }
        for name, fact in facts.items()
    }
    levels = sorted({level for found in scores.values() for level in found})
    rows = []
    for file in files:
        fact, found = facts[file.name], scores[file.name]
        cells = ["–" if level not in found else both(*found[level]) for level in levels]
        parameters = sum(tensor.numel() for tensor in read_network(file)[1].values())
        trained = "–".join(f"{level:g}" for level in dict.fromkeys(fact["noise_levels"]))
        rows.append([file.name, f"{parameters:,}", trained, *cells, f"{fact['seconds'] / 60:.0f}", fact["device"]])
    return {
        "title": "Shipped weights on the 9 held-out photographs: PSNR in dB, in brackets that of the noisy picture",
        "command": 'make train PROJECT=mdrn ARGS="experiment=weights model=<tiny, small> channels=<1, 3> threads=1"',
        "device": "",
        "date": "",
        "columns": ["file", "parameters", "trained on σ", *[f"σ {level:g}" for level in levels], "minutes", "device"],
        "rows": rows,
        "note": "Scored by the run that made them, with the weights that were best on the validation photographs; "
        "noise of seed 0 per picture, not clipped. The teachers are of experiment=teacher, DnCNN of experiment=dncnn.",
    }


def both(ours: float, floor: float | None) -> str:
    """Write a score and the trivial one."""
    return f"{ours:.2f}" + ("" if floor is None else f" ({floor:.2f})")


def load_folded(path: Path) -> FoldedMDRN:
    """Load an MDRN and fold it.

    Raises:
        InputError: the file cannot be read or holds another network.
    """
    net = load_published(path)
    if not isinstance(net, MDRN):
        raise InputError(f"{path} holds a {type(net).__name__}; only an MDRN can be folded and written")
    return fold(net)


def trace(net: FoldedMDRN) -> torch.export.ExportedProgram:
    """Trace for (B, C, H, W), H and W multiples of 2^L and at least `SMALLEST_SIDE`; with a noise map also (B,)."""
    step = 2**net.levels
    low = -(-SMALLEST_SIDE // step)
    batch = torch.export.Dim("batch", min=1, max=1024)
    height, width = (step * torch.export.Dim(name, min=low, max=2**20 // step) for name in ("rows", "columns"))
    noisy = torch.zeros(2, net.in_channels, 3 * SMALLEST_SIDE, 4 * SMALLEST_SIDE)
    inputs, shapes = (noisy,), ({0: batch, 2: height, 3: width},)
    if net.noise_map:
        inputs, shapes = (noisy, torch.zeros(2)), (*shapes, {0: batch})
    with torch.no_grad():
        return torch.export.export(net, inputs, dynamic_shapes=shapes)


def write_program(net: FoldedMDRN, path: Path) -> Path:
    """Write the traced network as .pt2; `torch.export.load(path).module()` maps (noisy[, noise_std]) to the picture."""
    if path.suffix != ".pt2":
        raise InputError(f"cannot write {path}: end the name of a program with .pt2")
    program = trace(net)
    with atomic_path(path, RuntimeError) as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the memory layout of weights
        torch.export.save(program, temporary)
    return path


def write_onnx(net: FoldedMDRN, path: Path) -> Path:
    """Write an ONNX model of inputs `noisy` and, with a noise map, `noise_std` (sigma/255), and output `denoised`.

    Raises:
        InputError: the packages for it are not installed, or the name does not end in .onnx.
    """
    if path.suffix != ".onnx":
        raise InputError(f"cannot write {path}: end the name of an ONNX model with .onnx")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            names = ["noisy", "noise_std"] if net.noise_map else ["noisy"]
            program = torch.onnx.export(
                trace(net), dynamo=True, input_names=names, output_names=["denoised"], verbose=False
            )
    except ImportError as error:
        raise InputError(f"{error.name} is not installed; `pip install onnx onnxscript`") from error
    with atomic_path(path) as temporary:
        program.save(temporary)
    return path


def run(arguments: argparse.Namespace) -> list[Path]:
    """Do what the command line asks for; return the files written."""
    if not arguments.run and not (arguments.ckpt and (arguments.onnx or arguments.program)):
        raise InputError("say what to export: --run <folder of a run>, or --ckpt <file> with --onnx or --program")
    written = [export(arguments.run, arguments.name)] if arguments.run else []
    source = arguments.ckpt or written[0]
    if arguments.onnx:
        written.append(write_onnx(load_folded(source), arguments.onnx))
    if arguments.program:
        written.append(write_program(load_folded(source), arguments.program))
    print(f"wrote {', '.join(map(str, written))}")
    return written


def main() -> None:
    """Export from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="folder of a finished run whose best weights to ship")
    parser.add_argument("--name", help="of the shipped file, without suffix")
    parser.add_argument("--ckpt", type=Path, help="weights to write as ONNX or program; those of --run by default")
    parser.add_argument("--onnx", type=Path, help="file to write, .onnx")
    parser.add_argument("--program", type=Path, help="file to write, .pt2")
    run_or_exit(run, parser.parse_args())


if __name__ == "__main__":
    main()
