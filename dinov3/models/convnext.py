"""The DINOv3 ConvNeXt (paper §5.3; architecture: ConvNeXt V1, arXiv 2201.03545). Torch only.

Legend: B images, c_i channels of stage i, h×w map. Overall strides of the four stages: 4, 8, 16, 32. No padding: every
strided convolution floors the size. "CLS" is the spatial mean of the last map, "patches" its pixels, and the final norm
is applied to both. There are no register tokens. A pseudo patch size resizes intermediate maps to the grid that a ViT
of that patch size would give, so that dense heads see stride 16; `forward_features` never does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3.errors import DinoError
from dinov3.models.architectures import ConvNeXtConfig
from dinov3.models.base import TokenModel, chosen_layers, named_features


class ChannelNorm(nn.Module):
    """LayerNorm over the channels of a [B, C, h, w] map."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x.permute(0, 2, 3, 1), self.weight.shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class Block(nn.Module):
    """x + drop(γ ⊙ MLP(norm(dwconv x))): a 7×7 depthwise convolution, then an MLP of four times the width."""

    def __init__(self, dim: int, drop_path_rate: float, layer_scale: float) -> None:
        super().__init__()
        self.drop_path_rate, self.layer_scale = drop_path_rate, layer_scale
        self.dwconv = nn.Conv2d(dim, dim, kernel_size=7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.pwconv2 = nn.Linear(4 * dim, dim)
        self.gamma = nn.Parameter(torch.full((dim,), float(layer_scale))) if layer_scale else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))  # [B, h, w, C]
        y = self.pwconv2(F.gelu(self.pwconv1(y)))
        y = (y if self.gamma is None else self.gamma * y).permute(0, 3, 1, 2)
        if self.training and self.drop_path_rate > 0:
            keep = 1 - self.drop_path_rate
            y = y * torch.empty(len(x), 1, 1, 1, device=x.device, dtype=x.dtype).bernoulli_(keep) / keep
        return x + y


class ConvNeXt(TokenModel):
    """A DINOv3 ConvNeXt backbone with the same two outputs as the ViT: `forward` [B, D] and `forward_features`."""

    def __init__(self, config: ConvNeXtConfig) -> None:
        super().__init__()
        c = self.config = config
        self.embed_dims = list(c.dims)
        self.embed_dim = self.num_features = c.dims[-1]
        self.n_blocks, self.n_storage_tokens, self.input_pad_size = len(c.dims), 0, 4
        self.patch_size = c.patch_size
        self.chunked_blocks = False
        self.stride = 4 * 2 ** (len(c.dims) - 1)

        stem = nn.Sequential(nn.Conv2d(c.in_chans, c.dims[0], kernel_size=4, stride=4), ChannelNorm(c.dims[0]))
        between = [
            nn.Sequential(ChannelNorm(a), nn.Conv2d(a, b, kernel_size=2, stride=2)) for a, b in zip(c.dims, c.dims[1:])
        ]
        self.downsample_layers = nn.ModuleList([stem, *between])
        # on the CPU whatever the default device: these are plain numbers
        rates = iter(torch.linspace(0, c.drop_path_rate, sum(c.depths), device="cpu").tolist())
        self.stages = nn.ModuleList(
            nn.Sequential(*(Block(dim, next(rates), c.layer_scale_init_value) for _ in range(depth)))
            for dim, depth in zip(c.dims, c.depths)
        )
        self.norm = nn.LayerNorm(self.embed_dim, eps=1e-6)
        # one norm per stage; the last is a second name of `norm`, and files hold it under both
        self.norms = nn.ModuleList([*(nn.Identity() for _ in c.dims[:-1]), self.norm])
        self.head = nn.Identity()

    @torch.no_grad()
    def init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.trunc_normal_(module.weight, std=0.02)
                assert module.bias is not None
                nn.init.zeros_(module.bias)
            elif isinstance(module, (nn.LayerNorm, ChannelNorm)):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, Block) and module.gamma is not None:
                nn.init.constant_(module.gamma, module.layer_scale)

    def patch_grid(self, height: int, width: int) -> tuple[int, int]:
        """(h, w) of the last map for an image of height × width pixels."""
        return height // self.stride, width // self.stride

    def _stages(self, x: Tensor) -> list[Tensor]:
        """The raw maps after each stage, [B, c_i, h_i, w_i]."""
        if x.shape[-2] < self.stride or x.shape[-1] < self.stride:
            raise DinoError(f"an image of {x.shape[-1]}×{x.shape[-2]} pixels is smaller than {self.stride}; resize it")
        maps = []
        for down, stage in zip(self.downsample_layers, self.stages):
            x = stage(down(x))
            maps.append(x)
        return maps

    def forward_features_list(self, x_list: list[Tensor], masks_list: list[Tensor | None]) -> list[dict[str, Any]]:
        """As the ViT's, but masks are returned without effect, `x_prenorm` holds the patches only, [B, hw, D], and
        `x_storage_tokens` is empty, [B, 0, D]."""
        outputs = []
        for images, mask in zip(x_list, masks_list, strict=True):
            last = self._stages(images)[-1]
            patches = last.flatten(2).transpose(1, 2)  # [B, hw, D]
            normed = self.norm(torch.cat([last.mean((2, 3)).unsqueeze(1), patches], dim=1))
            outputs.append(named_features(normed, patches, mask))
        return outputs

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_class_token: bool = False,
        norm: bool = True,
    ) -> tuple[Any, ...]:
        """Outputs of chosen stages (0 to 3), ascending: patches [B, hw, c_i], or [B, c_i, h, w] with `reshape`, and
        with `return_class_token` the spatial mean [B, c_i] beside them. Only the last stage has a norm."""
        chosen, maps = chosen_layers(n, self.n_blocks, "stage"), self._stages(x)
        results = []
        for i in chosen:
            y = maps[i]
            pooled = y.mean((2, 3))  # before the resize
            if self.patch_size:
                grid = (x.shape[-2] // self.patch_size, x.shape[-1] // self.patch_size)
                y = F.interpolate(y, size=grid, mode="bilinear", antialias=True)
            h, w = y.shape[-2:]
            y = y.flatten(2).transpose(1, 2)  # [B, hw, c_i]
            if norm:
                y, pooled = self.norms[i](y), self.norms[i](pooled)
            if reshape:
                y = y.transpose(1, 2).reshape(x.shape[0], -1, h, w).contiguous()
            results.append((y, pooled) if return_class_token else y)
        return tuple(results)
