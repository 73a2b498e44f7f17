"""Training, validation and test of a classifier, alone or with a teacher."""

from inspect import signature

import lightning.pytorch as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.errors import InputError
from shared.io.checkpoints import load_strictly

from .checkpoints import read_network
from .correlation import class_correlation, correlation_distance
from .distill import Distiller, check_methods
from .networks import build_network
from .strong import strong_view

FEATURE_TERMS = ("fitnet", "at", "review", "feat")
LOGIT_TERMS = ("kd", "dkd", "mlkd", "dist")
MANY_CLASSES = 100  # from here on the literature reports top-5 too
MAX_VIEWS = 2  # of an image, whose teacher's logits are kept


class Distillation(L.LightningModule):
    """A student under the recipe. All arguments are plain data, saved as hyperparameters.

    Args:
        net: {"name", "num_classes"} of networks.py, and what overrides the network's arguments.
        optimizer: arguments of SGD, for the student and the modules of the methods alike.
        scheduler: {"milestones", "gamma"}: the learning rate is multiplied by gamma after each of these epochs, counted
            from 1; null milestones make a cosine down to 0 over the training.
        distill: arguments of `Distiller`, or null for no teacher.
        cosine_every: steps between two looks at the cosine between the gradients of feature and logit terms; 0 for
            none.

    Attributes:
        test_logits: after a test, logits (N, K) of the test set: "student" and, where there is one, "teacher".

    Raises:
        InputError: an unknown network, method or argument.
    """

    def __init__(self, net: dict, optimizer: dict, scheduler: dict, distill: dict | None = None, cosine_every: int = 0):
        super().__init__()
        if distill:  # built only when its teacher is needed; mistyped keys stop now
            try:
                signature(Distiller).bind(None, 0, **distill)
            except TypeError as error:
                raise InputError(f"model.distill: {error}") from error
            check_methods(distill["methods"])
        self.save_hyperparameters()
        self.net = build_network(net).to(memory_format=torch.channels_last)
        self.distiller: Distiller | None = None
        self.test_logits: dict[str, Tensor] = {}
        self._outputs: list[dict[str, Tensor]] = []
        # sum and number of the cosines; in the checkpoint, so that a resumed run averages over all
        self.register_buffer("cosines", torch.zeros(2, dtype=torch.float64))

    def setup(self, stage: str) -> None:
        data = self.trainer.datamodule
        if data.num_classes != self.hparams.net["num_classes"]:
            raise InputError(
                f"{data.name} has {data.num_classes} classes, the network {self.hparams.net['num_classes']}; "
                f"say num_classes={data.num_classes} or give a checkpoint of this data set"
            )
        if self.hparams.distill and self.distiller is None:
            self.distiller = Distiller(self.net, data.image_size, **self.hparams.distill)

    def on_fit_start(self) -> None:
        """Ask the teacher once for all, where it always says the same."""
        data = self.trainer.datamodule
        few = data.num_views is not None and data.num_views <= MAX_VIEWS
        if self.distiller and self.distiller.cache_teacher and few:
            self.distiller.fill_cache(map(data.normalize, view) for view in data.every_view(self.device))

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        """Leave the methods' modules out where nothing is distilled any more."""
        if self.distiller is None:
            state = checkpoint["state_dict"]
            checkpoint["state_dict"] = {key: state[key] for key in state if not key.startswith("distiller.")}

    def configure_optimizers(self) -> dict:
        if self.hparams.scheduler.keys() != {"milestones", "gamma"}:
            raise InputError(f"model.scheduler takes milestones and gamma, not {', '.join(self.hparams.scheduler)}")
        try:
            optimizer = torch.optim.SGD(self.parameters(), **self.hparams.optimizer)
        except (TypeError, ValueError) as error:
            raise InputError(f"model.optimizer: {error}") from error
        milestones, gamma = self.hparams.scheduler["milestones"], self.hparams.scheduler["gamma"]
        if milestones is None:
            steps = int(self.trainer.estimated_stepping_batches)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "epoch"}}

    def forward(self, images: Tensor) -> Tensor:
        """Give logits (B, K) of images (B, 3, H, W) in [0, 1]."""
        return self.net(self.inputs(images))

    def inputs(self, images: Tensor) -> Tensor:
        """Normalise images as the data set asks, in the memory format that convolutions prefer."""
        return self.trainer.datamodule.normalize(images).contiguous(memory_format=torch.channels_last)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        images = self.inputs(batch["images"])
        if self.distiller is None:
            logits = self.net(images)
            terms = {"ce": F.cross_entropy(logits.float(), batch["label"])}
        else:
            student = self.distiller.taps(self.net, images)
            strong = None
            if self.distiller.needs_strong:
                # from torch's own stream, which the runner seeds by (seed, epoch, process)
                generator = torch.Generator(self.device).manual_seed(int(torch.randint(2**62, ())))
                other = self.inputs(strong_view(batch["images"], generator))
                strong = other, self.net(other)
            terms = self.distiller(student, images, batch, self.current_epoch + 1, strong)
            logits = student.logits
            for name, term in terms.items():
                self.log(f"train/loss/{name}", term.detach(), on_step=False, on_epoch=True)
            if self.hparams.cosine_every and self.global_step % self.hparams.cosine_every == 0:
                self.look_at_gradients(terms)
        loss = torch.stack(list(terms.values())).sum()
        self.log("train/loss", loss.detach(), on_step=False, on_epoch=True, prog_bar=True)
        hits = (logits.detach().argmax(1) == batch["label"]).float().mean()
        self.log("train/top1", 100 * hits, on_step=False, on_epoch=True)
        return loss

    def look_at_gradients(self, terms: dict[str, Tensor]) -> None:
        """Note the cosine between the gradients of feature and logit terms on the weights of the last stage."""
        weights = [p for p in last_stage(self.net).parameters() if p.ndim > 1]
        flat = []
        for names in (FEATURE_TERMS, LOGIT_TERMS):
            chosen = [term for name, term in terms.items() if name in names]
            if not chosen:
                return
            found = torch.autograd.grad(sum(chosen), weights, retain_graph=True, allow_unused=True)
            flat.append(torch.cat([torch.zeros_like(w).flatten() if g is None else g.flatten()
                                   for g, w in zip(found, weights, strict=True)]))  # fmt: skip
        self.cosines += self.cosines.new_tensor([F.cosine_similarity(*flat, dim=0).item(), 1])

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        logits = self(batch["images"]).float()
        size = len(logits)
        self.log("val/loss", F.cross_entropy(logits, batch["label"]), batch_size=size)
        self.log("val/top1", top_k(logits, batch["label"], 1), prog_bar=True, batch_size=size)

    def test_step(self, batch: dict, batch_idx: int) -> None:
        with torch.autocast(self.device.type, enabled=False):  # scores are of float32, whatever the training was in
            images = self.inputs(batch["images"])
            found = {"student": self.net(images), "label": batch["label"]}
            if self.distiller is not None:
                taught = self.distiller.teach(images)
                found["teacher"] = next(iter(taught.values())).logits
                if "unikd" in self.distiller.methods:
                    method = self.distiller.methods["unikd"]
                    distribution = method.teacher_distribution(taught[method.teacher_preact])
                    found["mu_teacher"], found["logvar_teacher"] = distribution
            self._outputs.append(found)

    def on_test_epoch_end(self) -> None:
        """Log the scores of student and teacher, how alike they see the classes, and what became of the teacher's FDP.

        Of the last, the variance of mu over the samples, 0 where it collapsed, and the mean log variance.
        """
        whole = {key: torch.cat([part[key] for part in self._outputs]) for key in self._outputs[0]}
        self._outputs.clear()
        name, label = self.trainer.datamodule.name, whole.pop("label")
        mu, logvar = whole.pop("mu_teacher", None), whole.pop("logvar_teacher", None)
        self.test_logits = whole
        for k in (1, 5) if self.hparams.net["num_classes"] >= MANY_CLASSES else (1,):
            self.log(f"test/{name}/top{k}", top_k(whole["student"], label, k))
            if "teacher" in whole:
                self.log(f"peer/teacher/{name}/top{k}", top_k(whole["teacher"], label, k))
        if "teacher" in whole:
            distance = correlation_distance(*(class_correlation(whole[who].double()) for who in ("student", "teacher")))
            self.log(f"test/{name}/correlation_distance", distance[0].float())
        if mu is not None:
            self.log(f"test/{name}/mu_teacher_variance", mu.var(0).mean())
            self.log(f"test/{name}/logvar_teacher", logvar.mean())
        if self.cosines[1]:
            self.log(f"test/{name}/gradient_cosine", (self.cosines[0] / self.cosines[1]).float())


def top_k(logits: Tensor, label: Tensor, k: int) -> Tensor:
    """Give the share, in percent, of rows of (B, K) whose label (B,) is among the k largest."""
    return 100 * (logits.topk(k, 1).indices == label[:, None]).any(1).float().mean()


def last_stage(network: nn.Module) -> nn.Module:
    """Find the deepest part of a network that convolves."""
    return [part for part in network.children() if any(isinstance(m, nn.Conv2d) for m in part.modules())][-1]


def load_module(path: str, teacher: str | None = None, **options) -> Distillation:
    """Wrap a checkpoint of ours or a published one for the test.

    Args:
        path: any file that `load_published` reads.
        teacher: a checkpoint to compare with.
        options: of `read_network`, for `path`.

    Raises:
        InputError: the file cannot be read or holds another network.
    """
    arguments, state = read_network(path, **options)
    distill = {"teacher": teacher, "ce_weight": 1.0, "methods": {}, "preact": False, "cache_teacher": False}
    module = Distillation(arguments, {}, {}, distill if teacher else None)
    load_strictly(module.net, state, path)
    return module
