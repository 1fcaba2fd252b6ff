"""Command line: python -m utils.sweep SWEEP.yaml [--jobs N] [--cluster slurm] [--publish] [key value ...]"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from utils.command_line import Parser, path, positive
from utils.config import OPTIONS
from utils.errors import InputError
from utils.signals import Signals
from utils.sweep import cluster, runner
from utils.sweep.plan import Run, plan
from utils.sweep.results import PUBLISHED, publish, results_of
from utils.sweep.spec import Sweep, read_sweep
from utils.sweep.tables import markdown


def sbatch_option(text: str) -> tuple[str, str | bool]:
    """An argparse type: ``key=value``, or ``key`` for options without a value."""
    match = re.fullmatch(r"([a-z][\w-]*)(?:=(.+))?", text)
    if text in OPTIONS:
        raise argparse.ArgumentTypeError(f"comes last, or before another --option: {text} is an option of the runs")
    if not match:
        raise argparse.ArgumentTypeError(f"must be a long option of sbatch, such as partition=gpu, not {text!r}")
    return match[1].replace("_", "-"), match[2] or True


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    prog, description = "python -m utils.sweep", "Run a grid of configurations; make tables with intervals."
    more = "[--jobs N] [--minutes N] [--cluster slurm|local|debug] [--per_gpu N] [--wait] [--save_dir FOLDER] "
    more += "[--images TEXT] [--publish]"
    parser = Parser(
        prog=prog,
        description=description,
        hint=f" (usage: {prog} SWEEP.yaml {more} [key value ...] [--slurm KEY=VALUE ...])",
        keys=OPTIONS,
    )
    parser.add_argument("sweep", nargs="?", type=path, metavar="SWEEP", help="YAML file, see config/sweeps/")
    parser.add_argument("overrides", nargs="*", metavar="key value", help="options of every run, such as: data_path D")
    number = {"metavar": "N"}
    jobs = "runs at once, which take turns on the GPUs (default 1); with --cluster, jobs at once"
    parser.add_argument("--jobs", type=positive(int), help=jobs, **number)
    parser.add_argument("--minutes", type=positive(float), help="start nothing that cannot end by then", **number)
    parser.add_argument("--cluster", choices=cluster.CLUSTERS, help="submit jobs, by submitit, and return")
    options = {"type": sbatch_option, "nargs": "+", "action": "extend", "metavar": "KEY=VALUE"}
    parser.add_argument("--slurm", help="at the end: options of sbatch, such as: partition=gpu gres=gpu:1", **options)
    parser.add_argument("--per_gpu", type=positive(int), help="runs that share a job and its GPU (default 1)", **number)
    parser.add_argument("--wait", action="store_true", help="follow the cluster's jobs to their end")
    parser.add_argument("--save_dir", type=path, default="saved", metavar="FOLDER", help="holds the sweep's folder")
    parser.add_argument("--images", metavar="TEXT", help="what the images are, for the tables")
    publishing = f"run nothing: finished runs go to {PUBLISHED} and into the page beside it"
    parser.add_argument("--publish", action="store_true", help=publishing)
    args = parser.parse_intermixed_args(arguments)
    if args.sweep is None:
        parser.error("which sweep?")
    for name in ("slurm", "per_gpu", "wait"):
        if getattr(args, name) and not args.cluster:
            parser.error(f"--{name} goes with --cluster")
    if args.minutes and args.cluster:
        parser.error("--minutes is for runs on this machine; a job's time limit is --slurm time=12:00:00")
    if args.publish and args.overrides:
        raise InputError("command line: --publish takes no options: it publishes the file's own runs")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    sweep = read_sweep(args.sweep)
    home = args.save_dir / sweep.name
    runs = plan(sweep, home, args.overrides)
    try:
        if args.publish:
            return publish(sweep, runs, args.sweep, args.images)
        home.mkdir(parents=True, exist_ok=True)
        failed = (on_cluster if args.cluster else here)(args, sweep, runs, home)
        for name, why in failed.items():
            print(f"failed: {name}: {why}", file=sys.stderr)
        runner.tell(f"{home / 'table.md'}\n\n{markdown(results_of(sweep, runs, failed, args.images))}")
    except OSError as error:
        raise InputError(f"{error.filename or home}: {error.strerror or error}") from None
    return 1 if failed else 0


def here(args: argparse.Namespace, sweep: Sweep, runs: Sequence[Run], home: Path) -> dict[str, str]:
    """Train the runs on this machine, without those that a cluster's jobs train; return name -> why it failed."""
    with Signals(runner.GRACE) as signals, signals.noted(), runner.claimed(home) as lock:
        scheduler = runner.Scheduler(sweep, runs, args.jobs or 1, args.minutes, args.images, [lock])
        if elsewhere := cluster.live(home, scheduler.waiting):
            scheduler.waiting = [run for run in scheduler.waiting if run.name not in elsewhere]
            runner.tell(f"{len(elsewhere)} runs are queued or running on a cluster, and left to it")
        return scheduler.work(signals)


def on_cluster(args: argparse.Namespace, sweep: Sweep, runs: Sequence[Run], home: Path) -> dict[str, str]:
    """Submit jobs, and follow them if that is asked for; return run name -> why it failed."""
    jobs = args.jobs or (256 if args.cluster == "slurm" else 1)
    with Signals(runner.GRACE) as signals, signals.noted(), runner.claimed(home):
        scheduler = cluster.ClusterScheduler(
            sweep, runs, args.images, args.cluster, jobs, args.per_gpu or 1, dict(args.slurm or [])
        )
        follow = args.wait or args.cluster != "slurm"  # whose jobs end with it
        return scheduler.work(signals) if follow else scheduler.submit()
