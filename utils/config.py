"""Configuration: every option once, with its default; YAML files that inherit; overrides; a frozen result.

Files of MiSLAS and ARBLOSS load unchanged: their switches (``arbloss: True``, ...) are translated here, once, and the
rest of the code sees only the new keys. Precedence, lowest first: defaults, ``_BASE_`` files, the file, the command
line. Only this module knows what a configuration file looks like; only the two scripts read the result.
"""

import ast
import contextlib
import difflib
import itertools
import math
import os
import reprlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from yacs.config import CfgNode

from utils.errors import InputError
from utils.precision import PRECISIONS


class ConfigError(InputError):
    """A configuration that is missing, unreadable, contradictory or out of range."""


class Option(NamedTuple):
    """One row of the table below; ``parse`` returns the checked value or raises ``ValueError`` ("must be ...")."""

    default: Any
    parse: Callable[[Any], Any]
    doc: str


# ---------------------------------------------------------------------------------------------------------------------
# Kinds of value. Each is a function of what YAML gave; the message says what would be right.


def text(value):
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError("must be text (put it in quotes)")
    return value


def folder_path(value):
    """Where something is written: what names it there has to be in UTF-8."""
    if "\0" in text(value) or not _is_utf8(text(value)):
        raise ValueError("must be the path of a folder, in UTF-8")
    return text(value)


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
    """A finite number as float; None for anything else."""
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


def several(kind, increasing: bool = False):
    def parse(value):
        if not isinstance(value, list | tuple):
            raise ValueError("must be a list of values, such as [160, 180]")
        values = [kind(v) for v in value]
        if increasing and any(a >= b for a, b in itertools.pairwise(values)):
            raise ValueError("must increase from value to value")
        return values

    return parse


def optional(kind):
    return lambda value: None if value is None else kind(value)


def flag_or_path(value):
    if isinstance(value, bool) or (isinstance(value, str) and value):
        return value
    raise ValueError("must be True, False or the path of a weights file")


# ---------------------------------------------------------------------------------------------------------------------
# Every option, once.

OPTIONS: dict[str, Option] = {
    # the run
    "name": Option("", folder_name, "name of the run's folder; empty: the file's name"),
    "save_dir": Option("saved", folder_path, "folder that holds the runs' folders"),
    "seed": Option(0, whole(0, 2**63 - 1), "fixes weights, order, crops, flips and mixup"),
    "deterministic": Option(False, flag, "on CUDA: deterministic kernels where they exist (slower)"),
    "device": Option("auto", choice("auto", "cpu", "cuda"), "auto: CUDA where there is one"),
    "workers": Option(4, whole(0), "per node: processes that read and decode images"),
    "print_freq": Option(40, whole(1), "steps from one log line to the next"),
    "eval_every": Option(1, whole(1), "epochs from one evaluation to the next; the last epoch is always evaluated"),
    "eval_last": Option(0, whole(0), "each of the last so many epochs is evaluated too"),
    "keep_epochs": Option(
        [], several(whole(1), increasing=True), "after so many epochs ckps/epoch_<N>.pth.tar is kept, such as [180]"
    ),
    "checkpoint_every_steps": Option(
        0, whole(0), "also keep current.pth.tar this often within an epoch; 0: at its end"
    ),
    "resume": Option(
        "", text, "checkpoint to go on from (ours), or to take weights from (any other); auto: this run's newest"
    ),
    "fork": Option("", text, "checkpoint (ours) whose whole state a new run begins with, for arms that differ late"),
    # what is measured inside the network
    "diagnostics": Option(
        0, whole(0), "attraction and repulsion in every so many-th step (methods/gradients.py); 0: off"
    ),
    "diagnostics_rows": Option(
        None, optional(several(whole(0))), "classifier rows kept in full; null: the rarest, median, most frequent class"
    ),
    "nc_every": Option(0, whole(0), "epochs from one measurement of neural collapse to the next; 0: none"),
    "decompose": Option(False, flag, "eval.py also compares the classifier with others on the same features"),
    # data
    "dataset": Option("cifar10", text, "cifar10, cifar100, imagenet, ina2018, places, digits or folder"),
    "data_path": Option("./data", text, "where the data set lies"),
    "train_txt": Option("", text, "list data sets: the training list; empty: its usual name under data_path"),
    "val_txt": Option("", text, "the same for the list of test images"),
    "class_map": Option(
        "", text, "list data sets: stable, legacy or a file; empty: the checkpoint's, else stable (resume: legacy)"
    ),
    "num_classes": Option(None, optional(whole(1)), "null: what the data set has; otherwise checked against it"),
    "image_size": Option(None, optional(whole(8, 4096)), "side in pixels; null: 224 for list data sets, else 32"),
    "decoder": Option("pil", choice("pil", "fast"), "list data sets: pil, or fast (TorchCodec, else torchvision)"),
    "data_on_device": Option(
        "auto", choice("auto", True, False), "small images live in the device's memory; auto: where they fit into half"
    ),
    "imb_type": Option("exp", choice("exp", "step"), "profile of the class counts after the cut"),
    "imb_factor": Option(None, optional(imbalance), "smallest class / largest class; null: the data set as it is"),
    "subset_seed": Option(0, whole(0, 2**32 - 1), "which images the cut keeps; 0: those of MiSLAS and LDAM-DRW"),
    "val_per_class": Option(
        0, whole(0), "training images per class held out before the cut; they then choose the best"
    ),
    "shots": Option(None, optional(choice("index", "count")), "many/medium/few by; null: count for folder, else index"),
    "head_class_idx": Option(
        None, optional(class_range), "[first, last + 1] of the many-shot classes; null: the data set's"
    ),
    "med_class_idx": Option(None, optional(class_range), "the same for medium-shot classes"),
    "tail_class_idx": Option(None, optional(class_range), "the same for few-shot classes"),
    # model
    "backbone": Option("resnet32", text, "resnet8 ... resnet110 (CIFAR), resnet10 ... resnext101 (torchvision)"),
    "pretrained": Option(None, optional(flag_or_path), "torchvision backbones: True, False, a file; null: places only"),
    "classifier": Option("linear", choice("linear", "cosine", "simplex"), "linear, cosine, or a simplex that is fixed"),
    "cosine_scale": Option(30.0, number(0, above=True), "classifier: cosine multiplies cosines by this"),
    # method
    "loss": Option("ce", text, "ce, arb, focal_arb, weighted_arb, las, logit_adjustment, ... (methods/method.py)"),
    "class_counts": Option("batch", text, "the n of ARB-Loss: global, batch, batch_synced, ... (methods/method.py)"),
    "logit_clamp": Option(30.0, optional(number(0, above=True)), "ARB-Loss clamps logits to +-this; null: eq. 14"),
    "tau": Option(1.0, number(0), "arb and logit_adjustment add tau log n to the logits"),
    "post_hoc_tau": Option(0.0, number(0), "evaluation subtracts this times log(n / N) from the logits; 0: raw logits"),
    "ldam_max_margin": Option(0.5, number(0), "LDAM: margin of the rarest class, as a cosine"),
    "focal_alpha": Option(1.0, number(0, above=True), "focal ARB: -alpha (1 - p)^gamma log p"),
    "focal_gamma": Option(2.0, number(0), "see focal_alpha"),
    "smooth_head": Option(None, optional(number(0, 1)), "label-aware smoothing of the most frequent class"),
    "smooth_tail": Option(None, optional(number(0, 1)), "label-aware smoothing of the rarest class"),
    "smooth_shape": Option("concave", choice("concave", "linear", "convex", "exp"), "from tail to head"),
    "smooth_power": Option(None, optional(number(0, above=True)), "exponent of smooth_shape: exp; null: none"),
    "drw_epoch": Option(
        None, optional(whole(0)), "losses are weighted by class from this epoch (from 0) on; null: never"
    ),
    "drw_beta": Option(0.9999, number(0, 1), "these weights: (1 - beta) / (1 - beta^n)"),
    "nc_within": Option(0.0, number(0), "weight of L_W, which pulls features to class means (methods/regularizers.py)"),
    "nc_between": Option(0.0, number(0), "weight of L_B, which pushes these means apart"),
    "nc_start_epoch": Option(0, whole(0), "both are off before this epoch (from 0)"),
    "nc_means_lr": Option(0.5, number(0, above=True), "learning rate of the class means"),
    "mixup": Option(False, flag, "input mixup"),
    "alpha": Option(1.0, optional(number(0)), "mixup: lambda ~ Beta(alpha, alpha); 0: no mixing"),
    # optimisation
    "num_epochs": Option(200, whole(1), "epochs"),
    "batch_size": Option(128, whole(1), "images per step over all processes"),
    "accumulate": Option(1, whole(1), "passes per step, each over a part of a process's images: for small cards"),
    "precision": Option("fp32", choice(*PRECISIONS), "fp32 (strict), tf32 (CUDA), bf16, fp16; for evaluation too"),
    "compile": Option(False, flag, "torch.compile: faster steps, after a first one that takes a minute"),
    "cuda_graph": Option(True, flag, "on one CUDA device, one pass per step: replay a recorded step; False: eager"),
    "max_grad_norm": Option(None, optional(number(0, above=True)), "longer gradients are scaled to this 2-norm"),
    "sync_bn": Option(False, flag, "batch norm over all processes' images instead of each its own (CUDA only)"),
    "lr": Option(0.1, number(0, above=True), "base learning rate of SGD"),
    "momentum": Option(0.9, number(0, 1), "momentum of SGD"),
    "weight_decay": Option(2e-4, number(0), "weight decay of SGD"),
    "cos": Option(False, flag, "cosine schedule without warm-up, instead of steps"),
    "lr_steps": Option([160, 180], several(whole(0), increasing=True), "epochs (from 0) at which a factor sets in"),
    "lr_step_factors": Option([0.1, 0.01], several(number(0, above=True)), "of the base rate, one per step"),
    "warmup_epochs": Option(5, whole(0), "linear warm-up, step schedule only"),
}

# Keys of MiSLAS and ARBLOSS that say nothing here, with the reason that goes into the log.
OBSOLETE = {
    **dict.fromkeys(
        ["distributed", "gpu", "world_size", "rank", "dist_url", "dist_backend", "multiprocessing_distributed"],
        "the launcher decides",
    ),
    **dict.fromkeys(["mode", "shift_bn", "lr_factor", "train_stage2_instance"], "stage 2 only"),
    **dict.fromkeys(["log_dir", "model_dir"], "a run's folder has one fixed layout"),
}

# Switches of the originals that choose the loss.
LOSS_SWITCHES = {"arbloss": "arb", "warbloss": "weighted_arb", "arbloss_fl": "focal_arb", "LAS": "las"}
# What a new key says, in terms of those switches.
IMPLIED_SWITCHES = {
    "arb": {"arbloss": True},
    "weighted_arb": {"arbloss": True, "warbloss": True},
    "focal_arb": {"arbloss": True, "arbloss_fl": True},
    "las": {"LAS": True},
}
OLD_SWITCHES = (*LOSS_SWITCHES, "arb_loss_use_global_class_cnt", "not_pretrained")


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> CfgNode:
    """The frozen configuration of a YAML file and ``key value`` overrides. Raises :class:`ConfigError`."""
    return read_config(path, overrides)[0]


def read_config(path: str | Path, overrides: Sequence[str] = ()) -> tuple[CfgNode, list[str]]:
    """As :func:`load_config`, with the notes that belong into a run's log (keys ignored, switches translated)."""
    values = {key: option.default for key, option in OPTIONS.items()}
    given: set[str] = set()
    notes: list[str] = []
    switches: dict[str, bool] = {}  # the originals' loss switches, as the sources so far left them
    for where, source in [*_file_sources(Path(path)), ("command line", _pairs(overrides))]:
        parsed = {key: _parse(key, value, where) for key, value in source.items() if known(key, where)}
        notes += _obsolete_notes(where, parsed)
        settings, switches = _translate(parsed, values, switches, where, notes)
        values |= settings
        given |= settings.keys()
    values["name"] = values["name"] or Path(path).stem
    _check_together(values, path)
    if not values["cos"] and "lr_steps" not in given:
        notes.append(
            f"lr_steps is not set: steps at epochs {values['lr_steps']}, as in the paper and MiSLAS "
            "(ARBLOSS's code steps at [160, 240])"
        )
    cfg = CfgNode(values)
    cfg.freeze()
    return cfg, notes


def dump_config(cfg: CfgNode, **changes: Any) -> str:
    """``cfg`` as YAML, with single values replaced; the text alone reproduces the run."""
    return yaml.safe_dump({**cfg, **changes}, sort_keys=False)


def _file_sources(path: Path, seen: tuple[Path, ...] = ()) -> list[tuple[str, dict]]:
    """(file, mapping) pairs of ``path`` and the files it inherits from, the root first."""
    source = _read_yaml(path)
    if path.resolve() in seen:
        raise ConfigError(
            f"{path}: _BASE_ goes round in a loop: {' -> '.join(str(p) for p in (*seen, path.resolve()))}"
        )
    base = source.pop("_BASE_", None)
    if base is None:
        return [(str(path), source)]
    if not isinstance(base, str):
        raise ConfigError(f"{path}: _BASE_ must be the path of one YAML file, relative to this one")
    if not os.path.isfile(path.parent / base):
        raise ConfigError(f"{path}: _BASE_ names {path.parent / base}, which is no file")
    return [*_file_sources(path.parent / base, (*seen, path.resolve())), (str(path), source)]


class RepeatedKey(yaml.constructor.ConstructorError):
    """A mapping has a key twice."""

    def __init__(self, key: object, mark: yaml.Mark):
        super().__init__(None, None, f"key {key!r} is given twice", mark)
        self.key = key


class UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML's safe loader, except that a key given twice is an error and not silently the last one."""

    def construct_mapping(self, node, deep=False):
        merge = "tag:yaml.org,2002:merge"
        nodes = [key for key, _ in node.value if key.tag != merge]
        keys = [self.construct_object(key, deep=True) for key in nodes]
        for number, key in enumerate(keys):
            if key in keys[:number]:
                raise RepeatedKey(key, nodes[number].start_mark)
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict:
    if not os.path.isfile(path):
        raise ConfigError(f"{path}: no such configuration file (give the path of a YAML file, see config/)")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=UniqueKeyLoader)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except Exception as error:  # PyYAML lets through whatever its constructors meet: KeyError, OverflowError, ...
        raise ConfigError(f"{path}: is not YAML: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: must hold a mapping of options (key: value), not {type(content).__name__}")
    return content


def _pairs(overrides: Sequence[str]) -> dict:
    if len(overrides) % 2:
        raise ConfigError(
            "command line: overrides come in pairs, such as 'lr 0.05' or 'lr_steps [10,20]' (quote a list that has "
            f"spaces); '{overrides[-1]}' stands alone"
        )
    pairs = {}
    for key, value in zip(overrides[::2], overrides[1::2], strict=True):
        try:
            if not isinstance(value, str):
                pairs[key] = value
            elif key in OPTIONS and _is_text(OPTIONS[key]):
                pairs[key] = None if value in ("null", "None") else value
            else:
                pairs[key] = yaml.safe_load(value)
        except Exception:  # as in _read_yaml
            raise ConfigError(f"command line: {key}: cannot read the value {value!r}") from None
    return pairs


def _is_text(option: Option) -> bool:
    return option.parse in (text, folder_name, folder_path)


def known(key: Any, where: str) -> bool:
    """Whether there is such a key, which raises :class:`ConfigError` where there is none; ``where``: it was given."""
    if key in (*OPTIONS, *OLD_SWITCHES, *OBSOLETE):
        return True
    near = difflib.get_close_matches(str(key), [*OPTIONS, *OLD_SWITCHES], n=1, cutoff=0.0)
    raise ConfigError(f"{where}: unknown key '{key}'; the nearest known one is '{near[0]}'")


def _parse(key: str, value: Any, where: str) -> Any:
    """The checked value of one key; ``2e-4`` and ``None`` are text to YAML 1.1 and mean a number and null."""
    if key in OBSOLETE:
        return value
    value = _literal(key, value)
    try:
        return _option(key).parse(value)
    except ValueError as error:
        raise ConfigError(f"{where}: {key}: {shown(value)} {error}") from None


def parse_option(key: str, value: Any) -> Any:
    """The checked value of one option, as YAML gave it. Raises ``ValueError`` ("must be ...")."""
    return _option(key).parse(_literal(key, value))


def _option(key: str) -> Option:
    return Option(False, flag, "") if key in OLD_SWITCHES else OPTIONS[key]


def _literal(key: str, value: Any) -> Any:
    """Text as the number, list, ... that it spells; what is no Python literal is plain text, such as a choice."""
    if isinstance(value, str) and not _is_text(_option(key)):
        with contextlib.suppress(ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            return ast.literal_eval(value)
    return value


def shown(value: Any) -> str:
    """``value`` as it was given, cut short: a few aliases in YAML can stand for gigabytes."""
    short = reprlib.Repr()
    short.maxlevel, short.maxstring, short.maxother = 3, 200, 200
    try:
        return short.repr(value)
    except ValueError:  # Python does not print numbers of thousands of digits
        return "a number of thousands of digits"


# ---------------------------------------------------------------------------------------------------------------------
# The originals' switches


def _obsolete_notes(where: str, source: dict) -> list[str]:
    notes = []
    for reason in dict.fromkeys(OBSOLETE.values()):
        keys = [key for key in source if OBSOLETE.get(key) == reason]
        if keys:
            notes.append(f"{where}: ignored {', '.join(keys)} ({reason})")
    return notes


def _translate(
    source: dict, before: dict, switches: dict, where: str, notes: list[str]
) -> tuple[dict, dict[str, bool]]:
    """The new keys that ``source`` sets, its old switches translated, and the loss switches as they stand after it.

    ``before`` and ``switches`` are what earlier sources gave.
    """
    new = {key: value for key, value in source.items() if key in OPTIONS}
    loss, switches = _old_loss(source, before["loss"], switches, where)
    old = {} if loss is None else {"loss": loss}
    if "arb_loss_use_global_class_cnt" in source:
        old["class_counts"] = "global" if source["arb_loss_use_global_class_cnt"] else "batch"
    if source.get("not_pretrained"):
        old["pretrained"] = False
    elif "not_pretrained" in source and (before["pretrained"] is False or new.get("pretrained") is False):
        old["pretrained"] = None  # the data set's habit
    for key, value in old.items():
        given = ", ".join(f"{k}: {v}" for k, v in source.items() if k in OLD_SWITCHES and _sets(k) == key)
        if key in new and new[key] != value:
            raise ConfigError(f"{where}: {given} (read as {key}: {value}) and {key}: {new[key]} disagree; keep one")
        if before[key] != value:
            notes.append(f"{where}: {given} is read as {key}: {value}")
        new[key] = value
    return new, switches


def _sets(switch: str) -> str:
    return {"arb_loss_use_global_class_cnt": "class_counts", "not_pretrained": "pretrained"}.get(switch, "loss")


def _old_loss(source: dict, before: str, switches: dict, where: str) -> tuple[str | None, dict[str, bool]]:
    """(the loss that the originals' switches choose in this source, None where they are silent; all switches after it).

    Switches keep their value from source to source; a new key ``loss`` replaces what earlier sources said of them.
    """
    given = {key: source[key] for key in LOSS_SWITCHES if key in source}
    implied = IMPLIED_SWITCHES.get(source.get("loss"), {})
    if not given:
        return None, implied if "loss" in source else switches
    merged = given if "loss" in source else {**switches, **given}
    # A variant that is chosen here replaces an earlier one; without arbloss there are no variants of it.
    if given.get("arbloss") is False or any(given.get(key) for key in ("warbloss", "arbloss_fl")):
        merged = {key: value for key, value in merged.items() if key in given or key in ("arbloss", "LAS")}
    on = [key for key in LOSS_SWITCHES if merged.get(key)]
    variants = [key for key in on if key != "arbloss"]
    arb = next((key for key in (*on, *implied) if key != "LAS"), None)
    if "LAS" in on and arb:
        raise ConfigError(
            f"{where}: LAS and {arb} cannot both be True: label-aware smoothing over ARB's log-probabilities is "
            "infinite with batch counts (a class absent from the batch has log-probability -inf) and moves decisions "
            "to rare classes with global ones; switch one off"
        )
    if len(variants) > 1:
        raise ConfigError(f"{where}: {' and '.join(variants)} are both True and choose different losses; keep one")
    if on:
        return LOSS_SWITCHES[(variants or on)[0]], merged
    if "loss" not in source:
        return ("ce" if before in LOSS_SWITCHES.values() else before), merged
    wrong = [key for key in given if LOSS_SWITCHES[key] == source["loss"]]
    if wrong:
        raise ConfigError(f"{where}: {wrong[0]}: False and loss: {source['loss']} disagree; keep one")
    return None, implied


# ---------------------------------------------------------------------------------------------------------------------
# Checks that need more than one key


def _check_together(values: dict, path: str | Path) -> None:
    if len(values["lr_steps"]) != len(values["lr_step_factors"]):
        raise ConfigError(
            f"{path}: lr_steps {values['lr_steps']} and lr_step_factors {values['lr_step_factors']} "
            "must have the same length"
        )
    if values["loss"] == "las" and (values["smooth_head"] is None or values["smooth_tail"] is None):
        raise ConfigError(f"{path}: loss: las needs smooth_head and smooth_tail, such as 0.3 and 0.0")
    if values["loss"] == "las" and values["smooth_shape"] == "exp" and values["smooth_power"] is None:
        raise ConfigError(f"{path}: smooth_shape: exp needs smooth_power, such as 2.0")
    if values["mixup"] and values["alpha"] is None:
        raise ConfigError(f"{path}: mixup: True needs alpha, such as 1.0")
    _check_method(values, path)
    ranges = [key for key in ("head_class_idx", "med_class_idx", "tail_class_idx") if values[key] is not None]
    if len(ranges) in (1, 2):
        raise ConfigError(f"{path}: head_class_idx, med_class_idx and tail_class_idx come together; {ranges} alone")


def _check_method(values: dict, path: str | Path) -> None:
    """Losses that read logits of one classifier only, and a regularizer that acts through another."""
    for loss, classifier, why in (
        ("ldam", "cosine", "its margins are taken from cosines"),
        ("dot_regression", "simplex", "it compares features with rows that do not train"),
    ):
        if values["loss"] == loss and values["classifier"] != classifier:
            raise ConfigError(f"{path}: loss: {loss} needs classifier: {classifier}, not {values['classifier']}: {why}")
    if values["nc_between"] > 0 and values["nc_within"] == 0:
        raise ConfigError(
            f"{path}: nc_between needs nc_within, such as 0.01: it moves the class means alone, and features only "
            "through nc_within"
        )
