"""The heat maps of the lens: words of the shift, and parts of the update."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from projaudit.formats.charts import Chart
from projaudit.formats.planes import heat
from projaudit.formats.wording import percent
from projaudit.inert import clean
from projaudit.lens.charted import charted
from projaudit.lens.result import Decoding, HeatMap, Score, Study

TOKENS = 12
"""Tokens of the frequency map."""


def token_maps(study: Study) -> Iterator[Chart]:
    """In what share of images a token is among the first of their v0 (docs/lens.md 3)."""
    for n, space in enumerate(("LM head", "input embeddings")):
        found = [d for d in study.decodings if d.space == space]
        if not found:
            continue
        words = _frequent(found)
        shares = [[_share_of(d, word) for d in found] for word in words]
        columns = [
            f"{d.group[0]}{'c' if d.centred else 'u'}{'+' if d.sign == '+' else '−'}" for d in found
        ]
        best = max(found, key=lambda d: d.shares[0])
        summary = (
            f"Most often: {best.tokens[0]!r} in {percent(best.shares[0])} of {best.group} images "
            f"({'centred' if best.centred else 'not centred'}, {best.sign}v0)."
        )
        title, ident = f"Tokens of the shift direction: {space}", f"tokens-{n}"
        yield charted(
            ident,
            title,
            "share of images (%) with the token among the first five of their v0",
            "Columns: c clean or t triggered images; u not centred or c centred over tokens; the "
            "sign of v0. Words that the images share say where they all shift to.",
            clean(summary, 300),
            heat(ident, title, clean(summary, 300), ("token", ""), words, columns, shares),
            (),
            ("token", *columns),
            [
                (clean(w), *(percent(s or 0) for s in row))
                for w, row in zip(words, shares, strict=True)
            ],
        )


def _frequent(found: Sequence[Decoding]) -> list[str]:
    """The tokens that are most frequent in any column, those of one column after the other's."""
    best: dict[str, float] = {}
    for one in found:
        for token, share in zip(one.tokens, one.shares, strict=True):
            best[token] = max(share, best.get(token, 0.0))
    return sorted(best, key=lambda token: (-best[token], token))[:TOKENS]


def _share_of(one: Decoding, token: str) -> float | None:
    return dict(zip(one.tokens, one.shares, strict=True)).get(token)


def subspace_maps(study: Study) -> Iterator[Chart]:
    """Success and clean answers over (k1, k2), for every map (docs/lens.md 6)."""
    found = study.answered
    if found is None:
        return
    labelled = found.tuned.accuracy is not None
    kinds: list[tuple[str, Callable[[Score], float | None]]] = []
    if found.success_is != "none":
        kinds.append(("attack success", lambda score: score.success))
    if labelled:
        kinds.append(("clean answers right", lambda score: score.accuracy))
    else:
        kinds.append(("clean answers as tuned", lambda score: score.kept))
    for n, one in enumerate(found.maps):
        for m, (words, of) in enumerate(kinds):
            yield _map(f"map-{n}-{m}", one, words, of, found.base, found.tuned)


def _map(
    ident: str,
    one: HeatMap,
    words: str,
    of: Callable[[Score], float | None],
    base: Score,
    tuned: Score,
) -> Chart:
    shares = [[of(score) for score in row] for row in one.scores]
    part = "first k" if one.ranks == "cumulative" else "k-th"
    does = f"base + the {part}" if one.kind == "recovery" else f"tuned − the {part}"
    title = f"{one.kind.capitalize()}: {words}"
    known = [share for row in shares for share in row if share is not None]
    whole = f"base {_percent(of(base))}, tuned {_percent(of(tuned))}"
    spread = f"from {percent(min(known))} to {percent(max(known))}" if known else "not measured"
    summary = f"{words.capitalize()}, %: {spread}; {whole}."
    rows, columns = [str(k) for k in one.first], [str(k) for k in one.second]
    return charted(
        ident,
        title,
        f"{does} components; bias and norms the {'tuned' if one.bias else 'base'}'s",
        "k1 counts components of the layers that read the features, k2 those of the layers behind "
        "them.",
        summary,
        heat(ident, title, summary, ("k1", "k2"), rows, columns, shares) if known else "",
        (),
        ("k1 \\ k2", *columns),
        [(k, *(_percent(share) for share in row)) for k, row in zip(rows, shares, strict=True)],
    )


def _percent(share: float | None) -> str:
    return "–" if share is None else percent(share)
