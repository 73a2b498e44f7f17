import h5py
import numpy as np
import pytest
from PIL import Image
from scipy.spatial import cKDTree
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from shared.errors import InputError
from shared.io import procshape as module
from shared.io.procshape import CLASSES, LEVELS, SPLITS, Difficulty, generate, load_cached
from shared.io.solids import OBJECTS, Box, Part, Superellipsoid, sample_surface

# nothing but the view
BARE = {"jitter": 0, "floor_share": 0, "neighbour_share": 0, "crop_shift": 0, "crop_scale": (2, 2)}
ALL_SEEN = {**BARE, "depth_tolerance": float("inf")}


def box_points(size=(1.0, 1.0, 1.0), count=5000, at=(0, 0, 0), seed=0) -> np.ndarray:
    """Points (3, n) of a box on the floor."""
    return sample_surface([Part(Box(size), at)], count, np.random.default_rng(seed)).T.astype(np.float64)


def scanned(surface, seed=0, **difficulty):
    return module.scan(surface, np.empty((3, 0)), np.random.default_rng(seed), Difficulty(**difficulty))


def test_classes_are_those_of_scanobjectnn_in_its_order():
    names = "bag bin box cabinet chair desk display door shelf table bed pillow sink sofa toilet"
    assert " ".join(CLASSES) == names
    assert set(CLASSES) <= set(OBJECTS)


@pytest.mark.parametrize("level", LEVELS)
def test_clouds_are_balanced_centred_and_within_the_unit_sphere(level):
    data, label = generate(50, level, 200)
    assert data.shape == (50, 200, 3)
    assert data.dtype == np.float32
    assert data.flags["C_CONTIGUOUS"]
    assert label.shape == (50,)
    assert label.dtype == np.int64
    assert np.ptp(np.bincount(label, minlength=15)) <= 1
    assert sorted(label[:15]) == sorted(label[15:30]) == list(range(15))
    assert list(label[:15]) != list(label[15:30])
    assert np.abs(data.mean(1)).max() < 1e-5
    assert np.allclose(np.linalg.norm(data, axis=2).max(1), 1, atol=1e-6)


@pytest.mark.parametrize("level", LEVELS)
def test_an_object_depends_on_seed_split_and_number_alone(level):
    data, label = generate(20, level, 100, seed=3)
    again, label_again = generate(7, level, 100, seed=3)
    assert np.array_equal(again, data[:7])
    assert np.array_equal(label_again, label[:7])
    for other in (generate(20, level, 100, seed=4), generate(20, level, 100, seed=3, split="test")):
        assert not np.array_equal(other[1], label)
        assert not np.isclose(other[0], data).all(2).any()


def test_splits_share_no_object():
    shapes = {}
    for split in SPLITS:
        data, label = generate(60, "clean", 300, split=split)
        # height and widths of the unit-sphere cloud, which no turn changes
        shapes[split] = np.column_stack([label, np.ptp(data[..., 1], 1), np.linalg.norm(data, axis=2).mean(1)])
    for first, second in (("train", "val"), ("train", "test"), ("val", "test")):
        distance, _ = cKDTree(shapes[first]).query(shapes[second])
        assert distance.min() > 1e-6


def test_a_seed_is_not_the_sum_of_its_parts():
    # (seed 1, object 0) must not be (seed 0, object 1)
    first, second = generate(2, "clean", 50, seed=0)[0], generate(2, "clean", 50, seed=1)[0]
    assert not np.isclose(first[1], second[0]).all(1).any()


def test_clouds_stand_upright_and_are_turned_about_y():
    data, label = generate(225, "clean", 300, seed=5)
    tables = data[label == CLASSES.index("table")]
    # the top is the largest part
    assert (np.median(tables[..., 1], 1) > 0).mean() > 0.9
    doors = data[label == CLASSES.index("door")]
    # direction of a door's breadth in the floor plan, over the half circle
    x, z = doors[..., 0], doors[..., 2]
    angle = 0.5 * np.arctan2(2 * (x * z).mean(1), (x * x - z * z).mean(1))
    assert np.histogram(angle, 3, (-np.pi / 2, np.pi / 2))[0].min() >= 2


def test_points_are_repeated_only_where_too_few_are_left():
    data, _ = generate(45, "hard", 128, seed=1)
    assert all(len(np.unique(cloud, axis=0)) == 128 for cloud in data)
    data, _ = generate(45, "hard", 2048, seed=1, min_share=0.02)
    distinct = np.array([len(np.unique(cloud, axis=0)) for cloud in data])
    assert distinct.min() >= 64
    assert (distinct < 2048).any()


def test_points_come_in_random_order():
    data, _ = generate(30, "clean", 1000)
    for cloud in data[:10]:
        first, rest = cloud[:300], cloud[300:]
        assert np.abs(first.mean(0) - rest.mean(0)).max() < 0.15
        assert np.abs(first.std(0) - rest.std(0)).max() < 0.1


def test_a_wall_hides_what_stands_behind_it():
    eye = np.array([0.0, 0.5, 3.0])
    wall = box_points((1, 1, 0.01), 4000)
    hidden = box_points((0.3, 0.3, 0.3), 1000, (0, 0.3, -0.5))
    beside = box_points((0.2, 0.2, 0.2), 1000, (1.2, 0.3, -0.5))
    points = np.concatenate([wall, hidden, beside], 1)
    seen = module.visible(points, eye, np.radians(1.5), 0.02)
    assert seen[:4000].mean() > 0.98
    assert seen[4000:5000].mean() < 0.02
    front = beside[2] > -0.41
    assert seen[5000:][front].mean() > 0.9
    # from the other side it is the wall that is covered
    seen = module.visible(points, eye * (1, 1, -1), np.radians(1.5), 0.02)
    assert seen[4000:5000].mean() > 0.15  # one face of six
    behind = (np.abs(wall[0]) < 0.1) & (np.abs(wall[1] - 0.45) < 0.1)
    assert seen[:4000][behind].mean() < 0.2


def test_one_sees_the_near_side_of_a_sphere():
    points = sample_surface([Part(Superellipsoid((2, 2, 2)), (0, 0, 0))], 20_000, np.random.default_rng(0)).T
    eye = np.array([3.0, 2.0, 4.0])
    seen = module.visible(points, eye, np.radians(1.5), 0.03)
    faces_eye = ((eye[:, None] - points) * points).sum(0) > 0
    assert seen[faces_eye].mean() > 0.8  # grazing views lose some
    assert seen[~faces_eye].mean() < 0.1


def test_a_slanting_floor_is_seen_whole():
    rng = np.random.default_rng(0)
    floor = np.stack([rng.uniform(-1, 1, 4000), np.zeros(4000), rng.uniform(-1, 1, 4000)])
    seen = [module.visible(floor, np.array([0, height, 4.0]), np.radians(1.5), 0.02).mean() for height in (1, 2, 3)]
    assert min(seen) > 0.92


def test_what_lies_behind_the_eye_is_not_seen():
    points = np.array([[0.0, 0, 0, 0], [0, 0, 0, 0.5], [0, 1, 5, 5]])
    eye = np.array([0.0, 0.0, 3.0])
    assert module.visible(points[:, :3], eye, 0.05, 0.1).tolist() == [False, True, False]
    assert module.visible(eye[:, None] + [[1e-9], [0], [-1]], eye, 0.05, 0.1).tolist() == [True]


def test_everything_is_seen_with_an_endless_tolerance():
    points = scanned(box_points(), **ALL_SEEN)
    assert points.shape == (3, 5000)
    assert scanned(box_points(), **BARE).shape[1] < 4000


@pytest.mark.parametrize("scale", [0.4, 0.55])
def test_the_crop_has_its_size(scale):
    rng = np.random.default_rng(0)
    # a full ball, which no turn changes
    ball = rng.normal(size=(3, 20_000))
    ball *= rng.random(20_000) ** (1 / 3) / np.linalg.norm(ball, axis=0)
    cut = scanned(ball, **{**ALL_SEEN, "crop_scale": (scale, scale)})
    assert np.allclose(np.ptp(cut, 1), 2 * scale, atol=0.03)
    assert np.allclose(cut.mean(1), 0, atol=0.03)


def test_the_crop_is_shifted_within_its_range():
    surface = box_points((1, 1, 1), 3000)
    lost = []
    for seed in range(60):
        points = scanned(surface, seed, **{**ALL_SEEN, "crop_scale": (1, 1), "crop_shift": 0.25})
        # the floor stays at 0 however one turns
        lost.append((points[1].min(), 1 - points[1].max()))
    low, high = np.array(lost).T
    assert max(low.max(), high.max()) < 0.26
    assert max(low.max(), high.max()) > 0.2
    assert ((low < 0.01) | (high < 0.01)).all()
    assert 0.3 < (low > 0.01).mean() < 0.7


def test_jitter_has_its_standard_deviation():
    rng = np.random.default_rng(0)
    # a slab of height 0 and longest side 2
    slab = np.stack([rng.uniform(-1, 1, 8000), np.full(8000, 0.5), rng.uniform(-0.1, 0.1, 8000)])
    slab[:, 0] = 0, 0, 0
    points = module.scan(slab, np.empty((3, 0)), rng, Difficulty(**{**ALL_SEEN, "jitter": 0.02}))
    extent = max(np.ptp(points[0]), np.ptp(points[2]))
    above = points[1][points[1] > 0.3]
    assert above.std() == pytest.approx(0.02 * extent, rel=0.1)


def test_floor_and_neighbour_lie_around_the_object():
    surface = box_points()
    bare = scanned(surface, **{**ALL_SEEN, "crop_scale": (3, 3)})
    floor = scanned(surface, **{**ALL_SEEN, "crop_scale": (3, 3), "floor_share": 0.5})
    assert floor.shape[1] - bare.shape[1] == 2500
    patch = floor[:, 5000:]
    assert (patch[1] == 0).all()
    assert (np.ptp(patch, 1)[[0, 2]] > np.ptp(bare, 1)[[0, 2]] + 0.4).all()
    rng = np.random.default_rng(0)
    low, high = np.array([-0.5, 0, -0.5]), np.array([0.5, 1, 0.5])
    for _ in range(30):
        beside = module.neighbour(400, rng)
        assert np.ptp(beside, 1).max() == pytest.approx(1)
        points = module.moved_beside(beside, low, high, rng)
        near = low - 0.25 - 1e-9, high + 0.25 + 1e-9
        assert (np.clip(points.T, *near) == points.T).all()
        # beyond one of the four sides, or touching it
        beyond = [points[0] > 0.47, points[0] < -0.47, points[2] > 0.47, points[2] < -0.47]
        assert any(side.all() for side in beyond)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("elevation", (60, 80)),
        ("distance", (4, 5)),
        ("cell", 3),
        ("depth_tolerance", 0.2),
        ("jitter", 0.05),
        ("floor_share", 0),
        ("neighbour_share", 0),
        ("crop_shift", 0),
        ("crop_scale", (1, 1)),
        ("min_share", 0.2),
    ],
)
def test_every_number_of_the_difficulty_counts(name, value):
    base = generate(15, "hard", 64)[0]
    assert not np.array_equal(generate(15, "hard", 64, **{name: value})[0], base)
    assert np.array_equal(generate(3, "clean", 64, **{name: value})[0], generate(3, "clean", 64)[0])


def test_hard_is_harder_than_clean_and_can_be_learnt():
    def features(data):
        # what no turn about y changes
        flat = np.hypot(data[..., 0], data[..., 2])
        height = data[..., 1] - data[..., 1].min(1, keepdims=True)
        parts = [flat, height, np.linalg.norm(data, axis=2), flat * height]
        return np.concatenate([np.quantile(part, np.linspace(0.02, 0.98, 9), axis=1).T for part in parts], 1)

    accuracy = {}
    for level in LEVELS:
        (train, train_label), (test, test_label) = (
            generate(n, level, 200, 2, s) for n, s in ((300, "train"), (150, "test"))
        )
        classifier = LinearDiscriminantAnalysis().fit(features(train), train_label)
        accuracy[level] = classifier.score(features(test), test_label)
    assert accuracy["clean"] > 0.7
    assert 0.2 < accuracy["hard"] < accuracy["clean"] - 0.15


def test_an_impossible_difficulty_is_refused():
    with pytest.raises(InputError, match=r"min_share=0\.08 of a .* was left in 50 tries; widen crop_scale"):
        generate(3, "hard", 64, crop_scale=(0.01, 0.01))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"num_objects": 0}, "num_objects"),
        ({"num_objects": 2.0}, "num_objects"),
        ({"num_points": 0}, "num_points"),
        ({"seed": -1}, "seed"),
        ({"level": "medium"}, "unknown level 'medium'; choose one of clean, hard"),
        ({"split": "validation"}, "unknown split"),
        ({"noise": 0.1}, "unknown difficulty 'noise'; choose from elevation"),
        ({"jitter": -0.1}, "jitter"),
        ({"jitter": "much"}, "jitter"),
        ({"jitter": float("nan")}, "jitter"),
        ({"crop_scale": (1.4, 0.75)}, "crop_scale"),
        ({"crop_scale": 1.0}, "crop_scale"),
        ({"distance": (0.5, 2)}, "distance"),
        ({"elevation": (5, 90)}, "elevation"),
        ({"min_share": 0}, "min_share"),
        ({"cell": 0}, "cell"),
        ({"cell": 0, "level": "clean"}, "cell"),
    ],
)
def test_wrong_arguments_are_named(tmp_path, arguments, match):
    for make in (generate, lambda **given: load_cached(tmp_path, **given)):
        with pytest.raises(InputError, match=match):
            make(**{"num_objects": 2, "num_points": 50} | arguments)
    assert not list(tmp_path.iterdir())


def test_lists_serve_as_ranges():
    assert Difficulty(crop_scale=[1, 2]) == Difficulty(crop_scale=(1.0, 2.0))


def test_the_cache_gives_back_what_was_made(tmp_path, monkeypatch):
    data, label = load_cached(tmp_path / "cache", 20, "hard", 100, 1, "val", jitter=0.01)
    (path,) = (tmp_path / "cache").iterdir()
    assert path.name.startswith("procshape_hard_val_")
    assert np.array_equal(data, generate(20, "hard", 100, 1, "val", jitter=0.01)[0])
    with h5py.File(path) as file:  # as ScanObjectNN
        assert set(file) == {"data", "label"}
        assert file["data"].dtype == np.float32
        assert file["data"].shape == (20, 100, 3)
        assert file["label"].shape == (20,)
    monkeypatch.setattr(module, "generate", None)
    again, label_again = load_cached(tmp_path / "cache", 20, "hard", 100, 1, "val", jitter=0.01)
    assert np.array_equal(again, data)
    assert np.array_equal(label_again, label)


def test_the_cache_tells_all_arguments_apart(tmp_path, monkeypatch):
    base = {"num_objects": 4, "level": "hard", "num_points": 60, "seed": 0, "split": "train"}
    others = [
        {"num_objects": 5},
        {"level": "clean"},
        {"num_points": 61},
        {"seed": 1},
        {"split": "test"},
        {"jitter": 0.01},
    ]
    for other in ({}, *others):
        data, label = load_cached(tmp_path, **base | other)
        expected = generate(**base | other)
        assert np.array_equal(data, expected[0])
        assert np.array_equal(label, expected[1])
    assert len(list(tmp_path.iterdir())) == 7
    # a default that is spelt out is the same set, and so is a difficulty that "clean" does not use
    load_cached(tmp_path, **base, jitter=Difficulty().jitter)
    load_cached(tmp_path, **base | {"level": "clean", "seed": np.int64(0)}, jitter=0.01)
    assert len(list(tmp_path.iterdir())) == 7
    monkeypatch.setattr(module, "VERSION", module.VERSION + 1)
    load_cached(tmp_path, **base)
    assert len(list(tmp_path.iterdir())) == 8


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "foreign", "other shape", "no labels", "NaN", "labels"])
def test_a_damaged_cache_file_is_made_anew(tmp_path, damage):
    data, label = load_cached(tmp_path, 10, "clean", 80)
    (path,) = tmp_path.iterdir()
    whole = bytearray(path.read_bytes())
    if damage in ("empty", "cut", "flipped", "foreign"):
        place = bytes(whole).index(data[5, 40].tobytes())
        changed = bytearray(whole)
        changed[place] ^= 1
        path.write_bytes({"empty": b"", "cut": whole[:3000], "flipped": changed, "foreign": b"no archive" * 99}[damage])
    else:
        with h5py.File(path, "w") as file:
            file["data"] = {"other shape": data[:, :9], "NaN": data * np.nan}.get(damage, data)
            if damage != "no labels":
                file["label"] = label + 10 if damage == "labels" else label
    again, label_again = load_cached(tmp_path, 10, "clean", 80)
    assert np.array_equal(again, data)
    assert np.array_equal(label_again, label)
    with h5py.File(path) as file:
        assert np.array_equal(file["data"], data)
        assert np.array_equal(file["label"], label)
    assert len(list(tmp_path.iterdir())) == 1


def test_the_contact_sheet_shows_every_class(tmp_path, capsys):
    arguments = ["--count", "2", "--points", "128", "--level", "clean"]
    assert module.main([str(tmp_path / "sheet.png"), *arguments]) == 0
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (2 * 160, 15 * 180)
        pixels = np.array(sheet)
    cells = pixels.reshape(15, 180, 2, 160, 3)[:, 20:].min((1, 3, 4))
    assert (cells < 200).all()
    assert module.main([str(tmp_path)]) == 2
    assert "it is a folder" in capsys.readouterr().err
    assert module.main([str(tmp_path / "a.png"), "--count", "0"]) == 2
