"""A frozen backbone as dense heads see it: images of any size → one map and one CLS token per chosen layer.

Legend: B images, D_i width of layer i (ViT: D everywhere; ConvNeXt: the width of the stage), h×w grid of a map.

A backbone loses the pixels beyond its last whole patch. Here no pixel gets lost: the image is first adapted to a
multiple of the backbone's step, by zeros around it (the published depth heads were trained so) or by stretching.
Predictions then have the adapted image's geometry; `to_image` brings them back to the image's.

The backbone is frozen: no gradient reaches it, and it stays in evaluation mode (no stochastic depth, no drawn
positions) while a head trains. Precision is the parameters' own: images are cast to the backbone's dtype, nothing
here opens an autocast region.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3.errors import DinoError, one_of
from dinov3.models.base import Backbone, chosen_layers


def four_even(n: int) -> list[int]:
    """Four blocks at even distances, the last one included: 12 → 2, 5, 8, 11; 40 → 9, 19, 29, 39; a ConvNeXt's four
    stages → 0, 1, 2, 3. Models of 24 blocks take 4, 11, 17, 23: published heads were trained on those."""
    return [4, 11, 17, 23] if n == 24 else [i * (n // 4) - 1 for i in (1, 2, 3, 4)]


LAYER_SETS: dict[str, Callable[[int], list[int]]] = {
    "LAST": lambda n: [n - 1],
    "FOUR_LAST": lambda n: list(range(n - 4, n)),
    "FOUR_EVEN_INTERVALS": four_even,
}
ADAPTATIONS = ("center_padding", "stretch", "never")


def layers_of(backbone: Backbone, chosen: str | Sequence[int]) -> list[int]:
    """0-based block (ConvNeXt: stage) indices, ascending, from the name of a set or from the indices themselves."""
    if isinstance(chosen, str):
        chosen = LAYER_SETS[one_of("the set of layers", chosen, LAYER_SETS)](backbone.n_blocks)
    return chosen_layers(list(chosen), backbone.n_blocks, "layer")


def widths_of(backbone: Backbone, layers: Sequence[int]) -> list[int]:
    """Channels of the maps of these layers."""
    every: list[int] = getattr(backbone, "embed_dims", None) or [backbone.embed_dim] * backbone.n_blocks
    return [every[i] for i in layers]


def step_of(backbone: Backbone) -> int:
    """The smallest multiple, in pixels, at which the backbone loses nothing: a ViT's patch, a ConvNeXt's stride 32.

    (The reference pads images for a ConvNeXt to multiples of 4, and its later stages then drop up to 28 pixels at
    the right and bottom; no published head depends on that. Pass `multiple=4` to do the same.)
    """
    return math.lcm(backbone.stride, backbone.patch_size or 1)


def adapted_size(size_hw: tuple[int, int], multiple: int) -> tuple[int, int]:
    """Height and width rounded up to the multiple."""
    height, width = (-(-s // multiple) * multiple for s in size_hw)  # in integers: exports trace it
    return height, width


def center_pad(x: Tensor, multiple: int) -> Tensor:
    """Zeros around images [B, C, H, W] up to the multiple; of an odd rest the larger half goes right and bottom."""
    (H, W), (height, width) = x.shape[-2:], adapted_size((x.shape[-2], x.shape[-1]), multiple)
    top, left = (height - H) // 2, (width - W) // 2
    return F.pad(x, (left, width - W - left, top, height - H - top))


def resized(x: Tensor, size_hw: Sequence[int]) -> Tensor:
    """Bilinear, pixel centres at (i + 0.5), no antialias: how dense predictions and levels change size everywhere."""
    if tuple(x.shape[-2:]) == tuple(size_hw):
        return x
    return F.interpolate(x, size=(size_hw[0], size_hw[1]), mode="bilinear", align_corners=False)


def dtype_of(module: nn.Module) -> torch.dtype:
    """The floating-point type of a module's parameters (float32 for one that has none)."""
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)


def check_levels(what: str, given: int, expected: int) -> None:
    """Refuses a list of feature maps whose length is not what a head was built for."""
    if given != expected:
        raise DinoError(f"the {what} was built for {expected} layers of the backbone and was given {given}")


class FrozenLayers(nn.Module):
    """Images [B, C, H, W] → a list of (map [B, D_i, h, w], cls [B, D_i]), one per chosen layer, ascending.

    backbone: a finished backbone. layers: a name of `LAYER_SETS` or 0-based indices. norm: apply the final norm to
    every layer. adapt: how images whose sides are no multiple of `multiple` (default: `step_of`) are treated:
    "center_padding", "stretch" (bilinear, up to the multiple), or "never": the backbone's remainder is lost.
    key: the name under which the backbone stands in state dicts.
    """

    def __init__(
        self,
        backbone: Backbone,
        layers: str | Sequence[int] = "FOUR_EVEN_INTERVALS",
        *,
        norm: bool = True,
        adapt: str = "center_padding",
        multiple: int | None = None,
        key: str = "backbone",
    ) -> None:
        super().__init__()
        one_of("adapt", adapt, ADAPTATIONS)
        self.layers = layers_of(backbone, layers)
        self.widths = widths_of(backbone, self.layers)
        self.multiple = multiple or step_of(backbone)
        self.norm, self.adapt, self.key = norm, adapt, key
        self.add_module(key, cast(nn.Module, backbone))
        self.train(self.training)

    def train(self, mode: bool = True) -> FrozenLayers:
        super().train(mode)
        self.get_submodule(self.key).eval()
        return self

    def adapted_size(self, size_hw: tuple[int, int]) -> tuple[int, int]:
        """The size in pixels at which the backbone sees an image of this size."""
        return size_hw if self.adapt == "never" else adapted_size(size_hw, self.multiple)

    def adapted(self, x: Tensor) -> Tensor:
        """Images as the backbone sees them: in its dtype, padded or stretched to the multiple."""
        if x.ndim != 4 or not x.is_floating_point():
            raise DinoError(f"expected normalised images [B, C, H, W] in floating point, got {list(x.shape)} {x.dtype}")
        x = x.to(dtype_of(self.get_submodule(self.key)))
        if self.adapt == "center_padding":
            return center_pad(x, self.multiple)
        return resized(x, self.adapted_size((x.shape[-2], x.shape[-1]))) if self.adapt == "stretch" else x

    @torch.no_grad()
    def forward(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        backbone: Any = self.get_submodule(self.key)
        options = {"reshape": True, "return_class_token": True, "norm": self.norm}
        return list(backbone.get_intermediate_layers(self.adapted(x), n=self.layers, **options))

    def to_image(self, prediction: Tensor, size_hw: tuple[int, int]) -> Tensor:
        """A dense prediction [B, C, h', w'] of any resolution → [B, C, H, W], pixel by pixel over the image given.

        The prediction covers the adapted image: it is resized to it, and then the padding is cut off (or the stretch
        undone). With adapt "never" it is taken to cover the whole image, up to the lost remainder.
        """
        if self.adapt != "center_padding":
            return resized(prediction, size_hw)
        height, width = self.adapted_size(size_hw)
        top, left = (height - size_hw[0]) // 2, (width - size_hw[1]) // 2
        return resized(prediction, (height, width))[..., top : top + size_hw[0], left : left + size_hw[1]]
