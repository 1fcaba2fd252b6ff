"""Command line: python -m utils.sweep SWEEP.yaml [--jobs N] [--publish] [key value ...]"""

import sys
from collections.abc import Sequence

from utils.command_line import Parser, path, positive
from utils.config import OPTIONS
from utils.errors import InputError
from utils.signals import Signals
from utils.sweep import runner
from utils.sweep.plan import plan
from utils.sweep.results import PUBLISHED, publish, results_of
from utils.sweep.spec import read_sweep
from utils.sweep.tables import markdown


def main(arguments: Sequence[str] | None = None) -> int:
    prog, description = "python -m utils.sweep", "Run a grid of configurations; make tables with intervals."
    more = "[--jobs N] [--minutes N] [--save_dir FOLDER] [--images TEXT] [--publish]"
    parser = Parser(
        prog=prog, description=description, hint=f" (usage: {prog} SWEEP.yaml {more} [key value ...])", keys=OPTIONS
    )
    parser.add_argument("sweep", nargs="?", type=path, metavar="SWEEP", help="YAML file, see config/sweeps/")
    parser.add_argument("overrides", nargs="*", metavar="key value", help="options of every run, such as: data_path D")
    number = {"metavar": "N"}
    parser.add_argument("--jobs", type=positive(int), default=1, help="runs at once; GPUs take turns", **number)
    parser.add_argument("--minutes", type=positive(float), help="start nothing that cannot end by then", **number)
    parser.add_argument("--save_dir", type=path, default="saved", metavar="FOLDER", help="holds the sweep's folder")
    parser.add_argument("--images", metavar="TEXT", help="what the images are, for the tables")
    publishing = f"run nothing: finished runs go to {PUBLISHED} and into the page beside it"
    parser.add_argument("--publish", action="store_true", help=publishing)
    args = parser.parse_intermixed_args(arguments)
    if args.sweep is None:
        parser.error("which sweep?")
    sweep = read_sweep(args.sweep)
    home = args.save_dir / sweep.name
    if args.publish and args.overrides:
        raise InputError("command line: --publish takes no options: it publishes the file's own runs")
    runs = plan(sweep, home, args.overrides)
    try:
        if args.publish:
            return publish(sweep, runs, args.sweep, args.images)
        home.mkdir(parents=True, exist_ok=True)
        with Signals(runner.GRACE) as signals, signals.noted(), runner.claimed(home) as lock:
            failed = runner.Scheduler(sweep, runs, args.jobs, args.minutes, args.images, [lock]).work(signals)
        for name, why in failed.items():
            print(f"failed: {name}: {why}", file=sys.stderr)
        runner.tell(f"{home / 'table.md'}\n\n{markdown(results_of(sweep, runs, failed, args.images))}")
    except OSError as error:
        raise InputError(f"{error.filename or home}: {error.strerror or error}") from None
    return 1 if failed else 0
