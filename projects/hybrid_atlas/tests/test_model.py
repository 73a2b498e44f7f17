"""The networks: their sizes, their shapes, what they give at the beginning, and what reaches their parameters."""

import itertools
import math
from pathlib import Path

import pytest
import torch
import yaml

from projects.hybrid_atlas.model import NETWORKS, DeepFlash, FlashHead, SpectrumNet, VoxelMorph, build_network
from shared.errors import InputError

CONFIGS = Path(__file__).parents[1] / "configs" / "model"
SIZES = {
    ("vxm", 2): 109_170, ("vxm", 3): 327_331, ("flash_head", 2): 241_698, ("flash_head", 3): 726_115,
    ("deepflash", 2): 980_404, ("deepflash", 3): 2_935_782,
}  # fmt: skip
SMALL = {
    "vxm": {"encoder": [4, 5, 6, 7], "decoder": [8, 7, 6, 5], "final": [6, 4]},
    "strided": {"encoder": [4, 5, 6], "decoder": [8, 7, 6], "final": [6, 4], "pooling": False, "between": [5]},
    "cvpr": {
        "encoder": [4, 5], "decoder": [7, 6], "final": [4], "pooling": False, "stride_kernel": 4, "downsize": 1,
        "kind": "displacement",
    },
    "half": {"encoder": [4, 5], "decoder": [7, 6], "final": [4], "half_res": True},
    "flash_head": {"encoder": [4, 5, 6], "decoder": [5], "num_modes": 5},
    "early": {"encoder": [4, 5, 6], "decoder": [5], "num_modes": 5, "first_stride": 2},
    "deepflash": {"spectrum_size": 32, "num_modes": 5},
    "one_net": {"spectrum_size": 32, "num_modes": 5, "two_nets": False, "dropout": 0.0},
}  # fmt: skip
NAMES = {"strided": "vxm", "cvpr": "vxm", "half": "vxm", "early": "flash_head", "one_net": "deepflash"}
SHAPES = {2: ((32, 48), (33, 41), (18, 50)), 3: ((16, 32, 16), (17, 20, 23))}
BOTH = pytest.mark.parametrize("dims", [2, 3])
EACH = pytest.mark.parametrize("kind", SMALL)


def small(kind, dims, **options):
    torch.manual_seed(0)
    return build_network({"name": NAMES.get(kind, kind), "dims": dims, **SMALL[kind], **options})


def pair(shape, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(2, batch, 1, *shape, generator=generator).unbind(0)


def given(net, moving, fixed, waken=True):
    """The output of a network whose last weights are not as small as they begin, in eval mode."""
    if waken:
        torch.manual_seed(1)
        for last in [net.flow] if hasattr(net, "flow") else [part.decoder[12] for part in net.nets]:
            torch.nn.init.normal_(last.weight, std=0.1)
    return net.eval()(moving, fixed)


def parameters(convolutions, dims, norms=()):
    return sum((i * 3**dims + 1) * o for i, o in itertools.pairwise(convolutions)) + sum(2 * n for n in norms)


@pytest.mark.parametrize(("name", "dims"), SIZES)
def test_configured_networks_have_the_parameters_of_their_layers(name, dims):
    options = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["net"]
    with torch.device("meta"):
        net = build_network({**options, "dims": dims})
    if name == "vxm":
        expected = parameters([2, 16, 32, 32, 32, 32], dims)
        expected += 3 * parameters([64, 32], dims) + parameters([48, 32, 16, 16, dims], dims)
    elif name == "flash_head":
        expected = (
            parameters([2, 32, 64, 64, 64], dims) + 2 * parameters([128, 64], dims) + parameters([64, dims], dims)
        )
    else:
        encoder, decoder = [1, 16, 16, 32, 64, 128], [256, 128, 64, 32, 8, dims]
        expected = parameters(encoder, dims, encoder[1:]) + parameters(decoder, dims, decoder[1:-1])
        expected *= 2
    assert sum(p.numel() for p in net.parameters()) == expected == SIZES[name, dims]


@BOTH
def test_deepflash_has_the_sides_of_the_paper(dims):
    with torch.device("meta"):
        net, sides = SpectrumNet(dims, 0.2), []
        for module in net.modules():
            if isinstance(module, (torch.nn.Conv2d, torch.nn.Conv3d)):
                module.register_forward_hook(lambda _, __, out: sides.append(set(out.shape[2:])))
        found = net(*(torch.zeros(1, 1, *[128] * dims) for _ in range(2)))
    assert sides[:5] == sides[5:10] == [{65}, {33}, {35}, {19}, {11}]
    assert sides[10:] == [{13}, {15}, {17}, {17}, {17}]
    assert found.shape == (1, dims, *[17] * dims)


@BOTH
@EACH
def test_every_parameter_gets_a_gradient(kind, dims):
    net = small(kind, dims).train()
    net(*pair(SHAPES[dims][0])).square().sum().backward()
    for name, parameter in net.named_parameters():
        # batch norm takes the means off what these add
        biases = ("encoder.0", "encoder.3", "encoder.7", "encoder.10", "encoder.14")
        biases += ("decoder.0", "decoder.2", "decoder.6", "decoder.9")
        if not (kind in ("deepflash", "one_net") and name.endswith(tuple(f"{bias}.bias" for bias in biases))):
            assert parameter.grad.abs().max() > 0, name


@BOTH
@EACH
def test_sizes_of_all_kinds_give_fields_of_the_promised_shape(kind, dims):
    net = small(kind, dims)
    for shape in SHAPES[dims]:
        field = given(net, *pair(shape, batch=3))
        if NAMES.get(kind, kind) != "vxm":
            # a quarter of the resolution has no room for more
            expected = [3 if kind == "early" and size == 16 else 5 for size in shape]
        else:
            expected = shape if kind == "cvpr" else [-(-size // 2) for size in shape]
        assert field.shape == (3, dims, *expected)
        assert field.isfinite().all()
        assert field.abs().max() > 0


@BOTH
@EACH
def test_subjects_of_a_batch_do_not_see_one_another(kind, dims):
    net = small(kind, dims)
    moving, fixed = pair(SHAPES[dims][1], batch=3)
    together = given(net, moving, fixed)
    for i in range(3):
        torch.testing.assert_close(net(moving[i : i + 1], fixed[i : i + 1]), together[i : i + 1], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together[0], together[1])


@BOTH
@EACH
def test_state_dict_comes_back(kind, dims):
    net, other = small(kind, dims), small(kind, dims)
    for parameter in other.parameters():
        torch.nn.init.normal_(parameter)
    other.load_state_dict(net.state_dict())
    moving, fixed = pair(SHAPES[dims][0])
    assert torch.equal(net.eval()(moving, fixed), other.eval()(moving, fixed))


@BOTH
@EACH
def test_both_images_matter_and_each_in_its_role(kind, dims):
    net, (moving, fixed) = small(kind, dims), pair(SHAPES[dims][0])
    found = given(net, moving, fixed)
    for other in (net(fixed, moving), net(moving, moving), net(fixed, fixed)):
        assert (other - found).abs().max() > 1e-6 * found.abs().max()


@BOTH
@EACH
def test_first_deformation_is_nearly_none(kind, dims):
    field = given(small(kind, dims), *pair(SHAPES[dims][0]), waken=False)
    assert 0 < field.abs().max() < 1e-3


@BOTH
def test_velocity_of_half_the_resolution_is_the_full_one_in_larger_voxels(dims):
    full, half = small("vxm", dims, downsize=1), small("vxm", dims)
    moving, fixed = pair(SHAPES[dims][1])
    w, small_w = given(full, moving, fixed), given(half, moving, fixed)
    for axis, (size, few) in enumerate(zip(w.shape[2:], small_w.shape[2:], strict=True)):
        corners = torch.tensor([0, -1])
        scale = (few - 1) / (size - 1)
        a, b = w[:, axis], small_w[:, axis]
        for other in range(1, dims + 1):
            a, b = a.index_select(other, corners % a.shape[other]), b.index_select(other, corners % b.shape[other])
        torch.testing.assert_close(b, scale * a, rtol=1e-4, atol=1e-6)


@BOTH
def test_half_resolution_decoder_gives_voxels_of_its_own_grid(dims):
    net = small("half", dims)
    assert net.unet_model.remaining[0].main.in_channels == 6
    assert given(net, *pair(SHAPES[dims][0])).shape[2:] == tuple(size // 2 for size in SHAPES[dims][0])


@BOTH
def test_unit_multiplies_what_the_network_says(dims):
    for kind in ("flash_head", "deepflash"):
        moving, fixed = pair(SHAPES[dims][0])
        one, ten = (given(small(kind, dims, unit=unit), moving, fixed) for unit in (1.0, 10.0))
        torch.testing.assert_close(ten, 10 * one)


@BOTH
def test_flash_head_keeps_only_the_frequencies_that_the_grid_has(dims):
    moving, fixed = pair([16] * dims)
    assert given(small("early", dims, num_modes=15), moving, fixed).shape[2:] == (3,) * dims
    assert given(small("flash_head", dims, num_modes=15), moving, fixed).shape[2:] == (7,) * dims


def test_networks_of_deepflash_see_real_and_imaginary_parts():
    net = small("deepflash", 2)
    seen = []
    for number, part in enumerate(net.nets):
        part.register_forward_hook(lambda _, inputs, __, number=number: seen.append((number, *inputs)))
    moving, fixed = pair((32, 32))
    given(net, moving, fixed)
    assert [number for number, *_ in seen] == [0, 1]
    for place, image in enumerate((moving, fixed), 1):
        spectrum = torch.fft.fftshift(torch.fft.fft2(image), dim=(2, 3)) / 32
        torch.testing.assert_close(seen[0][place], spectrum.real, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(seen[1][place], spectrum.imag, rtol=1e-4, atol=1e-5)


def test_spectra_of_one_scene_at_two_resolutions_are_nearly_the_same():
    x = torch.linspace(0, 2 * math.pi, 129)[:-1]
    scene = (0.5 + 0.3 * torch.sin(x)[:, None] * torch.cos(2 * x) + 0.1 * torch.cos(3 * x))[None, None]
    net = small("deepflash", 2)
    whole, coarse = net._spectrum(scene), net._spectrum(torch.nn.functional.avg_pool2d(scene, 2))
    middle = (slice(None), slice(None), slice(12, 21), slice(12, 21))
    assert (whole[middle].abs() - coarse[middle].abs()).abs().max() < 0.02 * whole.abs().max()


def test_network_that_knows_the_spectrum_gives_its_field():
    """The output is the centred spectrum: a field comes back from its own."""
    net = small("deepflash", 2, two_nets=False, num_modes=5)
    field = torch.randn(1, 2, 5, 5)
    spectrum = torch.fft.fftshift(torch.fft.fft2(field, norm="forward"), dim=(2, 3))
    spectrum = torch.nn.functional.pad(spectrum, [6, 6, 6, 6])
    parts = iter((spectrum.real, spectrum.imag))
    net.nets[0].forward = lambda *_: next(parts)
    torch.testing.assert_close(net(*pair((32, 32), batch=1)), 0.1 * field, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "unet"}, "choose one of vxm, flash_head, deepflash"),
        ({"name": "vxm", "width": 3}, "takes no 'width'"),
        ({"name": "vxm", "dims": 4}, "dims is 2 or 3"), ({"name": "vxm", "encoder": [4]}, "as many widths"),
        ({"name": "vxm", "between": [3]}, "are for pooling=false"),
        ({"name": "vxm", "stride_kernel": 4}, "are for pooling=false"),
        ({"name": "vxm", "pooling": False, "stride_kernel": 5}, "stride_kernel is 3 or 4"),
        ({"name": "vxm", "pooling": False, "half_res": True}, "half_res is for"),
        ({"name": "vxm", "downsize": 4, "half_res": True}, "half_res is for"),
        ({"name": "vxm", "downsize": 0}, "downsize at least 1"), ({"name": "vxm", "kind": "velocity"}, "kind is svf"),
        ({"name": "vxm", "kind": "displacement"}, "with downsize=1"),
        ({"name": "flash_head", "first_stride": 3}, "first_stride is 1 or 2"),
        ({"name": "flash_head", "decoder": [8, 8, 8, 8]}, "two widths less"),
        ({"name": "flash_head", "num_modes": 14}, "odd num_modes"), ({"name": "deepflash", "num_modes": 4}, "is odd"),
    ],
)  # fmt: skip
def test_arguments_that_make_no_sense_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        build_network(options)


def test_networks_say_what_they_give():
    assert {name: small(name, 2).kind for name in NETWORKS} == {
        "vxm": "svf", "flash_head": "velocity", "deepflash": "velocity",
    }  # fmt: skip
    assert list(NETWORKS.values()) == [VoxelMorph, FlashHead, DeepFlash]
