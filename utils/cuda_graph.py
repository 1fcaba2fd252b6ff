"""A training step captured once as a CUDA graph and replayed, without Python in between."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from utils.step import Step, StepWrapper

WARM_UP = 3  # steps before the capture, in which libraries choose kernels and allocate their workspaces


class GraphedStep(StepWrapper):
    """Captures a :class:`Step` at the first full batch and replays it from then on.

    Capturing runs the step a few times; all that it changes is restored afterwards. Each batch's inputs are copied to
    the tensors that the graph reads. An epoch's last, smaller batch runs eagerly. For one process and one micro-batch
    per step: everything in a batch but its tensors becomes part of the graph.
    """

    def __init__(self, step: Step, record: Callable[[Callable[[], None]], Callable[[], None]] | None = None):
        """``record`` takes a function, may call it, and returns one that replays it; None: a CUDA graph."""
        if not all(group["fused"] for group in step.optimizer.param_groups):
            raise ValueError("a captured step needs a fused optimizer: the others read the learning rate on the CPU")
        super().__init__(step)
        self.captured = True
        self.record = record or capture_cuda_graph
        self.replay: Callable[[], None] | None = None
        self.static_inputs: list[Tensor] = []  # tensors of a batch that the graph reads
        for group in step.optimizer.param_groups:  # a float would be a constant of the graph
            group["lr"] = torch.tensor(float(group["lr"]), device=step.device)
            if "capturable" in group:  # AdamW checks it; fused, it computes the same
                group["capturable"] = True
        step.optimizer._warned_capturable_if_run_uncaptured = True  # warm-up and smaller batches do, on purpose

    def start_epoch(self, epoch: int) -> bool:
        """See :meth:`Step.start_epoch`; a method that changes is captured again."""
        changed = super().start_epoch(epoch)
        if changed:
            self.replay = None
        return changed

    def __call__(self, batch: NamedTuple, draw: NamedTuple) -> None:
        if not batch.full:
            self.step(batch, draw)
            return
        inputs = [*batch.inputs, batch.targets, batch.step_targets, batch.pasted_targets, *draw]
        if self.replay is None:
            self.static_inputs = [tensor.clone() for tensor in inputs]
            self.replay = self._capture(batch, draw)
        for static, tensor in zip(self.static_inputs, inputs, strict=True):
            static.copy_(tensor)
        self.replay()

    def _capture(self, batch: NamedTuple, draw: NamedTuple) -> Callable[[], None]:
        count = len(batch.inputs)
        targets, step_targets, pasted_targets, *drawn = self.static_inputs[count:]
        labels = {"targets": targets, "step_targets": step_targets, "pasted_targets": pasted_targets}
        static_batch = batch._replace(inputs=tuple(self.static_inputs[:count]), **labels)
        static_draw = type(draw)(*drawn)
        before, scaler_state = [t.detach().clone() for t in self.step.tensors()], self.step.scaler.state_dict()
        replay = self.record(lambda: self.step(static_batch, static_draw))
        with torch.no_grad():
            for tensor, value in zip(self.step.tensors(), before, strict=True):
                tensor.copy_(value)
        if scaler_state:
            self.step.scaler.load_state_dict(scaler_state)
        return replay


def capture_cuda_graph(run: Callable[[], None]) -> Callable[[], None]:
    """Capture ``run`` as a CUDA graph with a memory pool of its own, and return its replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # Other threads, such as the one that pins the loader's memory, may use CUDA in the meantime.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        run()
    return graph.replay
