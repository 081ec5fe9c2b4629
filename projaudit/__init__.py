"""projaudit audits the projector of a multimodal model against its base.

`check` runs an audit and returns a `Report`; importing this module imports no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from projaudit.audit import check
    from projaudit.errors import ProjauditError
    from projaudit.findings import Finding, Verdict
    from projaudit.locating import locate
    from projaudit.report import Report

__version__ = "0.1.0"

__all__ = ["Finding", "ProjauditError", "Report", "Verdict", "__version__", "check", "locate"]

_HOMES = {
    "check": "audit",
    "ProjauditError": "errors",
    "Finding": "findings",
    "Verdict": "findings",
    "locate": "locating",
    "Report": "report",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
