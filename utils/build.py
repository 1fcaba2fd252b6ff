"""From the configuration to data, model, method, optimizer and step: the one place where they meet."""

from collections.abc import Mapping, Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from datasets import Data, build_data, find_spec
from datasets.loaders import Batch, TrainLoader
from methods import Method, build_method, check_names
from methods.component_meter import ComponentMeter, chosen_rows
from methods.losses import post_hoc_shift
from methods.mixup import StepDraws
from models import build_model, find_backbone
from utils import distributed
from utils.errors import InputError
from utils.metrics import shot_groups
from utils.schedule import lr_at
from utils.seed import seeded_weights
from utils.step import RecordedStep, Step, WatchedStep, compile_model


def check(cfg: CfgNode) -> None:
    """Names that do not exist are refused before any data are read."""
    find_spec(cfg.dataset)
    find_backbone(cfg.backbone)
    check_names(cfg.loss, cfg.class_counts)


def load_data(cfg: CfgNode, class_map: str | Sequence[int], device: torch.device) -> Data:
    """``class_map``: see :class:`Numbering`; ``device``: where small images will live."""
    return build_data(
        cfg.dataset,
        cfg.data_path,
        num_classes=cfg.num_classes,
        image_size=cfg.image_size,
        imb_type=cfg.imb_type,
        imb_factor=cfg.imb_factor,
        subset_seed=cfg.subset_seed,
        val_per_class=cfg.val_per_class,
        workers=distributed.workers_here(cfg.workers),
        decoder=cfg.decoder,
        train_txt=cfg.train_txt,
        val_txt=cfg.val_txt,
        class_map=class_map,
        data_on_device=cfg.data_on_device,
        device=device,
    )


def class_groups(cfg: CfgNode, data: Data) -> dict[str, dict[str, Tensor]]:
    """Many / medium / few by every rule that applies, the headline rule first."""
    return groups_of(cfg, data.class_counts)


def groups_of(cfg: CfgNode, class_counts: Tensor) -> dict[str, dict[str, Tensor]]:
    """:func:`class_groups` without the data, from training images per class [C]."""
    given = (cfg.head_class_idx, cfg.med_class_idx, cfg.tail_class_idx)
    return shot_groups(cfg.shots, find_spec(cfg.dataset).shot_ranges if None in given else given, class_counts)


def new_model(cfg: CfgNode, data: Data, content: Mapping | None = None) -> nn.Module:
    """``content``: of a checkpoint that all weights will come from, which makes pretrained ones needless."""
    pretrained = cfg.pretrained if content is None else False
    with seeded_weights(cfg.seed):
        model = build_model(cfg.dataset, cfg.backbone, data.num_classes, pretrained, cfg.classifier, cfg.cosine_scale)
    return model.to(memory_format=torch.channels_last)  # as the images are


def check_smallest_batch(model: nn.Module, loader: TrainLoader, image_size: int) -> None:
    """Batch norm cannot normalise one value per channel: one image, where the network pools it down to one pixel."""
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
    """``model``: whose features the class means are of, where ``nc_within`` is set."""
    return build_method(
        cfg.loss,
        cfg.class_counts,
        data.class_counts,
        mixup_alpha=cfg.alpha if cfg.mixup else 0.0,
        drw_epoch=cfg.drw_epoch,
        drw_beta=cfg.drw_beta,
        nc_within=cfg.nc_within,
        nc_between=cfg.nc_between,
        nc_start_epoch=cfg.nc_start_epoch,
        nc_means_lr=cfg.nc_means_lr,
        feature_width=0 if model is None else model.classifier.rows().shape[1],
        seed=cfg.seed,
        clamp=cfg.logit_clamp,
        tau=cfg.tau,
        focal_alpha=cfg.focal_alpha,
        focal_gamma=cfg.focal_gamma,
        smooth_head=cfg.smooth_head,
        smooth_tail=cfg.smooth_tail,
        smooth_shape=cfg.smooth_shape,
        smooth_power=cfg.smooth_power,
        max_margin=cfg.ldam_max_margin,
        cosine_scale=cfg.cosine_scale,
    )


def new_shift(cfg: CfgNode, data: Data) -> Tensor | None:
    """What evaluation subtracts from the logits, [C]; None: nothing."""
    return post_hoc_shift(data.class_counts, cfg.post_hoc_tau) if cfg.post_hoc_tau > 0 else None


def new_optimizer(cfg: CfgNode, model: nn.Module, method: Method) -> torch.optim.Optimizer:
    """SGD over whatever learns: frozen backbones do not, and a method may have groups of parameters of its own."""
    groups = [{"params": [p for p in model.parameters() if p.requires_grad]}, *method.parameter_groups()]
    return torch.optim.SGD(groups, lr=cfg.lr, momentum=cfg.momentum, weight_decay=cfg.weight_decay, fused=True)


def set_lr(optimizer: torch.optim.Optimizer, cfg: CfgNode, epoch: int) -> float:
    lr = lr_at(epoch, cfg.lr, cfg.num_epochs, cfg.cos, cfg.lr_steps, cfg.lr_step_factors, cfg.warmup_epochs)
    for group in optimizer.param_groups:
        if group.get("constant_lr"):  # of a method's own
            continue
        if isinstance(group["lr"], Tensor):  # where a recorded step reads it
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr
    return lr


def new_parallel(cfg: CfgNode, model: nn.Module, device: torch.device) -> nn.Module:
    """What is trained: ``model``, compiled and over all processes where that is asked for."""
    if cfg.compile:
        compile_model(model, device)
    return distributed.parallel(model, device, cfg.sync_bn)


def new_component_meter(cfg: CfgNode, data: Data, device: torch.device) -> ComponentMeter | None:
    """None where ``diagnostics`` is off."""
    rows = chosen_rows(data.class_counts, cfg.diagnostics_rows)
    return ComponentMeter(data.num_classes, rows, cfg.num_epochs - 1, device) if cfg.diagnostics else None


def new_step(
    cfg: CfgNode,
    parallel: nn.Module,
    method: Method,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    device: torch.device,
    components: ComponentMeter | None = None,
) -> Step | RecordedStep | WatchedStep:
    """A step is recorded where it is one pass of one process on CUDA, and watched where ``components`` are measured."""
    options = (cfg.precision, cfg.compile, cfg.max_grad_norm, components is not None)
    step = Step(parallel, method, optimizer, scaler, device, *options)
    if cfg.cuda_graph and device.type == "cuda" and distributed.world_size() * cfg.accumulate == 1:
        step = RecordedStep(step)
    if components is None:
        return step

    def watch(logits: Tensor, features: Tensor, batch: Batch, draws: StepDraws) -> None:
        components.update(method.components(logits, features, batch.targets, draws, batch.step_targets))

    return WatchedStep(step, watch, cfg.diagnostics)
