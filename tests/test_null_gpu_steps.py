"""What a training step asks of a CUDA device, counted on one whose kernels do nothing; and planted faults."""

from collections.abc import Callable

import pytest
import torch

import train_stage1
from methods.method import Method, MethodOutput
from tests import null_gpu
from tests.conftest import train
from tests.null_gpu import Operation
from tests.null_gpu.streams import ordered
from tests.test_null_gpu import (
    STEPS,
    pytestmark,
    trained,
    without_judgement,
)
from utils.cuda_graph import GraphedStep
from utils.run.checkpoint_manager import CheckpointManager

__all__ = ["pytestmark", "without_judgement"]  # for pytest


@pytest.fixture
def steps(monkeypatch) -> list[list[Operation]]:
    """What was asked of the device, a list for each step of the runs of the test, from the loader's part on."""
    lists: list[list[Operation]] = []

    def between_steps(self, done, seconds, own=CheckpointManager.between_steps):
        own(self, done, seconds)
        operations = null_gpu.take()
        lists.extend([operations] if done else [])

    monkeypatch.setattr(CheckpointManager, "between_steps", between_steps)
    return lists


def shape(operations: list[Operation]) -> list[tuple[str, str, int]]:
    return sorted((operation.kind, operation.name, operation.size) for operation in operations)


def waits(steps: list[list[Operation]]) -> list[bool]:
    """Whether the host waited for the device within each step."""
    return [any(operation.kind == "sync" for operation in operations) for operations in steps]


FLOAT, LONG, BATCH = 4, 8, 64
# lambda; flips; targets, those of the step, indices, partners of mixup; offsets.
INPUTS = [FLOAT, BATCH, *4 * [BATCH * LONG], 2 * BATCH * LONG]
COPIES = [("copy", "device to device", size) for size in INPUTS]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_replayed_step_copies_its_inputs_and_nothing_else(tmp_path, steps, precision):
    """No kernel is launched from Python, the host waits for nothing, and nothing is allocated."""
    trained(tmp_path, "num_epochs", 1, "precision", precision, "max_grad_norm", 1, "print_freq", 100)
    for operations in steps[1 : STEPS - 1]:
        *copies, graph = shape(operations)
        assert copies == COPIES
        assert graph[:2] == ("graph", "launch")


def test_a_replayed_step_of_images_that_are_read_copies_them_from_pinned_memory(tmp_path, steps):
    pixels = BATCH * 8 * 8 * 3
    trained(tmp_path, "num_epochs", 1, "data_on_device", False, "workers", 1, "print_freq", 100)
    for operations in steps[2 : STEPS - 1]:
        found = [part for part in shape(operations) if part[0] not in ("graph", "alloc")]
        assert ("copy", "pinned to device", pixels) in found
        assert ("copy", "device to device", pixels) in found
        assert sum(size for *_, size in found) == 2 * pixels + sum(INPUTS) - BATCH * LONG  # no indices


STEP_KINDS = {
    "captured": [],
    "eager": ["cuda_graph", False, "max_grad_norm", 1],
    "accumulated": ["accumulate", 2, "precision", "fp16", "max_grad_norm", 1],
    "deferred": [
        "loss",
        "ldam",
        "classifier",
        "cosine",
        "drw_epoch",
        0,
        "nc_within",
        0.1,
        "nc_between",
        0.1,
        "cuda_graph",
        False,
    ],
    "pasted": ["mixup", False, "mix", "cmo", "cmo_idle", 0, "augment", "autoaugment", "cutout", 4, "cuda_graph", False],
    "aligned": ["nc_rows", 1, "nc_means", 1, "nc_dual", 1, "spa", "slerp", "cuda_graph", False],
    "diagnosed": ["diagnostics", 1],
    "sharp and averaged": ["sam", 0.05, "ema", 0.9],
    "AdamW": ["optimizer", "adamw", "precision", "fp16"],
    "read": ["data_on_device", False, "workers", 1, "cuda_graph", False],
}


@pytest.mark.parametrize("options", STEP_KINDS.values(), ids=STEP_KINDS)
def test_the_host_waits_for_the_device_at_log_lines_only(tmp_path, steps, options):
    trained(tmp_path, "num_epochs", 2, "print_freq", 4, *options)
    logged = [step % 4 == 0 for step in range(STEPS)]
    assert waits(steps) == logged * 2


# ---------------------------------------------------------------------------------------------------------------------
# The learning rate, which changes from epoch to epoch


@pytest.fixture
def rates(monkeypatch) -> list[list[Operation]]:
    """What setting the learning rate asked of the device, a list for each epoch."""
    lists: list[list[Operation]] = []

    def set_lr(*arguments, own=train_stage1.set_lr):
        null_gpu.take()
        lr = own(*arguments)
        lists.append(null_gpu.take())
        return lr

    monkeypatch.setattr(train_stage1, "set_lr", set_lr)
    return lists


def written(rates: list[list[Operation]]) -> list[bool]:
    """Whether each learning rate was written to the device, by one kernel and without waiting."""
    return [[operation.kind for operation in operations] == ["kernel"] for operations in rates]


def test_a_learning_rate_is_written_to_the_device(tmp_path, rates):
    train(tmp_path, "num_epochs", 2)
    assert written(rates) == [True, True]


def test_a_learning_rate_that_is_a_python_number_is_not(tmp_path, rates, monkeypatch):
    """The graph would go on with the first one."""

    def new_step(self, step, own=GraphedStep.__init__):
        own(self, step)
        for group in step.optimizer.param_groups:
            group["lr"] = float(group["lr"])

    monkeypatch.setattr(GraphedStep, "__init__", new_step)
    train(tmp_path, "num_epochs", 2)
    assert written(rates) == [False, False]


# ---------------------------------------------------------------------------------------------------------------------
# Faults in the method: the capture refuses them, and so do the counts of an eager step


def read(output: MethodOutput) -> None:
    output.loss.item()


def choose(output: MethodOutput) -> None:
    """The result's shape is a number, which the host has to know; here it is what was in memory, at times too large."""
    try:
        output.logits[output.logits > 0].sum()
    except RuntimeError as error:
        if "overflow" not in str(error):
            raise


def copy_a_number(output: MethodOutput) -> None:
    torch.tensor([0.5], device=output.loss.device)


def allocate_elsewhere(output: MethodOutput) -> None:
    """Another stream has another pool, which is not the graph's."""
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.empty(2**26, device="cuda")


def use_a_stream_that_never_comes_back(output: MethodOutput) -> None:
    other = torch.cuda.Stream()
    other.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(other):
        output.loss.add(1)


@pytest.fixture
def plant(monkeypatch) -> Callable[[Callable[[MethodOutput], None]], None]:
    def planted(fault: Callable[[MethodOutput], None]) -> None:
        def forward(self, *arguments, own=Method.forward, **options):
            output = own(self, *arguments, **options)
            fault(output)
            return output

        monkeypatch.setattr(Method, "forward", forward)

    return planted


REFUSED = {
    read: "previous error during capture",
    choose: "previous error during capture",
    copy_a_number: "Cannot copy between CPU and CUDA tensors during CUDA graph capture",
    allocate_elsewhere: "previous error during capture",
    use_a_stream_that_never_comes_back: "unjoined work",
}


@pytest.mark.parametrize(("fault", "words"), REFUSED.items(), ids=lambda item: getattr(item, "__name__", ""))
def test_a_capture_refuses(tmp_path, plant, monkeypatch, fault, words):
    """And the process can train another run."""
    with pytest.raises(RuntimeError, match=words):
        plant(fault)
        train(tmp_path, "num_epochs", 1)
    monkeypatch.undo()
    trained(tmp_path, "num_epochs", 1)


@pytest.mark.parametrize("fault", [read, choose, copy_a_number], ids=lambda fault: fault.__name__)
def test_an_eager_step_that_makes_the_host_wait_is_noticed(tmp_path, steps, plant, fault):
    plant(fault)
    train(tmp_path, "num_epochs", 1, "print_freq", 4, "cuda_graph", False)
    assert all(waits(steps))


@pytest.fixture
def left_behind(monkeypatch) -> None:
    """A tensor of the method that stays on the CPU."""

    class Left(Method):
        def to(self, *arguments, **options):
            counts = self.class_counts
            super().to(*arguments, **options)
            self.class_counts = counts
            return self

    monkeypatch.setattr("methods.method.Method", Left)


@pytest.mark.parametrize(("counts", "captured"), [("global", True), ("global_masked", False)])
def test_a_tensor_on_the_cpu_is_refused(tmp_path, left_behind, counts, captured):
    with pytest.raises(RuntimeError, match=r"CPU|same device"):
        train(tmp_path, "num_epochs", 1, "class_counts", counts, "cuda_graph", captured)


def test_a_tensor_on_the_cpu_that_is_copied_in_every_eager_step_is_noticed(tmp_path, steps, left_behind):
    train(tmp_path, "num_epochs", 1, "print_freq", 4, "class_counts", "global", "cuda_graph", False)
    assert all(waits(steps))


# ---------------------------------------------------------------------------------------------------------------------
# Streams

FEW = ["num_epochs", 1, "batch_size", 160]  # three steps: the sanitizer is slow


@pytest.mark.parametrize("options", [[], ["data_on_device", False, "workers", 0]], ids=["held", "read"])
def test_streams_wait_for_each_other(tmp_path, options):
    with ordered():
        train(tmp_path, *FEW, *options)


def test_a_stream_that_does_not_wait_is_noticed(tmp_path, monkeypatch):
    """The stream of the warm-up, before the capture."""
    monkeypatch.setattr(torch.cuda.Stream, "wait_stream", lambda self, other: None)
    with ordered(), pytest.raises(Exception, match="detected 1 errors"):
        train(tmp_path, *FEW)
