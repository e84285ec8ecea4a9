"""Heads of one linear layer: image classes, segmentation, depth (paper §6.1, §7; Tab. 3, 4).

Legend: B images, D width, K classes or depth bins, D_i width of level i, h×w the first level's grid, C = Σ D_i.

They measure what a frozen backbone's features hold. Attribute names that end up in files are given: `linear_head`,
`batchnorm_layer`, `conv`, `conv_depth`, `segmentation_model`. Batch norm keeps plain BatchNorm2d keys; across ranks the
trainer converts it (`nn.SyncBatchNorm.convert_sync_batchnorm`), the head knows nothing of ranks. Losses and training
are elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3.errors import DinoError
from dinov3.heads.encoder import FrozenLayers, check_levels, dtype_of, resized
from dinov3.models.base import Backbone

# ---- classes of an image ------------------------------------------------------------------------------------------


class LinearClassifier(nn.Module):
    """Images → logits [B, K] from [CLS ; mean of the patch tokens], 2·D numbers, both normalised.

    The backbone is not frozen here: gradients reach it, and `.eval()` is the caller's to call.
    """

    def __init__(self, backbone: Backbone, linear_head: nn.Linear) -> None:
        super().__init__()
        if linear_head.in_features != 2 * backbone.embed_dim:
            raise DinoError(
                f"the linear head takes {linear_head.in_features} numbers, but [CLS ; mean patch] of this backbone has "
                f"{2 * backbone.embed_dim}: the head belongs to another backbone"
            )
        self.backbone, self.linear_head = backbone, linear_head

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_head(self.pooled(x))

    def pooled(self, x: Tensor) -> Tensor:
        """The input of the linear layer [B, 2D]."""
        features = self.backbone.forward_features(x)
        patches = features["x_norm_patchtokens"].mean(1)  # [B, D]
        pooled = torch.cat([features["x_norm_clstoken"], patches], dim=-1)
        return pooled.to(self.linear_head.weight.dtype)


def build_linear_classifier(backbone: Backbone, n_classes: int) -> LinearClassifier:
    """A classifier with initial weights: normal of standard deviation 0.01, biases 0."""
    linear = nn.Linear(2 * backbone.embed_dim, n_classes)
    nn.init.normal_(linear.weight, std=0.01)
    nn.init.zeros_(linear.bias)
    return LinearClassifier(backbone, linear)


# ---- maps ----------------------------------------------------------------------------------------------------------


class LinearDenseHead(nn.Module):
    """Levels → resized to the first and concatenated [B, C, h, w] → batch norm → one 1×1 convolution.

    widths: channels D_i of the levels (`FrozenLayers.widths`). A level is a map, or a pair (map, cls) as `FrozenLayers`
    gives it. The two heads below differ in their names in files and in what may stand before the batch norm.
    """

    conv_key: str

    def __init__(self, widths: Sequence[int], n_output_channels: int, *, use_batchnorm: bool) -> None:
        super().__init__()
        self.widths = list(widths)
        channels = sum(self.widths)
        self.batchnorm_layer = nn.BatchNorm2d(channels) if use_batchnorm else nn.Identity()
        self.add_module(self.conv_key, nn.Conv2d(channels, n_output_channels, kernel_size=1))
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        convolution = self.get_submodule(self.conv_key)
        assert isinstance(convolution, nn.Conv2d)
        assert convolution.bias is not None
        nn.init.normal_(convolution.weight, std=0.01)
        nn.init.zeros_(convolution.bias)
        if isinstance(self.batchnorm_layer, nn.BatchNorm2d):
            self.batchnorm_layer.reset_parameters()

    def level(self, given: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        return given if isinstance(given, Tensor) else given[0]

    def concatenated(self, levels: Sequence[Tensor | tuple[Tensor, Tensor]]) -> Tensor:
        check_levels("linear head", len(levels), len(self.widths))
        maps = [self.level(given) for given in levels]
        if [m.shape[1] for m in maps] != self.widths:
            raise DinoError(f"the linear head expects {self.widths} channels, got {[m.shape[1] for m in maps]}")
        return torch.cat([resized(m, maps[0].shape[-2:]) for m in maps], dim=1).to(dtype_of(self))  # [B, C, h, w]

    def forward(self, levels: Sequence[Tensor | tuple[Tensor, Tensor]]) -> Tensor:
        return self.get_submodule(self.conv_key)(self.batchnorm_layer(self.concatenated(levels)))

    def predict(self, levels: Sequence[Tensor | tuple[Tensor, Tensor]], rescale_to: tuple[int, int]) -> Tensor:
        """As `forward`, resized to rescale_to = (height, width) and without dropout in any mode."""
        return resized(LinearDenseHead.forward(self, levels), rescale_to)


class LinearSegmentationHead(LinearDenseHead):
    """Levels → class logits [B, K, h, w]. In training whole channels are dropped before the batch norm."""

    conv_key = "conv"

    def __init__(
        self, widths: Sequence[int], n_classes: int, *, use_batchnorm: bool = True, dropout: float = 0.1
    ) -> None:
        super().__init__(widths, n_classes, use_batchnorm=use_batchnorm)
        self.dropout = dropout

    def forward(self, levels: Sequence[Tensor | tuple[Tensor, Tensor]]) -> Tensor:
        x = F.dropout2d(self.concatenated(levels), self.dropout, self.training)
        return self.get_submodule(self.conv_key)(self.batchnorm_layer(x))


class LinearDepthHead(LinearDenseHead):
    """Levels → K channels [B, K, h, w], for `FeaturesToDepth`. With `use_cls_token` every level is its map with the CLS
    token's D_i numbers appended at every place."""

    conv_key = "conv_depth"

    def __init__(
        self,
        widths: Sequence[int],
        n_output_channels: int = 256,
        *,
        use_batchnorm: bool = True,
        use_cls_token: bool = False,
    ) -> None:
        super().__init__([w * (1 + use_cls_token) for w in widths], n_output_channels, use_batchnorm=use_batchnorm)
        self.use_cls_token = use_cls_token

    def level(self, given: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        if not self.use_cls_token:
            return super().level(given)
        if isinstance(given, Tensor):
            raise DinoError("this depth head appends the CLS token: every level must be a pair (map, cls)")
        patches, cls = given
        return torch.cat([patches, cls[:, :, None, None].expand(-1, -1, *patches.shape[-2:])], dim=1)


# ---- segmentation --------------------------------------------------------------------------------------------------


class LinearSegmentor(nn.Module):
    """A frozen backbone and a linear segmentation head, as two steps `segmentation_model.0` and `.1`."""

    def __init__(self, encoder: FrozenLayers, head: LinearSegmentationHead) -> None:
        super().__init__()
        self.segmentation_model = nn.ModuleList([encoder, head])

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] → logits [B, K, h, w] on the grid of the adapted image."""
        encoder, head = self.segmentation_model
        return head(encoder(x))

    @torch.no_grad()
    def predict(self, x: Tensor, rescale_to: tuple[int, int] = (512, 512)) -> Tensor:
        """Logits [B, K, *rescale_to] over exactly the image given, whatever its size."""
        encoder, head = self.segmentation_model
        assert isinstance(encoder, FrozenLayers)
        assert isinstance(head, LinearSegmentationHead)
        levels, size_hw = encoder(x), (x.shape[-2], x.shape[-1])
        if encoder.adapt != "center_padding" or encoder.adapted_size(size_hw) == size_hw:
            return head.predict(levels, rescale_to)  # one resize from the grid, as in the reference
        logits = head.predict(levels, levels[0][0].shape[-2:])
        return resized(encoder.to_image(logits, size_hw), rescale_to)


def build_linear_segmentor(
    backbone: Backbone,
    *,
    backbone_out_layers: str | Sequence[int] = "FOUR_EVEN_INTERVALS",
    num_classes: int = 150,
    dropout: float = 0.1,
    use_batchnorm: bool = True,
    use_backbone_norm: bool = True,
) -> LinearSegmentor:
    """The linear segmentor over a backbone, with a fresh head."""
    encoder = FrozenLayers(backbone, backbone_out_layers, norm=use_backbone_norm, key="feature_model")
    head = LinearSegmentationHead(encoder.widths, num_classes, use_batchnorm=use_batchnorm, dropout=dropout)
    return LinearSegmentor(encoder, head)
