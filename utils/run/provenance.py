"""Where numbers come from: the machine, the versions of the software, the commit."""

import contextlib
import platform
import subprocess
import sys
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from utils import distributed

ROOT = Path(__file__).resolve().parents[2]


def machine(device: torch.device) -> dict[str, Any]:
    """When, on what and with what."""
    versions = {name: version(name) for name in ("torch", "torchvision", "numpy", "pillow")}
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
    """The commit of the source under ``root``, with ``-dirty`` where files that git knows have changed since.

    Empty where ``root`` is no git checkout of its own, or git is not there.
    """
    if not (root / ".git").exists():
        return ""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
