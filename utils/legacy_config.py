"""Translate the configuration keys of MiSLAS and ARBLOSS: ``arbloss: True`` becomes ``loss: arb``, and so on."""

from utils.errors import ConfigError

# Keys that have no effect here -> the reason, for the log.
OBSOLETE = {
    **dict.fromkeys(
        ["distributed", "gpu", "world_size", "rank", "dist_url", "dist_backend", "multiprocessing_distributed"],
        "the launcher decides",
    ),
    **dict.fromkeys(["mode", "shift_bn", "lr_factor", "train_stage2_instance"], "stage 2 only"),
    **dict.fromkeys(["log_dir", "model_dir"], "a run's folder has one fixed layout"),
}

# Switches that choose the loss -> our ``loss``.
LOSS_SWITCHES = {"arbloss": "arb", "warbloss": "weighted_arb", "arbloss_fl": "focal_arb", "LAS": "las"}
# Our ``loss`` -> the switches that would choose it.
IMPLIED_SWITCHES = {
    "arb": {"arbloss": True},
    "weighted_arb": {"arbloss": True, "warbloss": True},
    "focal_arb": {"arbloss": True, "arbloss_fl": True},
    "las": {"LAS": True},
}
OLD_SWITCHES = (*LOSS_SWITCHES, "arb_loss_use_global_class_cnt", "not_pretrained")


def obsolete_notes(where: str, source: dict) -> list[str]:
    """Log notes for the keys of ``source`` that are ignored."""
    notes = []
    for reason in dict.fromkeys(OBSOLETE.values()):
        keys = [key for key in source if OBSOLETE.get(key) == reason]
        if keys:
            notes.append(f"{where}: ignored {', '.join(keys)} ({reason})")
    return notes


def translate(source: dict, before: dict, switches: dict, where: str, notes: list[str]) -> tuple[dict, dict[str, bool]]:
    """Translate the old switches of one source (a file or the command line).

    Args:
        source: Checked values by key, old and new.
        before: Our options as earlier sources left them.
        switches: Loss switches as earlier sources left them.
        where: Name of the source, for messages.
        notes: Log notes; translations that change an option are appended.

    Returns:
        Our options that this source sets, and the loss switches after it.

    Raises:
        ConfigError: An old and a new key of the same source disagree.
    """
    new = {key: value for key, value in source.items() if key not in (*OLD_SWITCHES, *OBSOLETE)}
    loss, switches = _old_loss(source, before["loss"], switches, where)
    old = {} if loss is None else {"loss": loss}
    if "arb_loss_use_global_class_cnt" in source:
        old["class_counts"] = "global" if source["arb_loss_use_global_class_cnt"] else "batch"
    if source.get("not_pretrained"):
        old["pretrained"] = False
    elif "not_pretrained" in source and (before["pretrained"] is False or new.get("pretrained") is False):
        old["pretrained"] = None  # the data set's habit
    for key, value in old.items():
        given = ", ".join(f"{k}: {v}" for k, v in source.items() if k in OLD_SWITCHES and _sets(k) == key)
        if key in new and new[key] != value:
            raise ConfigError(f"{where}: {given} (read as {key}: {value}) and {key}: {new[key]} disagree; keep one")
        if before[key] != value:
            notes.append(f"{where}: {given} is read as {key}: {value}")
        new[key] = value
    return new, switches


def _sets(switch: str) -> str:
    """The option that an old switch sets."""
    return {"arb_loss_use_global_class_cnt": "class_counts", "not_pretrained": "pretrained"}.get(switch, "loss")


def _old_loss(source: dict, before: str, switches: dict, where: str) -> tuple[str | None, dict[str, bool]]:
    """Return the loss that the switches of this source choose (None: no switch is given) and all switches after it.

    Switches keep their values from source to source; a ``loss`` key resets them.
    """
    given = {key: source[key] for key in LOSS_SWITCHES if key in source}
    implied = IMPLIED_SWITCHES.get(source.get("loss"), {})
    if not given:
        return None, implied if "loss" in source else switches
    merged = given if "loss" in source else {**switches, **given}
    # A variant replaces one from an earlier source; arbloss: False switches all variants off.
    if given.get("arbloss") is False or any(given.get(key) for key in ("warbloss", "arbloss_fl")):
        merged = {key: value for key, value in merged.items() if key in given or key in ("arbloss", "LAS")}
    on = [key for key in LOSS_SWITCHES if merged.get(key)]
    variants = [key for key in on if key != "arbloss"]
    arb = next((key for key in (*on, *implied) if key != "LAS"), None)
    if "LAS" in on and arb:
        raise ConfigError(
            f"{where}: LAS and {arb} cannot both be True: label-aware smoothing over ARB's log-probabilities is "
            "infinite with batch counts (a class absent from the batch has log-probability -inf) and moves decisions "
            "to rare classes with global ones; switch one off"
        )
    if len(variants) > 1:
        raise ConfigError(f"{where}: {' and '.join(variants)} are both True and choose different losses; keep one")
    if on:
        return LOSS_SWITCHES[(variants or on)[0]], merged
    if "loss" not in source:
        return ("ce" if before in LOSS_SWITCHES.values() else before), merged
    wrong = [key for key in given if LOSS_SWITCHES[key] == source["loss"]]
    if wrong:
        raise ConfigError(f"{where}: {wrong[0]}: False and loss: {source['loss']} disagree; keep one")
    return None, implied
