"""Scores of a finished atlas, and the labels that its subjects give it."""

import math
import threading

import pytest
import torch

from projects.hybrid_atlas.assess import (
    COLUMNS,
    MAX_LABELS,
    Votes,
    assess,
    atlas_labels,
    image_scores,
    one_hot_splat,
    vote,
)
from projects.hybrid_atlas.atlas import AtlasBuilder, AtlasOptions
from projects.hybrid_atlas.cohort import Synthetic, Toys, nearest
from projects.hybrid_atlas.deformation import Flash
from projects.hybrid_atlas.engine import MapReduce, Single
from projects.hybrid_atlas.loss import energies
from projects.hybrid_atlas.scores import dice, psnr
from projects.hybrid_atlas.toys import bullseye
from projects.hybrid_atlas.workspace import Workspace
from shared.errors import InputError

PLANE, BOX = (36, 32), (16, 17, 16)


def scans(shape=PLANE, count=5):
    toy = bullseye(shape, jitter=0)
    return Synthetic(toy.image, toy.labels, toy.names, count, 0, amplitude=1.2, num_modes=5)


def labelled(cohort, missing=()):
    """The same scans without a known truth, some of them without labels."""
    images = cohort.images(range(len(cohort)))[:, 0].numpy()
    given = Toys(images, torch.stack([cohort.labels(index) for index in range(len(cohort))]).numpy())
    of_all = given.labels
    given.labels = lambda index: None if index in missing else of_all(index)
    return given


def built(folder, cohort, engine=None, **options):
    def make(factor):
        return Flash([size // factor for size in cohort.shape], 7, steps=3, spacing=float(factor))

    chosen = AtlasOptions(
        **{"iterations": 3, "final_iterations": 1, "refine": 4, "optimizer": "lbfgs", "tolerance": 0.0, **options}
    )
    builder = AtlasBuilder(cohort, make, chosen, None, engine or Single(), Workspace(folder, "x"))
    return builder, builder.run()


def column(table, name):
    return table[:, COLUMNS.index(name)]


@pytest.mark.parametrize("shape", [PLANE, pytest.param(BOX, marks=pytest.mark.slow)], ids=["2d", "3d"])
def test_every_subject_is_scored(tmp_path, shape):
    cohort = scans(shape)
    builder, atlas = built(tmp_path, cohort, batch_size=2)
    summary, table = assess(builder, atlas)
    assert table.shape == (5, len(COLUMNS))
    parameter = torch.cat([atlas.parameters(shard) for shard in range(3)])
    images, u = cohort.images(range(5)), atlas.model.displacement(parameter)
    warped = atlas.model.warp(atlas.image, parameter)
    found = energies(atlas.model, parameter, atlas.image, images, 0.03)
    torch.testing.assert_close(column(table, "energy").float(), found.total, rtol=1e-4, atol=0)
    torch.testing.assert_close(column(table, "image_energy").float(), found.image, rtol=1e-4, atol=0)
    torch.testing.assert_close(column(table, "regulariser").float(), found.regulariser, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(column(table, "psnr").float(), psnr(warped, images), rtol=1e-4, atol=0)
    torch.testing.assert_close(column(table, "mse").float(), (warped - images).square().flatten(1).mean(1))
    assert (column(table, "ncc") > 0.95).all()
    lengths = u.square().sum(1).sqrt().flatten(1).mean(1)
    torch.testing.assert_close(column(table, "displacement").float(), lengths, rtol=1e-4, atol=1e-5)
    for index in range(5):
        truth = dice(nearest(cohort.truth_labels, u[index]), cohort.labels(index))
        assert float(column(table, "dice")[index]) == pytest.approx(truth)
    # pairs within a batch: the last subject is alone in its own
    assert column(table, "bridge_dice").isnan().tolist() == [False] * 4 + [True]
    assert (column(table, "bridge_dice")[:4] > 0.5).all()
    for name in COLUMNS:
        assert summary[name] == pytest.approx(float(column(table, name).nanmean()))
    assert summary["atlas_psnr"] == pytest.approx(float(psnr(atlas.image, cohort.truth)))
    assert 0.5 < summary["atlas_ssim"] <= 1
    assert summary["folding"] == 0


def test_registered_subjects_overlap_more_than_unregistered_ones(tmp_path):
    cohort = scans()
    builder, atlas = built(tmp_path, cohort)
    summary, _ = assess(builder, atlas)
    before = [dice(cohort.truth_labels, cohort.labels(index)) for index in range(5)]
    between = [dice(cohort.labels(index), cohort.labels((index + 1) % 5)) for index in range(5)]
    assert summary["dice"] > sum(before) / 5 + 0.05
    assert summary["bridge_dice"] > sum(between) / 5 + 0.05


def test_what_does_not_apply_is_left_out(tmp_path):
    cohort = Toys(scans().images(range(5))[:, 0].numpy())
    builder, atlas = built(tmp_path, cohort, iterations=1)
    assert vote(builder, atlas) is None
    summary, table = assess(builder, atlas)
    assert not {"dice", "bridge_dice", "atlas_psnr", "atlas_ssim"} & summary.keys()
    assert {"energy", "psnr", "folding", "sharpness", "focus_entropy"} <= summary.keys()
    assert column(table, "dice").isnan().all()
    assert all(math.isfinite(value) for value in summary.values())


@pytest.mark.parametrize(("shape", "exact"), [(PLANE, True), (PLANE, False), (BOX, True)], ids=str)
def test_subjects_vote_for_the_labels_of_the_atlas(tmp_path, shape, exact):
    cohort = scans(shape)
    builder, atlas = built(tmp_path, labelled(cohort), batch_size=2, exact_reduce=exact)
    votes = vote(builder, atlas)
    assert votes.values.tolist() == [0, 1, 2, 3]
    assert votes.counts == {0: 5, 1: 5, 2: 5, 3: 5}
    assert votes.weights.sum() == pytest.approx(5 * math.prod(shape), rel=1e-5)
    assert dice(votes.winner(), cohort.truth_labels) > (0.85 if len(shape) == 2 else 0.75)
    summary, table = assess(builder, atlas, votes)
    assert (column(table, "dice") > 0.6).all()
    assert "atlas_psnr" not in summary


@pytest.mark.parametrize("exact", [True, False])
def test_no_subject_votes_on_what_it_is_compared_with(tmp_path, exact):
    cohort = labelled(scans())
    lone = cohort.labels(2).clone()
    lone[8:12, 8:12] = 7  # a label that no other subject has
    of_all = cohort.labels
    cohort.labels = lambda index: lone if index == 2 else of_all(index)
    builder, atlas = built(tmp_path, cohort, exact_reduce=exact, center="none")
    votes = vote(builder, atlas)
    assert votes.counts[7] == 1
    assert 7 in votes.values
    u = atlas.model.displacement(torch.cat([atlas.parameters(shard) for shard in range(len(atlas.shards))]))
    assert not (atlas_labels(builder, votes, lone, u[2]) == 7).any()
    others = sum(one_hot_splat(of_all(index), u[index], votes.values) for index in (0, 1, 3, 4))
    wanted = votes._replace(weights=others).winner()
    assert (atlas_labels(builder, votes, lone, u[2]) == wanted).float().mean() > 0.999


def test_what_rounding_leaves_of_a_vote_is_none(tmp_path):
    builder, _ = built(tmp_path, labelled(scans(count=2)), iterations=1)
    own, u = scans().labels(0), scans().displacement([0])[0]
    values = torch.unique(own)
    weights = one_hot_splat(own, u, values)
    weights = (weights * 2**24 + 0.4).round() / 2**24 + 3e-8  # as whole-numbered sums give it, or a little more
    weights[2, 10, 12] += 0.5  # another subject reaches one voxel
    found = atlas_labels(builder, Votes(values, weights, {}), own, u)
    assert found[10, 12] == values[2]
    assert (found > 0).sum() == 1


def test_the_only_labelled_subject_is_not_compared_with_itself(tmp_path):
    builder, atlas = built(tmp_path, labelled(scans(), missing=(0, 1, 2, 4)), iterations=1)
    votes = vote(builder, atlas)
    assert votes.counts[1] == 1
    summary, table = assess(builder, atlas, votes)
    assert column(table, "dice").isnan().all()
    assert "dice" not in summary
    assert dice(votes.winner(), scans().truth_labels) > 0.5


def test_subjects_without_labels_are_left_out(tmp_path):
    builder, atlas = built(tmp_path, labelled(scans(), missing=(1,)), iterations=2)
    votes = vote(builder, atlas)
    assert votes.counts[2] == 4
    _, table = assess(builder, atlas, votes)
    assert column(table, "dice").isnan().tolist() == [False, True, False, False, False]
    assert column(table, "bridge_dice").isnan().tolist() == [True, True, False, False, False]


def test_labels_that_are_none_are_refused(tmp_path):
    cohort = labelled(scans())
    builder, atlas = built(tmp_path, cohort, iterations=1)
    cohort.labels = lambda index: torch.full(PLANE, -1)
    with pytest.raises(InputError, match="subject_0000 has labels outside of 0 to 65535"):
        vote(builder, atlas)
    cohort.labels = lambda index: torch.arange(math.prod(PLANE)).reshape(PLANE)
    with pytest.raises(InputError, match=f"hold 1152 values, more than {MAX_LABELS}: are they images"):
        vote(builder, atlas)


def test_jobs_that_share_a_folder_score_alike(tmp_path):
    cohort, results = labelled(scans()), {}
    options = {"batch_size": 2, "exact_reduce": True, "iterations": 1, "refine": 1, "cg_steps": 3}
    builder, atlas = built(tmp_path / "single", cohort, **options)
    votes = vote(builder, atlas)
    wanted = votes.weights, assess(builder, atlas, votes)[1]

    def work(number):
        workspace = Workspace(tmp_path / "shared", "x")
        engine = MapReduce(tmp_path / "sums", number, 2, 10.0, workspace.latest)
        builder, atlas = built(tmp_path / "shared", cohort, engine, **options)
        votes = vote(builder, atlas)
        results[number] = votes.weights, assess(builder, atlas, votes)[1]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(2):
        assert torch.equal(results[number][0], wanted[0])
        torch.testing.assert_close(results[number][1], wanted[1], equal_nan=True, rtol=0, atol=0)


def test_the_truth_scores_best():
    truth = scans().truth
    found, worse = image_scores(truth, truth), image_scores(0.5 * truth, truth)
    assert found["atlas_psnr"] == pytest.approx(120)
    assert found["atlas_ssim"] == pytest.approx(1)
    assert worse["atlas_psnr"] < 30
    assert worse["atlas_ssim"] < 0.99
    volume = scans(BOX).truth
    assert image_scores(volume, volume)["atlas_ssim"] == pytest.approx(1)
    assert "atlas_psnr" not in image_scores(truth, None)
