"""The parts: cifar, criterion and pipeline in this process, startup and epoch by ``train_stage1.py`` itself."""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torchvision import transforms

from datasets import Data, find_spec
from datasets.decoding import fast_decoder
from datasets.source import ImageFiles
from datasets.streaming import CropReader, StreamedLargeImages
from utils.bench.contestants import (
    BATCH,
    CIFAR,
    CRITERION_BATCH,
    MODES,
    ROOT,
    Bound,
    Classic,
    Trainer,
    losses,
    noise,
    options_of,
)
from utils.bench.timing import Part, Row, Run, compare, interleaved, peak_memory, rows_of, seconds

CLASSES = (10, 100, 1000, 8142)  # of CIFAR-10, CIFAR-100, ImageNet-LT, iNaturalist 2018
SAMPLE = 0.05  # seconds: shorter calls are repeated within one timing
SIDE, PHOTOS = 224, 128  # pixels of a crop, images read per round at most
EPOCHS = 3  # measured by the part epoch, after a first one
STAGES = ("imports, data, model", "first step", "in all")


@dataclass
class Bench:
    """State shared by the parts."""

    args: argparse.Namespace
    device: torch.device
    scratch: Path  # removed at the end
    fastest: str | None = None  # of the trainer's modes, once a part has measured it

    @property
    def on_cuda(self) -> bool:
        return self.device.type == "cuda"

    def rounds(self, default: int) -> int:
        return self.args.rounds or default

    def modes(self) -> list[str]:
        """The trainer's modes to try: a CPU has no TF32 and is slow in float16."""
        default = [mode for mode in MODES if self.on_cuda or mode.startswith(("fp32", "bf16"))]
        return [mode for mode in self.args.modes or default if self.args.compile or "+" not in mode]


def warm_up(
    bench: Bench, data: Data, steps: int, new: Callable[..., Trainer] = Trainer
) -> tuple[dict[str, Trainer], list[Row]]:
    """The trainer in its modes, warmed up, and their speed over a few steps; notes the fastest."""
    trainers = {mode: new(data, mode, bench.device) for mode in bench.modes()}
    first = {mode: seconds(partial(trainer.train, 1), bench.device) for mode, trainer in trainers.items()}
    runs = {mode: partial(trainer.train, steps) for mode, trainer in trainers.items()}
    images = steps * next(iter(trainers.values())).loader.batch_size
    rows = compare(runs, images, bench.device, bench.rounds(5))
    bench.fastest = max(rows, key=lambda row: row["high"])["what"]  # other work on the machine only slows down
    return trainers, [row | {"first step, s": first[row["what"]]} for row in rows]


def cifar(bench: Bench) -> Part:
    """Training steps on small images: ResNet-32, ARB-Loss with batch counts, mixup."""
    steps = bench.args.steps or (100 if bench.on_cuda else 8)
    data = noise(steps * BATCH, 10)
    trainers, tried = warm_up(bench, data, max(1, steps // 4))
    ideal = bench.fastest.partition("+")[0] + "+compile" * bench.args.compile
    classic, bound = Classic(data, bench.device), Bound(data, ideal, bench.device)
    runs: dict[str, Run] = {"classic": classic.train}
    runs |= {mode: trainers[mode].train for mode in ("fp32", bench.fastest) if mode in trainers}
    runs["bound"] = partial(bound.train, steps)
    settings = {
        "configuration": Path(CIFAR).stem,
        "images": "random, 32 x 32, 10 classes",
        "classic": f"the usual loop with {classic.workers} workers, eager float32 with torch's default flags",
        "bound": f"the bare step, {ideal}{'' if bench.args.compile else ', not compiled'}, on one batch",
        "fastest mode": bench.fastest,
    }
    rows = compare(runs, steps * BATCH, bench.device, bench.rounds(7), "classic", "bound")
    return Part(settings, {"the trainer's modes": tried, f"rounds of {steps} steps of {BATCH} images": rows})


def criterion(bench: Bench) -> Part:
    """Forward and backward of the loss alone, float32; two targets per image unless the row says one."""
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


def _milliseconds(run: Run, calls: int, device: torch.device) -> float:
    return seconds(lambda: [run() for _ in range(calls)], device) / calls * 1000


def pipeline(bench: Bench) -> Part:
    """A worker's work on a photograph, on one core; the classic chain includes the device's share of it."""
    folder = bench.args.photos or make_photos(bench.scratch / "photos")
    names, spec = jpegs(folder)[:PHOTOS], find_spec("imagenet")
    files = ImageFiles.under(folder, names)
    chain = transforms.Compose([
        transforms.RandomResizedCrop(SIDE), transforms.RandomHorizontalFlip(), transforms.ColorJitter(0.4, 0.4, 0.4),
        transforms.ToTensor(), transforms.Normalize(spec.mean, spec.std),
    ])  # fmt: skip
    epochs = itertools.count()
    runs: dict[str, Run] = {"classic": lambda: torch.stack([chain(_open(folder / name)) for name in names])}
    for title, decoder in (("pil", "pil"), (f"fast ({fast_decoder()})", "fast")):
        read = CropReader(files, SIDE, decoder)
        runs[title] = lambda read=read: read([(i, (0, next(epochs), "crop", i)) for i in range(len(names))])
    images = StreamedLargeImages(files, SIDE, spec.mean, spec.std, bench.device)
    inputs = next(images.train_inputs(torch.arange(len(names)), [slice(0, len(names))], 0, 0))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        sizes, own = (len(names), bench.device, bench.rounds(7)), time.process_time
        tables = {"images per second of one core's time": compare(runs, *sizes, "classic", clock=own)}
        rest = {"colours, normalisation": partial(images.augment, *inputs)}
        title = f"the device's part, on {'CUDA' if bench.on_cuda else 'one core'}"
        tables[title] = compare(rest, *sizes, clock=time.perf_counter if bench.on_cuda else own)
    finally:
        torch.set_num_threads(threads)
    photos = f"{len(names)} of {folder}" if bench.args.photos else f"{len(names)} made of two photographs, 500 x 375"
    return Part({"photos": photos, "crops": f"{SIDE} x {SIDE}"}, tables)


def _open(path: Path) -> Image.Image:
    with path.open("rb") as file:
        return Image.open(file).convert("RGB")


def jpegs(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*") if path.suffix.lower() in (".jpg", ".jpeg"))


def make_photos(folder: Path) -> Path:
    """Write crops of scikit-learn's two photographs, 500 x 375 pixels, as JPEG files."""
    draw, photos = np.random.default_rng(0), load_sample_images().images
    folder.mkdir()
    for number in range(32):
        photo, top, left = photos[number % 2], *draw.integers(0, (52, 140))
        image = Image.fromarray(photo[top : top + 375, left : left + 500])
        image.save(folder / f"{number:02}.jpg", quality=90)
    return folder


def startup(bench: Bench) -> Part:
    """From the command to the end of the first training step of the CIFAR configuration."""
    folder = make_folders(bench.scratch / "startup", train=5000, test=1000)
    rounds = range(bench.rounds(3))
    imports = [seconds(lambda: start("-c", "import torch, torchvision").communicate(), bench.device) for _ in rounds]
    runs = [time_first_step(bench, folder, "fp32") for _ in rounds]
    measured = {"import torch, torchvision": imports} | {stage: [run[stage] for run in runs] for stage in STAGES}
    tables = {"seconds, fp32": rows_of(measured, "s")}
    mode = bench.fastest or bench.modes()[-1]
    if "+" in mode:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(bench.scratch / "startup-compiled")
        first = {name: [time_first_step(bench, folder, mode)["first step"]] for name in ("cold", "cached")}
        tables[f"seconds of the first step, {mode}"] = rows_of(first, "s")
    return Part({"data": "60,000 JPEG files of noise in class folders"}, tables)


def start(*arguments: str) -> subprocess.Popen:
    """A Python process in the repository."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *arguments], cwd=ROOT, **pipes)


def time_first_step(bench: Bench, data_path: Path, mode: str) -> dict[str, float]:
    """Seconds of each of ``STAGES``, by when the log's first line and its first progress line come."""
    command = train_command(bench, data_path, bench.scratch / "saved", *options_of(mode), "print_freq", "1")
    began, described = time.perf_counter(), 0.0
    with start(*command) as process:
        for line in process.stdout:
            described = described or time.perf_counter() - began
            if "Epoch: [0][" in line:
                stepped = time.perf_counter() - began
                process.kill()
                return dict(zip(STAGES, (described, stepped - described, stepped), strict=True))
        raise RuntimeError(process.stderr.read())


def train_command(bench: Bench, data_path: Path, saved: Path, *overrides: str) -> list[str]:
    where = ["data_path", str(data_path), "save_dir", str(saved), "device", bench.args.device]
    return [str(ROOT / "train_stage1.py"), "--cfg", CIFAR, *where, *overrides]


def make_folders(folder: Path, train: int, test: int) -> Path:
    """Class folders with so many 32 x 32 JPEG files per class: links to a few hundred files of noise."""
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
    """Whole epochs of the real command, with evaluation, checkpoint and logs; and how training time scales."""
    each = bench.args.images or (1240 if bench.on_cuda else 124)
    test = -(-each * 10_000 // 12_406)  # CIFAR-10-LT's ratio of test to training images
    folder, twice = (make_folders(bench.scratch / f"epoch-{n}", n * each, test) for n in (1, 2))
    data = noise(10 * each, 10 * test)
    if bench.fastest is None:
        warm_up(bench, data, 2)
    classic = Classic(data, bench.device)
    whole: dict[str, Callable[[], float]] = {"classic": partial(classic_epoch, classic, bench)}
    whole |= {mode: partial(whole_epoch, bench, folder, mode) for mode in dict.fromkeys(("fp32", bench.fastest))}
    classic_epoch(classic, bench)
    scaling = {
        f"{10 * each} images, batch {BATCH}": partial(train_seconds, bench, folder),
        "twice the images": partial(train_seconds, bench, twice),
        "batch 64": partial(train_seconds, bench, folder, "batch_size", "64"),
        "batch 256": partial(train_seconds, bench, folder, "batch_size", "256"),
    }
    if not bench.on_cuda or torch.cuda.device_count() > 1:
        scaling["2 processes"] = partial(train_seconds, bench, folder, processes=2)
    tables = {
        "seconds per epoch": rows_of(interleaved(whole, bench.rounds(2)), "s", "classic"),
        "seconds of training per epoch, fp32": rows_of(interleaved(scaling, bench.rounds(1)), "s", next(iter(scaling))),
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
    """Seconds that each further epoch adds to the real command."""
    durations = []
    for epochs in (1, 1 + EPOCHS):
        start = time.perf_counter()
        train_by_command(bench, data_path, epochs, *options_of(mode))
        durations.append(time.perf_counter() - start)
    return (durations[1] - durations[0]) / EPOCHS


def train_seconds(bench: Bench, data_path: Path, *overrides: str, processes: int = 1) -> float:
    """Seconds of training in an epoch of the real command, without the first epoch."""
    rows = train_by_command(bench, data_path, 1 + EPOCHS, *overrides, processes=processes)
    return statistics.median(row["timing"]["train_seconds"] for row in rows[1:])


def train_by_command(bench: Bench, data_path: Path, epochs: int, *overrides: str, processes: int = 1) -> list[Row]:
    """Train; returns the rows of ``metrics.jsonl``."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    with tempfile.TemporaryDirectory(dir=bench.scratch) as saved:
        options = ["imb_factor", "null", "num_epochs", str(epochs), *overrides]
        command = train_command(bench, data_path, Path(saved), *options)
        process = start(*(launcher if processes > 1 else []), *command)
        _, errors = process.communicate()
        if process.returncode:
            raise RuntimeError(errors)
        return [json.loads(line) for line in next(Path(saved).glob("*/metrics.jsonl")).read_text().splitlines()]
