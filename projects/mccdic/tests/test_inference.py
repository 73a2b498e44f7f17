"""Arrays through networks: shapes, units, slices one by one, every mistake."""

import numpy as np
import pytest
import torch

from shared.errors import InputError

from .. import inference
from ..checkpoints import save_network
from ..inference import intensity, load_restorer, restore, restore_array, shipped_weights
from ..networks import build_network

ARGUMENTS = {"name": "mccdic", "widths": [6, 4, 4], "features": 4, "stages": 2, "blocks": [1, 1, 1], "attention": False}


def network(**options):
    torch.manual_seed(0)
    return build_network({**ARGUMENTS, **options}).eval()


@pytest.fixture
def weights(tmp_path):
    def save(**options):
        path = tmp_path / "weights.safetensors"
        save_network(network(**options), {**ARGUMENTS, **options}, path)
        return path

    return save


def slices(count=3, references=1, size=(16, 20)):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(count, *size, generator=generator), torch.rand(count, references, *size, generator=generator)


def test_a_batch_of_slices_is_restored_as_each_alone(weights):
    net = load_restorer(weights())
    target, references = slices(5)
    done = []
    found = restore(net, target, references, batch_size=2, progress=lambda *counts: done.append(counts))
    assert done == [(2, 5), (4, 5), (5, 5)]
    for index in range(5):
        alone = restore(net, target[index, None], references[index, None])[0]
        np.testing.assert_allclose(found[index], alone, atol=1e-5)
    expected = network()(target[:, None], references).target[:, 0].detach()
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert not net.training
    assert not any(parameter.requires_grad for parameter in net.parameters())


def test_empty_slices_stay_empty_whatever_the_reference_shows(weights):
    net = load_restorer(weights())
    target, references = slices()
    target[1] = 0
    found = restore(net, target, references, batch_size=3)
    assert not found[1].any()
    assert found[0].any()
    assert found[2].any()


@pytest.mark.parametrize("shape", [(16, 20), (3, 16, 20)])
@pytest.mark.parametrize("units", [1e-6, 1, 3000])
def test_arrays_keep_shape_and_units(weights, shape, units):
    path, rng = weights(), np.random.default_rng(0)
    target, reference = rng.random(shape), rng.random(shape)
    found = restore_array(target * units, reference * 7, ckpt_path=path)
    assert found.shape == shape
    assert found.dtype == np.float32
    assert found.min() >= 0
    np.testing.assert_allclose(found / units, restore_array(target, reference, ckpt_path=path), rtol=1e-4, atol=1e-5)


def test_one_stands_for_the_99_9th_percentile_of_what_is_not_zero():
    volume = np.zeros((2, 100, 100))
    volume[0, :, :50].flat = np.arange(1, 5001)
    assert intensity(volume, "target") == pytest.approx(1 + 0.999 * 4999)
    volume[1, 0, 0] = 1e9  # a bright outlier changes nothing much
    assert intensity(volume, "target") == pytest.approx(4996, rel=1e-3)


def test_shipped_weights_are_named_by_task(tmp_path, monkeypatch):
    monkeypatch.setattr(inference, "__file__", str(tmp_path / "inference.py"))
    with pytest.raises(InputError, match=r"mccdic_tiny_rec8[.]safetensors is missing; reinstall"):
        shipped_weights("rec8")
    with pytest.raises(InputError, match="no shipped weights for task=joint4; choose one of rec4, rec8, sr2, sr4"):
        shipped_weights("joint4")
    (tmp_path / "weights").mkdir()
    save_network(network(), ARGUMENTS, tmp_path / "weights" / "mccdic_tiny_rec4.safetensors")
    assert shipped_weights("rec4").is_file()
    assert restore_array(*(side[:, 0] for side in (slices()[1], slices()[1]))).shape == (3, 16, 20)


TARGET, REFERENCES = slices()


@pytest.mark.parametrize(
    ("target", "references", "said"),
    [
        (TARGET[0], REFERENCES, r"needs slices \(N, H, W\) and \(N, R, H, W\)"),
        (TARGET[:2], REFERENCES, r"needs slices"),
        (TARGET[..., :-1], REFERENCES, "differ in size, 16x19 and 16x20"),
        (TARGET, REFERENCES.expand(-1, 2, -1, -1), "takes 1 references, 2 were given"),
        (TARGET[..., :7], REFERENCES[..., :7], "slices of 16x7 pixels are too small"),
        (TARGET / 0, REFERENCES, "the target holds values that are NaN"),
        (TARGET, REFERENCES * torch.nan, "the reference holds values that are NaN"),
    ],
)
def test_slices_that_cannot_be_restored_are_refused(target, references, said):
    with pytest.raises(InputError, match=said):
        restore(network(), target, references)


@pytest.mark.parametrize(
    ("target", "reference", "said"),
    [
        (np.ones((4, 4, 4, 4)), np.ones((4, 4, 4, 4)), "needs two arrays"),
        (np.ones((8, 8)), np.ones((8, 9)), "needs two arrays"),
        (np.zeros((8, 8)), np.ones((8, 8)), "the target is zero everywhere"),
        (np.ones((8, 8)), -np.ones((8, 8)), "the reference holds negative values; give magnitudes"),
        (np.full((8, 8), np.nan), np.ones((8, 8)), "the target holds 64 values that are NaN"),
    ],
)
def test_arrays_that_cannot_be_restored_are_refused(weights, target, reference, said):
    with pytest.raises(InputError, match=said):
        restore_array(target, reference, ckpt_path=weights())


def test_networks_with_data_consistency_are_refused(weights):
    with pytest.raises(InputError, match="data consistency"):
        load_restorer(weights(consistency="hard"))
