"""Files of weights: which are published (`catalog`), how they are written (`formats`), how they are opened (`loading`).

    opened = weights.open("model.safetensors")      # any form, by content: a path, a folder, a URL, a Hugging Face id
    model = weights.build(opened.config, opened)

`dinov3.weights.catalog` is cheap to import; what needs torch is resolved on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_WHERE = {
    "OpenedWeights": "dinov3.weights.loading",
    "build": "dinov3.weights.loading",
    "explain_mismatch": "dinov3.weights.loading",
    "fingerprint": "dinov3.weights.loading",
    "open": "dinov3.weights.loading",
    "save": "dinov3.weights.loading",
    "fetch": "dinov3.weights.download",
    "resolve": "dinov3.weights.catalog",
}
__all__ = ["OpenedWeights", "build", "explain_mismatch", "fetch", "fingerprint", "open", "resolve", "save"]

if TYPE_CHECKING:
    from dinov3.weights.catalog import resolve
    from dinov3.weights.download import fetch
    from dinov3.weights.loading import OpenedWeights, build, explain_mismatch, fingerprint, open, save


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        value = getattr(importlib.import_module(_WHERE[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'dinov3.weights' has no attribute {name!r}")
