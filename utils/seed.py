"""Randomness as a pure function of (seed, epoch, purpose): nothing is carried along, so nothing needs to be saved."""

import contextlib
import zlib
from collections.abc import Iterator

import numpy as np
import torch


def generator(seed: int, epoch: int, purpose: str, *index: int) -> np.random.Generator:
    """A fresh generator that depends on its arguments alone.

    ``purpose`` ("order", "crop", "mixup", ...) keeps the streams apart: one more draw for the crops
    does not shift the mixing weights. ``index``: of an image, where each has a generator of its own.
    """
    places = (i + 1 for i in index)  # a sequence is filled up with zeros, which are no index
    return np.random.default_rng(np.random.SeedSequence([seed, epoch, zlib.crc32(purpose.encode()), *places]))


@contextlib.contextmanager
def seeded_weights(seed: int) -> Iterator[None]:
    """Inside the block torch's default CPU generator starts from ``seed``; afterwards it is as it was before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
