"""Deterministic inputs and weights, so that two implementations can be compared without shipping weights."""

import math

import torch


def fill_state_dict(state_dict):
    """Overwrite every tensor of ``state_dict`` in place with a fixed pattern that depends only on its name and shape.

    Convolution and linear weights get a He-scaled sine, batch-norm scales and variances stay positive.
    """
    for name in sorted(state_dict):
        tensor = state_dict[name]
        if not tensor.is_floating_point():
            tensor.zero_()
            continue
        phase = float(sum(ord(c) for c in name) % 97)
        wave = torch.sin(torch.arange(tensor.numel(), dtype=torch.float64) * 0.7 + phase).reshape(tensor.shape)
        if name.endswith("running_var"):
            value = 1.0 + 0.5 * wave**2
        elif tensor.dim() > 1:
            value = wave * math.sqrt(2.0 / tensor[0].numel())
        elif name.endswith("weight"):
            value = 1.0 + 0.1 * wave
        else:
            value = 0.1 * wave
        tensor.copy_(value.to(tensor.dtype))
    return state_dict


def wave_images(count, size, seed=0):
    """``count`` x 3 x ``size`` x ``size`` float32 images in [-1, 1], a fixed pattern of ``seed``."""
    index = torch.arange(count * 3 * size * size, dtype=torch.float64)
    return (
        torch.sin(index * 0.013 + seed)
        .add_(torch.cos(index * 0.0071 * (seed + 1)))
        .mul_(0.5)
        .float()
        .reshape(count, 3, size, size)
    )
