import json

import numpy as np
import pytest
from scipy import ndimage

from shared.errors import InputError
from shared.io.volumes import read_volume

from ..itk import places_in_atlas
from ..phantom import ORIENTATIONS, Phantom, main, write_demonstration
from ..scan import common_grid, list_scans, prepare_scan


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    return folder, write_demonstration(folder, 5, 2, seed=1)


def test_a_demonstration_is_a_cohort_with_its_truth(demo):
    folder, files = demo
    assert sorted(path for path in folder.rglob("*") if path.is_file()) == sorted(files)
    scans = list_scans(folder)
    assert [scan.id for scan in scans] == [f"subject_{index:04d}" for index in range(5)]
    volumes = [read_volume(scan.image) for scan in scans]
    assert all(volume.shape[2] == 1 and volume.dtype == np.int16 for volume in volumes)
    assert len({volume.orientation for volume in volumes}) > 1
    assert {volume.orientation for volume in volumes} <= set(ORIENTATIONS[2])
    assert len({volume.spacing for volume in volumes}) > 1
    brightest = [volume.data.max() for volume in volumes]
    assert 350 < min(brightest) < 0.8 * max(brightest)
    truth = json.loads((folder / "truth" / "subjects.json").read_text())
    assert set(truth["matrices"]) == {scan.id for scan in scans}
    assert set(np.unique(read_volume(folder / "truth" / "template_labels.nii.gz").data)) == set(range(7))


def test_a_subject_is_the_template_under_its_truth(demo):
    folder, _ = demo
    phantom = Phantom(5, 2, seed=1)
    scan = list_scans(folder)[3]
    own = common_grid(read_volume(scan.image))
    found = prepare_scan(scan, own)
    matrix = np.array(json.loads((folder / "truth" / "subjects.json").read_text())["matrices"][scan.id])
    u = phantom.cohort.displacement([3])[0].numpy()
    places = places_in_atlas(u, phantom.grid, matrix, own.shape, own.affine)
    template = read_volume(folder / "truth" / "template.nii.gz").data[..., 0]
    expected = ndimage.map_coordinates(template, places, order=1)
    assert np.corrcoef(found.image.ravel(), expected.ravel())[0, 1] > 0.998
    labels = ndimage.map_coordinates(phantom.template.labels, places, order=0)
    assert (labels == found.labels).mean() > 0.999
    # not without its deformation and affine
    still = places_in_atlas(0 * u, phantom.grid, np.eye(4), own.shape, own.affine)
    assert np.corrcoef(found.image.ravel(), ndimage.map_coordinates(template, still, order=1).ravel())[0, 1] < 0.98


def test_equal_seeds_make_equal_files_and_others_do_not(demo, tmp_path):
    files = demo[1]
    for seed, same in ((1, True), (2, False)):
        again = write_demonstration(tmp_path / str(seed), 5, 2, seed)
        assert (again[0].read_bytes() == files[0].read_bytes()) is same


@pytest.mark.slow
def test_volumes_have_permuted_axes(tmp_path):
    write_demonstration(tmp_path, 2, 3)
    volumes = [read_volume(scan.image) for scan in list_scans(tmp_path)]
    assert {volume.orientation for volume in volumes} <= set(ORIENTATIONS[3])
    assert all(min(volume.shape) > 50 for volume in volumes)


def test_the_command_says_what_it_wrote_and_what_is_wrong(tmp_path, capsys):
    assert main([str(tmp_path / "demo"), "--subjects", "1"]) == 0
    said = f"wrote 1 scans with labels to {tmp_path}/demo, their truth to {tmp_path}/demo/truth\n"
    assert capsys.readouterr().out == said
    assert len(list_scans(tmp_path / "demo")) == 1
    for arguments in (["--subjects", "0"], ["--seed", "-1"]):
        assert main([str(tmp_path / "other"), *arguments]) == 2
        assert capsys.readouterr().err.startswith("error: --seed must be 0 or more")
    (tmp_path / "file").write_text("")
    assert main([str(tmp_path / "file")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(InputError, match="dims is 2 or 3"):
        Phantom(1, 4)
