"""Types of configuration options: each returns a checked value, or raises ``ValueError`` ("must be ...")."""

import contextlib
import difflib
import itertools
import math
import os
import re

PRECISIONS = ("fp32", "tf32", "bf16", "fp16")  # see utils.precision, which needs torch
VARIABLE = re.compile(r"\$\w+|\$\{\w+\}")


def text(value):
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError("must be text (put it in quotes)")
    return value


def user_path(value):
    """A path, with ``~`` and ``$VARIABLES`` replaced."""
    found = os.path.expanduser(os.path.expandvars(text(value)))
    unknown = VARIABLE.search(found)
    if unknown:
        raise ValueError(f"must be a path without variables that are not set, such as {unknown[0]}")
    return found


def folder_path(value):
    """The path of a folder to write to; it must be encodable as UTF-8."""
    if "\0" in text(value) or not _is_utf8(text(value)):
        raise ValueError("must be the path of a folder, in UTF-8")
    return user_path(value)


def auto_or_folder(value):
    if value is False:
        return False
    if value in (True, None, ""):
        raise ValueError("must be auto, False or the path of a folder")
    return folder_path(value)


def folder_name(value):
    if set(text(value)) & set("/\\\0\n") or value in (".", "..") or not _is_utf8(text(value)):
        raise ValueError("must be usable as a folder's name")
    return text(value)


def _is_utf8(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def flag(value):
    if not isinstance(value, bool):
        raise ValueError("must be True or False")
    return value


def whole(low: int, high: float = math.inf):
    bounds = f">= {low}" + (f" and <= {high}" if high < math.inf else "")

    def parse(value):
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ValueError(f"must be a whole number {bounds}")
        return value

    return parse


def number(low: float, high: float = math.inf, above: bool = False):
    bounds = f"{'>' if above else '>='} {low:g}" + (f" and <= {high:g}" if high < math.inf else "")

    def parse(value):
        real = _real(value)
        if real is None or not low <= real <= high or (above and real == low):
            raise ValueError(f"must be a number {bounds}")
        return real

    return parse


def imbalance(value):
    real = _real(value)
    if real is None or not 0 < real <= 1:
        ratio = real if real is not None and real > 1 else 100.0
        raise ValueError(
            f"must lie in (0, 1]: it is the smallest class over the largest, {1 / ratio:g} for a ratio of {ratio:g}"
        )
    return real


def _real(value) -> float | None:
    """``value`` as a float, or None if it is not a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    with contextlib.suppress(OverflowError):
        return float(value) if math.isfinite(value) else None
    return None


def choice(*known: str | bool):
    def parse(value):
        if not any(value == k and type(value) is type(k) for k in known):  # 1 is not True
            names = [str(k) for k in known]
            near = difflib.get_close_matches(str(value), names, n=1)
            raise ValueError(f"must be one of {', '.join(names)}" + (f" (did you mean {near[0]}?)" if near else ""))
        return value

    return parse


def class_range(value):
    bounds = several(whole(0))(value)
    if len(bounds) != 2 or bounds[0] > bounds[1]:
        raise ValueError("must be [first, last + 1], such as [0, 3]")
    return bounds


def epochs_or_fractions(value):
    """Epochs from 0, or all of them fractions of the training, in (0, 1); increasing."""
    if isinstance(value, list | tuple) and any(isinstance(v, float) and 0 < v < 1 for v in value):
        with contextlib.suppress(ValueError):
            steps = several(number(0, above=True), increasing=True)(value)
            if steps[-1] < 1:
                return steps
        raise ValueError("must be epochs alone, such as [160, 180], or increasing fractions alone, such as [0.8, 0.9]")
    return several(whole(0), increasing=True)(value)


def several(kind, increasing: bool = False):
    def parse(value):
        if not isinstance(value, list | tuple):
            raise ValueError("must be a list of values, such as [160, 180]")
        values = [kind(v) for v in value]
        if increasing and any(a >= b for a, b in itertools.pairwise(values)):
            raise ValueError("must increase from value to value")
        return values

    return parse


def betas(value):
    pair = several(number(0, 1))(value)
    if len(pair) != 2 or max(pair) == 1:
        raise ValueError("must be two numbers >= 0 and < 1, such as [0.9, 0.999]")
    return pair


def optional(kind):
    return lambda value: None if value is None else kind(value)


def flag_or_path(value):
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value:
        return user_path(value)
    raise ValueError("must be True, False or the path of a weights file")
