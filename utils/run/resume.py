"""Where a run starts: from scratch, from its own checkpoint, as a fork of another run, or from foreign weights."""

import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from yacs.config import CfgNode

from datasets import Data, find_spec
from utils import distributed
from utils.build import Training
from utils.checkpoint import (
    AVERAGED,
    CheckpointError,
    TrainState,
    is_ours,
    load_content,
    read_checkpoint,
    restore,
    stored_class_map,
)
from utils.config import FIXED, INCIDENTAL, OPTIONS
from utils.errors import InputError
from utils.option_checks import has_moving_means
from utils.run.folder import folder_of, inherit, new_folder
from utils.run.provenance import environment

# ---------------------------------------------------------------------------------------------------------------------
# Finding the checkpoint


@dataclass
class Origin:
    """The checkpoint that a run starts from."""

    path: str  # empty: there is none
    content: dict | None
    notes: list[str]  # for the log
    forked: bool = False  # the checkpoint is another run's, whose state this run starts with

    def checksum(self) -> int:
        """CRC-32 of the file; 0 if there is none."""
        return zlib.crc32(Path(self.path).read_bytes()) if self.path else 0


class ClassOrder(NamedTuple):
    """How the labels of list data become classes."""

    choice: str | Sequence[int]  # "stable", "legacy", a file or the map itself, see :mod:`datasets.class_order`
    notes: list[str]  # for the log; empty for other data


def find_checkpoint(cfg: CfgNode) -> Origin:
    """Read the checkpoint that ``resume`` names or (``auto``) stands for, else the one to ``fork``."""
    if cfg.resume == "auto":
        origin = newest_checkpoint(cfg.save_dir, cfg)
    else:
        origin = Origin(cfg.resume, read_checkpoint(cfg.resume) if cfg.resume else None, [])
    if origin.content is not None or not cfg.fork:
        return origin
    if cfg.fork == "auto":
        raise CheckpointError("fork: auto is for resume; give a checkpoint, such as saved/<run>/ckps/epoch_180.pth.tar")
    content = read_checkpoint(cfg.fork)
    if not is_ours(content):
        raise CheckpointError(f"fork: {cfg.fork} is not this trainer's; a run can take its weights by resume")
    return Origin(cfg.fork, content, origin.notes, forked=True)


def newest_checkpoint(save_dir: str, config: Mapping) -> Origin:
    """Find the last good checkpoint of the newest run of ``config`` under ``save_dir``.

    Runs may differ from ``config`` in incidental options. If a run's ``current`` is damaged, ``model_best`` is used.
    """
    notes = []
    for checkpoints in _runs_of(config["name"], save_dir):
        for path in checkpoints:
            try:
                content = read_checkpoint(path)
            except CheckpointError as error:
                notes.append(f"resume auto: passed over {error}")
                continue
            changed = changed_options(content, config)
            if is_ours(content) and fork_of(content["config"]) != fork_of(config):
                changed["fork"] = (content["config"].get("fork"), config["fork"])
            if is_ours(content) and not changed:
                return Origin(str(path), content, notes)
            why = f"has another {', '.join(changed)}" if changed else "is not this trainer's"
            notes.append(f"resume auto: passed over {path}, which {why}")
            break
    notes.append(f"resume auto: no checkpoint of this configuration in {save_dir}, starting a new run")
    return Origin("", None, notes)


def _runs_of(name: str, save_dir: str) -> list[list[Path]]:
    """The existing ``current`` and ``model_best`` of each run called ``name``, the newest run first."""
    folders = (f for f in Path(save_dir).glob("*") if re.fullmatch(re.escape(name) + r"_\d{14}(_\d+)?", f.name))
    files = ([folder / "ckps" / f"{name}.pth.tar" for name in ("current", "model_best")] for folder in folders)
    runs = [existing for paths in files if (existing := [path for path in paths if path.is_file()])]
    return sorted(runs, key=lambda paths: max(path.stat().st_mtime_ns for path in paths), reverse=True)


def changed_options(content: Mapping, config: Mapping) -> dict[str, tuple]:
    """Return option -> (value in our checkpoint, value in ``config``) where they differ, without incidental options."""
    if not is_ours(content):
        return {}
    # An option that came later had its default's effect.
    saved = {key: option.default for key, option in OPTIONS.items()} | content["config"]
    return {
        key: (saved[key], config[key])
        for key in config
        if key not in INCIDENTAL and (isinstance(saved[key], Tensor) or saved[key] != config[key])
    }


def fork_of(config: Mapping) -> list[str]:
    """The last three parts of ``fork`` (run, ``ckps``, file), which do not change when a folder of runs is moved."""
    return list(Path(str(config.get("fork") or "")).parts[-3:])


def class_map(cfg: CfgNode, origin: Origin) -> ClassOrder:
    """Choose the order of classes: a checkpoint's own; without one it is MiSLAS's or ARBLOSS's."""
    if find_spec(cfg.dataset).lists is None:
        return ClassOrder(cfg.class_map, [])
    if origin.content is None:
        choice = cfg.class_map or "stable"
        return ClassOrder(choice, [f"class map: {choice}"])
    stored = stored_class_map(origin.content, origin.path)
    if stored is None:
        choice = cfg.class_map or "legacy"
        return ClassOrder(choice, [f"class map: {choice}, the checkpoint has none"])
    remark = f", class_map {cfg.class_map} is not needed" if cfg.class_map else ""
    return ClassOrder(stored.tolist(), [f"class map: the checkpoint's{remark}"])


# ---------------------------------------------------------------------------------------------------------------------
# Starting from it


class Start(NamedTuple):
    """Where training starts."""

    state: TrainState
    folder: Path  # of the run
    settings: dict  # the resolved configuration that reproduces the run
    notes: list[str]  # for the log


def start(cfg: CfgNode, origin: Origin, data: Data, training: Training, steps: int) -> Start:
    """Restore ``training`` from the checkpoint, if there is one, and choose or create the run's folder.

    ``steps``: per epoch. Frees the checkpoint's content.
    """
    path, content, forked = origin.path, origin.content, origin.forked
    origin.content = None
    settings = dict(cfg) | {"resume": "" if forked else path}  # the file that "auto" stands for
    if not distributed.all_equal(origin.checksum()):
        raise CheckpointError(
            f"resume: {cfg.resume} is not the same file for every process; all nodes need one save_dir"
        )
    if content is None:
        return Start(TrainState(), new_folder(cfg.save_dir, cfg.name), settings, origin.notes)
    if cfg.fork and not forked and fork_of(content["config"] if is_ours(content) else {}) != fork_of(cfg):
        raise CheckpointError(f"resume: {path} was not started from the fork {cfg.fork}; give one of the two")
    if not is_ours(content):
        source = load_content(training.model, content, path)["source"]
        if training.average is not None:
            training.average.reset()
        note = f"{path}: {source}; weights only, training starts at epoch 0"
        return Start(TrainState(), new_folder(cfg.save_dir, cfg.name), settings, [*origin.notes, note])
    changed = changed_options(content, cfg)
    check_unchanged(content, path, cfg, data)
    state = restore(content, path, **training.parts())
    kept = ("resume", "class_map") if forked else ("resume", "class_map", "fork")
    settings |= {key: str(content["config"].get(key, "")) for key in kept}
    folder = fork(cfg, path, state) if forked else folder_of(path) or new_folder(cfg.save_dir, cfg.name)
    reached = f"{state.epoch} epochs" + (f" and {state.step} steps" if state.step else "")
    notes = [*origin.notes, f"{path}: {'forked' if forked else 'resuming'} after {reached}, in {folder}"]
    notes += [f"{key} changes from {old} to {new}" for key, (old, new) in changed.items()]
    if training.average is not None and AVERAGED not in content:
        notes.append(f"ema: {path} has no averaged weights; they start from its weights")
    if state.step and not {"seed", "batch_size"}.isdisjoint(changed):
        state.step, state.sums, state.seconds = 0, None, 0.0  # of other steps
        notes.append(f"epoch {state.epoch} starts over: its steps have changed")
    if state.step > steps:
        raise CheckpointError(f"{path}: is at step {state.step} of an epoch that has {steps} steps")
    return Start(state, folder, settings, notes + environment_changes(content, training.device))


def fork(cfg: CfgNode, path: str, state: TrainState) -> Path:
    """Create the folder of a fork and copy the history of its parent, whose checkpoint is ``path``, into it."""
    state.best_acc1, state.its_ece, state.log_size = -1.0, 0.0, None  # the best checkpoint will be the fork's own
    folder, parent = new_folder(cfg.save_dir, cfg.name), folder_of(path)
    try:
        if parent:
            inherit(folder, parent, state.epoch)
    except OSError as error:
        raise InputError(f"fork: cannot copy {parent}'s metrics to {folder}: {error.strerror}") from None
    return folder


def check_unchanged(content: Mapping, path: str, config: Mapping, data: Data) -> None:
    """Raise :class:`CheckpointError` if the run's data or network differ from the checkpoint's."""
    changed = changed_options(content, config)
    for key in FIXED:
        if key in changed:
            old, new = changed[key]
            raise CheckpointError(
                f"{path}: was trained with {key} {old}, but {key} is {new}; resume with the run's own "
                "data and network (see its config.yaml), or start a new run without resume"
            )
    before, after = has_moving_means(content["config"]), has_moving_means(config)
    if before != after:
        raise CheckpointError(
            f"{path}: was trained with{'' if before else 'out'} moving class means; nc_means, nc_dual and spa "
            "cannot be switched on or off when a run resumes"
        )
    counts, fingerprint = content.get("class_counts"), content.get("fingerprint")
    if counts is not None and not (isinstance(counts, Tensor) and torch.equal(counts, data.class_counts)):
        raise CheckpointError(
            f"{path}: was trained on other images: the class counts differ from those of data_path (and "
            "train_txt); resume with the run's own data"
        )
    if fingerprint is not None and not (isinstance(fingerprint, str) and fingerprint in ("", data.label_hash)):
        raise CheckpointError(
            f"{path}: was trained on other data: the lists (or the images' labels) are not what they were (their hash "
            "differs); resume with the run's own data"
        )


def environment_changes(content: Mapping, device: torch.device) -> list[str]:
    """Notes on what has changed so that the run is no longer bit-exact."""
    before, now = content.get("environment") or {}, environment(device)
    return [
        f"{what}: {before[what]} before, {now[what]} now; results are no longer bit-identical to an uninterrupted run"
        for what in now
        if what in before and before[what] != now[what]
    ]
