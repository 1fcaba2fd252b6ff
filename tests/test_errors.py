"""The errors that scripts answer with an exit code."""

import signal

import pytest

from utils.errors import Interrupted


def test_a_signal_is_no_exception_that_somebody_catches_by_the_way():
    with pytest.raises(Interrupted) as stop:
        try:
            raise Interrupted(signal.SIGTERM, "kept")
        except Exception:
            raise AssertionError from None
    assert (stop.value.number, str(stop.value)) == (15, "kept")
    assert str(Interrupted(2)) == ""
