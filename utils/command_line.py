"""Command lines, and the exit codes of the scripts."""

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn, TextIO

from utils import launcher
from utils.errors import DivergenceError, InputError, Interrupted, LostProcessError
from utils.signals import NAMES


class Parser(argparse.ArgumentParser):
    """Reports errors in one line."""

    def __init__(self, *, hint: str, **options: Any):
        """``hint`` ends every message and says what would be right; ``%(prog)s`` is the program's name."""
        super().__init__(**options)
        self.hint = hint

    def error(self, message: str) -> NoReturn:
        raise InputError(f"command line: {message}{self.hint % {'prog': self.prog}}")


def positive(kind: type, **words: int) -> Callable[[str], float]:
    """Return an argparse type for numbers above 0: ``int`` or ``float``.

    ``words``: accepted in place of a number, with the values that they stand for.
    """
    expected = " or ".join([*words, f"a {'whole ' * (kind is int)}number above 0"])

    def parse_number(text: str) -> float:
        if text in words:
            return words[text]
        with contextlib.suppress(ValueError):
            if kind(text) > 0:
                return kind(text)
        raise argparse.ArgumentTypeError(f"must be {expected}, not {text!r}")

    return parse_number


def parse(
    description: str, arguments: Sequence[str] | None = None, epilog: str = "", **options: dict
) -> argparse.Namespace:
    """Parse ``--cfg FILE [key value ...]``.

    ``epilog`` ends ``--help``, as it is. ``options``: a script's own, from name to the keywords of ``add_argument``.
    ``--local-rank``, which torch.distributed.launch passes, is accepted and not needed.
    """
    hint = " (usage: %(prog)s --cfg FILE [key value ...], such as lr 0.05)"
    layout = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=description, hint=hint, epilog=epilog, formatter_class=layout)
    parser.add_argument("--cfg", required=True, metavar="FILE", help="YAML file, see config/")
    for name, keywords in options.items():
        parser.add_argument(f"--{name}", **keywords)
    parser.add_argument("--local-rank", "--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="key value", help="such as: lr 0.05 seed 1")
    return parser.parse_intermixed_args(arguments)


def exit_code(main: Callable[[], int | None]) -> int:
    """Run ``main`` and return the exit code; expected errors become one line on standard error.

    2: bad input, or numbers that are not finite. 1: another process of the run has failed. 128 + signal: stopped by it.
    """
    try:
        return main() or 0
    except (InputError, DivergenceError, LostProcessError) as error:
        _print_error(f"error{launcher.who()}: {error}")
        return 1 if isinstance(error, LostProcessError) else 2
    except (Interrupted, KeyboardInterrupt) as stop:
        number = stop.number if isinstance(stop, Interrupted) else signal.SIGINT
        for name in NAMES:  # torch takes a while to finalize, and a second signal would change the exit code
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), signal.SIG_IGN)
        if launcher.speaks():
            _print_error(f"stopped by {signal.Signals(number).name}" + f": {stop}" * bool(str(stop)))
        return 128 + number


def _print_error(line: str) -> None:
    with discard_if_closed(sys.stderr):
        print(" ".join(line.split()), file=sys.stderr)


@contextlib.contextmanager
def discard_if_closed(stream: TextIO) -> Iterator[None]:
    """Flush ``stream`` after the block; once its reader (a pipe, a terminal) has gone, its output is discarded."""
    try:
        yield
        stream.flush()
    except OSError:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())
