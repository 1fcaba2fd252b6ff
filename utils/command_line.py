"""Command lines, and the exit codes of the scripts."""

import argparse
import contextlib
import difflib
import errno
import os
import re
import signal
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn, TextIO

from utils import launcher
from utils.errors import DivergenceError, InputError, Interrupted, LostProcessError
from utils.option_types import user_path
from utils.signals import NAMES


def check_packages() -> None:
    """Name a package of another project in the place of ours: many have ``models``, Hugging Face has ``datasets``."""
    root = Path(__file__).resolve().parents[1]
    for name in ("datasets", "methods", "models"):
        spec = find_spec(name)
        if spec is None or Path(spec.origin or "").resolve().parents[1] != root:
            where = "run from this project's folder, or put it first in PYTHONPATH"
            message = f"`{name}` is {spec and spec.origin}, not this project's: {where}"
            if root in Path(sys.argv[0]).resolve().parents:  # a command of ours, not somebody's notebook
                sys.stderr.write(f"error: {message}\n")
                raise SystemExit(2)
            raise ImportError(message)


check_packages()


class Parser(argparse.ArgumentParser):
    """Reports errors in one line, and takes ``key value`` as other trainers do: ``key=value``, ``--key value``."""

    def __init__(self, *, hint: str, keys: Collection[str] = (), **options: Any):
        """``hint`` ends every message and says what would be right; ``%(prog)s`` is the program's name."""
        super().__init__(**options)
        self.hint, self.keys = hint, keys

    def parse_intermixed_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> argparse.Namespace:
        words = []
        for word in sys.argv[1:] if args is None else args:
            key, equals, value = word.removeprefix("--").partition("=")
            own = f"--{key}" in self._option_string_actions
            key = key.replace("-", "_")
            if key not in self.keys or own or word == key:
                words.append(word)
            else:
                words += [key, value] if equals else [key]
        return super().parse_intermixed_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        unknown = re.match(r"unrecognized arguments: --([\w-]+)", message)
        near = unknown and difflib.get_close_matches(unknown[1].replace("-", "_"), self.keys, n=1)
        if near:
            message = f"unknown option --{unknown[1]}; the nearest known one is {near[0]}"
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


def path(text: str) -> Path:
    """An argparse type: a path, with ``~`` and ``$VARIABLES`` replaced as in a configuration."""
    try:
        return Path(user_path(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} {error}") from None


def output_file(text: str) -> Path:
    """An argparse type: :func:`path` of a file that may be written, in an existing folder."""
    file = path(text)
    if file.is_dir() or not file.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} must be a file in an existing folder")
    return file


def parse(
    description: str,
    arguments: Sequence[str] | None = None,
    keys: Collection[str] = (),
    epilog: str = "",
    **options: dict,
) -> argparse.Namespace:
    """Parse ``--cfg FILE [key value ...]``.

    ``keys``: what may also be written ``key=value`` or ``--key value``. ``epilog`` ends ``--help``, as it is.
    ``options``: a script's own, from name to the keywords of ``add_argument``.
    ``--local-rank``, which torch.distributed.launch passes, is accepted and not needed.
    """
    hint = " (usage: %(prog)s --cfg FILE [key value ...], such as lr 0.05)"
    layout = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=description, hint=hint, keys=keys, epilog=epilog, formatter_class=layout)
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
    for name in ("stdout", "stderr"):
        _prepare(name)
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


def refuse_at_once(read: Callable[[], object]) -> None:
    """Exit if ``read`` refuses the command line or what it names, or prints help; before torch is imported.

    Torch takes seconds. Several processes read together instead, see :func:`utils.distributed.together`.
    """
    code = 0 if launcher.launched() else exit_code(lambda: read() and None)
    if code:
        sys.exit(code)


def _print_error(line: str) -> None:
    with discard_if_closed(sys.stderr):
        print(" ".join(line.split()), file=sys.stderr)


def say(*lines: str) -> None:
    """Print ``lines`` to standard output, see :func:`discard_if_closed`."""
    with discard_if_closed(sys.stdout):
        sys.stdout.writelines(f"{line}\n" for line in lines)


@contextlib.contextmanager
def discard_if_closed(stream: TextIO) -> Iterator[None]:
    """Flush ``stream`` after the block; once it cannot be written, its output is discarded.

    A reader that has gone (a pipe, a terminal) is no news; any other reason is said on standard error.
    """
    try:
        yield
        stream.flush()
    except OSError as error:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())
        if error.errno not in (errno.EPIPE, errno.EIO) and stream is not sys.stderr:
            _print_error(f"warning: standard output cannot be written ({error.strerror}); what follows is discarded")


def _prepare(name: str) -> None:
    """Make ``sys.stdout`` or ``sys.stderr`` take any character, and exist even if the caller has closed it."""
    stream = getattr(sys, name)
    if stream is None:
        setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (for as long as the process lasts)
    elif hasattr(stream, "reconfigure"):
        with contextlib.suppress(OSError):  # a closed pipe
            stream.reconfigure(errors="backslashreplace")
