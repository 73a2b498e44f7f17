import math

import numpy as np
import pytest
from PIL import ImageFont

from projects.lg3d.pictures import (
    COLORS,
    HIGHEST,
    LINE,
    LOWEST,
    TEXT,
    Overhead,
    Perspective,
    corner_view,
    corners_of,
    draw_scene,
    draw_texts,
    drawn_points,
    extent_of,
    is_near_wall,
    overhead_view,
    write_boxes_ply,
)
from shared.errors import InputError
from shared.io.points import read_points

NAMES = ("bed", "chair", "lamp")
SIZE = 200
NONE = (np.zeros((0, 7)), np.zeros(0, int), np.zeros(0))


def room(walls="wsen", count=6000, width=4.0):
    """Points (n, 3) of a square floor from (0, 0) on, and of walls 2 m high in the west, south, east and north."""
    rng = np.random.default_rng(0)
    along, height = rng.uniform(0, width, count), rng.uniform(0, 2, count)
    far, near = np.full(count, width), np.zeros(count)
    sides = {"w": (near, along), "s": (along, near), "e": (far, along), "n": (along, far)}
    floor = np.column_stack([rng.uniform(0, width, (4 * count, 2)), np.zeros(4 * count)])
    return np.concatenate([floor, *(np.column_stack([*sides[wall], height]) for wall in walls)])


def pixel(picture, view, x, y):
    """Colour from above at a place in the scene."""
    column, row, _ = view(np.array([x, y, 0.0])).astype(int)
    return picture[row, column].astype(int)


def test_a_scene_becomes_two_square_views():
    points, boxes = room(), np.array([[2, 2, 0.4, 1, 0.6, 0.8, 0.3]])
    given = points.copy(), boxes.copy()
    picture = draw_scene(points, boxes, boxes, np.array([1]), np.array([0.7]), NAMES, size=SIZE)
    assert picture.shape == (SIZE, 2 * SIZE, 3)
    assert picture.dtype == np.uint8
    assert np.array_equal(picture, draw_scene(points, boxes, boxes, [1], [0.7], NAMES, size=SIZE))
    assert np.array_equal(points, given[0])
    assert np.array_equal(boxes, given[1])


def test_from_above_lengths_are_to_scale_and_y_is_up():
    view = overhead_view(np.array([0, 0, 0.0]), np.array([4, 2, 3.0]), 1000)
    # the longer side fills nine tenths
    found = view(np.array([[0, 0, 5], [4, 2, 6], [2, 1, 7], [3, 1, 8.0]]))
    np.testing.assert_allclose(found, [[50, 725, 5], [950, 275, 6], [500, 500, 7], [725, 500, 8]])


def test_a_box_from_above_is_where_it_stands_and_its_line_points_to_the_front():
    points = room()
    box = np.array([[2.4, 1.4, 0.5, 2, 1, 1, math.pi / 2]])  # its front towards +y
    picture = draw_scene(points, None, box, np.array([2]), np.array([0.5]), ("a", "b", ""), size=400)
    view = overhead_view(*extent_of(points, corners_of(box).reshape(-1, 3), 0), 400)
    color = COLORS[2].astype(int)
    for x, y in ((2.4, 2.4), (1.9, 1.4), (2.9, 1.4), (2.4, 0.4), (2.4, 2.0)):
        assert np.abs(pixel(picture, view, x, y) - color).max() < 60, (x, y)
    # the floor within is tinted; beyond the box and behind its centre there is no line
    for x, y in ((2.4, 0.7), (2.4, 2.7), (1.5, 1.4), (3.3, 1.4)):
        assert np.abs(pixel(picture, view, x, y) - color).max() > 100, (x, y)


def test_truth_is_black_and_may_be_missing():
    points, box = room(""), np.array([[2, 2, 0.5, 2, 1, 1, 0]])
    with_truth = draw_scene(points, box, *NONE, NAMES, size=400)
    without = draw_scene(points, None, *NONE, NAMES, size=400)
    view = overhead_view(*extent_of(points, np.zeros((0, 3)), 0), 400)
    column, row, _ = view(np.array([1, 2, 0.0])).astype(int)
    edge = slice(row - 1, row + 2), slice(column - 1, column + 2)
    assert with_truth[edge].min() < 120
    assert without[edge].min() > 180
    # black shows nothing but the scale then
    black = np.argwhere((without < 30).all(-1))
    assert len(black)
    assert (black[:, 0] > 360).all()
    assert (black[:, 1] < 150).all()


def test_a_ceiling_hides_nothing():
    points = room()
    ceiling = np.column_stack([np.random.default_rng(1).uniform(0, 4, (9000, 2)), np.full(9000, 2.3)])
    box = np.array([[2, 2, 0.5, 2, 1, 1, 0]])
    expected = draw_scene(points, box, *NONE, NAMES, size=SIZE)
    assert np.array_equal(draw_scene(np.concatenate([points, ceiling]), box, *NONE, NAMES, size=SIZE), expected)


def test_higher_points_are_darker():
    points = np.array([[0, 0, 0], [1, 0, 1.1], [2, 0, 2.2], [3, 0, 9.0]])
    picture = drawn_points(points, Overhead(np.array([1.5, 0]), 100.0, 400), 0.0, 400)
    shades = picture[200, [50, 150, 250, 350]].astype(float)
    np.testing.assert_allclose(shades, [LOWEST, (LOWEST + HIGHEST) / 2, HIGHEST, HIGHEST], atol=1)


def test_near_points_hide_far_ones_and_the_far_are_paler():
    view = Perspective(np.zeros(3), np.eye(3), 100.0, np.array([50.0, 50]))
    # the viewer looks along -z of these axes; height is z as well, so that the first is the higher
    near, far = np.array([0, 0, -1.0]), np.array([0, 0, -9.0])
    aside = np.array([2.0, 0, -8])
    for points in (np.stack([near, far, aside]), np.stack([far, near, aside])):
        picture = drawn_points(points, view, -10.0, 100)
        alone = drawn_points(np.stack([near, aside]), view, -10.0, 100)
        assert np.array_equal(picture[50, 50], alone[50, 50])
    assert picture[50, 75].min() > picture[50, 50].max()


def test_points_beyond_the_picture_are_left_out():
    view = Overhead(np.zeros(2), 10.0, 50)
    assert (drawn_points(np.array([[99.0, 0, 0], [0, -99, 0]]), view, 0.0, 50) == 255).all()
    assert (drawn_points(np.zeros((0, 3)), view, 0.0, 50) == 255).all()


@pytest.mark.parametrize(
    ("walls", "side"), [("wn", (1, -1)), ("en", (-1, -1)), ("ws", (1, 1)), ("es", (-1, 1)), ("", (-1, -1))]
)
def test_the_viewer_stands_at_the_open_corner(walls, side):
    points = room(walls)
    low, high = extent_of(points, np.zeros((0, 3)), 0.0)
    view = corner_view(points, np.zeros((0, 8, 3)), low, high, SIZE)
    assert tuple(np.sign(view.eye - (low + high) / 2)[:2]) == side
    assert view.eye[2] > high[2]
    # of the walls that are there only the ends are cut off
    assert is_near_wall(points, view.eye, low, high).sum() < 0.1 * len(walls) * 6000 + 1


def test_walls_between_viewer_and_room_are_left_out_above_the_knee():
    points = room("wsen")
    low, high = extent_of(points, np.zeros((0, 3)), 0.0)
    hidden = points[is_near_wall(points, np.array([-5, -5, 5.0]), low, high)]
    assert len(hidden) > 8000
    assert (hidden[:, :2].min(1) < 0.3).all()
    assert (hidden[:, 2] > 0.4).all()


@pytest.mark.parametrize("width", [0.3, 4.0, 40.0])
def test_perspective_shows_the_whole_room_and_every_box(width):
    points = room("wn", width=width)
    outlines = corners_of(np.array([[0.6, 0.6, 1, 1, 1, 2, 0.2]]) * ([width / 4] * 2 + [1] + [width / 4] * 2 + [1, 1]))
    low, high = extent_of(points, outlines.reshape(-1, 3), 0.0)
    view = corner_view(points, outlines, low, high, SIZE)
    shown = points[~is_near_wall(points, view.eye, low, high)]
    places = view(np.concatenate([shown, outlines.reshape(-1, 3)]))
    assert places[:, :2].min() > 0
    assert places[:, :2].max() < SIZE
    assert (places[:, 2] < 0).all()
    # it fills the picture, and is upright: what is higher is above
    assert np.ptp(places[:, :2], axis=0).max() > 0.6 * SIZE
    assert view(np.array([1.0, 1, 1]))[1] < view(np.array([1.0, 1, 0]))[1]


def test_one_stray_point_or_box_does_not_shrink_the_room():
    points = room()
    low, high = extent_of(np.concatenate([points, [[500, 0, 1.0]]]), np.array([[-300.0, 0, 0]]), 0.0)
    assert (high - low)[:2].max() < 8


class Page:
    """Remembers where texts were written."""

    def __init__(self):
        self.written = []

    def text(self, place, text, font, **_):
        self.written.append((*place, place[0] + font.getlength(text), text))


def test_texts_do_not_overlap_and_the_surest_keeps_its_place():
    view = Overhead(np.zeros(2), 100.0, 600)
    outlines = corners_of(np.array([[0, 0, 0.5, 1, 1, 1, 0]] * 6))
    page, alone = Page(), Page()
    texts = [f"chair 0.{i}" for i in range(6)]
    draw_texts(page, view, outlines, [(0, 0, 0)] * 6, texts, 600)
    draw_texts(alone, view, outlines[5:], [(0, 0, 0)], texts[5:], 600)
    assert page.written[0] == alone.written[0]
    tops = np.sort([top for _, top, _, _ in page.written])
    assert (np.diff(tops) >= LINE).all()
    assert len(tops) == 6
    # boxes at the edge keep their words in the picture
    page = Page()
    draw_texts(page, view, corners_of(np.array([[9, 9, 0, 1, 1, 1, 0.0]])), [(0, 0, 0)], ["chair"], 600)
    left, top, right, _ = page.written[0]
    assert right <= 600.001
    assert (left, top) == pytest.approx((600 - ImageFont.load_default(TEXT).getlength("chair"), 0))


def test_names_and_scores_are_written():
    points, box = room(), np.array([[2, 2, 0.5, 2, 1, 1, 0]])
    pictures = [
        draw_scene(points, None, box, np.array([0]), np.array([score]), (name,), size=SIZE)
        for name, score in (("bed", 0.5), ("bed", 0.6), ("lamp", 0.5))
    ]
    assert (pictures[0] != pictures[1]).any()
    assert (pictures[0] != pictures[2]).any()


@pytest.mark.parametrize("points", [np.zeros((1, 3)), np.full((5, 3), 7.0), np.array([[0, 0, 0], [0, 0, 50.0]])])
def test_degenerate_scenes_are_drawn(points):
    empty = np.array([[0, 0, 0, 0, 0, 0, 0.0]])
    for boxes in (NONE, (empty, [1], [0.1])):
        picture = draw_scene(points, empty, *boxes, NAMES, size=64)
        assert picture.shape == (64, 128, 3)
        assert (picture[:, :64] != 255).any()


def test_what_cannot_be_drawn_is_refused():
    points, box = room(), np.array([[2, 2, 0.5, 2, 1, 1, 0]])
    cases = [
        (np.zeros((0, 3)), None, box, [0], [1.0], "needs points"),
        (np.zeros((4, 4)), None, box, [0], [1.0], "needs points"),
        (points, None, box[:, :6], [0], [1.0], "boxes are"),
        (points, box[0], box, [0], [1.0], "boxes are"),
        (points, None, box, [0, 1], [1.0], "do not fit"),
        (points, None, box, [0], [], "do not fit"),
        (points, None, box * math.nan, [0], [1.0], "NaN"),
        (points + math.inf, None, box, [0], [1.0], "NaN"),
    ]
    for cloud, truths, boxes, labels, scores, message in cases:
        with pytest.raises(ValueError, match=message):
            draw_scene(cloud, truths, boxes, labels, scores, NAMES, size=SIZE)


def test_points_have_the_class_of_the_smallest_box_that_holds_them(tmp_path):
    points = np.array([[0, 0, 0], [0.9, 0, 0], [3, 0, 0], [0, 0.9, 0], [5, 5, 5.0]])
    # a large box, a small one within, and one that is turned by a quarter
    boxes = np.array([[0, 0, 0, 2, 2, 2, 0], [0, 0, 0, 1, 1, 1, 0], [3, 0, 0, 4, 0.5, 1, math.pi / 2]])
    write_boxes_ply(tmp_path / "a.ply", points, boxes, np.array([4, 7, 0]))
    found = read_points(tmp_path / "a.ply")
    np.testing.assert_allclose(found.xyz, points)
    assert found.extra["label"].tolist() == [7, 4, 0, 4, -1]
    assert (found.extra["rgb"][:4] == COLORS[[7, 4, 0, 4]]).all()
    assert np.ptp(found.extra["rgb"][4]) == 0
    write_boxes_ply(tmp_path / "b.ply", points, np.zeros((0, 7)), np.zeros(0))
    assert read_points(tmp_path / "b.ply").extra["label"].tolist() == [-1] * 5
    with pytest.raises(InputError, match="end the name with"):
        write_boxes_ply(tmp_path / "a.obj", points, boxes, np.array([4, 7, 0]))
