"""What the scripts share: their command line, and the exit code 2 with one line for bad input."""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from utils import distributed
from utils.errors import DivergenceError, InputError, Interrupted, LostProcessError
from utils.signals import NAMES


class Parser(argparse.ArgumentParser):
    """One line, as for every other bad input, instead of argparse's usage."""

    def __init__(self, *, hint: str, **options: Any):
        """``hint``: what follows the message, and says what would be right, ``%(prog)s`` being the program's name.

        ``options``: of argparse.
        """
        super().__init__(**options)
        self.hint = hint

    def error(self, message: str) -> NoReturn:
        raise InputError(f"command line: {message}{self.hint % {'prog': self.prog}}")


def parse(
    description: str, arguments: Sequence[str] | None = None, epilog: str = "", **options: dict
) -> argparse.Namespace:
    """``--cfg FILE [key value ...]``; ``--local-rank`` comes from torch.distributed.launch and is not needed.

    ``epilog``: text at the end of ``--help``, as it is. ``options``: a script's own, from name to the keywords of
    ``add_argument``.
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
    """What ``main`` returns, or 0; 2 after one line on standard error where the input or the numbers were bad.

    1 after such a line where it is another process that failed; 128 + signal after one where a signal ended it.
    """
    try:
        return main() or 0
    except (InputError, DivergenceError, LostProcessError) as error:
        _say(f"error{distributed.who()}: {error}")
        return 1 if isinstance(error, LostProcessError) else 2
    except (Interrupted, KeyboardInterrupt) as stop:
        number = stop.number if isinstance(stop, Interrupted) else signal.SIGINT
        for name in NAMES:  # to end takes torch a while, in which a further signal would change the exit code
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), signal.SIG_IGN)
        if distributed.speaks():
            _say(f"stopped by {signal.Signals(number).name}" + f": {stop}" * bool(str(stop)))
        return 128 + number


def _say(line: str) -> None:
    try:
        print(" ".join(line.split()), file=sys.stderr, flush=True)
    except OSError:  # nobody listens any more; the exit code is still worth something
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
