"""The processes of a run, as the environment describes them: started by torchrun, srun or mpirun, or just this one.

Torch reads variables that torchrun sets. :func:`join` sets them under srun and mpirun; everything else reads them.
"""

import os
import re
import socket
import zlib
from collections.abc import Mapping

from utils.errors import InputError

# Torch's names, and the same four in the environments of Open MPI, of MPICH and Intel MPI, and of a SLURM step.
TORCH = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
MPI = (
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_SIZE", "PMI_RANK", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)
SLURM = ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE")
ADVICE = "start several processes with srun, mpirun or torchrun, or a single one with WORLD_SIZE=1"


def join() -> None:
    """Set torch's variables if srun or mpirun has started this process; those that are set already stay.

    Raises :class:`InputError` if they do not suffice or contradict each other, and for a process that was started alone
    in a job for several.
    """
    found = _mpi(os.environ) or _slurm(os.environ)  # within SLURM, mpirun starts its processes in a step of its own
    if not found and "WORLD_SIZE" not in os.environ:
        _check_alone(os.environ)
    if os.environ.get("WORLD_SIZE", found.get("WORLD_SIZE")) == found.get("WORLD_SIZE"):
        os.environ |= {name: value for name, value in found.items() if name not in os.environ}
    _check(os.environ)


def _mpi(env: Mapping[str, str]) -> dict[str, str]:
    """Torch's variables from mpirun's, or an empty dict."""
    for names in MPI:
        if all(name in env for name in names):
            found = {ours: env[theirs] for ours, theirs in zip(TORCH, names, strict=True)}
            if found["LOCAL_WORLD_SIZE"] == found["WORLD_SIZE"]:
                return found | _meeting("127.0.0.1", env.get("PMIX_NAMESPACE", str(os.getppid())))
            if not {"WORLD_SIZE", "MASTER_ADDR"} & env.keys():
                raise InputError("mpirun on several nodes: set MASTER_ADDR to rank 0's node and MASTER_PORT")
            return found
    return {}


def _slurm(env: Mapping[str, str]) -> dict[str, str]:
    """Torch's variables from those of a SLURM step, or an empty dict.

    Jobs that are submitted from within a step inherit its variables: they count if they agree with the process's own.
    """
    if not {*SLURM, "SLURM_NODEID", "SLURM_GTIDS"} <= env.keys() or env.get("SLURM_NTASKS") != env[SLURM[0]]:
        return {}
    found = {ours: env[theirs] for ours, theirs in zip(TORCH, SLURM, strict=True)}
    tasks, node = _tasks_per_node(env["SLURM_STEP_TASKS_PER_NODE"]), _number(env, "SLURM_NODEID", 0, 10**6)
    if node >= len(tasks) or tasks[node] != len(env["SLURM_GTIDS"].split(",")):  # GTIDS: the tasks on this node
        return {}
    if "SLURM_PTY_PORT" in env and "WORLD_SIZE" not in env and found["WORLD_SIZE"] != "1" and os.isatty(0):
        raise InputError(f"srun --pty: only the first of {found['WORLD_SIZE']} tasks has this terminal; {ADVICE}")
    host = _first_host(env["SLURM_STEP_NODELIST"]) if len(tasks) > 1 else "127.0.0.1"
    try:
        if not {"WORLD_SIZE", "MASTER_ADDR"} & env.keys():
            socket.getaddrinfo(host, None)  # torch would try for half an hour
    except OSError:
        raise InputError(f"{host}, the first node of this SLURM step, has no address here; set MASTER_ADDR") from None
    place = _meeting(host, f"{env['SLURM_JOB_ID']}.{env['SLURM_STEP_ID']}")
    return found | {"LOCAL_WORLD_SIZE": str(tasks[node])} | place


def _tasks_per_node(text: str) -> list[int]:
    """Return [4, 4, 3] for "4(x2),3"."""
    runs = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(tasks) for tasks, nodes in runs for _ in range(int(nodes or "1"))]


def _first_host(nodes: str) -> str:
    """Return gpu03 for "gpu[03-05,09],login1"."""
    first = re.match(r"(?:\[[^]]*\]|[^,[])+", nodes)[0]
    return re.sub(r"\[(\d+)[^]]*\]", r"\1", first)


def _meeting(host: str, job: str) -> dict[str, str]:
    """All ranks of ``job`` derive the same port, below those that systems hand out."""
    return {"MASTER_ADDR": host, "MASTER_PORT": str(20_000 + zlib.crc32(job.encode()) % 12_000)}


def _check_alone(env: Mapping[str, str]) -> None:
    for names in MPI:
        missing = [name for name in names if name not in env]
        if env.get(names[0], "1") != "1" and missing:
            raise InputError(f"{names[0]} is {env[names[0]]}, but {missing[0]} is not set; {ADVICE}")
    tasks = env.get("SLURM_NTASKS", "1")
    if "SLURM_PROCID" in env and tasks != "1" and not os.isatty(0):  # somebody at a terminal sees that it is one
        raise InputError(f"a batch script's own process in a SLURM job for {tasks} tasks; add srun, or use --ntasks=1")


def _check(env: Mapping[str, str]) -> None:
    size = _number(env, "WORLD_SIZE", 1, 10**6)
    if "WORLD_SIZE" not in env:
        return
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if size > 1 and not env.get(name)]
    if missing:
        raise InputError(f"WORLD_SIZE is {size}, but {missing[0]} is not set; {ADVICE}")
    ranks = {"RANK": (0, size - 1), "LOCAL_RANK": (0, size - 1), "LOCAL_WORLD_SIZE": (1, size)}
    for name, (least, most) in (ranks | {"MASTER_PORT": (1, 65_535)}).items():
        _number(env, name, least, most)


def _number(env: Mapping[str, str], name: str, least: int, most: int) -> int:
    text = env.get(name, str(least))
    if not (text.isdecimal() and least <= int(text) <= most):
        size = f"with WORLD_SIZE {env['WORLD_SIZE']} " * (name in TORCH[1:])
        raise InputError(f"{name} is {text!r}; {size}it must be a whole number from {least} to {most}; {ADVICE}")
    return int(text)


def launched() -> bool:
    """Whether this process is one of several."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


def local_rank() -> int:
    """This process's number among those on its node."""
    return int(os.environ.get("LOCAL_RANK", "0")) if launched() else 0


def speaks() -> bool:
    """True on rank 0, with or without a process group."""
    return not launched() or os.environ.get("RANK", "0") == "0"


def who() -> str:
    """A suffix for messages, " (rank r)", empty for a single process."""
    return f" (rank {os.environ['RANK']})" if launched() and "RANK" in os.environ else ""


def how_to_resume(command: str) -> str:
    """Say how to start ``command``, a script with its arguments, in as many processes as there are now."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    here = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    known = {"SLURM_STEP_ID": "srun", "OMPI_COMM_WORLD_SIZE": "mpirun", "PMI_SIZE": "mpirun"}
    starter = next((program for name, program in known.items() if name in os.environ), None)
    if size == 1:
        start = "python"
    elif starter and "TORCHELASTIC_RUN_ID" not in os.environ:
        start = f"{starter} -n {size} python"
    elif here == size:
        start = f"torchrun --standalone --nproc_per_node {size}"
    else:
        start = f"torchrun --nnodes {size // here} --nproc_per_node {here} [--rdzv_... as before]"
    again = "submit the same script again (with resume auto), or " if "SLURM_JOB_ID" in os.environ else ""
    return f"{again}resume with: {start} {command}"
