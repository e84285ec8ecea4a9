"""The projection head of self-distillation (DINO, iBOT; paper §3.2, Tab. 1): MLP → unit sphere → prototypes.

Legend: D width, H hidden, b bottleneck, K prototypes. One head for the CLS token, another for the masked patches;
they never share weights. State-dict names are given: `mlp.0`, `mlp.2`, `mlp.4` (of one layer: `mlp`), `last_layer.weight`.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3.errors import DinoError
from dinov3.models.vit import init_layers


class ProjectionHead(nn.Module):
    """Features [..., D] → logits over prototypes [..., K].

    `n_layers` linear layers D → H → … → H → b with exact GELU between them, division by the length, then a linear
    layer without bias. (No weight normalisation there, unlike in DINO: the reference has the options and ignores them.)
    7B: DINO H 8192, b 512, K 262 144; iBOT H 4096 (paper: 8192), b 384, K 98 304.
    """

    def __init__(
        self, in_dim: int, n_prototypes: int, *, n_layers: int = 3, hidden_dim: int = 2048, bottleneck_dim: int = 256
    ) -> None:
        super().__init__()
        if n_layers < 1:
            raise DinoError(f"a projection head has at least 1 layer, not {n_layers}")
        widths = [in_dim, *[hidden_dim] * (n_layers - 1), bottleneck_dim]
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after), nn.GELU()]
        self.mlp = nn.Sequential(*layers[:-1]) if n_layers > 1 else layers[0]
        self.last_layer = nn.Linear(bottleneck_dim, n_prototypes, bias=False)

    @torch.no_grad()
    def init_weights(self) -> None:
        init_layers(self)

    def forward(self, x: Tensor, part: str = "all") -> Any:
        """`part` "all": [..., D] → [..., K]; "bottleneck": [..., D] → unit vectors [..., b]; "prototypes": those → [..., K].

        The parts exist so that ranks can send b numbers instead of K. They are one method because sharding gathers
        the weights when a module is called, and only then. "both": (logits [..., K], the bottleneck [..., b] before it
        is divided by its length), which SIGReg takes.
        """
        if part not in ("all", "both", "bottleneck", "prototypes"):
            raise DinoError(f"a projection head runs 'all', 'both', 'bottleneck' or 'prototypes', not {part!r}")
        if part == "prototypes":
            return self.last_layer(x)
        raw = self.mlp(x)
        x = F.normalize(raw, dim=-1, eps=1e-6 if raw.dtype == torch.float16 else 1e-12)
        if part == "bottleneck":
            return x
        return self.last_layer(x) if part == "all" else (self.last_layer(x), raw)
