"""The search space: identities, where content moves to, gradients, what the randomness is drawn from."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from projects.sokd.operations import OPERATIONS, operations, sub_policies
from shared.errors import InputError

NAMES = tuple(OPERATIONS)
GEOMETRIC, RANDOM = NAMES[:5], NAMES[5:]
CHANNELS_LAST = torch.channels_last


def run(name, feat, value, seed=0, per_sample=False, **options):
    (operation,) = operations([name], **options)
    value = torch.as_tensor(value, dtype=torch.float32) if not torch.is_tensor(value) else value
    return operation.apply(feat, value, torch.Generator().manual_seed(seed), per_sample)


def features(*shape, seed=0, **options):
    return torch.randn(*(shape or (3, 6, 8, 8)), generator=torch.Generator().manual_seed(seed), **options)


def test_the_search_space_is_the_papers():
    assert NAMES == (
        "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Cutout", "Noise", "ChannelShuffle", "ChannelDrop"
    )  # fmt: skip
    ranges = [(operation.low, operation.high) for operation in OPERATIONS.values()]
    assert ranges == [(-0.3, 0.3)] * 2 + [(-0.45, 0.45)] * 2 + [(-30, 30), (0, 0.2), (0, 0.1), (0, 1), (0, 0.5)]
    assert [name for name in NAMES if not OPERATIONS[name].pathwise] == ["ChannelShuffle", "ChannelDrop"]


def test_magnitudes_span_the_range_and_keep_their_gradient():
    rotate = OPERATIONS["Rotate"]
    assert [rotate.value(m) for m in (0, 0.5, 1)] == [-30, 0, 30]
    magnitude = torch.tensor(0.2, requires_grad=True)
    (gradient,) = torch.autograd.grad(rotate.value(magnitude), magnitude)
    assert gradient == 60


@pytest.mark.parametrize("name", [name for name in NAMES if name != "ChannelShuffle"])
@pytest.mark.parametrize("shape", [(3, 6, 8, 8), (2, 3, 5, 7)])
def test_a_value_of_zero_changes_nothing(name, shape):
    feat = features(*shape)
    torch.testing.assert_close(run(name, feat, 0.0), feat, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", GEOMETRIC)
def test_half_the_magnitude_of_a_signed_range_changes_nothing(name):
    feat = features()
    value = OPERATIONS[name].value(torch.tensor(0.5))
    torch.testing.assert_close(run(name, feat, value), feat, rtol=0, atol=1e-5)


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_shape_dtype_and_input_are_kept_in_every_layout(name, per_sample):
    feat, value = features(), OPERATIONS[name].high
    before = feat.clone()
    expected = run(name, feat, value, per_sample=per_sample)
    last = feat.contiguous(memory_format=CHANNELS_LAST)
    torch.testing.assert_close(run(name, last, value, per_sample=per_sample), expected)
    for changed in (expected, run(name, last, value, per_sample=per_sample)):
        assert changed.shape == feat.shape
        assert changed.dtype == feat.dtype
        assert not torch.equal(changed, feat)
    assert torch.equal(feat, before)
    assert torch.equal(last, before)
    strided = features(3, 6, 16, 8)[:, :, ::2]
    torch.testing.assert_close(
        run(name, strided, value, per_sample=per_sample), run(name, strided.contiguous(), value, per_sample=per_sample)
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32_under_autocast_too(name, dtype):
    feat, value = features().to(dtype), OPERATIONS[name].high
    expected = run(name, feat.float(), value).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(run(name, feat, value), expected)
        assert run(name, feat.double(), value).dtype == torch.double


@pytest.mark.parametrize("name", NAMES)
def test_the_least_side_is_that_of_a_map_that_changes(name):
    side = OPERATIONS[name].min_side
    feat = features(2, 6, side, side)
    assert not torch.allclose(run(name, feat, OPERATIONS[name].high), feat, rtol=0, atol=1e-3)


# ------------------------------------------------------------------------------------------------------------ geometry


@pytest.mark.parametrize("columns", [-3, 1, 4])
def test_translation_is_a_roll_away_from_the_border(columns):
    feat = features(2, 3, 16, 16)
    inside = slice(max(columns, 0), 16 + min(columns, 0))
    moved = run("TranslateX", feat, columns / 16)
    rolled = torch.zeros_like(feat)
    rolled[..., inside] = feat.roll(columns, 3)[..., inside]
    torch.testing.assert_close(moved, rolled, rtol=0, atol=1e-5)
    torch.testing.assert_close(run("TranslateY", feat.mT, columns / 16), rolled.mT, rtol=0, atol=1e-5)


def test_translation_counts_in_columns_or_rows_of_the_map():
    feat = features(1, 2, 4, 10)
    torch.testing.assert_close(run("TranslateX", feat, 0.2), F.pad(feat, (2, -2)), rtol=0, atol=1e-5)
    torch.testing.assert_close(run("TranslateY", feat, 0.25), F.pad(feat, (0, 0, 1, -1)), rtol=0, atol=1e-5)


def test_the_furthest_translation_leaves_more_than_half_of_the_map():
    moved = run("TranslateX", torch.ones(1, 1, 16, 16), 0.45)
    assert moved[0, 0, 0].sum().item() == pytest.approx(16 - 7.2, abs=1e-4)
    assert moved[0, 0, 0, :7].abs().max() == 0


@pytest.mark.parametrize("side", [7, 8])
@pytest.mark.parametrize("quarters", [-1, 1, 2])
def test_quarter_turns_are_those_of_rot90(side, quarters):
    feat = features(2, 3, side, side)
    torch.testing.assert_close(
        run("Rotate", feat, 90.0 * quarters), torch.rot90(feat, quarters, (2, 3)), rtol=0, atol=1e-4
    )


def test_rotation_of_an_oblong_map_keeps_its_proportions():
    feat = torch.zeros(1, 1, 5, 9)
    feat[0, 0, 2, 6] = 1.0  # two columns to the right of the centre
    turned = run("Rotate", feat, 90.0)
    assert turned[0, 0, 0, 4].item() == pytest.approx(1, abs=1e-5)
    assert turned.sum().item() == pytest.approx(1, abs=1e-5)


def test_shear_moves_each_row_by_its_distance_from_the_centre():
    feat = F.pad(features(1, 2, 5, 5), (4, 4))
    sheared = run("ShearX", feat, 1.0)
    expected = torch.stack([feat[:, :, row].roll(row - 2, 2) for row in range(5)], 2)
    torch.testing.assert_close(sheared, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(run("ShearY", feat.mT, 1.0), expected.mT, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", GEOMETRIC)
def test_gradients_of_the_geometric_operations(name):
    feat = features(2, 2, 4, 5, dtype=torch.double, requires_grad=True)
    # away from the kinks of bilinear weights
    value = torch.tensor(0.37 * OPERATIONS[name].high, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, v: run(name, x, v), (feat, value))


@pytest.mark.parametrize("name", ["Cutout", "Noise"])
@pytest.mark.parametrize("per_sample", [False, True])
def test_gradients_of_cutout_and_noise(name, per_sample):
    feat = features(2, 2, 4, 5, dtype=torch.double, requires_grad=True)
    value = torch.tensor(0.6 * OPERATIONS[name].high, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, v: run(name, x, v, 0, per_sample), (feat, value))


@pytest.mark.parametrize("name", NAMES)
def test_the_value_gets_a_gradient_exactly_where_the_operation_says_so(name):
    feat, value = features(requires_grad=True), torch.tensor(0.1, requires_grad=True)
    (run(name, feat, value) ** 2).sum().backward()
    assert feat.grad.abs().max() > 0
    assert (value.grad is not None) == OPERATIONS[name].pathwise
    assert value.grad is None or value.grad != 0


# ---------------------------------------------------------------------------------------------------------- randomness


@pytest.mark.parametrize("name", [name for name in RANDOM if name != "Noise"])
def test_a_seed_repeats_and_samples_share_or_differ_as_asked(name):
    feat, value = torch.arange(1.0, 33)[:, None, None].expand(4, 32, 8, 8), OPERATIONS[name].high
    for per_sample in (False, True):
        first = run(name, feat, value, 1, per_sample)
        assert torch.equal(first, run(name, feat, value, 1, per_sample))
        assert not torch.equal(first, run(name, feat, value, 2, per_sample))
        same = [torch.equal(first[a], first[b]) for a, b in itertools.combinations(range(4), 2)]
        assert not any(same) if per_sample else all(same)


def test_operations_draw_from_their_generator_alone():
    before = torch.get_rng_state()
    for name in NAMES:
        run(name, features(), 0.1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("seed", range(5))
def test_cutout_takes_at_most_its_share_and_is_felt_on_small_maps(seed):
    kept = run("Cutout", torch.ones(2, 3, 8, 8), 0.2, seed)
    lost = 1 - kept
    assert 0 < lost[0, 0].sum() <= (0.2 * 8) ** 2 + 1e-5
    assert lost.min() >= 0
    assert torch.equal(kept, kept[:1, :1].expand_as(kept))
    assert run("Cutout", torch.ones(1, 1, 8, 8), 0.2, seed).min() < 0.9


def test_cutout_of_the_middle_by_hand():
    seed = next(s for s in range(1000) if cutout_centre(s).sub(0.5).abs().max() < 0.1)
    kept = run("Cutout", torch.ones(1, 1, 10, 10), 0.5, seed)
    y, x = (10 * cutout_centre(seed)).tolist()
    assert (1 - kept).sum().item() == pytest.approx(25, abs=1e-3)  # nothing of the box is outside the map
    cells = torch.arange(10) + 0.5
    weight = (1 - kept)[0, 0]
    assert (weight.sum(0) @ cells / 25).item() == pytest.approx(x, abs=1e-3)
    assert (weight.sum(1) @ cells / 25).item() == pytest.approx(y, abs=1e-3)


def cutout_centre(seed):
    return torch.rand(1, 2, generator=torch.Generator().manual_seed(seed))[0]


def test_noise_is_of_each_sample_its_own_and_repeats_with_its_seed():
    feat = torch.zeros(2, 4, 8, 8)
    first, again, other = (run("Noise", feat, 0.1, seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first[0], first[1])


def test_noise_has_the_deviation_asked_for():
    feat = features(2, 16, 32, 32)
    added = run("Noise", feat, 0.1, per_sample=True) - feat
    assert added.std().item() == pytest.approx(0.1, rel=0.03)
    assert added.mean().item() == pytest.approx(0, abs=0.003)


def test_nonnegative_noise_clamps_only_what_was_not_negative():
    feat = features(2, 8, 8, 8)
    feat[feat.abs() < 0.5] = 0.0
    plain, clamped = run("Noise", feat, 0.5), run("Noise", feat, 0.5, nonnegative=True)
    assert plain[feat >= 0].min() < 0
    assert clamped[feat >= 0].min() == 0
    assert torch.equal(clamped[feat < 0], plain[feat < 0])
    assert torch.equal(clamped[plain > 0], plain[plain > 0])


def test_shuffled_channels_are_the_same_channels():
    feat = torch.arange(32.0)[None, :, None, None].expand(2, 32, 2, 2)
    for per_sample in (False, True):
        shuffled = run("ChannelShuffle", feat, 0.0, per_sample=per_sample)
        assert torch.equal(shuffled.sort(1).values, feat)
        assert torch.equal(shuffled, run("ChannelShuffle", feat, 1.0, per_sample=per_sample))


def test_channels_drop_with_the_probability_asked_for_and_as_a_whole():
    feat = torch.ones(4, 4000, 2, 2)
    kept = run("ChannelDrop", feat, 0.3)
    assert kept[:, :, 0, 0].mean().item() == pytest.approx(0.7, abs=0.03)
    assert torch.equal(kept, kept[:1, :, :1, :1].expand_as(kept))
    assert set(kept.unique().tolist()) == {0.0, 1.0}


def test_rescaled_channel_drop_keeps_the_mean():
    dropped = run("ChannelDrop", torch.ones(1, 4000, 1, 1), 0.3, rescale=True)
    torch.testing.assert_close(dropped.unique(), torch.tensor([0, 1 / 0.7]))
    assert dropped.mean().item() == pytest.approx(1, abs=0.04)
    value = torch.tensor(0.3, requires_grad=True)
    assert not run("ChannelDrop", torch.ones(1, 4, 1, 1), value, rescale=True).requires_grad


# -------------------------------------------------------------------------------------------------------------- choice


def test_chosen_operations_keep_their_order():
    assert [operation.name for operation in operations(["Noise", "ShearX"])] == ["Noise", "ShearX"]


def test_unknown_and_repeated_operations_are_named():
    with pytest.raises(InputError, match=r"'Blur'.*ShearX, .*ChannelDrop"):
        operations(["Noise", "Blur"])
    with pytest.raises(InputError, match=r"'Noise'.*more than once"):
        operations(["Noise", "ShearX", "Noise"])


def test_sub_policies_are_all_unordered_pairs_in_the_order_of_the_list():
    pairs = sub_policies(9, None, 0)
    assert pairs.tolist() == [[i, j] for i in range(9) for j in range(i + 1, 9)]
    assert pairs.dtype == torch.int64


def test_drawn_sub_policies_are_fixed_by_their_seed():
    drawn = sub_policies(9, 35, 3)
    assert torch.equal(drawn, sub_policies(9, 35, 3))
    assert len({tuple(pair) for pair in drawn.tolist()}) == 35
    places = (9 * drawn[:, 0] + drawn[:, 1]).tolist()
    assert (drawn[:, 0] < drawn[:, 1]).all()
    assert places == sorted(places)
    assert len({tuple(sub_policies(9, 35, seed).flatten().tolist()) for seed in range(8)}) > 1


@pytest.mark.parametrize(
    ("count", "wanted", "message"), [(1, None, "at least two"), (9, 37, "=37.*1 to 36"), (9, 0, "=0.*1 to 36")]
)
def test_impossible_numbers_of_sub_policies_are_named(count, wanted, message):
    with pytest.raises(InputError, match=message):
        sub_policies(count, wanted, 0)
