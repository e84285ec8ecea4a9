"""Zero-shot classification, segmentation and retrieval by text, with a dino.txt model (paper Tab. 16; the public examples).

    dinov3 eval zero-shot task=classification dataset=ImageNet:root=…:split=VAL model.weights=HEAD model.backbone_weights=L
    dinov3 eval zero-shot task=segmentation dataset=ADE20K:root=…:split=VAL …
    dinov3 eval zero-shot task=retrieval dataset=CocoCaptions:root=…:split=VAL …
    dinov3 eval zero-shot dataset=photos model.sizes=OUT/clip_model_config.yaml model.weights=OUT/head.safetensors

classification: every class name in every template; short side and centre crop `size` (bicubic); cosines with the whole
feature; top-1 and top-5. The published table is at 576 patches (size=384); the public example at 512.
segmentation: the second half of the text features against patch tokens, `tokens=backbone` (the published notebook) or
`head`; the scores of both are in the results where the widths agree; short side `resize` (bicubic, the long one rounded
down); mode slide: windows of `side` every `stride`, the mean of their softmax without a temperature; mode whole: cosines.
Then bilinear to the mask's size. Macro Jaccard over the classes that occur, mIoU in percent.
retrieval: recall of images by captions and captions by images; any caption of an image counts.

Class names come from the data set (ImageNet's, ADE20K's and Cityscapes' published lists, or folders' names), or from the
file `names`, one on each line; templates are CLIP's 80, or the lines of the file `templates`, or "none": the bare name.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov3 import distributed
from dinov3.config.bounds import setting
from dinov3.data import names as known
from dinov3.data.datasets import make_dataset
from dinov3.data.datasets.base import ImageDataset
from dinov3.data.datasets.captions import Captioned
from dinov3.data.datasets.dense import DenseDataset
from dinov3.data.transforms.inputs import Preprocessing
from dinov3.dense.matching import nearest
from dinov3.errors import DinoError
from dinov3.eval import session as common
from dinov3.eval.features import decoded, test_targets
from dinov3.eval.session import Number, Session
from dinov3.features import batched, check_patches, evaluating
from dinov3.heads.dinotxt import DinoTxt, OpenVocabulary, class_vectors, patch_part, prompt_features, text_features
from dinov3.heads.encoder import resized, slide
from dinov3.hub.published_heads import open_model
from dinov3.metrics import accuracy, confusion_matrix, iou_scores, reduce_zero_label


@dataclass
class TextModelSection:
    """Which dino.txt model. Nothing given: the published one, fetched."""

    weights: str | None = None  # the head and text tower; "random" for trying
    backbone_weights: str | None = None
    bpe: str | None = None  # CLIP's bpe_simple_vocab_16e6.txt.gz
    sizes: str | None = None  # clip_model_config.yaml of a training of one's own
    device: str = "auto"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"


@dataclass
class ZeroShotConfig:
    POSITIONAL = (("FOLDER", "dataset"),)

    model: TextModelSection = field(default_factory=TextModelSection)
    task: Literal["classification", "segmentation", "retrieval"] = "classification"
    dataset: str = setting("", required="dataset=ImageNet:root=…:split=VAL, or a folder of class folders")
    names: str | None = None
    templates: str | None = None
    size: int = setting(512, at_least=1)
    mode: Literal["slide", "whole"] = "slide"
    tokens: Literal["backbone", "head"] = "backbone"  # whose patches segmentation compares with the texts
    resize: int = setting(512, at_least=1)
    side: int = setting(384, at_least=1)
    stride: int = setting(192, at_least=1)
    batch_size: int = setting(16, at_least=1)
    workers: int = 4
    max_images: int | None = None  # the first so many; null: all
    output_dir: str | None = "."
    save_results: bool = False


def class_names(dataset: Any, file: str | None) -> list[str]:
    """One name for each class number, from a file or from what the data set is."""
    if file is not None:
        return list(known.read_names(file))
    kind = type(dataset).__name__
    if kind.startswith("ImageNet") and kind != "ImageNet22k":
        return list(known.imagenet1k())
    if kind == "ADE20K":
        return list(known.ade20k())
    own = getattr(dataset, "class_names", None)
    if not own:
        raise DinoError("this data set does not name its classes: give names=FILE, one name on each line, in order")
    return [str(name).replace("_", " ") for name in own]


def chosen_templates(text: str | None) -> list[str]:
    """CLIP's 80, the lines of a file, or "none": the bare name."""
    if text is None:
        return list(known.templates())
    return ["{}"] if text == "none" else list(known.read_names(text, "templates"))


# ---- features -------------------------------------------------------------------------------------------------------


def text_preprocessing(model: Any, size: int) -> Preprocessing:
    """As dino.txt is measured: the short side to `size`, bicubic, and a square of it from the middle."""
    origin = model.origin
    multiple = model.visual_model.backbone.stride
    check_patches("size", size, multiple)
    return Preprocessing.named(
        "classification", size=size, center_crop=size, multiple=multiple, mean=origin.mean, std=origin.std
    )


def image_features(
    model: DinoTxt, data: ImageDataset, rows: Sequence[int], *, size: int, batch_size: int = 32, workers: int = 4
) -> Tensor:
    """[N, E] of some of a data set's images, on the CPU in float32. The model's mode is restored."""
    weight = next(model.text_model.parameters())
    preprocessing = text_preprocessing(model, size)
    read = partial(decoded, data, target_short_side=preprocessing.target_short_side)
    batches = batched(rows, preprocessing, batch_size, workers=workers, read=read)
    with evaluating(model):
        parts = [
            model.encode_image(x.to(weight.device, weight.dtype), normalize=True).float().cpu() for x, _ in batches
        ]
    return torch.cat(parts)


# ---- numbers -----------------------------------------------------------------------------------------------------


def retrieval(images: Tensor, texts: Tensor, image_of: Tensor, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """Recall in percent: `text_to_image_R@k`, `image_to_text_R@k`.

    images [N, E] · texts [M, E] · image_of [M]: which image a caption belongs to. A caption is found when its
    image is among the k most similar; an image when any of its captions is. Every image needs a caption.
    """
    N, M = len(images), len(texts)
    if len(image_of) != M or set(image_of.tolist()) != set(range(N)):
        raise DinoError(f"retrieval needs a caption for each of {N} images, and an image for each of {M} captions")
    k = max(ks)
    images_found = nearest(texts, images, min(k, N))[1]  # [M, k]
    texts_found = nearest(images, texts, min(k, M))[1]  # [N, k]
    hits_text = (images_found == image_of[:, None]).cumsum(1)
    hits_image = (image_of[texts_found] == torch.arange(N)[:, None]).cumsum(1)

    def found(hits: Tensor, k: int) -> float:
        return 100 * float((hits[:, min(k, hits.shape[1]) - 1] > 0).double().mean())

    return {f"text_to_image_R@{k}": found(hits_text, k) for k in ks} | {
        f"image_to_text_R@{k}": found(hits_image, k) for k in ks
    }


def classification(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """`top-1` and `top-5` in percent of logits [N, C] and labels [N]."""
    return {f"top-{k}": 100 * accuracy(logits, labels, k) for k in (1, 5)}


# ---- the evaluation -------------------------------------------------------------------------------------------------


def evaluate(config: ZeroShotConfig, session: Session) -> dict[str, Number]:
    """One row of numbers in percent."""
    c, m = config, config.model
    dataset = make_dataset(c.dataset)
    device = session.device
    model, tokenizer = open_model(
        m.weights or None, m.backbone_weights, m.bpe, m.sizes, device=device, dtype=getattr(torch, m.dtype)
    )
    session.log(f"{model.origin}, {m.dtype} on {device}")
    n = len(dataset) if c.max_images is None else min(len(dataset), c.max_images)
    rows = list(range(n))
    if n < len(dataset):
        session.log(f"note: only the first {n} of {len(dataset)} images, so this is another benchmark")
    if c.task == "retrieval":
        return _retrieval(c, model, tokenizer, dataset, rows)
    names = class_names(dataset, c.names)
    session.log(f"{len(names)} classes, {len(chosen_templates(c.templates))} templates, {n} images")
    if c.task == "classification":
        return _classification(c, model, tokenizer, dataset, rows, names)
    return _segmentation(c, model, tokenizer, dataset, rows, names, session)


def _classification(
    c: ZeroShotConfig, model: DinoTxt, tokenizer: Any, dataset: Any, rows: Sequence[int], names: list[str]
) -> dict[str, Number]:
    targets = test_targets(dataset, c.dataset)
    labels = torch.from_numpy(targets.labels)
    if labels.ndim != 1:
        raise DinoError(f"{c.dataset} has several labels an image; zero-shot classification needs one")
    vectors = class_vectors(model, tokenizer, names, chosen_templates(c.templates))
    share = distributed.share(rows)
    images = image_features(model, dataset, share, size=c.size, batch_size=c.batch_size, workers=c.workers)
    logits = torch.from_numpy(targets.chosen((100 * images @ vectors.T).numpy()))
    gathered = distributed.gather_objects((logits, labels[share]))
    return dict(classification(*(torch.cat(parts) for parts in zip(*gathered))))


def _retrieval(
    c: ZeroShotConfig, model: DinoTxt, tokenizer: Any, dataset: Any, rows: Sequence[int]
) -> dict[str, Number]:
    if not isinstance(dataset, Captioned):
        raise DinoError(f"{c.dataset} has no captions; CocoCaptions:root=… and Captions:root=… do")
    images = image_features(model, dataset, rows, size=c.size, batch_size=c.batch_size, workers=c.workers)
    captions = [(i, caption) for i, row in enumerate(rows) for caption in dataset.captions[row]]
    texts = F.normalize(text_features(model, tokenizer, [text for _, text in captions]), dim=-1)
    return dict(retrieval(images, texts, torch.tensor([i for i, _ in captions])))


def place_maps(
    model: DinoTxt, vectors: Tensor, x: Tensor, config: ZeroShotConfig, tokens: Sequence[str] = ("head",)
) -> Tensor:
    """Class maps [1, kinds of tokens · C, h, w] of one image [1, 3, h, w]: shares from windows, or cosines of the whole."""
    size_hw = (x.shape[-2], x.shape[-1])
    if config.mode == "whole":
        return OpenVocabulary(model, vectors, tokens=tokens).predict(x, size_hw)
    return slide(
        x,
        OpenVocabulary(model, vectors, softmax=True, tokens=tokens),
        decoder_head_type="linear",
        n_output_channels=len(tokens) * len(vectors),
        crop_hw=(config.side, config.side),
        stride_hw=(config.stride, config.stride),
    )


def _segmentation(
    c: ZeroShotConfig,
    model: DinoTxt,
    tokenizer: Any,
    dataset: Any,
    rows: Sequence[int],
    names: list[str],
    session: Session,
) -> dict[str, Number]:
    if not isinstance(dataset, DenseDataset) or dataset.kind != "classes":
        raise DinoError(f"{c.dataset} has no class masks; ADE20K, Cityscapes, VOC2012 and DenseFolder do")
    vectors = patch_part(model, prompt_features(model, tokenizer, names, chosen_templates(c.templates)))
    weight = next(model.text_model.parameters())
    origin: Any = model.origin
    # the long side rounded down, as the public example does: nothing is cut and no multiple of the patch is needed
    preprocessing = Preprocessing(
        size=c.resize, shape="short", multiple=1, interpolation="bicubic", mean=origin.mean, std=origin.std,
        rounding="down",
    )  # fmt: skip
    both = c.tokens == "backbone" or vectors.shape[-1] == model.visual_model.backbone.embed_dim
    tokens = ("backbone", "head") if both else ("head",)
    total = torch.zeros(len(tokens), len(names), len(names), dtype=torch.float64)
    for row in session.shared(rows, "images"):
        image = decoded(dataset, row).image
        x, _ = preprocessing(image)
        maps = place_maps(model, vectors, x[None].to(weight.device), c, tokens)
        target = torch.from_numpy(dataset.target(row).astype("int64"))
        if dataset.zero_is_other:
            target = reduce_zero_label(target)
        maps = resized(maps, (target.shape[-2], target.shape[-1]))[0].unflatten(0, (len(tokens), -1))
        for counts, classes in zip(total, maps.argmax(1).cpu()):
            counts += confusion_matrix(classes, target, len(names), dataset.ignore_index).double()
    scores = dict(zip(tokens, map(iou_scores, sum(distributed.gather_objects(total)))))
    results: dict[str, Number] = {name: 100 * float(scores[c.tokens][name]) for name in ("mIoU", "aAcc", "mAcc")}
    return results | {f"mIoU {kind}": 100 * float(each["mIoU"]) for kind, each in scores.items()}


def main(argv: Sequence[str] | None = None) -> int:
    return common.main("zero_shot", ZeroShotConfig, evaluate, argv)  # type: ignore[type-var]


if __name__ == "__main__":
    sys.exit(main())
