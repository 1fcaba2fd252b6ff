"""Floating-point precision of training and evaluation.

``fp32`` is strict float32. ``tf32`` allows TF32 in CUDA's matrix products and convolutions; a CPU stays strict.
``bf16`` and ``fp16`` run convolutions in half precision (torch.autocast); weights, optimizer, batch-norm statistics,
classifier, loss and metrics stay in float32. ``fp16`` scales the loss.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from utils.errors import InputError

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


@contextlib.contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Allow TF32 in the block for "tf32", and forbid it for every other precision."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Autocast a forward pass; no effect for "fp32" and "tf32"."""
    return torch.autocast(device.type, HALF.get(precision, torch.bfloat16), enabled=precision in HALF)


def at_least_float32(tensor: Tensor) -> Tensor:
    """``tensor`` in float32 if it is in half precision, else as it is."""
    return tensor.float() if tensor.dtype in HALF.values() else tensor


def new_scaler(precision: str, device: torch.device) -> torch.amp.GradScaler:
    """Create the loss scaler; it is disabled except for "fp16".

    Raises :class:`InputError` for "bf16" on a CUDA device without it.
    """
    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise InputError("precision: bf16, but this CUDA device cannot compute in bfloat16; use fp16 or fp32")
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")
