"""Measures this trainer beside the usual loop and beside the bound: python -m utils.bench [PART ...] [--json FILE] ...

Parts: cifar, criterion, pipeline, startup, epoch; by default all. What is compared takes turns, warm, in one run, in an
order that every round shuffles. Numbers are medians over the rounds, beside the lowest and the highest; a column "/ x"
is the row's median divided by that of row x. Nothing is asserted: another machine gives other numbers.
"""

import argparse
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in train_stage1, for all that is compared

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from datasets import Data, Images, find_spec
from datasets.decoding import fast_decoder
from datasets.loaders import Batch
from datasets.long_tail import long_tail_counts
from datasets.source import ImageFiles
from datasets.streaming import Crops, StreamedPixels
from methods import build_method
from models import build_model
from utils import build, distributed
from utils.command_line import Parser
from utils.config import read_config
from utils.cuda_graph import capture_cuda_graph
from utils.errors import InputError
from utils.files import write_text
from utils.precision import PRECISIONS, autocast, matmul_precision, new_scaler
from utils.run.provenance import machine
from utils.step import compile_model

ROOT = Path(__file__).resolve().parents[2]
CIFAR = str(ROOT / "config/cifar10/cifar10_imb001_arbloss_mixup.yaml")
IMAGENET = str(ROOT / "config/imagenet/imagenet_resnet50_arbloss_ugcc_mixup.yaml")
MODES = [precision + way for way in ("", "+compile") for precision in PRECISIONS]
CLASSES = (10, 100, 1000, 8142)  # of CIFAR-10, CIFAR-100, ImageNet-LT, iNaturalist 2018
SAMPLE = 0.05  # seconds: what is shorter is repeated within one timing
EPOCHS = 3  # that the part epoch measures, after a first one
BATCH, CRITERION_BATCH = 128, 256  # images; the first is the CIFAR configuration's
SIDE, PHOTOS = 224, 128  # the part pipeline: pixels of a crop, images read per round at most

Run = Callable[[], Any]
Row = dict[str, Any]


class Part(NamedTuple):
    """What one part found."""

    settings: Row
    tables: dict[str, list[Row]]  # from title to rows


@dataclass
class Bench:
    """What the parts need to know, and what they tell one another."""

    args: argparse.Namespace
    device: torch.device
    scratch: Path  # a folder that goes away at the end
    fastest: str | None = None  # of the trainer's modes, once a part has found it

    @property
    def on_cuda(self) -> bool:
        return self.device.type == "cuda"

    def rounds(self, usual: int) -> int:
        return self.args.rounds or usual

    def modes(self) -> list[str]:
        """The trainer's modes that are tried: a CPU has no TF32, and is slow in float16."""
        usual = [mode for mode in MODES if self.on_cuda or mode.startswith(("fp32", "bf16"))]
        return [mode for mode in self.args.modes or usual if self.args.compile or "+" not in mode]


def main(arguments: Sequence[str] | None = None) -> None:
    args = _arguments(arguments)
    with distributed.processes(args.device) as device, tempfile.TemporaryDirectory() as scratch:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.path.join(scratch, "compiled")  # so that compiling starts afresh
        bench, report = Bench(args, device, Path(scratch)), machine(device)
        print(*(f"{key}: {value}" for key, value in report.items()), sep="\n", flush=True)
        report["parts"] = {}
        for name in args.parts:
            part = PARTS[name](bench)
            print(in_words(name, part), flush=True)
            report["parts"][name] = part._asdict()
            if args.json:
                write_text(args.json, json.dumps(report, indent=2) + "\n")


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    description = "Measures the trainer beside the usual loop and the bound."
    parser = Parser(prog="python -m utils.bench", description=description, hint="; --help says what there is")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; by default all of them")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there, with each round's numbers")
    parser.add_argument("--rounds", type=_positive, metavar="N", help="of every comparison")
    parser.add_argument("--steps", type=_positive, metavar="N", help="cifar: steps per round")
    parser.add_argument("--images", type=_positive, metavar="N", help="epoch: training images of each of 10 classes")
    parser.add_argument("--photos", type=Path, metavar="FOLDER", help="pipeline: JPEG files; by default some are made")
    parser.add_argument("--data_path", type=Path, metavar="FOLDER", help="startup: CIFAR-10; by default noise")
    parser.add_argument("--modes", type=lambda text: text.split(","), metavar="A,B", help="such as fp32,bf16+compile")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="nothing, not even the bound")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    args = parser.parse_args(arguments)
    args.parts = args.parts or list(PARTS)
    for what, given, known in (("part", args.parts, PARTS), ("mode", args.modes or [], MODES)):
        for name in set(given) - set(known):
            parser.error(f"there is no {what} {name!r}, only {', '.join(known)}")
    if args.modes and not args.compile and all("+" in mode for mode in args.modes):
        parser.error("--no-compile leaves none of --modes")
    if args.json and args.json.is_dir():
        parser.error(f"--json {args.json}: is a folder")
    if args.json and not args.json.parent.is_dir():
        parser.error(f"--json {args.json}: there is no folder {args.json.parent}")
    if args.photos and not _jpegs(args.photos):
        parser.error(f"--photos {args.photos}: is no folder with JPEG files")
    return args


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number >= 1")
    return int(text)


# ---------------------------------------------------------------------------------------------------------------------
# Measuring, and saying what came out


def interleaved(contestants: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What each contestant returns in every round; they take turns."""
    measured: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds):
        order = list(contestants)
        random.Random(number).shuffle(order)
        for name in order:
            measured[name].append(contestants[name]())
    return measured


def compare(
    runs: Mapping[str, Run],
    images: int,
    device: torch.device,
    rounds: int,
    *against: str,
    clock: Run = time.perf_counter,
) -> list[Row]:
    """Images per second of runs that take ``images`` images each, after a first round that does not count."""
    contestants = {name: partial(seconds, run, device, clock) for name, run in runs.items()}
    measured = interleaved(contestants, 1 + rounds)
    speeds = {name: [images / value for value in values[1:]] for name, values in measured.items()}
    return rows_of(speeds, "images/s", *against)


def seconds(run: Run, device: torch.device, clock: Run = time.perf_counter) -> float:
    """Until the device is done. ``clock``: of the wall, or ``time.process_time`` of what this process computed."""
    _wait(device)
    began = clock()
    run()
    _wait(device)
    return clock() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(run: Run, device: torch.device) -> int:
    """Bytes of tensors that ``run`` holds at its worst moment, beyond what is there before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler talks to standard error
    with tempfile.TemporaryDirectory() as folder:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            run()
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"])
    return max(itertools.accumulate(e["args"]["Bytes"] for e in changes), default=0)


def rows_of(measured: Mapping[str, Sequence[float]], unit: str, *against: str) -> list[Row]:
    """A row per contestant: median, lowest and highest of its rounds, and the median against those of some others."""
    medians = {name: statistics.median(values) for name, values in measured.items()}
    return [
        {"what": name, unit: medians[name], "low": min(values), "high": max(values)}
        | {f"/ {other}": medians[name] / medians[other] for other in against}
        | {"rounds": values}
        for name, values in measured.items()
    ]


def in_words(name: str, part: Part) -> str:
    """A heading, the settings, and the tables."""
    lines = ["", f"== {name}", *(f"{key}: {value}" for key, value in part.settings.items())]
    for title, rows in part.tables.items():
        columns = [key for key in rows[0] if key != "rounds"]
        cells = [columns, *([_shown(row[key]) for key in columns] for row in rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines += ["", title]
        for first, *others in cells:
            numbers = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
            lines.append("  ".join([f"  {first.ljust(widths[0])}", *numbers]))
    return "\n".join(lines)


def _shown(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


# ---------------------------------------------------------------------------------------------------------------------
# What is compared


def published_arb(logits: Tensor, targets: Tensor, counts: Tensor) -> Tensor:
    """ARB-Loss the way it was published, mean over the batch: ``logits [B, C]``, ``targets [B]``, ``counts [C]``."""
    powers = logits.clamp(-30, 30).exp()
    weights = counts / counts[targets][:, None].repeat(1, logits.shape[1])  # [B, C], n_k / n_y
    own = powers.gather(1, targets[:, None]).squeeze(1)
    return -(own / (powers * weights).sum(dim=1)).log().mean()


class PILImages(Dataset):
    """Images in memory, handed out as torchvision's CIFAR-10 does: one by one, through PIL."""

    def __init__(self, part: Images, *transform: Callable):
        self.images, self.targets = part.images.numpy(), part.targets.tolist()
        self.transform = transforms.Compose(transform)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), self.targets[index]


class Classic:
    """The usual loop: a DataLoader over PIL images, eager float32, the default layout, numbers read in every step."""

    def __init__(self, data: Data, device: torch.device):
        cfg, _ = read_config(CIFAR)
        self.device, self.alpha, self.classes = device, cfg.alpha, data.num_classes
        self.model = build_model(cfg.dataset, cfg.backbone, data.num_classes).to(device)
        lr = cfg.lr / cfg.warmup_epochs
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr, cfg.momentum, weight_decay=cfg.weight_decay)
        on_cuda = device.type == "cuda"
        self.workers = distributed.workers_here(8 if on_cuda else sys.maxsize)
        loader = partial(
            DataLoader, batch_size=cfg.batch_size, num_workers=self.workers, persistent_workers=True, pin_memory=on_cuda
        )
        varied = (transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip())
        plain = (transforms.ToTensor(), transforms.Normalize(data.spec.mean, data.spec.std))
        self.train_loader = loader(PILImages(data.train, *varied, *plain), shuffle=True)
        self.test_loader = loader(PILImages(data.test, *plain))

    def train(self) -> None:
        """One epoch with mixup and ARB-Loss of batch counts."""
        self.model.train()
        loss_sum, hits = 0.0, 0
        for images, targets in self.train_loader:
            images, targets = images.to(self.device, non_blocking=True), targets.to(self.device, non_blocking=True)
            lam, partner = np.random.beta(self.alpha, self.alpha), torch.randperm(len(images), device=self.device)
            logits = self.model(lam * images + (1 - lam) * images[partner])
            counts = torch.bincount(targets, minlength=self.classes).float()
            loss = lam * published_arb(logits, targets, counts)
            loss = loss + (1 - lam) * published_arb(logits, targets[partner], counts)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            loss_sum += loss.item() * len(images)
            hits += (logits.argmax(dim=1) == targets).sum().item()

    @torch.no_grad()
    def evaluate(self) -> float:
        """Accuracy on the test images."""
        self.model.eval()
        hits = 0
        for images, targets in self.test_loader:
            logits = self.model(images.to(self.device, non_blocking=True))
            hits += (logits.argmax(dim=1) == targets.to(self.device, non_blocking=True)).sum().item()
        return hits / len(self.test_loader.dataset)


def options_of(mode: str) -> list[str]:
    """``bf16+compile`` as the configuration has it."""
    precision, plus, _ = mode.partition("+")
    return ["precision", precision, "compile", str(bool(plus))]


class Trainer:
    """This trainer, made of its own pieces; ``train`` is :func:`train_stage1.train_epoch` without log and checks."""

    def __init__(self, data: Data, mode: str, device: torch.device, file: str = CIFAR, overrides: Sequence[str] = ()):
        cfg, _ = read_config(file, [*overrides, *options_of(mode)])
        self.precision, self.seed, self.epoch = cfg.precision, cfg.seed, 0
        self.loader = data.train_loader(cfg.batch_size, cfg.seed, device)
        self.batches: Callable[[int], Iterable[Batch]] = self.loader.epoch
        model = build.new_model(cfg, data).to(device)
        method = build.new_method(cfg, data).to(device)
        optimizer = build.new_optimizer(cfg, model, method)
        scaler, parallel = new_scaler(cfg.precision, device), build.new_parallel(cfg, model, device)
        self.step = build.new_step(cfg, build.Training(model, method, optimizer, scaler, parallel, device))
        build.set_lr(optimizer, cfg, 0)

    def train(self, steps: int | None = None) -> None:
        """An epoch, or its first steps."""
        self.epoch += 1
        with matmul_precision(self.precision):
            self.step.start_epoch(self.epoch)
            draws = self.step.method.draws(self.loader.batch_sizes, self.seed, self.epoch, device=self.loader.device)
            pairs = zip(self.batches(self.epoch), draws, strict=True)
            for batch, draw in itertools.islice(pairs, steps):
                self.step(batch, draw)
            self.step.meter.averages()


class Bound:
    """The bare model on one batch that lies ready: forward, cross-entropy, backward, optimizer, and nothing else."""

    def __init__(self, data: Data, mode: str, device: torch.device):
        cfg, _ = read_config(CIFAR, options_of(mode))
        self.precision, self.device = cfg.precision, device
        model = build_model(cfg.dataset, cfg.backbone, data.num_classes)
        self.model = model.to(device, memory_format=torch.channels_last)
        parameters = self.model.parameters()
        self.optimizer = torch.optim.SGD(parameters, 0.01, cfg.momentum, weight_decay=cfg.weight_decay, fused=True)
        self.images = torch.randn(BATCH, 3, 32, 32, device=device).to(memory_format=torch.channels_last)
        self.targets = torch.arange(BATCH, device=device) % data.num_classes
        if cfg.compile:
            compile_model(self.model, device)
        self.step: Run = self._step
        if device.type == "cuda":
            with matmul_precision(self.precision):
                self.step = capture_cuda_graph(self._step)

    def _step(self) -> None:
        with autocast(self.precision, self.device):
            logits = self.model(self.images)
        F.cross_entropy(logits, self.targets).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def train(self, steps: int) -> None:
        with matmul_precision(self.precision):
            for _ in range(steps):
                self.step()


def noise(train: int, test: int) -> Data:
    """Random images of CIFAR-10's size, 10 classes: nobody's speed depends on what they show."""
    draw = np.random.default_rng(0)
    pixels = (draw.integers(0, 256, (size, 32, 32, 3), dtype=np.uint8) for size in (train, test))
    parts = [Images(torch.from_numpy(images), torch.arange(len(images)) % 10) for images in pixels]
    return _data("cifar10", 32, *parts)


def _data(dataset: str, side: int, train: Images, test: Images, workers: int = 0, decoder: str = "pil") -> Data:
    spec = find_spec(dataset)
    names = [str(label) for label in range(spec.num_classes)]
    counts = torch.bincount(train.targets, minlength=len(names))
    return Data(spec, names, counts, train, None, test, None, side, workers, decoder)


def heat(bench: Bench, data: Data, steps: int) -> tuple[dict[str, Trainer], list[Row]]:
    """The trainer's modes, warm, and their speed in a few steps; the fastest is remembered."""
    trainers = {mode: Trainer(data, mode, bench.device) for mode in bench.modes()}
    first = {mode: seconds(partial(trainer.train, 1), bench.device) for mode, trainer in trainers.items()}
    runs = {mode: partial(trainer.train, steps) for mode, trainer in trainers.items()}
    rows = compare(runs, steps * BATCH, bench.device, bench.rounds(5))
    bench.fastest = max(rows, key=lambda row: row["high"])["what"]  # other work on the machine only makes slower
    return trainers, [row | {"first step, s": first[row["what"]]} for row in rows]


# ---------------------------------------------------------------------------------------------------------------------
# The parts


def cifar(bench: Bench) -> Part:
    """Training steps on small images: ResNet-32, ARB-Loss with batch counts, mixup."""
    steps = bench.args.steps or (100 if bench.on_cuda else 8)
    data = noise(steps * BATCH, 10)
    trainers, tried = heat(bench, data, max(1, steps // 4))
    ideal = bench.fastest.partition("+")[0] + "+compile" * bench.args.compile
    classic, bound = Classic(data, bench.device), Bound(data, ideal, bench.device)
    runs: dict[str, Run] = {"classic": classic.train}
    runs |= {mode: trainers[mode].train for mode in ("fp32", bench.fastest) if mode in trainers}
    runs["bound"] = partial(bound.train, steps)
    settings = {
        "configuration": Path(CIFAR).stem,
        "images": "random, 32 x 32, 10 classes; no speed depends on what they show",
        "classic": f"the usual loop with {classic.workers} workers, eager float32 with torch's default flags",
        "bound": f"the bare step, {ideal}{'' if bench.args.compile else ', not compiled'}, on one batch",
        "fastest mode": bench.fastest,
    }
    rows = compare(runs, steps * BATCH, bench.device, bench.rounds(7), "classic", "bound")
    return Part(settings, {"heat of the trainer's modes": tried, f"rounds of {steps} steps of {BATCH} images": rows})


def criterion(bench: Bench) -> Part:
    """Forward and backward of the loss alone, in float32; with two targets per image but where it says one."""
    tables = {}
    for classes in CLASSES:
        runs = losses(classes, bench.device)
        for run in runs.values():
            run()
        calls = max(1, int(SAMPLE / min(seconds(run, bench.device) for run in runs.values())))
        contestants = {name: partial(_milliseconds, run, calls, bench.device) for name, run in runs.items()}
        rows = rows_of(interleaved(contestants, bench.rounds(9)), "ms", "plain", "published")
        peaks = {name: peak_memory(run, bench.device) / 2**20 for name, run in runs.items()}
        for row in rows:
            peak = peaks[row["what"]]
            row |= {"peak, MiB": peak} | {f"peak / {x}": peak / peaks[x] for x in ("plain", "published")}
        tables[f"{classes} classes"] = rows
    settings = {"batch": CRITERION_BATCH, "plain": "cross-entropy", "peak": "tensors, without the logits themselves"}
    return Part(settings, tables)


def losses(classes: int, device: torch.device) -> dict[str, Run]:
    """One call each: forward, backward."""
    draw = torch.Generator().manual_seed(0)
    counts = torch.tensor(long_tail_counts(1280, classes, "exp", 0.004), device=device)
    logits = torch.randn(CRITERION_BATCH, classes, generator=draw).to(device).requires_grad_()
    targets = torch.randint(classes, (2, CRITERION_BATCH), generator=draw).to(device)
    lam, log_counts, as_floats = torch.tensor(0.3, device=device), counts.log(), counts.float()
    method = build_method("arb", "global", counts, mixup_alpha=1.0).to(device)

    def ours() -> Tensor:
        own, other = method.criterion(logits, counts)(torch.stack(list(targets))).mean(dim=1)
        return lam * own + (1 - lam) * other

    def mixed(loss: Callable[[Tensor], Tensor]) -> Tensor:
        return lam * loss(targets[0]) + (1 - lam) * loss(targets[1])

    def run(loss: Run) -> None:
        loss().backward()
        logits.grad = None

    ways: dict[str, Run] = {
        "plain, one target": lambda: F.cross_entropy(logits, targets[0]),
        "plain": lambda: mixed(partial(F.cross_entropy, logits)),
        "clamp, add, plain": lambda: mixed(partial(F.cross_entropy, logits.clamp(-30, 30) + log_counts)),
        "published": lambda: mixed(lambda labels: published_arb(logits, labels, as_floats)),
        "ours": ours,
    }
    return {name: partial(run, loss) for name, loss in ways.items()}


def _milliseconds(run: Run, calls: int, device: torch.device) -> float:
    return seconds(lambda: [run() for _ in range(calls)], device) / calls * 1000


def pipeline(bench: Bench) -> Part:
    """What a worker does with a photograph, on one core; the classic chain also does the device's part of it."""
    folder = bench.args.photos or make_photos(bench.scratch / "photos")
    names, spec = _jpegs(folder)[:PHOTOS], find_spec("imagenet")
    files = ImageFiles.under(folder, names)
    chain = transforms.Compose([
        transforms.RandomResizedCrop(SIDE), transforms.RandomHorizontalFlip(), transforms.ColorJitter(0.4, 0.4, 0.4),
        transforms.ToTensor(), transforms.Normalize(spec.mean, spec.std),
    ])  # fmt: skip
    pil, fast, epochs = Crops(files, SIDE, "pil"), Crops(files, SIDE, "fast"), itertools.count()
    runs: dict[str, Run] = {
        "classic": lambda: torch.stack([chain(_open(folder / name)) for name in names]),
        "pil": lambda: pil([(index, (0, next(epochs))) for index in range(len(names))]),
        f"fast ({fast_decoder()})": lambda: fast([(index, (0, next(epochs))) for index in range(len(names))]),
    }
    pixels, whole = StreamedPixels(files, SIDE, spec.mean, spec.std, bench.device), slice(0, len(names))
    inputs = next(pixels.augmented(torch.arange(len(names)), [whole], 0, 0))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        sizes, own = (len(names), bench.device, bench.rounds(7)), time.process_time
        tables = {"images per second of one core's time": compare(runs, *sizes, "classic", clock=own)}
        rest = {"colours, normalisation": partial(pixels.develop, *inputs)}
        title = f"the device's part, on {'CUDA' if bench.on_cuda else 'one core'}"
        tables[title] = compare(rest, *sizes, clock=time.perf_counter if bench.on_cuda else own)
    finally:
        torch.set_num_threads(threads)
    if bench.on_cuda:
        tables["training ResNet-50 in bf16, end to end"] = streamed(bench, files, steps=50)
    photos = f"{len(names)} of {folder}" if bench.args.photos else f"{len(names)} made of two photographs, 500 x 375"
    return Part({"photos": photos, "crops": f"{SIDE} x {SIDE}"}, tables)


def streamed(bench: Bench, files: ImageFiles, steps: int, *overrides: str) -> list[Row]:
    """Training on images that are decoded meanwhile, beside the same steps on one batch that lies ready."""
    cfg, _ = read_config(IMAGENET, overrides)
    repeated, targets = np.resize(np.arange(len(files)), steps * cfg.batch_size), torch.arange(steps * cfg.batch_size)
    part = Images(files.select(repeated), targets % 1000)
    trainers = {}
    for name in ("pil", "fast", "resident"):
        decoder = "pil" if name == "resident" else name
        data = _data("imagenet", cfg.image_size or SIDE, part, part, distributed.workers_here(sys.maxsize), decoder)
        trainers[name] = Trainer(data, "bf16", bench.device, IMAGENET, overrides)
    resident = trainers["resident"]
    batch = next(resident.loader.epoch(0))
    batch = batch._replace(inputs=(batch.images,), develop=lambda images: images)
    resident.batches = lambda epoch: [batch] * steps
    runs = {name: trainer.train for name, trainer in trainers.items()}
    return compare(runs, len(targets), bench.device, bench.rounds(3), "resident")


def _open(path: Path) -> Image.Image:
    with path.open("rb") as file:
        return Image.open(file).convert("RGB")


def _jpegs(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*") if path.suffix.lower() in (".jpg", ".jpeg"))


def make_photos(folder: Path) -> Path:
    """Parts of scikit-learn's two photographs, 500 x 375 pixels, as JPEG files."""
    draw, photos = np.random.default_rng(0), load_sample_images().images
    folder.mkdir()
    for number in range(32):
        photo, top, left = photos[number % 2], *draw.integers(0, (52, 140))
        image = Image.fromarray(photo[top : top + 375, left : left + 500])
        image.save(folder / f"{number:02}.jpg", quality=90)
    return folder


PROBE = """
import time
began = time.perf_counter()
import torch, torchvision
torch_there = time.perf_counter()
import json, sys, train_stage1
from utils.command_line import exit_code
trainer_there = time.perf_counter()

class Done(Exception):
    pass

def new_step(*parts, make=train_stage1.new_step):
    def first_step(self, batch, draw):
        ready = time.perf_counter()
        kind.__call__(self, batch, draw)
        self.meter.averages()
        raise Done(ready, time.perf_counter())
    step = make(*parts)
    kind = type(step)
    step.__class__ = type(kind.__name__, (kind,), {"__call__": first_step})
    return step

train_stage1.new_step = new_step
try:
    sys.exit(exit_code(lambda: train_stage1.main(sys.argv[1:])))
except Done as done:
    print(json.dumps([began, torch_there, trainer_there, *done.args]))
"""
STAGES = ("import torch, torchvision", "import the trainer", "data, model and all", "first step")


def startup(bench: Bench) -> Part:
    """From nothing to the end of the first training step of the CIFAR configuration, in fresh processes."""
    folder = bench.args.data_path or make_folders(bench.scratch / "startup", train=5000, test=1000)
    runs = [probe(bench, folder, "fp32") for _ in range(bench.rounds(3))]
    measured = {stage: [run[stage] for run in runs] for stage in STAGES}
    measured["all but torch"] = [sum(run[stage] for stage in STAGES[1:]) for run in runs]
    tables = {"seconds, fp32": rows_of(measured, "s")}
    mode = bench.fastest or bench.modes()[-1]
    if "+" in mode:
        kept = {"TORCHINDUCTOR_CACHE_DIR": str(bench.scratch / "startup-compiled")}
        first = {name: [probe(bench, folder, mode, **kept)["first step"]] for name in ("first time", "again")}
        tables[f"seconds of the first step, {mode}"] = rows_of(first, "s")
    return Part({"data": str(bench.args.data_path or "60,000 JPEG files of noise in class folders")}, tables)


def probe(bench: Bench, data_path: Path, mode: str, **variables: str) -> dict[str, float]:
    """Seconds of each of ``STAGES``."""
    options = ["data_path", str(data_path.resolve()), "save_dir", str(bench.scratch / "saved"), *options_of(mode)]
    words = ["--cfg", CIFAR, *options, "device", bench.args.device]
    times = json.loads(_process("-c", PROBE, *words, **variables).splitlines()[-1])
    return {stage: end - start for stage, start, end in zip(STAGES, times, times[1:], strict=False)}


def _process(*words: str, **variables: str) -> str:
    """Standard output of a Python process in the repository, and its error where there is one."""
    environment = os.environ | variables
    done = subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise (InputError if done.returncode == 2 else RuntimeError)(done.stderr.strip().removeprefix("error: "))
    return done.stdout


def make_folders(folder: Path, train: int, test: int) -> Path:
    """Class folders of 32 x 32 JPEG files, so many per class: names for a few hundred files of noise."""
    draw, files = np.random.default_rng(0), []
    folder.mkdir()
    for number in range(min(500, train)):
        files.append(folder / f"{number}.jpg")
        Image.fromarray(draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(files[-1])
    for part, size in (("train", train), ("test", test)):
        for label in range(10):
            where = folder / part / str(label)
            where.mkdir(parents=True)
            for number in range(size):
                os.link(files[(number + label) % len(files)], where / f"{number:04}.jpg")
    return folder


def epoch(bench: Bench) -> Part:
    """Whole epochs by the real command, with evaluation, checkpoint and logs; and how training time grows."""
    each = bench.args.images or (1240 if bench.on_cuda else 124)
    test = -(-each * 10_000 // 12_406)  # as many to each training image as CIFAR-10-LT has
    folder, twice = (make_folders(bench.scratch / f"epoch-{n}", n * each, test) for n in (1, 2))
    data = noise(10 * each, 10 * test)
    if bench.fastest is None:
        heat(bench, data, 2)
    classic = Classic(data, bench.device)
    whole: dict[str, Callable[[], float]] = {"classic": partial(classic_epoch, classic, bench)}
    whole |= {mode: partial(whole_epoch, bench, folder, mode) for mode in dict.fromkeys(("fp32", bench.fastest))}
    classic_epoch(classic, bench)
    growth = {
        f"{10 * each} images, batch {BATCH}": partial(train_seconds, bench, folder),
        "twice the images": partial(train_seconds, bench, twice),
        "batch 64": partial(train_seconds, bench, folder, "batch_size", "64"),
        "batch 256": partial(train_seconds, bench, folder, "batch_size", "256"),
    }
    if not bench.on_cuda or torch.cuda.device_count() > 1:
        growth["2 processes"] = partial(train_seconds, bench, folder, processes=2)
    tables = {
        "seconds per epoch": rows_of(interleaved(whole, bench.rounds(2)), "s", "classic"),
        "seconds of training per epoch, fp32": rows_of(interleaved(growth, bench.rounds(1)), "s", next(iter(growth))),
    }
    return Part({"images": f"{10 * each} for training, {10 * test} for testing", "fastest mode": bench.fastest}, tables)


def classic_epoch(classic: Classic, bench: Bench) -> float:
    """Seconds of the usual loop's epoch: training, evaluation, checkpoint."""

    def run() -> None:
        classic.train()
        classic.evaluate()
        state = {"model": classic.model.state_dict(), "optimizer": classic.optimizer.state_dict()}
        torch.save(state, bench.scratch / "classic.pth.tar")

    return seconds(run, bench.device)


def whole_epoch(bench: Bench, data_path: Path, mode: str) -> float:
    """Seconds that an epoch of the real command adds."""
    durations = []
    for epochs in (1, 1 + EPOCHS):
        began = time.perf_counter()
        train_by_command(bench, data_path, epochs, *options_of(mode))
        durations.append(time.perf_counter() - began)
    return (durations[1] - durations[0]) / EPOCHS


def train_seconds(bench: Bench, data_path: Path, *overrides: str, processes: int = 1) -> float:
    """Seconds of training in an epoch of the real command that is not its first."""
    rows = train_by_command(bench, data_path, 1 + EPOCHS, *overrides, processes=processes)
    return statistics.median(row["timing"]["train_seconds"] for row in rows[1:])


def train_by_command(bench: Bench, data_path: Path, epochs: int, *overrides: str, processes: int = 1) -> list[Row]:
    """The rows of ``metrics.jsonl``."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    with tempfile.TemporaryDirectory(dir=bench.scratch) as saved:
        where = ["data_path", str(data_path), "save_dir", saved, "imb_factor", "null", "device", bench.args.device]
        words = ["--cfg", CIFAR, *where, "num_epochs", str(epochs), *overrides]
        _process(*(launcher if processes > 1 else []), str(ROOT / "train_stage1.py"), *words)
        return [json.loads(line) for line in next(Path(saved).glob("*/metrics.jsonl")).read_text().splitlines()]


PARTS: dict[str, Callable[[Bench], Part]] = {
    "cifar": cifar,
    "criterion": criterion,
    "pipeline": pipeline,
    "startup": startup,
    "epoch": epoch,
}
