"""Processes: the identity with one, and a real Gloo group of two."""

import contextlib
import os
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.conftest import in_ranks
from tests.scripts import ended, forked_scripts, free_port, script_of  # noqa: F401
from utils import distributed
from utils.errors import InputError, LostProcessError
from utils.meter import TrainMeter
from utils.run.folder import new_folder
from utils.run.log import RunLog

# ---------------------------------------------------------------------------------------------------------------------
# One process


def test_one_process_is_the_main_one_and_what_groups_do_is_the_identity():
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    tensor = torch.tensor([3.0, -1.0])
    assert distributed.all_reduce_sum(tensor) is distributed.all_reduce_min(tensor) is tensor
    assert tensor.tolist() == [3.0, -1.0]
    norm = nn.BatchNorm1d(2)
    norm.running_mean += 3
    distributed.broadcast_buffers(norm)
    distributed.barrier()
    assert norm.running_mean.tolist() == [3.0, 3.0]
    assert distributed.broadcast_text("a\nü") == "a\nü"
    assert distributed.parallel(norm, torch.device("cpu")) is norm
    assert distributed.parallel(norm, torch.device("cpu"), sync_bn=True) is norm  # its own images are all there are
    rows = torch.zeros(0, 2)
    assert distributed.gather_rows(rows) is rows


@pytest.mark.parametrize("wanted", [True, False])
def test_gradients_of_one_process_add_up(wanted):
    model = nn.Linear(1, 1, bias=False)
    for image in (2.0, 3.0):
        with distributed.averaging(model, wanted):
            model(torch.tensor([[image]])).backward()
    assert model.weight.grad.tolist() == [[5.0]]


def test_main_first_runs_the_block_once_and_passes_errors_on():
    ran = []
    with distributed.main_first():
        ran.append(1)
    assert ran == [1]
    with pytest.raises(ZeroDivisionError), distributed.main_first():
        ran.append(1 / 0)


def test_workers_are_at_most_the_cpus():
    usable = len(os.sched_getaffinity(0))
    assert [distributed.workers_here(n) for n in (0, 1, 10_000)] == [0, 1, usable]


@pytest.mark.parametrize("size", [None, "1"])
def test_without_a_launcher_there_is_no_group(monkeypatch, size):
    monkeypatch.delenv("WORLD_SIZE", raising=False) if size is None else monkeypatch.setenv("WORLD_SIZE", size)
    with distributed.processes("cpu") as device:
        assert device == torch.device("cpu")
        assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("wanted", [True, False])
def test_determinism_is_switched_for_the_block_alone_also_after_an_error(wanted):
    before = torch.are_deterministic_algorithms_enabled()
    with distributed.processes("cpu", wanted):
        assert torch.are_deterministic_algorithms_enabled() is wanted
    assert torch.are_deterministic_algorithms_enabled() is before
    with pytest.raises(RuntimeError), distributed.processes("cpu", wanted):
        raise RuntimeError
    assert torch.are_deterministic_algorithms_enabled() is before


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_is_refused_where_there_is_none_and_auto_takes_the_cpu():
    with pytest.raises(InputError, match="no usable CUDA"), distributed.processes("cuda"):
        pass
    with distributed.processes("auto") as device:
        assert device == torch.device("cpu")


@pytest.mark.parametrize("own_fault", [True, False])
def test_a_launcher_that_is_gone_is_noticed_at_once_and_hides_no_error(monkeypatch, own_fault):
    """Its store lived at a port where nobody listens now."""
    launched = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    for key, value in {**launched, "TORCHELASTIC_USE_AGENT_STORE": "True"}.items():
        monkeypatch.setenv(key, value)
    began = time.monotonic()
    with pytest.raises(InputError if own_fault else LostProcessError), distributed.together():
        if own_fault:
            raise InputError("mine")
    assert time.monotonic() - began < 10


# ---------------------------------------------------------------------------------------------------------------------
# Two processes


SET_UP = """
import os, sys
from utils import distributed
from utils.command_line import exit_code
from utils.errors import InputError
def main():
    with distributed.together():
        if os.environ["RANK"] == sys.argv[1]:
            raise InputError("mine")
    print("on it goes")
sys.exit(exit_code(main))
"""


@pytest.mark.parametrize("wrong", [0, 1, None])
def test_a_rank_whose_set_up_fails_ends_the_others(scripts, tmp_path, wrong):
    """They meet at a store of the launcher, which is this process here."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    place = {"MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    with scripts.group(2, tmp_path, script_of(tmp_path, SET_UP), wrong, **place) as ranks:
        done = [ended(rank, 60) for rank in ranks]
    if wrong is None:
        assert [(rank.code, rank.out) for rank in done] == [(0, "on it goes\n")] * 2
    else:
        assert (done[wrong].code, done[wrong].err) == (2, f"error (rank {wrong}): mine\n")
        other = done[1 - wrong]
        assert (other.code, other.err) == (1, f"error (rank {1 - wrong}): {distributed.LOST}\n")


MEET = """
import sys, torch
from utils import distributed
from utils.command_line import exit_code
def main():
    with distributed.together():
        pass
    with distributed.processes("cpu"):
        print(distributed.world_size(), distributed.all_reduce_sum(torch.tensor(1 + distributed.rank())).item())
sys.exit(exit_code(main))
"""
STARTED = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_NODEID": "0"}
STARTED |= {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_GTIDS": "0,1"}
STARTED |= {"SLURM_STEP_NODELIST": "node1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "PMIX_NAMESPACE": str(os.getpid())}
RANKS = {
    "srun": ("SLURM_PROCID", "SLURM_LOCALID"),
    "mpirun": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"),
}


@pytest.mark.parametrize("program", RANKS)
def test_processes_of_srun_and_mpirun_meet_without_another_launcher(scripts, tmp_path, program):
    """In their environments; for a real SLURM see test_slurm.py."""
    size = {"OMPI_COMM_WORLD_SIZE": "2"} if program == "mpirun" else {}
    with contextlib.ExitStack() as stack:
        places = [dict.fromkeys(RANKS[program], str(rank)) for rank in range(2)]
        words = (tmp_path, script_of(tmp_path, MEET))
        done = [stack.enter_context(scripts.alive(*words, **STARTED, **size, **place)) for place in places]
        done = [ended(rank, 60) for rank in done]
    assert [(rank.code, rank.out, rank.err) for rank in done] == [(0, "2 3\n", "")] * 2


# What both processes do, one function after another, in one group. Objects of the trainer live in functions, as in the
# scripts: a parallel module that lives until the interpreter ends can abort it ("terminate called without ...").


def members(rank: int, device: torch.device, folder: Path) -> None:
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (rank, 2, rank == 0)
    assert device == torch.device("cpu")


def reductions(rank: int, device: torch.device, folder: Path) -> None:
    assert distributed.all_reduce_sum(torch.tensor([1.0 + rank, 10.0 * rank])).tolist() == [3.0, 10.0]
    assert distributed.all_reduce_min(torch.tensor([5 - rank, 7 + rank])).tolist() == [4, 7]
    assert distributed.greatest(10 * rank) == 10
    assert [distributed.all_equal(3, 4), distributed.all_equal(3, rank)] == [True, False]


def rows_in_the_order_of_ranks(rank: int, device: torch.device, folder: Path) -> None:
    none_and_two = torch.arange(4.0 * rank).reshape(2 * rank, 2) + 1
    assert distributed.gather_rows(none_and_two).tolist() == [[1.0, 2.0], [3.0, 4.0]]
    whole = distributed.gather_rows(torch.arange(3 - rank) + 10 * rank)
    assert (whole.tolist(), whole.dtype) == ([0, 1, 2, 10, 11], torch.int64)
    whole = distributed.gather_rows(torch.arange(1 + 2 * rank) > 0)
    assert (whole.tolist(), whole.dtype) == ([False, False, True, True], torch.bool)
    assert distributed.gather_rows(torch.empty(0, 3)).shape == (0, 3)


def text_and_buffers_of_the_first(rank: int, device: torch.device, folder: Path) -> None:
    assert distributed.broadcast_text(f"from {rank}: ü" * (rank + 1)) == "from 0: ü"
    norm = nn.BatchNorm1d(3)
    norm.running_mean += 1 + rank
    norm.num_batches_tracked += 10 + rank
    with torch.no_grad():
        norm.weight += rank
    distributed.broadcast_buffers(norm)
    assert (norm.running_mean.tolist(), norm.num_batches_tracked.item()) == ([1.0] * 3, 10)
    assert norm.weight.tolist() == [1.0 + rank] * 3  # parameters are not buffers


def the_first_goes_first(rank: int, device: torch.device, folder: Path) -> None:
    with distributed.main_first():
        entered = time.monotonic_ns()
        if rank == 0:
            time.sleep(0.1)
            (folder / "made by the first").write_text("whole")
        assert (folder / "made by the first").read_text() == "whole"
        left = time.monotonic_ns()
    first, second = distributed.gather_rows(torch.tensor([[entered, left]])).tolist()
    assert second[0] >= first[1]


def averages_of_gradients(rank: int, device: torch.device, folder: Path) -> None:
    model = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0 + rank)
    parallel = distributed.parallel(model, device)
    parallel(torch.tensor([[1.0, 4.0 * rank]])).sum().backward()
    assert model.weight.tolist() == [[1.0, 1.0]]
    assert model.weight.grad.tolist() == [[1.0, 2.0]]
    parallel.zero_grad()
    with distributed.averaging(parallel, False):  # passes add up, and the last one averages their sums
        parallel(torch.tensor([[1.0, 4.0 * rank]])).sum().backward()
    assert model.weight.grad.tolist() == [[1.0, 4.0 * rank]]
    with distributed.averaging(parallel, True):
        parallel(torch.tensor([[2.0 + 2 * rank, 0.0]])).sum().backward()
    assert model.weight.grad.tolist() == [[4.0, 2.0]]  # of [1 + 2, 0] and [1 + 4, 4]
    with pytest.raises(InputError, match=r"^sync_bn: True needs CUDA; "):
        distributed.parallel(nn.BatchNorm1d(2), device, sync_bn=True)


def sums_of_the_meter(rank: int, device: torch.device, folder: Path) -> None:
    meter, targets = TrainMeter(device), torch.zeros(1 + 2 * rank, dtype=torch.long)
    meter.update(torch.tensor(2.0 + 4 * rank), torch.eye(3)[targets + rank], targets)
    assert meter.averages() == {"loss": 5.0, "top1": 25.0, "top5": 100.0}
    assert meter.last_step()["loss"] == 2.0 + 4 * rank  # its own
    meter.update(torch.tensor(0.0), torch.eye(3)[[0] * 4], torch.zeros(4, dtype=torch.long))
    later = meter.averages()
    assert later == pytest.approx({"loss": 20 / 12, "top1": 75.0, "top5": 100.0})
    assert meter.first_bad_step() is None
    meter.skipped(torch.tensor(1.0))
    assert meter.counts() == {"clamped_logits": 0, "skipped_steps": 1}
    # Resumed: each process has its own row again; from four processes there is only the sum of all rows.
    rows = meter.rows()
    meter.reset()
    meter.load_rows(rows, 2)
    assert [len(rows), meter.averages(), int(meter.steps), float(meter.sums[3])] == [2, later, 2, 5.0 + 2 * rank]
    meter.load_rows(rows.repeat(2, 1), 2)
    assert [meter.averages(), float(meter.sums[3])] == [later, 24.0 * (rank == 0)]
    assert meter.counts() == {"clamped_logits": 0, "skipped_steps": 2}
    meter.load_rows(rows, 2)
    if rank == 1:
        meter.update(torch.tensor(float("nan")), torch.eye(3), torch.zeros(3, dtype=torch.long))
    assert meter.first_bad_step() == 2  # everyone knows


def one_folder(rank: int, device: torch.device, folder: Path) -> None:
    run_folder = new_folder(str(folder / "saved"), "run")
    with RunLog(run_folder, "run") as run:
        run.info(f"line of {rank}")
        run.write_epoch({"epoch": 0, "rank": rank})
        run.scalars(0, {"loss": 1.0})
        run.class_accuracies(0, torch.zeros(2), ["a", "b"])
        assert run.history() == [{"epoch": 0, "rank": 0}] * (rank == 0)
    distributed.barrier()
    assert list((folder / "saved").iterdir()) == [run_folder]


PARTS = (members, reductions, rows_in_the_order_of_ranks, text_and_buffers_of_the_first, the_first_goes_first)
PARTS += (averages_of_gradients, sums_of_the_meter, one_folder)


def all_parts(rank: int, folder: Path) -> None:
    with distributed.processes("cpu") as device:
        for part in PARTS:
            part(rank, device, folder)
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)


def test_two_processes_agree_on_sums_rows_gradients_and_one_folder(tmp_path):
    said = in_ranks(tmp_path, all_parts, tmp_path)
    (run,) = (tmp_path / "saved").iterdir()
    assert "line of 0" in said[0] and "line of 1" not in "".join(said)  # only the first process writes
    assert (run / "logs" / "run.txt").read_text().count("line of") == 1
    assert len(list((run / "tensorboard").iterdir())) == 1
