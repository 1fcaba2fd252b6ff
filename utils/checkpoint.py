"""Checkpoints: written atomically, read without ever running code that a file carries.

The keys are MiSLAS's (``epoch state_dict_model state_dict_classifier [state_dict_block] best_acc1 its_ece``), so that
its stage 2 reads our files, plus what going on exactly needs. Files hold tensors, plain containers and numbers only.
"""

import math
import os
import pickle
import re
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from utils import distributed
from utils.errors import InputError
from utils.files import atomic_file
from utils.metrics import SUMS

# The parts of a model, by the key that MiSLAS gives each.
PARTS = {"state_dict_model": "backbone", "state_dict_block": "block", "state_dict_classifier": "classifier"}
# Options that say nothing about what is trained.
INCIDENTAL = (
    *("name", "save_dir", "resume", "fork", "device", "workers", "print_freq", "checkpoint_every_steps", "keep_epochs"),
    *("data_path", "data_on_device", "decoder", "class_map", "cuda_graph", "decompose"),
    *("diagnostics", "diagnostics_rows", "nc_every"),
)
PREFIXES = ("module.", "_orig_mod.")  # of DataParallel / DistributedDataParallel and of torch.compile


class CheckpointError(InputError):
    """A checkpoint that is missing, damaged, unsafe to load or of another architecture."""


@dataclass
class TrainState:
    """What the loop itself knows; everything else is a function of (seed, epoch)."""

    epoch: int = 0  # epochs finished
    step: int = 0  # steps of the next one that are finished too
    sums: torch.Tensor | None = None  # of those steps, see TrainMeter.rows
    seconds: float = 0.0  # that they took
    log_size: int | None = None  # bytes in the log; None: not known
    best_acc1: float = -1.0  # percent, on the images that choose (``selected_on``)
    its_ece: float = 0.0  # percent, on the test set, of that model
    components: torch.Tensor | None = None  # sums of diagnostics of those steps, see ComponentMeter.rows


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def save_checkpoint(
    path: Path,
    model: nn.Module,
    method: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    state: TrainState,
    config: Mapping,
    selected_on: str,
    class_counts: torch.Tensor | None = None,
    class_map: torch.Tensor | None = None,
    class_names: Sequence[str] = (),
    fingerprint: str = "",
    environment: Mapping | None = None,
) -> None:
    """Writes everything that a later ``resume`` needs. ``model`` is the bare module, not a parallel wrapper.

    ``class_counts``: int64 [C], training images per class; ``class_map``: int64 [C], label in the lists -> class, for
    data sets that come as lists; ``class_names`` [C]; ``fingerprint`` of the data; ``environment``: see
    :func:`environment`.
    """
    content = {
        "epoch": state.epoch,
        "step": state.step,
        "sums": state.sums,
        "components": state.components,
        "seconds": state.seconds,
        "log_size": state.log_size,
        "best_acc1": torch.tensor([state.best_acc1], dtype=torch.float64),  # exact, or a tie would become a new best
        "its_ece": state.its_ece,
        **{key: part.state_dict() for key, part in _parts(model).items()},
        "state_dict_method": method.state_dict(),
        "optimizer": _portable(optimizer.state_dict()),
        "scaler": scaler.state_dict(),
        "class_counts": class_counts,
        "class_map": class_map,
        "class_names": list(class_names),
        "fingerprint": fingerprint,
        "environment": dict(environment or {}),
        "selected_on": selected_on,
        "config": dict(config),
    }
    with atomic_file(path) as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # how torch ends a file after a write that failed
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None


def _portable(state: dict) -> dict:
    """An optimizer's state with learning rates as numbers: a recorded step keeps them in tensors on its device."""
    groups = [group | {"lr": float(group["lr"])} for group in state["param_groups"]]
    return state | {"param_groups": groups}


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read_checkpoint(path: str | Path) -> dict:
    """The content of a checkpoint as a dict, on the CPU. Raises :class:`CheckpointError`; never runs code in it."""
    path = Path(path)
    if os.path.isdir(path):
        raise CheckpointError(f"{path}: is a folder; a run's last checkpoint is ckps/current.pth.tar in it")
    if not os.path.isfile(path):
        raise CheckpointError(f"{path}: no such checkpoint file")
    try:
        with path.open("rb") as file:
            file.read(1)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or _brief(error)}") from None
    try:
        _check_sums(path)
        with torch.serialization.safe_globals(_numpy_scalars()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch has to say of a plain pickle comes as an error too
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and pickle raise many types on a damaged file
        if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error):
            problem = "refused, it is unsafe to load: it holds objects other than tensors, containers and numbers"
        else:
            problem = f"is damaged or no checkpoint at all, or unsafe to load ({_brief(error)})"
        raise CheckpointError(f"{path}: {problem}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not a checkpoint (a dict of state dicts)")
    return content


def _check_sums(path: Path) -> None:
    """Compares a zip file's check sums, which ``torch.load`` does not."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            wrong = archive.testzip()
        if wrong:
            raise ValueError(f"the check sum of {wrong} is wrong")


def is_ours(content: Mapping) -> bool:
    """Whether a checkpoint holds all that going on exactly needs, not only weights."""
    whole = all(key in content for key in ("optimizer", "state_dict_method", "selected_on"))
    return whole and isinstance(content.get("config"), Mapping)


def stored_class_map(content: Mapping, path: str | Path) -> torch.Tensor | None:
    """The class map of a checkpoint, int64 [C]; None where it has none. Raises :class:`CheckpointError`."""
    stored = content.get("class_map")
    if stored is None:
        return None
    try:
        numbers = torch.as_tensor(stored)
    except (TypeError, ValueError, RuntimeError):
        numbers = torch.zeros(())
    if numbers.ndim != 1 or len(numbers) == 0 or numbers.dtype not in (torch.int64, torch.int32):
        raise CheckpointError(f"{path}: its class_map is no list of whole numbers, one per class")
    return numbers.long()


class Found(NamedTuple):
    """What ``resume`` stands for."""

    path: str  # empty: there is no checkpoint
    content: dict | None
    notes: list[str]  # lines for the log
    forked: bool = False  # the state is another run's, and this one begins with it

    def checksum(self) -> int:
        """Of the file; 0 where there is none."""
        return zlib.crc32(Path(self.path).read_bytes()) if self.path else 0


def newest_checkpoint(save_dir: str, config: Mapping) -> Found:
    """The last good checkpoint of the newest run of ``config`` under ``save_dir``; paths and the like may differ.

    A run whose ``current`` is damaged goes on from its ``model_best``.
    """
    runs = [
        path
        for path in Path(save_dir).glob("*")
        if re.fullmatch(re.escape(config["name"]) + r"_\d{14}(_\d+)?", path.name)
    ]
    kept = {run: [run / "ckps" / f"{name}.pth.tar" for name in ("current", "model_best")] for run in runs}
    kept = {run: [path for path in paths if path.is_file()] for run, paths in kept.items()}
    notes = []
    for run in sorted(
        filter(kept.get, kept), key=lambda run: max(p.stat().st_mtime_ns for p in kept[run]), reverse=True
    ):
        for path in kept[run]:
            try:
                content = read_checkpoint(path)
            except CheckpointError as error:
                notes.append(f"resume auto: passed over {error}")
                continue
            changed = changed_options(content, config)
            if is_ours(content) and fork_of(content["config"]) != fork_of(config):
                changed["fork"] = (content["config"].get("fork"), config["fork"])
            if is_ours(content) and not changed:
                return Found(str(path), content, notes)
            why = f"has another {', '.join(changed)}" if changed else "is not this trainer's"
            notes.append(f"resume auto: passed over {path}, which {why}")
            break
    return Found(
        "", None, [*notes, f"resume auto: no checkpoint of this configuration in {save_dir}, training starts anew"]
    )


def load_weights(model: nn.Module, path: str | Path) -> dict:
    """Loads backbone, block and classifier from our checkpoints or those of MiSLAS and ARBLOSS.

    Prefixes of wrappers are stripped; stage 2's learnable scaling ``s`` of the logits is folded into the classifier,
    exactly: ``s * (W h + b) = (s W) h + (s b)``. Returns ``epoch``, ``best_acc1`` (percent or None), ``class_map``
    (or None) and ``source``, which says in words what was read. Raises :class:`CheckpointError`.
    """
    return load_content(model, read_checkpoint(path), path)


def load_content(model: nn.Module, content: Mapping, path: str | Path) -> dict:
    """:func:`load_weights` for a checkpoint that was read already."""
    try:
        return _load_content(model, content, path)
    except CheckpointError:
        raise
    except (TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"{path}: holds a value of the wrong kind ({_brief(error)})") from None


def _load_content(model: nn.Module, content: Mapping, path: str | Path) -> dict:
    source = "this trainer's checkpoint" if is_ours(content) else "weights in the format of MiSLAS / ARBLOSS"
    states = {key: _strip(content[key]) for key in PARTS if isinstance(content.get(key), Mapping)}
    needed = _parts(model)
    missing = [key for key in needed if key not in states]
    if missing:
        raise CheckpointError(f"{path}: has no {', '.join(missing)}; it holds: {_some(content)}")
    if isinstance(content.get("state_dict_lws_model"), Mapping):
        _fold_scaling(states["state_dict_classifier"], _strip(content["state_dict_lws_model"]), path)
        source += ", stage 2's scaling folded into the classifier"
    for key in states:
        if key not in needed:
            raise CheckpointError(f"{path}: has a {key}, which this model has no place for (dataset: places has one)")
        _check_shapes(needed[key], states[key], path)
    for key, state in states.items():
        needed[key].load_state_dict(state)
    best = content.get("best_acc1")
    return {
        "epoch": int(content.get("epoch", 0)),
        "best_acc1": None if best is None else float(best),
        "class_map": content.get("class_map"),
        "source": source,
    }


def restore(
    content: Mapping,
    path: str | Path,
    model: nn.Module,
    method: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
) -> TrainState:
    """Puts everything of our own checkpoint back into its place.

    Of the optimizer that is its momentum; its options (weight decay, ...) are those of this configuration.
    """
    load_content(model, content, path)
    try:
        method.load_state_dict(content["state_dict_method"])
        _restore_momentum(content["optimizer"], optimizer)
        if content.get("scaler"):  # empty but for fp16
            scaler.load_state_dict(content["scaler"] | {"scale": float(content["scaler"]["scale"])})
        return _state(content)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"{path}: does not fit this configuration: {_brief(error)}") from None


def _restore_momentum(stored: Mapping, optimizer: torch.optim.Optimizer) -> None:
    """Each weight's momentum, in the weight's own shape and layout: a fused optimizer trusts both, addresses and all.

    Raises ``ValueError`` for a state that is none of SGD's over these weights.
    """
    weights = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if sum(len(group["params"]) for group in stored["param_groups"]) != len(weights):
        raise ValueError(f"its optimizer has another number of weights than the {len(weights)} that learn here")
    for index, weight in enumerate(weights):
        state = stored["state"].get(index, {})
        momentum = state.get("momentum_buffer")
        if set(state) - {"momentum_buffer"}:
            raise ValueError(f"its optimizer's state has {_some(state)}, and SGD's only momentum_buffer")
        if momentum is None:
            continue
        if not (isinstance(momentum, torch.Tensor) and momentum.is_floating_point() and not momentum.is_sparse):
            raise ValueError("a momentum is no tensor of numbers")
        if momentum.shape != weight.shape:
            raise ValueError(f"a momentum has shape {tuple(momentum.shape)}, its weight {tuple(weight.shape)}")
        optimizer.state[weight]["momentum_buffer"] = torch.zeros_like(weight).copy_(momentum)


def _state(content: Mapping) -> TrainState:
    sums, components, log_size = content.get("sums"), content.get("components"), content.get("log_size")
    state = TrainState(
        epoch=int(content["epoch"]),
        step=int(content.get("step", 0)),
        sums=sums,
        seconds=float(content.get("seconds", 0.0)),
        log_size=log_size,
        best_acc1=float(content["best_acc1"]),
        its_ece=float(content["its_ece"]),
        components=components,
    )
    if state.epoch < 0 or state.step < 0:
        raise ValueError(f"its epoch {state.epoch} or step {state.step} is negative")
    if not all(map(math.isfinite, (state.seconds, state.best_acc1, state.its_ece))):
        raise ValueError("its time or its accuracy is not finite")
    if log_size is not None and (type(log_size) is not int or log_size < 0):
        raise ValueError("its log_size is no number of bytes")
    if state.step and not (_is_sums(sums) and sums.shape[1:] == (len(SUMS),)):
        raise ValueError(f"it lies within an epoch, at step {state.step}, and has no sums of that epoch's steps")
    if components is not None and not _is_sums(components):
        raise ValueError("its components are no sums of an epoch's diagnostics")
    return state


def _is_sums(value: object) -> bool:
    """Whether ``value`` is a row of sums for every process."""
    table = isinstance(value, torch.Tensor) and value.dtype == torch.float64 and value.dim() == 2
    return table and len(value) > 0


def environment(device: torch.device) -> dict[str, str | int]:
    """All beside configuration and data that last bits depend on."""
    return {
        "torch": str(torch.__version__),
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else torch.backends.cpu.get_cpu_capability(),
        "CPU threads": torch.get_num_threads(),
        "processes": distributed.world_size(),
    }


def changed_options(content: Mapping, config: Mapping) -> dict[str, tuple]:
    """Option -> (value in our checkpoint, value in ``config``) where they differ; paths and the like do not count."""
    saved = content["config"] if is_ours(content) else {}
    return {
        key: (saved[key], config[key])
        for key in config
        if key in saved and key not in INCIDENTAL and not _same(saved[key], config[key])
    }


def fork_of(config: Mapping) -> list[str]:
    """What a run began with, as the run's folder, ``ckps`` and the file: they stay when runs are moved."""
    return list(Path(str(config.get("fork") or "")).parts[-3:])


def _same(a: object, b: object) -> bool:
    return not isinstance(a, torch.Tensor) and a == b  # an option is no tensor


def _parts(model: nn.Module) -> dict[str, nn.Module]:
    """MiSLAS's key -> the part of ``model`` that it stands for."""
    return {key: getattr(model, part) for key, part in PARTS.items() if getattr(model, part, None) is not None}


def _strip(state: Mapping) -> dict:
    stripped = {}
    for name, value in state.items():
        while str(name).startswith(PREFIXES):
            name = name[len(next(p for p in PREFIXES if name.startswith(p))) :]
        stripped[name] = value
    return stripped


def _fold_scaling(classifier: dict, scaling: Mapping, path: str | Path) -> None:
    scale = scaling.get("learned_norm")
    if scale is None or scale.numel() != len(classifier.get("fc.weight", ())):
        raise CheckpointError(f"{path}: its state_dict_lws_model does not fit its classifier")
    classifier["fc.weight"] = classifier["fc.weight"] * scale.reshape(-1, 1)
    if "fc.bias" in classifier:
        classifier["fc.bias"] = classifier["fc.bias"] * scale.reshape(-1)


def _check_shapes(module: nn.Module, state: Mapping, path: str | Path) -> None:
    own = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    other = {name: tuple(getattr(value, "shape", ())) for name, value in state.items()}
    if own == other:
        return
    name = next(n for n in [*own, *other] if own.get(n) != other.get(n))
    raise CheckpointError(
        f"{path}: is of another architecture: {name} is {_shape(other, name)} in the file and {_shape(own, name)} in "
        "the model; check backbone, classifier, dataset and num_classes"
    )


def _shape(shapes: Mapping, name: str) -> str:
    return "x".join(map(str, shapes[name])) or "a number" if name in shapes else "absent"


def _numpy_scalars() -> list:
    """The few NumPy names that MiSLAS's pickled ``its_ece`` uses, as NumPy 1 and NumPy 2 spell them."""
    scalar = np.float64(0).__reduce__()[0]
    names = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
    kinds = [type(np.dtype(kind)) for kind in (np.float64, np.float32, np.int64)]
    return [*((scalar, name) for name in names), (np.dtype, "numpy.dtype"), *kinds]


def _some(keys: Iterable, most: int = 6) -> str:
    names = [str(key) for key in keys]
    return (", ".join(names[:most]) + (", ..." if len(names) > most else "")) or "nothing"


def _brief(error: Exception) -> str:
    return " ".join(str(error).split()).split(". ")[0][:160] or type(error).__name__
