"""Real sweeps on digits, whose results are those of their runs' folders."""

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
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import ROOT, assert_same_run, content, failure, history
from tests.test_several_processes import completed, processes_of, started, wait_for
from tests.test_sweep_plan import ARMS, DIGITS, LATE, OPTIONS, WATERFALL, planned, written
from tests.test_sweep_tables import FIELDS, check_published
from utils import config
from utils.command_line import exit_code
from utils.config import load_config
from utils.errors import InputError
from utils.signals import Signals
from utils.sweep import runner as sweep
from utils.sweep.intervals import estimate
from utils.sweep.tables import fill_readme, markdown

# ---------------------------------------------------------------------------------------------------------------------
# Real sweeps


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """The folder of a finished sweep of two arms, two seeds and a fork; tests do not write into it."""
    folder = tmp_path_factory.mktemp("sweeps")
    path = written(folder, arms=ARMS | LATE, waterfall=WATERFALL)
    done = swept(folder, path, "--jobs", 2, "--images", "digits of a test")
    assert done.code == 0, done.err
    assert done.out.count(" start ") == done.out.count(" done ") == 5
    assert "5 of 5 runs are finished" in done.out and "| arb - plain | 2 |" in done.out
    return folder


def swept(folder: Path, path: Path, *arguments: object):
    return completed(folder, "-m", "utils.sweep", path, "--save_dir", folder / "saved", *arguments)


def of_tiny(folder: Path) -> tuple[sweep.Sweep, list[sweep.Run], Path]:
    """The sweep, its runs and its home."""
    asked = sweep.read_sweep(folder / "tiny.yaml")
    home = folder / "saved/tiny"
    return asked, sweep.plan(asked, home), home


@pytest.fixture
def copied(tiny, tmp_path) -> Path:
    """A copy to write into."""
    return shutil.copytree(tiny, tmp_path / "copy")


def again(folder: Path, *arguments: object) -> int:
    """The same command in this process; for what starts no run."""
    told = [str(folder / "tiny.yaml"), "--save_dir", str(folder / "saved"), *map(str, arguments)]
    return exit_code(lambda: sweep.main(told))


def state_of(home: Path) -> list[tuple]:
    """All that lies in the runs' folders."""
    inside = [path for folder in home.iterdir() if folder.is_dir() for path in (folder, *folder.rglob("*"))]
    return sorted((str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in inside)


def folder_of(home: Path, name: str) -> Path:
    (found,) = home.glob(f"{name}_2*")
    return found


def test_results_are_those_of_the_runs_folders(tiny):
    home = tiny / "saved/tiny"
    results = json.loads((home / "results.json").read_text())
    assert [row["run"] for row in results["runs"]] == [
        *("plain_seed0", "arb_seed0", "late_seed0", "plain_seed1", "arb_seed1"),
    ]
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
        assert row["data"] == start["data"] and row["commit"] == start["commit"] and row["threads"] == 1
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
    assert (
        "From plain to the best of 2 arms, over the 2 seeds that all steps have" in table
        and "| schedule | too few runs | - |" in table
        and r"\bottomrule" in (home / "table.tex").read_text()
    )
    assert Image.open(home / "waterfall.png").size == (1650, 720)


def test_arms_of_a_seed_are_trained_on_the_same_images_at_the_same_rates(tiny):
    home = tiny / "saved/tiny"
    first, second = ([folder_of(home, f"{arm}_seed{seed}") for arm in ARMS] for seed in (0, 1))
    assert len({start["data"] for folder in (*first, *second) for start in starts_of(folder)}) == 1
    for one, other in (first, second):
        assert (
            [row["lr"] for row in history(one)] == [row["lr"] for row in history(other)] == pytest.approx([0.1, 0.01])
        )
        assert history(one)[0]["train"] != history(other)[0]["train"]
    assert history(first[0])[0]["train"] != history(second[0])[0]["train"]  # another seed


def test_a_fork_begins_with_its_parent_s_epoch(tiny):
    parent, fork = (folder_of(tiny / "saved/tiny", f"{arm}_seed0") for arm in ("plain", "late"))
    assert history(fork)[0] == history(parent)[0]
    assert (history(parent)[1]["lr"], history(fork)[1]["lr"]) == pytest.approx((0.01, 0.1))
    assert load_config(fork / "config.yaml").fork == str(parent / "ckps/epoch_1.pth.tar")


def test_a_second_call_starts_nothing_and_leaves_everything_as_it_was(copied, capsys):
    home = copied / "saved/tiny"
    before, results, table = state_of(home), (home / "results.json").read_bytes(), (home / "table.md").read_bytes()
    assert again(copied, "--jobs", 2) == 0
    said = capsys.readouterr().out
    assert "5 runs, 5 finished before" in said and " start " not in said and "left for another time" not in said
    assert state_of(home) == before
    assert (home / "results.json").read_bytes() == results and (home / "table.md").read_bytes() == table


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"images": 3'])
def test_damaged_results_are_made_anew(copied, damage):
    home = copied / "saved/tiny"
    whole = json.loads((home / "results.json").read_text())
    (home / "results.json").write_text(damage)
    assert again(copied, "--images", "digits of a test") == 0
    assert json.loads((home / "results.json").read_text()) == whole


def test_a_run_of_an_older_version_counts_and_is_compared_with_nothing(copied):
    asked, runs, home = of_tiny(copied)
    (folder_of(home, "arb_seed0") / "starts.jsonl").unlink()
    results = sweep.results_of(asked, runs)
    (row,) = (row for row in results["runs"] if row["run"] == "arb_seed0")
    assert row["data"] == row["commit"] == "" and row["starts"] == [] and row.keys() >= FIELDS
    said = markdown(results)
    assert "| arb | 2 |" in said and "| arb - plain | 1 |" in said


def test_a_run_whose_summary_is_damaged_goes_on_and_the_rest_stays(copied):
    asked, runs, home = of_tiny(copied)
    for text in ("", "{}", "[]", '{"last epoch": {}'):
        (folder_of(home, "arb_seed0") / "summary.json").write_text(text)
        assert [run.name for run in runs if not run.finished()] == ["arb_seed0"]
        assert len(sweep.results_of(asked, runs)["runs"]) == 4


def test_metrics_that_cannot_be_read_fail_their_run_alone(copied, capsys):
    path = folder_of(copied / "saved/tiny", "arb_seed0") / "metrics.jsonl"
    path.write_text("{\n" + path.read_text())
    assert again(copied) == 1
    assert f"failed: arb_seed0: {path}, line 1: is not valid JSON" in capsys.readouterr().err
    results = json.loads((copied / "saved/tiny/results.json").read_text())
    assert [row["run"] for row in results["runs"]] == ["plain_seed0", "late_seed0", "plain_seed1", "arb_seed1"]
    assert list(results["failed"]) == ["arb_seed0"]


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
    others = [{"forked_after": 2}, {"parent": arb}, {"parent": None, "forked_after": 0}]
    for changes in others:
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
    assert sweep.results_of(sweep.read_sweep(path), [run])["overridden"] == {"lr": 0.05}


def test_a_changed_sweep_makes_new_runs_and_keeps_the_old_folders(copied):
    _, runs, home = of_tiny(copied)
    arms = {**ARMS, "arb": {**ARMS["arb"], "lr": 0.05}, **LATE}
    asked = sweep.read_sweep(written(copied, arms=arms, waterfall=WATERFALL))
    changed = sweep.plan(asked, home)
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
    before = state_of(copied / "saved/tiny")
    assert again(copied, "--minutes", 0.0005) == 0
    said = capsys.readouterr().out
    assert " start " not in said and "2 runs are left for another time; the same command goes on" in said
    assert state_of(copied / "saved/tiny") == before


def crew_of(folder: Path, path: Path | None = None, **changes) -> sweep.Crew:
    asked = sweep.read_sweep(path or folder / "tiny.yaml")
    runs = sweep.plan(asked, folder / "saved" / asked.name)
    return sweep.Crew(asked, runs, **{"jobs": 2, "minutes": None, "images": None, **changes})


def test_times_are_estimated_from_runs_of_the_same_arm(copied):
    home = copied / "saved/tiny"
    for arm, seconds in (("plain", 10.0), ("arb", 20.0), ("late", 60.0)):
        for folder in home.glob(f"{arm}_seed*_2*"):
            rows = [json.loads(line) | {"timing": {"train_seconds": seconds}} for line in metrics(folder)]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arms = {**ARMS, **LATE, "new": {"lr": 0.05}}
    arms["late"] = {**LATE["late"], "seeds": [0, 2]}
    crew = crew_of(copied, written(copied, seeds=[0, 2], arms=arms))
    left = {run.name: crew._seconds_left(run) for run in crew.waiting}
    slower = sweep.OVERHEAD
    assert left == {
        "new_seed0": pytest.approx(slower * 20 * 2),  # the median of 10, 20, 60
        "plain_seed2": pytest.approx(slower * 10 * 2),
        "arb_seed2": pytest.approx(slower * 20 * 2),
        "late_seed2": pytest.approx(slower * 60),  # one epoch of its own
        "new_seed2": pytest.approx(slower * 20 * 2),
    }
    assert crew._epochs_left() == 2 + 2 + 2 + 1 + 2
    for minutes, ready in ((60, 5), (slower * 40.5 / 60, 4), (slower * 20.5 / 60, 1), (slower * 19 / 60, 0)):
        crew.deadline = time.monotonic() + 60 * minutes
        able = [run.name for run in crew.waiting if run.parent is None and crew._ready(run)]
        assert len(able) == min(ready, 4), (minutes, able)
    assert not crew._ready(next(run for run in crew.waiting if run.arm == "late"))  # its parent has kept nothing yet


def metrics(folder: Path) -> list[str]:
    return (folder / "metrics.jsonl").read_text().splitlines()


def test_the_pace_of_a_fork_is_of_its_own_epochs(tiny):
    """Its folder has its parent's rows from the beginning."""
    run = next(run for run in of_tiny(tiny)[1] if run.arm == "late")
    fresh = dataclasses.replace(run, home=tiny)  # where it was never started
    assert (fresh.epochs_left(), run.epochs_left()) == (1, 0)
    worker = sweep.Working(run, None, 0, since=time.monotonic() - 50, left_before=fresh.epochs_left())
    assert worker.pace() is None and worker.pace(least=1) == pytest.approx(50, abs=5)


def test_when_the_time_is_over_runs_stop_with_a_checkpoint(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    path = written(tmp_path, options=OPTIONS | {"num_epochs": 500}, seeds=[0], arms=ARMS)
    crew = crew_of(tmp_path, path, jobs=1, minutes=60)
    home = tmp_path / "saved/tiny"
    home.mkdir(parents=True)

    def wait() -> None:
        while not any(metrics(folder) for folder in home.glob("plain_seed0_*") if (folder / "metrics.jsonl").exists()):
            time.sleep(0.05)
        crew.deadline = time.monotonic()

    clock = threading.Thread(target=wait, daemon=True)
    clock.start()
    with Signals() as signals, signals.noted():
        assert crew.work(signals) == {}
    said = capsys.readouterr().out
    assert "the time is over: plain_seed0 writes a checkpoint" in said and "stopped plain_seed0 after " in said
    assert "2 runs are left for another time" in said and "start arb_seed0" not in said
    kept = content(folder_of(home, "plain_seed0"))
    assert kept["epoch"] >= 1 and json.loads((home / "results.json").read_text())["runs"] == []
    assert not processes_of(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Ends


def test_a_sweep_that_was_stopped_goes_on_to_the_same_numbers(tiny, tmp_path):
    path = written(tmp_path, seeds=[0], arms=ARMS | LATE, waterfall=WATERFALL)
    home = tmp_path / "saved/tiny"
    command = ("-m", "utils.sweep", path, "--save_dir", tmp_path / "saved", "--jobs", 2)
    with started(tmp_path, *command) as run:
        wait_for(lambda: len([*home.glob("*/ckps/current.pth.tar")]) == 2, run)
        run.process.send_signal(signal.SIGTERM)
        assert run.process.wait(60) == 143
        assert run.err().splitlines() == [
            "stopped by SIGTERM: every run is kept as far as it came; the same command goes on"
        ]
        assert not processes_of(tmp_path)
    for arm in ARMS:
        assert content(folder_of(home, f"{arm}_seed0"))["epoch"] >= 1
    assert json.loads((home / "results.json").read_text())["planned"] == 3
    done = swept(tmp_path, path, "--jobs", 2)
    assert done.code == 0, done.err
    for arm in ("plain", "arb", "late"):
        assert_same_run(folder_of(tiny / "saved/tiny", f"{arm}_seed0"), folder_of(home, f"{arm}_seed0"))
    results = [json.loads((folder / "saved/tiny/results.json").read_text())["runs"][:3] for folder in (tiny, tmp_path)]
    for one, other in zip(*results, strict=True):
        told = ("run", "hash", "options", "data", "epochs", "last", "cross_fitted", "best")
        assert [one[key] for key in told] == [other[key] for key in told]


def test_an_arm_that_fails_is_named_and_stops_no_other(tmp_path):
    arms = {
        "no-data": {"dataset": "cifar10", "num_classes": 10, "data_path": str(tmp_path / "nowhere")},
        "diverges": {"lr": 1e18},
        "from-it": {"fork": {"arm": "diverges", "epoch": 1}},
        "good": {},
    }
    path = written(tmp_path, seeds=[0], arms=arms)
    done = swept(tmp_path, path, "--jobs", 2)
    assert done.code == 1
    failed = dict(line.removeprefix("failed: ").split(": ", 1) for line in done.err.splitlines())
    assert set(failed) == {"no-data_seed0", "diverges_seed0", "from-it_seed0"}
    assert "nowhere" in failed["no-data_seed0"] and "is not finite" in failed["diverges_seed0"]
    assert "diverges_seed0, whose checkpoint it begins with, failed" in failed["from-it_seed0"]
    assert "done good_seed0" in done.out and "left for another time" not in done.out
    home = tmp_path / "saved/tiny"
    results = json.loads((home / "results.json").read_text())
    assert results["failed"] == failed and [row["run"] for row in results["runs"]] == ["good_seed0"]
    assert "* failed: no-data_seed0: " in (home / "table.md").read_text()


def test_what_runs_of_two_arms_die_of_at_once_stops_the_sweep(tmp_path):
    """As where the images are not where they should be: nobody wants to hear that once for each of 88 runs."""
    path = written(tmp_path, arms={name: {} for name in "abcdef"})
    done = swept(tmp_path, path, "dataset", "folder", "data_path", tmp_path / "nowhere", "imb_factor", "null")
    assert done.code == 2 and done.out.count("failed ") == done.out.count("start ") == 2
    (line,) = done.err.splitlines()
    assert str(tmp_path / "nowhere") in line and line.endswith(
        "(runs of two arms have ended so at once; no other was started)"
    )


@contextlib.contextmanager
def going_on(folder: Path) -> Iterator:
    """A sweep whose only run is being trained, for as long as the block lasts."""
    path = written(folder, options=OPTIONS | {"num_epochs": 500}, seeds=[0], arms={"plain": {}})
    with started(folder, "-m", "utils.sweep", path, "--save_dir", folder / "saved") as run:
        wait_for(lambda: len([*(folder / "saved/tiny").glob("*/ckps/current.pth.tar")]) == 1, run)
        yield run


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="only Linux ends a run with its killed sweep")
def test_a_second_sweep_is_refused_and_a_killed_one_leaves_no_orphans(tmp_path, capsys):
    with going_on(tmp_path) as run:
        result = failure(capsys, sweep.main, tmp_path / "tiny.yaml", "--save_dir", tmp_path / "saved")
        assert (result.code, len(result.lines)) == (2, 1) and "another process works on this sweep" in result.said
        run.process.kill()
        run.process.wait(10)
        wait_for(lambda: not processes_of(tmp_path), run, 40)
        wait_for(lambda: is_free(tmp_path / "saved/tiny"), run, 20)  # what is ending closes its files late
    (said,) = (tmp_path / "saved/tiny/started").glob("*.txt")
    assert "stopped by SIGTERM" in said.read_text().splitlines()[-1]
    kept = content(folder_of(tmp_path / "saved/tiny", "plain_seed0"))
    assert kept["epoch"] >= 1


def is_free(home: Path) -> bool:
    with contextlib.suppress(InputError), sweep._claimed(home):
        return True
    return False


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
    assert sweep._why(code, tmp_path / "said.txt").startswith(said)


def test_runs_share_processors_and_take_turns_on_gpus(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    cores = len(os.sched_getaffinity(0))
    monkeypatch.setattr(sweep.torch.cuda, "device_count", lambda: 0)
    assert sweep._environment(0, 2)["OMP_NUM_THREADS"] == str(max(1, cores // 2))
    assert "OMP_NUM_THREADS" not in sweep._environment(0, 1) and "CUDA_VISIBLE_DEVICES" not in sweep._environment(0, 1)
    monkeypatch.setattr(sweep.torch.cuda, "device_count", lambda: 2)
    assert [sweep._environment(slot, 3)["CUDA_VISIBLE_DEVICES"] for slot in range(3)] == ["0", "1", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,MIG-7")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert [sweep._environment(slot, 3)["CUDA_VISIBLE_DEVICES"] for slot in range(3)] == ["5", "MIG-7", "5"]
    assert sweep._environment(0, 3)["OMP_NUM_THREADS"] == "3"


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
    ((name, figure),) = sweep.figures(results)
    assert name == "imbalance_lr_steps1-9"
    drawn = {line.get_label(): line for line in figure.axes[0].get_lines() if not line.get_label().startswith("_")}
    means = [
        np.mean([row["last"]["top1"] for row in rows if row["arm"] == "arb" and row["axes"]["imb_factor"] == f])
        for f in (0.1, 0.05)
    ]
    assert drawn["arb"].get_ydata() == pytest.approx(means)
    assert drawn["arb"].get_xdata() == pytest.approx([10, 20], rel=0.02) and set(drawn) == {"plain", "arb", "late"}


def test_the_figure_s_intervals_are_over_cuts_where_there_are_several_like_the_table_s(tiny):
    asked, runs, _ = of_tiny(tiny)
    results = sweep.results_of(asked, runs)
    one = next(row for row in results["runs"] if row["arm"] == "arb")
    rows = [copy.deepcopy(one) for _ in range(4)]
    for number, row in enumerate(rows):
        row["axes"], row["seed"], row["subset_seed"] = {"imb_factor": 0.1}, number % 2, number // 2
        row["last"]["top1"] = [80.0, 82.0, 90.0, 92.0][number]
    results |= {"axes": {"imb_factor": [0.1]}, "subset_seeds": [0, 1], "runs": rows, "waterfall": {}}
    curve = sweep._over_imbalance(results, {})["arb"]
    means = estimate([81.0, 91.0])
    assert (curve["means"], curve["lows"], curve["highs"]) == ([86.0], [means.low], [means.high])
    assert f"[{means.low:.2f}, {means.high:.2f}]" in markdown(results)


@pytest.fixture
def repository(tiny, tmp_path) -> Path:
    """What publishing needs of the repository, with the finished sweep in it."""
    root = tmp_path / "root"
    shutil.copytree(ROOT / "config/digits", root / "config/digits")
    written(root / "config/sweeps", cfg="../digits/digits_imb005.yaml", arms=ARMS | LATE, waterfall=WATERFALL)
    page = "# Title\n\n<!-- results of tiny -->\nold\n<!-- end of results -->\n\nafter\n"
    (root / "README.md").write_text(page.replace("after", f"{page}<!-- not a marker -->"))
    return root


def publish(root: Path, home: Path) -> Path:
    path = root / "config/sweeps/tiny.yaml"
    asked = sweep.read_sweep(path)
    assert sweep.publish(asked, sweep.plan(asked, home), home, path, None, root) == 0
    return root / sweep.PUBLISHED / "tiny.json"


def test_publishing_puts_results_beside_the_sweep_and_tables_into_the_readme(repository, tiny):
    home = tiny / "saved/tiny"
    before = state_of(home)
    target = publish(repository, home)
    assert json.loads(target.read_text()) == json.loads((home / "results.json").read_text())
    assert Image.open(target.with_name("tiny_waterfall.png")).size[0] == 1650
    readme = (repository / "README.md").read_text()
    table = markdown(json.loads(target.read_text()))
    part = f"<!-- results of tiny -->\n\n{table}\n<!-- end of results -->"
    assert (
        readme.count(part) == 2
        and "\nold\n" not in readme
        and readme.startswith("# Title\n")
        and "<!-- not a marker -->" in readme
    )
    assert fill_readme(readme, lambda name: sweep.published(name, repository)) == readme
    check_published(target, repository)
    assert state_of(home) == before
    publish(repository, home)
    assert (repository / "README.md").read_text() == readme


@pytest.mark.parametrize(
    ("page", "said"),
    [
        (
            "# Title\n",
            "has no place for the tables; put the lines <!-- results of tiny --> and <!-- end of results -->",
        ),
        (
            "<!-- results of tiny -->\n<!-- end of results -->\n<!-- results of tinny -->\n<!-- end of results -->\n",
            "has a place for results of tinny, which is no sweep in config/sweeps",
        ),
    ],
)
def test_a_readme_without_the_right_places_is_refused_before_anything_is_written(repository, tiny, page, said):
    (repository / "README.md").write_text(page)
    with pytest.raises(InputError, match=re.escape(f"README.md: {said}")):
        publish(repository, tiny / "saved/tiny")
    assert (repository / "README.md").read_text() == page and not (repository / sweep.PUBLISHED).exists()


def test_results_have_the_keys_that_published_files_are_asked_for(tiny):
    asked, runs, _ = of_tiny(tiny)
    assert sweep.results_of(asked, runs).keys() == sweep.RESULTS


def test_what_failed_is_published_too(repository, copied):
    home = copied / "saved/tiny"
    shutil.rmtree(folder_of(home, "arb_seed1"))
    results = json.loads((home / "results.json").read_text())
    why = {"arb_seed1": "the loss is not finite", "plain_seed0": "was finished later"}
    (home / "results.json").write_text(json.dumps(results | {"failed": why}))
    found = json.loads(publish(repository, home).read_text())
    assert found["failed"] == {"arb_seed1": "the loss is not finite"} and len(found["runs"]) == 4
    assert "* failed: arb_seed1: the loss is not finite" in (repository / "README.md").read_text()


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
    assert [row["run"] for row in json.loads(target.read_text())["runs"]] == [
        "plain_seed0",
        "late_seed0",
        "plain_seed1",
    ]
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
    assert not (repository / sweep.PUBLISHED).exists() and "\nold\n" in (repository / "README.md").read_text()


def test_an_estimate_is_finite_before_anything_is_known(tmp_path):
    crew = crew_of(tmp_path, written(tmp_path))
    assert crew._seconds_left(crew.waiting[0]) is None and crew._outlook().startswith("0 of 4 runs are finished, all ")
    crew.deadline = math.inf
    assert all(crew._ready(run) for run in crew.waiting)
