"""The loop that builds an atlas: invariants, resuming, engines."""

import itertools
import os
import threading
import weakref

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from projects.hybrid_atlas import atlas as atlas_module
from projects.hybrid_atlas.atlas import AtlasBuilder, AtlasOptions, pool, resize_image
from projects.hybrid_atlas.cohort import Cohort, Synthetic, Toys
from projects.hybrid_atlas.deformation import LDDMM, SVF, Flash, Momentum
from projects.hybrid_atlas.engine import Distributed, MapReduce, Single, Sums
from projects.hybrid_atlas.loss import energies
from projects.hybrid_atlas.registration import STEP, refine
from projects.hybrid_atlas.scores import psnr
from projects.hybrid_atlas.toys import bullseye
from projects.hybrid_atlas.update import add_splat, weighted_mean
from projects.hybrid_atlas.workspace import Workspace
from shared.errors import InputError

PLANE, BOX = (36, 32), (20, 16, 18)
slow = pytest.mark.slow
QUICK = {"iterations": 3, "final_iterations": 1, "refine": 3, "final_refine": 2, "tolerance": 0.0, "optimizer": "lbfgs"}
MODELS = {
    "flash": lambda shape, h: Flash(shape, 7, steps=3, spacing=h),
    "lddmm": lambda shape, h: LDDMM(shape, steps=3, spacing=h),
    "momentum": lambda shape, h: Momentum(shape, steps=3, spacing=h),
    "svf": lambda shape, h: SVF(shape, steps=5, spacing=h),
}


def scans(shape=PLANE, count=5, seed=0, **options):
    toy = bullseye(shape, jitter=0)
    return Synthetic(toy.image, toy.labels, toy.names, count, seed, **{"amplitude": 1.2, "num_modes": 5, **options})


def images_of(cohort):
    return cohort.images(range(len(cohort)))


def builder_of(folder, cohort, model="flash", prior=None, engine=None, identity="x", **options):
    def make(factor):
        return MODELS[model]([size // factor for size in cohort.shape], float(factor))

    return AtlasBuilder(
        cohort, make, AtlasOptions(**{**QUICK, **options}), prior, engine or Single(), Workspace(folder, identity)
    )


def build(folder, cohort, watch=None, **arguments):
    return builder_of(folder, cohort, **arguments).run(watch)


def parameters_of(atlas):
    return torch.cat([atlas.parameters(shard) for shard in range(len(atlas.shards))])


class Recorded:
    """Keeps what an atlas tells while it is built."""

    def __init__(self):
        self.rows, self.images = [], []

    def __call__(self, row, image):
        self.rows.append(row)
        self.images.append(image.clone())


# --- What comes out ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "shape"),
    [*((name, PLANE) for name in MODELS), ("flash", BOX), pytest.param("svf", BOX, marks=slow)],
    ids=str,
)
def test_the_energy_falls_and_the_truth_comes_closer(tmp_path, model, shape):
    cohort, watch = scans(shape), Recorded()
    atlas = build(tmp_path, cohort, watch, model=model, iterations=5, refine=4)
    found = [row["energy"] for row in atlas.history]
    for before, after in itertools.pairwise(found):
        assert after < 1.03 * before  # centring may cost a little
    images = images_of(cohort)
    start = float((images - images.mean(0)).square().sum()) / len(images) / (2 * 0.03**2)
    assert found[-1] < 0.5 * start
    mean = float(psnr(images.mean(0, keepdim=True), cohort.truth))
    assert float(psnr(atlas.image, cohort.truth)) > mean + 2
    for row in atlas.history:
        assert row["energy"] == pytest.approx(row["image_energy"] + row["regulariser"])
    assert [row["update"] for row in atlas.history] == ["splat"] * 5 + ["cg"]
    assert [row["gradients"] for row in atlas.history] == [4] * 5 + [2]
    assert watch.rows == atlas.history
    assert torch.equal(watch.images[-1], atlas.image)


def test_the_energies_are_those_of_the_velocities_against_the_atlas_before(tmp_path):
    cohort, watch = scans(), Recorded()
    atlas = build(tmp_path, cohort, watch, center="none", batch_size=2)
    parameter = parameters_of(atlas)
    found = energies(atlas.model, parameter, watch.images[-2], images_of(cohort), 0.03)
    assert atlas.history[-1]["image_energy"] == pytest.approx(float(found.image.mean()), rel=1e-5)
    assert atlas.history[-1]["regulariser"] == pytest.approx(float(found.regulariser.mean()), rel=1e-5)


def test_least_squares_never_raise_the_image_term_of_the_loop(tmp_path):
    cohort, ratios = scans(), []

    def watch(row, image):
        state = builder.workspace.load_shard(row["iteration"], 0)["parameter"]
        after = energies(builder.models[1], state, image, images_of(cohort), 0.03).image.mean()
        ratios.append(float(after) / row["image_energy"])

    options = {"center": "none", "update": "cg", "final_iterations": 0, "refine": 1}
    builder = builder_of(tmp_path, cohort, iterations=5, **options)
    builder.run(watch)
    # from a good atlas on a single step, which the weighted mean and a step would not reach
    builder = builder_of(tmp_path, cohort, iterations=7, cg_steps=1, **options)
    builder.run(watch)
    assert len(ratios) == 7
    assert max(ratios) <= 1 + 1e-6
    assert min(ratios) < 0.9


@pytest.mark.parametrize("center", ["velocity", "delayed", "none"])
def test_the_velocities_that_are_given_are_those_the_image_was_made_with(tmp_path, center):
    cohort = scans()
    atlas = build(tmp_path, cohort, center=center, final_iterations=0)
    sums = Sums(False)
    add_splat(sums, atlas.model.warper(parameters_of(atlas)), images_of(cohort))
    torch.testing.assert_close(weighted_mean(sums, torch.zeros_like(atlas.image)), atlas.image, rtol=0, atol=1e-5)


@pytest.mark.parametrize("center", ["velocity", "delayed", "none"])
def test_an_iteration_starts_from_the_velocities_the_image_was_made_with(tmp_path, center):
    builder, starts, offsets = builder_of(tmp_path, scans(), center=center), [], []
    improve, offset = builder._improve, builder._offset

    def watched(state, *arguments):
        starts.append(state[0])
        return improve(state, *arguments)

    def noted(*arguments):
        offsets.append(offset(*arguments))
        return offsets[-1]

    builder._improve, builder._offset = watched, noted
    ends = []
    builder.run(lambda row, image: ends.append(builder.workspace.load_shard(row["iteration"], 0)["parameter"]))
    assert not starts[0].any()
    for start, end, taken in zip(starts[1:], ends, offsets, strict=False):
        torch.testing.assert_close(start, end - taken)
    assert (center == "none") == (not any(taken.any() for taken in offsets))
    if center == "velocity":
        assert max(start.mean(0).abs().max() for start in starts) < 1e-6


def test_all_updates_give_about_the_same_atlas(tmp_path):
    cohort = scans()
    found = {
        update: build(tmp_path / update, cohort, update=update, final_iterations=0, iterations=6, atlas_lr=1.0).image
        for update in ("splat", "pull", "cg", "grad")
    }
    quality = {update: float(psnr(image, cohort.truth)) for update, image in found.items()}
    mean = float(psnr(images_of(cohort).mean(0, keepdim=True), cohort.truth))
    assert min(quality.values()) > mean + 1.5
    for update in ("pull", "grad"):
        assert float(psnr(found[update], found["splat"])) > 25


def test_sharpening_is_the_last_thing_that_is_done(tmp_path):
    cohort, options = scans(), {"iterations": 1, "final_iterations": 0}
    plain = build(tmp_path / "plain", cohort, **options).image
    sharp = build(tmp_path / "sharp", cohort, sharpen=0.25, **options).image
    torch.testing.assert_close(sharp, atlas_module.sharpen(plain, 0.25))


# --- Symmetries -------------------------------------------------------------------------------------------------------


def margin(cohort, side=6):
    """Images whose rim is empty."""
    images = images_of(cohort).clone()
    rim = torch.ones(cohort.shape, dtype=torch.bool)
    rim[(slice(side, -side),) * len(cohort.shape)] = False
    images[:, :, rim] = 0
    return images[:, 0]


@pytest.mark.parametrize("shape", [(40, 36), (24, 26, 25)], ids=["2d", "3d"])
def test_shifted_scans_give_a_shifted_atlas(tmp_path, shape):
    images = margin(scans(shape, noise_std=0.0, amplitude=0.8), side=4)
    shift = (3, -2, 1)[: len(shape)]
    moved = torch.roll(images, shift, tuple(range(1, images.ndim)))
    atlases = [
        build(tmp_path / name, Toys(part.numpy()), refine=2, optimizer="gd").image
        for name, part in (("here", images), ("there", moved))
    ]
    back = torch.roll(atlases[1], [-step for step in shift], tuple(range(2, atlases[1].ndim)))
    inside = (..., *[slice(4, -4)] * len(shape))
    assert (back - atlases[0])[inside].abs().max() < 5e-3
    assert (atlases[1] - atlases[0])[inside].abs().max() > 0.1


def test_the_order_of_the_scans_does_not_matter(tmp_path):
    images = images_of(scans())[:, 0]
    order = [3, 0, 4, 1, 2]
    found = [build(tmp_path / name, Toys(part.numpy())).image
             for name, part in (("as they are", images), ("permuted", images[order]))]  # fmt: skip
    torch.testing.assert_close(*found, rtol=0, atol=1e-4)
    exact = [
        build(tmp_path / f"exact {name}", Toys(part.numpy()), exact_reduce=True, batch_size=1)
        for name, part in (("as they are", images), ("permuted", images[order]))
    ]
    assert torch.equal(exact[0].image, exact[1].image)
    assert torch.equal(parameters_of(exact[0])[order], parameters_of(exact[1]))


def test_every_scan_twice_is_the_same_cohort(tmp_path):
    images = images_of(scans())[:, 0]
    found = [
        build(tmp_path / name, Toys(part.numpy()), ridge=ridge)
        for name, part, ridge in (("once", images, 1e-3), ("twice", torch.cat([images, images]), 2e-3))
    ]
    torch.testing.assert_close(found[0].image, found[1].image, rtol=0, atol=1e-4)
    assert found[0].history[-1]["energy"] == pytest.approx(found[1].history[-1]["energy"], rel=1e-4)


@pytest.mark.parametrize("options", [{"batch_size": 2}, {"exact_reduce": True}, {"cache_mb": 0}], ids=str)
def test_how_it_is_computed_does_not_matter(tmp_path, options):
    cohort = scans()
    usual, other = build(tmp_path / "usual", cohort), build(tmp_path / "other", cohort, **options)
    torch.testing.assert_close(usual.image, other.image, rtol=0, atol=1e-4)
    torch.testing.assert_close(parameters_of(usual), parameters_of(other), rtol=0, atol=1e-3)


# --- Centring ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
def test_the_mean_velocity_is_nothing(tmp_path, model):
    cohort = scans()
    atlas = build(tmp_path / "centred", cohort, model=model, batch_size=2)
    parameter = parameters_of(atlas)
    assert parameter.mean(0).abs().max() < 1e-5 * parameter.abs().max()
    free = parameters_of(build(tmp_path / "free", cohort, model=model, center="none"))
    assert free.mean(0).abs().max() > 1e-3 * free.abs().max()


@pytest.mark.parametrize("center", ["delayed", "shape_update"])
def test_other_ways_to_the_middle_come_close_to_it(tmp_path, center):
    cohort, options = scans(count=4), {"iterations": 6, "final_iterations": 0}
    wanted = build(tmp_path / "velocity", cohort, **options)
    found = build(tmp_path / center, cohort, center=center, **options)
    free = build(tmp_path / "none", cohort, center="none", **options)
    assert float(psnr(found.image, wanted.image)) > 30
    means = [float(parameters_of(atlas).mean(0).square().sum(0).mean().sqrt()) for atlas in (found, free)]
    assert means[0] < 0.5 * means[1]
    assert found.history[-1]["energy"] == pytest.approx(wanted.history[-1]["energy"], rel=0.05)


def test_a_late_mean_takes_one_pass_over_the_scans(tmp_path):
    passes = {}
    for center in ("velocity", "delayed"):
        cohort = Counted(images_of(scans())[:, 0])
        build(tmp_path / center, cohort, center=center, final_iterations=0)
        passes[center] = cohort.num_read / len(cohort)
    assert passes == {"velocity": 1 + 2 * 3, "delayed": 1 + 3}


class Biased:
    """A prior that registers well, but for the same error in all its velocities."""

    def __init__(self, bias=0.6, steps=8):
        self.bias, self.steps, self.calls = bias, steps, 0

    def predict(self, model, atlas, images, subjects):
        self.calls += 1
        step = torch.full((len(images),), STEP)
        found = refine(model, model.zeros(len(images)), step, atlas, images, self.steps, 0.03, optimizer="lbfgs")
        parameter = found.parameter.clone()
        parameter[:, 0] += self.bias
        return parameter


PREDICTION_ONLY = {"prediction_iterations": 6, "iterations": 0, "final_iterations": 0, "repredict": "never"}


@pytest.mark.parametrize("center", ["velocity", "delayed", "none"])
def test_predictions_alone_drift_without_centring_and_not_with_it(tmp_path, center):
    cohort, watch = scans(noise_std=0.0, count=4), Recorded()
    build(tmp_path, cohort, watch, prior=Biased(), center=center, **PREDICTION_ONLY)
    quality = [float(psnr(image, cohort.truth)) for image in watch.images]
    if center == "none":
        assert quality[-1] < quality[0] - 3
        assert watch.rows[-1]["change"] > 0.01
    else:
        assert quality[-1] > quality[0] - 0.5
        assert watch.rows[-1]["change"] < 0.01
        assert watch.rows[-1]["mean_velocity"] == pytest.approx(
            0.6, abs=0.2
        )  # that of the prior, before it is taken off
    assert all(row["predicted"] and not row["gradients"] for row in watch.rows)


# --- The prior --------------------------------------------------------------------------------------------------------


def test_a_prior_saves_descent_steps(tmp_path):
    cohort = scans()
    options = {"iterations": 2, "refine": 1, "final_iterations": 0}
    hybrid = build(tmp_path / "hybrid", cohort, prior=Biased(0.0), prediction_iterations=2, **options)
    plain = build(tmp_path / "plain", cohort, **options)
    assert len(hybrid.history) == 4
    assert hybrid.history[2]["energy"] < 0.7 * plain.history[0]["energy"]
    assert [row["predicted"] for row in hybrid.history] == [True, True, False, False]


def test_predictions_are_taken_only_where_they_are_better(tmp_path):
    cohort = scans()
    bad = build(tmp_path / "bad", cohort, prior=Biased(50.0, steps=1), prediction_iterations=0, repredict="always")
    plain = build(tmp_path / "plain", cohort)
    torch.testing.assert_close(bad.image, plain.image)
    assert all(row["predicted"] for row in bad.history)


def test_a_prior_that_does_not_help_any_more_is_not_asked_again(tmp_path):
    calls = {}
    for repredict in ("never", "until_stall", "always"):
        prior = Biased(0.0, steps=1)
        build(tmp_path / repredict, scans(), prior=prior, prediction_iterations=0, repredict=repredict, iterations=6)
        calls[repredict] = prior.calls
    assert calls["never"] == 0
    assert 1 < calls["until_stall"] < 7
    assert calls["always"] == 7


class Broken(Biased):
    """Predicts no numbers for the first scan of each batch."""

    def predict(self, model, atlas, images, subjects):
        parameter = super().predict(model, atlas, images, subjects)
        parameter[0] = torch.nan
        return parameter


@pytest.mark.parametrize("options", [PREDICTION_ONLY, {"prediction_iterations": 2}], ids=["alone", "refined"])
def test_predictions_that_are_no_numbers_are_left_out(tmp_path, options):
    cohort = scans()
    atlas = build(tmp_path, cohort, prior=Broken(0.0), exact_reduce=True, **options)
    assert atlas.image.isfinite().all()
    assert parameters_of(atlas).isfinite().all()
    assert (
        float(psnr(atlas.image, cohort.truth)) > float(psnr(images_of(cohort).mean(0, keepdim=True), cohort.truth)) + 1
    )


# --- Resolutions, sizes, degenerate cohorts --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "shape"),
    [("flash", PLANE), *(pytest.param(*case, marks=slow) for case in (("svf", PLANE), ("flash", BOX), ("svf", BOX)))],
    ids=str,
)
def test_coarse_iterations_lead_to_nearly_the_same_atlas(tmp_path, model, shape):
    cohort = scans(shape)
    full = build(tmp_path / "full", cohort, model=model, iterations=6, refine=4)
    coarse = build(tmp_path / "coarse", cohort, model=model, coarse_iterations=3, iterations=3, refine=4)
    assert [row["factor"] for row in coarse.history] == [2] * 3 + [1] * 4
    assert coarse.image.shape == full.image.shape
    assert coarse.history[-1]["energy"] == pytest.approx(full.history[-1]["energy"], rel=0.1)
    assert float(psnr(coarse.image, full.image)) > 27


def test_pooled_and_resized_images_lie_on_each_other():
    image = images_of(scans(noise_std=0.0))[:1]
    assert torch.equal(pool(image, 1), image)
    small = pool(image, 2)
    assert small.shape == (1, 1, 18, 16)
    torch.testing.assert_close(small[0, 0, 3, 4], image[0, 0, 6:8, 8:10].mean())
    assert resize_image(image, PLANE) is image

    def middle(picture):
        weights = picture[0, 0]
        return [
            float((weights.sum(1 - axis) * (torch.arange(size) + 0.5) / size).sum() / weights.sum())
            for axis, size in enumerate(weights.shape)
        ]

    assert middle(small) == pytest.approx(middle(image), abs=1e-5)
    assert middle(resize_image(small, PLANE)) == pytest.approx(middle(image), abs=1e-4)
    assert pool(torch.zeros(1, 1, 4, 6, 8), 2).shape == (1, 1, 2, 3, 4)


def test_one_scan_is_its_own_atlas(tmp_path):
    cohort = scans(count=1)
    atlas = build(tmp_path, cohort)
    assert float(psnr(atlas.image, cohort.images([0]))) > 50
    assert not parameters_of(atlas).any()
    assert atlas.history[-1]["change"] < 1e-3


@pytest.mark.parametrize("update", ["splat", "pull", "cg", "grad"])
@pytest.mark.parametrize("value", [0.0, 0.6])
def test_constant_scans_give_a_constant_atlas(tmp_path, value, update):
    cohort = Toys(torch.full((3, *PLANE), value).numpy())
    atlas = build(tmp_path, cohort, update=update, final_update=update, similarity="ncc" if value else "ssd")
    torch.testing.assert_close(atlas.image, torch.full((1, 1, *PLANE), value), rtol=0, atol=2e-3)
    assert parameters_of(atlas).isfinite().all()


@pytest.mark.parametrize(
    ("model", "shape"),
    [*((name, (27, 22)) for name in MODELS), ("flash", (17, 19, 16)), ("svf", (17, 19, 16))],
    ids=str,
)
def test_sides_may_be_odd_and_unequal(tmp_path, model, shape):
    cohort = scans(shape, count=3)
    atlas = build(tmp_path, cohort, model=model, iterations=2, batch_size=1)
    assert atlas.image.shape == (1, 1, *shape)
    assert atlas.history[-1]["energy"] < atlas.history[0]["energy"]


def test_scans_of_other_contrast_are_fitted_by_correlation(tmp_path):
    cohort = scans(noise_std=0.005, gamma=0.4)
    atlas = build(tmp_path, cohort, similarity="ncc", iterations=5)
    energy = [row["energy"] for row in atlas.history]
    assert energy[-1] < 0.9 * energy[0]


def test_it_ends_early_when_nothing_changes(tmp_path):
    cohort = scans()
    atlas = build(tmp_path, cohort, iterations=50, tolerance=0.02, refine=5)
    assert 2 < len(atlas.history) < 20
    assert [row["update"] for row in atlas.history][-2:] == ["splat", "cg"]
    changes = [row["change"] for row in atlas.history[:-1]]
    assert changes[-1] < 0.02 <= min(changes[:-1])
    assert len(build(tmp_path / "all", cohort, iterations=6, tolerance=0.0).history) == 7


def test_predictions_alone_and_coarse_iterations_do_not_end_early(tmp_path):
    atlas = build(
        tmp_path, scans(), prior=Biased(0.0), prediction_iterations=2, coarse_iterations=3, iterations=3, tolerance=10.0
    )
    assert [(row["factor"], row["update"]) for row in atlas.history] == [(2, "splat")] * 5 + [(1, "splat"), (1, "cg")]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"center": "mean"}, "atlas.center is one of velocity, delayed, shape_update, none, not 'mean'"),
        ({"update": "median"}, "atlas.update is one of"),
        ({"final_update": "x"}, "atlas.final_update"),
        ({"optimizer": "sgd"}, "atlas.optimizer"),
        ({"similarity": "mi"}, "atlas.similarity"),
        ({"gradient": "none"}, "atlas.gradient"),
        ({"repredict": "first"}, "atlas.repredict"),
        ({"iterations": -1}, "atlas.iterations is at least 0, not -1"),
        ({"refine": 0}, "atlas.refine is at least 1"),
        ({"batch_size": 0}, "atlas.batch_size is at least 1"),
        ({"noise_std": 0.0}, "atlas.noise_std is above 0"),
    ],
)
def test_options_that_are_none_are_refused(options, words):
    with pytest.raises(InputError, match=words):
        AtlasOptions(**options)


def test_schedules_that_end_nowhere_are_refused(tmp_path):
    cohort = scans()
    for options in ({"iterations": 0, "final_iterations": 0},
                    {"iterations": 0, "final_iterations": 0, "coarse_iterations": 3}):  # fmt: skip
        with pytest.raises(InputError, match="at least one iteration at full resolution"):
            builder_of(tmp_path, cohort, **options)
    with pytest.raises(InputError, match=r"multiples of 2, not \(27, 22\); say atlas\.coarse_iterations=0"):
        builder_of(tmp_path, scans((27, 22)), coarse_iterations=1)


# --- Resuming ---------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """As a signal would."""


RESUMED = {
    "prediction_iterations": 1, "coarse_iterations": 1, "iterations": 2, "refine": 2, "batch_size": 3,
    "repredict": "until_stall",
}  # fmt: skip


def contents(folder):
    """The tensors of every file, bit for bit."""
    from safetensors.torch import load_file

    return {path.name: load_file(path) for path in sorted(folder.glob("*.safetensors"))}


def assert_same_contents(found, wanted):
    assert found.keys() == wanted.keys()
    for name, tensors in wanted.items():
        for key, value in tensors.items():
            assert torch.equal(found[name][key], value), f"{name} {key}"


KILLS = [
    ("save_shard", 2), ("save_shard", 3), ("save_shard", 9), ("save_iteration", 1), ("save_iteration", 3),
    ("load_shard", 4), ("load_shard", 12),
]  # fmt: skip
MORE_KILLS = [
    ("save_shard", 6), ("save_iteration", 2), ("save_iteration", 5), ("load_shard", 8), ("load_shard", 17),
]  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    return build(folder, scans(), prior=Biased(0.0, steps=2), **RESUMED), contents(folder)


@pytest.mark.parametrize(
    ("method", "count", "after"),
    [
        *((*kill, False) for kill in KILLS),
        *(pytest.param(*kill, True, marks=slow) for kill in KILLS),
        *(pytest.param(*kill, after, marks=slow) for kill in MORE_KILLS for after in (False, True)),
    ],
    ids=str,
)
def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path, monkeypatch, uninterrupted, method, count, after):
    calls, original = [0], getattr(Workspace, method)

    def counted(self, *arguments):
        calls[0] += 1
        if calls[0] == count and not after:
            raise Killed
        result = original(self, *arguments)
        if calls[0] == count:
            raise Killed
        return result

    monkeypatch.setattr(Workspace, method, counted)
    with pytest.raises(Killed):
        build(tmp_path, scans(), prior=Biased(0.0, steps=2), **RESUMED)
    monkeypatch.undo()
    watch, done = Recorded(), Workspace(tmp_path, "x").latest()
    atlas = build(tmp_path, scans(), watch, prior=Biased(0.0, steps=2), **RESUMED)
    wanted, files = uninterrupted
    assert torch.equal(atlas.image, wanted.image)
    assert torch.equal(parameters_of(atlas), parameters_of(wanted))
    assert_same_contents(contents(tmp_path), files)
    times = {"seconds", "refine_seconds"}
    for found, row in zip(atlas.history, wanted.history, strict=True):
        assert {k: v for k, v in found.items() if k not in times} == {k: v for k, v in row.items() if k not in times}
    assert len(watch.rows) == len(wanted.history) - done


def test_a_finished_atlas_is_only_read(tmp_path):
    first, cohort = build(tmp_path, scans()), Counted(images_of(scans())[:, 0])
    again = build(tmp_path, cohort)
    assert torch.equal(first.image, again.image)
    assert torch.equal(parameters_of(first), parameters_of(again))
    assert again.history == first.history
    assert cohort.num_read == 0


# --- Memory -----------------------------------------------------------------------------------------------------------


class Counted(Cohort):
    """Says how many scans were read, and how many of them are still held by somebody."""

    def __init__(self, images):
        self.images_, self.shape = images, tuple(images.shape[1:])
        self.names = [str(index) for index in range(len(images))]
        self.num_read, self.given, self.most_held = 0, [], 0

    def images(self, indices):
        self.given = [(reference, count) for reference, count in self.given if reference() is not None]
        self.most_held = max(self.most_held, sum(count for _, count in self.given) + len(indices))
        self.num_read += len(indices)
        found = self.images_[list(indices)][:, None].clone()
        self.given.append((weakref.ref(found), len(indices)))
        return found

    def labels(self, index):
        return None


@pytest.mark.parametrize("center", ["velocity", "delayed"])
def test_no_more_scans_are_held_than_a_batch(tmp_path, center):
    cohort = Counted(images_of(scans(count=7))[:, 0])
    options = {"iterations": 5, "refine": 1, "update": "cg", "cg_steps": 2, "cache_mb": 0}
    builder = builder_of(tmp_path, cohort, batch_size=2, center=center, **options)
    sizes = []
    builder.run(lambda row, image: sizes.append(sum(os.path.getsize(path) for path in tmp_path.iterdir())))
    assert cohort.most_held <= 4  # one batch, and the one before that has just been let go
    assert not builder._warpers
    # nor does the folder grow, but for a row of the history in each of two files
    assert all(after - before < 1000 for before, after in itertools.pairwise(sizes[1:]))


# --- Engines ----------------------------------------------------------------------------------------------------------

SHARED = {
    "batch_size": 1, "exact_reduce": True, "iterations": 2, "refine": 1, "final_refine": 1, "cg_steps": 3,
    "center": "velocity",
}  # fmt: skip


def few():
    return scans(count=3)


def worker(folder, number, num_workers, results, patience=10.0, **options):
    workspace = Workspace(folder / "state", "x")
    engine = MapReduce(folder / "sums", number, num_workers, patience, workspace.latest)
    atlas = builder_of(folder / "state", few(), engine=engine, **{**SHARED, **options}).run()
    results[number] = (atlas.image, parameters_of(atlas), engine.iteration)


@pytest.mark.parametrize(
    ("center", "exact"),
    [
        ("velocity", True),
        ("delayed", False),
        *(pytest.param(*case, marks=slow) for case in (("velocity", False), ("delayed", True))),
    ],
)
def test_two_jobs_build_the_atlas_of_one_process_to_the_bit(tmp_path, exact, center):
    options = {"exact_reduce": exact, "center": center}
    wanted = build(tmp_path / "single", few(), **{**SHARED, **options})
    results = {}
    threads = [
        threading.Thread(target=worker, args=(tmp_path / "shared", number, 2, results), kwargs=options)
        for number in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(2):
        image, parameter, iteration = results[number]
        assert torch.equal(image, wanted.image)
        assert torch.equal(parameter, parameters_of(wanted))
        assert iteration == 3
    left = {path.name[:4] for path in (tmp_path / "shared" / "sums").iterdir()}
    assert left == {"0002", "0003"}
    assert_same_contents(contents(tmp_path / "shared" / "state"), contents(tmp_path / "single"))


def test_a_job_whose_partner_died_goes_on_alone(tmp_path):
    results = {}
    worker(tmp_path, 0, 2, results, patience=0.05)
    assert torch.equal(results[0][0], build(tmp_path / "single", few(), **SHARED).image)
    # started again, the other finds everything done, and takes part in what comes after under the same name
    worker(tmp_path, 1, 2, results)
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert results[0][2] == results[1][2] == 3


@pytest.mark.parametrize("number", [0, pytest.param(1, marks=slow)])
def test_a_job_that_died_and_starts_again_catches_up(tmp_path, monkeypatch, number):
    results, original = {}, Workspace.save_shard
    calls = [0]

    def dies(self, iteration, shard, tensors):
        calls[0] += 1
        if calls[0] == 3:
            raise Killed
        original(self, iteration, shard, tensors)

    monkeypatch.setattr(Workspace, "save_shard", dies)
    with pytest.raises(Killed):
        worker(tmp_path, number, 2, results, patience=0.05)
    monkeypatch.undo()
    threads = [threading.Thread(target=worker, args=(tmp_path, n, 2, results)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wanted = build(tmp_path / "single", few(), **SHARED)
    for n in range(2):
        assert torch.equal(results[n][0], wanted.image)


def test_a_job_that_was_overtaken_goes_on_where_the_others_are(tmp_path):
    results, slow = {}, {}
    workspace = Workspace(tmp_path / "state", "x")
    engine = MapReduce(tmp_path / "sums", 1, 2, 0.05, workspace.latest)
    builder = builder_of(tmp_path / "state", few(), engine=engine, **SHARED)
    real = builder._improve

    def stalls(*arguments):
        if not slow:  # while it computes, the other loses patience and finishes
            slow["iteration"] = engine.iteration
            worker(tmp_path, 0, 2, results, patience=0.05)
        return real(*arguments)

    builder._improve = stalls
    atlas = builder.run()
    assert slow["iteration"] == 1
    assert engine.iteration == 3
    assert torch.equal(atlas.image, results[0][0])


def distributed_process(rank, folder, options):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    atlas = builder_of(folder / "state", few(), engine=Distributed(), **options).run()
    torch.save({"image": atlas.image, "parameters": parameters_of(atlas)}, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("center", ["velocity", "delayed"])
def test_two_processes_build_the_atlas_of_one_to_the_bit(tmp_path, center):
    options = {**SHARED, "center": center}
    mp.spawn(distributed_process, (tmp_path, options), nprocs=2)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    wanted = build(tmp_path / "single", few(), **options)
    torch.set_num_threads(threads)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert torch.equal(found["image"], wanted.image)
        assert torch.equal(found["parameters"], parameters_of(wanted))
