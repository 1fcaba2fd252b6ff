"""The manager: what is in a checkpoint when, and how a run ends by a signal or by numbers that are not finite."""

import math
import os
import shlex
import signal
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from models.classifier import LinearClassifier
from models.model import Model
from tests.conftest import content
from utils.checkpoint import TrainState
from utils.errors import DivergenceError, InputError, Interrupted
from utils.meter import TrainMeter
from utils.precision import new_scaler
from utils.run.checkpoint_manager import CheckpointManager
from utils.run.log import RunLog
from utils.signals import Signals

CPU = torch.device("cpu")


class FourSteps:
    """Stands for a loader."""

    def __len__(self):
        return 4

    def step_indices(self, epoch, step):
        return [10 * epoch + step, 99]


@pytest.fixture
def kept(tmp_path):
    """A manager over a small model, with a log and signals of its own."""
    model = Model(nn.Sequential(nn.Flatten(), nn.Linear(4, 5)), LinearClassifier(5, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    parts = {"model": model, "method": nn.Identity(), "optimizer": optimizer, "scaler": new_scaler("fp32", CPU)}
    with Signals() as signals, RunLog(tmp_path, "run") as run:
        meter = TrainMeter(CPU)
        options = {"config": {}, "selected_on": "test set"}
        manager = CheckpointManager(run, signals, TrainState(), FourSteps(), meter, 2, {**parts, **options})
        yield SimpleNamespace(manager=manager, signals=signals, model=model, meter=meter, folder=tmp_path, run=run)


def one_step(meter, loss=1.0):
    meter.update(torch.tensor(loss), torch.eye(3), torch.arange(3))


def names(folder):
    return sorted(path.name for path in (folder / "ckps").glob("*"))


def test_a_checkpoint_within_the_epoch_has_the_steps_and_their_sums(kept):
    for done in (1, 2, 3):
        one_step(kept.meter, loss=float(done))
        kept.manager.between_steps(done, seconds=10.0 * done)
        assert names(kept.folder) == ([] if done == 1 else ["current.pth.tar"])
    stored = content(kept.folder)
    assert (stored["epoch"], stored["step"], stored["seconds"]) == (0, 2, 20.0)
    assert stored["sums"].tolist() == [[3 * (1.0 + 2.0), 6, 6, 6, 0, 0]]
    assert stored["log_size"] == (kept.folder / "logs" / "run.txt").stat().st_size == kept.run.size()


def test_nothing_is_kept_within_an_epoch_unless_it_is_asked_for(kept):
    kept.manager.every = 0
    for done in range(5):
        kept.manager.between_steps(done, 0.0)
    assert names(kept.folder) == []


def test_the_end_of_an_epoch_keeps_the_last_and_the_best(kept):
    manager = kept.manager
    manager.between_steps(3, 1.0)
    manager.end_epoch({"epoch": 0, "test": {"top1": 50.0, "ece": 5.0}})
    assert names(kept.folder) == ["current.pth.tar", "model_best.pth.tar"]
    stored = content(kept.folder)
    assert (stored["epoch"], stored["step"], stored["sums"], stored["seconds"]) == (1, 0, None, 0.0)
    with torch.no_grad():
        kept.model.classifier.fc.bias.fill_(3.0)
    manager.end_epoch({"epoch": 1, "test": {"top1": 50.0, "ece": 1.0}})  # a tie is no new best
    manager.end_epoch({"epoch": 2})  # not evaluated
    best, last = content(kept.folder, "model_best"), content(kept.folder)
    assert (best["epoch"], float(best["best_acc1"]), best["its_ece"]) == (1, 50.0, 5.0)
    assert (last["epoch"], float(last["best_acc1"])) == (3, 50.0)
    assert not torch.equal(best["state_dict_classifier"]["fc.bias"], last["state_dict_classifier"]["fc.bias"])


def test_asked_for_epochs_are_kept_for_good(kept):
    kept.manager.keep = [2]
    for epoch in range(3):
        kept.manager.end_epoch({"epoch": epoch})
    assert names(kept.folder) == ["current.pth.tar", "epoch_2.pth.tar"]
    assert (content(kept.folder, "epoch_2")["epoch"], content(kept.folder)["epoch"]) == (2, 3)


def test_the_best_is_written_before_the_last(kept):
    """Who is killed in between trains the epoch again, and so writes both."""
    (kept.folder / "ckps").mkdir()
    (kept.folder / "ckps" / ".current.pth.tar.part").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        kept.manager.end_epoch({"epoch": 0, "test": {"top1": 50.0, "ece": 5.0}})
    assert names(kept.folder) == ["model_best.pth.tar"]
    assert not kept.signals.saving


def test_a_checkpoint_that_was_just_read_is_not_written_again(kept):
    manager = kept.manager
    manager.state.epoch, manager.state.step = 3, 2
    again = CheckpointManager(
        manager.run, manager.signals, manager.state, FourSteps(), manager.meter, 2, manager.content
    )
    again.between_steps(2, 0.0)
    assert names(kept.folder) == []
    again.between_steps(4, 0.0)
    assert names(kept.folder) == ["current.pth.tar"]


def test_held_out_images_choose_where_there_are_any(kept):
    kept.manager.end_epoch({"epoch": 0, "test": {"top1": 50.0, "ece": 5.0}, "val": {"top1": 40.0}})
    kept.manager.end_epoch({"epoch": 1, "test": {"top1": 20.0, "ece": 9.0}, "val": {"top1": 41.0}})
    best = content(kept.folder, "model_best")
    assert (best["epoch"], float(best["best_acc1"]), best["its_ece"]) == (2, 41.0, 9.0)


def test_a_signal_ends_the_block_after_the_step_with_a_checkpoint_and_the_command(kept):
    with pytest.raises(Interrupted) as stop, kept.manager.stop_on_signal():
        for done in (1, 2, 3):
            one_step(kept.meter)
            if done == 3:
                os.kill(os.getpid(), signal.SIGUSR1)
                os.kill(os.getpid(), signal.SIGTERM)
            kept.manager.between_steps(done, 0.0)
    assert stop.value.number == signal.SIGUSR1
    stored = content(kept.folder)
    assert (stored["epoch"], stored["step"]) == (0, 3)
    reached, _, command = str(stop.value).partition("; resume with: ")
    assert reached == "epoch 0, 3 of 4 steps, is saved"
    words = ["python", "train_stage1.py", "--cfg", f"{kept.folder}/config.yaml", "resume"]
    assert shlex.split(command) == [*words, f"{kept.folder}/ckps/current.pth.tar"]


def test_a_signal_in_the_evaluation_keeps_all_the_epoch_s_steps(kept):
    with pytest.raises(Interrupted), kept.manager.stop_on_signal():
        kept.manager.between_steps(4, 0.0)
        assert kept.manager.signal() == 0
        os.kill(os.getpid(), signal.SIGTERM)
        raise Interrupted(kept.manager.signal())  # as predict does
    assert content(kept.folder)["step"] == 4


@pytest.mark.parametrize("where", ["loss", "weight"])
def test_numbers_that_are_not_finite_are_never_kept(kept, where):
    manager = kept.manager
    manager.between_steps(2, 0.0)
    before = (kept.folder / "ckps" / "current.pth.tar").read_bytes()
    manager.state.epoch = 7
    one_step(kept.meter)
    if where == "loss":
        one_step(kept.meter, math.nan)
        said = r"^epoch 7, step 1: the loss or a logit is not finite .*training images: 71, 99$"
    else:
        with torch.no_grad():
            kept.model.classifier.fc.bias[0] = math.inf
        said = "^epoch 7, last step: a weight is not finite"
    with pytest.raises(DivergenceError, match=said):
        manager.between_steps(4, 0.0)
    with pytest.raises(DivergenceError, match=said), manager.stop_on_signal():
        raise Interrupted(signal.SIGTERM)
    assert (kept.folder / "ckps" / "current.pth.tar").read_bytes() == before


@pytest.mark.parametrize("error", [InputError("x"), RuntimeError("y"), KeyError("z")])
def test_other_errors_go_on_their_way(kept, error):
    with pytest.raises(type(error)), kept.manager.stop_on_signal():
        raise error
    assert not (kept.folder / "ckps").exists()
