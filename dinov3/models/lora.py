"""LoRA: a frozen linear layer learns a difference of low rank (arXiv 2106.09685), which is merged into it afterwards.

    y = W x + b + (alpha / rank) · B A x        A [rank, I] drawn, B [O, rank] zeros: nothing has changed at step 0

Legend: I inputs, O outputs of a linear layer. The fused qkv layer is one layer of 3·D outputs, with one A.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3.errors import DinoError, one_of

RANK = 8
ATTENTION, POINTWISE = ("qkv", "proj"), ("pwconv1", "pwconv2")  # the default layers of a ViT, of a ConvNeXt


class LoRA(nn.Module):
    """`base`, frozen, plus a product of two small matrices that train."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.base, self.scale = base.requires_grad_(False), alpha / rank
        self.a = nn.Parameter(base.weight.new_empty(rank, base.in_features))
        self.b = nn.Parameter(base.weight.new_zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.a, math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + F.linear(F.linear(x, self.a), self.b * self.scale)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The plain layer, with the difference added to its weight in place."""
        self.base.weight += self.scale * (self.b @ self.a)
        return self.base


def add_lora(backbone: nn.Module, rank: int = RANK, alpha: float | None = None, layers: Sequence[str] = ()) -> None:
    """Puts a `LoRA` in the place of every linear layer inside blocks whose last name is in `layers`, in place.

    alpha: None is the rank, a scale of 1. layers: none is qkv and proj, of a ConvNeXt pwconv1 and pwconv2. A is drawn from
    torch's random state. Raises `DinoError` for a name that no layer has.
    """
    linears = {name: part for name, part in backbone.named_modules() if isinstance(part, nn.Linear)}
    known = sorted({name.rpartition(".")[2] for name in linears})
    chosen = list(layers) or [name for name in (*ATTENTION, *POINTWISE) if name in known]
    for name in chosen:
        one_of("the linear layer for LoRA", name, known)
    if not chosen:
        raise DinoError(f"name the linear layers for LoRA; this model has {', '.join(known) or 'none'}")
    for name, linear in linears.items():
        parent, _, last = name.rpartition(".")
        if last in chosen:
            setattr(backbone.get_submodule(parent), last, LoRA(linear, rank, rank if alpha is None else alpha))


def merge_lora(backbone: nn.Module) -> None:
    """Puts the plain layers back, each with its difference: the state dict has the names it had before `add_lora`."""
    for name, part in list(backbone.named_modules()):
        if isinstance(part, LoRA):
            parent, _, last = name.rpartition(".")
            setattr(backbone.get_submodule(parent), last, part.merged())
