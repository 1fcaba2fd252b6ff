"""What a sweep plans and refuses."""

import json
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT, failure
from utils.sweep.command import main
from utils.sweep.plan import Run, plan
from utils.sweep.spec import read_sweep

DIGITS = ROOT / "config/digits/digits_imb005.yaml"
OPTIONS = {"num_epochs": 2, "batch_size": 64, "lr_steps": [1, 9], "warmup_epochs": 0}
OPTIONS |= {"backbone": "resnet8", "image_size": 8}
ARMS = {"plain": {}, "arb": {"loss": "arb", "class_counts": "batch"}}
LATE = {"late": {"fork": {"arm": "plain", "epoch": 1}, "lr_steps": [8, 9], "seeds": [0]}}
STEPS = {"arb": {"arb": 1, "plain": -1}, "schedule": {"late": 1, "plain": -1}}
WATERFALL = {"start": "plain", "steps": STEPS, "end": "best", "published": 50}
# A few lines that stand for 10^14 numbers.
LAUGHS = f"cfg: {DIGITS}\narms: {{a: {{}}}}\nseeds:\n  - &n0 [1]\n"
LAUGHS += "".join(f"  - &n{n} [{', '.join([f'*n{n - 1}'] * 10)}]\n" for n in range(1, 15))


def written(folder: Path, name: str = "tiny", **changes: object) -> Path:
    """A sweep's file: two arms, two seeds; a change to None takes a key out."""
    told = {"cfg": str(DIGITS), "options": OPTIONS, "seeds": [0, 1], "arms": ARMS, **changes}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in told.items() if value is not None}, sort_keys=False))
    return path


def planned(path: Path, *overrides: str, home: str = "saved") -> list[Run]:
    return plan(read_sweep(path), Path(home) / path.stem, overrides)


def names(runs) -> list[str]:
    return [run.name for run in runs]


# ---------------------------------------------------------------------------------------------------------------------
# Plans


def test_seeds_are_outermost_and_arms_innermost(tmp_path):
    path = written(
        tmp_path, axes={"imb_factor": [0.1, 0.05]}, subset_seeds=[0, 3], arms={"a": {}, "b": {"seeds": [1, 2]}}
    )
    assert names(planned(path)) == [
        f"{arm}_imb_factor{factor}_seed{seed}{subset}"
        for subset in ("", "_subset3")
        for seed, arms in ((0, "a"), (1, "ab"), (2, "b"))
        for factor in (0.1, 0.05)
        for arm in arms
    ]
    run = planned(path)[-1]
    assert (run.cfg.seed, run.cfg.subset_seed, run.cfg.imb_factor) == (2, 3, 0.05)
    assert (run.seed, run.arm, run.cell) == (2, "b", {"imb_factor": 0.05})
    assert run.cfg.name == run.name and run.cfg.save_dir == "saved/tiny" and run.cfg.resume == "auto"


def test_arms_of_a_seed_have_the_same_configuration_but_for_what_they_say(tmp_path):
    plain, arb = planned(written(tmp_path))[:2]
    assert {key for key in plain.cfg if plain.cfg[key] != arb.cfg[key]} == {"name", "loss"}  # batch is the default
    assert (plain.cfg.num_epochs, plain.cfg.lr_steps) == (2, [1, 9])


def test_an_arm_has_its_own_configuration_beside_the_sweep_s_file(tmp_path):
    (tmp_path / "own.yaml").write_text(f"_BASE_: {DIGITS}\nmomentum: 0.8\n")
    arms = {"a": None, "b": {"cfg": str(DIGITS)}}
    runs = planned(written(tmp_path / "deeper", cfg="../own.yaml", arms=arms, seeds=None))
    assert names(runs) == ["a_seed0", "b_seed0"]  # without seeds there is one
    assert [run.cfg.momentum for run in runs] == [0.8, 0.9]


def test_a_fork_inherits_what_its_parent_says(tmp_path):
    arms = {**ARMS, "late": {"fork": {"arm": "arb", "epoch": 1}, "lr_steps": [8, 9]}}
    plain, arb, late = planned(written(tmp_path, arms=arms))[:3]
    assert late.parent is arb and late.forked_after == 1
    assert {key for key in arb.cfg if arb.cfg[key] != late.cfg[key]} == {"name", "lr_steps", "keep_epochs"}
    assert (plain.cfg.keep_epochs, arb.cfg.keep_epochs, late.cfg.keep_epochs) == ([], [1], [])
    seeds = {**ARMS, "arb": {**ARMS["arb"], "seeds": [5]}, "late": arms["late"]}
    assert names(planned(written(tmp_path, arms=seeds)))[-2:] == ["arb_seed5", "late_seed5"]


def test_odd_values_of_yaml_mean_what_they_mean_elsewhere(tmp_path):
    text = f"""
cfg: {DIGITS}
options: {{num_epochs: 2e0, imb_factor: null}}
axes: {{weight_decay: [2e-4, 5.0e-4], lr_steps: [[1, 2], [3, 4]]}}
arms:
  old: {{arbloss: True, arb_loss_use_global_class_cnt: True}}
  text: {{alpha: "5e-1", logit_clamp: ~}}
pairs: [[old, text]]
claims: {{1: {{pair: [old, text], at_least: 5e-1}}, of one: {{arm: old, published: 8e1, at: {{weight_decay: 2e-4}}}}}}
waterfall: {{start: text, steps: {{x: {{old: 1e0, text: -1}}}}, end: last, published: 83}}
"""
    (tmp_path / "odd.yaml").write_text(text)
    runs = planned(tmp_path / "odd.yaml")
    assert names(runs)[:3] == [
        *("old_weight_decay0.0002_lr_steps1-2_seed0", "text_weight_decay0.0002_lr_steps1-2_seed0"),
        "old_weight_decay0.0002_lr_steps3-4_seed0",
    ]
    assert [run.cell["weight_decay"] for run in runs[::4]] == [2e-4, 5e-4]
    assert (runs[0].cfg.loss, runs[0].cfg.class_counts, runs[0].cfg.num_epochs) == ("arb", "global", 2)
    assert (runs[1].cfg.alpha, runs[1].cfg.logit_clamp, runs[1].cfg.imb_factor) == (0.5, None, None)
    compared = read_sweep(tmp_path / "odd.yaml").compared
    assert compared["claims"]["1"]["at_least"] == 0.5
    assert compared["waterfall"]["steps"] == {"x": {"old": 1.0, "text": -1.0}}
    assert compared["claims"]["of one"] == {"arm": "old", "published": 80.0, "at": {"weight_decay": 2e-4}}
    assert json.loads(json.dumps(compared)) == compared


@pytest.mark.parametrize("option", [("lr", 0.2), ("mixup", True), ("momentum", 0.8), ("eval_every", 2)])
def test_hashes_change_with_what_is_trained(tmp_path, option):
    before = {run.name: run.hash for run in planned(written(tmp_path))}
    after = {run.name: run.hash for run in planned(written(tmp_path, options=OPTIONS | dict([option])))}
    assert before.keys() == after.keys() and not set(before.values()) & set(after.values())
    assert len(set(before.values())) == 4  # of every arm and seed another


@pytest.mark.parametrize(
    "option", [("data_path", "/elsewhere"), ("workers", 0), ("device", "cpu"), ("momentum", 0.9), ("diagnostics", 1)]
)
def test_hashes_do_not_change_with_paths_and_defaults(tmp_path, option):
    before = {run.name: run.hash for run in planned(written(tmp_path))}
    assert {run.name: run.hash for run in planned(written(tmp_path, options=OPTIONS | dict([option])))} == before
    assert {run.name: run.hash for run in planned(written(tmp_path, "other"), home="elsewhere")} == before
    assert {run.name: run.hash for run in planned(written(tmp_path), *map(str, option))} == before


def test_the_hash_of_a_fork_is_of_its_parent_and_its_epoch_too(tmp_path):
    def late(epoch, **options):
        arms = {"plain": options, "late": {"fork": {"arm": "plain", "epoch": epoch}, "lr_steps": [8, 9], "lr": 0.1}}
        return planned(written(tmp_path, options=OPTIONS | {"num_epochs": 3}, arms=arms))[1].hash

    assert len({late(1), late(2), late(1, lr=0.2)}) == 3 and late(1) == late(1)


@pytest.mark.parametrize("path", sorted((ROOT / "config/sweeps").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_sweep_of_the_repository_can_be_planned(path):
    runs = planned(path)
    assert len({run.name for run in runs}) == len({run.hash for run in runs}) == len(runs) > 1
    arms = read_sweep(path).arms
    assert {run.arm for run in runs} == set(arms) and all(run.arm in "".join(names(runs)) for run in runs)


# ---------------------------------------------------------------------------------------------------------------------
# Refusals

FORK = {"arm": "plain", "epoch": 1}
REFUSED = {
    "unknown key 'arm'; the keys are arms, cfg, options": {"arm": {}},
    "arms: {} must be a mapping, {name: value, ...}, of one entry": {"arms": {}},
    "arms: plain: cfg is missing, here and in the sweep": {"cfg": None},
    "nowhere.yaml: no such configuration file": {"cfg": "nowhere.yaml"},
    "tiny: a: unknown key 'lrr'; the nearest known one is 'lr'": {"arms": {"a": {"lrr": 1}}},
    "tiny: a: loss": {"arms": {"a": {"loss": "arbb"}}},
    "disagree; keep one": {"arms": {"a": {"arbloss": True, "loss": "ce"}}},
    "arms: a: 3 must be a mapping of options": {"arms": {"a": 3}},
    "'a.b' must be a name of letters": {"arms": {"a.b": {}}},
    "a: seed is set for every run by the sweep itself; give seeds": {"arms": {"a": {"seed": 1}}},
    "options: seed is set for every run": {"options": {"seed": 1}},
    "seeds: 3 must be a list of different whole numbers >= 0, such as [0, 1, 2]": {"seeds": 3},
    "seeds: [1, 1] must be a list of different whole numbers": {"seeds": [1, 1]},
    "arms: a: seeds: [] must be a list": {"arms": {"a": {"seeds": []}}},
    "seeds: [-1] must be a list of different whole numbers >= 0": {"seeds": [-1]},
    "subset_seeds: [True] must be a list of different whole numbers": {"subset_seeds": [True]},
    "axes: lr: [] must be a list of values": {"axes": {"lr": []}},
    "axes: seed is set for every run by the sweep itself; give seeds": {"axes": {"seed": [1]}},
    "axes: arbloss: a switch of the originals": {"axes": {"arbloss": [True]}},
    "axes: lr: 1 must be a list of values": {"axes": {"lr": 1}},
    "axes: imb_factor: value: 100 must lie in (0, 1]": {"axes": {"imb_factor": [100]}},
    "'1e-1' is there twice": {"axes": {"imb_factor": [0.1, "1e-1"]}},
    "a: lr is an axis already": {"axes": {"lr": [1]}, "arms": {"a": {"lr": 2}}},
    "'nobody' is compared and is no arm; there are plain, arb": {"against": "nobody"},
    "pairs: a pair: ['arb', 'arb'] must be [arm, another arm]": {"pairs": [["arb", "arb"]]},
    "'arb.worst': a term is an arm, or arm.last or arm.": {"pairs": [["arb.worst", "arb"]]},
    "'x' is compared and is no arm": {"claims": {"c": {"arm": "x", "published": 1}}},
    "claims: c: published is missing; the keys are arm, published, at": {"claims": {"c": {"arm": "arb"}}},
    "claims: c: published: 'high' must be a number": {"claims": {"c": {"arm": "arb", "published": "high"}}},
    "c: published: [9, 1] must be a number or [low": {"claims": {"c": {"arm": "arb", "published": [9, 1]}}},
    "claims: c: pair: ['arb'] must be [arm, another arm]": {"claims": {"c": {"pair": ["arb"], "at_least": 1}}},
    "c: within: 0 must be": {"claims": {"c": {"pair": ["arb", "plain"], "within": 0}}},
    "claims: c: at: {'lr': 1} must be {axis: one": {"claims": {"c": {"arm": "arb", "published": 1, "at": {"lr": 1}}}},
    "'x' is compared and is no arm; there are plain, arb": {"waterfall": WATERFALL | {"steps": {"s": {"x": 1}}}},
    "waterfall: end: 'worst' must be one of last, cross_fitted, best, val": {"waterfall": WATERFALL | {"end": "worst"}},
    "waterfall: steps: {} must be a mapping": {"waterfall": WATERFALL | {"steps": {}}},
    "waterfall: published: 'x' must be a number": {"waterfall": WATERFALL | {"published": "x"}},
    "choose: True needs val_per_class above 0": {"choose": True},
    "pairs: a pair: [1, 'arb'] must be text": {"pairs": [[1, "arb"]]},
    "claims: c: published: 1000": {"claims": {"c": {"arm": "arb", "published": 10**3000}}},
    "'plain.best' is compared and is no arm; there are plain, arb, late": {
        "waterfall": WATERFALL | {"start": "plain.best"},
        "arms": ARMS | LATE,
    },
    "plain.val needs val_per_class above 0, and plain has none": {"pairs": [["plain.val", "arb.val"]]},
    "the measure ema needs ema above 0, and arb has none": {"pairs": [["arb.ema", "plain"]]},
    "seeds: [1, 1, ": {"seeds": [1] * 2000},
    "choose: 'yes' must be True or False": {"choose": "yes"},
    "fork: arm: 'plain' must be an arm above (there is none)": {"arms": {"late": {"fork": FORK}, "plain": {}}},
    "fork: epoch is missing; the keys are arm, epoch": {"arms": {**ARMS, "late": {"fork": {"arm": "plain"}}}},
    "fork: epoch: 1.5 must be a whole number": {"arms": {**ARMS, "late": {"fork": FORK | {"epoch": 1.5}}}},
    "late: fork: epoch 2 must lie in": {"arms": {**ARMS, "late": {"fork": FORK | {"epoch": 2}}}},
    "late: seed 7 would fork a run of plain that the sweep does not have": {
        "arms": {**ARMS, "late": {"fork": FORK, "seeds": [7]}}
    },
    "its imb_factor is another": {"arms": {**ARMS, "late": {"fork": FORK, "imb_factor": 0.1}}},
    "c: fork: epoch 2 must lie in the 5 epochs of b (after its own 3)": {
        "options": OPTIONS | {"num_epochs": 5},
        "arms": {"plain": {}, "b": {"fork": FORK | {"epoch": 3}}, "c": {"fork": {"arm": "b", "epoch": 2}}},
    },
    "late: a fork keeps its parent's data, network and optimizer, and its nc_within is another": {
        "arms": {"plain": {}, "late": {"fork": FORK, "nc_within": 0.01}}
    },
    "its use of moving class means (nc_means, nc_dual, spa) is another": {
        "arms": {"plain": {}, "late": {"fork": FORK, "spa": "proj"}}
    },
    "its optimizer is another": {"arms": {"plain": {}, "late": {"fork": FORK, "optimizer": "adamw"}}},
    "two runs would be called plain_data_patha-b_seed0": {"axes": {"data_path": ["a/b", "a-b"]}},
}


@pytest.mark.parametrize(("said", "changes"), REFUSED.items(), ids=REFUSED)
def test_a_wrong_sweep_is_refused_in_one_line(said, changes, tmp_path, capsys):
    result = failure(capsys, main, written(tmp_path, **changes), "--save_dir", tmp_path / "saved")
    assert (result.code, len(result.lines)) == (2, 1), result.said
    assert said in result.said and result.said.startswith("error: ") and len(result.said) < 1000
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("arms: {a: {}, a: {lr: 1}}", "line 1: a is given twice; keep one"),
        ("arms:\n  a: {lr: 1}\n  b: {lr: 1, lr: 2}", "line 3: lr is given twice; keep one"),
        ("", "None must be a mapping of arms, cfg, options"),
        (f"cfg: {DIGITS}\narms: &a {{x: *a}}", "x: unknown key 'x'"),
        (f"cfg: {DIGITS}\narms: {{a: &a {{lr: *a}}}}", "a: lr: {"),
        (LAUGHS, "must be a list of different whole numbers >= 0"),
        ("arms: {a: 2026-99-99}", "cannot be read"),
    ],
)
def test_files_that_are_no_sweeps_are_refused(text, said, tmp_path, capsys):
    (tmp_path / "x.yaml").write_text(text)
    result = failure(capsys, main, tmp_path / "x.yaml")
    assert (result.code, len(result.lines)) == (2, 1) and said in result.said
    assert "error: x: " in result.said or "x.yaml" in result.said
    assert len(result.said) < 2000


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--jobs", "0"], "must be a whole number above 0, not '0'"),
        (["--minutes", "nan"], "must be a number above 0, not 'nan'"),
        (["--nonsense"], "usage: python -m utils.sweep SWEEP.yaml"),
        (["lr"], "options come in pairs, such as 'data_path D'; 'lr' stands alone"),
        (["seed", "3"], "command line: seed is set for every run by the sweep itself"),
        (["imb_factor", "0.1"], "command line: imb_factor is set for every run by the sweep itself"),
        (["loss", "ce"], "command line: loss is what plain and arb differ in"),
        (["arbloss", "True"], "arbloss is a switch of the originals; give the option that it stands for"),
        (["momentumm", "1"], "unknown key 'momentumm'; the nearest known one is 'momentum'"),
        (["--publish", "lr", "1"], "--publish takes no options"),
        (["--publish"], "only sweeps in config/sweeps are published"),
    ],
)
def test_a_wrong_command_line_is_refused_in_one_line(arguments, said, tmp_path, capsys):
    path = written(tmp_path, axes={"imb_factor": [0.1, 0.05]})
    result = failure(capsys, main, path, "--save_dir", tmp_path / "saved", *arguments)
    assert (result.code, len(result.lines)) == (2, 1) and said in result.said
    assert not (tmp_path / "saved").exists()


def test_a_folder_that_cannot_hold_the_sweep_is_named(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    result = failure(capsys, main, written(tmp_path), "--save_dir", tmp_path / "file")
    assert (result.code, len(result.lines)) == (2, 1) and str(tmp_path / "file") in result.said
    for name in ("none", "n" * 300):
        missing = failure(capsys, main, tmp_path / f"{name}.yaml")
        assert (missing.code, len(missing.lines)) == (2, 1) and f"{name}.yaml: no such sweep" in missing.said
    nothing = failure(capsys, main)
    assert (nothing.code, len(nothing.lines)) == (2, 1) and "which sweep? (usage: python" in nothing.said
