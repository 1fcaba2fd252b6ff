"""The bench for the day a GPU is there: one process after another, and the parts made for it, on a CPU."""

import fcntl
import json
import multiprocessing
import os
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from tests.conftest import failure
from utils.bench import __main__ as command
from utils.bench import contestants, gpu, gpu_parts, parts
from utils.bench.gpu import Job
from utils.errors import Interrupted

CPU = torch.device("cpu")
TABLES = {"first": [{"what": "a", "ms": 1.5}, {"what": "b", "ms": 250.0}], "shorter": [{"what": "c", "s": 2.0}]}
MEASURES = f"""
import json, sys
part = {{"settings": {{"batch": 8}}, "tables": {TABLES}}}
json.dump({{"device": "a card", "parts": {{"good": part}}}}, open(sys.argv[1], "w"))
"""


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """``run(minutes, (job, script), ...)`` -> exit code, standard output, the parts of the report."""
    report = tmp_path / "report.json"

    def run(minutes: float, *jobs: tuple[Job, str]) -> tuple[int, str, dict]:
        scripts = dict(jobs)

        def start(job: Job, args: object, folder: Path) -> list[str]:
            return [sys.executable, "-c", scripts[job], str(folder / "report.json")]

        monkeypatch.setattr(gpu, "JOBS", tuple(scripts))
        monkeypatch.setattr(gpu, "command", start)
        code = command.main(["gpu", "--device", "cpu", "--minutes", str(minutes), "--json", str(report)])
        return code, capsys.readouterr().out, json.loads(report.read_text())

    return run


def holding(lock: Path, then: str) -> str:
    """A script whose child keeps ``lock`` for a minute."""
    return f"""
import fcntl, os, signal, subprocess, sys, time
file = open({str(lock)!r}, "w")
fcntl.flock(file, fcntl.LOCK_EX)
subprocess.Popen(["sleep", "60"], pass_fds=[file.fileno()])
print("the last kernel", file=sys.stderr, flush=True)
{then}
time.sleep(60)
"""


def seconds_until_free(lock: Path) -> float:
    began = time.monotonic()
    with lock.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
    return time.monotonic() - began


# ---------------------------------------------------------------------------------------------------------------------
# One process after another


def test_a_crash_and_a_hang_lose_no_other_result(run, tmp_path):
    lock, report = tmp_path / "lock", tmp_path / "report.json"
    aborts = "import os, sys; print('no kernel image\\n', file=sys.stderr, flush=True); os.abort()"
    advises = "raise RuntimeError('no such kernel\\n\\nSet VERBOSE=1')"
    reads = f"import json; raise SystemExit('so far: ' + ', '.join(json.load(open({str(report)!r}))['parts']))"
    jobs = {
        Job("good", "fp32", 60): MEASURES,
        Job("crashes", "", 60): aborts,
        Job("advises", "", 60): advises,
        Job("hangs", "", 4): holding(lock, ""),
        Job("good", "bf16", 60): MEASURES + "raise SystemExit('too late')",
        Job("reads", "", 9999): reads,
    }
    code, said, found = run(5, *jobs.items())
    assert code == 1 and found.pop("device") == "a card"
    results = found["parts"]
    failed = {title: result.get("failed") for title, result in results.items()}
    assert failed == {
        "good fp32": None,
        "crashes": "SIGABRT: no kernel image",
        "advises": "exit code 1: RuntimeError: no such kernel",
        "hangs": failed["hangs"],
        "good bf16": "exit code 1: too late",
        "reads": "exit code 1: so far: good fp32, crashes, advises, hangs, good bf16",
    }
    assert "VERBOSE=1" in results["advises"]["stderr"] and "Traceback" in results["advises"]["stderr"]
    assert failed["hangs"].startswith("not done within ") and failed["hangs"].endswith(" s: the last kernel")
    assert results["good fp32"]["tables"] == results["good bf16"]["tables"] == TABLES
    assert results["hangs"]["seconds"] < 30 and seconds_until_free(lock) < 30  # its child was killed, too
    lines = said.splitlines()
    assert lines[-8:-6] == ["device: a card", ""]
    assert lines[-6].startswith("good fp32") and lines[-6].endswith(" s  first, ms: [a] 1.5, [b] 250")
    assert lines[-5].endswith("failed: SIGABRT: no kernel image")
    assert "failed: exit code 1: too late" in lines[-2] and "[b] 250" in lines[-2]


def test_time_is_shared_by_what_is_left_to_do(monkeypatch):
    limits, clock = [], iter([0, *(0, 10), *(10, 100), *(100, 570), *(570, 600), *(601, 601)])
    monkeypatch.setattr(gpu.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(gpu, "JOBS", tuple(Job("good", "", seconds) for seconds in (100, 200, 100, 100, 100)))
    monkeypatch.setattr(gpu, "run", lambda job, args, limit, folder: limits.append(round(limit)) or {})
    *_, last = gpu.results(command.parse(["gpu", "--device", "cpu", "--minutes", "10"]))
    assert limits == [100, 236, 167, 30]  # the fourth asks for more than is left
    assert last[1] == {"seconds": 0, "failed": "no time was left"}


def test_a_signal_ends_the_job_in_progress(run, tmp_path):
    lock = tmp_path / "lock"
    with pytest.raises(Interrupted):
        run(1, (Job("stops", "", 9), holding(lock, "os.kill(os.getppid(), signal.SIGTERM)")))
    assert seconds_until_free(lock) < 30


@pytest.fixture
def service(monkeypatch, tmp_path):
    """A stand-in for NVIDIA's service that notes how it is called; returns the file of its notes."""
    notes, program = tmp_path / "notes", tmp_path / "bin" / gpu.MPS
    program.parent.mkdir()
    program.write_text(
        f'#!/bin/sh\necho "$CUDA_MPS_PIPE_DIRECTORY $*" >> {notes}\n[ $# -gt 0 ] || cat >> {notes}\n'
        '[ "$1" != -d ] || [ -z "$BROKEN" ] || exit 1\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    return notes


def test_the_service_is_stopped_even_if_its_job_hangs(run, service):
    waits = "import os, sys, time; print(os.environ['CUDA_MPS_PIPE_DIRECTORY'], file=sys.stderr); time.sleep(60)"
    code, _, found = run(0.05, (Job("together", "fp32", 1, mps=True), waits))
    failed = found["parts"]["together fp32 MPS"]["failed"]
    folder = failed.rpartition(": ")[2]
    assert code == 1 and service.read_text().splitlines() == [f"{folder} -d", f"{folder} ", "quit -t 5"]
    assert not Path(folder).exists()


def test_a_service_that_does_not_start_costs_only_its_job(run, service, monkeypatch):
    monkeypatch.setenv("BROKEN", "1")
    _, _, found = run(1, (Job("together", "fp32", 9, mps=True), MEASURES), (Job("good", "", 9), MEASURES))
    assert gpu.MPS in found["parts"]["together fp32 MPS"]["failed"]
    assert found["parts"]["good"]["tables"] == TABLES


def test_without_the_service_its_job_is_left_out(run, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    code, _, found = run(1, (Job("together", "fp32", 9, mps=True), MEASURES), (Job("good", "", 9), MEASURES))
    assert code == 0 and list(found["parts"]) == ["good"]


def test_every_job_is_a_command_of_the_bench(tmp_path):
    args = command.parse(["gpu", "--device", "cpu", "--steps", "2"])
    assert len({job.title for job in gpu.JOBS}) == len(gpu.JOBS)
    for job in gpu.JOBS:
        parsed = command.parse(gpu.command(job, args, tmp_path)[3:])
        assert parsed.parts == [job.part] and parsed.modes == ([job.mode] if job.mode else None)
        assert (parsed.rounds, parsed.steps, parsed.device) == (gpu.ROUNDS, 2, "cpu")
        assert parsed.compile == ("+compile" in job.mode)
    modes = {job.mode for job in gpu.JOBS if job.part == "cifar"}
    assert modes == set(contestants.MODES)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["gpu", "cifar", "--device", "cpu"], "gpu runs"),
        (["gpu", "--minutes", "0", "--device", "cpu"], "'0'"),
        pytest.param(
            *(["gpu"], "no usable CUDA device"),
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device"),
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_ends_with_one_line(capsys, arguments, named):
    result = failure(capsys, command.main, *arguments)
    assert result.code == 2 and len(result.lines) == 1 and named in result.said


# ---------------------------------------------------------------------------------------------------------------------
# The parts


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """Both configurations with the smallest networks and batches of 8; on a CPU, in float32."""
    for name, backbone in (("CIFAR", "resnet8"), ("IMAGENET", "resnet10")):
        cfg = tmp_path / f"{name}.yaml"
        cfg.write_text(f"_BASE_: {getattr(contestants, name)}\nbackbone: {backbone}\nbatch_size: 8\n")
        monkeypatch.setattr(contestants, name, str(cfg))
    for name, value in (("IMAGENET", str(cfg)), ("BATCH", 8), ("LARGE_BATCH", 8), ("SIDE", 32)):
        monkeypatch.setattr(gpu_parts, name, value)
    monkeypatch.setenv("KINETO_LOG_LEVEL", "99")
    args = ("--device", "cpu", "--steps", "2", "--rounds", "1", "--modes", "fp32", "--no-compile")
    return parts.Bench(command.parse(args), CPU, tmp_path)


def test_correctness_says_how_far_weights_are_apart(bench, monkeypatch):
    class Wrong(gpu_parts.Trainer):
        """Adds 0.5 to a weight if the step is not recorded."""

        def train(self, steps):
            super().train(steps)
            if made.pop():
                with torch.no_grad():
                    next(self.step.model.parameters())[0, 0, 0, 0] += 0.5

    (rows,) = gpu_parts.correctness(bench).tables.values()
    apart = {row["what"]: row["largest difference"] for row in rows}
    scale = apart.pop("CPU - before")
    assert scale > 0 and set(apart.values()) == {0.0} and sum(row["bit for bit"] for row in rows) == 4
    made = [False, False, True, False]  # from the last to the first: recorded, eager, eager again, on the CPU
    monkeypatch.setattr(gpu_parts, "Trainer", Wrong)
    (rows,) = gpu_parts.correctness(bench).tables.values()
    assert [row["largest difference"] for row in rows[:4]] == pytest.approx([0.5, 0.5, 0.5, 0])
    assert [row["bit for bit"] for row in rows[:4]] == [False, False, False, True]


def test_the_large_network_is_trained_on_images_that_lie_ready(bench, monkeypatch):
    made = []
    monkeypatch.setattr(gpu_parts, "warm_up", lambda *arguments: made.append(arguments) or parts.warm_up(*arguments))
    ((title, rows),) = gpu_parts.large(bench).tables.items()
    ((_, data, steps, new),) = made
    trainer = new(data, "fp32", CPU)
    assert title == "rounds of 2 steps of 8 images" and rows[0]["images/s"] > 0
    assert data.on_device and data.num_classes == 1000 and len(data.train.targets) == 16
    assert trainer.step.model.classifier.rows().shape[0] == 1000 and len(trainer.loader) == steps == 2


def test_memory_of_both_networks(bench):
    (rows,) = gpu_parts.memory(bench).tables.values()
    small, big = (row["tensors, MiB"] for row in rows)
    weights = sum(
        p.numel() for p in gpu_parts._resnet50(gpu_parts._large_noise(1), "fp32", CPU).step.model.parameters()
    )
    assert 0 < small < big and big > 3 * 4 * weights / 2**20  # with gradients and momentum


def test_a_training_answers_until_its_pipe_ends(bench):
    here, there = multiprocessing.Pipe()
    training = threading.Thread(target=gpu_parts._train_on_demand, args=(there, "fp32", CPU, 2))
    training.start()
    assert here.recv() == "ready"
    for _ in range(2):
        here.send(0.01)
        assert here.recv() > 0
    here.close()
    training.join(30)
    assert not training.is_alive()


@pytest.mark.slow
def test_trainings_at_once(bench, monkeypatch, capfd):
    """Processes of their own, which train the real network."""
    monkeypatch.setattr(gpu_parts, "SECONDS", 0.1)
    monkeypatch.setattr(bench.args, "steps", 1)
    monkeypatch.setattr(gpu_parts.distributed, "workers_here", lambda workers: 3)
    (rows,) = gpu_parts.together(bench).tables.values()
    assert [row["what"] for row in rows] == ["1 at once", "2 at once"] and all(row["images/s"] > 0 for row in rows)
    monkeypatch.setattr(gpu_parts.distributed, "workers_here", lambda workers: 1)
    monkeypatch.setattr(parts.Bench, "modes", lambda self: ["fp99"])
    with pytest.raises(SystemExit):
        gpu_parts.together(bench)
    assert "fp99" in capfd.readouterr().err.splitlines()[-1]
