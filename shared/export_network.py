"""Write the network of a training alone, as .safetensors, with what its run scored, for `predict` or another training.

A project's export.py is one call of `main`.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn

from shared.errors import InputError
from shared.io.checkpoints import load_strictly

__all__ = ["export", "main"]

Read = Callable[[Path], tuple[dict, dict[str, Tensor]]]


def export(ckpt: Path, output: Path, read: Read, build: Callable[[dict], nn.Module], save: Callable) -> Path:
    """Write a network with its arguments, and what its run's metrics.json says where there is one.

    Args:
        ckpt: checkpoint of a run.
        output: file to write, .safetensors.
        read: gives the network's arguments and tensors.
        build: makes the network of its arguments.
        save: writes (network, arguments, path, facts as keywords).

    Raises:
        InputError: the checkpoint cannot be used, or `output` does not end in .safetensors.
    """
    if output.suffix != ".safetensors":
        raise InputError(f"cannot write {output}: end the name with .safetensors")
    arguments, state = read(ckpt)
    net = build(arguments)
    load_strictly(net, state, ckpt)
    record = ckpt.absolute().parent.parent / "metrics.json"
    facts = {}
    if record.is_file():
        found = json.loads(record.read_text(encoding="utf-8"))
        facts = {name: json.dumps(found[name]) for name in ("data", "seed", "config_hash", "metrics")}
    save(net, arguments, output, **facts)
    print(f"wrote {output}")
    return output


def main(description: str, read: Read, build: Callable[[dict], nn.Module], save: Callable) -> Path:
    """Export from the command line; see `export`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ckpt", type=Path, help="checkpoint of a run")
    parser.add_argument("output", type=Path, help="file to write, .safetensors")
    options = parser.parse_args()
    return export(options.ckpt, options.output, read, build, save)
