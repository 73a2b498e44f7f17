"""Write the network of a training alone, as .safetensors, for `predict` or as the start of another training.

    python -m projects.fgdcn.export runs/fgdcn/<run>/checkpoints/best.ckpt weights.safetensors

What a finished run scored goes into the file's metadata.
"""

import argparse
import json
from pathlib import Path

from shared.errors import InputError
from shared.experiment import run_or_exit
from shared.io.checkpoints import load_strictly

from .checkpoints import read_network, save_network
from .model import FGDCN


def export(ckpt: Path, output: Path) -> Path:
    """Write the network with its arguments, and what its run's metrics.json says where there is one.

    Raises:
        InputError: the checkpoint cannot be used, or `output` does not end in .safetensors.
    """
    if output.suffix != ".safetensors":
        raise InputError(f"cannot write {output}: end the name with .safetensors")
    arguments, state = read_network(ckpt)
    net = FGDCN(**arguments)
    load_strictly(net, state, ckpt)
    record = ckpt.absolute().parent.parent / "metrics.json"
    facts = {}
    if record.is_file():
        found = json.loads(record.read_text(encoding="utf-8"))
        facts = {name: json.dumps(found[name]) for name in ("data", "seed", "config_hash", "metrics")}
    save_network(net, arguments, output, **facts)
    print(f"wrote {output}")
    return output


def main() -> Path:
    """Export from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ckpt", type=Path, help="checkpoint of a run")
    parser.add_argument("output", type=Path, help="file to write, .safetensors")
    options = parser.parse_args()
    return export(options.ckpt, options.output)


if __name__ == "__main__":
    run_or_exit(main)
