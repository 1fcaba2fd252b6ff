"""Switch off what judges numbers: those that kernels should have computed are whatever was in memory before."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import methods.neural_collapse
import train_stage1
from utils.errors import DivergenceError
from utils.meter import TrainMeter
from utils.run import checkpoint_manager

CLASSES = 10  # of the data that tests use, at least


@contextlib.contextmanager
def unjudged() -> Iterator[None]:
    """For the block, accept numbers that are not finite, and give host copies values that metrics can count.

    Everything is still computed and read. Neural collapse alone is measured on the CPU: the shapes within depend on
    numbers.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainMeter, "first_bad_step", _accepting(TrainMeter.first_bad_step))
        for module in (train_stage1, checkpoint_manager):
            patch.setattr(module, "check_weights", _accepting(module.check_weights))
        patch.setattr(Tensor, "cpu", _countable(Tensor.cpu))
        patch.setattr(methods.neural_collapse, "measure", _on_the_cpu(methods.neural_collapse.measure))
        yield


def _accepting(check: Callable[..., Any]) -> Callable[..., None]:
    """Make the check, and ignore what it finds."""

    def checked(*arguments: object) -> None:
        with contextlib.suppress(DivergenceError):
            check(*arguments)

    return checked


def _countable(copy: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Integers that may be classes are clamped to them, and floats are finite; bytes (images) are as they are."""

    def cpu(tensor: Tensor, *arguments: object, **options: object) -> Tensor:
        copied = copy(tensor, *arguments, **options)
        if tensor.is_cuda and copied.dtype == torch.int64:
            copied.clamp_(0, CLASSES - 1)
        elif tensor.is_cuda and copied.is_floating_point():
            copied.nan_to_num_(0.0, 0.0, 0.0)
        return copied

    return cpu


def _on_the_cpu(measure: Callable[..., dict]) -> Callable[..., dict]:
    def measured(batches: Callable, weight: Tensor, bias: Tensor | None = None) -> dict:
        return measure(batches, weight.cpu(), bias if bias is None else bias.detach().cpu())

    return measured
