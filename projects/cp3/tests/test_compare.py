"""What a pruning run leaves beside its checkpoints, and what stands beside it."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from projects.cp3 import compare
from projects.cp3.compare import with_criterion
from projects.cp3.groups import Group
from projects.cp3.module import PointNetwork
from projects.cp3.pruner import Pruned
from projects.cp3.scoring import Scores
from shared import recorded
from shared.experiment import config_hash
from shared.testing.project import assert_equal_weights

PREFIX = "test/procshape/"
SCORES = {"oa", "macc", "params_m", "gmacs", "gflops"}
FLOPS = ["model.prune.flops_cut=null", "model.prune.rate=0.4"]


def named(*names):
    return {f"{PREFIX}{name}" for name in names}


def plan_of(path):
    content = json.loads((path / "plan.json").read_text())
    return {name: group["kept"] for name, group in content["groups"].items()}


# --- Files ------------------------------------------------------------------------------------------------------------


def test_pruning_run_leaves_its_numbers_beside_those_of_others(pruned_run, dense_run):
    record, path = pruned_run
    own = named(*SCORES, "latency_ms", "relative_latency", "flops_cut")
    assert record["metrics"].keys() == own
    assert record["baseline"].keys() == record["peers"]["base"].keys() == named(*SCORES)
    assert record["peers"].keys() == {"dense", "base"}
    dense, expected = record["peers"]["dense"], dense_run[0]["metrics"]
    assert dense.keys() == named(*SCORES, "latency_ms")
    assert all(dense[name] == pytest.approx(expected[name], rel=1e-6) for name in named(*SCORES))
    assert expected[f"{PREFIX}oa"] > 2 * 100 / 15
    metrics = record["metrics"]
    share = metrics[f"{PREFIX}gflops"] / dense[f"{PREFIX}gflops"]
    assert metrics[f"{PREFIX}flops_cut"] == pytest.approx(100 * (1 - share))
    assert 57.8 <= metrics[f"{PREFIX}flops_cut"] < 70
    # the same rate for all, and other channels
    for other in (record["baseline"], record["peers"]["base"]):
        assert other[f"{PREFIX}gflops"] == metrics[f"{PREFIX}gflops"]
    plans = []
    for name in (".", "base", "random"):
        kept = torch.load(path / name / "checkpoints" / "last.ckpt")["pruning"]["kept"]
        plans.append({key: channels.tolist() for key, channels in kept.items()})
    assert plans[0] == plan_of(path)
    assert plans[0] != plans[1] != plans[2] != plans[0]
    assert all(len(plan[key]) == len(kept) for plan in plans for key, kept in plans[0].items())
    assert json.loads((path / "metrics.json").read_text()) == record


def test_plan_and_table_say_what_the_network_became(pruned_run):
    record, path = pruned_run
    plan = json.loads((path / "plan.json").read_text())
    net = PointNetwork.load_from_checkpoint(path / "checkpoints" / "best.ckpt").net
    assert plan["net"]["width"] == 8
    assert plan["after"]["params"] == sum(p.numel() for p in net.parameters())
    assert plan["after"]["flops"] == pytest.approx(1e9 * record["metrics"][f"{PREFIX}gflops"])
    assert plan["before"]["flops"] == pytest.approx(1e9 * record["peers"]["dense"][f"{PREFIX}gflops"])
    lines = [line.split(" | ") for line in (path / "table.md").read_text().splitlines()]
    table = {line[0].removeprefix("| "): line[1:] for line in lines}
    for name, group in plan["groups"].items():
        assert table[f"width of {name}"][:2] == [str(group["width"]), str(group["kept_width"])]
        assert group["kept"] == sorted(group["kept"])
        assert net.get_submodule(name).weight.shape[0] == group["kept_width"] == len(group["kept"])
    share = float(table["FLOPs (G)"][2].removesuffix(" |"))
    assert share == pytest.approx(plan["after"]["flops"] / plan["before"]["flops"], abs=1e-3)


@pytest.mark.parametrize(("name", "least"), [("importance", 400), ("predictions", 400)])
def test_pictures_show_something(pruned_run, name, least):
    with Image.open(pruned_run[1] / "pictures" / f"{name}.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert min(pixels.shape[:2]) >= least / 2
    assert pixels.shape[1] >= least
    colours = {tuple(colour) for colour in pixels[::3, ::3].reshape(-1, 3)}
    assert len(colours) > 10
    assert 0.01 < (pixels < 200).any(2).mean() < 0.9


def test_picture_of_importance_has_a_panel_for_each_layer_and_no_bar_for_each_channel(tmp_path, monkeypatch):
    drawn, group = [], next(iter(make_pruned(1).groups))
    original = compare.Figure.savefig
    monkeypatch.setattr(compare.Figure, "savefig", lambda self, *a, **k: drawn.append(self) or original(self, *a, **k))
    compare.draw_importance(tmp_path / "a.png", make_pruned(5))
    (figure,) = drawn
    shown = [axes for axes in figure.axes if axes.axison]
    assert [axes.get_title() for axes in shown] == [f"layer{number}" for number in range(5)]
    for axes in shown:
        assert len(axes.patches) == 3
        base, ce, kr = (patch.get_data() for patch in axes.patches)
        assert len(base.values) == group.width
        assert np.allclose(ce.baseline, base.values)
        assert np.all(np.diff(kr.values) <= 1e-12)  # in the order of the sum
        assert axes.lines[0].get_xdata()[0] == 2.5
    compare.draw_importance(tmp_path / "none.png", Pruned([], {}, {}, None, None))
    assert not (tmp_path / "none.png").exists()


def make_pruned(count, width=10):
    groups, scores, plan = [], {}, {}
    for number in range(count):
        name = f"encoder.layer{number}"
        parts = torch.rand(3, width, dtype=torch.float64, generator=torch.Generator().manual_seed(number))
        groups.append(Group(name, width, (name,), {}, ()))
        scores[name] = Scores(*parts, total=parts.sum(0))
        plan[name] = torch.arange(3)
    return Pruned(groups, plan, scores, None, None)


# --- What is pruned ---------------------------------------------------------------------------------------------------


def test_plan_of_another_run_gives_its_network_and_nothing_stands_beside(fine_tuned, pruned_run):
    plan = pruned_run[1] / "plan.json"
    options = [f"model.prune.plan={plan}", "model.prune.flops_cut=null", "beside=[base, random]"]
    record, path = fine_tuned("a", *options)
    assert plan_of(path) == plan_of(pruned_run[1])
    assert (record["baseline"], record["peers"].keys()) == ({}, {"dense"})
    assert not (path / "base").exists()
    for name in ("params_m", "gflops", "flops_cut"):
        assert record["metrics"][f"{PREFIX}{name}"] == pruned_run[0]["metrics"][f"{PREFIX}{name}"]


@pytest.mark.slow
def test_channels_are_rounded_and_shared_among_layers_as_asked(fine_tuned):
    _, plain = fine_tuned("plain", *FLOPS)
    _, rounded = fine_tuned("rounded", *FLOPS, "model.prune.round_to=4")
    record, network = fine_tuned("network", "model.prune.scope=network")
    counts = [{name: len(kept) for name, kept in plan_of(path).items()} for path in (plain, rounded, network)]
    widths = {name: group["width"] for name, group in json.loads((plain / "plan.json").read_text())["groups"].items()}
    assert counts[0] == {name: int(width * 0.6) for name, width in widths.items()}
    assert all(count % 4 == 0 for count in counts[1].values())
    shares = {count / widths[name] for name, count in counts[2].items()}
    assert len(shares) > 2
    assert record["metrics"][f"{PREFIX}flops_cut"] >= 57.8


@pytest.mark.slow
def test_each_way_of_scoring_chooses_its_own_channels(fine_tuned):
    ways = [
        [], ["prune=hrank_cp3"], ["prune=hrank"], ["prune=chip"], ["prune=l1"], ["prune=random"],
        ["prune=random", "model.prune.criterion.seed=1"], ["prune=cp3_corr"], ["model.prune.criterion.kr=base"],
        ["model.prune.criterion.unsampled=released"], ["model.prune.split=test"],
    ]  # fmt: skip
    plans = []
    for number, way in enumerate(ways):
        _, path = fine_tuned(str(number), *way, *FLOPS)
        plans.append(plan_of(path))
    assert all(plan not in plans[:number] for number, plan in enumerate(plans))


@pytest.mark.slow
def test_released_columns_keep_the_same_channels_in_another_network(fine_tuned):
    still = ["model.optimizer.lr=1e-12", *FLOPS]
    _, path = fine_tuned("ours", *still)
    _, other = fine_tuned("released", *still, "model.prune.released_columns=true")
    assert plan_of(path) == plan_of(other)
    states = [torch.load(run / "checkpoints" / "last.ckpt")["state_dict"] for run in (path, other)]
    ours, others = states
    weights = [key for key in ours if key.endswith("weight")]
    differing = [key for key in weights if not torch.allclose(ours[key], others[key], atol=1e-6)]
    assert differing
    assert all(key.endswith(".0.0.weight") and "scales" in key for key in differing)
    for key in differing:
        kept = plan_of(path)[key.removesuffix(".weight").removeprefix("net.")]
        assert len(ours[key]) == len(kept)
        assert ours[key].shape == others[key].shape


# --- What stands beside -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "choice"), [("base", "chip"), ("random", "random"), pytest.param("l1", "l1", marks=pytest.mark.slow)],
)  # fmt: skip
def test_configuration_of_another_criterion_is_what_the_command_line_composes(composed, name, choice):
    for options in ([], ["data.num_points=128", "model.prune.flops_cut=0.75", "seed=3"]):
        found = with_criterion(composed("train", *options), name)
        assert config_hash(found) == config_hash(composed("train", *options, f"prune={choice}", "beside=[]"))
    found = with_criterion(composed("train", "prune=hrank_cp3"), "base")
    assert config_hash(found) == config_hash(composed("train", "prune=hrank", "beside=[]"))


@pytest.mark.parametrize(("options", "differing"), [
    ([], {"base", "random", "l1"}), (["prune=chip"], {"random", "l1"}), (["prune=random"], {"l1"}),
    (["prune=l1"], {"random"}), (["model.prune.plan=plan.json"], set()),
    (["model.prune.criterion.base=none"], {"random", "l1"}),
])  # fmt: skip
def test_criteria_that_are_the_runs_own_or_nothing_do_not_stand_beside(composed, options, differing):
    config = composed("train", *options)
    found = {name for name in compare.BESIDE if compare.differs(config, name)}
    assert found == differing


def test_arm_that_another_run_trained_for_itself_is_taken(composed, recorded_runs, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(compare, "train", lambda config, finish: {"trained": config.run_dir})
    config = composed("train", "seed=5")
    folder = recorded_runs / "earlier" / "base"
    folder.mkdir(parents=True)
    record = {"config_hash": config_hash(with_criterion(config, "base")), "metrics": {"a": 1.0}}
    (folder / "metrics.json").write_text(json.dumps(record))
    assert compare.run_beside(config, "base", tmp_path / "own") == record
    assert compare.run_beside(config, "random", tmp_path / "own") == {"trained": str(tmp_path / "own" / "random")}
    assert "now random alone at the same rate" in capfd.readouterr().out
    config.seed = 6
    assert compare.run_beside(config, "base", tmp_path / "own") == {"trained": str(tmp_path / "own" / "base")}


@pytest.mark.slow
def test_found_arms_are_not_trained_again(fine_tuned, recorded_runs, tmp_path, monkeypatch):
    trained, original = [], compare.train
    monkeypatch.setattr(compare, "train", lambda *a: trained.append(a[0].run_dir) or original(*a))
    brief = [*FLOPS, "beside=[base, random]"]
    folder = recorded_runs.relative_to(tmp_path)
    first, path = fine_tuned(f"{folder}/first", *brief)
    assert trained == [str(path / "base"), str(path / "random")]
    (recorded_runs / "damaged" / "base").mkdir(parents=True)
    (recorded_runs / "damaged" / "base" / "metrics.json").write_text("{")
    # one that another run trained for itself, and one that was recorded
    other, again = fine_tuned(f"{folder}/second", *brief)
    assert len(trained) == 2
    assert not (again / "base").exists()
    for name in ("baseline", "metrics"):
        assert {k: v for k, v in other[name].items() if "latency" not in k} == {
            k: v for k, v in first[name].items() if "latency" not in k
        }
    assert other["peers"]["base"] == first["peers"]["base"]
    assert_equal_weights(again, path)
    # of another configuration nothing is found
    fine_tuned(f"{folder}/third", *brief, "seed=1")
    assert len(trained) == 4


@pytest.mark.slow
def test_recorded_runs_stand_beside(fine_tuned, recorded_runs, tmp_path, monkeypatch):
    arm, path = fine_tuned("arm", "prune=chip", "model.prune.num_clouds=8", "model.prune.batch_size=4", *FLOPS)
    monkeypatch.setattr(
        recorded, "_recorded", lambda project: [recorded.summary(arm, path)] if project == "cp3" else []
    )
    monkeypatch.setattr(compare, "train", lambda *a: pytest.fail("it is trained again"))
    record, _ = fine_tuned("a", *FLOPS, "beside=[base]")
    assert record["peers"]["base"] == {key: value for key, value in arm["metrics"].items() if key in record["metrics"]}


@pytest.mark.slow
def test_killed_arm_goes_on_where_it_stopped(fine_tuned, monkeypatch):
    options = [*FLOPS, "beside=[base]"]
    whole, path = fine_tuned("whole", *options)

    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(compare, "add_costs", killed)
        with pytest.raises(KeyboardInterrupt):
            fine_tuned("cut", *options)
    assert not (path.parent / "cut" / "metrics.json").exists()
    resumed, cut = fine_tuned("cut", *options, "resume=auto")
    for part in (resumed["metrics"], whole["metrics"]):
        part.update({name: 0 for name in part if "latency" in name})
    assert resumed["metrics"] == whole["metrics"]
    assert resumed["peers"]["base"] == whole["peers"]["base"]
    assert (cut / "plan.json").read_bytes() == (path / "plan.json").read_bytes()
    assert all(math.isfinite(value) for value in resumed["peers"]["dense"].values())
