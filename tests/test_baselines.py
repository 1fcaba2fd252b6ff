"""The baselines end to end: their files, what sets in later, other classifiers, and class means that learn."""

import contextlib
import io
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import eval as eval_script
from methods.losses import drw_weights, ldam_margins, post_hoc_shift
from tests.conftest import (
    CE,
    ROOT,
    SHORT,
    assert_same_run,
    assert_same_tensors,
    content,
    copy_of,
    current,
    history,
    in_ranks,
    log_of,
    stopped,
    train,
)
from utils import build, distributed
from utils.compare import page as compare
from utils.config import load_config
from utils.evaluation import predict
from utils.precision import new_scaler
from utils.run import describe
from utils.step import Step

FILES = sorted((ROOT / "config").glob("*/baselines/*.yaml"))
METHODS = (
    *("balanced_softmax", "logit_adjustment_post_hoc", "ldam", "ldam_drw", "ce_drw", "las", "nc_drw"),
    "simplex_dot_regression",
)
NC = ["nc_within", 0.01, "nc_between", 0.1, "drw_epoch", 2]


# ---------------------------------------------------------------------------------------------------------------------
# The files


def test_every_method_has_its_own_and_the_common_protocol_on_both_data_sets():
    expected = {f"{d}_imb001_{m}_{k}" for d in ("cifar10", "cifar100") for m in METHODS for k in ("own", "common")}
    assert {path.stem for path in FILES} == {*expected, "cifar10_imb001_nc_all_common"}


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_a_baseline_s_file_builds_and_its_first_line_says_what_it_is(path):
    cfg = load_config(path)
    assert (cfg.imb_factor, cfg.num_epochs, cfg.batch_size, cfg.lr, cfg.lr_steps) == (0.01, 200, 128, 0.1, [160, 180])
    if path.stem.endswith("common"):
        assert (cfg.mixup, cfg.alpha, cfg.weight_decay, cfg.lr_step_factors) == (True, 1.0, 2e-4, [0.1, 0.01])
    counts = torch.linspace(5000, 50, cfg.num_classes).long()
    data = SimpleNamespace(num_classes=cfg.num_classes, image_size=32, class_counts=counts)
    model = build.new_model(cfg, data)
    method = build.new_method(cfg, data, model)
    build.new_optimizer(cfg, model, method)
    words = describe.describe_method(cfg)
    says = {
        "balanced_softmax": ["Balanced Softmax (logit adjustment, tau 1)"],
        "logit_adjustment_post_hoc": ["evaluated after post-hoc logit adjustment (logits less 1 log(n / N))"],
        "ldam": ["LDAM (margins up to 0.5)", "cosine classifier times 30"],
        "drw": ["deferred re-weighting from epoch 160 (beta 0.9999)"],
        "las": ["label-aware smoothing"],
        "nc": ["0.01 L_W + 0.1 L_B from epoch 0" if cfg.num_classes == 10 else "0.01 L_W + 0.5 L_B from epoch 100"],
        "nc_all": ["1 (rows apart) + 1 (means apart) + 1 (duality) from epoch 0"],
        "simplex": ["dot regression", "fixed simplex classifier"],
    }
    for part, expected in says.items():
        found = [fragment in words for fragment in expected]
        assert found == [f"_{part}_" in path.stem] * len(expected), (part, words)


def test_the_settings_of_the_papers():
    own = {m: load_config(ROOT / f"config/cifar10/baselines/cifar10_imb001_{m}_own.yaml") for m in METHODS}
    assert {name for name, cfg in own.items() if cfg.lr_step_factors == [0.01, 0.0001]} == {
        "ldam",
        "ldam_drw",
        "ce_drw",
    }
    assert [name for name, cfg in own.items() if cfg.mixup] == ["las", "nc_drw"]
    assert [name for name, cfg in own.items() if cfg.weight_decay != 2e-4] == ["nc_drw"]
    assert own["nc_drw"].weight_decay == 5e-3
    wide = load_config(ROOT / "config/cifar100/baselines/cifar100_imb001_simplex_dot_regression_own.yaml")
    assert wide.backbone == "resnet32x2"


def test_what_is_never_reached_or_corrects_twice_is_said_so():
    short = load_config(CE, [*map(str, NC), "num_epochs", "2", "nc_start_epoch", "2"])
    assert [line.split()[0] for line in describe.never_reached(short)] == [
        *("lr_steps", "warmup_epochs", "drw_epoch", "nc_start_epoch")
    ]
    arb = load_config("config/digits/digits_imb005_arbloss_mixup.yaml", ["post_hoc_tau", "1", "tau", "0.5"])
    words = describe.describe_method(arb)
    assert "batch class counts to the power 0.5" in words and "the loss has corrected the prior already" in words


# ---------------------------------------------------------------------------------------------------------------------
# Class means that learn, and what sets in later


def test_a_run_with_class_means_goes_on_as_if_it_had_not_ended(tmp_path):
    """Stopped before the regularizer sets in and before the weights do; momentum, means and all."""
    options = [*NC, "nc_start_epoch", 1, "mixup", True, "imb_factor", 0.01, "batch_size", 120]
    whole = train(tmp_path, *options, "num_epochs", 3, "keep_epochs", "[1]", cfg=CE)
    parts = stopped(whole, tmp_path / "parts")
    started = content(parts)["state_dict_method"]["regularizer.means"]
    assert torch.equal(started, means_at_the_start("imb_factor", "0.01"))
    for epochs in (2, 3):
        train(parts.parent, *options, "num_epochs", epochs, "keep_epochs", "[1]", "resume", current(parts), cfg=CE)
    assert_same_run(whole, parts)
    board = EventAccumulator(str(parts / "tensorboard")).Reload()
    assert [p.step for p in board.Scalars("top1/test")] == [0, 1, 2]
    assert (content(whole)["state_dict_method"]["regularizer.means"] - started).norm() > 0
    assert "0.01 L_W + 0.1 L_B from epoch 1 (class means: lr 0.5)" in log_of(whole).splitlines()[0]


@pytest.mark.parametrize("spa", ["proj", "slerp"])
def test_a_run_with_moving_means_goes_on_as_if_it_had_not_ended(tmp_path, spa):
    options = ["nc_rows", 1, "nc_means", 1, "nc_dual", 1, "spa", spa, "mixup", True, "num_epochs", 2]
    whole = train(tmp_path, *options, "keep_epochs", "[1]", cfg=CE)
    parts = stopped(whole, tmp_path / "parts")
    before = content(parts)["state_dict_method"]["geometry.moving.means"]
    train(parts.parent, *options, "keep_epochs", "[1]", "resume", current(parts), cfg=CE)
    assert_same_run(whole, parts)
    after = content(whole)["state_dict_method"]
    assert (before != 0).any() and not torch.equal(before, after["geometry.moving.means"])
    assert set(after) == {"geometry.moving.means", "geometry.moving.seen"}
    words = {"proj": "projection (gamma 0.6)", "slerp": "slerp (up to 0.02 a step)"}[spa]
    assert f"(duality) from epoch 0, space alignment by {words} from epoch 0" in log_of(whole).splitlines()[0]


ASPECTS = {  # the option: what nc_every measures of it, and the fraction of the plain run's that it must stay below
    ("nc_rows", 1): ("nc2_equiangle_weights", 0.6),  # measured with five seeds: 0.28 to 0.37
    ("nc_means", 10): ("nc2_equiangle", 0.9),  # 0.53 to 0.73
    ("nc_dual", 1): ("nc3", 0.75),  # 0.45 to 0.55
    ("spa", "proj", "spa_gamma", 0): ("nc3", 0.95),  # 0.71 to 0.81
    ("spa", "slerp"): ("nc3_uncentred", 0.6),  # 0.21 to 0.25
}


def measured_at_the_end(folder: Path, *options: object) -> dict[str, float]:
    schedule = ["num_epochs", 12, "warmup_epochs", 0, "eval_every", 12, "nc_every", 12]
    return history(train(folder, *schedule, *options, cfg=CE))[-1]["nc"]


@pytest.fixture(scope="module")
def without(tmp_path_factory) -> dict[str, float]:
    return measured_at_the_end(tmp_path_factory.mktemp("saved"))


@pytest.mark.parametrize("options", ASPECTS, ids=lambda options: "_".join(map(str, options[:2])))
def test_what_a_term_is_for_improves_on_the_digits(tmp_path, without, options):
    key, bound = ASPECTS[options]
    assert measured_at_the_end(tmp_path, *options)[key] < bound * without[key]


def means_at_the_start(*overrides: str) -> torch.Tensor:
    cfg = load_config(CE, [*SHORT, *map(str, NC), *overrides])
    data = build.load_data(cfg, cfg.class_map, torch.device("cpu"))
    return build.new_method(cfg, data, build.new_model(cfg, data)).regularizer.means.detach()


def test_the_schedule_leaves_the_means_rate_alone():
    cfg = load_config(CE, [*SHORT, *map(str, NC), "lr", "0.3", "warmup_epochs", "0", "nc_means_lr", "0.2"])
    data = build.load_data(cfg, cfg.class_map, torch.device("cpu"))
    model = build.new_model(cfg, data)
    optimizer = build.new_optimizer(cfg, model, build.new_method(cfg, data, model))
    for epoch in (0, 30, 36):
        rate = build.set_lr(optimizer, cfg, epoch)
        assert [group["lr"] for group in optimizer.param_groups] == [rate, 20.0]
    assert [(g["momentum"], g["weight_decay"]) for g in optimizer.param_groups] == [(0.9, 5e-4), (0.0, 0.0)]


def steps_with_class_means(rank: int, folder: Path) -> None:
    """One epoch in which the means learn; leaves what every process must have alike."""
    options = ["nc_within", 0.05, "nc_between", 0.1, "batch_size", 61, "drw_epoch", 0]
    cfg = load_config(CE, [*SHORT, *map(str, options)])
    with distributed.processes("cpu") as device:
        data = build.load_data(cfg, cfg.class_map, device)
        model = build.new_model(cfg, data)
        method = build.new_method(cfg, data, model)
        start = method.regularizer.means.detach().clone()
        optimizer = build.new_optimizer(cfg, model, method)
        loader = data.train_loader(cfg.batch_size, 0, device, rank, distributed.world_size())
        step = Step(distributed.parallel(model, device), method, optimizer, new_scaler("fp32", device), device)
        for batch, draw in zip(loader.epoch(0), method.draws(loader.batch_sizes, 0, 0), strict=True):
            step(batch, draw)
        layer = torch.nn.Linear(2, 1, bias=False)
        distributed.average_gradients(layer)  # which has none
        layer.weight.grad = torch.full((1, 2), 1.0 + rank)
        distributed.average_gradients(layer)
        found = {"start": start, "end": method.regularizer.means.detach(), "weight": model.classifier.fc.weight}
        torch.save({**found, "mean": layer.weight.grad}, folder / f"{rank}.pt")


def test_class_means_stay_equal_in_two_processes(tmp_path):
    in_ranks(tmp_path, steps_with_class_means, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert torch.equal(first["start"], means_at_the_start())
    for key in first:
        assert torch.equal(first[key], second[key]), key
    assert (first["end"] - first["start"]).norm() > 0
    assert first["mean"].tolist() == [[1.5, 1.5]]


# ---------------------------------------------------------------------------------------------------------------------
# Other classifiers


LDAM = ["loss", "ldam", "classifier", "cosine", "drw_epoch", 1]
SIMPLEX = ["loss", "dot_regression", "classifier", "simplex", "mixup", True]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of two epochs in which everything is measured that can be."""
    root = tmp_path_factory.mktemp("saved")
    everything = ["num_epochs", 2, "diagnostics", 4, "nc_every", 2]
    both = {"ldam": LDAM, "simplex": SIMPLEX}
    return {name: train(root / name, *everything, *both[name], "name", name, cfg=CE) for name in both}


@pytest.mark.parametrize("name", ["ldam", "simplex"])
def test_everything_is_measured_with_other_classifiers(runs, name):
    rows = history(runs[name])
    assert {"nc1", "nc4", "b_a", "simplex_weights"} <= set(rows[-1]["nc"])
    assert (runs[name] / "diagnostics.npz").is_file()
    # LDAM's lengths are of the rows as they multiply the features.
    zero = {"simplex": ("simplex_weights", "b_a", "nc2_equiangle_weights"), "ldam": ("b_l",)}[name]
    assert [rows[-1]["nc"][key] for key in zero] == pytest.approx([0] * len(zero), abs=1e-4)


def test_the_simplex_is_kept_as_it_began(runs):
    cfg = load_config(runs["simplex"] / "config.yaml")
    initial = build.new_model(cfg, SimpleNamespace(num_classes=10, image_size=32)).classifier
    kept = content(runs["simplex"])["state_dict_classifier"]
    assert torch.equal(kept["fc.weight"], initial.fc.weight)
    assert not torch.equal(kept["neck.norm.weight"], initial.neck.norm.weight)


def evaluate(run, *options) -> str:
    """What eval.py says of a copy of the run, so that the run stays as it is."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        eval_script.main(["--cfg", str(run / "config.yaml"), "resume", str(current(run)), *map(str, options)])
    return said.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ldam", "simplex"])
def test_eval_decomposes_and_agrees_with_the_training(runs, tmp_path, name):
    run = copy_of(runs[name], tmp_path)
    said = evaluate(run, "decompose", True)
    top1 = history(run)[-1]["test"]["top1"]
    assert f"* Acc@1 {top1:.3f}%" in said
    found = json.loads((run / "eval" / "current" / "decomposition.json").read_text())
    assert found["rows"]["model"]["top1"] == pytest.approx(top1)


@pytest.mark.slow
def test_runs_with_other_classifiers_are_compared(runs, tmp_path):
    compare.main([*map(str, runs.values()), "--out", str(tmp_path / "page.html")])
    page = (tmp_path / "page.html").read_text()
    for words in ("LDAM (margins up to 0.5)", "fixed simplex classifier"):
        assert words in page


def test_the_weights_of_ldam_and_drw_are_those_of_the_training_set(runs):
    cfg = load_config(runs["ldam"] / "config.yaml")
    counts = content(runs["ldam"])["class_counts"]
    data = SimpleNamespace(class_counts=counts, image_size=8)
    method = build.new_method(cfg, data)
    assert torch.equal(method.criterion.margins, ldam_margins(counts))
    assert torch.equal(method.drw_weights, drw_weights(counts))
    assert method.criterion.options == {"cosine_scale": 30.0}


# ---------------------------------------------------------------------------------------------------------------------
# Post hoc


WORDS = "evaluated after post-hoc logit adjustment (logits less 1.5 log(n / N))"


def test_post_hoc_adjustment_is_of_the_evaluation_alone(cross_entropy, tmp_path):
    shifted = train(tmp_path, "num_epochs", 2, "post_hoc_tau", 1.5, cfg=CE)
    a, b = content(cross_entropy), content(shifted)
    for key in ("state_dict_model", "state_dict_classifier"):
        assert_same_tensors(a[key], b[key])
    cfg = load_config(CE, SHORT)
    data = build.load_data(cfg, cfg.class_map, torch.device("cpu"))
    model = build.new_model(cfg, data)
    model.backbone.load_state_dict(b["state_dict_model"])
    model.classifier.load_state_dict(b["state_dict_classifier"])
    with torch.no_grad():
        model.classifier.fc.bias -= post_hoc_shift(data.class_counts, 1.5)
    found = predict(model, data.test_loader(torch.device("cpu")))
    top1 = 100 * float((found.classes == found.targets).double().mean())
    assert history(shifted)[1]["test"]["top1"] == pytest.approx(top1, abs=0.6)  # two images in 400: last bits
    before, after = (
        data.class_counts.numpy()[np.load(run / "predictions/1.npz")["classes"]] for run in (cross_entropy, shifted)
    )
    assert (after <= before).all()  # no image goes to a more frequent class
    assert WORDS in log_of(shifted).splitlines()[0]


@pytest.mark.slow
def test_eval_adjusts_as_the_run_did_and_says_so(cross_entropy, tmp_path):
    run = copy_of(cross_entropy, tmp_path)
    raw, adjusted = evaluate(run), evaluate(run, "post_hoc_tau", 1.5)
    assert WORDS not in raw
    assert f"note: {WORDS}" in adjusted
    shifted = train(tmp_path / "shifted", "num_epochs", 2, "post_hoc_tau", 1.5, cfg=CE)
    for said, folder in ((raw, cross_entropy), (adjusted, shifted)):
        assert f"* Acc@1 {history(folder)[1]['test']['top1']:.3f}%" in said
