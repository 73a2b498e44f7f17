"""Batches by the number of the step: who gets what, that it repeats, and where a resumed run goes on."""

import pickle
from types import SimpleNamespace

import lightning.pytorch as L
import numpy as np
import pytest
import torch

from shared.errors import InputError
from shared.io import sampling
from shared.io.batches import PlainBatches, StepData, TrainingBatches, tensors
from shared.io.sampling import draw_generator


class Numbered:
    """Makes batches that say which samples they are of, and what was drawn for them."""

    def batch(self, index, random):
        drawn = np.zeros(len(index)) if random is None else random.random(len(index))
        return {"index": np.asarray(index), "drawn": drawn}


class Steps(StepData):
    """Ten numbered samples."""

    def __init__(self, batch_size=3, num_workers=0, trainer=None, count=10):
        super().__init__()
        self.batch_size, self.num_workers, self.count = batch_size, num_workers, count
        self.trainer = trainer

    def train_dataloader(self):
        processes = self.trainer.world_size if self.trainer else 1
        return self.step_loader(TrainingBatches(Numbered(), self.count, self.batch_size, 5, processes))

    def val_dataloader(self):
        return self.batch_loader(PlainBatches(Numbered(), np.arange(self.count), 4))


def training(count=10, batch_size=3, seed=5, **options):
    return TrainingBatches(Numbered(), count, batch_size, seed, **options)


def counting(step=0, accumulated=1, processes=1):
    """Stands for a trainer that has taken so many steps."""
    return SimpleNamespace(world_size=processes, accumulate_grad_batches=accumulated, global_step=step)


def indices(batches):
    return [number for batch in batches for number in batch["index"].tolist()]


def same(batches, others):
    return len(batches) == len(others) and all(
        one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
        for one, other in zip(batches, others, strict=True)
    )


# --- Training ---------------------------------------------------------------------------------------------------------


def test_an_epoch_shows_a_sample_at_most_once_and_each_epoch_leaves_out_others():
    plan = training()
    assert len(plan) == 3
    epochs = [indices(plan[3 * epoch + i] for i in range(3)) for epoch in range(20)]
    assert all(len(epoch) == len({*epoch}) == 9 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 20
    assert {number for epoch in epochs for number in epoch} == {*range(10)}
    assert len({frozenset(range(10)) - frozenset(epoch) for epoch in epochs}) > 4


def test_a_batch_is_that_of_seed_and_step_in_whatever_order_they_are_asked_for():
    forwards, backwards = training(), training()
    expected = [forwards[step] for step in range(9)]
    assert same([backwards[step] for step in reversed(range(9))], expected[::-1])
    other = training(seed=6)
    assert all(not torch.equal(other[step]["drawn"], expected[step]["drawn"]) for step in range(9))
    assert indices(other[step] for step in range(9)) != indices(expected)
    for step, batch in enumerate(expected):
        np.testing.assert_array_equal(batch["drawn"], draw_generator(5, step).random(3))


def test_order_of_an_epoch_has_random_numbers_of_its_own():
    # a step's draws must not repeat those that ordered an epoch, not even in epoch 0 and step 0
    plan = training(count=50, batch_size=50)
    for epoch in (0, 1, 7):
        order = plan[epoch]["index"].numpy()
        assert not np.array_equal(order, draw_generator(5, epoch).permutation(50))
        assert sorted(order) == list(range(50))


def test_one_batch_of_all_samples_and_batches_of_one():
    assert len(training(count=3)) == 1
    assert sorted(training(count=3)[0]["index"].tolist()) == [0, 1, 2]
    ones = training(count=3, batch_size=1)
    assert sorted(indices(ones[step] for step in range(3))) == [0, 1, 2]


def test_too_few_samples_are_named():
    with pytest.raises(InputError, match=r"^2 training samples do not fill a batch; set data\.batch_size=3 lower$"):
        training(count=2)
    with pytest.raises(
        InputError, match=r"^5 training rooms do not fill a batch on each of 2 processes; set data\.batch_size=3 lower$"
    ):
        training(count=5, processes=2, of="rooms")
    assert len(training(count=6, processes=2)) == 2


# --- Evaluation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "sizes"), [(9, [4, 4, 1]), (8, [4, 4]), (3, [3]), (0, [])])
def test_plain_batches_come_in_order_and_nothing_is_drawn(count, sizes):
    plan = PlainBatches(Numbered(), np.arange(count) + 7, 4)
    batches = [plan[i] for i in range(len(plan))]
    assert [len(batch["index"]) for batch in batches] == sizes
    assert indices(batches) == list(range(7, 7 + count))
    assert all((batch["drawn"] == 0).all() for batch in batches)


def test_arrays_of_any_layout_become_tensors_of_their_type():
    arrays = {
        "reversed": np.arange(6, dtype=np.float32)[::-1],
        "turned": np.arange(6).reshape(2, 3).T,
        "whole": np.ones((2, 0), np.int64),
    }
    found = tensors(arrays)
    assert found["reversed"].dtype == torch.float32
    assert all(value.is_contiguous() for value in found.values())
    assert all(np.array_equal(found[name], array) for name, array in arrays.items())


# --- Loaders ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("accumulated", "steps_per_epoch"), [(1, 5), (2, 3), (4, 2), (20, 1)])
def test_loader_goes_on_from_the_steps_taken(accumulated, steps_per_epoch):
    plan = training(batch_size=2)
    data = Steps(2, trainer=counting(accumulated=accumulated))
    loader = data.train_dataloader()
    assert len(loader) == 5
    assert same(list(loader), [plan[i] for i in range(5)])
    # the last step of an epoch accumulates what is left of it
    data.trainer.global_step = 2 * steps_per_epoch
    assert same(list(loader), [plan[i] for i in range(10, 15)])
    resumed = Steps(2, trainer=counting(accumulated=accumulated))
    resumed.load_state_dict(data.state_dict())  # before its trainer counts on
    assert same(list(resumed.train_dataloader()), [plan[i] for i in range(10, 15)])
    resumed.trainer.global_step = 3 * steps_per_epoch
    assert same(list(resumed.train_dataloader()), [plan[i] for i in range(15, 20)])


def test_loader_goes_on_within_an_epoch():
    plan, data = training(batch_size=2), Steps(2, trainer=counting(step=7))
    assert same(list(data.train_dataloader()), [plan[i] for i in range(7, 12)])


def test_without_a_trainer_the_first_epoch_is_loaded():
    plan = training()
    assert same(list(Steps().train_dataloader()), [plan[i] for i in range(3)])


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5])
def test_processes_share_an_epoch_evenly(batch_size, monkeypatch):
    seen = []
    for rank in range(2):
        monkeypatch.setattr(sampling, "_rank", lambda rank=rank: (rank, 2))
        loader = Steps(batch_size, trainer=counting(processes=2)).train_dataloader()
        batches = list(loader)
        assert len(batches) == len(loader) == 10 // (2 * batch_size)
        seen.append(indices(batches))
    assert len({*seen[0], *seen[1]}) == len(seen[0] + seen[1]) == 10 // (2 * batch_size) * 2 * batch_size


def test_loading_draws_nothing_from_torchs_random_numbers():
    # a resumed run makes one iterator fewer than the uninterrupted one
    data = Steps()
    before = torch.get_rng_state()
    for loader in (data.train_dataloader(), data.val_dataloader()):
        list(loader)
    assert torch.equal(torch.get_rng_state(), before)


def test_workers_change_nothing_and_stay_for_the_next_epoch():
    alone, helped = (Steps(num_workers=workers) for workers in (0, 2))
    assert same(list(alone.train_dataloader()), list(helped.train_dataloader()))
    assert same(list(alone.val_dataloader()), list(helped.val_dataloader()))
    assert helped.train_dataloader().persistent_workers
    assert not helped.val_dataloader().persistent_workers
    assert not alone.train_dataloader().persistent_workers


def test_spawned_workers_can_be_handed_the_batches():
    for plan in (training(), PlainBatches(Numbered(), np.arange(9), 4)):
        handed = pickle.loads(pickle.dumps(plan))
        assert len(handed) == len(plan)
        assert same([handed[1]], [plan[1]])


class Recorder(L.LightningModule):
    """Learns one number from what it sees, and writes down what that was."""

    def __init__(self):
        super().__init__()
        self.weight, self.seen = torch.nn.Parameter(torch.zeros(())), []

    def training_step(self, batch, _):
        self.seen.append((batch["index"].tolist(), batch["drawn"].tolist()))
        return (self.weight - batch["drawn"].float().mean()).square()

    def validation_step(self, batch, _):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fitted(data, epochs, folder, ckpt_path=None, **options):
    module = Recorder()
    trainer = L.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, use_distributed_sampler=False, enable_checkpointing=False, **options,
    )  # fmt: skip
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return trainer, module


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("num_workers", "accumulated"), [(0, 1), (0, 2), (2, 1)])
def test_resumed_training_sees_what_the_uninterrupted_one_saw(tmp_path, num_workers, accumulated):
    options = {"accumulate_grad_batches": accumulated}
    _, whole = fitted(Steps(num_workers=num_workers), 3, tmp_path, **options)
    trainer, cut = fitted(Steps(num_workers=num_workers), 2, tmp_path, **options)
    trainer.save_checkpoint(tmp_path / "cut.ckpt")
    _, resumed = fitted(Steps(num_workers=num_workers), 3, tmp_path, tmp_path / "cut.ckpt", **options)
    plan = training()
    assert whole.seen == [(plan[i]["index"].tolist(), plan[i]["drawn"].tolist()) for i in range(9)]
    assert cut.seen + resumed.seen == whole.seen
    assert torch.equal(resumed.weight, whole.weight)
