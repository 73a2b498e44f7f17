"""Make weights to ship from a run: `python -m projects.fssm.export --run runs/fssm/<run> --output x.safetensors`."""

import argparse
import json
from pathlib import Path

from shared.errors import InputError
from shared.experiment import run_or_exit

from .checkpoints import load_published, read_network, save_network


def export(run_dir: Path, output: Path) -> None:
    """Write the best weights of a finished run with the network's arguments and the run's scores.

    Raises:
        InputError: the run is not finished or its checkpoint cannot be used.
    """
    try:
        record = json.loads((run_dir / "metrics.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{run_dir} holds no finished run (no metrics.json)") from error
    checkpoint = run_dir / "checkpoints" / "best.ckpt"
    arguments, _ = read_network(checkpoint)
    facts = {key: json.dumps(record[key]) for key in ("metrics", "baseline", "seed", "config_hash", "device")}
    save_network(load_published(checkpoint), arguments, output, **facts)


def main() -> None:
    """Export from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="folder of a finished run")
    parser.add_argument("--output", type=Path, required=True, help=".safetensors file to write")
    arguments = parser.parse_args()
    run_or_exit(export, arguments.run, arguments.output)


if __name__ == "__main__":
    main()
