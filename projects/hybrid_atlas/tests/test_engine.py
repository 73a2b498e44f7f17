"""Sums over subjects, by one process, by several, by jobs that share a folder."""

import threading

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file

from projects.hybrid_atlas.engine import Distributed, MapReduce, OvertakenError, Single, Sums, shards_of
from shared.errors import InputError

COUNT = 23


def values(index):
    """What a subject adds: of many sizes, so that the order of additions shows."""
    random = torch.Generator().manual_seed(index)
    return 10 ** (4 * torch.rand(1, 5, 6, generator=random) - 2) * torch.randn(1, 5, 6, generator=random)


def work_of(shards, exact, done=None):
    def work(shard):
        sums = Sums(exact)
        for index in shards[shard]:
            sums.add("image", values(index))
            sums.add("energy", values(index).flatten()[:1])
        if done is not None:
            done.append(shard)
        return sums

    return work


def single(exact, size=4):
    shards = shards_of(COUNT, size)
    return Single().run("step", range(len(shards)), work_of(shards, exact))


def same_bits(a, b):
    assert a.values.keys() == b.values.keys()
    for name, value in a.values.items():
        assert torch.equal(value, b.values[name]), name


# --- Sums -------------------------------------------------------------------------------------------------------------


def test_exact_sums_do_not_depend_on_order_or_shards():
    wanted = single(exact=True, size=COUNT)
    for size in (1, 4, 7):
        same_bits(single(exact=True, size=size), wanted)
    for seed in range(3):
        order = torch.randperm(COUNT, generator=torch.Generator().manual_seed(seed)).tolist()
        sums = Sums(True)
        for index in order:
            sums.add("image", values(index))
            sums.add("energy", values(index).flatten()[:1])
        same_bits(sums, wanted)
    plain = [single(exact=False, size=size)["image"] for size in (1, 4, COUNT)]
    assert any(not torch.equal(plain[0], other) for other in plain[1:])  # or nothing was shown


def test_exact_sums_are_the_sums_to_their_unit():
    wanted = sum(values(index).double() for index in range(COUNT))
    found = single(exact=True)
    assert found.values["image"].dtype == torch.int64
    assert found["image"].dtype == torch.float32
    assert (found["image"] - wanted).abs().max() < COUNT * 2**-24 + 1e-6 * wanted.abs().max()
    assert found.total("energy") == pytest.approx(float(wanted.flatten()[0]), abs=1e-5)
    torch.testing.assert_close(single(exact=False)["image"].double(), wanted[0], rtol=1e-4, atol=1e-4)
    assert single(exact=False).total("energy") == pytest.approx(float(wanted.flatten()[0]), rel=1e-4)


def test_large_cohorts_fit_into_exact_sums():
    sums = Sums(True)
    for _ in range(10):
        sums.merge({"energy": (torch.tensor([4e6 * 1000]).double() * 2**24).to(torch.int64).sum()})  # 1000 volumes
    assert sums.total("energy") == pytest.approx(4e10)


def test_sums_go_to_the_device_that_goes_on_with_them():
    sums = single(exact=True).to(torch.device("meta"))
    assert {value.device.type for value in sums.values.values()} == {"meta"}


def test_shards_cut_subjects_in_order():
    assert [list(shard) for shard in shards_of(7, 3)] == [[0, 1, 2], [3, 4, 5], [6]]
    assert shards_of(4, 16) == [range(4)]


# --- Jobs that share a folder ----------------------------------------------------------------------------------------


def in_threads(folder, num_workers, exact=True, size=4, patience=30.0, steps=("refine", "update")):
    """Run workers of a MapReduce at once; give their sums and which shards each did."""
    shards = shards_of(COUNT, size)
    results, done, failures = {}, {worker: [] for worker in range(num_workers)}, []

    def go(worker):
        try:
            engine = MapReduce(folder, worker, num_workers, patience, lambda: 0)
            engine.iteration = 1
            work = work_of(shards, exact, done[worker])
            results[worker] = [engine.run(step, range(len(shards)), work) for step in steps]
        except BaseException as error:  # a thread would hide it
            failures.append(error)

    threads = [threading.Thread(target=go, args=(worker,)) for worker in range(num_workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    return results, done


@pytest.mark.parametrize("num_workers", [1, 2, 3])
@pytest.mark.parametrize("exact", [True, False])
def test_jobs_that_share_a_folder_give_the_bits_of_one_process(tmp_path, num_workers, exact):
    results, done = in_threads(tmp_path, num_workers, exact)
    for sums in results.values():
        for found in sums:
            same_bits(found, single(exact))
    assert sorted(shard for part in done.values() for shard in part) == sorted(2 * list(range(6)))
    assert done[0][: len(done[0]) // 2] == list(range(0, 6, num_workers))
    assert sorted(path.name for path in tmp_path.iterdir())[0] == "0001_refine_00000.safetensors"
    assert len(list(tmp_path.iterdir())) == 12


def test_more_jobs_than_shards_do_no_harm(tmp_path):
    results, done = in_threads(tmp_path, 3, size=COUNT)
    assert [len(done[worker]) for worker in range(3)] == [2, 0, 0]
    same_bits(results[2][0], single(True, COUNT))


def test_the_shards_of_a_dead_job_are_done_by_another_after_patience(tmp_path, capsys):
    shards, done = shards_of(COUNT, 4), []
    engine = MapReduce(tmp_path, 1, 3, 0.2, lambda: 0)
    found = engine.run("mean", range(6), work_of(shards, True, done))
    same_bits(found, single(True))
    assert done[:2] == [1, 4]
    assert sorted(done) == list(range(6))
    assert "worker 1: mean of shard 0 is missing, doing it here" in capsys.readouterr().out


def test_a_job_that_starts_again_does_not_repeat_what_is_there(tmp_path):
    shards, done = shards_of(COUNT, 4), []
    in_threads(tmp_path, 2, steps=("refine",))
    engine = MapReduce(tmp_path, 0, 2, 30.0, lambda: 0)
    engine.iteration = 1
    same_bits(engine.run("refine", range(6), work_of(shards, True, done)), single(True))
    assert not done


def test_a_killed_job_leaves_no_half_written_sums(tmp_path):
    shards = shards_of(COUNT, 4)
    engine = MapReduce(tmp_path, 0, 1, 30.0, lambda: 0)

    def killed(shard):
        if shard == 2:
            raise KeyboardInterrupt
        return work_of(shards, True)(shard)

    with pytest.raises(KeyboardInterrupt):
        engine.run("mean", range(6), killed)
    assert len(list(tmp_path.iterdir())) == 2
    same_bits(engine.run("mean", range(6), work_of(shards, True)), single(True))


def test_a_job_that_the_others_have_overtaken_learns_it(tmp_path):
    shards, latest = shards_of(COUNT, 4), [3]
    engine = MapReduce(tmp_path, 1, 2, 30.0, lambda: latest[0])
    engine.iteration = 2
    with pytest.raises(OvertakenError):
        engine.run("refine", range(6), work_of(shards, True))  # those of worker 0 are gone
    # what it starts from may be gone too, while it works
    engine = MapReduce(tmp_path, 0, 2, 30.0, lambda: latest[0])

    def gone(shard):
        raise InputError("shard_0001_00000.safetensors cannot be read")

    engine.iteration = 2
    with pytest.raises(OvertakenError):
        engine.run("update", range(6), gone)
    latest[0] = 2
    with pytest.raises(InputError, match="cannot be read"):
        engine.run("update", range(6), gone)


def test_sums_that_cannot_be_read_are_named(tmp_path):
    in_threads(tmp_path, 1, steps=("refine",))
    (tmp_path / "0001_refine_00003.safetensors").write_bytes(b"nothing")
    engine = MapReduce(tmp_path, 0, 1, 30.0, lambda: 0)
    engine.iteration = 1
    with pytest.raises(InputError, match=r"0001_refine_00003.safetensors cannot be read .*remove it and start again"):
        engine.run("refine", range(6), work_of(shards_of(COUNT, 4), True))


def test_the_folder_does_not_grow_with_the_iterations(tmp_path):
    shards, sizes = shards_of(COUNT, 4), []
    engine = MapReduce(tmp_path, 0, 1, 30.0, lambda: engine.iteration)
    for iteration in range(1, 8):
        engine.iteration = iteration
        engine.run("refine", range(6), work_of(shards, True))
        engine.committed(iteration)
        sizes.append(len(list(tmp_path.iterdir())))
    assert max(sizes) == 12  # this iteration, and the one before, which a slow job may still read
    assert {path.name[:4] for path in tmp_path.iterdir()} == {"0006", "0007"}
    # what a slow job wrote after all goes as well
    late = tmp_path / "0002_refine_00000.safetensors"
    late.write_bytes((tmp_path / "0007_refine_00000.safetensors").read_bytes())
    other = MapReduce(tmp_path, 1, 2, 30.0, lambda: 8)
    other.committed(8)
    assert late.is_file()
    engine.committed(8)
    assert {path.name[:4] for path in tmp_path.iterdir()} == {"0007"}
    assert load_file(tmp_path / "0007_refine_00000.safetensors").keys() == {"image", "energy"}


def test_workers_that_are_none_are_refused(tmp_path):
    for worker in (-1, 2):
        with pytest.raises(InputError, match=r"engine\.worker is 0 to 1 of engine\.num_workers=2"):
            MapReduce(tmp_path, worker, 2, 30.0, lambda: 0)


# --- Processes of torch.distributed ----------------------------------------------------------------------------------


def distributed_process(rank, folder, exact, size):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    shards, done = shards_of(COUNT, size), []
    engine = Distributed()
    sums = engine.run("step", range(len(shards)), work_of(shards, exact, done))
    engine.committed(1)
    torch.save({"values": sums.values, "exact": sums.exact, "done": done, "first": engine.is_first},
               f"{folder}/{rank}.pt")  # fmt: skip
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize(("exact", "size"), [(True, 4), (False, 4), (True, COUNT)])
def test_two_processes_give_the_sums_of_one(tmp_path, exact, size):
    mp.spawn(distributed_process, (tmp_path, exact, size), nprocs=2)
    wanted = single(exact, size)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert found["first"] == (rank == 0)
        assert found["exact"] == exact
        assert found["done"] == list(range(len(shards_of(COUNT, size))))[rank::2]
        for name, value in wanted.values.items():
            if exact:
                assert torch.equal(found["values"][name], value)
            else:
                torch.testing.assert_close(found["values"][name], value, rtol=1e-4, atol=1e-4)


def test_processes_that_nobody_started_are_refused():
    with pytest.raises(InputError, match="start it with torchrun"):
        Distributed()
