"""A run that begins with another run's state: arms that differ late share what comes before."""

import json

import pytest
import torch

import train_stage1
from eval import main as eval_main
from tests.conftest import (
    ARB,
    SHORT,
    assert_same_run,
    content,
    current,
    failure,
    history,
    log_of,
    stop_before,
    train,
)
from utils.config import load_config

EPOCHS = ["num_epochs", 2, "keep_epochs", "[1]"]
LATE = [*EPOCHS, "warmup_epochs", 1]  # from epoch 1 on another learning rate than the parent's


def kept(parent):
    """The state after one epoch of the finished run."""
    return parent / "ckps" / "epoch_1.pth.tar"


@pytest.fixture(scope="module")
def late(finished, tmp_path_factory):
    """The only run of its folder: a fork that trains its own way."""
    return train(tmp_path_factory.mktemp("saved"), *LATE, "fork", kept(finished), "name", "late")


def test_a_fork_without_changes_is_its_parent_again(finished, tmp_path):
    fork = train(tmp_path, *EPOCHS, "fork", kept(finished))
    assert_same_run(finished, fork)
    settings = load_config(fork / "config.yaml")
    assert (settings.fork, settings.resume) == (str(kept(finished)), "")
    starts = [
        [json.loads(line) for line in (run / "starts.jsonl").read_text().splitlines()] for run in (finished, fork)
    ]
    assert [[start["epoch"] for start in run] for run in starts] == [[0], [1]]
    assert starts[0][0]["data"] == starts[1][0]["data"]


def test_a_fork_shares_the_epochs_before_and_trains_its_own_way_after(finished, late):
    theirs, ours = history(finished), history(late)
    assert theirs[0] == ours[0]
    assert (theirs[1]["lr"], ours[1]["lr"]) == pytest.approx((0.04, 0.1))
    assert "warmup_epochs changes from 5 to 1" in log_of(late)


def test_a_fork_leaves_its_parent_alone(finished, tmp_path):
    before = sorted((path, path.stat().st_mtime_ns) for path in finished.rglob("*"))
    train(tmp_path, "num_epochs", 1, "fork", kept(finished))
    assert sorted((path, path.stat().st_mtime_ns) for path in finished.rglob("*")) == before


def test_a_fork_that_was_stopped_goes_on_by_itself(finished, late, tmp_path, monkeypatch, capsys):
    options = [*LATE, "resume", "auto", "fork", kept(finished)]
    with monkeypatch.context() as patch:
        stop_before(patch, 3)
        words = ["--cfg", ARB, *SHORT, *options, "save_dir", tmp_path]
        assert failure(capsys, train_stage1.main, *words).code == 143
    (folder,) = tmp_path.iterdir()
    assert (content(folder)["epoch"], content(folder)["step"]) == (1, 4)
    assert train(tmp_path, *options).samefile(tmp_path)  # no new folder
    assert history(folder) == history(late)
    assert load_config(folder / "config.yaml").fork == str(kept(finished))


def test_the_best_checkpoint_of_a_fork_is_its_own(finished, tmp_path):
    """Though its parent was better before."""
    better = torch.load(kept(finished), weights_only=True) | {"best_acc1": torch.tensor([100.0], dtype=torch.float64)}
    torch.save(better, tmp_path / "better.pth.tar")
    fork = train(tmp_path, *EPOCHS, "fork", tmp_path / "better.pth.tar")
    assert content(fork, "model_best")["epoch"] == 2
    assert [row["epoch"] for row in history(fork)] == [1]  # a file of no run brings no history


def test_only_this_trainer_s_checkpoints_can_be_forked(tmp_path, capsys):
    torch.save({"state_dict_model": {}, "state_dict_classifier": {}}, tmp_path / "x.pth.tar")
    for path, said in ((tmp_path / "x.pth.tar", "is not this trainer's"), (tmp_path / "no", "no such checkpoint")):
        result = failure(capsys, train_stage1.main, "--cfg", ARB, "fork", path, "save_dir", tmp_path / "saved")
        assert (result.code, len(result.lines)) == (2, 1) and said in result.said
    assert not (tmp_path / "saved").exists()


def test_resume_goes_on_with_the_same_fork_alone(finished, late, tmp_path, capsys):
    """``auto`` passes over a run that began otherwise, an explicit path is refused; eval.py wants a run of its own."""
    options = ["--cfg", ARB, *SHORT, *LATE, "save_dir", late.parent]
    arguments = ["resume", current(late), "fork", current(finished)]
    result = failure(capsys, train_stage1.main, *options, *arguments)
    assert (result.code, len(result.lines)) == (2, 1) and "was not started from the fork" in result.said
    for without in ([], ["fork", kept(finished).with_name("epoch_2.pth.tar")]):
        result = failure(capsys, eval_main, *options, "resume", "auto", *without)
        assert result.code == 2, result.said
    arguments = ["resume", "auto", "fork", kept(finished), "save_dir", tmp_path / "none"]
    result = failure(capsys, eval_main, *options, *arguments)
    assert (result.code, len(result.lines)) == (2, 1) and "auto finds no checkpoint" in result.said
