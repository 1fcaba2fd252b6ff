"""What one step computes: mixing, the forward pass, the class counts and the loss."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from methods import losses, mixup
from methods.gradients import Components, components
from methods.mixup import StepDraws
from methods.regularizers import CollapseRegularizer
from utils.errors import InputError


class MethodOutput(NamedTuple):
    loss: Tensor  # scalar, mean over the batch, with the regularizers
    logits: Tensor  # [B, C], raw
    features: Tensor  # [B, D]


class Settings(NamedTuple):
    """Every number that some loss reads; each loss takes the ones it knows."""

    class_counts: Tensor  # int64 [C], of the training set
    clamp: float | None = 30.0
    tau: float = 1.0
    focal_alpha: float = 1.0
    focal_gamma: float = 2.0
    smooth_head: float | None = None
    smooth_tail: float | None = None
    smooth_shape: str = "concave"
    smooth_power: float | None = None
    max_margin: float = 0.5
    cosine_scale: float = 30.0


class Criterion(nn.Module):
    """A ``*_terms`` function of :mod:`methods.losses` with its options; tensors among them are buffers.

    The buffers follow from data and configuration, so no checkpoint keeps them.
    """

    def __init__(self, terms: Callable[..., losses.Terms], **options):
        super().__init__()
        self.terms = terms
        self.options = {name: value for name, value in options.items() if not isinstance(value, Tensor)}
        self.tensors = [name for name, value in options.items() if isinstance(value, Tensor)]
        for name in self.tensors:
            self.register_buffer(name, options[name], persistent=False)

    def forward(self, logits: Tensor, class_counts: Tensor) -> losses.Terms:
        return self.terms(logits, class_counts, **self.options, **{name: getattr(self, name) for name in self.tensors})


def _smoothing(s: Settings) -> Tensor:
    if s.smooth_head is None or s.smooth_tail is None:
        raise InputError("loss: las needs smooth_head and smooth_tail, such as 0.3 and 0.0")
    return losses.smoothing_by_count(s.class_counts, s.smooth_head, s.smooth_tail, s.smooth_shape, s.smooth_power)


def _prior(s: Settings) -> Tensor:
    return s.class_counts / s.class_counts.sum()


def _margins(s: Settings) -> Tensor:
    return losses.ldam_margins(s.class_counts, s.max_margin)


LOSSES: dict[str, Callable[[Settings], Criterion]] = {
    "ce": lambda s: Criterion(losses.ce_terms),
    "arb": lambda s: Criterion(losses.arb_terms, clamp=s.clamp, tau=s.tau),
    "focal_arb": lambda s: Criterion(losses.focal_arb_terms, clamp=s.clamp, alpha=s.focal_alpha, gamma=s.focal_gamma),
    "weighted_arb": lambda s: Criterion(losses.weighted_arb_terms, clamp=s.clamp),
    "las": lambda s: Criterion(losses.smoothing_terms, smoothing=_smoothing(s)),
    "logit_adjustment": lambda s: Criterion(losses.logit_adjustment_terms, prior=_prior(s), tau=s.tau),
    "ldam": lambda s: Criterion(losses.ldam_terms, margins=_margins(s), scale=s.cosine_scale),
    "dot_regression": lambda s: Criterion(losses.dot_regression_terms),
}


def step_counts(kind: str, targets: Tensor, class_counts: Tensor, step_targets: Tensor | None = None) -> Tensor:
    """The n of one pass, [C]: which counts ARB-Loss reads.

    ``targets [B]``, unmixed; ``class_counts [C]`` of the training set; ``step_targets [G]`` of the whole global batch,
    None where that is ``targets``. ``global``: the training set's; ``batch``: this process's batch; ``batch_synced``:
    the global batch's; ``global_masked``: the training set's, 0 for classes absent from the batch; ``batch_unmasked``:
    the batch's, B n_k / N for classes absent from it.
    """
    if kind == "global":
        return class_counts
    if kind == "batch_synced" and step_targets is not None:
        return losses.count_classes(step_targets, len(class_counts))
    batch = losses.count_classes(targets, len(class_counts))
    if kind in ("batch", "batch_synced"):
        return batch
    if kind == "global_masked":
        return torch.where(batch > 0, class_counts, 0)
    return torch.where(batch > 0, batch, len(targets) * class_counts / class_counts.sum())


COUNTS = ("global", "batch", "batch_synced", "global_masked", "batch_unmasked")


class Method(nn.Module):
    """One training step's mathematics; the loop knows nothing of losses, counts, mixup or what sets in later."""

    def __init__(
        self,
        criterion: nn.Module,
        counts: str,
        class_counts: Tensor,
        mixup_alpha: float,
        drw: tuple[int, Tensor] | None = None,
        regularizer: tuple[int, CollapseRegularizer] | None = None,
        means_lr: float = 0.5,
    ):
        """``drw``: from which epoch on losses are weighted, and the weights [C] (deferred re-weighting).

        ``regularizer``: from which epoch on it is added, and itself. Before, it is off and its means stay as they are,
        as the paper has it; the released code keeps both terms, with the means frozen. ``means_lr``: theirs.
        """
        super().__init__()
        self.criterion = criterion
        self.counts = counts
        self.mixup_alpha = mixup_alpha
        self.register_buffer("class_counts", class_counts, persistent=False)
        self.drw_epoch, weights = drw or (None, None)
        self.register_buffer("drw_weights", weights, persistent=False)
        self.regularizer_epoch, self.regularizer = regularizer or (None, None)
        self.means_lr = means_lr
        self.weighted = self.regularized = False
        self.start_epoch(0)

    @property
    def clamp(self) -> float | None:
        """What the loss clamps logits to (+-), None where it does not."""
        return self.criterion.options.get("clamp")

    def parameter_groups(self) -> list[dict]:
        """The optimizer's groups of what the method itself learns; with ``constant_lr`` no schedule applies.

        Class means train by plain SGD with their gradient divided by lambda1, which a rate divided by it amounts to.
        """
        if self.regularizer is None:
            return []
        plain = {"lr": self.means_lr / self.regularizer.within, "momentum": 0.0, "weight_decay": 0.0}
        return [{"params": list(self.regularizer.parameters()), "constant_lr": True, **plain}]

    def start_epoch(self, epoch: int) -> bool:
        """Called before every epoch: what sets in later is switched on here, by the epoch's number alone.

        True where ``forward`` computes something else from here on: a recorded step is then recorded anew.
        """
        before = self.weighted, self.regularized
        self.weighted = self.drw_epoch is not None and epoch >= self.drw_epoch
        self.regularized = self.regularizer_epoch is not None and epoch >= self.regularizer_epoch
        return before != (self.weighted, self.regularized)

    def draws(
        self,
        batch_sizes: Sequence[int],
        seed: int,
        epoch: int,
        accumulate: int = 1,
        device: torch.device | None = None,
    ) -> list[StepDraws]:
        """What the passes of ``epoch`` draw at random; the same for every method with the same seed and alpha.

        ``batch_sizes``: one per pass, ``accumulate`` passes per step. The passes of a step draw as that many processes
        would: one lambda, and partners from the same stream.
        """
        tables = [mixup.draw(self.mixup_alpha, batch_sizes[n::accumulate], seed, epoch) for n in range(accumulate)]
        return mixup.to_device([draw for step in zip(*tables, strict=True) for draw in step], device)

    def forward(
        self,
        model: nn.Module,
        images: Tensor,
        targets: Tensor,
        draws: StepDraws,
        step_targets: Tensor | None = None,
    ) -> MethodOutput:
        """``images [B, 3, H, W]``, ``targets [B]`` -> loss, logits, features.

        ``step_targets [G]``: labels of the whole global batch, of which this is a part; None: of which this is all.
        """
        mixed, labels = images, targets[None]  # labels [T, B]
        if self.mixup_alpha > 0:
            mixed, *pair = mixup.mix(images, targets, draws.lam, draws.partner)
            labels = torch.stack(pair)
        logits, features = model(mixed, with_features=True)
        loss, *partners = self._losses(logits, targets, labels, step_targets).mean(dim=1)
        if partners:
            loss = draws.lam * loss + (1 - draws.lam) * partners[0]
        if self.regularized:
            loss = loss + self.regularizer(features, labels, self._shares(draws))
        return MethodOutput(loss, logits, features)

    def components(
        self,
        logits: Tensor,
        features: Tensor,
        targets: Tensor,
        draws: StepDraws,
        step_targets: Tensor | None = None,
    ) -> Components:
        """Attraction and repulsion in a pass of which ``logits [B, C]`` and ``features [B, D]`` came out.

        Of the very loss that is trained, whichever it is, clamp, weights and mixup included: the residuals are its
        derivatives. (The regularizers have none in the logits.)
        """
        labels = torch.stack([targets, targets[draws.partner]]) if self.mixup_alpha > 0 else targets[None]
        shares = self._shares(draws).to(logits.device)
        with torch.enable_grad():
            logits = logits.detach().requires_grad_()
            sums = self._losses(logits, targets, labels, step_targets).sum(dim=1)
            residuals = [torch.autograd.grad(total, logits, retain_graph=True)[0] for total in sums]
        return components(torch.stack(residuals), features, labels, shares)

    def _losses(self, logits: Tensor, targets: Tensor, labels: Tensor, step_targets: Tensor | None) -> Tensor:
        """The loss of every sample for each of its labels, [T, B]; batch counts are those of ``targets``.

        Weights are divided by their mean over the pass, for each of the T rows of labels, so that a row's plain mean
        is the weighted mean, the one that divides by the weights of the batch.
        """
        counts = step_counts(self.counts, targets, self.class_counts, step_targets)
        each = self.criterion(logits, counts)(labels)
        if not self.weighted:
            return each
        weights = self.drw_weights[labels]
        return each * (weights / weights.mean(dim=1, keepdim=True))

    def _shares(self, draws: StepDraws) -> Tensor:
        """What each label counts in the loss, [T]."""
        return torch.stack([draws.lam, 1 - draws.lam]) if self.mixup_alpha > 0 else torch.ones_like(draws.lam)[None]


def check_names(loss: str, counts: str) -> None:
    """Raises :class:`InputError`, which lists what there is, for a loss or a kind of counts that does not exist."""
    if loss not in LOSSES:
        raise InputError(f"loss: {loss!r} is unknown; known are {', '.join(LOSSES)}")
    if counts not in COUNTS:
        raise InputError(f"class_counts: {counts!r} is unknown; known are {', '.join(COUNTS)}")


def build_method(
    loss: str,
    counts: str,
    class_counts: Tensor,
    mixup_alpha: float,
    drw_epoch: int | None = None,
    drw_beta: float = 0.9999,
    nc_within: float = 0.0,
    nc_between: float = 0.0,
    nc_start_epoch: int = 0,
    nc_means_lr: float = 0.5,
    feature_width: int = 0,
    seed: int = 0,
    **options,
) -> Method:
    """A :class:`Method`. ``counts``: a name of ``COUNTS``; ``mixup_alpha`` 0: no mixup; ``options``: see Settings.

    ``drw_epoch``: deferred re-weighting sets in (None: never), with ``drw_beta``. ``nc_within``, ``nc_between``: of
    :mod:`methods.regularizers` (0: off), from ``nc_start_epoch`` on; their class means have ``feature_width`` numbers
    each, start from ``seed`` and train with the rate ``nc_means_lr``.
    """
    check_names(loss, counts)
    criterion = LOSSES[loss](Settings(class_counts=class_counts, **options))
    drw = None if drw_epoch is None else (drw_epoch, losses.drw_weights(class_counts, drw_beta))
    regularizer = None
    if nc_within > 0:
        means = CollapseRegularizer(len(class_counts), feature_width, nc_within, nc_between, seed)
        regularizer = (nc_start_epoch, means)
    return Method(criterion, counts, class_counts, mixup_alpha, drw, regularizer, nc_means_lr)
