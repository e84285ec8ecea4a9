"""Depth in metres from a frozen backbone: the DPT head and what turns its channels into depth (paper §7; CHMv2).

DPT is arXiv 2103.13413. Two published models: `SYNTHMIX` (7B, monocular depth) and `CHMV2` (L on satellite imagery,
canopy height); both lists of options are at the bottom, with the builder. Loss and evaluation are elsewhere.

Legend: B images, D_i width of level i, P_i its width after projection, K width of the fusion, n depth bins, h×w grid of
patches. Output: 32·⌈h/2⌉ × 32·⌈w/2⌉, the adapted image's pixels when h and w are even, 16 more otherwise.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3.errors import DinoError, one_of
from dinov3.heads.encoder import FrozenLayers, check_levels, dtype_of, resized
from dinov3.heads.linear import LinearDepthHead
from dinov3.models.base import Backbone

READOUTS = ("ignore", "add", "project")
BINS = ("linear", "log", "chmv2_mixlog")
NORMS = ("linear", "softmax", "sigmoid", "chmv2_mixlog")


# ---- channels to metres --------------------------------------------------------------------------------------------


def bin_centres(strategy: str, n: int, min_depth: float, max_depth: float) -> Tensor:
    """[n] ascending depths in metres. "linear": even; "log": even in the logarithm; "chmv2_mixlog": from logarithmic
    (near) to even (far), over an eighth of the range, as its norm multiplies by 8."""
    one_of("bins", strategy, BINS)
    if strategy == "chmv2_mixlog":
        max_depth = max_depth / 8
    even = torch.linspace(min_depth, max_depth, n)
    if strategy == "linear":
        return even
    logarithmic = torch.exp(torch.linspace(math.log(min_depth), math.log(max_depth), n))
    if strategy == "log":
        return logarithmic
    t = torch.linspace(1, 0, n)
    return t * logarithmic + (1 - t) * even


class FeaturesToDepth(nn.Module):
    """Channels [B, n, H, W] → depth [B, 1, H, W] in metres: Σ_k w_k b_k over n bins, or relu + min_depth for n = 1.

    bins: where the b_k are (`bin_centres`). norm: how channels become weights w_k that sum to 1. Always computed in
    float32 or wider: at 100 m, bfloat16 would round to half a metre. No parameters.
    """

    def __init__(self, min_depth: float, max_depth: float, *, bins: str = "linear", norm: str = "linear") -> None:
        super().__init__()
        if not 0 <= min_depth < max_depth or (min_depth == 0 and bins != "linear"):
            raise DinoError(f"depths from {min_depth} to {max_depth} m are no range for {bins} bins")
        self.min_depth, self.max_depth = min_depth, max_depth
        self.bins, self.norm = one_of("bins", bins, BINS), one_of("norm", norm, NORMS)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return self.depth(x.float() if x.dtype in (torch.float16, torch.bfloat16) else x)

    def depth(self, x: Tensor) -> Tensor:
        if x.shape[1] == 1:
            return F.relu(x) + self.min_depth
        centres = bin_centres(self.bins, x.shape[1], self.min_depth, self.max_depth).to(x)
        if self.norm == "chmv2_mixlog":
            # The published formula shifts by clamp(−min relu(x), 0, 1e-4) + 1e-8, which is 1e-8: pixels without any
            # positive channel get uniform weights.
            y = F.relu(x) + 1e-8
            total = torch.nan_to_num(y.sum(1, keepdim=True), nan=1.0, posinf=1.0, neginf=1.0)
            weights = y / total.clamp_min(1e-12)
            return 8 * torch.einsum("bkhw,k->bhw", weights, centres.clamp_min(1e-12)).clamp_min(1e-12).unsqueeze(1)
        if self.norm == "softmax":
            weights = x.softmax(1)
        else:
            y = x.sigmoid() if self.norm == "sigmoid" else F.relu(x) + 0.1
            weights = y / y.sum(1, keepdim=True)
        return torch.einsum("bkhw,k->bhw", weights, centres).unsqueeze(1)


# ---- the DPT head --------------------------------------------------------------------------------------------------


def conv(*args: Any, **options: Any) -> nn.Sequential:
    """A convolution under the name `conv`, as files have it."""
    return nn.Sequential(OrderedDict(conv=nn.Conv2d(*args, **options)))


class Reassemble(nn.Module):
    """Levels (map [B, D_i, h, w], cls [B, D_i]) → [B, P_i, ·, ·] at 4, 2, 1 and ½ times the grid.

    readout: what becomes of the CLS token: "ignore", "add" (to every place), or "project": GELU of a linear layer over
    [patch ; CLS].
    """

    def __init__(self, widths: Sequence[int], channels: Sequence[int], *, readout: str, use_batchnorm: bool) -> None:
        super().__init__()
        self.readout = one_of("readout", readout, READOUTS)
        self.projects = nn.ModuleList(conv(D, P, kernel_size=1) for D, P in zip(widths, channels, strict=True))
        self.resize_layers = nn.ModuleList(
            [
                nn.ConvTranspose2d(channels[0], channels[0], kernel_size=4, stride=4),
                nn.ConvTranspose2d(channels[1], channels[1], kernel_size=2, stride=2),
                nn.Identity(),
                nn.Conv2d(channels[3], channels[3], kernel_size=3, stride=2, padding=1),
            ]
        )
        if readout == "project":
            self.readout_projects = nn.ModuleList(nn.Sequential(nn.Linear(2 * D, D), nn.GELU()) for D in widths)
        self.batchnorm_layers = nn.ModuleList(nn.BatchNorm2d(D) if use_batchnorm else nn.Identity() for D in widths)

    def read(self, i: int, patches: Tensor, cls: Tensor) -> Tensor:
        if self.readout == "ignore":
            return patches
        everywhere = cls[:, :, None, None].expand_as(patches)
        if self.readout == "add":
            return patches + everywhere
        both = torch.cat([patches, everywhere], dim=1).permute(0, 2, 3, 1)  # [B, h, w, 2D]
        return self.readout_projects[i](both).permute(0, 3, 1, 2)

    def forward(self, levels: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
        outputs = []
        for i, (patches, cls) in enumerate(levels):
            x = self.batchnorm_layers[i](self.read(i, patches, cls))
            outputs.append(self.resize_layers[i](self.projects[i](x)))
        return outputs


class ResidualConvUnit(nn.Module):
    """z + conv2(relu(conv1(relu(z))))."""

    def __init__(self, channels: int, *, bias: bool) -> None:
        super().__init__()
        self.conv1 = conv(channels, channels, kernel_size=3, padding=1, bias=bias)
        self.conv2 = conv(channels, channels, kernel_size=3, padding=1, bias=bias)

    def forward(self, z: Tensor) -> Tensor:
        return z + self.conv2(F.relu(self.conv1(F.relu(z))))


class Fusion(nn.Module):
    """Adds the next finer level to what came from the coarser ones, refines and doubles the resolution.

    The coarsest block has nothing to add and so no `res_conv_unit1`.
    """

    def __init__(self, channels: int, *, bias: bool, coarsest: bool) -> None:
        super().__init__()
        if not coarsest:
            self.res_conv_unit1 = ResidualConvUnit(channels, bias=bias)
        self.res_conv_unit2 = ResidualConvUnit(channels, bias=bias)
        self.project = conv(channels, channels, kernel_size=1)

    def forward(self, x: Tensor, finer: Tensor | None = None) -> Tensor:
        if finer is not None:
            # a grid of odd size came back one larger from its half: ⌈3/2⌉·2 = 4
            x = x + self.res_conv_unit1(resized(finer, x.shape[-2:]))
        return self.project(doubled(self.res_conv_unit2(x)))


def doubled(x: Tensor) -> Tensor:
    """Twice the size, corners on corners: here and in `UpConvHead`, nowhere else, as the published heads were trained."""
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)


class UpConvHead(nn.Module):
    """[B, K, H, W] → [B, n, 2H, 2W]. In files: `head.0`, `head.2`, `head.4`; places 1 and 3 have no parameters."""

    def __init__(self, channels: int, hidden: int, out: int) -> None:
        super().__init__()
        self.head = nn.Sequential(
            nn.Conv2d(channels, channels // 2, kernel_size=3, padding=1),
            nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True),
            nn.Conv2d(channels // 2, hidden, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Conv2d(hidden, out, kernel_size=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)


class DPTHead(nn.Module):
    """Four levels (map [B, D_i, h, w], cls [B, D_i]) of one grid → [B, n, 32·⌈h/2⌉, 32·⌈w/2⌉], for `FeaturesToDepth`.

    widths: the D_i (`FrozenLayers.widths`). post_process_channels: the P_i. use_bias: biases inside the fusion's
    residual units (elsewhere they are given).
    """

    def __init__(
        self,
        widths: Sequence[int],
        *,
        channels: int = 256,
        post_process_channels: Sequence[int] = (128, 256, 512, 1024),
        n_output_channels: int = 256,
        n_hidden_channels: int = 32,
        readout: str = "ignore",
        use_batchnorm: bool = False,
        use_bias: bool = False,
        projection_after_fusion: bool = True,
    ) -> None:
        super().__init__()
        check_levels("DPT head", len(widths), 4)
        self.widths = list(widths)
        self.reassemble_blocks = Reassemble(widths, post_process_channels, readout=readout, use_batchnorm=use_batchnorm)
        self.convs = nn.ModuleList(
            conv(P, channels, kernel_size=3, padding=1, bias=False) for P in post_process_channels
        )
        self.fusion_blocks = nn.ModuleList(Fusion(channels, bias=use_bias, coarsest=i == 0) for i in range(4))
        self.project = conv(channels, channels, kernel_size=3, padding=1) if projection_after_fusion else None
        self.conv_depth = UpConvHead(channels, n_hidden_channels, n_output_channels)

    @torch.no_grad()
    def init_weights(self) -> None:
        """torch's defaults for every layer; construction already gives them, except on the meta device."""
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear, nn.BatchNorm2d)):
                module.reset_parameters()

    def forward(self, levels: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        check_levels("DPT head", len(levels), 4)
        if [patches.shape[1] for patches, _ in levels] != self.widths:
            raise DinoError(f"the DPT head expects {self.widths} channels, got {[p.shape[1] for p, _ in levels]}")
        grids = [tuple(patches.shape[-2:]) for patches, _ in levels]  # of symbols in a trace, which have no hash
        if any(grid != grids[0] for grid in grids):
            raise DinoError(
                f"the DPT head needs its four levels on one grid, got {grids}; build the ConvNeXt with patch_size=16"
            )
        dtype = dtype_of(self)
        x: list[Tensor] = self.reassemble_blocks([(patches.to(dtype), cls.to(dtype)) for patches, cls in levels])
        finest_first = [convolve(y) for convolve, y in zip(self.convs, x)]
        out = self.fusion_blocks[0](finest_first[3])
        for i in (1, 2, 3):
            out = self.fusion_blocks[i](out, finest_first[3 - i])
        if self.project is not None:
            out = F.relu(self.project(out))
        return self.conv_depth(out)

    def predict(self, levels: Sequence[tuple[Tensor, Tensor]], rescale_to: tuple[int, int]) -> Tensor:
        """As `forward`, resized to rescale_to = (height, width)."""
        return resized(self(levels), rescale_to)


# ---- images to metres --------------------------------------------------------------------------------------------


class Depther(nn.Module):
    """Normalised images [B, 3, H, W] → depth [B, 1, H', W'] in metres, over the adapted (padded) image.

    `in_image` gives the depth of exactly the image's pixels. autocast_dtype: None computes in the parameters' own
    dtype; torch.bfloat16 or float16 runs encoder and decoder under autocast on the image's device. The depth itself
    is float32 (or wider) either way, also on the CPU, where the reference silently gives bfloat16.
    """

    def __init__(
        self,
        encoder: FrozenLayers,
        decoder: nn.Module,
        features_to_depth: FeaturesToDepth,
        *,
        autocast_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.encoder, self.decoder, self.features_to_depth = encoder, decoder, features_to_depth
        self.autocast_dtype = None if autocast_dtype is torch.float32 else autocast_dtype

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, self.autocast_dtype) if self.autocast_dtype else nullcontext():
            channels = self.decoder(self.encoder(x))  # [B, n, H', W']
        return self.features_to_depth(channels)

    @torch.no_grad()
    def in_image(self, x: Tensor) -> Tensor:
        """Images [B, 3, H, W] → depth [B, 1, H, W] in metres: resized to the padded image, the padding cut off."""
        return self.encoder.to_image(self(x), (x.shape[-2], x.shape[-1]))


HEADS = ("linear", "dpt")

# What makes the two published models, beside their backbones; options of `build_depther`.
SYNTHMIX: dict[str, Any] = {
    "backbone_out_layers": "FOUR_EVEN_INTERVALS",  # of the 7B: 9, 19, 29, 39
    "head_type": "dpt",
    "n_output_channels": 256,
    "use_batchnorm": True,
    "use_cls_token": False,
    "min_depth": 0.001,
    "max_depth": 100.0,
    "channels": 512,
    "post_process_channels": (2048, 2048, 2048, 2048),
}
CHMV2: dict[str, Any] = {
    "backbone_out_layers": (5, 11, 17, 23),
    "head_type": "dpt",
    "n_output_channels": 256,
    "use_batchnorm": False,
    "use_cls_token": True,
    "min_depth": 0.001,
    "max_depth": 96.0,
    "bins_strategy": "chmv2_mixlog",
    "norm_strategy": "chmv2_mixlog",
    "n_hidden_channels": 128,
    "use_bias": True,
    "projection_after_fusion": False,
}


def build_depther(
    backbone: Backbone,
    *,
    backbone_out_layers: str | Sequence[int] = "FOUR_EVEN_INTERVALS",
    adapt_to_patch_size: str = "center_padding",
    use_backbone_norm: bool = True,
    head_type: str = "linear",
    use_batchnorm: bool = False,
    use_cls_token: bool = False,
    min_depth: float = 0.001,
    max_depth: float = 80.0,
    bins_strategy: str = "linear",
    norm_strategy: str = "linear",
    autocast_dtype: torch.dtype | None = None,
    **head_options: Any,
) -> Depther:
    """A depther over a backbone, with a fresh head; the options are those of the depth configurations.

    `head_options` go to the head: n_output_channels (256) and for "dpt" those of `DPTHead` (where `use_cls_token` means
    readout "project").
    """
    options: dict[str, Any] = {"n_output_channels": 256, "use_batchnorm": use_batchnorm} | head_options
    encoder = FrozenLayers(backbone, backbone_out_layers, norm=use_backbone_norm, adapt=adapt_to_patch_size)
    decoder: nn.Module
    if one_of("head_type", head_type, HEADS) == "linear":
        decoder = LinearDepthHead(encoder.widths, use_cls_token=use_cls_token, **options)
    else:
        options.setdefault("readout", "project" if use_cls_token else "ignore")
        decoder = DPTHead(encoder.widths, **options)
    to_depth = FeaturesToDepth(min_depth, max_depth, bins=bins_strategy, norm=norm_strategy)
    return Depther(encoder, decoder, to_depth, autocast_dtype=autocast_dtype)
