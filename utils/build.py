"""Build data, model, method, optimizer and step from the configuration."""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from datasets import Data, build_data, find_spec
from datasets.loaders import Batch, EvalLoader, TrainLoader
from datasets.policies import Augmentation
from methods import Method, build_method, check_names
from methods.component_meter import ComponentMeter, chosen_rows
from methods.losses import post_hoc_shift
from methods.mixing import Draws, Mixing, new_mixing
from methods.neural_collapse import collapse
from models import build_model, find_backbone
from utils import distributed
from utils.cuda_graph import GraphedStep
from utils.ema import AveragedModel
from utils.errors import InputError
from utils.evaluation import Evaluation, evaluate
from utils.metrics import shot_groups
from utils.precision import new_scaler
from utils.schedule import lr_at
from utils.seed import seeded_weights
from utils.step import ProfiledStep, Step, StepWrapper, compile_model

# Options that ``build_data`` and ``build_method`` take under the same names.
DATA_OPTIONS = (
    "dataset", "data_path", "num_classes", "image_size", "imb_type", "imb_factor", "subset_seed", "val_per_class",
    "decoder", "train_txt", "val_txt", "test_txt", "data_on_device",
    "data_cache",
)  # fmt: skip
METHOD_OPTIONS = (
    "drw_epoch", "drw_beta", "nc_within", "nc_between", "nc_start_epoch", "nc_means_lr", "nc_rows", "nc_means",
    "nc_dual", "spa", "spa_gamma", "spa_step", "num_epochs", "seed", "tau", "focal_alpha", "focal_gamma", "smooth_head",
    "smooth_tail", "smooth_shape", "smooth_power", "cosine_scale", "label_smoothing",
)  # fmt: skip


class Loaders(NamedTuple):
    """Iterables over the data, for this process."""

    train: TrainLoader
    test: EvalLoader
    val: EvalLoader | None  # select the best epoch
    plain: EvalLoader  # the training images without augmentation


@dataclass
class Training:
    """What training changes, and a checkpoint restores."""

    model: nn.Module  # the bare model
    method: Method
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    parallel: nn.Module  # the model as it is trained: compiled, wrapped by DistributedDataParallel
    device: torch.device
    average: AveragedModel | None = None

    def parts(self) -> dict[str, Any]:
        """The parts that a checkpoint holds, as :func:`utils.checkpoint.save_checkpoint` takes them."""
        return {name: getattr(self, name) for name in ("model", "method", "optimizer", "scaler", "average")}


@dataclass
class Evaluator:
    """Evaluates the model that is being trained."""

    model: nn.Module
    loaders: Loaders
    class_counts: Tensor
    groups: dict[str, dict[str, Tensor]]  # see :func:`class_groups`
    precision: str
    shift: Tensor | None
    average: nn.Module | None  # evaluated beside the model

    def evaluate(self, signal: Callable[[], int] = lambda: 0) -> Evaluation:
        """See :func:`utils.evaluation.evaluate`."""
        splits = (self.loaders.test, self.loaders.val)
        options = (self.precision, self.shift, signal, self.average)
        return evaluate(self.model, *splits, self.class_counts, self.groups, *options)

    def neural_collapse(self, signal: Callable[[], int]) -> dict[str, float]:
        """See :func:`methods.neural_collapse.collapse`."""
        return collapse(self.model, self.loaders.plain, self.groups, self.precision, signal)


def check(cfg: CfgNode) -> None:
    """Reject unknown names before any data are read."""
    find_spec(cfg.dataset)
    find_backbone(cfg.backbone)
    check_names(cfg.loss, cfg.class_counts)


def load_data(cfg: CfgNode, class_map: str | Sequence[int], device: torch.device) -> Data:
    """``class_map``: see :class:`utils.run.resume.ClassOrder`; ``device``: for images that are held in memory."""
    options = {key: cfg[key] for key in DATA_OPTIONS}
    return build_data(class_map=class_map, workers=distributed.workers_here(cfg.workers), device=device, **options)


def class_groups(cfg: CfgNode, data: Data) -> dict[str, dict[str, Tensor]]:
    """Many / medium / few by every rule that applies, the headline rule first."""
    return groups_of(cfg, data.class_counts)


def groups_of(cfg: CfgNode, class_counts: Tensor) -> dict[str, dict[str, Tensor]]:
    """:func:`class_groups` without the data, from training images per class [C]."""
    given = (cfg.head_class_idx, cfg.med_class_idx, cfg.tail_class_idx)
    return shot_groups(cfg.shots, find_spec(cfg.dataset).shot_ranges if None in given else given, class_counts)


def new_loaders(cfg: CfgNode, data: Data, device: torch.device) -> Loaders:
    ranks = {"rank": distributed.rank(), "world_size": distributed.world_size()}
    train = train_loader(cfg, data, device, **ranks)
    plain = data.plain_train_loader(device, **ranks, pixels=train.pixels)
    return Loaders(train, data.test_loader(device, **ranks), data.val_loader(device, **ranks), plain)


def train_loader(cfg: CfgNode, data: Data, device: torch.device, **ranks: int) -> TrainLoader:
    if cfg.cutout >= data.image_size:
        raise InputError(f"cutout: {cfg.cutout} leaves nothing of images of {data.image_size} pixels; use less")
    augmentation = Augmentation(**{key: cfg[key] for key in Augmentation._fields})
    weights = (1 / data.class_counts.clamp(min=1)) ** cfg.cmo_alpha if cfg.mix == "cmo" else None
    options = {"accumulate": cfg.accumulate, "augmentation": augmentation, "paste_weights": weights}
    return data.train_loader(cfg.batch_size, cfg.seed, device, **options, **ranks)


def new_training(
    cfg: CfgNode, data: Data, loader: TrainLoader, device: torch.device, content: Mapping | None = None
) -> Training:
    """``content``: of the checkpoint that weights will be restored from."""
    model = new_model(cfg, data, content).to(device)
    check_smallest_batch(model, loader, data.image_size)
    method = new_method(cfg, data, model).to(device)
    optimizer = new_optimizer(cfg, model, method)
    scaler = new_scaler(cfg.precision, device)
    average = AveragedModel(model, cfg.ema) if cfg.ema > 0 else None
    return Training(model, method, optimizer, scaler, new_parallel(cfg, model, device), device, average)


def new_evaluator(cfg: CfgNode, data: Data, training: Training, loaders: Loaders) -> Evaluator:
    groups, shift = class_groups(cfg, data), new_shift(cfg, data)
    average = training.average and training.average.model
    return Evaluator(training.model, loaders, data.class_counts, groups, cfg.precision, shift, average)


def new_model(cfg: CfgNode, data: Data, content: Mapping | None = None) -> nn.Module:
    """``content``: of the checkpoint that weights will be restored from: no pretrained ones are needed."""
    pretrained = cfg.pretrained if content is None else False
    with seeded_weights(cfg.seed):
        options = (pretrained, cfg.classifier, cfg.cosine_scale, data.image_size)
        model = build_model(cfg.dataset, cfg.backbone, data.num_classes, *options)
    return model.to(memory_format=torch.channels_last)  # as the images are


def check_smallest_batch(model: nn.Module, loader: TrainLoader, image_size: int) -> None:
    """Reject micro-batches of one image if a batch norm sees one value per channel (the image pooled to one pixel)."""
    if min(loader.batch_sizes) > 1:
        return
    copy = deepcopy(model).train()
    try:
        copy(torch.zeros(1, 3, image_size, image_size, device=loader.device))
    except ValueError:
        raise InputError(
            f"batch_size: {loader.batch_size} leaves a pass of one image, which the batch norm of this backbone (or of "
            "classifier: simplex) cannot train on at this image_size; choose another batch_size (or accumulate, or "
            "number of processes)"
        ) from None


def new_method(cfg: CfgNode, data: Data, model: nn.Module | None = None) -> Method:
    """``model``: gives the width of the class means; needed with class means only."""
    return build_method(
        cfg.loss,
        cfg.class_counts,
        data.class_counts,
        mixing=mixing_of(cfg, data),
        feature_width=0 if model is None else model.classifier.rows().shape[1],
        clamp=cfg.logit_clamp,
        max_margin=cfg.ldam_max_margin,
        **{key: cfg[key] for key in METHOD_OPTIONS},
    )


def mix_kind(cfg: CfgNode) -> str | None:
    """``mix``, or what ``mixup`` says."""
    kind = cfg.mix or ("mixup" if cfg.mixup else None)
    return None if cfg.alpha == 0 else kind


def mixing_of(cfg: CfgNode, data: Data) -> Mixing | None:
    kind = mix_kind(cfg)
    options = (data.image_size, cfg.mix_prob, cfg.cmo_idle, cfg.num_epochs)
    return new_mixing(kind, cfg.alpha, *options) if kind else None


def new_shift(cfg: CfgNode, data: Data) -> Tensor | None:
    """Post-hoc logit adjustment, subtracted from the logits in evaluation: [C] or None."""
    return post_hoc_shift(data.class_counts, cfg.post_hoc_tau) if cfg.post_hoc_tau > 0 else None


def new_optimizer(cfg: CfgNode, model: nn.Module, method: Method) -> torch.optim.Optimizer:
    """SGD or AdamW over the trainable parameters of the model and the method's own parameter groups."""
    groups = [{"params": [p for p in model.parameters() if p.requires_grad]}, *method.parameter_groups()]
    options = {"lr": cfg.lr, "weight_decay": cfg.weight_decay, "fused": True}
    if cfg.optimizer == "adamw":
        return torch.optim.AdamW(groups, betas=tuple(cfg.betas), **options)
    return torch.optim.SGD(groups, momentum=cfg.momentum, nesterov=cfg.nesterov, **options)


def set_lr(optimizer: torch.optim.Optimizer, cfg: CfgNode, epoch: int) -> float:
    """Set and return the learning rate of ``epoch``."""
    steps = (cfg.lr_steps, cfg.lr_step_factors)
    lr = lr_at(epoch, cfg.lr, cfg.num_epochs, cfg.cos, *steps, cfg.warmup_epochs, cfg.cos_warmup)
    for group in optimizer.param_groups:
        if group.get("constant_lr"):
            continue
        if isinstance(group["lr"], Tensor):  # read by a CUDA graph
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr
    return lr


def new_parallel(cfg: CfgNode, model: nn.Module, device: torch.device) -> nn.Module:
    """Compile ``model`` if the configuration says so, and wrap it for several processes."""
    if cfg.compile:
        compile_model(model, device)
    return distributed.parallel(model, device, cfg.sync_bn)


def new_component_meter(cfg: CfgNode, data: Data, device: torch.device) -> ComponentMeter | None:
    """None if ``diagnostics`` is off."""
    rows = chosen_rows(data.class_counts, cfg.diagnostics_rows)
    return ComponentMeter(data.num_classes, rows, cfg.num_epochs - 1, device) if cfg.diagnostics else None


def new_step(cfg: CfgNode, training: Training, components: ComponentMeter | None = None) -> Step | StepWrapper:
    """Build the step: captured as a CUDA graph if possible, with diagnostics if there is a meter for ``components``."""
    t, options = training, (cfg.precision, cfg.compile, cfg.max_grad_norm, components is not None)
    step = Step(t.parallel, t.method, t.optimizer, t.scaler, t.device, *options, average=t.average, sam=cfg.sam)
    if cfg.cuda_graph and t.device.type == "cuda" and distributed.world_size() * cfg.accumulate == 1:
        step = GraphedStep(step)
    if components is None:
        return step

    def watch(logits: Tensor, features: Tensor, batch: Batch, draws: Draws) -> None:
        labels = (batch.step_targets, batch.pasted_targets)
        components.update(t.method.components(logits, features, batch.targets, draws, *labels))

    return ProfiledStep(step, watch, cfg.diagnostics)
