"""The log of a run: text, ``metrics.jsonl`` and TensorBoard.

Only rank 0 writes; on all other ranks the methods of :class:`RunLog` do nothing.
"""

import contextlib
import logging
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from utils import distributed
from utils.command_line import discard_if_closed
from utils.errors import DivergenceError, InputError, describing
from utils.files import atomic_file, lock_file, named
from utils.run.folder import read_rows, write_rows

REPEATED = ("Epoch: [", "* Acc@1", "* ECE", "* EMA")  # prefixes of lines that a repeated epoch writes again
TIME = len("2026-01-31 23:59:59,999 ")
SCALAR_CLASSES = 100  # TensorBoard: one curve per class up to this many, beyond that a histogram


class _Terminal(logging.Handler):
    """Writes to standard output above the progress bar; a closed output is ignored."""

    def emit(self, record: logging.LogRecord) -> None:
        with discard_if_closed(sys.stdout):
            tqdm.write(self.format(record), file=sys.stdout)


class _File(logging.FileHandler):
    """Writes to the text log; a failed write is an error, as for every other file."""

    def handleError(self, record: logging.LogRecord) -> None:
        with named(self.baseFilename):
            raise


class RunLog:
    """Writes the text log, ``metrics.jsonl`` and TensorBoard of one run.

    Errors that leave the block name the last good checkpoint.

    Args:
        folder: Of the run.
        name: Of the text log.
        start_epoch: Drop rows that were written for this epoch and later ones, which will be trained again.
        log_size: :meth:`size` of the text log at that epoch; later lines that will be written again are dropped.
    """

    def __init__(self, folder: Path, name: str, start_epoch: int = 0, log_size: int | None = None):
        self.folder = folder
        self.active = distributed.is_main()
        self.logger = logging.getLogger(f"run.{folder.name}")
        self.logger.propagate = False
        self._hook = threading.excepthook
        if not self.active:
            self.logger.addHandler(logging.NullHandler())
            return
        self.board = self._lock = None
        try:
            with self._naming_checkpoint():
                self._open(name, start_epoch, log_size)
        except BaseException:
            self._close()
            raise

    def _open(self, name: str, start_epoch: int, log_size: int | None) -> None:
        taken = f"{self.folder}: another process is training this run; wait for it, or stop it"
        self._lock = lock_file(self.folder / ".lock", taken)
        (self.folder / "logs").mkdir(exist_ok=True)
        self._text = self.folder / "logs" / f"{name}.txt"
        self._drop_repeated_lines(log_size)
        self.logger.setLevel(logging.INFO)
        file = _File(self._text, encoding="utf-8")
        file.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        for handler in (file, _Terminal()):
            self.logger.addHandler(handler)
        dropped = self._drop_rows_from(start_epoch)
        if dropped:
            self.info(f"note: epochs from {start_epoch} on will be trained again; their {dropped} rows are dropped")
        threading.excepthook = self._in_thread
        purge = start_epoch if (self.folder / "tensorboard").exists() else None
        with named(self.folder / "tensorboard"):
            self.board = SummaryWriter(self.folder / "tensorboard", purge_step=purge)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        try:
            if error is not None:
                with contextlib.suppress(OSError):  # the log may be what cannot be written
                    self.info(f"stopped: {str(error) or type(error).__name__}")
            with self._naming_checkpoint():
                if isinstance(error, OSError | InputError | DivergenceError | RuntimeError):
                    raise error
        finally:
            self._close()

    def _close(self) -> None:
        for handler in list(self.logger.handlers):
            with contextlib.suppress(OSError):  # a failed write has been reported already
                handler.close()
            self.logger.removeHandler(handler)
        if self.active and self.board:
            with contextlib.suppress(OSError):
                self.board.close()
        if self.active and self._lock:
            with contextlib.suppress(OSError):
                (self.folder / ".lock").unlink()
            self._lock.close()
        threading.excepthook = self._hook

    @contextlib.contextmanager
    def _naming_checkpoint(self) -> Iterator[None]:
        """Append the last good checkpoint to the message of an expected error."""
        try:
            yield
        except OSError as error:
            ours = error.filename and Path(error.filename).is_relative_to(self.folder)
            what = f"{error.filename}: cannot be written: {error.strerror}" if ours else str(error)
            raise InputError(f"{what}; {self.last()}") from None
        except (InputError, DivergenceError) as error:
            raise type(error)(f"{error}; {self.last()}") from None
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            said = "a process that reads images was killed; if memory ran out, use fewer workers"
            raise InputError(f"{said}; {self.last()}") from None

    def last(self) -> str:
        """Name the last good checkpoint."""
        path = self.folder / "ckps" / "current.pth.tar"
        if path.is_file():
            return f"the last good checkpoint is {path}"
        return "this run has no checkpoint yet" if self.folder.is_dir() else f"{self.folder} is gone, checkpoints too"

    def _in_thread(self, failure: threading.ExceptHookArgs) -> None:
        """TensorBoard raises an error of its writer thread in the next call; do not print it as well."""
        if not issubclass(failure.exc_type, OSError):
            self._hook(failure)

    def info(self, line: str) -> None:
        self.logger.info(line)

    def history(self) -> list[dict]:
        """The rows of ``metrics.jsonl`` so far."""
        return read_rows(self._metrics) if self.active else []

    def write_epoch(self, row: Mapping) -> None:
        """Append a row to ``metrics.jsonl``."""
        if self.active:
            write_rows(self._metrics, [*self.history(), row])

    @describing("TensorBoard's curves")
    def scalars(self, epoch: int, values: Mapping[str, float]) -> None:
        """Write TensorBoard scalars, tag -> value."""
        if self.active:
            with named(self.folder / "tensorboard"):
                for tag, value in values.items():
                    self.board.add_scalar(tag, value, epoch)
                self.board.flush()

    @describing("TensorBoard's accuracies per class")
    def class_accuracies(self, epoch: int, percent: torch.Tensor, names: list[str]) -> None:
        """Write top-1 per class in percent ``[C]`` to TensorBoard; NaN (a class without test images) is skipped."""
        tested = ~percent.isnan()
        if len(names) <= SCALAR_CLASSES:
            tags = {f"per_class/{i:02d} {name}": float(percent[i]) for i, name in enumerate(names) if tested[i]}
            self.scalars(epoch, tags)
        elif self.active:
            with named(self.folder / "tensorboard"):
                self.board.add_histogram("per_class", percent[tested], epoch)

    @property
    def _metrics(self) -> Path:
        return self.folder / "metrics.jsonl"

    def _drop_rows_from(self, epoch: int) -> int:
        rows = self.history()
        kept = [row for row in rows if row["epoch"] < epoch]
        write_rows(self._metrics, kept)
        return len(rows) - len(kept)

    def size(self) -> int:
        """Size of the text log in bytes."""
        return self._text.stat().st_size if self.active else 0

    def _drop_repeated_lines(self, size: int | None) -> None:
        if size is None or not self._text.is_file():
            return
        content = self._text.read_bytes()
        later = content[size:].splitlines(keepends=True)
        kept = [line for line in later if not line.decode(errors="replace")[TIME:].startswith(REPEATED)]
        if len(kept) < len(later):
            with atomic_file(self._text) as file:
                file.write(content[:size] + b"".join(kept))


def progress_line(epoch: int, step: int, steps: int, seconds: float, last: Mapping, mean: Mapping) -> str:
    """Format MiSLAS's progress line: this step's values, the epoch's means so far in brackets, seconds per step."""
    width = len(str(steps))
    return (
        f"Epoch: [{epoch}][{step:>{width}}/{steps}]\tTime {seconds:6.3f}"
        f"\tLoss {last['loss']:.4e} ({mean['loss']:.4e})"
        f"\tAcc@1 {last['top1']:6.2f} ({mean['top1']:6.2f})\tAcc@5 {last['top5']:6.2f} ({mean['top5']:6.2f})"
    )


def count_lines(epoch: int, counts: Mapping[str, int], clamp: float | None) -> list[str]:
    """Format the counts of an epoch that are not 0, see :meth:`TrainMeter.counts`."""
    lines = []
    if counts["clamped_logits"]:
        lines.append(f"Epoch: [{epoch}]\t{counts['clamped_logits']} logits were clamped to +-{clamp:g}")
    if counts["skipped_steps"]:
        lines.append(f"Epoch: [{epoch}]\t{counts['skipped_steps']} steps were skipped: float16 gradients overflowed")
    return lines
