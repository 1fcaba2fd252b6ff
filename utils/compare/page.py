"""One page for one or many runs: python -m utils.compare RUN [RUN ...] --out page.html

RUN is a run's folder, such as saved/<name>_<time>. The page is one HTML file with its pictures in it; it needs no
network and no JavaScript. What a run did not record is named in one line, with the option that records it. Sentences
beside the pictures follow from the numbers.

Legend: N test images, C classes, D features, E epochs.
"""

import argparse
import base64
import contextlib
import html
import json
import math
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor
from yacs.config import CfgNode

from datasets import find_spec
from methods.neural_collapse import balance_metrics
from utils.checkpoint import read_checkpoint
from utils.command_line import Parser
from utils.config import read_config
from utils.errors import InputError
from utils.files import write_text
from utils.metrics import GROUPS, class_accuracy, group_calibration, group_sizes, shot_groups
from utils.report import plots
from utils.report.text import NPZ_LIMIT, group_line
from utils.run.describe import describe_method, describe_schedule
from utils.run.epoch_arrays import read_arrays
from utils.run.resume import changed_options
from utils.run.summary import summarise

# Runs that differ in one of these were not trained and tested on the same images.
DATA = ("dataset", "num_classes", "image_size", "imb_type", "imb_factor", "subset_seed", "val_per_class")
# What belongs to a loss, or says nothing about training: no reason beside the loss for a difference.
OF_THE_LOSS = {"loss", "class_counts", "logit_clamp", "tau", "shots", "eval_every"}
BALANCE = {
    "b_a": "B_A\n(angles)",
    "b_d": "B_D\n(dot products)",
    "b_d_relative": "B_D\n/ mean ||w||²",
    "b_l": "B_L\n(lengths)",
    "b_l_relative": "B_L\n/ mean ||w||",
    "b_a_as_printed": "B_A\nas printed",
    "b_d_as_printed": "B_D\nas printed",
}
JUDGED = ("b_a", "b_d_relative", "b_l_relative")  # the others follow the scale of the rows, or say the same again
LISTED = 5  # worst and best classes
QUARTER = 4  # sentences on components are about the last quarter of the epochs
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 1120px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.7em; } h2 { font-size: 1.3em; margin-top: 2.2em; border-bottom: 1px solid #ccc; }
h3 { font-size: 1.05em; margin-bottom: .3em; }
table { border-collapse: collapse; margin: .6em 0; font-variant-numeric: tabular-nums; }
th, td { padding: .2em .7em; text-align: right; border-bottom: 1px solid #e2e2e2; vertical-align: top; }
th:first-child, td:first-child, td.text, th.text { text-align: left; }
thead th { border-bottom: 2px solid #888; }
img { max-width: 100%; height: auto; display: block; margin: .5em 0; }
.side { display: flex; flex-wrap: wrap; gap: 0 1.5em; align-items: flex-start; }
.missing { color: #555; font-style: italic; } .finding { background: #eef4fb; padding: .6em .9em; }
.warning { background: #fdf0e3; border-left: 4px solid #d55e00; padding: .5em .9em; }
.note, figcaption { color: #444; font-size: .92em; } figure { margin: 0; max-width: 100%; }
dt { font-weight: 600; } dd { margin: 0 0 .6em 1.5em; } h4 { margin: .6em 0 0; } td + td.text { white-space: nowrap; }
td:first-child { overflow-wrap: anywhere; min-width: 11em; } th { vertical-align: bottom; white-space: pre; }
@media print { body { max-width: none; margin: 0; font-size: 10pt; } figure, table { break-inside: avoid; } }
"""


@dataclass(frozen=True)
class Run:
    """What the folder of a run holds."""

    folder: Path
    cfg: CfgNode
    checkpoint: dict  # the last one, without its networks but for the classifier
    rows: list[dict]  # of metrics.jsonl
    groups: dict[str, dict[str, Tensor]]  # rule -> masks [C], the headline rule first
    predictions: dict[str, NDArray] | None  # classes, confidences, targets [N]; of the last evaluated epoch
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
        """[C]; in older checkpoints, which have none, the indices."""
        return list(self.checkpoint.get("class_names") or map(str, range(len(self.class_counts))))

    @property
    def weight(self) -> Tensor:
        """Classifier rows, [C, D], as they multiply the features."""
        weight = self.checkpoint["state_dict_classifier"]["fc.weight"]
        if self.cfg.classifier != "cosine":
            return weight
        return self.cfg.cosine_scale * torch.nn.functional.normalize(weight, dim=1)


Runs = Mapping[str, Run]  # from label


def main(arguments: Sequence[str] | None = None) -> None:
    args = _arguments(arguments)
    out = Path(args.out)
    if out.is_dir() or not out.parent.is_dir():
        raise InputError(f"--out: {out} is a folder" if out.is_dir() else f"--out: there is no folder {out.parent}")
    runs = read_runs([Path(run) for run in args.runs])
    content = page(runs)
    try:
        write_text(out, content)
    except OSError as error:
        raise InputError(f"--out: {out} cannot be written: {error.strerror}") from None
    print(f"{out}: {', '.join(runs)}; {len(content) / 1e6:.1f} MB")


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    prog = "python -m utils.compare"
    hint = f" (usage: {prog} RUN [RUN ...] --out page.html)"
    parser = Parser(prog=prog, description="One page for one or many runs.", hint=hint)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, such as saved/<name>_<time>")
    parser.add_argument("--out", required=True, metavar="FILE", help="the page, an HTML file")
    return parser.parse_args(arguments)


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read_runs(folders: Sequence[Path]) -> dict[str, Run]:
    """Label -> run, in the order given. Raises :class:`InputError`."""
    resolved = [folder.resolve() for folder in folders]
    for folder, where in zip(folders, resolved, strict=True):
        if resolved.count(where) > 1:
            raise InputError(f"{folder}: is given twice")
    runs = [read_run(folder) for folder in folders]
    kinds = (
        [run.cfg.name for run in runs],
        [f"{run.cfg.name}, seed {run.cfg.seed}" for run in runs],
        [where.name for where in resolved],
        [str(folder) for folder in folders],
    )
    labels = next(kind for kind in kinds if len(set(kind)) == len(runs) and all(kind))
    return dict(zip(labels, runs, strict=True))


def read_run(folder: Path) -> Run:
    """Reads a run's folder. Raises :class:`InputError` where it is none, or where a file in it is damaged."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; a run is a folder such as saved/<name>_<time>")
    if not (folder / "config.yaml").is_file():
        raise InputError(f"{folder}: is no run's folder, it has no config.yaml")
    cfg, _ = read_config(folder / "config.yaml")
    rows = _rows(folder / "metrics.jsonl")
    evaluated = [row["epoch"] for row in rows if "test" in row]
    if not evaluated:
        raise InputError(f"{folder}: no epoch of this run was evaluated yet; there is nothing to show")
    checkpoint = _checkpoint(folder / "ckps" / "current.pth.tar")
    counts = checkpoint["class_counts"]
    ranges = (cfg.head_class_idx, cfg.med_class_idx, cfg.tail_class_idx)
    ranges = find_spec(cfg.dataset).shot_ranges if None in ranges else ranges
    decompositions = {
        path.parent.name: _decomposition(path) for path in sorted(folder.glob("eval/*/decomposition.json"))
    }
    return Run(
        folder,
        cfg,
        checkpoint,
        rows,
        shot_groups(cfg.shots, ranges, counts),
        _predictions(folder / "predictions", evaluated[-1], len(counts)),
        _diagnostics(folder / "diagnostics.npz", len(counts)),
        decompositions,
    )


@contextlib.contextmanager
def _reading(path: Path, remedy: str = "") -> Iterator[None]:
    """Whatever a damaged file raises leaves the block as one line that names it."""
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{path}: is damaged, or not what this version writes ({why}){remedy}") from None


def _rows(path: Path) -> list[dict]:
    """The epochs; a last line that a crash has cut short is left out."""
    rows, lines = [], []
    with _reading(path):
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            if number == len(lines):
                break
            row = None
        if not _is_row(row):
            raise InputError(f"{path}, line {number}: is no row of an epoch; mend it, or remove it")
        rows.append(row)
    return rows


def _is_row(row: object) -> bool:
    """Whether ``row`` has the shape of an epoch, with numbers where the page wants some."""
    if not (isinstance(row, dict) and {"epoch", "lr", "train"} <= row.keys() and _numbers_only(row)):
        return False
    parts = [row.get(key, {}) for key in ("train", "test", "nc")]
    if not all(isinstance(part, dict) for part in parts):
        return False
    by_rule = [table for key in ("ece_groups", "shots") for table in [parts[1].get(key, {})]]
    by_rule += [part for table in by_rule if isinstance(table, dict) for part in table.values()]
    return type(row["epoch"]) is int and row["lr"] is not None and all(isinstance(part, dict) for part in by_rule)


def _numbers_only(value: object) -> bool:
    """Whether all that containers hold are numbers, or None in place of one."""
    if isinstance(value, dict | list):
        return all(map(_numbers_only, value.values() if isinstance(value, dict) else value))
    return value is None or isinstance(value, int | float)


def _checkpoint(path: Path) -> dict:
    content = read_checkpoint(path)
    kept = {key: value for key, value in content.items() if key not in ("state_dict_model", "state_dict_block")}
    kept["optimizer"] = {}  # several times the network
    with _reading(path):
        counts, weight = kept["class_counts"], kept["state_dict_classifier"]["fc.weight"]
        if weight.ndim != 2 or counts.shape != (len(weight),):
            raise ValueError(f"class_counts {tuple(counts.shape)} do not go with a classifier {tuple(weight.shape)}")
        if counts.dtype != torch.int64 or (counts < 0).any() or not weight.isfinite().all():
            raise ValueError("its class_counts are no numbers of images, or its classifier is not finite")
        if not isinstance(kept.get("fingerprint", ""), str):
            raise ValueError("its fingerprint is no text")
        if len(kept.get("class_names") or counts) != len(counts):
            raise ValueError("it has another number of class_names than of classes")
    return kept


def _predictions(folder: Path, epoch: int, classes: int) -> dict[str, NDArray] | None:
    files = (folder / f"{epoch}.npz", folder / "targets.npz")
    if not all(file.is_file() for file in files):
        return None
    with _reading(files[1]):
        targets = read_arrays(files[1])["targets"]
    with _reading(files[0]):
        stored = read_arrays(files[0])
        found = {"classes": stored["classes"], "targets": targets, "confidences": stored["confidences"]}
        found = {key: values.astype(float if key == "confidences" else np.int64) for key, values in found.items()}
        if not ((found["confidences"] >= 0) & (found["confidences"] <= 1)).all():
            raise ValueError("confidences that are not in 0 to 1")
        if len({values.shape for values in found.values()}) > 1 or targets.ndim != 1:
            raise ValueError("there are more or fewer predictions than targets")
        for key in ("classes", "targets"):
            if found[key].min() < 0 or found[key].max() >= classes:
                raise ValueError(f"{key} that are not in 0 to {classes - 1}")
    return found


def _diagnostics(path: Path, classes: int) -> dict[str, NDArray] | None:
    if not path.is_file():
        return None
    with _reading(path, "; without this file the page leaves out the components"):
        found = read_arrays(path)
        for key in ("epochs", "rows", "class_counts"):
            found[key] = found[key].astype(np.int64, casting="safe")
        for key in ("row_norms", "attraction_mass", "repulsion_mass", "repulsion_cosine"):
            found[key] = found[key].astype(float)
        if (
            found["epochs"].ndim != 1
            or found["rows"].ndim != 1
            or len(set(found["rows"].tolist())) < len(found["rows"])
        ):
            raise ValueError("its epochs or its rows are no lists, or a row is there twice")
        epochs, rows = len(found["epochs"]), len(found["rows"])
        shapes = {"row_norms": (epochs, rows, classes), "class_counts": (classes,)}
        shapes |= dict.fromkeys(("attraction_mass", "repulsion_mass", "repulsion_cosine"), (epochs, classes))
        for key, shape in shapes.items():
            if found[key].shape != shape:
                raise ValueError(f"{key} has the shape {found[key].shape} instead of {shape}")
        if rows and (found["rows"].min() < 0 or found["rows"].max() >= classes):
            raise ValueError(f"rows that are not in 0 to {classes - 1}")
    return found if epochs and rows else None


def _decomposition(path: Path) -> dict:
    with _reading(path):
        found = json.loads(path.read_text(encoding="utf-8"))
        tau = found["tau"]
        lengths = {len(tau[key]) for key in ("values", "top1", *GROUPS) if tau.get(key) is not None}
        if len(lengths) != 1 or not all(isinstance(row, dict) for row in found["rows"].values()):
            raise ValueError("its lists differ in length, or its rows are none")
        if len(tau["best"]) != 2 or not _numbers_only([tau, found["rows"]]):
            raise ValueError("its values are no numbers, or there are not two best taus")
    return found


# ---------------------------------------------------------------------------------------------------------------------
# The page


class Section(NamedTuple):
    """A part of the page; the body is HTML."""

    name: str
    title: str
    body: str


def page(runs: Runs) -> str:
    """The whole page as HTML."""
    sections = [
        Section("results", "Results", results(runs)),
        Section("classes", "Accuracy per class", accuracy_per_class(runs)),
        Section("confusion", "Confusion", confusion(runs)),
        Section("calibration", "Calibration", calibration(runs)),
        Section("similarity", "Similarity of classifier rows (Fig. 4)", similarity(runs)),
        Section("components", "Attraction and repulsion on a row (Fig. 5)", components(runs)),
        Section("collapse", "Neural collapse", collapse(runs)),
        Section("learning", "Learning curves", learning(runs)),
        Section("decomposition", "Representation or classifier", decomposition(runs)),
    ]
    title = f"{len(runs)} runs side by side" if len(runs) > 1 else f"Report of {next(iter(runs))}"
    contents = "".join(f'<li><a href="#{part.name}">{text(part.title)}</a></li>' for part in sections)
    parts = "".join(f'<section id="{part.name}"><h2>{text(part.title)}</h2>{part.body}</section>' for part in sections)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{text(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<style>{STYLE}</style></head><body><h1>{text(title)}</h1>"
        f"{described(runs)}{warnings(runs)}<nav><ol>{contents}</ol></nav>{parts}</body></html>\n"
    )


def described(runs: Runs) -> str:
    """How each run was trained."""
    rows = []
    for label, run in runs.items():
        done, cfg = run.rows[-1]["epoch"] + 1, run.cfg
        short = "" if done == cfg.num_epochs else f"; so far {done} of {cfg.num_epochs} epochs"
        words = f"{describe_method(cfg)}; {cfg.backbone}; {describe_schedule(cfg)}"
        rows.append((label, f"{words}; seed {cfg.seed}, subset seed {cfg.subset_seed}{short}", run.folder))
    lines = (
        f"<dt>{text(label)}</dt><dd>{text(words)}<br><code>{text(folder)}</code></dd>" for label, words, folder in rows
    )
    return f"<dl>{''.join(lines)}</dl>"


def warnings(runs: Runs) -> str:
    """Why these runs are not to be compared, if they are not."""
    return "".join(f'<p class="warning">Not comparable: {text(line)}.</p>' for line in differences(runs))


def differences(runs: Runs) -> list[str]:
    """One line for everything in which the runs' data differ."""
    lines = []
    for key in DATA:
        values = {label: run.cfg.get(key) for label, run in runs.items()}
        if len(set(map(str, values.values()))) > 1:
            lines.append(f"{key} differs ({'; '.join(f'{label}: {value}' for label, value in values.items())})")
    first = next(iter(runs.values()))
    for label, run in runs.items():
        if not lines and not torch.equal(run.class_counts, first.class_counts):
            lines.append(f"{label} has other numbers of training images per class than {next(iter(runs))}")
        marks = [each.checkpoint.get("fingerprint") for each in (first, run)]
        if not lines and all(marks) and marks[0] != marks[1]:
            lines.append(f"the data of {label} are not those of {next(iter(runs))}: lists or labels differ")
        tested = [None if each.predictions is None else each.predictions["targets"] for each in (first, run)]
        if tested[0] is not None and tested[1] is not None and not np.array_equal(*tested):
            lines.append(f"{label} was tested on other images than {next(iter(runs))}: the labels differ")
    return lines


# ---------------------------------------------------------------------------------------------------------------------
# Sections on predictions


def results(runs: Runs) -> str:
    """The three numbers of every run, with groups by every rule; and the last epoch's worst and best classes."""
    rules = list(dict.fromkeys(rule for run in runs.values() for rule in run.groups))
    rows = []
    for label, run in runs.items():
        with _reading(run.folder, "; its metrics.jsonl or predictions do not hold what the table needs"):
            by_rule = {rule: _summary(run, rule) for rule in run.groups}
        for choice, found in next(iter(by_rule.values())).items():
            epochs = ", ".join(str(epoch) for epoch in dict.fromkeys(found["epochs"]))
            groups = [by_rule.get(rule, {}).get(choice, {}).get(group) for rule in rules for group in GROUPS]
            rows.append([label, choice, epochs, *map(number, [found.get("top1"), *groups, found.get("ece")])])
    head = ["run", "choice", "epoch", "top-1", *(f"{group}\n({rule})" for rule in rules for group in GROUPS), "ECE"]
    sizes = {label: group_line(group_sizes(run.groups)) for label, run in runs.items()}
    said = set(sizes.values())
    lines = said if len(said) == 1 else [f"{label}: {line}" for label, line in sizes.items()]
    return (
        table(head, rows, words=(0, 1))
        + note(
            "In percent. Last epoch; the best epoch, chosen and scored on different halves of the test set, both ways; "
            "the best epoch on the test set, which that set has chosen. Groups are means over classes, by index ranges "
            "or by training images (many > 100, medium 20 to 100, few < 20); a value that does not exist is -."
        )
        + "".join(map(note, lines))
        + extremes(runs)
    )


def _summary(run: Run, rule: str) -> dict[str, dict]:
    """:func:`summarise` with many / medium / few by ``rule``."""
    rows = []
    for row in run.evaluated:
        whole = {key: value for key, value in row["test"].items() if key not in GROUPS}
        rows.append(row | {"test": whole | row["test"]["shots"].get(rule, {})})
    return summarise(rows, run.folder / "predictions", run.groups[rule])


def extremes(runs: Runs) -> str:
    """Worst and best classes of the last evaluated epoch."""
    tables = []
    for label, run in runs.items():
        if run.predictions is None:
            tables.append(missing(_no_predictions(label)))
            continue
        accuracy = _accuracy(run)
        counts, names = run.class_counts.numpy(), run.class_names
        tested = np.flatnonzero(~np.isnan(accuracy))
        worst = tested[np.lexsort((counts[tested], accuracy[tested]))]  # of equals the rarest first
        shown = min(LISTED, -(-len(worst) // 2))
        kinds = {"worst": worst[:shown], "best": worst[::-1][:shown]}
        rows = [
            [names[i], kind, f"{counts[i]:,}", number(accuracy[i])] for kind, chosen in kinds.items() for i in chosen
        ]
        head = ["class", "", "training images", "top-1 (%)"]
        title = f"{label}, epoch {run.evaluated[-1]['epoch']}"
        tables.append(f"<div><h4>{text(title)}</h4>{table(head, rows, words=(0, 1))}</div>")
    return f'<h3>Worst and best classes</h3><div class="side">{"".join(tables)}</div>'


def accuracy_per_class(runs: Runs) -> str:
    """Accuracy over class counts, all runs in one picture."""
    shown = {label: run for label, run in runs.items() if run.predictions is not None}
    body = "".join(missing(_no_predictions(label)) for label in runs if label not in shown)
    if shown:
        data = {label: (run.class_counts.numpy(), _accuracy(run)) for label, run in shown.items()}
        caption = "Last evaluated epoch; the number of training images on a logarithmic axis."
        if max(len(run.class_counts) for run in shown.values()) > 30:
            caption += " Lines: means over classes of similar counts."
        body += picture(
            plots.class_accuracy_figure(data), f"Top-1 per class over training images: {', '.join(shown)}", caption
        )
    return body


def confusion(runs: Runs) -> str:
    """A confusion matrix for every run."""
    body, drawn = "", ""
    for label, run in runs.items():
        if run.predictions is None:
            body += missing(_no_predictions(label))
            continue
        found, rule = run.predictions, next(iter(run.groups))
        figure = plots.confusion_figure(
            found["classes"], found["targets"], run.class_counts, run.class_names, run.groups[rule], title=label
        )
        caption = f"Rows: true classes, most frequent first. Where there are borders: many, medium, few by {rule}."
        classes = len(run.class_counts)
        if classes > plots.CELLS:
            caption += (
                f" {plots.BINS} groups of {classes:,} classes with neighbouring ranks; a cell is the share of the row "
                "group's images that are predicted in the column group."
            )
        drawn += picture(figure, f"Confusion matrix of {label}", caption)
    return body + f'<div class="side">{drawn}</div>'


def calibration(runs: Runs) -> str:
    """Reliability diagrams, and ECE over all and per group."""
    rules = list(dict.fromkeys(rule for run in runs.values() for rule in run.groups))
    rows, drawn, body = [], "", ""
    for label, run in runs.items():
        groups = _ece_groups(run)
        whole = run.evaluated[-1]["test"].get("ece")
        cells = [groups.get(rule, {}).get(group) for rule in rules for group in GROUPS]
        rows.append([label, *map(number, [whole, *cells])])
        if run.predictions is None:
            body += missing(_no_predictions(label))
            continue
        found = run.predictions
        figure = plots.reliability_figure(found["confidences"], found["classes"], found["targets"], label)
        drawn += picture(figure, f"Reliability diagram of {label}", "15 bins; below, the share of images in each.")
    head = [
        "ECE (%)\nof the last evaluated epoch",
        "all",
        *(f"{group}\n({rule})" for rule in rules for group in GROUPS),
    ]
    return f'{table(head, rows)}{body}<div class="side">{drawn}</div>'


def _accuracy(run: Run) -> NDArray:
    """Top-1 per class in percent [C], NaN without test images."""
    classes, targets = (torch.from_numpy(run.predictions[key]) for key in ("classes", "targets"))
    return 100 * class_accuracy(classes, targets, len(run.class_counts))[0].numpy()


def _ece_groups(run: Run) -> dict[str, dict[str, float]]:
    """ECE in percent by rule and group; of runs that did not record it, from the predictions."""
    recorded = run.evaluated[-1]["test"].get("ece_groups")
    if recorded is not None or run.predictions is None:
        return recorded or {}
    arrays = (torch.from_numpy(run.predictions[key]) for key in ("confidences", "classes", "targets"))
    return group_calibration(*arrays, run.groups)


def _no_predictions(label: str) -> str:
    return f"{label}: no predictions of the last evaluated epoch; they are kept for test sets of at most {NPZ_LIMIT:,}"


# ---------------------------------------------------------------------------------------------------------------------
# Sections on geometry and gradients


def similarity(runs: Runs) -> str:
    """Fig. 4, its balance metrics, and what they say."""
    figure = plots.similarity_figure({label: (run.weight, run.class_counts) for label, run in runs.items()})
    caption = (
        "M_ij = w_i·w_j / sum over k ≠ i of w_i·w_k, times C - 1, so that the ideal is 1 everywhere off the diagonal; "
        "one colour scale for all runs. The definition means negative dot products: a row whose sum is positive or "
        f"nearer to 0 than {plots.LEAST:g} ||w_i||² is grey, as its signs are turned round or its size says nothing."
    )
    if max(len(run.class_counts) for run in runs.values()) > plots.CELLS:
        caption += (
            f" Beyond {plots.CELLS} classes a cell is a mean over {plots.BINS} groups of neighbours in frequency."
        )
    balance = {label: balance_metrics(run.weight) for label, run in runs.items()}
    rows = [[label, *(number(found.get(key), 4) for key in BALANCE)] for label, found in balance.items()]
    return (
        picture(figure, f"Similarity of classifier rows: {', '.join(runs)}", caption)
        + table(["balance metric (ideal 0)", *BALANCE.values()], rows)
        + finding(similarity_sentence(runs, balance))
    )


def similarity_sentence(runs: Runs, balance: Mapping[str, Mapping[str, float]]) -> str:
    """What Fig. 4 shows, from the numbers: whose balance metrics are smaller, and how far M is from its ideal."""
    spread, whole, ranges, pairs, words = {}, set(), [], compared(runs), []
    for label, run in runs.items():
        found = plots.row_similarity(run.weight, run.class_counts)
        cells = found.cells[~np.isnan(found.cells)]
        if len(cells):
            low, high = np.percentile(cells, [5, 95])
            spread[label] = high - low
            if not found.undefined:
                whole.add(label)
            ranges.append(f"90 % of the cells of {label} lie between {low:.2f} and {high:.2f} times the ideal")
        if found.undefined:
            rows = f"{found.undefined:,} of the {len(run.class_counts):,} rows of {label}"
            ranges.append(f"M is not drawn for {rows}, whose dot products are not clearly negative in sum")
    for plain, arb in pairs:
        smaller = sum(balance[arb][key] < balance[plain][key] for key in JUDGED)
        if all(balance[arb][key] == balance[plain][key] for key in JUDGED):
            words.append(f"the balance metrics of {arb} and {plain} are equal")
        else:
            words.append(
                f"under ARB-Loss ({arb}) {smaller} of the {len(JUDGED)} balance metrics that no scale changes (B_A and "
                f"the relative B_D and B_L) are smaller than under cross-entropy ({plain}), which "
                f"{agreement(smaller, len(JUDGED))} the paper, by which ARB-Loss balances the rows"
            )
        if {plain, arb} <= whole and not math.isclose(spread[arb], spread[plain], rel_tol=1e-3):
            nearer = arb if spread[arb] < spread[plain] else plain
            words.append(f"in the picture the cells of {nearer} lie closer together")
        words += confounded(runs, plain, arb)
    return sentence([*words, *ranges, *([] if pairs else [NO_PAIR])])


NO_PAIR = "there is no cross-entropy run with an ARB-Loss run on the same data here, so nothing is said of the paper"


def compared(runs: Runs) -> list[tuple[str, str]]:
    """(cross-entropy, ARB-Loss) for every ARB-Loss run, with the cross-entropy run on its data that is most like it."""
    found = []
    for label, run in runs.items():
        others = {
            other: plain
            for other, plain in runs.items()
            if plain.cfg.loss == "ce" and not differences({label: run, other: plain})
        }
        if run.cfg.loss == "arb" and others:
            found.append((min(others, key=lambda other: len(beside_the_loss(run, others[other]))), label))
    return found


def beside_the_loss(first: Run, second: Run) -> list[str]:
    """Options, other than the loss's own, in which two runs differ; and whether other shares make their batches."""
    options = [key for key in changed_options(first.checkpoint, second.cfg) if key not in OF_THE_LOSS]
    processes = {(run.checkpoint.get("environment") or {}).get("processes") for run in (first, second)} - {None}
    return [*options, *["number of processes"] * (len(processes) > 1)]


def confounded(runs: Runs, plain: str, arb: str) -> list[str]:
    """A clause where the loss is not all in which two runs differ."""
    others = beside_the_loss(runs[arb], runs[plain])
    return [f"the two differ in {', '.join(others)} too, so it is not the loss alone"] if others else []


def agreement(held: int, of: int) -> str:
    """In words: how many of the paper's statements hold."""
    if held == of:
        return "agrees with"
    return "does not agree with" if held == 0 else f"agrees in part ({held} of {of}) with"


def sentence(clauses: Sequence[str]) -> str:
    """One sentence."""
    whole = "; ".join(clauses) + "."
    return whole[0].upper() + whole[1:]


class RowNumbers(NamedTuple):
    """Means over the last quarter of the epochs, on one classifier row."""

    attraction: float  # norm
    repulsion: float  # sum of norms
    ratio: float  # largest over smallest repulsion component; infinite where the smallest is 0
    frequent: float  # share of the more frequent half of the other classes in it; a class in the middle is left out
    attraction_mass: float
    repulsion_mass: float
    cosine: float = math.nan  # mean between the repulsion of two classes


def row_numbers(diagnostics: Mapping[str, NDArray], row: int) -> RowNumbers:
    """``diagnostics``: see :func:`read_run`; ``row``: one of its "rows"."""
    late = slice(-math.ceil(len(diagnostics["epochs"]) / QUARTER), None)
    place = diagnostics["rows"].tolist().index(row)
    norms = diagnostics["row_norms"][late, place].astype(float).mean(axis=0)  # [C]
    order = np.argsort(-diagnostics["class_counts"], kind="stable")
    others = norms[order[order != row]]  # [C - 1], of the most frequent class first
    half = len(others) // 2
    frequent, rare, least = others[:half].sum(), others[len(others) - half :].sum(), others.min()
    return RowNumbers(
        float(norms[row]),
        float(others.sum()),
        float(others.max() / least) if least > 0 else math.inf,
        float(frequent / (frequent + rare)) if frequent + rare > 0 else math.nan,
        float(diagnostics["attraction_mass"][late, row].mean()),
        float(diagnostics["repulsion_mass"][late, row].mean()),
        float(diagnostics["repulsion_cosine"][late, row].mean()),
    )


def components(runs: Runs) -> str:
    """Fig. 5 on the rarest of the chosen rows, what it says, and smaller pictures of the other rows."""
    shown = {label: run for label, run in runs.items() if run.diagnostics is not None}
    body = "".join(
        missing(f"{label}: no row in diagnostics.npz; training with `diagnostics: N` records some every N steps")
        for label in runs
        if label not in shown
    )
    if not shown:
        return body
    rarest = {label: min(chosen_rows(run), key=lambda row: run.class_counts[row]) for label, run in shown.items()}
    numbers = {label: row_numbers(run.diagnostics, rarest[label]) for label, run in shown.items()}
    body += picture(_components(shown, rarest, 4.6), _components_alt(shown, rarest), _components_caption(shown))
    body += components_table(numbers) + finding(components_sentence(shown, rarest, numbers))
    taken = set(rarest.values())
    rest = dict.fromkeys(row for run in shown.values() for row in chosen_rows(run) if row not in taken)
    if rest:
        body += "<h3>Other rows</h3>"
    for row in rest:
        here = {label: row for label, run in shown.items() if row in chosen_rows(run)}
        body += picture(_components(shown, here, 3.4), _components_alt(shown, here), "")
    return body


def chosen_rows(run: Run) -> list[int]:
    return run.diagnostics["rows"].tolist()


def _components(runs: Runs, rows: Mapping[str, int], height: float) -> Figure:
    data = {}
    for label, row in rows.items():
        run = runs[label]
        norms = run.diagnostics["row_norms"][:, chosen_rows(run).index(row)]
        groups = next(iter(run.groups.values()))
        data[label] = plots.Components(
            run.diagnostics["epochs"], norms, row, run.class_counts.numpy(), run.class_names, groups
        )
    return plots.components_figure(data, height)


def _components_alt(runs: Runs, rows: Mapping[str, int]) -> str:
    what = "; ".join(f"{label}, class {runs[label].class_names[row]}" for label, row in rows.items())
    return f"Gradient components on a classifier row over the epochs: {what}"


def _components_caption(runs: Runs) -> str:
    windows = sorted({plots.smoothing_window(len(run.diagnostics["epochs"])) for run in runs.values()})
    soft = f"curves are centred means over {' or '.join(map(str, windows))} epochs, faint ones the values themselves"
    return (
        "What the samples of each class put on the row's gradient in a batch, mean over the epoch's diagnosed batches; "
        + (soft if windows != [1] else "not smoothed, with so few epochs")
        + ". Attraction, dashed, comes from the row's own class, repulsion from the others."
    )


def components_table(numbers: Mapping[str, RowNumbers]) -> str:
    """``numbers`` by label."""
    head = ["last quarter of the epochs,\nrow of the picture above", "attraction\n(norm)", "repulsion\n(sum of norms)"]
    head += ["largest / smallest\nrepulsion", "share of the\nfrequent half (%)", "attraction\nmass", "repulsion\nmass"]
    head += ["cosine between\nrepulsions"]
    rows = []
    for label, now in numbers.items():
        masses = (number(now.attraction_mass, 3), number(now.repulsion_mass, 3))
        norms = (number(now.attraction, 3), number(now.repulsion, 3), number(now.ratio, 1))
        rows.append([label, *norms, number(100 * now.frequent, 1), *masses, number(now.cosine, 3)])
    return table(head, rows)


def components_sentence(runs: Runs, rows: Mapping[str, int], numbers: Mapping[str, RowNumbers]) -> str:
    """What Fig. 5 shows in the last quarter of the epochs, and which of the paper's statements it bears out."""
    pairs = [(plain, arb) for plain, arb in compared(runs) if rows[plain] == rows[arb]]
    words = []
    for plain, arb in pairs:
        words += [*claims(plain, numbers[plain], arb, numbers[arb]), *confounded(runs, plain, arb)]
    for label, now in numbers.items():
        if label not in {name for pair in pairs for name in pair}:
            words.append(f"in {label} the repulsion norms add up to {_times(now)} the attraction's")
    return "In the last quarter of the epochs: " + "; ".join([*words, *([] if pairs else [NO_PAIR])]) + "."


def claims(plain: str, before: RowNumbers, arb: str, after: RowNumbers) -> list[str]:
    """The paper's three statements on a rare row, held against the numbers of cross-entropy and of ARB-Loss."""
    even = _distance(after) < _distance(before)
    held, words = [even], []
    if math.isfinite(before.frequent):  # there are two other classes at least
        dominated, alike = before.frequent > 0.5, after.ratio < before.ratio
        held += [dominated, alike]
        words = [
            f"under cross-entropy ({plain}) the more frequent half of the other classes has "
            f"{number(100 * before.frequent, 1)} % of the repulsion, which is {'' if dominated else 'not '}the larger "
            "part",
            f"under ARB-Loss ({arb}) the largest repulsion is {_ratio(after.ratio)} the smallest, against "
            f"{_ratio(before.ratio)} it, so the components are {'more' if alike else 'not more'} alike",
        ]
    return [
        *words,
        f"the repulsion norms add up to {_times(after)} the attraction's, against {_times(before)}, so the two are "
        f"{'closer' if even else 'not closer'} to each other",
        f"this {agreement(sum(held), len(held))} the paper, by which frequent classes dominate a rare row under "
        "cross-entropy and ARB-Loss balances attraction and repulsion",
    ]


def _ratio(value: float) -> str:
    return f"{value:.3g} times" if math.isfinite(value) else "infinitely many times"


def _times(found: RowNumbers) -> str:
    return _ratio(found.repulsion / found.attraction if found.attraction > 0 else math.inf)


def _distance(found: RowNumbers) -> float:
    """Between summed repulsion and attraction, in the logarithm; infinite where one is 0."""
    if found.repulsion <= 0 or found.attraction <= 0:
        return math.inf
    return abs(math.log(found.repulsion / found.attraction))


def collapse(runs: Runs) -> str:
    """Neural-collapse metrics over the epochs."""
    body, data = "", {}
    for label, run in runs.items():
        rows = [row for row in run.rows if isinstance(row.get("nc"), dict)]
        if not rows:
            body += missing(f"{label}: no neural-collapse metrics; training with `nc_every: N` measures them")
            continue
        keys = dict.fromkeys(key for row in rows for key in row["nc"])
        data[label] = {key: np.array([row["nc"].get(key) for row in rows], dtype=float) for key in keys}
        data[label]["epochs"] = np.array([row["epoch"] for row in rows])
    if data:
        caption = (
            "On training images without augmentation; NC1 on a logarithmic axis. 0 is collapse. Where counts differ, "
            "nothing is at distance 0 from both the simplex and SELI, which is cross-entropy's own optimum then."
        )
        body += picture(plots.collapse_figure(data), f"Neural collapse over the epochs: {', '.join(data)}", caption)
    return body


# ---------------------------------------------------------------------------------------------------------------------
# Sections on training and on post-hoc classifiers


def learning(runs: Runs) -> str:
    """Loss and accuracy over the epochs."""
    data = {}
    for label, run in runs.items():
        with _reading(run.folder / "metrics.jsonl"):
            data[label] = {
                "epochs": [row["epoch"] for row in run.rows],
                "loss": [row["train"]["loss"] for row in run.rows],
                "train_top1": [row["train"]["top1"] for row in run.rows],
                "lr": [row["lr"] for row in run.rows],
                "test_epochs": [row["epoch"] for row in run.evaluated],
                "test_top1": [row["test"]["top1"] for row in run.evaluated],
            }
    caption = "Losses of different methods are different functions. Under mixup, hits are counted on unmixed labels."
    return picture(plots.learning_figure(data), f"Loss and top-1 over the epochs: {', '.join(runs)}", caption)


def decomposition(runs: Runs) -> str:
    """What eval.py found with other classifiers on the same features."""
    body, rows, curves = "", [], {}
    for label, run in runs.items():
        if not run.decompositions:
            body += missing(f"{label}: no decomposition; `eval.py ... decompose True` writes it")
        for checkpoint, found in run.decompositions.items():
            name = f"{label}, {checkpoint}" if len(run.decompositions) > 1 else label
            curves[name] = {key: value for key, value in found["tau"].items() if value is not None}
            body += "".join(note(f"{name}: {line}") for line in found.get("notes", []))
            for classifier, values in found["rows"].items():
                rows.append([name, classifier, *(number(values.get(key)) for key in ("top1", *GROUPS))])
    if rows:
        body += table(["run", "classifier", "top-1", *GROUPS], rows, words=(0, 1))
    if curves:
        caption = "Post-hoc logit adjustment: tau times the log training counts is taken off the logits."
        body += picture(plots.tau_figure(curves), f"Top-1 over tau: {', '.join(curves)}", caption)
    return body


# ---------------------------------------------------------------------------------------------------------------------
# HTML


def text(value: object) -> str:
    return html.escape(str(value))


def note(line: str) -> str:
    return f'<p class="note">{text(line)}</p>'


def missing(line: str) -> str:
    return f'<p class="missing">{text(line)}.</p>'


def finding(line: str) -> str:
    return f'<p class="finding">{text(line)}</p>'


def number(value: float | None, digits: int = 2) -> str:
    """A number, or ``-`` where there is none."""
    return "-" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], words: Sequence[int] = (0,)) -> str:
    """An HTML table of plain text; ``words``: columns that are not numbers."""

    def line(cells: Sequence[str], tag: str) -> str:
        kinds = [f'<{tag} class="text">' if place in words else f"<{tag}>" for place in range(len(cells))]
        return (
            "<tr>" + "".join(f"{kind}{text(cell)}</{tag}>" for kind, cell in zip(kinds, cells, strict=True)) + "</tr>"
        )

    body = "".join(line(row, "td") for row in rows)
    return f"<table><thead>{line(head, 'th')}</thead><tbody>{body}</tbody></table>"


def picture(figure: Figure, alt: str, caption: str) -> str:
    """The figure within the page, at 100 pixels per inch."""
    content = base64.b64encode(plots.png(figure)).decode()
    wide, high = (round(100 * inches) for inches in figure.get_size_inches())
    return (
        f'<figure style="width:{wide}px"><img alt="{text(alt)}" width="{wide}" height="{high}" '
        f'src="data:image/png;base64,{content}">'
        f"<figcaption>{text(caption)}</figcaption></figure>"
    )
