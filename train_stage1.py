"""Stage-1 training: python train_stage1.py --cfg config/<data set>/<experiment>.yaml [key value ...]"""

import os
import sys
import time
from collections.abc import Sequence

# Read when torch is loaded: a thread that waits gives its core away instead of spinning on it. Alone on a machine that
# costs a few percent at most; beside other work it saves a run from becoming tens of times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from tqdm import tqdm

from datasets.loaders import TrainLoader
from methods.neural_collapse import collapse
from utils import distributed
from utils.build import (
    check,
    check_smallest_batch,
    class_groups,
    load_data,
    new_component_meter,
    new_method,
    new_model,
    new_optimizer,
    new_parallel,
    new_shift,
    new_step,
    set_lr,
)
from utils.command_line import exit_code, parse
from utils.config import read_config
from utils.evaluation import evaluate
from utils.metrics import (
    check_weights,
)
from utils.precision import float32_products, new_scaler
from utils.run.describe import describe
from utils.run.keeper import Keeper
from utils.run.log import RunLog, progress_line
from utils.run.record import (
    announce,
    diagnostics_file,
    finish,
    publish,
    record,
    record_components,
    record_start,
    write_settings,
)
from utils.run.resume import class_map, find_checkpoint, origins, start
from utils.signals import Signals
from utils.step import RecordedStep, Step, WatchedStep


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


if __name__ == "__main__":
    sys.exit(exit_code(main))
