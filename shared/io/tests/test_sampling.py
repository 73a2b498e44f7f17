"""The order of draws."""

import numpy as np
import torch
import torch.distributed

from shared.io.sampling import DrawSampler, dihedral, draw_generator, draw_loader, to_tensor


def test_epoch_numbers_its_draws_from_where_the_training_stands():
    step = 0
    sampler = DrawSampler(5, lambda: 5 * step)
    assert (list(sampler), len(sampler)) == ([0, 1, 2, 3, 4], 5)
    step = 3
    assert list(sampler) == [15, 16, 17, 18, 19]


def test_processes_share_an_epoch(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    draws = []
    for rank in range(2):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        sampler = DrawSampler(6, lambda: 6)
        assert len(sampler) == 3
        draws.append(list(sampler))
    assert draws == [[6, 8, 10], [7, 9, 11]]


def test_loader_draws_nothing_from_the_generator_that_the_network_draws_from():
    loader = draw_loader(range(6), batch_size=2, steps_per_epoch=3, num_workers=0, trainer=None)
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    assert [batch.tolist() for batch in loader] == [[0, 1], [2, 3], [4, 5]]
    assert torch.rand(1) == expected


def test_generator_is_a_function_of_seed_and_draw():
    a, b, c = (draw_generator(*key).random() for key in ((0, 1), (0, 1), (1, 0)))
    assert a == b != c


def test_dihedral_makes_all_eight_symmetries():
    image = np.arange(27).reshape(3, 3, 3)
    turned = {dihedral(image, np.array(f, bool)).tobytes() for f in np.ndindex(2, 2, 2)}
    assert len(turned) == 8


def test_picture_becomes_a_tensor_that_may_be_written_to():
    image = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    image.flags.writeable = False
    tensor = to_tensor(image)
    assert (tensor.shape, tensor[2, 1, 3].item()) == ((3, 2, 4), torch.tensor(23 / 255).item())
    tensor += 1  # a copy
