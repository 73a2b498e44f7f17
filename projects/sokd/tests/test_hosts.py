"""The hosts: each gives the loss of its paper on the taps that it says it reads, and bad options are named."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf

from projects.sokd.hosts import HOSTS, FeatureLoss, Host, Lesson, Pair, build_host, check_host, hint_shapes, warm_up
from projects.sokd.loss import attention_loss, dkd_loss, hcl_loss, kd_loss
from projects.sokd.networks import build_network
from projects.sokd.taps import Taps, tap_shapes
from shared.errors import InputError

THREE = {"name": "resnet8", "num_classes": 5, "filters": [4, 4, 8, 8]}
WIDER = {"name": "resnet8", "num_classes": 5, "filters": [4, 6, 8, 12]}
FOUR = {"name": "ResNet18", "num_classes": 5, "width": 4}
LABELS = torch.arange(16) % 5
OPTIONS = {
    "fitnet": {"weight": 3.0, "hint": 2, "depth": 1, "final_relu": True},
    "at": {"weight": 3.0},
    "reviewkd": {"weight": 3.0, "warmup_epochs": 4},
    "crd": {"weight": 3.0, "num_negatives": 6, "temperature": 0.1, "momentum": 0.5},
    "kd": {"weight": 3.0, "temperature": 2.0},
    "dkd": {"alpha": 1.0, "beta": 2.0, "temperature": 2.0, "warmup_epochs": 4},
}
CONFIGS = Path(__file__).parents[1] / "configs" / "host"


def lesson_of(student=THREE, teacher=WIDER, preact=False, side=16, **options):
    """Taps of an untrained pair on the same images -> (pair, lesson)."""
    torch.manual_seed(0)
    nets = build_network(student), build_network(teacher).eval()
    images = torch.randn(16, 3, side, side)
    taps = nets[0].taps(images), nets[1].taps(images, preact)
    taught = Taps(*(part.detach() if torch.is_tensor(part) else [x.detach() for x in part] for part in taps[1]))
    pair = Pair(*(tap_shapes(net, side) for net in nets), LABELS)
    return pair, Lesson(taps[0], taught, LABELS, index=torch.arange(16), **options)


def host_of(name, pair, **options):
    torch.manual_seed(1)
    return build_host({"name": name, **OPTIONS[name], **options}, pair)


def given(name, student=THREE, teacher=WIDER, epoch=1, **options):
    """A host and what it says of a lesson -> (host, lesson, loss)."""
    preact = HOSTS[name].teacher_preact
    pair, lesson = lesson_of(student, teacher, preact)
    lesson = lesson._replace(epoch=epoch)
    host = host_of(name, pair, **options)
    return host, lesson, host(lesson)


# -------------------------------------------------------------------------------------------------------------- losses


def test_fitnet_is_the_squared_error_of_its_adapted_hint():
    host, lesson, loss = given("fitnet")
    adapted = host.adapter(lesson.student.feats[2])
    torch.testing.assert_close(loss, 3 * F.mse_loss(adapted, lesson.teacher.feats[2]))
    assert (host.reads, host.hint, host.student_hint) == ((2,), 2, 2)


def test_fitnet_takes_what_is_adapted_already():
    host, lesson, _ = given("fitnet")
    adapted = torch.randn_like(lesson.teacher.feats[2])
    loss = host(lesson._replace(adapted=adapted))
    torch.testing.assert_close(loss, 3 * F.mse_loss(adapted, lesson.teacher.feats[2]))


def test_fitnet_counts_hints_from_the_deep_end_of_each_network():
    host, lesson, loss = given("fitnet", THREE, FOUR, hint=-2)
    assert (host.reads, host.hint, host.student_hint) == ((3,), 3, 2)
    adapted = host.adapter(lesson.student.feats[2])
    torch.testing.assert_close(loss, 3 * F.mse_loss(adapted, lesson.teacher.feats[3]))


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [(THREE, WIDER, (1, 2, 3)), (THREE, FOUR, (2, 3, 4)), (FOUR, THREE, (1, 2, 3)), (FOUR, FOUR, (1, 2, 3, 4))],
)
def test_at_compares_the_stages_from_the_deep_end(student, teacher, expected):
    host, lesson, loss = given("at", student, teacher)
    count = len(expected)
    maps = lesson.student.feats[-count:], [lesson.teacher.feats[level] for level in expected]
    torch.testing.assert_close(loss, 3 * attention_loss(*maps))
    assert host.reads == expected


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [(THREE, WIDER, (1, 2, 3, 4)), (THREE, FOUR, (2, 3, 4, 5)), (FOUR, THREE, (1, 2, 3, 4))],
)
def test_reviewkd_compares_the_levels_and_the_pooled_vector(student, teacher, expected):
    host, lesson, loss = given("reviewkd", student, teacher, epoch=4)
    own = [*lesson.student.feats[1:], lesson.student.pooled[:, :, None, None]][-len(expected) :]
    levels = [*lesson.teacher.feats, lesson.teacher.pooled[:, :, None, None]]
    by_hand = sum(hcl_loss(x, levels[level]) for x, level in zip(host.fusion(own), expected, strict=True))
    torch.testing.assert_close(loss, 3 * by_hand)
    assert host.reads == expected
    assert len(levels) - 1 == expected[-1]


def test_reviewkd_takes_the_teacher_before_its_relu_and_the_student_as_asked():
    pair, _ = lesson_of()
    assert host_of("reviewkd", pair).teacher_preact
    assert not host_of("reviewkd", pair).student_preact
    assert host_of("reviewkd", pair._replace(preact=True)).student_preact


def test_kd_compares_softened_logits():
    host, lesson, loss = given("kd")
    torch.testing.assert_close(loss, 3 * kd_loss(lesson.student.logits, lesson.teacher.logits, 2.0))
    assert (host.reads, host.through_head) == ((3,), True)


def test_dkd_compares_decoupled_logits():
    host, lesson, loss = given("dkd", epoch=4)
    torch.testing.assert_close(loss, dkd_loss(lesson.student.logits, lesson.teacher.logits, LABELS, 1.0, 2.0, 2.0))
    assert (host.reads, host.through_head) == ((3,), True)


def test_crd_contrasts_pooled_vectors():
    pair, lesson = lesson_of()
    host = host_of("crd", pair)
    twin = host_of("crd", pair).contrast
    torch.manual_seed(2)
    loss = host(lesson)
    torch.manual_seed(2)
    torch.testing.assert_close(loss, 3 * twin(lesson.student.pooled, lesson.teacher.pooled, lesson.index))
    assert (host.reads, host.through_head) == ((3,), True)
    with pytest.raises(InputError, match="labels"):
        host_of("crd", pair._replace(labels=None))


def test_hosts_read_the_last_map_of_a_teacher_of_four_stages():
    pair, _ = lesson_of(THREE, FOUR)
    assert {name: host_of(name, pair).reads for name in ("crd", "kd", "dkd")} == dict.fromkeys(
        ("crd", "kd", "dkd"), (4,)
    )


@pytest.mark.parametrize("name", ["reviewkd", "dkd"])
def test_the_loss_warms_up(name):
    pair, lesson = lesson_of(preact=HOSTS[name].teacher_preact)
    host = host_of(name, pair)
    losses = [host(lesson._replace(epoch=epoch)) for epoch in (1, 2, 4, 9)]
    torch.testing.assert_close([4 * losses[0], 2 * losses[1], losses[3]], [losses[2]] * 3)


def test_warm_up_counts_epochs_from_one():
    assert [warm_up(epoch, 4) for epoch in (1, 3, 4, 5)] == [0.25, 0.75, 1, 1]
    assert warm_up(1, 0) == 1


@pytest.mark.parametrize("name", HOSTS)
def test_every_host_teaches_the_student_and_its_own_modules(name):
    host, lesson, loss = given(name)
    assert loss > 0
    slopes = torch.autograd.grad(loss, [lesson.student.feats[1], *host.parameters()])
    assert all(slope.isfinite().all() for slope in slopes)
    assert slopes[0].any()


def test_a_loss_of_ones_own_sees_both_taps():
    _, lesson = lesson_of()
    host = FeatureLoss(lambda student, teacher: (student.pooled.mean() - teacher.pooled.mean()).square(), reads=[3])
    expected = (lesson.student.pooled.mean() - lesson.teacher.pooled.mean()).square()
    assert torch.equal(host(lesson), expected)
    assert isinstance(host, Host)
    assert host.reads == (3,)
    with pytest.raises(InputError, match="reads"):
        FeatureLoss(lambda student, teacher: student.logits.sum(), reads=())


def test_a_loss_with_parameters_of_its_own_trains_them():
    class Scaled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))

        def forward(self, student, teacher):
            return (self.scale * student.pooled.mean() - teacher.pooled.mean()).square()

    assert [name for name, _ in FeatureLoss(Scaled(), [3]).named_parameters()] == ["loss.scale"]


# -------------------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize("name", HOSTS)
def test_the_configuration_of_each_host_builds_it(name):
    distill = {"hint": -1, "host": OmegaConf.load(CONFIGS / f"{name}.yaml")}
    config = OmegaConf.to_container(OmegaConf.create({"model": {"distill": distill}}), resolve=True)
    (pair, _), config = lesson_of(), config["model"]["distill"]["host"]
    assert config["name"] == name
    assert type(build_host(config, pair)) is HOSTS[name]


@pytest.mark.parametrize(
    ("host", "message"),
    [({"name": "ofd"}, "unknown host 'ofd'; choose from fitnet"), ({}, "unknown host None"),
     ({"name": "at"}, "host at: missing a required argument: 'weight'"),
     ({"name": "at", "weight": 1.0, "wieght": 1.0}, "'wieght'"),
     ({"name": "kd", "weight": 1.0, "temperature": 0.0}, "temperature is above 0"),
     ({"name": "reviewkd", "weight": 1.0, "warmup_epochs": -1}, "warmup_epochs"),
     ({"name": "crd", **OPTIONS["crd"], "num_negatives": 0}, "num_negatives is above 0"),
     ({"name": "at", "weight": 1.0, "pair": 1}, "pair")],
)  # fmt: skip
def test_bad_hosts_are_named(host, message):
    with pytest.raises(InputError, match=message):
        check_host(host)
    with pytest.raises(InputError, match=message):
        build_host(host, lesson_of()[0])


@pytest.mark.parametrize("hint", [4, -5, 9])
def test_a_hint_that_one_network_lacks_is_named(hint):
    pair, _ = lesson_of(THREE, FOUR)
    with pytest.raises(InputError, match=rf"hint={hint}: the student has maps 0..3, the teacher 0..4"):
        hint_shapes(pair, hint)
    with pytest.raises(InputError, match="hint"):
        host_of("fitnet", pair, hint=hint)


def test_hint_shapes_are_of_maps_alone():
    pair, _ = lesson_of(THREE, FOUR)
    assert hint_shapes(pair, 2) == ((8, 8), (8, 8))
    assert hint_shapes(pair, -1) == ((8, 4), (32, 2))
