"""DINOv3, independently implemented. `import dinov3` is cheap: names are resolved on first use.

model = dinov3.load("dinov3_vits16", weights="model.safetensors")
f = dinov3.embed(model, ["a.jpg", "b.jpg"])        # f.cls [B, D], f.patches [B, h, w, D]
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_WHERE = {
    "load": "dinov3.hub",
    "embed": "dinov3.features",
    "encode": "dinov3.features",
    "extract": "dinov3.features",
    "list_models": "dinov3.hub",
    "default_preprocessing": "dinov3.features",
    "Features": "dinov3.features",
    "Preprocessing": "dinov3.data.transforms.inputs",
    "DinoError": "dinov3.errors",
    "push_to_hub": "dinov3.export.convert",
    "save_pretrained": "dinov3.export.convert",
}
__all__ = [
    "DinoError",
    "Features",
    "Preprocessing",
    "default_preprocessing",
    "embed",
    "encode",
    "extract",
    "list_models",
    "load",
    "push_to_hub",
    "save_pretrained",
]

if TYPE_CHECKING:
    from dinov3.data.transforms.inputs import Preprocessing
    from dinov3.errors import DinoError
    from dinov3.export.convert import push_to_hub, save_pretrained
    from dinov3.features import Features, default_preprocessing, embed, encode, extract
    from dinov3.hub import list_models, load


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        value = getattr(importlib.import_module(_WHERE[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'dinov3' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_WHERE])
