"""A run's folder: ``<save_dir>/<name>_<time>``.

logs/<name>.txt  config.yaml  starts.jsonl  metrics.jsonl  summary.json  tensorboard/  ckps/  predictions/
"""

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from utils import distributed
from utils.errors import InputError
from utils.files import write_text


def folder_of(checkpoint: str | Path) -> Path | None:
    """Return the folder of the run that a checkpoint belongs to, as rank 0 sees it; None for any other file."""
    kept = Path(checkpoint).resolve().parent
    inside = kept.name == "ckps" and (kept.parent / "config.yaml").is_file()
    found = distributed.broadcast_text(str(kept.parent) if inside else "")
    return Path(found) if found else None


def new_folder(save_dir: str, name: str) -> Path:
    """Create ``<save_dir>/<name>_<time>`` on rank 0 and return it on all ranks; never an existing folder."""
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


def inherit(folder: Path, parent: Path, epoch: int) -> None:
    """Copy the parent's metrics and predictions of the epochs before ``epoch`` to a fork's folder."""
    if not distributed.is_main():
        return
    rows = [row for row in read_rows(parent / "metrics.jsonl") if row["epoch"] < epoch]
    write_rows(folder / "metrics.jsonl", rows)
    names = ["targets.npz", *(f"{row['epoch']}.npz" for row in rows)]
    files = [file for file in (parent / "predictions" / name for name in names) if file.is_file()]
    for file in files:
        (folder / "predictions").mkdir(exist_ok=True)
        shutil.copyfile(file, folder / "predictions" / file.name)


def read_rows(path: Path) -> list[dict]:
    """Read a ``metrics.jsonl``, one row per epoch; a last line truncated by a crash is ignored."""
    if not path.is_file():
        return []
    rows, lines = [], path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            if number < len(lines):
                raise InputError(f"{path}, line {number}: is not valid JSON; fix or delete the line") from None
    return rows


def write_rows(path: Path, rows: Sequence[Mapping]) -> None:
    """Write a ``metrics.jsonl``."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
