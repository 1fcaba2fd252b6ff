"""Which options go together, and which have no effect beside others."""

from collections.abc import Mapping
from pathlib import Path

from utils.errors import ConfigError

MOVING_MEANS = ("nc_means", "nc_dual", "spa")  # what needs moving class means


def has_moving_means(values: Mapping) -> bool:
    return any(values.get(key) for key in MOVING_MEANS)


def unused(values: dict) -> list[tuple[str, str]]:
    """Options that have no effect beside the others, each with the reason."""
    unused = [("betas", "optimizer: sgd has momentum")]
    if values["optimizer"] == "adamw":
        unused = [(key, "optimizer: adamw has betas") for key in ("momentum", "nesterov")]
    if values["cos"]:
        unused += [(key, "the cosine schedule (cos: True) has no steps") for key in ("lr_steps", "lr_step_factors")]
    if values["cos"] and not values["cos_warmup"]:
        unused.append(("warmup_epochs", "cos: True has no warm-up without cos_warmup: True"))
    if values["cos_warmup"] and not values["cos"]:
        unused.append(("cos_warmup", "cos: False always has a warm-up"))
    for option, kinds, keys in (
        ("augment", ["randaugment"], ("num_ops", "magnitude")),
        ("mix", ["cutmix", "cmo"], ("mix_prob",)),
        ("mix", ["cmo"], ("cmo_alpha", "cmo_idle")),
        ("spa", ["proj"], ("spa_gamma",)),
        ("spa", ["slerp"], ("spa_step",)),
    ):
        if values[option] not in kinds:
            unused += [(key, f"it is for {option}: {' or '.join(kinds)}") for key in keys]
    return unused


def check_together(values: dict, path: str | Path) -> None:
    """Raise :class:`ConfigError`, a line that begins with the file's ``path``, for options that exclude each other."""
    if len(values["lr_steps"]) != len(values["lr_step_factors"]):
        raise ConfigError(
            f"{path}: lr_steps {values['lr_steps']} and lr_step_factors {values['lr_step_factors']} "
            "must have the same length"
        )
    if values["loss"] == "las" and (values["smooth_head"] is None or values["smooth_tail"] is None):
        raise ConfigError(f"{path}: loss: las needs smooth_head and smooth_tail, such as 0.3 and 0.0")
    if values["loss"] == "las" and values["smooth_shape"] == "exp" and values["smooth_power"] is None:
        raise ConfigError(f"{path}: smooth_shape: exp needs smooth_power, such as 2.0")
    if (values["mixup"] or values["mix"]) and values["alpha"] is None:
        raise ConfigError(f"{path}: {'mixup: True' if values['mixup'] else 'mix'} needs alpha, such as 1.0")
    if values["mixup"] and values["mix"] not in (None, "mixup"):
        raise ConfigError(f"{path}: mix: {values['mix']} takes the place of mixup: True; set mixup: False")
    if values["mix"] == "cmo" and 2 * values["cmo_idle"] >= values["num_epochs"]:
        idle, epochs = values["cmo_idle"], values["num_epochs"]
        raise ConfigError(f"{path}: cmo_idle: {idle} first and {idle} last epochs leave none of {epochs} for CMO")
    _check_method(values, path)
    _check_optimization(values, path)
    ranges = [key for key in ("head_class_idx", "med_class_idx", "tail_class_idx") if values[key] is not None]
    if len(ranges) in (1, 2):
        raise ConfigError(f"{path}: head_class_idx, med_class_idx and tail_class_idx come together; {ranges} alone")


def _check_method(values: dict, path: str | Path) -> None:
    """Some losses and regularizers need a kind of classifier, another regularizer, or a whole batch."""
    for loss, classifier, why in (
        ("ldam", "cosine", "its margins are taken from cosines"),
        ("dot_regression", "simplex", "it compares features with rows that do not train"),
    ):
        if values["loss"] == loss and values["classifier"] != classifier:
            raise ConfigError(f"{path}: loss: {loss} needs classifier: {classifier}, not {values['classifier']}: {why}")
    if values["label_smoothing"] > 0:
        _check_label_smoothing(values["label_smoothing"], values["loss"], values["class_counts"], path)
    if values["nc_between"] > 0 and values["nc_within"] == 0:
        raise ConfigError(
            f"{path}: nc_between needs nc_within, such as 0.01: it moves the class means alone, and features only "
            "through nc_within"
        )
    turning = [key for key in ("nc_rows", "nc_dual", "spa") if values[key]]
    if turning and values["classifier"] == "simplex":
        raise ConfigError(
            f"{path}: {turning[0]} needs classifier: linear or cosine, not simplex: it moves the classifier's rows"
        )
    moving = [key for key in MOVING_MEANS if values[key]]
    if moving and values["accumulate"] > 1:
        raise ConfigError(
            f"{path}: {moving[0]} needs accumulate: 1, not {values['accumulate']}: its class means are of whole batches"
        )


def _check_label_smoothing(share: float, loss: str, class_counts: str, path: str | Path) -> None:
    if share == 1:
        raise ConfigError(f"{path}: label_smoothing: 1 would train without labels; use less, such as 0.1")
    losses, counts = ("ce", "arb", "logit_adjustment"), ("global", "batch_unmasked")
    if loss not in losses:
        raise ConfigError(f"{path}: label_smoothing is for loss: {', '.join(losses)}, not {loss}; use 0")
    if loss == "arb" and class_counts not in counts:
        raise ConfigError(
            f"{path}: label_smoothing with loss: arb needs class_counts: {' or '.join(counts)}, not {class_counts}: a "
            "class that is absent from the batch would make the loss infinite"
        )


def _check_optimization(values: dict, path: str | Path) -> None:
    if values["optimizer"] == "adamw" and values["nc_within"] > 0:
        raise ConfigError(f"{path}: nc_within needs optimizer: sgd, not adamw: its class means train by plain SGD")
    if values["optimizer"] == "sgd" and values["nesterov"] and values["momentum"] == 0:
        raise ConfigError(f"{path}: nesterov: True needs momentum above 0, such as 0.9")
    if values["sam"] > 0 and values["accumulate"] > 1:
        raise ConfigError(
            f"{path}: sam needs accumulate: 1, not {values['accumulate']}: micro-batches would each have another "
            "perturbation"
        )
    if values["ema"] == 1:
        raise ConfigError(f"{path}: ema: 1 would keep the initial weights; use a decay below 1, such as 0.999")
