"""The errors that end a script with exit code 2 and one line instead of a traceback."""


class InputError(ValueError):
    """Something the user gave is wrong: the message names it and says, in one line, what would be right."""


class DivergenceError(ArithmeticError):
    """Training produced numbers that are not finite."""
