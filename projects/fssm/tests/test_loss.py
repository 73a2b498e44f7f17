"""The loss."""

import torch

from projects.fssm.loss import pixel_loss


def test_pixel_loss_is_the_mean_absolute_difference():
    sr, gt = torch.tensor([[[[0.0, 0.5], [1.0, 0.25]]]]), torch.tensor([[[[1.0, 0.5], [0.5, 0.0]]]])
    assert pixel_loss(sr, gt).item() == (1 + 0 + 0.5 + 0.25) / 4
