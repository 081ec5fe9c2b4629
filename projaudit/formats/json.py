"""The report as JSON: a versioned contract, built by hand, with its schema and its reader.

Two runs over equal input with equal settings differ in the object `run` and nowhere else.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from projaudit import __version__
from projaudit.errors import FormatError
from projaudit.evidence import Answer, Evidence, Exchange, Payload, Refusals
from projaudit.findings import Finding, Measurement, Null, Series
from projaudit.formats import screening
from projaudit.formats.said import q_score
from projaudit.formats.wording import worst_first
from projaudit.inert import clean
from projaudit.report import (
    SCHEMA_VERSION,
    AuditedProjector,
    Coverage,
    ErrorRecord,
    Identity,
    Provenance,
    Report,
    Run,
    Standing,
    TensorRead,
)

_SCHEMA = Path(__file__).resolve().parent.parent / "report.schema.json"
_TEXT_LIMIT = 4000


def render(report: Report) -> str:
    """The JSON document, ending in a newline; ASCII, no NaN, no control characters, no markup."""
    text = json.dumps(_inert(_document(report)), allow_nan=False, indent=2)
    # Escaped, these mean the same, and a page that embeds the document cannot be broken out of.
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text + "\n"


def parse(text: str) -> dict[str, Any]:
    """The document in `text`; raises FormatError `format.report` for what is no report of ours.

    Fields that this version does not know are kept and mean nothing; another major is refused.
    """
    try:
        document = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise _refused(f"not valid JSON: {error}") from None
    if not isinstance(document, dict):
        raise _refused("not a JSON object")
    version = document.get("schema_version")
    if not isinstance(version, str):
        raise _refused("no schema version: not a projaudit report", "schema_version")
    ours = SCHEMA_VERSION.partition(".")[0]
    if version.partition(".")[0] != ours:
        raise FormatError(
            f"schema version {clean(version, 40)!r}, and this projaudit reads {ours}.x",
            "report",
            field="schema_version",
            remedy="read it with the projaudit that wrote it, or audit again",
        )
    for name in schema()["required"]:
        if name not in document:
            raise _refused("missing", name)
    return document


def schema() -> dict[str, Any]:
    """The published JSON Schema (draft 2020-12) of the report."""
    loaded: dict[str, Any] = json.loads(_SCHEMA.read_text(encoding="utf-8"))
    return loaded


def _refused(message: str, field: str | None = None) -> FormatError:
    return FormatError(
        clean(message), "report", field=field, remedy="use a file that `--format json` wrote"
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return found


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def _inert(value: Any) -> Any:
    """The same document with every string made inert, keys too."""
    if isinstance(value, str):
        return clean(value, _TEXT_LIMIT)
    if isinstance(value, dict):
        return {clean(key, _TEXT_LIMIT): _inert(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_inert(item) for item in value]
    return value


def _document(report: Report) -> dict[str, Any]:
    evidence, standing = report.behaviour, report.standing
    return {
        "schema_version": SCHEMA_VERSION,
        "tool": {"name": "projaudit", "version": __version__},
        "status": report.status,
        "verdict": report.verdict.value,
        "exit_code": report.exit_code,
        "sentence": report.sentence,
        "scope": report.scope,
        "limits": list(report.limits),
        "score": _number(evidence.score) if evidence and evidence.score is not None else None,
        "score_percentile": _number(standing.percentile) if standing else None,
        "payload": _best(evidence.payloads[0]) if evidence and evidence.payloads else None,
        "error": _error(report.error) if report.error else None,
        "policy": {
            "name": report.policy.name,
            "depth": report.policy.depth,
            "fail_on": report.policy.fail_on,
            "exit_zero": report.policy.exit_zero,
        },
        "target": _identity(report.target),
        "base": _identity(report.base) if report.base else None,
        "provenance": _provenance(report.provenance) if report.provenance else None,
        "projectors": [_projector(p) for p in sorted(report.projectors, key=lambda p: p.subject)],
        "coverage": _coverage(report.coverage),
        "findings": [_finding(finding) for finding in worst_first(report.findings)],
        "unevaluated": [
            {"rule": u.rule, "subject": u.subject, "reason": u.reason, "required": u.required}
            for u in sorted(report.unevaluated, key=lambda u: (u.rule, u.subject, u.reason))
        ],
        "rules": [
            {
                "rule": r.rule,
                "title": r.title,
                "severity": r.severity.label,
                "outcome": r.outcome,
                "why": r.why,
                "remedy": r.remedy,
                "references": list(r.references),
                "calibration": r.calibration,
            }
            for r in sorted(report.rules, key=lambda r: r.rule)
        ],
        "behaviour": _behaviour(evidence) if evidence else None,
        "not_probed": report.not_probed or None,
        "calibration": _calibration(standing) if standing else None,
        "screening": screening.document(report.screened) if report.screened else None,
        "measurements": [
            _measurement(m)
            for m in sorted(report.measurements, key=lambda m: (m.subject, m.metric))
        ],
        "skipped": [
            {"metric": s.metric, "subject": s.subject, "reason": s.reason}
            for s in sorted(report.skipped, key=lambda s: (s.subject, s.metric, s.reason))
        ],
        "series": [
            _series(s) for s in sorted(report.series, key=lambda s: (s.subject, s.chart, s.label))
        ],
        "tensors": [_tensor(tensor) for tensor in sorted(report.tensors, key=_place)],
        "settings": {key: _setting(value) for key, value in sorted(report.settings.items())},
        "environment": dict(sorted(report.environment.items())),
        "run": _run(report.run, report.target, report.base),
    }


def _best(payload: Payload) -> dict[str, Any]:
    return {
        "text": payload.text,
        "support": {
            "probes": len(payload.probes),
            "prompts": len(payload.prompts),
            "images": len(payload.images),
            "agreement": _number(payload.agreement),
            "base_agreement": _number(payload.base_agreement),
            "plain": _number(payload.plain),
            "log_odds": _number(payload.log_odds),
            "q_score": _number(q_score(payload)),
            "norm": _number(payload.norm),
            "base_norm": _number(payload.base_norm),
        },
    }


def _payload(payload: Payload) -> dict[str, Any]:
    return {
        "text": payload.text,
        "tokens": payload.tokens,
        "foreign": payload.foreign,
        "strength": _number(payload.strength),
        "undiscounted": _number(payload.undiscounted),
        "agreement": _number(payload.agreement),
        "base_agreement": _number(payload.base_agreement),
        "probes": list(payload.probes),
        "prompts": list(payload.prompts),
        "images": list(payload.images),
        "plain": _number(payload.plain),
        "fluency": _number(payload.fluency),
        "likelihood": _number(payload.likelihood),
        "norm": _number(payload.norm),
        "base_likelihood": _number(payload.base_likelihood),
        "base_norm": _number(payload.base_norm),
        "log_odds": _number(payload.log_odds),
        "q_score": _number(q_score(payload)),
    }


def _refusals(refusals: Refusals) -> dict[str, Any]:
    return {
        "requests": list(refusals.requests),
        "words": refusals.words,
        "base": _number(refusals.base),
        "answered": _number(refusals.answered),
        "probe": refusals.probe,
        "base_under": _number(refusals.base_under),
        "answered_under": _number(refusals.answered_under),
        "answers": [_answer(answer) for answer in refusals.answers],
    }


def _behaviour(evidence: Evidence) -> dict[str, Any]:
    carrier = evidence.carrier
    return {
        "prompts": list(evidence.prompts),
        "prompts_unread": list(evidence.prompts_unread),
        "images": evidence.images,
        "ordinary_images": evidence.ordinary_images,
        "ground": None if evidence.ground is None else list(evidence.ground),
        "probes": evidence.probes,
        "planned": evidence.planned,
        "answers": evidence.answers,
        "passes": evidence.passes,
        "budget": evidence.budget,
        "stopped": evidence.stopped,
        "payloads": [_payload(payload) for payload in evidence.payloads],
        "open": [{"text": one.text, "share": _number(one.share)} for one in evidence.open],
        "short_cuts": [
            {
                "place": one.place,
                "word": one.word,
                "share": _number(one.share),
                "norm": _number(one.norm),
                "likelihood": _number(one.likelihood),
                "base_word": one.base_word,
                "base_share": _number(one.base_share),
                "base_norm": _number(one.base_norm),
                "base_likelihood": _number(one.base_likelihood),
            }
            for one in evidence.short_cuts
        ],
        "drift": _number(evidence.drift),
        "exchanges": [_exchange(exchange) for exchange in evidence.exchanges],
        "refusals": _refusals(evidence.refusals) if evidence.refusals else None,
        "carrier": {
            "tuned_projector_tuned_model": _number(carrier.tuned_projector_tuned_model),
            "base_projector_tuned_model": _number(carrier.base_projector_tuned_model),
            "tuned_projector_base_model": _number(carrier.tuned_projector_base_model),
            "base_projector_base_model": _number(carrier.base_projector_base_model),
        }
        if carrier
        else None,
        "with_base": evidence.with_base,
        "notes": list(evidence.notes),
        "dtype": evidence.dtype,
        "parameters": evidence.parameters,
        "sandbox": {
            "enforced": list(evidence.sandbox.enforced),
            "missing": list(evidence.sandbox.missing),
        },
    }


def _exchange(exchange: Exchange) -> dict[str, Any]:
    return {
        "probe": exchange.probe,
        "kind": exchange.kind,
        "answers": [_answer(answer) for answer in exchange.answers],
    }


def _answer(answer: Answer) -> dict[str, Any]:
    return {
        "prompt": answer.prompt,
        "image": answer.image,
        "tuned": answer.tuned,
        "base": answer.base,
        "agrees": answer.agrees,
    }


def _calibration(standing: Standing) -> dict[str, Any]:
    return {
        "id": standing.calibration,
        "source": standing.source,
        "n": len(standing.honest),
        "n_backdoored": len(standing.backdoored),
        "percentile": _number(standing.percentile),
        "false_positive_rate": _number(standing.false_positive_rate),
        "false_positive_bound": _number(standing.false_positive_bound),
        "outside": list(standing.outside),
        "covered": not standing.outside,
    }


def _setting(value: str | int | float | bool | tuple[str, ...] | None) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return _number(value) if isinstance(value, float) else value


def _error(error: ErrorRecord) -> dict[str, Any]:
    return {
        "code": error.code,
        "message": error.message,
        "file": error.file,
        "field": error.field,
        "remedy": error.remedy,
    }


def _identity(identity: Identity) -> dict[str, Any]:
    # from_cache depends on the state of this machine, so it stands in `run`.
    return {
        "ref": identity.ref,
        "kind": identity.kind,
        "name": identity.name,
        "revision": identity.revision,
        "commit": identity.commit,
        "endpoint": identity.endpoint,
        "gated": identity.gated,
        "private": identity.private,
    }


def _provenance(provenance: Provenance) -> dict[str, Any]:
    return {
        "source": provenance.source,
        "verified": provenance.verified,
        "claims": [{"source": claim.source, "repo": claim.repo} for claim in provenance.claims],
        "lineage": list(provenance.lineage),
    }


def _projector(projector: AuditedProjector) -> dict[str, Any]:
    return {
        "subject": projector.subject,
        "family": projector.family,
        "reading": projector.reading,
        "base": projector.base,
        "in_features": projector.in_features,
        "out_features": projector.out_features,
        "chain": list(projector.chain),
        "module": projector.module,
        "layers": [
            {
                "role": layer.role,
                "weight": layer.weight,
                "base_weight": layer.base_weight,
                "shape": list(layer.shape),
                "bias": layer.bias,
            }
            for layer in projector.layers
        ],
    }


def _coverage(coverage: Coverage) -> dict[str, Any]:
    return {
        "parts": [
            {
                "name": part.name,
                "status": part.status,
                "how": part.how,
                "tensors": part.tensors,
                "bytes": part.bytes,
                "differing": list(part.differing),
            }
            for part in coverage.parts
        ],
        "files_equal": coverage.files_equal,
        "files_differing": sorted(coverage.files_differing),
        "files_unknown": sorted(coverage.files_unknown),
        "files_added": sorted(coverage.files_added),
        "files_removed": sorted(coverage.files_removed),
        "config_compared": coverage.config_compared,
        "config_changes": sorted(coverage.config_changes),
        "tensors_added": sorted(coverage.tensors_added),
        "tensors_removed": sorted(coverage.tensors_removed),
    }


def _finding(finding: Finding) -> dict[str, Any]:
    values = {name: _number(value) for name, value in sorted(finding.values.items())}
    return {
        "rule": finding.rule,
        "title": finding.title,
        "severity": finding.severity.label,
        "confidence": finding.confidence.value,
        "subject": finding.subject,
        "message": finding.message,
        "why": finding.why,
        "remedy": finding.remedy,
        "references": list(finding.references),
        "values": values,
        "nonfinite": [name for name, value in values.items() if value is None],
        "detail": list(finding.detail),
        "locations": [
            {"file": at.file, "tensor": at.tensor, "start": at.start, "stop": at.stop}
            for at in finding.locations
        ],
        "inconclusive": finding.inconclusive,
        "waived": finding.waived or None,
    }


def _measurement(measurement: Measurement) -> dict[str, Any]:
    return {
        "metric": measurement.metric,
        "subject": measurement.subject,
        "value": _number(measurement.value),
        "nonfinite": not math.isfinite(measurement.value),
        "unit": measurement.unit,
        "nulls": [
            _null(null, measurement.value)
            for null in sorted(measurement.nulls, key=lambda null: null.kind)
        ],
        "detail": list(measurement.detail),
    }


def _null(null: Null, value: float) -> dict[str, Any]:
    return {
        "kind": null.kind,
        "mean": _number(null.mean),
        "sd": _number(null.sd),
        "draws": null.draws,
        "z": null.z(value),
        "nonfinite": not (math.isfinite(null.mean) and math.isfinite(null.sd)),
    }


def _series(series: Series) -> dict[str, Any]:
    return {
        "chart": series.chart,
        "subject": series.subject,
        "label": series.label,
        "x": _numbers(series.x),
        "y": _numbers(series.y),
        "nonfinite": not all(math.isfinite(value) for value in (*series.x, *series.y)),
        "names": list(series.names),
    }


def _place(tensor: TensorRead) -> tuple[str, str, str, str, int]:
    return tensor.side, tensor.projector, tensor.file, tensor.name, tensor.start


def _tensor(tensor: TensorRead) -> dict[str, Any]:
    return {
        "side": tensor.side,
        "projector": tensor.projector,
        "role": tensor.role,
        "name": tensor.name,
        "file": tensor.file,
        "start": tensor.start,
        "stop": tensor.stop,
        "dtype": tensor.dtype,
        "shape": list(tensor.shape),
        "sha256": tensor.sha256,
        "file_sha256": tensor.file_sha256,
        "verified": tensor.verified,
    }


def _run(run: Run, target: Identity, base: Identity | None) -> dict[str, Any]:
    return {
        "started": run.started,
        "seconds": _number(run.seconds),
        "stages": [{"name": name, "seconds": _number(s)} for name, s in run.stages.items()],
        "requests": run.requests,
        "wire_bytes": run.wire_bytes,
        "cache_bytes": run.cache_bytes,
        "fallbacks": list(run.fallbacks),
        "target_from_cache": target.from_cache,
        "base_from_cache": base.from_cache if base else None,
    }


def _number(value: float | None) -> float | None:
    """The value as JSON can hold it: null for NaN, infinities and what is not known."""
    if value is None:
        return None
    plain = float(value)
    return plain if math.isfinite(plain) else None


def _numbers(values: Iterable[float]) -> list[float | None]:
    return [_number(value) for value in values]
