"""What a config.json declares of quantised weights, its values strictly typed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from projaudit.inert import clean


class Unread(Exception):
    """Why a layer's weight is not read."""


_SKIPPED = ("llm_int8_skip_modules", "modules_to_not_convert", "ignored_layers", "ignore")
# They quantise as they load, or take every module that is not left out for quantised and give it
# scales of their own where the file brings none (transformers 5.23; FP8 on a GPU only).
_TAKES_ALL = {"bitsandbytes", "quanto", "fp8", "fbgemm_fp8", "compressed-tensors", "awq"}


def rewrites(config: Mapping[str, object] | None, weights: Iterable[str]) -> str:
    """What a loader with this config makes of weights in full precision; empty where it takes them
    as they are stored: methods that quantise a decoder's blocks only, and modules left out."""
    declared = Declared(config)
    try:
        method = declared.method
        skipped, groups = declared.texts(*_SKIPPED), declared.targets()
    except Unread as why:
        return str(why)
    if method in _TAKES_ALL:
        for name in weights:
            module = name.removesuffix(".weight")
            if not any(_names(key, module) for key in skipped) and (
                not groups or any(_names(key, module) is not False for key in groups)
            ):
                return f"{method} quantises {clean(name, 100)}, or takes it for quantised"
        return ""
    known = {"gptq", "mlx"}
    return "" if method in known else f"quant_method {clean(method, 40)!r} is not known here"


_TAME = re.compile(r"(?:[\w^$-]|\\?\.|\.\*)+", re.ASCII)  # expressions that cannot take long


def _names(key: str, module: str) -> bool | None:
    """Whether a config's key for modules is of that one; None where it cannot be told.

    As transformers matches names, from the start or up to the end at whole segments, and
    compressed-tensors expressions (`re:…`), from the start.
    """
    short = module.removeprefix("model.")
    if key.startswith("re:"):
        pattern = key.removeprefix("re:")
        if len(pattern) > 200 or pattern.count("*") > 3 or not _TAME.fullmatch(pattern):
            return None
        try:
            return any(re.match(pattern, name) for name in (short, f"model.{short}"))
        except re.error:
            return None
    if "." not in key and key[:1].isupper():
        return None  # a class of modules
    path, part = f".{short}.", f".{key.removeprefix('model.')}."
    return path.startswith(part) or path.endswith(part)


# Where a config describes the language model; loaders take its quantisation for the whole model's.
_TEXT = {"text_config", "llm_config", "language_config", "thinker_config", "decoder", "generator"}


class Declared:
    """The quantisation that config.json declares, its values strictly typed."""

    def __init__(self, config: Mapping[str, object] | None) -> None:
        config = config or {}
        parts = {"": config, **{k: v for k, v in config.items() if isinstance(v, Mapping)}}
        keys = ("quantization_config", "compression_config", "quantization")
        found = [
            (key, part[key])
            for where, part in parts.items()
            for key in keys
            if part.get(key) and (not where or where in _TEXT or where.endswith("_config"))
        ]
        self.faults = [f"{key} is no object" for key, v in found if not isinstance(v, Mapping)]
        self.faults += [
            f"the config declares a quantisation in {clean(where, 60)}, where no loader looks"
            for where, part in parts.items()
            if where.endswith("_config") and where not in _TEXT and any(part.get(k) for k in keys)
        ]
        if any(value != found[0][1] for _, value in found):
            self.faults.append("the config declares two quantisations that differ")
        self.there = bool(found)
        self._key = found[0][0] if found else ""
        said = found[0][1] if found else {}
        self._said: Mapping[str, Any] = said if isinstance(said, Mapping) else {}
        self._is_mlx = any(key == "quantization" for key, _ in found)

    @property
    def method(self) -> str:
        """`quant_method`, empty where no quantisation is declared."""
        if self.faults:
            raise Unread(self.faults[0])
        method: str = self.value("quant_method", str, "")
        if not method and self._is_mlx:
            return "mlx"
        if not method and (self.flag("load_in_4bit") or self.flag("load_in_8bit")):
            return "bitsandbytes"
        if not method and self.there:
            raise Unread(f"{self._key} names no quant_method")
        return method.lower()

    @property
    def scales_f8(self) -> bool:
        """Whether 8-bit floats of this checkpoint need a scale."""
        try:
            return self.method in {"fp8", "fbgemm_fp8", "compressed-tensors"}
        except Unread:
            return True

    def require(self, *methods: str, silent: bool = True) -> str:
        """The declared method, which is one of those; `silent`: or none is declared."""
        method = self.method
        if not method and not silent:
            raise Unread(f"is laid out as {methods[0]}, and no quantization_config says how")
        if method and method not in methods:
            raise Unread(f"is laid out as {methods[0]}, and the config says {clean(method, 40)!r}")
        return method

    def value(self, key: str, kind: type, default: Any, of: Mapping[str, Any] | None = None) -> Any:
        """The value of that key, which has that type; the default for none."""
        value = (self._said if of is None else of).get(key)
        if value is None:
            return default
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise Unread(f"{self._key}: {key} is no {_KINDS[kind]}")
        return value

    def flag(self, key: str) -> bool:
        """Whether that key is true."""
        return bool(self.value(key, bool, False))

    def texts(self, *keys: str) -> list[str]:
        """The texts of those lists."""
        lists = [self.value(key, list, []) for key in keys]
        return [text for texts in lists for text in texts if isinstance(text, str) and text]

    def block(self) -> tuple[int, int]:
        """(rows, columns) that share a scale where the scales are a grid; 128 × 128 unless said."""
        sizes = [self.value("weight_block_size", list, None)]
        sizes += [self.value("block_structure", list, None, of=w) for w in self.weights()]
        given = [tuple(size) for size in sizes if size is not None] or [(128, 128)]
        if any(len(b) != 2 or any(type(n) is not int or n < 1 for n in b) for b in given):
            raise Unread(f"{self._key}: the size of a block is no pair of counts")
        if len(set(given)) > 1:
            raise Unread(f"{self._key}: blocks of several sizes")
        return given[0]

    def weights(self) -> list[Mapping[str, Any]]:
        """What compressed-tensors' groups say of weights."""
        groups = self.value("config_groups", dict, {}).values()
        if not all(isinstance(group, Mapping) for group in groups):
            raise Unread(f"{self._key}: config_groups is no object of objects")
        found = [self.value("weights", dict, {}, of=group) for group in groups]
        return [weights for weights in found if weights]

    def targets(self) -> list[str]:
        """The modules that compressed-tensors' groups are of, by name, expression or class."""
        groups = self.value("config_groups", dict, {}).values()
        listed = [self.value("targets", list, [], of=g) for g in groups if isinstance(g, Mapping)]
        return [text for texts in listed for text in texts if isinstance(text, str)]

    def refuse_more(self) -> None:
        """Raises where compressed-tensors does more to a layer than to quantise it."""
        if self.value("transform_config", dict, {}):
            raise Unread("transform_config turns what goes through the layers, which is not read")
        sparse = self.value("sparsity_config", dict, {}).get("format")
        if sparse not in (None, "dense"):
            raise Unread(f"sparsity {clean(sparse, 40)!r} is not read")

    def layer(self, module: str) -> Mapping[str, Any]:
        """MLX: what is said of that layer, else of all."""
        own = self._said.get(module)
        if own is False:
            raise Unread("is laid out as mlx, and the config says that it is not quantised")
        return own if isinstance(own, Mapping) else self._said


_KINDS: Mapping[type, str] = {
    str: "text", int: "whole number", bool: "true or false", list: "list", dict: "object",
}  # fmt: skip
