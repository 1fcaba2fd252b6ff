"""Evaluation of a checkpoint: python eval.py --cfg config/<...>.yaml resume CHECKPOINT [key value ...]"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn
from yacs.config import CfgNode

from datasets import Data
from datasets.loaders import EvalLoader
from utils import distributed
from utils.build import check, class_groups, load_data, new_model, new_shift
from utils.checkpoint import CheckpointError, changed_options, load_content
from utils.command_line import exit_code, parse
from utils.config import read_config
from utils.evaluation import (
    calibration_line,
    class_table,
    details,
    gather_outputs,
    group_line,
    mislas_lines,
    predict,
    table,
    write_report,
)
from utils.metrics import Predictions, class_accuracy, report
from utils.precision import float32_products
from utils.report import plots
from utils.report.decompose import decompose, decomposition_text, write_decomposition
from utils.run.describe import post_hoc_in_words
from utils.run.log import folder_of, new_folder
from utils.run.resume import FIXED, class_map, find_checkpoint


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse("Evaluate a checkpoint of ours, of MiSLAS or of ARBLOSS.", arguments)
    with distributed.together():
        cfg, notes = read_config(args.cfg, args.overrides)
        check(cfg)
        if not cfg.resume:
            raise CheckpointError("resume: eval.py needs a checkpoint; add: resume saved/<run>/ckps/current.pth.tar")
        found = find_checkpoint(cfg)
        path, content, origin = found.path, found.content, found.notes
        if content is None or found.forked:
            raise CheckpointError(f"resume: auto finds no checkpoint of this configuration in {cfg.save_dir}")
        numbering = class_map(cfg, found)
    with distributed.processes(cfg.device, cfg.deterministic) as device, float32_products(cfg.precision):
        data = load_data(cfg, numbering.choice, device)
        groups = class_groups(cfg, data)
        model = new_model(cfg, data, content)
        loaded = load_content(model, content, path)
        test = data.test_loader(device, rank=distributed.rank(), world_size=distributed.world_size())
        predictions = predict(model.to(device), test, cfg.precision, shift=new_shift(cfg, data))
        metrics = report(predictions, data.class_counts, groups)
        folder = report_folder(path, cfg.save_dir, cfg.name)
        if distributed.is_main():
            write_report(folder, metrics, predictions, data.class_counts, data.class_names)
            write_figures(folder, predictions, data, model, next(iter(groups.values())))
            print(f"{path}: {loaded['source']}, after {loaded['epoch']} epochs; report in {folder}")
            print(
                *(f"note: {note}" for note in [*notes, *origin, *numbering.notes, *differences(content, cfg)]),
                sep="\n",
            )
            print(f"\n{class_table(predictions, data.class_counts, data.class_names)}")
            print(f"\n{table(by_rule(metrics))}")
            print(f"\n{group_line(metrics['group_sizes'])}\n{calibration_line(metrics['ece_groups'])}")
            print(f"{details(metrics)}\n")
        if cfg.decompose:
            compare_classifiers(cfg, data, model, test, groups, folder)
        if distributed.is_main():
            print(*mislas_lines(metrics), sep="\n")


def by_rule(metrics: dict) -> dict[str, dict]:
    """One row per rule for the groups; top-1 and ECE are the same in each."""
    whole = {key: metrics[key] for key in ("top1", "ece")}
    return {f"groups by {rule}": {**whole, **shots} for rule, shots in metrics["shots"].items()}


def write_figures(
    folder: Path, predictions: Predictions, data: Data, model: nn.Module, groups: Mapping[str, Tensor]
) -> None:
    """Pictures of the report as PNG files, the same as on the page of :mod:`utils.compare`; ``groups``: masks [C]."""
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
    """Representation or classifier? See :mod:`utils.report.decompose`; from raw logits, groups by the headline rule."""
    train = data.plain_train_loader(test.targets.device, distributed.rank(), distributed.world_size())
    fitted = gather_outputs(model, train, cfg.precision, with_logits=False)
    scored = gather_outputs(model, test, cfg.precision)
    if distributed.is_main():
        decomposition = decompose(fitted, scored, data.class_counts, next(iter(groups.values())))
        write_decomposition(folder, decomposition)
        plots.save_png(plots.tau_figure({folder.name: decomposition.tau}), folder / "tau.png")
        print(f"{decomposition_text(decomposition)}\n")


def differences(content: Mapping, cfg: CfgNode) -> list[str]:
    """Lines that warn where data, network or precision are not those of the checkpoint's own run, or logits not raw."""
    changed = {key: pair for key, pair in changed_options(content, cfg).items() if key in (*FIXED, "precision")}
    return [
        *(
            f"trained with {key} {old}, but this configuration says {new}, and what is below follows it"
            for key, (old, new) in changed.items()
        ),
        *[post_hoc_in_words(cfg)] * (cfg.post_hoc_tau > 0),
    ]


def report_folder(checkpoint: str, save_dir: str, name: str) -> Path:
    """``eval/<checkpoint name>`` in the run's folder, else a new folder ``<name>_eval_<time>``."""
    run = folder_of(checkpoint)
    return (
        run / "eval" / Path(checkpoint).name.removesuffix(".pth.tar") if run else new_folder(save_dir, f"{name}_eval")
    )


if __name__ == "__main__":
    sys.exit(exit_code(main))
