"""Provenance of a run: machine, software versions, commit, data."""

import contextlib
import platform
import subprocess
import sys
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
import torchvision

from datasets import Data
from utils import distributed
from utils.errors import describing

ROOT = Path(__file__).resolve().parents[2]


def machine(device: torch.device) -> dict[str, Any]:
    """Date, hardware and software versions."""
    modules = {"torch": torch, "torchvision": torchvision, "numpy": np, "pillow": PIL}
    modules |= {name: sys.modules[name] for name in ("timm",) if name in sys.modules}  # optional
    versions = {name: str(module.__version__) for name, module in modules.items()}  # metadata may be missing
    return {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cpu": f"{_cpu_name()}, {torch.backends.cpu.get_cpu_capability()}",
        "cores": distributed.workers_here(sys.maxsize),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version()} | versions,
    }


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def commit(root: Path = ROOT) -> str:
    """The commit of the source under ``root``, with ``-dirty`` if tracked files have changed.

    Empty if ``root`` is not a git checkout, or git is not installed.
    """
    if not (root / ".git").exists():
        return ""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def environment(device: torch.device) -> dict[str, str | int]:
    """Everything except configuration and data that bit-exactness depends on."""
    on_cuda = device.type == "cuda"
    return {
        "torch": str(torch.__version__),
        "device": torch.cuda.get_device_name(device) if on_cuda else torch.backends.cpu.get_cpu_capability(),
        "CPU threads": torch.get_num_threads(),
        "processes": distributed.world_size(),
    }


def provenance(data: Data, settings: Mapping, device: torch.device) -> dict:
    """The entries of a checkpoint that say where it comes from."""
    origin = {
        "config": settings,
        "class_counts": data.class_counts,  # int64 [C], training images per class
        "class_map": data.class_map,  # int64 [C], label in the lists -> class, or None
        "class_names": data.class_names,  # [C]
        "fingerprint": data.label_hash,
        "selected_on": "held-out images" if data.val else "test set",
    }
    with describing("the environment in checkpoints"):
        origin["environment"] = environment(device)
    return origin
