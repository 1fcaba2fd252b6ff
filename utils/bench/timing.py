"""Interleaved timing of contestants, and tables of the results."""

import itertools
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

Run = Callable[[], Any]
Row = dict[str, Any]


class Part(NamedTuple):
    """The result of one part of the benchmark."""

    settings: Row
    tables: dict[str, list[Row]]  # from title to rows


def interleaved(contestants: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Call every contestant once per round, in an order that each round shuffles; returns what they return."""
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
    """Images per second of runs that take ``images`` images each; an additional first round is not counted."""
    contestants = {name: partial(seconds, run, device, clock) for name, run in runs.items()}
    measured = interleaved(contestants, 1 + rounds)
    speeds = {name: [images / value for value in values[1:]] for name, values in measured.items()}
    return rows_of(speeds, "images/s", *against)


def seconds(run: Run, device: torch.device, clock: Run = time.perf_counter) -> float:
    """Duration until the device is done. ``clock``: ``perf_counter``, or ``process_time`` to ignore waiting."""
    _synchronise(device)
    start = clock()
    run()
    _synchronise(device)
    return clock() - start


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(run: Run, device: torch.device) -> int:
    """Peak bytes of tensors allocated by ``run``."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler writes to standard error
    with tempfile.TemporaryDirectory() as folder:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            run()
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"])
    return max(itertools.accumulate(e["args"]["Bytes"] for e in changes), default=0)


def rows_of(measured: Mapping[str, Sequence[float]], unit: str, *against: str) -> list[Row]:
    """A row per contestant: median, minimum and maximum, and the ratio of its median to that of each ``against``."""
    medians = {name: statistics.median(values) for name, values in measured.items()}
    return [
        {"what": name, unit: medians[name], "low": min(values), "high": max(values)}
        | {f"/ {other}": medians[name] / medians[other] for other in against}
        | {"rounds": values}
        for name, values in measured.items()
    ]


def as_text(name: str, part: Part) -> str:
    """A heading, the settings and the tables."""
    lines = ["", f"== {name}", *(f"{key}: {value}" for key, value in part.settings.items())]
    for title, rows in part.tables.items():
        columns = [key for key in rows[0] if key != "rounds"]
        cells = [columns, *([cell(row[key]) for key in columns] for row in rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines += ["", title]
        for first, *others in cells:
            numbers = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
            lines.append("  ".join([f"  {first.ljust(widths[0])}", *numbers]))
    return "\n".join(lines)


def cell(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
