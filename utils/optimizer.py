"""What SGD and AdamW keep from step to step."""

import torch
from torch import Tensor


def fresh_state(optimizer: torch.optim.Optimizer, weight: Tensor) -> dict[str, Tensor]:
    """The state of one weight before the first step, zeros, under the names of PyTorch's fused optimizers."""
    if isinstance(optimizer, torch.optim.AdamW):
        averages = {name: torch.zeros_like(weight) for name in ("exp_avg", "exp_avg_sq")}
        return {"step": torch.zeros((), device=weight.device), **averages}
    return {"momentum_buffer": torch.zeros_like(weight)}
