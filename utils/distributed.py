"""Process groups. With a single process every function here is the identity.

Rank and world size come from the environment, see :mod:`utils.launcher`.
"""

import contextlib
import os
import socket
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from utils import launcher
from utils.errors import InputError, LostProcessError

LOST = "another process of this run has ended; see its error message"


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """True on rank 0, the only one that writes files and prints."""
    return rank() == 0


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum ``tensor`` over all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def all_reduce_min(tensor: Tensor) -> Tensor:
    """Take the elementwise minimum of ``tensor`` over all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor, op=dist.ReduceOp.MIN)
    return tensor


def greatest(number: int) -> int:
    """All-reduce (max) of an int over Gloo; does not synchronise the GPU."""
    if not dist.is_initialized():
        return number
    box = torch.tensor(number)
    dist.all_reduce(box, op=dist.ReduceOp.MAX)
    return int(box)


def all_equal(*numbers: int) -> bool:
    """Return on every rank whether all ranks have the same ``numbers``."""
    return all(greatest(n) == -greatest(-n) for n in numbers)


def gather_rows(tensor: Tensor) -> Tensor:
    """Concatenate the rows of all ranks, in rank order, on every rank. Ranks may have different numbers, also 0."""
    if not dist.is_initialized():
        return tensor
    counts = torch.zeros(world_size(), dtype=torch.int64)  # on the CPU: travels over Gloo, and no device is waited for
    counts[rank()] = len(tensor)
    counts = all_reduce_sum(counts).tolist()
    padded = tensor.new_zeros((max(counts), *tensor.shape[1:]))
    padded[: len(tensor)] = tensor
    gathered = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(gathered, padded)
    return torch.cat([rows[:count] for rows, count in zip(gathered, counts, strict=True)])


def broadcast_text(value: str) -> str:
    """Return rank 0's ``value`` on every rank."""
    box = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(box, src=0)
    return box[0]


def broadcast_buffers(model: nn.Module) -> None:
    """Copy rank 0's buffers to all ranks: batch-norm statistics are of each rank's own images."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def barrier() -> None:
    greatest(0)


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """Run the block on rank 0 first, then on the first rank of every other node, then on the rest.

    For files that the first one creates, on a disk that nodes may or may not share.
    """
    turn = 0 if is_main() else 1 if launcher.local_rank() == 0 else 2
    for _ in range(turn):
        barrier()
    yield
    for _ in range(2 - turn):
        barrier()


def processes_here() -> int:
    """Number of processes of this run on this node."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if dist.is_initialized() else 1


def workers_here(workers: int) -> int:
    """This process's share of a node's ``workers``, at most the CPUs that it may use."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(-(-workers // processes_here()), usable)


def parallel(model: nn.Module, device: torch.device, sync_bn: bool = False) -> nn.Module:
    """Wrap ``model`` in DistributedDataParallel, which averages gradients over the ranks.

    ``sync_bn``: normalise over the images of all ranks instead of each rank's own. CUDA only, else
    :class:`InputError`.
    """
    if not dist.is_initialized():
        return model
    if sync_bn and device.type != "cuda":
        raise InputError("sync_bn: True needs CUDA; on a CPU use sync_bn: False, each process normalises its own share")
    if sync_bn:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return nn.parallel.DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)


def average_gradients(module: nn.Module) -> None:
    """Average the gradients of a module that is not :func:`parallel` over the ranks, in place.

    All ranks must have gradients of the same parameters.
    """
    if dist.is_initialized():
        for parameter in module.parameters():
            if parameter.grad is not None:
                all_reduce_sum(parameter.grad).div_(world_size())


def averaging(model: nn.Module, wanted: bool) -> contextlib.AbstractContextManager:
    """Return a context in which a backward pass averages gradients over the ranks, or only accumulates them."""
    alone = wanted or not isinstance(model, nn.parallel.DistributedDataParallel)
    return contextlib.nullcontext() if alone else model.no_sync()


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Wrap set-up that runs before the process group exists: if one rank fails, all ranks exit.

    The first to read the environment: :func:`utils.launcher.join`.
    """
    launcher.join()
    try:
        yield
    except InputError:
        _report(failed=True)
        raise
    _report(failed=False)


def _report(failed: bool) -> None:
    """Exchange outcomes over the launcher's store. Raises :class:`LostProcessError` if another rank has failed."""
    if not launcher.launched() or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    key = f"together {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    try:
        _check_store()
        store, own_rank, size = next(dist.rendezvous("env://"))
        store.set(f"{key} {own_rank}", "failed" if failed else "went well")
        lost = not failed and any(store.get(f"{key} {other}") == b"failed" for other in range(size))
    except (dist.DistError, ConnectionRefusedError):  # the launcher, which hosts the store, has ended
        lost = not failed
    if lost:
        raise LostProcessError(LOST)


def _check_store() -> None:
    """Raise ``ConnectionRefusedError`` if the launcher's store is gone; torch would retry for many minutes."""
    try:
        socket.create_connection((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), timeout=30).close()
    except ConnectionRefusedError:
        raise
    except OSError:
        return  # torch may know another way


def _meet(device: torch.device) -> None:
    # Tensors travel by the backend of their device: agreements between steps by Gloo, gradients by NCCL.
    on_cuda = device.type == "cuda"
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo", device_id=device if on_cuda else None)
    except RuntimeError as error:
        port = os.environ["MASTER_PORT"]
        if "EADDRINUSE" in str(error):
            raise InputError(f"MASTER_PORT: {port} is in use on this machine; set it to a free port") from None
        if not isinstance(error, dist.DistError):
            raise
        raise LostProcessError(f"cannot meet the other processes at {os.environ['MASTER_ADDR']}:{port}") from None


@contextlib.contextmanager
def processes(device: str, deterministic: bool = False) -> Iterator[torch.device]:
    """Join the launcher's process group, if any, for the length of the block; yield this process's device.

    ``device``: "auto" (CUDA if available), "cpu" or "cuda". The backend is NCCL on CUDA, Gloo on a CPU.
    ``deterministic``: use deterministic kernels where they exist.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("device: cuda, but this machine has no usable CUDA device; use auto or cpu")
    on_cuda = device != "cpu" and torch.cuda.is_available()
    launched = launcher.launched()
    if on_cuda and launcher.local_rank() >= torch.cuda.device_count():
        here, devices = launcher.local_rank() + 1, torch.cuda.device_count()
        raise InputError(
            f"at least {here} processes run on this machine, but this one sees {devices} CUDA devices; start at most "
            f"{devices}, or with srun use --gpus-per-node, not --gpus-per-task"
        )
    here = torch.device("cuda", launcher.local_rank()) if on_cuda else torch.device("cpu")
    if on_cuda:
        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at its first call
        torch.cuda.set_device(here)
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    if launched:
        _meet(here)
    try:
        yield here
        # Not after an error: other ranks may wait in a collective, and this would wait for them. The launcher ends
        # them once this process has exited.
        if launched:
            dist.destroy_process_group()
    except RuntimeError as error:
        if launched and (isinstance(error, dist.DistError) or "gloo" in str(error).lower()):
            raise LostProcessError(LOST) from None
        raise
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
