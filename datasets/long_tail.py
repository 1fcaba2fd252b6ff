"""Long-tailed subsets and hold-outs. Legend: N images, C classes."""

from collections.abc import Sequence

import numpy as np

from datasets.source import DataError
from utils.seed import generator


def long_tail_counts(images_per_class: int, num_classes: int, imb_type: str, imb_factor: float) -> list[int]:
    """Images per class of a long-tailed profile, by class index (Cui et al., CVPR 2019; Cao et al., NeurIPS 2019).

    ``exp``: ``int(n f^(i / (C - 1)))``; ``step``: the first C // 2 classes full, the others ``int(n f)``. Zeros stay.
    """
    if imb_type == "exp":
        return [int(images_per_class * imb_factor ** (i / max(num_classes - 1, 1))) for i in range(num_classes)]
    if imb_type == "step":
        full = num_classes // 2
        return [images_per_class] * full + [int(images_per_class * imb_factor)] * (num_classes - full)
    raise DataError(f"imb_type: {imb_type!r} is unknown; known are exp, step")


def long_tail_indices(targets: np.ndarray, counts: Sequence[int], seed: int = 0) -> np.ndarray:
    """The images that MiSLAS and LDAM-DRW keep: int64 positions in ``targets [N]``, class by class.

    NumPy's legacy generator, seeded once, shuffles one class after another; the first ``counts[c]`` are kept.
    """
    random = np.random.RandomState(seed)
    kept = []
    for positions, count in zip(positions_by_class(targets, len(counts)), counts, strict=True):
        random.shuffle(positions)
        kept.append(positions[:count])
    return np.concatenate(kept)


def positions_by_class(targets: np.ndarray, num_classes: int) -> list[np.ndarray]:
    """Ascending positions in ``targets [N]`` of each class."""
    order = np.argsort(targets, kind="stable")
    ends = np.bincount(targets, minlength=num_classes).cumsum()
    return np.split(order[: ends[num_classes - 1]], ends[: num_classes - 1])


def cut_counts(natural: np.ndarray, imb_type: str, imb_factor: float, ranked: bool) -> list[int]:
    """Class counts after applying the profile to the ``natural [C]`` counts, starting from the largest class's size.

    ``ranked``: apply it by descending count; otherwise by class index. A class that has fewer images than its place in
    the profile keeps all of them.
    """
    profile = long_tail_counts(int(natural.max()), len(natural), imb_type, imb_factor)
    order = np.argsort(-natural, kind="stable") if ranked else np.arange(len(natural))
    counts = np.empty(len(natural), dtype=np.int64)
    counts[order] = np.minimum(profile, natural[order])
    return counts.tolist()


def hold_out(
    targets: np.ndarray, per_class: int, class_names: Sequence[str], seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Hold out ``per_class`` images of every class that has any: ascending positions (remaining, held out)."""
    random = generator(seed, 0, "validation split")
    held = []
    for name, positions in zip(class_names, positions_by_class(targets, len(class_names)), strict=True):
        if 0 < len(positions) <= per_class:
            raise DataError(
                f"val_per_class: {per_class}, but class {name!r} has only {len(positions)} training images; "
                f"at most {len(positions) - 1} can be held out"
            )
        held.append(random.permutation(positions)[:per_class])
    held_out = np.sort(np.concatenate(held))
    return np.setdiff1d(np.arange(len(targets)), held_out), held_out
