"""Stage-1 training: python train_stage1.py --cfg config/<data set>/<experiment>.yaml [key value ...]"""

import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import NamedTuple

# Read when torch is loaded: a thread that waits gives its core away instead of spinning on it. Alone on a machine that
# costs a few percent at most; beside other work it saves a run from becoming tens of times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
import torchvision
from torch import Tensor, nn
from tqdm import tqdm
from yacs.config import CfgNode

from datasets import Data, build_data, find_spec
from datasets.decoding import fast_decoder
from datasets.loaders import Batch, EvalLoader, TrainLoader
from methods import Method, build_method, check_names
from methods.component_meter import ComponentMeter, chosen_rows
from methods.losses import post_hoc_shift
from methods.mixup import StepDraws
from methods.neural_collapse import measure
from models import build_model, find_backbone
from utils import distributed
from utils.checkpoint import (
    CheckpointError,
    Found,
    TrainState,
    changed_options,
    environment,
    fork_of,
    is_ours,
    load_content,
    newest_checkpoint,
    read_checkpoint,
    restore,
    stored_class_map,
)
from utils.command_line import exit_code, parse
from utils.config import dump_config, read_config
from utils.epoch_arrays import EpochArrays
from utils.errors import InputError
from utils.evaluation import feature_batches, group_line, mislas_lines, predict, save_predictions, until_signal
from utils.files import write_text
from utils.keeper import Keeper
from utils.metrics import (
    GROUPS,
    Predictions,
    check_weights,
    class_accuracy,
    group_sizes,
    half_accuracies,
    report,
    shot_accuracy,
    shot_groups,
)
from utils.precision import float32_products, new_scaler
from utils.provenance import commit, machine
from utils.run_log import RunLog, count_lines, folder_of, inherit, new_folder, progress_line
from utils.schedule import lr_at
from utils.seed import seeded_weights
from utils.signals import Signals
from utils.step import RecordedStep, Step, WatchedStep, compile_model
from utils.summary import summarise, summary_table, write_summary

# What a run cannot change when it goes on: its data and its network.
FIXED = (
    *("dataset", "num_classes", "image_size", "imb_type", "imb_factor", "subset_seed", "val_per_class"),
    *("backbone", "classifier", "cosine_scale"),
)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse("Train one stage with ARB-Loss or a baseline.", arguments)
    with Signals() as signals:
        with distributed.together():
            cfg, notes = read_config(args.cfg, args.overrides)
            check(cfg)
            found = find_checkpoint(cfg)
            numbering = class_map(cfg, found)
        with distributed.processes(cfg.device, cfg.deterministic) as device, float32_products(cfg.precision):
            data = load_data(cfg, numbering.choice, device)
            groups = class_groups(cfg, data)
            shares = {"rank": distributed.rank(), "world_size": distributed.world_size()}
            loader = data.train_loader(cfg.batch_size, cfg.seed, device, accumulate=cfg.accumulate, **shares)
            test, held_out = data.test_loader(device, **shares), data.val_loader(device, **shares)
            plain = data.plain_train_loader(device, **shares, pixels=loader.pixels)
            model = new_model(cfg, data, found.content).to(device)
            check_smallest_batch(model, loader, data.image_size)
            method = new_method(cfg, data, model).to(device)
            optimizer = new_optimizer(cfg, model, method)
            scaler = new_scaler(cfg.precision, device)
            parallel = new_parallel(cfg, model, device)  # may refuse: before a folder is made
            components = new_component_meter(cfg, data, device)
            parts = {"model": model, "method": method, "optimizer": optimizer, "scaler": scaler}
            state, folder, settings, origin = start(cfg, found, data, len(loader), device, **parts)
            found = found._replace(content=None)  # its weights are in the model now
            step = new_step(cfg, parallel, method, optimizer, scaler, device, components)

            with RunLog(folder, cfg.name, state.epoch, state.log_size) as run:
                describe(run, cfg, data, groups, step, [*notes, *found.notes, *origin, *numbering.notes])
                content = {**parts, **origins(data, settings, device)}
                every = cfg.checkpoint_every_steps
                keeper = Keeper(run, signals, state, loader, step.meter, every, content, components, cfg.keep_epochs)
                arrays = diagnostics_file(folder, components, data, state.epoch)
                evaluated = (model, test, held_out, data.class_counts, groups, cfg.precision, new_shift(cfg, data))
                epochs = range(state.epoch, cfg.num_epochs)
                if epochs:
                    write_settings(folder, settings)
                    record_start(folder, state, data, device)
                with keeper.until_signal():
                    for epoch in epochs:
                        row = {"epoch": epoch, "lr": set_lr(optimizer, cfg, epoch)}
                        row |= train_epoch(step, loader, run, keeper, epoch, cfg.seed, cfg.print_freq)
                        if due(epoch, cfg.eval_every, cfg.num_epochs, cfg.eval_last):
                            evaluation = evaluate(*evaluated, keeper.signal)
                            row |= evaluation.entries
                            publish(run, epoch, evaluation, data)
                        if due(epoch, cfg.nc_every, cfg.num_epochs):
                            row["nc"] = collapse(model, plain, groups, cfg.precision, keeper.signal)
                        record(run, row, step.meter.clamp)
                        record_components(run, epoch, components, arrays)
                        keeper.end_epoch(row)
                    if epochs:
                        finish(run, state, evaluation, groups)
                if not epochs:  # a finished run was resumed
                    evaluation = evaluate(*evaluated)
                    announce(run, evaluation)
                    finish(run, state, evaluation, groups)


# ---------------------------------------------------------------------------------------------------------------------
# Config -> objects. Only here are configuration and code introduced to each other.


def check(cfg: CfgNode) -> None:
    """Names that do not exist are refused before any data are read."""
    find_spec(cfg.dataset)
    find_backbone(cfg.backbone)
    check_names(cfg.loss, cfg.class_counts)


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


class Numbering(NamedTuple):
    """How the labels of list data become classes."""

    choice: str | Sequence[int]  # "stable", "legacy", a file or the map itself, see :mod:`datasets.class_order`
    notes: list[str]  # a line that says it; none for other data


def find_checkpoint(cfg: CfgNode) -> Found:
    """The checkpoint that ``resume`` names or, by ``auto``, means; where there is none, the one to ``fork`` from."""
    if cfg.resume == "auto":
        found = newest_checkpoint(cfg.save_dir, cfg)
    else:
        found = Found(cfg.resume, read_checkpoint(cfg.resume) if cfg.resume else None, [])
    if found.content is not None or not cfg.fork:
        return found
    content = read_checkpoint(cfg.fork)
    if not is_ours(content):
        raise CheckpointError(f"fork: {cfg.fork} is not this trainer's; a run can take its weights by resume")
    return Found(cfg.fork, content, found.notes, forked=True)


def class_map(cfg: CfgNode, found: Found) -> Numbering:
    """A checkpoint goes with the numbers that it was trained with; one without a map is MiSLAS's or ARBLOSS's."""
    if find_spec(cfg.dataset).lists is None:
        return Numbering(cfg.class_map, [])
    if found.content is None:
        choice = cfg.class_map or "stable"
        return Numbering(choice, [f"class map: {choice}"])
    stored = stored_class_map(found.content, found.path)
    if stored is None:
        choice = cfg.class_map or "legacy"
        return Numbering(choice, [f"class map: {choice}, the checkpoint has none"])
    remark = f", class_map {cfg.class_map} is not needed" if cfg.class_map else ""
    return Numbering(stored.tolist(), [f"class map: the checkpoint's{remark}"])


def class_groups(cfg: CfgNode, data: Data) -> dict[str, dict[str, Tensor]]:
    """Many / medium / few by every rule that applies, the headline rule first."""
    given = (cfg.head_class_idx, cfg.med_class_idx, cfg.tail_class_idx)
    return shot_groups(cfg.shots, data.spec.shot_ranges if None in given else given, data.class_counts)


def new_model(cfg: CfgNode, data: Data, content: Mapping | None = None) -> nn.Module:
    """``content``: of a checkpoint that all weights will come from, which makes pretrained ones needless."""
    pretrained = cfg.pretrained if content is None else False
    with seeded_weights(cfg.seed):
        model = build_model(cfg.dataset, cfg.backbone, data.num_classes, pretrained, cfg.classifier, cfg.cosine_scale)
    return model.to(memory_format=torch.channels_last)  # as the images are


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


def new_parallel(cfg: CfgNode, model: nn.Module, device: torch.device) -> nn.Module:
    """What is trained: ``model``, compiled and over all processes where that is asked for."""
    if cfg.compile:
        compile_model(model, device)
    return distributed.parallel(model, device, cfg.sync_bn)


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


def new_component_meter(cfg: CfgNode, data: Data, device: torch.device) -> ComponentMeter | None:
    """None where ``diagnostics`` is off."""
    rows = chosen_rows(data.class_counts, cfg.diagnostics_rows)
    return ComponentMeter(data.num_classes, rows, cfg.num_epochs - 1, device) if cfg.diagnostics else None


def start(
    cfg: CfgNode,
    found: Found,
    data: Data,
    steps: int,
    device: torch.device,
    model: nn.Module,
    method: Method,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
) -> tuple[TrainState, Path, dict, list[str]]:
    """Where training starts: (state, the run's folder, the settings it records, notes for the log).

    ``steps`` of an epoch.
    """
    path, content, _, forked = found
    settings = dict(cfg) | {"resume": "" if forked else path}  # which "auto" has become
    if not distributed.all_equal(found.checksum()):
        raise CheckpointError(
            f"resume: {cfg.resume} is not the same file for every process; all nodes need one save_dir"
        )
    if content is None:
        return TrainState(), new_folder(cfg.save_dir, cfg.name), settings, []
    if cfg.fork and not forked and fork_of(content["config"] if is_ours(content) else {}) != fork_of(cfg):
        raise CheckpointError(f"resume: {path} did not begin with the fork {cfg.fork}; give one of the two")
    if not is_ours(content):
        source = load_content(model, content, path)["source"]
        note = f"{path}: {source}; weights only, training starts at epoch 0"
        return TrainState(), new_folder(cfg.save_dir, cfg.name), settings, [note]
    changed = changed_options(content, cfg)
    check_unchanged(content, path, changed, data)
    state = restore(content, path, model, method, optimizer, scaler)
    kept = ("resume", "class_map") if forked else ("resume", "class_map", "fork")
    settings |= {key: str(content["config"].get(key, "")) for key in kept}
    folder = fork(cfg, path, state) if forked else folder_of(path) or new_folder(cfg.save_dir, cfg.name)
    reached = f"{state.epoch} epochs" + (f" and {state.step} steps" if state.step else "")
    notes = [f"{path}: going on after {reached}, in {folder}"]
    notes += [f"{key} was {old} so far and is {new} from here on" for key, (old, new) in changed.items()]
    if state.step and not {"seed", "batch_size"}.isdisjoint(changed):
        state.step, state.sums, state.seconds = 0, None, 0.0  # of other steps
        notes.append(f"epoch {state.epoch} begins anew: its steps are others now")
    if state.step > steps:
        raise CheckpointError(f"{path}: lies at step {state.step} of an epoch that has {steps} steps")
    return state, folder, settings, notes + moved(content, device)


def fork(cfg: CfgNode, path: str, state: TrainState) -> Path:
    """The folder of a new run that begins with ``state``, read from ``path``; it has what its parent has up to there.

    The best checkpoint will be one of its own.
    """
    state.best_acc1, state.its_ece, state.log_size = -1.0, 0.0, None
    folder, parent = new_folder(cfg.save_dir, cfg.name), folder_of(path)
    try:
        if parent:
            inherit(folder, parent, state.epoch)
    except OSError as error:
        raise InputError(f"fork: cannot copy {parent}'s metrics to {folder}: {error.strerror}") from None
    return folder


def check_unchanged(content: Mapping, path: str, changed: Mapping[str, tuple], data: Data) -> None:
    """A run goes on with its own data and its own network."""
    for key in FIXED:
        if key in changed:
            old, new = changed[key]
            raise CheckpointError(
                f"{path}: was trained with {key} {old}, and {key} {new} is asked for; a run goes on with its own data "
                "and network (its config.yaml has them), or starts anew without resume"
            )
    counts, fingerprint = content.get("class_counts"), content.get("fingerprint")
    if counts is not None and not (isinstance(counts, Tensor) and torch.equal(counts, data.class_counts)):
        raise CheckpointError(
            f"{path}: was trained on other images: their number per class differs from what data_path (and "
            "train_txt) hold now; a run goes on with its own data"
        )
    if fingerprint is not None and not (isinstance(fingerprint, str) and fingerprint in ("", data.fingerprint)):
        raise CheckpointError(
            f"{path}: was trained on other data: the lists (or the images' labels) are not what they were (their hash "
            "differs); a run goes on with its own data"
        )


def moved(content: Mapping, device: torch.device) -> list[str]:
    """Notes that say where the run cannot be the same to the last bit any more."""
    before, now = content.get("environment") or {}, environment(device)
    return [
        f"{what}: {before[what]} so far, {now[what]} from here on; from here on the run is not, bit for bit, the one "
        "that it would have been"
        for what in now
        if what in before and before[what] != now[what]
    ]


def origins(data: Data, settings: Mapping, device: torch.device) -> dict:
    """What a checkpoint says of where it comes from."""
    return {
        "config": settings,
        "class_counts": data.class_counts,
        "class_map": data.class_map,
        "class_names": data.class_names,
        "fingerprint": data.fingerprint,
        "environment": environment(device),
        "selected_on": "held-out training images" if settings["val_per_class"] else "test set",
    }


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


# ---------------------------------------------------------------------------------------------------------------------
# One epoch


def due(epoch: int, every: int, num_epochs: int, last: int = 1) -> bool:
    """After every ``every`` epochs and after each of the ``last``, the very last one anyway; 0: never."""
    return every > 0 and ((epoch + 1) % every == 0 or epoch >= num_epochs - max(last, 1))


def train_epoch(
    step: Step | RecordedStep | WatchedStep,
    loader: TrainLoader,
    run: RunLog,
    keeper: Keeper,
    epoch: int,
    seed: int,
    print_freq: int,
) -> dict[str, dict[str, float]]:
    """Trains for one epoch, or what is left of it; returns the row's entries: mean loss, accuracies, counts, and time.

    Accuracies in percent, see :meth:`TrainMeter.counts` for the counts.
    """
    began = time.perf_counter() - keeper.state.seconds
    step.start_epoch(epoch)
    first, meter, passes = keeper.start_epoch(), step.meter, loader.accumulate
    keeper.between_steps(first, time.perf_counter() - began)
    draws = step.method.draws(loader.batch_sizes, seed, epoch, passes, loader.device)[first * passes :]
    batches = tqdm(loader.epoch(epoch, first), f"epoch {epoch}", len(draws), leave=False, disable=not show_progress())
    for number, (batch, draw) in enumerate(zip(batches, draws, strict=True), first * passes):
        step(batch, draw)
        if not batch.ends_step:
            continue
        done = number // passes
        if done % print_freq == 0:
            keeper.check()
            per_step = (time.perf_counter() - began) / (done + 1)
            run.info(progress_line(epoch, done, len(loader), per_step, meter.last_step(), meter.averages()))
        keeper.between_steps(done + 1, time.perf_counter() - began)
    keeper.check()
    check_weights(step.model, epoch)
    seconds = time.perf_counter() - began
    timing = {"train_seconds": seconds, "images_per_second": len(loader.targets) / seconds}
    return {"train": {**meter.averages(), **meter.counts()}, "timing": timing}


def show_progress() -> bool:
    return sys.stderr.isatty() and distributed.is_main()


class Evaluation(NamedTuple):
    """One evaluation: what goes into the epoch's row, and what it was computed from."""

    entries: dict  # "test", "halves" and, where training images are held out, "val"; see utils.metrics.report
    predictions: Predictions  # on the test set


def evaluate(
    model: nn.Module,
    test: EvalLoader,
    held_out: EvalLoader | None,
    class_counts: Tensor,
    groups: dict,
    precision: str,
    shift: Tensor | None = None,
    signal: Callable[[], int] = lambda: 0,
) -> Evaluation:
    """Evaluates the bare model, with rank 0's batch-norm statistics on every rank.

    ``shift``, ``signal``: see :func:`predict`.
    """
    distributed.broadcast_buffers(model)
    predictions = predict(model, test, precision, signal, shift)
    entries = {"test": report(predictions, class_counts, groups), "halves": half_accuracies(predictions)}
    if held_out is not None:
        entries["val"] = report(predict(model, held_out, precision, signal, shift), class_counts, groups)
    return Evaluation(entries, predictions)


def collapse(
    model: nn.Module, plain: EvalLoader, groups: dict, precision: str, signal: Callable[[], int]
) -> dict[str, float]:
    """Neural collapse on the training images without augmentation, see :func:`measure`; NC1 by group beside it.

    Features are kept in the host's memory: a second pass of all images through the network would cost more.
    """
    distributed.broadcast_buffers(model)
    batches = [(h.cpu(), y.cpu()) for h, _, y in feature_batches(model, plain, precision, signal)]
    rows, bias = model.classifier.rows(), model.classifier.fc.bias
    measured = measure(lambda: until_signal(batches, signal), rows.detach(), bias)
    per_class = measured.pop("nc1_per_class")
    headline = next(iter(groups.values()))
    by_group = shot_accuracy(per_class, ~per_class.isnan(), headline)  # means, of whatever it is given
    measured |= {f"nc1_{name}": value for name, value in by_group.items()}
    return {key: value for key, value in measured.items() if math.isfinite(value)}


def announce(run: RunLog, evaluation: Evaluation) -> None:
    """MiSLAS's two lines, in the log."""
    for line in mislas_lines(evaluation.entries["test"]):
        run.info(line)


def diagnostics_file(
    folder: Path, components: ComponentMeter | None, data: Data, first_epoch: int
) -> EpochArrays | None:
    """``diagnostics.npz``, which rank 0 writes; None where there are no components."""
    if components is None or not distributed.is_main():
        return None
    fixed = {"class_counts": data.class_counts.numpy(), "rows": np.array(components.chosen)}
    return EpochArrays(folder / "diagnostics.npz", fixed, first_epoch, last=["table"])


def record_components(run: RunLog, epoch: int, components: ComponentMeter | None, arrays: EpochArrays | None) -> None:
    """The epoch's row of ``diagnostics.npz``, and the chosen rows' attraction and repulsion as TensorBoard scalars."""
    if components is None:
        return
    means = components.averages()
    if arrays is None:
        return
    arrays.add(epoch, means)
    for row in components.chosen:
        attraction = float(means["diagonal"][row])
        repulsion = float(means["row_sums"][row]) - attraction
        run.scalars(epoch, {f"row {row}/attraction": attraction, f"row {row}/repulsion": repulsion})


def publish(run: RunLog, epoch: int, evaluation: Evaluation, data: Data) -> None:
    """The lines in the log, the predictions, and accuracy per class for TensorBoard."""
    announce(run, evaluation)
    predictions = evaluation.predictions
    accuracy, _ = class_accuracy(predictions.classes, predictions.targets, data.num_classes)
    run.class_accuracies(epoch, 100 * accuracy, data.class_names)
    if distributed.is_main():
        save_predictions(run.folder / "predictions", epoch, predictions)


def record(run: RunLog, row: Mapping, clamp: float | None) -> None:
    """What was counted in the epoch, its line in ``metrics.jsonl`` and its TensorBoard scalars."""
    for line in count_lines(row["epoch"], row["train"], clamp):
        run.info(line)
    run.write_epoch(row)
    scalars = {"loss/train": row["train"]["loss"], "top1/train": row["train"]["top1"], "lr": row["lr"]}
    scalars |= {f"collapse/{key}": value for key, value in row.get("nc", {}).items()}
    for split in ("test", "val"):
        shown = {key: row[split][key] for key in ("top1", *GROUPS, "ece", "nll") if key in row.get(split, {})}
        scalars |= {f"{key}/{split}": value for key, value in shown.items()}
    run.scalars(row["epoch"], scalars)


# ---------------------------------------------------------------------------------------------------------------------
# In words


def describe(
    run: RunLog,
    cfg: CfgNode,
    data: Data,
    groups: dict,
    step: Step | RecordedStep | WatchedStep,
    notes: Sequence[str],
) -> None:
    """The first lines of a run: what is trained, on what, with which software."""
    run.info(
        f"{cfg.name}: training {method_in_words(cfg)}; {schedule_in_words(cfg)}; "
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
    run.info(images_in_words(cfg, data, step.device))
    run.info(group_line(group_sizes(groups)))
    run.info(
        f"device {step.device} ({torch.get_num_threads()} CPU threads), torch {torch.__version__}, "
        f"torchvision {torchvision.__version__}, Python {platform.python_version()}"
    )
    run.info(computing_in_words(cfg, step))
    if cfg.diagnostics:
        run.info(
            f"diagnostics: every {cfg.diagnostics} steps, rows {chosen_rows(counts, cfg.diagnostics_rows)} in full"
        )
    if distributed.world_size() * cfg.accumulate > 1:
        run.info(parts_in_words(cfg))
    for note in notes:
        run.info(f"note: {note}")
    run.info(f"folder: {run.folder}")


def computing_in_words(cfg: CfgNode, step: Step | RecordedStep | WatchedStep) -> str:
    """Precision, and what is done to be fast."""
    numbers = {
        "fp32": "strict float32",
        "tf32": "float32" + (", products in TF32" if step.device.type == "cuda" else " (TF32 is for CUDA only)"),
        "bf16": "bfloat16, weights and loss in float32",
        "fp16": "float16, weights and loss in float32, the loss scaled",
    }[cfg.precision]
    recorded = isinstance(step.step if isinstance(step, WatchedStep) else step, RecordedStep)
    ways = ["compiled"] * cfg.compile + ["the step recorded as a CUDA graph"] * recorded
    return f"computing: {'; '.join([numbers, *ways])}"


def images_in_words(cfg: CfgNode, data: Data, device: torch.device) -> str:
    """Where a step's images come from."""
    way = "read"
    if data.spec.lists:
        way = f"decoded with {fast_decoder() if cfg.decoder == 'fast' else 'PIL'}"
    where = f"in the memory of {device}" if data.on_device else f"{way} by {data.workers} workers of each process"
    return f"images: {data.image_size} pixels, {where}"


def parts_in_words(cfg: CfgNode) -> str:
    """Into how many parts a step is divided, and what each part has for itself."""
    several, count = distributed.world_size(), cfg.accumulate
    passes = f" with {count} passes per step" if count > 1 else ""
    batch_counts = cfg.loss.endswith("arb") and cfg.class_counts not in ("global", "batch_synced")
    own = ["mixup pairs"] * cfg.mixup + ["batch counts"] * batch_counts
    own += ["mean weight"] * (cfg.drw_epoch is not None) + ["counts in L_W"] * (cfg.nc_within > 0)
    own += [] if cfg.sync_bn and count == 1 else ["batch-norm statistics"]
    who = f"{several} processes{passes}" if several > 1 else f"{count} passes per step"
    return f"{who}: each has its own {', '.join(own)}, so their number matters" if own else f"{who}"


def method_in_words(cfg: CfgNode) -> str:
    """Loss, what is added to it, mixup and data, as a sentence would have them."""
    words = [loss_in_words(cfg)]
    if cfg.drw_epoch is not None:
        never = ", never reached" * (cfg.drw_epoch >= cfg.num_epochs)
        words.append(f"deferred re-weighting from epoch {cfg.drw_epoch} (beta {cfg.drw_beta:g}{never})")
    if cfg.nc_within > 0:
        never = ", never reached" * (cfg.nc_start_epoch >= cfg.num_epochs)
        parts = f"{cfg.nc_within:g} L_W + {cfg.nc_between:g} L_B"
        words.append(f"{parts} from epoch {cfg.nc_start_epoch} (class means: lr {cfg.nc_means_lr:g}{never})")
    if cfg.classifier != "linear":
        kinds = {"cosine": f"cosine classifier times {cfg.cosine_scale:g}", "simplex": "fixed simplex classifier"}
        words.append(kinds[cfg.classifier])
    words.append(f"mixup alpha {cfg.alpha:g}" if cfg.mixup else "no mixup")
    words += [post_hoc_in_words(cfg)] * (cfg.post_hoc_tau > 0)
    cut = "as it is" if cfg.imb_factor is None else f"{cfg.imb_type}, imbalance factor {cfg.imb_factor:g}"
    return ", ".join(words) + f", on {cfg.dataset} ({cut})"


def post_hoc_in_words(cfg: CfgNode) -> str:
    """And whether that corrects the prior a second time."""
    twice = "; the loss has corrected the prior already" * (cfg.loss.endswith("arb") or cfg.loss == "logit_adjustment")
    return f"evaluated after post-hoc logit adjustment (logits less {cfg.post_hoc_tau:g} log(n / N){twice})"


def loss_in_words(cfg: CfgNode) -> str:
    """The loss with its numbers."""
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


def schedule_in_words(cfg: CfgNode) -> str:
    """Optimizer and learning rate."""
    if cfg.cos:
        steps = "cosine"
    else:
        late = [step for step in cfg.lr_steps if step >= cfg.num_epochs]
        steps = ", ".join(f"x{f:g} from epoch {s}" for s, f in zip(cfg.lr_steps, cfg.lr_step_factors, strict=True))
        steps = f"{cfg.warmup_epochs} warm-up epochs, {steps}" + (f" ({late} never reached)" if late else "")
    passes = f" in {cfg.accumulate} passes" if cfg.accumulate > 1 else ""
    return (
        f"SGD for {cfg.num_epochs} epochs, batch {cfg.batch_size}{passes}, lr {cfg.lr:g}, {steps}, "
        f"momentum {cfg.momentum:g}, weight decay {cfg.weight_decay:g}"
    )


def write_settings(folder: Path, settings: Mapping) -> None:
    """``config.yaml``: with this file alone the run can be repeated."""
    if distributed.is_main():
        write_text(folder / "config.yaml", dump_config(settings))


def record_start(folder: Path, state: TrainState, data: Data, device: torch.device) -> None:
    """A line of ``starts.jsonl``: from where the run goes on, with which commit, on which machine, on which data."""
    if not distributed.is_main():
        return
    start = {
        "epoch": state.epoch,
        "step": state.step,
        "commit": commit(),
        "processes": distributed.world_size(),
        "data": data.checksum(),
        "class_counts": data.class_counts.tolist(),
        **machine(device),
    }
    with (folder / "starts.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(start) + "\n")


def finish(run: RunLog, state: TrainState, evaluation: Evaluation, groups: dict) -> None:
    """The table of the three numbers, in the log and as ``summary.json``."""
    if not distributed.is_main():
        return
    rows = [row for row in run.history() if "test" in row]
    if not rows or rows[-1]["epoch"] != state.epoch - 1:  # a checkpoint that came without its run's folder
        rows.append({"epoch": state.epoch - 1, **evaluation.entries})
    headline = next(iter(groups))
    summary = summarise(rows, run.folder / "predictions", groups[headline])
    write_summary(run.folder / "summary.json", summary)
    run.info(f"\n{summary_table(summary)}\n\n{group_line(group_sizes(groups))} (in the table: by {headline})")


if __name__ == "__main__":
    sys.exit(exit_code(main))
