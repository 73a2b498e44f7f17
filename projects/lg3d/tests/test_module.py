"""Steps, what each loss teaches, the optimiser, what a training starts from, scores."""

import copy
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import lightning.pytorch as L
import pytest
import torch
from torch import nn

from projects.lg3d import module as module_file
from projects.lg3d.checkpoints import load_published, read_network, save_network
from projects.lg3d.data import ProcRoom
from projects.lg3d.layouts import SUNRGBD_MEAN_SIZES
from projects.lg3d.loss import detection_loss, instance_targets, vote_targets
from projects.lg3d.model import build_network
from projects.lg3d.module import PointDetector, load_module
from shared.errors import InputError
from shared.io.checkpoints import save_weights
from shared.io.procroom import CLASSES
from shared.metrics.boxes import detection_scores

NET = {
    "name": "votenet",
    "backbone": {
        "in_channels": 1, "num_points": [48, 24, 12, 6], "radii": [0.3, 0.6, 1.0, 1.5], "num_samples": [6, 6, 6, 6],
        "widths": [[4, 4, 8], [8, 8, 8], [8, 8, 8], [8, 8, 8]], "out_channels": 16,
    },
    "head": {
        "num_proposals": 12, "radius": 0.5, "num_samples": 6, "widths": [8, 8, 8], "num_headings": 12,
        "mean_sizes": torch.tensor(SUNRGBD_MEAN_SIZES).tolist(),
    },
}  # fmt: skip
RELEASED = {
    "variant": "released", "share_attention": True, "layout": "tiled", "pad": "zero", "frozen_norms": "train",
    "head_norms": "shared",
}  # fmt: skip
FORMS = {"paper": {}, "released": RELEASED}
BOTH = ["paper", pytest.param("released", marks=pytest.mark.slow)]
DETECTION = {
    "vote", "objectness", "center", "heading_class", "heading_residual", "size_class", "size_residual", "semantic",
    "total",
}  # fmt: skip


def changed(part, **values):
    return {**NET, part: {**NET[part], **values}}


def module(optimizer=None, scheduler=None, net=NET, **options):
    torch.manual_seed(0)
    return PointDetector(
        copy.deepcopy(net), {"name": "adamw", "lr": 1e-3, "weight_decay": 0.01, **(optimizer or {})},
        {"milestones": [], "gamma": 0.1, **(scheduler or {})}, **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("rooms")


class Rooms(ProcRoom):
    """Generated rooms; those of some parts without boxes."""

    def __init__(self, cache, bare=(), **options):
        super().__init__(**{
            "mode": "sun", "num_train": 6, "num_validation": 2, "num_test": 3, "stored_points": 200, "data_seed": 0,
            "num_points": 120, "batch_size": 2, "seed": 3, "augment": {}, "cache_dir": str(cache), "test_batch_size": 2,
        } | options)  # fmt: skip
        self.bare = bare

    def load(self, part):
        read, count = super().load(part)
        if part in self.bare:
            return lambda i: replace(read(i), boxes=read(i).boxes[:0], labels=read(i).labels[:0]), count
        return read, count


@pytest.fixture
def make_rooms(cache):
    return lambda **options: Rooms(cache, **options)


def trainer(root, **options):
    quiet = {
        "logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
    }  # fmt: skip
    options = {"limit_val_batches": 0, "num_sanity_val_steps": 0, **quiet, **options}
    return L.Trainer(accelerator="cpu", default_root_dir=root, **options)


def saved(path, net=NET, seed=5):
    """Write the weights of a detector whose norms have seen something -> path."""
    torch.manual_seed(seed)
    made = build_network(copy.deepcopy(net))
    xyz = torch.rand(2, 120, 3) * torch.tensor([4.0, 4.0, 1.5])
    made.train()(xyz, torch.rand(2, net["backbone"]["in_channels"], 120))
    save_network(made, net, path)
    return str(path)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("weights") / "teacher.safetensors")


def guide(teacher, **options):
    return {"teacher": teacher, "detection_weight": 1.0, "imitation_weight": 1.0, **options}


def awake(made):
    """Give layers that start at 0 some weights, so that everything before them matters."""
    for layer in made.guidance.modules():
        if isinstance(layer, nn.Conv1d) and not layer.weight.any():
            nn.init.normal_(layer.weight, 0, 0.1)
    return made


def a_batch(data):
    return next(iter(data.train_dataloader()))


def equal_states(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


# --- What each loss teaches -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", BOTH)
def test_guidance_of_no_weight_is_bit_for_bit_the_training_without_it(tmp_path, make_rooms, teacher, form):
    def trained(guidance):
        made = module(guidance=guidance)
        trainer(tmp_path, max_steps=3).fit(made, datamodule=make_rooms())
        return made.net.state_dict()

    alone = trained(None)
    none = guide(teacher, detection_weight=0.0, imitation_weight=0.0, **FORMS[form])
    assert equal_states(trained(none), alone)
    for weights in ({"detection_weight": 0.0}, {"imitation_weight": 0.0}):
        assert not equal_states(trained(guide(teacher, **weights, **FORMS[form])), alone)


@pytest.mark.parametrize("form", FORMS)
def test_each_loss_teaches_its_own_part(make_rooms, teacher, form):
    made = awake(module(guidance=guide(teacher, **FORMS[form]))).train()
    batch = a_batch(make_rooms())
    own = [name for name, _ in made.guidance.named_parameters() if not name.startswith("teacher.")]

    def taught(name):
        made.zero_grad()
        made.losses(batch, "vote")[0][name].backward()
        return {key for key, p in made.named_parameters() if p.grad is not None and p.grad.any()}

    assert taught("imitation") == {f"net.backbone.{name}" for name, _ in made.net.backbone.named_parameters()}
    guided = taught("guided/total")
    assert {key for key in guided if key.startswith("net.")} <= {
        f"net.head.{name}" for name, _ in made.net.head.named_parameters()
    }
    assert "net.head.regress.weight" in guided
    # those before a softmax may have next to no gradient
    assert {key for key in guided if key.startswith("guidance.")} <= {f"guidance.{name}" for name in own}
    assert sum(key.startswith("guidance.") for key in guided) > 0.6 * len(own)
    student = taught("total")
    assert all(key.startswith("net.") for key in student)
    assert any(key.startswith("net.backbone.") for key in student)


def test_step_adds_the_losses_by_their_weights(make_rooms, teacher):
    made = awake(module(guidance=guide(teacher, detection_weight=0.5, imitation_weight=10.0))).train()
    batch, logged = a_batch(make_rooms()), {}
    made.log = lambda name, value, **_: logged.update({name: float(value)})

    def gradients(loss):
        made.zero_grad()
        loss.backward()
        return {key: torch.zeros_like(p) if p.grad is None else p.grad for key, p in made.named_parameters()}

    weights = {"total": 1.0, "imitation": 10.0, "guided/total": 0.5}
    terms = {name: made.losses(batch, "vote")[0][name] for name in weights}
    parts = {name: gradients(loss) for name, loss in terms.items()}
    values = {name: loss.item() for name, loss in terms.items()}
    loss = made.training_step(batch, 0)
    assert loss.item() == pytest.approx(sum(weights[name] * value for name, value in values.items()), rel=1e-6)
    found = gradients(loss)
    for key, value in found.items():
        expected = sum(weight * parts[name][key] for name, weight in weights.items())
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max() + 1e-6))
    # the curve is the student's alone, comparable with a training without guidance
    assert logged["train/loss"] == pytest.approx(values["total"], rel=1e-6)
    assert logged["train/loss/imitation"] == pytest.approx(values["imitation"], rel=1e-6)
    assert logged["train/loss/guided/total"] == pytest.approx(values["guided/total"], rel=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_frozen_network_is_that_of_its_file_after_some_steps(tmp_path, make_rooms, teacher, form):
    made = module(guidance=guide(teacher, **FORMS[form]))
    before = {name: p.clone() for name, p in made.named_parameters()}
    trainer(tmp_path, max_epochs=2, limit_val_batches=1).fit(made, datamodule=make_rooms())
    _, state = read_network(teacher)
    backbone = {key.removeprefix("backbone."): value for key, value in state.items() if key.startswith("backbone.")}
    assert equal_states(dict(made.guidance.teacher.state_dict()), backbone)
    moved = {name for name, p in made.named_parameters() if not torch.equal(p, before[name])}
    frozen = {name for name, _ in made.named_parameters() if name.startswith("guidance.teacher.")}
    assert not {p for group in made.optimizers().param_groups for p in group["params"]} & {
        p for name, p in made.named_parameters() if name in frozen
    }
    assert {name.partition(".")[0] for name in moved - frozen} == {"net", "guidance"}
    assert {name for name, p in made.named_parameters() if not p.requires_grad} == frozen


def test_losses_are_those_of_the_parts(make_rooms, teacher):
    for mode in ("sun", "scan"):
        net = NET if mode == "sun" else changed("head", num_headings=1)
        made = awake(module(net=net, guidance=guide(teacher))).eval()
        batch = a_batch(make_rooms(mode=mode, augment={"rotation": 5}))
        losses, outputs = made.losses(batch, "seed")
        assert losses.keys() == DETECTION | {"imitation"} | {f"guided/{name}" for name in DETECTION}
        assert outputs.keys() == {"student", "guided"}
        expected = made.net(batch["xyz"], batch["features"], "seed")
        assert all(torch.equal(outputs["student"][key], value) for key, value in expected.items())
        seeds = made.net.backbone(batch["features"], made.net.backbone.geometry(batch["xyz"]))
        if mode == "sun":
            votes = vote_targets(seeds.xyz, batch["boxes"], batch["labels"] >= 0)
        else:
            votes = instance_targets(batch["xyz"], batch["instance"], seeds.index, batch["boxes"].shape[1])
        terms = detection_loss(expected, votes, batch["boxes"], batch["labels"], made.net.head.coder)
        assert all(torch.equal(losses[name], value) for name, value in terms.items())
        guided = made.guidance(batch["xyz"], batch["features"], batch["boxes"], batch["labels"])
        torch.testing.assert_close(losses["imitation"], (seeds.features - guided.features).square().mean())
        assert not torch.equal(losses["guided/total"], losses["total"])


def test_form_without_a_loss_of_its_own_runs_no_head(make_rooms, teacher):
    batch = a_batch(make_rooms())
    made = module(guidance=guide(teacher, detection_weight=0.0))
    losses, outputs = made.losses(batch, "vote")
    assert losses.keys() == DETECTION | {"imitation"}
    assert outputs.keys() == {"student"}
    made = module(guidance=guide(teacher, detection_weight=0.0, imitation_weight=0.0))
    made.guidance.forward = None  # would fail
    assert made.losses(batch, "vote")[0].keys() == DETECTION
    assert module().losses(batch, "vote")[0].keys() == DETECTION


def test_a_training_that_diverges_is_stopped_with_one_line(tmp_path, make_rooms, teacher):
    for guidance in (None, guide(teacher)):
        made = module(guidance=guidance)
        part = made.net if guidance is None else made.guidance.descriptor
        next(part.parameters()).data.fill_(math.nan)
        with pytest.raises(InputError, match="training diverged; lower the learning rate") as caught:
            trainer(tmp_path, max_steps=2).fit(made, datamodule=make_rooms())
        assert "\n" not in str(caught.value)


# --- Optimiser and schedules ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"), [pytest.param("adam", torch.optim.Adam, marks=pytest.mark.slow), ("adamw", torch.optim.AdamW)]
)
def test_rate_falls_after_the_epochs_that_are_named(tmp_path, make_rooms, name, kind):
    made, rates = module({"name": name, "betas": [0.8, 0.99]}, {"milestones": [1, 3], "gamma": 0.1}), []
    made.on_train_batch_start = lambda *_: rates.append(made.optimizers().param_groups[0]["lr"])
    trainer(tmp_path, max_epochs=4).fit(made, datamodule=make_rooms())
    assert rates == pytest.approx([1e-3] * 3 + [1e-4] * 6 + [1e-5] * 3)
    assert type(made.optimizers().optimizer) is kind
    (group,) = made.optimizers().param_groups
    assert (tuple(group["betas"]), group["weight_decay"]) == ((0.8, 0.99), 0.01)
    assert len(group["params"]) == len(list(made.parameters()))


@pytest.mark.parametrize(("options", "message"), [
    ({"optimizer": {"lr": 0.0}}, r"training needs model\.optimizer\.lr above 0, not 0"),
    ({"optimizer": {"lr": None}}, r"model\.optimizer\.lr above 0, not None"),
    ({"optimizer": {"lr": "fast"}}, r"model\.optimizer\.lr above 0, not fast"),
    ({"optimizer": {"lr": math.nan}}, r"model\.optimizer\.lr above 0, not nan"),
    ({"optimizer": {"name": "sgd"}}, r"unknown model\.optimizer\.name 'sgd'; choose one of adam, adamw"),
    ({"optimizer": {"momentum": 1}}, r"model\.optimizer: .*momentum"),
    ({"optimizer": {"weight_decay": -1.0}}, r"model\.optimizer: Invalid weight_decay"),
    ({"scheduler": {"warmup": 1}}, r"model\.scheduler takes milestones and gamma, not milestones, gamma, warmup"),
    ({"scheduler": {"milestones": 3}}, r"model\.scheduler\.milestones is a list of epochs, not 3"),
    ({"scheduler": {"milestones": ["three"]}}, r"model\.scheduler\.milestones is a list of epochs"),
    ({"scheduler": {"gamma": 0.0}}, r"model\.scheduler\.gamma is above 0 and at most 1, not 0"),
    ({"scheduler": {"gamma": "half"}}, r"model\.scheduler\.gamma is above 0 and at most 1, not 'half'"),
])  # fmt: skip
def test_optimisers_that_cannot_be_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        module(**options).configure_optimizers()


def test_missing_optimisers_are_named():
    made = module()
    for name, message in (("optimizer", "unknown model.optimizer.name None"), ("scheduler", "gamma, not nothing")):
        for value in (None, {}):
            arguments = dict(made.hparams) | {name: value}
            with pytest.raises(InputError) as caught:
                PointDetector(**arguments).configure_optimizers()
            assert message in str(caught.value)


def test_momentum_of_the_norms_falls_as_in_the_original():
    how = {"start": 0.5, "factor": 0.5, "every": 20, "least": 0.001}
    made = module(norm_momentum=how)
    norms = [part for part in made.net.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    assert len(norms) == 23
    expected = {0: 0.5, 19: 0.5, 20: 0.25, 39: 0.25, 40: 0.125, 100: 1 / 64, 159: 2**-8, 179: 2**-9, 180: 0.001}
    for epoch, momentum in expected.items():
        made._trainer = SimpleNamespace(current_epoch=epoch)
        made.on_train_epoch_start()
        assert [norm.momentum for norm in norms] == pytest.approx([momentum] * len(norms))
    plain = module()
    plain.on_train_epoch_start()
    assert {p.momentum for p in plain.net.modules() if isinstance(p, nn.modules.batchnorm._BatchNorm)} == {0.1}


def test_momentum_is_set_in_a_training(tmp_path, make_rooms):
    made = module(norm_momentum={"start": 0.5, "factor": 0.1, "every": 1, "least": 0.01})
    trainer(tmp_path, max_epochs=2).fit(made, datamodule=make_rooms())
    assert made.net.head.shared[0][1].momentum == pytest.approx(0.05)


@pytest.mark.parametrize(("options", "message"), [
    ({"norm_momentum": {"start": 0.5}}, "norm_momentum takes start, factor, every, least, not start"),
    ({"norm_momentum": {}}, "norm_momentum takes start, factor, every, least, not nothing"),
    ({"norm_momentum": {"start": 2, "factor": 0.5, "every": 20, "least": 0.001}}, r"norm_momentum\.start is above 0"),
    ({"norm_momentum": {"start": 1, "factor": 0, "every": 20, "least": 0.001}}, r"norm_momentum\.factor is above 0"),
    ({"norm_momentum": {"start": 1, "factor": 1, "every": 0, "least": 0.001}}, r"every is a number of epochs of at"),
    ({"norm_momentum": {"start": 1, "factor": 1, "every": 2, "least": "no"}}, r"norm_momentum\.least is above 0"),
    ({"norm_momentum": 0.1}, r"model\.norm_momentum is a mapping, not 0\.1"),
    ({"postprocessing": {"nms": 0.2}}, r"model\.postprocessing: .*'nms'"),
    ({"postprocessing": {"nms_iou": 1.2}}, r"nms_iou is in 0\.\.1, not 1\.2"),
    ({"postprocessing": [1]}, r"model\.postprocessing is a mapping, not \[1\]"),
    ({"guidance": {"teacher": "a", "varient": "paper"}}, r"model\.guidance: .*'varient'"),
    ({"guidance": {"variant": "drawn"}}, "unknown guidance variant='drawn'; choose one of paper, released"),
    ({"guidance": {"imitation_weight": -1.0}}, r"model\.guidance\.imitation_weight is at least 0, not -1"),
    ({"guidance": {"detection_weight": math.inf}}, r"model\.guidance\.detection_weight is at least 0, not inf"),
    ({"guidance": {"detection_weight": "one"}}, r"model\.guidance\.detection_weight is at least 0, not 'one'"),
    ({"guidance": "lg3d"}, r"model\.guidance is a mapping, not 'lg3d'"),
    ({"net": {**NET, "name": "votenet3"}}, "unknown network 'votenet3'"),
    ({"net": changed("head", widht=3)}, "widht"),
    ({"net": changed("backbone", radii=[0.2, 0.4, 0.8, -1])}, "radii of the backbone"),
])  # fmt: skip
def test_arguments_that_cannot_be_are_refused(options, message):
    with pytest.raises(InputError, match=message) as caught:
        module(**options)
    assert "\n" not in str(caught.value)


# --- What a training starts from --------------------------------------------------------------------------------------


def test_training_starts_from_given_weights_and_a_teacher_but_a_resumed_one_needs_no_file(
    tmp_path, make_rooms, teacher
):
    files = [tmp_path / name for name in ("start.safetensors", "teacher.safetensors")]
    for seed, file in enumerate(files):
        saved(file, seed=seed)
    start, taught = (load_published(file) for file in files)
    made = module({"lr": 1e-12}, guidance=guide(str(files[1])), init_from=str(files[0]))
    run = trainer(tmp_path, max_steps=1)
    run.fit(made, datamodule=make_rooms())
    for name, value in start.named_parameters():
        torch.testing.assert_close(made.net.get_parameter(name), value.detach(), rtol=0, atol=1e-8)
    assert equal_states(dict(made.guidance.teacher.state_dict()), dict(taught.backbone.state_dict()))
    last = tmp_path / "checkpoints" / "last.ckpt"  # where a run has it
    run.save_checkpoint(last)
    for file in files:
        file.unlink()
    again = module({"lr": 1e-12}, guidance=guide(str(files[1])), init_from=str(files[0]))
    trainer(tmp_path, max_steps=2).fit(again, datamodule=make_rooms(), ckpt_path=last, weights_only=True)
    assert again.global_step == 2
    assert equal_states(dict(again.guidance.teacher.state_dict()), dict(taught.backbone.state_dict()))
    # neither is needed to load it for a test, nor any argument
    loaded = PointDetector.load_from_checkpoint(last, weights_only=True)
    assert equal_states(dict(loaded.state_dict()), dict(made.state_dict()))
    (found,) = trainer(tmp_path).test(loaded, datamodule=make_rooms(), verbose=False)
    assert "test/procroom/guided_map_50" in found


@pytest.mark.parametrize("form", BOTH)
def test_a_checkpoint_of_a_guided_training_is_that_of_the_detector_alone(tmp_path, make_rooms, teacher, form):
    made = module(guidance=guide(teacher, **FORMS[form]))
    run = trainer(tmp_path, max_steps=2)
    run.fit(made, datamodule=make_rooms())
    run.save_checkpoint(tmp_path / "a.ckpt")
    arguments, state = read_network(tmp_path / "a.ckpt")
    assert arguments == NET
    assert state.keys() == build_network(NET).state_dict().keys()
    assert equal_states(state, dict(made.net.state_dict()))
    for net in (load_published(tmp_path / "a.ckpt"), load_module(str(tmp_path / "a.ckpt")).net):
        assert not net.training
        batch = a_batch(make_rooms())
        scene = batch["xyz"], batch["features"]
        made.eval()
        expected = made(*scene)
        assert all(torch.equal(value, expected[key]) for key, value in net(*scene).items())
    alone = load_module(str(tmp_path / "a.ckpt"))
    assert alone.guidance is None
    assert sum(p.numel() for p in alone.parameters()) == sum(p.numel() for p in made.net.parameters())


@pytest.mark.parametrize(("net", "message"), [
    (changed("backbone", out_channels=32), "holds weights of another network: 'propagations.0.convs.0.0.weight' is of"),
    (changed("backbone", in_channels=2), "weights of another network: 'abstractions.0.convs.0.0.weight' is of shape"),
    (changed("backbone", widths=[[4, 4, 8], [8, 8, 8], [8, 8, 8], [8, 8]]), "lacks 'abstractions.3.convs.2.0.weight'"),
    (changed("backbone", radii=[0.2, 0.4, 0.8, 1.2]),
     "has levels of the radii [0.2, 0.4, 0.8, 1.2], the network of [0.3, 0.6, 1.0, 1.5]; give a teacher of the same"),
])  # fmt: skip
def test_teachers_of_another_backbone_are_refused(tmp_path, make_rooms, net, message):
    path = saved(tmp_path / "other.safetensors", net)
    refused(tmp_path, make_rooms, module(guidance=guide(path)), "other.safetensors", message)


def refused(root, make_rooms, made, *parts):
    with pytest.raises(InputError) as caught:
        trainer(root, max_steps=1).fit(made, datamodule=make_rooms())
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in parts), message


def test_teachers_with_another_head_are_taken(tmp_path, make_rooms):
    path = saved(tmp_path / "scan.safetensors", changed("head", num_headings=1, mean_sizes=[[1.0, 1.0, 1.0]] * 18))
    trainer(tmp_path, max_steps=1).fit(module(guidance=guide(path)), datamodule=make_rooms())


def test_teachers_that_are_none_are_named(tmp_path, make_rooms):
    refused(tmp_path, make_rooms, module(guidance=guide(None)), "say teacher=<file>, or train one with guidance=none")
    refused(tmp_path, make_rooms, module(guidance=guide("absent.pth")), "no checkpoint at absent.pth")
    (tmp_path / "note.pth").write_text("not weights")
    refused(tmp_path, make_rooms, module(guidance=guide(str(tmp_path / "note.pth"))), "note.pth is not a checkpoint")
    save_weights(tmp_path / "cp3.safetensors", {"a": torch.zeros(1)}, {"net": json.dumps({"name": "pointnext"})})
    path = str(tmp_path / "cp3.safetensors")
    refused(tmp_path, make_rooms, module(guidance=guide(path)), "cp3.safetensors holds a network of another project")
    torch.save({"state_dict": {"conv.weight": torch.zeros(1)}}, tmp_path / "other.pth")
    refused(tmp_path, make_rooms, module(guidance=guide(str(tmp_path / "other.pth"))), "holds no network we know")


def test_given_weights_of_another_network_are_refused(tmp_path, make_rooms):
    path = saved(tmp_path / "wide.safetensors", changed("head", widths=[8, 8, 16]))
    refused(tmp_path, make_rooms, module(init_from=path), "wide.safetensors holds weights of another network")
    refused(tmp_path, make_rooms, module(init_from="absent.ckpt"), "no checkpoint at absent.ckpt")


def test_data_of_other_classes_or_headings_are_refused(tmp_path, make_rooms):
    message = "procroom has 10 classes and 1 headings, the network 10 and 12; choose a model"
    refused(tmp_path, lambda: make_rooms(mode="scan"), module(), message)
    other = module(net=changed("head", mean_sizes=[[1.0, 1.0, 1.0]] * 18))
    refused(tmp_path, make_rooms, other, "procroom has 10 classes and 12 headings, the network 18 and 12")
    with pytest.raises(InputError, match="the network 18 and 12"):
        trainer(tmp_path).test(other, datamodule=make_rooms(), verbose=False)


# --- Scores -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounds", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_scores_are_means_over_the_rounds(tmp_path, make_rooms, teacher, monkeypatch, rounds):
    made, data = module(guidance=guide(teacher)), make_rooms(test_rounds=rounds)
    detections, truths, found_in = {"": [], "guided_": []}, [], []
    for number, batch in enumerate(data.plain_dataloader("test", rounds)):
        own = [(boxes[labels >= 0], labels[labels >= 0]) for boxes, labels in
               zip(batch["boxes"], batch["labels"], strict=True)]  # fmt: skip
        truths += [{"boxes": boxes, "labels": labels} for boxes, labels in own]
        # the student misses the truth more and more, the guided branch does not
        for prefix, miss in (("", 0.1 * number), ("guided_", 0.0)):
            found = [{"boxes": boxes + miss, "scores": torch.rand(len(labels)), "labels": labels}
                     for boxes, labels in own]  # fmt: skip
            detections[prefix] += found
            found_in.append(found)
    calls = iter(found_in)
    monkeypatch.setattr(module_file, "detect", lambda *_: next(calls))
    (logged,) = trainer(tmp_path).test(made, datamodule=data, verbose=False)
    expected = {}
    for prefix, scenes in detections.items():
        parts = [
            detection_scores(scenes[3 * i : 3 * i + 3], truths[3 * i : 3 * i + 3], CLASSES) for i in range(rounds)
        ]  # fmt: skip
        for name in parts[0]:
            if name[:3] in ("map", "ar_") or (name[:3] == "ap_" and not prefix):
                expected[f"test/procroom/{prefix}{name}"] = sum(part[name] for part in parts) / rounds
    assert expected["test/procroom/guided_map_50"] == 100
    assert 0 < expected["test/procroom/map_50"] < 100
    assert {name: value for name, value in logged.items() if not name.endswith("loss")} == pytest.approx(expected)
    assert {name for name in logged if name.endswith("loss")} == {"test/procroom/loss", "test/procroom/guided_loss"}
    assert [int(truth["scene"]) for truth in made.test_scenes] == [0, 1, 2] * rounds
    for one, other in zip(made.test_detections, detections[""], strict=True):
        assert equal_states(one, other)


def test_scores_of_one_scene_seen_several_times_are_means_too(tmp_path, make_rooms):
    made = module()
    (found,) = trainer(tmp_path).test(made, datamodule=make_rooms(num_test=1, test_rounds=3), verbose=False)
    assert len(made.test_scenes) == 3
    assert 0 <= found["test/procroom/map_25"] <= 100
    assert not any("guided" in name for name in found)


def test_settings_of_the_test_are_heeded(tmp_path, make_rooms, detector):
    net, arguments = detector()
    counts = []
    for how in ({}, {"per_class": False}, {"min_score": 1.0}):
        made = module(net=arguments, postprocessing=how)
        made.net.load_state_dict(net.state_dict())
        trainer(tmp_path).test(made, datamodule=make_rooms(), verbose=False)
        counts.append(sum(len(found["labels"]) for found in made.test_detections))
    assert counts[0] == 10 * counts[1] > 0 == counts[2]


def test_validation_logs_losses_and_scores_of_both_branches(tmp_path, make_rooms, teacher):
    names = {"val/loss", "val/map_25", "val/map_50"}
    guided = {"val/loss/guided", "val/guided_map_25", "val/guided_map_50"}
    for guidance, expected in (
        (None, names), (guide(teacher), names | guided), (guide(teacher, detection_weight=0.0), names),
    ):  # fmt: skip
        made = module(guidance=guidance)
        run = trainer(tmp_path, max_epochs=1, limit_val_batches=1.0)
        run.fit(made, datamodule=make_rooms())
        assert {name for name in run.callback_metrics if name.startswith("val/")} == expected
        made.eval()
        with torch.no_grad():
            (batch,) = run.datamodule.val_dataloader()
            losses = made.losses(batch, "seed")[0]
        assert float(run.callback_metrics["val/loss"]) == pytest.approx(float(losses["total"]), rel=1e-5)


def test_validation_without_any_box_does_not_end_the_training(tmp_path, make_rooms, teacher, capsys):
    made = module(guidance=guide(teacher))
    best = L.callbacks.ModelCheckpoint(tmp_path, "best", monitor="val/map_25", mode="max")
    run = trainer(tmp_path, max_epochs=2, limit_val_batches=1.0, callbacks=[best], enable_checkpointing=True)
    run.fit(made, datamodule=make_rooms(bare=("validation",)))
    assert run.global_step == 6
    assert float(run.callback_metrics["val/map_25"]) == float(run.callback_metrics["val/map_50"]) == 0
    assert math.isfinite(run.callback_metrics["val/loss"])
    lines = [line for line in capsys.readouterr().out.splitlines() if "no validation scene has a box" in line]
    assert len(lines) == 2  # one a validation
    assert (tmp_path / "best.ckpt").is_file()
    # where there is nothing to score a test has no result
    with pytest.raises(InputError, match="no scene has a true box"):
        run.test(made, datamodule=make_rooms(bare=("test",)), verbose=False)


def test_training_scenes_without_any_box_are_learnt_from(tmp_path, make_rooms, teacher):
    for form in FORMS.values():
        made = module(guidance=guide(teacher, **form))
        trainer(tmp_path, max_epochs=1).fit(made, datamodule=make_rooms(bare=("train",)))
        assert all(p.isfinite().all() for p in made.parameters())


def test_file_is_wrapped_for_the_test_with_other_options(tmp_path, teacher):
    made = load_module(teacher, head={"num_proposals": 5})
    assert made.net.head.num_proposals == 5
    assert equal_states(dict(made.net.state_dict()), dict(load_published(teacher).state_dict()))
    with pytest.raises(InputError, match="no checkpoint"):
        load_module(str(tmp_path / "absent.pth"))
