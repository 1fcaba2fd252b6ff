"""Negative log-likelihoods over many classes: one exponential per logit, one copy of the probabilities.

Clamp, counts and log-softmax as separate operations of autograd write a [B, C] tensor each, masks among them, and
again in the backward pass. Here they share one, written in place, and so do all targets of a row.
"""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable


def fused_nll(logits: Tensor, targets: Tensor, log_counts: Tensor | None = None, clamp: float | None = None) -> Tensor:
    """``-log_softmax(clamp(z) + log n)_y``: ``logits [B, C]``, ``targets [T, B]``, ``log_counts [C]`` -> [T, B].

    In float32 for logits in half precision. None: no counts, no clamp. Differentiable once, in the logits.
    """
    if targets.shape[1:] != logits.shape[:1]:  # what follows would broadcast
        raise ValueError(f"targets: shape {tuple(targets.shape)} does not fit logits of shape {tuple(logits.shape)}")
    return _FusedNLL.apply(logits, targets, log_counts, clamp)


class _FusedNLL(torch.autograd.Function):
    """Keeps the probabilities p [B, C], as log-softmax keeps its result, times the slope of the clamp (0 or 1)."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, logits: Tensor, targets: Tensor, log_counts: Tensor | None, clamp: float | None
    ) -> Tensor:
        targets = targets.T  # [B, T]
        z = logits.to(torch.promote_types(logits.dtype, torch.float32)).contiguous()
        p = z.clone() if clamp is None else z.clamp(-clamp, clamp)
        if log_counts is not None:
            p.add_(log_counts)
        nll = p.amax(dim=1, keepdim=True) - p.gather(1, targets)
        torch.softmax(p, dim=1, out=p)
        nll -= p.amax(dim=1, keepdim=True).log()  # the largest p is exp(0) over the sum
        slope = torch.ones_like(nll)
        if clamp is not None:
            slope = (z.gather(1, targets).abs() < clamp).to(p.dtype)
            # Sets p to 0 where |z| >= clamp, in one pass; with a mask in memory it would be several, and slow ones.
            torch.ops.aten.hardtanh_backward.grad_input(p, z, -clamp, clamp, grad_input=p)
        ctx.save_for_backward(p, targets, slope)
        ctx.dtype = logits.dtype
        return nll.T.contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, weights: Tensor) -> tuple[Tensor, None, None, None]:
        """``sum_t w_t (p - onehot_t)`` with ``weights [T, B]``, times the slope of the clamp."""
        p, targets, slope = ctx.saved_tensors
        weights = weights.T
        gradient = p * weights.sum(dim=1, keepdim=True)
        for y, w in zip(targets.split(1, dim=1), (weights * slope).split(1, dim=1), strict=True):
            gradient.scatter_add_(1, y, -w)  # one target at a time: no entry twice, so no race
        return gradient.to(ctx.dtype), None, None, None
