"""The plain part of the configurations: a mistyped key or type stops at composition."""

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore

from shared import experiment


@dataclass
class TrainConfig(experiment.TrainConfig):
    """Training of a prior, and the atlas that is built with it.

    Attributes:
        deformation: what the prior predicts and the atlas is built of, chosen by the group: flash, lddmm,
            lddmm_momentum, svf.
        dims: axes of the images, 2 or 3.
        atlas: how the atlas is built, see atlas.AtlasOptions; `atlas=none` builds none.
        prior: `trained`, or `none` for the iterative method; then nothing is trained.
        iterative: build the atlas without the prior too, to stand beside.
        classical: build FLASH's of 100 iterations too, and say when the others reach 1.05 times its energy.
    """

    deformation: dict[str, Any] = field(default_factory=dict)
    atlas: dict[str, Any] = field(default_factory=dict)
    dims: int = 2
    prior: str = "trained"
    iterative: bool = True
    classical: bool = True


@dataclass
class EvaluateConfig(experiment.EvaluateConfig):
    """Evaluation of a prior on pairs of scans, and of the atlas that is built with it.

    Attributes:
        deformation: what the prior predicts and the atlas is built of, chosen by the group: flash, lddmm,
            lddmm_momentum, svf.
        dims: axes of the images, 2 or 3.
        atlas: how the atlas is built, see atlas.AtlasOptions; `atlas=none` builds none.
        prior: `trained`, or `none` for the iterative method.
        iterative: build the atlas without the prior too, to stand beside.
        classical: build FLASH's of 100 iterations too, and say when the others reach 1.05 times its energy.
        loss: which energy is scored.
        num_pictures: test pairs to draw.
    """

    deformation: dict[str, Any] = field(default_factory=dict)
    atlas: dict[str, Any] = field(default_factory=dict)
    dims: int = 2
    prior: str = "trained"
    iterative: bool = True
    classical: bool = True
    loss: dict[str, Any] = field(default_factory=dict)
    num_pictures: int = 2


@dataclass
class PredictConfig(experiment.PredictConfig):
    """An atlas of a user's scans; `input` is a folder, a list or a table of scans, `output` the atlas.

    Attributes:
        layout: name of a data set that `input` is the folder of, see layouts.py; null for scans of one's own.
        split: part of the data set.
        layout_options: of the layout's function.
        prefix: put before every line of a list.
        suffix: put behind it.
        skip_bad: leave out scans that cannot be used, with a warning, instead of stopping.
        work: folder of the unfinished run; null is <output>_work beside the output.
        keep_work: do not remove it in the end.
        restart: drop an unfinished run, or build a finished atlas again.
        spacing: mm, one number or one by axis; null is the first scan's.
        grid: a volume whose grid is used instead.
        margin: voxels added around the first scan.
        affine: alignment before the deformation: `affine`, `rigid` or `none`.
        norm: `pct` divides intensities by a percentile, `max` by the largest.
        clip: the percentile.
        prior: `network`, `none` (the iterative method) or `external`.
        displacements: folder of <id>_warp.nii.gz in ITK's convention, for prior=external.
        unit_mm: length that the network's velocities and the metric's alpha are in.
        deformation: chosen by the group: flash, lddmm, lddmm_momentum, svf.
        atlas: how the atlas is built, see atlas.AtlasOptions.
        engine: who computes, chosen by the group: single, ddp, mapreduce.
        warps: write displacement fields of each scan.
        warped: write scans and labels in the atlas's space, and the atlas's labels in each scan's.
    """

    layout: str | None = None
    split: str = "all"
    layout_options: dict[str, Any] = field(default_factory=dict)
    prefix: str = ""
    suffix: str = ""
    skip_bad: bool = False
    work: str | None = None
    keep_work: bool = False
    restart: bool = False
    spacing: Any = None
    grid: str | None = None
    margin: int = 4
    affine: str = "affine"
    norm: str = "pct"
    clip: float = 99.9
    prior: str = "network"
    displacements: str | None = None
    unit_mm: float = 2.0
    deformation: dict[str, Any] = field(default_factory=dict)
    atlas: dict[str, Any] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)
    warps: bool = False
    warped: bool = False


store = ConfigStore.instance()
store.store(name="hybrid_atlas_train", node=TrainConfig)
store.store(name="hybrid_atlas_evaluate", node=EvaluateConfig)
store.store(name="hybrid_atlas_predict", node=PredictConfig)
