"""The table of options: roles, and the help text that lists it."""

import pytest

import train_stage1
from utils.config import FIXED, INCIDENTAL, OPTIONS


def test_every_option_has_a_known_role():
    assert {option.role for option in OPTIONS.values()} == {"data", "network", "training", "incidental"}


def test_a_resumed_run_keeps_its_data_and_network():
    assert {"dataset", "imb_factor", "subset_seed", "val_per_class", "backbone", "classifier"} <= set(FIXED)
    assert not set(FIXED) & set(INCIDENTAL)


def test_what_is_trained_does_not_depend_on_where_or_how_often_something_is_written():
    assert {"name", "save_dir", "device", "workers", "print_freq", "checkpoint_every_steps"} <= set(INCIDENTAL)
    assert not {"seed", "lr", "loss", "precision", "batch_size", "eval_every"} & set(INCIDENTAL)


def test_help_lists_every_option_with_its_default_and_description(capsys):
    with pytest.raises(SystemExit) as end:
        train_stage1.main(["--help"])
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert end.value.code == 0
    for key, option in OPTIONS.items():
        assert ("null" if option.default is None else str(option.default)) in lines[key]
        assert option.doc in lines[key]
