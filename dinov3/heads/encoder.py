"""A frozen backbone as dense heads see it: images of any size → one map and one CLS token per chosen layer.

Legend: B images, D_i width of layer i (ViT: D everywhere; ConvNeXt: the width of the stage), h×w grid of a map.

A backbone loses the pixels beyond its last whole patch. Here no pixel gets lost: the image is first adapted to a
multiple of the backbone's step, by zeros around it (the published depth heads were trained so) or by stretching.
Predictions then have the adapted image's geometry; `to_image` brings them back to the image's.

The backbone is frozen: no gradient reaches it (unless it is tuned), and it stays in evaluation mode (no stochastic depth,
no drawn positions) while a head trains. Precision is the parameters' own: images are cast to the backbone's dtype, nothing
here opens an autocast region.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
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
    # in integers of one sign: exports trace it, and ONNX divides toward zero
    height, width = ((s + multiple - 1) // multiple * multiple for s in size_hw)
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
    key: the name under which the backbone stands in state dicts. `tuned`: whether gradients pass (`train_head.tune`).
    """

    tuned = False

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

    def forward(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        backbone: Any = self.get_submodule(self.key)
        options = {"reshape": True, "return_class_token": True, "norm": self.norm}
        with nullcontext() if self.tuned else torch.no_grad():
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


# ---- sliding windows -------------------------------------------------------------------------------------------------
# Class maps of one image, whole or through sliding windows (paper §6.2.2; the protocol of mmsegmentation).
#
# Legend: B images, K output channels (classes), Q queries of a Mask2Former head. A segmentation model is anything with
# `predict(x, rescale_to)`: for "linear" heads logits [B, K, *rescale_to], for "m2f" heads a dict of `pred_logits`
# [B, Q, K+1] (the last: nothing) and `pred_masks` [B, Q, *rescale_to].


MODES = ("whole", "slide")
DECODERS = ("linear", "m2f")
WHOLE_SIZE = (512, 512)  # what "whole" resizes an image to, whatever its shape


def windows(size_hw: tuple[int, int], crop_hw: tuple[int, int], stride_hw: tuple[int, int]) -> list[tuple[int, ...]]:
    """(top, left, bottom, right) of every window, row by row; the last of a row or column is shifted back to the border.

    A crop larger than the image in both directions becomes the square of its short side; one that is larger in one
    direction only gives windows of the image's size there.
    """
    (H, W), (crop_h, crop_w) = size_hw, crop_hw
    if min(*crop_hw, *stride_hw) < 1:
        raise DinoError(f"crops and strides are at least 1 pixel, got crop {crop_hw} and stride {stride_hw}")
    if crop_h > H and crop_w > W:
        crop_h = crop_w = min(H, W)

    def starts(length: int, crop: int, stride: int) -> list[tuple[int, int]]:
        spans = []
        for i in range(max(length - crop + stride - 1, 0) // stride + 1):
            end = min(i * stride + crop, length)
            spans.append((max(end - crop, 0), end))
        return spans

    return [
        (top, left, bottom, right)
        for top, bottom in starts(H, crop_h, stride_hw[0])
        for left, right in starts(W, crop_w, stride_hw[1])
    ]


def class_maps(prediction: Any, decoder_head_type: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """What `predict` gave → [B, K, H, W]. For "m2f" Σ_q softmax(logits)_qk · sigmoid(mask_q) without the last class,
    both factors rounded to `dtype` first."""
    if decoder_head_type == "linear":
        return prediction
    classes = prediction["pred_logits"].softmax(-1)[..., :-1].to(dtype)  # [B, Q, K]
    masks = prediction["pred_masks"].sigmoid().to(dtype)  # [B, Q, H, W]
    return torch.einsum("bqk,bqhw->bkhw", classes, masks)


def slide(
    x: Tensor,
    segmentation_model: Any,
    *,
    decoder_head_type: str,
    n_output_channels: int,
    crop_hw: tuple[int, int],
    stride_hw: tuple[int, int],
    num_max_forward: int = 1,
) -> Tensor:
    """The mean over all windows that see a pixel, [B, K, H, W], gathered on the CPU: class maps of a large image are
    larger than a model. Every window is predicted at its own resolution."""
    B, _, H, W = x.shape
    total = torch.zeros(B, n_output_channels, H, W, dtype=x.dtype)
    times = torch.zeros(1, 1, H, W, dtype=x.dtype)
    spans = windows((H, W), crop_hw, stride_hw)
    for top, left, bottom, right in spans:
        crop = x[:, :, top:bottom, left:right]
        prediction = segmentation_model.predict(crop, rescale_to=(bottom - top, right - left))
        # bfloat16 here, float32 for whole images: the published numbers of the m2f head were made so
        maps = class_maps(prediction, decoder_head_type, torch.bfloat16)
        if maps.shape[1] != n_output_channels:
            raise DinoError(f"the model gives {maps.shape[1]} classes, but n_output_channels is {n_output_channels}")
        total[:, :, top:bottom, left:right] += maps.to(total)
        times[:, :, top:bottom, left:right] += 1
    for _ in range(num_max_forward - len(spans)):  # every rank of a sharded model must take part in every forward
        segmentation_model.predict(crop, rescale_to=(bottom - top, right - left))
    return total / times


@torch.no_grad()
def make_inference(
    x: Tensor,
    segmentation_model: Any,
    inference_mode: str = "whole",
    decoder_head_type: str = "linear",
    rescale_to: tuple[int, int] = (512, 512),
    n_output_channels: int = 256,
    crop_size: tuple[int, int] | None = None,
    stride: tuple[int, int] | None = None,
    apply_horizontal_flip: bool = False,
    num_max_forward: int = 1,
    output_activation: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Normalised images [B, 3, H, W] → class maps [B, n_output_channels, *rescale_to].

    inference_mode: "whole" resizes the image to 512×512 and predicts once; "slide" averages windows of `crop_size`
    (height, width) every `stride` pixels at the image's own resolution, and gives the result on the CPU.
    decoder_head_type: "linear" (logits) or "m2f" (sums of mask probabilities). apply_horizontal_flip: mirror the result
    (x was a mirrored image). num_max_forward: at least so many forwards in "slide", for models sharded over ranks.
    output_activation: applied last, to the resized map.
    """
    one_of("inference_mode", inference_mode, MODES)
    one_of("decoder", decoder_head_type, DECODERS)
    if inference_mode == "whole":
        x = F.interpolate(x, size=WHOLE_SIZE, mode="bilinear", align_corners=False)
        maps = class_maps(segmentation_model.predict(x, rescale_to=rescale_to), decoder_head_type)
    else:
        if crop_size is None or stride is None:
            raise DinoError("sliding windows need crop_size=(height, width) and stride=(down, right)")
        maps = slide(
            x,
            segmentation_model,
            decoder_head_type=decoder_head_type,
            n_output_channels=n_output_channels,
            crop_hw=crop_size,
            stride_hw=stride,
            num_max_forward=num_max_forward,
        )
        maps = F.interpolate(maps, size=rescale_to, mode="bilinear", align_corners=False)
    if apply_horizontal_flip:
        maps = maps.flip(-1)
    return output_activation(maps) if output_activation is not None else maps
