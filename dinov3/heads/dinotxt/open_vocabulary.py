"""Open vocabulary: predictions of a dino.txt model for an image, or each of its patches, given class names.

    vectors = class_vectors(model, tokenizer, ["cat", "sofa"], templates)      # [C, E], whole images: cosines with
    cosines = model.encode_image(x, normalize=True) @ vectors.T                # the image feature
    maps = OpenVocabulary(model, patch_part(model, prompts)).predict(x, (h, w))   # [B, C, h, w], places

The first half of a text feature is aligned with the CLS token, the second with patch tokens; with both halves a class is
compared to the whole image, with the second alone to each patch (paper Tab. 16; the recipes are those of the public
examples). Prompts of a class are brought to length one, averaged, and brought to length one again.

Legend: B images, C classes, T templates, E shared width, D' = E/2 width of patch tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3.data.tokenizer import Tokenizer
from dinov3.errors import DinoError
from dinov3.heads.dinotxt.model import DinoTxt
from dinov3.heads.encoder import adapted_size, resized


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
    """Images → a map per class, for `heads.windows.make_inference` and `slide`: `predict(x, rescale_to)`.

    vectors [C, D'] from `patch_part`. `softmax`: shares of the classes in place of cosines (no temperature), which is what
    windows are averaged as. Images whose sides are no multiple of the patch are stretched up to one (bicubic).
    """

    def __init__(self, model: DinoTxt, vectors: Tensor, *, softmax: bool = False) -> None:
        super().__init__()
        self.model, self.softmax = model, softmax
        self.vectors: Tensor
        self.register_buffer("vectors", vectors, persistent=False)

    @torch.inference_mode()
    def forward(self, x: Tensor) -> Tensor:
        """Normalised images [B, 3, height, width] → cosines [B, C, h, w] on the patch grid."""
        backbone = self.model.visual_model.backbone
        size = adapted_size((x.shape[-2], x.shape[-1]), backbone.stride)
        if size != tuple(x.shape[-2:]):
            x = F.interpolate(x, size=size, mode="bicubic", align_corners=False)
        _, patches, _ = self.model.visual_model.get_class_and_patch_tokens(x.to(next(backbone.parameters()).dtype))
        cosines = F.normalize(patches.float(), dim=-1) @ self.vectors.to(patches.device).T  # [B, hw, C]
        return cosines.mT.unflatten(-1, backbone.patch_grid(*size))

    def predict(self, x: Tensor, rescale_to: tuple[int, int]) -> Tensor:
        maps = resized(self(x), rescale_to)
        return maps.softmax(1) if self.softmax else maps
