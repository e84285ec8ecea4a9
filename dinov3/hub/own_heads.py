"""Heads of your own: built over any backbone by task and kind, saved in one small file, loaded with their backbone.

    model = build_head("segmentation", "linear", backbone, n_classes=11)
    save_head("street.safetensors", model, task="segmentation", head="linear", options={"n_classes": 11}, class_names=[…])
    model = load_head("street.safetensors")          # with the backbone it was trained on, or another that you name

A head file is safetensors: the head's parameters and buffers under the task model's names, without the backbone, and in
the metadata one JSON under "dinov3_head" (`HeadInfo`). A head means nothing on another backbone, so the file names its own
by a fingerprint of the weights and `load_head` compares. Meta's published heads are other files: see `hub.published_heads`.

Sizes that are not given follow the backbone (`sizes_for`): the published ones belong to a backbone of 6.7 billion numbers.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

import dinov3
from dinov3.data.transforms.inputs import Preprocessing
from dinov3.drawing import palette
from dinov3.errors import DinoError, UnknownName, WeightsError, WeightsMismatch, one_of, without_secrets
from dinov3.features import default_preprocessing
from dinov3.files import nonexistent
from dinov3.fit import backbones_in, freeze, head_tensors, load_head_tensors
from dinov3.heads.detr import build_detector
from dinov3.heads.dpt import build_depther
from dinov3.heads.encoder import FrozenLayers, dtype_of
from dinov3.heads.linear import build_linear_classifier, build_linear_segmentor
from dinov3.heads.mask2former import build_segmentor, default_width
from dinov3.hub import HEADS, foreign, head, load
from dinov3.hub.published_heads import placed
from dinov3.models.base import Backbone
from dinov3.models.convnext import ConvNeXt
from dinov3.weights import identity, reading, writing
from dinov3.weights.catalog import DOWNLOAD_PAGE, FILES
from dinov3.weights.filling import difference
from dinov3.weights.reading import read

KINDS: dict[str, tuple[str, ...]] = {
    "classification": ("linear",),
    "segmentation": ("linear", "mask2former"),
    "depth": ("linear", "dpt"),
    "detection": ("detr",),
}
METADATA = reading.OWN_HEAD
HEAD, TUNED = "head.safetensors", "backbone.safetensors"  # in the folder of a run; the second where it was tuned
FORMAT = 1
MOST_CLASSES = 1_000_000

# ---- building ------------------------------------------------------------------------------------------------------


def check_kind(task: str, head: str) -> None:
    """Raises on an unknown task or kind of head, or a kind for another task, with suggestions."""
    kinds = KINDS[one_of("the task", task, KINDS)]
    others = [other for other in KINDS if head in KINDS[other]]
    if others and task not in others:
        raise UnknownName(f"{head} is a head for {' and '.join(others)}; {task} has {' and '.join(kinds)}")
    one_of(f"the head for {task}", head, kinds)


def sizes_for(task: str, head: str, backbone: Backbone) -> dict[str, Any]:
    """Options of a head that suit the backbone's width D, where the user names none. DPT's are those of Depth Anything."""
    D = backbone.embed_dim
    small, middle = D <= 384, D <= 768
    if (task, head) == ("depth", "linear"):
        return {"use_batchnorm": True, "max_depth": 10.0}
    if (task, head) == ("depth", "dpt"):
        channels = 64 if small else 128 if middle else 256
        widths = (48, 96, 192, 384) if small else (96, 192, 384, 768) if middle else (256, 512, 1024, 1024)
        return {"channels": channels, "post_process_channels": widths, "use_batchnorm": True, "max_depth": 10.0}
    if (task, head) == ("segmentation", "mask2former"):
        width = default_width(backbone)
        return {"hidden_dim": width, "ffn": max(2 * width, 1024)}
    if (task, head) == ("detection", "detr"):
        if not middle:
            return {}
        sizes: dict[str, Any] = {"width": 256, "encoder_ffn": 1024, "decoder_ffn": 1024, "bias_hidden": 128}
        sizes |= {"n_queries": 300, "n_queries_one2many": 300, "topk": 300}
        return sizes | ({"encoder_layers": 3, "decoder_layers": 3} if small else {})
    return {}


def build_head(task: str, head: str, backbone: nn.Module, *, n_classes: int | None = None, **options: Any) -> nn.Module:
    """A task model over `backbone` with a fresh head; only the head wants gradients.

    task and head: a row of `KINDS`. n_classes: for everything but depth. `options` go to the builder: `build_depther`,
    `build_linear_segmentor`, `build_segmentor` (Mask2Former), `build_detector`; what is not given follows `sizes_for`.
    """
    check_kind(task, head)
    if task == "depth":
        if n_classes is not None:
            raise DinoError("a depth head has no classes; its range is min_depth and max_depth")
    elif n_classes is None or n_classes < 1:
        raise DinoError(f"a head for {task} needs n_classes, the number of classes (at least 1), not {n_classes}")
    try:
        under: Any = backbone
        return freeze(_built(task, head, under, n_classes or 0, sizes_for(task, head, under) | options))
    except TypeError as error:
        raise _no_option(error, task, head) from None


def _built(task: str, head: str, backbone: Any, n_classes: int, options: dict[str, Any]) -> nn.Module:
    if task == "depth":
        return build_depther(backbone, head_type=head, **options)
    if task == "classification":
        return build_linear_classifier(backbone, n_classes, **options)
    if task == "detection":
        return build_detector(backbone, n_classes, **options)
    if head == "linear":
        return build_linear_segmentor(backbone, num_classes=n_classes, **options)
    return build_segmentor(backbone, n_classes, **options)


def _no_option(error: TypeError, task: str, head: str) -> Exception:
    """The builder's complaint about a keyword, as ours; any other TypeError is a mistake of our own and stays one."""
    text = str(error)
    if "unexpected keyword argument" not in text:
        return error
    return UnknownName(f"a {head} head for {task} has no option {text.split()[-1]}")


# ---- metadata of a file --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HeadInfo:
    """Metadata of a head file; `model.head_info` of a loaded one."""

    task: str
    head: str
    options: dict[str, Any]  # of `build_head`, all that were in force
    n_classes: int | None
    class_names: tuple[str, ...]
    colours: tuple[tuple[int, int, int], ...]  # RGB of each class, 0 to 255
    layers: tuple[int, ...]  # of the backbone, 0-based
    backbone: str  # the catalogue's id, or "custom"
    backbone_source: str  # what was opened: a file's name without its folder, a URL, an id, "random (seed 0)"
    backbone_dtype: str
    backbone_options: dict[str, Any]  # of its constructor that leave the weights alone (a ConvNeXt's patch_size)
    fingerprint: str  # of the backbone's weights, `identity.fingerprint`
    preprocessing: Preprocessing
    metrics: dict[str, float] = field(default_factory=dict)
    dtype: str = "float32"
    steps: int | None = None
    data: dict[str, Any] = field(default_factory=dict)  # what it was trained on
    version: str = ""  # of this package
    format: int = FORMAT
    tuned: str = ""  # how the backbone was trained with the head ("lora:8"); it then lies beside the head as `TUNED`

    @property
    def backbone_label(self) -> str:
        how = f" tuned with it ({self.tuned})," if self.tuned else ""
        return f"{self.backbone}{how} from {self.backbone_source} (fingerprint {self.fingerprint})"

    def to_json(self) -> str:
        values = asdict(self) | {"preprocessing": asdict(self.preprocessing)}
        return json.dumps({k: v for k, v in values.items() if k != "tuned" or v})

    @classmethod
    def from_json(cls, text: str) -> HeadInfo:
        try:
            return cls._of(json.loads(text))
        except DinoError:
            raise
        except reading.NONSENSE as error:
            raise WeightsError(f"the head's metadata makes no sense ({reading.first_line(error)})") from None

    @classmethod
    def _of(cls, values: dict[str, Any]) -> HeadInfo:
        known = {f.name for f in fields(cls)}
        if int(values.get("format", 0)) > FORMAT or set(values) - known:
            raise WeightsError("the head file was written by a newer version of this package; update it")
        values["preprocessing"] = Preprocessing.from_json(json.dumps(values["preprocessing"]))
        values["class_names"], values["layers"] = tuple(values["class_names"]), tuple(values["layers"])
        values["colours"] = tuple((int(r), int(g), int(b)) for r, g, b in values["colours"])
        info = cls(**values)
        info.check()
        return info

    def check(self) -> None:
        """Raises `DinoError` for what no head has, before anything of that size is built."""
        check_kind(self.task, self.head)
        for dtype in (self.dtype, self.backbone_dtype):
            one_of("the dtype in a head's metadata", dtype, ("float32", "bfloat16", "float16"))
        n = len(self.class_names)
        if self.task != "depth" and (self.n_classes != n or not 1 <= n <= MOST_CLASSES):
            raise WeightsError(f"the head's metadata states {self.n_classes!r:.20} classes and {n} names")
        texts = (*self.class_names, self.backbone, self.backbone_source, self.fingerprint, self.tuned)
        if not all(isinstance(text, str) for text in texts) or not isinstance(self.backbone_options, dict):
            raise WeightsError("the head's metadata makes no sense (a name is not text)")
        for key, value in self.options.items():
            if isinstance(value, dict):
                raise WeightsError(f"the head's metadata states no value for {key}")
            for number in value if isinstance(value, list) else [value]:
                most = reading.MOST_LAYERS if "layers" in key else reading.MOST_WIDTH
                if isinstance(number, (int, float)) and not abs(number) <= most:
                    raise WeightsError(f"the head's metadata states {key} = {number!r:.20}, which no head has")


def the_backbone(module: nn.Module) -> Any:
    """The one backbone inside a task model."""
    found = list(backbones_in(module).values())
    assert len(found) == 1, f"{len(found)} backbones"
    return found[0]


# ---- files ---------------------------------------------------------------------------------------------------------


def save_head(
    path: str | os.PathLike[str],
    module: nn.Module,
    *,
    task: str,
    head: str,
    options: Mapping[str, Any] | None = None,
    class_names: Sequence[str] | None = None,
    colours: Sequence[tuple[int, int, int]] | None = None,
    preprocessing: Preprocessing | None = None,
    metrics: Mapping[str, float] | None = None,
    steps: int | None = None,
    data: Mapping[str, Any] | None = None,
    tuned: str = "",
) -> Path:
    """Writes the head of a task model; appears whole or not at all. Returns its path.

    options: what `build_head` was given, `n_classes` included; sizes that followed the backbone are added. class_names:
    one per class, default "class 0" …; colours: default `drawing.palette`.
    preprocessing: how images became the model's input. tuned: how the backbone was trained, which is then written beside.
    """
    check_kind(task, head)
    backbone = the_backbone(module)
    origin = getattr(backbone, "origin", None)
    given = dict(options or {})
    n_classes = given.pop("n_classes", len(class_names) if class_names is not None else None)
    names = tuple(class_names) if class_names is not None else tuple(f"class {i}" for i in range(n_classes or 0))
    if task != "depth" and len(names) != n_classes:
        raise DinoError(f"the head has {n_classes} classes and was given {len(names)} names")
    source = without_folder(str(origin.source)) if origin is not None else "unknown"
    info = HeadInfo(
        task=task,
        head=head,
        options=_plain(sizes_for(task, head, backbone) | given),
        n_classes=n_classes,
        class_names=names,
        colours=tuple(colours) if colours is not None else palette(len(names)),
        layers=tuple(next((m.layers for m in module.modules() if isinstance(m, FrozenLayers)), ())),
        backbone=origin.name if origin is not None else "custom",
        backbone_source=without_secrets(source),
        backbone_dtype=str(dtype_of(backbone)).removeprefix("torch."),
        backbone_options={"patch_size": backbone.patch_size} if _resizes(backbone) else {},
        fingerprint=identity.fingerprint(backbone),
        preprocessing=preprocessing if preprocessing is not None else default_preprocessing(backbone),
        metrics={k: float(v) for k, v in (metrics or {}).items() if math.isfinite(v)},
        dtype=str(next(t.dtype for t in head_tensors(module).values() if t.is_floating_point())).removeprefix("torch."),
        steps=steps,
        data=_plain(data or {}),
        version=dinov3.__version__,
        tuned=tuned,
    )
    # one key: safetensors writes several in an order of chance, and equal heads should be equal files
    writing.write_safetensors(head_tensors(module), Path(path), {METADATA: info.to_json()})
    return Path(path)


def _resizes(backbone: Any) -> bool:
    return isinstance(backbone, ConvNeXt) and backbone.patch_size is not None


def without_folder(source: str) -> str:
    """A source as others may read it: a file's name without where it lies here, other sources as they are."""
    if foreign.is_spec(source):  # KIND:WHAT,options
        kind, _, rest = source.partition(":")
        what, *options = rest.split(",")
        return f"{kind}:{','.join([Path(what).name if Path(what).exists() else what, *options])}"
    return Path(source).name if "://" not in source and Path(source).expanduser().exists() else source


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(dict(values), default=str))


def read_head_info(path: str | os.PathLike[str]) -> HeadInfo:
    """The metadata of a head file (or that of a run's folder), without its tensors."""
    return _opened(path)[1]


def head_file(path: str | os.PathLike[str]) -> Path:
    """The head file itself, or that of a run's folder."""
    inside = Path(path) / HEAD
    return inside if inside.is_file() else Path(path)


def _opened(path: str | os.PathLike[str]) -> tuple[dict[str, Any], HeadInfo]:
    path = head_file(path)
    if not path.is_file():
        raise WeightsError(f"there is no head file: {nonexistent(path)}")
    tensors, metadata = reading.read(path)
    if METADATA not in metadata:
        raise WeightsError(
            f"{path} is no head file of ours: it lacks our metadata. Published heads are loaded by their functions in "
            "hubconf.py, backbones by dinov3.load"
        )
    try:
        return tensors, HeadInfo.from_json(metadata[METADATA])
    except DinoError as error:
        raise type(error)(f"{path}: {error}") from None


def load_head(
    path: str | os.PathLike[str],
    *,
    backbone: nn.Module | None = None,
    backbone_weights: str | os.PathLike[str] | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """The task model of a head file or a run's folder, in evaluation mode, with `.head_info` and `.origin` (the backbone's).

    The backbone is the one given, or that of `backbone_weights` (path, URL, id), or what the file names, or one that was
    tuned with the head and lies beside it. It must be the one
    that the head was trained on: weights are compared. dtype: of head and backbone; default float32 for the head, and
    for the backbone what it was trained over.

    Raises `WeightsError`: no head file, or a backbone that cannot be found; `WeightsMismatch`: another backbone.
    """
    tensors, info = _opened(path)
    under = backbone if backbone is not None else _its_backbone(path, info, backbone_weights)
    found = identity.fingerprint(under)
    if found != info.fingerprint:
        origin = getattr(under, "origin", None)
        raise WeightsMismatch(
            f"{path} was trained on {info.backbone_label}, and this backbone is {origin or type(under).__name__} "
            f"(fingerprint {found}): pass the weights it was trained on, or train the head again on these"
        )
    try:
        reading.check_finite(tensors)
        with torch.device("meta"):  # nothing is allocated before the file is known to fit
            sketch = build_head(info.task, info.head, under, n_classes=info.n_classes, **info.options)
        if lines := difference(head_tensors(sketch), tensors):
            raise WeightsMismatch("\n".join([f"{path} does not fit the {info.head} head that it names", *lines]))
        model: Any = build_head(info.task, info.head, under, n_classes=info.n_classes, **info.options)
    except WeightsMismatch:
        raise
    except DinoError as error:
        raise type(error)(f"{path}: {error}") from None
    except reading.NONSENSE as error:
        raise WeightsError(
            f"{path}: its metadata describes no {info.head} head ({reading.first_line(error)})"
        ) from error
    load_head_tensors(model, tensors)  # in float32, whatever the file holds
    placed(model, device, dtype)
    model.head_info, model.origin = info, getattr(under, "origin", None)
    if hasattr(model, "class_names"):
        model.class_names = info.class_names
    return model.eval()


def _its_backbone(path: str | os.PathLike[str], info: HeadInfo, weights: str | os.PathLike[str] | None) -> nn.Module:
    from dinov3 import hub

    dtype = getattr(torch, info.backbone_dtype)
    name = info.backbone if info.backbone != "custom" else None
    if weights is None and info.tuned:
        weights = head_file(path).parent / TUNED
        if not weights.is_file():
            raise WeightsError(
                f"{path} was trained on {info.backbone_label}, and no {TUNED} lies beside it; pass it as backbone_weights"
            )
    if weights is not None:
        line = os.fspath(weights)
        return (
            hub.load(line, dtype=dtype)
            if foreign.is_spec(line)
            else hub.load(None, weights, dtype=dtype, **info.backbone_options)
        )
    if name is not None and (seeded := re.fullmatch(r"random \(seed (\d{1,18})\)", info.backbone_source)):
        seed = int(seeded[1])
        return hub.load(name, "random", seed=seed, dtype=dtype, **info.backbone_options)
    if name is None or foreign.is_spec(info.backbone_source):
        raise WeightsError(f"{path} was trained on {info.backbone_label}; pass that file as backbone_weights")
    try:
        return hub.load(name, dtype=dtype, **info.backbone_options)
    except DinoError as error:
        raise WeightsError(
            f"{path} was trained on {info.backbone_label}, which could not be had ({error}); pass it as backbone_weights"
        ) from None


# ---- the opener ------------------------------------------------------------------------------------------------------
# `open_task_model`: backbone and head by what people name: a published head, a head file of their own, or an untrained head.
# Tasks are those of the commands: classify, segment, depth, canopy, detect.


# task → (published head, its name in own head files, kind and options of an untrained head)
TASKS: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "classify": ("dinov3_vit7b16_lc", "classification", "linear", {"n_classes": 1000}),
    "segment": ("dinov3_vit7b16_ms", "segmentation", "linear", {"n_classes": 150}),
    "depth": ("dinov3_vit7b16_dd", "depth", "dpt", {}),
    "canopy": ("dinov3_vitl16_chmv2", "depth", "dpt", {"max_depth": 96.0}),
    "detect": ("dinov3_vit7b16_de", "detection", "detr", {"n_classes": 91}),
}
# Heads of our own on the small model, files of the package: what a command uses where no weights are named.
SHIPPED = {"classify": "dinov3_vitt16_classify.safetensors", "segment": "dinov3_vitt16_segment.safetensors"}
AUTOCAST = ("segment", "depth", "canopy")  # whose published functions take autocast_dtype


def open_task_model(
    task: str,
    source: str | None = None,
    *,
    weights: str | os.PathLike[str] | None = None,
    backbone_weights: str | os.PathLike[str] | None = None,
    backbone: nn.Module | None = None,
    device: Any = "cpu",
    dtype: torch.dtype | None = None,
    **options: Any,
) -> Any:
    """The model of a published head's name (None: the one of the task) or of an own head file, in evaluation mode.

    weights: the published head's file, "random" without backbone_weights for an untrained model. backbone: what an own
    head stands on, instead of backbone_weights and of what its file names. options: of the published function. Raises
    `DinoError` for a head of another task, and what the openers raise.
    """
    if (
        source is not None
        and source not in HEADS
        and (os.path.exists(source) or Path(source).name != Path(source).stem)
    ):
        info = read_head_info(source)
        _same_task(source, info.task, TASKS[task][1])
        model = load_head(source, backbone=backbone, backbone_weights=backbone_weights)
        return placed(model, device, dtype)
    row = head(source or TASKS[task][0])
    _same_task(row.name, row.task, task)
    files = {"weights": weights, "backbone_weights": backbone_weights}
    given: dict[str, Any] = {name: file for name, file in files.items() if file is not None}
    if weights == "random" and backbone_weights is None:
        given = {"pretrained": False}
    return row.function(**given, device=device, dtype=dtype, **options).eval()


def shipped_head(task: str) -> Path:
    """The head file that the package has for a task. Raises `WeightsError` that says what to get where it has none."""
    if task in SHIPPED:
        return FILES / SHIPPED[task]
    published = "dino.txt" if task == "zero-shot" else TASKS[task][0]
    own = "" if task == "zero-shot" else f"; or a head of your own: --head FILE (`dinov3 train-head {TASKS[task][1]}`)"
    raise WeightsError(
        f"{task} needs weights that do not ship: Meta's {published}, free to request at {DOWNLOAD_PAGE}, as "
        f"--weights HEAD --backbone-weights BACKBONE{own}.\nTo see the form of the output without them: --weights random"
    )


def untrained_model(
    task: str, backbone_weights: Any = None, *, device: Any = "cpu", dtype: Any = None, **options: Any
) -> nn.Module:
    """An untrained head of the task over a backbone (None: the small model that ships), to try a command."""
    _, own, kind, default = TASKS[task]
    under: Any = load(None, backbone_weights)
    return placed(build_head(own, kind, under, **default | options).eval(), device, dtype)


def is_head_file(path: str) -> bool:
    """Whether it is a head file of ours, or a run's folder with one; it knows its backbone and its options."""
    file = head_file(path)
    return file.is_file() and METADATA in read(file)[1]


def verb_of(task: str) -> str:
    """The command for a task, by either of its names."""
    return "zero-shot" if task == "text" else next((v for v, row in TASKS.items() if task in (v, row[1])), task)


def _same_task(source: str, found: str, wanted: str) -> None:
    depths = {"depth", "canopy"}
    if found != wanted and not {found, wanted} <= depths:
        raise DinoError(f"{source} is a head for {found}, not for {wanted}: use `dinov3 {verb_of(found)}`")
