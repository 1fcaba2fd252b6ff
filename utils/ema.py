"""Exponential moving average of a model's weights."""

from copy import deepcopy

import torch
from torch import Tensor, nn


class AveragedModel:
    """A copy of a model that follows it: ``average = decay * average + (1 - decay) * weights`` after every step.

    Batch-norm statistics are averaged as weights are; integers, which count batches, are copied.
    """

    def __init__(self, model: nn.Module, decay: float):
        """``model``: the bare one; its tensors are read where they are now, so they may only change in place."""
        self.model, self.decay = deepcopy(model).requires_grad_(False), decay
        pairs = list(zip(self.model.state_dict().values(), model.state_dict().values(), strict=True))
        self._floats = [pair for pair in pairs if pair[0].is_floating_point()]
        self._integers = [pair for pair in pairs if not pair[0].is_floating_point()]

    @torch.no_grad()
    def update(self) -> None:
        """Follow the model by one step, on the device and without synchronising."""
        torch._foreach_lerp_(*map(list, zip(*self._floats, strict=True)), 1 - self.decay)
        for average, current in self._integers:
            average.copy_(current)

    @torch.no_grad()
    def reset(self) -> None:
        """Start from the model's weights."""
        for average, current in (*self._floats, *self._integers):
            average.copy_(current)

    def tensors(self) -> list[Tensor]:
        """All that :meth:`update` changes in place."""
        return [average for average, _ in (*self._floats, *self._integers)]
