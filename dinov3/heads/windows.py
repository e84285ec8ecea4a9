"""Class maps of one image, whole or through sliding windows (paper §6.2.2; the protocol of mmsegmentation).

Legend: B images, K output channels (classes), Q queries of a Mask2Former head. A segmentation model is anything with
`predict(x, rescale_to)`: for "linear" heads logits [B, K, *rescale_to], for "m2f" heads a dict of `pred_logits`
[B, Q, K+1] (the last: nothing) and `pred_masks` [B, Q, *rescale_to].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov3.errors import DinoError, one_of

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
