"""The file that describes a sweep: its keys, once, and a reader that checks them.

Parsers are those of :mod:`utils.config`: functions of what YAML gave that return the checked value or raise
``ValueError`` ("must be ..."). :func:`at` adds the key, so an error names the file and the whole way to what is wrong.
"""

import contextlib
import itertools
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from utils import config
from utils.config import OPTIONS, shown
from utils.errors import InputError
from utils.sweep.contrasts import MEASURES, arm_of, measure_of

# Options that the sweep sets for each run -> what to write instead.
SET_BY_SWEEP = {
    **dict.fromkeys(("name", "save_dir", "resume", "fork", "keep_epochs"), ""),
    **{"seed": "; give seeds", "subset_seed": "; give subset_seeds of the sweep"},
}


class Arm(NamedTuple):
    """One of the configurations that a sweep compares."""

    name: str
    cfg: Path
    options: dict[str, Any]
    seeds: list[int]
    fork: tuple[str, int] | None  # the arm whose runs it continues, and after how many epochs


@dataclass(frozen=True)
class Sweep:
    """A sweep's file, checked."""

    name: str
    arms: dict[str, Arm]
    axes: dict[str, list]  # option -> values
    subset_seeds: list[int]
    compared: dict[str, Any]  # against, pairs, claims, waterfall, choose


def at(key: object, parse: Callable[[Any], Any], value: Any) -> Any:
    """``parse(value)``; an error names ``key``."""
    try:
        return parse(value)
    except InputError as error:  # of an entry within
        raise InputError(f"{key}: {error}") from None
    except ValueError as error:
        raise InputError(f"{key}: {shown(value)} {error}") from None


def mapping(parse: Callable[[Any], Any], least: int = 0):
    def entries(value):
        if not isinstance(value, dict) or len(value) < least:
            raise ValueError("must be a mapping, {name: value, ...}" + ", of one entry or more" * bool(least))
        return {str(key): at(key, parse, entry) for key, entry in value.items()}

    return entries


def fields(needed: Mapping[str, Callable], **optional: Callable):
    """A mapping of these keys, each with its kind of value."""
    kinds = needed | optional

    def entries(value):
        if not isinstance(value, dict):
            raise ValueError(f"must be a mapping of {', '.join(kinds)}")
        for key in [*(key for key in value if key not in kinds), *(key for key in needed if key not in value)]:
            what = f"{key} is missing" if key in kinds else f"unknown key {shown(key)}"
            raise InputError(f"{what}; the keys are {', '.join(kinds)}")
        return {key: at(key, kinds[key], entry) for key, entry in value.items()}

    return entries


def real(value):
    """A finite number; ``5e-1`` is text to YAML."""
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        if not isinstance(value, bool) and math.isfinite(float(value)):
            return float(value)
    raise ValueError("must be a number")


def figure(value):
    if not isinstance(value, list):
        return real(value)
    if len(value) != 2 or real(value[0]) > real(value[1]):
        raise ValueError("must be a number or [lowest, highest]")
    return [real(bound) for bound in value]


def seeds(value):
    with contextlib.suppress(ValueError):
        numbers = config.several(config.whole(0))(value)
        if numbers and len(set(numbers)) == len(numbers):
            return numbers
    raise ValueError("must be a list of different whole numbers >= 0, such as [0, 1, 2]")


def pair(value):
    if not isinstance(value, list) or len(value) != 2 or value[0] == value[1]:
        raise ValueError("must be [arm, another arm]")
    return config.several(config.text)(value)


def options(value):
    if not isinstance(value, dict):
        raise ValueError("must be a mapping of options, {option: value, ...}")
    refuse_set_by_sweep(value)
    return dict(value)


def refuse_set_by_sweep(keys: Iterable[str]) -> None:
    for key in set(keys) & SET_BY_SWEEP.keys():
        raise InputError(f"{key} is set for every run by the sweep itself{SET_BY_SWEEP[key]}")


def axes(value):
    for axis in options(value):
        if config.known(axis, axis) and axis not in OPTIONS:
            raise InputError(f"{axis}: a switch of the originals; give the option that it stands for")
    return {axis: at(axis, partial(_along, axis), values) for axis, values in value.items()}


def _along(axis: str, values: Any) -> list:
    """An axis's values as the configuration will have them."""
    if not isinstance(values, list) or not values:
        raise ValueError("must be a list of values")
    found = [at("value", partial(config.parse_option, axis), value) for value in values]
    for number, value in enumerate(found):
        if value in found[:number]:
            raise InputError(f"{shown(values[number])} is there twice; keep one")
    return found


def arms(value):
    for key in value if isinstance(value, dict) else ():
        if not isinstance(key, str) or not re.fullmatch(r"\w+(-\w+)*", key):
            raise InputError(f"{shown(key)} must be a name of letters, digits and _")
    return mapping(_arm, least=1)(value)


def _arm(value: Any) -> dict[str, Any]:
    if value is not None and not isinstance(value, dict):
        raise ValueError("must be a mapping of options, {option: value, ...}")
    rest = dict(value or {})
    own = {key: at(key, ARM[key], rest.pop(key)) for key in ARM if key in rest}
    return own | {"options": options(rest)}


def claim(value):
    keys = value if isinstance(value, dict) else ()
    return (EQUIVALENCE if "within" in keys else DIFFERENCE if "pair" in keys else REPRODUCTION)(value)


# Every key, once; config/sweeps/README.md says what each means.
ARM = {
    "cfg": config.user_path,
    "seeds": seeds,
    "fork": fields({"arm": config.text, "epoch": config.whole(1)}),
}  # beside options
POINT = mapping(lambda value: value, least=1)
REPRODUCTION = fields({"arm": config.text, "published": figure}, at=POINT)
EQUIVALENCE = fields({"pair": pair, "within": config.number(0, above=True)}, at=POINT)
DIFFERENCE = fields({"pair": pair, "at_least": real}, at=POINT)
STEPS = mapping(mapping(real, least=1), least=1)
KEYS = fields(
    {"arms": arms},
    cfg=config.text,
    options=options,
    axes=axes,
    seeds=seeds,
    subset_seeds=seeds,
    against=config.text,
    pairs=config.several(partial(at, "a pair", pair)),
    claims=mapping(claim),
    waterfall=fields(
        {"start": config.text, "steps": STEPS, "end": config.choice(*MEASURES)}, published=config.optional(real)
    ),
    choose=config.flag,
)


def read_sweep(path: Path) -> Sweep:
    """The sweep that a file describes. Raises :class:`InputError`."""
    if not os.path.isfile(path):  # unlike pathlib's, False for any name that cannot be
        raise InputError(f"{path}: no such sweep (give the path of a YAML file, see config/sweeps/)")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=config.UniqueKeyLoader)
    except config.RepeatedKey as error:
        line = error.problem_mark.line + 1
        raise InputError(f"{path}, line {line}: {error.key} is given twice; keep one") from None
    except Exception as error:  # PyYAML lets through whatever its constructors meet
        raise InputError(f"{path}: cannot be read: {' '.join(str(error).split())[:200]}") from None
    return at(path, partial(_sweep, path), content)


def _sweep(path: Path, content: Any) -> Sweep:
    found = KEYS(content)
    axes, arms = found.get("axes", {}), {}
    for arm, own in found["arms"].items():
        arms[arm] = at(f"arms: {arm}", partial(_inherit, path, found, arm, arms), own)
        for key in arms[arm].options.keys() & axes.keys():
            raise InputError(f"arms: {arm}: {key} is an axis already, which sets it for every run; keep one")
    compared = {"against": next(iter(arms)), "pairs": [], "claims": {}, "waterfall": {}, "choose": False}
    compared |= {key: found[key] for key in compared if key in found}
    for name, one in compared["claims"].items():
        if "at" in one:
            one["at"] = at(f"claims: {name}: at", partial(_point, axes), one["at"])
    _check_names(compared, arms)
    return Sweep(path.stem, arms, axes, found.get("subset_seeds", [0]), compared)


def _inherit(path: Path, sweep: Mapping, arm: str, before: Mapping[str, Arm], own: Mapping) -> Arm:
    """An arm has the sweep's configuration, options and seeds, or those of the arm that it forks, and its own."""
    base, fork = own.get("cfg") or sweep.get("cfg"), None
    parent = Arm(arm, path.parent / (base or ""), sweep.get("options", {}), sweep.get("seeds", [0]), None)
    if "fork" in own:
        fork = own["fork"]["arm"], own["fork"]["epoch"]
        if fork[0] not in before:
            raise InputError(f"fork: arm: {fork[0]!r} must be an arm above ({', '.join(before) or 'there is none'})")
        parent = before[fork[0]]
    elif not base:
        raise InputError("cfg is missing, here and in the sweep: the configuration it starts from")
    cfg = path.parent / own["cfg"] if own.get("cfg") else parent.cfg
    return Arm(arm, cfg, parent.options | own["options"], own.get("seeds", parent.seeds), fork)


def _point(axes: Mapping[str, list], value: Mapping) -> dict[str, Any]:
    if value.keys() <= axes.keys():
        value = {axis: config.parse_option(axis, entry) for axis, entry in value.items()}
        if all(entry in axes[axis] for axis, entry in value.items()):
            return value
    raise ValueError(f"must be {{axis: one of its values}}; the axes are {shown(dict(axes))}")


def _check_names(compared: Mapping[str, Any], arms: Mapping[str, Arm]) -> None:
    claims, terms = compared["claims"].values(), terms_of(compared)
    plain = [compared["against"], compared["waterfall"].get("start"), *(one.get("arm") for one in claims)]
    for arm in (*filter(None, plain), *map(arm_of, terms)):
        if arm not in arms:
            raise InputError(f"{arm!r} is compared and is no arm; there are {', '.join(arms)}")
    for term in terms:
        if measure_of(term) not in MEASURES:
            raise InputError(f"{term!r}: a term is an arm, or arm.{' or arm.'.join(MEASURES)}")


def terms_of(compared: Mapping[str, Any]) -> list[str]:
    """Everything that differences are taken of: an arm, or ``arm.best`` and the like."""
    of_claims = (claim.get("pair", []) for claim in compared["claims"].values())
    return list(itertools.chain(*compared["pairs"], *of_claims, *compared["waterfall"].get("steps", {}).values()))
