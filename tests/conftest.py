"""One thread per process, processor time per test, and short runs by the real scripts that tests share."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

# Before torch is loaded, for this process and all that tests start: two workers of one thread each are faster than one
# of two, and far faster beside other work.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch

import train_stage1
from datasets.loaders import TrainLoader
from tests.trees import PATTERNS, make_tree
from utils.checkpoint import TrainState
from utils.command_line import exit_code
from utils.run.checkpoint_manager import CheckpointManager
from utils.run.log import RunLog
from utils.signals import NAMES, Signals
from utils.step import Step

ROOT = Path(__file__).parent.parent
ARB = "config/digits/digits_imb005_arbloss_mixup.yaml"
SHORT = ["backbone", "resnet8", "image_size", "8", "batch_size", "64", "print_freq", "4"]  # 8 steps an epoch
SPENT = pytest.StashKey[dict[str, float]]()  # processor seconds by test


def processor_seconds() -> float:
    """Of this process and of all its children that have ended."""
    return sum(os.times()[:4])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Note a test's processor time, with fixtures and children: a busy machine changes it less than its duration."""
    before = processor_seconds()
    try:
        return (yield)
    finally:
        item.config.stash.setdefault(SPENT, {})[item.nodeid] = processor_seconds() - before


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker of pytest-xdist hands its times to the process that reports."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["processor_seconds"] = session.config.stash.get(SPENT, {})


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error) -> None:
    output = getattr(node, "workeroutput", {})
    node.config.stash.setdefault(SPENT, {}).update(output.get("processor_seconds", {}))


def pytest_terminal_summary(terminalreporter, exitstatus: int, config: pytest.Config) -> None:
    spent = config.stash.get(SPENT, {})
    dearest = sorted(spent.items(), key=lambda pair: -pair[1])[:25]
    terminalreporter.section(f"{sum(spent.values()):.0f} s of processor time in {len(spent)} tests; the dearest")
    for name, seconds in dearest if len(spent) > 25 else []:
        terminalreporter.write_line(f"{seconds:8.2f} s  {name}")


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    """Configuration files are named as the README names them."""
    monkeypatch.chdir(ROOT)


@pytest.fixture(autouse=True)
def signals_as_they_were():
    """A script that a signal has ended ignores further ones, up to its process's end."""
    before = {number: signal.getsignal(number) for number in (getattr(signal, name) for name in NAMES)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def train(save_dir: Path, *overrides: object, cfg: str = ARB) -> Path:
    """Trains in this process and returns the run's folder."""
    before = set(save_dir.glob("*"))
    train_stage1.main(["--cfg", cfg, *SHORT, *map(str, overrides), "save_dir", str(save_dir)])
    new = set(save_dir.glob("*")) - before
    assert len(new) <= 1
    return new.pop() if new else save_dir


def manager_of(run: RunLog, loader: TrainLoader, step: Step) -> CheckpointManager:
    """For ``train_epoch`` alone: nothing is saved and no signal heard."""
    return CheckpointManager(run, Signals(), TrainState(), loader, step.meter, 0, {"model": step.model})


def failure(capsys, main, *arguments: object) -> SimpleNamespace:
    """Exit code and what was said on standard error by a script that is given bad input."""
    capsys.readouterr()
    code = exit_code(lambda: main([str(a) for a in arguments]))
    said = capsys.readouterr().err
    return SimpleNamespace(code=code, said=said, lines=said.strip().splitlines())


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Path:
    """The folder of a run of two epochs; tests do not write into it."""
    return train(tmp_path_factory.mktemp("saved"), "num_epochs", 2)


@pytest.fixture(scope="session")
def lists(tmp_path_factory) -> Path:
    """A folder with small ``imagenet``, ``ina2018`` and ``places`` trees; tests do not write into them."""
    root = tmp_path_factory.mktemp("lists")
    for dataset in PATTERNS:
        make_tree(root, dataset)
    return root


def content(folder, name="current"):
    return torch.load(folder / "ckps" / f"{name}.pth.tar", weights_only=True)


def history(folder):
    """The rows of metrics.jsonl without times and rates."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "timing"} for row in rows]


def assert_same_tensors(a, b):
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert torch.equal(value, b[key]), key


def assert_same_run(first, second):
    """Weights, optimizer, metrics, predictions and diagnostics, bit for bit."""
    a, b = content(first), content(second)
    for key in ("state_dict_model", "state_dict_classifier", "state_dict_method"):
        assert_same_tensors(a[key], b[key])
    momentum = [state["optimizer"]["state"] for state in (a, b)]
    assert momentum[0].keys() == momentum[1].keys()
    for index in momentum[0]:
        assert torch.equal(momentum[0][index]["momentum_buffer"], momentum[1][index]["momentum_buffer"])
    assert torch.equal(a["best_acc1"], b["best_acc1"])
    assert history(first) == history(second)
    files = sorted(path.name for path in (first / "predictions").iterdir())
    assert files == sorted(path.name for path in (second / "predictions").iterdir())
    diagnostics = [path.name for path in first.glob("*.npz")]
    assert diagnostics == [path.name for path in second.glob("*.npz")]
    for name in [*(f"predictions/{name}" for name in files), *diagnostics]:
        one, other = (np.load(folder / name) for folder in (first, second))
        assert one.files == other.files
        assert all(np.array_equal(one[key], other[key], equal_nan=one[key].dtype.kind == "f") for key in one.files)
