"""The bench: what it compares, how it counts, and every part in its smallest form. No speed is asserted."""

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from datasets.decoding import fast_decoder
from methods.losses import arb_loss, count_classes
from tests.conftest import ROOT, failure
from utils.bench import __main__ as command
from utils.bench import contestants, parts, timing
from utils.config import read_config
from utils.run.provenance import machine

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def restored_variables(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    monkeypatch.setenv("KINETO_LOG_LEVEL", "99")


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """The CIFAR configuration with the smallest network and batch, and few classes for the criteria."""
    cfg = tmp_path / "tiny.yaml"
    cfg.write_text(f"_BASE_: {contestants.CIFAR}\nbackbone: resnet8\nbatch_size: 8\nworkers: 0\n")
    for module in (contestants, parts):
        monkeypatch.setattr(module, "CIFAR", str(cfg))
        monkeypatch.setattr(module, "BATCH", 8)
    monkeypatch.setattr(parts, "CLASSES", (10, 2000))
    monkeypatch.setattr(parts, "SAMPLE", 0.001)
    monkeypatch.setattr(parts, "PHOTOS", 4)


@pytest.fixture
def run(capsys, tmp_path):
    """The bench in this process: (what was printed, the parts of the JSON file)."""

    def run(*arguments: object) -> tuple[str, dict]:
        words = [*arguments, "--json", tmp_path / "report.json", "--device", "cpu"]
        command.main([str(word) for word in words])
        report = json.loads((tmp_path / "report.json").read_text())
        for part in report["parts"].values():
            check_tables(part["tables"])
        return capsys.readouterr().out, report["parts"]

    return run


def check_tables(tables: dict) -> None:
    """Medians, ratios and rounds agree."""
    for rows in tables.values():
        medians = {row["what"]: list(row.values())[1] for row in rows}
        for row in rows:
            assert row["low"] == min(row["rounds"]) and row["high"] == max(row["rounds"]) and row["low"] > 0
            assert medians[row["what"]] == pytest.approx(np.median(row["rounds"]))
            for key in row:
                if key.startswith("/ "):
                    assert row[key] == pytest.approx(medians[row["what"]] / medians[key[2:]])


def names(rows: list[dict]) -> list[str]:
    return [row["what"] for row in rows]


def context(tmp_path: Path, *arguments: str) -> parts.Bench:
    return parts.Bench(command.parse(["--device", "cpu", *arguments]), CPU, tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def test_contestants_take_turns_in_an_order_of_each_round():
    calls = []
    contestants = {name: lambda name=name: calls.append(name) or len(calls) for name in "abcde"}
    measured = timing.interleaved(contestants, 4)
    rounds = [calls[start : start + 5] for start in range(0, 20, 5)]
    assert all(sorted(order) == list("abcde") for order in rounds)
    assert len(set(map(tuple, rounds))) > 1
    expected = list("abcde")
    random.Random(2).shuffle(expected)
    assert rounds[2] == expected
    assert list(measured) == list("abcde")
    assert measured["c"] == [5 * number + order.index("c") + 1 for number, order in enumerate(rounds)]


def test_rows_have_medians_and_ratios_of_medians():
    rows = timing.rows_of({"slow": [1.0, 3.0, 2.0], "fast": [4.0, 5.0, 9.0]}, "images/s", "slow")
    assert rows[1] == {
        "what": "fast",
        "images/s": 5.0,
        "low": 4.0,
        "high": 9.0,
        "/ slow": 2.5,
        "rounds": [4.0, 5.0, 9.0],
    }
    assert rows[0]["/ slow"] == 1


def test_the_first_round_of_a_comparison_does_not_count():
    calls = []
    rows = timing.compare({"a": lambda: calls.append(time.sleep(0.01))}, 5, CPU, 3, "a")
    assert len(calls) == 4 and len(rows[0]["rounds"]) == 3
    assert 0 < rows[0]["images/s"] <= 500


def test_the_clock_of_the_process_does_not_count_waiting():
    assert timing.seconds(lambda: time.sleep(0.2), CPU, time.process_time) < 0.2
    assert timing.seconds(lambda: time.sleep(0.2), CPU) >= 0.2


def test_a_table_is_aligned():
    rows = timing.rows_of({"classic": [512.4], "bf16+compile": [1.2345]}, "images/s", "classic")
    lines = timing.as_text("cifar", timing.Part({"batch": 128}, {"speed": rows})).splitlines()
    assert lines == [
        "",
        "== cifar",
        "batch: 128",
        "",
        "speed",
        "  what          images/s   low  high  / classic",
        "  classic            512   512   512          1",
        "  bf16+compile      1.23  1.23  1.23    0.00241",
    ]


def test_peak_memory_counts_what_is_held_at_once():
    def run():
        first = torch.zeros(2**18)  # 1 MiB
        second = torch.zeros(2**19)
        del first
        return second, torch.zeros(2**18)

    run()
    assert timing.peak_memory(run, CPU) == 3 * 2**20
    assert timing.peak_memory(lambda: None, CPU) == 0


# ---------------------------------------------------------------------------------------------------------------------
# What is compared


@pytest.mark.parametrize("classes", [3, 100])
def test_the_published_formula_is_this_trainer_s_loss(classes):
    draw = torch.Generator().manual_seed(0)
    logits = (20 * torch.randn(16, classes, generator=draw)).double().requires_grad_()  # some beyond the clamp
    targets = torch.randint(classes, (16,), generator=draw)
    counts = count_classes(targets, classes)
    published = contestants.published_arb(logits, targets, counts.double())
    (gradient,) = torch.autograd.grad(published, logits)
    ours = arb_loss(logits, targets, counts)
    torch.testing.assert_close(published, ours)
    torch.testing.assert_close(gradient, torch.autograd.grad(ours, logits)[0])


def test_the_classic_loop_sees_what_the_trainer_sees():
    data = contestants.noise(256, 20)
    classic = contestants.Classic(data, CPU)
    theirs = torch.stack([classic.train_loader.dataset[index][0] for index in range(256)])
    ours = torch.cat([batch.augment() for batch in data.train_loader(64, 0, CPU).epoch(0)])
    assert theirs.shape == ours.shape and theirs.dtype == ours.dtype
    for statistic in (torch.mean, torch.std):  # black borders included
        torch.testing.assert_close(statistic(theirs, (0, 2, 3)), statistic(ours, (0, 2, 3)), atol=0.03, rtol=0.03)
    images, targets = next(iter(data.test_loader(CPU)))
    tested = [classic.test_loader.dataset[index] for index in range(20)]
    torch.testing.assert_close(torch.stack([image for image, _ in tested]), images)
    assert [label for _, label in tested] == targets.tolist()


def test_both_loops_train_the_same_network_as_the_configuration_says():
    cfg, _ = read_config(contestants.CIFAR)
    assert cfg.batch_size == contestants.BATCH
    data = contestants.noise(contestants.BATCH, 10)
    classic, trainer, bound = (make(data, *mode, CPU) for make, mode in
        ((contestants.Classic, ()), (contestants.Trainer, ("bf16",)), (contestants.Bound, ("bf16",))))  # fmt: skip
    assert trainer.precision == bound.precision == "bf16"
    sizes = [sum(p.numel() for p in one.parameters()) for one in (classic.model, trainer.step.model, bound.model)]
    assert len(set(sizes)) == 1
    classic.train()
    settings = [one.param_groups[0] for one in (classic.optimizer, trainer.step.optimizer)]
    assert all(settings[0][key] == settings[1][key] for key in ("lr", "momentum", "weight_decay"))


def test_a_bench_without_compilation_has_no_compiled_modes(tmp_path):
    assert context(tmp_path).modes() == ["fp32", "bf16", "fp32+compile", "bf16+compile"]
    assert context(tmp_path, "--no-compile").modes() == ["fp32", "bf16"]
    assert context(tmp_path, "--modes", "bf16+compile").modes() == ["bf16+compile"]
    assert contestants.options_of("bf16+compile") == ["precision", "bf16", "compile", "True"]


# ---------------------------------------------------------------------------------------------------------------------
# The parts


def test_the_parts_of_this_process(tiny, run):
    said, report = run(
        *("cifar", "criterion", "pipeline", "--steps", 1, "--rounds", 1, "--modes", "fp32", "--no-compile")
    )
    assert list(report) == ["cifar", "criterion", "pipeline"]
    tried, rows = report["cifar"]["tables"].values()
    assert names(tried) == ["fp32"] and tried[0]["first step, s"] > 0
    assert report["cifar"]["settings"]["fastest mode"] == "fp32"
    assert names(rows) == ["classic", "fp32", "bound"]
    assert "fp32, not compiled" in said and "/ classic  / bound" in said
    assert list(report["criterion"]["tables"]) == ["10 classes", "2000 classes"]
    for rows in report["criterion"]["tables"].values():
        assert names(rows) == ["plain, one target", "plain", "clamp, add, plain", "published", "ours"]
        assert rows[1]["peak / plain"] == rows[3]["peak / published"] == 1
    *_, published, ours = rows
    assert ours["peak / published"] == ours["peak, MiB"] / published["peak, MiB"] < 0.65
    workers, device = report["pipeline"]["tables"].values()
    assert names(workers) == ["classic", "pil", f"fast ({fast_decoder()})"]
    assert names(device) == ["colours, normalisation"]
    assert "photos: 4 made of two photographs" in said
    assert torch.get_num_threads() == machine(CPU)["threads"]


def test_the_fastest_mode_is_compared(tiny, run):
    _, report = run("cifar", "--steps", 1, "--rounds", 1, "--modes", "fp32,bf16", "--no-compile")
    tried, rows = report["cifar"]["tables"].values()
    fastest = max(tried, key=lambda row: row["high"])["what"]
    assert report["cifar"]["settings"]["fastest mode"] == fastest
    assert names(rows) == list(dict.fromkeys(["classic", "fp32", fastest, "bound"]))


def test_the_criteria_are_one_loss_but_for_plain_cross_entropy(monkeypatch):
    values = []
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: values.append(loss.item()))
    for run in contestants.losses(100, CPU).values():
        run()
    assert values[2:] == pytest.approx([values[2]] * 3, rel=1e-5)
    assert abs(values[1] - values[2]) > 0.1  # the class counts differ by a factor of 250


def test_photographs_of_one_s_own(run, tmp_path):
    photos = parts.make_photos(tmp_path / "own")
    for path in sorted(photos.iterdir())[2:]:
        path.unlink()
    _, report = run("pipeline", "--photos", photos, "--rounds", 1)
    assert report["pipeline"]["settings"]["photos"] == f"2 of {photos}"


def test_epoch(tiny, run, monkeypatch):
    """With the command replaced by one that takes 0.1 s per epoch; the command itself is tested below."""
    commands = []

    def train(bench, data_path, epochs, *overrides, processes=1):
        commands.append((data_path.name, epochs, overrides, processes))
        time.sleep(0.1 * epochs)
        return [{"timing": {"train_seconds": seconds}} for seconds in (9.0, 1.0, 2.0, 3.0)[:epochs]]

    monkeypatch.setattr(parts, "train_by_command", train)
    _, report = run("epoch", "--modes", "tf32", "--images", 2, "--rounds", 1)
    whole, scaling = report["epoch"]["tables"].values()
    assert names(whole) == ["classic", "fp32", "tf32"]
    assert whole[1]["s"] >= 0.05
    assert names(scaling) == ["20 images, batch 8", "twice the images", "batch 64", "batch 256", "2 processes"]
    assert scaling[0]["s"] == 2.0
    assert ("epoch-1", 4, (), 2) in commands and ("epoch-2", 4, (), 1) in commands
    assert ("epoch-1", 1, ("precision", "tf32", "compile", "False"), 1) in commands
    assert report["epoch"]["settings"]["images"] == "20 for training, 20 for testing"


@pytest.mark.slow
def test_startup(tiny, run, monkeypatch):
    """One run of the real command, up to its first progress line."""
    folders = parts.make_folders
    monkeypatch.setattr(parts, "make_folders", lambda folder, train, test: folders(folder, train=2, test=1))
    said, report = run("startup", "--modes", "fp32", "--rounds", 1)
    (rows,) = report["startup"]["tables"].values()
    assert names(rows) == ["import torch, torchvision", *parts.STAGES]
    assert rows[3]["s"] == pytest.approx(rows[1]["s"] + rows[2]["s"])
    assert "first step" in said


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_training_by_the_real_command(tiny, tmp_path, processes):
    data = parts.make_folders(tmp_path / "data", train=3, test=1)
    rows = parts.train_by_command(context(tmp_path), data, 1, processes=processes)
    assert [row["epoch"] for row in rows] == [0] and rows[0]["timing"]["train_seconds"] > 0


def test_stages_are_timed_by_the_lines_of_the_log(tmp_path, monkeypatch):
    says = "import time; print('training', flush=True); time.sleep(0.2); print('Epoch: [0][0/9]', flush=True); input()"
    monkeypatch.setattr(parts, "train_command", lambda *_: ["-c", says])
    found = parts.time_first_step(context(tmp_path), tmp_path, "fp32")
    assert list(found) == list(parts.STAGES)
    assert found["in all"] == pytest.approx(found["imports, data, model"] + found["first step"])
    assert found["first step"] > 0.1


@pytest.mark.parametrize("call", [(parts.train_by_command, 1), (parts.time_first_step, "fp32")])
def test_a_command_that_fails_is_an_error_with_its_message(tmp_path, monkeypatch, call):
    monkeypatch.setattr(parts, "train_command", lambda *_: ["-c", "raise SystemExit('no such data')"])
    function, argument = call
    with pytest.raises(RuntimeError, match="no such data"):
        function(context(tmp_path), tmp_path, argument)


# ---------------------------------------------------------------------------------------------------------------------
# The command


def in_a_process(*arguments: object) -> subprocess.CompletedProcess:
    words = [sys.executable, "-m", "utils.bench", *map(str, arguments)]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_the_command_says_where_it_ran_and_writes_what_it_prints(tmp_path):
    done = in_a_process("pipeline", "--rounds", 1, "--device", "cpu", "--json", tmp_path / "report.json")
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads((tmp_path / "report.json").read_text())
    for key, value in report.items():
        assert key == "parts" or f"{key}: {value}" in done.stdout.splitlines()
    assert report.keys() == {"date", "device", "cpu", "cores", "threads", "versions", "parts"}
    assert timing.as_text("pipeline", timing.Part(**report["parts"]["pipeline"])) in done.stdout


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["cifar", "speed"], "'speed'"),
        (["--modes", "fp32,fast"], "'fast'"),
        (["--modes", "fp32+compile", "--no-compile"], "--no-compile leaves none"),
        (["--rounds", "0"], "'0'"),
        (["--steps", "many"], "'many'"),
        (["--photos", "nowhere"], "nowhere"),
        (["--photos", "config"], "config"),
        (["--json", "nowhere/report.json"], "nowhere"),
        (["--json", "config"], "config"),
        (["--device", "tpu"], "'tpu'"),
        (["--frobnicate"], "--frobnicate"),
    ],
    ids=" ".join,
)
def test_bad_input_ends_with_one_line(capsys, arguments, named):
    result = failure(capsys, command.main, *arguments)
    assert result.code == 2 and len(result.lines) == 1 and result.lines[0].startswith("error: ")
    assert named in result.said


@pytest.mark.soak
def test_everything_with_compilation(tmp_path):
    done = in_a_process(
        *("cifar", "startup", "epoch", "--rounds", 1, "--steps", 2, "--images", 20, "--device", "cpu"),
        *("--modes", "fp32,bf16+compile", "--json", tmp_path / "report.json"),
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())["parts"]
    assert list(report) == ["cifar", "startup", "epoch"]
    for part in report.values():
        check_tables(part["tables"])
    assert "not compiled" not in report["cifar"]["settings"]["bound"]
