"""Sweeps as jobs: what SLURM is asked for, and runs by submitit's executor for one machine.

A SLURM of two nodes trains sweeps in test_slurm.py.
"""

import contextlib
import json
import os
import signal
import sys
from pathlib import Path

import pytest

from tests.conftest import assert_same_run, failure
from tests.scripts import completed, kill_all, processes_of, started, wait_for
from tests.test_sweep import trained
from tests.test_sweep_plan import ARMS, LATE, OPTIONS, names, planned, written
from utils.files import lock_file
from utils.sweep import cluster, runner
from utils.sweep.command import main
from utils.sweep.results import results_of
from utils.sweep.spec import read_sweep

# ---------------------------------------------------------------------------------------------------------------------
# The command line


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--slurm", "partition=gpu"], "--slurm goes with --cluster"),
        (["--per_gpu", "2"], "--per_gpu goes with --cluster"),
        (["--wait"], "--wait goes with --cluster"),
        (["--cluster", "slurm", "--minutes", "5"], "a job's time limit is --slurm time=12:00:00"),
        (
            ["--cluster", "slurm", "--slurm", "=gpu"],
            "must be a long option of sbatch, such as partition=gpu",
        ),
        (
            ["--cluster", "slurm", "--slurm", "partition=gpu", "lr", "0.05"],
            "comes last, or before another --option: lr is an option of the runs",
        ),
        (["--cluster", "condor"], "invalid choice: 'condor'"),
    ],
)
def test_what_does_not_go_together_is_refused_in_a_line(tmp_path, capsys, words, said):
    result = failure(capsys, main, written(tmp_path), "--save_dir", tmp_path / "saved", *words)
    assert (result.code, len(result.lines)) == (2, 1) and said in result.said
    assert not (tmp_path / "saved").exists()


def test_without_submitit_it_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)  # as if it were not installed
    result = failure(capsys, main, written(tmp_path), "--save_dir", tmp_path, "--cluster", "slurm")
    assert (result.code, len(result.lines)) == (2, 1)
    assert "--cluster slurm needs submitit, which is not installed: pip install submitit" in result.said


# ---------------------------------------------------------------------------------------------------------------------
# What SLURM is asked for, by stand-ins for its commands

SBATCH = """#!/bin/sh
number=$(($(cat {folder}/number) + 1))
echo $number > {folder}/number
cp "$1" {folder}/$number.sh
echo Submitted batch job $number
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch) -> Path:
    """A folder: N.sh is what was submitted as job N, from 1 on; queue is what squeue says, error why it fails."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    (folder / "number").write_text("0")
    (folder / "queue").touch()
    scripts = {"sbatch": SBATCH.format(folder=folder), "srun": "#!/bin/sh\n"}
    scripts["squeue"] = (
        f"#!/bin/sh\nif [ -e {folder}/error ]; then cat {folder}/error >&2; exit 1; fi\ncat {folder}/queue"
    )
    for name, text in scripts.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    return folder


def submit(folder: Path, *words: object) -> int:
    words = ("--cluster", "slurm", "--slurm", "partition=gpu", "exclusive", "--slurm", "cpus_per_task=8", *words)
    return main([str(word) for word in (folder / "tiny.yaml", "--save_dir", folder / "saved", *words)])


def asked(script: Path) -> dict[str, str]:
    """Options of sbatch in a script."""
    lines = [line.removeprefix("#SBATCH --") for line in script.read_text().splitlines() if line.startswith("#SBATCH")]
    return {key: value.strip("'") for key, _, value in (line.partition("=") for line in lines)}


def test_forks_are_an_array_that_waits_for_their_parents(slurm, tmp_path, capsys):
    pytest.importorskip("submitit")
    written(tmp_path, arms=ARMS | LATE | {"later": {"fork": {"arm": "arb", "epoch": 1}, "lr_steps": [8, 9]}})
    assert submit(tmp_path, "--jobs", 3) == 0
    assert "7 runs, 0 finished, 0 queued or running, 7 new" in capsys.readouterr().out
    first, second = asked(slurm / "1.sh"), asked(slurm / "2.sh")
    assert not (slurm / "3.sh").exists()
    given = {"partition": "gpu", "cpus-per-task": "8", "time": "1-00:00:00", "signal": "USR1@120", "ntasks": "1"}
    assert first.items() >= given.items() and {"exclusive", "requeue"} <= first.keys()
    assert (first["array"], second["array"]) == ("0-3%3", "0-2%3")
    ids = json.loads((tmp_path / "saved/tiny/jobs/ids.json").read_text())
    parents = {ids[f"{name}"] for name in ("plain_seed0", "arb_seed0", "arb_seed1")}
    assert "dependency" not in first and second["dependency"] == f"afterany:{':'.join(sorted(parents))}"


def test_what_is_queued_is_left_alone_and_what_died_is_submitted_again(slurm, tmp_path, capsys):
    pytest.importorskip("submitit")
    written(tmp_path)
    assert submit(tmp_path, "--per_gpu", 3, "--slurm", "time=2:00") == 0
    assert asked(slurm / "1.sh").items() >= {"array": "0-1%2", "time": "2:00"}.items()
    (slurm / "queue").write_text("1_0\n1_1\n99\n")
    assert submit(tmp_path) == 0
    assert "4 runs, 0 finished, 4 queued or running, 0 new" in capsys.readouterr().out
    (slurm / "queue").write_text("1_0\n")
    (tmp_path / "saved/tiny/started").mkdir()
    (tmp_path / "saved/tiny/started/arb_seed1.txt").write_text("error: out of memory\n")
    assert submit(tmp_path) == 0
    said = capsys.readouterr().out
    assert "submit arb_seed1, from epoch 0, as job 2; job 1_1: out of memory\n" in said
    assert "4 runs, 0 finished, 3 queued or running, 1 new" in said and "array" not in asked(slurm / "2.sh")
    assert json.loads((tmp_path / "saved/tiny/results.json").read_text())["planned"] == 4


def test_a_run_that_a_job_has_is_not_trained_here(slurm, tmp_path, capsys):
    """By the queue, or where that cannot be asked by the lock that the job holds."""
    pytest.importorskip("submitit")
    path = written(tmp_path, seeds=[0])
    submit(tmp_path)
    (slurm / "queue").write_text("1_0\n1_1\n")
    assert main([str(path), "--save_dir", str(tmp_path / "saved")]) == 0
    said = capsys.readouterr().out
    assert "2 runs are queued or running on a cluster, and left to it" in said and " start " not in said
    (slurm / "queue").write_text("")
    home, runs = tmp_path / "saved/tiny", planned(path, home=str(tmp_path / "saved"))
    assert cluster.live(home, runs) == set()
    (home / "started").mkdir()
    with contextlib.closing(lock_file(home / "started/arb_seed0.lock", "", inheritable=True)):
        assert cluster.live(home, runs) == {"arb_seed0"}


def test_jobs_of_a_cluster_that_is_out_of_reach_are_not_trained_here(slurm, tmp_path, monkeypatch, capsys):
    pytest.importorskip("submitit")
    path = written(tmp_path)
    submit(tmp_path)
    (slurm / "squeue").unlink()
    monkeypatch.setenv("PATH", str(slurm))
    result = failure(capsys, main, path, "--save_dir", tmp_path / "saved")
    assert (result.code, len(result.lines)) == (2, 1)
    assert "names jobs of runs that have not ended, and there is no squeue here" in result.said


def test_nothing_is_submitted_while_the_queue_is_not_known(slurm, tmp_path, capsys):
    pytest.importorskip("submitit")
    written(tmp_path)
    submit(tmp_path)
    (slurm / "error").write_text("slurm_load_jobs error: Unable to contact slurm controller\n")
    result = failure(capsys, lambda _: submit(tmp_path))
    assert (result.code, len(result.lines)) == (2, 1)
    assert "squeue does not tell which jobs there are: slurm_load_jobs error: Unable to contact" in result.said
    assert not (slurm / "2.sh").exists()


def test_sbatch_s_error_is_one_line(slurm, tmp_path, capsys):
    pytest.importorskip("submitit")
    (slurm / "sbatch").write_text("#!/bin/sh\necho sbatch: error: invalid partition specified: gpu >&2; exit 1\n")
    written(tmp_path)
    result = failure(capsys, lambda _: submit(tmp_path))
    assert (result.code, len(result.lines)) == (2, 1)
    assert "--cluster slurm: sbatch: error: invalid partition specified: gpu" in result.said


def test_a_fork_is_in_the_generation_after_its_parent_until_it_can_begin(tmp_path):
    runs = planned(written(tmp_path, seeds=[0], arms=ARMS | LATE), home=str(tmp_path / "saved"))
    assert [names(generation) for generation in cluster.generations(runs)] == [
        ["plain_seed0", "arb_seed0"],
        ["late_seed0"],
    ]
    assert cluster.generations([]) == []


# ---------------------------------------------------------------------------------------------------------------------
# Runs

SAME = ("run", "hash", "options", "data", "epochs", "last", "cross_fitted", "best")  # what two trainings share
STAND_IN = "import shutil; shutil.copytree({!r}, {!r})"


def test_a_job_trains_its_runs_as_the_sweep_does_here(tmp_path, capsys, monkeypatch):
    """The process that is started, whose imports take seconds, puts a finished run there."""
    pytest.importorskip("submitit")
    path = written(tmp_path, seeds=[0], arms={"plain": {}})
    (run,) = runs = planned(path, home=str(tmp_path / "saved"))
    trained(runs)
    former, place = run.folder().rename(tmp_path / "former"), run.home / "plain_seed0_29990101000000"
    monkeypatch.setattr(runner, "ROOT", tmp_path)
    (tmp_path / "train_stage1.py").write_text(STAND_IN.format(str(former), str(place)))
    assert main([str(path), "--save_dir", str(tmp_path / "saved"), "--cluster", "debug", "--per_gpu", "2"]) == 0
    said = capsys.readouterr().out
    assert "submit plain_seed0, from epoch 0, as job DEBUG_" in said and "1 of 1 runs are finished" in said
    assert [row["run"] for row in json.loads((run.home / "results.json").read_text())["runs"]] == ["plain_seed0"]
    assert not cluster.live(run.home, runs)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the jobs' processes as Linux lists them")
def test_a_sweep_begun_here_goes_on_in_jobs_that_are_requeued_and_ends_here(tmp_path, capsys):
    """The sweep is killed, and then the command that has submitted its jobs."""
    pytest.importorskip("submitit")
    folders = tmp_path / "whole", tmp_path / "moved"
    paths = [written(folder, seeds=[0], options=OPTIONS | {"num_epochs": 60}) for folder in folders]
    whole, moved = ([*planned(path, home=str(folder / "saved"))] for path, folder in zip(paths, folders, strict=True))
    trained(whole)
    home, words = moved[0].home, [paths[1], "--save_dir", folders[1] / "saved", "--jobs", 2]

    def trained_epochs(least: int) -> None:
        wait_for(lambda: all(run.epochs_done() >= least for run in moved), seconds=400)

    with contextlib.ExitStack() as stack:
        stack.callback(kill_all, tmp_path)
        here = stack.enter_context(started(tmp_path, "-m", "utils.sweep", *words))
        trained_epochs(2)
        here.process.kill()
        here.process.wait(10)
        wait_for(lambda: not processes_of(home))
        before = max(run.epochs_done() for run in moved)
        there = stack.enter_context(started(tmp_path, "-m", "utils.sweep", *words, "--cluster", "local"))
        trained_epochs(before + 2)
        there.process.kill()
        there.process.wait(10)
        assert cluster.live(home, moved) == {run.name for run in moved}
        assert main([str(word) for word in words]) == 0
        assert "2 runs are queued or running on a cluster, and left to it" in capsys.readouterr().out
        jobs = [int(path.name.removesuffix("_submitted.pkl")) for path in home.glob("jobs/*_submitted.pkl")]
        for job in jobs:
            (task,) = Path(f"/proc/{job}/task/{job}/children").read_text().split()
            os.kill(int(task), signal.SIGUSR1)
        for job in jobs:
            log = home / f"jobs/{job}_0_log.out"
            wait_for(lambda log=log: log.read_text().count("Starting with") == 2)
            os.kill(job, signal.SIGTERM)
        wait_for(lambda: not processes_of(home))
        done = completed(tmp_path, "-m", "utils.sweep", *words)
    assert done.code == 0, done.err
    results = [results_of(read_sweep(path), runs)["runs"] for path, runs in zip(paths, (whole, moved), strict=True)]
    assert json.loads((home / "results.json").read_text())["runs"] == results[1]
    for one, other, row, same in zip(whole, moved, *results, strict=True):
        assert_same_run(one.folder(), other.folder())
        assert [row[key] for key in SAME] == [same[key] for key in SAME] and len(same["starts"]) >= 3
