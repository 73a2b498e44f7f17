"""Steps, optimiser, what a training starts from, scores."""

import math
from types import SimpleNamespace

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from projects.cp3.checkpoints import load_published, save_network
from projects.cp3.data import ProcShape
from projects.cp3.model import build_network
from projects.cp3.module import PointNetwork, load_module, same_size, scores_of
from shared.errors import InputError

NET = {"name": "pointnext", "num_classes": 15, "width": 4, "num_samples": 4, "blocks": [1, 1, 1], "strides": [1, 2, 1],
       "head": [8]}  # fmt: skip
STILL = {"lr": 1e-12, "weight_decay": 0.0}
PRUNE = {"criterion": {"base": "l1", "ce": "none", "kr": "none"}, "rate": 0.5, "num_clouds": 2}


def module(optimizer=None, scheduler=None, net=None, **options):
    torch.manual_seed(0)
    given = {"lr": 1e-3, "weight_decay": 0.05, **(optimizer or {})}
    return PointNetwork({**NET, **(net or {})}, given, {"epochs": None, "min_lr": 1e-5, **(scheduler or {})}, **options)


def scans(root, **options):
    options = {
        "level": "clean", "num_train": 12, "num_validation": 3, "num_test": 5, "stored_points": 32, "num_points": 24,
        "data_seed": 0, "difficulty": {}, "features": "xyz_height", "resample": "random", "test_points": "first",
        "batch_size": 4, "seed": 3, "augment": {}, "cache_dir": str(root / "cache"), "test_batch_size": 2,
    } | options  # fmt: skip
    return ProcShape(**options)


def trainer(root, **options):
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return L.Trainer(accelerator="cpu", default_root_dir=root, num_sanity_val_steps=0, **quiet, **options)


@pytest.fixture
def given(tmp_path):
    """Weights in a file."""
    torch.manual_seed(5)
    save_network(build_network(NET), NET, tmp_path / "given.safetensors")
    return str(tmp_path / "given.safetensors")


def rates(made, root, **options):
    """The learning rate of each step."""
    found = []
    made.on_train_batch_start = lambda *_: found.append(made.optimizers().param_groups[0]["lr"])
    trainer(root, limit_val_batches=0, **options).fit(made, datamodule=scans(root))
    return found


def test_rate_falls_as_a_cosine_to_its_least_and_stays_there(tmp_path):
    def cosine(steps, count):
        shares = (min(1, step / steps) for step in range(count))
        return [1e-5 + (1e-3 - 1e-5) * (1 + math.cos(math.pi * share)) / 2 for share in shares]

    assert rates(module(), tmp_path, max_epochs=3) == pytest.approx(cosine(9, 9))
    # of 3 epochs 2
    assert rates(module(scheduler={"epochs": 2}), tmp_path, max_epochs=3) == pytest.approx(cosine(6, 9))
    assert rates(module(), tmp_path, max_epochs=-1, max_steps=4) == pytest.approx(cosine(4, 4))


def test_decay_is_of_weights_alone_and_no_parameter_is_left_out(tmp_path):
    made = module({"weight_decay": 0.3, "betas": [0.8, 0.99]})
    trainer(tmp_path, max_steps=1, limit_val_batches=0).fit(made, datamodule=scans(tmp_path))
    weights, others = made.optimizers().param_groups
    assert (weights["weight_decay"], others["weight_decay"], tuple(weights["betas"])) == (0.3, 0.0, (0.8, 0.99))
    assert {p.ndim for p in others["params"]} == {1}
    assert min(p.ndim for p in weights["params"]) == 2
    assert len(weights["params"]) + len(others["params"]) == len(list(made.parameters()))
    assert isinstance(made.optimizers().optimizer, torch.optim.AdamW)


@pytest.mark.parametrize(("options", "message"), [
    ({"optimizer": {"lr": 0.0}}, r"model\.optimizer\.lr above 0, not 0"),
    ({"optimizer": {"lr": None}}, r"model\.optimizer\.lr above 0, not None"),
    ({"optimizer": {"beta": 1}}, r"model\.optimizer: .*beta"),
    ({"optimizer": {"weight_decay": -1.0}}, r"model\.optimizer: Invalid weight_decay"),
    ({"scheduler": {"gamma": 1}}, r"model\.scheduler takes epochs and min_lr, not epochs, min_lr, gamma"),
])  # fmt: skip
def test_optimisers_that_cannot_be_are_refused(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        trainer(tmp_path, max_steps=1, limit_val_batches=0).fit(module(**options), datamodule=scans(tmp_path))
    with pytest.raises(InputError, match="an end"):
        trainer(tmp_path, max_epochs=-1, limit_val_batches=0).fit(module(), datamodule=scans(tmp_path))


def test_networks_and_prunings_that_cannot_be_are_refused():
    with pytest.raises(InputError, match="pointnext3"):
        module(net={"name": "pointnext3"})
    with pytest.raises(InputError, match=r"model\.prune: .*'rat'"):
        module(prune={**PRUNE, "rat": 1})
    with pytest.raises(InputError, match=r"prune\.rate is in \[0, 1\)"):
        module(prune={**PRUNE, "rate": 1.0})


def test_loss_is_the_smoothed_cross_entropy_and_accuracy_is_in_percent():
    made, logged = module(smoothing=0.2), {}
    made.log = lambda name, value, **_: logged.update({name: float(value)})
    xyz = torch.rand(4, 24, 3)
    batch = {"xyz": xyz, "features": torch.rand(4, 4, 24), "label": torch.tensor([0, 3, 3, 14])}
    made.eval()
    loss = made.training_step(batch, 0)
    logits = made.net(xyz, batch["features"])
    target = torch.full((4, 15), 0.2 / 14)
    target[range(4), batch["label"]] = 0.8
    assert float(loss) == pytest.approx(float(F.cross_entropy(logits, target)), rel=1e-5)
    assert logged["train/loss"] == pytest.approx(float(loss))
    made.validation_step(batch, 0)
    assert logged["val/loss"] == pytest.approx(float(F.cross_entropy(logits, batch["label"])), rel=1e-5)
    hits = 100 * float((logits.argmax(1) == batch["label"]).float().mean())
    assert logged["val/oa"] == logged["train/oa"] == pytest.approx(hits)
    loss.backward()
    assert all(p.grad is not None for p in made.parameters())


# --- What a training starts from --------------------------------------------------------------------------------------


def test_training_starts_from_given_weights_but_not_when_it_is_resumed(given, tmp_path):
    made = module(STILL, {"min_lr": 0.0}, init_from=given)
    run = trainer(tmp_path, max_steps=1, limit_val_batches=0)
    run.fit(made, datamodule=scans(tmp_path))
    expected = dict(load_published(given).named_parameters())
    assert all(torch.allclose(p, expected[name], atol=1e-8) for name, p in made.net.named_parameters())
    last = tmp_path / "checkpoints" / "last.ckpt"  # where a run has it
    run.save_checkpoint(last)
    again = module(init_from="absent.safetensors")
    trainer(tmp_path, max_steps=2, limit_val_batches=0).fit(
        again, datamodule=scans(tmp_path), ckpt_path=last, weights_only=True
    )
    assert again.global_step == 2


@pytest.mark.parametrize(("net", "message"), [
    ({"name": "pointnet2", "num_classes": 15, "width": 0.05, "head": [8]}, "name=pointnet2, not pointnext"),
    ({**NET, "num_classes": 12}, "num_classes=12, not 15; choose the model and data that it is of"),
    ({**NET, "num_classes": 20}, "num_classes=20, not 15"),
    ({**NET, "in_channels": 3}, "in_channels=3, not 4"),
    ({**NET, "width": 8}, "holds weights of another network: "),
    ({**NET, "blocks": [1, 1, 1, 1], "strides": [1, 2, 2, 1]}, "holds weights of another network: "),
])  # fmt: skip
def test_weights_of_another_network_are_refused(tmp_path, net, message):
    save_network(build_network(net), net, tmp_path / "a.safetensors")
    made = module(init_from=str(tmp_path / "a.safetensors"))
    with pytest.raises(InputError, match=message) as caught:
        trainer(tmp_path, max_steps=1, limit_val_batches=0).fit(made, datamodule=scans(tmp_path))
    assert "\n" not in str(caught.value)


def test_data_of_other_classes_or_channels_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"procshape has 15 classes, the network 10; say model\.net\.num_classes=15"):
        trainer(tmp_path, max_steps=1).fit(module(net={"num_classes": 10}), datamodule=scans(tmp_path))
    with pytest.raises(InputError, match=r"procshape gives 3 feature channels, the network takes 4; say model\.net"):
        trainer(tmp_path, max_steps=1).fit(module(), datamodule=scans(tmp_path, features="xyz"))
    with pytest.raises(InputError, match="15 classes, the network 10"):
        trainer(tmp_path).test(module(net={"num_classes": 10}), datamodule=scans(tmp_path), verbose=False)


# --- Pruning ----------------------------------------------------------------------------------------------------------


def test_pruned_module_comes_back_from_its_checkpoint_with_what_was_pruned(given, tmp_path):
    made = module(init_from=given, prune={**PRUNE, "steps": 2})
    run = trainer(tmp_path, max_epochs=2, limit_val_batches=0, limit_train_batches=1)
    run.fit(made, datamodule=scans(tmp_path))
    run.save_checkpoint(tmp_path / "last.ckpt")
    loaded = PointNetwork.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    assert (loaded.dense_widths, loaded.costs) == (made.dense_widths, made.costs)
    for name, kept in made.kept.items():
        assert torch.equal(loaded.kept[name], kept)
        assert len(kept) == loaded.dense_widths[name] // 2
        layer = loaded.net.get_submodule(name)
        assert len(layer.weight) == len(kept)
        assert torch.equal(loaded.pruned.plan[name], made.pruned.plan[name])
        assert torch.equal(loaded.pruned.scores[name].total, made.pruned.scores[name].total)
    assert [(g.name, g.width, g.producers) for g in loaded.pruned.groups] == [
        (g.name, g.width, g.producers) for g in made.pruned.groups
    ]
    cloud = torch.rand(2, 24, 3), torch.rand(2, 4, 24)
    assert torch.equal(loaded.eval()(*cloud), made.eval()(*cloud))
    assert loaded.costs[1].params == sum(p.numel() for p in loaded.parameters()) < loaded.costs[0].params


def test_channels_kept_in_steps_are_numbered_as_in_the_dense_network(given, tmp_path):
    made = module(STILL, {"min_lr": 0.0}, init_from=given, prune={**PRUNE, "steps": 2})
    trainer(tmp_path, max_epochs=2, limit_val_batches=0, limit_train_batches=1).fit(made, datamodule=scans(tmp_path))
    dense = load_published(given)
    stem, kept = dense.encoder.stem, made.kept["encoder.stem"]
    assert len(kept) == 2
    assert torch.allclose(made.net.encoder.stem.weight, stem.weight[kept], atol=1e-8)
    # by size alone, those of one step
    once = module(init_from=given, prune=PRUNE)
    trainer(tmp_path, max_epochs=1, limit_val_batches=0, limit_train_batches=1).fit(once, datamodule=scans(tmp_path))
    assert kept.tolist() == once.kept["encoder.stem"].tolist()


def test_moments_of_wider_weights_are_forgotten_at_a_step(given, tmp_path):
    seen = []

    class Watched(PointNetwork):
        def on_train_epoch_start(self):
            before = len(self.optimizers().optimizer.state)
            super().on_train_epoch_start()
            seen.append((before, len(self.optimizers().optimizer.state)))

    torch.manual_seed(0)
    made = Watched(
        NET,
        {"lr": 1e-3},
        {"epochs": None, "min_lr": 0.0},
        init_from=given,
        prune={**PRUNE, "steps": 2, "epochs_between": 2},
    )
    trainer(tmp_path, max_epochs=4, limit_val_batches=0, limit_train_batches=1).fit(made, datamodule=scans(tmp_path))
    count = len(list(made.parameters()))
    assert seen == [(0, 0), (count, count), (count, 0), (count, count)]


def test_clouds_of_different_sizes_are_told_from_equal_ones():
    a, b = (torch.zeros(2, n, 3) for n in (8, 9))
    assert same_size([(a, a), (a[:1], a[:1])])
    assert not same_size([(a, a), (b, b)])


# --- Scores -----------------------------------------------------------------------------------------------------------


def test_scores_of_objects_are_those_of_an_independent_computation(tmp_path):
    made, data = module(), scans(tmp_path)
    (found,) = trainer(tmp_path).test(made, datamodule=data, verbose=False)
    label = torch.cat([batch["label"] for batch in data.test_dataloader()]).numpy()
    made.eval()
    with torch.no_grad():
        logits = [made.net(batch["xyz"], batch["features"]) for batch in data.test_dataloader()]
    guess = torch.cat(logits).argmax(1).numpy()
    recalls = [np.mean(guess[label == k] == k) for k in np.unique(label)]
    assert found == pytest.approx({
        "test/procshape/oa": 100 * np.mean(guess == label), "test/procshape/macc": 100 * np.mean(recalls)
    })  # fmt: skip
    assert torch.equal(made.test_outputs["label"], torch.from_numpy(label))
    torch.testing.assert_close(made.test_outputs["probabilities"], torch.cat(logits).softmax(1))


def test_scores_go_by_the_task():
    logits = torch.zeros(1, 3, 4)
    logits[0, 1] = 1
    label = torch.tensor([[1, 1, 0, 1]])
    room = {"logits": logits, "label": label, "index": torch.arange(4)[None], "room": torch.tensor([0]),
            "room_points": torch.tensor([4])}  # fmt: skip
    found = scores_of([room], SimpleNamespace(task="segmentation", num_classes=3))
    assert found["oa"] == 75
    assert found["miou"] == pytest.approx(100 * (0.75 + 0) / 2)
    shape = {"logits": logits, "label": label, "shape": torch.tensor([0])}
    found = scores_of([shape], SimpleNamespace(task="parts", parts_of_shape=[(0, 2)]))
    assert found["instance_miou"] == pytest.approx(100 * (0.75 + 0) / 2)


def test_file_is_wrapped_for_the_test_with_other_options(given, tmp_path):
    made = load_module(given, radius=0.3)
    assert made.hparams.net["radius"] == 0.3
    assert all(
        torch.equal(value, load_published(given).state_dict()[key]) for key, value in made.net.state_dict().items()
    )
    with pytest.raises(InputError, match="no checkpoint"):
        load_module(str(tmp_path / "absent.pth"))
