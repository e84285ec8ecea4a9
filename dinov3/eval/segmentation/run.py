"""Semantic segmentation on frozen features: fits a linear head and scores it, or scores a head that exists (paper §6.1.2).

    python dinov3/eval/segmentation/run.py model.dino_hub=dinov3_vitl16 config=config-ade20k-linear-training.yaml \\
        datasets.root=/data/ade --output-dir=OUT
    python dinov3/eval/segmentation/run.py config=config-ade20k-m2f-inference.yaml datasets.root=/data/ade \\
        load_from=dinov3_vit7b16_ms head_weights=HEAD.pth backbone_weights=7B.pth --output-dir=OUT
    dinov3 eval segmentation FOLDER --model dinov3_vits16           your own images and masks; no configuration

Protocol: sliding windows on an image resized to a short side, overlapping logits averaged, the map resized to the mask,
softmax; with test-time augmentation the mean over sizes and flips; arg-max. The confusion matrix is summed over all
images of all processes. Results: results-semantic-segmentation.csv (percent) and .json, per-class.csv, model_final.pth.

Where the reference reads past a key, it counts here: eval.reduce_zero_label (null: as the data set is), eval.mode,
decoder_head.use_batchnorm and use_backbone_norm, eval.compute_metric_per_image; the weights of Dice and cross-entropy add
up; validation runs every eval_interval iterations and at the end; every image counts once on any number of processes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from dinov3 import distributed
from dinov3.config.bounds import Problem, setting
from dinov3.data.datasets.dense import ONE_CLASS, DenseDataset
from dinov3.data.transforms.dense import SegmentationTransform, short_side, tta_short
from dinov3.data.transforms.inputs import resized, standardised, to_pixels
from dinov3.errors import DinoError
from dinov3.eval import dense
from dinov3.eval import session as common
from dinov3.eval.segmentation.inference import make_inference
from dinov3.fit import head_tensors
from dinov3.heads.encoder import FrozenLayers
from dinov3.heads.linear import LinearSegmentor, build_linear_segmentor
from dinov3.heads.objectives import segmentation_terms
from dinov3.hub import HEADS
from dinov3.losses import LossTerms
from dinov3.metrics import IGNORED, SEGMENTATION_COLUMNS, confusion_matrix, iou_scores, percentages, reduce_zero_label
from dinov3.runlog import silent, ticked

NAME = "semantic_segmentation"


# ---- configuration -------------------------------------------------------------------------------------------------


@dataclass
class DecoderSection:
    type: Literal["linear", "m2f"] = "m2f"  # only linear ones are fitted here
    backbone_out_layers: Literal["LAST", "FOUR_LAST", "FOUR_EVEN_INTERVALS"] = "LAST"
    use_batchnorm: bool = True
    use_cls_token: bool = False
    use_backbone_norm: bool = True
    num_classes: int = 150
    hidden_dim: int = 2048  # of a Mask2Former head
    dropout: float = 0.1  # of a linear head


@dataclass
class TrainTransform:
    img_size: int | None = None
    random_img_size_ratio_range: list[float] | None = setting(None, above=0, rising=True)
    crop_size: int | list[int] | None = None
    flip_prob: float = 0.0
    augment: bool = True  # ours; false: images as for evaluation, features computed once


@dataclass
class EvalTransform:
    img_size: int | None = None  # short side; null: eval.crop_size with load_from, else the image's own size
    tta_ratios: list[float] = field(default_factory=lambda: [1.0])


@dataclass
class TransformsSection:
    train: TrainTransform = field(default_factory=TrainTransform)
    eval: EvalTransform = field(default_factory=EvalTransform)
    mean: list[float] | None = None  # on the scale of 0–255; null: the weights' own (ImageNet's for the web models)
    std: list[float] | None = None


@dataclass
class LossSection:
    diceloss_weight: float = 0.0
    celoss_weight: float = 1.0


@dataclass
class EvalSection:
    compute_metric_per_image: bool = False  # true: mean over images of each one's scores
    reduce_zero_label: bool | None = None  # null: as the data set is (ADE20K: yes)
    mode: Literal["slide", "whole"] = "slide"
    crop_size: int = 512
    stride: int = 341
    eval_interval: int = 40000
    use_tta: bool = False  # tta_ratios, each with its mirror image


@dataclass
class SegmentationConfig(dense.DenseConfig):
    model_dtype: dense.ModelDtype | None = "FLOAT32"
    metric_to_save: str = setting("mIoU", choices=SEGMENTATION_COLUMNS)
    decoder_head: DecoderSection = field(default_factory=DecoderSection)
    transforms: TransformsSection = field(default_factory=TransformsSection)
    train: LossSection = field(default_factory=LossSection)
    eval: EvalSection = field(default_factory=EvalSection)

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        if self.load_from is None and self.decoder_head.type == "m2f":
            yield (
                "decoder_head.type",
                "Mask2Former heads are scored here, not fitted: give load_from, or decoder_head.type=linear",
            )
        if self.decoder_head.use_cls_token:
            yield "decoder_head.use_cls_token", "no head of segmentation uses the CLS token; leave it false"
        if self.train.celoss_weight <= 0 and self.train.diceloss_weight <= 0:
            yield "train.celoss_weight", "one of celoss_weight and diceloss_weight must be above 0"


# ---- scoring -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Protocol:
    """How images become class maps."""

    n_classes: int
    size: int | None = None  # short side; None: as they are
    mode: str = "slide"
    crop: int = 512
    stride: int = 341
    ratios: tuple[float, ...] = (1.0,)
    flip: bool = False
    head: str = "linear"
    mean: tuple[float, ...] = SegmentationTransform.mean
    std: tuple[float, ...] = SegmentationTransform.std


def copies(image: Any, protocol: Protocol) -> list[tuple[Tensor, bool]]:
    """The network inputs [1, 3, h, w] of one image and whether each is mirrored: originals first, then mirror images."""
    pixels = to_pixels(image)
    h, w = pixels.shape[-2:]
    size = protocol.size
    if size is None and protocol.ratios != (1.0,):
        size = min(h, w)
    inputs = []
    for ratio in protocol.ratios:
        hw = (h, w) if size is None else short_side((h, w), tta_short(size, ratio))
        inputs.append(standardised(resized(pixels, hw), protocol.mean, protocol.std)[None])
    mirrored = [(x.flip(-1), True) for x in inputs] if protocol.flip else []
    return [(x, False) for x in inputs] + mirrored


@torch.no_grad()
def class_probabilities(model: Any, image: Any, size_hw: tuple[int, int], protocol: Protocol, device: Any) -> Tensor:
    """[K, *size_hw]: the mean of the copies' softmax maps, on the CPU for sliding windows."""
    total: Tensor | None = None
    inputs = copies(image, protocol)
    for x, mirrored in inputs:
        maps = make_inference(
            x.to(device),
            model,
            inference_mode=protocol.mode,
            decoder_head_type=protocol.head,
            rescale_to=size_hw,
            n_output_channels=protocol.n_classes,
            crop_size=(protocol.crop, protocol.crop),
            stride=(protocol.stride, protocol.stride),
            apply_horizontal_flip=mirrored,
            output_activation=lambda m: m.float().softmax(1),
        )[0]
        total = maps if total is None else total + maps
    assert total is not None
    return total / len(inputs)


def evaluate_model(
    model: Any,
    dataset: DenseDataset,
    protocol: Protocol,
    *,
    reduce_zero: bool,
    per_image: bool = False,
    device: torch.device | str = "cpu",
    log: Callable[[str], None] = silent,
    shown: Callable[[int, Tensor], None] | None = None,
) -> dict[str, Any]:
    """Scores of a segmentation model (`predict`) on a data set, those of `metrics.iou_scores`; the same on all ranks.

    shown(index, class map) is called for every image of this process.
    """
    K, n = protocol.n_classes, len(dataset)
    counts = torch.zeros((n if per_image else 1), K, K, dtype=torch.int64)
    for index in ticked(distributed.share(range(n)), log, "images"):
        image, target = dataset[index]
        labels = torch.from_numpy(target)
        labels = reduce_zero_label(labels) if reduce_zero else labels
        prediction = class_probabilities(model, image, (labels.shape[0], labels.shape[1]), protocol, device).argmax(0)
        counts[index if per_image else 0] += confusion_matrix(prediction, labels, K, IGNORED)
        if shown is not None:
            shown(index, prediction)
    counts = distributed.all_reduce(counts.to(device), "sum").cpu()
    scores = iou_scores(counts.sum(0))
    if per_image:
        rows = [iou_scores(c) for c in counts]
        scores |= {name: float(torch.tensor([r[name] for r in rows]).nanmean()) for name in SEGMENTATION_COLUMNS}
    return scores


# ---- fitting -------------------------------------------------------------------------------------------------------


def segmentation_loss(model: nn.Module, batch: dict[str, Any], ce: float, dice: float) -> LossTerms:
    """Of a batch {"x", "target"}; logits are brought over exactly the image, without the padding around it."""
    assert isinstance(model, LinearSegmentor)
    encoder = model.segmentation_model[0]
    assert isinstance(encoder, FrozenLayers)
    logits, size_hw = model(batch["x"]), (batch["x"].shape[-2], batch["x"].shape[-1])
    if encoder.adapted_size(size_hw) != size_hw:
        logits = encoder.to_image(logits, size_hw)
    return segmentation_terms(logits, batch["target"], ce=ce, dice=dice, ignore_index=IGNORED, mean_over="all")


def fitted(
    config: SegmentationConfig, session: common.Session, protocol: Protocol, model: LinearSegmentor
) -> dict[str, Any]:
    """Fits the head of `model` and gives the scores of the best evaluation; the model has that head afterwards."""
    c, t = config, config.transforms.train
    train = dense.open_dense(c.datasets.train, c.datasets.root, ("classes",), "datasets.train")
    val = dense.open_dense(c.datasets.val, c.datasets.root, ("classes",), "datasets.val")
    for what, data in (("train", train), ("val", val)):
        left = f" ({data.left_out} images without a mask are left out)" if data.left_out else ""
        session.log(f"datasets.{what}: {len(data)} images{left}")
    zero = train.zero_is_other if c.eval.reduce_zero_label is None else c.eval.reduce_zero_label
    low_high = t.random_img_size_ratio_range
    transform = SegmentationTransform(
        img_size=t.img_size if t.augment else protocol.size,
        ratio_range=(low_high[0], low_high[1]) if low_high else None,
        crop_hw=dense.pair(t.crop_size, "transforms.train.crop_size") if t.crop_size is not None else None,
        flip_prob=t.flip_prob,
        reduce_zero_label=zero,
        mean=protocol.mean,
        std=protocol.std,
    )  # fmt: skip
    best: list[dict[str, Any]] = []
    options: Any = {"per_image": c.eval.compute_metric_per_image, "device": session.device}

    def validate(module: nn.Module) -> dict[str, float]:
        with dense.autocast(c.model_dtype, session.device):
            scores = evaluate_model(module, val, protocol, reduce_zero=zero, **options)
        name = c.metric_to_save
        if not best or scores[name] > best[0][name] or best[0][name] != best[0][name]:
            best[:] = [scores]
        return percentages(scores)

    def loss(module: nn.Module, batch: dict[str, Any]) -> LossTerms:
        return segmentation_loss(module, batch, c.train.celoss_weight, c.train.diceloss_weight)

    report = dense.fit_head(
        c, session, model, train, transform, loss, validate, late=1, best_by=c.metric_to_save
    )  # fmt: skip
    assert report.best is not None, "mIoU is a number as soon as a mask holds a class"
    session.log(f"best {c.metric_to_save} {report.best[1][c.metric_to_save]} after {report.best[0]} iterations")
    dense.write_head(session.output / "model_final.pth", head_tensors(model), report.best[0])
    if not best or percentages(best[0]) != report.best[1]:  # the best head was found before this start
        best.clear()
        validate(model)
    scores = best[0]
    if distributed.is_main():
        _save_head(config, session, model, val, protocol, scores)
    return scores


def _linear_options(section: DecoderSection) -> dict[str, Any]:
    names = ("backbone_out_layers", "dropout", "use_batchnorm", "use_backbone_norm")
    return {name: getattr(section, name) for name in names}


def _save_head(
    config: SegmentationConfig,
    session: common.Session,
    model: nn.Module,
    data: DenseDataset,
    protocol: Protocol,
    scores: Any,
) -> None:
    """head.safetensors: the head in one small file that knows its backbone, for `dinov3 predict` and `load_from`."""
    from dinov3.features import default_preprocessing
    from dinov3.hub.own_heads import save_head

    d = config.decoder_head
    options = {"n_classes": d.num_classes} | _linear_options(d)
    names = data.class_names if data.class_names and len(data.class_names) == d.num_classes else None
    backbone = model.get_submodule("segmentation_model.0.feature_model")
    shape: Any = {"size": protocol.size, "shape": "short"} if protocol.size else {}
    transform = default_preprocessing(backbone, **shape)
    save_head(
        session.output / "head.safetensors", model, task="segmentation", head="linear", options=options, class_names=names,
        preprocessing=transform, metrics=percentages(scores), steps=config.scheduler.total_iter,
        data={"train": config.datasets.train, "val": config.datasets.val},
    )  # fmt: skip


# ---- the evaluation ------------------------------------------------------------------------------------------------


def opened(config: SegmentationConfig, session: common.Session) -> tuple[Any, str]:
    """(the model, kind of its head): of `load_from`, or the frozen backbone with a fresh linear head."""
    d = config.decoder_head

    def build(backbone: Any) -> LinearSegmentor:
        if d.type == "m2f":
            raise DinoError(
                f"load_from={config.load_from}: Meta's file of a Mask2Former head is loaded by "
                f"load_from=dinov3_vit7b16_ms head_weights={config.load_from}"
            )
        return build_linear_segmentor(backbone, num_classes=d.num_classes, **_linear_options(d))

    sizes = {"n_classes": d.num_classes, "hidden_dim": d.hidden_dim}
    model = dense.task_model("segment", config, session, build, "segmentation_model.1", **sizes)
    own = getattr(getattr(model, "head_info", None), "head", "")
    return model, "m2f" if config.load_from in HEADS or own == "mask2former" else "linear"


def evaluate(config: SegmentationConfig, session: common.Session) -> dict[str, Any]:
    """One row of the documented columns, in percent."""
    c = config
    val = dense.open_dense(c.datasets.val, c.datasets.root, ("classes",), "datasets.val")
    model, head = opened(c, session)
    own, size = getattr(model, "head_info", None), c.transforms.eval.img_size
    protocol = Protocol(
        n_classes=c.decoder_head.num_classes if own is None else own.n_classes,
        size=size if size is not None or c.load_from is None else c.eval.crop_size,
        mode=c.eval.mode,
        crop=c.eval.crop_size,
        stride=c.eval.stride,
        ratios=tuple(c.transforms.eval.tta_ratios) if c.eval.use_tta else (1.0,),
        flip=c.eval.use_tta,
        head=head,
        **dense.normalisation(c, model, 255),
    )
    if c.load_from is None:
        scores = fitted(c, session, protocol, model)
    if c.load_from is not None or c.save_results:
        zero = val.zero_is_other if c.eval.reduce_zero_label is None else c.eval.reduce_zero_label
        with dense.autocast(c.model_dtype, session.device):
            scores = evaluate_model(
                model, val, protocol, reduce_zero=zero, per_image=c.eval.compute_metric_per_image,
                device=session.device, log=session.log, shown=_writer(session.output) if c.save_results else None,
            )  # fmt: skip
    if session.run.writer:
        names = val.class_names or [str(i) for i in range(protocol.n_classes)]
        per_class = ("IoU", "acc", "precision", "dice")
        rows = [
            {"class": name} | {k: 100 * scores[f"{k}_per_class"][i] for k in per_class if i < protocol.n_classes}
            for i, name in enumerate(names[: protocol.n_classes])
        ]
        common.write_table(session.output / "per-class.csv", rows)
    return percentages(scores)


def _writer(folder: Path) -> Callable[[int, Tensor], None]:
    """`save_results`: predicted classes in predictions/<number of the image>.png, 8 bits (16 beyond 256 classes)."""
    from PIL import Image

    (folder / "predictions").mkdir(parents=True, exist_ok=True)

    def write(index: int, classes: Tensor) -> None:
        array = classes.numpy().astype(np.uint8 if int(classes.max()) < 256 else np.uint16)
        Image.fromarray(array).save(folder / "predictions" / f"{index:05}.png")

    return write


# ---- entry points --------------------------------------------------------------------------------------------------


def folder_overrides(
    train: str, val: str, given: Sequence[str], *, size: int = 512, classes: int | None = None
) -> list[str]:
    """What `dinov3 eval segmentation FOLDER` sets. classes: None takes the highest number in the masks."""
    from dinov3.data.datasets import make_dataset

    if classes is None:
        known = [make_dataset(spec) for spec in (train, val)]
        sets = [data for data in known if isinstance(data, DenseDataset)]
        classes = sets[0].n_classes or max(data.highest_class() for data in sets) + 1
        if classes < 1:
            raise DinoError(f"the masks of {train} hold no class that counts")
        if classes == 1:
            raise DinoError(ONE_CLASS)
    return [
        f"decoder_head.num_classes={classes}", "optimizer.lr=3e-3", f"transforms.eval.img_size={size}",
        f"eval.crop_size={size}", f"eval.stride={max(1, size * 2 // 3)}",
    ]  # fmt: skip


# ignore: a number that does not count, besides 255
FOLDER = dense.FolderForm("segmentation", "classes", "ignore", folder_overrides)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the script and of the command; the exit status."""
    return dense.main(
        NAME, SegmentationConfig, evaluate, argv, FOLDER, saved_as="segmentation_config.yaml", doc=__doc__
    )


if __name__ == "__main__":
    sys.exit(main())
