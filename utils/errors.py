"""Errors that end a script with one line instead of a traceback."""


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
