"""A run's folder and its log, rows and TensorBoard scalars, also after a resume."""

import json
import logging
import re
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from utils.errors import InputError
from utils.run_log import SCALAR_CLASSES, RunLog, new_folder, progress_line

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


@pytest.mark.parametrize("kind", ["file", "below a file", "dangling link"])
def test_a_place_that_cannot_hold_folders_is_refused(tmp_path, kind):
    place = tmp_path / "saved"
    place.symlink_to(tmp_path / "nowhere") if kind == "dangling link" else place.write_text("")
    with pytest.raises(InputError, match=r"^save_dir: "):
        new_folder(str(place / "deeper" if kind == "below a file" else place), "run")


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


# ---------------------------------------------------------------------------------------------------------------------
# Rows


def test_rows_are_written_one_per_line_and_read_back(tmp_path):
    with RunLog(tmp_path, "x") as run:
        assert run.history() == []
        for row in ROWS:
            run.write_epoch(row)
            assert stored_rows(tmp_path)[-1] == row
        assert run.history() == ROWS


@pytest.mark.parametrize("start", [0, 1, 2, 4, 9])
def test_after_a_resume_no_epoch_is_there_twice(tmp_path, start):
    with RunLog(tmp_path, "x") as run:
        for row in ROWS:
            run.write_epoch(row)
    with RunLog(tmp_path, "x", start_epoch=start) as run:
        assert run.history() == stored_rows(tmp_path) == ROWS[:start]
        for epoch in range(start, 4):
            run.write_epoch({"epoch": epoch, "again": True})
    assert [row["epoch"] for row in stored_rows(tmp_path)] == [0, 1, 2, 3]
    assert [row["epoch"] for row in stored_rows(tmp_path) if "again" in row] == list(range(start, 4))


@pytest.mark.parametrize("cut", [1, 12, 30])
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


def test_tensorboard_reads_the_scalars(tmp_path):
    with RunLog(tmp_path, "x") as run:
        for epoch in range(3):
            run.scalars(epoch, {"top1/test": 10.0 * epoch, "lr": 0.5})
            assert curve(tmp_path, "top1/test")[-1] == (epoch, 10.0 * epoch)  # while the run goes on
    assert curve(tmp_path, "top1/test") == [(0, 0.0), (1, 10.0), (2, 20.0)]
    assert curve(tmp_path, "lr") == [(0, 0.5), (1, 0.5), (2, 0.5)]


def test_tensorboard_shows_no_epoch_twice_after_a_resume(tmp_path):
    with RunLog(tmp_path, "x") as run:
        for epoch in range(4):
            run.scalars(epoch, {"loss": float(epoch)})
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
