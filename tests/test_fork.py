"""A run that begins with another run's state: arms that differ late share what comes before."""

import json
import shutil

import pytest
import torch

import train_stage1
from eval import main as eval_main
from tests.conftest import ARB, assert_same_run, content, failure, history, train
from utils.config import load_config

EPOCHS = ["num_epochs", 4, "lr_steps", "[2,3]", "warmup_epochs", 0, "eval_every", 3]


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    """A finished run that kept its state after two epochs."""
    return train(tmp_path_factory.mktemp("saved"), *EPOCHS, "keep_epochs", "[2]")


def kept(parent):
    return parent / "ckps" / "epoch_2.pth.tar"


def test_a_fork_without_changes_is_its_parent_again(parent, tmp_path):
    fork = train(tmp_path, *EPOCHS, "fork", kept(parent))
    assert_same_run(parent, fork)
    settings = load_config(fork / "config.yaml")
    assert (settings.fork, settings.resume) == (str(kept(parent)), "")
    starts = [[json.loads(line) for line in (run / "starts.jsonl").read_text().splitlines()] for run in (parent, fork)]
    assert [[start["epoch"] for start in run] for run in starts] == [[0], [2]]
    assert starts[0][0]["data"] == starts[1][0]["data"]


def test_a_fork_shares_the_epochs_before_and_trains_its_own_way_after(parent, tmp_path):
    before = sorted((path, path.stat().st_mtime_ns) for path in parent.rglob("*"))
    fork = train(tmp_path, *EPOCHS, "lr_steps", "[2,9]", "fork", kept(parent), "name", "late")
    theirs, ours = history(parent), history(fork)
    assert theirs[:3] == ours[:3]
    assert (theirs[3]["lr"], ours[3]["lr"]) == pytest.approx((0.001, 0.01))
    assert theirs[3]["train"] != ours[3]["train"]
    log = (fork / "logs" / "late.txt").read_text()
    assert "lr_steps changes from [2, 3] to [2, 9]" in log
    assert sorted((path, path.stat().st_mtime_ns) for path in parent.rglob("*")) == before


def test_a_fork_that_was_stopped_goes_on_by_itself(parent, tmp_path):
    options = [*EPOCHS, "lr_steps", "[2,9]", "resume", "auto", "fork", kept(parent)]
    whole = train(tmp_path / "whole", *options)
    part = train(tmp_path / "parts", *options, "keep_epochs", "[3]")
    shutil.copy(part / "ckps" / "epoch_3.pth.tar", part / "ckps" / "current.pth.tar")  # as if it had ended there
    assert content(part)["epoch"] == 3
    assert train(tmp_path / "parts", *options).samefile(tmp_path / "parts")  # no new folder
    assert_same_run(whole, part)
    assert load_config(part / "config.yaml").fork == str(kept(parent))


def test_the_best_checkpoint_of_a_fork_is_its_own(parent, tmp_path):
    """Though its parent was better before."""
    better = torch.load(kept(parent), weights_only=True) | {"best_acc1": torch.tensor([100.0], dtype=torch.float64)}
    torch.save(better, tmp_path / "better.pth.tar")
    fork = train(tmp_path, *EPOCHS, "fork", tmp_path / "better.pth.tar")
    assert content(fork, "model_best")["epoch"] in (3, 4)
    assert [row["epoch"] for row in history(fork)] == [2, 3]  # a file of no run brings no history


def test_only_this_trainer_s_checkpoints_can_be_forked(tmp_path, capsys):
    torch.save({"state_dict_model": {}, "state_dict_classifier": {}}, tmp_path / "x.pth.tar")
    for path, said in ((tmp_path / "x.pth.tar", "is not this trainer's"), (tmp_path / "no", "no such checkpoint")):
        result = failure(capsys, train_stage1.main, "--cfg", ARB, "fork", path, "save_dir", tmp_path / "saved")
        assert (result.code, len(result.lines)) == (2, 1) and said in result.said
    assert not (tmp_path / "saved").exists()


def test_resume_goes_on_with_the_same_fork_alone(parent, tmp_path, capsys):
    """``auto`` passes over a run that began otherwise, an explicit path is refused; eval.py wants a run of its own."""
    fork = train(tmp_path, *EPOCHS, "fork", kept(parent))
    other = parent / "ckps" / "current.pth.tar"
    options = ["--cfg", ARB, *map(str, EPOCHS), "batch_size", 64, "save_dir", tmp_path]
    path = fork / "ckps" / "current.pth.tar"
    result = failure(capsys, train_stage1.main, *options, "resume", path, "fork", other)
    assert (result.code, len(result.lines)) == (2, 1) and "was not started from the fork" in result.said
    for without in ([], ["fork", kept(parent).with_name("epoch_1.pth.tar")]):
        result = failure(capsys, eval_main, *options, "resume", "auto", *without)
        assert result.code == 2, result.said
    result = failure(capsys, eval_main, *options, "resume", "auto", "fork", kept(parent), "save_dir", tmp_path / "none")
    assert (result.code, len(result.lines)) == (2, 1) and "auto finds no checkpoint" in result.said
