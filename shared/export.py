"""Write the student of a training alone, without what taught it, for a project's `predict` or for other programs.

A project's export.py is one call of `main`. The weights keep the names of the classes, mean, std, image_size and data
of the training, and its score. A graph takes images (B, 3, image_size, image_size) in [0, 1], normalises them itself
and gives logits (B, K), or probabilities.
"""

import argparse
import copy
import json
import logging
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

from shared.classify import Facts, read_facts, whose
from shared.errors import InputError
from shared.experiment import build, run_or_exit
from shared.io.checkpoints import load_strictly, read_metadata
from shared.io.classifiers import Classifiers, save_network
from shared.io.files import atomic_path
from shared.io.image_classes import normalize

__all__ = ["Classifier", "export", "load_student", "main", "write_onnx", "write_program"]

FORMATS = (".safetensors", ".onnx", ".pt2")
ANY_BATCH = ({0: torch.export.Dim("batch", min=1, max=2**16)},)


class Classifier(nn.Module):
    """A student as other programs see it: images (B, 3, H, H) in [0, 1] -> logits or probabilities (B, K).

    Args:
        net: the network, normalised images -> logits; it is left as it is, a copy has its batch norms folded.
        facts: of its training.
        softmax: give probabilities.
    """

    def __init__(self, net: nn.Module, facts: Facts, softmax: bool):
        super().__init__()
        self.net = fuse(copy.deepcopy(net).eval(), inplace=True).requires_grad_(False)
        self.softmax, self.mean, self.std = softmax, list(facts.mean), list(facts.std)

    def forward(self, images: Tensor) -> Tensor:
        """Normalise, classify."""
        logits = self.net(normalize(images, self.mean, self.std))
        return logits.softmax(1) if self.softmax else logits


def load_student(
    path: Path, project: str, classifiers: Classifiers, usual: Callable[[nn.Module], Facts]
) -> tuple[nn.Module, dict, Facts, dict[str, str]]:
    """Load the network of a checkpoint and all that is known of its training.

    Args:
        path: the checkpoint.
        project: see `shared.classify.read_facts`.
        classifiers: of the project.
        usual: see `shared.classify.read_facts`.

    Returns:
        The network in eval mode, its arguments, the facts, and the text metadata for a .safetensors file.

    Raises:
        InputError: the checkpoint or the run's data cannot be used, or the data has another number of classes.
    """
    arguments, state = classifiers.read(path)
    net = classifiers.build(arguments)
    load_strictly(net, state, path)
    run_dir = path.absolute().parent.parent
    facts = read_facts(path, net, project, usual)
    if path.suffix == ".safetensors":
        metadata = {key: value for key, value in read_metadata(path).items() if key not in ("net", "format")}
    elif facts:
        facts = run_facts(run_dir)
        metadata = facts.as_metadata() | run_scores(run_dir, path.stem)
    else:
        metadata = {}
    if facts is None:
        facts = usual(net)
        print(f"{path} does not say what it was trained on; mean and std as for {facts.image_size} x "
              f"{facts.image_size} pixels of {whose(facts)}")  # fmt: skip
    if facts.class_names and len(facts.class_names) != arguments["num_classes"]:
        count = len(facts.class_names)
        raise InputError(
            f"{path} tells {arguments['num_classes']} classes apart, but its data {facts.data} has {count}"
        )
    return net.eval(), arguments, facts, metadata


def run_facts(run_dir: Path) -> Facts:
    """Read the facts of a run off the data set that its config.yaml names.

    Raises:
        InputError: the data cannot be read.
    """
    data = build(OmegaConf.load(run_dir / "config.yaml").data, "data")
    data.setup("test")
    resize = getattr(data, "resize", None)
    return Facts(data.mean, data.std, data.image_size, resize, tuple(data.class_names), data.name)


def run_scores(run_dir: Path, which: str) -> dict[str, str]:
    """Read what a finished run scored with its weights `which` (best or last); nothing where that was not tested."""
    try:
        record = json.loads((run_dir / "metrics.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    tested = list(OmegaConf.load(run_dir / "config.yaml").tested)
    if which not in tested:
        return {}
    # scores of the first bear no ending, those of another its name
    endings = tuple(f"_{other}" for other in tested[1:])
    if which == tested[0]:
        scores = {name: value for name, value in record["metrics"].items() if not name.endswith(endings)}
    else:
        scores = {name: value for name, value in record["metrics"].items() if name.endswith(f"_{which}")}
        scores = {name.removesuffix(f"_{which}"): value for name, value in scores.items()}
    kept = {key: record[key] for key in ("seed", "config_hash", "device", "seconds")}
    return {key: json.dumps(value) for key, value in {"metrics": scores, **kept}.items()}


def write_program(classifier: Classifier, facts: Facts, metadata: dict[str, str], path: Path) -> None:
    """Write the traced network as .pt2, the metadata as its extra file `facts.json`.

    `torch.export.load(path).module()` maps images to the outputs.
    """
    images = torch.zeros(2, 3, facts.image_size, facts.image_size)
    with torch.no_grad():
        program = torch.export.export(classifier.eval(), (images,), dynamic_shapes=ANY_BATCH)
    with atomic_path(path, RuntimeError) as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the memory layout of weights
        torch.export.save(program, temporary, extra_files={"facts.json": json.dumps(metadata)})


def write_onnx(classifier: Classifier, facts: Facts, metadata: dict[str, str], path: Path) -> None:
    """Write an ONNX model of input `images` and output `logits` or `probabilities`, and its metadata.

    Raises:
        InputError: the packages for it are not installed.
    """
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    images = torch.zeros(2, 3, facts.image_size, facts.image_size)
    names = {"input_names": ["images"], "output_names": ["probabilities" if classifier.softmax else "logits"]}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                classifier.eval(), (images,), **names, dynamic_shapes=ANY_BATCH, dynamo=True, verbose=False
            )
    except ImportError as error:
        raise InputError(f"{error.name} is not installed; `pip install onnx onnxscript`") from error
    program.model.metadata_props.update(metadata)
    with atomic_path(path) as temporary:
        program.save(temporary)


def export(
    checkpoint: Path, output: Path, softmax: bool, project: str, classifiers: Classifiers,
    usual: Callable[[nn.Module], Facts],
) -> Path:  # fmt: skip
    """Write the student of a checkpoint in the format that the suffix of `output` names; return `output`.

    Args:
        checkpoint: best.ckpt of a run, or any file that holds a classifier.
        output: .safetensors, .onnx or .pt2.
        softmax: let a graph give probabilities in place of logits.
        project: see `load_student`.
        classifiers: likewise.
        usual: likewise.

    Raises:
        InputError: as `load_student`; another suffix, a softmax asked of weights alone, or a missing package.
    """
    if output.suffix not in FORMATS:
        raise InputError(f"cannot write {output}: end the name with one of {', '.join(FORMATS)}")
    if softmax and output.suffix == ".safetensors":
        raise InputError("weights alone hold no softmax; leave --softmax out, or write .onnx or .pt2")
    net, arguments, facts, metadata = load_student(checkpoint, project, classifiers, usual)
    if output.suffix == ".safetensors":
        save_network(net, arguments, output, **metadata)
    else:
        write = write_onnx if output.suffix == ".onnx" else write_program
        write(Classifier(net, facts, softmax), facts, metadata, output)
    print(f"wrote {output}")
    return output


def main(description: str, project: str, classifiers: Classifiers, usual: Callable[[nn.Module], Facts]) -> None:
    """Export from the command line; `description` is its help, the rest as for `load_student`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="best.ckpt of a run, or any file that holds a classifier")
    parser.add_argument("--output", type=Path, required=True, help="file to write, .safetensors, .onnx or .pt2")
    parser.add_argument("--softmax", action="store_true", help="let a graph give probabilities in place of logits")
    given = parser.parse_args()
    run_or_exit(export, given.checkpoint, given.output, given.softmax, project, classifiers, usual)
