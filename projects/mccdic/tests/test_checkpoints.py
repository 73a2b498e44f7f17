"""Files of the authors' code, forged key by key in their format, and our own, in and out."""

import json
import math
import pickle
import warnings
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
from safetensors.torch import save_file

from projects.mccdic.checkpoints import (
    USUAL_STEP,
    is_unpublished,
    load_published,
    published_name,
    read_network,
    save_network,
)
from projects.mccdic.dictionary import largest_eigenvalue
from projects.mccdic.model import MCCDic
from projects.mccdic.module import MultiContrastRestoration, load_module
from projects.mccdic.networks import build_network
from shared.errors import InputError
from shared.io.checkpoints import read_metadata

BASE = ([128, 96, 64], 64, 5, (1, 3, 5))
SMALL = ([20, 18, 16], 8, 4, (1, 1, 2))
NET = {"name": "mccdic", "widths": [8, 6, 4], "features": 5, "stages": 3, "blocks": [1, 2, 1]}


@pytest.fixture(autouse=True)
def steps_that_begin_anywhere(monkeypatch):
    """Most of the time of a small network goes into the eigenvalues that it begins with, which do not matter here."""
    monkeypatch.setattr("projects.mccdic.model.largest_eigenvalue", lambda *_, **__: 4.0)


def dictionary_shapes(name, widths, out):
    w = widths
    shapes = {f"{name}.bottleneck_conv.weight": (w[0], w[0], 3, 3), f"{name}.syn_outc.conv.weight": (out, w[2], 1, 1)}
    for level in (0, 1):
        shapes[f"{name}.syn_up_list.{level}.up.weight"] = (w[level], w[level + 1], 2, 2)
        shapes[f"{name}.syn_up_list.{level}.conv.weight"] = (w[level + 1], 2 * w[level + 1], 3, 3)
    return shapes


def conv_shapes(name, inputs, outputs, kernel):
    return {f"{name}.weight": (outputs, inputs, kernel, kernel), f"{name}.bias": (outputs,)}


def published_shapes(widths, features, stages, blocks):
    """Name and shape of every tensor that the authors' code saves."""
    shapes = {}
    for kind in ("encoder", "precond_encoder", "decoder"):
        for code in "xyz":
            out = 2 if (kind, code) == ("decoder", "z") else features
            shapes |= dictionary_shapes(f"{kind}_dictionary_{code}", widths, out)
    for code in ("zx", "zy"):
        shapes |= dictionary_shapes(f"encoder_dictionary_{code}", widths, features)
    for code in "xyz":
        adjoint = f"adjoint_encoder_dictionary_{code}"
        shapes[f"{adjoint}.adjoint_syn_outc.adjoint_conv.weight"] = (features, widths[2], 1, 1)
        shapes[f"{adjoint}.adjoint_syn_bottleneck_conv.transpose_conv.weight"] = (widths[0], widths[0], 3, 3)
        for scale, (width, count) in enumerate(zip(widths, blocks, strict=True)):
            group = f"resnet_{code}.{scale}.body"
            for block in range(count):
                shapes |= conv_shapes(f"{group}.{block}.body.0", width, width, 3)
                shapes |= conv_shapes(f"{group}.{block}.body.2", width, width, 3)
                shapes |= conv_shapes(f"{group}.{block}.body.3.conv_du.0", width, width // 16, 1)
                shapes |= conv_shapes(f"{group}.{block}.body.3.conv_du.2", width // 16, width, 1)
            shapes |= conv_shapes(f"{group}.{count}", width, width, 3)
        shapes |= conv_shapes(f"layer_in_{code}", 2 if code == "z" else 1, features, 3)
    shapes |= conv_shapes("cpmpress_z", 2 * features, features, 3)
    for code in "xy":
        shapes |= conv_shapes(f"HFF_fuse_{code}", features * (stages - 1), features, 1)
        shapes |= conv_shapes(f"rec_{code}_unique", features, 1, 3)
    shapes = {f"predict_ista.{name}": shape for name, shape in shapes.items()}
    return shapes | {
        "decoder.conv_1.weight": (features, 2 * features, 3, 3), "decoder.conv_2.weight": (1, features, 3, 3),
    }  # fmt: skip


def forged(size=SMALL):
    """A state dict as the authors' code would save it, with small random values."""
    generator = torch.Generator().manual_seed(0)
    state = {
        name: 0.05 * torch.randn(shape, generator=generator) for name, shape in published_shapes(*size).items()
    }  # fmt: skip
    for code in "xyz":
        adjoint = f"predict_ista.adjoint_encoder_dictionary_{code}."
        dictionary = f"predict_ista.precond_encoder_dictionary_{code}."
        state[f"{adjoint}adjoint_syn_outc.adjoint_conv.weight"] = state[f"{dictionary}syn_outc.conv.weight"]
        bottleneck = state[f"{dictionary}bottleneck_conv.weight"]
        state[f"{adjoint}adjoint_syn_bottleneck_conv.transpose_conv.weight"] = bottleneck
    return state


def saved(state, path):
    torch.save(state, path)
    return path


def images(size=16):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(1, 1, size, size, generator=generator), torch.rand(1, 1, size, size, generator=generator)


# --- the authors' format ---


def test_published_file_has_the_entries_and_elements_that_were_counted():
    shapes = published_shapes(*BASE)
    assert len(shapes) == 324
    assert sum(map(math.prod, shapes.values())) == 10_066_444
    assert shapes["predict_ista.HFF_fuse_x.weight"] == (64, 256, 1, 1)
    assert shapes["predict_ista.resnet_x.1.body.2.body.3.conv_du.0.weight"] == (6, 96, 1, 1)


def test_every_tensor_of_the_network_has_its_place_in_a_published_file_and_none_is_left():
    with torch.device("meta"):
        net = MCCDic(*BASE[:3], list(BASE[3]), steps="constant")
    ours = {published_name(name): tuple(t.shape) for name, t in net.state_dict().items() if not is_unpublished(name)}
    unpublished = [name for name in net.state_dict() if is_unpublished(name)]
    assert len(unpublished) == 3 * (1 + 3)
    published = published_shapes(*BASE)
    extra = {name for name in published if name not in ours}
    assert len(extra) == 6 + 2
    assert all(name.startswith(("predict_ista.adjoint_encoder_dictionary_", "decoder.conv_")) for name in extra)
    assert ours == {name: shape for name, shape in published.items() if name not in extra}
    assert sum(map(math.prod, ours.values())) == 9_537_484


@pytest.mark.slow
def test_published_size_loads_strictly(tmp_path):
    state = forged(BASE)
    net = load_published(saved(state, tmp_path / "Iter_200000.pth"), step_size=0.235)
    assert sum(p.numel() for name, p in net.named_parameters() if "thresholds" not in name) == 9_537_484
    assert torch.equal(net.unique[1].prox[2][4].second.weight, state["predict_ista.resnet_y.2.body.4.body.2.weight"])
    with torch.no_grad():
        assert net(*images()).target.isfinite().all()


def test_every_tensor_of_a_published_file_arrives_under_our_name(tmp_path):
    state = forged()
    net = load_published(saved(state, tmp_path / "Iter_1000.pth"), step_size=0.2)
    assert not net.training
    assert (net.stages, net.scales, net.num_references) == (4, 3, 1)
    assert [len(prox) - 1 for prox in net.unique[0].prox] == [1, 1, 2]
    assert not net.unique[0].prox[0].skip
    # key by key, from the roles in the published network
    roles = {
        "encoder_dictionary_x": net.unique[0].synthesis, "encoder_dictionary_y": net.unique[1].synthesis,
        "encoder_dictionary_z": net.common.synthesis, "precond_encoder_dictionary_x": net.unique[0].preconditioned,
        "precond_encoder_dictionary_y": net.unique[1].preconditioned,
        "precond_encoder_dictionary_z": net.common.preconditioned, "decoder_dictionary_x": net.reconstruction[0],
        "decoder_dictionary_y": net.reconstruction[1], "decoder_dictionary_z": net.render_common,
        "encoder_dictionary_zx": net.explained[0], "encoder_dictionary_zy": net.explained[1],
    }  # fmt: skip
    for name, made in roles.items():
        tensors = {
            "bottleneck_conv": made.bottleneck, "syn_up_list.0.up": made.up[0], "syn_up_list.0.conv": made.mix[0],
            "syn_up_list.1.up": made.up[1], "syn_up_list.1.conv": made.mix[1], "syn_outc.conv": made.out,
        }  # fmt: skip
        for key, tensor in tensors.items():
            assert torch.equal(tensor, state[f"predict_ista.{name}.{key}.weight"]), (name, key)
    layers = {
        "layer_in_x": net.lift[0], "layer_in_y": net.lift[1], "layer_in_z": net.lift_common,
        "cpmpress_z": net.compress, "HFF_fuse_x": net.fuse[0], "HFF_fuse_y": net.fuse[1],
        "rec_x_unique": net.render[0], "rec_y_unique": net.render[1],
    }  # fmt: skip
    for code, coder in zip("xyz", (*net.unique, net.common), strict=True):
        for scale, prox in enumerate(coder.prox):
            *blocks, last = prox
            group = f"resnet_{code}.{scale}.body"
            layers[f"{group}.{len(blocks)}"] = last
            for i, block in enumerate(blocks):
                layers |= {
                    f"{group}.{i}.body.0": block.first, f"{group}.{i}.body.2": block.second,
                    f"{group}.{i}.body.3.conv_du.0": block.attention.squeeze,
                    f"{group}.{i}.body.3.conv_du.2": block.attention.excite,
                }  # fmt: skip
    for name, layer in layers.items():
        assert torch.equal(layer.weight, state[f"predict_ista.{name}.weight"]), name
        assert torch.equal(layer.bias, state[f"predict_ista.{name}.bias"]), name
    # 8 are aliases or never called
    assert 6 * len(roles) + 2 * len(layers) + 8 == len(state)


@pytest.mark.parametrize("stages", [2, 6])
def test_number_of_stages_is_read_off_the_file(tmp_path, stages):
    size = (*SMALL[:2], stages, SMALL[3])
    net = load_published(saved(forged(size), tmp_path / "a.pth"), step_size=0.2)
    assert net.stages == stages
    assert net.unique[0].steps.tolist() == pytest.approx([0.2] * stages)


def test_prefix_of_parallel_training_and_missing_repetitions_are_understood(tmp_path):
    state = forged()
    expected = load_published(saved(state, tmp_path / "a.pth"), step_size=0.2)(*images()).target
    variants = {
        "parallel.pth": {f"module.{name}": value for name, value in state.items()},
        "bare.pth": {n: v for n, v in state.items() if "adjoint" not in n and not n.startswith("decoder.")},
    }
    for name, variant in variants.items():
        found = load_published(saved(variant, tmp_path / name), step_size=0.2)(*images()).target
        assert torch.equal(found, expected)
    save_file({name: value.clone() for name, value in state.items()}, tmp_path / "converted.safetensors")
    found = load_published(tmp_path / "converted.safetensors", step_size=0.2)(*images()).target
    assert torch.equal(found, expected)


def test_step_size_is_given_recomputed_or_the_usual_one_with_a_warning(tmp_path):
    path = saved(forged(), tmp_path / "a.pth")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        given = load_published(path, step_size=0.3)
        recomputed = load_published(path, step_size="recomputed")
    with pytest.warns(UserWarning, match=r"a\.pth holds no step sizes; 0\.235 is taken"):
        usual = load_published(path)
    assert USUAL_STEP == 0.235
    for net, step in ((given, 0.3), (usual, 0.235)):
        for coder in (*net.unique, net.common):
            assert coder.steps.tolist() == pytest.approx([step] * 4)
            assert not coder.thresholds.state_dict() or all((t == 0.01).all() for t in coder.thresholds)
    for coder in (*recomputed.unique, recomputed.common):
        assert coder.steps.tolist() == pytest.approx([1 / largest_eigenvalue(coder.synthesis)] * 4)
    assert not torch.allclose(given(*images()).target, recomputed(*images()).target)
    with pytest.raises(InputError, match="step_size='guess' is neither a number nor 'recomputed'"):
        load_published(path, step_size="guess")


def test_options_override_what_the_file_says(tmp_path):
    path = saved(forged(), tmp_path / "a.pth")
    plain, other = load_published(path, step_size=0.2), load_published(path, step_size=0.2, skip=True)
    assert not torch.equal(plain(*images()).target, other(*images()).target)
    with pytest.raises(InputError, match=r"a\.pth holds weights of another network"):
        load_published(path, step_size=0.2, num_references=2)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("cpmpress_z.weight", "missing", "lacks 'predict_ista.cpmpress_z.weight'"),
        ("resnet_z.2.body.1.body.3.conv_du.2.bias", "missing", r"lacks 'predict_ista.resnet_z.2.body.1.body.3.conv_du"),
        ("layer_in_x.weight", "missing", "holds no MC-CDic"),
        ("precond_encoder_dictionary_y.syn_outc.conv.weight", "missing", "holds no MC-CDic"),
        ("rec_x_unique.weight", "shape", r"'render.0.weight' is of shape"),
        ("encoder_dictionary_zy.syn_up_list.1.up.weight", "shape", r"'explained.1.up.1' is of shape"),
        ("dc.weight", "unknown", "unknown key 'predict_ista.dc.weight'"),
        ("adjoint_encoder_dictionary_x.adjoint_syn_outc.adjoint_conv.weight", "value", "differs from the tensor that"),
        ("adjoint_encoder_dictionary_z.adjoint_syn_bottleneck_conv.transpose_conv.weight", "value", "differs from"),
    ],
)
def test_file_that_differs_in_one_tensor_is_refused(tmp_path, name, change, message):
    state, key = forged(), f"predict_ista.{name}"
    if change == "missing":
        del state[key]
    elif change == "shape":
        state[key] = torch.zeros(*state[key].shape, 1)
    else:
        state[key] = torch.zeros(3) if change == "unknown" else state[key] + 1
    with pytest.raises(InputError, match=message) as caught:
        load_published(saved(state, tmp_path / "other.pth"), step_size=0.2)
    assert "other.pth" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_dictionary_of_another_shape_has_no_step_size(tmp_path):
    state = forged()
    state["predict_ista.encoder_dictionary_y.bottleneck_conv.weight"] = torch.zeros(3, 3)
    with pytest.raises(InputError, match=r"other\.pth holds weights of another network: 'bottleneck' is of shape"):
        load_published(saved(state, tmp_path / "other.pth"), step_size="recomputed")


def test_head_that_is_never_called_must_be_the_published_one(tmp_path):
    state = forged()
    state["decoder.conv_1.weight"] = torch.zeros(3, 3)
    with pytest.raises(InputError, match="holds no MC-CDic"):
        load_published(saved(state, tmp_path / "other.pth"), step_size=0.2)


# --- our own files ---


def network(**arguments):
    torch.manual_seed(0)
    return build_network({**NET, **arguments}).eval()


@pytest.mark.parametrize(
    "arguments",
    [
        {}, {"tie": True}, {"steps": "constant", "prox": "soft"}, {"common": False, "consistency": "soft"},
        {"widths": [6], "blocks": [1]},
    ],
)  # fmt: skip
def test_our_weights_come_back(tmp_path, arguments):
    net, path = network(**arguments), tmp_path / "a.safetensors"
    save_network(net, {**NET, **arguments}, path, trained="in a test")
    again = load_published(path)
    assert not again.training
    assert again.state_dict().keys() == net.state_dict().keys()
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in net.state_dict().items())
    save_network(net.to(memory_format=torch.channels_last), {**NET, **arguments}, path, trained="in a test")
    found, state = read_network(path)
    assert found == {**NET, **arguments}
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    about = read_metadata(path)
    assert about["trained"] == "in a test"
    assert json.loads(about["net"]) == {**NET, **arguments}


@pytest.mark.parametrize("other", [{"name": "cunet"}, {"name": "plain", "width": 4, "blocks": 1, "num_references": 2}])
def test_weights_of_the_other_networks_come_back(tmp_path, other):
    torch.manual_seed(0)
    net = build_network(other)
    save_network(net, other, tmp_path / "a.safetensors")
    again = load_published(tmp_path / "a.safetensors")
    assert type(again) is type(net)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("arguments", [{}, {"tie": True}, {"steps": "constant"}])
def test_checkpoint_of_a_training_is_read(tmp_path, arguments):
    torch.manual_seed(0)
    net = {**NET, **arguments}
    loss = {"kind": "l1", "reference_weight": 0.1}
    module = MultiContrastRestoration(net, loss, {"lr": 1e-3}, {"lr_min": 1e-4})
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = load_published(tmp_path / "last.ckpt").state_dict()
    assert again.keys() == module.net.state_dict().keys()
    assert all(torch.equal(again[name], value) for name, value in module.net.state_dict().items())
    assert read_network(tmp_path / "last.ckpt")[0] == net
    tested = load_module(tmp_path / "last.ckpt", guided=False, num_pictures=1)
    assert (tested.hparams.guided, tested.hparams.num_pictures) == (False, 1)
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in tested.state_dict().items())


def test_published_file_is_tested_by_the_module(tmp_path):
    path = saved(forged(), tmp_path / "Iter_1000.pth")
    module = load_module(path, step_size=0.3)
    net = load_published(path, step_size=0.3)
    with torch.no_grad():
        torch.testing.assert_close(module(*images()).target, net(*images()).target, rtol=1e-5, atol=1e-6)
    assert module.net.common.steps.tolist() == pytest.approx([0.3] * 4)


@pytest.mark.parametrize("change", ["missing", "unknown", "shape"])
def test_own_file_that_differs_in_one_tensor_is_refused(tmp_path, change):
    state = {name: value.clone() for name, value in network().state_dict().items()}
    if change == "missing":
        del state["compress.bias"]
    else:
        state["compress.bias" if change == "shape" else "compress.gain"] = torch.zeros(9)
    save_file(state, tmp_path / "other.safetensors", {"net": json.dumps(NET)})
    with pytest.raises(InputError, match=r"other\.safetensors holds weights of another network"):
        load_published(tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    "content",
    [
        {}, {"conv.weight": torch.zeros(3, 3)}, {0: torch.zeros(2)},
        {"state_dict": {"net.conv.weight": torch.zeros(2)}, "hyper_parameters": {"net": {"name": "unet"}}},
        {"state_dict": {0: torch.zeros(2)}, "hyper_parameters": {"scale": 2}},
        {"state_dict": None, "hyper_parameters": None},
        {"predict_ista.layer_in_x.weight": torch.zeros(())},
        {"predict_ista.layer_in_x.weight": torch.zeros(0, 1, 3, 3), "predict_ista.HFF_fuse_x.weight": torch.zeros(0)},
    ],
    ids=["empty", "weights", "numbered", "another project's", "no network", "nothing", "a number", "no channels"],
)  # fmt: skip
def test_files_that_hold_no_network_are_refused(tmp_path, content):
    with pytest.raises(InputError, match=r"stranger\.pth holds no MC-CDic"):
        load_published(saved(content, tmp_path / "stranger.pth"))


@pytest.mark.parametrize("about", [None, {"net": "{"}, {"net": "[1]"}, {"net": '{"width": 3}'}, {"net": "{}"}])
def test_safetensors_that_do_not_say_what_they_are_are_refused(tmp_path, about):
    save_file({"conv.weight": torch.zeros(2)}, tmp_path / "other.safetensors", about)
    with pytest.raises(InputError, match=r"other\.safetensors holds no MC-CDic"):
        load_published(tmp_path / "other.safetensors")


class Code:
    """What a file that runs code when it is read would hold."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("save", ["torch", "pickle"])
def test_no_code_of_a_file_is_run(tmp_path, save):
    trace, path = tmp_path / "trace", tmp_path / "evil.pth"
    state = {**forged(), "extra": Code(trace)}
    if save == "torch":
        torch.save(state, path)
    else:
        path.write_bytes(pickle.dumps(state["extra"], protocol=2))
    with pytest.raises(InputError, match=r"evil\.pth"):
        load_published(path, step_size=0.2)
    assert not trace.exists()


def test_missing_and_damaged_files_are_named(tmp_path):
    (tmp_path / "cut.ckpt").write_bytes(b"PK\x03\x04 cut")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10")
    for name in ("absent.pth", "absent.safetensors", "cut.ckpt", "cut.safetensors"):
        with pytest.raises(InputError, match=name):
            load_published(tmp_path / name)
