"""How well criteria rank channels, without any fine-tuning: accuracy after pruning at several rates (claim 3), and how
stable the ranking is when other points are seen (claim 2).

    python -m projects.cp3.one_shot order --output <file>        CP3 > CHIP > l1 > random, over rates
    python -m projects.cp3.one_shot stability --output <file>    Kendall's tau with and without knowledge recycling
    python -m projects.cp3.one_shot modes --output <file>        Kendall's tau of the two coordinate-enhanced scores

All on the shipped dense network and generated scans; after pruning the batch norms' statistics are estimated anew.
"""

import argparse
import itertools
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from omegaconf import OmegaConf
from scipy.stats import kendalltau
from torch import Tensor, nn

from shared.claims import interval95
from shared.experiment import run_or_exit
from shared.io.files import write_json

from .checkpoints import load_published
from .data import ProcShape
from .groups import find_groups
from .predict import WEIGHTS
from .pruner import reestimate_norms
from .pruning import choose, prune, widths
from .scoring import Criterion, score

SCANS = Path(__file__).parent / "configs" / "data" / "procshape.yaml"
SEEDS = (0, 1, 2, 3, 4)
RATES = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3)
SMALLEST_GAIN = 1.0  # points of accuracy, mean over the rates; fixed before the run
SMALLEST_TAU = 0.01  # fixed before the run
SMALLEST_DIFFERENCE = 0.2  # of tau; fixed before the run
CALIBRATION = 48
CP3 = Criterion()
CRITERIA = {
    "cp3": CP3,
    "cp3_corr": Criterion(ce="corr"),
    "chip": Criterion(ce="none", kr="none"),
    "l1": Criterion(base="l1", ce="none", kr="none"),
    "random": Criterion(base="random", ce="none", kr="none"),
}

Clouds = tuple[Tensor, Tensor]


def order(
    net: nn.Module, calibration: Sequence[Sequence[Clouds]], test: Sequence[dict], rates: Sequence[float]
) -> dict:
    """Prune at once by each criterion and compare accuracies -> {"passed", "values", "statement"}.

    Args:
        net: dense.
        calibration: for each seed batches of clouds; also the seed of the criteria.
        test: batches to score on.
        rates: of pruning.
    """
    groups = find_groups(net, *(part[:1] for part in calibration[0][0]))
    found: dict[str, list[list[float]]] = {name: [] for name in CRITERIA}
    for seed, batches in enumerate(calibration):
        for name, criterion in CRITERIA.items():
            scores = score(net, groups, batches, replace(criterion, seed=seed))
            totals = {key: value.total for key, value in scores.items()}
            row = []
            for rate in rates:
                narrow = prune(net, groups, choose(groups, totals, widths(groups, rate)))
                reestimate_norms(narrow, batches)
                row.append(accuracy(narrow, test))
            found[name].append(row)
    means = {name: np.mean(rows, axis=0).tolist() for name, rows in found.items()}  # by rate
    each = {name: np.mean(rows, axis=1) for name, rows in found.items()}  # by seed
    gains, verdicts = {}, []
    for better, worse in (("cp3", "chip"), ("chip", "l1"), ("l1", "random")):
        mean, _, low, high = interval95((each[better] - each[worse]).tolist())
        gains[f"{better}_over_{worse}"] = [mean, low, high]
        verdicts.append(True if low > 0 and mean >= SMALLEST_GAIN else False if high < SMALLEST_GAIN else None)
    passed = True if all(verdicts) else False if False in verdicts else None
    parts = [f"{name.replace('_over_', ' over ')} {m:+.1f} [{a:+.1f}, {b:+.1f}]" for name, (m, a, b) in gains.items()]
    curves = "; ".join(f"{name} {', '.join(f'{v:.1f}' for v in values)}" for name, values in means.items())
    statement = f"points of accuracy, mean over rates {list(rates)}: {'; '.join(parts)}. Curves: {curves}"
    values = {"dense": accuracy(net, test), "rates": list(rates), **means, **gains}
    return {"passed": passed, "values": values, "statement": statement}


def stability(
    net: nn.Module, pairs: Sequence[tuple[Sequence[Clouds], Sequence[Clouds]]], ce: str = CP3.ce
) -> dict:  # fmt: skip
    """Rank channels twice on other points of the same clouds and compare the rankings -> as `order`.

    Args:
        net: dense.
        pairs: the same clouds twice, each time other points of theirs, with another first point.
        ce: form of the coordinate-enhanced score.
    """
    groups = find_groups(net, *(part[:1] for part in pairs[0][0][0]))
    with_kr, without = [], []
    for seed, pair in enumerate(pairs):
        for criterion, taus in ((Criterion(ce=ce), with_kr), (Criterion(ce=ce, kr="none"), without)):
            totals = []
            for i, clouds in enumerate(pair):
                # the draws of dropped points are other ones too
                scores = score(net, groups, clouds, replace(criterion, seed=2 * seed + i))
                totals.append({key: found.total for key, found in scores.items()})
            taus.append(agreement(*totals))
    gain = [a - b for a, b in zip(with_kr, without, strict=True)]
    mean, _, low, high = interval95(gain)
    passed = True if low > 0 and mean >= SMALLEST_TAU else False if high < SMALLEST_TAU else None
    values = {
        "tau_with_kr": statistics.mean(with_kr),
        "tau_without_kr": statistics.mean(without),
        "gain": [mean, low, high],
    }
    statement = (
        f"Kendall's tau of two rankings on other points of the same clouds, ce={ce}: {values['tau_with_kr']:.3f} with "
        f"knowledge recycling, {values['tau_without_kr']:.3f} without; gain {mean:+.3f} [{low:+.3f}, {high:+.3f}] over "
        f"{len(gain)} pairs"
    )
    return {"passed": passed, "values": values, "statement": statement}


def modes(net: nn.Module, calibration: Sequence[Sequence[Clouds]]) -> dict:
    """Compare the rankings of the two coordinate-enhanced scores, and each with the responses' size -> as `order`.

    Passed is whether released_l2 agrees with the size of the responses more than corr does: is it nearly a norm?
    """
    groups = find_groups(net, *(part[:1] for part in calibration[0][0]))
    rows = []
    for seed, batches in enumerate(calibration):
        ranked = {
            name: {
                key: value.ce if name != "norm" else value.kr
                for key, value in score(net, groups, batches, criterion).items()
            }
            for name, criterion in (
                ("corr", Criterion(base="none", ce="corr", kr="none", seed=seed)),
                ("released_l2", Criterion(base="none", ce="released_l2", kr="none", seed=seed)),
                ("norm", Criterion(base="none", ce="none", kr="norm", seed=seed)),
            )
        }
        rows.append([agreement(ranked[a], ranked[b]) for a, b in itertools.combinations(ranked, 2)])
    between, corr_norm, released_norm = np.mean(rows, axis=0).tolist()
    mean, _, low, high = interval95([row[2] - row[1] for row in rows])
    values = {"corr_and_released": between, "corr_and_norm": corr_norm, "released_and_norm": released_norm}
    statement = (
        f"Kendall's tau: corr with released_l2 {between:+.2f}; with the norm of the responses around dropped points "
        f"{corr_norm:+.2f} (corr) and {released_norm:+.2f} (released_l2); difference {mean:+.2f} "
        f"[{low:+.2f}, {high:+.2f}]"
    )
    passed = True if low > 0 and mean >= SMALLEST_DIFFERENCE else False if high < SMALLEST_DIFFERENCE else None
    return {"passed": passed, "values": values | {"difference": [mean, low, high]}, "statement": statement}


def agreement(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    """Give Kendall's tau of two scorings, mean over the layers that both score."""
    names = [name for name in first if first[name].any() and second[name].any()]
    return statistics.mean(float(kendalltau(first[name].numpy(), second[name].numpy()).statistic) for name in names)


@torch.inference_mode()
def accuracy(net: nn.Module, batches: Sequence[dict]) -> float:
    """Give the overall accuracy in percent."""
    net.eval()
    hits = [net(batch["xyz"], batch["features"]).argmax(1) == batch["label"] for batch in batches]
    return 100 * float(torch.cat(hits).float().mean())


def scans(num_train: int, num_test: int, cache_dir: str) -> ProcShape:
    """Give the scans of the default run."""
    difficulty = OmegaConf.to_container(OmegaConf.load(SCANS).difficulty)
    return ProcShape(
        level="hard", num_train=num_train, num_validation=1, num_test=num_test, stored_points=1024, data_seed=0,
        difficulty=difficulty, num_points=256, features="xyz_height", resample="random", test_points="furthest",
        batch_size=8, seed=0, augment={"center": "unit_sphere"}, cache_dir=cache_dir, test_batch_size=50,
    )  # fmt: skip


def views(data: ProcShape, seed: int, count: int = CALIBRATION) -> list[Clouds]:
    """Draw calibration clouds of the training set, random points of each in random order, in batches of 8."""
    loader = data.train_dataloader()
    loader.dataset.seed = seed
    found = itertools.islice((loader.dataset[step] for step in range(len(loader.dataset))), count // 8)
    return [(batch["xyz"], batch["features"]) for batch in found]


def two_views(data: ProcShape, seed: int, count: int = CALIBRATION) -> tuple[list[Clouds], list[Clouds]]:
    """Draw the same clouds twice, each time other random points of theirs."""
    source = data.train_dataloader().dataset.source
    rng = np.random.default_rng(seed)
    index = rng.permutation(len(source.xyz))[:count]
    both = []
    for _ in range(2):
        batches = [source.batch(index[i : i + 8], rng) for i in range(0, count, 8)]
        both.append([(torch.from_numpy(b["xyz"]), torch.from_numpy(b["features"])) for b in batches])
    return both[0], both[1]


def main() -> None:
    """Measure as the command line says, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("order", "stability", "modes"))
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--ckpt", type=Path, default=WEIGHTS / "pointnext_tiny_hard.safetensors", help="dense weights")
    parser.add_argument("--num-test", type=int, default=750)
    parser.add_argument("--cache-dir", default="runs/cp3/cache")
    options = parser.parse_args()
    torch.set_num_threads(1)
    net = load_published(options.ckpt)
    data = scans(1600, options.num_test, options.cache_dir)
    if options.what == "stability":
        pairs = [two_views(data, seed) for seed in SEEDS]
        result, other = stability(net, pairs), stability(net, pairs, "corr")
        result["values"]["corr"] = other["values"]
        result["statement"] += f". {other['statement']}"
    else:
        calibration = [views(data, seed) for seed in SEEDS]
        if options.what == "modes":
            result = modes(net, calibration)
        else:
            result = order(net, calibration, list(data.test_dataloader()), RATES)
    write_json(options.output, result)
    print(result["statement"])


if __name__ == "__main__":
    run_or_exit(main)
