"""The network without its reference, which a run is shown beside."""

import json
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from projects.mccdic import compare
from shared import recorded
from shared.experiment import config_hash
from shared.recorded import find_recorded

BRIEF = ["trainer.max_steps=5", "model.num_pictures=0"]


@pytest.fixture
def runs(monkeypatch, tmp_path):
    """Let the runs of this machine lie in a folder of the test."""
    for module in (compare, recorded):
        monkeypatch.setattr(module, "RUNS", tmp_path / "runs")
    (tmp_path / "runs" / "mccdic").mkdir(parents=True)
    return tmp_path / "runs" / "mccdic"


def unguided(composed, *overrides):
    return config_hash(composed("train", "experiment=smoke", "callbacks.progress=null", *BRIEF, *overrides))


def test_peer_is_trained_beside_and_found_again_by_its_hash(smoke, composed, runs, monkeypatch):
    record, path = smoke("runs/mccdic/first", *BRIEF, "without_reference=true")
    alone = json.loads((path / "without_reference" / "metrics.json").read_text())
    assert alone["config_hash"] == unguided(composed, "without_reference=true", "model.guided=false")
    peer = record["peers"]["no_reference"]
    assert peer == {name: value for name, value in alone["metrics"].items() if name in record["metrics"]}
    assert peer["test/phantom/psnr"] != record["metrics"]["test/phantom/psnr"]
    assert set(record["metrics"]) - set(peer) == {
        "test/phantom/unique_share", "test/phantom/unique_share_common",
    }  # fmt: skip
    assert json.loads((path / "metrics.json").read_text())["peers"] == record["peers"]
    assert not list((path / "without_reference").glob("without_reference"))
    monkeypatch.setattr(compare, "train", lambda config: pytest.fail("trained again"))
    again, other = smoke("runs/mccdic/second", *BRIEF, "without_reference=true")
    assert again["peers"] == record["peers"]
    assert not (other / "without_reference").exists()


def finished(composed, *overrides):
    """A run's configuration, record and module, without the run."""
    config = composed("train", "experiment=smoke", *BRIEF, "without_reference=true", *overrides)
    record = {"metrics": {"test/phantom/psnr": 25.0}, "peers": {}}
    return config, record, SimpleNamespace(trainer=SimpleNamespace(world_size=1))


def written(runs, name, record):
    (runs / name).mkdir(parents=True)
    (runs / name / "metrics.json").write_text(record if isinstance(record, str) else json.dumps(record))


@pytest.mark.parametrize("place", ["earlier", "earlier/without_reference"])
def test_peer_is_a_run_of_this_machine_that_somebody_made_of_it(composed, runs, tmp_path, place):
    config, record, module = finished(composed)
    fingerprint = config_hash(OmegaConf.merge(config, {"model": {"guided": False}}))
    found = {"config_hash": fingerprint, "seed": 0, "git": None, "device": "a CPU", "seconds": 1.0}
    written(runs, place, found | {"metrics": {"test/phantom/psnr": 23.0, "test/phantom/of_another": 1.0}})
    # neither a damaged record nor one of another configuration is in the way
    folder = "/without_reference" if "/" in place else ""
    written(runs, f"z_damaged{folder}", "{")
    written(runs, f"z_other{folder}", found | {"config_hash": "0", "metrics": {"test/phantom/psnr": 9.0}})
    assert (find_recorded("mccdic", fingerprint) is None) == ("/" in place)
    compare.finish(config, record, module, tmp_path)
    assert record["peers"] == {"no_reference": {"test/phantom/psnr": 23.0}}


@pytest.mark.parametrize("option", ["without_reference=false", "model.guided=false"])
def test_nothing_is_trained_where_it_is_not_wanted_or_known_already(composed, runs, tmp_path, monkeypatch, option):
    monkeypatch.setattr(compare, "train", lambda config: pytest.fail("trained"))
    config, record, module = finished(composed, option)
    compare.finish(config, record, module, tmp_path)
    assert record["peers"] == {}


def test_several_processes_do_not_train_the_peer_and_say_so(composed, runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare, "train", lambda config: pytest.fail("trained"))
    config, record, module = finished(composed)
    module.trainer.world_size = 2
    compare.finish(config, record, module, tmp_path)
    assert record["peers"] == {}
    assert "say model.guided=false" in capsys.readouterr().out


def test_finished_run_keeps_its_configuration(composed, runs, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(compare, "train", lambda config: seen.append(config) or {"metrics": {}})
    config, record, module = finished(composed)
    before = OmegaConf.to_container(config)
    compare.finish(config, record, module, tmp_path)
    assert OmegaConf.to_container(config) == before
    (alone,) = seen
    assert (alone.model.guided, alone.resume, alone.run_dir) == (False, "auto", str(tmp_path / "without_reference"))
