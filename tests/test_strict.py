"""Strict JSON and YAML: each surprise of the usual parsers is an error or plain text."""

from __future__ import annotations

import pytest

from projaudit.errors import FormatError, UsageError
from projaudit.strict import YAML_DEPTH, front_matter, load_json, load_yaml


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b'{"a": 1, "a": 2}', "twice"),
        (b'{"a": 1, "\\u0061": 2}', "twice"),
        (b'[{"x": {"b": 1, "b": 1}}]', "twice"),
        (b"[NaN]", "NaN"),
        (b"[-Infinity]", "Infinity"),
        (b"[1e999]", "Infinity"),
        (b"[" * 65 + b"]" * 65, "deeper"),
        (b"[" * 100_000, "deep"),
        (b'{"a":' * 100_000, "deep"),
        (b"[" + b"9" * 5000 + b"]", "5000 digits"),
        (b'["\\ud800"]', "surrogate"),
        (b'{"\\udfff": 1}', "surrogate"),
        (b'["\xff"]', "UTF-8"),
        (b"\xef\xbb\xbf{}", "BOM"),
        (b"", "line 1"),
        (b"{}\n{}", "line 2"),
        (b"{'a': 1}", "line 1"),
        (b"[-0]", "-0"),
    ],
)
def test_json_that_is_refused(data: bytes, says: str) -> None:
    with pytest.raises(FormatError, match=says) as caught:
        load_json(data, file="c.json", kind="config")
    assert caught.value.code == "format.config"
    assert caught.value.file == "c.json"


def test_json_above_its_limit() -> None:
    assert load_json(b"[1]", file="x", limit=3) == [1]
    with pytest.raises(FormatError, match="limit of 3"):
        load_json(b"[1] ", file="x", limit=3)


def test_json_that_is_read() -> None:
    deep = b"[" * 64 + b"]" * 64
    load_json(deep, file="x")
    text = '{"a": [1, -2.5e3, true, null], "\\ud83d\\ude00": "\u00e9"}'
    assert load_json(text.encode(), file="x") == {
        "a": [1, -2500.0, True, None],
        "\U0001f600": "\u00e9",
    }


def test_constants_as_text_never_become_floats() -> None:
    data = b"[NaN, Infinity, -Infinity, 1e999, -1e999]"
    value = load_json(data, file="x", constants="text")
    assert value == ["NaN", "Infinity", "-Infinity", "Infinity", "-Infinity"]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("-1.5E+2", -150.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("0", 0),
        ("+7", 7),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("NO", "NO"),
        ("on", "on"),
        ("12:30:45", "12:30:45"),
        ("2024-01-01", "2024-01-01"),
        ("010", "010"),
        ("0x1F", "0x1F"),
        ("1_000", "1_000"),
        ("'1'", "1"),
        ("=", "="),
        ("1e", "1e"),
        ("[a, {b: 2}]", ["a", {"b": 2}]),
    ],
)
def test_yaml_scalars_hold_no_surprise(text: str, value: object) -> None:
    read = load_yaml(f"key: {text}\n", file="x")
    assert read == {"key": value}
    assert type(read["key"]) is type(value)  # type: ignore[index]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: 1\nb: 2\na: 3", "line 3: the key 'a' stands twice"),
        ("a: {b: 1, 'b': 2}", "line 1: the key 'b' stands twice"),
        ("a: &x 1", "line 1: anchors"),
        ("\na: &x [1]\nb: *x", "line 2: anchors"),
        ("b: *x", "anchors"),
        ("<<: *x", "anchors"),
        ("a: !!python/object/apply:os.system [id]", "line 1: tags"),
        ("a: !!str 1", "tags"),
        ("a: ! b", "tags"),
        ("a: .inf", "finite"),
        ("a: -.INF", "finite"),
        ("a: .nan", "finite"),
        ("a: 1e999", "finite"),
        ("a: " + "9" * 5000, "5000 digits"),
        ("1: a", "key is not text"),
        ("true: a", "key is not text"),
        ("? [a]\n: b", "key is not text"),
        ("[" * 5000, f"deeper than {YAML_DEPTH}"),
        ("a: 1\n---\nb: 2", "line 2"),
        ("a: b: c", "line 1"),
        ("a: 'b", "line 1"),
        ("\tb", "line 1"),
        ("a: \x1b[2J", "control character"),
        ("a: \ud800", "surrogate"),
    ],
)
def test_yaml_that_is_refused(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says.replace("[", r"\[")) as caught:
        load_yaml(text, file="rule.yaml", error=UsageError, kind="rule")
    assert caught.value.code == "usage.rule"
    assert str(caught.value).isprintable()


def test_yaml_bytes_and_limits() -> None:
    assert load_yaml("a: \u00e9".encode(), file="x") == {"a": "\u00e9"}
    assert load_yaml("", file="x") is None
    nested = "[" * YAML_DEPTH + "]" * YAML_DEPTH
    assert load_yaml(nested, file="x")
    with pytest.raises(FormatError, match="UTF-8"):
        load_yaml(b"a: \xff", file="x")
    with pytest.raises(FormatError, match="above the limit of 9"):
        load_yaml("a: 4567890", file="x", limit=9)


def test_alias_bomb_is_refused_before_it_grows() -> None:
    bomb = "a0: &a0 [x]\n" + "".join(
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 20)
    )
    with pytest.raises(FormatError, match="anchors"):
        load_yaml(bomb, file="x")


CARD = """---
license: other
base_model: {base}
base_model_relation: finetune
tags: [1, 2.5, {{x: null}}]
self: 1
ignore_metadata_errors: true
---
# Title
base_model: not/this
"""


def test_front_matter_gives_the_base_and_nothing_else() -> None:
    found = front_matter(CARD.format(base="org/base"), file="README.md")
    assert found == {"base_model": ["org/base"], "base_model_relation": "finetune"}
    several = front_matter(CARD.format(base="[a/b, c/d]").encode(), file="README.md")
    assert several["base_model"] == ["a/b", "c/d"]
    windows = "\ufeff" + CARD.format(base="org/base").replace("\n", "\r\n")
    assert front_matter(windows, file="README.md") == found


@pytest.mark.parametrize(
    "text", ["", "# Title", "---\nbase_model: a/b\n", "---\n---\n", "x\n---\nbase_model: a\n---\n"]
)
def test_cards_without_front_matter(text: str) -> None:
    assert front_matter(text, file="README.md") == {}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("---\nbase_model: 1\n---\n", "base_model: is no text"),
        ("---\nbase_model: [a, 1]\n---\n", "base_model: is no text"),
        ("---\nbase_model: {a: b}\n---\n", "base_model: is no text"),
        (f"---\nbase_model: {'x' * 201}\n---\n", "base_model: is no text"),
        (f"---\nbase_model: [{'a/b, ' * 33}]\n---\n", "base_model: is no text"),
        ("---\nbase_model_relation: [a]\n---\n", "base_model_relation: is no text"),
        ("---\nx: 1\nbase_model: a\nbase_model: b\n---\n", "line 4: the key"),
        ("---\nx: !!python/object/apply:os.system [id]\n---\n", "line 2: tags"),
        ("---\n- a\n---\n", "no mapping"),
        ("x" * (1 << 20) + "y", "above the limit"),
    ],
)
def test_cards_that_are_refused(text: str, says: str) -> None:
    with pytest.raises(FormatError, match=says) as caught:
        front_matter(text, file="README.md")
    assert caught.value.code == "format.card"


def test_card_that_is_not_utf8() -> None:
    with pytest.raises(FormatError, match="UTF-8"):
        front_matter(b"---\nx: \xff\n---\n", file="README.md")
