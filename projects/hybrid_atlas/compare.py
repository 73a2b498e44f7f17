"""What a finished training is for: an atlas built with the prior, beside the iterative one without it."""

import csv
import io
import math
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from rich.progress import Progress
from torch import Tensor

from shared.errors import InputError
from shared.experiment import config_hash
from shared.io.files import write_text
from shared.io.images import picture_grid, write_image

from .assess import COLUMNS, assess, image_scores, vote
from .atlas import Atlas, AtlasBuilder, AtlasOptions
from .cohort import Cohort
from .deformation import Deformation, build_deformation
from .engine import Single
from .loss import energies
from .module import RegistrationPrior, middle
from .priors import Prior
from .workspace import Workspace

CLASSICAL = {
    "coarse_iterations": 0, "iterations": 100, "refine": 1, "final_iterations": 0, "tolerance": 0.0,
    "optimizer": "gd", "update": "splat",
}  # fmt: skip
COSTS = ("iterations", "change", "seconds", "seconds_per_iteration")
MARGIN = 1.05  # of the classical method's energy after 100 iterations
# what stands in the table: the rest is in subjects.csv and history.csv
SHOWN = (
    "atlas_psnr", "atlas_ssim", "sharpness", "energy", "psnr", "dice", "bridge_dice", "folding", "folding_cells",
)  # fmt: skip


def finish(config: DictConfig, record: dict, module: RegistrationPrior, run_dir: Path) -> None:
    """Build the atlas with the trained prior, and beside it as the configuration says.

    Adds to the record "metrics" test/atlas/..., "baseline" (the arithmetic mean of the scans) and "peers": `iterative`,
    the same method without a prior, and `flash`, the classical one of 100 iterations with a gradient step each.

    Args:
        config: of the finished run.
        record: of the finished run.
        module: tested.
        run_dir: folder of the run.
    """
    options = atlas_options(config.atlas)
    if not num_iterations(options, True):
        return
    cohort = module.trainer.datamodule.cohort("atlas")
    deformation = OmegaConf.to_container(config.deformation, resolve=True)
    prior = Prior(module.net.eval()) if config.prior == "trained" else None
    identity = config_hash(config)

    def build(name: str, chosen: AtlasOptions, network: Prior | None) -> tuple[dict[str, float], Atlas]:
        workspace = Workspace(run_dir / "atlases" / name, f"{identity} {name}")

        def make(factor: int) -> Deformation:
            return build_deformation(deformation, [size // factor for size in cohort.shape], float(factor))

        builder = AtlasBuilder(cohort, make, chosen, network, Single(), workspace, module.device)
        atlas = with_progress(builder, name)
        votes = None if cohort.truth_labels is not None else vote(builder, atlas)
        scores, table = assess(builder, atlas, votes)
        write_history(run_dir / "atlases" / name / "history.csv", atlas.history)
        write_subjects(run_dir / "atlases" / name / "subjects.csv", cohort.names, table)
        return scores | times(atlas.history), atlas

    atlases, target, pretraining = {}, None, record["seconds"]
    if config.classical:
        classical = AtlasOptions(**{**vars(options), **CLASSICAL})
        scores, atlases["flash"] = build("flash", classical, None)
        target = MARGIN * atlases["flash"].history[-1]["energy"]
        add(record["peers"].setdefault("flash", {}), scores, atlases["flash"].history, target)
    if config.iterative and prior is not None and num_iterations(options, False):
        scores, atlases["iterative"] = build("iterative", options, None)
        add(record["peers"].setdefault("iterative", {}), scores, atlases["iterative"].history, target)
    scores, atlases["hybrid"] = build("hybrid", options, prior)
    add(record["metrics"], scores, atlases["hybrid"].history, target)
    add_comparison(record, pretraining, len(cohort))
    mean = mean_image(cohort)
    baseline = image_scores(mean, cohort.truth) | {"energy": identity_energy(cohort, mean, options, deformation)}
    record["baseline"] |= {f"test/atlas/{name}": value for name, value in baseline.items() if name in SHOWN}
    pictures = {"mean": mean} | {name: atlas.image for name, atlas in atlases.items()}
    if cohort.truth is not None:
        pictures["truth"] = cohort.truth
    panels = [middle(image) for image in pictures.values()]
    write_image(run_dir / "pictures" / "atlas.png", picture_grid([panels], list(pictures)))


def checked(config: DictConfig) -> DictConfig:
    """Refuse what cannot be built before anything is computed; without a prior nothing is trained or scored on pairs.

    Raises:
        InputError: options of the atlas that do not exist or do not go together.
    """
    if config.prior not in ("trained", "none"):
        raise InputError(f"prior is trained or none, not {config.prior!r}")
    options = atlas_options(config.atlas)
    if config.prior == "trained":
        return config
    if not num_iterations(options, False):
        raise InputError("prior=none leaves an atlas of predictions alone nothing to do; say atlas=hybrid")
    nothing = {"max_steps": 0, "limit_val_batches": 0, "limit_test_batches": 0}
    return OmegaConf.merge(config, {"trainer": nothing})


def num_iterations(options: AtlasOptions, has_prior: bool) -> int:
    """Give the iterations that are asked for; atlas=none asks for none."""
    predicting = options.prediction_iterations if has_prior else 0
    return predicting + options.coarse_iterations + options.iterations + options.final_iterations


def atlas_options(node: DictConfig) -> AtlasOptions:
    """Read the options of an atlas from a configuration.

    Raises:
        InputError: an unknown option, or a value that is refused.
    """
    try:
        return AtlasOptions(**node)
    except TypeError as error:
        raise InputError(f"atlas: {error}") from error


def with_progress(builder: AtlasBuilder, name: str) -> Atlas:
    """Build with a progress bar."""
    with Progress(transient=True) as progress:
        task = progress.add_task(f"{name} atlas", total=len(builder.schedule))

        def watch(row: dict, image: Tensor) -> None:
            words = f"{name} atlas, energy {row['energy']:.0f}, change {row['change']:.1e}"
            progress.update(task, completed=row["iteration"], description=words)

        return builder.run(watch)


def add(values: dict[str, float], scores: dict[str, float], history: list[dict], target: float | None) -> None:
    """Add the scores of an atlas, and when it reached an energy, to the metrics of a record."""
    shown = {name: value for name, value in scores.items() if name in (*SHOWN, *COSTS)}
    if target is not None:
        shown |= reached(history, target)
    values |= {f"test/atlas/{name}": value for name, value in shown.items()}


def add_comparison(record: dict, pretraining: float, count: int) -> None:
    """Add the time to the target relative to the classical method's, and the number of scans at which training pays.

    Args:
        record: of the run.
        pretraining: seconds that the prior took before.
        count: scans of the atlas.
    """
    metric = "test/atlas/seconds_to_target"
    own, flash = (values.get(metric) for values in (record["metrics"], record["peers"].get("flash", {})))
    if own is None or flash is None:
        return
    record["metrics"]["test/atlas/relative_seconds"] = own / flash
    if own < flash:
        record["break_even_scans"] = math.ceil(count * pretraining / (flash - own))


def times(history: list[dict]) -> dict[str, float]:
    """Sum up what the iterations took."""
    seconds = sum(row["seconds"] for row in history)
    return {
        "seconds": seconds, "iterations": float(len(history)), "seconds_per_iteration": seconds / len(history),
        "change": history[-1]["change"],
    }  # fmt: skip


def reached(history: list[dict], target: float) -> dict[str, float]:
    """Say after how many seconds and gradients a subject the energy was below a target; nothing if it never was."""
    seconds, gradients = 0.0, 0
    for row in history:
        seconds, gradients = seconds + row["seconds"], gradients + row["gradients"]
        if row["energy"] <= target:
            return {"seconds_to_target": seconds, "gradients_to_target": float(gradients)}
    return {}


@torch.no_grad()
def mean_image(cohort: Cohort) -> Tensor:
    """Give the arithmetic mean of all scans, (1, 1, *S)."""
    total = torch.zeros(1, 1, *cohort.shape)
    for index in range(len(cohort)):
        total += cohort.images([index])
    return total / len(cohort)


@torch.no_grad()
def identity_energy(cohort: Cohort, mean: Tensor, options: AtlasOptions, deformation: dict) -> float:
    """Give the mean energy of the scans against their undeformed mean."""
    model, total = build_deformation(deformation, cohort.shape), 0.0
    for index in range(len(cohort)):
        terms = (mean, cohort.images([index]), options.noise_std, options.similarity)
        total += float(energies(model, model.zeros(1), *terms).total)
    return total / len(cohort)


def write_history(path: Path, history: list[dict]) -> None:
    """Write what each iteration did, one a row."""
    _write_rows(path, list(history[0]), [list(row.values()) for row in history])


def write_subjects(path: Path, names: list[str], table: Tensor) -> None:
    """Write the scores of each subject, one a row; a cell stays empty where a score does not apply."""
    rows = [
        [name, *("" if value != value else repr(value) for value in values)]
        for name, values in zip(names, table.tolist(), strict=True)
    ]
    _write_rows(path, ["subject", *COLUMNS], rows)


def _write_rows(path: Path, header: list[str], rows: list[list]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([header, *rows])
    write_text(path, text.getvalue())
