"""What a fault must not do: run code of a file, leave half of one behind, or reach the network."""

import contextlib
import importlib
import io
import os
import pickle
import resource
import shutil
import socket
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from shared import report
from shared.errors import InputError
from shared.experiment import AtomicCheckpoints
from shared.io.checkpoints import save_weights
from shared.io.depth import read_depth
from shared.io.fastmri import write_kspace
from shared.io.files import write_json, write_text
from shared.io.images import write_image
from shared.io.labelled import read_pickle
from shared.io.packed import pack
from shared.io.points import read_points, write_ply
from shared.io.procroom import load_cached as load_rooms
from shared.io.procshape import load_cached as load_objects
from shared.io.shapes import EASY, cached_shape_texture
from shared.io.volumes import make_volume, write_volume
from shared.testing.films import noise, write_film
from shared.testing.project import assert_equal_runs

ROOT = Path(__file__).parents[1]
PROJECTS = sorted(path.parent.name for path in (ROOT / "projects").glob("*/paper.yaml"))
QUIET = ["callbacks.progress=null", "threads=1"]


def run(module: str, *arguments: str, **options: object) -> subprocess.CompletedProcess:
    """Run a command as the shell would."""
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **options)


def assert_one_line(done: subprocess.CompletedProcess, said: str) -> None:
    """Assert that a command said what the user can mend, and nothing besides."""
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert said in done.stderr


# Files that carry code ------------------------------------------------------------------------------------------------


class Evil:
    """An object that makes a file when it is unpickled."""

    def __init__(self, made: Path):
        self.made = made

    def __reduce__(self):
        return Path.touch, (self.made,)


def zipped(content: object, path: Path) -> None:
    torch.save(content, path)


def legacy(content: object, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def bare(content: object, path: Path) -> None:
    path.write_bytes(pickle.dumps(content))


def archived(content: object, path: Path) -> None:
    """An archive as that of CRD's teachers."""
    inner = io.BytesIO()
    torch.save(content, inner)
    with tarfile.open(path, "w") as archive:
        entry = tarfile.TarInfo("models/resnet8_vanilla/ckpt_epoch_240.pth")
        entry.size = len(inner.getvalue())
        archive.addfile(entry, io.BytesIO(inner.getvalue()))


WAYS = {"a.ckpt": zipped, "a.pth": legacy, "a.bin": bare, "a.safetensors": bare, "a.pth.tar": zipped, "a.tar": archived}


def hostile(made: Path) -> dict:
    """What a checkpoint holds, and code besides."""
    return {"state_dict": {"net.weight": torch.ones(2)}, "hyper_parameters": {"net": Evil(made)}, "epoch": 1}


def test_hostile_file_does_make_its_file_when_it_is_trusted(tmp_path):
    zipped(hostile(tmp_path / "made"), tmp_path / "a.ckpt")
    torch.load(tmp_path / "a.ckpt", weights_only=False)
    assert (tmp_path / "made").is_file()


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("project", PROJECTS)
def test_no_project_runs_the_code_of_a_checkpoint(project, name, tmp_path):
    path, made = tmp_path / name, tmp_path / "made"
    WAYS[name](hostile(made), path)
    checkpoints = importlib.import_module(f"projects.{project}.checkpoints")
    options = {"member": "resnet8"} if name == "a.tar" and project in ("sokd", "unikd") else {}
    for read in (checkpoints.load_published, checkpoints.read_network):
        with pytest.raises(InputError, match=rf"{tmp_path}/{name}"):
            read(path, **options)
    assert not made.exists()


@pytest.mark.slow
@pytest.mark.parametrize("project", PROJECTS)
def test_no_command_runs_the_code_of_a_checkpoint(project, tmp_path):
    path, made = tmp_path / "a.ckpt", tmp_path / "made"
    zipped(hostile(made), path)
    out = f"run_dir={tmp_path / 'run'}"
    commands = (
        ("train", "experiment=smoke", *QUIET, f"resume={path}", out),
        ("evaluate", "threads=1", f"ckpt_path={path}", out),
    )
    for entry, *arguments in commands:
        assert_one_line(run(f"projects.{project}.{entry}", *arguments), str(path))
    done = predicted(project, tmp_path, f"ckpt_path={path}")
    assert_one_line(done, str(path))
    assert not made.exists()
    assert not (tmp_path / "run").exists()


def test_no_reader_of_pickles_runs_their_code(tmp_path):
    from projects.fgdcn.triplets import read_plain_pickle as read_keys
    from projects.lg3d.layouts import read_plain_pickle as read_scenes

    path, made = tmp_path / "a.pkl", tmp_path / "made"
    for protocol in range(6):
        path.write_bytes(pickle.dumps({"data": Evil(made), "labels": [0]}, protocol))
        for read in (read_pickle, read_keys, lambda path: read_scenes(path, "get it again")):
            with pytest.raises(InputError, match=rf"{path}"):
                read(path)
    assert not made.exists()


def test_no_reader_of_arrays_runs_the_code_of_their_objects(tmp_path):
    made = tmp_path / "made"
    objects = np.array([[Evil(made)] * 3] * 4, object)
    np.save(tmp_path / "a.npy", objects)
    np.savez(tmp_path / "a.npz", xyz=objects)
    for read, name in ((read_depth, "a.npy"), (read_points, "a.npy"), (read_points, "a.npz")):
        with pytest.raises(InputError, match=rf"{tmp_path}/{name}"):
            read(tmp_path / name)
    cached_shape_texture(EASY, 2, 0, tmp_path / "cache")
    (kept,) = (tmp_path / "cache").iterdir()
    np.savez(kept, images=objects, labels=objects, boxes=objects)
    assert cached_shape_texture(EASY, 2, 0, tmp_path / "cache").images.dtype == np.uint8
    assert not made.exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"state_dict": {}}, "is no checkpoint of a training: it lacks callbacks"),
        pytest.param([1, 2], "holds a list, not a dictionary of weights", marks=pytest.mark.slow),
        pytest.param(None, "is not a checkpoint or is damaged", marks=pytest.mark.slow),
    ],
)
def test_resuming_from_another_file_is_refused_before_a_run_folder_is_made(content, said, tmp_path):
    path = tmp_path / "a.ckpt"
    path.write_bytes(b"damaged") if content is None else torch.save(content, path)
    folder = tmp_path / "run"
    done = run("projects.fssm.train", "experiment=smoke", *QUIET, f"resume={path}", f"run_dir={folder}")
    assert_one_line(done, said)
    assert not folder.exists()


# A disk that is full --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def full_disk(limit: int = 2000):
    """Let the kernel refuse every byte of a file beyond `limit`, as it does when the disk is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


PICTURE = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
VOXELS = np.random.default_rng(0).random((16, 16, 16))
LARGE = {"values": list(range(1000))}
WRITERS = {
    "last.ckpt": lambda path: AtomicCheckpoints().save_checkpoint({"state_dict": {"w": torch.rand(5000)}}, path),
    "w.safetensors": lambda path: save_weights(path, {"w": torch.rand(5000)}, {}),
    "a.png": lambda path: write_image(path, PICTURE),
    "deep.png": lambda path: write_image(path, PICTURE, bit_depth=16),
    "a.jpg": lambda path: write_image(path, PICTURE),
    "a.webp": lambda path: write_image(path, PICTURE),
    "a.tif": lambda path: write_image(path, PICTURE),
    "metrics.csv": lambda path: write_text(path, "epoch,step,val/loss\n" * 500),
    "claims.json": lambda path: write_json(path, LARGE),
    "a.packed": lambda path: pack([("a", np.zeros((64, 64, 3), np.uint8))], path),
    "a.ply": lambda path: write_ply(path, VOXELS.reshape(-1, 4)[:, :3]),
    "a.h5": lambda path: write_kspace(path, VOXELS + 1j),
    "a.nii.gz": lambda path: write_volume(path, VOXELS, make_volume(VOXELS, np.eye(4))),
    "a.mp4": lambda path: write_film(path, noise(24)),
}


@pytest.mark.parametrize("name", WRITERS)
def test_full_disk_keeps_the_older_file_whole_and_leaves_no_half_of_the_new_one(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(b"the older file")
    with (
        full_disk(),
        pytest.raises(InputError, match=rf"cannot write {path}.*(File too large|is the disk full\?)"),
    ):
        WRITERS[name](path)
    assert path.read_bytes() == b"the older file"
    assert list(tmp_path.iterdir()) == [path]
    WRITERS[name](path)
    assert path.read_bytes() != b"the older file"


@pytest.mark.parametrize(
    "load", [lambda folder: load_rooms(folder, 4), lambda folder: load_objects(folder, 4),
             lambda folder: cached_shape_texture(EASY, 4, 0, folder)],
)  # fmt: skip
def test_full_disk_leaves_no_half_of_a_cache(load, tmp_path):
    with full_disk(), pytest.raises(InputError, match="cannot write"):
        load(tmp_path)
    assert not list(tmp_path.iterdir())


def test_report_on_a_full_disk_keeps_the_older_page(tmp_path, monkeypatch, capfd):
    shutil.copytree(ROOT / "projects" / "fssm", tmp_path / "projects" / "fssm", ignore=shutil.ignore_patterns("tests"))
    monkeypatch.chdir(tmp_path)
    page = tmp_path / "report" / "index.html"
    page.parent.mkdir()
    page.write_text("the older page")
    with full_disk():
        assert report.main(["--output", "report"]) == 2
    error = capfd.readouterr().err
    assert error.startswith("error: cannot write ")
    assert error.count("\n") == 1
    assert page.read_text() == "the older page"
    assert not list(page.parent.rglob(".*"))


@pytest.mark.slow
@pytest.mark.parametrize("limit", [500, 20_000])
def test_training_on_a_full_disk_ends_in_one_line_and_resumes_when_there_is_space(limit, tmp_path):
    """The smaller disk has no room for environment.txt, the larger none for a checkpoint."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    arguments = ("projects.fssm.train", "experiment=smoke", *QUIET, "resume=auto")
    assert run(*arguments, f"run_dir={whole}").returncode == 0
    done = run(
        *arguments, f"run_dir={cut}", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    )
    assert_one_line(done, "cannot write ")
    assert not list(cut.rglob(".*"))
    assert not (cut / "metrics.json").exists()
    assert run(*arguments, f"run_dir={cut}").returncode == 0
    assert_equal_runs(cut, whole)


# No network -----------------------------------------------------------------------------------------------------------


def test_tests_are_refused_the_network():
    with pytest.raises(ConnectionRefusedError, match="asked for the network"):
        socket.socket().connect(("192.0.2.1", 80))
    with pytest.raises(socket.gaierror, match="asked for the address"):
        socket.create_connection(("example.org", 80), timeout=1)


# what Python runs first where it is found on PYTHONPATH: whoever asks for the network is noted and refused
WITHOUT_NETWORK = """
import os, socket, traceback

def refused(*arguments, **options):
    with open(os.environ["ASKED"], "a") as file:
        file.write(f"{arguments} {options}\\n" + "".join(traceback.format_stack(limit=8)))
    raise OSError("there is no network")

class Socket(socket.socket):
    def __init__(self, family=-1, *arguments, **options):
        if family in (-1, socket.AF_INET, socket.AF_INET6) and options.get("fileno") is None:
            refused(family, *arguments, **options)
        super().__init__(family, *arguments, **options)

socket.socket = Socket
socket.getaddrinfo = socket.gethostbyname = socket.create_connection = refused
"""


@pytest.fixture
def offline(tmp_path):
    """Run a command without network -> what it did; nobody may have asked for it."""
    folder = tmp_path / "offline"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(WITHOUT_NETWORK)
    asked = folder / "asked.txt"

    def call(module, *arguments):
        done = run(module, *arguments, env=os.environ | {"PYTHONPATH": str(folder), "ASKED": str(asked)})
        assert not asked.exists(), asked.read_text()
        return done

    return call


def test_program_without_network_cannot_ask_for_it(offline, tmp_path):
    with pytest.raises(AssertionError, match="client"):
        offline("timeit", "-n1", "-r1", "__import__('http.client').client.HTTPConnection('example.org').connect()")


def clip(path: Path) -> Path:
    return write_film(path, noise(3))


def scans(folder: Path) -> Path:
    subprocess.run([sys.executable, "-m", "projects.hybrid_atlas.phantom", str(folder)], cwd=ROOT, check=True)
    return folder


def contrasts(folder: Path) -> Path:
    subprocess.run([sys.executable, "-m", "projects.mccdic.phantom", str(folder)], cwd=ROOT, check=True)
    return folder / "t2_undersampled.nii.gz"


def photo(path: Path) -> Path:
    write_image(path, PICTURE[:, :32, :32])
    return path


def cloud(path: Path) -> Path:
    points = np.random.default_rng(0).random((3000, 3))
    write_ply(path, points * (4, 4, 2))
    return path


# what is given to predict, how it is made, what is asked for, further options
PREDICTED = {
    "bvfi": ("in.mkv", clip, "out.mkv", []),
    "cp3": ("in.ply", cloud, "out.csv", []),
    "fgdcn": ("in.mkv", clip, "out.mkv", []),
    "fssm": ("in.png", photo, "out.png", []),
    "hybrid_atlas": ("scans", scans, "atlas.nii.gz", ["spacing=6"]),
    "lg3d": ("in.ply", cloud, "out.json", []),
    "mccdic": ("demo", contrasts, "out.nii.gz", ["reference={folder}/demo/pd.nii.gz"]),
    "mdrn": ("in.png", photo, "out.png", []),
    "sokd": ("in.png", photo, "out.csv", []),
    "unikd": ("in.png", photo, "out.csv", []),
}

# weights that fit the data of evaluate, where those of a smoke run do not
SCORED = {
    project: ROOT / "projects" / project / "weights" / "student_shapes.safetensors" for project in ("sokd", "unikd")
}


def predicted(project: str, folder: Path, *options: str, call=run) -> subprocess.CompletedProcess:
    """Predict a small input of a project."""
    name, make, output, further = PREDICTED[project]
    source = make(folder / name)
    arguments = [f"input={source}", f"output={folder / output}", "threads=1"]
    arguments += [option.format(folder=folder) for option in further]
    return call(f"projects.{project}.predict", *arguments, *options)


@pytest.mark.slow
@pytest.mark.parametrize("project", PROJECTS)
def test_no_command_of_a_project_asks_for_the_network(project, offline, tmp_path):
    folder = tmp_path / "run"
    done = offline(f"projects.{project}.train", "experiment=smoke", *QUIET, f"run_dir={folder}")
    assert done.returncode == 0, done.stderr
    weights = SCORED.get(project, folder / "checkpoints" / "best.ckpt")
    scored = f"run_dir={tmp_path / 'scored'}"
    few = "++trainer.limit_test_batches=1"
    done = offline(f"projects.{project}.evaluate", "threads=1", f"ckpt_path={weights}", scored, few)
    assert done.returncode == 0, done.stderr
    done = predicted(project, tmp_path, call=offline)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / PREDICTED[project][2]).is_file()


def test_check_of_the_report_asks_for_no_network(offline):
    assert offline("shared.report", "--check").returncode in (0, 1)
