"""What a finished run is shown beside: the same network without its reference, under the same recipe."""

import copy
import json
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from shared.experiment import config_hash, train
from shared.recorded import RUNS, find_recorded

from .module import MultiContrastRestoration

FOLDER = "without_reference"  # in that of the run


def finish(config: DictConfig, record: dict, module: MultiContrastRestoration, run_dir: Path) -> None:
    """Add the network without its reference as the peer `no_reference`.

    It is trained here, in `<run_dir>/without_reference`, unless a run of this machine, one that another run trained for
    itself, or a recorded one has the same configuration.

    Args:
        config: of the finished run.
        record: of the finished run; "peers" is added to.
        module: tested.
        run_dir: folder of the run.
    """
    if not (config.without_reference and config.model.guided):
        return
    alone = copy.deepcopy(config)
    OmegaConf.set_struct(alone, False)
    alone.model.guided = False
    alone.logger = {}  # what follows the run above is not to be mixed with it
    fingerprint = config_hash(alone)
    found = find_recorded("mccdic", fingerprint) or find_beside(fingerprint)
    if found is None:
        if module.trainer.world_size > 1:
            print("the network without reference is not trained beside several processes; say model.guided=false")
            return
        print("now the same network without its reference, to stand beside")
        alone.run_dir, alone.resume = str(run_dir / FOLDER), "auto"
        found = train(alone)
    record["peers"]["no_reference"] = {
        name: value for name, value in found["metrics"].items() if name in record["metrics"]
    }


def find_beside(fingerprint: str) -> dict | None:
    """Give the record of a network that another run of this machine trained for itself; None without one."""
    for file in sorted((RUNS / "mccdic").glob(f"*/{FOLDER}/metrics.json"), reverse=True):
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:  # a damaged one is no reason to lose the run that asks
            continue
        if record.get("config_hash") == fingerprint:
            return record
    return None
