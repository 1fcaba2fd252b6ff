"""Evaluation of a checkpoint: python eval.py --cfg config/<...>.yaml resume CHECKPOINT [key value ...]"""

import sys
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path

from yacs.config import CfgNode

from utils.command_line import exit_code, parse, refuse_at_once, say
from utils.config import FIXED, OPTIONS, option_help, read_config


def read(arguments: Sequence[str] | None = None) -> tuple[CfgNode, list[str]]:
    """The configuration, and notes for the report."""
    args = parse("Evaluate a checkpoint of ours, of MiSLAS or of ARBLOSS.", arguments, OPTIONS, option_help())
    return read_config(args.cfg, args.overrides)


if __name__ == "__main__":
    refuse_at_once(read)

from torch import Tensor, nn

from datasets import Data
from datasets.loaders import EvalLoader
from utils import distributed
from utils.build import check, class_groups, load_data, new_model, new_shift
from utils.checkpoint import AVERAGED, CheckpointError, load_content
from utils.errors import describing
from utils.evaluation import gather_outputs, predict
from utils.metrics import Predictions, class_accuracy, report
from utils.precision import matmul_precision
from utils.report import plots
from utils.report.decompose import decompose, decomposition_text, write_decomposition
from utils.report.text import (
    calibration_line,
    class_table,
    details,
    ema_line,
    group_line,
    mislas_lines,
    table,
    write_report,
)
from utils.run.describe import describe_post_hoc
from utils.run.folder import folder_of, new_folder
from utils.run.resume import Origin, changed_options, class_map, find_checkpoint


def main(arguments: Sequence[str] | None = None) -> None:
    """Evaluate a checkpoint, print the report and write it to a folder."""
    with distributed.together():
        cfg, notes = read(arguments)
        check(cfg)
        origin = find_evaluated(cfg)
        class_order = class_map(cfg, origin)
    with distributed.processes(cfg.device, cfg.deterministic) as device, matmul_precision(cfg.precision):
        data = load_data(cfg, class_order.choice, device)
        groups = class_groups(cfg, data)
        model = new_model(cfg, data, origin.content)
        loaded = load_content(model, origin.content, origin.path)
        test = data.test_loader(device, rank=distributed.rank(), world_size=distributed.world_size())
        predictions = predict(model.to(device), test, cfg.precision, shift=new_shift(cfg, data))
        metrics = report(predictions, data.class_counts, groups)
        if AVERAGED in origin.content:
            averaged = deepcopy(model)
            load_content(averaged, origin.content[AVERAGED], origin.path)
            shown = predict(averaged, test, cfg.precision, shift=new_shift(cfg, data))
            metrics["ema"] = report(shown, data.class_counts, groups)
        folder = report_folder(origin.path, cfg.save_dir, cfg.name)
        if distributed.is_main():
            say(f"{origin.path}: {loaded['source']}, after {loaded['epoch']} epochs; report in {folder}")
            notes += [*origin.notes, *class_order.notes, *data.notes, *differences(origin.content, cfg)]
            say(*(f"note: {note}" for note in notes))
            print_report(metrics, predictions, data)
            write_report(folder, metrics, predictions, data.class_counts, data.class_names)
            write_figures(folder, predictions, data, model, next(iter(groups.values())))
        if cfg.decompose:
            compare_classifiers(cfg, data, model, test, groups, folder)
        if distributed.is_main():
            say(*([ema_line(metrics["ema"])] if "ema" in metrics else []), *mislas_lines(metrics))


def find_evaluated(cfg: CfgNode) -> Origin:
    """Read the checkpoint that ``resume`` names. Raises :class:`CheckpointError` if there is none."""
    if not cfg.resume:
        raise CheckpointError("resume: eval.py needs a checkpoint; add: resume saved/<run>/ckps/current.pth.tar")
    origin = find_checkpoint(cfg)
    if origin.content is None or origin.forked:
        raise CheckpointError(f"resume: auto finds no checkpoint of this configuration in {cfg.save_dir}")
    return origin


def print_report(metrics: Mapping, predictions: Predictions, data: Data) -> None:
    by_rule = {}
    for whose, scores in (("", metrics), ("averaged weights, ", metrics.get("ema", {"shots": {}}))):
        for rule, shots in scores["shots"].items():
            by_rule[f"{whose}groups by {rule}"] = {"top1": scores["top1"], "ece": scores["ece"], **shots}
    say("", class_table(predictions, data.class_counts, data.class_names), "", table(by_rule), "")
    say(group_line(metrics["group_sizes"]), calibration_line(metrics["ece_groups"]), details(metrics), "")


@describing("a figure")
def write_figures(
    folder: Path, predictions: Predictions, data: Data, model: nn.Module, groups: Mapping[str, Tensor]
) -> None:
    """Write the figures of :mod:`utils.compare`'s page as PNG files. ``groups``: masks [C]."""
    classes, confidences, targets = predictions.classes, predictions.confidences, predictions.targets
    counts, names = data.class_counts, data.class_names
    accuracy = 100 * class_accuracy(classes, targets, data.num_classes)[0]
    weight = model.classifier.rows().detach().cpu()
    figures = {
        "class_accuracy": plots.class_accuracy_figure({folder.name: (counts, accuracy)}),
        "confusion": plots.confusion_figure(classes, targets, counts, names, groups, folder.name),
        "reliability": plots.reliability_figure(confidences, classes, targets, folder.name),
        "similarity": plots.similarity_figure({folder.name: (weight, counts)}),
    }
    for name, figure in figures.items():
        plots.save_png(figure, folder / f"{name}.png")


def compare_classifiers(
    cfg: CfgNode, data: Data, model: nn.Module, test: EvalLoader, groups: Mapping[str, Mapping], folder: Path
) -> None:
    """Compare the classifier with others on the same features, from raw logits; see :mod:`utils.report.decompose`."""
    train = data.plain_train_loader(test.targets.device, distributed.rank(), distributed.world_size())
    fitted = gather_outputs(model, train, cfg.precision, with_logits=False)
    scored = gather_outputs(model, test, cfg.precision)
    if distributed.is_main():
        decomposition = decompose(fitted, scored, data.class_counts, next(iter(groups.values())))
        say(f"{decomposition_text(decomposition)}\n")
        write_decomposition(folder, decomposition)
        with describing("a figure"):
            plots.save_png(plots.tau_figure({folder.name: decomposition.tau}), folder / "tau.png")


def differences(content: Mapping, cfg: CfgNode) -> list[str]:
    """Warn about data, network or precision that differ from the checkpoint's, and about adjusted logits."""
    changed = {key: pair for key, pair in changed_options(content, cfg).items() if key in (*FIXED, "precision")}
    warnings = [
        f"trained with {key} {old}, but this configuration says {new}, which is used here"
        for key, (old, new) in changed.items()
    ]
    return warnings + [describe_post_hoc(cfg)] * (cfg.post_hoc_tau > 0)


def report_folder(checkpoint: str, save_dir: str, name: str) -> Path:
    """Return ``eval/<checkpoint name>`` in the run's folder, or a new folder ``<name>_eval_<time>``."""
    run = folder_of(checkpoint)
    if run is None:
        return new_folder(save_dir, f"{name}_eval")
    return run / "eval" / Path(checkpoint).name.removesuffix(".pth.tar")


if __name__ == "__main__":
    sys.exit(exit_code(main))
