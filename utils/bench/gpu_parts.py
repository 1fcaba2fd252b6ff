"""Further parts, made for a GPU: correctness, together, large, memory. A CPU runs them too."""

import contextlib
import gc
import multiprocessing
import sys
import time
from collections.abc import Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import Tensor

from datasets import Data
from utils import distributed
from utils.bench.contestants import BATCH, IMAGENET, Trainer, noise
from utils.bench.parts import SIDE, Bench, warm_up
from utils.bench.timing import Part, interleaved, peak_memory, rows_of

LARGE_BATCH = 256  # images: one GPU's share of ImageNet-LT's batch, which is made for four
AT_ONCE = (1, 2, 4, 8, 16)  # trainings, as far as there are cores
SECONDS = 3.0  # of training at once


def correctness(bench: Bench) -> Part:
    """A few float32 steps recorded as a CUDA graph, eager, and on a CPU: how far the weights are apart."""
    steps, cpu = bench.args.steps or 3, torch.device("cpu")
    data = noise(steps * BATCH, 1)

    def state(device: torch.device, graph: bool, trained: bool = True) -> Tensor:
        trainer = Trainer(data, "fp32", device, "cuda_graph", str(graph))
        if trained:
            trainer.train(steps)
        return torch.cat([tensor.cpu().double().flatten() for tensor in trainer.step.model.state_dict().values()])

    recorded, eager, again = (state(bench.device, graph) for graph in (True, False, False))
    start, on_cpu = state(cpu, False, trained=False), state(cpu, False)
    pairs = {
        "recorded - eager": (recorded, eager),
        "eager - eager again": (eager, again),  # what CUDA itself does not repeat
        "eager - CPU": (eager, on_cpu),
        "recorded - CPU": (recorded, on_cpu),
        "CPU - before": (on_cpu, start),  # for scale
    }
    rows = [
        {"what": name, "largest difference": (a - b).abs().max().item(), "bit for bit": torch.equal(a, b)}
        for name, (a, b) in pairs.items()
    ]
    return Part({"precision": "fp32"}, {f"weights and buffers after {steps} steps of {BATCH} images": rows})


def together(bench: Bench) -> Part:
    """Trainings of the CIFAR configuration at once, each a process of its own: images per second in all."""
    mode, cores = bench.modes()[0], distributed.workers_here(sys.maxsize)
    counts = [count for count in AT_ONCE if count <= cores]
    context, pipes = multiprocessing.get_context("spawn"), []
    for _ in range(counts[-1]):
        here, there = context.Pipe()
        arguments = (there, mode, bench.device, bench.args.steps or 25)
        context.Process(target=_train_on_demand, args=arguments, daemon=True).start()
        there.close()  # or the end of the process would not end the pipe
        pipes.append(here)
    try:
        for pipe in pipes:
            pipe.recv()  # it is ready
        runs = {f"{count} at once": partial(_train_at_once, pipes[:count]) for count in counts}
        rows = rows_of(interleaved(runs, bench.rounds(3)), "images/s", "1 at once")
    except EOFError:
        sys.exit(1)  # a training has failed, and said on standard error why
    return Part({"mode": mode, "cores": cores}, {f"in all, {SECONDS:g} s": rows})


def _train_at_once(pipes: Sequence[Connection]) -> float:
    for pipe in pipes:
        pipe.send(SECONDS)
    return sum(pipe.recv() for pipe in pipes)


def _train_on_demand(pipe: Connection, mode: str, device: torch.device, steps: int) -> None:
    """A training: goes on for as many seconds as each message says, and answers with its images per second."""
    trainer = Trainer(noise(steps * BATCH, 1), mode, device)
    trainer.train()
    pipe.send("ready")
    with contextlib.suppress(EOFError):
        while True:
            seconds, began, images = pipe.recv(), time.perf_counter(), 0
            while time.perf_counter() - began < seconds:
                trainer.train()
                images += steps * BATCH
            pipe.send(images / (time.perf_counter() - began))


def large(bench: Bench) -> Part:
    """Training steps of ResNet-50; the part ``pipeline`` says how fast a core reads images for it."""
    steps = bench.args.steps or 4
    _, rows = warm_up(bench, _large_noise(steps), steps, _resnet50)
    images = f"random, {SIDE} x {SIDE}, on the device"
    settings = {"configuration": Path(IMAGENET).stem, "images": images}
    return Part(settings, {f"rounds of {steps} steps of {LARGE_BATCH} images": rows})


def _large_noise(steps: int) -> Data:
    return noise(steps * LARGE_BATCH, 1, "imagenet", SIDE, 1000)


def _resnet50(data: Data, mode: str, device: torch.device) -> Trainer:
    return Trainer(data, mode, device, "batch_size", str(LARGE_BATCH), config=IMAGENET)


def memory(bench: Bench) -> Part:
    """Peak memory of training: of tensors and, on CUDA, of all that is reserved for them."""
    mode, rows = bench.modes()[0], []
    trainings = {
        f"CIFAR-10-LT, batch {BATCH}": (Trainer, noise(BATCH, 1)),
        f"ResNet-50, batch {LARGE_BATCH}": (_resnet50, _large_noise(1)),
    }
    for name, (new, data) in trainings.items():
        peak = peak_memory(lambda new=new, data=data: new(data, mode, bench.device).train(), bench.device)
        rows.append({"what": name, "tensors, MiB": peak / 2**20})
        if bench.on_cuda:
            rows[-1]["reserved, MiB"] = torch.cuda.max_memory_reserved(bench.device) / 2**20
            gc.collect()
            torch.cuda.empty_cache()
    return Part({"mode": mode}, {"peak": rows})
