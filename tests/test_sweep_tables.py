"""What is said of a sweep's results, from results made by hand; and what the repository has published."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from tests.conftest import ROOT
from utils.config import OPTIONS
from utils.errors import InputError
from utils.sweep import results as sweep
from utils.sweep.contrasts import contrast, pairs, values, waterfall
from utils.sweep.intervals import detectable
from utils.sweep.plan import plan
from utils.sweep.spec import read_sweep
from utils.sweep.tables import (
    arm_table,
    choice,
    claims,
    fill_page,
    latex,
    markdown,
    pair_table,
    places,
    tables,
    waterfall_table,
)

FIELDS = {
    *("run", "arm", "axes", "seed", "subset_seed", "hash", "options", "forked", "commit", "device", "cpu", "threads"),
    *("processes", "versions", "data", "starts", "epochs", "seconds", "last", "cross_fitted", "best"),
}
NONE_COMMON = {"none": [70.0, 71.0, 72.5], "both": [75.0, 76.5, 77.0]}


def row(arm, seed, top1, axes=None, **changes):
    measured = {"top1": top1, "many": 90.0, "medium": 60.0, "few": 30.0, "ece": 5.0, "epochs": [199]}
    commit = changes.get("commit", "f" * 40)
    origin = {"commit": commit, "device": "cpu", "cpu": "a processor", "threads": 1, "processes": 1}
    return {
        **{"run": f"{arm}_seed{seed}", "arm": arm, "axes": axes or {}, "seed": seed, "subset_seed": 0, "hash": "0"},
        **{"options": {}, "forked": None, **origin, "versions": {"torch": "2.6"}, "data": "images"},
        "starts": [{"epoch": 0, "step": 0, "commit": commit, "date": ""}],
        **{"epochs": 200, "seconds": 1800.0, "last": measured},
        **{"cross_fitted": {**measured, "top1": top1 + 0.25}, "best": {**measured, "top1": top1 + 0.5}, **changes},
    }


def results(rows, **changes):
    """``rows``: arm -> top-1 by seed, or rows."""
    if isinstance(rows, dict):
        rows = [row(arm, seed, top1) for arm, found in rows.items() for seed, top1 in enumerate(found)]
    arms = list(dict.fromkeys(one["arm"] for one in rows))
    seeds = {arm: sorted({one["seed"] for one in rows if one["arm"] == arm}) for arm in arms}
    return {
        **{"sweep": "by_hand", "images": "", "arms": arms, "seeds": seeds, "subset_seeds": [0], "axes": {}},
        **{"against": arms[0], "pairs": [], "claims": {}, "waterfall": {}, "choose": False},
        **{"planned": len(rows), "failed": {}, "overridden": {}, "defaults": {}, "runs": rows, **changes},
    }


# ---------------------------------------------------------------------------------------------------------------------
# Pairs


def test_a_row_has_mean_deviation_number_and_interval():
    found = arm_table(results(NONE_COMMON), {})
    assert found.head[:4] == ["arm", "n", "top-1, last epoch", "95 % interval"]
    for (arm, top1), line in zip(NONE_COMMON.items(), found.rows, strict=True):
        low, high = stats.ttest_1samp(top1, 0).confidence_interval(0.95)
        assert line[:3] == [arm, "3", f"{np.mean(top1):.2f} ± {np.std(top1, ddof=1):.2f}"]
        assert line[3] == f"[{low:.2f}, {high:.2f}]"
        for cell, more in zip(line[4:6], (0.25, 0.5), strict=True):
            assert cell.startswith(f"{np.mean(top1) + more:.2f} ±")
        assert line[6:] == ["90.00 ± 0.00", "60.00 ± 0.00", "30.00 ± 0.00", "5.00 ± 0.00"]
    assert not found.bold


def test_missing_groups_and_single_runs_are_dashes():
    one = row("none", 0, 70.0)
    del one["last"]["few"]
    (line,) = arm_table(results([one]), {}).rows
    assert line[:4] == ["none", "1", "70.00", "-"] and line[8] == "-"


def test_two_arms_are_compared_by_their_paired_difference():
    (line,) = pair_table(results(NONE_COMMON), {}).rows
    test = stats.ttest_rel(NONE_COMMON["both"], NONE_COMMON["none"])
    low, high = test.confidence_interval(0.95)
    assert line[:4] == ["both - none", "3", f"{5 + 0:+.2f}", f"[{low:+.2f}, {high:+.2f}]"]
    deviation = np.std(np.subtract(NONE_COMMON["both"], NONE_COMMON["none"]), ddof=1)
    assert line[4:] == [f"{value:.2f}" for value in (deviation, *(detectable(deviation, n) for n in (3, 5, 10)))]


def test_pairs_are_of_one_seed_one_subset_seed_and_the_same_images():
    def paired(*rows):
        return contrast(results(list(rows)), {"both": 1, "none": -1}, {})

    rows = [row("none", seed, 70.0 + seed) for seed in (0, 1, 2, 5)] + [row("both", s, 80.0 + 2 * s) for s in (5, 2, 7)]
    assert paired(*rows) == {(2, 0): 84.0 - 72.0, (5, 0): 90.0 - 75.0}
    rows = [row("none", 0, 70.0, subset_seed=s) for s in (0, 1)] + [row("both", s, 71.0, subset_seed=1) for s in (0, 1)]
    assert paired(*rows) == {(0, 1): 1.0}
    assert values(results(rows), "none", {}) == {(0, 0): 70.0, (0, 1): 70.0}
    rows = [row("none", 0, 70.0), row("none", 1, 70.0), row("both", 0, 71.0), row("both", 1, 75.0, data="others")]
    assert paired(*rows) == {(0, 0): 1.0}
    assert arm_table(results(rows), {}).rows[1][1] == "2"  # a mean is of all
    rows = [one | {"data": ""} for one in rows]  # of an older version
    assert pair_table(results(rows), {}) is None and len(arm_table(results(rows), {}).rows) == 2


def test_pairs_are_formed_within_a_point_of_the_grid():
    axes = {"imb_factor": [0.1, 0.01]}
    cells = (("none", 0.1, 80), ("none", 0.01, 70), ("both", 0.01, 74))
    found = results([row(arm, 0, top1, {"imb_factor": factor}) for arm, factor, top1 in cells], axes=axes)
    assert pair_table(found, {"imb_factor": 0.1}) is None
    assert pair_table(found, {"imb_factor": 0.01}).rows == [["both - none", "1", "+4.00", *"-----"]]
    captions = [table.caption for table in tables(found)]
    for caption, factor in zip(captions, (0.1, 0.01, 0.01), strict=True):
        assert f", imb_factor {factor}" in caption


def test_every_arm_is_compared_with_one_and_a_pair_is_there_once():
    found = results({"a": [1.0], "b": [2.0], "c": [3.0]}, against="b", pairs=[["c", "a"], ["c", "b"]])
    assert pairs(found) == [("a", "b"), ("c", "b"), ("c", "a")]


# Differences whose intervals end a little above, at, and below 0: mean 1, and n = 2 has t = 12.706.
@pytest.mark.parametrize(
    ("differences", "bold"),
    [
        ([0.93, 1.07], True),
        ([0.92, 1.08], False),
        ([-0.93, -1.07], True),
        ([1.0, 1.0], False),  # alike by chance: no deviation, and so no interval to speak of
        ([0.0, 0.0], False),
        ([5.0], False),
    ],
)
def test_a_difference_is_bold_only_where_its_interval_excludes_zero(differences, bold):
    found = results({"none": [70.0] * len(differences), "both": [70 + d for d in differences]})
    assert pair_table(found, {}).bold == ({(0, 0), (0, 2), (0, 3)} if bold else set())
    assert markdown(found).count("**") == 6 * bold
    assert latex(found).count(r"\textbf") == 3 * bold


# ---------------------------------------------------------------------------------------------------------------------
# Claims


def claimed(rows, **claim):
    found = results(rows, claims={"the claim": claim})
    (line,) = claims(found)
    assert line.startswith("the claim: ")
    return line.removeprefix("the claim: ")


def test_reproduced_means_that_the_figure_lies_in_the_prediction_interval():
    low, high = 70.5 - 12.7062047 * 0.7071068 * 1.2247449, 70.5 + 12.7062047 * 0.7071068 * 1.2247449
    for published, verdict in ((low + 0.001, "yes"), (low - 0.001, "no"), (high - 0.001, "yes"), (high + 0.001, "no")):
        said = claimed({"a": [70.0, 71.0]}, arm="a", published=published)
        assert said.startswith(f"{verdict} ([{low:.2f}, {high:.2f}], 2 runs; rule: ")
    assert claimed({"a": [70.0, 70.0]}, arm="a", published=70.0).startswith("yes")


def test_a_published_range_is_reproduced_where_any_of_it_is():
    rows = {"a": [70.0, 70.2, 70.1]}
    for published, verdict in (([60, 69], "no"), ([60, 69.9], "yes"), ([70.3, 75], "yes"), ([72, 73], "no")):
        assert claimed(rows, arm="a", published=published).startswith(verdict), published
    assert "one of 60 to 69.9 lies in" in claimed(rows, arm="a", published=[60, 69.9])


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ([0.5 - 1 / 64, 0.5, 0.5 + 1 / 64], "yes"),  # exactly at_least
        ([0.49, 0.5, 0.5], "no"),  # certain, and too small
        ([0.4, 1.0, 2.0], "no"),  # large enough, and uncertain
        ([-2.0, -2.1, -2.0], "no"),  # certain, in the other direction
        ([3.0], "not decided"),
    ],
)
def test_a_difference_matters_where_it_is_certain_and_large_enough(differences, verdict):
    rows = {"a": [64.0] * len(differences), "b": [64.0 + difference for difference in differences]}
    said = claimed(rows, pair=["b", "a"], at_least=0.5)
    assert said.split(" (")[0] == verdict
    assert "the 95 % interval of b - a excludes 0 and the mean is at least 0.5 points" in said


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ([0.2, -0.3, 0.1], "yes"),
        ([0.4, -0.5, 0.4], "yes"),  # the 95 % interval would not lie within it
        ([0.5, -0.6, 0.4], "not shown"),  # uncertain
        ([1.2, 1.3, 1.2], "not shown"),  # certain, and too large
        ([0.0, 0.0, 0.0], "not shown"),  # alike by chance
        ([0.1], "not decided"),
    ],
)
def test_two_arms_are_equivalent_where_the_90_percent_interval_lies_within_the_margin(differences, verdict):
    rows = {"a": [64.0] * len(differences), "b": [64.0 + difference for difference in differences]}
    said = claimed(rows, pair=["b", "a"], within=1.0)
    assert said.split(" (")[0] == verdict
    assert "rule: the 90 % interval of b - a lies between -1 and +1" in said
    if len(differences) > 1:
        low, high = stats.ttest_1samp(differences, 0).confidence_interval(0.9)
        assert f"[{low:+.2f}, {high:+.2f}], 3 pairs" in said or len(set(differences)) == 1


CLAIMS = {"c": {"arm": "b", "published": 70.0}, "d": {"pair": ["a", "b"], "at_least": 0.5}}


def test_a_claim_on_too_few_runs_is_not_decided():
    assert claimed({"a": [70.0]}, arm="a", published=70.0).startswith("not decided (1 run; ")
    found = results({"a": [70.0, 71.0]}, claims=CLAIMS)
    found["seeds"]["b"] = [0, 1]
    assert [line[:14] for line in claims(found)] == ["c: not decided", "d: not decided"]


def test_a_verdict_on_less_than_was_planned_says_so():
    found = results({"a": [70.0, 71.0], "b": [70.0, 71.0]}, claims=CLAIMS)
    assert not any("so far" in line for line in claims(found))
    found["seeds"] = {"a": [0, 1, 2], "b": [0, 1, 2, 3]}
    for line, said in zip(claims(found), ("only 2 of 4 runs so far", "only 2 of 3 pairs so far"), strict=True):
        assert said in line
    found["subset_seeds"] = [0, 1]
    assert "only 2 of 8 runs so far" in claims(found)[0]


def test_a_claim_of_one_point_of_the_grid_is_made_there_alone():
    axes = {"imb_factor": [0.1, 0.01]}
    rows = [row("a", seed, 60.0 + seed, {"imb_factor": factor}) for factor in (0.1, 0.01) for seed in (0, 1)]
    claim = {"arm": "a", "published": 60.0}
    found = results(rows, axes=axes, claims={"here": {**claim, "at": {"imb_factor": 0.01}}, "everywhere": claim})
    assert [line.split(":")[0] for line in claims(found)] == [
        *("everywhere, imb_factor 0.1", "here, imb_factor 0.01", "everywhere, imb_factor 0.01"),
    ]


def test_held_out_images_choose_the_best_of_the_candidates():
    validated = ((arm, seed, val + seed) for arm, val in (("a", 60), ("b", 61)) for seed in (0, 1))
    rows = [row(arm, seed, 70.0 + seed, val={"top1": top1}) for arm, seed, top1 in validated]
    (line,) = choice(results(rows, choose=True))
    assert "held-out training images: b (61.50 ± 0.71, 2 seeds), out of 2 candidates" in line
    assert choice(results(rows)) == []
    (line,) = choice(results(NONE_COMMON, choose=True))  # nothing was held out
    assert line.endswith("not decided (0 of 3 seeds of all 2 candidates)")
    (line,) = choice(results(rows[:-1], choose=True, seeds={"a": [0, 1], "b": [0, 1]}))  # b's second seed is missing
    assert line.endswith("not decided (1 of 2 seeds of all 2 candidates)")
    assert "held-out" in arm_table(results(rows), {}).head


# ---------------------------------------------------------------------------------------------------------------------
# Waterfall

TOP1 = {
    "none": [70.0, 70.6, 69.8, 71.0],
    "prior": [78.0, 78.9, 77.7],
    "mixup": [72.0, 73.0, 71.7, 74.0],
    "both": [80.0, 82.1, 79.9],
}
PLAN = {
    "start": "none",
    "steps": {
        "prior": {"prior": 1.0, "none": -1.0},
        "mixup": {"mixup": 1.0, "none": -1.0},
        "half of it": {"mixup": 0.5, "none": -0.5},
        "interaction": {"both": 1.0, "prior": -1.0, "mixup": -1.0, "none": 1.0},
        "selection": {"both.best": 1.0, "both": -1.0},
    },
    "end": "best",
    "published": 83.3,
}


def test_a_waterfall_adds_up_and_its_steps_have_the_intervals_of_their_contrasts():
    found = waterfall(results(TOP1, waterfall=PLAN), {})
    names = ["none", "prior", "mixup", "half of it", "interaction", "selection", "remainder"]
    assert [bar.name for bar in found.bars()] == [*names, "both, best on the test set"]
    assert {bar.change.count for bar in found.bars()} == {3} and found.missing == []  # seeds that all have
    none, prior, mixup, both = (np.array(TOP1[arm][:3]) for arm in TOP1)
    expected = [none, prior - none, mixup - none, (mixup - none) / 2, both - prior - mixup + none, 0 * both + 0.5]
    expected += [both + 0.5 - sum(expected), both + 0.5]
    for bar, each in zip(found.bars(), expected, strict=True):
        assert bar.change.mean == pytest.approx(each.mean(), abs=1e-9)
        if each.std() > 1e-9:
            low, high = stats.ttest_1samp(each, 0).confidence_interval(0.95)
            assert (bar.change.low, bar.change.high) == pytest.approx((low, high), abs=1e-9)


def test_steps_that_were_not_run_are_named_and_left_out():
    found = results({arm: top1 for arm, top1 in TOP1.items() if arm != "both"}, waterfall=PLAN)
    steps = waterfall(found, {})
    assert [bar.name for bar in steps.steps] == ["prior", "mixup", "half of it", "remainder"]
    assert steps.missing == ["interaction", "selection"]
    assert steps.end.name == "prior, best on the test set"
    assert sum(bar.change.mean for bar in steps.bars()[:-1]) == pytest.approx(steps.end.change.mean, abs=1e-10)
    shown = waterfall_table(found, {}).rows
    missing = [[name, "too few runs", "-"] for name in ("interaction", "selection")]
    assert shown[-3:] == [*missing, ["published", "83.3", "-"]]
    assert shown[0][0] == "none" and not shown[0][1].startswith("+") and shown[1][1].startswith("+")


def test_a_waterfall_of_nothing_is_none():
    for arms in ({"none": [70.0]}, {"prior": [70.0], "mixup": [71.0]}, {"mixup": [70.0]}):
        assert waterfall(results(arms, waterfall=PLAN), {}) is None
    assert waterfall(results(TOP1, waterfall=PLAN | {"end": "val"}), {}) is None  # which nobody measured
    apart = results([row("none", 0, 70.0), row("prior", 1, 75.0)], waterfall=PLAN)
    assert waterfall(apart, {}) is None and waterfall_table(apart, {}) is None
    assert waterfall_table(results(TOP1), {}) is None


def test_a_waterfall_is_of_seeds_whose_runs_have_the_same_images():
    """In every one of its bars, or it would not add up."""
    rows = [row(arm, seed, top1) for arm, found in TOP1.items() for seed, top1 in enumerate(found)]
    rows = [one | {"data": "others"} if (one["arm"], one["seed"]) == ("both", 1) else one for one in rows]
    found = waterfall(results(rows, waterfall=PLAN), {})
    assert {bar.change.count for bar in found.bars()} == {2}
    assert found.start.change.mean == pytest.approx((TOP1["none"][0] + TOP1["none"][2]) / 2)
    assert sum(bar.change.mean for bar in found.bars()[:-1]) == pytest.approx(found.end.change.mean, abs=1e-10)
    strangers = [one | {"data": one["arm"]} for one in rows]
    assert waterfall(results(strangers, waterfall=PLAN), {}) is None


def test_the_name_of_a_step_is_free():
    plan = {"start": "none", "steps": {"start": {"prior": 1.0, "none": -1.0}}, "end": "last"}
    found = waterfall(results(TOP1, waterfall=plan), {})
    assert [bar.name for bar in found.bars()] == ["none", "start", "remainder", "both, last epoch"]
    assert found.start.change.mean == pytest.approx(np.mean(TOP1["none"][:3]))


def test_the_end_is_the_best_of_all_arms_that_have_the_seeds():
    plan = {"start": "none", "steps": {"prior": {"prior": 1.0, "none": -1.0}}, "end": "last"}
    rows = TOP1 | {"better": [90.0, 91.0, 92.0], "best of two": [99.0, 99.0]}
    found = waterfall(results(rows, waterfall=plan), {})
    assert found.end.name == "better, last epoch" and found.tried == 5
    assert found.end.change.mean == 91.0 and {bar.change.count for bar in found.bars()} == {3}
    assert found.steps[-1].change.mean == pytest.approx(91.0 - np.mean(TOP1["prior"]))
    assert "the best of 5 arms" in waterfall_table(results(rows, waterfall=plan), {}).caption


def test_a_step_of_too_few_seeds_is_missing_and_takes_no_interval_from_the_others():
    rows = TOP1 | {"both": TOP1["both"][:1]}
    found = waterfall(results(rows, waterfall=PLAN), {})
    assert found.missing == ["interaction", "selection"]
    assert {bar.change.count for bar in found.bars()} == {3} and found.end.name.startswith("prior")
    alone = waterfall(results({arm: top1[:1] for arm, top1 in TOP1.items()}, waterfall=PLAN), {})
    assert alone.missing == [] and {bar.change.count for bar in alone.bars()} == {1}


def test_runs_of_one_cut_are_not_independent_where_there_are_several():
    """Five seeds on each of two cuts, whose differences are 0.3 and 1.0: two values, and no ten."""
    rows = [
        row(arm, seed, 70.0 + seed + more * (1.0 if cut else 0.3), subset_seed=cut)
        for arm, more in (("none", 0), ("both", 1))
        for seed in range(5)
        for cut in (0, 7)
    ]
    found = results(rows, subset_seeds=[0, 7])
    (line,) = pair_table(found, {}).rows
    low, high = stats.ttest_1samp([0.3, 1.0], 0).confidence_interval(0.95)
    assert line[:5] == ["both - none", "2", "+0.65", f"[{low:+.2f}, {high:+.2f}]", "0.49"]
    table = arm_table(found, {})
    assert table.rows[0][1] == "2" and "over n cuts" in table.caption


# ---------------------------------------------------------------------------------------------------------------------
# On paper


def everything():
    plan = PLAN | {"steps": {**PLAN["steps"], r"50 % | of_it & {more} \ ~^ #1 $x$ <b>": {"mixup": 1.0, "none": -1.0}}}
    claim = {"a | b": {"pair": ["both", "none"], "at_least": 0.5}}
    axes = {"imb_factor": [0.1, 0.01]}
    rows = [
        row(arm, seed, top1, {"imb_factor": factor}, val={"top1": top1})
        for factor in axes["imb_factor"]
        for arm, found in TOP1.items()
        for seed, top1 in enumerate(found)
    ]
    failed = {"x_seed0": "error: | no data"}
    return results(rows, waterfall=plan, claims=claim, axes=axes, choose=True, failed=failed, images="some | images")


def test_markdown_is_tables_whose_lines_have_as_many_columns():
    said = markdown(everything())
    blocks = [block.splitlines() for block in said.split("\n\n") if block.startswith("|")]
    assert len(blocks) == 2 * 3
    for head, rule, *lines in blocks:
        columns = [len(re.findall(r"(?<!\\)\|", line)) for line in (head, rule, *lines)]
        assert len(set(columns)) == 1 and columns[0] > 3
        assert set(rule) == set("| -:") and lines
        assert all(line.startswith("| ") and line.endswith(" |") for line in (head, *lines))
    assert "50 % \\| of_it" in said
    lists = [line for line in said.splitlines() if line.startswith("* ")]
    assert len(lists) == 2 + 2 + 1 and said.endswith("\n")


def test_markdown_says_where_numbers_come_from():
    rows = [row("a", 0, 70.0), row("a", 1, 70.0, device="NVIDIA H200", commit=f"{'e' * 40}-dirty")]
    rows.append(row("a", 2, 70.0, commit=""))
    said = markdown(results(rows, planned=5, images="the official images"))
    assert said.splitlines()[0] == (
        "Sweep `by_hand`: 3 of 5 runs, on the official images. Device: NVIDIA H200, a processor; torch 2.6; "
        "commit eeeeeeeeee-dirty, ffffffffff, unknown; 1.5 hours of training."
    )
    assert ", lr 0.5. Device:" in markdown(results(rows, overridden={"lr": 0.5}))


def test_epochs_of_which_nothing_is_recorded_are_named():
    late = [{"epoch": 19, "step": 3, "commit": "e" * 40, "date": ""}]
    rows = [row("a", 0, 70.0), row("a", 1, 70.0, starts=late), row("a", 2, 70.0, starts=[])]
    rows += [row("b", 0, 70.0, starts=late, forked={"run": "a_seed0", "epoch": 19})]
    said = [line for line in markdown(results(rows)).splitlines() if "are not known" in line]
    assert said == [
        "* a_seed1: commit and machine of epochs 0 to 18 are not known; starts were not recorded then",
        "* a_seed2: commit and machine of epochs 0 to 199 are not known; starts were not recorded then",
    ]


def test_no_run_at_all_makes_no_table():
    nothing = results([row("a", 0, 1.0)]) | {"runs": []}
    assert tables(nothing) == [] and latex(nothing) == ""
    assert markdown(nothing) == "Sweep `by_hand`: 0 of 1 runs. Device: -; torch -; commit -; 0.0 hours of training.\n"


def test_latex_is_balanced_and_escaped():
    said = latex(everything())
    assert said.count(r"\begin{table}") == said.count(r"\end{table}") == 6
    assert said.count(r"\begin{tabular}") == said.count(r"\end{tabular}") == 6
    for table in said.split(r"\begin{table}")[1:]:
        columns = len(re.search(r"\\begin\{tabular\}\{(\w+)\}", table)[1])
        body = [line for line in table.splitlines() if line.endswith(r" \\")]
        assert len(body) > 2
        assert all(len(re.findall(r"(?<!\\)&", line)) == columns - 1 for line in body)
    plain = re.sub(r"\\[%_&#${}]|\\text(backslash|asciitilde|asciicircum)\{\}|\$(\\pm|[-<>|])\$", "", said)
    assert not set(plain) & set("%#$~^±|<>")
    assert "_" not in plain and plain.count("{") == plain.count("}")
    escaped = r"50 \% $|$ of\_it \& \{more\} \textbackslash{} \textasciitilde{}\textasciicircum{} \#1 \$x\$ $<$b$>$"
    assert escaped in said
    assert "both $-$ none" in said and "[-" not in said


def test_a_line_of_latex_that_begins_with_a_bracket_is_no_option_of_the_line_above():
    plan = {"start": "none", "steps": {"[optional]": {"prior": 1.0, "none": -1.0}, "*": {"mixup": 1.0, "none": -1.0}}}
    lines = latex(results(TOP1, waterfall=plan | {"end": "last"})).splitlines()
    for name in ("[optional]", "*"):
        assert any(line.startswith(f"{{}}{name} & ") for line in lines)
    assert not any(line.startswith(("[", "*")) for line in lines)


@pytest.mark.skipif(not shutil.which("pdflatex"), reason="there is no TeX")
def test_latex_compiles(tmp_path):
    packages = r"\usepackage[utf8]{inputenc}\usepackage[T1]{fontenc}\usepackage{booktabs}"
    text = rf"\documentclass{{article}}{packages}\begin{{document}}{latex(everything())}\end{{document}}"
    (tmp_path / "table.tex").write_text(text)
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "table.tex"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)


# ---------------------------------------------------------------------------------------------------------------------
# On the page of the sweeps

PAGE = """# Title

Tables stand between `<!-- results of NAME -->` and `<!-- end of results -->`.

<!-- results of one -->
what was there
<!-- end of results -->
between \\1 \\g<name>
<!-- results of two-b -->
<!-- end of results -->
end
"""


def by_name(name):
    return results(NONE_COMMON, sweep=name)


def test_only_what_stands_between_markers_changes():
    filled = fill_page(PAGE, by_name)
    one, two = markdown(by_name("one")), markdown(by_name("two-b"))
    assert filled == PAGE.replace("what was there\n", f"\n{one}\n").replace("two-b -->\n", f"two-b -->\n\n{two}\n")
    assert fill_page(filled, by_name) == filled
    assert fill_page("no marker", by_name) == "no marker"
    assert fill_page(PAGE, lambda name: None) == PAGE.replace("what was there\n", "")  # nothing is published
    pictured = fill_page(PAGE, by_name, lambda name: [f"results/{name}_runs.png"])
    assert pictured == filled.replace(one, f"![one_runs](results/one_runs.png)\n\n{one}").replace(
        two, f"![two-b_runs](results/two-b_runs.png)\n\n{two}"
    )


@pytest.mark.parametrize(
    "wrong",
    [
        PAGE.replace("<!-- end of results -->\nbetween", "between"),  # or the text between would be lost
        PAGE + "<!-- results of three -->\n",
        PAGE + "<!-- end of results -->\n",
    ],
)
def test_a_marker_without_its_end_is_refused(wrong):
    with pytest.raises(InputError, match="one of these lines is missing"):
        fill_page(wrong, by_name)


def published():
    return sorted((ROOT / sweep.PUBLISHED).glob("*.json"))


def test_the_page_has_the_published_tables():
    """Byte for byte what the files beside the sweeps give."""
    page = (ROOT / sweep.PAGE).read_text(encoding="utf-8")
    assert sweep.filled_page() == page, "python -m utils.sweep ... --publish brings it up to date"
    assert {path.stem for path in published()} <= set(places(page))
    assert {place.removeprefix(sweep.ENGINE) for place in places(page)} <= {
        path.stem for path in (ROOT / sweep.SWEEPS).glob("*.yaml")
    }


def test_a_number_that_was_changed_by_hand_is_caught(tmp_path):
    """On the page, and in the file that it is made from."""
    stored = results(NONE_COMMON, sweep="quick_digits")
    file = tmp_path / sweep.PUBLISHED / "quick_digits.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(stored))
    page = fill_page(PAGE.replace("of one ", "of quick_digits ").replace("two-b", "quick_digits"), lambda _: stored)
    assert fill_page(page, lambda name: sweep.published(name, tmp_path)) == page
    wrong = page.replace("71.17 ± 1.26", "71.18 ± 1.26", 1)
    assert wrong != page and fill_page(wrong, lambda name: sweep.published(name, tmp_path)) == page
    stored["runs"][0]["last"]["top1"] += 0.02
    file.write_text(json.dumps(stored))
    assert fill_page(page, lambda name: sweep.published(name, tmp_path)) != page


def test_published_files_that_are_missing_or_damaged_are_named(tmp_path):
    folder = tmp_path / sweep.PUBLISHED
    folder.mkdir(parents=True)
    (folder / "cut.json").write_text('{"runs": [')
    (folder / "other.json").write_text("[]")
    whole = json.loads((ROOT / sweep.PUBLISHED / "quick_digits.json").read_text())
    (folder / "less.json").write_text(json.dumps({key: whole[key] for key in whole if key != "failed"}))
    for said in ("cut.json: cannot be read", "other.json: does not hold a sweep", "less.json: does not hold a sweep"):
        name = said.split(".")[0]
        with pytest.raises(InputError, match=said):
            sweep.published(name, tmp_path)
    assert sweep.published("none", tmp_path) is None


def check_published(path: Path, root: Path = ROOT) -> None:
    """What lies there is of a sweep as its file, the configurations and the defaults are today."""
    found, file = sweep.published(path.stem, root), root / "config/sweeps" / f"{path.stem}.yaml"
    assert file.is_file(), f"{path} belongs to no sweep"
    asked = read_sweep(file)
    planned = {run.name: run for run in plan(asked, Path("saved") / path.stem)}
    assert found["sweep"] == path.stem and found["planned"] == len(planned) and found["failed"] == {}
    assert found["arms"] == list(asked.arms) and found["axes"] == asked.axes
    assert {key: found[key] for key in asked.compared} == json.loads(json.dumps(asked.compared))
    for key, default in found["defaults"].items():
        assert OPTIONS[key].default == default, f"{path.name}: {key} had another default"
    assert found["runs"]
    for one in found["runs"]:
        assert one.keys() >= FIELDS, f"{one['run']}: {FIELDS - one.keys()} is missing"
        assert {"top1", "ece", "epochs"} <= one["last"].keys()
        assert one["hash"] == planned[one["run"]].hash, f"{one['run']} was of another configuration"
        assert one["epochs"] == planned[one["run"]].cfg.num_epochs and one["data"] and one["commit"]


def check_engine(path: Path, root: Path = ROOT) -> None:
    """The trainer's runs there are those that are published of the sweep, the usual loop's of its configuration."""
    name = path.stem.removeprefix(sweep.ENGINE)
    found, whole = sweep.published(path.stem, root), sweep.published(name, root)
    planned = plan(read_sweep(root / sweep.SWEEPS / f"{name}.yaml"), Path("saved"))
    hashes, (ours, theirs) = {run.hash for run in planned if run.arm == found["arms"][0]}, found["arms"]
    assert all(row in whole["runs"] for row in found["runs"] if row["arm"] == ours)
    assert all(row["hash"] in hashes for row in found["runs"] if row["arm"] == theirs)


@pytest.mark.parametrize("path", published(), ids=lambda path: path.stem)
def test_what_is_published_is_of_the_sweeps_as_they_are_today(path):
    (check_engine if path.stem.startswith(sweep.ENGINE) else check_published)(path)
