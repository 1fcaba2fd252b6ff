"""Evaluation of a checkpoint: python eval.py --cfg config/<...>.yaml resume CHECKPOINT [key value ...]"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from yacs.config import CfgNode

from train_stage1 import FIXED, check, class_groups, class_map, find_checkpoint, load_data, new_model
from utils import distributed
from utils.checkpoint import CheckpointError, changed_options, load_content
from utils.command_line import exit_code, parse
from utils.config import read_config
from utils.evaluation import class_table, details, group_line, mislas_lines, predict, table, write_report
from utils.metrics import report
from utils.precision import float32_products
from utils.run_log import folder_of, new_folder


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse("Evaluate a checkpoint of ours, of MiSLAS or of ARBLOSS.", arguments)
    with distributed.together():
        cfg, notes = read_config(args.cfg, args.overrides)
        check(cfg)
        if not cfg.resume:
            raise CheckpointError("resume: eval.py needs a checkpoint; add: resume saved/<run>/ckps/current.pth.tar")
        path, content, origin = found = find_checkpoint(cfg)
        if content is None:
            raise CheckpointError(f"resume: auto finds no checkpoint of this configuration in {cfg.save_dir}")
        numbering = class_map(cfg, found)
    with distributed.processes(cfg.device, cfg.deterministic) as device, float32_products(cfg.precision):
        data = load_data(cfg, numbering.choice, device)
        groups = class_groups(cfg, data)
        model = new_model(cfg, data, content)
        loaded = load_content(model, content, path)
        test = data.test_loader(device, rank=distributed.rank(), world_size=distributed.world_size())
        predictions = predict(model.to(device), test, cfg.precision)
        metrics = report(predictions, data.class_counts, groups)
        folder = report_folder(path, cfg.save_dir, cfg.name)
        if distributed.is_main():
            write_report(folder, metrics, predictions, data.class_counts, data.class_names)
            print(f"{path}: {loaded['source']}, after {loaded['epoch']} epochs; report in {folder}")
            print(
                *(f"note: {note}" for note in [*notes, *origin, *numbering.notes, *differences(content, cfg)]),
                sep="\n",
            )
            print(f"\n{class_table(predictions, data.class_counts, data.class_names)}")
            print(f"\n{table(by_rule(metrics))}")
            print(f"\n{group_line(metrics['group_sizes'])}\n{details(metrics)}\n")
            print(*mislas_lines(metrics), sep="\n")


def by_rule(metrics: dict) -> dict[str, dict]:
    """One row per rule for the groups; top-1 and ECE are the same in each."""
    whole = {key: metrics[key] for key in ("top1", "ece")}
    return {f"groups by {rule}": {**whole, **shots} for rule, shots in metrics["shots"].items()}


def differences(content: Mapping, cfg: CfgNode) -> list[str]:
    """Lines that warn where data or precision, and so the figures, are not those of the checkpoint's own run."""
    changed = {key: pair for key, pair in changed_options(content, cfg).items() if key in (*FIXED, "precision")}
    return [
        f"trained with {key} {old}, but this configuration says {new}, and what is below follows it"
        for key, (old, new) in changed.items()
    ]


def report_folder(checkpoint: str, save_dir: str, name: str) -> Path:
    """``eval/<checkpoint name>`` in the run's folder, else a new folder ``<name>_eval_<time>``."""
    run = folder_of(checkpoint)
    return (
        run / "eval" / Path(checkpoint).name.removesuffix(".pth.tar") if run else new_folder(save_dir, f"{name}_eval")
    )


if __name__ == "__main__":
    sys.exit(exit_code(main))
