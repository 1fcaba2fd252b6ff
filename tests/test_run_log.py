"""A run's folder and its log, rows and TensorBoard scalars, also after a resume."""

import json
import logging
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.scripts import forked_scripts, script_of, until  # noqa: F401
from utils.errors import DivergenceError, InputError
from utils.run.folder import new_folder
from utils.run.log import SCALAR_CLASSES, TIME, RunLog, count_lines, progress_line

ROWS = [{"epoch": epoch, "train": {"loss": 1 / (epoch + 1)}} for epoch in range(4)]


def board(folder):
    return EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "histograms": 0}).Reload()


def curve(folder, tag):
    """[(step, value), ...] as TensorBoard shows it."""
    return [(event.step, event.value) for event in board(folder).Scalars(tag)]


def stored_rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------------------------------------------------------------
# The folder


def test_a_new_folder_carries_name_and_time(tmp_path):
    before = time.strftime("%Y%m%d%H%M%S")
    folder = new_folder(str(tmp_path / "not" / "there"), "my.run")
    assert folder.is_dir()
    assert folder.parent == tmp_path / "not" / "there"
    stamp = re.fullmatch(r"my\.run_(\d{14})", folder.name).group(1)
    assert before <= stamp <= time.strftime("%Y%m%d%H%M%S")


def test_folders_made_at_the_same_time_are_never_the_same(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: new_folder(str(tmp_path), "run"), range(24)))
    assert len(set(folders)) == 24
    assert sorted(tmp_path.iterdir()) == sorted(folders)
    assert all(re.fullmatch(r"run_\d{14}(_\d+)?", folder.name) for folder in folders)


@pytest.mark.parametrize("name", ["file", "file/below", "dangling link"])
def test_a_place_that_cannot_hold_folders_is_refused(tmp_path, name):
    (tmp_path / "file").touch()
    (tmp_path / "dangling link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"^save_dir: "):
        new_folder(str(tmp_path / name), "run")


# ---------------------------------------------------------------------------------------------------------------------
# The log


def test_lines_go_to_the_file_with_their_time_and_to_the_terminal_without(tmp_path, capsys, caplog):
    with RunLog(tmp_path, "experiment") as run:
        run.info("Epoch: [0] 100 % größer")
    assert caplog.text == ""  # nothing goes to the root logger, whose handlers would say it again
    assert capsys.readouterr().out == "Epoch: [0] 100 % größer\n"
    text = (tmp_path / "logs" / "experiment.txt").read_text(encoding="utf-8")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} Epoch: \[0\] 100 % größer\n", text)


def test_after_the_block_no_handler_is_left_and_a_second_log_does_not_say_things_twice(tmp_path, capsys):
    root = list(logging.getLogger().handlers)
    for life in range(2):
        with RunLog(tmp_path, "x", start_epoch=life) as run:
            run.info(f"life {life}")
            assert len(run.logger.handlers) == 2
        assert run.logger.handlers == []
    assert logging.getLogger().handlers == root
    assert capsys.readouterr().out == "life 0\nlife 1\n"
    lines = (tmp_path / "logs" / "x.txt").read_text().splitlines()
    assert [line[-6:] for line in lines] == ["life 0", "life 1"]


@pytest.mark.parametrize(
    ("error", "line"),
    [(ValueError("epoch 3: bad"), "stopped: epoch 3: bad"), (KeyboardInterrupt(), "stopped: KeyboardInterrupt")],
)
def test_an_error_is_written_into_the_log_and_goes_on_its_way(tmp_path, error, line):
    with pytest.raises(type(error)), RunLog(tmp_path, "x") as run:
        raise error
    assert (tmp_path / "logs" / "x.txt").read_text().rstrip().endswith(line)
    assert run.logger.handlers == []


def lines(folder):
    return [line[TIME:] for line in (folder / "logs" / "x.txt").read_text().splitlines()]


def test_lines_that_a_resume_writes_again_are_dropped_and_all_others_stay(tmp_path):
    with RunLog(tmp_path, "x") as run:
        run.info("Epoch: [0][0/8] first")
        size = run.size()
        repeated = ("Epoch: [0][4/8] later", "* Acc@1 5%", "* ECE 3", "Epoch: [0]\t7 logits")
        for line in (repeated[0], "note: mine", *repeated[1:], "ä Epoch: ["):
            run.info(line)
    assert size == len((tmp_path / "logs" / "x.txt").read_bytes().splitlines(keepends=True)[0])
    with RunLog(tmp_path, "x", 0, size) as run:
        run.info("Epoch: [0][4/8] again")
    assert lines(tmp_path) == ["Epoch: [0][0/8] first", "note: mine", "ä Epoch: [", "Epoch: [0][4/8] again"]
    with RunLog(tmp_path, "x", 0, None) as run:
        run.info("end")
    assert lines(tmp_path)[-2:] == ["Epoch: [0][4/8] again", "end"]


@pytest.mark.parametrize("size", [0, 5, 10**6])
def test_a_size_that_does_not_fit_the_log_does_no_harm(tmp_path, size):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "x.txt").write_bytes(b"2026-01-31 23:59:59,999 note: \xff\n")
    with RunLog(tmp_path, "x", 0, size) as run:
        run.info("end")
    assert b"note: \xff\n" in (tmp_path / "logs" / "x.txt").read_bytes()


KILLED = RuntimeError("DataLoader worker (pid 3) is killed by signal: Killed.")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (InputError("bad"), "bad"),
        (DivergenceError("bad"), "bad"),
        (OSError(28, "No space left", "FOLDER/x"), "FOLDER/x: cannot be written: No space left"),
        (OSError(24, "Too many open files", "elsewhere"), r"[Errno 24] Too many open files: 'elsewhere'"),
        (KILLED, "a process that reads images was killed; if memory ran out, use fewer workers"),
    ],
)
@pytest.mark.parametrize("there", [True, False])
def test_errors_name_the_last_good_checkpoint(tmp_path, error, said, there):
    path = tmp_path / "ckps" / "current.pth.tar"
    if there:
        path.parent.mkdir()
        path.write_bytes(b"whole")
    last = f"the last good checkpoint is {path}" if there else "this run has no checkpoint yet"
    if isinstance(error, OSError):
        error = OSError(error.errno, error.strerror, error.filename.replace("FOLDER", str(tmp_path)))
    kind = InputError if isinstance(error, OSError | RuntimeError) else type(error)
    with pytest.raises(kind) as told, RunLog(tmp_path, "x"):
        raise error
    assert str(told.value) == f"{said}; {last}".replace("FOLDER", str(tmp_path))


def test_a_damaged_row_that_is_not_the_last_one_is_refused_and_kept(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 0}\n{"epo\n{"epoch": 2}\n')
    with pytest.raises(InputError, match=r"metrics.jsonl, line 2: is no"):
        RunLog(tmp_path, "x", 3)
    assert '{"epoch": 2}' in (tmp_path / "metrics.jsonl").read_text()
    assert logging.getLogger(f"run.{tmp_path.name}").handlers == []


def test_a_run_whose_folder_is_gone_says_so(tmp_path):
    (tmp_path / "run").mkdir()
    said = r"metrics.jsonl: cannot be written: .* is gone, checkpoints too$"
    with pytest.raises(InputError, match=said), RunLog(tmp_path / "run", "x") as run:
        shutil.rmtree(tmp_path / "run")
        run.write_epoch(ROWS[0])


@pytest.mark.parametrize(("link", "file"), [("logs/x.txt", "logs/x.txt"), (".metrics.jsonl.part", "metrics.jsonl")])
def test_a_full_disk_is_one_line_that_names_the_file(tmp_path, link, file, capfd):
    said = f"^{tmp_path / file}: cannot be written: No space left on device; this run has no checkpoint yet$"
    with pytest.raises(InputError, match=said), RunLog(tmp_path, "x") as run:
        if link == file:
            (tmp_path / link).unlink()
            run.logger.handlers[0].close()  # opened anew at the next line
        (tmp_path / link).symlink_to("/dev/full")
        run.info("line")
        run.write_epoch(ROWS[0])
    assert capfd.readouterr().err == ""


def test_a_tensorboard_that_cannot_be_written_is_one_line(tmp_path, capfd):
    """Its own thread writes, and hands the error over."""
    said = "^.*: cannot be written: No space left on device; this run has no checkpoint yet$"
    with (
        open("/dev/full", "wb", buffering=0) as full,
        pytest.raises(InputError, match=said),
        RunLog(tmp_path, "x") as run,
    ):
        run.board.file_writer.event_writer._async_writer._writer._writer = full
        for epoch in range(20):
            run.scalars(epoch, {"loss": 1.0})
            time.sleep(0.02)
    assert capfd.readouterr().err == ""


LOGGING = """
import sys, time
from pathlib import Path
from utils.run.log import RunLog
with RunLog(Path(sys.argv[1]), "x") as run:
    run.info("line")
    time.sleep(60)
"""


def test_a_folder_that_another_process_writes_is_refused_until_that_ends(scripts, tmp_path):
    with scripts.alive(tmp_path, script_of(tmp_path, LOGGING), tmp_path) as other:
        assert until(lambda: "line\n" in other.out(), other)
        with pytest.raises(InputError, match=f"^{tmp_path}: another process is training this run"):
            RunLog(tmp_path, "x")
        other.process.kill()
        other.process.wait()
        for _ in range(2):
            with RunLog(tmp_path, "x") as run:
                run.info("line")


def test_counts_are_said_where_there_are_any():
    assert count_lines(3, {"clamped_logits": 0, "skipped_steps": 0}, 30.0) == []
    assert count_lines(3, {"clamped_logits": 12, "skipped_steps": 2}, 30.0) == [
        "Epoch: [3]\t12 logits were clamped to +-30",
        "Epoch: [3]\t2 steps were skipped: float16 gradients overflowed",
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Rows


@pytest.mark.parametrize("start", [0, 2, 4, 9])
def test_rows_are_written_one_per_line_and_no_epoch_is_there_twice_after_a_resume(tmp_path, start):
    with RunLog(tmp_path, "x") as run:
        assert run.history() == []
        for row in ROWS:
            run.write_epoch(row)
            assert stored_rows(tmp_path)[-1] == row
    with RunLog(tmp_path, "x", start_epoch=start) as run:
        assert run.history() == stored_rows(tmp_path) == ROWS[:start]
        for epoch in range(start, 4):
            run.write_epoch({"epoch": epoch, "again": True})
    assert [row["epoch"] for row in stored_rows(tmp_path)] == [0, 1, 2, 3]
    assert [row["epoch"] for row in stored_rows(tmp_path) if "again" in row] == list(range(start, 4))


@pytest.mark.parametrize("cut", [1, 30])
def test_a_last_line_cut_short_is_left_out_and_the_next_row_has_a_line_of_its_own(tmp_path, cut):
    lines = [json.dumps(row) for row in ROWS[:3]]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines[:2], lines[2][:cut]]))
    with RunLog(tmp_path, "x", start_epoch=3) as run:
        assert run.history() == ROWS[:2]
        run.write_epoch(ROWS[3])
    assert stored_rows(tmp_path) == [*ROWS[:2], ROWS[3]]


def test_a_whole_last_line_without_its_line_end_is_kept(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS[:3]))
    with RunLog(tmp_path, "x", start_epoch=3) as run:
        run.write_epoch(ROWS[3])
    assert stored_rows(tmp_path) == ROWS


# ---------------------------------------------------------------------------------------------------------------------
# TensorBoard


def test_tensorboard_shows_no_epoch_twice_after_a_resume(tmp_path):
    with RunLog(tmp_path, "x") as run:
        for epoch in range(4):
            run.scalars(epoch, {"loss": float(epoch)})
            assert curve(tmp_path, "loss")[-1] == (epoch, float(epoch))  # while the run goes on
    (events,) = (tmp_path / "tensorboard").iterdir()  # TensorBoard sorts files by the second they were made in
    events.rename(events.with_name("events.out.tfevents.1000000000.earlier"))
    with RunLog(tmp_path, "x", start_epoch=2) as run:
        for epoch in range(2, 5):
            run.scalars(epoch, {"loss": 100.0 + epoch})
    assert curve(tmp_path, "loss") == [(0, 0.0), (1, 1.0), (2, 102.0), (3, 103.0), (4, 104.0)]


def test_each_tested_class_has_its_curve(tmp_path):
    percent = torch.tensor([50.0, torch.nan, 0.0], dtype=torch.float64)
    with RunLog(tmp_path, "x") as run:
        run.class_accuracies(3, percent, ["cat", "dog", "yak"])
    assert board(tmp_path).Tags()["scalars"] == ["per_class/00 cat", "per_class/02 yak"]
    assert curve(tmp_path, "per_class/00 cat") == [(3, 50.0)]


@pytest.mark.parametrize("classes", [SCALAR_CLASSES, SCALAR_CLASSES + 1])
def test_beyond_a_hundred_classes_there_is_one_histogram(tmp_path, classes):
    percent = torch.linspace(0, 100, classes, dtype=torch.float64)
    percent[0] = torch.nan
    with RunLog(tmp_path, "x") as run:
        run.class_accuracies(3, percent, [f"class {i}" for i in range(classes)])
    tags = board(tmp_path).Tags()
    if classes <= SCALAR_CLASSES:
        assert (len(tags["scalars"]), tags["histograms"]) == (classes - 1, [])
    else:
        assert (tags["scalars"], tags["histograms"]) == ([], ["per_class"])
        (event,) = board(tmp_path).Histograms("per_class")
        assert (event.step, event.histogram_value.num) == (3, classes - 1)


def test_the_progress_line_is_mislas_s():
    last, mean = {"loss": 0.5, "top1": 50.0, "top5": 100.0}, {"loss": 1.25, "top1": 33.333, "top5": 66.667}
    assert progress_line(7, 40, 391, 0.1234, last, mean) == (
        "Epoch: [7][ 40/391]\tTime  0.123\tLoss 5.0000e-01 (1.2500e+00)\tAcc@1  50.00 ( 33.33)\tAcc@5 100.00 ( 66.67)"
    )
