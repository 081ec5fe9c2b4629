"""Where the data files beside the code are: rules, report templates, the demo's models."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

_HERE = Path(__file__).resolve().parent
_CHECKOUT = {
    "rules": "rules",
    "templates": "reports/templates",
    "demo": "benchmarks/testbed/exported",
}


def data_path(kind: Literal["rules", "templates", "demo"]) -> Path:
    """The folder of that kind: inside an installed package, else in the checkout around it."""
    packaged = _HERE / "_data" / kind
    return packaged if packaged.exists() else _HERE.parent / _CHECKOUT[kind]
