"""Hours that a configuration takes on other machines: python -m utils.bench plan --cfg FILE [--gpus N] [--nodes N] ...

A minute measures the training step, the evaluation and the reading of images on this machine's device; the rest is
arithmetic, for processes that are each as fast as this one. On GPUs, reading, computing and averaging gradients overlap
and the slowest sets the pace; on CPUs they share the cores and their times add up. Start-up, checkpoints, diagnostics
and waiting for a disk are left out, so a real training takes longer.
"""

import argparse
import itertools
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from yacs.config import CfgNode

from datasets import Data, Images, find_spec
from datasets.long_tail import long_tail_counts
from datasets.source import ImageFiles
from utils import build, distributed
from utils.bench.contestants import noise
from utils.bench.parts import SAMPLE, jpegs, make_photos
from utils.bench.timing import Part, Run, as_text, rows_of, seconds
from utils.command_line import Parser, output_file, path, positive
from utils.config import OPTIONS, read_config
from utils.errors import InputError
from utils.evaluation import predict
from utils.files import write_text
from utils.precision import matmul_precision
from utils.run.provenance import machine
from utils.schedule import due

USAGE = "plan --cfg FILE [--gpus N] [--nodes N] [--cores N] [--bandwidth N] [--speed N] [--minutes N] [key value ...]"
CIFAR = (50_000, 10_000)  # images for training and testing
WITHIN_NODE, BETWEEN_NODES = 100, 10  # Gbit/s: PCI Express 3.0 x16, a common Ethernet
FORWARD = 1 / 3  # of a training step, where --speed gives the step alone
FEW, ROUNDS = 8, 9  # images of a first try; timings at most
SHARES = {"evaluation": 0.15, "step": 0.5, "decoder": 0.15}  # of the minutes; the rest is for set-up


class Cluster(NamedTuple):
    """The machines that are planned for."""

    gpus: int  # processes per node
    nodes: int
    readers: int  # processes per node that read images, each on a core of its own
    bandwidth: float  # Gbit/s of the slowest link between processes

    def seconds(self, what: str, images: int, costs: Mapping[str, float], gradient: int = 0) -> dict[str, float]:
        """Seconds of each part of a training step or evaluation on ``images`` over all processes.

        Args:
            what: "step" or "evaluation".
            costs: Seconds per image of ``what`` and, unless images are held on the device, of one reader ("decoder").
            gradient: Bytes; a ring all-reduce sends them 2 (P - 1) / P times (Patarasuk and Yuan, 2009).
        """
        processes = self.gpus * self.nodes
        return {
            "decoder": images / self.nodes / self.readers * costs.get("decoder", 0),
            what: math.ceil(images / processes) * costs[what],
            "network": 2 * (processes - 1) / processes * gradient * 8 / (self.bandwidth * 1e9),
        }


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    cfg, _ = read_config(args.cfg, args.overrides)
    build.check(cfg)
    with distributed.processes(cfg.device) as device, tempfile.TemporaryDirectory() as scratch:
        report, (data, source) = machine(device), find_data(cfg, device, Path(scratch))
        part = plan(cfg, data, source, args, device)
    print(*(f"{key}: {value}" for key, value in report.items()), as_text("plan", part), sep="\n", flush=True)
    if args.json:
        write_text(args.json, json.dumps(report | {"parts": {"plan": part._asdict()}}, indent=2) + "\n")
    return 0


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    prog, hint = "python -m utils.bench plan", f" (usage: python -m utils.bench {USAGE})"
    parser = Parser(prog=prog, description="Hours of a training on other machines.", hint=hint, keys=OPTIONS)
    parser.add_argument("--cfg", type=path, required=True, metavar="FILE", help="YAML file, see config/")
    parser.add_argument("overrides", nargs="*", metavar="key value", help="such as: data_path D precision bf16")
    for name, kind, default, meaning in (
        ("gpus", int, 1, "processes per node; 1 by default"),
        ("nodes", int, 1, "1 by default"),
        ("cores", int, None, "per node; by default as many as here"),
        ("bandwidth", float, None, f"Gbit/s; by default {WITHIN_NODE} in one node, {BETWEEN_NODES} between several"),
        ("speed", float, None, "images/s that one GPU is known to train at; measured on this machine by default"),
        ("minutes", float, 1, "of measuring, without compilation; 1 by default"),
    ):
        parser.add_argument(f"--{name}", type=positive(kind), default=default, metavar="N", help=meaning)
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write everything there")
    return parser.parse_intermixed_args(arguments)


def find_data(cfg: CfgNode, device: torch.device, scratch: Path) -> tuple[Data, str]:
    """The data, and what they are: stand-ins of the published number if there is no ``data_path``."""
    spec, folder = find_spec(cfg.dataset), Path(cfg.data_path)
    sizes = CIFAR if cfg.dataset.startswith("cifar") else spec.published and (spec.published.train, spec.published.test)
    if sizes is None or folder.exists():
        return build.load_data(cfg, "", device), "the configuration's"
    if spec.lists and cfg.imb_factor is not None:
        raise InputError(
            f"data_path: {folder} does not exist, and imb_factor needs its lists; give the folder, or null"
        )
    side, (train, test), classes = cfg.image_size or spec.image_size, sizes, spec.num_classes
    if not spec.lists:
        if cfg.imb_factor is not None:
            train = sum(long_tail_counts(train // classes, classes, cfg.imb_type, cfg.imb_factor))
        return noise(train, test, cfg.dataset, side, classes), f"noise, since there is no {folder}"
    names = itertools.cycle(jpegs(make_photos(scratch / "photos")))
    files = (ImageFiles.under(scratch / "photos", list(itertools.islice(names, size))) for size in (train, test))
    splits = [Images(split, torch.arange(len(split)) % classes) for split in files]
    counts = torch.bincount(splits[0].targets, minlength=classes)
    data = Data(spec, [*map(str, range(classes))], counts, splits[0], None, splits[1], side, decoder=cfg.decoder)
    return data, f"photographs of 500 x 375 pixels, since there is no {folder}"


def plan(cfg: CfgNode, data: Data, source: str, args: argparse.Namespace, device: torch.device) -> Part:
    """Measure, and compute the hours."""
    cores = args.cores or distributed.workers_here(sys.maxsize)
    readers = min(math.ceil(cfg.workers / args.gpus) * args.gpus, cores) or args.gpus
    bandwidth, processes = args.bandwidth or (WITHIN_NODE if args.nodes == 1 else BETWEEN_NODES), args.gpus * args.nodes
    cluster = Cluster(args.gpus, args.nodes, readers, bandwidth)
    overlap = cfg.workers > 0 and (bool(args.speed) or device.type == "cuda")
    loader = build.train_loader(cfg, data, torch.device("cpu"), world_size=processes)  # to count, not to read
    own, held_out = loader.batch_sizes[0], len(data.val.targets) if data.val else 0
    tested = len(data.test.targets) * (2 if cfg.ema > 0 else 1) + held_out  # averaged weights are tested, too
    with matmul_precision(cfg.precision):
        graph = cfg.cuda_graph and processes * cfg.accumulate == 1
        alone = CfgNode({**cfg, "accumulate": 1, "cuda_graph": graph, "pretrained": False})
        rates, taken, gradient = measure(alone, replace(data, workers=0), device, own, 60 * args.minutes, args.speed)
    costs = {what: 1 / statistics.median(values) for what, values in rates.items()}
    if args.speed:
        costs |= {"step": 1 / args.speed, "evaluation": FORWARD / args.speed}
    epochs, whole = cfg.num_epochs, max if overlap else sum
    times = sum(due(epoch, cfg.eval_every, epochs, cfg.eval_last) for epoch in range(epochs))
    step = cluster.seconds("step", cfg.batch_size, costs, gradient * (2 if cfg.sam > 0 else 1))
    if cfg.mix == "cmo":
        step["decoder"] *= 2  # and images to paste; the idle epochs are counted like the others
    totals = {
        "training": (epochs * len(loader), step),
        "evaluation": (times, cluster.seconds("evaluation", tested, costs)),
    }
    hours = {what: count * whole(parts.values()) / 3600 for what, (count, parts) in totals.items()}
    limits = {what: max(parts, key=parts.get) for what, (_, parts) in totals.items()}
    hours["in all"], limits["in all"] = sum(hours.values()), limits[max(hours, key=hours.get)]
    speed = f"{args.speed:g} images/s per GPU" if args.speed else f"processes as fast as one on {device.type} here"
    settings = {
        "configuration": f"{cfg.name}: {epochs} epochs of {len(loader)} steps of {cfg.batch_size} images",
        "images": f"{len(data.train.targets)} for training, {tested} for {times} evaluations; {source}",
        "planned for": f"{args.nodes} x {args.gpus} processes, {own} images a pass, {readers} readers per node",
        "assumed": f"{speed}, {bandwidth:g} Gbit/s, times of a step that {'overlap' if overlap else 'add up'}",
    }
    tables = {f"measured, {taken} images at a time": rows_of(rates, "images/s")} if rates else {}
    tables["one training step, computed"] = [{"what": what, "ms": 1000 * value} for what, value in step.items()]
    tables["hours, computed"] = [
        {"what": what, "hours": value, "limited by": limits[what], "to try": remedies(limits[what], cfg, cores)}
        for what, value in hours.items()
    ]
    return Part(settings, tables)


def remedies(part: str, cfg: CfgNode, cores: int) -> str:
    """What may make ``part`` faster: options of the configuration or of this command."""
    files, spare = find_spec(cfg.dataset).lists is not None, cfg.workers < cores
    options = {
        "decoder": {"data_on_device True": not files, "decoder fast": files and cfg.decoder == "pil"}
        | {f"workers {cores}": spare, "cores": not spare},
        "step": {"precision bf16": cfg.precision in ("fp32", "tf32"), "compile True": not cfg.compile, "gpus": True},
        "network": {"bandwidth": True, "batch_size": True},
        "evaluation": {"eval_every": True},
    }
    return ", ".join(option for option, helps in options[part].items() if helps)


def measure(
    cfg: CfgNode, data: Data, device: torch.device, own: int, limit: float, speed: float | None
) -> tuple[dict[str, list[float]], int, int]:
    """Images per second of each part, how many were taken at a time, and the bytes of the gradient.

    ``own``: images of one process's pass; fewer are taken if ``limit`` seconds would not do. With ``speed`` only the
    decoder is measured.
    """
    taken = min(own, FEW)
    runs, gradient = prepare(CfgNode({**cfg, "compile": False}), data, device, taken)
    if not speed:
        runs["step"]()
        fits = limit * SHARES["step"] / 4 * taken / seconds(runs["step"], device)  # one to warm up, three to time
        taken = min(own, max(taken, int(fits)))
        runs, gradient = prepare(cfg, data, device, taken)
    # Other work does not change processor time; and while one reader waits for a disk, others can use its core.
    own_time = {"decoder"} | (set(runs) if device.type == "cpu" and torch.get_num_threads() == 1 else set())
    rates = {}
    for what in [what for what in runs if not speed or what == "decoder"]:
        clock = time.process_time if what in own_time else time.perf_counter
        rates[what] = [taken / value for value in repeated(runs[what], limit * SHARES[what], device, clock)]
    return rates, taken, gradient


def prepare(cfg: CfgNode, data: Data, device: torch.device, taken: int) -> tuple[dict[str, Run], int]:
    """What can be timed, each on ``taken`` images, and the bytes of the gradient.

    The evaluation comes first: steps on one batch may diverge.
    """
    cfg, epoch = CfgNode({**cfg, "batch_size": taken}), cfg.num_epochs // 2
    loader = build.train_loader(cfg, data, device)
    training = build.new_training(cfg, data, loader, device)
    step = build.new_step(cfg, training)
    step.start_epoch(epoch)
    batch = next(loader.epoch(epoch, paste=step.method.pastes))
    (draw,) = step.method.draws(loader.batch_sizes[:1], cfg.seed, epoch, device=device)
    evaluate = partial(predict, training.model, [(batch.augment()[:taken], batch.targets)], cfg.precision)
    runs: dict[str, Run] = {"evaluation": evaluate, "step": partial(step, batch, draw)}
    if not data.on_device:
        read, order = loader.pixels.workers.loader.dataset.read, itertools.cycle(loader.order(epoch).tolist())
        crops = ((index, (cfg.seed, epoch, "crop", index)) for index in order)
        runs["decoder"] = lambda: read(list(itertools.islice(crops, taken)))
    trained = [p for group in training.optimizer.param_groups for p in group["params"]]
    return runs, sum(p.numel() * p.element_size() for p in trained)


def repeated(run: Run, limit: float, device: torch.device, clock: Run) -> list[float]:
    """Seconds per call of ``run`` by ``clock``, several times within ``limit``; the first call is not counted."""
    run()
    end = time.perf_counter() + limit
    calls = max(1, int(SAMPLE / seconds(run, device, clock)))
    rounds = []
    while not rounds or (len(rounds) < ROUNDS and time.perf_counter() < end):
        rounds.append(seconds(lambda: [run() for _ in range(calls)], device, clock) / calls)
    return rounds
