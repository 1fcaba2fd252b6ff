"""Stage-1 training: python train_stage1.py --cfg config/<data set>/<experiment>.yaml [key value ...]"""

import os
import sys
import time
from collections.abc import Sequence

from yacs.config import CfgNode

from utils.command_line import exit_code, parse, refuse_at_once
from utils.config import OPTIONS, option_help, read_config


def read(arguments: Sequence[str] | None = None) -> tuple[CfgNode, list[str]]:
    """The configuration, and notes for the log."""
    args = parse("Train one stage with ARB-Loss or a baseline.", arguments, OPTIONS, option_help())
    return read_config(args.cfg, args.overrides)


if __name__ == "__main__":
    refuse_at_once(read)

# Read when torch is loaded. Waiting threads yield their core instead of spinning: a few percent slower at most on an
# idle machine, tens of times faster on a busy one.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from tqdm import tqdm

from datasets.loaders import TrainLoader
from utils import distributed
from utils.build import (
    check,
    load_data,
    new_component_meter,
    new_evaluator,
    new_loaders,
    new_step,
    new_training,
    set_lr,
)
from utils.meter import check_weights
from utils.precision import matmul_precision
from utils.run.checkpoint_manager import CheckpointManager
from utils.run.describe import describe_run
from utils.run.log import RunLog, progress_line
from utils.run.provenance import provenance
from utils.run.record import Recorder
from utils.run.resume import class_map, find_checkpoint, start
from utils.schedule import due
from utils.signals import Signals
from utils.step import Step, StepWrapper


def main(arguments: Sequence[str] | None = None) -> None:
    """Train one run. To go on reading: utils/build.py, utils/step.py, methods/method.py, methods/losses.py."""
    with Signals() as signals:
        with distributed.together():
            cfg, notes = read(arguments)
            check(cfg)
            origin = find_checkpoint(cfg)
            class_order = class_map(cfg, origin)
        with distributed.processes(cfg.device, cfg.deterministic) as device, matmul_precision(cfg.precision):
            data = load_data(cfg, class_order.choice, device)
            loaders = new_loaders(cfg, data, device)
            training = new_training(cfg, data, loaders.train, device, origin.content)
            evaluator = new_evaluator(cfg, data, training, loaders)
            components = new_component_meter(cfg, data, device)
            state, folder, settings, start_notes = start(cfg, origin, data, training, len(loaders.train))
            step = new_step(cfg, training, components)

            with RunLog(folder, cfg.name, state.epoch, state.log_size) as log:
                notes += [*start_notes, *class_order.notes, *data.notes]
                describe_run(log, cfg, data, evaluator.groups, step, notes)
                recorder = Recorder(log, state, data, evaluator.groups, components)
                if state.epoch >= cfg.num_epochs:  # a finished run was resumed
                    return recorder.finish_again(evaluator.evaluate())
                recorder.start(settings, device)
                content = training.parts() | provenance(data, settings, device)
                options = {"every": cfg.checkpoint_every_steps, "keep": cfg.keep_epochs, "components": components}
                manager = CheckpointManager(log, signals, state, loaders.train, step.meter, content=content, **options)
                with manager.stop_on_signal():
                    for epoch in range(state.epoch, cfg.num_epochs):
                        row = {"epoch": epoch, "lr": set_lr(training.optimizer, cfg, epoch)}
                        row |= train_epoch(step, loaders.train, log, manager, epoch, cfg.seed, cfg.print_freq)
                        if due(epoch, cfg.eval_every, cfg.num_epochs, cfg.eval_last):
                            evaluation = evaluator.evaluate(manager.signal)
                            row |= evaluation.entries
                            recorder.end_evaluation(epoch, evaluation)
                        if due(epoch, cfg.nc_every, cfg.num_epochs):
                            row["nc"] = evaluator.neural_collapse(manager.signal)
                        recorder.end_epoch(row, step.meter.clamp)
                        manager.end_epoch(row)
                    recorder.finish(evaluation)


# ---------------------------------------------------------------------------------------------------------------------
# One epoch


def train_epoch(
    step: Step | StepWrapper,
    loader: TrainLoader,
    log: RunLog,
    manager: CheckpointManager,
    epoch: int,
    seed: int,
    print_freq: int,
) -> dict[str, dict[str, float]]:
    """Train for (the rest of) one epoch.

    Returns:
        Entries of the row of ``metrics.jsonl``: "train" (mean loss, accuracies in percent, see also
        :meth:`TrainMeter.counts`) and "timing".
    """
    began = time.perf_counter() - manager.state.seconds  # as if the epoch had not been interrupted
    step.start_epoch(epoch)
    first = manager.start_epoch()
    manager.between_steps(first, time.perf_counter() - began)
    draws = step.method.draws(loader.batch_sizes, seed, epoch, loader.accumulate, loader.device)
    draws = draws[first * loader.accumulate :]
    batches = loader.epoch(epoch, first, step.method.pastes)
    batches = tqdm(batches, f"epoch {epoch}", len(draws), leave=False, disable=not show_progress())
    for batch, draw in zip(batches, draws, strict=True):
        step(batch, draw)
        if batch.ends_step:
            done = batch.number + 1
            if batch.number % print_freq == 0:
                manager.check()
                per_step, last = (time.perf_counter() - began) / done, step.meter.last_step()
                log.info(progress_line(epoch, batch.number, len(loader), per_step, last, step.meter.averages()))
            manager.between_steps(done, time.perf_counter() - began)
    manager.check()
    check_weights(step.model, epoch)
    seconds = time.perf_counter() - began
    timing = {"train_seconds": seconds, "images_per_second": len(loader.targets) / seconds}
    return {"train": {**step.meter.averages(), **step.meter.counts()}, "timing": timing}


def show_progress() -> bool:
    return sys.stderr.isatty() and distributed.is_main()


if __name__ == "__main__":
    sys.exit(exit_code(main))
