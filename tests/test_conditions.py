"""Conditions on analyses: what they can say, and the statistics behind their outcomes, against plain loops."""

from __future__ import annotations

import ast
import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from analysis_factory import make_analysis, make_full, two_groups
from scipy import stats

import collapse_probe.diagnosis
from collapse_probe.conditions import OnFinding, OnReading, check, parse, to_json, to_junit
from collapse_probe.conditions.estimates import Estimate, difference, estimates, mean
from collapse_probe.conditions.evidence import RISK, chance, holm, judged
from collapse_probe.diagnosis.codes import CODES, RESTS_ON
from collapse_probe.errors import UsageError
from collapse_probe.readings import DERIVED, READINGS
from collapse_probe.result import Analysis, Finding

IMAGES = 50
PAGE = Path(__file__).resolve().parents[1] / "docs" / "continuous_integration.md"


def analysis_with(values, errors=0.01, reading="head_diversity", images=IMAGES, **columns) -> Analysis:
    """An analysis whose layers have these values and standard errors of one reading."""
    analysis = make_analysis(layers=len(values))
    analysis.layers[reading] = values
    analysis.layers[f"{reading}_se"] = errors
    for name, numbers in columns.items():
        analysis.layers[f"{reading}{name}"] = numbers
    analysis.provenance["images"]["count"] = images
    return analysis


def status(analysis, condition, baseline=None):
    (outcome,) = check(analysis, [condition], baseline)
    assert outcome.condition == condition
    assert outcome.message
    return outcome.status


def finding(code, severity):
    return Finding(code, severity, f"Something about {code}.", "numbers", "cut-off", "ours", "")


# -- what can be said --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("attention-collapse", OnFinding("attention-collapse", "attention-collapse", "")),
        (" problem ", OnFinding("problem", "", "problem")),
        ("dead-heads : warning", OnFinding("dead-heads : warning", "dead-heads", "warning")),
        ("head_diversity<0.05", OnReading("head_diversity<0.05", "head_diversity", "", "<", 0.05, False)),
        ("max( entropy ) >= -1.5e-2", OnReading("max( entropy ) >= -1.5e-2", "entropy", "max", ">=", -0.015, False)),
        ("cka_to_previous>baseline", OnReading("cka_to_previous>baseline", "cka_to_previous", "", ">", 0.0, True)),
        ("entropy<=baseline - .5", OnReading("entropy<=baseline - .5", "entropy", "", "<=", -0.5, True)),
        ("mean(sink_share_patch)>baseline+1", OnReading("mean(sink_share_patch)>baseline+1", "sink_share_patch", "mean",
                                                        ">", 1.0, True)),
        ("similar_blocks>4", OnReading("similar_blocks>4", "similar_blocks", "", ">", 4.0, False)),
        ("nonfinite_tokens>0", OnReading("nonfinite_tokens>0", "nonfinite_tokens", "", ">", 0.0, False)),
        ("cka_absent>0.5", OnReading("cka_absent>0.5", "cka_absent", "", ">", 0.5, False)),
        ("entropy_se>0.01", OnReading("entropy_se>0.01", "entropy_se", "", ">", 0.01, False)),
    ],
)  # fmt: skip
def test_what_conditions_say(text, expected):
    assert parse(text) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "A condition is empty"),
        ("  \n", "A condition is empty"),
        (None, "A condition is text; got None"),
        (7, "A condition is text; got 7"),
        ("attention-colapse", "Did you mean attention-collapse? Codes: non-finite, "),
        ("head_diversity", "A reading needs a bound, for example head_diversity>0.5"),
        ("note", "Severities: warning, problem"),
        ("dead-heads:grave", "a severity is warning or problem; got 'grave'"),
        ("dead-heads:", "a severity is warning or problem; got ''"),
        ("nonsense>0.5", "there is no reading 'nonsense'"),
        ("head_divesity<0.05", "Did you mean head_diversity?"),
        ("kind>1", "there is no reading 'kind'"),
        ("nonsense_absent>1", "there is no reading 'nonsense_absent'"),
        ("median(entropy)>1", "median is not known. Use max, min, mean"),
        ("entropy>nan", "neither a finite number"),
        ("entropy>NaN", "neither a finite number"),
        ("entropy<inf", "neither a finite number"),
        ("entropy<-Infinity", "neither a finite number"),
        ("entropy>1e999", "too large to be a number"),
        ("entropy>baseline+1e999", "too large to be a number"),
        ("entropy>", "neither a finite number"),
        ("entropy>0,95", "with a decimal point"),
        ("entropy>1_000", "neither a finite number"),
        ("entropy>\u0661", "neither a finite number"),
        ("entropy>baseline+nan", "neither a finite number"),
        ("entropy>baseline*2", "neither a finite number"),
        ("entropy>entropy", "neither a finite number"),
        (">0.5", "is no condition"),
        ("0.1<entropy<0.5", "is no condition"),
        ("entropy=0.5", "is no condition"),
        ("entropy=>0.5", "is no condition"),
        ("max(entropy>0.5", "is no condition"),
        ("max(max(entropy))>0.5", "is no condition"),
        ("__import__('os')>1", "is no condition"),
        ("entropy>\x1b[31m", "neither a finite number"),
        ("max(similar_blocks)>4", "is of a whole group"),
        ("onset>4", "for example onset<12"),
        ("max(entropy)>baseline", "layer by layer, or by the mean"),
    ],
)
def test_what_is_no_condition(text, words):
    with pytest.raises(UsageError) as caught:
        parse(text)
    assert words in str(caught.value)
    assert "\x1b" not in str(caught.value)
    with pytest.raises(UsageError):
        check(make_analysis(), [text])


def test_every_reading_and_code_can_be_a_condition():
    for name in (*READINGS, "similar_blocks", *(f"{name}_se" for name in READINGS)):
        assert parse(f"{name}>0.5").reading == name
    for code in CODES:
        assert parse(code).code == code
    assert set(DERIVED) == {"similar_blocks", "onset"}


def test_the_codes_are_those_of_the_rules():
    """No rule makes a finding of a code that the list of codes does not hold, and each one in it is used."""
    folder = Path(collapse_probe.diagnosis.__file__).parent
    used = set()
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Finding":
                (code,) = (item.value for item in node.keywords if item.arg == "code")
                assert isinstance(code, ast.Attribute), f"{path.name}: {ast.unparse(code)}"
                assert code.value.id == "codes"
                used.add(getattr(collapse_probe.diagnosis.codes, code.attr))
    assert used == set(CODES)
    assert all(name in READINGS for readings in RESTS_ON.values() for name in readings)


# -- one value ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("freedom", "quantile"), [(1, 12.706), (7, 2.365), (49, 2.010), (math.inf, 1.960)])
def test_one_value_fails_beyond_students_t(freedom, quantile):
    """Quantiles from printed tables."""
    assert chance(quantile * 1.001, 1.0, freedom, False) < RISK
    assert chance(quantile * 0.999, 1.0, freedom, False) > RISK
    assert chance(-quantile, 1.0, freedom, False) > 1 - 1.01 * RISK


@pytest.mark.parametrize(
    ("distance", "error", "touching", "expected"),
    [
        (1.0, 0.0, False, 0.0), (-1.0, 0.0, False, 1.0), (0.0, 0.0, False, 1.0), (0.0, 0.0, True, 0.0),
        (1.0, math.nan, False, 1.0), (1.0, math.inf, False, 0.5), (math.inf, 1.0, False, 0.0),
        (-math.inf, 1.0, False, 1.0), (math.inf, math.inf, False, 1.0), (math.inf, math.nan, True, 1.0),
    ],
)  # fmt: skip
@pytest.mark.parametrize("freedom", [3.0, math.inf])
def test_values_without_errors_and_without_ends(distance, error, touching, expected, freedom):
    assert chance(distance, error, freedom, touching) == expected


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ("head_diversity<0.479", "passed"), ("head_diversity<0.481", "unclear"), ("head_diversity<0.5", "unclear"),
        ("head_diversity<0.519", "unclear"), ("head_diversity<0.521", "failed"), ("head_diversity>0.521", "passed"),
        ("head_diversity>0.519", "unclear"), ("head_diversity>0.479", "failed"),
    ],
)  # fmt: skip
def test_a_single_layer_by_its_interval(condition, expected):
    """0.5 with a standard error of 0.01 over 50 images: the 95 % interval is 0.480 to 0.520."""
    assert status(analysis_with([0.5]), condition) == expected


@pytest.mark.parametrize(
    ("condition", "expected"),
    [("head_diversity>0.5", "passed"), ("head_diversity>=0.5", "failed"), ("head_diversity<=0.5", "failed")],
)
def test_a_value_without_spread_is_compared_as_it_is(condition, expected):
    assert status(analysis_with([0.5], 0.0), condition) == expected


def test_few_images_need_more():
    """Three standard errors are beyond a bound for 50 images and not for 3, where t is 4.3."""
    assert status(analysis_with([0.53]), "head_diversity>0.5") == "failed"
    assert status(analysis_with([0.53], images=3), "head_diversity>0.5") == "unclear"
    unknown = analysis_with([0.53])
    del unknown.provenance["images"]
    assert status(unknown, "head_diversity>0.5") == "failed"


def test_the_rank_of_maps_is_measured_on_few_images():
    """The eight of the sample leave seven degrees of freedom, whatever the number of images: t is 2.36."""
    for images, error in ((1000, 1.0), (8, 1.0)):
        far, near = (analysis_with([10 + step], error, "effective_rank", images) for step in (2.4, 2.3))
        assert status(far, "effective_rank>10") == "failed"
        assert status(near, "effective_rank>10") == "unclear"


def test_an_interval_counts_with_the_end_that_faces_the_bound():
    lopsided = {"reading": "similarity_ratio", "_low": [0.40], "_high": [0.8]}
    analysis = analysis_with([0.5], math.nan, **lopsided)
    for bound, above, below in ((0.39, "failed", "passed"), (0.41, "unclear", "unclear"), (0.79, "unclear", "unclear"),
                                (0.81, "passed", "failed")):  # fmt: skip
        assert status(analysis, f"similarity_ratio>{bound}") == above
        assert status(analysis, f"similarity_ratio<{bound}") == below
    # An interval is preferred to a standard error, and stands in for it where there is none of it.
    assert status(analysis_with([0.5], 1e-6, **lopsided), "similarity_ratio>0.41") == "unclear"
    missing = {"reading": "similarity_ratio", "_low": [math.nan], "_high": [math.nan]}
    assert status(analysis_with([0.5], 0.01, **missing), "similarity_ratio>0.41") == "failed"


# -- many layers -------------------------------------------------------------------------------------------------------


def reference(values, errors, bound, sign, images, of_all):
    """What becomes of a condition, by critical values instead of chances, in plain loops."""
    count, freedom = len(values), images - 1
    ratios = [sign * (value - bound) / error for value, error in zip(values, errors, strict=True)]

    def some(numbers):
        """How many of the largest are beyond their critical value, one after the other, each less strict."""
        number = 0
        for place, ratio in enumerate(sorted(numbers, reverse=True)):
            if ratio < stats.t.ppf(1 - 0.025 / (count - place), freedom):
                break
            number += 1
        return number

    def every(numbers):
        return all(ratio >= stats.t.ppf(0.975, freedom) for ratio in numbers)

    negative = [-ratio for ratio in ratios]
    if of_all:
        return "failed" if every(ratios) else "passed" if some(negative) else "unclear"
    return "failed" if some(ratios) else "passed" if every(negative) else "unclear"


@pytest.mark.parametrize(
    ("form", "sign", "of_all"),
    [
        ("head_diversity>{}", 1, False), ("head_diversity<{}", -1, False), ("max(head_diversity)>{}", 1, False),
        ("min(head_diversity)<{}", -1, False), ("min(head_diversity)>{}", 1, True),
        ("max(head_diversity)<{}", -1, True),
    ],
)  # fmt: skip
def test_many_layers_against_plain_loops(form, sign, of_all):
    draw = np.random.default_rng(7)
    seen = set()
    for _ in range(40):
        layers, images = int(draw.integers(1, 9)), int(draw.integers(2, 40))
        values, errors = draw.normal(0.5, 0.02, layers), draw.uniform(0.001, 0.03, layers)
        bound = round(0.5 + draw.normal(0, 0.06), 4)
        expected = reference(values, errors, bound, sign, images, of_all)
        assert status(analysis_with(values, errors, images=images), form.format(bound)) == expected
        seen.add(expected)
    assert seen == {"failed", "unclear", "passed"}


def test_the_layers_that_are_beyond_are_those_of_holm():
    chances = [0.02, 0.001, 0.9, 0.006, 0.0125]
    # In order: 0.001 against 0.025/5, then 0.006 against 0.025/4; 0.0125 is more than 0.025/3.
    assert holm(chances) == [False, True, False, True, False]
    assert holm([]) == []
    assert judged([0.02, 0.02], [0.9, 0.9], True) == ("beyond", ["beyond", "beyond"])
    assert judged([0.02, 0.02], [0.9, 0.9], False) == ("unclear", ["unclear", "unclear"])
    assert judged([0.9, 0.9], [0.02, 0.02], False) == ("clear", ["clear", "clear"])
    assert judged([0.9, 0.9], [0.02, 0.02], True) == ("unclear", ["unclear", "unclear"])


def test_conditions_seldom_fail_where_no_layer_is_beyond():
    """Twelve layers exactly at the bound, with errors that are independent, or shared by all: in 2.5 % at most."""
    draw = np.random.default_rng(0)
    for shared in (0.0, 0.8, 1.0):
        common, own = draw.normal(size=(4000, 1)), draw.normal(size=(4000, 12))
        ratios = math.sqrt(shared) * common + math.sqrt(1 - shared) * own
        failed = np.mean([judged([chance(r, 1.0, math.inf, False) for r in row], [1.0] * 12, False)[0] == "beyond"
                          for row in ratios])  # fmt: skip
        assert failed <= 0.025 + 3 * math.sqrt(0.025 / 4000)
        assert failed > (0.015 if shared == 0 else 0.0005)


def test_the_mean_has_the_error_that_layers_may_share():
    values, errors = [0.50, 0.56], [0.01, 0.03]
    together = mean([Estimate(str(n), v, e, 2 * e, 5 + n) for n, (v, e) in enumerate(zip(values, errors, strict=True))])
    assert (together.value, together.below, together.above) == (pytest.approx(0.53), pytest.approx(0.02),
                                                                pytest.approx(0.04))  # fmt: skip
    assert together.freedom == 5
    analysis = analysis_with(values, errors)
    half = stats.t.ppf(0.975, IMAGES - 1) * 0.02
    assert status(analysis, f"mean(head_diversity)>{0.53 - 1.01 * half}") == "failed"
    assert status(analysis, f"mean(head_diversity)>{0.53 - 0.99 * half}") == "unclear"
    assert status(analysis, f"mean(head_diversity)>{0.53 + 1.01 * half}") == "passed"
    # Shared errors: the same noise in every layer. Its standard deviation in the mean is that of one layer.
    noise = np.random.default_rng(1).normal(size=20000)
    assert np.std(np.mean([errors[0] * noise, errors[1] * noise], axis=0)) == pytest.approx(together.below, rel=0.02)


def test_layers_without_a_value_do_not_count_and_layers_without_an_error_do_not_fail():
    analysis = analysis_with([math.nan, 0.9, 0.1], [math.nan, 0.01, math.nan])
    (outcome,) = check(analysis, ["head_diversity<0.5"])
    assert [item.place for item in outcome.comparisons] == list(analysis.layers.index[1:])
    assert outcome.status == "unclear"
    assert status(analysis, "head_diversity>0.5") == "failed"


# -- derived readings --------------------------------------------------------------------------------------------------


def with_derived(*entries):
    analysis = two_groups()
    for group, entry in zip(analysis.groups, entries, strict=False):
        group.derived = entry
    return analysis


def similar_blocks(value, low, high):
    return {"similar_blocks": {"value": value, "low": low, "high": high}}


@pytest.mark.parametrize(
    ("entry", "condition", "expected"),
    [
        ((6, 5.0, 7.0), "similar_blocks>4", "failed"),
        ((6, 4.0, 7.0), "similar_blocks>4", "unclear"),
        ((6, 4.0, 7.0), "similar_blocks>=4", "failed"),
        ((2, 1.0, 4.0), "similar_blocks>4", "passed"),
        ((2, 1.0, 4.0), "similar_blocks>=4", "unclear"),
        ((4, 4.0, 4.0), "similar_blocks>4", "passed"),
        ((4, 4.0, 4.0), "similar_blocks>=4", "failed"),
        ((3, 4.0, 5.0), "similar_blocks>3", "unclear"),
        ((2, 1.0, 3.0), "similar_blocks>4", "passed"),
        ((6, None, None), "similar_blocks>4", "not-measured"),
    ],
)
def test_the_number_of_similar_blocks(entry, condition, expected):
    assert status(with_derived(similar_blocks(*entry)), condition) == expected


def test_groups_are_many_as_layers_are():
    """An interval that just clears the bound does so for one group; of two, its end is moved out."""
    one, two = similar_blocks(6, 4.2, 8.0), similar_blocks(1, 1.0, 1.0)
    assert status(with_derived(one), "similar_blocks>4") == "failed"
    assert status(with_derived(one, two), "similar_blocks>4") == "unclear"
    assert check(with_derived(one, two), ["similar_blocks>4"])[0].comparisons[1].place == "group B"


@pytest.mark.parametrize(
    ("value", "low", "high", "share", "expected"),
    [
        (5, 4.0, 6.0, 1.0, "failed"),
        (5, 4.0, 9.0, 1.0, "unclear"),
        (5, 4.0, 6.0, 0.9, "unclear"),  # in one draw of ten there is no run at all
        (9, 9.0, 10.0, 0.99, "passed"),
        (None, None, None, 0.0, "passed"),
        (None, 4.0, 6.0, 0.01, "passed"),
        (None, 4.0, 6.0, 0.3, "unclear"),
        (None, None, None, None, "not-measured"),
        (5, None, None, None, "not-measured"),
    ],
)
def test_the_onset_may_be_nowhere(value, low, high, share, expected):
    entry = {"onset": {"value": value, "low": low, "high": high, "share": share}}
    assert status(with_derived(entry), "onset<8") == expected
    if share == 0.9:
        assert "group A 5 or none" in check(with_derived(entry), "onset<8")[0].message


# -- what is not there -------------------------------------------------------------------------------------------------


def test_what_was_not_measured_is_said():
    analysis = make_analysis()
    analysis.absent = [{"metric": "cka", "where": "stream S1", "reason": "fewer than four images"}]
    outcomes = check(
        analysis,
        ["cka_to_previous>0.9", "effective_rank<2", "similar_blocks>4", "nonfinite_tokens>0", "token-collapse"],
    )
    assert {outcome.status for outcome in outcomes} == {"not-measured"}
    assert "no layer has cka_to_previous, a reading of cka: fewer than four images" in outcomes[0].message
    assert "a reading of map_rank" in outcomes[1].message
    assert "no group has similar_blocks" in outcomes[2].message
    assert outcomes[3].message == "no layer has nonfinite_tokens"
    assert "no layer has token_similarity_typical" in outcomes[4].message


def test_a_reading_without_any_error_cannot_be_judged():
    (outcome,) = check(analysis_with([0.99], math.nan, images=1), ["head_diversity>0.5"])
    assert outcome.status == "not-measured"
    assert "has no standard error" in outcome.message
    assert status(analysis_with([math.nan]), "head_diversity>0.5") == "not-measured"
    assert status(analysis_with([math.inf]), "head_diversity>0.5") == "not-measured"


def test_counts_and_errors_are_compared_as_they_are():
    analysis = analysis_with([0.5, 0.5], [0.02, 0.03])
    analysis.layers["nonfinite_columns"] = [0, 3]
    for condition, expected in (
        ("nonfinite_columns>0", "failed"), ("nonfinite_columns>3", "passed"), ("nonfinite_columns>=3", "failed"),
        ("head_diversity_se>0.025", "failed"), ("head_diversity_se>0.03", "passed"),
    ):  # fmt: skip
        assert status(analysis, condition) == expected


# -- findings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("severity", "outcomes"),
    [
        ("note", ("failed", "passed", "passed", "passed", "passed")),
        ("warning", ("failed", "failed", "passed", "failed", "passed")),
        ("problem", ("failed", "failed", "failed", "failed", "failed")),
    ],
)
def test_findings_by_code_and_severity(severity, outcomes):
    analysis = make_analysis()
    analysis.findings = [finding("attention-collapse", severity), finding("attention-sinks", "note")]
    conditions = [
        "attention-collapse",
        "attention-collapse:warning",
        "attention-collapse:problem",
        "warning",
        "problem",
    ]
    found = check(analysis, conditions)
    assert tuple(item.status for item in found) == outcomes
    assert "Something about attention-collapse" in found[0].message
    assert status(analysis, "entropy-collapse") == "passed"


def test_a_finding_that_nothing_could_show_is_not_measured():
    analysis = make_analysis()
    del analysis.layers["normalized_entropy"]
    assert status(analysis, "entropy-collapse") == "not-measured"
    assert status(analysis, "untrained") == "passed"
    other_kind = make_analysis()
    other_kind.groups[0].kind = "class"  # which the verdict is not about
    assert status(other_kind, "entropy-collapse") == "not-measured"
    silent = make_analysis()
    silent.findings = []
    assert status(silent, "problem") == "not-measured"


# -- a baseline --------------------------------------------------------------------------------------------------------


def reference_difference(one, other, bound, sign, images):
    """The test of a single difference, in plain arithmetic."""
    ratio = sign * (one[0] - other[0] - bound) / math.sqrt(one[1] ** 2 + other[1] ** 2)
    critical = stats.t.ppf(0.975, min(images) - 1)
    return "failed" if ratio > critical else "passed" if ratio < -critical else "unclear"


@pytest.mark.filterwarnings("ignore:The baseline was measured on other images")
def test_a_difference_has_both_errors():
    draw = np.random.default_rng(3)
    seen = set()
    for _ in range(60):
        (one, other), images = draw.normal(0.5, 0.03, 2), [int(n) for n in draw.integers(3, 60, 2)]
        errors = draw.uniform(0.001, 0.02, 2)
        bound, sign = float(np.round(draw.normal(0, 0.04), 3)), int(draw.choice([-1, 1]))
        expected = reference_difference((one, errors[0]), (other, errors[1]), bound, sign, images)
        analysis, baseline = (
            analysis_with([value], error, images=count)
            for value, error, count in zip((one, other), errors, images, strict=True)
        )
        condition = f"head_diversity{'>' if sign > 0 else '<'}baseline{bound:+}"
        assert status(analysis, condition, baseline) == expected
        seen.add(expected)
    assert seen == {"failed", "unclear", "passed"}


def test_layers_are_compared_with_their_own_baseline():
    baseline = analysis_with([0.2, 0.5, 0.8], 0.001)
    worse = analysis_with([0.2, 0.6, 0.8], 0.001)
    (outcome,) = check(worse, ["head_diversity>baseline+0.05"], baseline)
    assert outcome.status == "failed"
    assert [item.status for item in outcome.comparisons] == ["clear", "beyond", "clear"]
    beyond = outcome.comparisons[1]
    assert (beyond.value, beyond.baseline, beyond.bound) == (0.6, 0.5, pytest.approx(0.55))
    assert beyond.error == pytest.approx(0.001 * math.sqrt(2))
    assert "blocks.1.attn 0.6 (baseline 0.5, difference +0.1000±0.0014)" in outcome.message
    assert status(worse, "mean(head_diversity)>baseline+0.03", baseline) == "failed"
    assert status(worse, "mean(head_diversity)>baseline+0.04", baseline) == "passed"
    assert status(worse, "head_diversity>baseline+0.05", worse) == "passed"


def test_intervals_of_both_face_each_other():
    value, other = Estimate("a", 0.8, 0.03, 0.5), Estimate("a", 0.5, 0.7, 0.04)
    gap = difference(value, other)
    assert gap.below == pytest.approx(0.05)
    assert gap.above == pytest.approx(math.hypot(0.5, 0.7))
    nowhere = Estimate("group A", math.inf)
    assert difference(nowhere, nowhere).value == 0
    assert difference(Estimate("group A", 3.0), nowhere).value == -math.inf


def test_an_onset_beside_a_baseline_without_one():
    def onset(value, share):
        entry = {"onset": {"value": value, "low": value, "high": value, "share": share}}
        return with_derived(entry)

    assert status(onset(3, 1.0), "onset<baseline-2", onset(None, 0.0)) == "failed"
    assert status(onset(None, 0.0), "onset<baseline-2", onset(None, 0.0)) == "passed"
    assert status(onset(3, 1.0), "onset<baseline-2", onset(4, 1.0)) == "passed"


def changed(change):
    analysis = analysis_with([0.2, 0.5, 0.8])
    analysis.provenance["options"] |= {"attention": "applied", "threshold": 0.9, "nearest": 1}
    change(analysis)
    return analysis


def renamed(analysis):
    analysis.layers.index = ["blocks.0.attn", "blocks.1.attn", "other"]


def resized(analysis):
    analysis.layers["keys"] = 50


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (renamed, "of other layers: blocks.2.attn only in this analysis; other only in the baseline"),
        (resized, "of other maps: blocks.0.attn has keys 197 here and 50 there"),
        (
            lambda item: item.provenance["options"].update(attention="softmax"),
            "attention 'softmax', this analysis with",
        ),
        (lambda item: item.provenance["options"].update(threshold=0.8), "threshold 0.8, this analysis with 0.9"),
        (lambda item: item.provenance["options"].update(nearest=2), "nearest 2"),
        (lambda item: item.provenance.update(complete=False), "interrupted"),
    ],
)
def test_a_baseline_that_cannot_be_compared_with(change, words):
    with pytest.raises(UsageError, match=re.escape(words)):
        check(changed(lambda _: None), ["head_diversity>baseline"], changed(change))
    # It does not matter to conditions that are not relative.
    assert status(changed(lambda _: None), "head_diversity>0.9", changed(change)) == "passed"


def test_a_baseline_in_another_order():
    other = changed(lambda _: None)
    other.layers = other.layers.iloc[::-1]
    with pytest.raises(UsageError, match="the same ones in another order"):
        check(changed(lambda _: None), ["head_diversity>baseline"], other)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda item: item.provenance["images"].update(count=20), "50 images here, 20 in the baseline"),
        (lambda item: item.provenance["fingerprint"].update(images="other"), "other files, or in another order"),
        (lambda item: item.provenance["images"].update(preprocessing={"mean": 0}), "another preprocessing"),
    ],
)
def test_other_images_bring_a_warning(change, words):
    def known(analysis):
        analysis.provenance["fingerprint"] = {"images": "one"}

    def other(analysis):
        known(analysis)
        change(analysis)

    with pytest.warns(UserWarning, match=re.escape(words)):
        check(changed(known), ["head_diversity>baseline"], changed(other))


def test_the_same_images_bring_none(recwarn):
    check(changed(lambda _: None), ["head_diversity>baseline"], changed(lambda _: None))
    assert not recwarn.list


def test_what_the_baseline_lacks_is_not_measured():
    baseline = analysis_with([0.5])
    del baseline.layers["entropy"]
    (outcome,) = check(analysis_with([0.5]), ["entropy>baseline"], baseline)
    assert outcome.status == "not-measured"
    assert outcome.message.startswith("the baseline: no layer has entropy")


# -- all of them -------------------------------------------------------------------------------------------------------


def test_conditions_are_checked_in_order_and_once():
    analysis = make_full(make_analysis())
    outcomes = check(analysis, ["problem", "entropy>99", "problem", parse("entropy>99")])
    assert [outcome.condition for outcome in outcomes] == ["problem", "entropy>99"]
    assert check(analysis, "problem") == outcomes[:1]
    assert str(outcomes[1]).startswith(
        "[passed] entropy>99: in none of 12 layers; nearest to the bound is blocks.0.attn"
    )
    with pytest.raises(UsageError, match="no conditions"):
        check(analysis, [])
    with pytest.raises(UsageError, match="relative to a baseline"):
        check(analysis, ["entropy>baseline"])
    analysis.provenance["complete"] = False
    with pytest.raises(UsageError, match="interrupted"):
        check(analysis, ["problem"])


def test_every_reading_of_a_full_analysis_can_be_judged():
    analysis = make_full(make_analysis(), seed=2)
    for name in READINGS:
        assert len(estimates(analysis, name)) in (11, 12)
        assert status(analysis, f"{name}>1e9") == "passed"
        assert status(analysis, f"{name}>-1e9") == "failed"


def test_a_saved_analysis_gives_the_same_outcomes(tmp_path):
    analysis = make_full(make_analysis())
    conditions = [f"{name}>0.5" for name in READINGS] + ["similar_blocks>1", "onset<11", "warning"]
    loaded = Analysis.load(analysis.save(tmp_path))
    assert check(loaded, conditions) == check(analysis, conditions)


# -- records -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def mixed():
    """Outcomes of every kind, with names that would break a careless file."""
    analysis = analysis_with([0.5, 0.02])
    analysis.layers.index = ['<layer> & "quotes" ]]>', "\x1b[31mred\x00\ud800"]
    analysis.provenance["model"]["architecture"] = "vit<&>\x07"
    analysis.findings = [finding("dead-heads", "problem")]
    conditions = ["head_diversity<0.05", "head_diversity>0.5", "head_diversity>0.9", "cka_to_previous>0.5", "problem"]
    outcomes = check(analysis, conditions)
    assert [item.status for item in outcomes] == ["failed", "unclear", "passed", "not-measured", "failed"]
    return analysis, outcomes


def test_json(mixed):
    analysis, outcomes = mixed
    stored = json.loads(to_json(outcomes, analysis, "released/"))
    assert stored["failed"] is True
    assert stored["counts"] == {"failed": 2, "unclear": 1, "passed": 1, "not-measured": 1}
    assert (stored["images"], stored["baseline"]) == (IMAGES, "released/")
    assert [item["status"] for item in stored["conditions"]] == [item.status for item in outcomes]
    first = stored["conditions"][0]["comparisons"]
    assert [(item["value"], item["error"], item["bound"], item["status"]) for item in first] == [
        (0.5, 0.01, 0.05, "clear"), (0.02, 0.01, 0.05, "beyond"),
    ]  # fmt: skip
    assert json.loads(to_json([], Analysis(pd.DataFrame(), [])))["images"] is None


def test_json_has_no_infinities():
    entry = {"onset": {"value": None, "low": None, "high": None, "share": 0.0}}
    analysis = with_derived(entry)
    stored = json.loads(to_json(check(analysis, ["onset<5"]), analysis))
    assert stored["conditions"][0]["comparisons"][0]["value"] is None


#: Element -> attributes and children that Jenkins's schema (junit-10.xsd of its xunit plugin) knows; the first ones are
#: required there, or by GitLab.
KNOWN_TO_JENKINS = {
    "testsuites": (set(), {"name", "time", "tests", "failures", "errors"}, {"testsuite"}),
    "testsuite": ({"name", "tests", "failures", "errors"}, {"time", "skipped", "timestamp", "hostname"}, {"testcase"}),
    "testcase": ({"name", "classname"}, {"time"}, {"failure", "error", "skipped", "system-out"}),
    "failure": ({"message"}, {"type"}, set()),
    "error": ({"message"}, {"type"}, set()),
    "system-out": (set(), set(), set()),
}


def test_junit_holds_what_its_readers_know(mixed):
    analysis, outcomes = mixed
    for element in ElementTree.fromstring(to_junit(outcomes, analysis)).iter():
        required, optional, children = KNOWN_TO_JENKINS[element.tag]
        assert required <= set(element.attrib) <= required | optional
        assert {child.tag for child in element} <= children


def test_junit(mixed):
    """What pytest, Jenkins and GitLab agree on: one suite, a case per condition, at most one result in each."""
    analysis, outcomes = mixed
    document = to_junit(outcomes, analysis)
    assert document.startswith(b"<?xml version='1.0' encoding='utf-8'?>\n")
    assert not {0, 7, 27} & set(document)
    root = ElementTree.fromstring(document)
    assert root.tag == "testsuites"
    (suite,) = root
    assert suite.tag == "testsuite"
    for element in (root, suite):
        assert [element.get(name) for name in ("tests", "failures", "errors")] == ["5", "2", "1"]
        assert float(element.get("time")) == 0
    results = []
    for case, outcome in zip(suite, outcomes, strict=True):
        assert case.tag == "testcase"
        assert case.get("name") == outcome.condition
        assert case.get("classname") == "collapse-probe.vit<&>\N{REPLACEMENT CHARACTER}"
        (result,) = case
        results.append(result.tag)
        assert result.text
        if result.tag != "system-out":
            assert set(result.attrib) == {"message", "type"}
            assert "\n" not in result.get("message")
    assert results == ["failure", "system-out", "system-out", "error", "failure"]
    assert suite[0][0].text == "\N{REPLACEMENT CHARACTER}[31mred" + 2 * "\N{REPLACEMENT CHARACTER}" + " 0.020±0.010"
    assert suite[1][0].text.startswith("unclear: ")


# -- the page ----------------------------------------------------------------------------------------------------------


def commands(page):
    """Every `--fail-on` of the page's examples."""
    return [first or second for first, second in re.findall(r'--fail-on (?:"([^"]+)"|([^\s"C]\S*))', page)]


def test_the_conditions_of_the_page_can_be_read():
    page = PAGE.read_text(encoding="utf-8")
    table = re.findall(r"^\| (`.*?) \|", page, re.MULTILINE)
    in_table = [code for cell in table for code in re.findall(r"`([^`]+)`", cell)]
    assert len(in_table) >= 12
    assert len(commands(page)) >= 5
    for text in (*in_table, *commands(page)):
        parse(text)
    listed = re.search(r"Codes of findings:\n(.*?)\. Healthy", page, re.DOTALL)[1]
    assert re.findall(r"`([^`]+)`", listed) == list(CODES)


def test_the_python_of_the_page_runs(tmp_path, monkeypatch, capsys):
    (program,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    make_analysis().save(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    exec(compile(program, str(PAGE), "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in printed] == [["passed", "problem"], ["passed", "head_diversity<0.05"]]


def test_conditions_need_no_torch():
    code = "import sys; sys.modules['torch'] = None; import collapse_probe.conditions, collapse_probe.diagnosis"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_conditions_change_nothing():
    analysis = make_full(make_analysis())
    before = analysis.to_dict()
    check(analysis, ["problem", "entropy>0.5", "similar_blocks>baseline"], replace(analysis))
    assert analysis.to_dict() == before
