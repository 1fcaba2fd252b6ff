"""Errors that end a script with one line instead of a traceback."""


class InputError(ValueError):
    """Bad input; the message is one line that names it and says what would be right."""


class DivergenceError(ArithmeticError):
    """Training produced numbers that are not finite."""


class LostProcessError(RuntimeError):
    """Another process of the run has ended, and this one cannot continue without it."""


class Interrupted(BaseException):
    """A signal has asked the process to end.

    Derives from ``BaseException``, like ``KeyboardInterrupt``, so that ``except Exception`` does not catch it.
    """

    def __init__(self, number: int, message: str = ""):
        """``number`` of the signal; ``message``: which checkpoint was saved, and how to resume."""
        super().__init__(message)
        self.number = number
