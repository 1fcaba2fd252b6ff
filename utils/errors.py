"""The errors that end a script with one line instead of a traceback."""


class InputError(ValueError):
    """Something the user gave is wrong: the message names it and says, in one line, what would be right."""


class DivergenceError(ArithmeticError):
    """Training produced numbers that are not finite."""


class LostProcessError(RuntimeError):
    """Another process of the run has ended, and this one cannot go on without it."""


class Interrupted(BaseException):
    """A signal has asked the process to end. As KeyboardInterrupt no ``Exception``, so that nothing else catches it."""

    def __init__(self, number: int, message: str = ""):
        """``number`` of the signal; ``message``: what was kept, and how to go on."""
        super().__init__(message)
        self.number = number
