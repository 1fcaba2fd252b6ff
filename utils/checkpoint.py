"""Checkpoints: written atomically, read without running code that a file may carry.

The keys are MiSLAS's (``epoch state_dict_model state_dict_classifier [state_dict_block] best_acc1 its_ece``), so that
its stage 2 reads our files, plus what exact resuming needs. Files hold tensors, plain containers and numbers only.
"""

import math
import os
import pickle
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from utils.ema import AveragedModel
from utils.errors import InputError
from utils.files import atomic_file
from utils.meter import SUMS
from utils.optimizer import fresh_state

# MiSLAS's key -> attribute of the model.
PARTS = {"state_dict_model": "backbone", "state_dict_block": "block", "state_dict_classifier": "classifier"}
AVERAGED = "averaged"  # holds the same keys, with averaged weights
PREFIXES = ("module.", "_orig_mod.")  # of DataParallel / DistributedDataParallel and of torch.compile


class CheckpointError(InputError):
    """A checkpoint that is missing, damaged, unsafe to load or of another architecture."""


@dataclass
class TrainState:
    """Progress of a run. Everything else that training depends on is a function of (seed, epoch)."""

    epoch: int = 0  # epochs finished
    step: int = 0  # steps finished in the current epoch
    sums: torch.Tensor | None = None  # of the current epoch, see TrainMeter.rows
    seconds: float = 0.0  # spent on the current epoch
    log_size: int | None = None  # bytes of the text log; None: unknown
    best_acc1: float = -1.0  # percent, on the images that select the best epoch (``selected_on``)
    its_ece: float = 0.0  # percent, on the test set, of the best epoch
    components: torch.Tensor | None = None  # diagnostics of the current epoch, see ComponentMeter.rows


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
    average: AveragedModel | None = None,
    **provenance: Any,
) -> None:
    """Write everything that a later ``resume`` needs. ``model`` is the bare module, not a parallel wrapper.

    ``selected_on``: the images that select the best epoch. ``provenance``: entries that are stored as they are. See
    :func:`utils.run.provenance.provenance`.
    """
    content = {
        **vars(state),
        "best_acc1": torch.tensor([state.best_acc1], dtype=torch.float64),  # exact, or a tie would become a new best
        **_states(model),
        **({} if average is None else {AVERAGED: _states(average.model)}),
        "state_dict_method": method.state_dict(),
        "optimizer": _portable(optimizer.state_dict()),
        "scaler": scaler.state_dict(),
        "config": dict(config),
        "selected_on": selected_on,
        **provenance,
    }
    with atomic_file(path) as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # torch hides the OSError of a failed write in the context
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None


def _states(model: nn.Module) -> dict[str, dict]:
    return {key: part.state_dict() for key, part in _parts(model).items()}


def _portable(state: dict) -> dict:
    """Convert learning rates to floats: for a CUDA graph the optimizer holds them as tensors on the device."""
    groups = [group | {"lr": float(group["lr"])} for group in state["param_groups"]]
    return state | {"param_groups": groups}


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read_checkpoint(path: str | Path) -> dict:
    """Load a file of tensors and plain containers as a dict on the CPU, without running code in it.

    Raises:
        CheckpointError: One line that says what is wrong with the file.
    """
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
            warnings.simplefilter("ignore")  # torch warns about a plain pickle and then raises
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
    """Verify the checksums of a zip file, which ``torch.load`` does not. Raises ``ValueError``."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            wrong = archive.testzip()
        if wrong:
            raise ValueError(f"the check sum of {wrong} is wrong")


def is_ours(content: Mapping) -> bool:
    """Whether a checkpoint holds everything that exact resuming needs, not only weights."""
    whole = all(key in content for key in ("optimizer", "state_dict_method", "selected_on"))
    return whole and isinstance(content.get("config"), Mapping)


def stored_class_map(content: Mapping, path: str | Path) -> torch.Tensor | None:
    """Return the class map of a checkpoint, int64 [C], or None. Raises :class:`CheckpointError`."""
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


def load_weights(model: nn.Module, path: str | Path) -> dict:
    """Load backbone, block and classifier from a checkpoint of ours, of MiSLAS or of ARBLOSS.

    Prefixes of wrappers are stripped. Stage 2's learnable scaling ``s`` of the logits is folded into the classifier,
    which is exact: ``s * (W h + b) = (s W) h + (s b)``.

    Returns:
        ``epoch``, ``best_acc1`` (percent or None), ``class_map`` (or None) and ``source``, a description of the file.

    Raises:
        CheckpointError: The file cannot be read or does not fit the model.
    """
    return load_content(model, read_checkpoint(path), path)


def load_content(model: nn.Module, content: Mapping, path: str | Path) -> dict:
    """:func:`load_weights` from the content of a checkpoint; ``path`` is for messages."""
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
    average: AveragedModel | None = None,
) -> TrainState:
    """Restore a run from a checkpoint of ours and return its progress.

    Of the optimizer only what it keeps of each weight is restored; weight decay and so on come from this
    configuration. ``average`` starts from the weights if the checkpoint has none.
    """
    load_content(model, content, path)
    if average is not None:
        load_content(average.model, content.get(AVERAGED, content), path)
    try:
        method.load_state_dict(content["state_dict_method"])
        _restore_optimizer(content["optimizer"], optimizer)
        if content.get("scaler"):  # empty except for fp16
            scaler.load_state_dict(content["scaler"] | {"scale": float(content["scaler"]["scale"])})
        return _state(content)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"{path}: does not fit this configuration: {_brief(error)}") from None


def _restore_optimizer(stored: Mapping, optimizer: torch.optim.Optimizer) -> None:
    """Copy each weight's state. Shapes and strides must match the weight's: the fused kernel does not check them.

    Raises ``ValueError`` if the state is not one of this optimizer over these weights.
    """
    weights = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if sum(len(group["params"]) for group in stored["param_groups"]) != len(weights):
        raise ValueError(f"its optimizer does not have the {len(weights)} weights that are trained here")
    for index, weight in enumerate(weights):
        state, own = stored["state"].get(index, {}), fresh_state(optimizer, weight)
        if state and state.keys() != own.keys():
            raise ValueError(
                f"its optimizer's state has {_some(state)}, and {type(optimizer).__name__}'s only {_some(own)}"
            )
        for name, value in state.items():
            if value is None:  # SGD's before the first step
                continue
            what = "a momentum" if name == "momentum_buffer" else f"a state's {name}"
            if not (isinstance(value, torch.Tensor) and value.is_floating_point() and not value.is_sparse):
                raise ValueError(f"{what} is not a dense floating-point tensor")
            if value.shape != own[name].shape:
                raise ValueError(f"{what} has shape {tuple(value.shape)}, not {tuple(own[name].shape)}")
            optimizer.state[weight][name] = own[name].copy_(value)


def _state(content: Mapping) -> TrainState:
    sums, components, log_size = content.get("sums"), content.get("components"), content.get("log_size")
    epoch, step, seconds = int(content["epoch"]), int(content.get("step", 0)), float(content.get("seconds", 0.0))
    best_acc1, its_ece = float(content["best_acc1"]), float(content["its_ece"])
    state = TrainState(epoch, step, sums, seconds, log_size, best_acc1, its_ece, components)
    if state.epoch < 0 or state.step < 0:
        raise ValueError(f"its epoch {state.epoch} or step {state.step} is negative")
    if not all(map(math.isfinite, (state.seconds, state.best_acc1, state.its_ece))):
        raise ValueError("its time or its accuracy is not finite")
    if log_size is not None and (type(log_size) is not int or log_size < 0):
        raise ValueError("its log_size is not a number of bytes")
    if state.step and not (_is_sums(sums) and sums.shape[1:] == (len(SUMS),)):
        raise ValueError(f"it is within an epoch, at step {state.step}, and has no sums of that epoch's steps")
    if components is not None and not _is_sums(components):
        raise ValueError("its components are not sums of an epoch's diagnostics")
    return state


def _is_sums(value: object) -> bool:
    """Whether ``value`` has one row of sums per process."""
    table = isinstance(value, torch.Tensor) and value.dtype == torch.float64 and value.dim() == 2
    return table and len(value) > 0


def _parts(model: nn.Module) -> dict[str, nn.Module]:
    """Return the parts of ``model`` by MiSLAS's keys."""
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
    """NumPy types in MiSLAS's pickled ``its_ece``, under the names of NumPy 1 and NumPy 2."""
    scalar = np.float64(0).__reduce__()[0]
    names = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
    kinds = [type(np.dtype(kind)) for kind in (np.float64, np.float32, np.int64)]
    return [*((scalar, name) for name in names), (np.dtype, "numpy.dtype"), *kinds]


def _some(keys: Iterable, most: int = 6) -> str:
    names = [str(key) for key in keys]
    return (", ".join(names[:most]) + (", ..." if len(names) > most else "")) or "nothing"


def _brief(error: Exception) -> str:
    return " ".join(str(error).split()).split(". ")[0][:160] or type(error).__name__
