"""What happens to a batch: forward, loss, backward, meter, optimizer; on one CUDA device recorded once as a graph.

The step knows neither data sets nor methods: ``batch`` is a NamedTuple with the fields of
:class:`datasets.loaders.Batch`, ``draw`` a NamedTuple of tensors, what the method draws at random for a pass.
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
from utils.errors import InputError
from utils.metrics import TrainMeter
from utils.precision import autocast

WARM_UP = 3  # steps before a recording, in which libraries choose kernels and allocate what they keep


class Step:
    """One pass, and at a step's end the optimizer."""

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
    ):
        """``model`` may be a parallel wrapper; ``compiled``: whether :func:`compile_model` was applied to what is in
        it. Weights, optimizer and scaler are loaded already: a recording starts from them. ``max_grad_norm``: longer
        gradients (2-norm over all that learns) are scaled down to it. ``keep_outputs``: for :class:`WatchedStep`.
        """
        self.model, self.method, self.optimizer, self.scaler = model, method, optimizer, scaler
        self.device, self.precision, self.compiled = device, precision, compiled
        self.max_grad_norm = max_grad_norm
        self.meter = TrainMeter(device, getattr(method, "clamp", None))
        self.outputs: dict[int, tuple[Tensor, Tensor]] = {}  # logits, features of the last batch of every size
        self.keep_outputs = keep_outputs
        if scaler.is_enabled():
            optimizer.register_step_post_hook(self._count_skipped)
        _make_momentum(optimizer)

    def start_epoch(self, epoch: int) -> bool:
        """Before an epoch's first batch; True where the method computes something else from here on."""
        self.model.train()
        self.meter.reset()
        return self.method.start_epoch(epoch)

    def __call__(self, batch: NamedTuple, draw: NamedTuple) -> None:
        with distributed.averaging(self.model, batch.ends_step), self._eager_if_odd(batch):
            with autocast(self.precision, self.device):
                output = self.method(self.model, batch.augment(), batch.targets, draw, batch.step_targets)
            self.scaler.scale(output.loss * batch.weight).backward()
        self.meter.update(output.loss, output.logits, batch.targets, batch.weight, batch.ends_step)
        if self.keep_outputs:
            self._keep(output.logits.detach(), output.features.detach())
        if batch.ends_step:
            self._optimize()

    def _optimize(self) -> None:
        distributed.average_gradients(self.method)  # the model's own are averaged already
        if self.max_grad_norm is not None:
            self.scaler.unscale_(self.optimizer)
            learning = [p for group in self.optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(learning, self.max_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()

    def _keep(self, logits: Tensor, features: Tensor) -> None:
        """In place: a recorded step goes on writing where it wrote first."""
        if len(logits) not in self.outputs:
            self.outputs[len(logits)] = (torch.empty_like(logits), torch.empty_like(features))
        for held, value in zip(self.outputs[len(logits)], (logits, features), strict=True):
            held.copy_(value)

    def _count_skipped(self, optimizer: torch.optim.Optimizer, *arguments: object) -> None:
        """The scaler leaves with a fused optimizer whether gradients overflowed: a number on the device."""
        self.meter.skipped(optimizer.found_inf)

    def _eager_if_odd(self, batch: NamedTuple) -> contextlib.AbstractContextManager:
        """An epoch's last, smaller batch is not worth the minute that compiling for its size takes."""
        odd = self.compiled and not batch.full
        return torch.compiler.set_stance("force_eager") if odd else contextlib.nullcontext()

    def tensors(self) -> list[Tensor]:
        """All that a step changes in place, but for the scaler."""
        momentum = [value for state in self.optimizer.state.values() for value in state.values()]
        modules = [t for module in (self.model, self.method) for t in (*module.parameters(), *module.buffers())]
        return [*modules, *(value for value in momentum if isinstance(value, Tensor)), *self.meter.tensors()]


class RecordedStep:
    """A :class:`Step` that is recorded at the first full batch and replayed from then on, without Python in between.

    Recording runs the step a few times; whatever it changes is put back. A step's parts of the epoch's tables (which
    images, their crops, lambda, ...) are copied to where the recording reads them. An epoch's last, smaller batch runs
    as it is. For one process and one pass per step: what a batch says beside its tensors becomes part of the recording.
    """

    def __init__(self, step: Step, record: Callable[[Callable[[], None]], Callable[[], None]] | None = None):
        """``record`` takes a function, may call it, and returns one that replays it; None: a CUDA graph."""
        if not all(group["fused"] for group in step.optimizer.param_groups):
            raise ValueError("a recorded step needs a fused optimizer: the others read the learning rate on the CPU")
        self.step = step
        self.model, self.method, self.meter, self.device = step.model, step.method, step.meter, step.device
        self.record = record or record_cuda_graph
        self.replay: Callable[[], None] | None = None
        self.held: list[Tensor] = []  # what the recording reads of a batch
        for group in step.optimizer.param_groups:  # a number would be part of the recording
            group["lr"] = torch.tensor(float(group["lr"]), device=step.device)

    def start_epoch(self, epoch: int) -> bool:
        """As :meth:`Step.start_epoch`; a method that changes is recorded anew."""
        changed = self.step.start_epoch(epoch)
        if changed:
            self.replay = None
        return changed

    def __call__(self, batch: NamedTuple, draw: NamedTuple) -> None:
        if not batch.full:
            self.step(batch, draw)
            return
        new = [*batch.inputs, batch.targets, batch.step_targets, *draw]
        if self.replay is None:
            self.held = [tensor.clone() for tensor in new]
            self.replay = self._recorded(batch, draw)
        for held, tensor in zip(self.held, new, strict=True):
            held.copy_(tensor)
        self.replay()

    def _recorded(self, batch: NamedTuple, draw: NamedTuple) -> Callable[[], None]:
        count = len(batch.inputs)
        inputs, (targets, step_targets, *drawn) = tuple(self.held[:count]), self.held[count:]
        held_batch = batch._replace(inputs=inputs, targets=targets, step_targets=step_targets)
        held_draw = type(draw)(*drawn)
        before, scaling = [t.detach().clone() for t in self.step.tensors()], self.step.scaler.state_dict()
        replay = self.record(lambda: self.step(held_batch, held_draw))
        with torch.no_grad():
            for tensor, value in zip(self.step.tensors(), before, strict=True):
                tensor.copy_(value)
        if scaling:
            self.step.scaler.load_state_dict(scaling)
        return replay


class WatchedStep:
    """A step of whose passes some are looked at, once they are done: outside of what is recorded."""

    def __init__(self, step: Step | RecordedStep, watch: Callable[..., None], every: int):
        """``watch(logits [B, C], features [B, D], batch, draw)`` after every pass of each ``every``-th step."""
        self.step, self.watch, self.every = step, watch, every
        self.model, self.method, self.meter, self.device = step.model, step.method, step.meter, step.device
        self.outputs = (step.step if isinstance(step, RecordedStep) else step).outputs

    def start_epoch(self, epoch: int) -> bool:
        """As :meth:`Step.start_epoch`."""
        return self.step.start_epoch(epoch)

    def __call__(self, batch: NamedTuple, draw: NamedTuple) -> None:
        self.step(batch, draw)
        if batch.number % self.every == 0 and batch.weight > 0:
            self.watch(*self.outputs[len(batch.targets)], batch, draw)


def record_cuda_graph(run: Callable[[], None]) -> Callable[[], None]:
    """Records ``run`` as a CUDA graph; memory that it allocates stays its own."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # Other threads, such as the one that pins the loader's memory, may go on with CUDA in the meantime.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        run()
    return graph.replay


def compile_model(model: nn.Module, device: torch.device) -> None:
    """Has torch.compile translate the model's training pass, at its first batch; evaluation calls ``forward`` as is."""
    compiler = shlex.split(os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++"))[0]
    if device.type == "cpu" and not shutil.which(compiler):
        raise InputError(
            f"compile: True needs a C++ compiler on a CPU, and there is no {compiler} (see CXX); use False"
        )
    if device.type == "cuda" and (not find_spec("triton") or torch.cuda.get_device_capability(device) < (7, 0)):
        raise InputError("compile: True needs Triton, and a CUDA device of capability 7.0 or more; use False")
    model.compile(dynamic=False)


def _make_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Momentum that is zero instead of absent before the first step: the same numbers, and nothing is created later.

    (A first step that fp16 skips would leave torch's fused SGD with momentum that was never written.)
    """
    for group in optimizer.param_groups:
        for parameter in group["params"] if group.get("momentum") else ():
            if "momentum_buffer" not in optimizer.state[parameter]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
