"""DAM: counts, peaks and boxes by hand and against loops, what covers a cell, what the heads learn from."""

import pytest
import torch
import torch.nn.functional as F

from projects.sokd.dam import DAM, Detection, box_counts, neighbourhood_max
from projects.sokd.loss import area_loss, consistency_loss
from shared.errors import InputError


def detection(batch=3, classes=4, height=6, width=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    heat, size, offset = (torch.randn(batch, n, height, width, generator=generator) for n in (classes, 2, 2))
    return Detection(heat, 3 * size.abs(), 2 * offset)


def constant(heat, size, offset):
    """One sample whose size (w, h) and offset (dx, dy) are the same in every cell."""
    maps = [torch.tensor(pair)[None, :, None, None].expand(1, 2, *heat.shape[2:]) for pair in (size, offset)]
    return Detection(heat, *maps)


def one_peak(x, y, height=8, width=8, classes=1):
    heat = torch.zeros(1, classes, height, width)
    heat[0, -1, y, x] = 1.0
    return heat


def plain_areas(found, num_areas, kernel):
    """Boxes by loops over classes and cells; a set for each sample, as equal scores have no order."""
    B, K, H, W = found.heat.shape
    boxes, reach = [], kernel // 2
    for b in range(B):
        peaks = []
        for k in range(K):
            for y in range(H):
                for x in range(W):
                    near = found.heat[b, k, max(y - reach, 0) : y + reach + 1, max(x - reach, 0) : x + reach + 1]
                    if found.heat[b, k, y, x] == near.max():
                        peaks.append((found.heat[b, k, y, x].item(), x, y))
        assert len(peaks) >= num_areas
        boxes.append([])
        for _, x, y in sorted(peaks, reverse=True)[:num_areas]:
            w, h = found.size[b, :, y, x].tolist()
            dx, dy = found.offset[b, :, y, x].tolist()
            edges = [(x + dx - w / 2, W), (y + dy - h / 2, H), (x + dx + w / 2, W), (y + dy + h / 2, H)]
            boxes[-1].append([int(min(max(edge, 0), side - 1)) for edge, side in edges])
    return boxes


def plain_counts(boxes, height, width):
    counts = torch.zeros(len(boxes), height, width)
    for b, sample in enumerate(boxes):
        for left, top, right, bottom in sample:
            counts[b, top : bottom + 1, left : right + 1] += 1
    return counts


@pytest.mark.parametrize(("channels", "expected"), [(128, 456_168), (256, 1_796_968)])
def test_counts_of_the_paper(channels, expected):
    assert sum(p.numel() for p in DAM(channels, 100).parameters()) == expected


def test_heads_give_classes_sizes_and_offsets_under_their_own_names():
    dam = DAM(6, 5)
    found = dam(torch.randn(2, 6, 8, 8))
    assert [x.shape[1] for x in found] == [5, 2, 2]
    assert found.size.min() > 0
    assert found.heat.min() < 0
    assert found.offset.min() < 0
    heads = {".".join(name.split(".")[:2]) for name in dam.state_dict()}
    assert heads == {f"{part}_head.{layer}" for part in ("heatmap", "size", "offset") for layer in (0, 2)}


def test_final_relu_keeps_the_heat_at_or_above_one_half():
    torch.manual_seed(0)
    found = DAM(6, 5, final_relu=True)(torch.randn(2, 6, 8, 8))
    assert found.heat.sigmoid().min() == 0.5
    assert found.heat.max() > 0
    assert found.size.min() == 0
    assert found.offset.min() == 0


# --------------------------------------------------------------------------------------------------------------- areas


def test_one_peak_by_hand():
    found = constant(one_peak(3, 4), size=(2.0, 4.0), offset=(1.5, -0.25))
    # centre (4.5, 3.75), corners (3.5, 1.75) and (5.5, 5.75)
    assert DAM(1, 1, areas=1).areas(found).tolist() == [[[3, 1, 5, 5]]]


@pytest.mark.parametrize(("x", "y"), [(0, 0), (3, 2), (7, 7)])
def test_a_box_without_size_covers_one_cell(x, y):
    dam = DAM(1, 1, areas=1)
    found = constant(one_peak(x, y), size=(0.0, 0.0), offset=(0.0, 0.0))
    cover = dam.cover(found, found)
    assert cover.sum() == 1
    assert cover[0, 0, y, x] == 1


def test_boxes_end_at_the_border_of_the_map():
    dam = DAM(1, 2, areas=1)
    found = constant(one_peak(1, 1, 5, 9, classes=2), size=(1e6, 1e6), offset=(0.0, 0.0))
    assert dam.areas(found).tolist() == [[[0, 0, 8, 4]]]
    beyond = constant(one_peak(1, 1, 5, 9, classes=2), size=(1.0, 1.0), offset=(50.0, -50.0))
    assert dam.areas(beyond).tolist() == [[[8, 0, 8, 0]]]


def test_neighbours_of_a_peak_and_of_other_classes():
    heat = torch.zeros(1, 2, 8, 8)
    heat[0, 0, 2, 2], heat[0, 0, 2, 3], heat[0, 1, 2, 3], heat[0, 0, 6, 6] = 5.0, 4.0, 3.0, 2.0
    found = constant(heat, size=(0.0, 0.0), offset=(0.0, 0.0))
    boxes = DAM(1, 2, areas=3).areas(found)
    assert boxes[0, :, :2].tolist() == [[2, 2], [3, 2], [6, 6]]  # (3, 2) is a peak of the second class alone


def test_saturated_heat_still_has_one_peak():
    heat = one_peak(3, 4)
    heat[0, 0, 4, 2], heat[0, 0, 4, 3] = 99.0, 100.0
    found = constant(heat, size=(0.0, 0.0), offset=(0.0, 0.0))
    assert DAM(1, 1, areas=1).areas(found).tolist() == [[[3, 4, 3, 4]]]


def test_a_map_with_too_few_peaks_gives_its_highest_other_cells():
    heat = -torch.arange(25.0).view(1, 1, 5, 5)
    found = constant(heat, size=(0.0, 0.0), offset=(0.0, 0.0))
    assert DAM(1, 1, areas=3).areas(found)[0, :, :2].tolist() == [[0, 0], [1, 0], [2, 0]]


@pytest.mark.parametrize("kernel", [1, 3, 5, 9])
def test_the_maximum_of_a_neighbourhood_is_that_of_the_pool(kernel):
    heat = detection().heat
    assert torch.equal(neighbourhood_max(heat, kernel), F.max_pool2d(heat, kernel, 1, kernel // 2))


@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_areas_and_counts_equal_loops_over_cells(kernel):
    found = detection()
    boxes = DAM(1, 4, areas=5, kernel=kernel).areas(found)
    expected = plain_areas(found, 5, kernel)
    assert boxes.tolist() == expected
    assert torch.equal(box_counts(boxes, 6, 7), plain_counts(expected, 6, 7))


def test_more_areas_than_cells_are_named():
    found = detection(1, 2, 3, 4)
    assert DAM(1, 2, areas=24).areas(found).shape == (1, 24, 4)
    with pytest.raises(InputError, match=r"dam.areas=25.*at most 24"):
        DAM(1, 2, areas=25).areas(found)


@pytest.mark.parametrize(
    ("option", "message"),
    [({"source": "both"}, "source 'both'"), ({"mask_mode": "max"}, "mask_mode 'max'"), ({"kernel": 2}, "odd"),
     ({"areas": 0}, "dam.areas=0"), ({"heat_channels": 0}, "dam.heat_channels=0")],
)  # fmt: skip
def test_bad_options_are_named(option, message):
    with pytest.raises(InputError, match=message):
        DAM(**({"channels": 4, "heat_channels": 2} | option))


# --------------------------------------------------------------------------------------------------------------- cover


def test_sources_take_student_teacher_fewer_or_more():
    student, teacher = detection(seed=1), detection(seed=2)
    cover = {source: DAM(1, 4, source=source).cover(student, teacher)[:, 0] for source in
             ("student", "teacher", "intersection", "union")}  # fmt: skip
    own, other = (plain_counts(plain_areas(x, 8, 3), 6, 7) for x in (student, teacher))
    assert not torch.equal(own, other)
    assert torch.equal(cover["student"], own)
    assert torch.equal(cover["teacher"], other)
    assert torch.equal(cover["intersection"], torch.minimum(own, other))
    assert torch.equal(cover["union"], torch.maximum(own, other))


def test_mask_modes_count_square_or_flatten():
    found = detection()
    cover = {mode: DAM(1, 4, mask_mode=mode).cover(found, found) for mode in ("sum_of_losses", "fork", "union")}
    count = cover["sum_of_losses"]
    assert count.shape == (3, 1, 6, 7)
    assert count.max() > 1
    assert torch.equal(cover["fork"], count**2)
    assert torch.equal(cover["union"], (count > 0).float())


def test_the_modes_are_the_sums_they_stand_for():
    student, teacher = torch.randn(2, 3, 5, 6, 7)
    found = detection()
    masks = torch.stack(
        [plain_counts([[box] for box in boxes], 6, 7) for boxes in zip(*plain_areas(found, 8, 3), strict=True)]
    )[:, :, None]
    of_areas = sum((mask * student - mask * teacher).square().mean() for mask in masks)
    torch.testing.assert_close(area_loss(student, teacher, DAM(1, 4).cover(found, found)), of_areas)
    of_sum = F.mse_loss(masks.sum(0) * student, masks.sum(0) * teacher)
    fork = DAM(1, 4, mask_mode="fork").cover(found, found)
    torch.testing.assert_close(area_loss(student, teacher, fork), of_sum)


def test_one_area_over_the_whole_map_is_the_mean_squared_error():
    student, teacher = torch.randn(2, 3, 5, 8, 8)
    found = constant(one_peak(4, 4), size=(99.0, 99.0), offset=(0.0, 0.0))
    cover = DAM(1, 1, areas=1).cover(found, found)
    assert torch.equal(area_loss(student, teacher, cover), F.mse_loss(student, teacher))


# ------------------------------------------------------------------------------------------------------------ learning


def test_heads_learn_from_consistency_alone():
    torch.manual_seed(0)
    dam = DAM(6, 5)
    student, teacher = torch.randn(3, 6, 8, 8, requires_grad=True), torch.randn(3, 6, 8, 8)
    said_student, said_teacher = dam(student), dam(teacher)
    cover = dam.cover(said_student, said_teacher)
    assert not cover.requires_grad
    area_loss(student, teacher, cover).backward()
    assert student.grad.abs().max() > 0
    assert all(p.grad is None for p in dam.parameters())
    consistency_loss(said_student, said_teacher).backward()
    # what is added to every offset and every heat cancels in the difference
    cancels = ("heatmap_head.2.bias", "offset_head.2.bias")
    assert all(p.grad.abs().max() > 0 for name, p in dam.named_parameters() if name not in cancels)
    assert all(dict(dam.named_parameters())[name].grad.abs().max() < 1e-6 for name in cancels)


def test_equal_features_are_consistent():
    dam, feat = DAM(6, 5), torch.randn(3, 6, 8, 8)
    assert consistency_loss(dam(feat), dam(feat.clone())) == 0
    assert consistency_loss(dam(feat), dam(2 * feat)) > 0


def test_bf16_autocast_and_channels_last_find_areas_too():
    dam, feat = DAM(6, 5), torch.randn(3, 6, 8, 8)
    expected = dam(feat)
    last = dam(feat.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(last, expected)
    with torch.autocast("cpu", torch.bfloat16):
        found = dam(feat)
        cover = dam.cover(found, found)
        loss = consistency_loss(found, dam(2 * feat))
    torch.testing.assert_close(found.heat.float(), expected.heat, rtol=0, atol=0.02)
    assert cover.dtype == loss.dtype == torch.float32
    assert cover.max() >= 1
