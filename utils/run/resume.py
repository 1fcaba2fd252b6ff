"""Where a run starts: anew, from a checkpoint of its own, as a fork of another run, or from foreign weights."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from datasets import Data, find_spec
from methods import Method
from utils import distributed
from utils.checkpoint import (
    CheckpointError,
    Found,
    TrainState,
    changed_options,
    environment,
    fork_of,
    is_ours,
    load_content,
    newest_checkpoint,
    read_checkpoint,
    restore,
    stored_class_map,
)
from utils.errors import InputError
from utils.run.log import folder_of, inherit, new_folder

# Runs that differ in one of these are not trained and tested on the same images.
DATA = ("dataset", "num_classes", "image_size", "imb_type", "imb_factor", "subset_seed", "val_per_class")
# What a run cannot change when it goes on: its data and its network.
FIXED = (*DATA, "backbone", "classifier", "cosine_scale")


class Numbering(NamedTuple):
    """How the labels of list data become classes."""

    choice: str | Sequence[int]  # "stable", "legacy", a file or the map itself, see :mod:`datasets.class_order`
    notes: list[str]  # a line that says it; none for other data


def find_checkpoint(cfg: CfgNode) -> Found:
    """The checkpoint that ``resume`` names or, by ``auto``, means; where there is none, the one to ``fork`` from."""
    if cfg.resume == "auto":
        found = newest_checkpoint(cfg.save_dir, cfg)
    else:
        found = Found(cfg.resume, read_checkpoint(cfg.resume) if cfg.resume else None, [])
    if found.content is not None or not cfg.fork:
        return found
    content = read_checkpoint(cfg.fork)
    if not is_ours(content):
        raise CheckpointError(f"fork: {cfg.fork} is not this trainer's; a run can take its weights by resume")
    return Found(cfg.fork, content, found.notes, forked=True)


def class_map(cfg: CfgNode, found: Found) -> Numbering:
    """A checkpoint goes with the numbers that it was trained with; one without a map is MiSLAS's or ARBLOSS's."""
    if find_spec(cfg.dataset).lists is None:
        return Numbering(cfg.class_map, [])
    if found.content is None:
        choice = cfg.class_map or "stable"
        return Numbering(choice, [f"class map: {choice}"])
    stored = stored_class_map(found.content, found.path)
    if stored is None:
        choice = cfg.class_map or "legacy"
        return Numbering(choice, [f"class map: {choice}, the checkpoint has none"])
    remark = f", class_map {cfg.class_map} is not needed" if cfg.class_map else ""
    return Numbering(stored.tolist(), [f"class map: the checkpoint's{remark}"])


def start(
    cfg: CfgNode,
    found: Found,
    data: Data,
    steps: int,
    device: torch.device,
    model: nn.Module,
    method: Method,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
) -> tuple[TrainState, Path, dict, list[str]]:
    """Where training starts: (state, the run's folder, the settings it records, notes for the log).

    ``steps`` of an epoch.
    """
    path, content, _, forked = found
    settings = dict(cfg) | {"resume": "" if forked else path}  # which "auto" has become
    if not distributed.all_equal(found.checksum()):
        raise CheckpointError(
            f"resume: {cfg.resume} is not the same file for every process; all nodes need one save_dir"
        )
    if content is None:
        return TrainState(), new_folder(cfg.save_dir, cfg.name), settings, []
    if cfg.fork and not forked and fork_of(content["config"] if is_ours(content) else {}) != fork_of(cfg):
        raise CheckpointError(f"resume: {path} did not begin with the fork {cfg.fork}; give one of the two")
    if not is_ours(content):
        source = load_content(model, content, path)["source"]
        note = f"{path}: {source}; weights only, training starts at epoch 0"
        return TrainState(), new_folder(cfg.save_dir, cfg.name), settings, [note]
    changed = changed_options(content, cfg)
    check_unchanged(content, path, changed, data)
    state = restore(content, path, model, method, optimizer, scaler)
    kept = ("resume", "class_map") if forked else ("resume", "class_map", "fork")
    settings |= {key: str(content["config"].get(key, "")) for key in kept}
    folder = fork(cfg, path, state) if forked else folder_of(path) or new_folder(cfg.save_dir, cfg.name)
    reached = f"{state.epoch} epochs" + (f" and {state.step} steps" if state.step else "")
    notes = [f"{path}: going on after {reached}, in {folder}"]
    notes += [f"{key} was {old} so far and is {new} from here on" for key, (old, new) in changed.items()]
    if state.step and not {"seed", "batch_size"}.isdisjoint(changed):
        state.step, state.sums, state.seconds = 0, None, 0.0  # of other steps
        notes.append(f"epoch {state.epoch} begins anew: its steps are others now")
    if state.step > steps:
        raise CheckpointError(f"{path}: lies at step {state.step} of an epoch that has {steps} steps")
    return state, folder, settings, notes + moved(content, device)


def fork(cfg: CfgNode, path: str, state: TrainState) -> Path:
    """The folder of a new run that begins with ``state``, read from ``path``; it has what its parent has up to there.

    The best checkpoint will be one of its own.
    """
    state.best_acc1, state.its_ece, state.log_size = -1.0, 0.0, None
    folder, parent = new_folder(cfg.save_dir, cfg.name), folder_of(path)
    try:
        if parent:
            inherit(folder, parent, state.epoch)
    except OSError as error:
        raise InputError(f"fork: cannot copy {parent}'s metrics to {folder}: {error.strerror}") from None
    return folder


def check_unchanged(content: Mapping, path: str, changed: Mapping[str, tuple], data: Data) -> None:
    """A run goes on with its own data and its own network."""
    for key in FIXED:
        if key in changed:
            old, new = changed[key]
            raise CheckpointError(
                f"{path}: was trained with {key} {old}, and {key} {new} is asked for; a run goes on with its own data "
                "and network (its config.yaml has them), or starts anew without resume"
            )
    counts, fingerprint = content.get("class_counts"), content.get("fingerprint")
    if counts is not None and not (isinstance(counts, Tensor) and torch.equal(counts, data.class_counts)):
        raise CheckpointError(
            f"{path}: was trained on other images: their number per class differs from what data_path (and "
            "train_txt) hold now; a run goes on with its own data"
        )
    if fingerprint is not None and not (isinstance(fingerprint, str) and fingerprint in ("", data.fingerprint)):
        raise CheckpointError(
            f"{path}: was trained on other data: the lists (or the images' labels) are not what they were (their hash "
            "differs); a run goes on with its own data"
        )


def moved(content: Mapping, device: torch.device) -> list[str]:
    """Notes that say where the run cannot be the same to the last bit any more."""
    before, now = content.get("environment") or {}, environment(device)
    return [
        f"{what}: {before[what]} so far, {now[what]} from here on; from here on the run is not, bit for bit, the one "
        "that it would have been"
        for what in now
        if what in before and before[what] != now[what]
    ]


def origins(data: Data, settings: Mapping, device: torch.device) -> dict:
    """What a checkpoint says of where it comes from."""
    return {
        "config": settings,
        "class_counts": data.class_counts,
        "class_map": data.class_map,
        "class_names": data.class_names,
        "fingerprint": data.fingerprint,
        "environment": environment(device),
        "selected_on": "held-out training images" if settings["val_per_class"] else "test set",
    }
