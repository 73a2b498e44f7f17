"""What a running atlas keeps, and what it finds again."""

import pytest
import torch

from projects.hybrid_atlas.workspace import Workspace
from shared.errors import InputError


def fill(workspace, iteration, num_shards=3):
    """Write an iteration as an atlas does."""
    for shard in range(num_shards):
        workspace.save_shard(iteration, shard, {"parameter": torch.full((2, 3), 10.0 * iteration + shard)})
    workspace.save_iteration(iteration, {"atlas": torch.full((1, 4), float(iteration))}, {"position": iteration + 1})


def test_what_was_saved_is_found_again(tmp_path):
    first = Workspace(tmp_path / "new" / "folder", "scans and settings")
    assert first.latest() == 0
    assert first.last() is None
    fill(first, 1)
    fill(first, 2)
    found = Workspace(tmp_path / "new" / "folder", "scans and settings")
    assert found.latest() == 2
    saved = found.last()
    assert (saved.iteration, saved.facts["position"]) == (2, 3)
    assert torch.equal(saved.tensors["atlas"], torch.full((1, 4), 2.0))
    assert torch.equal(found.load_shard(2, 1)["parameter"], torch.full((2, 3), 21.0))
    assert torch.equal(found.load_shard(1, 2)["parameter"], torch.full((2, 3), 12.0))


def test_the_folder_does_not_grow_with_the_iterations(tmp_path):
    workspace, sizes = Workspace(tmp_path, "x"), []
    for iteration in range(1, 12):
        fill(workspace, iteration)
        sizes.append(sum(path.stat().st_size for path in tmp_path.iterdir()))
    names = {path.name for path in tmp_path.glob("*.safetensors")}
    assert names == {f"atlas_{i:04d}.safetensors" for i in (10, 11)} | {
        f"shard_{i:04d}_{shard:05d}.safetensors" for i in (10, 11) for shard in range(3)
    }
    assert max(sizes) - sizes[1] < 16  # the iteration's number has a digit more


@pytest.mark.parametrize("iterations", [0, 2])
def test_a_folder_of_another_atlas_is_refused_from_the_start(tmp_path, iterations):
    workspace = Workspace(tmp_path, "sixteen scans")
    for iteration in range(1, iterations + 1):
        fill(workspace, iteration)
    with pytest.raises(InputError, match="holds an atlas of other scans or settings; remove it"):
        Workspace(tmp_path, "seventeen scans")
    Workspace(tmp_path, "sixteen scans")


def test_a_write_that_is_cut_off_leaves_the_iteration_before(tmp_path, monkeypatch):
    workspace = Workspace(tmp_path, "x")
    fill(workspace, 1)

    def cut(path, content):
        path.open("wb").write(content[:10])
        raise KeyboardInterrupt

    monkeypatch.setattr("pathlib.Path.write_bytes", cut)
    with pytest.raises(KeyboardInterrupt):
        workspace.save_iteration(2, {"atlas": torch.zeros(1)}, {"position": 3})
    with pytest.raises(KeyboardInterrupt):
        workspace.save_shard(1, 0, {"parameter": torch.zeros(1)})
    monkeypatch.undo()
    assert Workspace(tmp_path, "x").last().iteration == 1
    assert torch.equal(workspace.load_shard(1, 0)["parameter"], torch.full((2, 3), 10.0))


def test_files_that_cannot_be_read_are_named(tmp_path):
    workspace = Workspace(tmp_path, "x")
    fill(workspace, 1)
    fill(workspace, 2)
    with pytest.raises(InputError, match=r"shard_0003_00000\.safetensors cannot be read .* start anew"):
        workspace.load_shard(3, 0)
    (tmp_path / "shard_0002_00000.safetensors").write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"shard_0002_00000\.safetensors cannot be read"):
        workspace.load_shard(2, 0)
    newest = tmp_path / "atlas_0002.safetensors"
    newest.write_bytes(newest.read_bytes()[:20])
    with pytest.raises(InputError, match=r"atlas_0002.* remove it to go on from the iteration before"):
        workspace.last()
    newest.unlink()
    assert workspace.last().iteration == 1
    assert torch.equal(workspace.load_shard(1, 0)["parameter"], torch.full((2, 3), 10.0))


def test_what_belongs_to_a_computation_is_not_saved(tmp_path):
    workspace = Workspace(tmp_path, "x")
    leaf = torch.ones(4, 6, requires_grad=True)
    workspace.save_shard(1, 0, {"parameter": (2 * leaf).T})
    found = workspace.load_shard(1, 0)["parameter"]
    assert not found.requires_grad
    assert torch.equal(found, torch.full((6, 4), 2.0))
