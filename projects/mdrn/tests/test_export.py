"""Shipping weights, and the folded network for other programs."""

import json

import numpy as np
import pytest
import torch

from projects.mdrn import export
from projects.mdrn.baselines import DnCNN
from projects.mdrn.checkpoints import read_network, save_network
from projects.mdrn.fold import fold
from projects.mdrn.inference import load_denoiser, trained_levels
from projects.mdrn.model import MDRN
from shared.errors import InputError

SIZES = ((2, 8, 8), (1, 24, 40), (3, 36, 16))  # batch, height, width


def network(**options):
    torch.manual_seed(0)
    settings = {"width": 4, "num_blocks": 1, "window": 9, "init_scale": 1.0, "tail_init_scale": 1.0}
    return MDRN(**settings | options).eval()


@pytest.fixture
def finished(tmp_path):
    """A run folder as training leaves it: finished(channels, width, num_blocks)."""

    def make(channels=1, width=16, num_blocks=2):
        arguments = {"name": "mdrn", "in_channels": channels, "width": width, "num_blocks": num_blocks}
        arguments |= {"attention": "none", "noise_map": True}
        torch.manual_seed(0)
        net = MDRN(**{key: value for key, value in arguments.items() if key != "name"})
        path = tmp_path / f"run{channels}{width}"
        (path / "checkpoints").mkdir(parents=True)
        state = {f"net.{key}": value for key, value in net.state_dict().items()}
        hyper = {"net": arguments, "noise": {"kind": "gaussian", "level": [0, 70]}}
        torch.save({"state_dict": state, "hyper_parameters": hyper}, path / "checkpoints" / "best.ckpt")
        scores = {
            "test/photographs_25/psnr": 30.126,
            "test/photographs_25/ssim": 0.9,
            "test/photographs/psnr_fall": 3.0,
        }
        record = {"metrics": scores, "baseline": {"test/photographs_25/psnr": 20.17}, "seed": 0, "seconds": 600.0}
        (path / "metrics.json").write_text(json.dumps(record | {"config_hash": "abc", "device": "a CPU"}))
        return path, net

    return make


def test_run_becomes_weights_and_a_row(finished, tmp_path):
    gray, net = finished()
    made = export.export(gray, folder=tmp_path)
    assert made == tmp_path / "weights" / "mdrn_tiny_gray.safetensors"
    assert export.export(finished(3, 32, 3)[0], folder=tmp_path).name == "mdrn_small_color.safetensors"
    assert trained_levels(made) == (0, 70)
    assert torch.equal(load_denoiser(made, folded=False)[0].head.weight, net.head.weight)
    table = json.loads((tmp_path / "results" / "weights.json").read_text())
    assert table["columns"] == ["file", "parameters", "trained on σ", "σ 25", "minutes", "device"]
    assert [row[0] for row in table["rows"]] == ["mdrn_small_color.safetensors", "mdrn_tiny_gray.safetensors"]
    count = f"{sum(p.numel() for p in net.parameters()):,}"
    assert table["rows"][1][1:] == [count, "0–70", "30.13 (20.17)", "10", "a CPU"]


def test_name_is_asked_for_where_it_cannot_be_made(finished, tmp_path):
    run, _ = finished(1, 8, 1)
    with pytest.raises(InputError, match="--name"):
        export.export(run, folder=tmp_path)
    assert export.export(run, "mine", tmp_path).name == "mine.safetensors"
    with pytest.raises(InputError, match="no finished run"):
        export.export(tmp_path / "absent", folder=tmp_path)


OPTIONS = [
    {"attention": "none", "noise_map": True},
    {"attention": "ca", "in_channels": 3, "levels": 1, "upsample": "transposed", "downsample": "haar"},
    {"attention": "local_ca", "noise_map": True, "levels": 0, "fusion": "last"},
]


def inputs(net, batch, height, width):
    noisy = torch.rand(batch, net.in_channels, height, width)
    return (noisy, torch.linspace(0.02, 0.2, batch)) if net.noise_map else (noisy,)


@pytest.mark.slow
@pytest.mark.parametrize("options", [OPTIONS[0], *(pytest.param(o, marks=pytest.mark.slow) for o in OPTIONS[1:])])
def test_program_takes_any_size_and_gives_the_same(tmp_path, options):
    net = network(**options)
    path = export.write_program(fold(net), tmp_path / "net.pt2")
    program = torch.export.load(path).module()
    for size in SIZES:
        given = inputs(net, *size)
        with torch.no_grad():
            assert (program(*given) - net(*given)).abs().max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS)
def test_onnx_takes_any_size_and_gives_the_same(tmp_path, options):
    onnxruntime = pytest.importorskip("onnxruntime", reason="the extra `benchmark` is not installed")
    net = network(**options)
    path = export.write_onnx(fold(net), tmp_path / "net.onnx")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [i.name for i in session.get_inputs()] == ["noisy", "noise_std"][: 1 + net.noise_map]
    for size in SIZES:
        given = inputs(net, *size)
        with torch.no_grad():
            expected = net(*given).numpy()
        names = [i.name for i in session.get_inputs()]
        (made,) = session.run(["denoised"], {k: v.numpy() for k, v in zip(names, given, strict=True)})
        assert np.abs(made - expected).max() < 1e-5


def test_command_line(command_line, tmp_path):
    arguments = {"name": "mdrn", "width": 4, "num_blocks": 1}
    save_network(network(), arguments, tmp_path / "ours.safetensors")
    torch.save(DnCNN(1, 3, 4).state_dict(), tmp_path / "dncnn.pth")
    assert read_network(tmp_path / "ours.safetensors")[0] == arguments
    for given, message in (
        ([], "say what to export"),
        (["--ckpt", f"{tmp_path}/ours.safetensors"], "say what to export"),
        (["--run", f"{tmp_path}/absent"], "no finished run"),
        (["--ckpt", f"{tmp_path}/dncnn.pth", "--program", f"{tmp_path}/a.pt2"], "holds a DnCNN"),
        (["--ckpt", f"{tmp_path}/ours.safetensors", "--program", f"{tmp_path}/a.zip"], "end the name"),
        (["--ckpt", f"{tmp_path}/ours.safetensors", "--onnx", f"{tmp_path}/a.pt2"], "end the name"),
    ):
        code, _, error = command_line("export", *given)
        assert (code, error.count("\n")) == (2, 1), error
        assert message in error
    code, out, error = command_line(
        "export", "--ckpt", f"{tmp_path}/ours.safetensors", "--program", f"{tmp_path}/a.pt2"
    )
    assert code == 0, error
    assert "a.pt2" in out
    assert (tmp_path / "a.pt2").is_file()
