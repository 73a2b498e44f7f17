"""Write the detector of a training alone, as .safetensors for `predict`, or as a graph; what guided it is left behind.

    python -m projects.lg3d.export runs/lg3d/<run>/checkpoints/best.ckpt weights.safetensors
    python -m projects.lg3d.export runs/lg3d/<run>/checkpoints/best.ckpt network.pt2

What a finished run scored, the names of its classes and how many points it saw go into the file's metadata. A graph is
for torch.export.load, after `import shared.kernels.points` for its operations; it takes xyz (B, N, 3) and features
(B, C, N) as data.py makes them, B and N free, and gives what the head says (model.py), clusters chosen as in the test.
"""

import argparse
import json
from pathlib import Path

import torch
import yaml
from torch import Tensor, nn

from shared.errors import InputError
from shared.experiment import run_or_exit
from shared.io.checkpoints import read_metadata
from shared.io.files import atomic_path

from . import data
from .checkpoints import load_published, read_network, save_network

EXAMPLES = 2


class Inference(nn.Module):
    """A detector that always proposes as in the test."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, xyz: Tensor, features: Tensor) -> dict[str, Tensor]:
        """See `VoteHead.forward`."""
        return self.net(xyz, features, "seed")


def main(arguments: list[str] | None = None) -> Path:
    """Export from the command line.

    Raises:
        InputError: the checkpoint cannot be used, or the output's suffix is unknown.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ckpt", type=Path, help="checkpoint of a run, or any file that evaluate reads")
    parser.add_argument("output", type=Path, help="file to write, .safetensors or .pt2")
    options = parser.parse_args(arguments)
    if options.output.suffix not in (".safetensors", ".pt2"):
        raise InputError(f"cannot write {options.output}: end the name with .safetensors or .pt2")
    net = load_published(options.ckpt)
    if options.output.suffix == ".safetensors":
        facts = read_training(options.ckpt)
        save_network(net, read_network(options.ckpt)[0], options.output, **facts)
    else:
        write_graph(net, options.output)
    print(f"wrote {options.output}")
    return options.output


def write_graph(net: nn.Module, path: Path) -> None:
    """Write a detector as a graph for any number of scenes, of any number of points that it can sample."""
    least = net.backbone.num_points[0]
    xyz = torch.rand(EXAMPLES, 2 * least + 1, 3)
    features = torch.rand(EXAMPLES, net.backbone.in_channels, 2 * least + 1)
    scenes, points = torch.export.Dim("scenes", min=1, max=4096), torch.export.Dim("points", min=least, max=2**24)
    shapes = [{0: scenes, 1: points}, {0: scenes, 2: points}]
    graph = torch.export.export(Inference(net), (xyz, features), dynamic_shapes=shapes, strict=False)
    with atomic_path(path, RuntimeError) as temporary:
        torch.export.save(graph, temporary)


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
            facts |= {key: json.dumps(chosen[key]) for key in ("num_points", "mode") if key in chosen}
            facts["data"] = kind
        if path.suffix == ".ckpt" and (run / "metrics.json").is_file():
            record = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
            # those of the guided branch are not the detector's
            scores = {name: value for name, value in record["metrics"].items() if "/guided_" not in name}
            facts |= {"metrics": json.dumps(scores)} | {key: json.dumps(record[key]) for key in ("seed", "config_hash")}
    except (yaml.YAMLError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"what {run} says of its run is damaged ({reason}); move {path.name} elsewhere") from error
    return facts


if __name__ == "__main__":
    run_or_exit(main)
