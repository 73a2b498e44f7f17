"""What a finished run is shown beside: a classical baseline, the detector without guidance; tables and pictures."""

import copy
import json
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from shared.experiment import config_hash, train
from shared.io.files import write_text
from shared.io.images import write_image
from shared.metrics.boxes import detection_scores
from shared.recorded import RUNS, find_recorded

from .clusters import find_clusters
from .data import SceneData
from .module import PointDetector
from .pictures import draw_scene

BESIDE = ("alone",)
SHOWN = 3  # scenes in the pictures
SHOWN_SCORE = 0.3  # of a box in a picture, at least


def finish(config: DictConfig, record: dict, module: PointDetector, run_dir: Path) -> None:
    """Add the baseline and what `config.beside` names; write table.md and pictures.

    The detector alone is trained here, in `<run_dir>/alone`, unless a run of this machine, one that another run trained
    for itself, or a recorded one has the same configuration.

    Args:
        config: of the finished run.
        record: of the finished run; added to.
        module: tested.
        run_dir: folder of the run.
    """
    finish_evaluation(record, module, run_dir)
    if "alone" not in config.beside or module.guidance is None:
        return
    if module.trainer.world_size > 1:
        print("nothing is trained beside several processes; say beside=[]")
        return
    found = run_alone(config, run_dir)
    record["peers"]["alone"] = {key: found["metrics"][key] for key in record["metrics"] if key in found["metrics"]}
    write_text(run_dir / "table.md", class_table(record, module.trainer.datamodule))


def finish_evaluation(record: dict, module: PointDetector, run_dir: Path) -> None:
    """Add parameters and the baseline to a run or an evaluation; write table.md and pictures."""
    data = module.trainer.datamodule
    prefix = f"test/{data.name}/"
    record["metrics"][f"{prefix}params_m"] = sum(p.numel() for p in module.net.parameters()) / 1e6
    record["baseline"] = {f"{prefix}{name}": value for name, value in baseline_scores(module).items()}
    write_text(run_dir / "table.md", class_table(record, data))
    draw_test(module, run_dir / "pictures")


def baseline_scores(module: PointDetector) -> dict[str, float]:
    """Score `find_clusters` on the scenes that the test saw, the first round of them."""
    data, head = module.trainer.datamodule, module.net.head
    scenes = [int(truth["scene"]) for truth in module.test_scenes]
    count = len(dict.fromkeys(scenes))
    source = data.batches("test")
    found = []
    for number in scenes[:count]:
        xyz = torch.from_numpy(source.batch(np.array([number]), None)["xyz"][0])
        found.append(find_clusters(xyz, head.mean_sizes, head.num_headings))
    scores = detection_scores(found, module.test_scenes[:count], data.class_names)
    return {name: value for name, value in scores.items() if name in ("map_25", "ar_25", "map_50", "ar_50")}


# --- What stands beside -----------------------------------------------------------------------------------------------


def without_guidance(config: DictConfig) -> DictConfig:
    """Give the configuration of the detector alone, with nothing beside and no logger."""
    other = copy.deepcopy(config)
    OmegaConf.set_struct(other, False)
    other.beside, other.logger, other.teacher, other.model.guidance = [], {}, None, None
    return other


def run_alone(config: DictConfig, run_dir: Path) -> dict:
    """Find or train the run of the detector alone; give its record."""
    other = without_guidance(config)
    fingerprint = config_hash(other)
    found = find_recorded("lg3d", fingerprint)
    for file in () if found else sorted((RUNS / "lg3d").glob("*/alone/metrics.json"), reverse=True):
        try:
            kept = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:  # a damaged one is no reason to lose the run that asks
            continue
        if kept.get("config_hash") == fingerprint:
            found = kept
            break
    if found is None:
        print("now the same detector without guidance, to stand beside")
        other.run_dir, other.resume = str(run_dir / "alone"), "auto"
        found = train(other)
    return found


# --- Files ------------------------------------------------------------------------------------------------------------


def class_table(record: dict, data: SceneData) -> str:
    """Write the average precisions of each class as a table, of this run and of what stands beside."""
    columns = {"this run": record["metrics"]} | record["peers"]
    heads = [f"AP@{threshold}, {name}" for threshold in ("0.25", "0.5") for name in columns]
    lines = ["| class | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for name in (*data.class_names, "mean"):
        cells = []
        for threshold in ("25", "50"):
            key = f"map_{threshold}" if name == "mean" else f"ap_{threshold}/{name}"
            values = [column.get(f"test/{data.name}/{key}") for column in columns.values()]
            cells += ["" if value is None else f"{value:.1f}" for value in values]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw_test(module: PointDetector, folder: Path) -> None:
    """Draw some scenes of the test from above and in perspective, with what is there and what was found."""
    data = module.trainer.datamodule
    source = data.batches("test")
    for i in range(min(SHOWN, len(module.test_scenes))):
        truth = module.test_scenes[i]
        xyz = source.batch(np.array([int(truth["scene"])]), None)["xyz"][0]
        found = likeliest(module.test_detections[i], SHOWN_SCORE)
        picture = draw_scene(
            xyz, truth["boxes"].numpy(), found["boxes"].numpy(), found["labels"].numpy(), found["scores"].numpy(),
            data.class_names,
        )  # fmt: skip
        write_image(folder / f"scene_{i}.png", torch.from_numpy(picture).permute(2, 0, 1) / 255)


def likeliest(found: dict[str, Tensor], min_score: float) -> dict[str, Tensor]:
    """Take of detections, which hold a box once for each class, each box once, if it scores at least so much.

    Detections come by falling score, so the first row of a box is its likeliest class.
    """
    _, first = np.unique(found["boxes"].numpy(), axis=0, return_index=True)
    first = torch.from_numpy(np.sort(first))
    first = first[found["scores"][first] >= min_score]
    return {key: value[first] for key, value in found.items()}
