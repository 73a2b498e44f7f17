"""What the runs of the claims say about held-out rooms: the guided branch (claim 2), and the gain by size (claim 5).

    python -m projects.lg3d.held_out branch --output <file>    the branch that sees the labels against the student
    python -m projects.lg3d.held_out sizes --output <file>     gain of each class against its volume

The runs of experiment=claims are found by their configuration; one that is not there is trained.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from scipy.stats import spearmanr

from shared.claims import interval95
from shared.experiment import config_hash, run_or_exit, train
from shared.io.files import write_json
from shared.io.procroom import CLASSES, MEAN_SIZES
from shared.recorded import RUNS

from . import schema  # noqa: F401  (registers the configuration's types)

CONFIGS = Path(__file__).parent / "configs"
BASE = ("experiment=claims", "threads=1")
SEEDS = (0, 1, 2, 3, 4)
SMALLEST_GAIN = 1.0  # points of mAP@0.5; fixed before the run
SMALLEST_RHO = -0.3  # fixed before the run


def configured(guidance: str, seed: int) -> DictConfig:
    """Compose the configuration of an arm of the claims."""
    with initialize_config_dir(str(CONFIGS), version_base=None):
        return compose("train", overrides=[*BASE, f"guidance={guidance}", f"seed={seed}"])


def metrics_of(guidance: str, seed: int) -> dict[str, float]:
    """Find or train a run of the claims; give its metrics."""
    config = configured(guidance, seed)
    fingerprint = config_hash(config)
    for file in sorted((RUNS / "lg3d" / "claims").glob("*/seed_*/metrics.json")):
        record = json.loads(file.read_text(encoding="utf-8"))
        if record["config_hash"] == fingerprint:
            return record["metrics"]
    config.run_dir, config.resume = str(RUNS / "lg3d" / "claims" / fingerprint / f"seed_{seed}"), "auto"
    return train(config)["metrics"]


def branch(runs: list[dict[str, float]]) -> dict:
    """Compare the branch that sees the labels with the student of the same run, on the test rooms.

    Args:
        runs: metrics of guided runs, one a seed.

    Returns:
        {"passed", "values", "statement"}; reproduced if it has the lower loss and the higher mAP, each surely.
    """
    gains = [run["test/procroom/guided_map_50"] - run["test/procroom/map_50"] for run in runs]
    losses = [run["test/procroom/loss"] - run["test/procroom/guided_loss"] for run in runs]
    mean, _, low, high = interval95(gains)
    drop, _, least, most = interval95(losses)
    if low > 0 and mean >= SMALLEST_GAIN and least > 0:
        passed = True
    else:
        passed = False if high < SMALLEST_GAIN or most < 0 else None
    statement = (
        f"mAP@0.5 of the branch less the student's {mean:+.1f} points [{low:+.1f}, {high:+.1f}], "
        f"loss of the student less the branch's {drop:+.2f} [{least:+.2f}, {most:+.2f}], {len(runs)} seeds"
    )
    return {"passed": passed, "values": {"map_50": gains, "loss": losses}, "statement": statement}


def sizes(pairs: list[tuple[dict[str, float], dict[str, float]]]) -> dict:
    """Correlate the gain of each class with the volume of its mean box.

    Args:
        pairs: metrics of a guided run and of the detector alone, a pair for each seed.

    Returns:
        as `branch`; reproduced if the rank correlation is surely below 0 and at most `SMALLEST_RHO`.
    """
    volumes = MEAN_SIZES.prod(1)
    gains = np.array(
        [[pair[0][f"test/procroom/ap_50/{n}"] - pair[1][f"test/procroom/ap_50/{n}"] for n in CLASSES] for pair in pairs]
    )
    found = [float(spearmanr(row, volumes).statistic) for row in gains]
    mean, _, low, high = interval95(found)
    passed = True if high < 0 and mean <= SMALLEST_RHO else False if low > SMALLEST_RHO else None
    by_class = ", ".join(f"{name} {gain:+.1f}" for name, gain in zip(CLASSES, gains.mean(0), strict=True))
    statement = f"Spearman's rho {mean:+.2f} [{low:+.2f}, {high:+.2f}], {len(pairs)} seeds; gains of AP@0.5: {by_class}"
    return {"passed": passed, "values": {"rho": found, "gains": gains.tolist()}, "statement": statement}


def main() -> None:
    """Compare as the command line says, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("branch", "sizes"))
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    options = parser.parse_args()
    guided = [metrics_of("lg3d", seed) for seed in SEEDS]
    if options.what == "branch":
        result = branch(guided)
    else:
        result = sizes([(run, metrics_of("none", seed)) for run, seed in zip(guided, SEEDS, strict=True)])
    write_json(options.output, result)
    print(result["statement"])


if __name__ == "__main__":
    run_or_exit(main)
