"""What the module measures beside the scores."""

import pytest
import torch

from projects.fssm.model import SS2D
from projects.fssm.module import StepSizes, SuperResolution


def test_share_of_large_steps_is_counted_over_all_of_z():
    torch.manual_seed(0)
    net = {
        "scale": 2,
        "embed_dim": 12,
        "depths": [1, 1],
        "d_state": 3,
        "expand": 1.2,
        "cab": "depthwise",
        "dt_max": 3.0,
    }
    module = SuperResolution(net, optimizer={}, scheduler={}).eval()
    expected, logged, counter = [], {}, StepSizes()
    module.log = logged.__setitem__

    def materialise(block, args):
        delta, A, _, _ = block.scan_inputs(block.sequences(args[0])[0])
        delta = torch.nn.functional.softplus(delta + block.dt_projs_bias.flatten()[:, None])
        expected.append((delta[..., None] * A[:, None] < -1.5).float().mean())

    hooks = [block.register_forward_pre_hook(materialise) for block in module.modules() if isinstance(block, SS2D)]
    counter.on_test_start(None, module)
    module(torch.rand(1, 3, 5, 7))
    for hook in hooks:
        hook.remove()
    counter.on_test_epoch_end(None, module)
    assert logged["test/z_below_share"] == pytest.approx(torch.stack(expected).mean().item(), abs=1e-6)
    assert 0.05 < logged["test/z_below_share"] < 0.95
    module(torch.rand(1, 3, 5, 7))  # the hooks are gone
    assert counter.total == 2 * 3 * 4 * 14 * 35
