"""The published file, forged key by key, and our own files."""

import pytest
import torch

from projects.fgdcn.checkpoints import (
    dead_shapes,
    load_published,
    published_name,
    read_network,
    save_network,
)
from projects.fgdcn.model import FGDCN
from shared.errors import InputError

C, N, G = 4, 8, 2
BLOCKS = (8, 6, 10)


def conv(name, o, i, k=3):
    return {f"{name}.weight": (o, i, k, k), f"{name}.bias": (o,)}


def published_shapes(blocks=BLOCKS, c=C, n=N, g=G):
    """Keys and shapes as the published training writes them, for any widths."""
    shapes = {}
    for i, (width, channels_in) in enumerate(zip(blocks, (6, 10, 10), strict=True)):
        block = f"flow_net.block{i}"
        for j, (o, inner) in enumerate(((width // 2, channels_in), (width, width // 2))):
            shapes |= conv(f"{block}.conv0.{j}.0", o, inner) | {f"{block}.conv0.{j}.1.weight": (o,)}
        for j in range(8):
            shapes |= conv(f"{block}.convblock.{j}.0", width, width) | {f"{block}.convblock.{j}.1.weight": (width,)}
        shapes |= {f"{block}.conv1.weight": (width, 4, 4, 4), f"{block}.conv1.bias": (4,)}
    for level, (i, o) in enumerate(((3, c), (c, 2 * c), (2 * c, 4 * c)), 1):
        for j, inner in ((1, i), (2, o)):
            name = f"flow_net.refine.conv{level}.conv{j}"
            shapes |= conv(f"{name}.0", o, inner) | {f"{name}.1.weight": (o,)}
        rf = f"flow_net.refine.rf_block{level}"
        for name, layers in {
            "occl_convs": ((0, o, 2 * o, 1), (2, o, o, 1), (4, 1, o, 1)),
            "occl_convs_new": ((0, o, 2 * o, 3), (2, o, o, 3), (4, 1, o, 3)),
            "corr_convs": ((0, o, 9, 1), (2, o, o, 1)),
            "flow_convs": ((0, o, 2, 3), (2, o, o, 3)),
            "motion_convs": ((0, o, 2 * o, 3),),
            "gru": ((0, o, 3 * o + 2, 3), (2, o, o, 3)),
            "flow_head": ((0, o, o, 3), (2, 2, o, 3)),
        }.items():
            for layer, out, inner, k in layers:
                shapes |= conv(f"{rf}.{name}.{layer}", out, inner, k)
                if out == o:
                    shapes[f"{rf}.{name}.{layer + 1}.weight"] = (o,)
    for level, width in ((3, 4 * c), (2, 2 * c), (1, c)):
        names = {3: ("1_1", "2_1", "3_1"), 2: ("1_1", "1_2", "2_1", "3_1"), 1: ("1_1", "1_2", "2_1", "3_1")}[level]
        for name in names:
            inner = 2 * width if name == "1_1" else 2 * n if name == "2_1" and level < 3 else n
            shapes |= conv(f"pcd_align.L{level}_offset_conv{name}", n, inner)
        shapes |= conv(f"pcd_align.L{level}_dcnpack_1", width, width)
        shapes |= conv(f"pcd_align.L{level}_dcnpack_1.conv_offset_mask", 27 * g, n)
    rows = (2 * c, 4 * c, 8 * c)
    paths = [(f"lateral.{r}.{k}", w, w) for r, w in enumerate(rows) for k in range(6 if r == 0 else 5)]
    paths += [(f"down.{r}.{k}", rows[r], rows[r + 1]) for r in (0, 1) for k in range(3)]
    paths += [(f"up.{r}.{k}", rows[r + 1], rows[r]) for r in (0, 1) for k in range(3)]
    for name, i, o in paths:
        name = f"flow_fea_fusin.{name}.layers"
        shapes |= conv(f"{name}.1", o, i) | conv(f"{name}.3", o, o) | {f"{name}.{j}.weight": (1,) for j in (0, 2)}
    for r, width in enumerate(rows):
        head = "flow_fea_fusin.to_RGB" + ("" if r == 0 else f"_L{r}")
        shapes |= conv(f"flow_fea_fusin.compress.{r}", width, width)
        shapes |= conv(f"{head}.1", 3, width) | {f"{head}.0.weight": (1,)}
    return shapes


def forged(**widths):
    generator = torch.Generator().manual_seed(0)
    return {key: torch.randn(shape, generator=generator) for key, shape in published_shapes(**widths).items()}


def test_forged_file_has_the_published_size():
    shapes = published_shapes((180, 120, 90), 24, 64, 8)
    assert len(shapes) == 457
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 14_362_942


def test_every_tensor_of_ours_has_one_published_name_and_shape():
    with torch.device("meta"):
        net = FGDCN((180, 120, 90), 24, 64, 8, pyramid_heads=True, initialisation="torch")
    shapes = published_shapes((180, 120, 90), 24, 64, 8)
    ours = {published_name(name): tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    assert len(ours) == 433
    assert ours | dead_shapes(24) == shapes


@pytest.mark.parametrize("prefix", ["", "module."])
def test_published_file_loads_strictly_in_its_own_mask_form(tmp_path, prefix):
    state = forged()
    torch.save({prefix + key: value for key, value in state.items()}, tmp_path / "Iter_final.pth")
    net = load_published(tmp_path / "Iter_final.pth")
    assert not net.training
    assert net.mask_mode == "sum"
    assert torch.equal(net.flow_net.blocks[2].body[7][1].weight, state["flow_net.block2.convblock.7.1.weight"])
    assert torch.equal(net.refine[2].update[1][0].bias, state["flow_net.refine.rf_block3.gru.2.bias"])
    assert torch.equal(net.compensation.convs["2"].weight, state["pcd_align.L2_dcnpack_1.weight"])
    assert torch.equal(net.fusion.up[1][2][3].weight, state["flow_fea_fusin.up.1.2.layers.3.weight"])
    assert torch.equal(net.fusion.heads[2][1].bias, state["flow_fea_fusin.to_RGB_L2.1.bias"])
    output = net(torch.rand(1, 2, 3, 32, 32))
    assert len(output.pyramid) == 2
    assert load_published(tmp_path / "Iter_final.pth", pyramid_heads=False)(torch.rand(1, 2, 3, 32, 32)).pyramid == ()


@pytest.mark.parametrize("change", ["missing", "unknown", "shape", "dead"])
def test_file_that_differs_in_one_tensor_is_refused(tmp_path, change):
    state = forged()
    if change == "missing":
        del state["flow_fea_fusin.up.1.2.layers.3.weight"]
    elif change == "unknown":
        state["flow_fea_fusin.up.1.3.layers.3.weight"] = torch.zeros(1)
    elif change == "shape":
        state["pcd_align.L1_dcnpack_1.bias"] = torch.zeros(C + 1)
    else:
        del state["flow_net.refine.rf_block2.occl_convs.2.weight"]
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(InputError, match=r"other\.pth"):
        load_published(tmp_path / "other.pth")


def test_another_networks_file_is_refused(tmp_path):
    torch.save({"conv.weight": torch.zeros(3, 3)}, tmp_path / "vgg.pth")
    with pytest.raises(InputError, match="holds no FGDCN"):
        load_published(tmp_path / "vgg.pth")


def test_our_weights_say_what_they_are(tmp_path):
    arguments = {"block_channels": [8, 6, 10], "channels": 4, "offset_channels": 8, "num_groups": 2, "levels": [1, 3]}
    net = FGDCN(**arguments)
    save_network(net, arguments, tmp_path / "a.safetensors", trained="in a test")
    again = load_published(tmp_path / "a.safetensors")
    frames = torch.rand(1, 2, 3, 32, 32)
    assert torch.equal(net(frames).frame, again(frames).frame)
    assert read_network(tmp_path / "a.safetensors")[0] == arguments
