"""What a data set's reader gives: labels at once, pixels on demand."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from utils.errors import InputError


class DataError(InputError):
    """Data that are missing, damaged or contradict the configuration."""


@dataclass(frozen=True)
class Split:
    """Training or test images that are not decoded yet."""

    targets: np.ndarray  # int64 [N]
    load: Callable[[np.ndarray], np.ndarray]  # indices [n] -> uint8 [n, H, W, 3]


@dataclass(frozen=True)
class Source:
    train: Split
    test: Split
    class_names: list[str]  # [C]
