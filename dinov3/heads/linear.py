"""Probes: one linear layer for classes, segmentation, depth (paper §6.1, §7; Tab. 3, 4); attention for clips (§6.2.4).

Legend: B images, D width, K classes or depth bins, D_i width of level i, h×w the first level's grid, C = Σ D_i.

They measure what a frozen backbone's features hold. Attribute names that end up in files are given: `linear_head`,
`batchnorm_layer`, `conv`, `conv_depth`, `segmentation_model`. Batch norm keeps plain BatchNorm2d keys; across ranks the
trainer converts it (`nn.SyncBatchNorm.convert_sync_batchnorm`), the head knows nothing of ranks. Losses and training
are elsewhere.
"""

from __future__ import annotations

import math
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


# ---- the attentive probe ---------------------------------------------------------------------------------------------
# The attentive probe: classifies a clip's patches by self-attention and one learned query (paper §6.2.4).
#
# Four self-attention blocks and one cross-attention block.
#
# Tokens know where and when they are twice over: a sin-cos embedding is added before the first block, and inside every
# block queries and keys are rotated by their position (a part of each head by x and y, a part by the time). Each head
# sees the plane turned by an angle of its own, so that directions other than the axes are represented, too. The query,
# one learned vector without a position, reads the clip in a fifth, cross-attending block.
#
# The paper gives blocks, width and tokens; heads, MLP ratio, norm and the wavelengths are ours (16, 4, pre-norm, below).
#
# Legend: B clips, N tokens, D width of the backbone, W width of the probe, h heads, d = W/h, K classes. Coordinates
# [B, N, 3] are (x, y, t): x and y in [0, 1] across the image, t in seconds.


# wavelengths, from two patches of a 16 × 16 grid to four images, from an eighth of a second to two minutes
SPACE = (2 / 16, 4.0)
TIME = (0.125, 120.0)


def _waves(low: float, high: float, n: int) -> Tensor:
    """n angular frequencies, wavelengths geometric from `low` to `high`."""
    if n == 0:
        return torch.zeros(0)
    return 2 * math.pi / (low * (high / low) ** (torch.arange(n) / max(n - 1, 1)))


def position_embedding(coordinates: Tensor, width: int) -> Tensor:
    """Sines and cosines [B, N, W] of x, y and t, a third of the width each; what does not divide by six stays zero."""
    n = width // 6
    parts = []
    for axis, (low, high) in enumerate((SPACE, SPACE, TIME)):
        angle = coordinates[..., axis : axis + 1] * _waves(low, high, n).to(coordinates)
        parts += [angle.sin(), angle.cos()]
    return F.pad(torch.cat(parts, -1), (0, width - 6 * n))


class Rotary3d(nn.Module):
    """Angles [B, h, N, d/2] by which pairs of a head's entries are turned.

    A third of the pairs by the time, the others half by x′ and half by y′, where (x′, y′) is the plane turned by the
    head's angle. The angles are drawn once and stay.
    """

    turn: Tensor  # [h]
    space: Tensor  # angular frequencies
    time: Tensor

    def __init__(self, heads: int, head_width: int, seed: int = 0) -> None:
        super().__init__()
        pairs = head_width // 2
        space = pairs // 3
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("turn", torch.rand(heads, generator=generator) * 2 * math.pi)
        self.register_buffer("space", _waves(*SPACE, space), persistent=False)
        self.register_buffer("time", _waves(*TIME, pairs - 2 * space), persistent=False)

    def forward(self, coordinates: Tensor) -> tuple[Tensor, Tensor]:
        """(cosines, sines) [B, h, N, d/2] of coordinates [B, N, 3]."""
        x, y, t = coordinates[:, None].unbind(-1)  # [B, 1, N]
        cos, sin = self.turn.cos()[:, None], self.turn.sin()[:, None]  # [h, 1]
        along, across = cos * x + sin * y, cos * y - sin * x  # [B, h, N]
        angles = [along[..., None] * self.space, across[..., None] * self.space]
        when = (t[..., None] * self.time).expand(*along.shape, len(self.time))
        angle = torch.cat([*angles, when], -1)
        return angle.cos(), angle.sin()


def rotated(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """x [B, h, N, d], its entries (i, i + d/2) turned as pairs."""
    cos, sin = rotation
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class _Mlp(nn.Sequential):
    def __init__(self, width: int, ratio: float) -> None:
        hidden = int(width * ratio)
        super().__init__(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


class SelfBlock(nn.Module):
    """Pre-norm self-attention with rotated queries and keys, then an MLP."""

    def __init__(self, width: int, heads: int, ratio: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = _Mlp(width, ratio)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [B, h, N, d]
        y = F.scaled_dot_product_attention(rotated(q, rotation), rotated(k, rotation), v)
        x = x + self.proj(y.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class CrossBlock(nn.Module):
    """Cross-attention of one learned query, without a position, to all tokens."""

    def __init__(self, width: int, heads: int, ratio: float) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Parameter(torch.zeros(1, 1, width))
        self.norm_query, self.norm_tokens, self.norm2 = (nn.LayerNorm(width) for _ in range(3))
        self.q, self.kv, self.proj = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.mlp = _Mlp(width, ratio)

    def forward(self, tokens: Tensor) -> Tensor:
        query = self.query.expand(len(tokens), -1, -1)
        q = self.q(self.norm_query(query)).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, h, 1, d]
        k, v = self.kv(self.norm_tokens(tokens)).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)
        x = query + self.proj(y.transpose(1, 2).flatten(2))
        return (x + self.mlp(self.norm2(x)))[:, 0]  # [B, W]


class AttentiveProbe(nn.Module):
    """Patch features of a clip [B, N, D] and their coordinates [B, N, 3] → logits [B, K].

    positions: without them (an ablation) the probe sees a bag of patches. Raises `DinoError` where the heads do not
    divide the width.
    """

    def __init__(
        self,
        in_dim: int,
        n_classes: int,
        *,
        width: int = 1024,
        depth: int = 4,
        heads: int = 16,
        mlp_ratio: float = 4.0,
        positions: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if width % heads or (width // heads) % 2:
            raise DinoError(f"a probe {width} wide cannot have {heads} heads: each needs an even number of entries")
        self.width, self.positions = width, positions
        self.project = nn.Linear(in_dim, width)
        self.rotary = Rotary3d(heads, width // heads, seed)
        self.blocks = nn.ModuleList(SelfBlock(width, heads, mlp_ratio) for _ in range(depth))
        self.cross = CrossBlock(width, heads, mlp_ratio)
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, n_classes)
        self.init_weights(seed)

    def init_weights(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02, generator=generator)
                nn.init.zeros_(module.bias)
        # so that features and positions weigh alike, whatever the backbone's width
        nn.init.trunc_normal_(self.project.weight, std=self.project.in_features**-0.5, generator=generator)
        nn.init.trunc_normal_(self.cross.query, std=0.02, generator=generator)

    def forward(self, tokens: Tensor, coordinates: Tensor) -> Tensor:
        if tokens.shape[:2] != coordinates.shape[:2] or coordinates.shape[-1] != 3:
            raise DinoError(
                f"tokens {list(tokens.shape)} need coordinates [{tokens.shape[0]}, {tokens.shape[1]}, 3], got "
                f"{list(coordinates.shape)}"
            )
        if not self.positions:
            coordinates = torch.zeros_like(coordinates)
        x = self.project(tokens)
        if self.positions:
            x = x + position_embedding(coordinates, self.width).to(x.dtype)
        cos, sin = self.rotary(coordinates)
        rotation = (cos.to(x.dtype), sin.to(x.dtype))
        for block in self.blocks:
            x = block(x, rotation)
        return self.classifier(self.norm(self.cross(x)))


def clip_coordinates(seconds: Tensor, grid_hw: tuple[int, int]) -> Tensor:
    """(x, y, t) [B, T·h·w, 3] of the patches' centres; seconds [B, T] of the frames."""
    h, w = grid_hw
    B, T = seconds.shape
    y, x = torch.meshgrid((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w, indexing="ij")
    plane = torch.stack([x, y], -1).to(seconds).expand(B, T, h, w, 2)
    when = seconds[:, :, None, None, None].expand(B, T, h, w, 1)
    return torch.cat([plane, when], -1).flatten(1, 3)
