"""Errors that end a script with one line instead of a traceback, and those that do not end it."""

import contextlib
import warnings
from collections.abc import Iterator


class InputError(ValueError):
    """Invalid user input. The message is one line that names what is wrong and what would be right."""


class ConfigError(InputError):
    """A configuration that is missing, unreadable, contradictory or out of range."""


class DivergenceError(ArithmeticError):
    """Training produced values that are not finite."""


class LostProcessError(RuntimeError):
    """Another process of the run has exited, so this one cannot continue."""


class Interrupted(BaseException):
    """A signal asked the process to stop.

    Derives from ``BaseException``, like ``KeyboardInterrupt``, so that ``except Exception`` does not catch it.
    """

    def __init__(self, number: int, message: str = ""):
        """``number``: of the signal; ``message``: what was saved, and the command that resumes."""
        super().__init__(message)
        self.number = number


@contextlib.contextmanager
def describing(what: str) -> Iterator[None]:
    """Turn a failure in the block into a warning: what only describes a run does not end it.

    Errors that have a line of their own pass, and so do those of files: a full disk concerns every other file too.
    """
    try:
        yield
    except (InputError, OSError):
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        warnings.warn(f"{what} is left out ({reason})", stacklevel=3)
