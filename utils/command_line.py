"""What the scripts share: their command line, and the exit code 2 with one line for bad input."""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from utils import distributed
from utils.errors import DivergenceError, InputError, LostProcessError


class _Parser(argparse.ArgumentParser):
    """One line, as for every other bad input, instead of argparse's usage."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"command line: {message} (usage: {self.prog} --cfg FILE [key value ...], such as lr 0.05)")


def parse(description: str, arguments: Sequence[str] | None = None, **options: dict) -> argparse.Namespace:
    """``--cfg FILE [key value ...]``; ``--local-rank`` comes from torch.distributed.launch and is not needed.

    ``options``: a script's own, from name to the keywords of ``add_argument``.
    """
    parser = _Parser(description=description)
    parser.add_argument("--cfg", required=True, metavar="FILE", help="YAML file, see config/")
    for name, keywords in options.items():
        parser.add_argument(f"--{name}", **keywords)
    parser.add_argument("--local-rank", "--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="key value", help="such as: lr 0.05 seed 1")
    return parser.parse_intermixed_args(arguments)


def exit_code(main: Callable[[], int | None]) -> int:
    """What ``main`` returns, or 0; 2 after one line on standard error where the input or the numbers were bad.

    1 after such a line where it is another process that failed.
    """
    try:
        return main() or 0
    except (InputError, DivergenceError, LostProcessError) as error:
        print(f"error{distributed.who()}: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return 1 if isinstance(error, LostProcessError) else 2
