"""Image classes with probabilities: a linear head on [CLS ; mean patch] (paper §6.1); zero-shot, by names (§5.3, Tab. 16)."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from dinov3 import drawing
from dinov3.data import names as known_names
from dinov3.data.tokenizer import Tokenizer
from dinov3.data.transforms.inputs import Preprocessing
from dinov3.drawing import palette
from dinov3.errors import DinoError
from dinov3.heads.dinotxt import DinoTxt, OpenVocabulary, averaged, patch_part, prompt_features
from dinov3.predict.common import best_class, names_of, predicted_map, preprocessing_of, result_files, see, statistics
from dinov3.predict.dense import Segmentation

SIZE = 224  # the centre crop; the short side is 256/224 of it


@dataclass(frozen=True)
class Classification:
    """probabilities [K] float32 that sum to 1; names of the K classes."""

    probabilities: np.ndarray
    names: tuple[str, ...]
    image: Image.Image

    FILE: ClassVar[str] = "classes"  # a table's name
    DRAWN: ClassVar[str] = "probabilities"  # a drawing's; NAME_classes.png is the mask of a segmentation
    COLUMNS: ClassVar[tuple[str, ...]] = ("rank", "class", "name", "probability")
    LISTED: ClassVar[int | None] = 100  # in a saved table

    def scores(self) -> np.ndarray:
        """[K]: what classes are ranked by."""
        return self.probabilities

    def best(self, top: int | None = 5) -> list[tuple[int, str, float]]:
        """(class number, name, probability), the likeliest first."""
        order = np.argsort(-self.scores(), kind="stable")[:top]
        return [(int(i), self.names[i], float(self.probabilities[i])) for i in order]

    def rows(self, top: int | None = None) -> list[tuple[Any, ...]]:
        """The likeliest classes as rows of a table with `COLUMNS`."""
        return [(rank, number, name, f"{p:.6g}") for rank, (number, name, p) in enumerate(self.best(top), 1)]

    def summary(self, top: int = 5) -> str:
        return ", ".join(f"{name} {p:.1%}" for _, name, p in self.best(top))

    def drawing(self) -> Image.Image:
        return drawing.shares_beside(self.image, [(name, p) for _, name, p in self.best()])

    def save(self, folder: str | os.PathLike[str], name: str = "image") -> list[Path]:
        """`NAME_classes.csv` (rank, class, name, probability; the likeliest 100) and `NAME_probabilities.png`."""
        data, seen = result_files(folder, name, f"{self.FILE}.csv", f"{self.DRAWN}.png")
        with data.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([self.COLUMNS, *self.rows(self.LISTED)])
        self.drawing().save(seen)
        return [data, seen]


def classification_preprocessing(model: nn.Module, size: int) -> Preprocessing:
    """Short side to 256/224 of the size (bicubic), centre crop: how the published accuracies are measured."""
    multiple = 32 if type(getattr(model, "backbone", None)).__name__ == "ConvNeXt" else 16
    size = max(multiple, round(size / multiple) * multiple)
    changes = {"size": round(size * 256 / 224), "center_crop": size, "multiple": multiple} | statistics(model)
    return Preprocessing.named("classification", **changes)


@torch.inference_mode()
def predict_classes(
    model: nn.Module, image: Any, *, size: int | None = None, names: Sequence[str] | None = None
) -> Classification:
    """size: the side of the square that the model sees, cut from the middle (default: as a head of your own was trained;
    else 224, as published). names: of the classes; default the model's own, ImageNet-1k's where there are 1000."""
    info = getattr(model, "head_info", None)
    preprocessing = (
        info.preprocessing if info is not None and size is None else classification_preprocessing(model, size or SIZE)
    )
    seen = see(model, image, preprocessing)
    logits = model(seen.x.to(next(model.parameters()).dtype))
    if not isinstance(logits, torch.Tensor) or logits.ndim != 2:
        raise DinoError(f"classification needs a classifier on a backbone, not a {type(model).__name__}")
    K = logits.shape[1]
    class_names = names_of(model, K, names, known_names.imagenet1k())
    return Classification(logits[0].float().softmax(-1).cpu().numpy(), class_names, seen.image)


# ---- zero-shot -------------------------------------------------------------------------------------------------------
# Zero-shot classification and segmentation with dino.txt (paper §5.3, Tab. 16).
#
# Class names are put into sentences (CLIP's 80 by default) and become vectors once, `Words`; images are compared with
# them. Nothing needs to be trained for a new list of classes.


ZERO_SHOT_SIZE = 384  # centre crop, as the published table was measured (576 patches); the short side is the same
SHORT, WINDOW = 512, 384  # of the published example for places


@dataclass(frozen=True, eq=False)
class Words:
    """C classes as vectors of length one: image [C, E] compares with whole images, patch [C, D'] with places."""

    names: tuple[str, ...]
    image: Tensor
    patch: Tensor | None  # None: the model was trained without patch tokens


def words(model: DinoTxt, tokenizer: Tokenizer, names: Sequence[str], templates: Sequence[str] | None = None) -> Words:
    """The vectors of class names in all templates (default: CLIP's 80; ("{}",) for the bare name or a whole sentence).

    A sentence longer than the text tower's context is cut, and a warning says so.
    """
    prompts = prompt_features(model, tokenizer, names, known_names.templates() if templates is None else templates)
    patch = patch_part(model, prompts) if model.config.vision_model_use_patch_tokens else None
    return Words(tuple(names), averaged(prompts), patch)


@dataclass(frozen=True)
class ZeroShot(Classification):
    """cosines [C] of the image with each class; probabilities [C] by the model's own temperature.

    Saved as `NAME_words.csv` (every class, with its cosine) and `NAME_words.png`.
    """

    cosines: np.ndarray
    FILE: ClassVar[str] = "words"
    DRAWN: ClassVar[str] = "words"
    COLUMNS: ClassVar[tuple[str, ...]] = (*Classification.COLUMNS, "cosine")
    LISTED: ClassVar[int | None] = None

    def scores(self) -> np.ndarray:
        return self.cosines

    def rows(self, top: int | None = None) -> list[tuple[Any, ...]]:
        return [(*row, f"{self.cosines[row[1]]:.6g}") for row in super().rows(top)]


def check_model(model: Any) -> DinoTxt:
    if not isinstance(model, DinoTxt):
        raise DinoError(f"words need a dino.txt model, not a {type(model).__name__}")
    return model


@torch.inference_mode()
def predict_words(model: DinoTxt, image: Any, classes: Words, *, size: int = ZERO_SHOT_SIZE) -> ZeroShot:
    """size: the side of the square cut from the middle, after the short side was brought to it (bicubic)."""
    step: Any = check_model(model).visual_model.backbone.stride
    size = max(step, round(size / step) * step)
    preprocessing = Preprocessing.named(
        "classification", **{"size": size, "center_crop": size, "multiple": step} | statistics(model)
    )
    seen = see(model, image, preprocessing)
    weight = model.visual_model.backbone.cls_token
    embedding = model.encode_image(seen.x.to(weight.dtype), normalize=True).float().cpu()
    cosines = (embedding @ classes.image.T)[0]  # [C]
    scale = model.logit_scale.exp().float().cpu()
    return ZeroShot((scale * cosines).softmax(0).numpy(), classes.names, seen.image, cosines.numpy())


@torch.inference_mode()
def predict_places(
    model: DinoTxt,
    image: Any,
    classes: Words,
    *,
    size: int = SHORT,
    window: int | None = WINDOW,
    stride: int | None = None,
) -> Segmentation:
    """The class of every pixel among `classes`; there is no "none of these", so give a word for the rest too.

    size: the short side (bicubic); window, stride: as in the published example, 384 every 192 pixels, windows averaged as
    shares of the classes; window None: everything at once, by cosines. `probability` of the result is that share or
    cosine; shares have no temperature and so are close to each other.
    """
    if classes.patch is None:
        raise DinoError("this dino.txt was trained without patch tokens: it can name images, but not places in them")
    if window is not None and stride is None:
        stride = max(1, window // 2)
    seen = see(check_model(model), image, preprocessing_of(model, size, interpolation="bicubic"))
    maps_of = OpenVocabulary(model, classes.patch, softmax=window is not None)
    maps = predicted_map(seen.x, maps_of.predict, len(classes.names), window, stride)
    number, share = best_class(maps, seen, lambda m: m)
    colours = np.array(palette(len(classes.names)), dtype=np.uint8)
    return Segmentation(number, share, classes.names, colours, seen.image)
