"""Rules and policies: data that is checked at load, three-valued, and never evaluated as code."""

from __future__ import annotations

from datetime import date
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from projaudit.analyses import METRICS
from projaudit.data import data_path
from projaudit.errors import UsageError
from projaudit.findings import Measurement, Null, Severity, Skipped
from projaudit.judge import judge
from projaudit.policy import load_policy, presets
from projaudit.rules import (
    Comparison,
    Condition,
    evaluate,
    failed_examples,
    load_rule,
    load_rules,
    metrics_of,
)

SHIPPED = load_rules(data_path("rules"), METRICS)
RULE = {
    "title": "A layer moved far",
    "severity": "info",
    "confidence": "low",
    "when": "relative_norm > 0.5",
    "message": "it moved by {relative_norm:.0%}",
    "why": "because",
    "remedy": "look",
    "examples": {"fires": [{"relative_norm": 0.9}], "passes": [{"relative_norm": 0.1}]},
}


def write(folder: Path, entry: object, name: str = "own-rule") -> Path:
    file = folder / f"{name}.yaml"
    file.write_text(entry if isinstance(entry, str) else yaml.safe_dump(entry))
    return file


@pytest.mark.parametrize("rule", SHIPPED, ids=lambda r: r.id)
def test_every_rule_can_fire_and_stay_quiet(rule):
    assert rule.fires
    assert rule.passes
    assert failed_examples(rule) == []


@pytest.mark.parametrize("rule", SHIPPED, ids=lambda r: r.id)
def test_a_disabled_condition_would_be_noticed(rule):
    """The control for the test above: with its condition turned round, a rule's examples fail."""
    from dataclasses import replace

    turned = replace(rule, when=Condition("not", (rule.when,)))
    assert len(failed_examples(turned)) == len(rule.fires) + len(rule.passes)


@pytest.mark.parametrize("rule", SHIPPED, ids=lambda r: r.id)
def test_uncalibrated_statistics_are_info(rule):
    kinds = {METRICS[n].kind for n in metrics_of(rule.when) if n in METRICS}
    if "statistic" in kinds and rule.calibration is None:
        assert rule.severity is Severity.INFO
        assert not rule.inconclusive


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"when": "relative_norm > nan"}, "when"),
        ({"when": "relative_norm > 1e999"}, "when"),
        ({"when": "no_such_metric > 1"}, "when"),
        ({"when": "relative_norm > __import__('os').getcwd()"}, "when"),
        ({"when": {"all": []}}, "when"),
        ({"when": {"xor": ["relative_norm > 1"]}}, "when"),
        ({"when": {"all": ["relative_norm > 0.5", "vector_shift > 1"]}}, "when"),
        ({"when": 3}, "when"),
        ({"severity": "high"}, "severity"),
        ({"severity": "catastrophic"}, "severity or confidence"),
        ({"confidence": "sure"}, "severity or confidence"),
        ({"message": "{stable_rank:.1f}"}, "message"),
        ({"message": "{relative_norm.__class__}"}, "message"),
        ({"message": "{relative_norm!r}"}, "message"),
        ({"message": "{relative_norm:>99999999}"}, "message"),
        ({"message": "{"}, "message"),
        ({"title": ""}, "title"),
        ({"sevrity": "info"}, "sevrity"),
        ({"inconclusive": "yes"}, "inconclusive"),
        ({"references": "arXiv"}, "references"),
        ({"examples": {"fires": [{"relative_norm": 0.9}]}}, "examples"),
        ({"examples": RULE["examples"] | {"fires": [{"relative_norm": 0}]}}, "examples"),
        ({"calibration": {"population": "p", "n": 10}}, "calibration"),
        (
            {
                "calibration": {
                    "population": "p",
                    "n": 10,
                    "false_positive_rate": 0.5,
                    "interval": [0.0, 0.1],
                }
            },
            "calibration",
        ),
    ],
)  # fmt: skip
def test_a_wrong_rule_is_refused_with_file_and_field(tmp_path: Path, change, field):
    file = write(tmp_path, RULE | change)
    with pytest.raises(UsageError) as raised:
        load_rule(file, METRICS)
    assert raised.value.exit_code == 4
    assert raised.value.code == "usage.rule"
    assert raised.value.file == str(file)
    assert raised.value.field == field


def test_the_unchanged_rule_is_accepted(tmp_path: Path):
    assert load_rule(write(tmp_path, RULE), METRICS).id == "own-rule"


@pytest.mark.parametrize(
    "text",
    [
        "title: a\ntitle: b\n",
        "when: &a [*a]\n",
        "!!python/object/apply:os.system ['true']\n",
        "[" * 5000,
        "- a list",
        "\x00",
        "title: {",
    ],
)
def test_hostile_yaml_is_one_line(tmp_path: Path, text: str):
    with pytest.raises(UsageError) as raised:
        load_rule(write(tmp_path, text), METRICS)
    assert "\n" not in str(raised.value)


def test_a_calibrated_statistic_may_be_more_than_info(tmp_path: Path):
    calibration = {
        "population": "own honest models",
        "n": 300,
        "false_positive_rate": 0.0,
        "interval": [0.0, 0.01],
    }
    rule = load_rule(
        write(tmp_path, RULE | {"severity": "high", "calibration": calibration}), METRICS
    )
    assert rule.severity is Severity.HIGH


TRUTH = {"t > 0": True, "f > 0": False, "missing > 0": None, "nan > 0": None}
VALUES = {"t": 1.0, "f": -1.0, "nan": float("nan")}


@given(
    st.recursive(
        st.sampled_from(["t", "f", "missing", "nan"]).map(lambda m: Comparison(m, ">", 0.0)),
        lambda inner: st.one_of(
            st.builds(
                Condition,
                st.sampled_from(["all", "any"]),
                st.lists(inner, min_size=1, max_size=4).map(tuple),
            ),
            inner.map(lambda t: Condition("not", (t,))),
        ),
        max_leaves=12,
    )
)
def test_conditions_follow_kleene(condition):
    """What is missing may decide either way; a condition is unknown exactly when it matters."""

    def leaves(term):
        if isinstance(term, Comparison):
            return {term.metric}
        return set().union(*map(leaves, term.terms))

    unknown = sorted({"missing", "nan"} & leaves(condition))
    outcomes = set()
    for bits in range(2 ** len(unknown)):
        guess = {m: 1.0 if bits >> i & 1 else -1.0 for i, m in enumerate(unknown)}
        outcomes.add(evaluate(condition, {"t": 1.0, "f": -1.0} | guess))
    result = evaluate(condition, VALUES)
    if result is not None:
        assert outcomes == {result}


def m(metric: str, subject: str, value: float, **kw) -> Measurement:
    return Measurement(metric, subject, value, **kw)


def policy(tmp_path: Path, entry: dict, rules: list[dict] | None = None, **kw):
    folder = None
    if rules:
        folder = tmp_path / "rules"
        folder.mkdir()
        for i, rule in enumerate(rules):
            write(folder, rule, f"own-{i}")
    return load_policy(write(tmp_path, entry, "policy"), METRICS, folder, **kw)


def test_nan_never_passes_for_a_number():
    """threats K16: a NaN metric makes its rule unevaluated, and a required one inconclusive."""
    ruleset = load_policy("structure", METRICS)
    _, unevaluated, _ = judge(
        ruleset, [m("nonfinite_count", "projector", float("nan"))], [], METRICS
    )
    assert [u.rule for u in unevaluated if u.required] == [
        "function-unknown",
        "nonfinite-weights",
        "projector-unchanged",
    ]


def test_a_skipped_metric_gives_its_reason():
    ruleset = load_policy("structure", METRICS)
    skipped = [Skipped("config_changes", "checkpoint", "no config.json")]
    _, unevaluated, outcomes = judge(ruleset, [], skipped, METRICS)
    reasons = {u.rule: u.reason for u in unevaluated}
    assert reasons["config-changed"] == "config_changes: no config.json"
    assert {o.rule: o.outcome for o in outcomes}["large-update"] == "not-applicable"


def test_a_layer_rule_sees_its_projector_and_z_scores(tmp_path: Path):
    rule = RULE | {
        "when": {"all": ["relative_norm > 0.5", "shift_slope_z_equal_norm > 2"]},
        "examples": {
            "fires": [{"relative_norm": 0.9, "shift_slope_z_equal_norm": 3}],
            "passes": [{"relative_norm": 0.9, "shift_slope_z_equal_norm": 1}],
        },
    }
    ruleset = policy(tmp_path, {"extends": "structure"}, [rule])
    measured = [
        m("relative_norm", "projector/linear_1", 0.9),
        m("relative_norm", "projector/linear_2", 0.1),
        m("shift_slope", "projector", 5.0, nulls=(Null("equal_norm", 1.0, 1.0, 4),)),
    ]
    findings, _, _ = judge(ruleset, measured, [], METRICS)
    assert [(f.rule, f.subject) for f in findings if f.rule == "own-0"] == [
        ("own-0", "projector/linear_1")
    ]


@pytest.mark.parametrize(
    ("entry", "field"),
    [
        ({"disable": ["no-such-rule"]}, "disable"),
        ({"thresholds": {"large-update": {"stable_rank": 3}}}, "thresholds"),
        ({"thresholds": {"large-update": {"relative_norm": "big"}}}, "thresholds"),
        ({"thresholds": {"large-update": {"relative_norm": float("nan")}}}, None),
        ({"extends": "/etc/passwd"}, "extends"),
        ({"fail_on": "never"}, "fail_on"),
        ({"depth": "deep"}, "depth"),
        ({"options": {"trust_remote_code": True}}, "options"),
        ({"waivers": [{"rule": "custom-code"}]}, "waivers"),
        ({"failon": "review"}, "failon"),
        ({"pins": ["org/model"]}, "pins"),
        ({"disable": [r.id for r in SHIPPED if r.required]}, "disable"),
    ],
)
def test_a_wrong_policy_is_refused_with_file_and_field(tmp_path: Path, entry, field):
    with pytest.raises(UsageError) as raised:
        policy(tmp_path, {"extends": "structure"} | entry)
    assert raised.value.code == "usage.policy"
    assert raised.value.field == field


def test_presets_load_and_default_asks_for_more():
    assert presets() == ("default", "structure")
    default, structure = (load_policy(name, METRICS) for name in ("default", "structure"))
    assert (default.depth, structure.depth) == ("behaviour", "weights")
    unverified = {r.id: r.inconclusive for r in default.rules}
    assert unverified["base-unverified"]


def test_thresholds_can_be_set(tmp_path: Path):
    ruleset = policy(
        tmp_path, {"extends": "structure", "thresholds": {"large-update": {"relative_norm": 0.01}}}
    )
    findings, _, _ = judge(ruleset, [m("relative_norm", "projector/linear_1", 0.05)], [], METRICS)
    assert "large-update" in {f.rule for f in findings}


def waiver(expires: str, digest: str = "a" * 40) -> dict:
    return {
        "rule": "custom-code",
        "digest": digest,
        "statement": "we read it",
        "owner": "ana",
        "expires": expires,
    }


@pytest.mark.parametrize(
    ("digest", "today", "waived"),
    [
        ("a" * 40, date(2026, 12, 31), True),
        ("a" * 40, date(2027, 1, 1), False),
        ("b" * 40, date(2026, 12, 1), False),
    ],
)
def test_waivers_cover_these_bytes_until_their_day(tmp_path: Path, digest, today, waived):
    ruleset = policy(tmp_path, {"extends": "structure", "waivers": [waiver("2026-12-31")]})
    findings, _, _ = judge(
        ruleset,
        [m("custom_code", "checkpoint", 1.0)],
        [],
        METRICS,
        digests=frozenset({digest}),
        today=today,
    )
    (finding,) = [f for f in findings if f.rule == "custom-code"]
    assert bool(finding.waived) is waived


def test_own_rules_cannot_replace_ours(tmp_path: Path):
    write(tmp_path, RULE, "large-update")
    with pytest.raises(UsageError, match="exists already"):
        load_policy("structure", METRICS, tmp_path)
