"""Errors that scripts turn into an exit code."""

import signal

import pytest

from utils.errors import Interrupted


def test_except_exception_does_not_catch_interrupted():
    with pytest.raises(Interrupted) as stop:
        try:
            raise Interrupted(signal.SIGTERM, "kept")
        except Exception:
            raise AssertionError from None
    assert (stop.value.number, str(stop.value)) == (15, "kept")
    assert str(Interrupted(2)) == ""
