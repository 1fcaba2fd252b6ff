"""Configuration options: the table of all options, and how YAML files and the command line set them.

Precedence, lowest first: defaults, ``_BASE_`` files, the file, the command line. Files of MiSLAS and ARBLOSS load
unchanged, see :mod:`utils.legacy_config`.
"""

import ast
import contextlib
import difflib
import os
import reprlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from yacs.config import CfgNode

from utils.errors import ConfigError
from utils.legacy_config import OBSOLETE, OLD_SWITCHES, obsolete_notes, translate
from utils.option_checks import check_together, unused
from utils.option_types import (
    PRECISIONS,
    auto_or_folder,
    betas,
    choice,
    class_range,
    epochs_or_fractions,
    flag,
    flag_or_path,
    folder_name,
    folder_path,
    imbalance,
    number,
    optional,
    several,
    text,
    user_path,
    whole,
)


class Option(NamedTuple):
    """One row of ``OPTIONS``."""

    default: Any
    parse: Callable[[Any], Any]  # returns the checked value, or raises ValueError ("must be ...")
    doc: str
    # "data" and "network" cannot change when a run resumes; "incidental" options do not affect what is trained: runs
    # that differ in them alone are the same run for ``resume auto``, forks and sweeps.
    role: str = "training"


SECTIONS: dict[str, dict[str, Option]] = {
    "run": {
        "name": Option("", folder_name, "name of the run's folder; empty: the configuration file's name", "incidental"),
        "save_dir": Option("saved", folder_path, "parent of the runs' folders", "incidental"),
        "seed": Option(0, whole(0, 2**63 - 1), "seed of weights, order, crops, flips and mixup"),
        "deterministic": Option(False, flag, "deterministic CUDA kernels where they exist (slower)"),
        "device": Option("auto", choice("auto", "cpu", "cuda"), "auto: CUDA if available", "incidental"),
        "workers": Option(4, whole(0), "processes per node that read and decode images", "incidental"),
        "print_freq": Option(40, whole(1), "steps between log lines", "incidental"),
        "eval_every": Option(1, whole(1), "epochs between evaluations; the last epoch is always evaluated"),
        "eval_last": Option(0, whole(0), "evaluate each of the last N epochs too"),
        "keep_epochs": Option(
            [], several(whole(1), increasing=True), "epochs after which ckps/epoch_<N>.pth.tar is saved", "incidental"
        ),
        "checkpoint_every_steps": Option(
            0, whole(0), "steps between checkpoints within an epoch; 0: none", "incidental"
        ),
        "resume": Option(
            "",
            user_path,
            "checkpoint to resume; auto: the newest of this run; MiSLAS's or ARBLOSS's: weights only",
            "incidental",
        ),
        "fork": Option("", user_path, "checkpoint (ours) whose full state a new run starts from", "incidental"),
    },
    "diagnostics": {
        "diagnostics": Option(0, whole(0), "steps between measurements of gradient components; 0: off", "incidental"),
        "diagnostics_rows": Option(
            None,
            optional(several(whole(0))),
            "rows recorded in full; null: rarest, median, most frequent",
            "incidental",
        ),
        "nc_every": Option(0, whole(0), "epochs between measurements of neural collapse; 0: off", "incidental"),
        "decompose": Option(
            False, flag, "eval.py: compare the classifier with others on the same features", "incidental"
        ),
    },
    "data": {
        "dataset": Option(
            "cifar10", text, "cifar10, cifar100, imagenet, ina2018, places, digits, folder or lists", "data"
        ),
        "data_path": Option("./data", user_path, "folder of the data set", "incidental"),
        "train_txt": Option("", user_path, "list data sets: training list; empty: its usual name under data_path"),
        "val_txt": Option("", user_path, "list data sets: test list; empty: its usual name under data_path"),
        "test_txt": Option(
            "", user_path, "list data sets: test list; val_txt is then a validation list, for the best epoch"
        ),
        "class_map": Option(
            "",
            user_path,
            "stable, legacy or a file; empty: the checkpoint's (legacy if it has none), else stable",
            "incidental",
        ),
        "num_classes": Option(
            None, optional(whole(1)), "expected number of classes (lists: sets it); null: any", "data"
        ),
        "image_size": Option(
            None, optional(whole(8, 4096)), "pixels per side; null: 224 for list data sets, else 32", "data"
        ),
        "decoder": Option("pil", choice("pil", "fast"), "pil, or fast (TorchCodec, else torchvision)", "incidental"),
        "data_on_device": Option(
            "auto", choice("auto", True, False), "hold images in device memory; auto: if they fit", "incidental"
        ),
        "data_cache": Option(
            "auto",
            auto_or_folder,
            "class folders: folder for decoded images; auto: beside them or in $TMPDIR, if many; False: none",
            "incidental",
        ),
        "imb_type": Option("exp", choice("exp", "step"), "profile of the class counts after subsampling", "data"),
        "imb_factor": Option(None, optional(imbalance), "smallest / largest class; null: no subsampling", "data"),
        "subset_seed": Option(
            0, whole(0, 2**32 - 1), "seed of the subsampling; 0: the images of MiSLAS and LDAM-DRW", "data"
        ),
        "val_per_class": Option(0, whole(0), "training images per class held out to select the best epoch", "data"),
        "shots": Option(
            None,
            optional(choice("index", "count")),
            "many / medium / few by; null: count for folder and lists, else index",
        ),
        "head_class_idx": Option(
            None, optional(class_range), "[first, last + 1] of many-shot classes; null: data set's"
        ),
        "med_class_idx": Option(None, optional(class_range), "likewise, medium-shot"),
        "tail_class_idx": Option(None, optional(class_range), "likewise, few-shot"),
    },
    "model": {
        "backbone": Option(
            "resnet32",
            text,
            "resnet8 ... resnet110 (CIFAR), resnet10 ... resnext101 (torchvision), timm:NAME",
            "network",
        ),
        "pretrained": Option(
            None, optional(flag_or_path), "torchvision's and timm's backbones: True, False or a file; null: places only"
        ),
        "classifier": Option(
            "linear", choice("linear", "cosine", "simplex"), "linear, cosine or fixed simplex", "network"
        ),
        "cosine_scale": Option(30.0, number(0, above=True), "classifier: cosine multiplies cosines by this", "network"),
    },
    "method": {
        "loss": Option("ce", text, "ce, arb, focal_arb, weighted_arb, las, logit_adjustment, ldam, dot_regression"),
        "class_counts": Option(
            "batch", text, "the n of ARB-Loss: batch, global, batch_synced, global_masked, batch_unmasked"
        ),
        "logit_clamp": Option(30.0, optional(number(0, above=True)), "ARB-Loss: clamp logits to +-this; null: eq. 14"),
        "tau": Option(1.0, number(0), "arb and logit_adjustment add tau log n to the logits"),
        "post_hoc_tau": Option(0.0, number(0), "evaluation subtracts this times log(n / N) from the logits"),
        "ldam_max_margin": Option(0.5, number(0), "LDAM: margin of the rarest class, as a cosine"),
        "focal_alpha": Option(1.0, number(0, above=True), "focal ARB: -alpha (1 - p)^gamma log p"),
        "focal_gamma": Option(2.0, number(0), "see focal_alpha"),
        "label_smoothing": Option(0.0, number(0, 1), "ce, arb and logit_adjustment: share of the uniform distribution"),
        "smooth_head": Option(None, optional(number(0, 1)), "label-aware smoothing of the most frequent class"),
        "smooth_tail": Option(None, optional(number(0, 1)), "label-aware smoothing of the rarest class"),
        "smooth_shape": Option("concave", choice("concave", "linear", "convex", "exp"), "smoothing from tail to head"),
        "smooth_power": Option(None, optional(number(0, above=True)), "exponent of smooth_shape: exp"),
        "drw_epoch": Option(None, optional(whole(0)), "deferred re-weighting from this epoch on; null: never"),
        "drw_beta": Option(0.9999, number(0, 1), "class weights of re-weighting: (1 - beta) / (1 - beta^n)"),
        "nc_within": Option(0.0, number(0), "weight of L_W, features to class means (methods/regularizers.py)"),
        "nc_between": Option(0.0, number(0), "weight of L_B, class means apart"),
        "nc_rows": Option(0.0, number(0), "weight of the term that pushes classifier rows apart"),
        "nc_means": Option(0.0, number(0), "weight of the term that pushes moving class means apart"),
        "nc_dual": Option(0.0, number(0), "weight of the term that aligns classifier rows and moving class means"),
        "spa": Option(None, optional(choice("proj", "slerp")), "space alignment of rows to class means; null: off"),
        "spa_gamma": Option(0.6, number(0, 1), "spa: proj keeps this share of the whole gradient"),
        "spa_step": Option(0.02, number(0, 1), "spa: slerp turns rows by up to this share of the angle, per step"),
        "nc_start_epoch": Option(0, whole(0), "first epoch of all nc terms and of spa"),
        "nc_means_lr": Option(0.5, number(0, above=True), "learning rate of the class means of L_W and L_B"),
        "mixup": Option(False, flag, "input mixup"),
        "mix": Option(None, optional(choice("mixup", "cutmix", "cmo")), "how images are mixed; null: as mixup says"),
        "alpha": Option(1.0, optional(number(0)), "mixing: lambda ~ Beta(alpha, alpha); 0: no mixing"),
        "mix_prob": Option(0.5, number(0, 1), "cutmix, cmo: probability that a step mixes"),
        "cmo_alpha": Option(1.0, number(0), "cmo: classes of pasted images are drawn by n^-alpha per image"),
        "cmo_idle": Option(3, whole(0), "cmo: first and last epochs without it"),
    },
    "augmentation": {
        "augment": Option(
            "standard",
            choice("standard", "autoaugment", "randaugment", "trivialaugment"),
            "a policy on top of crops and flips; standard: colour jitter for large images, else none",
        ),
        "num_ops": Option(2, whole(1, 16), "randaugment: operations per image"),
        "magnitude": Option(9, whole(0, 30), "randaugment: their strength"),
        "cutout": Option(0, whole(0), "side in pixels of a square that is cut out of each image; 0: none"),
        "random_erasing": Option(0.0, number(0, 1), "probability that a box is cut out of an image"),
    },
    "optimization": {
        "num_epochs": Option(200, whole(1), "epochs"),
        "batch_size": Option(128, whole(1), "images per step, over all processes"),
        "accumulate": Option(1, whole(1), "micro-batches per step"),
        "precision": Option("fp32", choice(*PRECISIONS), "fp32 (strict), tf32 (CUDA), bf16 or fp16"),
        "compile": Option(False, flag, "torch.compile: faster steps after a first one that takes a minute"),
        "cuda_graph": Option(
            True, flag, "capture the step as a CUDA graph (one device, one micro-batch)", "incidental"
        ),
        "max_grad_norm": Option(None, optional(number(0, above=True)), "clip gradients to this 2-norm; null: off"),
        "sync_bn": Option(False, flag, "batch norm over all processes (CUDA only)"),
        "lr": Option(0.1, number(0, above=True), "base learning rate"),
        "optimizer": Option("sgd", choice("sgd", "adamw"), "sgd or adamw", "network"),
        "betas": Option([0.9, 0.999], betas, "decay of AdamW's averages of the gradient and of its square"),
        "momentum": Option(0.9, number(0, 1), "momentum of SGD"),
        "nesterov": Option(False, flag, "Nesterov's momentum"),
        "sam": Option(0.0, number(0), "sharpness-aware minimisation: radius rho (utils/sam.py); 0: off"),
        "ema": Option(0.0, number(0, 1), "also average the weights, with this decay per step; 0: off"),
        "weight_decay": Option(2e-4, number(0), "weight decay"),
        "cos": Option(False, flag, "cosine schedule, instead of steps"),
        "cos_warmup": Option(False, flag, "warm-up of warmup_epochs before the cosine, too"),
        "lr_steps": Option(
            [160, 180], epochs_or_fractions, "epochs (from 0) of the schedule's steps, or fractions < 1"
        ),
        "lr_step_factors": Option(
            [0.1, 0.01], several(number(0, above=True)), "factors of the base rate, one per step"
        ),
        "warmup_epochs": Option(5, whole(0), "linear warm-up (cos: True only with cos_warmup: True)"),
    },
}
OPTIONS: dict[str, Option] = {key: option for section in SECTIONS.values() for key, option in section.items()}


def with_role(*roles: str) -> tuple[str, ...]:
    """The options that have one of ``roles``, in the table's order."""
    return tuple(key for key, option in OPTIONS.items() if option.role in roles)


FIXED = with_role("data", "network")
INCIDENTAL = with_role("incidental")


def option_help() -> str:
    """List every option with its default and its description, for ``--help``."""
    lines = ["options (in FILE or as key value), with their defaults"]
    for section, options in SECTIONS.items():
        lines += ["", f"{section}:"]
        for key, option in options.items():
            default = "null" if option.default is None else option.default
            lines.append(f"  {key:<24}{default!s:<14}{option.doc}")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> CfgNode:
    """Load a YAML file and ``key value`` overrides as a frozen configuration. Raises :class:`ConfigError`."""
    return read_config(path, overrides)[0]


def read_config(path: str | Path, overrides: Sequence[str] = ()) -> tuple[CfgNode, list[str]]:
    """Like :func:`load_config`; also return notes for the run's log (ignored keys, translated switches)."""
    path = _expanded(path, "--cfg")
    values = {key: option.default for key, option in OPTIONS.items()}
    given: set[str] = set()
    notes: list[str] = []
    switches: dict[str, bool] = {}  # loss switches of MiSLAS and ARBLOSS, as the sources so far left them
    for where, source in [*_file_sources(path), ("command line", _pairs(overrides))]:
        parsed = {key: _parse(key, value, where) for key, value in source.items() if known(key, where)}
        notes += obsolete_notes(where, parsed)
        settings, switches = translate(parsed, values, switches, where, notes)
        values |= settings
        given |= settings.keys()
    values["name"] = values["name"] or path.stem
    check_together(values, path)
    if not values["cos"] and "lr_steps" not in given:
        notes.append(
            f"lr_steps is not set: steps at epochs {values['lr_steps']}, as in the paper and MiSLAS "
            "(ARBLOSS's code steps at [160, 240])"
        )
    notes += [
        f"{key} is not used: {why}"
        for key, why in unused(values)
        if key in given and values[key] != OPTIONS[key].default
    ]
    cfg = CfgNode(values)
    cfg.freeze()
    return cfg, notes


def dump_config(cfg: CfgNode, **changes: Any) -> str:
    """Format ``cfg`` as YAML, with ``changes`` applied; the text alone reproduces the run."""
    return yaml.safe_dump({**cfg, **changes}, sort_keys=False)


def _file_sources(path: Path, seen: tuple[Path, ...] = ()) -> list[tuple[str, dict]]:
    """Return (file, mapping) of ``path`` and of the files that it inherits from, the root first."""
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
    base = path.parent / _expanded(base, f"{path}: _BASE_")
    if not os.path.isfile(base):
        raise ConfigError(f"{path}: _BASE_ names {base}, which is no file")
    return [*_file_sources(base, (*seen, path.resolve())), (str(path), source)]


def _expanded(path: str | Path, where: str) -> Path:
    try:
        return Path(user_path(str(path)))
    except ValueError as error:
        raise ConfigError(f"{where}: {str(path)!r} {error}") from None


class RepeatedKey(yaml.constructor.ConstructorError):
    """A mapping has a key twice."""

    def __init__(self, key: object, mark: yaml.Mark):
        super().__init__(None, None, f"key {key!r} is given twice", mark)
        self.key = key


class UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML's safe loader, except that a repeated key is an error."""

    def construct_mapping(self, node, deep=False):
        merge = "tag:yaml.org,2002:merge"
        nodes = [key for key, _ in node.value if key.tag != merge]
        keys = [self.construct_object(key, deep=True) for key in nodes]
        for i, key in enumerate(keys):
            if key in keys[:i]:
                raise RepeatedKey(key, nodes[i].start_mark)
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict:
    if os.path.isdir(path):
        raise ConfigError(f"{path}: is a folder; give the path of a YAML file, such as {path / 'config.yaml'}")
    if not os.path.isfile(path):
        raise ConfigError(f"{path}: no such configuration file (give the path of a YAML file, see config/)")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=UniqueKeyLoader)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except Exception as error:  # PyYAML's constructors also raise KeyError, OverflowError, ...
        raise ConfigError(f"{path}: is not YAML: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: must hold a mapping of options (key: value), not {type(content).__name__}")
    return content


def _pairs(overrides: Sequence[str]) -> dict:
    if len(overrides) % 2:
        raise ConfigError(
            "command line: overrides come in pairs, such as 'lr 0.05' or 'lr_steps [10,20]' (quote a list that has "
            f"spaces); '{overrides[-1]}' stands alone" + "; write a blank instead of =" * ("=" in overrides[-1])
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
    return option.parse in (text, user_path, folder_name, folder_path)


def known(key: Any, where: str) -> bool:
    """Return True if ``key`` exists, else raise :class:`ConfigError`. ``where`` names its source."""
    if key in (*OPTIONS, *OLD_SWITCHES, *OBSOLETE):
        return True
    near = difflib.get_close_matches(str(key), [*OPTIONS, *OLD_SWITCHES], n=1, cutoff=0.0)
    raise ConfigError(f"{where}: unknown key '{key}'; the nearest known one is '{near[0]}'")


def _parse(key: str, value: Any, where: str) -> Any:
    """Check the value of one key. YAML 1.1 reads ``2e-4`` and ``None`` as text; here they are a number and null."""
    if key in OBSOLETE:
        return value
    value = _literal(key, value)
    try:
        return _option(key).parse(value)
    except ValueError as error:
        raise ConfigError(f"{where}: {key}: {shown(value)} {error}") from None


def parse_option(key: str, value: Any) -> Any:
    """Check a value as YAML gives it. Raises ``ValueError`` ("must be ...")."""
    return _option(key).parse(_literal(key, value))


def _option(key: str) -> Option:
    return Option(False, flag, "") if key in OLD_SWITCHES else OPTIONS[key]


def _literal(key: str, value: Any) -> Any:
    """Evaluate text that is a Python literal (number, list, ...); other text is returned unchanged."""
    if isinstance(value, str) and not _is_text(_option(key)):
        with contextlib.suppress(ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            return ast.literal_eval(value)
    return value


def shown(value: Any) -> str:
    """Format a value for a message, truncated: a few YAML aliases can expand to gigabytes."""
    short = reprlib.Repr()
    short.maxlevel, short.maxstring, short.maxother = 3, 200, 200
    try:
        return short.repr(value)
    except ValueError:  # Python does not print numbers of thousands of digits
        return "a number of thousands of digits"
