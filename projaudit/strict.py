"""Strict JSON and YAML: what a hostile or careless file says twice or too deeply is an error."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, NoReturn

import yaml

from projaudit.errors import FormatError, ProjauditError
from projaudit.inert import clean

JSON_LIMIT = 10 << 20
"""Bytes of a JSON file."""
YAML_LIMIT = 256 << 10
"""Bytes of a YAML file or of the front matter of a card."""
CARD_LIMIT = 1 << 20
"""Bytes of a README.md."""
JSON_DEPTH = 64
YAML_DEPTH = 32
_DIGITS = 30

ErrorType = Callable[..., ProjauditError]


def load_json(
    data: bytes,
    *,
    file: str,
    limit: int = JSON_LIMIT,
    kind: str = "json",
    constants: Literal["reject", "text"] = "reject",
) -> object:
    """The value of a JSON file.

    Refused, with FormatError (`format.<kind>`): more than `limit` bytes, bytes that are not UTF-8,
    a key that stands twice in one object (however it is escaped), nesting deeper than 64, lone
    surrogates, integers of more than 30 digits, floats beyond the range of a double, and the
    constants NaN and Infinity, which are no JSON; `constants="text"` reads these as their names.
    """
    if len(data) > limit:
        raise _error(FormatError, f"{len(data)} bytes, above the limit of {limit}", kind, file)
    value = decode_json(data, file=file, kind=kind, constants=constants)
    if _depth(value) > JSON_DEPTH:
        raise _error(FormatError, f"nested deeper than {JSON_DEPTH}", kind, file)
    return value


def decode_json(
    data: bytes,
    *,
    file: str,
    kind: str = "json",
    constants: Literal["reject", "text"] = "reject",
) -> object:
    """As `load_json`, without its limits on bytes and depth."""
    as_text = constants == "text"

    def constant(name: str) -> str:
        if as_text:
            return name
        raise ValueError(f"{name} is no JSON")

    def number(text: str) -> float | str:
        value = float(text)
        if math.isinf(value):
            return constant("-Infinity" if value < 0 else "Infinity")
        return value

    try:
        text = data.decode("utf-8")
        value: object = json.loads(
            text,
            object_pairs_hook=_object,
            parse_int=_integer,
            parse_float=number,
            parse_constant=constant,
        )
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise _error(FormatError, f"byte {error.start} is not UTF-8", kind, file) from None
    except UnicodeEncodeError:
        raise _error(FormatError, "holds a lone surrogate", kind, file) from None
    except RecursionError:
        raise _error(FormatError, "nested too deeply", kind, file) from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}"
        raise _error(FormatError, f"not JSON: {error.msg} at {where}", kind, file) from None
    except ValueError as error:
        raise _error(FormatError, str(error), kind, file) from None
    return value


def load_yaml(
    text: str | bytes,
    *,
    file: str,
    limit: int = YAML_LIMIT,
    error: ErrorType = FormatError,
    kind: str = "yaml",
    first_line: int = 1,
) -> object:
    """The value of a YAML file (None for an empty one), in a small and unsurprising dialect.

    `true`, `false`, `null`, `~`, decimal integers and floats (`1e-3` too) are read as such;
    everything else is text: `NO`, `12:30:45`, `2024-01-01`, `010`, `0x1F`, `1_000`, `<<`. Refused,
    with `error` (`<family>.<kind>`) and the line: a key that stands twice or is not text, anchors
    and aliases, tags, nesting deeper than 32, `.inf`, `.nan` and numbers beyond a double or 30
    digits, several documents, and more than `limit` bytes.
    """
    try:
        raw = text.encode("utf-8") if isinstance(text, str) else text
        if len(raw) > limit:
            raise _error(error, f"{len(raw)} bytes, above the limit of {limit}", kind, file)
        loader = _Loader(raw.decode("utf-8"))
    except UnicodeDecodeError as problem:
        raise _error(error, f"byte {problem.start} is not UTF-8", kind, file) from None
    except UnicodeEncodeError:
        raise _error(error, "holds a lone surrogate", kind, file) from None
    except yaml.YAMLError:
        raise _error(error, "holds a control character", kind, file) from None
    try:
        value: object = loader.get_single_data()
    except yaml.MarkedYAMLError as problem:
        mark = problem.problem_mark or problem.context_mark
        where = f"line {mark.line + first_line}: " if mark else ""
        says = clean(problem.problem or problem.context or "not YAML", 200)
        raise _error(error, where + says, kind, file) from None
    except (yaml.YAMLError, ValueError, RecursionError) as problem:
        raise _error(error, f"not YAML: {clean(problem, 200)}", kind, file) from None
    finally:
        loader.dispose()
    return value


def front_matter(text: str | bytes, *, file: str) -> dict[str, Any]:
    """What a model card claims about its base, from the YAML at the head of README.md.

    Keys, each only where the card has it: `base_model` (a list of str, also for a single one) and
    `base_model_relation` (a str). Other keys may hold anything that is YAML. Raises FormatError
    (`format.card`) for a card above 1 MiB, YAML that `load_yaml` refuses, and these keys with
    another type, more than 32 items or more than 200 characters.
    """
    raw = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    if len(raw) > CARD_LIMIT:
        raise _error(
            FormatError, f"{len(raw)} bytes, above the limit of {CARD_LIMIT}", "card", file
        )
    block = _front_block(raw)
    if block is None:
        return {}
    lines_above, head = block
    card = load_yaml(head, file=file, kind="card", first_line=lines_above + 1)
    if card is None:
        return {}
    if not isinstance(card, Mapping):
        raise _error(FormatError, "the front matter is no mapping", "card", file)
    claims: dict[str, Any] = {}
    if card.get("base_model") is not None:
        named = card["base_model"]
        models = named if isinstance(named, list) else [named]
        if len(models) > 32 or not all(_is_short(model) for model in models):
            says = "is no text of at most 200 characters, nor a list of at most 32 of them"
            raise _error(FormatError, says, "card", file, "base_model")
        claims["base_model"] = models
    if card.get("base_model_relation") is not None:
        relation = card["base_model_relation"]
        if not _is_short(relation):
            says = "is no text of at most 200 characters"
            raise _error(FormatError, says, "card", file, "base_model_relation")
        claims["base_model_relation"] = relation
    return claims


def _is_short(value: object) -> bool:
    return isinstance(value, str) and len(value) <= 200


def _front_block(raw: bytes) -> tuple[int, bytes] | None:
    lines = re.split(rb"\r\n|\r|\n", raw.removeprefix(b"\xef\xbb\xbf"))
    above = 0
    while above < len(lines) and not lines[above].strip():
        above += 1
    if above == len(lines) or lines[above].strip() != b"---":
        return None
    for end in range(above + 1, len(lines)):
        if lines[end].rstrip() == b"---":
            return above + 1, b"\n".join(lines[above + 1 : end])
    return None


def _error(
    error: ErrorType, message: str, kind: str, file: str, field: str | None = None
) -> ProjauditError:
    return error(message, kind, file=clean(file), field=field)


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {clean(twice, 80)!r} stands twice")
    return value


def _integer(text: str) -> int:
    if len(text) > _DIGITS:
        raise ValueError(f"an integer of {len(text)} digits")
    if text == "-0":
        # A float to other parsers.
        raise ValueError("-0 is no integer")
    return int(text)


def _depth(value: object) -> int:
    deepest, pending = 0, [(value, 1)]
    while pending:
        item, depth = pending.pop()
        if isinstance(item, dict | list):
            deepest = max(deepest, depth)
            inner = item.values() if isinstance(item, dict) else item
            pending.extend((part, depth + 1) for part in inner if isinstance(part, dict | list))
    return deepest


class _Loader(yaml.SafeLoader):
    """SafeLoader with other scalars, and without what makes a file mean more than it shows."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            _refuse("anchors and aliases are not read", event.start_mark)
        if getattr(event, "tag", None) is not None:
            _refuse("tags are not read", event.start_mark)
        self.depth += 1
        if self.depth > YAML_DEPTH:
            _refuse(f"nested deeper than {YAML_DEPTH}", event.start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict[Any, Any]:
        assert isinstance(node, yaml.MappingNode)
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:str":
                _refuse("a key is not text", key.start_mark)
            if key.value in seen:
                _refuse(f"the key {clean(key.value, 80)!r} stands twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_int(self, node: yaml.ScalarNode) -> int:
        if len(node.value) > _DIGITS:
            _refuse(f"an integer of {len(node.value)} digits", node.start_mark)
        return int(node.value)

    def construct_float(self, node: yaml.ScalarNode) -> float:
        try:
            value = float(node.value)
        except ValueError:
            value = math.inf
        if math.isinf(value):
            _refuse(f"{clean(node.value, 40)!r} is no finite number", node.start_mark)
        return value

    def construct_bool(self, node: yaml.ScalarNode) -> bool:
        return bool(node.value.lower() == "true")


def _refuse(message: str, mark: yaml.Mark | None) -> NoReturn:
    raise yaml.constructor.ConstructorError(None, None, message, mark)


for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:(?:0|[1-9][0-9]*)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}",
        re.compile(rf"(?:{_pattern})\Z"),
        [c if c != "\0" else "" for c in _first],
    )
for _tag, _construct in (
    ("int", _Loader.construct_int),
    ("float", _Loader.construct_float),
    ("bool", _Loader.construct_bool),
):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _construct)
