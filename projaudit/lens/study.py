"""The whole look through the lens, in the confined process: from a request to plain values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from projaudit.behaviour.images import Image
from projaudit.behaviour.loading import image_size, load
from projaudit.behaviour.places import in_module
from projaudit.behaviour.prompts import GENERAL, usable
from projaudit.behaviour.reasons import CouldNotProbe
from projaudit.behaviour.speaker import Side, Speaker
from projaudit.lens.answers import Questions, Wanted, answered
from projaudit.lens.capture import Both, Pictures, plain, read_all
from projaudit.lens.decoding import Space, Words, chance, decode, words_of
from projaudit.lens.drifting import Shifted, drifted
from projaudit.lens.result import DRAWN, Answered, Decoding, LayerSpectrum, Study
from projaudit.lens.subspace import LayerParts, delta_of, layer_parts
from projaudit.lens.triggers import parse_trigger
from projaudit.linalg import spectrum
from projaudit.projector import Linear

PROMPTS = 4
"""General questions that are asked in turn."""
KNOWN = 16
"""Singular values by which the noise edge of an update is found."""


def study(request: Mapping[str, Any], tell: Callable[[str, int, int], None]) -> dict[str, Any]:
    """`result.Study` as JSON values, or which images were all that could not be read.

    `request`: what `loading.load` needs; `layers` (of the forward path: those of
    `projector.Linear`, and `reads`: whether they read the features), `reader` (the layer that reads
    the hidden units, None), `images`, `triggered` (files), `trigger` (a spec or None), `target`,
    `prompts` (None for general ones), `labels` (file name -> [prompt, answer]), `per_cell`, `most`,
    `maps` (pairs of ranks and bias), `length`.
    """
    tell("load model", 0, 0)
    (speaker, tuned), other, _ = load(request)
    assert other is not None
    size = image_size(speaker.processor)
    clean = read_all(request["images"], size)
    marked = _triggered(request, clean, size)
    for which, found in (("images", clean), ("triggered", marked)):
        if found is not None and not found.images:
            return {"refused": which, "unreadable": list(found.unreadable[:20]), "study": None}
    found_study = look(Subject(speaker, other[1], tuned), request, clean, marked, tell)
    return {"refused": "", "unreadable": [], "study": asdict(found_study)}


@dataclass(frozen=True)
class Subject:
    """A loaded model with both projectors."""

    speaker: Speaker
    base: Side
    tuned: Side


def look(
    subject: Subject,
    request: Mapping[str, Any],
    clean: Pictures,
    marked: Pictures | None,
    tell: Callable[[str, int, int], None],
) -> Study:
    """All analyses, of images that are read."""
    speaker = subject.speaker
    prompts, asked = _prompts(speaker, request, clean, marked)
    speaker.prepare(prompts, clean.images[0])
    speaker.settle(2 * clean.images[:1] if len(clean.images) == 1 else clean.images)
    target = _target(speaker, request["target"])
    tell("features", 0, 0)
    features = {"clean": speaker.features(clean.images)}
    if marked is not None:
        features["triggered"] = speaker.features(marked.images)
    tell("spectra", 0, 0)
    exact = _exact(request)
    parts = _parts(request, exact)
    spectra = tuple(_spectrum(name, one, exact) for name, one in parts.items())
    tell("drift", 0, 0)
    reader = request["reader"]
    reader = in_module(reader, request["prefix"]).rpartition(".")[0] if reader else ""
    drifts = drifted(Both(speaker, subject.base, subject.tuned, reader), features, tell)
    tell("decode", 0, 0)
    decodings, chances = _decoded(speaker, drifts.shifts, target, int(request["seed"]))
    answers: Answered | None = None
    if request["per_cell"]:
        tell("answers", 0, 0)
        answers = answered(
            speaker,
            subject.base,
            subject.tuned,
            exact,
            parts,
            _questions(request, features, clean, marked, asked),
            prompts,
            Wanted(
                str(request["target"] or "").lower(),
                int(request["length"]),
                tuple((ranks, bool(bias)) for ranks, bias in request["maps"]),
                int(request["most"]),
            ),
            tell,
        )
    notes = [*request["notes"]]
    if reader and drifts.units is None:
        notes.append("transformers builds no layer that reads the hidden units")
    if len(spectra) > DRAWN:
        notes.append(f"of {len(spectra)} layers those {DRAWN} are drawn that changed most")
    if not decodings:
        notes.append("the outputs are no vectors of the language model's width: not decoded")
    return Study(
        clean=clean.names,
        triggered=() if marked is None else marked.names,
        unreadable=(*clean.unreadable, *(() if marked is None else marked.unreadable)),
        prompts=tuple(prompts),
        tokens=drifts.tokens,
        spectra=spectra,
        clusters=drifts.clusters,
        drift=drifts.spectra,
        shifts=tuple(one.shift for one in drifts.shifts),
        decodings=decodings,
        chance=chances,
        norms=drifts.norms,
        laws=drifts.laws,
        units=drifts.units,
        answered=answers,
        notes=tuple(notes),
        dtype=str(request["dtype"]),
        parameters=sum(p.numel() for p in speaker.model.parameters()),
    )


# ------------------------------------------------------------------ what is looked at


def _triggered(request: Mapping[str, Any], clean: Pictures, size: int) -> Pictures | None:
    if request["triggered"]:
        return read_all(request["triggered"], size)
    if not request["trigger"]:
        return None
    trigger, seed = parse_trigger(request["trigger"]), int(request["seed"])
    marked: list[Image] = [trigger.over(image, seed, i) for i, image in enumerate(clean.images)]
    return Pictures(clean.names, marked, ())


def _prompts(
    speaker: Speaker, request: Mapping[str, Any], clean: Pictures, marked: Pictures | None
) -> tuple[tuple[str, ...], dict[str, int]]:
    """The prompts, and which of them an image of a name is asked.

    Its label's where it has one; the others in turn.
    """
    labels, groups = request["labels"], [clean.names, *([marked.names] if marked else [])]
    general: tuple[str, ...] = ()
    if any(name not in labels for names in groups for name in names):
        wanted = request["prompts"] or GENERAL
        most = len(wanted) if request["prompts"] else PROMPTS
        general, _ = usable(speaker.processor.tokenizer, wanted, most, fewest=1)
    asked: dict[str, str] = {}
    for names in groups:
        for i, name in enumerate(names):
            asked.setdefault(name, labels[name][0] if name in labels else general[i % len(general)])
    prompts = tuple(dict.fromkeys(asked.values()))
    return prompts, {name: prompts.index(prompt) for name, prompt in asked.items()}


def _target(speaker: Speaker, text: str | None) -> frozenset[int]:
    """The ids of the target text's tokens, as it begins an answer and within one."""
    if not text:
        return frozenset()
    tokenizer = speaker.processor.tokenizer
    spelled = (text, " " + text)
    ids = {i for t in spelled for i in tokenizer(t, add_special_tokens=False).input_ids}
    if tokenizer.unk_token_id in ids:
        raise CouldNotProbe("the target text has words outside its tokenizer's vocabulary")
    return frozenset(ids)


def _questions(
    request: Mapping[str, Any],
    features: Mapping[str, Tensor],
    clean: Pictures,
    marked: Pictures | None,
    asked: Mapping[str, int],
) -> Questions:
    """The first images of both groups, each with its prompt and, where known, the right answer."""
    most = int(request["per_cell"])
    names, parts = [*clean.names[:most]], [features["clean"][:most]]
    if marked is not None:
        names += marked.names[:most]
        parts.append(features["triggered"][:most])
    return Questions(
        features=torch.cat(parts),
        names=tuple(names),
        prompts=tuple(asked[name] for name in names),
        truths=tuple(request["labels"].get(name, (None, None))[1] for name in names),
        clean=len(parts[0]),
    )


# ------------------------------------------------------------------ the update


def _exact(request: Mapping[str, Any]) -> tuple[Side, Side]:
    """Base and tuned in their storage dtypes, by name in the module."""
    prefix, device = request["prefix"], request["device"]
    base, tuned = (load_file(request[side], device=device) for side in ("base", "tuned"))
    ours = {in_module(n, prefix): t for n, t in tuned.items() if n.startswith(prefix)}
    theirs = {in_module(n, prefix): t for n, t in base.items() if n.startswith(prefix)}
    return {**ours, **theirs}, ours


def _parts(request: Mapping[str, Any], exact: tuple[Side, Side]) -> dict[str, LayerParts]:
    """Weight's name in the module -> its update's leading components, of the forward path."""
    found = {}
    for told in request["layers"]:
        fields = {name: value for name, value in told.items() if name != "reads"}
        layer = Linear(**{**fields, "shape": tuple(told["shape"])})
        name = in_module(layer.weight, request["prefix"])
        delta = delta_of(layer, exact[0][name], exact[1][name])
        found[name] = layer_parts(layer, delta, first=told["reads"], most=int(request["most"]))
    return found


def _spectrum(name: str, parts: LayerParts, exact: tuple[Side, Side]) -> LayerSpectrum:
    """All singular values of ΔW, and how many stand above its own noise (docs/lens.md 1)."""
    rows, columns = parts.layer.shape
    base, tuned = (side[name] for side in exact)
    edge, spikes = 0.0, 0
    if float(parts.values[0]) > 0:
        delta = delta_of(parts.layer, base, tuned)
        k, generator = min(KNOWN, len(parts.values)), torch.Generator().manual_seed(0)
        noise = spectrum(delta, k, generator=generator)
        edge, spikes = noise.threshold, noise.above_edge
    return LayerSpectrum(
        layer=name.removesuffix(".weight"),
        rows=rows,
        columns=columns,
        values=plain(parts.values),
        base_frobenius=float(base.float().norm()),
        edge=float(f"{edge:.7g}"),
        spikes=spikes,
    )


# ------------------------------------------------------------------ words


def _decoded(
    speaker: Speaker, shifts: Sequence[Shifted], target: frozenset[int], seed: int
) -> tuple[tuple[Decoding, ...], float | None]:
    """The tokens of every shift, through the head and against the embeddings."""
    tokenizer = speaker.processor.tokenizer

    def spell(token: int) -> str:
        return str(tokenizer.convert_ids_to_tokens(token))

    places: Sequence[tuple[Space, Any]] = (
        ("LM head", speaker.model.get_output_embeddings()),
        ("input embeddings", speaker.model.get_input_embeddings()),
    )
    found: list[Decoding] = []
    by_chance: float | None = None
    for space, module in places:
        weight = getattr(module, "weight", None)
        if weight is None or not shifts or weight.shape[1] != len(shifts[0].common):
            continue
        words: Words = words_of(space, weight, spell)
        if space == "LM head":
            by_chance = chance(words, target, torch.Generator().manual_seed(seed))
        for one in shifts:
            found += decode(
                words,
                one.shift.group,
                one.directions,
                one.common,
                centred=one.shift.centred,
                target=target,
            )
    return tuple(found), by_chance
