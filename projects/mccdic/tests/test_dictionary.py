"""The multi-scale dictionary: its adjoint, its linearity, its size and its norm."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from projects.mccdic import reference
from projects.mccdic.dictionary import Dictionary, analyse, largest_eigenvalue, synthesise
from projects.mccdic.model import copy_of

SIZES = list(itertools.product((16, 14, 15), repeat=2))
TINY = ([32, 24, 16], 16)
ONE_SCALE = ([6], 3)


def dictionary(widths, out_channels, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    return Dictionary(widths, out_channels).to(dtype)


def random_codes(made, height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = zip(made.widths, made.sizes(height, width), strict=True)
    return [torch.randn(2, channels, *size, dtype=made.out.dtype, generator=generator) for channels, size in sizes]


def random_image(made, height, width, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, made.out_channels, height, width, dtype=made.out.dtype, generator=generator)


def inner(left, right):
    return sum((a * b).sum() for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("size", [TINY, ([128, 96, 64], 64), ONE_SCALE], ids=["tiny", "base", "one scale"])
def test_adjoint(size, dtype, limit, height, width):
    made = dictionary(*size, dtype)
    codes, image = random_codes(made, height, width), random_image(made, height, width)
    synthesised, analysed = made(codes), made.adjoint(image)
    assert synthesised.shape == image.shape
    assert [code.shape for code in analysed] == [code.shape for code in codes]
    scale = synthesised.norm() * image.norm()
    assert (inner([synthesised], [image]) - inner(codes, analysed)).abs() < limit * scale


@pytest.mark.parametrize(("height", "width"), [(8, 8), (7, 6), (5, 7)])
def test_gradients_of_synthesis_and_adjoint(height, width):
    made = dictionary([3, 2, 2], 2)
    names = [name for name, _ in made.named_parameters()]
    weights = [parameter.detach().clone().requires_grad_() for parameter in made.parameters()]
    codes = [code[:1].requires_grad_() for code in random_codes(made, height, width)]
    image = random_image(made, height, width)[:1].requires_grad_()

    def synthesis(*tensors):
        state = dict(zip(names, tensors[3:], strict=True))
        return torch.func.functional_call(made, state, (list(tensors[:3]),))

    class Adjoint(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.made = made

        def forward(self, image):
            return tuple(self.made.adjoint(image))

    def adjoint(image, *tensors):
        state = {f"made.{name}": tensor for name, tensor in zip(names, tensors, strict=True)}
        return torch.func.functional_call(Adjoint(), state, (image,))

    assert torch.autograd.gradcheck(synthesis, (*codes, *weights), fast_mode=True)
    assert torch.autograd.gradcheck(adjoint, (image, *weights), fast_mode=True)


@pytest.mark.parametrize(("height", "width"), [(16, 16), (14, 15)])
@pytest.mark.parametrize("size", [TINY, ONE_SCALE])
def test_synthesis_is_linear(size, height, width):
    made = dictionary(*size)
    one, other = random_codes(made, height, width), random_codes(made, height, width, 2)
    mixed = made([3 * a - 0.5 * b for a, b in zip(one, other, strict=True)])
    torch.testing.assert_close(mixed, 3 * made(one) - 0.5 * made(other), rtol=0, atol=1e-12)
    assert (made([torch.zeros_like(code) for code in one]) == 0).all()
    assert all((code == 0).all() for code in made.adjoint(torch.zeros_like(mixed)))


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_transposed_convolutions_are_convolutions_with_flipped_transposed_weights(height, width):
    made = dictionary(*TINY)
    image = random_image(made, height, width)
    expected = []
    rest = F.conv2d(image, made.out.transpose(0, 1))
    for up, mix in zip(reversed(made.up), reversed(made.mix), strict=True):
        both = F.conv2d(rest, mix.transpose(0, 1).flip(2, 3), padding=1)
        expected.insert(0, both[:, : up.shape[1]])
        # each coarse pixel gathers its 2x2 fine ones
        fine = both[:, up.shape[1] :, : rest.shape[2] // 2 * 2, : rest.shape[3] // 2 * 2]
        blocks = fine.unfold(2, 2, 2).unfold(3, 2, 2)
        rest = torch.einsum("bfijyx,cfyx->bcij", blocks, up)
    expected.insert(0, F.conv2d(rest, made.bottleneck.transpose(0, 1).flip(2, 3), padding=1))
    for found, code in zip(made.adjoint(image), expected, strict=True):
        torch.testing.assert_close(found, code, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("height", "width"), [(16, 16), (14, 15)])
@pytest.mark.parametrize("size", [TINY, ONE_SCALE])
def test_folding_the_last_layer_changes_nothing(size, height, width):
    made = dictionary(*size, torch.float32)
    codes, image = random_codes(made, height, width), random_image(made, height, width)
    expected = reference.synthesis(made, codes)
    assert (made(codes) - expected).norm() < 1e-6 * expected.norm()
    for found, code in zip(made.adjoint(image), reference.adjoint(made, image), strict=True):
        assert (found - code).norm() < 1e-6 * code.norm()
    before = torch.randn(5, made.out_channels, 1, 1)
    expected = F.conv2d(reference.synthesis(made, codes), before)
    assert (synthesise(codes, made.folded(before)) - expected).norm() < 1e-6 * expected.norm()


def test_weights_without_the_last_layer_leave_it_to_others():
    made = dictionary(*TINY)
    image = random_image(made, 14, 15)
    analysed = analyse(F.conv_transpose2d(image, made.out), made.inner())
    for found, code in zip(analysed, made.adjoint(image), strict=True):
        torch.testing.assert_close(found, code, rtol=0, atol=1e-12)


def test_codes_have_the_sizes_of_repeated_halving():
    assert dictionary(*TINY).sizes(15, 14) == [(3, 3), (7, 7), (15, 14)]
    assert dictionary(*ONE_SCALE).sizes(15, 14) == [(15, 14)]


def test_published_dictionaries_have_their_numbers_of_parameters():
    for out_channels, expected in ((64, 464_896), (2, 460_928)):
        assert sum(p.numel() for p in Dictionary([128, 96, 64], out_channels).parameters()) == expected


def test_initial_weights_have_the_variance_of_their_fan_in():
    made = dictionary([64, 48, 32], 32)
    for weight in made.parameters():
        fan_in = weight[0].numel()
        assert weight.var().item() == pytest.approx(1 / fan_in, rel=0.1)
        assert weight.abs().max().item() <= (3 / fan_in) ** 0.5
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(list(made.mix), 2))


@pytest.mark.parametrize("size", [([3, 2, 2], 2), ([3, 2], 1), ([2], 2)])
def test_power_iteration_finds_the_largest_singular_value(size):
    made = dictionary(*size)
    side = 8 >> (len(size[0]) - 1)
    codes = [torch.zeros(1, *code.shape[1:], dtype=code.dtype) for code in random_codes(made, 8, 8)]
    places = torch.eye(sum(code.numel() for code in codes), dtype=torch.float64)
    columns = [part.view(-1, *code.shape[1:]) for part, code in zip(
        places.split([code.numel() for code in codes], 1), codes, strict=True
    )]  # fmt: skip
    matrix = made(columns).flatten(1).T
    expected = torch.linalg.svdvals(matrix)[0].item() ** 2
    assert largest_eigenvalue(made, side, 300) == pytest.approx(expected, rel=1e-3)
    # it comes from below
    assert largest_eigenvalue(made, side, 5) <= expected * (1 + 1e-9)


def test_step_of_the_inverse_eigenvalue_never_increases_the_error():
    made = dictionary([6, 5, 4], 3)
    step = 0.95 / largest_eigenvalue(made, 16, 100)
    image = random_image(made, 30, 22)
    codes = [torch.zeros_like(code) for code in random_codes(made, 30, 22)]
    errors = []
    for _ in range(20):
        rest = made(codes) - image
        errors.append(rest.square().sum().item())
        codes = [code - step * part for code, part in zip(codes, made.adjoint(rest), strict=True)]
    assert all(after < before for before, after in itertools.pairwise(errors))
    assert errors[-1] < 0.7 * errors[0]


def test_power_iteration_repeats_and_leaves_no_gradient():
    made = dictionary([6, 5, 4], 3, torch.float32)
    state = torch.get_rng_state()
    assert largest_eigenvalue(made, 4) == largest_eigenvalue(made, 4)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in made.parameters())


def test_copy_has_weights_of_its_own():
    made = dictionary(*TINY, torch.float32)
    other = copy_of(made)
    codes = random_codes(made, 8, 8)
    assert torch.equal(other(codes), made(codes))
    torch.nn.init.zeros_(other.out)
    assert made.out.abs().min() > 0
