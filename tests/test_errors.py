"""Errors that scripts turn into an exit code."""

import signal

import pytest

from utils.errors import InputError, Interrupted, describing


def test_except_exception_does_not_catch_interrupted():
    with pytest.raises(Interrupted) as stop:
        try:
            raise Interrupted(signal.SIGTERM, "kept")
        except Exception:
            raise AssertionError from None
    assert (stop.value.number, str(stop.value)) == (15, "kept")
    assert str(Interrupted(2)) == ""


def test_what_only_describes_becomes_a_warning_and_files_that_fail_do_not():
    with pytest.warns(UserWarning, match=r"^the figure is left out \(KeyError: 'x'\)$"), describing("the figure"):
        {}["x"]
    for error in (InputError("wrong"), OSError("full"), Interrupted(15)):
        with pytest.raises(type(error)), describing("the figure"):
            raise error
