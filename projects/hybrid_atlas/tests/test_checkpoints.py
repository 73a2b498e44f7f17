"""Files of others, forged key by key in their formats, and our own, in and out."""

import json
import math
import pickle
from pathlib import Path

import h5py
import lightning.pytorch as L
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from projects.hybrid_atlas.checkpoints import load_published, read_lagomorph, read_network, save_network
from projects.hybrid_atlas.deformation import Momentum
from projects.hybrid_atlas.metric import Metric
from projects.hybrid_atlas.model import DeepFlash, VoxelMorph, build_network
from projects.hybrid_atlas.module import RegistrationPrior, load_module
from shared.errors import InputError
from shared.io.checkpoints import read_metadata

NET = {"name": "flash_head", "dims": 2, "encoder": [8, 8, 8], "decoder": [8], "first_stride": 2, "num_modes": 7}
USUAL = ([16, 32, 32, 32], [32, 32, 32, 32, 32, 16, 16])
SMALL = ([3, 4, 5, 6], [7, 8, 9, 10, 11, 12, 13])
CONFIG = {
    "inshape": (16, 16, 16), "nb_unet_features": None, "nb_unet_levels": None, "unet_feat_mult": 1,
    "nb_unet_conv_per_level": 1, "int_steps": 7, "int_downsize": 2, "bidir": False, "use_probs": False, "src_feats": 1,
    "trg_feats": 1, "unet_half_res": False,
}  # fmt: skip


def convolution(name, inputs, outputs, dims, kernel=3):
    return {f"{name}.weight": (outputs, inputs, *[kernel] * dims), f"{name}.bias": (outputs,)}


def pooled_shapes(encoder, features, dims=3, half_res=False):
    """Name and shape of every tensor of version 0.2."""
    decoder, final, shapes, before = features[:4], features[4:], {}, 2
    for level, width in enumerate(encoder):
        shapes |= convolution(f"unet_model.encoder.{level}.0.main", before, width, dims)
        before = width
    for level, width in enumerate(decoder):
        shapes |= convolution(f"unet_model.decoder.{level}.0.main", before, width, dims)
        before = width + (0 if half_res and level == 3 else encoder[3 - level])
    for number, width in enumerate(final):
        shapes |= convolution(f"unet_model.remaining.{number}.main", before, width, dims)
        before = width
    return shapes | convolution("flow", before, dims, dims)


def strided_shapes(encoder, features, dims=3):
    """Name and shape of every tensor of version 0.1."""
    shapes, before = {}, 2
    for level, width in enumerate(encoder):
        shapes |= convolution(f"unet_model.downarm.{level}.main", before, width, dims)
        before = width
    for level, width in enumerate(features[:4]):
        inputs = before if level == 0 else before + encoder[3 - level]
        shapes |= convolution(f"unet_model.uparm.{level}.main", inputs, width, dims)
        before = width
    before += 2
    for number, width in enumerate(features[4:]):
        shapes |= convolution(f"unet_model.extras.{number}.main", before, width, dims)
        before = width
    return shapes | convolution("flow", before, dims, dims)


def cvpr_shapes(encoder, features, dims=3):
    """Name and shape of every tensor of the network vm2 of CVPR 2018; of vm1 where one feature less is given."""
    shapes, before = {}, 2
    for level, width in enumerate(encoder):
        shapes |= convolution(f"unet_model.enc.{level}.main", before, width, dims, kernel=4)
        before = width
    inputs = [
        encoder[3], features[0] + encoder[2], features[1] + encoder[1], features[2] + encoder[0], features[3],
        features[4] + 2,
    ]  # fmt: skip
    for level, (width, before) in enumerate(zip(features[:6], inputs, strict=True)):
        shapes |= convolution(f"unet_model.dec.{level}.main", before, width, dims)
    if len(features) == 7:
        shapes |= convolution("unet_model.vm2_conv.main", features[5], features[6], dims)
    return shapes | convolution("flow", features[-1], dims, dims)


def deepflash_shapes(dims=3):
    """Name and shape of every tensor of DeepFLASH."""
    shapes = {}
    widths = {"encoder": [1, 16, 16, 32, 64, 128], "decoder": [256, 128, 64, 32, 8, dims]}
    places = {
        "encoder": ((0, 3, 7, 10, 14), (1, 4, 8, 11, 15)), "decoder": ((0, 2, 6, 9, 12), (1, 3, 7, 10)),
    }  # fmt: skip
    for part, (convolutions, norms) in places.items():
        for place, before, width in zip(convolutions, widths[part][:-1], widths[part][1:], strict=True):
            shapes |= convolution(f"{part}.{place}", before, width, dims)
        for place, width in zip(norms, widths[part][1:], strict=False):
            shapes |= {f"{part}.{place}.{name}": (width,) for name in ("weight", "bias", "running_mean", "running_var")}
            shapes[f"{part}.{place}.num_batches_tracked"] = ()
    return shapes


def forged(shapes):
    """Random tensors with which numbers neither vanish nor explode."""
    generator = torch.Generator().manual_seed(0)
    state = {
        name: torch.randn(shape, generator=generator) * (1.4 / math.prod(shape[1:]) ** 0.5 if shape[1:] else 0.2)
        for name, shape in shapes.items()
    }
    for name in state:
        if name.endswith(("1.weight", "4.weight", "8.weight", "11.weight")) and state[name].ndim == 1:
            state[name] += 1
        if name.endswith("running_var"):
            state[name] = 0.5 + state[name].abs()
        elif name.endswith("tracked"):
            state[name] = torch.tensor(7)
    return state


def voxelmorph_file(state, path, **config):
    """Save as VoxelMorph does; it leaves buffers out only by this name."""
    torch.save({"config": {**CONFIG, **config}, "model_state": state}, path)
    return path


def saved(content, path):
    torch.save(content, path)
    return path


def keras_file(shapes, path, nested="vxm_dense/vxm_dense_", **config):
    """Write the tensors of `forged` as Keras would; its decoder counts down."""
    state = forged(shapes)
    with h5py.File(path, "w") as file:
        file.attrs["model_config"] = json.dumps({"class_name": "VxmDense", "config": {**CONFIG, **config}}).encode()
        for name, tensor in state.items():
            layer, part = name.removeprefix("unet_model.").rsplit(".", 1)
            kind, level, *_ = (*layer.split("."), "")
            layer = {
                "encoder": f"unet_enc_conv_{level}_0", "remaining": f"unet_dec_final_conv_{level}", "flow": "flow",
                "decoder": f"unet_dec_conv_{3 - int(level or 0)}_0",
            }[kind]  # fmt: skip
            if part == "weight":
                file[f"model_weights/{nested}{layer}/kernel:0"] = np.moveaxis(tensor.numpy(), (1, 0), (-2, -1))
                file[f"optimizer_weights/Adam/m/{nested}{layer}/kernel:0"] = np.zeros(3)
            else:
                file[f"model_weights/{nested}{layer}/bias:0"] = tensor.numpy()
    return state


def images(dims=3, size=16):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(2, 2, 1, *[size] * dims, generator=generator).unbind(0)


# --- what the published networks compute, in other words ---


def layer(state, name, x, **options):
    convolve = F.conv2d if x.ndim == 4 else F.conv3d
    return convolve(x, state[f"{name}.weight"], state[f"{name}.bias"], padding=1, **options)


def block(state, name, x, **options):
    return F.leaky_relu(layer(state, f"unet_model.{name}.main", x, **options), 0.2)


def doubled(x):
    for axis in range(2, x.ndim):
        x = x.repeat_interleave(2, axis)
    return x


def pooled_flow(state, moving, fixed, half_res=False):
    pool = F.max_pool2d if moving.ndim == 4 else F.max_pool3d
    outputs, x = [], torch.cat([moving, fixed], 1)
    for level in range(4):
        outputs.append(block(state, f"encoder.{level}.0", x))
        x = pool(outputs[-1], 2)
    for level in range(4):
        x = block(state, f"decoder.{level}.0", x)
        if not (half_res and level == 3):
            x = torch.cat([doubled(x), outputs[3 - level]], 1)
    for number in range(sum("remaining" in name for name in state) // 2):
        x = block(state, f"remaining.{number}", x)
    return layer(state, "flow", x)


def strided_flow(state, moving, fixed):
    outputs = [torch.cat([moving, fixed], 1)]
    for level in range(4):
        outputs.append(block(state, f"downarm.{level}", outputs[-1], stride=2))
    x = outputs[4]
    for level in range(4):
        x = torch.cat([doubled(block(state, f"uparm.{level}", x)), outputs[3 - level]], 1)
    for number in range(3):
        x = block(state, f"extras.{number}", x)
    return layer(state, "flow", x)


def cvpr_displacement(state, moving, fixed):
    outputs = [torch.cat([moving, fixed], 1)]
    for level in range(4):
        outputs.append(block(state, f"enc.{level}", outputs[-1], stride=2))
    x = outputs[4]
    for level in range(3):
        x = torch.cat([doubled(block(state, f"dec.{level}", x)), outputs[3 - level]], 1)
    x = block(state, "dec.4", block(state, "dec.3", x))
    x = block(state, "dec.5", torch.cat([doubled(x), outputs[0]], 1))
    if "unet_model.vm2_conv.main.weight" in state:
        x = block(state, "vm2_conv", x)
    return layer(state, "flow", x)


def halved(flow):
    """A displacement field on half as many points with the same corners, in voxels of theirs."""
    sides = flow.shape[2:]
    small = [side // 2 for side in sides]
    places = [torch.linspace(0, side - 1, half) for side, half in zip(sides, small, strict=True)]
    for axis, place in enumerate(places, 2):
        low = place.floor().long().clamp(max=flow.shape[axis] - 2)
        share = (place - low).reshape(-1, *[1] * (flow.ndim - 1 - axis))
        flow = (1 - share) * flow.index_select(axis, low) + share * flow.index_select(axis, low + 1)
    scale = torch.tensor([(half - 1) / (side - 1) for side, half in zip(sides, small, strict=True)])
    return flow * scale.reshape(-1, *[1] * len(sides))


@torch.no_grad()
def same(net, wanted, dims=3):
    moving, fixed = images(dims)
    found = net(moving, fixed)
    assert wanted(moving, fixed).abs().max() > 1e-3
    torch.testing.assert_close(found, wanted(moving, fixed), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, net(fixed, moving))


# --- VoxelMorph ---


def test_forged_files_have_the_parameters_of_the_published_networks():
    for shapes in (pooled_shapes, strided_shapes):
        table = shapes(*USUAL)
        assert table["flow.weight"] == (3, 16, 3, 3, 3)
        assert sum(map(math.prod, table.values())) == (327_331 if shapes is pooled_shapes else 301_411)
    table = pooled_shapes(*USUAL)
    assert table["unet_model.remaining.0.main.weight"] == (32, 48, 3, 3, 3)
    assert table["unet_model.decoder.3.0.main.weight"] == (32, 64, 3, 3, 3)
    table = strided_shapes(*USUAL)
    assert table["unet_model.uparm.3.main.weight"] == (32, 48, 3, 3, 3)
    assert table["unet_model.extras.0.main.weight"] == (32, 34, 3, 3, 3)
    table = cvpr_shapes(*USUAL)
    assert table["unet_model.dec.3.main.weight"][:2] == (32, 48)
    assert table["unet_model.dec.5.main.weight"][:2] == (16, 34)
    assert table["unet_model.vm2_conv.main.weight"][:2] == (16, 16)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("widths", [USUAL, SMALL, (SMALL[0], SMALL[1][:5])], ids=["usual", "small", "one_final"])
def test_version_02_computes_what_it_did(tmp_path, dims, widths):
    state = forged(pooled_shapes(*widths, dims))
    net = load_published(voxelmorph_file(state, tmp_path / "0100.pt"))
    assert (type(net), net.kind, net.training) == (VoxelMorph, "svf", False)
    assert {name: value.shape for name, value in net.state_dict().items()} == {n: v.shape for n, v in state.items()}
    same(net, lambda moving, fixed: halved(pooled_flow(state, moving, fixed)), dims)


@pytest.mark.parametrize("dims", [2, 3])
def test_version_01_computes_what_it_did(tmp_path, dims):
    state = forged(strided_shapes(*SMALL, dims))
    net = load_published(voxelmorph_file(state, tmp_path / "0100.pt"))
    assert (net.kind, net.unet_model.downarm[0].main.stride[0]) == ("svf", 2)
    same(net, lambda moving, fixed: halved(strided_flow(state, moving, fixed)), dims)


def test_versions_of_the_usual_size_load_strictly(tmp_path):
    for number, shapes in enumerate((pooled_shapes, strided_shapes, cvpr_shapes)):
        table = shapes(*USUAL)
        net = load_published(voxelmorph_file(forged(table), tmp_path / f"{number}.pt"))
        assert sum(p.numel() for p in net.parameters()) == sum(map(math.prod, table.values()))


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("features", [SMALL[1], SMALL[1][:6]], ids=["vm2", "vm1"])
def test_network_of_cvpr_2018_gives_its_displacement(tmp_path, dims, features):
    state = forged(cvpr_shapes(SMALL[0], features, dims))
    path = saved({**state, "spatial_transform.grid": torch.zeros(1, dims, *[16] * dims)}, tmp_path / "vm2.ckpt")
    net = load_published(path)
    assert net.kind == "displacement"
    same(net, lambda moving, fixed: cvpr_displacement(state, moving, fixed), dims)


def test_what_changes_the_network_is_honoured(tmp_path):
    state = forged(pooled_shapes(*SMALL))
    full = load_published(voxelmorph_file(state, tmp_path / "full.pt", int_downsize=1))
    assert full.kind == "svf"
    same(full, lambda moving, fixed: pooled_flow(state, moving, fixed))
    plain = load_published(voxelmorph_file(state, tmp_path / "plain.pt", int_steps=0))
    assert plain.kind == "displacement"
    same(plain, lambda moving, fixed: pooled_flow(state, moving, fixed))
    half = forged(pooled_shapes(*SMALL, half_res=True))
    net = load_published(voxelmorph_file(half, tmp_path / "half.pt", unet_half_res=True))
    same(net, lambda moving, fixed: pooled_flow(half, moving, fixed, half_res=True))
    for free in ({"bidir": True}, {"int_steps": 5}, {"nb_unet_features": [*SMALL]}, {"inshape": [8, 8, 8]}):
        arguments, _ = read_network(voxelmorph_file(state, tmp_path / "free.pt", **free))
        assert arguments == read_network(voxelmorph_file(state, tmp_path / "usual.pt"))[0]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"nb_unet_conv_per_level": 2}, "of nb_unet_conv_per_level=2; only networks with 1"),
        ({"src_feats": 2}, "of src_feats=2"), ({"trg_feats": 3}, "of trg_feats=3"),
        ({"unet_half_res": True}, "weights of another network: 'unet_model.remaining.0.main.weight' is of shape"),
        ({"unet_half_res": True, "int_steps": 0}, "gives no displacement"),
        ({"int_downsize": None}, "holds no registration network"), ({"int_downsize": 0}, "downsize at least 1"),
    ],
)  # fmt: skip
def test_what_is_not_known_is_refused(tmp_path, config, message):
    path = voxelmorph_file(forged(pooled_shapes(*SMALL)), tmp_path / "other.pt", **config)
    with pytest.raises(InputError, match=message):
        load_published(path)


def test_buffers_of_coordinates_and_missing_configurations_do_not_matter(tmp_path):
    state = forged(pooled_shapes(*SMALL))
    net = load_published(voxelmorph_file(state, tmp_path / "a.pt"))
    grids = {"transformer.grid": torch.zeros(1, 3, 4, 4, 4), "integrate.transformer.grid": torch.zeros(1, 3, 2, 2, 2)}
    save_file(state, tmp_path / "converted.safetensors")
    for path in (saved({**state, **grids}, tmp_path / "b.pt"), tmp_path / "converted.safetensors"):
        again = load_published(path)
        assert all(torch.equal(value, again.state_dict()[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("shapes", [pooled_shapes, strided_shapes, cvpr_shapes])
@pytest.mark.parametrize(
    ("change", "message"),
    [("missing", "lacks '"), ("unknown", "unknown key 'unet_model.gain'"), ("shape", "is of shape")],
)
def test_file_that_differs_in_one_tensor_is_refused(tmp_path, shapes, change, message):
    state = forged(shapes(*SMALL))
    victim = [name for name in state if name.endswith(("2.main.bias", "2.0.main.bias"))][-1]
    if change == "missing":
        del state[victim]
    elif change == "shape":
        state[victim] = torch.zeros(99)
    else:
        state["unet_model.gain"] = torch.zeros(1)
    with pytest.raises(InputError, match=message) as caught:
        load_published(voxelmorph_file(state, tmp_path / "other.pt"))
    assert "other.pt holds weights of another network" in str(caught.value)
    assert "\n" not in str(caught.value)


# --- Keras ---


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("nested", ["vxm_dense/vxm_dense_", "", "unet/x/"])
def test_keras_weights_compute_what_they_did(tmp_path, dims, nested):
    state = keras_file(pooled_shapes(*SMALL, dims), tmp_path / "brain.h5", nested)
    net = load_published(tmp_path / "brain.h5")
    assert net.kind == "svf"
    same(net, lambda moving, fixed: halved(pooled_flow(state, moving, fixed)), dims)


def test_keras_network_of_32_features_loads_strictly(tmp_path):
    widths = ([32] * 4, [32] * 6)
    keras_file(pooled_shapes(*widths), tmp_path / "brain.h5", int_resolution=2, int_downsize=None)
    net = load_published(tmp_path / "brain.h5")
    assert sum(p.numel() for p in net.parameters()) == sum(map(math.prod, pooled_shapes(*widths).values()))


def test_kernels_of_keras_are_turned_and_its_decoder_is_counted_from_below(tmp_path):
    state = keras_file(pooled_shapes(*SMALL), tmp_path / "brain.h5")
    with h5py.File(tmp_path / "brain.h5") as file:
        kernel = file["model_weights/vxm_dense/vxm_dense_unet_dec_conv_3_0/kernel:0"][...]
    assert kernel.shape == (3, 3, 3, 6, 7)
    found = load_published(tmp_path / "brain.h5").unet_model.decoder[0][0].main.weight
    assert found[4, 5, 0, 1, 2] == kernel[0, 1, 2, 5, 4]
    assert torch.equal(found, state["unet_model.decoder.0.0.main.weight"])


def test_keras_options_are_honoured_or_refused(tmp_path):
    path = tmp_path / "brain.h5"
    keras_file(pooled_shapes(*SMALL), path, int_steps=0)
    assert load_published(path).kind == "displacement"
    state = keras_file(pooled_shapes(*SMALL), path, use_probs=True)
    with h5py.File(path, "a") as file:
        file["model_weights/vxm_dense/vxm_dense_log_sigma/kernel:0"] = np.zeros((3, 3, 3, 13, 3))
    assert torch.equal(load_published(path).flow.weight, state["flow.weight"])
    keras_file(pooled_shapes(*SMALL), path, svf_resolution=2)
    with pytest.raises(InputError, match="of svf_resolution=2"):
        load_published(path)
    keras_file(pooled_shapes(*SMALL), path)
    with h5py.File(path, "a") as file:
        del file.attrs["model_config"]
    assert load_published(path).kind == "svf"


@pytest.mark.parametrize("change", ["missing", "twice", "shape", "second", "text", "config"])
def test_other_keras_files_are_refused(tmp_path, change):
    path, layer = tmp_path / "other.h5", "model_weights/vxm_dense/vxm_dense_unet_enc_conv_2_0"
    keras_file(pooled_shapes(*SMALL), path)
    with h5py.File(path, "a") as file:
        if change == "missing":
            del file[f"{layer}/bias:0"]
        elif change == "twice":
            file["model_weights/other_unet_enc_conv_2_0/bias:0"] = np.zeros(5)
        elif change == "shape":
            del file[f"{layer}/kernel:0"]
            file[f"{layer}/kernel:0"] = np.zeros((3, 4, 5))
        elif change == "second":
            file["model_weights/vxm_dense/vxm_dense_unet_enc_conv_2_1/bias:0"] = np.zeros(5)
        elif change == "text":
            del file[f"{layer}/bias:0"]
            file[f"{layer}/bias:0"] = "words"
        else:
            file.attrs["model_config"] = "{"
    with pytest.raises(InputError, match=r"other\.h5 holds") as caught:
        load_published(path)
    assert "\n" not in str(caught.value)


# --- DeepFLASH ---


@pytest.mark.parametrize("dims", [2, 3])
def test_deepflash_loads_and_computes_what_it_did(tmp_path, dims):
    state = forged(deepflash_shapes(dims))
    optimizer = {"state": {0: {"step": 3, "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 5e-3, "params": [0]}]}
    path = saved({"model_state_dict": state, "optimizer_state_dict": optimizer}, tmp_path / "deepflash.pth")
    net = load_published(path, spectrum_size=32, num_modes=5)
    assert (type(net), len(net.nets), net.unit, net.training) == (DeepFlash, 1, 1.0, False)
    size = net.spectrum_size
    convolve = F.conv2d if dims == 2 else F.conv3d

    def norm(x, name):
        parts = [state[f"{name}.{part}"].reshape(1, -1, *[1] * dims) for part in ("running_mean", "running_var")]
        gain, shift = (state[f"{name}.{part}"].reshape(1, -1, *[1] * dims) for part in ("weight", "bias"))
        return (x - parts[0]) / (parts[1] + 1e-5).sqrt() * gain + shift

    def through(x, part, steps):
        for place, stride, padding, normed, rectified in steps:
            weight, bias = state[f"{part}.{place}.weight"], state[f"{part}.{place}.bias"]
            x = convolve(x, weight, bias, stride=stride, padding=padding)
            x = norm(x, f"{part}.{place + 1}") if normed else x
            x = x.relu() if rectified else x
        return x

    down = [(0, 2, 2, 1, 1), (3, 2, 1, 1, 1), (7, 1, 2, 1, 1), (10, 2, 2, 1, 1), (14, 2, 2, 1, 1)]
    up = [(0, 1, 2, 1, 0), (2, 1, 2, 1, 1), (6, 1, 2, 1, 1), (9, 1, 1, 1, 1), (12, 1, 1, 0, 0)]

    def part(moving, fixed):
        return through(torch.cat([through(x, "encoder", down) for x in (moving, fixed)], 1), "decoder", up)

    def wanted(moving, fixed):
        axes = tuple(range(2, dims + 2))
        spectra = [torch.fft.fftshift(torch.fft.fftn(image, dim=axes, norm="ortho"), axes) for image in (moving, fixed)]
        padded = []
        for spectrum in spectra:
            wide = torch.zeros(len(moving), 1, *[size] * dims, dtype=torch.complex64)
            first = size // 2 - 8
            wide[(slice(None), slice(None), *[slice(first, first + 16)] * dims)] = spectrum
            padded.append(wide * (size / 16) ** (dims / 2))
        found = torch.complex(part(*(x.real for x in padded)), part(*(x.imag for x in padded)))
        middle = found.shape[2] // 2
        found = found[(slice(None), slice(None), *[slice(middle - 2, middle + 3)] * dims)]
        total = torch.zeros(len(moving), dims, *[5] * dims)
        grid = torch.stack(torch.meshgrid(*[torch.arange(5.0)] * dims, indexing="ij"))
        for k in torch.cartesian_prod(*[torch.arange(-2, 3)] * dims):
            wave = 2 * math.pi * (grid * k.reshape(-1, *[1] * dims)).sum(0) / 5
            value = found[(slice(None), slice(None), *(k + 2).tolist())].reshape(len(moving), dims, *[1] * dims)
            total += value.real * wave.cos() - value.imag * wave.sin()
        return total

    same(net, wanted, dims)


def test_deepflash_that_is_not_the_published_one_is_refused(tmp_path):
    state = forged(deepflash_shapes())
    for name, content in {
        "more.pth": {**state, "decoder.13.weight": torch.zeros(3)},
        "less.pth": {key: value for key, value in state.items() if key != "encoder.4.running_var"},
        "two.pth": {**state, "decoder.9.weight": torch.zeros(8, 32, 3, 3)},
    }.items():
        with pytest.raises(InputError, match=rf"{name} holds weights of another network"):
            load_published(saved({"model_state_dict": content}, tmp_path / name))


# --- lagomorph ---


def lagomorph_file(path, atlas, momenta):
    with h5py.File(path, "w") as file:
        file["atlas"] = atlas
        file["momenta"] = momenta
        file["momenta"].attrs["batch_sizes"] = [2, 2]
        for name in ("epoch_losses", "epoch_reg_terms", "iter_losses", "iter_reg_terms"):
            file[name] = np.zeros(3)
    return path


@pytest.mark.parametrize("dims", [2, 3])
def test_atlas_of_lagomorph_is_read_and_its_momenta_move_the_atlas(tmp_path, dims):
    shape = (12, 14, 10)[:dims]
    rng = np.random.default_rng(0)
    atlas = rng.random((1, 1, *shape), dtype=np.float32)
    momenta = 0.01 * rng.standard_normal((4, dims, *shape)).astype(np.float32)
    image, found = read_lagomorph(lagomorph_file(tmp_path / "atlas.h5", atlas, momenta))
    assert np.array_equal(image, atlas)
    assert np.array_equal(found, momenta)
    model = Momentum(shape, Metric(alpha=0.1, gamma=0.1, power=2, kind="fluid"))
    warped = model.warp(image, found)
    assert warped.shape == (4, 1, *shape)
    assert not torch.allclose(warped, image.expand_as(warped), atol=1e-3)
    # to first order u = -v
    small = 1e-3 * found
    torch.testing.assert_close(model.displacement(small), -model.velocity(small), rtol=1e-2, atol=1e-6)


def test_momenta_on_a_coarser_grid_are_brought_to_the_atlas(tmp_path):
    path = lagomorph_file(tmp_path / "atlas.h5", np.zeros((1, 1, 12, 16)), np.ones((2, 2, 6, 8)))
    atlas, momenta = read_lagomorph(path)
    assert Momentum(atlas.shape[2:]).adopt(momenta).shape == (2, 2, 12, 16)


@pytest.mark.parametrize(
    ("atlas", "momenta", "message"),
    [
        (np.zeros((2, 1, 8, 8)), np.zeros((2, 2, 8, 8)), r"atlas \(2, 1, 8, 8\) and momenta"),
        (np.zeros((1, 1, 8, 8)), np.zeros((2, 3, 8, 8)), r"momenta \(2, 3, 8, 8\)"),
        (np.zeros((8, 8)), np.zeros((2, 2, 8, 8)), "give an atlas of lagomorph"),
        (np.zeros((1, 1, 8, 8)), np.full((2, 2, 8, 8), np.nan), "not finite"),
        (np.zeros((1, 1, 8, 8)), "words", "."),
    ],
)
def test_other_atlases_are_refused(tmp_path, atlas, momenta, message):
    path = tmp_path / "other.h5"
    with h5py.File(path, "w") as file:
        file["atlas"], file["momenta"] = atlas, momenta
    with pytest.raises(InputError, match=message) as caught:
        read_lagomorph(path)
    assert "other.h5" in str(caught.value)


def test_hdf5_files_that_are_missing_cut_or_empty_are_named(tmp_path):
    keras_file(pooled_shapes(*USUAL), tmp_path / "whole.h5")
    content = (tmp_path / "whole.h5").read_bytes()
    (tmp_path / "cut.h5").write_bytes(content[: len(content) // 2])
    (tmp_path / "text.h5").write_text("no weights")
    with h5py.File(tmp_path / "empty.h5", "w"):
        pass
    for read in (load_published, read_lagomorph):
        for name in ("absent.h5", "cut.h5", "text.h5", "empty.h5"):
            with pytest.raises(InputError, match=name) as caught:
                read(tmp_path / name)
            assert "\n" not in str(caught.value)


# --- our own files ---


def network(**arguments):
    torch.manual_seed(0)
    return build_network({**NET, **arguments}).eval()


OTHERS = (
    {"name": "vxm", "dims": 2, "encoder": [4, 4], "decoder": [4, 4], "final": [4]},
    {"name": "vxm", "dims": 2, "encoder": [4, 4], "decoder": [4, 4], "final": [4], "pooling": False, "between": [3]},
    {"name": "deepflash", "dims": 2, "spectrum_size": 32, "num_modes": 5, "two_nets": True},
)


@pytest.mark.parametrize("arguments", [NET, *OTHERS], ids=lambda arguments: arguments["name"])
def test_our_weights_come_back(tmp_path, arguments):
    torch.manual_seed(0)
    net, path = build_network(arguments), tmp_path / "a.safetensors"
    save_network(net, arguments, path, trained="in a test")
    again = load_published(path)
    assert not again.training
    assert again.state_dict().keys() == net.state_dict().keys()
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in net.state_dict().items())
    assert read_network(path)[0] == arguments
    assert read_metadata(path)["trained"] == "in a test"
    assert json.loads(read_metadata(path)["net"]) == arguments


def test_options_override_what_the_file_says(tmp_path):
    save_network(network(), NET, tmp_path / "a.safetensors")
    plain, other = load_published(tmp_path / "a.safetensors"), load_published(tmp_path / "a.safetensors", unit=2.0)
    moving, fixed = images(2)
    torch.testing.assert_close(other(moving, fixed), 2 * plain(moving, fixed))
    with pytest.raises(InputError, match="takes no 'units'"):
        load_published(tmp_path / "a.safetensors", units=2.0)


def test_checkpoint_of_a_training_is_read(tmp_path):
    torch.manual_seed(0)
    loss = {"kind": "energy", "noise_std": 0.03, "similarity": "ssd", "scale": 1e-4, "steps": 3}
    module = RegistrationPrior(NET, {"name": "flash", "num_modes": 7}, loss, {"lr": 1e-3})
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = load_published(tmp_path / "last.ckpt").state_dict()
    assert again.keys() == module.net.state_dict().keys()
    assert all(torch.equal(again[name], value) for name, value in module.net.state_dict().items())
    assert read_network(tmp_path / "last.ckpt")[0] == NET
    tested = load_module(tmp_path / "last.ckpt", {"name": "flash", "num_modes": 5}, loss, num_pictures=1)
    assert (tested.hparams.num_pictures, tested.hparams.deformation["num_modes"]) == (1, 5)
    assert all(torch.equal(value, module.net.state_dict()[name]) for name, value in tested.net.state_dict().items())


@pytest.mark.parametrize("change", ["missing", "unknown", "shape"])
def test_own_file_that_differs_in_one_tensor_is_refused(tmp_path, change):
    state = {name: value.clone() for name, value in network().state_dict().items()}
    if change == "missing":
        del state["flow.bias"]
    else:
        state["flow.bias" if change == "shape" else "flow.gain"] = torch.zeros(9)
    save_file(state, tmp_path / "other.safetensors", {"net": json.dumps(NET)})
    with pytest.raises(InputError, match=r"other\.safetensors holds weights of another network"):
        load_published(tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    "content",
    [
        {}, {"conv.weight": torch.zeros(3, 3)}, {0: torch.zeros(2)}, {"model_state": None}, {"model_state": {}},
        {"model_state_dict": {"conv.weight": torch.zeros(2)}}, {"model_state_dict": [1]},
        {"state_dict": {"net.conv.weight": torch.zeros(2)}, "hyper_parameters": {"net": {"name": "unet"}}},
        {"state_dict": None, "hyper_parameters": None}, {"flow.weight": torch.zeros(())},
        {"flow.weight": torch.zeros(3, 2, 3, 3, 3), "unet_model.encoder.0.0.main.weight": torch.zeros(())},
        {"config": {}, "model_state": {**forged(pooled_shapes(*SMALL)), "flow.bias": 3}},
    ],
    ids=range(12),
)  # fmt: skip
def test_files_that_hold_no_network_are_refused(tmp_path, content):
    with pytest.raises(InputError, match=r"stranger\.pth holds no registration network"):
        load_published(saved(content, tmp_path / "stranger.pth"))


@pytest.mark.parametrize("about", [None, {"net": "{"}, {"net": "[1]"}, {"net": '{"width": 3}'}, {"net": "{}"}])
def test_safetensors_that_do_not_say_what_they_are_are_refused(tmp_path, about):
    save_file({"conv.weight": torch.zeros(2)}, tmp_path / "other.safetensors", about)
    with pytest.raises(InputError, match=r"other\.safetensors holds no registration network"):
        load_published(tmp_path / "other.safetensors")


class Code:
    """What a file that runs code when it is read would hold."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("save", ["torch", "pickle", "config"])
def test_no_code_of_a_file_is_run(tmp_path, save):
    trace, path = tmp_path / "trace", tmp_path / "evil.pt"
    state = forged(pooled_shapes(*SMALL))
    if save == "pickle":
        path.write_bytes(pickle.dumps(Code(trace), protocol=2))
    elif save == "torch":
        torch.save({"model_state": {**state, "extra": Code(trace)}}, path)
    else:
        voxelmorph_file(state, path, inshape=Code(trace))
    with pytest.raises(InputError, match=r"evil\.pt"):
        load_published(path)
    assert not trace.exists()


def test_missing_and_damaged_files_are_named(tmp_path):
    (tmp_path / "cut.ckpt").write_bytes(b"PK\x03\x04 cut")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10")
    for name in ("absent.pth", "absent.safetensors", "cut.ckpt", "cut.safetensors"):
        with pytest.raises(InputError, match=name):
            load_published(tmp_path / name)
