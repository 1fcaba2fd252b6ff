"""The first lines of a run's log: method, schedule, data, hardware and software."""

import platform
from collections.abc import Mapping, Sequence

import torch
import torchvision
from torch import Tensor
from yacs.config import CfgNode

from datasets import Data
from datasets.decoding import fast_decoder
from methods.component_meter import chosen_rows
from utils import distributed
from utils.build import mix_kind
from utils.errors import describing
from utils.metrics import group_sizes
from utils.report.text import group_line
from utils.run.log import RunLog
from utils.schedule import step_epochs
from utils.step import Step, StepWrapper


@describing("the run's description")
def describe_run(
    run: RunLog, cfg: CfgNode, data: Data, groups: dict, step: Step | StepWrapper, notes: Sequence[str]
) -> None:
    """Log the first lines of a run."""
    run.info(
        f"{cfg.name}: training {describe_method(cfg)}; {describe_schedule(cfg)}; "
        f"seed {cfg.seed}, subset seed {cfg.subset_seed}"
    )
    counts, filled = data.class_counts, data.class_counts[data.class_counts > 0]
    classes = f"{data.num_classes}" if len(filled) == len(counts) else f"{len(filled)} of {data.num_classes}"
    run.info(
        f"data: {cfg.dataset}, {int(counts.sum())} training images in {classes} classes "
        f"(largest {int(filled.max())}, smallest {int(filled.min())}), "
        + (f"{len(data.val.targets)} held out, " if data.val else "")
        + f"{len(data.test.targets)} test images; model: {cfg.backbone}"
    )
    run.info(describe_images(cfg, data, step.device))
    run.info(group_line(group_sizes(groups)))
    run.info(
        f"device {step.device} ({torch.get_num_threads()} CPU threads), torch {torch.__version__}, "
        f"torchvision {torchvision.__version__}, Python {platform.python_version()}"
    )
    run.info(describe_precision(cfg, step))
    if cfg.diagnostics:
        run.info(
            f"diagnostics: every {cfg.diagnostics} steps, rows {chosen_rows(counts, cfg.diagnostics_rows)} in full"
        )
    if distributed.world_size() * cfg.accumulate > 1:
        run.info(describe_parallelism(cfg))
    for note in notes:
        run.info(f"note: {note}")
    for warning in [*empty_classes(counts, groups), *never_reached(cfg)]:
        run.info(f"warning: {warning}")
    run.info(f"folder: {run.folder}")


def empty_classes(class_counts: Tensor, groups: Mapping[str, Mapping[str, Tensor]]) -> list[str]:
    """Which ``groups`` (masks [C] by rule, the headline rule first) the classes without training images are in."""
    empty = class_counts == 0
    if not empty.any():
        return []
    masks = next(iter(groups.values()))
    shots = ", ".join(f"{int((mask & empty).sum())} of {int(mask.sum())} {name}" for name, mask in masks.items())
    have = f"{int(empty.sum())} of {len(class_counts)} classes have no training image ({shots})"
    return [f"{have}; their test images count all the same"]


def never_reached(cfg: CfgNode) -> list[str]:
    """Epochs that the configuration names and that lie beyond its last one."""
    epochs = {
        "lr_steps": [] if cfg.cos else step_epochs(cfg.lr_steps, cfg.num_epochs),
        "warmup_epochs": [cfg.warmup_epochs - 1] if cfg.cos_warmup or not cfg.cos else [],
        "drw_epoch": [] if cfg.drw_epoch is None else [cfg.drw_epoch],
        "nc_start_epoch": [cfg.nc_start_epoch] if cfg.nc_within > 0 or describe_geometry(cfg) else [],
        "keep_epochs": [number - 1 for number in cfg.keep_epochs],
    }
    late = [key for key, named in epochs.items() if any(epoch >= cfg.num_epochs for epoch in named)]
    return [f"{key} {cfg[key]}: not all of it is reached in {cfg.num_epochs} epochs" for key in late]


def describe_precision(cfg: CfgNode, step: Step | StepWrapper) -> str:
    """Precision and acceleration."""
    numbers = {
        "fp32": "strict float32",
        "tf32": "float32" + (", products in TF32" if step.device.type == "cuda" else " (TF32 is for CUDA only)"),
        "bf16": "bfloat16, weights and loss in float32",
        "fp16": "float16, weights and loss in float32, the loss scaled",
    }[cfg.precision]
    ways = ["compiled"] * cfg.compile + ["the step captured as a CUDA graph"] * step.captured
    return f"computing: {'; '.join([numbers, *ways])}"


def describe_images(cfg: CfgNode, data: Data, device: torch.device) -> str:
    """Image size, and where a step's images come from."""
    way = "read"
    if data.spec.lists:
        way = f"decoded with {fast_decoder() if cfg.decoder == 'fast' else 'PIL'}"
    where = f"in the memory of {device}" if data.on_device else f"{way} by {data.workers} workers of each process"
    return f"images: {data.image_size} pixels, {where}"


def describe_parallelism(cfg: CfgNode) -> str:
    """Processes and micro-batches, and what each of them computes from its own images alone."""
    several, count = distributed.world_size(), cfg.accumulate
    passes = f" with {count} micro-batches per step" if count > 1 else ""
    batch_counts = cfg.loss.endswith("arb") and cfg.class_counts not in ("global", "batch_synced")
    pairs = [f"{mix_kind(cfg)} pairs"] * (mix_kind(cfg) in ("mixup", "cutmix"))
    pasted = ["pasted classes in the batch's counts"] * (cfg.mix == "cmo" and cfg.class_counts == "batch_synced")
    own = [*pairs, *pasted] + ["batch counts"] * batch_counts
    own += ["mean weight"] * (cfg.drw_epoch is not None) + ["counts in L_W"] * (cfg.nc_within > 0)
    own += [] if cfg.sync_bn and count == 1 else ["batch-norm statistics"]
    who = f"{several} processes{passes}" if several > 1 else f"{count} micro-batches per step"
    return f"{who}: each has its own {', '.join(own)}, so their number matters" if own else f"{who}"


def describe_method(cfg: CfgNode) -> str:
    """Loss, regularizers, classifier, mixup and data, in one sentence."""
    words = [describe_loss(cfg)]
    words += [f"label smoothing {cfg.label_smoothing:g}"] * (cfg.label_smoothing > 0)
    if cfg.drw_epoch is not None:
        words.append(f"deferred re-weighting from epoch {cfg.drw_epoch} (beta {cfg.drw_beta:g})")
    if cfg.nc_within > 0:
        parts = f"{cfg.nc_within:g} L_W + {cfg.nc_between:g} L_B"
        words.append(f"{parts} from epoch {cfg.nc_start_epoch} (class means: lr {cfg.nc_means_lr:g})")
    words += [f"{part} from epoch {cfg.nc_start_epoch}" for part in describe_geometry(cfg)]
    if cfg.classifier != "linear":
        kinds = {"cosine": f"cosine classifier times {cfg.cosine_scale:g}", "simplex": "fixed simplex classifier"}
        words.append(kinds[cfg.classifier])
    words += [describe_mixing(cfg), *describe_augmentation(cfg)]
    words += [describe_post_hoc(cfg)] * (cfg.post_hoc_tau > 0)
    cut = "not subsampled" if cfg.imb_factor is None else f"{cfg.imb_type}, imbalance factor {cfg.imb_factor:g}"
    return ", ".join(words) + f", on {cfg.dataset} ({cut})"


def describe_mixing(cfg: CfgNode) -> str:
    """Mixup, CutMix or CMO with their hyperparameters."""
    kind = mix_kind(cfg)
    steps = f"alpha {cfg.alpha:g}, {100 * cfg.mix_prob:g} % of the steps"
    return {
        None: "no mixup",
        "mixup": f"mixup alpha {cfg.alpha:g}",
        "cutmix": f"CutMix ({steps})",
        "cmo": f"CMO ({steps}, classes by n^-{cfg.cmo_alpha:g}, not in the first and last {cfg.cmo_idle} epochs)",
    }[kind]


def describe_augmentation(cfg: CfgNode) -> list[str]:
    """What comes on top of crops and flips."""
    strength = f" ({cfg.num_ops} of strength {cfg.magnitude})" * (cfg.augment == "randaugment")
    names = {"autoaugment": "AutoAugment", "randaugment": "RandAugment", "trivialaugment": "TrivialAugment"}
    return [
        *[f"{names.get(cfg.augment)}{strength}"] * (cfg.augment in names),
        *[f"Cutout {cfg.cutout}"] * (cfg.cutout > 0),
        *[f"random erasing {cfg.random_erasing:g}"] * (cfg.random_erasing > 0),
    ]


def describe_geometry(cfg: CfgNode) -> list[str]:
    """The regularizers with moving class means, and space alignment."""
    weights = {"rows apart": cfg.nc_rows, "means apart": cfg.nc_means, "duality": cfg.nc_dual}
    terms = [f"{weight:g} ({name})" for name, weight in weights.items() if weight > 0]
    words = [" + ".join(terms)] if terms else []
    spa = {"proj": f"projection (gamma {cfg.spa_gamma:g})", "slerp": f"slerp (up to {cfg.spa_step:g} a step)"}
    return words + ([f"space alignment by {spa[cfg.spa]}"] if cfg.spa else [])


def describe_post_hoc(cfg: CfgNode) -> str:
    """Post-hoc adjustment, with a remark if the loss has adjusted for the prior already."""
    twice = "; the loss has corrected the prior already" * (cfg.loss.endswith("arb") or cfg.loss == "logit_adjustment")
    return f"evaluated after post-hoc logit adjustment (logits less {cfg.post_hoc_tau:g} log(n / N){twice})"


def describe_loss(cfg: CfgNode) -> str:
    """The loss and its hyperparameters."""
    adjusted = "Balanced Softmax (logit adjustment, tau 1)" if cfg.tau == 1 else f"logit adjustment, tau {cfg.tau:g}"
    name = {
        "ce": "cross-entropy",
        "arb": "ARB-Loss",
        "focal_arb": "focal ARB-Loss",
        "weighted_arb": "weighted ARB-Loss",
        "las": f"label-aware smoothing ({cfg.smooth_head} to {cfg.smooth_tail}, {cfg.smooth_shape})",
        "logit_adjustment": adjusted,
        "ldam": f"LDAM (margins up to {cfg.ldam_max_margin:g})",
        "dot_regression": "dot regression",
    }.get(cfg.loss, cfg.loss)
    if not cfg.loss.endswith("arb"):
        return name
    clamp = "not clamped" if cfg.logit_clamp is None else f"clamped to +-{cfg.logit_clamp:g}"
    power = f" to the power {cfg.tau:g}" if cfg.loss == "arb" and cfg.tau != 1 else ""
    return f"{name} with {cfg.class_counts} class counts{power}, logits {clamp}"


def describe_schedule(cfg: CfgNode) -> str:
    """Optimizer and learning rate."""
    if cfg.cos:
        steps = f"{cfg.warmup_epochs} warm-up epochs, cosine" if cfg.cos_warmup else "cosine"
    else:
        epochs = step_epochs(cfg.lr_steps, cfg.num_epochs)
        steps = ", ".join(f"x{f:g} from epoch {e}" for e, f in zip(epochs, cfg.lr_step_factors, strict=True))
        steps = f"{cfg.warmup_epochs} warm-up epochs, {steps}"
    passes = f" in {cfg.accumulate} micro-batches" if cfg.accumulate > 1 else ""
    sharp = f", sharpness-aware with rho {cfg.sam:g}" if cfg.sam > 0 else ""
    averaged = f", weights averaged with decay {cfg.ema:g}" if cfg.ema > 0 else ""
    name, memory = "SGD", f"{'Nesterov ' * cfg.nesterov}momentum {cfg.momentum:g}"
    if cfg.optimizer == "adamw":
        name, memory = "AdamW", "betas {:g} and {:g}".format(*cfg.betas)
    return (
        f"{name} for {cfg.num_epochs} epochs, batch {cfg.batch_size}{passes}, lr {cfg.lr:g}, {steps}, "
        f"{memory}, weight decay {cfg.weight_decay:g}{sharp}{averaged}"
    )
