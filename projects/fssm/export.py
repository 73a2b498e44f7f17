"""Ship a run's best weights: `python -m projects.fssm.export --run runs/fssm/<run>` writes weights/ and its table."""

import argparse
import json
from pathlib import Path

from shared.errors import InputError
from shared.experiment import run_or_exit
from shared.io.checkpoints import read_metadata
from shared.io.files import write_json

from .checkpoints import load_published, read_network, save_network

FOLDER = Path(__file__).parent


def export(run_dir: Path, folder: Path = FOLDER) -> Path:
    """Write the best weights of a finished run with the network's arguments and the run's scores; renew the table.

    Returns:
        `folder`/weights/fmambair_x<scale>.safetensors.

    Raises:
        InputError: the run is not finished or its checkpoint cannot be used.
    """
    try:
        record = json.loads((run_dir / "metrics.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{run_dir} holds no finished run (no metrics.json)") from error
    checkpoint = run_dir / "checkpoints" / "best.ckpt"
    arguments, _ = read_network(checkpoint)
    output = folder / "weights" / f"fmambair_x{arguments['scale']}.safetensors"
    facts = {
        key: json.dumps(record[key]) for key in ("metrics", "baseline", "seed", "config_hash", "device", "seconds")
    }
    save_network(load_published(checkpoint), arguments, output, **facts)
    write_json(folder / "results" / "weights.json", table(sorted((folder / "weights").glob("*.safetensors"))))
    return output


def table(files: list[Path]) -> dict:
    """Say what shipped weights scored in the run that made them, as a table for the README."""
    rows = []
    for file in files:
        facts = {name: json.loads(value) for name, value in read_metadata(file).items()}
        ours, floor = facts["metrics"], facts["baseline"]
        scores = [
            f"{x[f'test/photographs/{m}']:.{d}f}" for x in (ours, floor) for m, d in (("psnr_y", 2), ("ssim_y", 4))
        ]
        net = facts["net"]
        rows.append([file.name, net["scale"], net["hold"], *scores, f"{facts['seconds'] / 60:.0f}", facts["device"]])
    return {
        "title": "Shipped weights on the 9 held-out photographs (PSNR and SSIM on Y)",
        "command": 'make train PROJECT=fssm ARGS="experiment=weights scale=<2, 3 or 4> threads=1"',
        "device": "",
        "date": "",
        "columns": [
            "file",
            "scale",
            "hold",
            "PSNR (dB)",
            "SSIM",
            "bicubic PSNR (dB)",
            "bicubic SSIM",
            "minutes",
            "device",
        ],
        "rows": rows,
        "note": "Scored by the run that made them, with the weights that were best on the validation photographs.",
    }


def main() -> None:
    """Export from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="folder of a finished run")
    print(f"wrote {run_or_exit(export, parser.parse_args().run)}")


if __name__ == "__main__":
    main()
