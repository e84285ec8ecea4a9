"""The two families with their inner part exchanged: tokens, norms and outputs stay those of the plain model's class.

Legend: B images, C channels, H×W patch grid, p patch, D width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3.errors import DinoError
from dinov3.inference.blocks import Rope
from dinov3.inference.fold import after_norm
from dinov3.inference.linear import DTYPES, Linear, arithmetic_of
from dinov3.models.convnext import ConvNeXt
from dinov3.models.vit import VisionTransformer

Engine = Callable[[Tensor, Rope | None, int, Sequence[int], bool], list[Tensor]]  # as `blocks.Blocks.__call__`
KEPT_GRIDS = 64  # whose position tables stay in memory


@dataclass(frozen=True)
class Form:
    """How a fast form computes, and how far a probe image's tokens are from the plain model's."""

    precision: str
    engine: str  # "torch" or "kernels"
    fingerprint: str  # of the plain model's weights
    error: float = 0.0  # the largest ‖fast - plain‖ / ‖plain‖ of a token
    cosine: float = 1.0  # the lowest of a token
    arithmetic: str = ""  # of the products, where this CPU is better at another than the precision's

    def __str__(self) -> str:
        measured = f"relative error {self.error:.1g}" if self.precision == "fp32" else f"cosine {self.cosine:.6f}"
        done = f"{self.engine} in {self.arithmetic}, as this CPU is best" if self.arithmetic else self.engine
        return f"{self.precision} by {done} ({measured} to the plain model)"


class Frozen(nn.Module):
    """What makes a copy of a plain model a fast form. `form` says what it is; `weights.identity` reads it."""

    form: Form

    def _take(self, plain: nn.Module, *without: str) -> None:
        """Becomes a copy of the plain model (float32) without some of its parts."""
        around = copy.copy(plain)
        around._modules = {name: part for name, part in plain._modules.items() if name not in without}
        self.__dict__.update(copy.deepcopy(around.__dict__))
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> Any:
        """Stays in evaluation mode."""
        return super().train(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        own = next(self.parameters()).data
        moved = fn(own)
        if (moved.device, moved.dtype) != (own.device, own.dtype):
            raise DinoError("a fast form stays as it was made: load the model with another device= or fast= instead")
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise DinoError("a fast form can be neither copied nor sent to another process: send the plain model")


def check_input(x: Tensor) -> None:
    if x.requires_grad and torch.is_grad_enabled():
        raise DinoError("a fast form gives no gradients: load the plain model (without fast=)")


def flat_patches(x: Tensor, size: int) -> Tensor:
    """Images [B, C, height, width] → [B, H, W, C·p·p], in the order of a convolution's weights."""
    B, C, height, width = x.shape
    H, W = height // size, width // size
    x = x[..., : H * size, : W * size].reshape(B, C, H, size, W, size)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(B, H, W, C * size * size)


class FlatPatchEmbed(nn.Module):
    """A convolution whose stride is its kernel, as one matrix product."""

    def __init__(self, conv: nn.Conv2d, precision: str) -> None:
        super().__init__()
        self.size, self.dtype = conv.kernel_size[0], DTYPES[precision]
        assert conv.bias is not None
        weight = conv.weight.detach().float()
        self._linear = (Linear(weight.flatten(1), conv.bias.detach().float(), precision, weight.device),)

    def forward(self, x: Tensor) -> Tensor:
        return self._linear[0](flat_patches(x.to(self.dtype), self.size)).float().permute(0, 3, 1, 2)  # [B, D, H, W]


class FastViT(Frozen, VisionTransformer):
    """A ViT whose blocks are an engine's."""

    def __init__(self, plain: VisionTransformer, engine: Engine, form: Form) -> None:
        nn.Module.__init__(self)
        self._take(plain, "blocks", "patch_embed")
        precision = arithmetic_of("bf16" if form.precision == "int8" else form.precision, plain.device)
        self.patch_embed = FlatPatchEmbed(plain.patch_embed.proj, precision)  # type: ignore[assignment]
        self.form, self._engine = form, engine
        self._tables: dict[tuple[int, int], Rope] = {}

    def forward(self, x: Any, masks: Any = None, is_training: bool = False) -> Any:
        """As the plain model's; where the CLS token is all that is wanted, the last block leaves the others out."""
        if is_training or not isinstance(x, Tensor):
            return super().forward(x, masks, is_training)
        return self.head(self.class_tokens(x, masks))

    def class_tokens(self, x: Tensor, masks: Tensor | None = None) -> Tensor:
        """The normalised CLS tokens [B, D] of images [B, C, height, width], and nothing else."""
        tokens, grid = self.tokens(x, masks)
        ((cls,),) = self._run([tokens], [grid], cls_only=True)
        return self._final_norm(cls)[:, 0]

    def _run(
        self, groups: list[Tensor], grids: list[tuple[int, int]], keep: Sequence[int] = (), cls_only: bool = False
    ) -> list[list[Tensor]]:
        layers = list(keep) or [self.n_blocks - 1]
        with torch.autocast(self.cls_token.device.type, enabled=False), torch.no_grad():
            by_group = [
                self._engine(x, self._rope(grid), 1 + self.n_storage_tokens, layers, cls_only)
                for x, grid in zip(groups, grids)
            ]
        return [list(of_layer) for of_layer in zip(*by_group)]

    def _rope(self, grid: tuple[int, int]) -> Rope:
        if grid not in self._tables:
            if len(self._tables) >= KEPT_GRIDS:
                self._tables.pop(next(iter(self._tables)), None)
            self._tables[grid] = self.rope_embed(*grid)
        return self._tables[grid]

    def tokens(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, tuple[int, int]]:
        check_input(x)
        with torch.autocast(x.device.type, enabled=False), torch.no_grad():
            return super().tokens(x, mask)


class _ConvBlock:
    """A ConvNeXt block on maps [B, h, w, C]: the norm's affine part is in the first layer, gamma in the second."""

    def __init__(self, block: Any, precision: str) -> None:
        device = block.dwconv.weight.device
        self.dtype, self.eps = DTYPES[precision], block.norm.eps
        self.conv = block.dwconv.weight.detach().to(self.dtype, copy=True, memory_format=torch.channels_last)
        self.bias = block.dwconv.bias.detach().to(self.dtype, copy=True)
        one, two = (
            (layer.weight.detach().float(), layer.bias.detach().float()) for layer in (block.pwconv1, block.pwconv2)
        )
        if block.gamma is not None:
            gamma = block.gamma.detach().float()
            two = two[0] * gamma[:, None], two[1] * gamma
        weight, bias = after_norm(one, block.norm)
        self.one, self.two = (Linear(w, b, precision, device) for w, b in ((weight, bias), two))

    def __call__(self, x: Tensor) -> Tensor:
        y = x.to(self.dtype).permute(0, 3, 1, 2)  # channels last, as the convolution likes it
        y = F.conv2d(y, self.conv, self.bias, padding=3, groups=y.shape[1]).permute(0, 2, 3, 1)
        y = F.layer_norm(y, y.shape[-1:], eps=self.eps)
        return self.two.add(x, self.one(y, gelu=True))


class FastConvNeXt(Frozen, ConvNeXt):
    """A ConvNeXt on maps with channels last, whose strided convolutions and linear layers are matrix products."""

    def __init__(self, plain: ConvNeXt, form: Form) -> None:
        nn.Module.__init__(self)
        self._take(plain, "downsample_layers", "stages")
        self.form, precision = form, arithmetic_of(form.precision, plain.device)
        self._dtype = DTYPES[precision]
        stem: Any = plain.downsample_layers[0]
        self._stem = (FlatPatchEmbed(stem[0], precision), copy.deepcopy(stem[1]).float().requires_grad_(False))
        self._down = [self._between(down, precision) for down in plain.downsample_layers[1:]]
        stages: Any = plain.stages
        self._blocks = [[_ConvBlock(block, precision) for block in stage] for stage in stages]

    @staticmethod
    def _between(down: Any, precision: str) -> tuple[Linear, float]:
        """A norm and a 2×2 convolution of stride 2 as one layer over the four pixels' channels; and the norm's eps."""
        norm, conv = down[0], down[1]
        weight = conv.weight.detach().float().permute(0, 2, 3, 1).flatten(1)  # [M, 4C], pixels before channels
        bias = conv.bias.detach().float() + weight @ norm.bias.detach().float().repeat(4)
        weight = weight * norm.weight.detach().float().repeat(4)
        return Linear(weight, bias, precision, weight.device), norm.eps

    def _stages(self, x: Tensor) -> list[Tensor]:
        check_input(x)
        if x.shape[-2] < self.stride or x.shape[-1] < self.stride:
            return super()._stages(x)  # raises
        with torch.autocast(x.device.type, enabled=False), torch.no_grad():
            embed, norm = self._stem
            y = norm(embed(x)).permute(0, 2, 3, 1).contiguous()  # [B, h, w, C]
            maps = []
            for i, blocks in enumerate(self._blocks):
                if i:
                    y = self._halved(y, *self._down[i - 1])
                for block in blocks:
                    y = block(y)
                maps.append(y.permute(0, 3, 1, 2))
                y = y.clone()  # blocks write into their input
            return maps

    def _halved(self, x: Tensor, layer: Linear, eps: float) -> Tensor:
        B, h, w, C = x.shape
        y = F.layer_norm(x[:, : h // 2 * 2, : w // 2 * 2], (C,), eps=eps).to(self._dtype)
        y = y.view(B, h // 2, 2, w // 2, 2, C).transpose(2, 3).reshape(B, h // 2, w // 2, 4 * C)
        return layer(y).float()
