"""The protocol of backbones; one forward for a tensor or a list of crop groups; how layers are chosen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from dinov3.errors import DinoError


@runtime_checkable
class Backbone(Protocol):
    """The attributes and methods that code above this row may use."""

    embed_dim: int
    n_blocks: int
    n_storage_tokens: int
    patch_size: int | None
    stride: int  # input pixels per patch of the last layer, in both directions

    def patch_grid(self, height: int, width: int) -> tuple[int, int]: ...
    def forward_features(self, x: Any, masks: Any = None) -> Any: ...
    def get_intermediate_layers(self, x: Tensor, n: int | Sequence[int] = 1, **options: Any) -> tuple[Any, ...]: ...


class TokenModel(nn.Module):
    """A backbone that gives a CLS token and patch tokens. A family implements `forward_features_list`."""

    head: nn.Module

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def feature_maps(self, x: Tensor, layers: int | Sequence[int] = 1) -> list[Tensor]:
        """Patch maps [B, D, h, w] of normalised images [B, 3, H, W], for decoders that take a list of maps: of the last
        `layers` blocks, or of the 0-based ones given (ascending), each after the final norm."""
        return list(self.get_intermediate_layers(x, n=layers, reshape=True))  # type: ignore[operator]

    def forward_features_list(self, x_list: list[Tensor], masks_list: list[Tensor | None]) -> list[dict[str, Any]]:
        raise NotImplementedError

    def forward_features(self, x: Tensor | list[Tensor], masks: Any = None) -> Any:
        """Normalised tokens of images [B, C, height, width], or of a list of crop groups of different sizes.

        `masks` [B, HW] boolean: True replaces the patch by the mask token (iBOT). For a list, a list of the same length
        whose entries may be None. Returns a dict, or a list of dicts, with `x_norm_clstoken` [B, D], `x_storage_tokens`
        [B, R, D] (normalised registers), `x_norm_patchtokens` [B, HW, D], `x_prenorm` [B, N, D] and `masks`.
        """
        if isinstance(x, Tensor):
            return self.forward_features_list([x], [masks])[0]
        return self.forward_features_list(x, masks if masks is not None else [None] * len(x))

    def forward(self, x: Any, masks: Any = None, is_training: bool = False) -> Any:
        """The normalised CLS token [B, D]; with `is_training` what `forward_features` gives."""
        if is_training:
            return self.forward_features(x, masks)
        if not isinstance(x, Tensor):
            raise TypeError("a list of crop groups is a training input: pass is_training=True")
        return self.head(self.forward_features(x, masks)["x_norm_clstoken"])


def chosen_layers(n: int | Sequence[int], total: int, what: str) -> list[int]:
    """Ascending 0-based layer indices from "the last n" or an explicit choice."""
    layers = list(range(total - n, total)) if isinstance(n, int) else sorted(n)
    if not layers or len(set(layers)) != len(layers) or layers[0] < 0 or layers[-1] >= total:
        raise DinoError(f"{what}s {n} were requested, but there are {total} (0 to {total - 1}), each at most once")
    return layers


def layer_output(
    tokens: Tensor, prefix: int, grid: tuple[int, int] | None, class_token: bool, extra_tokens: bool
) -> Tensor | tuple[Tensor, ...]:
    """Of tokens [B, prefix + P, D] the patches [B, P, D], or [B, D, h, w] on a `grid`; with the flags a tuple that also holds
    the CLS token [B, D] and the registers [B, R, D]."""
    patches = tokens[:, prefix:]
    if grid is not None:  # `len` would fix the batch in torch's exporter
        patches = patches.transpose(1, 2).reshape(patches.shape[0], -1, *grid).contiguous()
    extras = [tokens[:, 0]] * class_token + [tokens[:, 1:prefix]] * extra_tokens
    return (patches, *extras) if extras else patches


def named_features(normed: Tensor, raw: Tensor, mask: Tensor | None, storage: int = 0) -> dict[str, Any]:
    """What `forward_features` gives: of tokens [B, 1+R+P, D] after the norm the CLS, the R = `storage` registers and the
    patches; the tokens before it; the mask."""
    return {
        "x_norm_clstoken": normed[:, 0],
        "x_storage_tokens": normed[:, 1 : 1 + storage],
        "x_norm_patchtokens": normed[:, 1 + storage :],
        "x_prenorm": raw,
        "masks": mask,
    }
