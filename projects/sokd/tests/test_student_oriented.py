"""The plug-in: what it reduces to, what is refined and compared, what trains, what the search may touch."""

import copy
import functools
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from projects.sokd.fold import folded, folded_classifier
from projects.sokd.hosts import HOSTS, Lesson, Pair, build_host
from projects.sokd.loss import augmentation_loss, consistency_loss
from projects.sokd.networks import build_network
from projects.sokd.student_oriented import StudentOriented, heat_loss
from projects.sokd.taps import tap_shapes
from shared.errors import InputError

STUDENT = {"name": "resnet8", "num_classes": 5, "filters": [4, 4, 8, 8]}
TEACHER = {"name": "resnet8", "num_classes": 5, "filters": [4, 6, 8, 12]}
FOUR = {"name": "ResNet18", "num_classes": 5, "width": 4}
OPTIONS = {
    "fitnet": {"weight": 1.0, "hint": 2, "depth": 1, "final_relu": True},
    "at": {"weight": 10.0},
    "reviewkd": {"weight": 1.0, "warmup_epochs": 0},
    "crd": {"weight": 0.1, "num_negatives": 6, "temperature": 0.1, "momentum": 0.5},
    "kd": {"weight": 1.0, "temperature": 4.0},
    "dkd": {"alpha": 1.0, "beta": 2.0, "temperature": 4.0, "warmup_epochs": 0},
}
DAM = {"heat_channels": 5, "areas": 4}
FULL = {"dafa": {"lr": 0.01}, "dam": DAM}
DAFA = {"dafa": {"lr": 0.01}}
SIGNED = ["ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"]
IMAGES = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(5))
LABELS = torch.arange(16) % 5
INDEX = torch.arange(16)


def pair_of(student=STUDENT, teacher=TEACHER):
    """Networks whose batch norms do something -> (student, teacher, their shapes)."""
    torch.manual_seed(0)
    nets = build_network(student), build_network(teacher)
    for module in nets[1].modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return *nets, Pair(*(tap_shapes(net, 16) for net in nets), LABELS)


def host_of(name, pair, **options):
    torch.manual_seed(1)
    return build_host({"name": name, **OPTIONS[name], **options}, pair)


def made(name="fitnet", student=STUDENT, teacher=TEACHER, host=None, **options):
    """A student and its plug-in -> (student, oriented); a host by name, with options `host`, or any function."""
    net, taught, pair = pair_of(student, teacher)
    built = host_of(name, pair, **(host or {})) if isinstance(name, str) else name
    through_head = getattr(built, "through_head", False)
    frozen = folded(taught, getattr(built, "teacher_preact", False))
    torch.manual_seed(2)
    return net, StudentOriented(built, pair, frozen, folded_classifier(taught) if through_head else None, **options)


def terms_of(net, oriented, **options):
    taught = oriented.teach(IMAGES)
    return oriented(net.taps(IMAGES, oriented.host.student_preact), taught, LABELS, 1, INDEX, **options)


def search(net, oriented, taught=None):
    return oriented.search(net, IMAGES, taught or oriented.teach(IMAGES), LABELS, 1, INDEX)


def optimizer_of(net, oriented):
    return torch.optim.SGD([*net.parameters(), *oriented.parameters()], 0.05, momentum=0.9, weight_decay=5e-4)


def train(net, oriented, steps, search_steps=0, optimizer=None, first=0):
    """The plain loop -> the loss of each step."""
    optimizer, losses = optimizer or optimizer_of(net, oriented), []
    for step in range(first, first + steps):
        torch.manual_seed(step)
        taught = oriented.teach(IMAGES)
        if step < search_steps:
            oriented.search(net, IMAGES, taught, LABELS, 1, INDEX)
        student = net.taps(IMAGES, oriented.host.student_preact)
        terms = oriented(student, taught, LABELS, 1, INDEX)
        loss = F.cross_entropy(student.logits, LABELS) + sum(terms.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        oriented.draw()
        losses.append(loss.item())
    return losses


def states(*modules):
    """Copies of the states, without names of operations, which assert_close does not compare."""
    found = copy.deepcopy([module.state_dict() for module in modules])
    for state in found:
        for extra in state.values():
            if isinstance(extra, dict):
                extra.pop("sub_policies", None)
    return found


def assert_same(first, second):
    torch.testing.assert_close(first, second, rtol=0, atol=0)


# ---------------------------------------------------------------------------------------------------------- reductions


@functools.cache
def plain_host(name):
    """The host alone in a loop of its own, three steps -> states of student and host."""
    net, teacher, pair = pair_of()
    host = host_of(name, pair)
    frozen = folded(teacher, host.teacher_preact)
    optimizer = torch.optim.SGD([*net.parameters(), *host.parameters()], 0.05, momentum=0.9, weight_decay=5e-4)
    for step in range(3):
        torch.manual_seed(step)
        with torch.no_grad():
            taught = frozen(IMAGES)
        student = net.taps(IMAGES, host.student_preact)
        loss = F.cross_entropy(student.logits, LABELS) + host(Lesson(student, taught, LABELS, 1, INDEX))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return states(net, host)


NO_PULL = {"dam": DAM, "area_weight": 0.0, "consistency_weight": 0.0}


@pytest.mark.parametrize("name", HOSTS)
def test_without_both_parts_it_is_the_host_bit_for_bit(name):
    net, oriented = made(name)
    train(net, oriented, 3)
    assert_same(states(net, oriented.host), plain_host(name))
    assert [key for key in oriented.state_dict() if not key.startswith("host.")] == []


@pytest.mark.parametrize("dafa", [{"ops": SIGNED, "probability": 1.0}, {"probability": 0.0}], ids=["still", "silent"])
@pytest.mark.parametrize("name", ["fitnet", "at", "reviewkd", "kd"])
def test_with_a_policy_that_changes_nothing_it_is_the_host_bit_for_bit(name, dafa):
    net, oriented = made(name, dafa=dafa, **NO_PULL)
    train(net, oriented, 3)
    assert_same(states(net, oriented.host), plain_host(name))


def test_a_policy_that_changes_something_is_not_the_host():
    net, oriented = made("fitnet", dafa={"probability": 1.0, "magnitude": 0.9}, **NO_PULL)
    train(net, oriented, 3)
    assert not torch.equal(states(net)[0]["fc.weight"], plain_host("fitnet")[0]["fc.weight"])


def test_one_area_over_the_whole_map_is_fitnet(monkeypatch):
    fitnet = terms_of(*made("fitnet", **DAFA))["host"]
    net, oriented = made("fitnet", dafa=DAFA["dafa"], dam=DAM | {"areas": 1}, host_weight=0.0)
    monkeypatch.setattr(oriented.dam, "areas", lambda found: torch.tensor([[[0, 0, 7, 7]]]).expand(16, 1, 4))
    terms = terms_of(net, oriented)
    torch.testing.assert_close(terms["area"], fitnet, rtol=0, atol=0)
    assert set(terms) == {"area", "consistency"}


def test_a_student_that_follows_the_refined_teacher_has_nothing_left_to_learn():
    net, oriented = made("at", **FULL)
    target = oriented.refine(oriented.teach(IMAGES)).feats[2]

    class Follow(nn.Module):
        def forward(self, feat):
            return target.clone()

    oriented.own_adapter = Follow()
    terms = terms_of(net, oriented)
    assert terms["consistency"] == terms["area"] == 0
    assert terms["host"] > 0


# --------------------------------------------------------------------------------------------------------------- terms


def test_the_terms_are_the_papers():
    weights = {"host_weight": 2.0, "area_weight": 3.0, "consistency_weight": 5.0, "heat_weight": 7.0}
    net, oriented = made("fitnet", **FULL, **weights)
    taught, student = oriented.teach(IMAGES), net.taps(IMAGES)
    terms = oriented(student, taught, LABELS)
    refined = oriented.policy(taught.feats[2])
    adapted = oriented.host.adapter(student.feats[2])
    said = oriented.dam(adapted), oriented.dam(refined)
    cover = oriented.dam.cover(*said)
    expected = {
        "host": 2 * F.mse_loss(adapted, refined),
        "area": 3 * (cover * (adapted - refined) ** 2).mean(),
        "consistency": 5 * consistency_loss(*said),
        "heat": 7 * F.cross_entropy(said[1].heat.mean((2, 3)), LABELS),
    }
    torch.testing.assert_close(terms, expected)
    areas = oriented.look(adapted, refined)
    torch.testing.assert_close(list(areas), [adapted, refined, *said, cover])


def test_facts_say_what_refinement_and_areas_came_to():
    net, oriented = made("fitnet", dafa={"probability": 1.0, "magnitude": 0.9}, dam=DAM)
    facts = {}
    terms_of(net, oriented, facts=facts)
    plain, student = oriented.teach(IMAGES), net.taps(IMAGES)
    refined = oriented.refine(plain)
    areas = oriented.look(oriented.adapter(student.feats[2]), refined.feats[2])
    expected = {
        "distance_before": F.mse_loss(areas.adapted, plain.feats[2]),
        "distance_after": 2 * augmentation_loss(areas.adapted, refined.feats[2]),
        "norm_ratio": refined.feats[2].norm() / plain.feats[2].norm(),
        "covered": (areas.cover > 0).float().mean(),
        "heat_variance": areas.student.heat.sigmoid().var(),
    }
    torch.testing.assert_close(facts, {name: fact.detach() for name, fact in expected.items()})
    assert facts["distance_before"] != facts["distance_after"]


def test_what_the_host_reads_and_the_hint_are_refined_and_nothing_else():
    _, oriented = made("at", teacher=FOUR, **FULL)
    plain = oriented.teach(IMAGES)
    for fires in ([1, 1], [0, 0]):
        oriented.policy.drawn.copy_(torch.tensor([1, *fires, 3]))  # ShearX, then TranslateX
        oriented.policy.magnitude.fill_(0.9)
        oriented.policy._drawn = None
        refined = oriented.refine(plain)
        changed = [not torch.equal(a, b) for a, b in zip(plain.feats, refined.feats, strict=True)]
        assert changed == ([False, False, True, True, True] if fires[0] else [False] * 5)
        assert refined.feats[0] is plain.feats[0]
        assert refined.pooled is plain.pooled
        assert refined.logits is plain.logits


def test_the_pooled_vector_is_refined_where_the_host_reads_it():
    _, oriented = made("reviewkd", dafa={"ops": ["Rotate", "Noise"], "probability": 1.0, "magnitude": 1.0}, dam=None)
    plain = oriented.teach(IMAGES)
    refined = oriented.refine(plain)
    noise = refined.pooled - plain.pooled
    assert noise.shape == (16, 12)
    assert 0.05 < noise.std() < 0.2  # not turned, but 0.1 of noise


@pytest.mark.parametrize("name", ["kd", "dkd", "crd"])
def test_outputs_are_made_of_the_refined_last_map(name):
    _, oriented = made(name, dafa={"probability": 1.0, "magnitude": 0.9}, dam=DAM)
    plain = oriented.teach(IMAGES)
    refined = oriented.refine(plain)
    torch.testing.assert_close(refined.feats[3], oriented.policy(plain.feats[3]))
    torch.testing.assert_close(refined.pooled, refined.feats[3].mean((2, 3)))
    assert not torch.equal(refined.logits, plain.logits)


def test_refinement_with_leaves_has_the_same_values():
    _, oriented = made("kd", **FULL)
    plain = oriented.teach(IMAGES)
    for _ in range(10):
        oriented.draw()
        given, again = (oriented.refine(plain, chi) for chi in (None, oriented.policy.leaves()))
        assert_same([given.logits, *given.feats, given.pooled], [again.logits, *again.feats, again.pooled])


def test_a_function_of_ones_own_sees_refined_features():
    seen = []

    def loss(student, teacher):
        seen.append(teacher)
        return F.mse_loss(student.feats[1].mean(1), teacher.feats[1].mean(1))

    net, oriented = made(loss, reads=(1,), dafa={"probability": 1.0, "magnitude": 0.9, "lr": 0.01}, dam=DAM)
    plain, terms = oriented.teach(IMAGES), terms_of(net, oriented)
    assert set(terms) == {"host", "area", "consistency"}
    assert torch.equal(seen[0].feats[1], oriented.policy(plain.feats[1]))
    assert not torch.equal(seen[0].feats[1], plain.feats[1])
    assert torch.equal(seen[0].feats[3], plain.feats[3])
    assert search(net, oriented)
    losses = train(net, oriented, 3, search_steps=3)
    assert losses[-1] < losses[0]


# ------------------------------------------------------------------------------------------------------------- teacher


def test_the_teacher_never_moves_and_is_no_part_of_the_state():
    net, oriented = made("kd", **FULL)
    frozen, head = oriented._frozen
    before = states(frozen, head)
    taught = oriented.teach(IMAGES)
    oriented.train()
    train(net, oriented, 2, search_steps=1)
    assert_same(states(frozen, head), before)
    assert not frozen.training
    assert not any(x.requires_grad for x in [taught.logits, taught.pooled, *taught.feats])
    refined = oriented.refine(taught)
    assert not any(x.requires_grad for x in [refined.logits, refined.pooled, *refined.feats])
    assert {key.split(".")[0] for key in oriented.state_dict()} == {"policy", "dam", "own_adapter"}
    own = {p.data_ptr() for p in oriented.parameters()}
    assert not any(p.requires_grad or p.grad is not None or p.data_ptr() in own for p in frozen.parameters())


@pytest.mark.parametrize("hypergrad", ["first_order", "finite_diff", "exact"])
def test_the_teacher_is_asked_once_a_step(hypergrad):
    net, oriented = made("fitnet", **FULL, search={"hypergrad": hypergrad})
    calls = []
    oriented._frozen[0].register_forward_hook(lambda *_: calls.append(1))
    train(net, oriented, 3, search_steps=2)
    assert len(calls) == 3


def test_the_student_keeps_nothing_of_the_plug_in():
    net, oriented = made("fitnet", **FULL)
    train(net, oriented, 2, search_steps=1)
    assert list(net.state_dict()) == list(build_network(STUDENT).state_dict())
    build_network(STUDENT).load_state_dict(net.state_dict())


def test_the_teacher_follows_to_another_type():
    net, oriented = made("kd", **FULL)
    oriented.double()
    images = IMAGES.double()
    taught = oriented.teach(images)
    assert taught.logits.dtype == torch.double
    assert oriented.search(net.double(), images, taught, LABELS)
    loss = sum(oriented(net.taps(images), taught, LABELS).values())
    assert loss.dtype == torch.double


# ------------------------------------------------------------------------------------------------------------- adapters


def test_a_host_with_an_adapter_at_the_hint_shares_it():
    net, oriented = made("fitnet", **FULL)
    assert oriented.shares_adapter
    assert oriented.adapter is oriented.host.adapter
    assert [key for key in oriented.state_dict() if "own_adapter" in key] == []
    parts = oriented.host, oriented.dam, oriented.policy
    count = sum(p.numel() for part in parts for p in part.parameters())
    assert sum(p.numel() for p in oriented.parameters()) == count
    # one forward pass: the running statistics move once
    before = oriented.adapter.layers[1].num_batches_tracked.clone()
    terms_of(net, oriented)
    assert oriented.adapter.layers[1].num_batches_tracked == before + 1


@pytest.mark.parametrize("hint", [1, 3, -1])
def test_a_host_with_an_adapter_elsewhere_keeps_it_to_itself(hint):
    net, oriented = made("fitnet", host={"hint": hint}, **FULL)
    assert not oriented.shares_adapter
    assert oriented.adapter is oriented.own_adapter
    terms = terms_of(net, oriented)
    refined = oriented.refine(oriented.teach(IMAGES)).feats[hint]
    torch.testing.assert_close(terms["host"], F.mse_loss(oriented.host.adapter(net.taps(IMAGES).feats[hint]), refined))


def test_one_tap_of_the_teacher_and_two_of_the_student_are_not_shared():
    # from the deep end the teacher's map 3 of 4 stands beside the student's 2 of 3, from the stem beside its 3
    net, oriented = made("fitnet", teacher=FOUR, host={"hint": -2}, hint=3, **FULL)
    assert oriented.host.hint == oriented.hint == 3
    assert not oriented.shares_adapter
    assert all(value.isfinite() for value in terms_of(net, oriented).values())
    net, oriented = made("fitnet", teacher=FOUR, host={"hint": -2}, hint=-2, **FULL)
    assert oriented.shares_adapter


@pytest.mark.parametrize(
    ("name", "options"), [("at", {}), ("kd", {}), ("fitnet", {"host": {"hint": 1}}), ("fitnet", {"host_weight": 0.0})]
)
def test_an_adapter_that_nothing_trains_learns_by_itself(name, options):
    net, oriented = made(name, **DAFA, **options)
    term = terms_of(net, oriented)["adapter"]
    taps = net.taps(IMAGES)
    refined = oriented.refine(oriented.teach(IMAGES)).feats[2]
    torch.testing.assert_close(term, augmentation_loss(oriented.adapter(taps.feats[2]), refined))
    term.backward()
    assert all(p.grad is None for p in net.parameters())
    assert all(p.grad is not None for p in oriented.adapter.parameters())
    assert oriented.adapter.layers[0].weight.grad.any()
    assert search(net, oriented)


@pytest.mark.parametrize("options", [{"dam": DAM}, FULL])
def test_an_adapter_that_areas_train_pulls_at_the_student(options):
    net, oriented = made("at", **options)
    terms = terms_of(net, oriented)
    assert "adapter" not in terms
    terms["area"].backward()
    assert net.layer1[0].conv1.weight.grad.any()
    assert oriented.own_adapter.layers[0].weight.grad.any()


# ------------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("name", HOSTS)
def test_everything_that_trains_gets_a_gradient(name):
    net, oriented = made(name, **FULL, heat_weight=1.0)
    sum(terms_of(net, oriented).values()).backward()
    # a bias before a batch norm, or added to both sides of L_D, changes no loss
    idle = {"own_adapter.layers.0.bias", "host.adapter.layers.0.bias", "dam.offset_head.2.bias"}
    for key, parameter in oriented.named_parameters():
        if key.startswith("policy."):
            assert parameter.grad is None
        else:
            assert parameter.grad.isfinite().all()
            assert key in idle or parameter.grad.any(), key


def test_the_heat_of_the_teacher_trains_the_heads_alone():
    net, oriented = made("fitnet", **FULL, heat_weight=1.0)
    terms_of(net, oriented)["heat"].backward()
    trained = {key for key, p in [*oriented.named_parameters(), *net.named_parameters()] if p.grad is not None}
    assert {key.rsplit(".", 2)[0] for key in trained} == {"dam.heatmap_head"}


def test_heat_is_the_mean_over_the_map_as_class_scores():
    _, oriented = made("fitnet", **FULL)
    found = oriented.dam(torch.randn(16, 8, 8, 8))
    torch.testing.assert_close(heat_loss(found, LABELS), F.cross_entropy(found.heat.mean((2, 3)), LABELS))


def test_a_detached_teacher_teaches_the_heads_nothing():
    losses, slopes = [], []
    for detach in (False, True):
        net, oriented = made("fitnet", **FULL, detach_teacher=detach)
        losses.append(terms_of(net, oriented)["consistency"])
        slopes.append(torch.autograd.grad(losses[-1], oriented.dam.heatmap_head[0].weight)[0])
    assert torch.equal(*losses)
    assert not torch.allclose(*slopes)


@pytest.mark.parametrize("name", ["fitnet", "reviewkd"])
def test_the_plain_loop_learns_one_batch_and_chi_in_the_search_alone(name):
    net, oriented = made(name, **FULL)
    optimizer, start = optimizer_of(net, oriented), oriented.policy.leaves()
    losses = train(net, oriented, 4, 4, optimizer)
    searched = oriented.policy.leaves()
    assert all((a - b).abs().max() > 0.01 for a, b in zip(searched, start, strict=True))
    losses += train(net, oriented, 26, 4, optimizer, first=4)
    assert all(torch.equal(a, b) for a, b in zip(oriented.policy.chi, searched, strict=True))
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


@pytest.mark.parametrize("name", ["fitnet", "crd"])
def test_a_training_taken_up_again_goes_on_as_if_uninterrupted(name):
    net, oriented = made(name, **FULL)
    optimizer = optimizer_of(net, oriented)
    train(net, oriented, 2, 3, optimizer)
    file = io.BytesIO()
    torch.save({"net": net.state_dict(), "oriented": oriented.state_dict(), "sgd": optimizer.state_dict()}, file)
    train(net, oriented, 2, 3, optimizer, first=2)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    again = made(name, **FULL)
    optimizer = optimizer_of(*again)
    for part, key in ((again[0], "net"), (again[1], "oriented"), (optimizer, "sgd")):
        part.load_state_dict(state[key])
    train(*again, 2, 3, optimizer, first=2)
    assert_same(states(*again), states(net, oriented))


# --------------------------------------------------------------------------------------------------------------- search


@pytest.mark.parametrize(
    ("name", "hypergrad"), [*((name, "finite_diff") for name in HOSTS), ("fitnet", "exact"), ("crd", "first_order")]
)
def test_a_search_moves_chi_and_nothing_else(name, hypergrad):
    net, oriented = made(name, **FULL, search={"hypergrad": hypergrad})
    terms_of(net, oriented)
    taught = oriented.teach(IMAGES)
    before, randomness = states(net, oriented), torch.get_rng_state()
    modes = [module.training for module in [*net.modules(), *oriented.modules()]]
    policy = oriented.policy.drawn.clone(), oriented.policy.leaves(), oriented.policy.generator.get_state()
    assert search(net, oriented, taught)
    after = states(net, oriented)
    for state in (before[1], after[1]):
        for key in [key for key in state if key.startswith("policy.")]:
            del state[key]
    assert_same(after, before)
    assert torch.equal(torch.get_rng_state(), randomness)
    assert [module.training for module in [*net.modules(), *oriented.modules()]] == modes
    assert all(p.grad is None for p in [*net.parameters(), *oriented.parameters()])
    assert torch.equal(oriented.policy.drawn, policy[0])
    assert torch.equal(oriented.policy.generator.get_state(), policy[2])
    assert not torch.equal(oriented.policy.alpha, policy[1].alpha)


def test_a_first_search_leaves_crd_to_find_its_constant_in_the_first_step():
    net, oriented = made("crd", **FULL)
    search(net, oriented)
    assert not oriented.host.contrast.has_z
    torch.manual_seed(0)
    terms = terms_of(net, oriented)
    assert oriented.host.contrast.has_z
    assert oriented.host.contrast.log_z.all()
    fresh = made("crd", **FULL)
    torch.manual_seed(0)
    # chi took a step, but from its draw at magnitudes near 1/2
    assert terms["host"].item() == pytest.approx(terms_of(*fresh)["host"].item(), rel=0.2)


@pytest.mark.parametrize("dam", [None, DAM], ids=["alone", "areas"])
@pytest.mark.parametrize("name", ["fitnet", "at", "crd"])
def test_finite_differences_agree_with_exact_on_a_pair(name, dam, monkeypatch):
    # what the loss holds constant may not move between the sides: areas, what a lone adapter learns from
    dafa, found = {"ops": [*SIGNED, "Noise"], "magnitude": 0.7}, {}
    for hypergrad in ("first_order", "finite_diff", "exact"):
        net, oriented = made(name, dafa=dafa, dam=dam, search={"hypergrad": hypergrad, "eta": 0.1})
        net.double()
        oriented.double()
        oriented.policy.drawn.copy_(torch.tensor([8, 1, 1, 3]))  # ShearY and Noise
        monkeypatch.setattr(oriented.policy, "learn", lambda gradient, key=hypergrad: found.update({key: gradient}))
        images = IMAGES.double()
        oriented.search(net, images, oriented.teach(images), LABELS, 1, INDEX)
    for direct, close, exact in zip(*found.values(), strict=True):
        assert (close - exact).norm() < 1e-2 * exact.norm()
        assert (close - exact).norm() < 0.1 * (direct - exact).norm()


def test_crd_shows_both_sides_of_the_difference_the_same_negatives(monkeypatch):
    net, oriented = made("crd", **FULL, search={"hypergrad": "finite_diff"})
    seen, draw = [], oriented.host.contrast.negatives
    monkeypatch.setattr(oriented.host.contrast, "negatives", lambda *args: seen.append(draw(*args)) or seen[-1])
    search(net, oriented)
    assert len(seen) == 3
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[1], seen[2])


@pytest.mark.parametrize("hypergrad", ["first_order", "finite_diff"])
@pytest.mark.parametrize("estimator", ["relax", "dense"])
def test_every_estimator_searches(estimator, hypergrad):
    dafa = {"ops": ["Rotate", "Noise", "ChannelDrop"], "estimator": estimator, "lr": 0.01}
    net, oriented = made("fitnet", dafa=dafa, dam=DAM, search={"hypergrad": hypergrad})
    start = oriented.policy.leaves()
    train(net, oriented, 3, 3)
    assert oriented.policy.skipped == 0
    assert all(not torch.equal(a, b) for a, b in zip(oriented.policy.chi, start, strict=True))


def test_the_virtual_step_is_the_students():
    net, oriented = made("at", **DAFA, search={"eta": 0.5, "weight_decay": 0.1})
    gradients = []
    oriented.policy.learn = gradients.append
    search(net, oriented)
    # by hand: a step of SGD on copies, then the upper loss
    taught, leaves = oriented.teach(IMAGES), oriented.policy.leaves()
    trained = [p for p in [*net.parameters(), *oriented.parameters()] if p.requires_grad]
    taps = net.taps(IMAGES)
    loss = F.cross_entropy(taps.logits, LABELS) + sum(oriented(taps, taught, LABELS).values())
    torch.optim.SGD(trained, 0.5, weight_decay=0.1).zero_grad()
    loss.backward()
    torch.optim.SGD(trained, 0.5, weight_decay=0.1).step()
    adapted = oriented.adapter(net.taps(IMAGES).feats[2])
    upper = augmentation_loss(adapted, oriented.policy(taught.feats[2], leaves))
    expected = oriented.policy.gradient(upper, leaves)
    torch.testing.assert_close(list(gradients[0]), list(expected))


def test_a_search_that_meets_nan_is_left_out_and_counted():
    net, oriented = made("fitnet", **FULL)
    train(net, oriented, 1, 1)
    before = states(net, oriented)
    clean = oriented.teach(IMAGES)
    feats = [feat.clone() for feat in clean.feats]
    feats[2][0, 0, 0, 0] = torch.nan
    assert not search(net, oriented, clean._replace(feats=feats))
    assert oriented.policy.skipped == 1
    after = states(net, oriented)
    after[1]["policy.skipped"] -= 1
    assert_same(after, before)
    losses = train(net, oriented, 2, 2)
    assert all(torch.tensor(losses).isfinite())
    assert oriented.policy.skipped == 1


def test_bf16_autocast_searches_and_trains():
    net, oriented = made("fitnet", **FULL)
    with torch.autocast("cpu", torch.bfloat16):
        assert search(net, oriented)
        terms = terms_of(net, oriented, facts={})
    loss = sum(terms.values())
    loss.backward()
    assert all(term.dtype == torch.float and term.isfinite() for term in terms.values())
    assert net.conv1.weight.grad.isfinite().all()


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [({"hint": 7, **FULL}, "hint=7"), ({"dam": DAM | {"areas": 321}}, "dam.areas=321"),
     ({"dafa": {"ops": ["Noise", "Blur"]}}, "'Blur'"), ({**FULL, "search": {"hypergrad": "darts"}}, "'darts'"),
     ({**FULL, "search": {"hypergrads": "exact"}}, "search takes no 'hypergrads'"),
     ({"dafa": {"estimator": "relax"}, "search": {"hypergrad": "exact"}}, "dafa.estimator")],
)  # fmt: skip
def test_bad_options_are_named(options, message):
    with pytest.raises(InputError, match=message):
        made("fitnet", **options)


def test_a_host_without_second_derivatives_refuses_the_exact_search():
    with pytest.raises(InputError, match=r"exact differentiates ReviewKD twice.*finite_diff"):
        made("reviewkd", **FULL, search={"hypergrad": "exact"})


def test_a_host_of_logits_needs_the_teachers_head():
    _, teacher, pair = pair_of()
    with pytest.raises(InputError, match=r"KD reads no feature maps.*head"):
        StudentOriented(host_of("kd", pair), pair, folded(teacher, False), dafa={})
    StudentOriented(host_of("kd", pair), pair, folded(teacher, False), dam=DAM)


def test_a_function_has_to_say_what_it_reads():
    with pytest.raises(InputError, match="reads"):
        made(lambda student, teacher: student.logits.sum(), **FULL)
    for level in (-1, 5):
        with pytest.raises(InputError, match=rf"reads={level}: the teacher has taps 0..4"):
            made(lambda student, teacher: student.logits.sum(), reads=(level,), **FULL)


def test_operations_that_need_a_larger_map_than_the_hint_are_named():
    net, teacher, _ = pair_of()
    shapes = [tap_shapes(one, 4) for one in (net, teacher)]  # the last map is one cell
    pair = Pair(*shapes)
    with pytest.raises(InputError, match=r"ShearX needs maps of 2 x 2, tap 3 of the teacher is 1 x 1"):
        StudentOriented(host_of("at", pair), pair, folded(teacher, False), hint=-1, dafa={})
    StudentOriented(host_of("at", pair), pair, folded(teacher, False), hint=-1, dafa={"ops": ["Noise", "ChannelDrop"]})


@pytest.mark.parametrize("options", [{}, {"dam": DAM}, {"dafa": {"random": True}, "dam": DAM}])
def test_without_a_policy_to_learn_there_is_no_search(options):
    net, oriented = made("fitnet", **options)
    with pytest.raises(InputError, match="no policy to search for"):
        search(net, oriented)
    oriented.draw()
    train(net, oriented, 1)


def test_adapter_and_noise_are_signed_where_the_teacher_is_taken_before_its_relu():
    for name, signed in (("at", False), ("reviewkd", True)):
        _, oriented = made(name, teacher=FOUR, **FULL)
        assert isinstance(oriented.adapter.layers[-1], torch.nn.ReLU) is not signed
        (noise,) = (operation for operation in oriented.policy.operations if operation.name == "Noise")
        feat = torch.zeros(2, 3, 8, 8)
        changed = noise.apply(feat, torch.tensor(0.1), torch.Generator().manual_seed(0), False)
        assert bool((changed < 0).any()) is signed
