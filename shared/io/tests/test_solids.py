import math

import numpy as np
import pytest
from scipy import stats
from scipy.spatial import ConvexHull

from shared.errors import InputError
from shared.io import solids
from shared.io.solids import OBJECTS, Box, Loft, Part, Ring, Superellipsoid, bounds, make_object, sample_surface

TURN = solids.turned("x", 0.4) @ solids.turned("z", -1.1)
RESOLUTION = 1.005  # what the corners of cells may miss of a round part
# surfaces, and a function that is 1 on them and nowhere else
SURFACES = {
    "box": (Box((1, 2, 3)), lambda x, y, z: np.maximum.reduce([np.abs(x) * 2, np.abs(y - 1), np.abs(z) / 1.5])),
    "cylinder": (Loft((2, 2), (2, 2), 3), lambda x, y, z: np.hypot(x, z) / 2),
    "cone": (Loft((2, 2), (0, 0), 3), lambda x, y, z: np.hypot(x, z) / 2 + y / 3),
    "leaning wall": (
        Loft((1, 2), (1, 2), 3, (4, 4), (0.6, -0.3)),
        lambda x, y, z: ((x - 0.2 * y) ** 4 + ((z + 0.1 * y) / 2) ** 4) ** 0.25,
    ),
    "plate with a hole": (Loft((2, 1), (0.5, 0.5), 0, (math.inf, 2)), lambda x, y, z: 1 + np.abs(y)),
    "sphere": (Superellipsoid((2, 2, 2)), lambda x, y, z: np.sqrt(x * x + y * y + z * z)),
    "pillow": (Superellipsoid((3, 1, 2), 8, 2), lambda x, y, z: ((x / 1.5) ** 8 + z**8) ** 0.25 + (2 * y) ** 2),
    "cushion": (
        Superellipsoid((3, 1, 2), math.inf, 4),
        lambda x, y, z: np.maximum(np.abs(x) / 1.5, np.abs(z)) ** 4 + (2 * y) ** 4,
    ),
    "bowl": (Superellipsoid((2, 1, 2), is_bowl=True), lambda x, y, z: x * x + (2 * y) ** 2 + z * z),
    "torus": (Ring((2, 2), 0.5), lambda x, y, z: np.hypot(np.hypot(x, y) - 2, z) / 0.5),
    "handle": (Ring((2, 2), 0.5, 0, math.pi), lambda x, y, z: np.hypot(np.hypot(x, y) - 2, z) / 0.5),
}


def drawn(surface, count=20_000, seed=0) -> np.ndarray:
    """Points (3, n), float64."""
    return sample_surface([Part(surface, (0, 0, 0))], count, np.random.default_rng(seed)).T.astype(np.float64)


def is_even(values, cdf) -> bool:
    return stats.kstest(values, cdf).pvalue > 1e-3


@pytest.mark.parametrize("name", SURFACES)
def test_points_lie_on_the_surface(name):
    surface, level = SURFACES[name]
    assert np.allclose(level(*drawn(surface)), 1, atol=2e-6)
    assert np.allclose(level(*surface.vertices()), 1, atol=1e-12)


@pytest.mark.parametrize("name", SURFACES)
def test_points_reach_every_end_and_no_farther(name):
    surface, _ = SURFACES[name]
    points, corners = drawn(surface), surface.vertices()
    low, high = corners.min(1), corners.max(1)
    extent = (high - low).max()
    assert np.abs(points.min(1) - low).max() < 0.02 * extent
    assert np.abs(points.max(1) - high).max() < 0.02 * extent
    assert (points.min(1) > low - (RESOLUTION - 1) * extent).all()
    assert (points.max(1) < high + (RESOLUTION - 1) * extent).all()


def test_areas_are_those_of_geometry():
    slope = math.hypot(1, 3)
    expected = {
        "box": 2 * (1 * 2 + 2 * 3 + 1 * 3),
        "cylinder": 4 * math.pi * 3,
        "cone": math.pi * 2 * math.hypot(2, 3),
        "plate with a hole": 8 - math.pi / 4,
        "sphere": 4 * math.pi,
        "torus": 4 * math.pi**2 * 2 * 0.5,
        "handle": 2 * math.pi**2 * 2 * 0.5,
    }
    areas = {name: SURFACES[name][0].areas().sum() for name in expected}
    assert areas == pytest.approx(expected, rel=0.03)
    assert areas["box"] == expected["box"]
    # half of what the hull of the whole has: an independent count
    whole = drawn(Superellipsoid((2, 1, 2)))
    assert SURFACES["bowl"][0].areas().sum() == pytest.approx(ConvexHull(whole.T).area / 2, rel=0.03)
    for name in ("pillow", "cushion"):
        surface = SURFACES[name][0]
        assert surface.areas().sum() == pytest.approx(ConvexHull(drawn(surface).T).area, rel=0.03), name
    assert Loft((2, 2), (1, 1), 3).areas().sum() == pytest.approx(math.pi * 3 * slope, rel=0.01)


def test_points_of_a_sphere_are_even():
    x, y, z = drawn(SURFACES["sphere"][0])
    # Archimedes: equal slices have equal areas, along any axis
    for axis in (x, y, z, (x + y + z) / math.sqrt(3)):
        assert is_even(axis, stats.uniform(-1, 2).cdf)
    assert is_even(np.arctan2(x, z), stats.uniform(-math.pi, 2 * math.pi).cdf)


def test_points_of_a_cone_a_disc_and_a_torus_are_even():
    x, y, z = drawn(Loft((2, 2), (1, 1), 3))
    t = y / 3
    assert is_even((2 * t - t**2 / 2) / 1.5, "uniform")  # area below t of a radius 2 - t
    assert is_even(np.arctan2(x, z), stats.uniform(-math.pi, 2 * math.pi).cdf)
    for hole in (0, 1):
        x, _, z = drawn(Loft((2, 2), (hole, hole), 0))
        # cells are quadrangles: their edges cut the arc by up to half a per cent
        assert is_even((np.minimum(x * x + z * z, 4) - hole**2) / (4 - hole**2), "uniform")
    x, y, z = drawn(SURFACES["torus"][0])
    phi = np.arctan2(z, np.hypot(x, y) - 2) % (2 * math.pi)
    assert is_even((2 * phi + 0.5 * np.sin(phi)) / (4 * math.pi), "uniform")
    assert is_even(np.arctan2(x, y), stats.uniform(-math.pi, 2 * math.pi).cdf)


def test_points_of_a_box_fall_on_its_faces_by_area():
    x, y, z = drawn(SURFACES["box"][0], 22_000)
    face = np.array([np.abs(x) * 2, np.abs(y - 1), np.abs(z) / 1.5]).argmax(0)
    assert np.abs(np.bincount(face) - np.array([12_000, 6_000, 4_000])).max() <= 2  # stratified
    on_side = face == 0
    assert is_even(y[on_side], stats.uniform(0, 2).cdf)
    assert is_even(z[on_side], stats.uniform(-1.5, 3).cdf)
    assert abs(np.corrcoef(y[on_side], z[on_side])[0, 1]) < 0.03


def test_points_of_a_pillow_have_the_density_of_its_hull():
    surface = SURFACES["pillow"][0]
    points = drawn(surface, 4000)
    hull = ConvexHull(drawn(surface, 30_000, seed=1).T)
    corners = hull.points[hull.simplices]
    areas = np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1) / 2
    middle = corners.mean(1).T
    # octants of a finer grid: corners, edges and the middle of the top
    edges = [0, 0.4, 0.8, 1.2, 1.6], [0, 0.15, 0.3, 0.6], [0, 0.4, 0.8, 1.1]
    expected, _ = np.histogramdd(np.abs(middle).T, edges, weights=areas / areas.sum())
    seen, _ = np.histogramdd(np.abs(points).T, edges)
    big = expected > 0.01
    assert big.sum() > 10
    assert np.abs(seen[big] / 4000 - expected[big]).max() < 0.012
    assert seen[expected < 1e-4].sum() < 8


def test_parts_get_their_share_and_keep_their_order():
    parts = [
        Part(Box((1, 1, 1)), (0, 0, 0)),
        Part(Box((2, 2, 2)), (10, 0, 0)),
        Part(Loft((0, 0), (0, 0), 0), (5, 0, 0)),
    ]
    points = sample_surface(parts, 1000, np.random.default_rng(0))
    assert points.shape == (1000, 3)
    assert points.dtype == np.float32
    assert (points[:200, 0] < 1).all()
    assert (points[200:, 0] > 8).all()


def test_parts_are_turned_and_put_in_their_places():
    inner = drawn(Box((1, 2, 3)), 500)
    rng = np.random.default_rng(0)
    points = sample_surface([Part(Box((1, 2, 3)), (4, 5, 6), TURN)], 500, rng).T
    assert np.allclose(points, TURN @ inner + [[4], [5], [6]], atol=1e-5)
    once = solids.moved([Part(Box((1, 2, 3)), (4, 5, 6), TURN)], (1, 1, 1), solids.turned("y", 0.5))
    points = sample_surface(once, 500, np.random.default_rng(0)).T
    expected = solids.turned("y", 0.5) @ (TURN @ inner + [[4], [5], [6]]) + 1
    assert np.allclose(points, expected, atol=1e-5)


def test_rotations_are_right_handed():
    x, y, z = np.eye(3)
    quarter = math.pi / 2
    assert np.allclose(solids.turned("x", quarter) @ y, z)
    assert np.allclose(solids.turned("y", quarter) @ z, x)
    assert np.allclose(solids.turned("z", quarter) @ x, y)


@pytest.mark.parametrize("end", [(1, 2, 3), (0, 0, 2), (0, 5, 0), (-1, 0, 0)])
def test_a_rod_runs_from_point_to_point(end):
    start = np.array((0.5, 0.5, 0.5))
    x, y, z = drawn_part = sample_surface([solids.rod(start, start + end, 0.1)], 2000, np.random.default_rng(0)).T
    way = np.array(end) / np.linalg.norm(end)
    along = way @ (drawn_part - start[:, None])
    assert along.min() == pytest.approx(0, abs=0.01)
    assert along.max() == pytest.approx(np.linalg.norm(end), abs=0.01)
    beside = drawn_part - start[:, None] - way[:, None] * along
    assert np.allclose(np.linalg.norm(beside, axis=0), 0.1, atol=1e-5)
    assert len(x) == len(y) == len(z) == 2000


def test_the_same_generator_gives_the_same_points():
    parts = make_object("chair", np.random.default_rng(1))
    first, again, other = (sample_surface(parts, 300, np.random.default_rng(seed)) for seed in (5, 5, 6))
    assert np.array_equal(first, again)
    assert not (first == other).all(1).any()


@pytest.mark.parametrize("name", OBJECTS)
def test_objects_stand_on_the_floor_in_human_size(name):
    rng = np.random.default_rng(0)
    longest = {"bag": 0.8, "bin": 1.2, "box": 1.3, "pillow": 1.2, "display": 1.4, "toilet": 1.3}.get(name, 2.9)
    sizes = []
    for _ in range(60):
        parts = make_object(name, rng)
        low, high = bounds(parts)
        assert low[1] == pytest.approx(0, abs=1e-12)
        assert np.allclose((low + high)[[0, 2]], 0, atol=1e-12)
        points = sample_surface(parts, 2000, rng)
        assert np.isfinite(points).all()
        assert (points > low - 0.01).all()
        assert (points < high + 0.01).all()
        sizes.append(high - low)
        # the size is tight: the surface comes near all six sides, thin parts apart
        assert (np.abs(np.concatenate([points.min(0) - low, high - points.max(0)])) < 0.1).all()
    sizes = np.array(sizes)
    assert sizes.max(1).min() > 0.1
    assert sizes.max() < longest
    assert (sizes.std(0) > 0.02).all()


@pytest.mark.parametrize("name", OBJECTS)
def test_objects_have_styles_and_are_functions_of_their_generator(name):
    numbers = {len(make_object(name, np.random.default_rng(seed))) for seed in range(40)}
    assert len(numbers) >= 2
    first, again = (bounds(make_object(name, np.random.default_rng(7))) for _ in range(2))
    assert np.array_equal(first, again)


def test_classes_have_their_marks():
    rng = np.random.default_rng(0)

    def heights(name, count=40):
        """Shares of the surface in the lower half and at the top tenth of the height."""
        found = []
        for _ in range(count):
            y = sample_surface(make_object(name, rng), 2000, rng)[:, 1]
            y = y / y.max()
            found.append(((y < 0.5).mean(), (y > 0.9).mean()))
        return np.mean(found, 0)

    # a table's top is its largest part, a chair's seat and back lie in the upper half, a cabinet is even
    assert heights("table")[1] > 0.5
    assert heights("chair")[0] < 0.4
    assert heights("cabinet")[0] == pytest.approx(0.5, abs=0.1)

    def footprint(name, count=40):
        sizes = [np.subtract(*bounds(make_object(name, rng))[::-1]) for _ in range(count)]
        return np.median([size.min() / size.max() for size in sizes])

    assert footprint("door") < 0.12  # thin, unless ajar
    assert footprint("display") < 0.5
    assert footprint("chair") > 0.4


def test_furniture_of_rooms_has_its_marks():
    rng = np.random.default_rng(0)
    heights = {"dresser": [], "night_stand": []}
    depths, behind, ahead = [], [], []
    for _ in range(30):
        x, y, z = sample_surface(make_object("bathtub", rng), 3000, rng).T
        inside = (np.abs(x) < 0.25 * x.max()) & (np.abs(z) < 0.25 * z.max())
        depths.append(np.median(y[inside]) / np.quantile(y, 0.99))
        x, y, z = sample_surface(make_object("bookshelf", rng), 3000, rng).T
        behind.append((z < z.min() + 0.02).mean())
        ahead.append((z > z.max() - 0.02).mean())
        for name, own in heights.items():
            parts = make_object(name, rng)
            own.append(bounds(parts)[1][1])
            # nothing reaches farther to the front than the handles
            corners = [part.placed(part.surface.vertices()) for part in parts]
            handle = max(corners, key=lambda own: own[2].max())
            assert np.ptp(handle, 1).max() < 0.21
            assert handle[2].min() > 0.7 * handle[2].max()
    assert max(depths) < 0.4  # hollow
    assert np.mean(behind) > 2 * np.mean(ahead)
    assert min(heights["dresser"]) > max(heights["night_stand"])


def test_what_cannot_be_made_is_refused():
    rng = np.random.default_rng(0)
    with pytest.raises(InputError, match="unknown class 'lamp'; choose one of bag, bin"):
        make_object("lamp", rng)
    with pytest.raises(InputError, match="at least one"):
        sample_surface([], 10, rng)
    with pytest.raises(InputError, match="0 points"):
        sample_surface([Part(Box((1, 1, 1)), (0, 0, 0))], 0, rng)
