"""Strong views: every operation against Pillow or by hand, and what the draws promise."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from projects.unikd.strong import ENHANCEMENTS, GREY, OPERATIONS, cutout, move, operate, strong_view
from shared.errors import InputError


def photos(count=4, height=32, width=32, seed=0):
    """Smooth images of 8-bit values that use part of the range."""
    generator = torch.Generator().manual_seed(seed)
    small = torch.rand(count, 3, 6, 6, generator=generator)
    images = torch.nn.functional.interpolate(small, size=(height, width), mode="bicubic").clamp(0, 1)
    return (255 * (0.15 + 0.7 * images)).round() / 255


def random(seed):
    return torch.Generator().manual_seed(seed)


def pillow(image):
    return Image.fromarray((255 * image).round().byte().permute(1, 2, 0).numpy())


def tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


PILLOW = {
    "autocontrast": lambda image, u: ImageOps.autocontrast(image),
    "equalize": lambda image, u: ImageOps.equalize(image),
    "solarize": lambda image, u: ImageOps.solarize(image, int(np.ceil(255 * u))),
    "posterize": lambda image, u: ImageOps.posterize(image, 4 + int(5 * u)),
    "color": lambda image, u: ImageEnhance.Color(image).enhance(0.05 + 0.9 * u),
    "contrast": lambda image, u: ImageEnhance.Contrast(image).enhance(0.05 + 0.9 * u),
    "brightness": lambda image, u: ImageEnhance.Brightness(image).enhance(0.05 + 0.9 * u),
    "sharpness": lambda image, u: ImageEnhance.Sharpness(image).enhance(0.05 + 0.9 * u),
}


@pytest.mark.parametrize("name", ENHANCEMENTS)
def test_enhancements_are_those_of_pillow(name):
    # Pillow rounds to 8 bits along the way, where we do not; equalisation, solarisation and bits are exact
    tolerance = 1e-6 if name in ("equalize", "solarize", "posterize") else 1.6 / 255
    images, u = photos(5), torch.tensor([0.0, 0.15, 0.41, 0.61, 0.99])
    found = ENHANCEMENTS[name](images, u)
    expected = torch.stack([tensor(PILLOW[name](pillow(x), float(s))) for x, s in zip(images, u, strict=True)])
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
    assert (found - images).abs().max() > 0.01


@pytest.mark.parametrize("name", ENHANCEMENTS)
def test_flat_images_stay_finite_and_in_range(name):
    flat = torch.tensor([0.0, 0.3, 1.0]).view(3, 1, 1, 1).expand(3, 3, 8, 8)
    found = ENHANCEMENTS[name](flat, torch.tensor([0.0, 0.5, 0.999]))
    assert found.min() >= 0
    assert found.max() <= 1
    if name in ("autocontrast", "equalize", "color", "contrast", "sharpness"):
        torch.testing.assert_close(found, flat, rtol=0, atol=0.5 / 255)


def motion(name, u, images):
    index = OPERATIONS.index(name) - OPERATIONS.index("rotate")
    return move(images, torch.full((len(images),), u), torch.full((len(images),), index))


def test_translation_shifts_by_pixels_and_lets_grey_in():
    images = photos(2, 20, 20)
    found = motion("translate_x", 0.5 + 0.5 * 4 / 6, images)  # 4 of at most 6 pixels
    torch.testing.assert_close(found[..., :16], images[..., 4:], rtol=0, atol=1e-5)
    torch.testing.assert_close(found[..., 16:], torch.full((2, 3, 20, 4), GREY))
    found = motion("translate_y", 0.0, images)
    torch.testing.assert_close(found[:, :, 6:], images[:, :, :14], rtol=0, atol=1e-5)
    torch.testing.assert_close(found[:, :, :6], torch.full((2, 3, 6, 20), GREY))


@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
def test_rotation_and_shear_are_those_of_pillow(size):
    image = photos(1, *size)
    height, width = size
    for name, u, matrix in (
        ("rotate", 1.0, lambda a: (np.cos(a), -np.sin(a), np.sin(a), np.cos(a))),
        ("shear_x", 1.0, lambda a: (1, 0.3, 0, 1)),
        ("shear_y", 0.0, lambda a: (1, 0, -0.3, 1)),
    ):
        a, b, c, d = matrix(np.pi / 6)
        x, y = width / 2, height / 2
        affine = (a, b, x - a * x - b * y, c, d, y - c * x - d * y)
        expected = tensor(
            pillow(image[0]).transform((width, height), Image.AFFINE, affine, Image.BILINEAR, fillcolor=(0,) * 3)
        )
        inside = expected.amin(0) > 0
        found = motion(name, u, image)[0]
        inside[[0, -1]] = inside[:, [0, -1]] = False
        difference = (found - expected).abs().amax(0)[inside]
        # the rim, where half a pixel is of the outside, is filled with another colour
        assert (difference < 2 / 255).float().mean() > 0.9
        assert inside.float().mean() > 0.6
        assert (found - image[0]).abs().max() > 0.1


@pytest.mark.parametrize("name", ["rotate", "shear_x", "shear_y", "translate_x", "translate_y"])
def test_motions_of_no_strength_change_nothing(name):
    images = photos(2, 24, 40)
    torch.testing.assert_close(motion(name, 0.5, images), images, rtol=0, atol=1e-5)


def test_every_image_gets_the_operation_it_drew():
    images, u = photos(len(OPERATIONS)), torch.full((len(OPERATIONS),), 0.3)
    order = torch.randperm(len(OPERATIONS), generator=random(0))
    found = operate(images, order, u)
    for index, operation in enumerate(order.tolist()):
        one = images[index : index + 1]
        name = OPERATIONS[operation]
        if name == "identity":
            assert torch.equal(found[index : index + 1], one)
        else:
            alone = ENHANCEMENTS[name](one, u[:1]) if name in ENHANCEMENTS else motion(name, 0.3, one)
            torch.testing.assert_close(found[index : index + 1], alone)


def test_cutout_by_hand():
    images = torch.zeros(3, 3, 8, 8)
    found = cutout(
        images, torch.tensor([1.0, 0.0, 1.0]), torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.5, 0.5, 0.999])
    )
    square = torch.zeros(8, 8, dtype=torch.bool)
    square[2:6, 2:6] = True
    assert torch.equal(found[0, 1] == GREY, square)
    assert (found[1] == 0).all()
    corner = torch.zeros(8, 8, dtype=torch.bool)
    corner[:2, 6:] = True
    assert torch.equal(found[2, 0] == GREY, corner)


def test_same_state_same_view_and_others_differ():
    images = photos(16)
    first, again, other = (strong_view(images, random(seed)) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    generator = random(3)
    assert not torch.equal(strong_view(images, generator), strong_view(images, generator))


@pytest.mark.parametrize("shape", [(5, 3, 32, 32), (3, 3, 24, 40), (1, 3, 3, 3), (0, 3, 32, 32)])
def test_shape_type_and_range_stay_and_the_images_too(shape):
    images = torch.rand(shape, generator=random(0))
    before = images.clone()
    for dtype in (torch.float32, torch.bfloat16):
        found = strong_view(images.to(dtype), random(1))
        assert found.shape == shape
        assert found.dtype == dtype
        assert ((found >= 0) & (found <= 1)).all()
    assert torch.equal(images, before)


def test_channels_last_images_give_the_same_views():
    images = photos(32)
    torch.testing.assert_close(
        strong_view(images.to(memory_format=torch.channels_last), random(0)), strong_view(images, random(0))
    )


def test_most_views_differ_and_squares_cover_a_twelfth_at_most():
    images = photos(1).expand(1000, -1, -1, -1)
    found = strong_view(images, random(0))
    changed = (found != images).flatten(1).any(1).float().mean()
    assert changed > 0.97
    # the square covers E[u²] / 4 = 1/12 of an image, less what the border clips
    painted = cutout(torch.zeros(4000, 3, 32, 32), *torch.rand(3, 4000, generator=random(0)))
    assert 0.05 < (painted > 0).float().mean() < 1 / 12


def test_wrong_input_is_named():
    for images in (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.zeros(3, 8, 8), torch.zeros(2, 1, 8, 8)):
        with pytest.raises(InputError, match="strong_view takes float images"):
            strong_view(images, random(0))
