"""One training step: forward, loss, backward, metrics and, after the last micro-batch, the optimizer.

The step knows neither data sets nor methods: ``batch`` is a NamedTuple with the fields of
:class:`datasets.loaders.Batch`, ``draw`` a NamedTuple of tensors that the method has drawn for the micro-batch. On a
single GPU the step is captured as a CUDA graph, see :mod:`utils.cuda_graph`.
"""

import contextlib
import os
import shlex
import shutil
import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor, nn

from utils import distributed
from utils.ema import AveragedModel
from utils.errors import InputError
from utils.meter import TrainMeter
from utils.optimizer import fresh_state
from utils.precision import autocast
from utils.sam import perturbed


class Step:
    """Runs one micro-batch and, after the last one of a step, updates the weights."""

    captured = False  # as a CUDA graph

    def __init__(
        self,
        model: nn.Module,
        method: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        device: torch.device,
        precision: str = "fp32",
        compiled: bool = False,
        max_grad_norm: float | None = None,
        keep_outputs: bool = False,
        average: AveragedModel | None = None,
        sam: float = 0.0,
    ):
        """Weights, optimizer and scaler are restored before: a CUDA graph starts from them.

        Args:
            model: May be a parallel wrapper.
            compiled: Whether :func:`compile_model` was applied to the model.
            max_grad_norm: Clip the gradients of all trained parameters to this 2-norm.
            keep_outputs: Keep logits and features for :class:`ProfiledStep`.
            average: Follows the model.
            sam: rho of :mod:`utils.sam`; 0: off. For one micro-batch per step.
        """
        self.model, self.method, self.optimizer, self.scaler = model, method, optimizer, scaler
        self.device, self.precision, self.compiled = device, precision, compiled
        self.max_grad_norm, self.average, self.sam = max_grad_norm, average, sam
        self.meter = TrainMeter(device, getattr(method, "clamp", None))
        self.outputs: dict[int, tuple[Tensor, Tensor]] = {}  # batch size -> its last logits and features
        self.keep_outputs = keep_outputs
        if scaler.is_enabled():
            optimizer.register_step_post_hook(self._count_skipped)
        _init_state(optimizer)

    def start_epoch(self, epoch: int) -> bool:
        """Reset the metrics; return True if the method computes something else from this epoch on."""
        self.model.train()
        self.meter.reset()
        return self.method.start_epoch(epoch)

    def __call__(self, batch: NamedTuple, draw: NamedTuple) -> None:
        with distributed.averaging(self.model, batch.ends_step), self._eager_if_odd(batch):
            images = batch.augment()
            output = self._with_sam(images, batch, draw) if self.sam > 0 else self._backward(images, batch, draw)
        self.meter.update(output.loss, output.logits, batch.targets, batch.weight, batch.ends_step)
        if self.keep_outputs:
            self._store_outputs(output.logits.detach(), output.features.detach())
        if batch.ends_step:
            self._update_weights()

    def _with_sam(self, images: Tensor, batch: NamedTuple, draw: NamedTuple) -> NamedTuple:
        """Two passes, both from the same buffers, such as moving class means; returns the first one's output."""
        buffers = (*self.model.buffers(), *self.method.buffers())
        start = [buffer.clone() for buffer in buffers]
        output = self._backward(images, batch, draw)
        with perturbed(self.model.parameters(), buffers, start, self.sam):
            self.optimizer.zero_grad()
            self._backward(images, batch, draw)
        return output

    def _backward(self, images: Tensor, batch: NamedTuple, draw: NamedTuple) -> NamedTuple:
        """Forward and backward; returns the method's output."""
        labels = (batch.step_targets, batch.pasted_targets)
        with autocast(self.precision, self.device):
            output = self.method(self.model, images, batch.targets, draw, *labels)
        self.scaler.scale(output.loss * batch.weight).backward()
        return output

    def _update_weights(self) -> None:
        distributed.average_gradients(self.method)  # DDP has averaged the model's own
        self.method.adjust_gradients(self.model)
        if self.max_grad_norm is not None:
            self.scaler.unscale_(self.optimizer)
            trained = [p for group in self.optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(trained, self.max_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.method.adjust_weights(self.model)
        if self.average is not None:
            self.average.update()

    def _store_outputs(self, logits: Tensor, features: Tensor) -> None:
        """Copy in place: a CUDA graph always writes to the same memory."""
        if len(logits) not in self.outputs:
            self.outputs[len(logits)] = (torch.empty_like(logits), torch.empty_like(features))
        for stored, value in zip(self.outputs[len(logits)], (logits, features), strict=True):
            stored.copy_(value)

    def _count_skipped(self, optimizer: torch.optim.Optimizer, *arguments: object) -> None:
        """With a fused optimizer the scaler leaves on the device whether gradients overflowed."""
        self.meter.skipped(optimizer.found_inf)

    def _eager_if_odd(self, batch: NamedTuple) -> contextlib.AbstractContextManager:
        """Run an epoch's last, smaller batch uncompiled: compiling for its size would take a minute."""
        odd = self.compiled and not batch.full
        return torch.compiler.set_stance("force_eager") if odd else contextlib.nullcontext()

    def tensors(self) -> list[Tensor]:
        """Everything that a step changes in place, except the scaler."""
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        modules = [t for module in (self.model, self.method) for t in (*module.parameters(), *module.buffers())]
        averages = [] if self.average is None else self.average.tensors()
        own = (value for value in states if isinstance(value, Tensor))
        return [*modules, *own, *self.meter.tensors(), *averages]


class StepWrapper:
    """A step that adds something to another one; its parts are those of the inner step."""

    def __init__(self, step: "Step | StepWrapper"):
        self.step, self.captured = step, step.captured
        self.model, self.method, self.meter, self.device = step.model, step.method, step.meter, step.device
        self.outputs = step.outputs

    def start_epoch(self, epoch: int) -> bool:
        """See :meth:`Step.start_epoch`."""
        return self.step.start_epoch(epoch)


class ProfiledStep(StepWrapper):
    """Calls a function with the outputs of some steps, outside of the CUDA graph."""

    def __init__(self, step: Step | StepWrapper, watch: Callable[..., None], every: int):
        """``watch(logits [B, C], features [B, D], batch, draw)`` after each micro-batch of every ``every``-th step."""
        super().__init__(step)
        self.watch, self.every = watch, every

    def __call__(self, batch: NamedTuple, draw: NamedTuple) -> None:
        self.step(batch, draw)
        if batch.number % self.every == 0 and batch.weight > 0:
            self.watch(*self.outputs[len(batch.targets)], batch, draw)


def compile_model(model: nn.Module, device: torch.device) -> None:
    """Compile the model's training pass at its first batch; evaluation calls ``forward``, which stays eager."""
    compiler = shlex.split(os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++"))[0]
    if device.type == "cpu" and not shutil.which(compiler):
        raise InputError(
            f"compile: True needs a C++ compiler on a CPU, and there is no {compiler} (see CXX); use False"
        )
    if device.type == "cuda" and (not find_spec("triton") or torch.cuda.get_device_capability(device) < (7, 0)):
        raise InputError("compile: True needs Triton, and a CUDA device of capability 7.0 or more; use False")
    model.compile(dynamic=False)


def _init_state(optimizer: torch.optim.Optimizer) -> None:
    """Start with a state of zeros instead of none: the same numbers, and no tensor is created later.

    (With fp16, a skipped first step would leave torch's fused SGD with uninitialised momentum.)
    """
    for group in optimizer.param_groups:
        for weight in group["params"] if group.get("momentum", True) else ():
            if not optimizer.state[weight]:
                optimizer.state[weight].update(fresh_state(optimizer, weight))
