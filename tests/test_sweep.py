"""Sweeps on digits at 8 pixels, whose results are those of their runs' folders."""

import contextlib
import copy
import dataclasses
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train_stage1
from tests.conftest import ROOT, assert_same_run, content, failure, history
from tests.test_several_processes import completed, processes_of, started, wait_for
from tests.test_sweep_plan import ARMS, DIGITS, LATE, OPTIONS, WATERFALL, planned, written
from tests.test_sweep_tables import FIELDS, check_published
from utils import config, launcher
from utils.command_line import exit_code
from utils.config import dump_config, load_config
from utils.errors import InputError, Interrupted
from utils.signals import Signals
from utils.sweep import results as sweep
from utils.sweep import runner
from utils.sweep.command import main
from utils.sweep.intervals import estimate
from utils.sweep.plan import Run, plan
from utils.sweep.spec import Sweep, read_sweep
from utils.sweep.tables import markdown

# ---------------------------------------------------------------------------------------------------------------------
# Runs and results


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """The folder of a finished sweep of two arms, two seeds and a fork; tests do not write into it."""
    folder = tmp_path_factory.mktemp("sweeps")
    written(folder, arms=ARMS | LATE, waterfall=WATERFALL)
    trained(of_tiny(folder)[1])
    assert again(folder, "--images", "digits of a test") == 0
    return folder


def trained(runs: Iterable[Run]) -> None:
    """Each by the same script and file as in a process of its own, but in this one."""
    for run in runs:
        run.home.mkdir(parents=True, exist_ok=True)
        path = run.home.parent / f"{run.name}.yaml"
        path.write_text(dump_config(run.cfg, fork=str(run.origin()) if run.parent else ""))
        train_stage1.main(["--cfg", str(path)])


def of_tiny(folder: Path) -> tuple[Sweep, list[Run], Path]:
    """The sweep, its runs and its home."""
    asked = read_sweep(folder / "tiny.yaml")
    home = folder / "saved/tiny"
    return asked, plan(asked, home), home


@pytest.fixture
def copied(tiny, tmp_path) -> Path:
    """A copy to write into."""
    return shutil.copytree(tiny, tmp_path / "copy")


def again(folder: Path, *arguments: object) -> int:
    """The same command in this process; for what starts no run."""
    told = [str(folder / "tiny.yaml"), "--save_dir", str(folder / "saved"), *map(str, arguments)]
    return exit_code(lambda: main(told))


def state_of(*folders: Path) -> list[tuple]:
    """Everything that lies in them."""
    inside = [path for folder in folders for path in (folder, *folder.rglob("*"))]
    return sorted((str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in inside)


def runs_in(home: Path) -> list[Path]:
    return [folder for folder in home.iterdir() if folder.is_dir()]


def folder_of(home: Path, name: str) -> Path:
    (found,) = home.glob(f"{name}_2*")
    return found


def test_results_are_those_of_the_runs_folders(tiny):
    home = tiny / "saved/tiny"
    results = json.loads((home / "results.json").read_text())
    names = ["plain_seed0", "arb_seed0", "late_seed0", "plain_seed1", "arb_seed1"]
    assert [row["run"] for row in results["runs"]] == names
    assert (results["sweep"], results["planned"], results["failed"]) == ("tiny", 5, {})
    assert results["images"] == "digits of a test"
    for row, run in zip(results["runs"], of_tiny(tiny)[1], strict=True):
        folder = folder_of(home, row["run"])
        assert row.keys() >= FIELDS and row["hash"] == run.hash
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        targets = np.load(folder / "predictions/targets.npz")["targets"]
        top1 = [100 * np.mean(np.load(folder / f"predictions/{epoch}.npz")["classes"] == targets) for epoch in (0, 1)]
        assert row["last"]["top1"] == pytest.approx(top1[1]) and row["best"]["top1"] == pytest.approx(max(top1))
        assert row["last"]["ece"] == rows[1]["test"]["ece"] and row["last"]["few"] == rows[1]["test"]["few"]
        summary = json.loads((folder / "summary.json").read_text())
        assert row["cross_fitted"] == summary["cross-fitted best"]
        own = rows[1:] if row["arm"] == "late" else rows  # the first epoch is its parent's
        assert row["seconds"] == pytest.approx(sum(one["timing"]["train_seconds"] for one in own), abs=0.06)
        cfg, (start,) = load_config(folder / "config.yaml"), starts_of(folder)
        assert (row["seed"], row["subset_seed"], row["epochs"]) == (cfg.seed, cfg.subset_seed, cfg.num_epochs)
        assert row["options"] == {key: cfg[key] for key in row["options"]}
        assert row["data"] == start["data"] and row["commit"] == start["commit"] and row["threads"] == start["threads"]
        assert row["versions"] == start["versions"] and row["starts"][0]["epoch"] == (row["arm"] == "late")


def starts_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "starts.jsonl").read_text().splitlines()]


def test_tables_and_the_figure_are_of_the_results(tiny):
    home = tiny / "saved/tiny"
    results = json.loads((home / "results.json").read_text())
    top1 = {row["run"]: row["last"]["top1"] for row in results["runs"]}
    mean = (top1["arb_seed0"] - top1["plain_seed0"] + top1["arb_seed1"] - top1["plain_seed1"]) / 2
    table = (home / "table.md").read_text()
    assert table == markdown(results) and f"| arb - plain | 2 | {mean:+.2f} | [" in table.replace("**", "")
    assert f"| late - plain | 1 | {top1['late_seed0'] - top1['plain_seed0']:+.2f} | - |" in table
    assert "From plain to the best of 2 arms, over the 2 seeds that all steps have" in table
    assert "| schedule | too few runs | - |" in table and r"\bottomrule" in (home / "table.tex").read_text()
    assert Image.open(home / "waterfall.png").size == (1650, 720)


def test_arms_of_a_seed_are_trained_on_the_same_images_at_the_same_rates(tiny):
    home = tiny / "saved/tiny"
    first, second = ([folder_of(home, f"{arm}_seed{seed}") for arm in ARMS] for seed in (0, 1))
    assert len({start["data"] for folder in (*first, *second) for start in starts_of(folder)}) == 1
    for folder in (*first, *second):
        assert [row["lr"] for row in history(folder)] == pytest.approx([0.1, 0.01])


def test_a_fork_begins_with_its_parent_s_epoch(tiny):
    parent, fork = (folder_of(tiny / "saved/tiny", f"{arm}_seed0") for arm in ("plain", "late"))
    assert history(fork)[0] == history(parent)[0]
    assert (history(parent)[1]["lr"], history(fork)[1]["lr"]) == pytest.approx((0.01, 0.1))
    assert load_config(fork / "config.yaml").fork == str(parent / "ckps/epoch_1.pth.tar")


STAND_IN = "import shutil; shutil.copytree({!r}, {!r})"


@pytest.mark.parametrize("fails", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_what_is_missing_is_trained_and_what_fails_stops_no_other(copied, capsys, monkeypatch, fails):
    """A fork of a run that is finished, and at the same time an arm without images.

    By default no arm fails, and the process that is started, whose imports take seconds, puts a finished run there.
    """
    home, away = copied / "saved/tiny", {"dataset": "folder", "data_path": str(copied / "nowhere"), "imb_factor": None}
    written(copied, arms={**ARMS, **({"away": {**away, "seeds": [0]}} if fails else {}), **LATE}, waterfall=WATERFALL)
    former = folder_of(home, "late_seed0").rename(copied / "former")
    if not fails:
        monkeypatch.setattr(runner, "ROOT", copied)
        (copied / "train_stage1.py").write_text(STAND_IN.format(str(former), str(home / "late_seed0_29990101000000")))
    rest = [folder_of(home, f"{arm}_seed{seed}") for arm in ARMS for seed in (0, 1)]
    before = state_of(*rest)
    assert again(copied, "--jobs", 2) == fails
    said = capsys.readouterr()
    assert said.out.count(" start ") == 1 + fails and f"{5 + fails} runs, 4 finished before" in said.out
    assert "done late_seed0: " in said.out and said.out.count("failed away_seed0: ") == fails
    lines = said.err.splitlines()
    assert len(lines) == fails
    assert all(line.startswith("failed: away_seed0: ") and str(copied / "nowhere") in line for line in lines)
    assert state_of(*rest) == before
    results = json.loads((home / "results.json").read_text())
    assert list(results["failed"]) == ["away_seed0"] * fails
    assert (home / "table.md").read_text().count("* failed: away_seed0: ") == fails
    assert [row["run"] for row in results["runs"]][2] == "late_seed0" and len(results["runs"]) == 5
    fork = folder_of(home, "late_seed0")
    assert starts_of(fork)[0]["data"] == starts_of(former)[0]["data"]
    assert history(fork)[0] == history(former)[0] and len(history(fork)) == 2


def test_a_second_call_starts_nothing_and_leaves_everything_as_it_was(copied, capsys):
    home = copied / "saved/tiny"
    before, files = state_of(*runs_in(home)), [(home / name).read_bytes() for name in ("results.json", "table.md")]
    assert again(copied, "--jobs", 2) == 0
    said = capsys.readouterr().out
    assert "5 runs, 5 finished before" in said and " start " not in said and "left for another time" not in said
    assert state_of(*runs_in(home)) == before
    assert [(home / name).read_bytes() for name in ("results.json", "table.md")] == files


def test_damaged_results_are_replaced(copied):
    asked, runs, home = of_tiny(copied)
    whole = json.loads((home / "results.json").read_text())
    assert whole.keys() == sweep.RESULTS
    for damage in ("{", "[]"):
        (home / "results.json").write_text(damage)
        assert sweep.results_of(asked, runs, images="digits of a test") == whole


def test_a_run_of_an_older_version_counts_and_is_compared_with_nothing(copied):
    asked, runs, home = of_tiny(copied)
    (folder_of(home, "arb_seed0") / "starts.jsonl").unlink()
    results = sweep.results_of(asked, runs)
    (row,) = (row for row in results["runs"] if row["run"] == "arb_seed0")
    assert row["data"] == row["commit"] == "" and row["starts"] == [] and row.keys() >= FIELDS
    said = markdown(results)
    assert "| arb | 2 |" in said and "| arb - plain | 1 |" in said


def test_a_run_whose_files_are_damaged_goes_on_and_the_rest_stays(copied):
    asked, runs, home = of_tiny(copied)
    for name, text in (("summary.json", ""), ("summary.json", "[]"), ("metrics.jsonl", "{\n{}\n")):
        path = folder_of(home, "arb_seed0") / name
        whole = path.read_text()
        path.write_text(text)
        assert [run.name for run in runs if not run.finished()] == ["arb_seed0"]
        assert len(sweep.results_of(asked, runs)["runs"]) == 4
        path.write_text(whole)


def test_a_run_that_was_trained_on_other_images_in_between_is_compared_with_nothing(copied):
    asked, runs, home = of_tiny(copied)
    path = folder_of(home, "arb_seed0") / "starts.jsonl"
    (start,) = starts_of(path.parent)
    path.write_text("".join(json.dumps(one) + "\n" for one in (start | {"data": "others"}, start)))
    rows = {row["run"]: row for row in sweep.results_of(asked, runs)["runs"]}
    assert rows["arb_seed0"]["data"] == "" and rows["arb_seed1"]["data"] == start["data"]
    assert "| arb - plain | 1 |" in markdown(sweep.results_of(asked, runs))


def test_another_fork_of_the_same_name_is_another_run(copied):
    """Another epoch, another parent, or no fork at all: what is finished was not that."""
    _, runs, home = of_tiny(copied)
    late = next(run for run in runs if run.arm == "late")
    assert late.finished()
    plain, arb = (next(run for run in runs if run.name == f"{arm}_seed0") for arm in ARMS)
    for changes in ({"forked_after": 2}, {"parent": arb}, {"parent": None, "forked_after": 0}):
        other = dataclasses.replace(late, **changes)
        assert other.folder() is None and other.hash != late.hash, changes
    moved = plain.folder().rename(home / "plain_seed0_29990101000000")  # the parent was trained anew
    assert plain.folder() == moved and late.folder() is None


def test_options_of_arms_that_differ_by_their_configurations_cannot_be_overridden(tmp_path):
    other = tmp_path / "other.yaml"
    other.write_text(f"_BASE_: {os.path.relpath(DIGITS, tmp_path)}\nweight_decay: 1e-3\n")
    path = written(tmp_path, arms={"plain": {}, "other": {"cfg": "other.yaml"}})
    with pytest.raises(InputError, match="weight_decay is what plain and other differ in"):
        planned(path, "weight_decay", "0.1")
    (run, *_) = planned(path, "lr", "0.05", "workers", "2")
    assert run.overridden == {"lr": 0.05}
    assert sweep.results_of(read_sweep(path), [run])["overridden"] == {"lr": 0.05}


def test_a_changed_sweep_makes_new_runs_and_keeps_the_old_folders(copied):
    _, runs, home = of_tiny(copied)
    arms = {**ARMS, "arb": {**ARMS["arb"], "lr": 0.05}, **LATE}
    asked = read_sweep(written(copied, arms=arms, waterfall=WATERFALL))
    changed = plan(asked, home)
    assert [run.name for run in changed if not run.finished()] == ["arb_seed0", "arb_seed1"]
    assert [row["arm"] for row in sweep.results_of(asked, changed)["runs"]] == ["plain", "late", "plain"]
    assert all(run.finished() for run in runs)  # of the file as it was


def test_what_a_run_was_is_read_from_its_folder(copied):
    """Two folders of one name: the one of this configuration counts, and of those a finished one."""
    _, runs, home = of_tiny(copied)
    first = folder_of(home, "plain_seed0")
    later = shutil.copytree(first, home / "plain_seed0_29990101000000")
    (later / "summary.json").unlink()
    assert runs[0].folder() == first and runs[0].finished()
    shutil.move(home / first.name, home / "plain_seed0_away")
    assert runs[0].folder() == later and not runs[0].finished() and runs[0].epochs_done() == 2
    (later / "config.yaml").write_text("lr: [")
    assert runs[0].folder() is None and runs[0].epochs_done() == 0


def test_a_fork_whose_parent_kept_nothing_is_named(copied, capsys):
    home = copied / "saved/tiny"
    shutil.rmtree(folder_of(home, "late_seed0"))
    (folder_of(home, "plain_seed0") / "ckps/epoch_1.pth.tar").unlink()
    assert again(copied) == 1
    said = capsys.readouterr()
    assert "has no ckps/epoch_1.pth.tar to begin with" in said.err and "failed: late_seed0: " in said.err
    assert " start " not in said.out
    assert list(json.loads((home / "results.json").read_text())["failed"]) == ["late_seed0"]


# ---------------------------------------------------------------------------------------------------------------------
# Time


def test_nothing_is_started_that_cannot_end_in_time(copied, capsys):
    """Epochs' times are known from the runs that have ended."""
    written(copied, seeds=[0, 1, 2], arms=ARMS | LATE, waterfall=WATERFALL)
    before = state_of(*runs_in(copied / "saved/tiny"))
    assert again(copied, "--minutes", 0.0005) == 0
    said = capsys.readouterr().out
    assert " start " not in said and "2 runs are left for another time; the same command goes on" in said
    assert state_of(*runs_in(copied / "saved/tiny")) == before


def scheduler_of(folder: Path, path: Path | None = None, **changes) -> runner.Scheduler:
    asked = read_sweep(path or folder / "tiny.yaml")
    runs = plan(asked, folder / "saved" / asked.name)
    return runner.Scheduler(asked, runs, **{"jobs": 2, "minutes": None, "images": None, **changes})


def test_times_are_estimated_from_runs_of_the_same_arm(copied):
    home = copied / "saved/tiny"
    for arm, seconds in (("plain", 10.0), ("arb", 20.0), ("late", 60.0)):
        for folder in home.glob(f"{arm}_seed*_2*"):
            rows = [row | {"timing": {"train_seconds": seconds}} for row in history(folder)]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arms = {**ARMS, **LATE, "new": {"lr": 0.05}}
    arms["late"] = {**LATE["late"], "seeds": [0, 2]}
    scheduler = scheduler_of(copied, written(copied, seeds=[0, 2], arms=arms))
    left = {run.name: scheduler.seconds_left(run) / runner.OVERHEAD for run in scheduler.waiting}
    slower = runner.OVERHEAD
    # The median of 10, 20, 60 for the new arm; a fork has one epoch of its own.
    names = ("new_seed0", "plain_seed2", "arb_seed2", "late_seed2", "new_seed2")
    assert left == pytest.approx(dict(zip(names, (40, 20, 40, 60, 40), strict=True)))
    assert scheduler.total_epochs_left() == 2 + 2 + 2 + 1 + 2
    for minutes, ready in ((60, 5), (slower * 40.5 / 60, 4), (slower * 20.5 / 60, 1), (slower * 19 / 60, 0)):
        scheduler.deadline = time.monotonic() + 60 * minutes
        able = [run.name for run in scheduler.waiting if run.parent is None and scheduler.is_ready(run)]
        assert len(able) == min(ready, 4), (minutes, able)
    assert not any(scheduler.is_ready(run) for run in scheduler.waiting if run.parent)  # which has kept nothing yet


def test_the_pace_of_a_fork_is_of_its_own_epochs(tiny):
    """Its folder has its parent's rows from the beginning."""
    run = next(run for run in of_tiny(tiny)[1] if run.arm == "late")
    fresh = dataclasses.replace(run, home=tiny)  # where it was never started
    assert (fresh.epochs_left(), run.epochs_left()) == (1, 0)
    worker = runner.Job(run, None, 0, since=time.monotonic() - 50, left_before=fresh.epochs_left())
    assert worker.pace() is None and worker.pace(least=1) == pytest.approx(50, abs=5)


@pytest.fixture
def busy(tmp_path, monkeypatch) -> Iterator[runner.Scheduler]:
    """A scheduler of two arms whose first run is a process that only waits."""
    monkeypatch.setattr(runner.Scheduler, "pause", 0.1)
    scheduler = scheduler_of(tmp_path, written(tmp_path, seeds=[0]), jobs=1, minutes=60)
    (tmp_path / "saved/tiny/started").mkdir(parents=True)
    with subprocess.Popen(["sleep", "60"]) as process:
        scheduler.running.append(runner.Job(scheduler.waiting.pop(0), process, 0))
        yield scheduler
        process.kill()


def test_when_the_time_is_over_runs_are_asked_to_stop(busy, capsys):
    busy.deadline = time.monotonic()
    with Signals() as signals, signals.noted():
        assert busy.work(signals) == {}
    said = capsys.readouterr().out
    assert "the time is over: plain_seed0 writes a checkpoint" in said and "stopped plain_seed0 after 0 epochs" in said
    assert "2 runs are left for another time" in said and " start " not in said


def test_a_signal_stops_the_runs_and_then_the_sweep(busy, capsys):
    with pytest.raises(Interrupted) as stop, Signals(runner.GRACE) as signals, signals.noted():
        signal.raise_signal(signal.SIGTERM)
        busy.work(signals)
    assert stop.value.number == signal.SIGTERM and "the same command goes on" in str(stop.value)
    assert "the sweep was stopped: plain_seed0 writes a checkpoint" in capsys.readouterr().out
    assert busy.running == [] and (busy.runs[0].home / "results.json").is_file()


def test_the_same_error_at_once_in_two_arms_stops_the_sweep(busy):
    job, why = busy.running[0], "data_path: no such folder"
    (job.run.home / "started/plain_seed0.txt").write_text(f"error: {why}\n")
    busy.failed["arb_seed0"] = why
    job.process.kill()
    job.process = subprocess.Popen(["sh", "-c", "exit 2"])
    with Signals() as signals, signals.noted(), pytest.raises(InputError, match=f"{why} .runs of two arms have ended"):
        busy.work(signals)


# ---------------------------------------------------------------------------------------------------------------------
# Ends


@pytest.mark.slow
def test_a_sweep_that_was_stopped_resumes_to_the_same_numbers(tmp_path):
    folders = tmp_path / "whole", tmp_path / "stopped"
    paths = [written(folder, seeds=[0], options=OPTIONS | {"num_epochs": 12}) for folder in folders]
    runs = [planned(path, home=str(folder / "saved")) for path, folder in zip(paths, folders, strict=True)]
    trained(runs[0])
    home, threads = folders[1] / "saved/tiny", {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = ("-m", "utils.sweep", paths[1], "--save_dir", home.parent, "--jobs", 2)
    with started(tmp_path, *command, **threads) as run:
        wait_for(lambda: len([*home.glob("*/ckps/current.pth.tar")]) == 2, run)
        run.process.send_signal(signal.SIGTERM)
        assert run.process.wait(60) == 143
        assert run.err().startswith("stopped by SIGTERM: every run is kept as far as it came")
        assert run.err().count("\n") == 1
        assert not processes_of(tmp_path)
    assert all(content(folder_of(home, f"{arm}_seed0"))["epoch"] >= 1 for arm in ARMS)
    assert json.loads((home / "results.json").read_text())["planned"] == 2
    done = completed(tmp_path, *command, **threads)
    assert done.code == 0, done.err
    for one, other in zip(*runs, strict=True):
        assert_same_run(one.folder(), dataclasses.replace(other, home=home).folder())
    results = [sweep.results_of(read_sweep(path), each)["runs"] for path, each in zip(paths, runs, strict=True)]
    for one, other in zip(*results, strict=True):
        same = ("run", "hash", "options", "data", "epochs", "last", "cross_fitted", "best")
        assert [one[key] for key in same] == [other[key] for key in same]


def test_a_fork_of_a_run_that_failed_fails_too(tmp_path, capsys):
    scheduler = scheduler_of(tmp_path, written(tmp_path, seeds=[0], arms={"plain": {}} | LATE))
    (tmp_path / "saved/tiny").mkdir(parents=True)
    scheduler.failed[scheduler.waiting.pop(0).name] = "the loss is not finite"
    with Signals() as signals, signals.noted():
        failed = scheduler.work(signals)
    assert failed["late_seed0"] == "plain_seed0, whose checkpoint it begins with, failed"
    assert "left for another time" not in capsys.readouterr().out
    results = json.loads((tmp_path / "saved/tiny/results.json").read_text())
    assert results["failed"] == failed and len(failed) == 2


def test_a_second_sweep_is_refused(copied, capsys):
    with runner.claimed(copied / "saved/tiny"):
        result = failure(capsys, main, copied / "tiny.yaml", "--save_dir", copied / "saved")
    assert (result.code, len(result.lines)) == (2, 1) and "another process works on this sweep" in result.said
    assert again(copied) == 0


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="only Linux ends a run with its killed sweep")
def test_a_killed_sweep_leaves_no_orphans_and_is_locked_until_its_runs_have_ended(tmp_path):
    path = written(tmp_path, options=OPTIONS | {"num_epochs": 500}, seeds=[0], arms={"plain": {}})
    home = tmp_path / "saved/tiny"
    with started(tmp_path, "-m", "utils.sweep", path, "--save_dir", tmp_path / "saved") as run:
        wait_for(lambda: len([*home.glob("*/ckps/current.pth.tar")]) == 1, run)
        assert not is_free(home)
        run.process.kill()
        run.process.wait(10)
        wait_for(lambda: not processes_of(tmp_path), run, 40)
        wait_for(lambda: is_free(home), run, 20)  # what is ending closes its files late
    (said,) = (home / "started").glob("*.txt")
    assert "stopped by SIGTERM" in said.read_text().splitlines()[-1]
    assert content(folder_of(home, "plain_seed0"))["epoch"] >= 1


def is_free(home: Path) -> bool:
    with contextlib.suppress(InputError), runner.claimed(home):
        return True
    return False


@pytest.mark.slow
def test_a_sweep_that_nobody_listens_to_ends_as_any_other(copied):
    """As with `| head`."""
    command = [sys.executable, "-m", "utils.sweep", copied / "tiny.yaml", "--save_dir", copied / "saved"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert (process.wait(120), process.stderr.read()) == (0, "")
    process.stderr.close()


@pytest.mark.parametrize(
    ("code", "text", "said"),
    [
        (2, "line\nerror: data_path: no such folder\n", "data_path: no such folder"),
        (1, "", "said nothing"),
        (-9, "Epoch: [3][4/8]\n", "was ended by SIGKILL"),
        (0, "fine\n", "ended without a result, see "),
    ],
)
def test_why_a_run_failed_is_said_in_a_line(tmp_path, code, text, said):
    (tmp_path / "said.txt").write_text(text)
    assert runner.reason(code, tmp_path / "said.txt").startswith(said)


def test_runs_are_single_processes_whatever_has_started_the_sweep(monkeypatch):
    """Such as a SLURM job for several tasks: a run must not wait for others, nor be refused."""
    for name, value in {
        "WORLD_SIZE": "4",
        "RANK": "3",
        "LOCAL_RANK": "3",
        "SLURM_NTASKS": "4",
        "SLURM_PROCID": "0",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "environ", runner.environment(0, 1))
    launcher.join()
    assert not launcher.launched()


def test_runs_share_processors_and_take_turns_on_gpus(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    cores = len(os.sched_getaffinity(0))
    monkeypatch.setattr(runner.torch.cuda, "device_count", lambda: 0)
    assert runner.environment(0, 2)["OMP_NUM_THREADS"] == str(max(1, cores // 2))
    assert "OMP_NUM_THREADS" not in runner.environment(0, 1) and "CUDA_VISIBLE_DEVICES" not in runner.environment(0, 1)
    monkeypatch.setattr(runner.torch.cuda, "device_count", lambda: 2)
    assert [runner.environment(slot, 3)["CUDA_VISIBLE_DEVICES"] for slot in range(3)] == ["0", "1", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,MIG-7")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert [runner.environment(slot, 3)["CUDA_VISIBLE_DEVICES"] for slot in range(3)] == ["5", "MIG-7", "5"]
    assert runner.environment(0, 3)["OMP_NUM_THREADS"] == "3"
    monkeypatch.setattr(runner.torch.cuda, "device_count", lambda: 1)
    assert runner.environment(1, 3)["CUDA_VISIBLE_DEVICES"] == "MIG-7"


# ---------------------------------------------------------------------------------------------------------------------
# Figures and publishing


def test_the_figure_over_imbalance_is_of_the_ratios(tiny):
    asked, runs, _ = of_tiny(tiny)
    results = sweep.results_of(asked, runs)
    rows = []
    for factor, shift in ((0.1, 5.0), (0.05, 0.0), (None, 9.0)):
        for row in copy.deepcopy(results["runs"]):
            row["axes"] = {"imb_factor": factor, "lr_steps": [1, 9]}
            row["last"]["top1"] += shift
            rows.append(row)
    results |= {"axes": {"imb_factor": [0.1, 0.05, None], "lr_steps": [[1, 9]]}, "runs": rows, "waterfall": {}}
    point = {"imb_factor": 0.05, "lr_steps": [1, 9]}
    ((name, figure),) = sweep.figures(results)
    assert name == "imbalance_lr_steps1-9"
    drawn = {line.get_label(): line for line in figure.axes[0].get_lines() if not line.get_label().startswith("_")}
    mean = np.mean([row["last"]["top1"] for row in results["runs"] if row["arm"] == "arb" and row["axes"] == point])
    assert drawn["arb"].get_ydata() == pytest.approx([mean + 5, mean])
    assert drawn["arb"].get_xdata() == pytest.approx([10, 20], rel=0.02) and set(drawn) == {"plain", "arb", "late"}


def test_the_figure_of_single_runs_has_what_is_published_of_an_arm_at_a_point(tiny, monkeypatch):
    asked, runs, _ = of_tiny(tiny)
    results, drawn = sweep.results_of(asked, runs), []
    monkeypatch.setattr(sweep.plots, "runs_figure", drawn.append)
    claim = {"arm": "arb", "published": [50, 60]}
    claims = {
        "here": claim,
        "there": {**claim, "published": 70.0, "at": {"lr": 0.2}},
        "pair": {"pair": ["arb", "plain"]},
    }
    for row in results["runs"]:
        row["axes"] = {"lr": 0.1}
    results |= {"axes": {"lr": [0.1, 0.2]}, "claims": claims, "waterfall": {}}
    assert [name for name, _ in sweep.figures(results)] == ["runs_lr0.1"]
    (arms,) = drawn
    assert list(arms) == ["plain", "arb", "late"]
    assert [list(data["published"]) for data in arms.values()] == [[], [50, 60], []]
    top1 = [row["last"]["top1"] for row in results["runs"] if row["arm"] == "arb"]
    assert arms["arb"]["runs"] == top1 and arms["arb"]["low"] == estimate(top1).low
    assert arms["late"]["low"] is None


def test_the_figure_s_intervals_are_over_cuts_where_there_are_several_like_the_table_s(tiny):
    asked, runs, _ = of_tiny(tiny)
    results = sweep.results_of(asked, runs)
    one = next(row for row in results["runs"] if row["arm"] == "arb")
    rows = [copy.deepcopy(one) for _ in range(4)]
    for number, row in enumerate(rows):
        row["axes"], row["seed"], row["subset_seed"] = {"imb_factor": 0.1}, number % 2, number // 2
        row["last"]["top1"] = [80.0, 82.0, 90.0, 92.0][number]
    results |= {"axes": {"imb_factor": [0.1]}, "subset_seeds": [0, 1], "runs": rows, "waterfall": {}}
    ((_, figure),) = sweep.figures(results)
    (interval,) = (line for line in figure.axes[0].get_lines() if len(line.get_ydata()) == 2)
    mean = estimate([81.0, 91.0])
    assert interval.get_ydata() == pytest.approx([mean.low, mean.high])
    assert f"[{mean.low:.2f}, {mean.high:.2f}]" in markdown(results)


@pytest.fixture
def repository(tiny, tmp_path) -> Path:
    """What publishing needs of the repository, with the finished sweep in it."""
    root = tmp_path / "root"
    shutil.copytree(ROOT / "config/digits", root / "config/digits")
    written(root / "config/sweeps", cfg="../digits/digits_imb005.yaml", arms=ARMS | LATE, waterfall=WATERFALL)
    page = "# Title\n\n<!-- results of tiny -->\nold\n<!-- end of results -->\n\nafter\n"
    (root / sweep.PAGE).write_text(page.replace("after", f"{page}<!-- not a marker -->"))
    return root


def publish(root: Path, home: Path) -> Path:
    path = root / "config/sweeps/tiny.yaml"
    asked = read_sweep(path)
    assert sweep.publish(asked, plan(asked, home), path, None, root) == 0
    return root / sweep.PUBLISHED / "tiny.json"


def test_publishing_puts_results_beside_the_sweep_and_tables_into_the_page(repository, tiny):
    home = tiny / "saved/tiny"
    before = state_of(*runs_in(home))
    target = publish(repository, home)
    assert json.loads(target.read_text()) == json.loads((home / "results.json").read_text())
    assert Image.open(target.with_name("tiny_waterfall.png")).size[0] == 1650
    readme = (repository / sweep.PAGE).read_text()
    pictures = "".join(f"![{name}](results/{name}.png)\n\n" for name in ("tiny_runs", "tiny_waterfall"))
    shown = pictures + markdown(json.loads(target.read_text()))
    part = f"<!-- results of tiny -->\n\n{shown}\n<!-- end of results -->"
    assert readme.count(part) == 2 and "\nold\n" not in readme
    assert readme.startswith("# Title\n") and "<!-- not a marker -->" in readme
    assert sweep.filled_page(repository) == readme
    check_published(target, repository)
    assert state_of(*runs_in(home)) == before
    publish(repository, home)
    assert (repository / sweep.PAGE).read_text() == readme


@pytest.mark.parametrize(
    ("page", "said"),
    [
        ("", "has no place for the tables; put the lines <!-- results of tiny --> and <!-- end of results -->"),
        ("tiny tinny", "has a place for results of tinny, which is no sweep in config/sweeps"),
    ],
)
def test_a_page_without_the_right_places_is_refused_before_anything_is_written(repository, tiny, page, said):
    page = "".join(f"<!-- results of {name} -->\n<!-- end of results -->\n" for name in page.split())
    (repository / sweep.PAGE).write_text(page)
    with pytest.raises(InputError, match=re.escape(f"{sweep.PAGE}: {said}")):
        publish(repository, tiny / "saved/tiny")
    assert (repository / sweep.PAGE).read_text() == page and not (repository / sweep.PUBLISHED).exists()


def test_what_failed_is_published_too(repository, copied):
    home = copied / "saved/tiny"
    shutil.rmtree(folder_of(home, "arb_seed1"))
    results = json.loads((home / "results.json").read_text())
    why = {"arb_seed1": "the loss is not finite", "plain_seed0": "was finished later"}
    (home / "results.json").write_text(json.dumps(results | {"failed": why}))
    found = json.loads(publish(repository, home).read_text())
    assert found["failed"] == {"arb_seed1": "the loss is not finite"} and len(found["runs"]) == 4
    assert "* failed: arb_seed1: the loss is not finite" in (repository / sweep.PAGE).read_text()


def test_what_was_published_elsewhere_stays_as_long_as_it_is_of_the_sweep(repository, tiny, copied, capsys):
    target = publish(repository, tiny / "saved/tiny")
    whole = json.loads(target.read_text())
    for folder in (copied / "saved/tiny").glob("*_seed0_2*"):
        shutil.rmtree(folder)
    publish(repository, copied / "saved/tiny")
    assert json.loads(target.read_text()) == whole
    arms = {**ARMS, "arb": {**ARMS["arb"], "lr": 0.05}, **LATE}
    written(repository / "config/sweeps", cfg="../digits/digits_imb005.yaml", arms=arms, waterfall=WATERFALL)
    publish(repository, copied / "saved/tiny")
    found = [row["run"] for row in json.loads(target.read_text())["runs"]]
    assert found == ["plain_seed0", "late_seed0", "plain_seed1"]
    target.write_text(target.read_text()[:100])
    with pytest.raises(InputError, match=r"tiny.json: cannot be read"):
        publish(repository, copied / "saved/tiny")


def test_published_results_of_other_sweeps_and_defaults_are_caught(repository, tiny, monkeypatch):
    target = publish(repository, tiny / "saved/tiny")
    stored = target.read_text()

    def caught(match: str) -> None:
        with pytest.raises(AssertionError, match=match):
            check_published(target, repository)

    with monkeypatch.context() as patched:  # an option that no file sets
        patched.setitem(config.OPTIONS, "momentum", config.OPTIONS["momentum"]._replace(default=0.8))
        caught("momentum had another default")
    lost = json.loads(stored)
    del lost["runs"][1]["seconds"]
    target.write_text(json.dumps(lost))
    caught("arb_seed0: {'seconds'} is missing")
    target.write_text(stored)
    check_published(target, repository)
    file = repository / "config/sweeps/tiny.yaml"
    file.write_text(file.read_text().replace("batch_size: 64", "batch_size: 65"))
    caught("plain_seed0 was of another configuration")
    file.unlink()
    caught("belongs to no sweep")


def test_nothing_finished_is_nothing_to_publish(repository, tmp_path):
    with pytest.raises(InputError, match="there is nothing to publish"):
        publish(repository, tmp_path / "empty")
    assert not (repository / sweep.PUBLISHED).exists() and "\nold\n" in (repository / sweep.PAGE).read_text()


def test_an_estimate_is_finite_before_anything_is_known(tmp_path):
    scheduler = scheduler_of(tmp_path, written(tmp_path))
    assert scheduler.seconds_left(scheduler.waiting[0]) is None
    assert scheduler.progress().startswith("0 of 4 runs are finished, all ")
    scheduler.deadline = math.inf
    assert all(scheduler.is_ready(run) for run in scheduler.waiting)
