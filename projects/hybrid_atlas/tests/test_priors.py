"""What networks and other tools say, as the parameter of each model: signs, units, grids."""

import math

import pytest
import torch
from torch import nn

from projects.hybrid_atlas.bands import interpolation, projection, separable
from projects.hybrid_atlas.deformation import SVF, Momentum, build_deformation
from projects.hybrid_atlas.model import build_network
from projects.hybrid_atlas.priors import External, Prior, as_parameter
from projects.hybrid_atlas.svf import enlarge, exponential, logarithm
from shared.errors import InputError

BOTH = pytest.mark.parametrize("dims", [2, 3])
SHAPES = {2: (48, 41), 3: (32, 27, 30)}
MODELS = {
    "flash": {"name": "flash", "num_modes": 15, "steps": 20}, "lddmm": {"name": "lddmm", "steps": 20},
    "svf": {"name": "svf"}, "svf_full": {"name": "svf", "downsize": 1},
}  # fmt: skip
SLOW = ("lddmm", "svf_full")
EACH = pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in MODELS])


def smooth(shape, amplitude, seed=0):
    """A smooth stationary field (1, d, *shape) in voxels that vanishes at the border."""
    generator, dims = torch.Generator().manual_seed(seed), len(shape)
    bumps = torch.randn(1, dims, *[3] * dims, generator=generator)
    field = separable(bumps, [interpolation(3, size).float() for size in shape])
    for axis, size in enumerate(shape):
        window = torch.sin(math.pi * (torch.arange(size) + 0.5) / size) ** 2
        field = field * window.reshape(-1, *[1] * (dims - 1 - axis))
    return field * amplitude / field.norm(dim=1).max()


def model_of(name, shape, spacing=1.0):
    return build_deformation(MODELS[name], shape, spacing)


def rms(field):
    return float(field.square().sum(1).mean().sqrt())


def halved(w):
    return enlarge(w, tuple(-(-size // 2) for size in w.shape[2:]))


class Says(nn.Module):
    """A network that has its answer ready and keeps what it was asked."""

    def __init__(self, answer, kind):
        super().__init__()
        self.answer, self.kind, self.dims, self.asked = answer, kind, answer.shape[1], []

    def forward(self, moving, fixed):
        self.asked.append((moving, fixed))
        return self.answer.expand(len(fixed), *self.answer.shape[1:])


def coarse(field, num_modes=15):
    return separable(field, [projection(size, num_modes).float() for size in field.shape[2:]])


# of the displacement: geodesics and stationary fields agree to first order only
@BOTH
@EACH
@pytest.mark.parametrize("kind", ["velocity", "svf", "displacement"])
@pytest.mark.parametrize("spacing", [pytest.param(1.0, marks=pytest.mark.slow), 0.5, "per axis"])
def test_known_displacement_comes_out_of_every_model(name, dims, kind, spacing):
    shape = SHAPES[dims]
    spacing = [1.0, 2.0, 0.7][:dims] if spacing == "per axis" else spacing
    w = smooth(shape, 0.6)
    u = exponential(w)
    field = {"velocity": coarse(-w), "svf": halved(w), "displacement": u}[kind]
    model = model_of(name, shape, spacing)
    length = spacing if isinstance(spacing, list) else [spacing] * dims
    found = model.displacement(as_parameter(model, field, kind, shape, length))
    assert found.shape == u.shape
    assert rms(found - u) < 0.12 * rms(u), rms(found - u) / rms(u)
    assert rms(found + u) > 1.8 * rms(u)


@BOTH
@EACH
def test_small_displacements_come_out_exactly(name, dims):
    shape = SHAPES[dims]
    w = smooth(shape, 0.05)
    model = model_of(name, shape, 2.0)
    for kind, field in (("velocity", coarse(-w)), ("svf", halved(w)), ("displacement", w)):
        found = model.displacement(as_parameter(model, field, kind, shape, [2.0] * dims))
        # half as many points do not hold all of it
        lost = rms(enlarge(halved(w), shape) - w) if kind != "velocity" or name == "svf" else 0.0
        assert rms(found - w) < 1.02 * lost + 0.01 * rms(w), kind


@BOTH
def test_voxelmorphs_own_field_is_kept_to_the_bit(dims):
    shape = SHAPES[dims]
    model, w = model_of("svf", shape, 0.5), halved(smooth(shape, 3.0))
    parameter = as_parameter(model, w, "svf", shape, [0.5] * dims)
    torch.testing.assert_close(parameter / model.coarse_length, w)
    wanted = enlarge(exponential(w), shape)
    torch.testing.assert_close(model.displacement(parameter), wanted, rtol=1e-4, atol=1e-4)


@BOTH
def test_flashs_own_velocity_is_kept_to_the_bit(dims):
    model = model_of("flash", SHAPES[dims], 0.5)
    v = torch.randn(2, dims, *[15] * dims)
    torch.testing.assert_close(as_parameter(model, v, "velocity", SHAPES[dims], [0.5] * dims), 0.5 * v)
    few = torch.randn(2, dims, *[7] * dims)
    wide = as_parameter(model, few, "velocity", SHAPES[dims], [1.0] * dims)
    assert wide.shape == (2, dims, *[15] * dims)
    torch.testing.assert_close(
        separable(wide, [projection(15, 7).float()] * dims), few, rtol=1e-4, atol=1e-5
    )  # what was added is nothing


@BOTH
@EACH
@pytest.mark.parametrize("kind", ["velocity", "svf", "displacement"])
def test_field_of_coarser_images_is_the_same_deformation(name, dims, kind):
    """A network that saw images of half as many points: its voxels are twice as long."""
    fine, small = [40, 32, 36][:dims], [20, 16, 18][:dims]
    w = smooth(small, 1.0)
    field = {"velocity": coarse(-w, 9), "svf": halved(w), "displacement": exponential(w)}[kind]
    model = model_of(name, fine)
    found = model.displacement(as_parameter(model, field, kind, small, [2.0] * dims))
    wanted = torch.nn.functional.interpolate(
        2 * exponential(w), size=fine, mode="bilinear" if dims == 2 else "trilinear", align_corners=False
    )
    assert rms(found - wanted) < 0.22 * rms(wanted), rms(found - wanted) / rms(wanted)


@BOTH
@pytest.mark.parametrize("amplitude", [0.05, 1.0, 6.0])
def test_logarithm_finds_the_field_of_a_displacement(dims, amplitude):
    w = smooth(SHAPES[dims], amplitude)
    found = logarithm(exponential(w))
    assert rms(exponential(found) - exponential(w)) < 0.05 * rms(w)
    assert rms(found - w) < 0.12 * rms(w)
    assert not found.requires_grad


# --- the network behind it ---


@BOTH
@EACH
def test_prior_asks_about_atlas_and_images_as_they_are(name, dims):
    shape = SHAPES[dims]
    net, model = Says(halved(smooth(shape, 1.0)), "svf"), model_of(name, shape)
    atlas, images = torch.rand(1, 1, *shape), torch.rand(3, 1, *shape)
    found = Prior(net).predict(model, atlas, images)
    assert found.shape == (3, dims, *model.parameter_shape)
    ((moving, fixed),) = net.asked
    assert torch.equal(moving, atlas.expand(3, -1, *shape))
    assert torch.equal(fixed, images)
    torch.testing.assert_close(found, as_parameter(model, net.answer, "svf", shape, [1.0] * dims).expand_as(found))


@BOTH
def test_images_of_another_spacing_are_brought_to_that_of_the_training(dims):
    shape = [80, 64, 72][:dims]
    atlas, images = torch.rand(1, 1, *shape), torch.rand(2, 1, *shape)
    small = [size // 2 for size in shape]
    w = smooth(small, 1.0)
    net = Says(halved(w), "svf")
    model = model_of("flash", shape, 0.5)
    found = Prior(net).predict(model, atlas, images)
    ((moving, fixed),) = net.asked
    pool = torch.nn.functional.avg_pool2d if dims == 2 else torch.nn.functional.avg_pool3d
    torch.testing.assert_close(fixed, pool(images, 2))
    torch.testing.assert_close(moving, pool(atlas, 2).expand_as(moving))
    # w of one unit is two voxels of these images
    wanted = 2 * torch.nn.functional.interpolate(
        exponential(w), size=shape, mode="bilinear" if dims == 2 else "trilinear", align_corners=False
    )
    assert rms(model.displacement(found)[:1] - wanted) < 0.15 * rms(wanted)
    finer = Says(halved(smooth([2 * size for size in shape], 1.0)), "svf")
    Prior(finer, spacing=0.25).predict(model, atlas, images)
    assert finer.asked[0][1].shape[2:] == tuple(2 * size for size in shape)
    # a hair's breadth is no reason to interpolate
    same = Says(halved(smooth(shape, 1.0)), "svf")
    Prior(same, spacing=0.505).predict(model, atlas, images)
    assert torch.equal(same.asked[0][1], images)


@BOTH
@pytest.mark.parametrize("network", ["vxm", "flash_head", "deepflash"])
def test_networks_learn_through_the_models(network, dims):
    options = {
        "vxm": {"encoder": [4, 4], "decoder": [4, 4], "final": [4]},
        "flash_head": {"encoder": [4, 4, 4], "decoder": [4], "num_modes": 7},
        "deepflash": {"spectrum_size": 32, "num_modes": 7},
    }[network]
    net = build_network({"name": network, "dims": dims, **options})
    shape = [24, 20, 22][:dims]
    atlas, images = torch.rand(1, 1, *shape), torch.rand(2, 1, *shape)
    for name in MODELS:
        model = model_of(name, shape)
        net.zero_grad()
        model.squared_error(Prior(net).predict(model, atlas, images), atlas, images).sum().backward()
        last = net.flow if network != "deepflash" else net.nets[0].decoder[12]
        assert last.weight.grad.abs().max() > 0, name


def test_what_does_not_go_together_is_refused():
    images = torch.rand(1, 1, 16, 16)
    with pytest.raises(InputError, match="the prior is for 3-D images, the scans are 2-D"):
        Prior(Says(torch.zeros(1, 3, 8, 8, 8), "svf")).predict(model_of("svf", (16, 16)), images, images)
    with pytest.raises(InputError, match="deformation=lddmm_momentum has no prior"):
        as_parameter(Momentum((16, 16)), torch.zeros(1, 2, 8, 8), "svf", (16, 16), [1.0, 1.0])


@BOTH
@EACH
def test_displacements_of_other_tools_are_asked_for_by_subject(name, dims):
    shape = SHAPES[dims]
    known = torch.cat([exponential(smooth(shape, 1.0, seed)) for seed in range(4)])
    model, asked = model_of(name, shape, 2.0), []

    def read(about, subjects):
        asked.append((about, list(subjects)))
        return known[list(subjects)]

    images = torch.rand(2, 1, *shape)
    found = model.displacement(External(read).predict(model, images[:1], images, [3, 1]))
    assert asked == [(model, [3, 1])]
    for i, subject in enumerate((3, 1)):
        wanted = known[subject : subject + 1]
        assert rms(found[i : i + 1] - wanted) < 0.12 * rms(wanted)


def test_stationary_field_of_any_grid_is_taken():
    """A network whose field is at full resolution, or at a third."""
    shape, w = (49, 43), smooth((49, 43), 1.0)
    model = SVF(shape)
    for grid in ((49, 43), (25, 22), (17, 15)):
        found = model.displacement(as_parameter(model, enlarge(w, grid), "svf", shape, [1.0, 1.0]))
        assert rms(found - exponential(w)) < 0.1 * rms(w), grid
