"""An atlas of the user's scans: what is written, what goes on after a kill, every mistake."""

import csv
import gzip
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from scipy import ndimage

from shared.errors import InputError
from shared.io.volumes import make_volume, read_volume, same_grid, write_volume

from .. import inference, predict
from ..checkpoints import save_network
from ..itk import read_displacement
from ..model import build_network
from ..phantom import write_demonstration
from ..scan import common_grid, list_scans, prepare_scan
from ..workspace import Workspace

ROOT = Path(__file__).parents[3]
ARGUMENTS = {"name": "flash_head", "dims": 2, "encoder": [4, 4, 4, 4, 4], "decoder": [4, 4, 4], "num_modes": 7}
# coarse voxels and few iterations: half a second for a cohort
SMALL = (
    "threads=1", "spacing=4", "atlas.prediction_iterations=1", "atlas.coarse_iterations=1", "atlas.iterations=1",
    "atlas.final_iterations=0", "atlas.refine=3", "atlas.batch_size=2", "atlas.exact_reduce=true",
    "deformation.steps=4",
)  # fmt: skip
EVERYTHING = {"warps": True, "warped": True}
LEFT = [
    "atlas.json", "atlas.nii.gz", "atlas_history.csv", "atlas_labels.nii.gz", "atlas_pictures", "atlas_subjects.csv",
]  # fmt: skip
FOLDERS = ["atlas_native", "atlas_warped", "atlas_warps"]


class KilledError(Exception):
    """Stands for the loss of the process."""


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Four slices with labels, but for the last."""
    folder = tmp_path_factory.mktemp("demo")
    write_demonstration(folder, 4, 2)
    (folder / "subject_0003_seg.nii.gz").unlink()
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Untrained networks that predict something, for 2-D and 3-D."""
    made = {}
    for dims in (2, 3):
        torch.manual_seed(0)
        net = build_network({**ARGUMENTS, "dims": dims})
        torch.nn.init.normal_(net.flow.weight, std=0.05)
        made[dims] = tmp_path_factory.mktemp("weights") / f"net{dims}.safetensors"
        save_network(net, {**ARGUMENTS, "dims": dims}, made[dims])
    return made


@pytest.fixture(scope="module")
def kept():
    """Configurations that were composed once, and the atlas that several tests look at."""
    return {}


@pytest.fixture
def configured(composed, kept, demo, weights):
    """Give the configuration of overrides, which are composed once, and of options by name."""

    def make(*overrides, **options):
        if overrides not in kept:
            kept[overrides] = composed("predict", *SMALL, *overrides)
        given = {"input": str(demo)}
        if "prior" not in options:
            given["ckpt_path"] = str(weights[2])
        return OmegaConf.merge(kept[overrides], {**given, **options})

    return make


@pytest.fixture
def made(configured, tmp_path, capsys):
    """Build an atlas in a folder -> (folder, what was said)."""

    def run(folder, *overrides, **options):
        output = tmp_path / folder / "atlas.nii.gz"
        predict.run(configured(*overrides, output=str(output), **options))
        return output.parent, capsys.readouterr().out

    return run


@pytest.fixture
def whole(made, kept, tmp_path_factory):
    """The folder of an atlas with everything beside it, and what was said."""
    if "whole" not in kept:
        kept["whole"] = made(tmp_path_factory.mktemp("whole"), **EVERYTHING)
    return kept["whole"]


def stop(*_):
    raise KilledError


def rows(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def contents(folder):
    """Files that are the same for equal atlases."""
    kept = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix in (".gz", ".png")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in kept} | {
        "subjects": (folder / "atlas_subjects.csv").read_bytes()
    }


def correlation(a, b):
    return np.corrcoef(a.ravel(), b.ravel())[0, 1]


def on_grid(volume, other):
    """Interpolate a slice at the voxels of another."""
    change = np.linalg.inv(volume.affine) @ other.affine
    smooth = ndimage.gaussian_filter(volume.data[..., 0], 1)
    return ndimage.affine_transform(smooth, change[:2, :2], change[:2, 3], other.shape[:2], order=1)


# --- what is written


def test_everything_lies_beside_the_atlas_and_nothing_else(whole, demo):
    folder, said = whole
    assert sorted(path.name for path in folder.iterdir()) == sorted([*LEFT, *FOLDERS])
    pictures = sorted(path.name for path in (folder / "atlas_pictures").iterdir())
    assert pictures == [*(f"iteration_{number:03d}.png" for number in range(4)), "sheet.png"]
    atlas, labels = (read_volume(folder / name) for name in ("atlas.nii.gz", "atlas_labels.nii.gz"))
    assert same_grid(atlas, labels) is None
    assert atlas.spacing[:2] == (4, 4)
    assert (atlas.dtype, labels.dtype) == (np.float32, np.int16)
    assert set(np.unique(labels.data)) <= set(range(7))
    assert 0.2 < (labels.data > 0).mean() < 0.8
    history, subjects = rows(folder / "atlas_history.csv"), rows(folder / "atlas_subjects.csv")
    assert [(row["factor"], row["predicted"]) for row in history] == [
        ("2", "True"), ("2", "False"), ("1", "False"),
    ]  # fmt: skip
    assert [row["subject"] for row in subjects] == [f"subject_{index:04d}" for index in range(4)]
    assert [row["dice"] == "" for row in subjects] == [False, False, False, True]
    facts = json.loads((folder / "atlas.json").read_text())
    assert [scan["id"] for scan in facts["scans"]] == [row["subject"] for row in subjects]
    assert facts["label_counts"] == {str(value): 3 for value in range(7)}
    assert (facts["options"]["spacing"], facts["skipped"]) == (4, {})
    assert facts["grid"]["shape"] == list(atlas.shape[:2])
    assert f"wrote {folder}/atlas.nii.gz of 4 scans" in said
    assert "warning" not in said
    # it looks like what the scans were made of, more than any of them does
    template, found = on_grid(read_volume(demo / "truth" / "template.nii.gz"), atlas), atlas.data[..., 0]
    grid = common_grid(atlas)
    others = [correlation(prepare_scan(scan, grid).image, template) for scan in list_scans(demo)]
    assert correlation(found, template) > max(0.95, *others)


def test_warps_lead_from_scans_to_the_atlas_and_back(whole, demo):
    folder, _ = whole
    names = [f"subject_{index:04d}" for index in range(4)]
    assert sorted(path.name for path in (folder / "atlas_warps").iterdir()) == sorted(
        f"{name}_{kind}.nii.gz" for name in names for kind in ("warp", "invwarp")
    )
    assert len(list((folder / "atlas_warped").iterdir())) == 7
    atlas = read_volume(folder / "atlas.nii.gz")
    for scan, name in zip(list_scans(demo), names, strict=True):
        warped, native = (
            read_volume(folder / f"atlas_{place}.nii.gz") for place in (f"warped/{name}", f"native/{name}_labels")
        )
        assert same_grid(warped, atlas) is None
        # more like the atlas than the scan was where it lay
        before = prepare_scan(scan, common_grid(atlas)).image
        assert correlation(warped.data, atlas.data) > max(0.98, correlation(before, atlas.data[..., 0]) + 0.005)
        source = read_volume(scan.image)
        assert same_grid(native, source) is None
        assert ((native.data > 0) == (source.data > 0)).mean() > 0.95
        # the same by the field: the place that it names for each voxel, in the numbers of the scan
        field = read_displacement(folder / "atlas_warps" / f"{name}_warp.nii.gz")
        mm = np.tensordot(field.affine[:2, :2], np.indices(atlas.shape[:2]), 1) + field.affine[:2, 3, None, None]
        change = np.linalg.inv(source.affine)
        voxels = np.tensordot(change[:2, :2], mm + field.field, 1) + change[:2, 3, None, None]
        carried = ndimage.map_coordinates(source.data[..., 0], voxels, order=1, mode="grid-constant")
        np.testing.assert_allclose(warped.data[..., 0], carried, atol=1e-2)


def test_fields_of_a_finished_atlas_start_another_one_where_it_ended(whole, made):
    folder, _ = whole
    atlas = {"coarse_iterations": 0, "refine": 1}
    options = {"prior": "external", "ckpt_path": None, "displacements": str(folder / "atlas_warps")}
    again, _ = made("again", atlas=atlas, **options)
    assert [row["predicted"] for row in rows(again / "atlas_history.csv")] == ["True", "False"]
    energies, lengths = (
        [np.mean([float(row[name]) for row in rows(path / "atlas_subjects.csv")]) for path in (folder, again)]
        for name in ("energy", "displacement")
    )
    # one step of descent alone finds a sixth of the deformation
    assert energies[1] < 1.3 * energies[0]
    assert lengths[1] == pytest.approx(lengths[0], rel=0.2)
    atlases = [read_volume(path / "atlas.nii.gz").data for path in (folder, again)]
    assert correlation(*atlases) > 0.998


@pytest.mark.parametrize(("overrides", "options"), [
    (("deformation=svf",), {"prior": "none", "affine": "rigid", "norm": "max", "grid": "{demo}", "spacing": None}),
    (("atlas=prediction", "atlas.prediction_iterations=2", "atlas.coarse_iterations=0", "atlas.iterations=0"), {}),
])  # fmt: skip
def test_other_models_loops_and_preparations_work(made, demo, overrides, options):
    given = {**options, "grid": f"{demo}/truth/template.nii.gz"} if "grid" in options else options
    folder, _ = made("out", *overrides, **given)
    history = [(row["factor"], row["predicted"]) for row in rows(folder / "atlas_history.csv")]
    assert history == ([("2", "False"), ("1", "False")] if "grid" in options else [("1", "True")] * 2)
    assert sorted(path.name for path in folder.iterdir()) == LEFT
    if "grid" in options:
        atlas, template = (read_volume(path) for path in (folder / "atlas.nii.gz", given["grid"]))
        assert same_grid(atlas, template) is None
        assert correlation(atlas.data, template.data) > 0.95


def test_one_scan_is_its_own_atlas_without_labels(made, demo, tmp_path):
    (tmp_path / "one").mkdir()
    shutil.copy(demo / "subject_0003.nii.gz", tmp_path / "one" / "only.nii.gz")
    folder, said = made("out", input=str(tmp_path / "one"))
    assert "warning: only is the only scan" in said
    assert not (folder / "atlas_labels.nii.gz").exists()
    atlas = read_volume(folder / "atlas.nii.gz")
    image = prepare_scan(list_scans(tmp_path / "one")[0], common_grid(atlas)).image
    # the ridge of the least squares takes a thousandth off
    np.testing.assert_allclose(1.001 * atlas.data[..., 0], image, atol=1e-3)


def test_a_bad_scan_is_left_out_when_asked_for(made, demo, tmp_path):
    scans = tmp_path / "scans"
    shutil.copytree(demo, scans)
    damaged = scans / "subject_0001.nii.gz"
    damaged.write_bytes(damaged.read_bytes()[:-200])
    folder, said = made("out", input=str(scans), skip_bad=True)
    assert "warning: subject_0001 is left out" in said
    assert "of 3 scans, 1 left out" in said
    assert list(json.loads((folder / "atlas.json").read_text())["skipped"]) == ["subject_0001"]
    assert len(rows(folder / "atlas_subjects.csv")) == 3


@pytest.mark.slow
def test_volumes_make_an_atlas(made, weights, tmp_path):
    write_demonstration(tmp_path / "demo", 2, 3)
    options = {"input": str(tmp_path / "demo"), "ckpt_path": str(weights[3]), "spacing": 6}
    folder, _ = made("out", warps=True, warped=True, **options)
    atlas = read_volume(folder / "atlas.nii.gz")
    for scan in list_scans(tmp_path / "demo"):
        warped, native = (
            read_volume(folder / f"atlas_{kind}.nii.gz") for kind in (f"warped/{scan.id}", f"native/{scan.id}_labels")
        )
        assert correlation(warped.data, atlas.data) > 0.97
        truth = read_volume(scan.labels)
        assert same_grid(native, truth) is None
        assert (native.data == truth.data).mean() > 0.75


# --- interrupted


@pytest.mark.parametrize(("place", "name", "after", "said"), [
    pytest.param(predict, "open_cohort", 0, "", marks=pytest.mark.slow),
    (Workspace, "save_iteration", 1, "1 of 3 iterations are done"),
    pytest.param(predict, "write_history", 0, "3 of 3 iterations are done", marks=pytest.mark.slow),
])  # fmt: skip
def test_a_killed_run_goes_on_to_the_same_bytes(whole, made, tmp_path, monkeypatch, place, name, after, said):
    calls, original = [], getattr(place, name)

    def later(*arguments):
        if len(calls) == after:
            raise KilledError
        calls.append(1)
        return original(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(place, name, later)
        with pytest.raises(KilledError):
            made("cut", **EVERYTHING)
    assert not (tmp_path / "cut" / "atlas.json").exists()
    folder, words = made("cut", **EVERYTHING)
    assert f"going on with what is in {folder}/atlas_work" in words
    assert said in words
    assert contents(folder) == contents(whole[0])
    assert not (folder / "atlas_work").exists()


def test_another_atlas_in_the_work_folder_is_refused_and_restart_drops_it(made, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(predict, "finish", stop)
        with pytest.raises(KilledError):
            made("out")
    with pytest.raises(InputError, match="holds an unfinished atlas of other scans or settings; say restart=true"):
        made("out", clip=99.0)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("")
    for options in ({}, {"restart": True}):
        with pytest.raises(InputError, match=r"mine is no folder of an unfinished atlas; choose another"):
            made("out", work=str(mine), **options)
    assert (mine / "thesis.txt").exists()
    folder, said = made("out", clip=99.0, restart=True, keep_work=True)
    assert "going on" not in said
    assert (folder / "atlas_work" / "cohort.json").is_file()


def test_a_finished_atlas_is_not_built_again_unless_more_or_other_is_asked_for(whole, made, monkeypatch):
    folder, _ = whole
    for options in (EVERYTHING, {}):
        assert made(folder, **options)[1] == f"{folder}/atlas.nii.gz is finished; say restart=true to build it anew\n"
    monkeypatch.setattr(predict, "prepare", stop)
    for options in ({"restart": True}, {"clip": 99.0}):
        with pytest.raises(KilledError):
            made(folder, **options)
    facts = json.loads((folder / "atlas.json").read_text())
    facts["written"]["warps"] = False
    kept = (folder / "atlas.json").read_text()
    (folder / "atlas.json").write_text(json.dumps(facts))
    with pytest.raises(KilledError):
        made(folder, warps=True)
    (folder / "atlas.json").write_text(kept)


def test_an_interruption_says_how_to_go_on(made, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(predict, "finish", interrupt)
    with pytest.raises(SystemExit, match="130"):
        made("out")
    assert capsys.readouterr().err == "interrupted; the same command goes on from here\n"


# --- engines


@pytest.mark.slow
def test_jobs_that_share_a_folder_make_the_bytes_of_one_process(whole, configured, tmp_path):
    jobs = [
        subprocess.Popen([*command(tmp_path / "jobs", configured, **EVERYTHING), *job(number)], cwd=ROOT)
        for number in (1, 0)
    ]
    assert [process.wait(120) for process in jobs] == [0, 0]
    assert contents(tmp_path / "jobs") == contents(whole[0])
    assert sorted(path.name for path in (tmp_path / "jobs").iterdir()) == sorted([*LEFT, *FOLDERS])


def command(folder, configured, **options):
    """The command line of `configured`."""
    config = configured(**options)
    values = {name: config[name] for name in ("input", "ckpt_path", *options)}
    overrides = [f"{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in values.items()]
    entry = [sys.executable, "-m", "projects.hybrid_atlas.predict", *SMALL, f"output={folder}/atlas.nii.gz"]
    return [*entry, *overrides]


def job(number, count=2):
    return ["engine=mapreduce", f"engine.worker={number}", f"engine.num_workers={count}"]


@pytest.mark.slow
def test_processes_of_torch_distributed_make_the_bytes_of_one(whole, configured, tmp_path):
    arguments = [*command(tmp_path / "ddp", configured, **EVERYTHING), "engine=ddp", "engine.processes=2"]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote") == 1
    assert contents(tmp_path / "ddp") == contents(whole[0])
    (tmp_path / "empty").mkdir()
    failed = subprocess.run([*arguments, f"input={tmp_path}/empty"], cwd=ROOT, capture_output=True, text=True)
    assert (failed.returncode, failed.stderr.count("error: ")) == (2, 1)


@pytest.mark.slow
def test_a_job_that_is_killed_and_started_again_ends_with_the_same_bytes(made, configured, tmp_path):
    long = {"atlas": {"iterations": 12, "tolerance": 0.0}}
    single, _ = made("single", **long)
    more = ["atlas.iterations=12", "atlas.tolerance=0"]

    def start(number):
        return subprocess.Popen([*command(tmp_path / "jobs", configured), *more, *job(number)], cwd=ROOT)

    first, second = start(0), start(1)
    state = tmp_path / "jobs" / "atlas_work" / "state"
    while not list(state.glob("atlas_*.safetensors")):
        assert second.poll() is None
        time.sleep(0.005)
    second.kill()
    second.wait()
    assert first.poll() is None
    assert start(1).wait(100) == 0
    assert first.wait(100) == 0
    assert contents(tmp_path / "jobs") == contents(single)


@pytest.mark.slow
def test_a_sigkilled_process_goes_on_to_the_same_bytes(made, configured, tmp_path):
    single, _ = made("single", atlas={"iterations": 12, "tolerance": 0.0})
    arguments = [*command(tmp_path / "cut", configured), "atlas.iterations=12", "atlas.tolerance=0"]
    process = subprocess.Popen(arguments, cwd=ROOT)
    while not list((tmp_path / "cut").glob("atlas_work/state/atlas_0003*")):
        assert process.poll() is None
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert not (tmp_path / "cut" / "atlas.nii.gz").exists()
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert "going on" in done.stdout
    assert contents(tmp_path / "cut") == contents(single)


@pytest.mark.slow
def test_a_job_that_comes_late_finds_the_atlas_finished(made, monkeypatch):
    late = {"engine": {"name": "mapreduce", "worker": 1, "num_workers": 2, "patience": 0.05}}
    first = {"engine": {**late["engine"], "worker": 0}}
    monkeypatch.setattr(predict, "FAREWELL", 0.1)
    folder, said = made("out", "engine=mapreduce", **first)  # does the part of the other, which never came
    assert "wrote" in said
    _, said = made("out", "engine=mapreduce", **late)
    assert said == ""
    assert sorted(path.name for path in folder.iterdir()) == LEFT
    with pytest.raises(InputError, match=r"nothing happens in .*atlas_work for 0.05 s; start the job of engine\.wor"):
        made("other", "engine=mapreduce", **late)


# --- mistakes


def bad_files(folder, demo):
    """Folders of scans that cannot be used, by what is wrong."""
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    good = read_volume(demo / "subject_0000.nii.gz")
    for name in ("empty", "cut", "constant", "nan", "labels", "mixed", "volume", "field"):
        (folder / name).mkdir()
    for name in ("cut", "constant", "nan", "labels", "mixed"):
        shutil.copy(demo / "subject_0000.nii.gz", folder / name / "a.nii.gz")
        shutil.copy(demo / "subject_0002.nii.gz", folder / name / "z.nii.gz")
    content = (demo / "subject_0001.nii.gz").read_bytes()
    (folder / "cut" / "m.nii.gz").write_bytes(content[: len(content) // 2])
    nib.save(nib.Nifti1Image(np.full((20, 20, 1), 7.0), affine), folder / "constant" / "m.nii.gz")
    nib.save(nib.Nifti1Image(np.where(good.data > 100, np.nan, 1.0), good.affine), folder / "nan" / "m.nii.gz")
    shutil.copy(demo / "subject_0001_seg.nii.gz", folder / "labels" / "a_seg.nii.gz")
    random = np.random.default_rng(0).random((20, 22, 18))
    for place in ("mixed/m", "volume/a"):
        write_volume(folder / f"{place}.nii.gz", random, make_volume(random, affine))
    (folder / "field" / "subject_0000_warp.nii.gz").write_bytes(gzip.compress(b""))
    (folder / "list.txt").write_text("a.nii.gz\nabsent.nii.gz\n")
    shutil.copy(demo / "subject_0000.nii.gz", folder / "a.nii.gz")


CASES = [
    ({"input": None}, "say which scans and where to write"),
    ({"output": None}, "say which scans and where to write"),
    ({"input": "absent"}, "no absent; give a folder of scans"),
    ({"input": "{bad}/empty"}, "empty has no volumes"),
    ({"input": "{bad}/list.txt"}, "line 2: no file"),
    ({"input": "{demo}/subject_0000.nii.gz"}, "is one scan; give a folder"),
    ({"input": "{bad}/cut"}, "m.nii.gz is damaged or cut short"),
    ({"input": "{bad}/constant"}, "m.nii.gz is 7 in every voxel"),
    ({"input": "{bad}/nan"}, "m.nii.gz has"),
    ({"input": "{bad}/labels"}, "a_seg.nii.gz is not on the grid of"),
    ({"input": "{bad}/mixed"}, "m.nii.gz is a volume among slices"),
    ({"input": "{bad}/volume"}, "the prior is for 2-D images, the scans are 3-D"),
    ({"layout": "oasis9", "input": "{bad}"}, "no layout 'oasis9'; choose one of oasis_neurite"),
    ({"layout": "oasis_neurite", "input": "{bad}"}, "subjects.txt"),
    ({"layout": "ixi", "input": "{bad}", "prefix": "x"}, "prefix= and suffix= are for lists"),
    ({"split": "train"}, "go with layout="),
    ({"output": "{out}/atlas.png"}, "end the name with .nii.gz or .nii"),
    ({"output": "{demo}/subject_0000.nii.gz"}, "subject_0000.nii.gz would overwrite a file that is read"),
    ({"output": "{demo}/atlas.nii.gz"}, "would lie among the scans"),
    ({"output": "{demo}/subject_0000.nii"}, "would lie among the scans"),
    ({"output": "{bad}/list.txt/atlas.nii.gz"}, "cannot use"),
    ({"grid": "absent.nii.gz", "spacing": None}, "no file absent.nii.gz"),
    ({"grid": "{bad}/volume/a.nii.gz", "spacing": None}, "subject_0000.nii.gz is a slice among volumes"),
    ({"grid": "{bad}/volume/a.nii.gz"}, "gives the spacing too"),
    ({"spacing": -1}, "not above 0"),
    ({"spacing": [2, 2, 2]}, "spacing is one number of mm or 2"),
    ({"affine": "elastic"}, "affine is one of none, rigid, affine"),
    ({"norm": "z"}, "no norm 'z'"),
    ({"margin": -1}, "margin is at least 0"),
    ({"unit_mm": 0}, "unit_mm is above 0"),
    ({"threads": 0}, "threads is at least 1"),
    ({"device": "cuda:99"}, "no device 'cuda:99'"),
    ({"ckpt_path": "absent.safetensors"}, "absent.safetensors"),
    ({"prior": "magic"}, "prior is one of network, none, external"),
    ({"prior": "none", "ckpt_path": "{net}"}, "ckpt_path is of a network"),
    ({"prior": "external", "ckpt_path": None}, "prior=external takes displacements="),
    ({"prior": "external", "ckpt_path": None, "displacements": "absent"}, "no folder absent"),
    ({"prior": "external", "ckpt_path": None, "displacements": "{bad}/field"}, "_0001_warp.nii.gz for subject_0001"),
    ({"displacements": "{bad}/field"}, "displacements= goes with prior=external"),
    ({"atlas": {"update": "median"}}, "atlas.update is one of"),
    ({"atlas": {"iterations": 0, "final_iterations": 0}}, "at least one iteration at full resolution"),
    ({"atlas": {"gradient": "adjoint", "similarity": "ncc"}}, "gradient=adjoint is for"),
    ({"deformation": {"steps": 0}}, "steps is at least 1"),
    ({"engine": {"name": "cluster"}}, "engine is one of single, ddp, mapreduce"),
    ({"engine": {"name": "single", "worker": 1}}, "engine=single takes no options"),
    ({"engine": {"name": "mapreduce", "worker": 2, "num_workers": 2, "patience": 9}}, "engine.worker is 0 to 1"),
    ({"engine": {"name": "mapreduce", "worker": 0, "num_workers": 2, "patience": 0}}, "engine.patience is above 0"),
    (
        {"engine": {"name": "mapreduce", "worker": 0, "num_workers": 2, "patience": 9}, "restart": True},
        "restart=true is not for engine=mapreduce",
    ),
]  # fmt: skip


def test_every_mistake_is_an_error_that_names_it_and_nothing_is_written(configured, demo, weights, tmp_path, capsys):
    folders = {"bad": tmp_path / "bad", "demo": demo, "out": tmp_path / "out", "net": weights[2]}
    folders["bad"].mkdir()
    bad_files(folders["bad"], demo)
    before = sorted(demo.rglob("*"))
    good = {"output": "{out}/atlas.nii.gz"}
    for changes, said in CASES:
        options = {
            name: value.format(**folders) if isinstance(value, str) else value
            for name, value in {**good, **changes}.items()
            if name != "engine"
        }
        config = configured(**options)
        if "engine" in changes:
            OmegaConf.update(config, "engine", changes["engine"], merge=False, force_add=True)
        with pytest.raises(InputError) as error:
            predict.run(config)
        assert said in str(error.value), (changes, str(error.value))
        assert "\n" not in str(error.value)
        left = [path for path in folders["out"].rglob("*") if path.is_file() and "atlas_work" not in path.parts]
        assert not left
        shutil.rmtree(folders["out"], ignore_errors=True)
    assert sorted(demo.rglob("*")) == before
    capsys.readouterr()


def test_a_network_of_no_use_for_the_momentum_stops_at_once(made):
    with pytest.raises(InputError, match="lddmm_momentum has no prior"):
        made("out", "deformation=lddmm_momentum")


def test_missing_shipped_weights_are_named(made, monkeypatch):
    monkeypatch.setattr(inference, "SHIPPED", {2: "absent.safetensors"})
    with pytest.raises(InputError, match=r"absent\.safetensors is missing"):
        made("out", ckpt_path=None)


def test_the_command_line_says_one_line_and_exits_with_2(command_line, demo, weights, tmp_path):
    good = [*SMALL, f"input={demo}", f"ckpt_path={weights[2]}", f"output={tmp_path}/out/atlas.nii.gz"]
    for arguments, said in (
        ([*good, "affine=elastic"], "affine is one of"),
        ([*good, "engine=cluster"], "cluster"),
        ([*good, "engine.worker=1"], "worker"),
        ([*good, "spacings=3"], "spacings"),
    ):
        code, _, error = command_line("predict", *arguments)
        assert code == 2
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert said in error
        assert not (tmp_path / "out").exists()
    code, out, _ = command_line("predict", *good)
    assert code == 0
    assert f"wrote {tmp_path}/out/atlas.nii.gz" in out


def test_help_shows_the_commands(command_line):
    code, out, _ = command_line("predict", "--help")
    assert code == 0
    for words in ("make predict PROJECT=hybrid_atlas INPUT=demo OUTPUT=atlas.nii.gz", "skip_bad=true", "engine=ddp"):
        assert words in out
