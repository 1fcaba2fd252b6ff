"""A run's folder: where it is, and everything that is written there but for checkpoints and predictions.

    <save_dir>/<name>_<time>/  logs/<name>.txt  config.yaml  metrics.jsonl  tensorboard/  ckps/  predictions/

Only rank 0 writes; on every other rank the methods of :class:`RunLog` do nothing.
"""

import json
import logging
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from utils import distributed
from utils.errors import InputError
from utils.files import write_text

SCALAR_CLASSES = 100  # up to this many classes each has its own curve; beyond, one histogram


def folder_of(checkpoint: str | Path) -> Path | None:
    """The folder of the run that a checkpoint lies in; None for a file that lies elsewhere. As rank 0 sees it."""
    kept = Path(checkpoint).resolve().parent
    inside = kept.name == "ckps" and (kept.parent / "config.yaml").is_file()
    found = distributed.broadcast_text(str(kept.parent) if inside else "")
    return Path(found) if found else None


def new_folder(save_dir: str, name: str) -> Path:
    """Makes ``<save_dir>/<name>_<time>`` on rank 0 and returns it on every rank; never an existing folder."""
    path = ""
    if distributed.is_main():
        stem = Path(save_dir) / f"{name}_{time.strftime('%Y%m%d%H%M%S')}"
        candidates = (stem if n == 1 else stem.with_name(f"{stem.name}_{n}") for n in range(1, 10_000))
        path = str(next(folder for folder in candidates if _made(folder)))
    return Path(distributed.broadcast_text(path))


def _made(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        if not folder.is_dir():
            raise InputError(f"save_dir: {folder.parent} cannot hold runs: a file is in the way") from None
        return False
    except OSError as error:
        raise InputError(f"save_dir: cannot make {folder}: {error.strerror}") from None
    return True


class _Terminal(logging.Handler):
    """Lines on standard output that do not run into a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stdout)


class RunLog:
    """The log, ``metrics.jsonl`` and TensorBoard of one run.

    ``start_epoch``: what a previous, longer life of the run wrote from this epoch on is dropped, so that no epoch is
    there twice.
    """

    def __init__(self, folder: Path, name: str, start_epoch: int = 0):
        self.folder = folder
        self.active = distributed.is_main()
        self.logger = logging.getLogger(f"run.{folder.name}")
        self.logger.propagate = False
        if not self.active:
            self.logger.addHandler(logging.NullHandler())
            return
        (folder / "logs").mkdir(exist_ok=True)
        self.logger.setLevel(logging.INFO)
        file = logging.FileHandler(folder / "logs" / f"{name}.txt", encoding="utf-8")
        file.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        for handler in (file, _Terminal()):
            self.logger.addHandler(handler)
        dropped = self._keep_before(start_epoch)
        if dropped:
            self.info(f"note: epochs from {start_epoch} on were trained before; their {dropped} rows are dropped")
        self.board = SummaryWriter(folder / "tensorboard", purge_step=start_epoch or None)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if error is not None:
            self.info(f"stopped: {str(error) or type(error).__name__}")
        for handler in list(self.logger.handlers):
            handler.close()
            self.logger.removeHandler(handler)
        if self.active:
            self.board.close()

    def info(self, line: str) -> None:
        self.logger.info(line)

    def history(self) -> list[dict]:
        """The rows of ``metrics.jsonl``, one per epoch; a last line cut short by a crash is left out."""
        rows = []
        if self.active and self._metrics.exists():
            for line in self._metrics.read_text(encoding="utf-8").splitlines():
                try:
                    rows.append(json.loads(line))
                except json.JSONDecodeError:
                    break
        return rows

    def write_epoch(self, row: Mapping) -> None:
        """One line of ``metrics.jsonl``."""
        if self.active:
            with self._metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def scalars(self, epoch: int, values: Mapping[str, float]) -> None:
        """TensorBoard scalars ``tag -> value`` at ``epoch``."""
        if self.active:
            for tag, value in values.items():
                self.board.add_scalar(tag, value, epoch)
            self.board.flush()

    def class_accuracies(self, epoch: int, percent: torch.Tensor, names: list[str]) -> None:
        """Top-1 per class in percent ``[C]``; NaN for a class without test images, which is left out."""
        tested = ~percent.isnan()
        if len(names) <= SCALAR_CLASSES:
            tags = {f"per_class/{i:02d} {name}": float(percent[i]) for i, name in enumerate(names) if tested[i]}
            self.scalars(epoch, tags)
        elif self.active:
            self.board.add_histogram("per_class", percent[tested], epoch)

    @property
    def _metrics(self) -> Path:
        return self.folder / "metrics.jsonl"

    def _keep_before(self, epoch: int) -> int:
        rows = self.history()
        kept = [row for row in rows if row["epoch"] < epoch]
        write_text(self._metrics, "".join(json.dumps(row) + "\n" for row in kept))
        return len(rows) - len(kept)


def progress_line(epoch: int, step: int, steps: int, seconds: float, last: Mapping, mean: Mapping) -> str:
    """MiSLAS's line: values of this step, and in brackets the epoch's means so far; ``seconds`` are per step."""
    width = len(str(steps))
    return (
        f"Epoch: [{epoch}][{step:>{width}}/{steps}]\tTime {seconds:6.3f}"
        f"\tLoss {last['loss']:.4e} ({mean['loss']:.4e})"
        f"\tAcc@1 {last['top1']:6.2f} ({mean['top1']:6.2f})\tAcc@5 {last['top5']:6.2f} ({mean['top5']:6.2f})"
    )
