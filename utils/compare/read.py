"""Read the folders of runs, and find which runs can be compared.

Legend: N test images, C classes, D features, E epochs, R diagnosed rows, T values of tau.
"""

import contextlib
import json
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from yacs.config import CfgNode

from models.classifier import CLASSIFIERS
from utils.build import groups_of
from utils.checkpoint import AVERAGED, read_checkpoint
from utils.config import read_config, with_role
from utils.errors import InputError
from utils.metrics import GROUPS, class_accuracy, group_calibration
from utils.run.epoch_arrays import read_arrays
from utils.run.folder import read_rows
from utils.run.resume import changed_options
from utils.run.summary import summarise

# Options of a loss, or without effect on training: differences in these do not confound a comparison of losses.
OF_THE_LOSS = {"loss", "class_counts", "logit_clamp", "tau", "shots", "eval_every"}

# What the files hold, see check(). A dict lists keys, optional ones with "?"; the key ``str`` stands for all others. A
# string is an array: its kind, and a letter per axis; equal letters are equal sizes.
NUMBER = int | float | None
TABLE = {str: {str: NUMBER}}
SCORES = {"top1": int | float, "shots": TABLE, "ece_groups?": TABLE, "ece?": NUMBER}
ROW = {
    "epoch": int,
    "lr": int | float,
    "train": {"loss": int | float, "top1": int | float},
    "test?": SCORES,
    "ema?": SCORES,
    "val?": {"top1": int | float},
    "halves?": [int | float],
    "nc?": {str: NUMBER},
}
PREDICTIONS = {"classes": "class N", "confidences": "finite N", "targets": "class N"}
DIAGNOSTICS = {
    "epochs": "count E",
    "rows": "class R",
    "class_counts": "count C",
    "row_norms": "float ERC",
    **dict.fromkeys(("attraction_mass", "repulsion_mass", "repulsion_cosine"), "float EC"),
}
DECOMPOSITION = {
    "tau": {"values": "float T", "top1": "float T", **{f"{group}?": "float T" for group in GROUPS}, "best": "float B"},
    "rows": TABLE,
    "notes?": [str],
}
CHECKPOINT = {
    "class_counts": "count C",
    "class_names?": "text C",
    "state_dict_classifier": {"fc.weight": "finite CD"},
    "fingerprint?": str,
    "environment?": {"processes?": int},
}
KINDS = {"count": "iu", "class": "iu", "float": "iuf", "finite": "iuf", "text": "U"}  # NumPy's kinds of dtypes


@dataclass(frozen=True)
class Run:
    """The content of a run's folder."""

    folder: Path
    cfg: CfgNode
    checkpoint: dict  # the last one, without networks and optimizer
    weight: Tensor  # classifier rows [C, D], as they multiply the features
    rows: list[dict]  # of metrics.jsonl
    groups: dict[str, dict[str, Tensor]]  # rule -> masks [C], the headline rule first
    summaries: dict[str, dict[str, dict]]  # rule -> :func:`utils.run.summary.summarise`, with groups by that rule
    predictions: dict[str, Tensor] | None  # classes, confidences, targets [N] of the last evaluated epoch
    diagnostics: dict[str, NDArray] | None
    decompositions: dict[str, dict]  # checkpoint's name -> decomposition.json

    @property
    def evaluated(self) -> list[dict]:
        return [row for row in self.rows if "test" in row]

    @property
    def class_counts(self) -> Tensor:
        """Training images per class, int64 [C]."""
        return self.checkpoint["class_counts"]

    @property
    def class_names(self) -> list[str]:
        """[C]; the indices for checkpoints of older versions."""
        return self.checkpoint.get("class_names") or [str(index) for index in range(len(self.class_counts))]

    def diagnosed(self) -> list[int]:
        """Rows of the diagnostics, the rarest class first."""
        return sorted(self.diagnostics["rows"].tolist(), key=self.class_counts.tolist().__getitem__)

    def accuracy(self) -> NDArray:
        """Top-1 per class in percent [C], NaN without test images."""
        classes, targets = self.predictions["classes"], self.predictions["targets"]
        return 100 * class_accuracy(classes, targets, len(self.class_counts))[0].numpy()

    def ece_groups(self) -> dict[str, dict[str, float]]:
        """ECE in percent by rule and group; computed from the predictions if the run did not record it."""
        recorded = self.evaluated[-1]["test"].get("ece_groups")
        if recorded is not None or self.predictions is None:
            return recorded or {}
        return group_calibration(*(self.predictions[key] for key in ("confidences", "classes", "targets")), self.groups)


Runs = Mapping[str, Run]  # by label


def read_runs(folders: Sequence[Path]) -> dict[str, Run]:
    """Return label -> run in the order given. Raises :class:`InputError`."""
    resolved = [folder.resolve() for folder in folders]
    for folder, where in zip(folders, resolved, strict=True):
        if resolved.count(where) > 1:
            raise InputError(f"{folder}: is given twice")
    runs = [read_run(folder) for folder in folders]
    candidates = (
        [run.cfg.name for run in runs],
        [f"{run.cfg.name}, seed {run.cfg.seed}" for run in runs],
        [where.name for where in resolved],
        [str(folder) for folder in folders],
    )
    labels = next(labels for labels in candidates if len(set(labels)) == len(runs) and all(labels))
    return dict(zip(labels, runs, strict=True))


def ended_runs(folders: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """Return the runs that have ended, of what a pattern such as ``saved/*`` gave, and why each other one is left out.

    If none has ended, all are kept; so is what does not exist, which :func:`read_run` refuses.
    """
    unfinished = [_unfinished(folder) for folder in folders]
    if all(unfinished):
        return list(folders), []
    kept = [folder for folder, why in zip(folders, unfinished, strict=True) if not why]
    return kept, [f"{folder}: {why}" for folder, why in zip(folders, unfinished, strict=True) if why]


def _unfinished(folder: Path) -> str:
    if not folder.exists():
        return ""
    if not (folder / "config.yaml").is_file():
        return "is not a run's folder"
    try:
        epochs, (cfg, _) = len(_rows(folder / "metrics.jsonl")), read_config(folder / "config.yaml")
    except InputError as error:
        return str(error)
    return f"{epochs} of {cfg.num_epochs} epochs are done" if epochs < cfg.num_epochs else ""


def read_run(folder: Path) -> Run:
    """Read a run's folder. Raises :class:`InputError` naming the file that is missing or damaged."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; a run is a folder such as saved/<name>_<time>")
    if not (folder / "config.yaml").is_file():
        raise InputError(f"{folder}: is not a run's folder, it has no config.yaml")
    cfg, _ = read_config(folder / "config.yaml")
    rows = _rows(folder / "metrics.jsonl")
    evaluated = [row for row in rows if "test" in row]
    if not evaluated:
        raise InputError(f"{folder}: no epoch of this run was evaluated yet; there is nothing to show")
    checkpoint, weight = _checkpoint(folder / "ckps" / "current.pth.tar", cfg)
    groups = groups_of(cfg, checkpoint["class_counts"])
    predictions = _predictions(folder / "predictions", evaluated[-1]["epoch"], len(weight))
    with reading(folder):
        summaries = {rule: _summary(folder, evaluated, rule, masks) for rule, masks in groups.items()}
    diagnostics = _diagnostics(folder / "diagnostics.npz", len(weight))
    others = {path.parent.name: _decomposition(path) for path in sorted(folder.glob("eval/*/decomposition.json"))}
    return Run(folder, cfg, checkpoint, weight, rows, groups, summaries, predictions, diagnostics, others)


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what a damaged file raises into one line that names it."""
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, zipfile.BadZipFile) as error:
        why = " ".join(str(error).split())[:160] or type(error).__name__
        raise InputError(f"{path}: is damaged, or not what this version writes ({why})") from None


def check(value: object, schema: object, sizes: dict[str, int], name: str = "it") -> None:
    """Raise ``ValueError`` unless ``value`` fits the schema. ``sizes`` of axes, which it completes."""
    if isinstance(schema, str):
        _check_array(np.asarray(value), *schema.split(), sizes, name)
    elif isinstance(schema, list):
        check(value, list, sizes, name)
        for entry in value:
            check(entry, schema[0], sizes, name)
    elif isinstance(schema, dict):
        check(value, Mapping, sizes, name)
        for key, part in schema.items():
            if key is str:
                for entry in value:
                    check(value[entry], part, sizes, str(entry))
            elif key.removesuffix("?") in value:
                check(value[key.removesuffix("?")], part, sizes, key.removesuffix("?"))
            elif not key.endswith("?"):
                raise ValueError(f"{key} is missing")
    elif not isinstance(value, schema) or isinstance(value, bool):
        raise ValueError(f"{name} is a {type(value).__name__}")


def _check_array(array: NDArray, kind: str, axes: str, sizes: dict[str, int], name: str) -> None:
    if array.dtype.kind not in KINDS[kind] or array.ndim != len(axes):
        raise ValueError(f"{name} is {array.dtype} {list(array.shape)}, not {kind} [{', '.join(axes)}]")
    for axis, size in zip(axes, array.shape, strict=True):
        if sizes.setdefault(axis, size) != size:
            raise ValueError(f"{name} is {list(array.shape)}, but {axis} is {sizes[axis]}")
    if kind in ("count", "class") and not ((array >= 0) & (array < sizes["C"] if kind == "class" else True)).all():
        raise ValueError(f"{name} has values below 0" + f" or above {sizes['C'] - 1}" * (kind == "class"))
    if kind == "finite" and not np.isfinite(array).all():
        raise ValueError(f"{name} is not finite")


def _rows(path: Path) -> list[dict]:
    with reading(path):
        rows = read_rows(path)
    for number, row in enumerate(rows, 1):
        try:
            check(row, ROW, {})
        except ValueError as error:
            raise InputError(f"{path}, line {number}: is not a row of an epoch ({error}); fix or remove it") from None
    return rows


def _summary(folder: Path, evaluated: Sequence[Mapping], rule: str, masks: Mapping[str, Tensor]) -> dict[str, dict]:
    rows = [row | {key: _by(rule, row[key]) for key in ("test", "ema") if key in row} for row in evaluated]
    return summarise(rows, folder / "predictions", masks)


def _by(rule: str, scores: Mapping) -> dict:
    """``scores`` with many / medium / few by ``rule``."""
    return {key: value for key, value in scores.items() if key not in GROUPS} | scores["shots"].get(rule, {})


def _checkpoint(path: Path, cfg: CfgNode) -> tuple[dict, Tensor]:
    """Return the content without its large parts, and the classifier's rows."""
    content = read_checkpoint(path)
    with reading(path):
        check(content, CHECKPOINT, {})
        state = content["state_dict_classifier"]
        classes, width = state["fc.weight"].shape
        with torch.device("meta"):  # no initialisation: the checkpoint's tensors are assigned
            classifier = CLASSIFIERS[cfg.classifier](width, classes, cfg.cosine_scale)
        classifier.load_state_dict(state, assign=True)
    large = ("state_dict_model", "state_dict_block", "state_dict_classifier", AVERAGED, "optimizer")
    return content | dict.fromkeys(large), classifier.rows().detach()


def _predictions(folder: Path, epoch: int, classes: int) -> dict[str, Tensor] | None:
    files = (folder / "targets.npz", folder / f"{epoch}.npz")
    if not all(file.is_file() for file in files):
        return None
    targets, stored = map(read_arrays, files)
    with reading(files[1]):
        found = {**stored, "targets": targets.get("targets")}
        check(found, PREDICTIONS, {"C": classes})
        kinds = {"classes": np.int64, "confidences": float, "targets": np.int64}
        return {key: torch.from_numpy(found[key].astype(kind)) for key, kind in kinds.items()}


def _diagnostics(path: Path, classes: int) -> dict[str, NDArray] | None:
    if not path.is_file():
        return None
    with reading(path):
        arrays = read_arrays(path)
        check(arrays, DIAGNOSTICS, {"C": classes})
    return arrays if arrays["row_norms"].size else None


def _decomposition(path: Path) -> dict:
    with reading(path):
        content = json.loads(path.read_text(encoding="utf-8"))
        check(content, DECOMPOSITION, {"B": 2})
    return content


def differences(runs: Runs) -> list[str]:
    """Return one line for each way in which the runs' data differ."""
    lines = []
    for key in with_role("data"):
        values = {label: run.cfg.get(key) for label, run in runs.items()}
        if len(set(map(str, values.values()))) > 1:
            lines.append(f"{key} differs ({'; '.join(f'{label}: {value}' for label, value in values.items())})")
    first, reference = next(iter(runs.items()))
    for label, run in runs.items():
        if not lines and not torch.equal(run.class_counts, reference.class_counts):
            lines.append(f"{label} and {first} have different numbers of training images per class")
        hashes = {each.checkpoint.get("fingerprint") for each in (reference, run)} - {None, ""}
        if not lines and len(hashes) > 1:
            lines.append(f"the data of {label} and {first} have different lists or labels")
        tested = [each.predictions["targets"] for each in (reference, run) if each.predictions]
        if len(tested) > 1 and not torch.equal(*tested):
            lines.append(f"{label} and {first} were tested on different images: the labels differ")
    return lines


def loss_pairs(runs: Runs) -> list[tuple[str, str]]:
    """Pair every ARB-Loss run with the cross-entropy run on its data that differs least in other options.

    Returns labels (cross-entropy, ARB-Loss).
    """
    plain, arb = ({label: run for label, run in runs.items() if run.cfg.loss == loss} for loss in ("ce", "arb"))
    pairs = []
    for label, run in arb.items():
        alike = {other: ce for other, ce in plain.items() if not differences({label: run, other: ce})}
        others = {other: len(confounders(run, ce)) for other, ce in alike.items()}
        pairs += [(min(others, key=others.get), label)] if others else []
    return pairs


def confounders(first: Run, second: Run) -> list[str]:
    """Return the options in which two runs differ, except the loss's own, and the number of processes if it differs."""
    options = [key for key in changed_options(first.checkpoint, second.cfg) if key not in OF_THE_LOSS]
    processes = {run.checkpoint.get("environment", {}).get("processes") for run in (first, second)} - {None}
    return [*options, *["number of processes"] * (len(processes) > 1)]
