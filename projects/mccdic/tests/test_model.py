"""The network: its size, what its switches do, and what its design promises."""

import copy
import functools
import itertools
import json

import pytest
import torch
from torch import nn

from projects.mccdic.dictionary import largest_eigenvalue
from projects.mccdic.model import INITIALISATIONS, PROXES, STEPS, MCCDic
from shared.errors import InputError

BASE = {"widths": [128, 96, 64], "features": 64, "stages": 5, "blocks": [1, 3, 5]}
SIZED = {
    "base": (BASE, 9_537_484),
    "small": (
        {"widths": [64, 48, 32], "features": 32, "stages": 5, "blocks": [1, 2, 3], "skip": True, "zero_heads": True},
        2_149_602,
    ),
    "tiny": (
        {
            "widths": [32, 24, 16], "features": 16, "stages": 4, "blocks": [1, 1, 2], "attention": False, "skip": True,
            "zero_heads": True,
        },
        491_402,
    ),
}  # fmt: skip
SMALL = {"widths": [8, 6, 4], "features": 5, "stages": 3, "blocks": [1, 2, 1]}
VARIANTS = [
    {}, {"attention": False, "skip": True}, {"prox": "soft"}, {"tie": True}, {"tie": True, "prox": "soft"},
    {"num_references": 2}, {"consistency": "soft"}, {"consistency": "hard"}, {"common": False},
    {"common": False, "prox": "soft", "tie": True}, {"steps": "constant"}, {"steps": "constant", "prox": "soft"},
    {"initialisation": "published"}, {"recompute": True}, {"widths": [6], "blocks": [2]}, {"stages": 2},
]  # fmt: skip
# (name, values): every choice of a switch by name
CHOICES = {"prox": PROXES, "steps": STEPS, "initialisation": INITIALISATIONS, "consistency": ("none", "hard", "soft")}


def label(arguments):
    return "-".join(f"{name}={value}" for name, value in arguments.items()) or "default"


def count(module):
    return sum(p.numel() for p in module.parameters())


@functools.cache
def built(arguments):
    torch.manual_seed(0)
    return MCCDic(**json.loads(arguments))


def small(dtype=torch.float32, **arguments):
    # most of the time of a small network goes into the eigenvalues that it begins with
    return copy.deepcopy(built(json.dumps({**SMALL, **arguments}))).to(dtype)


def noisy(net):
    """Move every parameter a little, so that each counts and no rectifier of the attention is shut."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter), alpha=0.02)
            if name.endswith("squeeze.bias"):
                parameter.fill_(1.0)
    return net


def images(height=15, width=14, num_references=1, dtype=torch.float32, batch=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    made = torch.rand(batch, 1 + num_references, height, width, dtype=dtype, generator=generator)
    return made[:, :1], made[:, 1:]


def run(net, *inputs):
    """Run a network, with samples of the target where it asks for them."""
    if net.consistency is None:
        return net(*inputs)
    mask = torch.zeros(inputs[0].shape, dtype=torch.bool)
    mask[..., 5:9] = True
    return net(*inputs, torch.ones(inputs[0].shape, dtype=torch.complex64) * mask, mask)


# --- size ---


@pytest.mark.parametrize("name", SIZED)
def test_parameters_are_those_of_the_derivation(name):
    arguments, expected = SIZED[name]
    with torch.device("meta"):
        net = MCCDic(**arguments)
    extra = sum(p.numel() for key, p in net.named_parameters() if "raw_steps" in key or "thresholds" in key)
    assert extra == 3 * (arguments["stages"] + sum(arguments["widths"]))
    assert count(net) - extra == expected


def test_parameters_in_all_are_those_of_the_configurations():
    totals = {"base": 9_538_363, "small": 2_150_049, "tiny": 491_630}
    with torch.device("meta"):
        assert {name: count(MCCDic(**arguments)) for name, (arguments, _) in SIZED.items()} == totals


def test_parts_of_the_published_network_have_their_parameters():
    with torch.device("meta"):
        net = MCCDic(**BASE)
    coders = [*net.unique, net.common]
    dictionaries = [
        *(part for coder in coders for part in (coder.synthesis, coder.preconditioned)), *net.reconstruction,
        *net.explained, net.render_common,
    ]  # fmt: skip
    assert len(dictionaries) == 11
    assert sum(count(part) for part in dictionaries) == 5_109_888
    assert [count(coder.prox) for coder in coders] == [1_439_086] * 3
    rest = [*net.lift, net.lift_common, net.compress, *net.fuse, *net.render]
    assert sum(count(part) for part in rest) == 110_338


def test_another_stage_costs_the_fusion_alone():
    with torch.device("meta"):
        counts = [count(MCCDic(**{**BASE, "stages": stages})) for stages in (5, 6)]
    assert counts[1] - counts[0] == 8_192 + 3  # and a step size for each code


# --- shapes and layouts ---


@pytest.mark.parametrize("size", range(60, 65))
@pytest.mark.parametrize("arguments", [{}, {"widths": [6], "blocks": [1]}], ids=label)
def test_output_has_the_shape_of_the_input(size, arguments):
    net = small(stages=2, **arguments).eval()
    with torch.no_grad():
        found = net(*images(size, 124 - size, batch=1))
    assert found.target.shape == found.references.shape == (1, 1, size, 124 - size)
    assert found.common.shape == found.unique.shape == (1, 2, size, 124 - size)


@pytest.mark.parametrize("arguments", VARIANTS, ids=label)
def test_parts_add_up_and_a_batch_is_its_images_one_by_one(arguments):
    net = small(**arguments)
    target, references = images(num_references=net.num_references)
    found = run(net, target, references)
    together = torch.cat([target, references], 1) + found.common + found.unique
    torch.testing.assert_close(found.references, together[:, 1:])
    if net.consistency is None:
        torch.testing.assert_close(found.target, together[:, :1])
    alone = [run(net, target[i : i + 1], references[i : i + 1]) for i in range(2)]
    for name in ("target", "references", "common", "unique"):
        one_by_one = torch.cat([getattr(part, name) for part in alone])
        torch.testing.assert_close(getattr(found, name), one_by_one, rtol=0, atol=1e-5)


def test_codes_are_coarse_to_fine_and_not_negative_at_first():
    net = small(prox="soft", num_references=2)
    target, references = images(num_references=2)
    codes, history = net.encode([target, *references.split(1, 1)])
    assert len(codes) == 4
    assert all([code.shape for code in found] == [(2, 8, 3, 3), (2, 6, 7, 7), (2, 4, 15, 14)] for found in codes)
    assert all((code >= 0).all() for found in codes for code in found)
    assert [len(kept) for kept in history] == [2, 2, 2]


def test_explained_features_are_what_the_codes_synthesise():
    net = noisy(small(num_references=2))
    target, references = images(num_references=2)
    common, unique = net.explained_features(target, references)
    assert common.shape == unique.shape == (2, 3, 5, 15, 14)
    codes, _ = net.encode([target, *references.split(1, 1)])
    for branch in range(3):
        torch.testing.assert_close(common[:, branch], net.explained[branch](codes[-1]))
        torch.testing.assert_close(unique[:, branch], net.reconstruction[branch](codes[branch]), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="no common code"):
        small(common=False).explained_features(*images())


def test_recomputation_gives_the_same_loss_and_gradients():
    nets = [noisy(small(recompute=recompute)) for recompute in (False, True)]
    losses = []
    for net in nets:
        found = net(*images())
        losses.append(found.target.square().mean() + found.references.square().mean())
        losses[-1].backward()
    assert torch.equal(*losses)
    kept, recomputed = ({k: p.grad for k, p in net.named_parameters()} for net in nets)
    assert kept.keys() == recomputed.keys()
    assert all(torch.equal(kept[name], recomputed[name]) for name in kept)


def test_network_runs_in_bfloat16():
    net = small()
    inputs = images()
    with torch.no_grad():
        exact = net(*inputs)
        with torch.autocast("cpu", torch.bfloat16):
            found = net(*inputs)
    assert found.target.dtype == torch.float32
    change = exact.target - inputs[0]
    assert (found.target - exact.target).norm() < 0.1 * change.norm()


# --- gradients ---


@pytest.mark.parametrize("arguments", VARIANTS, ids=label)
def test_every_parameter_gets_a_gradient(arguments):
    net = noisy(small(**arguments))
    target, references = images(num_references=net.num_references)
    found = run(net, target, references)
    (found.target.square().mean() + found.references.square().mean()).backward()
    fixed = {name for name, p in net.named_parameters() if not p.requires_grad}
    # constant thresholds belong to the constant steps
    assert all("thresholds" in name for name in fixed)
    assert bool(fixed) == (arguments.get("steps") == "constant")
    without = {name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()} - fixed
    assert not without


@pytest.mark.parametrize("name", ["tiny", "small"])
def test_every_parameter_of_a_preset_is_in_the_graph_from_the_first_step(name):
    arguments = {**SIZED[name][0], "widths": [8, 6, 4], "features": 5}
    torch.manual_seed(0)
    net = MCCDic(**arguments)
    found = net(*images())
    (found.target.square().mean() + found.references.square().mean()).backward()
    assert all(parameter.grad is not None for parameter in net.parameters())
    # the heads begin at zero, so that they alone move in the first step
    assert net.render[0].weight.grad.any()
    assert net.render_common.out.grad.any()


@pytest.mark.parametrize("arguments", [{}, {"prox": "soft"}, {"common": False}], ids=label)
def test_gradients_of_one_full_iteration(arguments):
    sizes = {"widths": [3, 2], "features": 2, "stages": 2, "blocks": [1, 1]}
    net = noisy(small(torch.float64, **{**sizes, **arguments}))
    names = [name for name, _ in net.named_parameters()]
    weights = [parameter.detach().clone().requires_grad_() for parameter in net.parameters()]
    inputs = [image.requires_grad_() for image in images(5, 6, dtype=torch.float64, batch=1)]

    def outputs(*tensors):
        found = torch.func.functional_call(net, dict(zip(names, tensors[2:], strict=True)), tensors[:2])
        return found.target, found.references

    assert torch.autograd.gradcheck(outputs, (*inputs, *weights), fast_mode=True)


# --- what the design promises ---


def test_untrained_network_with_zero_heads_returns_its_input():
    for arguments in ({}, {"common": False}, {"num_references": 2}):
        net = small(zero_heads=True, **arguments)
        target, references = images(num_references=net.num_references)
        found = net(target, references)
        assert torch.equal(found.target, target)
        assert torch.equal(found.references, references)
        assert not torch.equal(small(**arguments)(target, references).target, target)


def test_without_a_common_code_nothing_of_the_references_reaches_the_target():
    for common in (False, True):
        net = noisy(small(common=common, num_references=2))
        target, references = images(num_references=2)
        references.requires_grad_()
        found = net(target, references)
        (gradient,) = torch.autograd.grad(found.target.sum(), references, allow_unused=True, retain_graph=True)
        if common:
            assert gradient.abs().sum() > 0
        else:
            assert gradient is None or not gradient.any()
            assert (found.common == 0).all()
            other = net(target, torch.rand_like(references))
            assert torch.equal(other.target, found.target)


def swapped(net):
    """The network with target and reference, and all that is theirs, in each other's place."""
    made = copy.deepcopy(net)
    with torch.no_grad():
        for parts in (made.lift, made.unique, made.reconstruction, made.fuse, made.render, made.explained):
            first, second = copy.deepcopy(parts[0].state_dict()), copy.deepcopy(parts[1].state_dict())
            parts[0].load_state_dict(second)
            parts[1].load_state_dict(first)
        made.lift_common.weight.copy_(net.lift_common.weight.flip(1))
        half = net.compress.weight.shape[1] // 2
        made.compress.weight.copy_(net.compress.weight.roll(half, 1))
        made.render_common.out.copy_(net.render_common.out.flip(0))
    return made


@pytest.mark.parametrize("prox", PROXES)
def test_swapping_target_and_reference_with_their_parameters_swaps_the_outputs(prox):
    net = noisy(small(torch.float64, prox=prox))
    target, reference = images(dtype=torch.float64)
    found, other = net(target, reference), swapped(net)(reference, target)
    torch.testing.assert_close(found.target, other.references, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.references, other.target, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.unique, other.unique.flip(1), rtol=0, atol=1e-12)
    assert not torch.allclose(found.target, net(reference, target).references)


class Identity(nn.Module):
    def forward(self, x):
        return x


@pytest.mark.parametrize("prox", PROXES)
def test_steps_of_zero_keep_the_initial_codes(prox):
    codes = []
    for stages in (2, 4):
        net = noisy(small(prox=prox, steps="constant", stages=4))
        net.stages = stages
        for coder in (*net.unique, net.common):
            coder.constant_steps[1:] = 0
            for scale in range(len(coder.prox)):
                coder.prox[scale] = Identity()
        weights = net.folded()
        target, reference = images()
        codes.append(net.encode([target, reference])[0])
        lifted = [net.lift[0](target), net.lift[1](reference), net.lift_common(torch.cat([target, reference], 1))]
        for coder, feature, found in zip((*net.unique, net.common), lifted, codes[-1], strict=True):
            for code, start in zip(found, coder.first(coder.preconditioned.adjoint(feature)), strict=True):
                torch.testing.assert_close(code, start, rtol=1e-5, atol=1e-6)
                assert start.any()
        assert len(weights["adjoint"]) == 3
    assert all(torch.equal(a, b) for one, other in zip(*codes, strict=True) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("skip", [False, True])
def test_proximal_network_is_its_layers_written_out(attention, skip):
    prox = noisy(small(attention=attention, skip=skip)).common.prox[1]
    *blocks, last = prox
    assert len(blocks) == 2
    image = torch.randn(2, 6, 7, 5)
    x = image
    for block in blocks:
        change = block.second(block.first(x).clamp(min=0))
        if attention:
            squeezed = block.attention.squeeze(change.mean((2, 3), keepdim=True)).clamp(min=0)
            change = change * block.attention.excite(squeezed).sigmoid()
        x = x + change
    torch.testing.assert_close(prox(image), last(x) + (image if skip else 0))


@pytest.mark.parametrize("prox", PROXES)
def test_update_is_a_gradient_step_and_its_proximal_operator(prox):
    coder = noisy(small(prox=prox)).unique[0]
    codes, gradient = ([torch.randn(1, width, 3, 3) for width in SMALL["widths"]] for _ in range(2))
    step = nn.functional.softplus(coder.raw_steps[2])
    found = coder.update(codes, gradient, 2)
    for scale, (code, part) in enumerate(zip(codes, gradient, strict=True)):
        moved = code - step * part
        if prox == "soft":
            expected = (moved - (step * coder.thresholds[scale][2]).clamp(min=0)).clamp(min=0)
        else:
            expected = coder.prox[scale](moved.clamp(min=0))
        torch.testing.assert_close(found[scale], expected)


def test_initial_codes_are_shrunk_by_step_and_threshold():
    coder = noisy(small()).unique[0]
    analysed = [torch.randn(1, width, 3, 3) for width in SMALL["widths"]]
    step = nn.functional.softplus(coder.raw_steps[0])
    for code, part, threshold in zip(coder.first(analysed), analysed, coder.thresholds, strict=True):
        expected = (step * part - (step * threshold[0]).clamp(min=0)).clamp(min=0)
        torch.testing.assert_close(code, expected)


@pytest.mark.parametrize("steps", STEPS)
def test_large_thresholds_leave_codes_of_zero_and_the_input(steps):
    net = small(prox="soft", steps=steps)
    with torch.no_grad():
        for coder in (*net.unique, net.common):
            for threshold in coder.thresholds:
                threshold.fill_(1e6)
        for part in (*net.fuse, *net.render):
            part.bias.zero_()
    target, reference = images()
    codes, _ = net.encode([target, reference])
    assert all((code == 0).all() for found in codes for code in found)
    found = net(target, reference)
    assert torch.equal(found.target, target)
    assert torch.equal(found.references, reference)


def test_reference_changes_the_target_only_through_the_common_code():
    net = noisy(small())
    target, reference = images()
    with torch.no_grad():
        before = net(target, reference)
        for dictionary in net.explained:
            dictionary.out.zero_()
        net.render_common.out.zero_()
        first, second = net(target, reference), net(target, 1 - reference)
    assert torch.equal(first.target, second.target)
    assert not torch.equal(before.target, first.target)


# --- initial values and options ---


def test_dictionaries_begin_as_copies_or_as_published():
    for initialisation, same in (("consistent", True), ("published", False)):
        net = small(initialisation=initialisation)
        for coder, reconstruction in zip(net.unique, net.reconstruction, strict=True):
            for name, weight in coder.preconditioned.named_parameters():
                assert torch.equal(weight, dict(reconstruction.named_parameters())[name])
                assert torch.equal(weight, dict(coder.synthesis.named_parameters())[name]) == same
        pairs = zip(net.common.synthesis.parameters(), net.common.preconditioned.parameters(), strict=True)
        assert all(torch.equal(a, b) and a is not b for a, b in pairs)
        assert not torch.equal(net.explained[0].out, net.explained[1].out)


def test_tied_dictionaries_are_one():
    net = small(tie=True)
    for coder, reconstruction in zip(net.unique, net.reconstruction, strict=True):
        assert coder.preconditioned is coder.synthesis is reconstruction
    assert net.common.preconditioned is net.common.synthesis
    per_dictionary = count(net.common.synthesis)
    assert count(small()) - count(net) == 5 * per_dictionary


@pytest.mark.parametrize("steps", STEPS)
def test_steps_begin_at_the_inverse_of_the_largest_eigenvalue(steps):
    net = small(steps=steps)
    for coder in (*net.unique, net.common):
        expected = 1 / largest_eigenvalue(coder.synthesis, size=16)
        torch.testing.assert_close(coder.steps, torch.full((3,), expected), rtol=1e-5, atol=0)
        assert all((threshold == 0.01).all() for threshold in coder.thresholds)
        counted = [len(threshold) for threshold in coder.thresholds]
        assert counted == [1, 1, 1]
    assert [len(t) for t in small(prox="soft").common.thresholds] == [3, 3, 3]


def test_learnt_steps_stay_positive_and_constant_ones_are_no_parameters():
    net = small()
    with torch.no_grad():
        net.common.raw_steps.fill_(-20)
    assert (net.common.steps > 0).all()
    net = small(steps="constant")
    assert not any("steps" in name for name, _ in net.named_parameters())
    assert {name for name in net.state_dict() if "steps" in name} == {
        "unique.0.constant_steps", "unique.1.constant_steps", "common.constant_steps",
    }  # fmt: skip


def test_switches_change_what_is_computed():
    inputs = images()
    with torch.no_grad():
        outputs = [run(noisy(small(**arguments)), *inputs).target for arguments in (
            {}, {"attention": False}, {"skip": True}, {"prox": "soft"}, {"tie": True}, {"common": False},
            {"stages": 4}, {"initialisation": "published"}, {"consistency": "hard"}, {"consistency": "soft"},
        )]  # fmt: skip
    assert not any(torch.allclose(a, b) for a, b in itertools.combinations(outputs, 2))


@pytest.mark.parametrize("name", CHOICES)
def test_unknown_choices_are_refused(name):
    known = ", ".join(CHOICES[name])
    with pytest.raises(InputError, match=f"unknown {name} 'other'; choose one of {known}"):
        small(**{name: "other"})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stages": 1}, "stages=1 leaves no iteration"),
        ({"num_references": 0}, "num_references=0: the network needs a reference"),
        ({"blocks": [1, 1]}, r"blocks=\[1, 1\] must have a number for each of widths=\[8, 6, 4\]"),
        ({"widths": [], "blocks": []}, "widths"),
    ],
)
def test_sizes_that_make_no_network_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        small(**arguments)


def test_images_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="needs 1 references, got 2"):
        small()(*images(num_references=2))
    with pytest.raises(InputError, match="3 scales need images or crops of 4 pixels a side at least"):
        small()(*images(3, 8))
    assert small(widths=[6], blocks=[1])(*images(1, 1)).target.shape == (2, 1, 1, 1)


@pytest.mark.slow
def test_published_network_runs():
    torch.manual_seed(0)
    net = MCCDic(**BASE).eval()
    with torch.no_grad():
        found = net(*images(30, 29, batch=1))
    assert found.target.shape == (1, 1, 30, 29)
    assert found.target.isfinite().all()
