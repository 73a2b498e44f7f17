"""What a student is shown, what is compared, what moves and what may not."""

import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf

from projects.unikd.checkpoints import save_network
from projects.unikd.distill import METHODS, Distiller, Lesson, UniKD, warm_up
from projects.unikd.loss import kd_loss, mlkd_loss
from projects.unikd.module import Distillation, last_stage
from projects.unikd.networks import build_network
from projects.unikd.strong import strong_view
from projects.unikd.taps import Taps
from shared.errors import InputError

STUDENT = {"name": "resnet8", "num_classes": 5, "filters": [4, 4, 6, 8]}
TEACHER = {"name": "resnet14", "num_classes": 5, "filters": [4, 6, 8, 12]}
CONFIGS = sorted((Path(__file__).parents[1] / "configs" / "distill").glob("*.yaml"))
KD = {"kd": {"weight": 1.0, "temperature": 4.0}}
DKD = {"dkd": {"alpha": 1.0, "beta": 2.0, "temperature": 4.0, "warmup_epochs": 4}}
MLKD = {"mlkd": {"weight": 1.0, "temperatures": [2.0, 4.0]}}
FITNET = {"fitnet": {"weight": 1.0, "hint": 2}}
AT = {"at": {"weight": 1.0}}
REVIEW = {"review": {"weight": 1.0, "warmup_epochs": 4}}
UNIKD = OmegaConf.to_container(OmegaConf.load(CONFIGS[0].parent / "unikd.yaml"))["methods"]["unikd"]


def unikd(**options):
    """The published form, whatever the configuration's weights and warm-up are."""
    plain = {"feat_weight": 1.0, "supp_weight": 1.0, "temperature": 1.0, "supp_temperature": 1.0, "warmup_epochs": 0}
    return {"unikd": UNIKD | plain | {"initial_logvar": -1.0} | options}


@pytest.fixture
def made(tmp_path):
    """Make a student and a distiller whose teacher is a file: made(methods, student, teacher, **options)."""

    def make(methods, student=STUDENT, teacher=TEACHER, image_size=16, **options):
        torch.manual_seed(1)
        network = build_network(teacher)
        for module in network.modules():  # statistics that a fold or a training mode would show
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
        save_network(network, teacher, tmp_path / "teacher.safetensors")
        torch.manual_seed(2)
        net = build_network(student)
        arguments = {"ce_weight": 1.0, "preact": False, "cache_teacher": False} | options
        return net, Distiller(net, image_size, str(tmp_path / "teacher.safetensors"), methods=methods, **arguments)

    return make


def batch_of(size=8, side=16, num_classes=5):
    generator = torch.Generator().manual_seed(3)
    label = torch.randint(num_classes, (size,), generator=generator)
    images = torch.rand(size, 3, side, side, generator=generator)
    return images, {"label": label, "index": torch.arange(size), "view": torch.zeros(size, dtype=torch.long)}


def terms(net, distiller, images, batch, epoch=1):
    torch.manual_seed(4)
    strong = None
    if distiller.needs_strong:
        other = strong_view(images, torch.Generator().manual_seed(5))
        strong = other, net(other)
    return distiller(distiller.taps(net, images), images, batch, epoch, strong)


def train(net, distiller, images, batch, steps=2):
    """Take steps of SGD -> the terms of each."""
    optimizer = torch.optim.SGD([*net.parameters(), *distiller.parameters()], 0.01)
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        found.append(terms(net, distiller, images, batch))
        sum(found[-1].values()).backward()
        optimizer.step()
    return found


def without_gradient(module):
    return {name for name, p in module.named_parameters() if p.grad is None or not p.grad.abs().max() > 0}


def methods_of(file):
    """The methods of a file of configs/distill, of the files it follows too."""
    content = OmegaConf.to_container(OmegaConf.load(file))
    followed = [name for name in content.pop("defaults", []) if name != "_self_"]
    found = methods_of(file.with_name(f"{followed[0]}.yaml")) if followed else {}
    return OmegaConf.to_container(OmegaConf.merge(found, content.get("methods") or {}))


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_every_method_trains_and_reaches_its_own_parameters(made, file):
    methods = methods_of(file)
    net, distiller = made(methods)
    images, batch = batch_of()
    first, second = train(net, distiller, images, batch)
    assert all(torch.isfinite(value) for found in (first, second) for value in found.values())
    assert without_gradient(distiller) == set()
    assert without_gradient(net) == set()
    names = {"unikd": ["feat", "supp"]}
    used = [name for name, options in methods.items() if options is not None]
    expected = {"ce", *itertools.chain(*(names.get(name, [name]) for name in used))}
    assert set(first) == expected | ({"ce_strong"} if "mlkd" in used else set())
    assert all(value > 0 for value in first.values())


def test_every_method_has_a_configuration():
    assert set(METHODS) == {name for file in CONFIGS for name in methods_of(file)}


@pytest.mark.parametrize("feature_loss", ["sampled_kl", "mean_kl", "gaussian_kl"])
@pytest.mark.parametrize("student_features", ["fused", "deep"])
@pytest.mark.parametrize("teacher_features", ["fused", "shallow", "deep"])
def test_every_variant_of_unikd_trains(made, feature_loss, student_features, teacher_features):
    net, distiller = made(unikd(
        feature_loss=feature_loss, student_features=student_features, teacher_features=teacher_features,
        detach_teacher_dist=feature_loss == "gaussian_kl",
    ))  # fmt: skip
    found = train(net, distiller, *batch_of())
    assert all(torch.isfinite(value) for part in found for value in part.values())
    # what predicts a variance that the loss does not look at
    idle = {"sampled_kl": (), "mean_kl": ("student", "teacher"), "gaussian_kl": ("teacher",)}[feature_loss]
    expected = {f"methods.unikd.fdp_{who}.logvar.{kind}" for who in idle for kind in ("weight", "bias")}
    assert without_gradient(distiller) == expected
    method = distiller.methods["unikd"]
    assert (method.aff_student is not None) == (student_features == "fused")
    assert (method.aff_teacher is not None) == (teacher_features == "fused")


@pytest.mark.parametrize("options", [{"norm": "bn"}, {"mid_channels": 7}, {"share_fdp": True}, {"warmup_epochs": 2}])
def test_options_of_unikd_train(made, options):
    net, distiller = made(unikd(**options))
    assert all(torch.isfinite(value) for found in train(net, distiller, *batch_of()) for value in found.values())
    assert without_gradient(distiller) == set()
    method = distiller.methods["unikd"]
    assert (method.fdp_student is method.fdp_teacher) == ("share_fdp" in options)
    assert method.aff_student.squeeze[0][0].out_channels == options.get("mid_channels", 8)


def test_teacher_stays_what_it_was_in_eval_mode_and_out_of_the_state(made):
    teacher = {"name": "wrn_16_1", "num_classes": 5}  # some of its batch norms stay when folded
    net, distiller = made(unikd() | FITNET, teacher=teacher)
    networks = list(distiller._teacher[0].values())
    assert len(networks) == 2
    assert any(isinstance(m, torch.nn.BatchNorm2d) for network in networks for m in network.modules())
    before = [{key: value.clone() for key, value in network.state_dict().items()} for network in networks]
    distiller.train()
    net.train()
    train(net, distiller, *batch_of())
    for network, state in zip(networks, before, strict=True):
        assert not any(module.training for module in network.modules())
        assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
        assert not any(p.requires_grad for p in network.parameters())
    assert {key.split(".")[0] for key in distiller.state_dict()} == {"methods"}
    taught = {id(p) for network in networks for p in network.parameters()}
    assert not taught & {id(p) for p in distiller.parameters()}


def test_teacher_moves_where_the_distiller_moves(made):
    _, distiller = made(KD)
    distiller.to(torch.float64)
    images = batch_of()[0].double()
    assert distiller.teach(images)[False].logits.dtype == torch.float64


def test_student_alone_asks_no_teacher_and_learns_from_labels_only(made, monkeypatch):
    net, distiller = made({}, ce_weight=0.5)
    monkeypatch.setattr(distiller, "teach", lambda _: pytest.fail("the teacher ran"))
    images, batch = batch_of()
    found = terms(net, distiller, images, batch)
    torch.testing.assert_close(found, {"ce": 0.5 * F.cross_entropy(net(images), batch["label"])})
    assert list(distiller.parameters()) == []


def test_terms_are_those_of_the_losses(made):
    net, distiller = made(KD | DKD)
    images, batch = batch_of()
    found = terms(net, distiller, images, batch)
    logits = net(images), distiller.teach(images)[False].logits
    assert found["kd"].item() == pytest.approx(kd_loss(*logits, 4.0).item())
    net, distiller = made(MLKD)
    strong = strong_view(images, torch.Generator().manual_seed(5))
    found = terms(net, distiller, images, batch)
    views = [
        logits
        for network in (net, lambda x: distiller.teach(x)[False].logits)
        for logits in (network(images), network(strong))
    ]
    assert found["mlkd"].item() == pytest.approx(mlkd_loss(*views, [2.0, 4.0]).item(), rel=1e-5)
    assert found["ce_strong"].item() == pytest.approx(F.cross_entropy(net(strong), batch["label"]).item())


@pytest.mark.parametrize("num_views", [1, 2])
def test_kept_logits_give_the_losses_of_asked_ones(made, monkeypatch, num_views):
    net, distiller = made(KD | DKD, cache_teacher=True)
    assert distiller.cache_teacher
    images, batch = batch_of()
    views = torch.stack([images, images.flip(3)])[:num_views]
    batch["view"] = torch.arange(8) % num_views
    batch["index"] = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    shown = views[batch["view"], batch["index"]]
    asked = terms(net, distiller, shown, batch)
    distiller.fill_cache(iter([iter(view.split(3)) for view in views]))
    assert distiller._cache.shape == (num_views, 8, 5)
    monkeypatch.setattr(distiller, "teach", lambda _: pytest.fail("the teacher ran"))
    torch.testing.assert_close(terms(net, distiller, shown, batch), asked)


@pytest.mark.parametrize("methods", [{}, FITNET | KD, MLKD])
def test_logits_are_not_kept_where_they_are_not_all(made, methods):
    assert not made(methods, cache_teacher=True)[1].cache_teacher


def test_warm_up_counts_epochs_from_one(made):
    assert [warm_up(epoch, 4) for epoch in (1, 2, 4, 5)] == [0.25, 0.5, 1, 1]
    assert warm_up(1, 0) == 1
    net, distiller = made(KD | DKD | REVIEW | unikd(warmup_epochs=4))
    first, third = (terms(net, distiller, *batch_of(), epoch=epoch) for epoch in (1, 3))
    for name in ("dkd", "review", "feat", "supp"):
        assert third[name].item() == pytest.approx(3 * first[name].item(), rel=1e-4)
    assert third["kd"].item() == first["kd"].item()


def gradient_of(term, tensors):
    found = torch.autograd.grad(term, tensors, retain_graph=True, allow_unused=True)
    return sum(0 if g is None else g.abs().sum().item() for g in found)


@pytest.mark.parametrize("detach", [True, False])
def test_supplementary_loss_moves_the_students_logits_only_where_it_may(made, detach):
    net, distiller = made(unikd(detach_targets=detach))
    found = terms(net, distiller, *batch_of())
    assert (gradient_of(found["supp"], [net.fc.weight, net.fc.bias]) == 0) == detach
    assert gradient_of(found["supp"], [net.conv1.weight]) > 0


@pytest.mark.parametrize("feature_loss", ["sampled_kl", "mean_kl", "gaussian_kl"])
@pytest.mark.parametrize("detach", [True, False])
def test_feature_loss_moves_the_teachers_side_only_where_it_may(made, feature_loss, detach):
    if feature_loss == "gaussian_kl" and not detach:
        with pytest.raises(InputError, match=r"gaussian_kl collapses without unikd\.detach_teacher_dist=true"):
            made(unikd(feature_loss=feature_loss, detach_teacher_dist=detach))
        return
    net, distiller = made(unikd(feature_loss=feature_loss, detach_teacher_dist=detach))
    method, found = distiller.methods["unikd"], terms(net, distiller, *batch_of())
    theirs = [*method.aff_teacher.parameters(), *method.fdp_teacher.parameters()]
    assert (gradient_of(found["feat"], theirs) == 0) == detach
    assert gradient_of(found["supp"], theirs) > 0
    assert gradient_of(found["feat"], [*method.aff_student.parameters()]) > 0


def test_sample_of_the_supplementary_loss_is_that_of_the_feature_loss(made):
    net, distiller = made(unikd(feat_weight=2.0, supp_weight=3.0, temperature=2.0))
    images, batch = batch_of()
    method, student = distiller.methods["unikd"], distiller.taps(net, images)
    teacher = distiller.teach(images)[True]
    torch.manual_seed(4)
    found = method(Lesson(student, teacher, batch["label"], 1))
    torch.manual_seed(4)
    z = [mu + torch.randn_like(mu) * (logvar / 2).exp()
         for mu, logvar in (method.student_distribution(student), method.teacher_distribution(teacher))]  # fmt: skip
    assert found["feat"].item() == pytest.approx(2 * kd_loss(*z, 2.0).item())
    supp = kd_loss(z[0], student.logits, 1.0) + kd_loss(z[1], teacher.logits, 1.0)
    assert found["supp"].item() == pytest.approx(3 * supp.item())


PAIRS = {
    "resnet8 under vgg": (STUDENT, {"name": "vgg8", "num_classes": 5, "widths": [4, 6, 8, 10, 12]}),
    "MobileNetV2 under resnet": ({"name": "MobileNetV2", "num_classes": 5, "width": 0.25}, TEACHER),
    "ShuffleV2 under resnet20": (
        {"name": "ShuffleV2", "num_classes": 5, "net_size": 0.3}, {"name": "resnet20", "num_classes": 5},
    ),
    "wrn under resnet50": (
        {"name": "wrn_16_1", "num_classes": 5}, {"name": "ResNet50", "num_classes": 5, "width": 4},
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("student", "teacher"), PAIRS.values(), ids=PAIRS)
def test_unlike_pairs_are_aligned_from_the_deep_end(made, student, teacher):
    net, distiller = made(AT | REVIEW | unikd(), student, teacher, image_size=32)
    images, batch = batch_of(4, 32)
    first, _ = train(net, distiller, images, batch)
    assert all(torch.isfinite(value) for value in first.values())
    assert without_gradient(distiller) == set()
    lesson = Lesson(distiller.taps(net, images), distiller.teach(images)[True], batch["label"], 1)
    counts = [len(taps.feats) for taps in lesson[:2]]
    for who in ("student", "teacher"):
        taps = getattr(lesson, who)
        surplus = len(taps.feats) - min(counts)
        for number, feat in enumerate(taps.feats):
            # the stem and what the other network has no level for; a fused level sees all deeper ones, so start below
            other = [*taps.feats[:number], feat.detach().roll(1, 0) + 1, *taps.feats[number + 1 :]]
            changed = lesson._replace(**{who: taps._replace(feats=other)})
            same = {
                name: torch.equal(distiller.methods[name](changed)[name], distiller.methods[name](lesson)[name])
                for name in ("at", "review")
            }
            assert same == dict.fromkeys(("at", "review"), number <= surplus), (who, number)


@pytest.mark.parametrize("methods", [KD, DKD, MLKD, {"dist": {"beta": 1.0, "gamma": 1.0, "temperature": 4.0}}, unikd()])
def test_two_classes_are_enough(made, methods):
    net, distiller = made(methods, STUDENT | {"num_classes": 2}, TEACHER | {"num_classes": 2})
    found = train(net, distiller, *batch_of(num_classes=2), steps=3)
    assert all(torch.isfinite(value) for part in found for value in part.values())
    assert all(torch.isfinite(p).all() for p in net.parameters())


def test_preactivations_are_shown_where_they_are_asked_for(made, monkeypatch):
    for preact, methods, expected in ((True, unikd(), True), (False, unikd(), False), (True, FITNET, False)):
        net, distiller = made(methods, preact=preact)
        assert distiller.student_preact == expected
        signed = (distiller.taps(net, batch_of()[0]).feats[1] < 0).any()
        assert signed == expected
        assert [(taps.feats[1] < 0).any() for taps in distiller.teach(batch_of()[0]).values()] == [
            methods is not FITNET
        ]


def test_methods_together_are_shown_what_each_asks_for(made):
    each = AT, KD, unikd(feature_loss="mean_kl")
    together = terms(*made(each[0] | each[1] | each[2]), *batch_of())
    for methods in each:
        for name, value in terms(*made(methods), *batch_of()).items():
            assert together[name].item() == pytest.approx(value.item(), rel=1e-5)


@pytest.mark.parametrize(("arguments", "message"), [
    ({"methods": {"kdd": {}}}, "unknown distillation method 'kdd'; choose from kd, dkd"),
    ({"methods": {"kd": {"weight": 1.0, "temperature": 4.0, "tau": 1}}}, r"distill\.methods\.kd: .*'tau'"),
    ({"methods": {"kd": {"weight": 1.0}}}, r"distill\.methods\.kd: .*'temperature'; its file in configs/distill"),
    ({"methods": {"kd": {"weight": 1.0, "temperature": 0}}}, r"kd\.temperature is above 0, not 0"),
    ({"methods": {"mlkd": {"weight": 1.0, "temperatures": []}}}, r"mlkd\.temperatures is above 0, not \[\]"),
    ({"methods": {"review": {"weight": 1.0, "warmup_epochs": -1}}}, r"review\.warmup_epochs is at least 0"),
    ({"methods": {"fitnet": {"weight": 1.0, "hint": 7}}}, "fitnet.hint=7: the student has maps 0..3, the teacher 0..3"),
    ({"methods": unikd(feature_loss="mse")}, "unknown unikd.feature_loss 'mse'; choose one of sampled_kl"),
    ({"methods": unikd(student_features="shallow")}, "unknown unikd.student_features 'shallow'"),
    ({"methods": unikd(teacher_features="stem")}, "unknown unikd.teacher_features 'stem'"),
    ({"methods": unikd(norm="layer")}, "unknown norm 'layer'"),
    ({"methods": unikd(mid_channels=0)}, "at least 1"),
    ({"methods": unikd(share_fdp=True, student_features="deep")}, "features are 8 wide, the teacher's 6; use two"),
    ({"methods": KD, "teacher": TEACHER | {"num_classes": 7}},
     r"tells 5 classes apart, the teacher .*teacher\.safetensors 7"),
    ({"methods": unikd(), "student": {"name": "MobileNetV2", "num_classes": 5}, "preact": True, "image_size": 32},
     "the student, a MobileNetV2, has no features before a ReLU"),
    ({"methods": unikd(), "teacher": {"name": "MobileNetV2", "num_classes": 5}, "image_size": 32},
     "the teacher, a MobileNetV2, has no features before a ReLU"),
    ({"methods": unikd() | FITNET, "preact": True}, "say distill.preact=false or leave one out"),
    ({"methods": {"fitnet": {"weight": 1.0, "hint": -1}}, "student": {"name": "MobileNetV2", "num_classes": 5},
      "image_size": 32}, "no hint from a teacher's map of side 8 to a student's of side 2"),
])  # fmt: skip
def test_what_cannot_be_taught_is_named(made, arguments, message):
    with pytest.raises(InputError, match=message):
        made(**arguments)


def test_teacher_that_cannot_be_read_is_named(tmp_path):
    save_network(build_network(TEACHER), TEACHER, tmp_path / "teacher.safetensors")
    content = (tmp_path / "teacher.safetensors").read_bytes()
    (tmp_path / "short.safetensors").write_bytes(content[: len(content) // 2])
    for teacher, message in (
        (str(tmp_path / "short.safetensors"), "short.safetensors is not a checkpoint or is damaged"),
        ("absent.safetensors", "no checkpoint at absent.safetensors"), (None, "say model.distill.teacher=<file>"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            Distiller(build_network(STUDENT), 16, teacher, 1.0, KD, False, False)


def lightning_module(**options):
    torch.manual_seed(0)
    return Distillation(STUDENT, {"lr": 0.1}, {"milestones": [2], "gamma": 0.1}, **options)


def test_gradient_cosine_is_that_of_feature_and_logit_terms():
    module = lightning_module()
    images, batch = batch_of()
    logits = module.net(images)
    target = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    one, other = kd_loss(logits, target, 4.0), F.cross_entropy(logits, batch["label"])
    gradients = [
        torch.cat(
            [
                g.flatten()
                for g in torch.autograd.grad(
                    term, [p for p in module.net.layer3.parameters() if p.ndim > 1], retain_graph=True
                )
            ]
        )
        for term in (one, other)
    ]
    cosine = F.cosine_similarity(*gradients, dim=0).item()
    assert abs(cosine) < 0.99
    for found, expected in (
        ({"feat": 0.1 * one, "kd": one, "ce": other}, 1), ({"feat": -one, "dkd": one}, -1),
        ({"fitnet": other, "kd": one}, cosine),
        ({"feat": one / 2, "review": one / 2, "kd": other / 2, "dist": other / 2}, cosine),
    ):  # fmt: skip
        module.cosines.zero_()
        module.look_at_gradients(found)
        assert module.cosines.tolist() == pytest.approx([expected, 1], abs=1e-5)
    module.cosines.zero_()
    module.look_at_gradients({"ce": other, "kd": one})
    assert module.cosines.tolist() == [0, 0]
    assert all(p.grad is None for p in module.parameters())


@pytest.mark.parametrize("name", ["resnet8", "wrn_16_1", "vgg8", "MobileNetV2", "ShuffleV1", "ShuffleV2", "ResNet18"])
def test_last_stage_is_the_deepest_that_convolves(name):
    with torch.device("meta"):
        net = build_network({"name": name, "num_classes": 5})
    names = {id(part): key for key, part in net.named_children()}
    expected = {
        "resnet8": "layer3", "wrn_16_1": "block3", "vgg8": "block4", "MobileNetV2": "conv2", "ShuffleV1": "layer3",
        "ShuffleV2": "conv2", "ResNet18": "layer4",
    }  # fmt: skip
    assert names[id(last_stage(net))] == expected[name]


def test_mistyped_arguments_stop_before_any_teacher_is_read():
    given = {"teacher": "absent", "ce_weight": 1.0, "methods": KD, "preact": False, "cache_teacher": True}
    assert lightning_module(distill=given).distiller is None
    for distill, message in (
        (given | {"cewight": 1}, "model.distill: .*'cewight'"), ({"teacher": "absent"}, "model.distill: .*'ce_weight'"),
        (given | {"methods": {"kdd": {}}}, "'kdd'"), (given | {"methods": {"kd": {"weigth": 1}}}, "'weight'"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            lightning_module(distill=distill)
    for optimizer, scheduler, message in (
        ({"learning_rate": 1}, {"milestones": [1], "gamma": 0.1}, "model.optimizer: .*learning_rate"),
        ({"lr": -1}, {"milestones": [1], "gamma": 0.1}, "model.optimizer: Invalid learning rate"),
        ({"lr": 1}, {"milestone": [1], "gamma": 0.1}, "model.scheduler takes milestones and gamma, not milestone"),
    ):
        with pytest.raises(InputError, match=message):
            Distillation(STUDENT, optimizer, scheduler).configure_optimizers()


def test_unikd_alone_can_be_used_without_lightning(made):
    net, distiller = made(unikd())
    method = distiller.methods["unikd"]
    assert isinstance(method, UniKD)
    taps = distiller.taps(net, batch_of()[0])
    assert isinstance(taps, Taps)
    for found in (
        *method.student_distribution(taps),
        *method.teacher_distribution(distiller.teach(batch_of()[0])[True]),
    ):
        assert found.shape == (8, 5)
