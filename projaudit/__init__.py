"""projaudit audits the projector of a multimodal model against its base."""

from __future__ import annotations

__version__ = "0.1.0"
