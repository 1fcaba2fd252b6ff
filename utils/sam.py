"""Sharpness-aware minimisation (Foret et al., ICLR 2021): the gradient at the worst point nearby.

    e = rho g / ||g||,    the step is taken with the gradient at w + e,    g the gradient at w

||g|| is the 2-norm over all trained weights of the model. It does not depend on the loss's scale, so gradients may be
those of a scaled loss.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def perturbed(
    weights: Iterable[nn.Parameter], buffers: Sequence[Tensor], start: Sequence[Tensor], rho: float
) -> Iterator[None]:
    """Move the weights by e in the block, from their gradients; afterwards they are what they were, bit for bit.

    ``buffers``, such as batch-norm statistics, are ``start`` in the block, as they were before the first pass; it must
    not move them again. If a gradient is not finite, all weights are NaN in the block, and so are its gradients: a loss
    scaler then skips the step.
    """
    weights = [weight for weight in weights if weight.grad is not None]
    moved = [*weights, *buffers]
    with torch.no_grad():
        before = [tensor.detach().clone() for tensor in moved]
        gradients = [weight.grad for weight in weights]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        factor = torch.where(norm.isfinite(), rho / (norm + 1e-12), torch.nan)
        torch._foreach_add_(weights, torch._foreach_mul(gradients, factor))
        _copy(buffers, start)
    yield
    with torch.no_grad():
        _copy(moved, before)


def _copy(tensors: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)
