"""dino.txt: a frozen DINOv3 backbone that understands text (paper §5.3; Jose et al. 2024, arXiv 2412.16334).

Two towers meet in one space of E dimensions. The vision tower lays two further blocks over the backbone's normed
tokens and puts the CLS token beside the mean of the patch tokens; the text tower is a causal transformer, read at the
end token. So the first half of a text feature is to be compared with CLS tokens, its second half with patch tokens:
that is how classes are found in places (`get_class_and_patch_tokens`).

Legend: B images or texts, P patches, R registers, N = 1 + R + P, D vision width, n text positions, T text width, E
shared width (released: D 1024, T 1280, E 2048). State-dict names are given. Two are empty in the released model and
ours: layer scale of the text tower (`ls1`, `ls2`) and blocks of the text head. Nothing here casts: wrap a call in
`torch.autocast` for mixed precision. Images: short side 256 (bicubic), centre crop 224, ImageNet statistics.

Open vocabulary (last section): predictions for an image, or each of its patches, given class names.

    vectors = class_vectors(model, tokenizer, ["cat", "sofa"], templates)      # [C, E], whole images: cosines with
    cosines = model.encode_image(x, normalize=True) @ vectors.T                # the image feature
    maps = OpenVocabulary(model, patch_part(model, prompts)).predict(x, (h, w))   # [B, C, h, w], places

With both halves of a text feature a class is compared to the whole image, with the second alone to each patch (paper
Tab. 16; the recipes are those of the public examples). Prompts of a class are brought to length one, averaged, and brought
to length one again. (C classes, T templates, D' = E/2 width of patch tokens.)

Left out: the contrastive loss (`dinov3.losses.image_text_loss`), tokenization (`dinov3.data.tokenizer`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3.data.tokenizer import Tokenizer
from dinov3.errors import DinoError, one_of
from dinov3.heads.encoder import adapted_size, resized
from dinov3.models.architectures import ViTConfig, checked
from dinov3.models.vit import Attention, Block, LayerScale, VisionTransformer, init_layers

LOGIT_SCALE = math.log(1 / 0.07)  # initial; used as its exponential
LOGIT_SCALE_MOST = math.log(100.0)


@dataclass(frozen=True)
class TextConfig:
    """What defines a text transformer; the defaults are the released one's. Names are those of its configuration file."""

    context_length: int = 77
    vocab_size: int = 49_408
    dim: int = 1280
    num_heads: int = 20
    num_layers: int = 24
    ffn_ratio: float = 4.0
    is_causal: bool = True
    ls_init_value: float | None = None  # layer scale, None for none
    dropout_prob: float = 0.0  # of attention weights and of both branches' outputs

    @classmethod
    def of(cls, **options: Any) -> TextConfig:
        """Like the constructor, but an unknown option is an error with suggestions."""
        options.pop("model_name", None)  # in the reference's files; nothing reads it
        return checked(cls, "a text transformer", options)


@dataclass(frozen=True)
class DinoTxtConfig:
    """How the towers are joined; the defaults are the released model's. Names are those of its configuration file."""

    embed_dim: int = 2048  # E
    vision_model_freeze_backbone: bool = True
    vision_model_use_class_token: bool = True
    vision_model_use_patch_tokens: bool = True
    vision_model_num_head_blocks: int = 2
    vision_model_head_blocks_drop_path: float = 0.3
    vision_model_use_linear_projection: bool = False  # one is there anyway where widths differ
    vision_model_patch_tokens_pooler_type: str = "mean"  # "mean" | "max"
    vision_model_patch_token_layer: int = 1  # patches come from the k-th last block, CLS always from the last
    text_model_freeze_backbone: bool = False
    text_model_num_head_blocks: int = 0
    text_model_head_blocks_is_causal: bool = False
    text_model_head_blocks_drop_prob: float = 0.0
    text_model_tokens_pooler_type: str = "argmax"  # "first" | "last" | "argmax": the largest id, which ends a text
    text_model_use_linear_projection: bool = True
    init_logit_scale: float = LOGIT_SCALE
    freeze_logit_scale: bool = False

    @classmethod
    def of(cls, **options: Any) -> DinoTxtConfig:
        """Like the constructor, but an unknown option is an error with suggestions."""
        return checked(cls, "dino.txt", options)


# ---- the vision tower ----------------------------------------------------------------------------------------------


class PlainAttention(Attention):
    """The ViT's attention without RoPE: the tokens carry their positions since the backbone."""

    def forward(self, x: Tensor, rope: Any = None) -> Tensor:
        B, N, D = x.shape
        qkv = self.qkv(x).view(B, N, 3, self.num_heads, D // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [B, h, N, d] each
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(B, N, D))


class HeadBlock(Block):
    """A ViT block without positions, over one tensor: x + γ1 ⊙ Attn(norm1 x), then x + γ2 ⊙ FFN(norm2 x)."""

    def __init__(self, c: ViTConfig) -> None:
        super().__init__(c)
        self.attn = PlainAttention(c)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        empty = (x.new_empty(0),) * 2  # the tables of a rotation that does not take place
        return super().forward([x], [empty])[0]


class VisionHead(nn.Module):
    """Tokens [B, N, D] → [B, N, out_dim]: blocks, norm, and a projection without bias if there is one."""

    def __init__(self, dim: int, num_heads: int, num_blocks: int, drop_path: float, project_to: int | None) -> None:
        super().__init__()
        block = ViTConfig(
            embed_dim=dim,
            num_heads=num_heads,
            ffn_layer="swiglu64",
            ffn_ratio=4.0,
            qkv_bias=False,
            norm_layer="layernormbf16",
            layerscale_init=1e-5,
            drop_path_rate=drop_path,
        )
        self.blocks = nn.ModuleList(HeadBlock(block) for _ in range(num_blocks))
        # without blocks the tokens are what the backbone's own norm made them
        self.ln_final = nn.LayerNorm(dim, eps=1e-5) if num_blocks else nn.Identity()
        self.linear_projection = nn.Linear(dim, project_to, bias=False) if project_to else nn.Identity()

    @torch.no_grad()
    def init_weights(self) -> None:
        init_layers(self)
        if isinstance(self.linear_projection, nn.Linear):
            nn.init.normal_(self.linear_projection.weight, std=self.linear_projection.in_features**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.linear_projection(self.ln_final(x))


class VisionTower(nn.Module):
    """A ViT and a head over its normed tokens. A frozen backbone stays in evaluation mode, whatever `train` says: its
    position augmentation and drop path belong to its own training."""

    def __init__(self, backbone: VisionTransformer, config: DinoTxtConfig) -> None:
        super().__init__()
        c = config
        if not (c.vision_model_use_class_token or c.vision_model_use_patch_tokens):
            raise DinoError("dino.txt needs the class token, the patch tokens or both; neither was requested")
        one_of("vision_model_patch_tokens_pooler_type", c.vision_model_patch_tokens_pooler_type, ("mean", "max"))
        if not 1 <= c.vision_model_patch_token_layer <= backbone.n_blocks:
            raise DinoError(
                f"vision_model_patch_token_layer is {c.vision_model_patch_token_layer}, "
                f"counted from the end of {backbone.n_blocks} blocks (1 is the last)"
            )
        parts = c.vision_model_use_class_token + c.vision_model_use_patch_tokens
        if c.embed_dim % parts:
            raise DinoError(f"embed_dim {c.embed_dim} is shared by class and patch tokens and so must be even")
        self.use_class_token, self.use_patch_tokens = c.vision_model_use_class_token, c.vision_model_use_patch_tokens
        self.pooler = c.vision_model_patch_tokens_pooler_type
        self.patch_token_layer = c.vision_model_patch_token_layer
        self.freeze_backbone = c.vision_model_freeze_backbone
        width = backbone.embed_dim
        project = c.vision_model_use_linear_projection or parts * width != c.embed_dim
        self.backbone = backbone
        self.head = VisionHead(
            width,
            backbone.num_heads,
            c.vision_model_num_head_blocks,
            c.vision_model_head_blocks_drop_path,
            c.embed_dim // parts if project else None,
        )
        if self.freeze_backbone:
            self.backbone.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> VisionTower:
        super().train(mode)
        if self.freeze_backbone:
            self.backbone.eval()
        return self

    def backbone_tokens(self, images: Tensor) -> Tensor:
        """Normed [CLS; registers; patches] [B, N, D] of images [B, 3, height, width]."""
        layers = self.backbone.get_intermediate_layers(
            images, n=self.patch_token_layer, return_class_token=True, return_extra_tokens=True
        )
        patches, _, registers = layers[0]
        cls = layers[-1][1]
        return torch.cat([cls[:, None], registers, patches], dim=1)

    def get_class_and_patch_tokens(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(CLS [B, D'], patch tokens [B, P, D'], the backbone's own patch tokens [B, P, D]); D' is E/2 in the released
        model. Patch tokens compare with the second half of a text feature."""
        tokens = self.backbone_tokens(images)
        prefix = 1 + self.backbone.n_storage_tokens
        x = self.head(tokens)
        return x[:, 0], x[:, prefix:], tokens[:, prefix:]

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(image features [B, E], patch tokens, the backbone's patch tokens)."""
        cls, patches, backbone_patches = self.get_class_and_patch_tokens(images)
        features = [cls] if self.use_class_token else []
        if self.use_patch_tokens:
            features.append(patches.mean(dim=1) if self.pooler == "mean" else patches.amax(dim=1))
        return torch.cat(features, dim=-1), patches, backbone_patches


# ---- the text tower ------------------------------------------------------------------------------------------------


class TextAttention(nn.Module):
    def __init__(self, dim: int, num_heads: int, is_causal: bool, dropout: float) -> None:
        super().__init__()
        if dim % num_heads:
            raise DinoError(f"a text width of {dim} does not divide into {num_heads} heads")
        self.num_heads, self.is_causal, self.dropout = num_heads, is_causal, dropout
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        B, n, T = x.shape
        q, k, v = self.qkv(x).view(B, n, 3, self.num_heads, T // self.num_heads).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=self.is_causal)
        return self.proj(x.transpose(1, 2).reshape(B, n, T))


class TextMLP(nn.Module):
    def __init__(self, dim: int, ffn_ratio: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, int(dim * ffn_ratio))
        self.fc2 = nn.Linear(int(dim * ffn_ratio), dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class TextBlock(nn.Module):
    """x + γ1 ⊙ Attn(attention_norm x), then x + γ2 ⊙ FFN(ffn_norm x), without γ unless layer scale is on."""

    def __init__(self, c: TextConfig, *, is_causal: bool, dropout: float) -> None:
        super().__init__()
        init = c.ls_init_value
        self.attention_norm = nn.LayerNorm(c.dim, eps=1e-5)
        self.attention = TextAttention(c.dim, c.num_heads, is_causal, dropout)
        self.ffn_norm = nn.LayerNorm(c.dim, eps=1e-5)
        self.feed_forward = TextMLP(c.dim, c.ffn_ratio)
        self.ls1 = LayerScale(c.dim, init) if init else nn.Identity()
        self.ls2 = LayerScale(c.dim, init) if init else nn.Identity()
        self.dropout = nn.Dropout(dropout)

    @torch.no_grad()
    def init_weights(self, n_layers: int) -> None:
        """As CLIP: branches that write to the residual stream begin smaller, the deeper the tower. Biases begin at 0,
        also the MLP's, which the reference leaves as the allocator found them."""
        dim = self.attention.proj.in_features
        out = dim**-0.5 * (2 * n_layers) ** -0.5
        nn.init.normal_(self.attention.qkv.weight, std=dim**-0.5)
        nn.init.normal_(self.attention.proj.weight, std=out)
        nn.init.normal_(self.feed_forward.fc1.weight, std=(2 * dim) ** -0.5)
        nn.init.normal_(self.feed_forward.fc2.weight, std=out)
        for linear in (self.attention.proj, self.feed_forward.fc1, self.feed_forward.fc2):
            nn.init.zeros_(linear.bias)
        self.attention_norm.reset_parameters()
        self.ffn_norm.reset_parameters()
        for scale in (self.ls1, self.ls2):
            if isinstance(scale, LayerScale):
                nn.init.constant_(scale.gamma, scale.init)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.dropout(self.attention(self.attention_norm(x))))
        return x + self.ls2(self.dropout(self.feed_forward(self.ffn_norm(x))))


class TextTransformer(nn.Module):
    """Token ids [B, n] → normed tokens [B, n, T]; n is at most the context length."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        c = self.config = config
        self.token_embedding = nn.Embedding(c.vocab_size, c.dim)
        self.positional_embedding = nn.Parameter(torch.empty(c.context_length, c.dim))
        self.blocks = nn.ModuleList(
            TextBlock(c, is_causal=c.is_causal, dropout=c.dropout_prob) for _ in range(c.num_layers)
        )
        self.ln_final = nn.LayerNorm(c.dim, eps=1e-5)

    @torch.no_grad()
    def init_weights(self) -> None:
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        for block in self.blocks:
            assert isinstance(block, TextBlock)
            block.init_weights(len(self.blocks))
        self.ln_final.reset_parameters()

    def forward(self, tokens: Tensor) -> Tensor:
        if tokens.ndim != 2 or tokens.is_floating_point():
            raise DinoError(f"text tokens are integers [B, n], not {tokens.dtype} {list(tokens.shape)}; tokenize first")
        if tokens.shape[1] > self.config.context_length:
            raise DinoError(
                f"texts of {tokens.shape[1]} tokens are longer than the context of {self.config.context_length}; "
                f"tokenize with context_length={self.config.context_length}"
            )
        # asking a GPU would stop it at every step, asking a compiler would break its graph: their own complaints have to do
        ask = tokens.device.type == "cpu" and tokens.numel() and not torch.compiler.is_compiling()
        if ask and int(tokens.max()) >= self.config.vocab_size:
            raise DinoError(
                f"token id {int(tokens.max())} is beyond this model's vocabulary of {self.config.vocab_size}: "
                "was another vocabulary file used?"
            )
        x = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.ln_final(x)


class TextHead(nn.Module):
    """Tokens [B, n, T] and one position each [B] → features [B, E]. Released: no blocks, only the projection."""

    def __init__(self, text: TextConfig, config: DinoTxtConfig) -> None:
        super().__init__()
        c, n = config, config.text_model_num_head_blocks
        self.blocks = nn.ModuleList(
            TextBlock(text, is_causal=c.text_model_head_blocks_is_causal, dropout=c.text_model_head_blocks_drop_prob)
            for _ in range(n)
        )
        self.ln_final = nn.LayerNorm(text.dim, eps=1e-5) if n else nn.Identity()
        project = c.text_model_use_linear_projection or text.dim != c.embed_dim
        self.linear_projection = nn.Linear(text.dim, c.embed_dim, bias=False) if project else nn.Identity()

    @torch.no_grad()
    def init_weights(self) -> None:
        for block in self.blocks:
            assert isinstance(block, TextBlock)
            block.init_weights(len(self.blocks))
        if isinstance(self.ln_final, nn.LayerNorm):
            self.ln_final.reset_parameters()
        if isinstance(self.linear_projection, nn.Linear):
            nn.init.normal_(self.linear_projection.weight, std=self.linear_projection.in_features**-0.5)

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        x = x[torch.arange(x.shape[0], device=x.device), position]  # the norm and the projection see one token each
        return self.linear_projection(self.ln_final(x))


class TextTower(nn.Module):
    def __init__(self, text: TextConfig, config: DinoTxtConfig) -> None:
        super().__init__()
        self.pooler = one_of(
            "text_model_tokens_pooler_type", config.text_model_tokens_pooler_type, ("first", "last", "argmax")
        )
        self.freeze_backbone = config.text_model_freeze_backbone
        self.backbone = TextTransformer(text)
        self.head = TextHead(text, config)
        if self.freeze_backbone:
            self.backbone.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> TextTower:
        super().train(mode)
        if self.freeze_backbone:
            self.backbone.eval()
        return self

    def position(self, tokens: Tensor) -> Tensor:
        """Where each text [B, n] is read, [B]; of several largest ids the first counts."""
        if self.pooler == "argmax":
            return tokens.argmax(dim=-1)
        return torch.full_like(tokens[:, 0], 0 if self.pooler == "first" else tokens.shape[1] - 1)

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids [B, n] → text features [B, E]."""
        return self.head(self.backbone(tokens), self.position(tokens))


# ---- both ----------------------------------------------------------------------------------------------------------


class DinoTxt(nn.Module):
    """Two finished towers and one temperature. `forward` gives what a contrastive training step needs."""

    def __init__(self, visual_model: VisionTower, text_model: TextTower, config: DinoTxtConfig) -> None:
        super().__init__()
        self.config, self.text_config = config, text_model.backbone.config
        self.visual_model = visual_model
        self.text_model = text_model
        self.logit_scale = nn.Parameter(torch.full((1,), float(config.init_logit_scale)))
        self.logit_scale.requires_grad_(not config.freeze_logit_scale)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Fresh weights for everything but the vision backbone, which brings its own."""
        self.visual_model.head.init_weights()
        self.text_model.backbone.init_weights()
        self.text_model.head.init_weights()
        nn.init.constant_(self.logit_scale, self.config.init_logit_scale)

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """To [0, ln 100]; training calls it after every step."""
        self.logit_scale.clamp_(0.0, LOGIT_SCALE_MOST)

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        """Images [B, 3, height, width] → features [B, E] = [CLS; mean of patch tokens], of length one with `normalize`."""
        return _unit(self.visual_model(image)[0], normalize)

    def encode_image_with_patch_tokens(self, image: Tensor, normalize: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """(features [B, E], patch tokens [B, P, D'], the backbone's patch tokens [B, P, D]); only features normalized."""
        features, patches, backbone_patches = self.visual_model(image)
        return _unit(features, normalize), patches, backbone_patches

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """Token ids [B, n] → features [B, E], of length one with `normalize`."""
        return _unit(self.text_model(text), normalize)

    def get_logits(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Scaled cosines of images [B, 3, height, width] and token ids [C, n]: [B, C] and its transpose."""
        images, texts = self.encode_image(image, normalize=True), self.encode_text(text, normalize=True)
        logits = self.logit_scale.exp() * images @ texts.T
        return logits, logits.T

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(image features, text features, scale, patch tokens, the backbone's patch tokens).

        Features are of length one; scale [1] is exp(logit_scale); the last two feed a Gram term.
        """
        features, patches, backbone_patches = self.encode_image_with_patch_tokens(image, normalize=True)
        return features, self.encode_text(text, normalize=True), self.logit_scale.exp(), patches, backbone_patches


def _unit(x: Tensor, normalize: bool) -> Tensor:
    return F.normalize(x, dim=-1) if normalize else x


def build(backbone: VisionTransformer, text: TextConfig | None = None, config: DinoTxtConfig | None = None) -> DinoTxt:
    """The joint model over a backbone; the defaults are the released model's. New parts hold no values yet: call
    `init_weights` or load a file."""
    config = config or DinoTxtConfig()
    return DinoTxt(VisionTower(backbone, config), TextTower(text or TextConfig(), config), config)


# ---- open vocabulary ------------------------------------------------------------------------------------------------


@torch.inference_mode()
def text_features(
    model: DinoTxt, tokenizer: Tokenizer, texts: Sequence[str], context: int | None = None, batch_size: int = 256
) -> Tensor:
    """Sentences → [n, E] as the tower gives them, in float32 on the CPU. The model's mode is restored.

    Sentences of more than `context` ids (default: the tower's length) are cut, and a warning says how many.
    """
    context = context or model.text_config.context_length
    weight = next(model.text_model.parameters())
    was = model.training
    model.eval()
    try:
        tokens = tokenizer.tokenize(list(texts), context)
        if (
            model.text_config.is_causal
            and model.text_model.pooler == "argmax"
            and not len(model.text_model.head.blocks)
        ):
            # what follows an end token cannot reach back: prompts of a dozen ids cost a sixth of 77
            tokens = tokens[:, : int(tokens.argmax(1).max()) + 1]
        parts = [model.encode_text(some.to(weight.device)).float().cpu() for some in tokens.split(batch_size)]
    finally:
        model.train(was)
    return torch.cat(parts)


def prompt_features(
    model: DinoTxt, tokenizer: Tokenizer, names: Sequence[str], templates: Sequence[str], context: int | None = None
) -> Tensor:
    """[C, T, E]: every class name in every template, `{}` standing for the name."""
    if not names:
        raise DinoError("no class names were given: name at least one")
    if not templates:
        raise DinoError("no templates were given: '{}' alone stands for the bare name")
    if odd := [t for t in templates if "{}" not in t]:
        raise DinoError(f"a template needs {{}} where the class goes: {odd[0]!r}")
    prompts = [template.replace("{}", name) for name in names for template in templates]
    return text_features(model, tokenizer, prompts, context).unflatten(0, (len(names), len(templates)))


def averaged(prompts: Tensor) -> Tensor:
    """[C, T, ·] → [C, ·] of length one."""
    return F.normalize(F.normalize(prompts, dim=-1).mean(1), dim=-1)


def class_vectors(
    model: DinoTxt, tokenizer: Tokenizer, names: Sequence[str], templates: Sequence[str], context: int | None = None
) -> Tensor:
    """[C, E]: what image features are compared to."""
    return averaged(prompt_features(model, tokenizer, names, templates, context))


def patch_part(model: DinoTxt, prompts: Tensor) -> Tensor:
    """[C, T, E] → [C, D']: what patch tokens are compared to, the second half of text features."""
    c = model.config
    if not c.vision_model_use_patch_tokens:
        raise DinoError("this model was trained without patch tokens: it can name images, but not places in them")
    return averaged(prompts.chunk(2, dim=-1)[1] if c.vision_model_use_class_token else prompts)


class OpenVocabulary(nn.Module):
    """Images → a map per class, for `heads.encoder.make_inference` and `slide`: `predict(x, rescale_to)`.

    vectors [C, D'] from `patch_part`. `softmax`: shares of the classes in place of cosines (no temperature), which is what
    windows are averaged as. `tokens`: whose patches are compared, those of the text-trained "head" or the "backbone"'s own;
    of several kinds the maps stand one after the other, [B, kinds · C, …]. Images whose sides are no multiple of the patch
    are stretched up to one (bicubic).
    """

    def __init__(
        self, model: DinoTxt, vectors: Tensor, *, softmax: bool = False, tokens: Sequence[str] = ("head",)
    ) -> None:
        super().__init__()
        for kind in tokens:
            one_of("tokens", kind, ("head", "backbone"))
        self.model, self.softmax, self.tokens = model, softmax, tuple(tokens)
        width = model.visual_model.backbone.embed_dim
        if "backbone" in tokens and vectors.shape[-1] != width:
            raise DinoError(
                f"the backbone's patches have {width} numbers and the classes {vectors.shape[-1]}: this model projects "
                "its patches, so only tokens=head can be compared"
            )
        self.vectors: Tensor
        self.register_buffer("vectors", vectors, persistent=False)

    @torch.inference_mode()
    def forward(self, x: Tensor) -> Tensor:
        """Normalised images [B, 3, height, width] → cosines [B, kinds · C, h, w] on the patch grid."""
        backbone = self.model.visual_model.backbone
        size = adapted_size((x.shape[-2], x.shape[-1]), backbone.stride)
        if size != tuple(x.shape[-2:]):
            x = F.interpolate(x, size=size, mode="bicubic", align_corners=False)
        _, *found = self.model.visual_model.get_class_and_patch_tokens(x.to(next(backbone.parameters()).dtype))
        patches = dict(zip(("head", "backbone"), found))
        vectors = self.vectors.to(x.device).T
        cosines = torch.cat([F.normalize(patches[k].float(), dim=-1) @ vectors for k in self.tokens], -1)  # [B, hw, C]
        return cosines.mT.unflatten(-1, backbone.patch_grid(*size))

    def predict(self, x: Tensor, rescale_to: tuple[int, int]) -> Tensor:
        maps = resized(self(x), rescale_to)
        return maps.unflatten(1, (len(self.tokens), -1)).softmax(2).flatten(1, 2) if self.softmax else maps
