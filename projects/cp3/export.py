"""Write the network of a training alone, dense or pruned, as .safetensors for `predict`, or as a graph.

    python -m projects.cp3.export runs/cp3/<run>/checkpoints/best.ckpt weights.safetensors
    python -m projects.cp3.export runs/cp3/<run>/checkpoints/best.ckpt network.pt2 [--num-points 1024]

What a finished run scored, the names of its classes and how many points it saw go into the file's metadata. A graph is
for torch.export.load, after `import shared.kernels.points` for its operations; it takes xyz (B, N, 3) and features
(B, C, N) as data.py makes them and gives logits.
"""

import argparse
import json
from pathlib import Path

import torch
import yaml

from shared.errors import InputError
from shared.experiment import run_or_exit
from shared.io.checkpoints import read_metadata
from shared.io.files import atomic_path

from . import data
from .checkpoints import load_published, read_network, save_network
from .model import Classifier

EXAMPLES = 2


def main(arguments: list[str] | None = None) -> Path:
    """Export from the command line.

    Raises:
        InputError: the checkpoint cannot be used, or the output's suffix is unknown.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ckpt", type=Path, help="checkpoint of a run, or any file that evaluate reads")
    parser.add_argument("output", type=Path, help="file to write, .safetensors or .pt2")
    parser.add_argument("--num-points", type=int, help="points of a cloud in a graph; else the run's, or 1,024")
    options = parser.parse_args(arguments)
    net = load_published(options.ckpt)
    facts = read_training(options.ckpt)
    if options.output.suffix == ".safetensors":
        save_network(net, read_network(options.ckpt)[0], options.output, **facts)
    elif options.output.suffix == ".pt2":
        num_points = int(facts.get("num_points", 1024)) if options.num_points is None else options.num_points
        # labels of points come back from three of the last level
        least = net.encoder.least_points * (1 if isinstance(net, Classifier) else 3)
        if num_points < least:
            raise InputError(f"--num-points is at least {least} for this network, not {num_points}")
        xyz = torch.rand(EXAMPLES, num_points, 3)
        features = torch.rand(EXAMPLES, net.encoder.in_channels, num_points)
        shape = [torch.zeros(EXAMPLES, dtype=torch.long)] if getattr(net, "num_shapes", 0) else []
        batch = torch.export.Dim("batch", min=1, max=4096)
        graph = torch.export.export(
            net, (xyz, features, *shape), dynamic_shapes=[{0: batch}] * (2 + len(shape)), strict=False
        )
        with atomic_path(options.output, RuntimeError) as temporary:
            torch.export.save(graph, temporary)
    else:
        raise InputError(f"cannot write {options.output}: end the name with .safetensors or .pt2")
    print(f"wrote {options.output}")
    return options.output


def read_training(path: Path) -> dict[str, str]:
    """Give what a file says of its training, as text: .safetensors itself, a .ckpt by the run that it lies in.

    Raises:
        InputError: what is said is damaged.
    """
    if path.suffix == ".safetensors":
        return {key: value for key, value in read_metadata(path).items() if key != "net"}
    run = path.absolute().parent.parent
    facts = {}
    try:
        if path.suffix == ".ckpt" and (run / "config.yaml").is_file():
            chosen = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["data"]
            kind = chosen["_target_"].rsplit(".", 1)[-1]
            if hasattr(data, kind):
                facts["class_names"] = json.dumps(getattr(data, kind).class_names)
            facts |= {key: json.dumps(chosen[key]) for key in ("num_points", "features", "level") if key in chosen}
            facts["data"] = kind
        if path.suffix == ".ckpt" and (run / "metrics.json").is_file():
            record = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
            facts |= {name: json.dumps(record[name]) for name in ("seed", "config_hash", "metrics")}
    except (yaml.YAMLError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"what {run} says of its run is damaged ({reason}); move {path.name} elsewhere") from error
    return facts


if __name__ == "__main__":
    run_or_exit(main)
