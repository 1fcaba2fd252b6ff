"""Train an arm of a sweep by the usual loop: python -m utils.bench.engine SWEEP.yaml --arm ARM [key value ...]

The loop is :class:`utils.bench.contestants.Classic`. It shares with the trainer the data set, the network's definition
and initial weights, and the learning rates; shuffling, augmentation, mixup, loss, step, evaluation and all randomness
are its own. Rule, written before the first run: the two are equivalent if the 90 % interval of the difference between
their top-1 after the last epoch (Student's t, pairs of the same seed) lies within 1 point of 0: two one-sided tests
(Schuirmann, 1987) at level 0.05.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded, as in train_stage1

import numpy as np
import torch

from utils import build, distributed
from utils.bench.contestants import Classic
from utils.command_line import Parser, exit_code, path
from utils.config import OPTIONS
from utils.errors import InputError
from utils.metrics import class_accuracy, shot_accuracy
from utils.run.folder import read_rows, write_rows
from utils.run.provenance import commit, machine
from utils.sweep.contrasts import Row
from utils.sweep.plan import Run, non_defaults, plan
from utils.sweep.results import ENGINE, ORIGIN, ROOT, published, write_published
from utils.sweep.runner import claimed, tell
from utils.sweep.spec import read_sweep

ARM = "classic"  # of the usual loop's rows
MARGIN = 1.0  # points
METHOD = {"loss": "arb", "class_counts": "batch", "mixup": True}  # all that the usual loop has
HONOURED = {
    *(*METHOD, "alpha", *build.DATA_OPTIONS, "seed", "backbone", "batch_size", "num_epochs"),
    *("lr", "lr_steps", "lr_step_factors", "warmup_epochs", "cos", "cos_warmup", "momentum", "weight_decay"),
    *("shots", "head_class_idx", "med_class_idx", "tail_class_idx"),
    *("precision", "compile", "eval_every", "eval_last"),  # the trainer's own affair
}


def main(arguments: Sequence[str] | None = None) -> int:
    prog, description = "python -m utils.bench.engine", "Train an arm of a sweep by the usual loop, to compare engines."
    hint = f" (usage: {prog} SWEEP.yaml --arm ARM [--seeds N,N] [--save_dir FOLDER] [--publish] [key value ...])"
    parser = Parser(prog=prog, description=description, hint=hint, keys=OPTIONS)
    parser.add_argument("sweep", type=path, metavar="SWEEP", help="YAML file, see config/sweeps/")
    parser.add_argument("overrides", nargs="*", metavar="key value", help="options of every run, such as: data_path D")
    parser.add_argument("--arm", required=True, metavar="ARM", help="an arm with ARB-Loss of batch counts and mixup")
    parser.add_argument("--seeds", type=whole_numbers, metavar="N,N", help="all of the arm's by default")
    parser.add_argument("--publish", action="store_true", help="train nothing: publish what is done beside the sweep")
    parser.add_argument("--save_dir", type=path, default="saved", metavar="FOLDER", help="holds the results' folder")
    args = parser.parse_intermixed_args(arguments)
    sweep = read_sweep(args.sweep)
    home = args.save_dir / f"{sweep.name}_engine"
    runs = [run for run in plan(sweep, home, args.overrides) if run.arm == args.arm]
    runs = [run for run in runs if args.seeds is None or run.seed in args.seeds]
    if not runs:
        raise InputError(f"command line: {sweep.name} has no run of --arm {args.arm} with these --seeds")
    check(runs[0])
    if args.publish:
        return publish(sweep.name, runs, read_rows(home / "rows.jsonl"))
    home.mkdir(parents=True, exist_ok=True)
    with claimed(home), distributed.processes(runs[0].cfg.device) as device:
        rows = read_rows(home / "rows.jsonl")
        for run in runs:
            if not any((row["run"], row["hash"]) == (name_of(run), run.hash) for row in rows):
                rows.append(train(run, device))
                write_rows(home / "rows.jsonl", rows)
    return 0


def whole_numbers(text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be whole numbers such as 0,1,2, not {text!r}") from None


def name_of(run: Run) -> str:
    """Of the same run by the usual loop."""
    return ARM + run.name.removeprefix(run.arm)


def check(run: Run) -> None:
    """Refuse an arm with anything that the usual loop does not do."""
    other = [key for key, value in METHOD.items() if run.cfg[key] != value]
    other += sorted(non_defaults(run.cfg).keys() - HONOURED)
    if other:
        raise InputError(
            f"{run.arm}: the usual loop has ARB-Loss with batch counts and mixup alone, and {other[0]} is "
            f"{run.cfg[other[0]]!r} here"
        )


def train(run: Run, device: torch.device) -> Row:
    """Train a run by the usual loop; returns its row of results, see :func:`utils.sweep.results.results_of`."""
    data = build.load_data(run.cfg, "", device)
    if not data.on_device:
        raise InputError(f"dataset: {run.cfg.dataset}: the usual loop needs images that fit into memory")
    origin = {"commit": commit(), "processes": 1, "data": data.content_hash(), **machine(device)}
    torch.manual_seed(run.seed)
    np.random.seed(run.seed)
    classic, began = Classic(data, device, run.cfg), time.perf_counter()
    for epoch in range(run.cfg.num_epochs):
        loss, seconds = classic.train(epoch), time.perf_counter() - began
        tell(f"seed {run.seed}, epoch {epoch}: loss {loss:.4f}, {seconds:.0f} s so far")
    accuracy, totals = class_accuracy(classic.evaluate(), data.test.targets, data.num_classes)
    groups = shot_accuracy(100 * accuracy, totals, next(iter(build.class_groups(run.cfg, data).values())))
    last = {"top1": float(100 * (accuracy * totals).sum() / totals.sum()), **groups}
    tell(f"seed {run.seed}: top-1 {last['top1']:.2f} after the last epoch")
    return {
        "run": name_of(run),
        "arm": ARM,
        "axes": run.cell,
        "seed": run.seed,
        "subset_seed": run.cfg.subset_seed,
        "hash": run.hash,  # of the arm's configuration
        "options": non_defaults(run.cfg),
        "forked": None,
        **{key: origin[key] for key in ORIGIN},
        "starts": [{"epoch": 0, "step": 0, "commit": origin["commit"], "date": origin["date"]}],
        "epochs": run.cfg.num_epochs,
        "seconds": round(seconds, 1),
        "last": last,
    }


def publish(sweep: str, runs: Sequence[Run], rows: Sequence[Row], root: Path = ROOT) -> int:
    """Publish the rows of ``runs`` by both engines as the results of a sweep with two arms.

    The trainer's are those that are published of ``sweep``.
    """
    before, planned, arm = published(sweep, root), {run.hash for run in runs}, runs[0].arm
    if before is None:
        raise InputError(f"{sweep}: nothing of it is published to compare with; publish the sweep first")
    theirs = [row for row in rows if row["hash"] in planned]
    ours = [row for row in before["runs"] if row["hash"] in planned and row["arm"] == arm]
    if not theirs:
        raise InputError(f"{sweep}: no run of {arm} by the usual loop has ended; there is nothing to publish")
    seeds = sorted({run.seed for run in runs})
    compared = {"arms": [arm, ARM], "seeds": {arm: seeds, ARM: seeds}, "against": arm, "pairs": [], "waterfall": {}}
    claims = {"engines are equivalent": {"pair": [ARM, arm], "within": MARGIN}}
    counts = {"planned": 2 * len(runs), "failed": {}, "choose": False}
    name = {"sweep": ENGINE + sweep}
    return write_published({**before, **name, **compared, **counts, "claims": claims, "runs": [*ours, *theirs]}, root)


if __name__ == "__main__":
    sys.exit(exit_code(main))
