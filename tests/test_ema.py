"""Averaged weights: against their formula, kept, resumed, evaluated and shown."""

import copy
import json

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import eval as eval_script
from tests.conftest import (
    ARB,
    SHORT,
    TWO_EPOCHS,
    assert_same_run,
    assert_same_tensors,
    content,
    current,
    history,
    in_ranks,
    log_of,
    stopped,
    train,
    train_in_rank,
)
from tests.test_step import CPU, Recorder, batches_and_draws, digits, new_parts, new_step, run  # noqa: F401
from utils.compare.read import read_run
from utils.cuda_graph import GraphedStep
from utils.ema import AveragedModel
from utils.run.summary import AVERAGED
from utils.step import Step


@pytest.fixture(scope="module")
def averaged(tmp_path_factory):
    """The run of the fixture ``finished``, with averaged weights beside it."""
    return train(tmp_path_factory.mktemp("saved"), *TWO_EPOCHS, "ema", 0.9)


def averaged_step(data, decay=0.8, **options) -> Step:
    parts = new_parts(data)
    return Step(*parts, CPU, average=AveragedModel(parts[0], decay), **options)


def test_the_average_is_its_formula(digits):  # noqa: F811
    step = averaged_step(digits, 0.8)
    expected = {key: value.double() for key, value in step.model.state_dict().items()}
    step.start_epoch(0)
    for number, (batch, draw) in enumerate(batches_and_draws(digits, step, 0)):
        step(batch, draw)
        for key, value in step.model.state_dict().items():
            is_count = key.endswith("num_batches_tracked")
            expected[key] = value if is_count else 0.8 * expected[key] + 0.2 * value.double()
        if number == 4:
            break
    for key, value in step.average.model.state_dict().items():
        torch.testing.assert_close(value.double(), expected[key].double(), rtol=1e-5, atol=1e-6)
    assert not any(parameter.requires_grad for parameter in step.average.model.parameters())


def test_recording_leaves_no_trace_in_the_average(digits):  # noqa: F811
    steps = [averaged_step(digits), GraphedStep(averaged_step(digits), Recorder())]
    one, other = (run(digits, step, steps=3) for step in steps)
    assert_same_tensors(one.average.model.state_dict(), other.step.average.model.state_dict())


def test_averaging_changes_nothing_that_is_trained(averaged, finished):
    assert_same_tensors(content(averaged)["state_dict_model"], content(finished)["state_dict_model"])
    rows = [{key: value for key, value in row.items() if key != "ema"} for row in history(averaged)]
    assert rows == history(finished)
    assert "averaged" not in content(finished)


def test_a_resumed_run_has_the_averages_of_one_that_was_not_stopped(averaged, tmp_path):
    folder = stopped(averaged, tmp_path)
    train(tmp_path, "num_epochs", 2, "ema", 0.9, "resume", current(folder))
    assert_same_run(folder, averaged)
    stored = [content(run)["averaged"] for run in (folder, averaged)]
    for key in ("state_dict_model", "state_dict_classifier"):
        assert_same_tensors(*(each[key] for each in stored))
    assert log_of(folder).count("* EMA ") == 2


def test_a_checkpoint_without_averages_starts_them_from_its_weights(finished, tmp_path):
    folder = stopped(finished, tmp_path)
    state = copy.deepcopy(content(folder)["state_dict_classifier"])
    train(tmp_path, "num_epochs", 2, "ema", 0.9999999, "resume", current(folder))
    assert "note: ema: " in log_of(folder) and "has no averaged weights; they start from its weights" in log_of(folder)
    for key, value in content(folder)["averaged"]["state_dict_classifier"].items():
        torch.testing.assert_close(value, state[key], rtol=1e-5, atol=1e-5)
    weights = tmp_path / "mislas.pth.tar"
    torch.save({key: value for key, value in content(folder).items() if key.startswith("state_dict_")}, weights)
    again = train(tmp_path / "new", "num_epochs", 1, "ema", 0.9999999, "resume", weights)
    for key, value in content(again)["averaged"]["state_dict_classifier"].items():
        torch.testing.assert_close(value, content(folder)["state_dict_classifier"][key], rtol=1e-5, atol=1e-5)


def test_averages_are_shown_wherever_results_are(averaged, capsys):
    rows, summary = history(averaged), json.loads((averaged / "summary.json").read_text())
    last = rows[-1]["ema"]
    assert list(summary)[:2] == ["last epoch", AVERAGED]
    assert summary[AVERAGED]["top1"] == last["top1"]
    log = log_of(averaged)
    assert f"* EMA   Acc@1 {last['top1']:.3f}% " in log and f"{AVERAGED} (epoch 1)" in log
    assert "weights averaged with decay 0.9;" in log
    board = EventAccumulator(str(averaged / "tensorboard")).Reload()
    assert [p.value for p in board.Scalars("top1/ema")] == pytest.approx([row["ema"]["top1"] for row in rows])
    by_rule = {rule: summaries[AVERAGED]["many"] for rule, summaries in read_run(averaged).summaries.items()}
    assert by_rule == {rule: scores["many"] for rule, scores in last["shots"].items()}


def test_eval_shows_both(averaged, capsys):
    eval_script.main(["--cfg", str(averaged / "config.yaml"), "resume", str(current(averaged))])
    said = capsys.readouterr().out
    assert "\ngroups by index " in said and "\naveraged weights, groups by count " in said
    row = history(averaged)[-1]
    metrics = json.loads((averaged / "eval" / "current" / "metrics.json").read_text())
    assert metrics["ema"]["nll"] == pytest.approx(row["ema"]["nll"])
    assert metrics["nll"] == pytest.approx(row["test"]["nll"])


def test_two_processes_average_the_same_weights(tmp_path):
    """Their averages are those of the first one, which evaluation shows."""
    in_ranks(tmp_path, train_in_rank, ARB, "num_epochs", 1, "ema", 0.5, "save_dir", tmp_path / "saved")
    (folder,) = (tmp_path / "saved").iterdir()
    eval_script.main(["--cfg", ARB, *SHORT, "resume", str(current(folder))])
    metrics = json.loads((folder / "eval" / "current" / "metrics.json").read_text())
    assert metrics["ema"]["nll"] == pytest.approx(history(folder)[-1]["ema"]["nll"])
