"""The teacher's part: what it is shown, what is compared, what it may not touch."""

import pytest
import torch

from projects.mdrn.checkpoints import save_network
from projects.mdrn.distill import Distiller, Taps, matched_points
from projects.mdrn.model import MDRN
from projects.mdrn.networks import build_network
from projects.mdrn.noise import add_noise
from shared.errors import InputError

TINY = {"name": "mdrn", "width": 4, "num_blocks": 1, "init_scale": 1.0, "tail_init_scale": 1.0}
LARGE = TINY | {"width": 6, "num_blocks": 3}


@pytest.fixture
def made(tmp_path):
    """Make a student and a distiller whose teacher is a file: made(student, teacher, **options)."""

    def make(student_arguments, teacher_arguments, **options):
        torch.manual_seed(1)
        save_network(build_network(teacher_arguments), teacher_arguments, tmp_path / "teacher.safetensors")
        torch.manual_seed(2)
        student = build_network(student_arguments).double()
        distiller = Distiller(student, str(tmp_path / "teacher.safetensors"), **options).double()
        return student, distiller

    return make


def make_batch(level=50, size=8, channels=1):
    generator = torch.Generator().manual_seed(3)
    clean, eps, other = (torch.randn(2, channels, size, size, generator=generator).double() for _ in range(3))
    noise_std = torch.full((2,), level / 255).double()
    noisy = add_noise(clean, eps, noise_std)
    return {"clean": clean, "eps": eps, "other_eps": other, "noise_std": noise_std, "noisy": noisy}


def terms(student, distiller, batch, step=0):
    return distiller(student(batch["noisy"], batch["noise_std"]), batch, step, 100)


def test_points_are_matched_by_their_share_of_the_depth():
    assert matched_points(MDRN(num_blocks=2), MDRN(num_blocks=3)) == [
        ("body.0", "body.1"), ("body.1", "body.2"), ("gff", "gff"),
    ]  # fmt: skip
    assert matched_points(MDRN(num_blocks=2), MDRN(num_blocks=6))[:2] == [("body.0", "body.2"), ("body.1", "body.5")]
    assert matched_points(MDRN(num_blocks=4), MDRN(num_blocks=4))[3] == ("body.3", "body.3")


@pytest.mark.parametrize("phi", ["raw", "norm", "attn", "affinity"])
def test_student_that_is_its_teacher_has_nothing_to_learn(made, phi):
    student, distiller = made(TINY, TINY, phi=phi)
    student.load_state_dict(distiller.teacher.state_dict())
    found = terms(student, distiller, make_batch())
    sum(found.values()).backward()
    assert {name: value.item() for name, value in found.items()} == {"out": 0, "feat": 0}
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in student.parameters())


def test_gradients_of_the_whole_loss(made):
    student, distiller = made(TINY, LARGE, feat_weight=1.0)
    batch = make_batch()

    def loss(noisy):
        denoised = student(noisy, batch["noise_std"])
        return sum(distiller(denoised, batch, 0, 100).values())

    assert torch.autograd.gradcheck(loss, (batch["noisy"].clone().requires_grad_(),))


def test_teacher_stays_frozen_in_eval_mode_and_out_of_everything(made):
    student, distiller = made(TINY, LARGE)
    before = {key: value.clone() for key, value in distiller.teacher.state_dict().items()}
    student.train()
    distiller.train()
    optimizer = torch.optim.SGD([*student.parameters(), *distiller.parameters()], lr=1.0)
    sum(terms(student, distiller, make_batch()).values()).backward()
    optimizer.step()
    assert not distiller.teacher.training
    assert all(p.grad is None and not p.requires_grad for p in distiller.teacher.parameters())
    assert all(torch.equal(value, before[key]) for key, value in distiller.teacher.state_dict().items())
    assert {key.split(".")[0] for key in distiller.state_dict()} == {"adapters"}
    assert all(p.grad is not None for p in distiller.adapters.parameters())
    # adapters: 3 conv1 from 4 to 6 channels, and nothing else is trained beside the student
    assert sum(p.numel() for p in distiller.parameters()) == 2 * (4 * 6 + 6)


def test_no_weight_no_teacher(made, monkeypatch):
    student, distiller = made(TINY, LARGE, out_weight=0.0, feat_weight=0.0)
    monkeypatch.setattr(distiller.teacher, "forward", lambda *_: pytest.fail("the teacher ran"))
    assert terms(student, distiller, make_batch()) == {}


def test_teacher_takes_no_random_numbers(made):
    student, distiller = made(TINY, LARGE)
    before = torch.get_rng_state()
    terms(student, distiller, make_batch())
    assert torch.equal(torch.get_rng_state(), before)


def test_second_strategy_shows_the_teacher_the_same_noise_at_its_own_level(made):
    batch = make_batch(level=50)
    _, distiller = made(TINY, TINY, teacher_noise_level=25)
    noisy, noise_std = distiller.teacher_input(batch)
    assert noise_std.tolist() == pytest.approx([25 / 255] * 2)
    torch.testing.assert_close(batch["noisy"] - batch["clean"], 2 * (noisy - batch["clean"]))
    _, distiller = made(TINY, TINY, teacher_noise_level=25, independent_noise=True)
    noisy, _ = distiller.teacher_input(batch)
    torch.testing.assert_close(noisy - batch["clean"], 25 / 255 * batch["other_eps"])


def test_second_strategy_at_equal_levels_is_the_first(made):
    batch = make_batch(level=50)
    results = []
    for options in ({"teacher_noise_level": 50}, {}):
        student, distiller = made(TINY, TINY, **options)
        results.append(terms(student, distiller, batch))
    assert results[0]["out"].item() == pytest.approx(results[1]["out"].item())
    assert results[0]["feat"].item() == pytest.approx(results[1]["feat"].item())


def test_second_strategy_at_level_zero_shows_the_truth(made):
    batch = make_batch()
    _, distiller = made(TINY, TINY, teacher_noise_level=0)
    assert torch.equal(distiller.teacher_input(batch)[0], batch["clean"])


def test_weight_falls_to_zero_at_the_end(made):
    student, distiller = made(TINY, TINY, out_weight=0.0)
    batch = make_batch()
    whole, half = (terms(student, distiller, batch, step)["feat"].item() for step in (0, 85))
    assert half == pytest.approx(whole / 2)
    assert terms(student, distiller, batch, 100) == {}


def test_adapters_stand_where_widths_differ_or_are_wished_for(made):
    def widths(distiller):
        return [tuple(a.weight.shape[:2]) if hasattr(a, "weight") else None for a in distiller.adapters]

    assert widths(made(TINY, LARGE)[1]) == [(6, 4), (6, 4)]
    assert widths(made(TINY, TINY)[1]) == [None, None]
    assert widths(made(TINY, TINY, adapter=True)[1]) == [(4, 4), (4, 4)]
    assert widths(made(TINY, LARGE, phi="attn")[1]) == [None, None]


def test_random_teacher_is_untrained_and_leaves_the_students_random_numbers_alone(made, tmp_path):
    _, trained = made(TINY, LARGE)
    student = build_network(TINY)
    before = torch.get_rng_state()
    distiller = Distiller(student, str(tmp_path / "teacher.safetensors"), random_teacher=True, phi="attn")
    assert torch.equal(torch.get_rng_state(), before)
    assert distiller.teacher.tail.weight.shape == trained.teacher.tail.weight.shape
    assert not torch.equal(distiller.teacher.head.weight, trained.teacher.head.weight.float())


def test_teacher_of_another_architecture(made):
    teacher = {"name": "drunet", "in_channels": 1, "widths": [4, 6, 8, 10], "num_blocks": 1}
    student, distiller = made(TINY, teacher, points=[["gff", "m_body"], ["body.0", "m_up1"]])
    found = terms(student, distiller, make_batch(size=16))
    assert found["feat"] > 0
    assert next(adapter.weight.shape[:2] for adapter in distiller.adapters if hasattr(adapter, "weight")) == (10, 4)
    with pytest.raises(InputError, match=r"distill\.points"):
        made(TINY, teacher)


def test_bad_options_are_named(made):
    for options, message in [
        ({"phi": "gram"}, "unknown phi 'gram'"),
        ({"points": [["body.7", "gff"]]}, r"no module 'body\.7'"),
        ({"feat_weight": -1.0}, "at least 0"),
        ({"teacher_noise_level": 300}, r"0\.\.255"),
    ]:
        with pytest.raises(InputError, match=message):
            made(TINY, TINY, **options)
    with pytest.raises(InputError, match=r"absent\.safetensors"):
        Distiller(build_network(TINY), "absent.safetensors")


def test_taps_hold_a_feature_no_longer_than_asked():
    net = MDRN(width=4)
    taps = Taps(net, ["gff"])
    net(torch.rand(1, 1, 8, 8))
    assert taps.take()[0].shape == (1, 4, 8, 8)
    assert taps.take() == [None]
