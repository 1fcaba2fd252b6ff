"""Processes: the identity with one, and a real Gloo group of two."""

import json
import math
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from utils import distributed
from utils.errors import InputError, LostProcessError

ROOT = Path(__file__).parents[1]

# What each of the two processes does; it leaves its findings in <folder>/<rank>.json. All of it is in a function, as in
# the scripts: a parallel module that lives until the interpreter ends can abort it ("terminate called without ...").
WORKER = """
import json, sys, time
from pathlib import Path
import torch
from torch import nn
from utils import distributed
from utils.errors import DivergenceError, InputError
from utils.meter import TrainMeter
from utils.run.folder import new_folder
from utils.run.log import RunLog

folder = Path(sys.argv[1])
found = {}
def work():
    with distributed.processes("cpu") as device:
        found["rank"] = rank = distributed.rank()
        found["device"], found["main"] = str(device), distributed.is_main()
        found["world_size"] = distributed.world_size()
        found["sum"] = distributed.all_reduce_sum(torch.tensor([1.0 + rank, 10.0 * rank])).tolist()
        found["min"] = distributed.all_reduce_min(torch.tensor([5 - rank, 7 + rank])).tolist()
        found["rows"] = distributed.gather_rows(torch.arange(4.0 * rank).reshape(2 * rank, 2) + 1).tolist()
        uneven = (torch.arange(3 - rank) + 10 * rank, torch.arange(1 + 2 * rank) > 0)
        gathered = [distributed.gather_rows(tensor) for tensor in uneven]
        found["uneven rows"] = [[tensor.tolist(), str(tensor.dtype)] for tensor in gathered]
        found["no rows"] = list(distributed.gather_rows(torch.empty(0, 3)).shape)
        found["text"] = distributed.broadcast_text(f"from {rank}: ü" * (rank + 1))

        norm = nn.BatchNorm1d(3)
        norm.running_mean += 1 + rank
        norm.num_batches_tracked += 10 + rank
        with torch.no_grad():
            norm.weight += rank
        distributed.broadcast_buffers(norm)
        found["buffers"] = [norm.running_mean.tolist(), norm.num_batches_tracked.item()]
        found["weight"] = norm.weight.tolist()

        with distributed.main_first():
            found["entered"] = time.monotonic_ns()
            if rank == 0:
                found["worked"] = sum(range(3_000_000))
                (folder / "made by the first").write_text("whole")
            found["read"] = (folder / "made by the first").read_text()
            found["left"] = time.monotonic_ns()

        model = nn.Linear(2, 1, bias=False)
        with torch.no_grad():
            model.weight.fill_(1.0 + rank)
        parallel = distributed.parallel(model, device)
        parallel(torch.tensor([[1.0, 4.0 * rank]])).sum().backward()
        found["same start"], found["gradient"] = model.weight.tolist(), model.weight.grad.tolist()

        parallel.zero_grad()
        for key, averaged, image in (("own", False, [1.0, 4.0 * rank]), ("both", True, [2.0 + 2 * rank, 0.0])):
            with distributed.averaging(parallel, averaged):
                parallel(torch.tensor([image])).sum().backward()
            found[f"{key} passes"] = model.weight.grad.tolist()
        try:
            distributed.parallel(nn.BatchNorm1d(2), device, sync_bn=True)
        except InputError as error:
            found["sync_bn"] = str(error)

        meter = TrainMeter(device)
        targets = torch.zeros(1 + 2 * rank, dtype=torch.long)
        meter.update(torch.tensor(2.0 + 4 * rank), torch.eye(3)[targets + rank], targets)
        found["averages"], found["last"] = meter.averages(), meter.last_step()
        meter.update(torch.tensor(0.0), torch.eye(3)[[0] * 4], torch.zeros(4, dtype=torch.long))
        found["later averages"] = meter.averages()
        found["good"] = meter.first_bad_step()
        meter.skipped(torch.tensor(1.0))
        found["counts"] = meter.counts()
        rows = meter.rows()
        meter.reset()
        meter.load_rows(rows, 2)
        found["gone on"] = [len(rows), meter.averages(), int(meter.steps), float(meter.sums[3])]
        meter.load_rows(rows.repeat(2, 1), 2)
        found["from four"] = [meter.averages(), float(meter.sums[3]), meter.counts()]
        meter.load_rows(rows, 2)
        found["greatest"] = distributed.greatest(10 * rank)
        found["equal"] = [distributed.all_equal(3, 4), distributed.all_equal(3, rank)]
        if rank == 1:
            meter.update(torch.tensor(float("nan")), torch.eye(3), torch.zeros(3, dtype=torch.long))
        found["bad"] = meter.first_bad_step()

        run_folder = new_folder(str(folder / "saved"), "run")
        found["folder"] = str(run_folder)
        with RunLog(run_folder, "run") as run:
            run.info(f"line of {rank}")
            run.write_epoch({"epoch": 0, "rank": rank})
            run.scalars(0, {"loss": 1.0})
            run.class_accuracies(0, torch.zeros(2), ["a", "b"])
            found["history"] = run.history()
        distributed.barrier()


work()
found["after"] = [distributed.rank(), distributed.world_size(), distributed.is_main()]
(folder / f"{found['rank']}.json").write_text(json.dumps(found))
"""


# ---------------------------------------------------------------------------------------------------------------------
# One process


def test_one_process_is_the_main_one():
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)


@pytest.mark.parametrize("reduce", [distributed.all_reduce_sum, distributed.all_reduce_min])
def test_reductions_of_one_process_are_the_identity(reduce):
    tensor = torch.tensor([3.0, -1.0])
    assert reduce(tensor) is tensor
    assert tensor.tolist() == [3.0, -1.0]


def test_broadcasts_of_one_process_are_the_identity():
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
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        port = str(door.getsockname()[1])
    launched = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for key, value in {**launched, "TORCHELASTIC_USE_AGENT_STORE": "True"}.items():
        monkeypatch.setenv(key, value)
    began = time.monotonic()
    with pytest.raises(InputError if own_fault else LostProcessError), distributed.together():
        if own_fault:
            raise InputError("mine")
    assert time.monotonic() - began < 10


# ---------------------------------------------------------------------------------------------------------------------
# Two processes


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    """What the two processes found, and the folder they worked in."""
    folder = tmp_path_factory.mktemp("group")
    (folder / "worker.py").write_text(WORKER, encoding="utf-8")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launch, str(folder / "worker.py"), str(folder)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return *(json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)), folder, done.stdout


def same(group, key):
    """What both processes found alike."""
    assert group[0][key] == group[1][key]
    return group[0][key]


def test_the_group_has_two_members_and_one_main_process(group):
    assert same(group, "world_size") == 2
    assert same(group, "device") == "cpu"
    assert [found["main"] for found in group[:2]] == [True, False]
    assert same(group, "after") == [0, 1, True]


def test_reductions_are_the_same_everywhere(group):
    assert same(group, "sum") == [3.0, 10.0]
    assert same(group, "min") == [4, 7]


def test_rows_are_gathered_rank_after_rank_whatever_their_number(group):
    assert same(group, "rows") == [[1.0, 2.0], [3.0, 4.0]]  # the first process has none
    assert same(group, "uneven rows") == [
        [[0, 1, 2, 10, 11], "torch.int64"],
        [[False, False, True, True], "torch.bool"],
    ]
    assert same(group, "no rows") == [0, 3]


def test_everyone_gets_the_text_and_the_buffers_of_the_first(group):
    assert same(group, "text") == "from 0: ü"
    assert same(group, "buffers") == [[1.0, 1.0, 1.0], 10]
    assert [found["weight"][0] for found in group[:2]] == [1.0, 2.0]  # parameters are not buffers


def test_the_others_enter_when_the_first_is_through(group):
    first, second = group[:2]
    assert same(group, "read") == "whole"
    assert second["entered"] >= first["left"]


def test_a_backward_pass_averages_gradients_over_the_processes(group):
    assert same(group, "same start") == [[1.0, 1.0]]
    assert same(group, "gradient") == [[1.0, 2.0]]


def test_passes_add_up_and_the_last_one_averages_their_sums(group):
    assert [found["own passes"] for found in group[:2]] == [[[1.0, 0.0]], [[1.0, 4.0]]]
    assert same(group, "both passes") == [[4.0, 2.0]]  # of [1 + 2, 0] and [1 + 4, 4]


def test_synced_batch_norm_is_refused_without_cuda(group):
    assert same(group, "sync_bn").startswith("sync_bn: True needs CUDA; ")


def test_training_sums_are_over_all_processes_and_the_last_step_is_one_s_own(group):
    assert same(group, "averages") == {"loss": 5.0, "top1": 25.0, "top5": 100.0}
    assert same(group, "later averages") == pytest.approx({"loss": 20 / 12, "top1": 75.0, "top5": 100.0})
    assert [found["last"]["loss"] for found in group[:2]] == [2.0, 6.0]
    assert math.isfinite(group[1]["last"]["top1"])


def test_a_number_that_is_not_finite_is_known_to_every_process(group):
    assert same(group, "good") is None
    assert same(group, "bad") == 2


def test_skipped_steps_are_counted_once(group):
    assert same(group, "counts") == {"clamped_logits": 0, "skipped_steps": 1}


def test_a_meter_goes_on_with_its_own_sums_or_with_the_whole(group):
    """Each process has its own row again; from four processes there is only the sum of all rows."""
    later = same(group, "later averages")
    assert [found["gone on"] for found in group[:2]] == [[2, later, 2, 5.0], [2, later, 2, 7.0]]
    twice = {"clamped_logits": 0, "skipped_steps": 2}
    assert [found["from four"] for found in group[:2]] == [[later, 24.0, twice], [later, 0.0, twice]]


def test_processes_agree_on_the_greatest_number_and_on_equality(group):
    assert same(group, "greatest") == 10
    assert same(group, "equal") == [True, False]


def test_only_the_first_process_writes(group):
    first, second, folder, said = group
    (run,) = (folder / "saved").iterdir()
    assert same(group, "folder") == str(run)
    assert [found["history"] for found in (first, second)] == [[{"epoch": 0, "rank": 0}], []]
    assert (run / "logs" / "run.txt").read_text().count("line of") == 1
    assert "line of 0" in said
    assert "line of 1" not in said
    assert len(list((run / "tensorboard").iterdir())) == 1
