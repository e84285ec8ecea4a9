"""The DINOv3 vision transformer (paper §3.1, Tab. 2): pre-norm blocks, axial RoPE, register tokens. Torch only.

Legend: B images, C channels, H×W patch grid, N tokens = 1 CLS + R registers + H·W patches, D width, h heads, d = D/h.

Attribute names that appear in checkpoints are given from outside and fixed: the register tokens are called
`storage_tokens` there and here. The model knows nothing of scale, files or sizes: activation checkpointing,
compilation and sharding are applied from outside, and an image whose sides are no multiple of the patch loses its
right and bottom remainder, as in the reference (`dinov3.features` is where no pixel gets lost).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3.errors import DinoError, one_of
from dinov3.models.architectures import ViTConfig
from dinov3.models.base import TokenModel, chosen_layers, layer_output, named_features

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
Rows = list[list[Tensor]]  # of a block's two branches: for each crop group the indices [m] of the rows computed


# ---- position ------------------------------------------------------------------------------------------------------


class RopeEmbedding(nn.Module):
    """Axial rotary position embedding (paper §3.1): sines and cosines of every patch centre, y angles then x angles.

    `periods` [d/4] is a persistent buffer: published files hold values rounded to bfloat16, and outputs equal to the
    published ones need exactly those, so it is loaded and never recomputed.
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        c = config
        if c.embed_dim % (4 * c.num_heads):
            raise DinoError(f"embed_dim {c.embed_dim} must be a multiple of 4 × num_heads = {4 * c.num_heads} for RoPE")
        by_range = c.pos_embed_rope_min_period is not None and c.pos_embed_rope_max_period is not None
        if by_range == (c.pos_embed_rope_base is not None):
            raise DinoError("RoPE takes either pos_embed_rope_base or both min_period and max_period")
        if c.pos_embed_rope_normalize_coords not in ("min", "max", "separate"):
            raise DinoError(
                f"normalize_coords is 'min', 'max' or 'separate', not {c.pos_embed_rope_normalize_coords!r}"
            )
        self.base = c.pos_embed_rope_base
        self.min_period = c.pos_embed_rope_min_period
        self.max_period = c.pos_embed_rope_max_period
        self.head_dim = c.head_dim
        self.normalize_coords = c.pos_embed_rope_normalize_coords
        self.shift_coords = c.pos_embed_rope_shift_coords
        self.jitter_coords = c.pos_embed_rope_jitter_coords
        self.rescale_coords = c.pos_embed_rope_rescale_coords
        self.dtype = DTYPES[c.pos_embed_rope_dtype]  # of the tables; stays when the model is cast
        self.periods: Tensor
        self.register_buffer("periods", torch.empty(self.head_dim // 4, dtype=self.dtype), persistent=True)
        if not self.periods.is_meta:  # arange on the meta device imports torch's compiler: seconds, for nothing
            self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        n = self.head_dim // 4
        options: dict[str, Any] = {"device": self.periods.device, "dtype": self.dtype}
        if self.base is not None:
            periods = self.base ** (2 * torch.arange(n, **options) / (2 * n))
        else:
            assert self.min_period is not None
            assert self.max_period is not None
            ratio = self.max_period / self.min_period
            periods = self.max_period * (ratio ** torch.linspace(0, 1, n, **options) / ratio)
        self.periods.copy_(periods)

    def coordinates(self, height: int, width: int) -> Tensor:
        """Patch centres as (y, x) in [-1, 1], row-major [HW, 2]."""
        options: dict[str, Any] = {"device": self.periods.device, "dtype": self.dtype}
        over = {"separate": (height, width), "max": (max(height, width),) * 2, "min": (min(height, width),) * 2}
        over_y, over_x = over[self.normalize_coords]
        y = torch.arange(0.5, height, **options) / over_y
        x = torch.arange(0.5, width, **options) / over_x
        return 2.0 * torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1).flatten(0, 1) - 1.0

    @property
    def draws(self) -> bool:
        """Whether two calls give different tables (training mode with an augmentation configured)."""
        return self.training and any(
            v is not None for v in (self.shift_coords, self.jitter_coords, self.rescale_coords)
        )

    def draw(self) -> list[Tensor]:
        """A fresh draw of each augmentation configured: shift [2], logarithms of the jitter [2] and of the scale [1]."""
        options: dict[str, Any] = {"device": self.periods.device, "dtype": self.dtype}
        drawn = []  # in this order, which is part of the recorded numbers
        if self.shift_coords is not None:
            drawn.append(torch.empty(2, **options).uniform_(-self.shift_coords, self.shift_coords))
        for factor, n in ((self.jitter_coords, 2), (self.rescale_coords, 1)):
            if factor is not None:
                drawn.append(torch.empty(n, **options).uniform_(-math.log(factor), math.log(factor)))
        return drawn

    def forward(self, height: int, width: int, draws: Sequence[list[Tensor]] | None = None) -> tuple[Tensor, Tensor]:
        """(sin, cos), each [HW, d], for a grid of height × width patches, freshly augmented in training mode.

        With L `draws`, each [L, HW, d]: the tables of all of them at once, in as many operations as one table takes.
        """
        coords = self.coordinates(height, width)
        if draws is None:
            sin, cos = self(height, width, [self.draw() if self.draws else []])
            return sin[0], cos[0]
        coords = coords.expand(len(draws), -1, -1)  # [L, HW, 2]
        drawn = [torch.stack(kind)[:, None] for kind in zip(*draws, strict=True)]  # [L, 1, 2 or 1] each
        if drawn and self.shift_coords is not None:
            coords = coords + drawn.pop(0)
        for logarithm in drawn:
            coords = coords * logarithm.exp()
        angles = 2 * math.pi * coords[..., None] / self.periods  # [L, HW, 2, d/4]
        angles = angles.flatten(2).tile(2)  # [L, HW, d]
        return angles.sin(), angles.cos()


def rotation(sin: Tensor, cos: Tensor, prefix: int) -> tuple[Tensor, Tensor]:
    """Tables [..., HW, d] as `rotate` wants them, [..., prefix + HW, 1, 1, d]: CLS and registers are turned by nothing,
    and the sign of rotate-half's first half is folded into the sines."""
    half = sin.shape[-1] // 2
    sin = torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)
    upright = (*sin.shape[:-2], prefix, 2 * half)
    sin = torch.cat([sin.new_zeros(upright), sin], dim=-2)
    cos = torch.cat([cos.new_ones(upright), cos], dim=-2)
    return sin[..., None, None, :], cos[..., None, None, :]


def rotate(z: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    """Turns queries and keys z [B, N, ..., d] by the tables of `rotation`; element i is paired with i + d/2.

    Computed in the tables' dtype, unturned tokens included, and cast back: in low precision the rounding of every token
    is then the same. Three passes over memory; splitting off the prefix and concatenating halves took three times that.
    """
    dtype, z = z.dtype, z.to(sin.dtype)
    return torch.addcmul(z * cos, z.roll(z.shape[-1] // 2, -1), sin).to(dtype)


# ---- one block -----------------------------------------------------------------------------------------------------


class MaskedKeyBiasLinear(nn.Linear):
    """The qkv projection whose key bias never acts: it is multiplied by zero, and what files hold there is noise.

    (Without positions softmax would cancel a key bias anyway; with RoPE it would not, so the mask is no formality.)

    `bias_mask` [3D] is 1/0/1 by thirds, persistent: published files carry it and strict loading expects it.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=True)
        self.bias_mask: Tensor
        self.register_buffer("bias_mask", torch.ones(out_features), persistent=True)
        self.init_mask()

    @torch.no_grad()
    def init_mask(self) -> None:
        width = self.out_features // 3
        self.bias_mask.fill_(1.0)
        self.bias_mask[width : 2 * width] = 0.0

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias * self.bias_mask.to(self.bias.dtype))


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention of q, k, v [B, h, N, d] → [B, h, N, d].

    Training in bfloat16 on a CPU takes plain products: forward and backward take a fifth of torch's fused kernel's
    time at 67 tokens, half of it at 201.
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.requires_grad:
        with torch.autocast("cpu", enabled=False):
            return (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    def __init__(self, c: ViTConfig) -> None:
        super().__init__()
        self.num_heads = c.num_heads
        if c.qkv_bias and c.mask_k_bias:
            self.qkv: nn.Linear = MaskedKeyBiasLinear(c.embed_dim, 3 * c.embed_dim)
        else:
            self.qkv = nn.Linear(c.embed_dim, 3 * c.embed_dim, bias=c.qkv_bias)
        self.proj = nn.Linear(c.embed_dim, c.embed_dim, bias=c.proj_bias)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        B, N, D = x.shape
        qkv = self.qkv(x).view(B, N, 3, self.num_heads, D // self.num_heads)
        q, k = rotate(qkv[:, :, :2], *rope).transpose(1, 3).unbind(2)  # [B, h, N, d] each
        v = qkv[:, :, 2].transpose(1, 2)
        return self.proj(attend(q, k, v).transpose(1, 2).reshape(B, N, D))


class MLP(nn.Module):
    def __init__(self, c: ViTConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(c.embed_dim, c.ffn_hidden, bias=c.ffn_bias)
        self.fc2 = nn.Linear(c.ffn_hidden, c.embed_dim, bias=c.ffn_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class SwiGLU(nn.Module):
    def __init__(self, c: ViTConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(c.embed_dim, c.ffn_hidden, bias=c.ffn_bias)  # the gate
        self.w2 = nn.Linear(c.embed_dim, c.ffn_hidden, bias=c.ffn_bias)
        self.w3 = nn.Linear(c.ffn_hidden, c.embed_dim, bias=c.ffn_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.w3(F.silu(self.w1(x)) * self.w2(x))


class LayerScale(nn.Module):
    def __init__(self, dim: int, init: float) -> None:
        super().__init__()
        self.init = init
        self.gamma = nn.Parameter(torch.full((dim,), float(init)))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


def residual(x: Tensor, branch: Tensor, scale: nn.Module) -> Tensor:
    """x + γ ⊙ branch, in one pass over memory where the types allow it."""
    if isinstance(scale, LayerScale) and x.dtype == branch.dtype == scale.gamma.dtype:
        return torch.addcmul(x, branch, scale.gamma)
    return x + scale(branch)


class RMSNorm(nn.Module):
    """x / rms(x) in float32, cast back, then times weight (the order matters in low precision)."""

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return y.to(x.dtype) * self.weight


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "layernorm": lambda dim: nn.LayerNorm(dim, eps=1e-6),
    "layernormbf16": lambda dim: nn.LayerNorm(dim, eps=1e-5),
    "rmsnorm": lambda dim: RMSNorm(dim, eps=1e-5),
}
FFNS: dict[str, type[nn.Module]] = {
    "mlp": MLP,
    "swiglu": SwiGLU,
    "swiglu32": SwiGLU,
    "swiglu64": SwiGLU,
    "swiglu128": SwiGLU,
}


class Block(nn.Module):
    """x + γ1 ⊙ Attn(norm1 x), then x + γ2 ⊙ FFN(norm2 x), over a list of crop groups of different sizes.

    Groups never see each other; they travel together so that stochastic depth draws in the recorded order: one
    permutation per group for the attention branch, then one per group for the FFN branch.
    """

    def __init__(self, c: ViTConfig) -> None:
        super().__init__()
        init = c.layerscale_init  # None or 0: no layer scale, and no key in the state dict
        scale: Callable[[], nn.Module] = (lambda: LayerScale(c.embed_dim, init)) if init else nn.Identity
        self.drop_path_rate = c.drop_path_rate
        self.norm1 = NORMS[c.norm_layer](c.embed_dim)
        self.attn = Attention(c)
        self.ls1 = scale()
        self.norm2 = NORMS[c.norm_layer](c.embed_dim)
        self.mlp = FFNS[c.ffn_layer](c)
        self.ls2 = scale()

    def draw(self, groups: list[Tensor]) -> Rows | None:
        """The rows of each group that each branch is computed for: a random part in training, else (None) all."""
        if not self.training or self.drop_path_rate == 0:
            return None
        kept = [max(int(len(x) * (1 - self.drop_path_rate)), 1) for x in groups]
        return [[torch.randperm(len(x), device=x.device)[:m] for x, m in zip(groups, kept)] for _branch in range(2)]

    def forward(
        self, groups: list[Tensor], ropes: list[tuple[Tensor, Tensor]], rows: Rows | None = None
    ) -> list[Tensor]:
        """Groups [B, N, D] and their rotations → groups. `rows`: what `draw` gave, where it was called before."""

        def attention(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
            return self.attn(self.norm1(x), rope)

        def ffn(x: Tensor, _rope: tuple[Tensor, Tensor]) -> Tensor:
            return self.mlp(self.norm2(x))

        rows = self.draw(groups) if rows is None else rows
        for i, (branch, scale) in enumerate(((attention, self.ls1), (ffn, self.ls2))):
            chosen = [None] * len(groups) if rows is None else rows[i]
            groups = [self._add(x, branch, scale, rope, c) for x, rope, c in zip(groups, ropes, chosen)]
        return groups

    def _add(
        self, x: Tensor, branch: Callable[..., Tensor], scale: nn.Module, rope: Any, chosen: Tensor | None
    ) -> Tensor:
        """The residual sum; with stochastic depth only over the m `chosen` of b rows, scaled up by b/m."""
        if chosen is None:
            return residual(x, branch(x, rope), scale)
        added = scale(branch(x[chosen], rope)).to(x.dtype)
        return torch.index_add(x, 0, chosen, added, alpha=len(x) / len(chosen))


# ---- the whole -----------------------------------------------------------------------------------------------------


class PatchEmbed(nn.Module):
    def __init__(self, c: ViTConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(c.in_chans, c.embed_dim, kernel_size=c.patch_size, stride=c.patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)  # [B, D, H, W]


@torch.no_grad()
def init_layers(root: nn.Module) -> None:
    """Fresh weights of all layers: linear ones truncated normal of std 0.02, biases 0, norms 1, layer scales their own."""
    for module in root.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        if isinstance(module, MaskedKeyBiasLinear):
            module.init_mask()
        elif isinstance(module, nn.LayerNorm):
            module.reset_parameters()
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, LayerScale):
            nn.init.constant_(module.gamma, module.init)


class VisionTransformer(TokenModel):
    """A DINOv3 ViT backbone. `forward` gives the normalised CLS token [B, D]; `forward_features` gives everything."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        c = self.config = config
        for name, table in (("norm_layer", NORMS), ("ffn_layer", FFNS), ("pos_embed_rope_dtype", DTYPES)):
            one_of(name, getattr(c, name), table)
        self.embed_dim = self.num_features = c.embed_dim
        self.n_blocks, self.num_heads, self.patch_size = c.depth, c.num_heads, c.patch_size
        self.n_storage_tokens = c.n_storage_tokens
        self.chunked_blocks = False
        self.stride = c.patch_size

        self.cls_token = nn.Parameter(torch.zeros(1, 1, c.embed_dim))
        if c.n_storage_tokens:
            self.storage_tokens = nn.Parameter(torch.zeros(1, c.n_storage_tokens, c.embed_dim))
        self.mask_token = nn.Parameter(torch.zeros(1, c.embed_dim))
        self.patch_embed = PatchEmbed(c)
        self.rope_embed = RopeEmbedding(c)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.depth))
        norm = NORMS[c.norm_layer]
        self.norm = norm(c.embed_dim)
        self.cls_norm = norm(c.embed_dim) if c.untie_cls_and_patch_norms else None
        self.local_cls_norm = norm(c.embed_dim) if c.untie_global_and_local_cls_norm else None
        self.head = nn.Identity()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Fresh weights, as training begins with them (spec: Initialisation)."""
        init_layers(self)
        bound = (self.config.in_chans * self.patch_size**2) ** -0.5
        nn.init.uniform_(self.patch_embed.proj.weight, -bound, bound)
        assert self.patch_embed.proj.bias is not None
        nn.init.uniform_(self.patch_embed.proj.bias, -bound, bound)
        nn.init.normal_(self.cls_token, std=0.02)
        if self.n_storage_tokens:
            nn.init.normal_(self.storage_tokens, std=0.02)
        nn.init.zeros_(self.mask_token)
        self.rope_embed.init_weights()

    def patch_grid(self, height: int, width: int) -> tuple[int, int]:
        """(H, W) of the patch grid for an image of height × width pixels."""
        return height // self.patch_size, width // self.patch_size

    def tokens(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, tuple[int, int]]:
        """Images [B, C, height, width] to the first block's input [B, N, D] and the patch grid."""
        if x.shape[-2] < self.patch_size or x.shape[-1] < self.patch_size:
            raise DinoError(
                f"an image of {x.shape[-1]}×{x.shape[-2]} pixels is smaller than one patch ({self.patch_size}); resize"
            )
        patches = self.patch_embed(x)
        grid = (patches.shape[-2], patches.shape[-1])
        patches = patches.flatten(2).transpose(1, 2)  # [B, HW, D]
        cls: Tensor = self.cls_token
        if mask is not None:
            patches = torch.where(mask.unsqueeze(-1), self.mask_token.to(patches.dtype).unsqueeze(0), patches)
        elif self.training:
            cls = cls + 0 * self.mask_token  # keeps the parameter in every rank's graph
        prefix = [cls.expand(x.shape[0], -1, -1)]
        if self.n_storage_tokens:
            prefix.append(self.storage_tokens.expand(x.shape[0], -1, -1))
        return torch.cat([*prefix, patches], dim=1), grid

    def _run(self, groups: list[Tensor], grids: list[tuple[int, int]], keep: Sequence[int] = ()) -> list[list[Tensor]]:
        """All blocks over all groups; the outputs after the blocks in `keep`, or after the last one."""
        prefix = 1 + self.n_storage_tokens
        # in training every block sees fresh coordinates, one draw per group, and other rows. All is drawn first, in the
        # order in which the blocks would: tables of all blocks then cost what those of one do, and blocks draw nothing
        fresh = len(self.blocks) if self.rope_embed.draws else 1
        draws: list[list[list[Tensor]]] = []
        rows = []
        for i, block in enumerate(self.blocks):
            if i < fresh:
                draws.append([self.rope_embed.draw() if self.rope_embed.draws else [] for _ in grids])
            rows.append(block.draw(groups))  # type: ignore[operator]
        tables = []  # of each group, (sin, cos) of each block
        for grid, of_group in zip(grids, zip(*draws)):
            sin, cos = self.rope_embed(*grid, of_group)
            tables.append(list(zip(*(t.unbind() for t in rotation(sin, cos, prefix)))))
        kept = []
        for i, block in enumerate(self.blocks):
            groups = block(groups, [of_block[i % fresh] for of_block in tables], rows[i])
            if i in keep:
                kept.append(groups)
                if len(kept) == len(keep):
                    break  # the blocks behind are not wanted
        return kept if keep else [groups]

    def _final_norm(self, x: Tensor, *, local_crops: bool = False) -> Tensor:
        """The last norm(s) over [B, N, D]; CLS and registers may have their own."""
        cls_norm = self.cls_norm or self.norm
        if local_crops and self.training and self.local_cls_norm is not None:
            cls_norm = self.local_cls_norm
        if cls_norm is self.norm:
            return self.norm(x)
        prefix = 1 + self.n_storage_tokens
        return torch.cat([cls_norm(x[:, :prefix]), self.norm(x[:, prefix:])], dim=1)

    def forward_features_list(self, x_list: list[Tensor], masks_list: list[Tensor | None]) -> list[dict[str, Any]]:
        embedded = [self.tokens(x, mask) for x, mask in zip(x_list, masks_list, strict=True)]
        (groups,) = self._run([tokens for tokens, _ in embedded], [grid for _, grid in embedded])
        return [
            named_features(self._final_norm(x, local_crops=i == 1), x, mask, self.n_storage_tokens)
            for i, (x, mask) in enumerate(zip(groups, masks_list))
        ]

    def get_intermediate_layers(
        self,
        x: Tensor,
        *,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_class_token: bool = False,
        return_extra_tokens: bool = False,
        norm: bool = True,
    ) -> tuple[Any, ...]:
        """Outputs of chosen blocks: the last `n`, or the 0-based indices in `n`; always in ascending block order.

        One element per block: patches [B, HW, D], or [B, D, H, W] with `reshape`; with the flags a tuple (patches,
        class token [B, D], register tokens [B, R, D]). `norm` applies the final norm to every chosen block.
        """
        layers = chosen_layers(n, self.n_blocks, "block")
        tokens, (H, W) = self.tokens(x)
        results, prefix = [], 1 + self.n_storage_tokens
        for (y,) in self._run([tokens], [(H, W)], keep=layers):
            if norm:
                y = self._final_norm(y)
            results.append(
                layer_output(y, prefix, (H, W) if reshape else None, return_class_token, return_extra_tokens)
            )
        return tuple(results)
