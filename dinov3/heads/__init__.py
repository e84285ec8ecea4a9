"""Modules that turn a backbone's features into something else; one file per head."""

from __future__ import annotations

from dinov3.heads.projection import ProjectionHead

__all__ = ["ProjectionHead"]
