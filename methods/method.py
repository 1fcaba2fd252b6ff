"""The mathematics of one training step: mixup, forward pass, class counts, loss and regularizers."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from methods import losses, mixup
from methods.gradients import Components, components
from methods.mixing import Draws, Mixing, new_mixing, to_device
from methods.regularizers import CollapseGeometry, CollapseRegularizer
from utils import distributed
from utils.errors import InputError


class MethodOutput(NamedTuple):
    loss: Tensor  # scalar, mean over the batch, with the regularizers
    logits: Tensor  # [B, C], raw
    features: Tensor  # [B, D]


def _smoothing(
    class_counts: Tensor,
    smooth_head: float,
    smooth_tail: float,
    smooth_shape: str = "concave",
    smooth_power: float | None = None,
) -> Tensor:
    return losses.smoothing_by_count(class_counts, smooth_head, smooth_tail, smooth_shape, smooth_power)


# Name -> (loss, {its parameter: function from the training set's counts to that parameter, a tensor [C]}).
# All other parameters are options of :func:`build_method`, by name.
LOSSES: dict[str, tuple[Callable[..., Tensor], dict[str, Callable[..., Tensor]]]] = {
    "ce": (losses.cross_entropy, {}),
    "arb": (losses.arb, {}),
    "focal_arb": (losses.focal_arb, {}),
    "weighted_arb": (losses.weighted_arb, {}),
    "las": (losses.smoothed_cross_entropy, {"smoothing": _smoothing}),
    "logit_adjustment": (losses.logit_adjustment, {"prior": losses.class_prior}),
    "ldam": (losses.ldam, {"margins": losses.ldam_margins}),
    "dot_regression": (losses.dot_regression, {}),
}


class Criterion(nn.Module):
    """A per-sample loss of :mod:`methods.losses` with its options; its tensors [C] are buffers.

    The buffers follow from data and configuration, so checkpoints do not hold them.
    """

    def __init__(self, loss: str, class_counts: Tensor, options: Mapping[str, Any]):
        """``options`` may hold those of other losses too."""
        super().__init__()
        self.loss, per_class = LOSSES[loss]
        self.options = _options_of(self.loss, options)
        self.reads_counts = "class_counts" in inspect.signature(self.loss).parameters
        self.per_class = tuple(per_class)
        for name, function in per_class.items():
            self.register_buffer(name, function(class_counts, **_options_of(function, options)), persistent=False)

    def forward(self, logits: Tensor, class_counts: Tensor) -> Callable[[Tensor], Tensor]:
        """The loss of ``logits [B, C]`` as a function of the targets, [T, B] -> [T, B]."""
        tensors = {name: getattr(self, name) for name in self.per_class}
        if self.reads_counts:
            tensors["class_counts"] = class_counts
        return partial(self.loss, logits, **self.options, **tensors)


def _options_of(function: Callable, options: Mapping[str, Any]) -> dict[str, Any]:
    """Values of the parameters that ``options`` names or that have a default."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: options.get(p.name, p.default) for p in parameters if p.name in options or p.default is not p.empty}


COUNTS = ("global", "batch", "batch_synced", "global_masked", "batch_unmasked")


def step_counts(
    kind: str,
    targets: Tensor,
    class_counts: Tensor,
    step_targets: Tensor | None = None,
    pasted: Tensor | None = None,
) -> Tensor:
    """The counts n [C] that ARB-Loss reads in one pass.

    Args:
        kind: "global": the training set's; "batch": this process's batch; "batch_synced": the global batch;
            "global_masked": the training set's, 0 for classes absent from the batch; "batch_unmasked": the batch's,
            B n_k / N for classes absent from it.
        targets: [B], before mixup.
        class_counts: [C], of the training set.
        step_targets: [G], of the whole global batch; None: the same as ``targets``.
        pasted: [B], labels of images from outside of the batch. Those of classes that the batch lacks, whose loss would
            be infinite, get the count to be expected in it, B n_k / N.
    """
    if pasted is not None:
        counts = step_counts(kind, targets, class_counts, step_targets)
        size = len(step_targets) if kind == "batch_synced" and step_targets is not None else len(targets)
        missing = (counts == 0) & (losses.count_classes(pasted, len(class_counts)) > 0)
        return torch.where(missing, size * class_counts / class_counts.sum(), counts)
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


class Method(nn.Module):
    """Compute a step's loss; the training loop does not know which loss, counts, mixup or schedule of parts that is."""

    def __init__(
        self,
        criterion: nn.Module,
        counts: str,
        class_counts: Tensor,
        mixing: Mixing | None,
        drw: tuple[int, Tensor] | None = None,
        regularizer: CollapseRegularizer | None = None,
        means_lr: float = 0.5,
        geometry: CollapseGeometry | None = None,
        regularizer_epoch: int = 0,
    ):
        """
        Args:
            criterion: see :class:`Criterion`.
            counts: a name of ``COUNTS``.
            class_counts: [C], of the training set.
            mixing: None for none.
            drw: deferred re-weighting: the first epoch in which losses are weighted, and the weights [C].
            regularizer: L_W and L_B.
            means_lr: learning rate of their class means.
            geometry: the regularizers with moving class means.
            regularizer_epoch: the first epoch with either. Until then they are off and class means do not move, as in
                the paper; the released code keeps both terms on and the means frozen.
        """
        super().__init__()
        self.criterion = criterion
        self.counts = counts
        self.mixing = mixing
        self.register_buffer("class_counts", class_counts, persistent=False)
        self.drw_epoch, weights = drw or (None, None)
        self.register_buffer("drw_weights", weights, persistent=False)
        self.regularizer, self.means_lr = regularizer, means_lr
        self.geometry, self.regularizer_epoch = geometry, regularizer_epoch
        self.weighted = self.regularized = self.mixes = False
        self.start_epoch(0)

    @property
    def clamp(self) -> float | None:
        """Bound to which the loss clamps logits; None if it does not."""
        return self.criterion.options.get("clamp")

    def parameter_groups(self) -> list[dict]:
        """Optimizer groups of the method's own parameters; no schedule applies to those with ``constant_lr``.

        Class means train by plain SGD on their gradient divided by lambda1, so the learning rate is divided by it.
        """
        if self.regularizer is None:
            return []
        plain = {"lr": self.means_lr / self.regularizer.within, "momentum": 0.0, "weight_decay": 0.0, "nesterov": False}
        return [{"params": list(self.regularizer.parameters()), "constant_lr": True, **plain}]

    def start_epoch(self, epoch: int) -> bool:
        """Switch deferred parts on or off, by the epoch's number alone; to be called before every epoch.

        Returns True if ``forward`` computes something else than before, so that a captured CUDA graph is out of date.
        """
        before = self.weighted, self.regularized, self.mixes
        self.weighted = self.drw_epoch is not None and epoch >= self.drw_epoch
        has_regularizer = self.regularizer is not None or self.geometry is not None
        self.regularized = has_regularizer and epoch >= self.regularizer_epoch
        self.mixes = self.mixing is not None and epoch in self.mixing.epochs
        if self.geometry is not None:
            self.geometry.start_epoch(epoch)
        return before != (self.weighted, self.regularized, self.mixes)

    @property
    def pastes(self) -> bool:
        """Whether a batch needs a second draw of images in this epoch."""
        return self.mixes and self.mixing.pastes

    def draws(
        self,
        batch_sizes: Sequence[int],
        seed: int,
        epoch: int,
        accumulate: int = 1,
        device: torch.device | None = None,
    ) -> list[Draws]:
        """Draw the mixing of all passes of ``epoch``; the same for every method with the same seed and mixing.

        ``batch_sizes``: one per pass, ``accumulate`` passes per step. The passes of a step draw as that many processes
        would: one lambda, and partners from the same stream.
        """
        draw = self.mixing.draw if self.mixing else partial(mixup.draw, 0.0)
        tables = [draw(batch_sizes[n::accumulate], seed, epoch) for n in range(accumulate)]
        return to_device([draws for step in zip(*tables, strict=True) for draws in step], device)

    def forward(
        self,
        model: nn.Module,
        images: Tensor,
        targets: Tensor,
        draws: Draws,
        step_targets: Tensor | None = None,
        pasted_targets: Tensor | None = None,
    ) -> MethodOutput:
        """``images [B, 3, H, W]``, ``targets [B]`` -> loss, logits, features.

        Args:
            step_targets: [G], labels of the whole global batch, of which this is a part; None: the same as ``targets``.
            pasted_targets: [B], if :attr:`pastes`: of the images [B:2B], which are to be pasted onto the others.
        """
        images, labels = self._mix(images, targets, draws, pasted_targets)
        logits, features = model(images, with_features=True)
        loss, *partners = self._losses(logits, targets, labels, step_targets).mean(dim=1)
        if partners:
            loss = draws.lam * loss + (1 - draws.lam) * partners[0]
        if self.regularized:
            loss = loss + self._regularize(model, features, labels, self._shares(draws), step_targets)
        return MethodOutput(loss, logits, features)

    def adjust_gradients(self, model: nn.Module) -> None:
        """Change gradients, averaged over processes, before they are clipped and the optimizer's step."""
        if self.regularized and self.geometry is not None:
            self.geometry.adjust_gradients(_classifier_weight(model))

    def adjust_weights(self, model: nn.Module) -> None:
        """Change weights after the optimizer's step."""
        if self.regularized and self.geometry is not None:
            self.geometry.adjust_weights(_classifier_weight(model))

    def components(
        self,
        logits: Tensor,
        features: Tensor,
        targets: Tensor,
        draws: Draws,
        step_targets: Tensor | None = None,
        pasted_targets: Tensor | None = None,
    ) -> Components:
        """Attraction and repulsion in a pass with these ``logits [B, C]`` and ``features [B, D]``.

        The residuals are the derivatives of the very loss that is trained, with clamp, weights and mixup. (The
        regularizers do not depend on the logits.)
        """
        none = features.new_empty(len(targets) * (1 + self.pastes), 0, 1, 1)  # the labels are wanted alone
        _, labels = self._mix(none, targets, draws, pasted_targets)
        shares = self._shares(draws).to(logits.device)
        with torch.enable_grad():
            logits = logits.detach().requires_grad_()
            sums = self._losses(logits, targets, labels, step_targets).sum(dim=1)
            residuals = [torch.autograd.grad(total, logits, retain_graph=True)[0] for total in sums]
        return components(torch.stack(residuals), features, labels, shares)

    def _mix(
        self, images: Tensor, targets: Tensor, draws: Draws, pasted_targets: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The images that the model sees, [B, 3, H, W], and their labels [T, B]."""
        if not self.mixes:
            return images, targets[None]
        known = torch.cat([targets, pasted_targets]) if self.pastes else targets
        mixed, *pair = self.mixing.mix(images, known, *draws)
        return mixed, torch.stack(pair)

    def _losses(self, logits: Tensor, targets: Tensor, labels: Tensor, step_targets: Tensor | None) -> Tensor:
        """Loss of every sample for each of its labels [T, B]; batch counts are those of ``targets``.

        DRW weights are divided by their mean over the pass, separately for each row of labels, so that a row's plain
        mean is the weighted mean of PyTorch, which divides by the sum of the batch's weights.
        """
        pasted = labels[1] if self.pastes else None
        counts = step_counts(self.counts, targets, self.class_counts, step_targets, pasted)
        each = self.criterion(logits, counts)(labels)
        if not self.weighted:
            return each
        weights = self.drw_weights[labels]
        return each * (weights / weights.mean(dim=1, keepdim=True))

    def _regularize(
        self, model: nn.Module, features: Tensor, labels: Tensor, shares: Tensor, step_targets: Tensor | None
    ) -> Tensor:
        """``features [B, D]``, ``labels [T, B]``, ``shares [T]``, ``step_targets [G]`` or None."""
        loss = 0 if self.regularizer is None else self.regularizer(features, labels, shares)
        if self.geometry is None:
            return loss
        images = len(features) if step_targets is None else len(step_targets)
        counted = len(features) if distributed.rank() < images else 0  # see ``plan_micro_batches``
        return loss + self.geometry(features, labels, shares, _classifier_weight(model), counted / images)

    def _shares(self, draws: Draws) -> Tensor:
        """Weights of a sample's labels in the loss, [T]."""
        return torch.stack([draws.lam, 1 - draws.lam]) if self.mixes else torch.ones_like(draws.lam)[None]


def _classifier_weight(model: nn.Module) -> nn.Parameter:
    """[C, D]; ``model`` may be wrapped by DistributedDataParallel."""
    return getattr(model, "module", model).classifier.fc.weight


def check_names(loss: str, counts: str) -> None:
    """Raise :class:`InputError`, listing the known names, if ``loss`` or ``counts`` is not one of them."""
    if loss not in LOSSES:
        raise InputError(f"loss: {loss!r} is unknown; known are {', '.join(LOSSES)}")
    if counts not in COUNTS:
        raise InputError(f"class_counts: {counts!r} is unknown; known are {', '.join(COUNTS)}")


def build_method(
    loss: str,
    counts: str,
    class_counts: Tensor,
    mixup_alpha: float = 0.0,
    mixing: Mixing | None = None,
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
    """Build a :class:`Method`.

    Args:
        loss: a name of ``LOSSES``.
        counts: a name of ``COUNTS``.
        class_counts: int64 [C], of the training set.
        mixup_alpha: of mixup; 0 for none, or for ``mixing``.
        mixing: instead of mixup, see :func:`new_mixing`.
        drw_epoch: first epoch with deferred re-weighting; None for never.
        drw_beta: see :func:`methods.losses.drw_weights`.
        nc_within: lambda1 of :mod:`methods.regularizers`; 0 switches L_W and L_B off.
        nc_between: lambda2.
        nc_start_epoch: first epoch with all regularizers.
        nc_means_lr: learning rate of the class means of L_W and L_B.
        feature_width: D, of the class means.
        seed: of the initial class means.
        options: parameters of the losses and of :class:`CollapseGeometry`, by name; those of other losses than ``loss``
            are ignored.

    Raises :class:`InputError` for unknown names.
    """
    check_names(loss, counts)
    functions = [f for function, per_class in LOSSES.values() for f in (function, *per_class.values())]
    functions.append(CollapseGeometry)
    unknown = options.keys() - {name for f in functions for name in inspect.signature(f).parameters}
    if unknown:
        raise TypeError(f"no loss has the option {', '.join(sorted(unknown))}")
    if options.get("label_smoothing") and loss != "ce" and not class_counts.all():
        raise InputError(
            f"label_smoothing: classes without a training image ({int((class_counts == 0).sum())} here) would make "
            f"loss: {loss} infinite; use 0"
        )
    criterion = Criterion(loss, class_counts, options)
    drw = None if drw_epoch is None else (drw_epoch, losses.drw_weights(class_counts, drw_beta))
    regularizer = None
    if nc_within > 0:
        regularizer = CollapseRegularizer(len(class_counts), feature_width, nc_within, nc_between, seed)
    geometry = CollapseGeometry(len(class_counts), feature_width, **_options_of(CollapseGeometry, options))
    regularizers = (regularizer, nc_means_lr, geometry if geometry.is_on else None, nc_start_epoch)
    mixing = new_mixing("mixup", mixup_alpha) if mixup_alpha > 0 else mixing
    return Method(criterion, counts, class_counts, mixing, drw, *regularizers)
