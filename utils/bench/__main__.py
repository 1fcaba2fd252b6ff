"""Compare this trainer with the usual loop and with its upper bound: python -m utils.bench [PART ...] [--json FILE] ...

Parts: cifar, criterion, pipeline, startup, epoch; all of these by default. Contestants take turns in one warm process,
in an order that every round shuffles. Numbers are medians over the rounds, with minimum and maximum; a column "/ x" is
the row's median divided by that of row x. Nothing is asserted: other machines give other numbers.

``gpu`` is for the day a GPU is there: most of these parts and some of its own, each in a process of its own that has a
time limit, see :mod:`utils.bench.gpu`. ``plan`` has options of its own, see :mod:`utils.bench.plan`.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded, as in train_stage1

import torch

from utils import distributed, launcher
from utils.bench import gpu, plan
from utils.bench.contestants import MODES
from utils.bench.gpu_parts import correctness, large, memory, together
from utils.bench.parts import Bench, cifar, criterion, epoch, jpegs, pipeline, startup
from utils.bench.timing import Part, as_text
from utils.command_line import Parser, exit_code, output_file, path, positive
from utils.files import write_text
from utils.run.provenance import machine
from utils.signals import Signals

DEFAULT = {part.__name__: part for part in (cifar, criterion, pipeline, startup, epoch)}
PARTS = DEFAULT | {part.__name__: part for part in (correctness, together, large, memory)}


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["plan"]:
        return plan.main(arguments[1:])
    args = parse(arguments)
    launcher.join()
    if args.parts == ["gpu"]:
        return measure_gpu(args)
    with distributed.processes(args.device) as device, tempfile.TemporaryDirectory() as scratch:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.path.join(scratch, "compiled")  # compile from scratch
        bench, report = Bench(args, device, Path(scratch)), machine(device)
        print(*(f"{key}: {value}" for key, value in report.items()), sep="\n", flush=True)
        report["parts"] = {}
        for name in args.parts:
            part = PARTS[name](bench)
            print(as_text(name, part), flush=True)
            report["parts"][name] = part._asdict()
            if args.json:
                write_text(args.json, json.dumps(report, indent=2) + "\n")
    return 0


def measure_gpu(args: argparse.Namespace) -> int:
    """Run the jobs of :mod:`utils.bench.gpu`; returns the exit code, 1 if one of them has failed."""
    report, lines = {"parts": {}}, []
    with Signals():  # any of them ends the job in progress, too
        for job, result, here in gpu.results(args):
            report = here | report
            report["parts"][job.title] = result
            lines.append(gpu.summary(job, result))
            measured = "tables" in result and Part(result["settings"], result["tables"])
            print(as_text(job.title, measured) if measured else f"\n{lines[-1]}", flush=True)
            if args.json:
                write_text(args.json, json.dumps(report, indent=2) + "\n")
    print("\n== gpu", *(f"{key}: {value}" for key, value in report.items() if key != "parts"), "", *lines, sep="\n")
    return int(any("failed" in result for result in report["parts"].values()))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    description = "Compare the trainer with the usual loop and with its upper bound."
    other = f"Hours on other machines: {plan.USAGE}; see plan --help."
    parser = Parser(prog="python -m utils.bench", description=description, epilog=other, hint="; see --help")
    known = f"{', '.join(PARTS)}; the first {len(DEFAULT)} by default. Or gpu: what there is to measure on a GPU"
    parser.add_argument("parts", nargs="*", metavar="PART", help=known)
    parser.add_argument("--minutes", type=positive(float), default=9, metavar="N", help="of gpu in all; 9 by default")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write all there, with each round's numbers")
    parser.add_argument("--rounds", type=positive(int), metavar="N", help="of every comparison")
    parser.add_argument("--steps", type=positive(int), metavar="N", help="cifar, large: steps per round")
    parser.add_argument(
        "--images", type=positive(int), metavar="N", help="epoch: training images of each of 10 classes"
    )
    parser.add_argument("--photos", type=path, metavar="FOLDER", help="pipeline: JPEG files; some are made by default")
    parser.add_argument("--modes", type=lambda text: text.split(","), metavar="A,B", help="such as fp32,bf16+compile")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="nothing, not even the bound")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    args = parser.parse_args(arguments)
    args.parts = args.parts or list(DEFAULT)
    for what, given, known in (("part", args.parts, [*PARTS, "gpu"]), ("mode", args.modes or [], MODES)):
        for name in set(given) - set(known):
            parser.error(f"unknown {what} {name!r}; known are {', '.join(known)}")
    if "gpu" in args.parts and len(args.parts) > 1:
        parser.error("gpu runs parts of its own; give no other")
    if "gpu" in args.parts and args.device != "cpu" and not torch.cuda.is_available():
        parser.error("gpu: this machine has no usable CUDA device; --device cpu tries the command without one")
    if args.modes and not args.compile and all("+" in mode for mode in args.modes):
        parser.error("--no-compile leaves none of --modes")
    if args.photos and not jpegs(args.photos):
        parser.error(f"--photos {args.photos}: no folder with JPEG files")
    return args


if __name__ == "__main__":
    sys.exit(exit_code(main))
