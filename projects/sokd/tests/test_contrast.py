"""CRD: against loops over plain numbers, what negatives are drawn from, what is remembered, what learns."""

import copy
import math

import pytest
import torch

from projects.sokd.contrast import CRD
from shared.errors import InputError

LABELS = torch.tensor([2, 0, 2, 7, 0, 2, 7, 2, 0, 2, 2, 7])


def criterion(num_negatives=5, dim=3, seed=0, **options):
    torch.manual_seed(seed)
    return CRD(4, 6, LABELS, num_negatives, dim=dim, **options)


def batch(seed=0, index=(3, 0, 8, 11), **options):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(len(index), n, generator=generator, **options) for n in (4, 6))
    return student, teacher, torch.tensor(index)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def unit(row):
    length = math.sqrt(sum(x * x for x in row))
    return [x / length for x in row]


def embed(layer, feat):
    weight, bias = layer.weight.tolist(), layer.bias.tolist()
    return [
        unit([sum(w * x for w, x in zip(row, one, strict=True)) + b for row, b in zip(weight, bias, strict=True)])
        for one in feat.tolist()
    ]


def plain_crd(crd, student, teacher, index, negatives, constants=None):
    """The loss and its constants by loops, in probabilities as the paper states them."""
    N, M, total, found = len(LABELS), negatives.shape[1], 0.0, []
    directions = (
        (embed(crd.embed_student, student), crd.memory_teacher.tolist()),
        (embed(crd.embed_teacher, teacher), crd.memory_student.tolist()),
    )
    for number, (embedded, memory) in enumerate(directions):
        powers = [
            [math.exp(sum(a * b for a, b in zip(e, memory[j], strict=True)) / crd.temperature) for j in [i, *others]]
            for e, i, others in zip(embedded, index.tolist(), negatives.tolist(), strict=True)
        ]
        Z = constants[number] if constants else N * sum(map(sum, powers)) / (len(powers) * (M + 1))
        found.append(Z)
        for positive, *rest in powers:
            total -= math.log(positive / Z / (positive / Z + M / N))
            total -= sum(math.log(M / N / (p / Z + M / N)) for p in rest)
    return total / len(index), found


def test_loss_equals_loops_over_samples_and_negatives():
    crd, (student, teacher, index) = criterion().double(), batch(dtype=torch.double)
    expected, constants = plain_crd(crd, student, teacher, index, crd.negatives(index, seeded()))
    before = copy.deepcopy(crd)
    assert crd(student, teacher, index, seeded()).item() == pytest.approx(expected, rel=1e-10)
    assert crd.log_z.exp().tolist() == pytest.approx(constants)
    # the constants of the first batch stay, the memories have moved
    student, teacher, index = batch(1, (1, 3, 5), dtype=torch.double)
    expected, _ = plain_crd(crd, student, teacher, index, crd.negatives(index, seeded(1)), constants)
    assert crd(student, teacher, index, seeded(1)).item() == pytest.approx(expected, rel=1e-10)
    fresh, _ = plain_crd(before, student, teacher, index, crd.negatives(index, seeded(1)))
    assert abs(fresh - expected) > 1e-3


def test_negatives_are_every_image_of_another_class_equally_often():
    crd = criterion(num_negatives=6)
    index = torch.arange(12).repeat(5000)
    drawn = crd.negatives(index, seeded())
    assert drawn.shape == (60_000, 6)
    assert (LABELS[drawn] != LABELS[index][:, None]).all()
    for image in range(12):
        counts = drawn[image::12].flatten().bincount(minlength=12)
        others = LABELS[image] != LABELS
        expected = 30_000 / int(others.sum())
        assert (counts[others] - expected).abs().max() < 5 * math.sqrt(expected)


def test_there_are_no_more_negatives_than_images_of_other_classes():
    assert criterion(16384).num_negatives == 6  # half of the images are of one class
    assert criterion(4).num_negatives == 4


def test_negatives_follow_the_generator():
    crd, index = criterion(), torch.arange(12)
    assert torch.equal(crd.negatives(index, seeded(1)), crd.negatives(index, seeded(1)))
    assert not torch.equal(crd.negatives(index, seeded(1)), crd.negatives(index, seeded(2)))


def test_memories_move_by_the_momentum_and_keep_their_length():
    crd, (student, teacher, index) = criterion(momentum=0.25), batch()
    before = {name: memory.clone() for name, memory in crd.state_dict().items() if "memory" in name}
    crd(student, teacher, index, seeded())
    for name, feat in (("student", student), ("teacher", teacher)):
        memory, embedded = before[f"memory_{name}"], embed(getattr(crd, f"embed_{name}"), feat)
        for i, e in zip(index.tolist(), embedded, strict=True):
            memory[i] = torch.tensor(unit([0.25 * m + 0.75 * x for m, x in zip(memory[i].tolist(), e, strict=True)]))
        torch.testing.assert_close(getattr(crd, f"memory_{name}"), memory)


def test_memories_begin_with_a_length_of_about_one():
    torch.manual_seed(0)
    crd = CRD(4, 6, torch.arange(1000) % 10, 100)
    assert crd.memory_student.shape == (1000, 128)
    assert crd.memory_student.norm(dim=1).mean().item() == pytest.approx(1, abs=0.02)
    assert not torch.equal(crd.memory_student, crd.memory_teacher)


def test_evaluation_leaves_no_trace():
    crd, parts = criterion().eval(), batch()
    before = copy.deepcopy(crd.state_dict())
    torch.testing.assert_close(crd(*parts, seeded()), criterion()(*parts, seeded()))
    torch.testing.assert_close(crd.state_dict(), before)


def test_gradients_reach_both_embeddings_and_both_features():
    crd, (student, teacher, index) = criterion(), batch()
    student.requires_grad_()
    teacher.requires_grad_()
    crd(student, teacher, index, seeded()).backward()
    for tensor in (student, teacher, *crd.parameters()):
        assert tensor.grad.abs().max() > 0
    assert not any(buffer.requires_grad for buffer in crd.buffers())


def test_gradients_of_crd():
    crd, (student, teacher, index) = criterion().double(), batch(dtype=torch.double, requires_grad=True)
    crd(student, teacher, index, seeded())
    crd.eval()
    assert torch.autograd.gradcheck(lambda s, t: crd(s, t, index, seeded()), (student, teacher))


def test_training_tells_the_images_apart():
    crd, parts = criterion(6, dim=8), batch(index=tuple(range(12)))
    optimizer = torch.optim.Adam(crd.parameters(), lr=0.05)
    losses = []
    for step in range(60):
        optimizer.zero_grad()
        losses.append(crd(*parts, seeded(step)))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]


def test_a_restored_state_goes_on_as_if_uninterrupted():
    crd, other = criterion(), criterion(seed=1)
    crd(*batch(), seeded())
    other.load_state_dict(copy.deepcopy(crd.state_dict()))
    first, again = (one(*batch(1, (5, 6)), seeded(1)) for one in (crd, other))
    assert torch.equal(first, again)
    torch.testing.assert_close(other.state_dict(), crd.state_dict(), rtol=0, atol=0)


def test_loss_under_bf16_autocast_is_that_of_float32():
    student, teacher, index = batch()
    halves = student.bfloat16(), teacher.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = criterion()(*halves, index, seeded())
    assert torch.equal(found, criterion()(halves[0].float(), halves[1].float(), index, seeded()))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"labels": torch.zeros(5, dtype=torch.long)}, "at least two"), ({"labels": LABELS[None]}, r"\(1, 12\)"),
     ({"num_negatives": 0}, "num_negatives"), ({"temperature": 0.0}, "temperature")],
)  # fmt: skip
def test_bad_input_is_named(options, message):
    with pytest.raises(InputError, match=message):
        CRD(**({"student_dim": 4, "teacher_dim": 6, "labels": LABELS} | options))
