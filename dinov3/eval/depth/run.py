"""Depth on frozen features: fits and scores a head, or scores one that exists; canopy heights too (paper §6.1.2, §6.3.3).

    python dinov3/eval/depth/run.py model.dino_hub=dinov3_vitl16 config=config-nyu.yaml datasets.root=/data/nyu \\
        --output-dir=OUT
    python dinov3/eval/depth/run.py config=config-nyu-synthmix-dpt-inference.yaml datasets.root=/data/nyu \\
        load_from=dinov3_vit7b16_dd head_weights=HEAD.pth backbone_weights=7B.pth --output-dir=OUT
    python dinov3/eval/depth/run.py load_from=dinov3_vitl16_chmv2 datasets.test=DenseFolder:root=/data/plots --output-dir=OUT
    dinov3 eval depth FOLDER --model dinov3_vits16               your own images and depth maps; no configuration

Protocol: the prediction is resized to the ground truth; pixels count inside the region, where min_depth < truth < max_depth;
test images are predicted a second time mirrored and averaged (eval.use_tta; not for validation during the fit); where
requested, each image's prediction is first fitted to the truth by scale and shift; scores are means over images. Heights
(data of kind "height") are scored over all pixels: mae, rmse, bias, r2, block_r2. Results: results-depth.csv with
<Data set>_<score>, <Data set>/results.json with every image's scores, model_final.pth, head.safetensors.

Padding around an image is cut off the prediction before it is resized (the reference stretches it along: the same at
640×480, where there is none). decoder_head.type=dpt can be fitted here too.
"""

from __future__ import annotations

import enum
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from dinov3 import distributed
from dinov3.config.bounds import Problem, setting
from dinov3.data.datasets import make_dataset
from dinov3.data.datasets.dense import DenseDataset
from dinov3.data.transforms.dense import FIXED_CROPS, DepthTransform
from dinov3.errors import UnknownName, choices_sentence
from dinov3.eval import dense
from dinov3.eval import session as common
from dinov3.fit import head_tensors
from dinov3.heads.dpt import Depther, build_depther
from dinov3.heads.encoder import LAYER_SETS, resized
from dinov3.heads.objectives import DEPTH_LOSSES, DepthLoss
from dinov3.losses import LossTerms
from dinov3.metrics import DEPTH_SCORES, REGIONS, CanopySums, canopy_scores, depth_scores, mean_scores
from dinov3.runlog import silent, ticked

NAME = "depth"
HEIGHT_SCORES = ("mae", "rmse", "bias", "r2", "block_r2")


# ---- configuration -------------------------------------------------------------------------------------------------


class Adaptation(enum.Enum):
    CENTER_PADDING = "center_padding"
    STRETCH = "stretch"
    NO_ADAPTATION = "never"


@dataclass
class DatasetsSection(dense.DatasetsSection):
    test: str = ""  # "": val


@dataclass
class DecoderSection:
    min_depth: float = 0.001
    max_depth: float = 80.0
    bins_strategy: Literal["linear", "log", "chmv2_mixlog"] = "linear"
    norm_strategy: Literal["linear", "softmax", "sigmoid", "chmv2_mixlog"] = "linear"
    head_kwargs: dict[str, Any] = field(default_factory=dict)
    backbone_out_layers: str | list[int] = "FOUR_EVEN_INTERVALS"
    adapt_to_patch_size: Adaptation = Adaptation.CENTER_PADDING
    use_backbone_norm: bool = True
    type: Literal["linear", "dpt"] = "linear"
    n_output_channels: int = 256
    use_batchnorm: bool = False
    use_cls_token: bool = False


@dataclass
class TrainTransform:
    img_size: int | None = None  # short side, after the fixed crop
    random_crop: int | list[int] | None = None
    brightness_range: list[float] = field(default_factory=lambda: [0.9, 1.1])
    rotation_angle: float = 2.5
    fixed_crop: str = setting("FULL", choices=FIXED_CROPS)
    eval_mask: str = setting("FULL", choices=REGIONS)
    augment: bool = True  # ours; false: images as for evaluation, features computed once


@dataclass
class EvalTransform:
    img_size: int | None = None
    fixed_crop: str = setting("FULL", choices=FIXED_CROPS)
    eval_mask: str = setting("FULL", choices=REGIONS)


@dataclass
class TransformsSection:
    train: TrainTransform = field(default_factory=TrainTransform)
    eval: EvalTransform = field(default_factory=EvalTransform)
    mean: list[float] | None = None  # of values in [0, 1]; null: the weights' own (ImageNet's for the web models)
    std: list[float] | None = None
    normalization_constant: float | None = None  # integers per metre of depth files; null: the data set's (1000)


@dataclass
class EvalSection:
    """Which pixels count, and how predictions are made."""

    ignored_value: float = 0.0  # metres
    align_least_squares: bool = False
    min_depth: float = 0.001
    max_depth: float = 10.0
    use_tta: bool = True  # mirror images, at the test
    eval_interval: int = 1600


@dataclass
class ResultSection:
    save_results: bool = False  # visualizations/results_<i>: prediction and truth
    extension: Literal["JPG", "PNG", "PTH"] = "JPG"
    save_resolution: list[int] | None = None  # [height, width]
    overlay_alpha: float = 1.0  # below 1 the image shines through
    save_separate_files: bool = False


@dataclass
class DepthConfig(dense.DenseConfig):
    num_workers: int = 2
    seed: int = 321
    scheduler: dense.SchedulerSection = field(default_factory=lambda: dense.SchedulerSection(total_iter=38400))
    optimizer: dense.OptimizerSection = field(default_factory=lambda: dense.OptimizerSection(lr=1e-4))
    datasets: DatasetsSection = field(default_factory=DatasetsSection)
    decoder_head: DecoderSection = field(default_factory=DecoderSection)
    losses: dict[str, float] | None = setting(None, choices=DEPTH_LOSSES)  # and their weights; null: SIGLOSS alone
    transforms: TransformsSection = field(default_factory=TransformsSection)
    eval: EvalSection = field(default_factory=EvalSection)
    metrics: list[str] = setting(["rmse", "abs_rel", "a1"], choices=(*DEPTH_SCORES, *HEIGHT_SCORES))
    result_config: ResultSection = field(default_factory=ResultSection)

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        if self.save_results:
            yield "save_results", "belongs to classification; depth maps are saved by result_config.save_results=true"
        layers = self.decoder_head.backbone_out_layers
        if isinstance(layers, str) and layers not in LAYER_SETS:
            yield "decoder_head.backbone_out_layers", choices_sentence(layers, (*LAYER_SETS, "a list of blocks"))
        if not 0 < self.eval.min_depth < self.eval.max_depth:
            yield "eval.min_depth", f"must be above 0 and below eval.max_depth ({self.eval.max_depth})"


# ---- scoring -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def depth_map(model: Depther, x: Tensor, size_hw: tuple[int, int], *, flip: bool) -> Tensor:
    """Normalised image [3, h, w] → metres float32 [*size_hw]; with `flip` the mean with the mirror image's, turned back."""
    x = x[None]
    depth = model.in_image(x).float()
    if flip:
        depth = (depth + model.in_image(x.flip(-1)).float().flip(-1)) / 2
    return resized(depth, size_hw)[0, 0]


def evaluate_model(
    model: Depther,
    dataset: DenseDataset,
    transform: DepthTransform,
    protocol: EvalSection,
    *,
    device: torch.device | str = "cpu",
    shown: Callable[[int, Any, Tensor, Tensor], None] | None = None,
    log: Callable[[str], None] = silent,
) -> tuple[dict[str, float], list[dict[str, float]]]:
    """(mean scores, each image's scores in order), the same on all ranks. Heights have no scores of single images.

    shown(index, image, prediction, truth) is called for every image of this process.
    """
    rows: list[Any] = []
    for index in ticked(distributed.share(range(len(dataset))), log, "images"):
        image, truth = dataset[index]
        if dataset.kind == "height":
            x, _ = transform(image, np.zeros_like(truth))
            target = torch.from_numpy(truth)
        else:
            x, target = transform(image, truth)
        prediction = depth_map(model, x.to(device), (target.shape[0], target.shape[1]), flip=protocol.use_tta).cpu()
        if dataset.kind == "height":
            rows.append(CanopySums.of(prediction, target))
        else:
            lowest, highest, align = protocol.min_depth, protocol.max_depth, protocol.align_least_squares
            counts = target != protocol.ignored_value
            rows.append(depth_scores(prediction, target, lowest, highest, mask=counts, align=align))
        if shown is not None:
            shown(index, image, prediction, target)
    every = distributed.gather_shares(rows)
    if dataset.kind == "height":
        return canopy_scores(every), []
    return mean_scores(every), every


# ---- fitting -------------------------------------------------------------------------------------------------------


def depth_loss(model: nn.Module, batch: dict[str, Any], loss: DepthLoss) -> LossTerms:
    """Of a batch {"x", "target", "step"}; the depth is brought over exactly the image, without the padding around it."""
    assert isinstance(model, Depther)
    depth = model.encoder.to_image(model(batch["x"]), (batch["x"].shape[-2], batch["x"].shape[-1]))
    return loss(depth, batch["target"][:, None], step=batch["step"])


def fitted(config: DepthConfig, session: common.Session, model: Depther, transforms: dict[str, DepthTransform]) -> None:
    """Fits the head of `model`, in place; the last head counts, as in the reference."""
    c, t = config, config.transforms.train
    train, val = (opened(c, getattr(c.datasets, key), f"datasets.{key}") for key in ("train", "val"))
    session.log(f"datasets.train: {len(train)} images; datasets.val: {len(val)} images")
    weights = c.losses if c.losses is not None else {"SIGLOSS": 1.0}
    loss = DepthLoss(weights, min_depth=c.decoder_head.min_depth, max_depth=c.decoder_head.max_depth)
    unmirrored = replace(c.eval, use_tta=False)

    def validate(module: nn.Module) -> dict[str, float]:
        assert isinstance(module, Depther)
        with dense.autocast(c.model_dtype, session.device):
            return evaluate_model(module, val, transforms["eval"], unmirrored, device=session.device)[0]

    report = dense.fit_head(
        c, session, model, train, transforms["train" if t.augment else "eval"], lambda m, b: depth_loss(m, b, loss), validate,
        late=0, finish_with="last",
    )  # fmt: skip
    decoder = {k.removeprefix("decoder."): v for k, v in head_tensors(model).items()}
    dense.write_head(session.output / "model_final.pth", decoder, report.steps)


def _save_head(config: DepthConfig, session: common.Session, model: Depther, scores: Mapping[str, float]) -> None:
    """head.safetensors: the head in one small file that knows its backbone, for `dinov3 predict` and `load_from`."""
    from dinov3.features import default_preprocessing
    from dinov3.hub.own_heads import save_head

    t = config.transforms.eval
    backbone = model.get_submodule("encoder.backbone")
    shape: dict[str, Any] = (
        {"size": t.img_size, "shape": "short", "rounding": "down"} if t.img_size else {"shape": "native"}
    )
    save_head(
        session.output / "head.safetensors", model, task="depth", head=config.decoder_head.type, options=head_options(config),
        preprocessing=default_preprocessing(backbone, **shape), metrics=scores, steps=config.scheduler.total_iter,
        data={"train": config.datasets.train, "test": config.datasets.test or config.datasets.val},
    )  # fmt: skip


# ---- the evaluation ------------------------------------------------------------------------------------------------


def opened(config: DepthConfig, line: str, key: str) -> DenseDataset:
    kinds = ("depth", "height") if key == "datasets.test" else ("depth",)
    data = dense.open_dense(line, config.datasets.root, kinds, key)
    if config.transforms.normalization_constant is not None:
        data.unit = config.transforms.normalization_constant
    return data


def head_options(config: DepthConfig) -> dict[str, Any]:
    """`build_depther`'s options but the type of the head."""
    d = config.decoder_head
    options = {name: value for name, value in vars(d).items() if name not in ("type", "head_kwargs")}
    return options | {"adapt_to_patch_size": d.adapt_to_patch_size.value} | dict(d.head_kwargs)


def fresh(config: DepthConfig, backbone: Any) -> Depther:
    """The frozen backbone with a fresh head."""
    try:
        return build_depther(backbone, head_type=config.decoder_head.type, **head_options(config))
    except TypeError as error:
        odd = [k for k in config.decoder_head.head_kwargs if f"'{k}'" in str(error)]
        if not odd:
            raise
        raise UnknownName(
            f"decoder_head.head_kwargs: a {config.decoder_head.type} head has no option {odd[0]!r}"
        ) from None


def evaluate(config: DepthConfig, session: common.Session) -> dict[str, Any]:
    """One row of <Data set>_<score>."""
    c = config
    line = c.datasets.test or c.datasets.val
    test = opened(c, line, "datasets.test")
    model = dense.task_model("depth", c, session, partial(fresh, c), "decoder")
    mean, std = dense.normalisation(c, model, 1).values()
    t, e = c.transforms.train, c.transforms.eval
    transforms = {
        "train": DepthTransform(
            t.img_size, t.fixed_crop, t.eval_mask,
            dense.pair(t.random_crop, "transforms.train.random_crop") if t.random_crop is not None else None,
            t.rotation_angle, (t.brightness_range[0], t.brightness_range[1]), mean, std,
        ),
        "eval": DepthTransform(e.img_size, e.fixed_crop, e.eval_mask, mean=mean, std=std),
    }  # fmt: skip
    if c.load_from is None:
        fitted(c, session, model, transforms)
    s = c.result_config
    shown = Images(s, session.output / "visualizations", c.eval.max_depth) if s.save_results else None
    with dense.autocast(c.model_dtype, session.device):
        scores, rows = evaluate_model(
            model, test, transforms["eval"], c.eval, device=session.device, shown=shown, log=session.log
        )
    name = line.split(":")[0]
    if session.run.writer:
        if rows:
            folder = session.output / name
            folder.mkdir(exist_ok=True)
            lists = {k: [row[k] if row[k] == row[k] else None for row in rows] for k in rows[0]}
            (folder / "results.json").write_text(json.dumps(lists) + "\n")
        if c.load_from is None:
            _save_head(c, session, model, scores)
    names = HEIGHT_SCORES if test.kind == "height" else c.metrics
    return {f"{name}_{k}": scores[k] for k in names if k in scores}


class Images:
    """Writes prediction and truth of every image, side by side or as two files; .pth keeps the metres."""

    def __init__(self, section: ResultSection, folder: Path, max_depth: float) -> None:
        from dinov3.errors import require

        self.section, self.folder, self.max_depth = section, folder, max_depth
        folder.mkdir(parents=True, exist_ok=True)
        if section.extension != "PTH":
            self.colours = require("matplotlib", "plots", "images of depth").colormaps["plasma"]

    def __call__(self, index: int, image: Any, prediction: Tensor, truth: Tensor) -> None:
        s = self.section
        maps = {"prediction": prediction, "truth": truth}
        if s.save_resolution is not None:
            hw = dense.pair(s.save_resolution, "result_config.save_resolution")
            maps = {k: resized(v[None, None].float(), hw)[0, 0] for k, v in maps.items()}
        stem = self.folder / f"results_{index}"
        if s.extension == "PTH":
            if s.save_separate_files:
                for what, values in maps.items():
                    torch.save(values, f"{stem}_{what}.pth")
            else:
                torch.save(maps, f"{stem}.pth")
            return
        from PIL import Image

        known = truth[torch.isfinite(truth) & (truth > 0)]
        highest = float(known.max()) if known.numel() else self.max_depth
        drawn = {k: self._drawn(v, highest, image) for k, v in maps.items()}
        parts = drawn if s.save_separate_files else {"": np.concatenate(list(drawn.values()), axis=1)}
        for what, pixels in parts.items():
            Image.fromarray(pixels).save(f"{stem}{'_' + what if what else ''}.{s.extension.lower()}")

    def _drawn(self, metres: Tensor, highest: float, image: Any) -> np.ndarray:
        values = np.nan_to_num(metres.numpy() / highest).clip(0, 1)
        pixels = self.colours(values)[..., :3] * 255
        alpha = self.section.overlay_alpha
        if alpha < 1:
            under = np.asarray(image.resize((metres.shape[1], metres.shape[0])), np.float32)
            pixels = alpha * pixels + (1 - alpha) * under
        return pixels.round().astype(np.uint8)


# ---- entry points --------------------------------------------------------------------------------------------------


def folder_overrides(
    train: str, val: str, given: Sequence[str], *, size: int | None = None, max_depth: int = 10
) -> list[str]:
    """What `dinov3 eval depth FOLDER` sets. size: short side (default: the images' own); max_depth: metres.

    A DPT among the `given` overrides keeps the configuration's four layers and learning rate.
    """
    linear = ["decoder_head.use_batchnorm=true", "decoder_head.backbone_out_layers=LAST", "optimizer.lr=1e-2"]
    make_dataset(val)
    return [
        *([] if "decoder_head.type=dpt" in given else linear),
        f"decoder_head.max_depth={max_depth}", f"eval.max_depth={max_depth}",
        *([f"transforms.eval.img_size={size}"] if size else []),
    ]  # fmt: skip


FOLDER = dense.FolderForm("depth", "depth", "unit", folder_overrides)  # unit: integers per metre of depth files


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the script and of the command; the exit status."""
    return dense.main(NAME, DepthConfig, evaluate, argv, FOLDER, saved_as="depth_config.yaml", doc=__doc__)


if __name__ == "__main__":
    sys.exit(main())
