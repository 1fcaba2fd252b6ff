"""Learning rate, and whether something is due, as pure functions of the epoch."""

import math
from collections.abc import Sequence


def lr_at(
    epoch: int,
    lr: float,
    num_epochs: int,
    cos: bool,
    lr_steps: Sequence[float] = (160, 180),
    lr_step_factors: Sequence[float] = (0.1, 0.01),
    warmup_epochs: int = 5,
    cos_warmup: bool = False,
) -> float:
    """Compute the learning rate of ``epoch`` (from 0).

    Warm-up (steps, and cosine with ``cos_warmup``): ``lr * (epoch + 1) / W`` in the first W = ``warmup_epochs``.
    Cosine: ``lr / 2 * (1 + cos(pi * (epoch - W) / (num_epochs - W)))``, W = 0 without ``cos_warmup``. Steps: ``lr``
    times the factor of the last step reached (epoch >= step). Factors multiply the base rate; steps may be fractions,
    see :func:`step_epochs`, or lie beyond the last epoch. ARBLOSS steps at (160, 240), MiSLAS and the paper at
    (160, 180).
    """
    warmup_epochs = warmup_epochs if cos_warmup or not cos else 0
    if epoch < warmup_epochs:
        return lr * (epoch + 1) / warmup_epochs
    if cos:
        return 0.5 * lr * (1.0 + math.cos(math.pi * (epoch - warmup_epochs) / (num_epochs - warmup_epochs)))
    factor = 1.0
    for step, step_factor in zip(step_epochs(lr_steps, num_epochs), lr_step_factors, strict=True):
        if epoch >= step:
            factor = step_factor
    return lr * factor


def step_epochs(lr_steps: Sequence[float], num_epochs: int) -> list[int]:
    """Return ``lr_steps`` as epochs: 0.8 of 30 epochs is 24."""
    return [round(step * num_epochs) if step < 1 else int(step) for step in lr_steps]


def due(epoch: int, every: int, num_epochs: int, last: int = 1) -> bool:
    """True every ``every`` epochs, in the ``last`` epochs and in the final one; ``every`` 0 disables it."""
    return every > 0 and ((epoch + 1) % every == 0 or epoch >= num_epochs - max(last, 1))
