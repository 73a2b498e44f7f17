"""Hybrid atlas building (Wu et al., ISBI 2022): registration priors inside the loop that estimates an atlas.

The atlas I and one velocity per subject minimise the sum of the energies of loss.py. An iteration

1. finds the velocities: in the first ones the prior predicts them from (I, J_n), then descent steps refine them;
2. takes their mean off, so that the atlas stays in the middle of its subjects;
3. makes the atlas anew of the images carried back (update.py).

Without a prior it is the classical iterative method. All sums over subjects go through an engine.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from shared.errors import InputError
from shared.kernels.image_warp import image_warp

from .cohort import Cohort
from .deformation import Deformation
from .engine import Distributed, MapReduce, OvertakenError, Single, Sums, shards_of
from .loss import SIMILARITIES, Energies, energies
from .priors import Prior
from .registration import OPTIMIZERS, STEP, Refined, keep_better, refine
from .update import UPDATES, add_normal, add_pull, add_splat, least_squares, sharpen, weighted_mean
from .workspace import Workspace

REPREDICT = ("never", "always", "until_stall")
CENTER = ("velocity", "delayed", "shape_update", "none")
SHAPE_UPDATES, SHAPE_STEP = 4, 0.25  # ANTs' convention


@dataclass(frozen=True)
class AtlasOptions:
    """How an atlas is built.

    Attributes:
        prediction_iterations: the first ones, in which the prior's velocities are taken as they are.
        coarse_iterations: then, with refinement, at half of the resolution; predictions are too, where there are any.
        iterations: then, at full resolution.
        final_iterations: after them, with `final_update`.
        refine: descent steps of each subject in an iteration.
        final_refine: the same of the final iterations.
        repredict: whether the prior predicts again before refinement, the better of both being refined: `never`,
            `always`, or `until_stall`, until no prediction is better than what is there.
        center: what keeps the atlas in the middle: `velocity` takes the mean velocity off, `delayed` that which the
            iteration before has left (one pass over the scans instead of two), `shape_update` warps the atlas, `none`.
        update: `splat` (sum of W^T J over sum of W^T 1), `pull` (weighted by |D phi|), `cg` (least squares) or `grad`.
        final_update: that of the final iterations.
        cg_steps: of the least-squares solver.
        ridge: of the same.
        atlas_lr: step of `grad`, in shares of the mean.
        sharpen: share of Laplacian sharpening after each update.
        tolerance: go to the final iterations when the atlas changes by less, relative.
        noise_std: sigma, of images in [0, 1].
        similarity: `ssd` or `ncc`.
        optimizer: `gd`, `adam` or `lbfgs`.
        gradient: `autograd` or `adjoint`.
        batch_size: scans in memory at once; a shard.
        exact_reduce: sums of whole numbers, the same bits for any number of processes.
        cache_mb: memory for warps between the passes of one iteration.
    """

    prediction_iterations: int = 2
    coarse_iterations: int = 0
    iterations: int = 10
    final_iterations: int = 2
    refine: int = 5
    final_refine: int = 5
    repredict: str = "never"
    center: str = "velocity"
    update: str = "splat"
    final_update: str = "cg"
    cg_steps: int = 10
    ridge: float = 1e-3
    atlas_lr: float = 1.0
    sharpen: float = 0.0
    tolerance: float = 1e-3
    noise_std: float = 0.03
    similarity: str = "ssd"
    optimizer: str = "gd"
    gradient: str = "autograd"
    batch_size: int = 16
    exact_reduce: bool = False
    cache_mb: int = 512

    def __post_init__(self):
        known = {
            "repredict": REPREDICT, "center": CENTER, "update": UPDATES, "final_update": UPDATES,
            "similarity": SIMILARITIES, "optimizer": OPTIMIZERS, "gradient": ("autograd", "adjoint"),
        }  # fmt: skip
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise InputError(f"atlas.{name} is one of {', '.join(values)}, not {getattr(self, name)!r}")
        counts = ("prediction_iterations", "coarse_iterations", "iterations", "final_iterations", "cache_mb")
        for name in counts:
            if getattr(self, name) < 0:
                raise InputError(f"atlas.{name} is at least 0, not {getattr(self, name)}")
        for name in ("refine", "final_refine", "batch_size", "cg_steps"):
            if getattr(self, name) < 1:
                raise InputError(f"atlas.{name} is at least 1, not {getattr(self, name)}")
        if not self.noise_std > 0:
            raise InputError(f"atlas.noise_std is above 0, not {self.noise_std}")

    def schedule(self, has_prior: bool) -> list["Step"]:
        """Give what each iteration does; without a prior none predicts.

        Raises:
            InputError: nothing is left to do.
        """
        predicting = self.prediction_iterations if has_prior else 0
        steps = [Step(2 if self.coarse_iterations else 1, 0, self.update)] * predicting
        steps += [Step(2, self.refine, self.update)] * self.coarse_iterations
        steps += [Step(1, self.refine, self.update)] * self.iterations
        steps += [Step(1, self.final_refine, self.final_update)] * self.final_iterations
        if not steps or steps[-1].factor != 1:
            raise InputError("an atlas takes at least one iteration at full resolution: atlas.iterations")
        return steps


@dataclass(frozen=True)
class Step:
    """One iteration: resolution is divided by `factor`; with `refine` 0 the prior's velocities are taken."""

    factor: int
    refine: int
    update: str


@dataclass
class Atlas:
    """What came out.

    Attributes:
        image: (1, 1, *S).
        model: the deformation at full resolution.
        history: one dictionary an iteration: energies a subject, change, seconds ...
        parameters: gives those (b, d, *n) of a shard's number that belong to the image.
        shards: subjects of each.
    """

    image: Tensor
    model: Deformation
    history: list[dict]
    parameters: Callable[[int], Tensor]
    shards: list[range] = field(default_factory=list)


Watch = Callable[[dict, Tensor], None]


class AtlasBuilder:
    """Builds an atlas of a cohort.

    Args:
        cohort: the scans.
        make_model: gives the deformation of images whose resolution is divided by a factor.
        options: how.
        prior: predicts velocities, a `Prior` or `External`; None for the classical method.
        engine: who computes.
        workspace: keeps the state; a started one is continued.
        device: where is computed.
    """

    def __init__(
        self, cohort: Cohort, make_model: Callable[[int], Deformation], options: AtlasOptions, prior: Prior | None,
        engine: Single | Distributed | MapReduce, workspace: Workspace, device: torch.device | str = "cpu",
    ):  # fmt: skip
        self.cohort, self.options, self.prior = cohort, options, prior
        self.engine, self.workspace, self.device = engine, workspace, torch.device(device)
        self.shards = shards_of(len(cohort), options.batch_size)
        self.schedule = options.schedule(prior is not None)
        factors = {step.factor for step in self.schedule} | {1}
        for factor in factors - {1}:
            if any(size % factor for size in cohort.shape):
                raise InputError(
                    f"coarse iterations need a grid whose sides are multiples of {factor}, not {cohort.shape}; "
                    "say atlas.coarse_iterations=0"
                )
        self.models = {factor: make_model(factor).to(self.device) for factor in factors}
        self._warpers: dict[int, object] = {}

    def run(self, watch: Watch | None = None) -> Atlas:
        """Build, or go on building.

        Args:
            watch: called after each iteration with its row of the history and the atlas (1, 1, *S).
        """
        while True:
            try:
                return self._run(watch)
            except OvertakenError:
                continue

    def _run(self, watch: Watch | None) -> Atlas:
        saved = self.workspace.last()
        schedule, position, history, mean, late = self.schedule, 0, [], None, None
        self.engine.iteration = iteration = 0 if saved is None else saved.iteration
        if saved is None:
            atlas = self._initial_atlas(schedule[0].factor)
        else:
            position, history = saved.facts["position"], saved.facts["history"]
            atlas, mean, late = (saved.tensors[name].to(self.device) for name in ("atlas", "mean", "late"))
        repredict = self.prior is not None and self.options.repredict != "never"
        repredict = repredict and (saved is None or saved.facts["repredict"])
        while position < len(schedule):
            started = time.perf_counter()
            self.engine.iteration = iteration = iteration + 1
            step = schedule[position]
            model = self.models[step.factor]
            atlas = resize_image(atlas, model.shape)
            self._warpers.clear()
            predicts = step.refine == 0 or repredict
            late = model.zeros(1) if late is None else model.adopt(late)
            sums = self._refine(iteration, step, model, atlas, mean, late, predicts)
            refine_seconds = time.perf_counter() - started
            new_mean = sums["velocity"][None] / len(self.cohort)
            offset = self._offset(step, late, new_mean)
            new = self._update(iteration, step, model, atlas, offset, new_mean, sums)
            change = float((new - atlas).norm() / atlas.norm().clamp(min=1e-12))
            row = {
                "iteration": iteration, "factor": step.factor, "update": step.update, "predicted": predicts,
                "energy": (sums.total("image_energy") + sums.total("regulariser")) / len(self.cohort),
                "image_energy": sums.total("image_energy") / len(self.cohort),
                "regulariser": sums.total("regulariser") / len(self.cohort),
                "change": change, "mean_velocity": float(new_mean.square().sum(1).mean().sqrt()),
                "gradients": step.refine, "seconds": time.perf_counter() - started, "refine_seconds": refine_seconds,
            }  # fmt: skip
            atlas, mean, late, position = new, offset, new_mean - offset, position + 1
            if self.options.repredict == "until_stall" and not sums.total("better_predictions") > 0:
                repredict = False
            last_of_full = len(schedule) - self.options.final_iterations
            if change < self.options.tolerance and step.factor == 1 and step.refine and position < last_of_full:
                position = last_of_full
            history = [*history, row]
            if self.engine.is_first:
                facts = {"position": position, "repredict": repredict, "history": history}
                self.workspace.save_iteration(iteration, {"atlas": atlas, "mean": mean, "late": late}, facts)
            self.engine.committed(iteration)
            if watch is not None:
                watch(row, atlas)

        def parameters(shard: int) -> Tensor:
            return self.workspace.load_shard(iteration, shard)["parameter"].to(self.device) - mean

        return Atlas(atlas, self.models[1], history, parameters, self.shards)

    def _images(self, shard: int, factor: int) -> Tensor:
        images = self.cohort.images(self.shards[shard]).to(self.device)
        return pool(images, factor)

    def _sum(self, step: str, work: Callable[[int], Sums]) -> Sums:
        """Let the engine sum over all shards; what jobs share comes from a file."""
        return self.engine.run(step, range(len(self.shards)), work).to(self.device)

    def _initial_atlas(self, factor: int) -> Tensor:
        def work(shard: int) -> Sums:
            sums = Sums(self.options.exact_reduce)
            sums.add("image", self._images(shard, factor))
            return sums

        return self._sum("mean", work)["image"][None] / len(self.cohort)

    def _refine(
        self, iteration: int, step: Step, model: Deformation, atlas: Tensor, mean: Tensor | None, late: Tensor,
        predicting: bool,
    ) -> Sums:  # fmt: skip
        """Bring the velocities of all subjects forward and save them."""
        options = self.options

        def work(shard: int) -> Sums:
            images = self._images(shard, step.factor)
            state = self._state(iteration - 1, shard, model, mean)
            found, num_better = self._improve(state, model, atlas, images, step.refine, predicting, self.shards[shard])
            self.workspace.save_shard(iteration, shard, {"parameter": found.parameter, "step": found.step})
            sums = Sums(options.exact_reduce)
            sums.add("velocity", found.parameter)
            sums.add("image_energy", found.energies.image)
            sums.add("regulariser", found.energies.regulariser)
            sums.add("better_predictions", num_better)
            if self._is_delayed(step):
                self._add_images(sums, step, model, found.parameter - late, images, shard)
            return sums

        return self._sum("refine", work)

    def _state(self, iteration: int, shard: int, model: Deformation, mean: Tensor | None) -> tuple[Tensor, Tensor]:
        if iteration == 0:
            count = len(self.shards[shard])
            return model.zeros(count), torch.full((count,), STEP, device=self.device)
        state = self.workspace.load_shard(iteration, shard)
        parameter = state["parameter"].to(self.device) - mean
        return model.adopt(parameter), state["step"].to(self.device)

    @torch.no_grad()
    def _improve(
        self, state: tuple[Tensor, Tensor], model: Deformation, atlas: Tensor, images: Tensor, steps: int,
        predicting: bool, subjects: Sequence[int],
    ) -> tuple[Refined, Tensor]:  # fmt: skip
        """Predict and refine -> (velocities, (B,) whether the prediction was better)."""
        options = self.options
        parameter, step = state
        terms = (atlas, images, options.noise_std, options.similarity)
        num_better = torch.zeros(len(images), device=self.device)
        if predicting:
            predicted = self.prior.predict(model, atlas, images, subjects)
            found = energies(model, predicted, *terms)
            told = found.total.isfinite()
            if steps == 0 and told.all():  # what the network says, the paper's loop
                return Refined(predicted, step, found), num_better + 1
            there = energies(model, parameter, *terms)
            if steps == 0:  # all but what is no deformation
                there = Energies(*(torch.where(told, torch.inf, term) for term in there))
            kept = keep_better(Refined(parameter, step, there), predicted, found)
            num_better = (kept.energies.total == found.total).float()
            if steps == 0:
                return kept, num_better
            parameter, step = kept.parameter, kept.step
        refined = refine(
            model, parameter, step, atlas, images, steps, options.noise_std, options.similarity, options.optimizer,
            options.gradient,
        )  # fmt: skip
        return refined, num_better

    def _is_delayed(self, step: Step) -> bool:
        """Say whether images are carried back before the mean velocity is known; predictions are off centre anew."""
        return self.options.center == "delayed" and step.refine > 0

    def _offset(self, step: Step, late: Tensor, mean: Tensor) -> Tensor:
        """Give what is taken off the velocities that an iteration leaves."""
        if self._is_delayed(step):
            return late
        return mean if self.options.center in ("velocity", "delayed") else torch.zeros_like(mean)

    def _update(
        self, iteration: int, step: Step, model: Deformation, atlas: Tensor, offset: Tensor, new_mean: Tensor,
        refined: Sums,
    ) -> Tensor:  # fmt: skip
        """Make the atlas of the refined velocities."""
        options = self.options
        sums = refined
        if not self._is_delayed(step):

            def work(shard: int) -> Sums:
                part = Sums(options.exact_reduce)
                parameter = self.workspace.load_shard(iteration, shard)["parameter"].to(self.device) - offset
                self._add_images(part, step, model, parameter, self._images(shard, step.factor), shard)
                return part

            sums = self._sum("update", work)
        if step.update == "grad":
            new = atlas + options.atlas_lr * (sums["numerator"][None] - self._normal(
                iteration, "grad", model, offset, atlas, step.factor
            )) / len(self.cohort)  # fmt: skip
        else:
            new = weighted_mean(sums, atlas)
        if step.update == "cg":

            def normal(image: Tensor, number: int) -> Tensor:
                return self._normal(iteration, f"cg{number:02d}", model, offset, image, step.factor)

            new = least_squares(normal, sums["numerator"][None], atlas, options.cg_steps, options.ridge)
        if options.center == "shape_update":
            part = model.displacement(SHAPE_STEP * new_mean)
            for _ in range(SHAPE_UPDATES):
                new = image_warp(new, part)
        return sharpen(new, options.sharpen) if options.sharpen else new

    def _add_images(
        self, sums: Sums, step: Step, model: Deformation, parameter: Tensor, images: Tensor, shard: int
    ) -> None:
        if step.update == "pull":
            add_pull(sums, model, parameter, images)
        else:
            add_splat(sums, self._warper(model, parameter, shard), images)

    def _normal(
        self, iteration: int, name: str, model: Deformation, offset: Tensor, image: Tensor, factor: int
    ) -> Tensor:
        """Give the sum over subjects of W^T W x."""

        def work(shard: int) -> Sums:
            warper = self._warpers.get(shard)
            if warper is None:
                parameter = self.workspace.load_shard(iteration, shard)["parameter"].to(self.device) - offset
                warper = self._warper(model, parameter, shard)
            sums = Sums(self.options.exact_reduce)
            add_normal(sums, warper, image)
            return sums

        return self._sum(name, work)["normal"][None]

    def _warper(self, model: Deformation, parameter: Tensor, shard: int) -> object:
        warper = model.warper(parameter)
        if sum(kept.num_bytes for kept in self._warpers.values()) + warper.num_bytes <= self.options.cache_mb * 2**20:
            self._warpers[shard] = warper
        return warper


def pool(images: Tensor, factor: int) -> Tensor:
    """Average images (B, 1, *S) over cubes of `factor` voxels."""
    if factor == 1:
        return images
    return (F.avg_pool2d if images.ndim == 4 else F.avg_pool3d)(images, factor)


def resize_image(image: Tensor, shape: Sequence[int]) -> Tensor:
    """Bring an image (1, 1, *s) to a grid of the same extent, linearly, by the centres of voxels."""
    if tuple(image.shape[2:]) == tuple(shape):
        return image
    mode = "bilinear" if image.ndim == 4 else "trilinear"
    return F.interpolate(image, size=tuple(shape), mode=mode, align_corners=False)
