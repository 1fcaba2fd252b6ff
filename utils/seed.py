"""Randomness as a pure function of (seed, epoch, purpose), so that no generator state needs to be saved."""

import contextlib
import zlib
from collections.abc import Iterator

import numpy as np
import torch


def generator(seed: int, epoch: int, purpose: str, *index: int) -> np.random.Generator:
    """Return a new generator that depends on the arguments alone.

    ``purpose`` ("order", "crop", "mixup", ...) makes streams independent: one more draw for crops does not change the
    mixing weights. ``index``: of an image, for one generator per image.
    """
    places = (i + 1 for i in index)  # SeedSequence pads with zeros, so 0 must not be an index
    return np.random.default_rng(np.random.SeedSequence([seed, epoch, zlib.crc32(purpose.encode()), *places]))


@contextlib.contextmanager
def seeded_weights(seed: int) -> Iterator[None]:
    """Seed torch's default CPU generator for the block and restore its state afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
