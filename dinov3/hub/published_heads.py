"""The published heads as `torch.hub` sees them: classifier (lc), depth (dd), canopy height (chmv2), detector (de), segmentor
(ms), dino.txt.

    segmentor = torch.hub.load(REPO, "dinov3_vit7b16_ms", source="local",
                               weights="head.pth", backbone_weights="vit7b16.pth")

A head's file holds the head alone (flat, or under one wrapping such as `model.`); the backbone comes from a file of its
own. All functions share their arguments. `weights`: the head, `backbone_weights`: the backbone; each a path, URL or enum
member, or "random". `check_hash` compares a file with the hash in its name, where there is one; `hash`: another ending of
the published head's name. `options`: `device`, `dtype` and constructor arguments of the backbone.

Differences from the reference: models come in evaluation mode, and the backbone is frozen except under the classifier;
nothing moves to a GPU by itself; autocast is for accelerators, and on the CPU nothing is computed in bfloat16 unless
requested; `check_hash` reaches both files; a head that lacks an entry, or a file with one too many, is an error (a warning
for the detector, whose exact file nobody but Meta has seen); "random" draws fresh weights.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from dinov3.data import names
from dinov3.data.tokenizer import Tokenizer
from dinov3.errors import DinoError, UnknownName, WeightsError, WeightsMismatch, without_secrets
from dinov3.heads.detr import DetrConfig, build_detector
from dinov3.heads.dinotxt import DinoTxt, DinoTxtConfig, TextConfig, build
from dinov3.heads.dpt import CHMV2, SYNTHMIX, build_depther
from dinov3.heads.linear import build_linear_classifier
from dinov3.heads.mask2former import build_segmentor
from dinov3.hub import Head, Origin, head
from dinov3.hub.backbones import Weights, _make, dinov3_vitl16
from dinov3.models.vit import VisionTransformer
from dinov3.weights import catalog
from dinov3.weights import download as cache
from dinov3.weights.filling import fill, some
from dinov3.weights.reading import MOST_LAYERS, MOST_WIDTH, NONSENSE, check_finite, first_line, locate, read_all

# The data sets that published heads were trained on.
ClassifierWeights = Enum("ClassifierWeights", {"IMAGENET1K": "IMAGENET1K"})
DepthWeights = Enum("DepthWeights", {"SYNTHMIX": "SYNTHMIX", "CHMV2": "CHMV2"})
DetectionWeights = Enum("DetectionWeights", {"COCO2017": "COCO2017"})
SegmentorWeights = Enum("SegmentorWeights", {"ADE20K": "ADE20K"})

Source = Enum | str | os.PathLike[str]
WRAPPINGS = ("model.", "module.")
N_CLASSES = 1000  # of the classifier


# ---- the functions --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Files:
    """The arguments that all functions share."""

    pretrained: bool = True
    weights: Source = "random"
    backbone_weights: Source = Weights.LVD1689M
    check_hash: bool = False
    hash: str | None = None


def dinov3_vit7b16_lc(
    *,
    pretrained: bool = True,
    weights: Source = ClassifierWeights.IMAGENET1K,
    backbone_weights: Source = Weights.LVD1689M,
    check_hash: bool = False,
    hash: str | None = None,
    **options: Any,
) -> Any:
    """ViT-7B/16 with a linear layer over [CLS ; mean patch]: normalised images [B, 3, H, W] → logits [B, 1000]."""
    files = Files(pretrained, weights, backbone_weights, check_hash, hash)
    return load_published("dinov3_vit7b16_lc", files, {}, **options)


def dinov3_vit7b16_dd(
    *,
    pretrained: bool = True,
    weights: Source = DepthWeights.SYNTHMIX,
    backbone_weights: Source = Weights.LVD1689M,
    check_hash: bool = False,
    autocast_dtype: torch.dtype = torch.float32,
    hash: str | None = None,
    **options: Any,
) -> Any:
    """ViT-7B/16 with the SYNTHMIX depth head: normalised images [B, 3, H, W] → metres [B, 1, H', W'], 0.001 to 100, over the
    image padded to multiples of 16."""
    files = Files(pretrained, weights, backbone_weights, check_hash, hash)
    return load_published("dinov3_vit7b16_dd", files, {"autocast_dtype": autocast_dtype}, **options)


def dinov3_vitl16_chmv2(
    pretrained: bool = True,
    weights: Source = DepthWeights.CHMV2,
    backbone_weights: Source = Weights.SAT493M,
    check_hash: bool = False,
    autocast_dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Any:
    """Satellite ViT-L/16 with the CHMv2 head: aerial images [B, 3, H, W] → canopy height in metres [B, 1, H', W'].

    Images in [0, 1] are normalised with mean (0.420, 0.411, 0.296) and std (0.213, 0.156, 0.143) (`model.origin`). `weights`
    may be transformers' folder or id, which holds the backbone too: then `backbone_weights` may be left out.
    """
    files = Files(pretrained, weights, backbone_weights, check_hash)
    return load_published("dinov3_vitl16_chmv2", files, {"autocast_dtype": autocast_dtype}, **options)


def dinov3_vit7b16_de(
    *,
    pretrained: bool = True,
    weights: Source = DetectionWeights.COCO2017,
    backbone_weights: Source = Weights.LVD1689M,
    check_hash: bool = False,
    hash: str | None = None,
    **options: Any,
) -> Any:
    """ViT-7B/16 with the COCO detector: a list of normalised images [3, H_i, W_i] → 1500 boxes in each
    (scores [1500], labels [1500], boxes [1500, 4]); `.detect([image], score_threshold=0.5)`: fewer, with names."""
    files = Files(pretrained, weights, backbone_weights, check_hash, hash)
    return load_published("dinov3_vit7b16_de", files, {}, **options)


def dinov3_vit7b16_ms(
    *,
    pretrained: bool = True,
    weights: Source = SegmentorWeights.ADE20K,
    backbone_weights: Source = Weights.LVD1689M,
    check_hash: bool = False,
    autocast_dtype: torch.dtype = torch.bfloat16,
    hidden_dim: int = 2048,
    hash: str | None = None,
    **options: Any,
) -> Any:
    """ViT-7B/16 with adapter and Mask2Former head: normalised images [B, 3, H, W] → `pred_logits` [B, 100, 151] and
    `pred_masks` [B, 100, H/4, W/4]; class maps come from `make_inference(…, decoder_head_type="m2f")`. `n_classes`: 150."""
    files = Files(pretrained, weights, backbone_weights, check_hash, hash)
    return load_published(
        "dinov3_vit7b16_ms",
        files,
        {"n_classes": options.pop("n_classes", 150), "autocast_dtype": autocast_dtype, "hidden_dim": hidden_dim},
        **options,
    )


# ---- how each kind is built -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """A task's head: how the model is built over a backbone, and how its file becomes the state of `part(model)`."""

    what: str
    build: Callable[..., nn.Module]  # (backbone, **options)
    part: Callable[[Any], Any] = lambda model: model
    keys: Callable[[dict[str, Tensor], nn.Module, str], dict[str, Tensor]] = lambda state, part, source: state
    backbone: str | None = None  # the prefix of the backbone's entries within the part
    leftover: bool = False  # whether a file may hold more


def _depther(backbone: Any, autocast_dtype: Any = None, depth_range: Any = None, **options: Any) -> nn.Module:
    if depth_range is not None:
        options["min_depth"], options["max_depth"] = depth_range
    return build_depther(
        backbone, autocast_dtype=None if autocast_dtype is torch.float32 else autocast_dtype, **options
    )


def _detector(backbone: Any, **options: Any) -> nn.Module:
    return build_detector(backbone, class_names=names.coco() if options["n_classes"] == 91 else None, **options)


def _without(*prefixes: str) -> Callable[[dict[str, Tensor], nn.Module, str], dict[str, Tensor]]:
    """Keys without a prefix that all of them share."""

    def stripped(state: dict[str, Tensor], part: nn.Module, source: str) -> dict[str, Tensor]:
        for prefix in prefixes:
            if state and all(key.startswith(prefix) for key in state):
                state = {key.removeprefix(prefix): value for key, value in state.items()}
        return state

    return stripped


def _detector_keys(state: dict[str, Tensor], part: nn.Module, source: str) -> dict[str, Tensor]:
    """Every entry under both of its names: the decoder's own copies of the heads are the heads."""
    state = {key.removeprefix("detector."): value for key, value in state.items()}
    for name in ("class_embed", "bbox_embed"):
        copy = f"transformer.decoder.{name}."
        for key in part.state_dict():
            if key.startswith(copy):
                other = f"{name}." + key.removeprefix(copy)
                for there, lacking in ((key, other), (other, key)):
                    if there in state:
                        state.setdefault(lacking, state[there])
    return state


def _segmentor_keys(state: dict[str, Tensor], part: nn.Module, source: str) -> dict[str, Tensor]:
    """Unchanged; the three sizes that people mix up are errors with one sentence each."""

    def size(tensors: Mapping[str, Tensor], key: str, dim: int) -> int | None:
        value = tensors.get(f"segmentation_model.{key}")
        return value.shape[dim] if value is not None and value.ndim > dim else None

    expected = part.state_dict()
    for key, dim, sentence in (
        ("0.level_embed", 1, "was trained on a backbone of width {0}, this one has {1}: load the one it belongs to"),
        ("1.predictor.query_feat.weight", 1, "is {0} wide, not {1}: pass hidden_dim={0}"),
        ("1.predictor.class_embed.bias", 0, "tells {0} classes apart, not {1}: pass n_classes={0}"),
    ):
        found, wanted = size(state, key, dim), size(expected, key, dim)
        if found is not None and wanted is not None and found != wanted:
            no_class = int("class_embed" in key)  # the last is "no class"
            raise WeightsMismatch(
                f"the head in {without_secrets(source)} {sentence.format(found - no_class, wanted - no_class)}"
            )
    return state


KINDS: dict[str, Kind] = {
    "classify": Kind(
        "the linear ImageNet-1k classifier",
        lambda backbone: build_linear_classifier(backbone, N_CLASSES),
        lambda m: m.linear_head,
        _without("linear_head."),
    ),
    "depth": Kind("the SYNTHMIX depth head", _depther, lambda m: m.decoder, _without("decoder.")),
    "canopy": Kind("the canopy height head (CHMv2)", _depther, lambda m: m.decoder, _without("decoder.")),
    "detect": Kind(
        "the detector's head", _detector, lambda m: m.detector, _detector_keys, "backbone.0.", leftover=True
    ),
    "segment": Kind(
        "the adapter and Mask2Former head", build_segmentor, keys=_segmentor_keys, backbone="segmentation_model.0.backbone."
    ),
}  # fmt: skip
# Options of a head on each backbone that it may stand on; only the first of each was published.
OPTIONS: dict[tuple[str, str], dict[str, Any]] = {
    ("dinov3_vit7b16_lc", "dinov3_vit7b16"): {},
    ("dinov3_vit7b16_dd", "dinov3_vit7b16"): SYNTHMIX,
    ("dinov3_vit7b16_dd", "dinov3_vitl16"): SYNTHMIX
    | {"backbone_out_layers": (4, 11, 17, 23), "post_process_channels": (1024,) * 4},
    ("dinov3_vitl16_chmv2", "dinov3_vitl16"): CHMV2,
    ("dinov3_vit7b16_de", "dinov3_vit7b16"): asdict(DetrConfig(windows=3)),
    ("dinov3_vit7b16_de", "dinov3_vitl16plus"): asdict(DetrConfig(windows=2)),
    ("dinov3_vit7b16_ms", "dinov3_vit7b16"): {"ffn": 4096},
    ("dinov3_vit7b16_ms", "dinov3_vitl16"): {"ffn": 4096},
}


def load_published(
    name: str, files: Files, head_options: dict[str, Any], *, arch: str | None = None, **options: Any
) -> Any:
    """The task model of a published head's name, on its own backbone or another `arch` of `OPTIONS`, in evaluation mode.

    head_options: of the head's constructor; `depth_range` of depth: other nearest and farthest metres.
    """
    row = head(name)
    kind, arch = KINDS[row.task], arch or row.backbone.rpartition("_")[0]
    if (name, arch) not in OPTIONS:
        raise UnknownName(f"{name} stands on {' or '.join(a for n, a in OPTIONS if n == name)}, not on {arch!r}")
    built = OPTIONS[name, arch] | head_options
    source, state, notes = read_head(row, files)
    below: Source = files.backbone_weights if files.pretrained else "random"
    if is_transformers_canopy(state):
        built |= canopy_options(source)
        if any(k.startswith("backbone.") for k in state) and member(Weights, below) is Weights.SAT493M:
            below = source
            notes.append("the backbone comes from the same file as the head")
        state = canopy_decoder(state)
    vit: Any = backbone_of(row, arch, below, check_hash=files.check_hash, **options)
    if row.task != "classify":
        vit.requires_grad_(False)
    device, dtype = next(vit.parameters()).device, options.get("dtype")
    with nullcontext() if source == "random" else torch.device("meta"):
        model: Any = kind.build(vit, **built)
    if source == "random":
        placed(model, device, dtype)
    else:
        part = kind.part(model)
        state = kind.keys(state, part, source)
        if kind.backbone and any(key.startswith(kind.backbone) for key in state):
            notes.append(f"{without_secrets(source)} holds a backbone of its own, which is used")
        left = fill(
            part, state, what=kind.what, source=source, device=device, dtype=dtype, optional=kind.backbone,
            leftover=kind.leftover,
        )  # fmt: skip
        if left:
            notes.append(f"left over in {without_secrets(source)}: {some(left)}")
            warnings.warn(notes[-1], stacklevel=3)
    model.origin = origin(row, source, vit, notes=notes)
    return model.eval()


# ---- files ----------------------------------------------------------------------------------------------------------


def member(enum: Any, weights: Source) -> Any:
    """An enum's member (also by its name), or the source as text: a path or URL."""
    if isinstance(weights, enum):
        return weights
    text = os.fspath(weights)  # type: ignore[arg-type]
    return enum[text] if text in enum.__members__ else text


def checkable(source: str, check_hash: bool) -> bool:
    """Published files have a hash in their name, others need not: what has none is not compared."""
    return check_hash and cache.hash_in_name(source.split("?")[0]) is not None


def read_head(row: Head, files: Files) -> tuple[str, dict[str, Tensor], list[str]]:
    """(source, state dict, notes) of a head's file, before the backbone's, since it is the smaller one; "random", {}, [] for
    fresh weights."""
    weights = files.weights
    if isinstance(weights, Enum) and weights.name != row.trained_on:
        raise UnknownName(f"{row.name} was trained on {row.trained_on}, not {weights.name}")
    if not files.pretrained or weights == "random":
        return "random", {}, []
    if isinstance(weights, Enum) or weights == row.trained_on:
        source = row.url
        if files.hash is not None:
            published = cache.hash_in_name(row.file)
            source = source.replace(f"-{published}.", f"-{files.hash}." if files.hash else ".")
    else:
        source = os.fspath(weights)
    return source, *read(source, check_hash=files.check_hash)


def read(source: str, *, check_hash: bool = False) -> tuple[dict[str, Tensor], list[str]]:
    """The state dict of a head's file at a path or URL, and notes on it; a wrapping that all keys share is taken off."""
    _, _, state, _ = read_all(source, check_hash=checkable(source, check_hash))
    try:
        check_finite(state)
    except WeightsError as error:
        raise WeightsError(f"{source}: {error}") from None
    notes = []
    for wrapping in WRAPPINGS:
        if state and all(key.startswith(wrapping) for key in state):
            state = {key.removeprefix(wrapping): value for key, value in state.items()}
            notes.append(f"the keys of {without_secrets(source)} began with {wrapping!r}; taken off")
    return state, notes


def backbone_of(row: Head, arch: str, weights: Source, *, check_hash: bool = False, **options: Any) -> nn.Module:
    """The backbone a head stands on: `weights` as the backbone functions take them, "random" for fresh ones."""
    chosen = member(Weights, weights)
    if chosen == "random":
        dataset = next(r.dataset.upper() for r in catalog.ROWS if r.id == row.backbone)
        return _make(arch, weights=Weights[dataset], pretrained=False, **options)
    if isinstance(chosen, str):
        check_hash = checkable(chosen, check_hash)
    return _make(arch, weights=chosen, check_hash=check_hash, **options)


def origin(row: Head, source: str, under: nn.Module, *, form: str = "meta", notes: Iterable[str] = ()) -> Origin:
    """Where the finished model's weights come from; `source` "random" for fresh weights."""
    mean, std = row.statistics
    backbone_origin = getattr(under, "origin", None)
    below = str(backbone_origin) if backbone_origin is not None else "the backbone given"
    all_notes = (*notes, *(backbone_origin.notes if backbone_origin is not None else ()))
    return Origin(row.name, f"{source} over {below}", "random" if source == "random" else form, mean, std, all_notes)


def placed(model: nn.Module, device: str | torch.device, dtype: torch.dtype | None = None) -> nn.Module:
    """The model on a device, in a dtype (None: as it is), except for rope periods, which half precision would change."""
    kept = {name: value.clone() for name, value in model.named_buffers() if name.endswith("rope_embed.periods")}
    model.to(device, dtype)
    for name, value in kept.items():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, value.to(device))
    return model


# ---- transformers' canopy height model (`CHMv2ForDepthEstimation`) -------------------------------------------------

# transformers' name → ours, of everything under `head.`
_CANOPY_NAMES = (
    (r"reassemble_stage\.layers\.(\d)\.projection\.", r"reassemble_blocks.projects.\1.conv."),
    (r"reassemble_stage\.layers\.(\d)\.resize\.", r"reassemble_blocks.resize_layers.\1."),
    (r"reassemble_stage\.readout_projects\.", r"reassemble_blocks.readout_projects."),
    (r"convs\.(\d)\.", r"convs.\1.conv."),
    (r"fusion_layers\.(\d)\.projection\.", r"fusion_blocks.\1.project.conv."),
    (r"fusion_layers\.(\d)\.residual_layer(\d)\.convolution(\d)\.", r"fusion_blocks.\1.res_conv_unit\2.conv\3.conv."),
    (r"conv_depth\.", r"conv_depth."),
)


def is_transformers_canopy(state: Mapping[str, Tensor]) -> bool:
    return any(k.startswith("head.reassemble_stage.") for k in state)


def canopy_decoder(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The decoder's state dict out of `CHMv2ForDepthEstimation`'s; a key without a counterpart keeps its name, so that
    the strict comparison names it."""
    decoder: dict[str, Tensor] = {}
    for key, value in state.items():
        if not key.startswith("head."):
            continue
        plain = key.removeprefix("head.")
        for pattern, ours in _CANOPY_NAMES:
            renamed, hits = re.subn("^" + pattern, ours, plain)
            if hits:
                plain = renamed
                break
        decoder[plain] = value
    return decoder


_CANOPY_CONFIG = {
    "fusion_hidden_size": "channels",
    "head_hidden_size": "n_hidden_channels",
    "number_output_channels": "n_output_channels",
    "post_process_channels": "post_process_channels",
    "readout_type": "readout",
    "min_depth": "min_depth",
    "max_depth": "max_depth",
    "bins_strategy": "bins_strategy",
    "norm_strategy": "norm_strategy",
}


def canopy_options(source: str) -> dict[str, Any]:
    """What the config.json beside transformers' weights states about the head, as options of `build_depther`."""
    path = Path(locate(source))
    file = (path if path.is_dir() else path.parent) / "config.json"
    if not file.is_file():
        return {}
    config = json.loads(file.read_text())
    if config.get("model_type") != "chmv2":
        raise WeightsMismatch(
            f"{without_secrets(source)}: config.json describes {config.get('model_type')!r}, not chmv2"
        )
    options = {ours: config[theirs] for theirs, ours in _CANOPY_CONFIG.items() if theirs in config}
    layers = (config.get("backbone_config") or {}).get("out_indices")
    if layers:
        options["backbone_out_layers"] = tuple(i - 1 for i in layers)  # there 0 is the patch embedding
    return options


# ---- dino.txt --------------------------------------------------------------------------------------------------------
#     model, tokenizer = torch.hub.load(REPO, "dinov3_vitl16_dinotxt_tet1280d20h24l", source="local",
#                                       weights="head.pth", backbone_weights="vitl16.pth", bpe_path_or_url="bpe.txt.gz")
#     logits, _ = model.get_logits(images, tokenizer.tokenize(["a photo of a dog", "a photo of a cat"]))
#
# Differences from the reference: a head file must hold every parameter of the head and the
# text tower, and what else it holds is a warning; a vocabulary that is not the text tower's is refused; `check_hash` reaches
# the backbone too where its name holds a hash; the model comes in evaluation mode also when it is not pretrained.


NAME, OWN = catalog.DINOTXT
OVER = " over "
VOCABULARY_FILE = "thirdparty/bpe_simple_vocab_16e6.txt.gz"
BACKBONE = "visual_model.backbone."


# The data set that the published head and text tower were trained on.
DINOTxtWeights = Enum("DINOTxtWeights", {"LVTD2300M": "LVTD2300M"})


def dinov3_vitl16_dinotxt_tet1280d20h24l(
    *,
    pretrained: bool = True,
    weights: Enum | str | os.PathLike[str] = DINOTxtWeights.LVTD2300M,
    backbone_weights: Weights | str | os.PathLike[str] = Weights.LVD1689M,
    bpe_path_or_url: str | os.PathLike[str] | None = None,
    check_hash: bool = False,
) -> tuple[DinoTxt, Tokenizer]:
    """ViT-L/16 with the dino.txt vision head and the 24-layer text tower, and CLIP's tokenizer; in evaluation mode.

    `weights`: the head and text tower, a path or URL; `backbone_weights`: the ViT-L, any form `dinov3.load` reads.
    `bpe_path_or_url`: CLIP's `bpe_simple_vocab_16e6.txt.gz`; None for the one at the download base, also when
    pretrained=False, which draws fresh weights and fetches no others. The model carries `origin`, with what was loaded
    and left over. Raises `DinoError`s: a file that is missing, holds something else, or does not fit.
    """
    text = TextConfig()
    tokenizer = vocabulary(bpe_path_or_url, text.vocab_size)  # small, and most often forgotten: first
    if not pretrained:
        backbone = cast(VisionTransformer, dinov3_vitl16(pretrained=False))
        return fresh(backbone, text, DinoTxtConfig()), tokenizer

    chosen = member(DINOTxtWeights, weights)
    source = head(NAME).url if isinstance(chosen, Enum) else chosen
    state, notes = read(source, check_hash=check_hash)
    below = member(Weights, backbone_weights)
    if isinstance(below, str):
        check_hash = checkable(below, check_hash)
    backbone = cast(VisionTransformer, dinov3_vitl16(weights=below, check_hash=check_hash))
    return assemble(backbone, state, text, DinoTxtConfig(), source=source, notes=notes), tokenizer


def open_towers(
    weights: str | os.PathLike[str] | None = None,
    backbone_weights: str | os.PathLike[str] | None = None,
    sizes: str | os.PathLike[str] | None = None,
    *,
    device: Any = "cpu",
    dtype: Any = None,
) -> DinoTxt:
    """dino.txt without its tokenizer, which is what images alone need; in evaluation mode.

    weights: the head and text tower, None for the published file, "random" for initial values. sizes: of a model of your
    own, the `clip_model_config.yaml` that its training wrote; None for the one beside the head, where there is one.
    backbone_weights None: the published ViT-L's, or the backbone that `sizes` names. `origin` names the model (`NAME`, or
    `OWN` for other sizes), and its source is "HEAD over BACKBONE", absolute, for a store that is to find both again.
    """
    from dinov3.hub import load

    source = _absolute(os.fspath(weights)) if weights is not None else head(NAME).url
    own = _sizes_of(source, sizes)
    chosen: Any = own.backbone_weights if backbone_weights is None else backbone_weights
    try:
        if isinstance(chosen, Weights):
            backbone: Any = dinov3_vitl16(weights=chosen, dtype=dtype)
        else:
            backbone = load(own.backbone, chosen, seed=0, dtype=dtype)
    except DinoError as error:
        if backbone_weights is not None:
            raise
        raise type(error)(f"the backbone under dino.txt (backbone_weights): {error}") from None
    if not isinstance(backbone, VisionTransformer):
        raise DinoError(f"dino.txt reads the tokens of a ViT, and {_origin(backbone)} is none")
    if weights == "random":
        torch.manual_seed(0)
        model = fresh(backbone, own.text, own.joint)
    else:
        state, notes = read(source)
        model = assemble(backbone, state, own.text, own.joint, source=source, notes=notes)
        origin: Any = model.origin
        under: Any = backbone.origin
        below = _absolute(under.source)
        if any(str(row.packaged_path) == below for row in catalog.ROWS if row.packaged):
            below = ""  # it ships with the package, wherever that is installed
        published = (own.text, own.joint, backbone.embed_dim) == (TextConfig(), DinoTxtConfig(), 1024)
        model.origin = replace(origin, name=NAME if published else OWN, source=f"{source}{OVER}{below}")
    return cast(DinoTxt, placed(model, device, dtype))


def open_model(
    weights: str | os.PathLike[str] | None = None,
    backbone_weights: str | os.PathLike[str] | None = None,
    vocabulary_file: str | os.PathLike[str] | None = None,
    sizes: str | os.PathLike[str] | None = None,
    **placing: Any,
) -> tuple[DinoTxt, Tokenizer]:
    """`open_towers` and the tokenizer; the vocabulary is read first, since it is what is most often forgotten."""
    own = _sizes_of(os.fspath(weights) if weights is not None else head(NAME).url, sizes)
    tokenizer = vocabulary(own.vocabulary if vocabulary_file is None else vocabulary_file, own.text.vocab_size)
    return open_towers(weights, backbone_weights, sizes, **placing), tokenizer


def _absolute(source: str) -> str:
    path = os.path.expanduser(source)
    return os.path.abspath(path) if os.path.exists(path) else source


def sources_of(text: str) -> tuple[str, str]:
    """(head, backbone) of the source that `open_model` wrote; no backbone: the one that the sizes beside the head name."""
    above, _, below = text.rpartition(OVER)
    return above, below


class ImageSide(nn.Module):
    """dino.txt's vision tower as a backbone: its CLS and patch tokens are those that texts compare with.

    [CLS ; mean patch] (pooling "cls+mean") is what `encode_image` gives, so a store filled so can be searched by text.
    """

    def __init__(self, model: DinoTxt) -> None:
        super().__init__()
        if model.visual_model.pooler != "mean":
            raise DinoError("this dino.txt takes the maximum of its patches, which no pooling of a store does")
        self.tower = model.visual_model
        backbone: Any = model.visual_model.backbone
        self.stride, self.patch_size, self.patch_grid = backbone.stride, backbone.patch_size, backbone.patch_grid
        self.n_blocks, self.n_storage_tokens = 1, backbone.n_storage_tokens  # one layer: the last
        projection = model.visual_model.head.linear_projection
        self.embed_dim: int = projection.out_features if isinstance(projection, nn.Linear) else backbone.embed_dim
        self.origin = model.origin

    def forward_features(self, x: Tensor) -> dict[str, Tensor]:
        tokens = self.tower.head(self.tower.backbone_tokens(x))
        n = 1 + self.n_storage_tokens
        return {
            "x_norm_clstoken": tokens[:, 0],
            "x_storage_tokens": tokens[:, 1:n],
            "x_norm_patchtokens": tokens[:, n:],
        }


class _Sizes(NamedTuple):
    joint: DinoTxtConfig
    text: TextConfig
    backbone: str | None
    backbone_weights: Weights | str | None
    vocabulary: str | None


def _sizes_of(source: str, file: str | os.PathLike[str] | None) -> _Sizes:
    """The sizes in `file`, else in the one beside the head at `source`, else the published ones."""
    if file is not None:
        return _read_sizes(file)
    beside = os.path.join(os.path.dirname(os.path.abspath(os.path.expanduser(source))), "clip_model_config.yaml")
    if "://" not in source and os.path.isfile(source) and os.path.isfile(beside):
        return _read_sizes(beside)
    return _Sizes(DinoTxtConfig(), TextConfig(), "dinov3_vitl16", Weights.LVD1689M, None)


def _read_sizes(file: str | os.PathLike[str]) -> _Sizes:
    """The `clip_model_config.yaml` of a training of your own."""
    import yaml

    try:
        with open(file, encoding="utf-8") as stream:
            own = dict(yaml.safe_load(stream))
        text = TextConfig.of(**own.pop("text_backbone"))
        names = [own.pop(key, None) for key in ("vision_backbone", "vision_backbone_weights", "text_vocab_path_or_url")]
        theirs = [own.pop(key, None) for key in ("vision_backbone_config", "vision_backbone_pretrained_weights")]
        if names[0] is None and theirs[0] is not None and names[1] is None:
            names[1] = theirs[1]
        sizes = _Sizes(DinoTxtConfig.of(**own), text, *names)
        for key, value in [*vars(sizes.text).items(), *vars(sizes.joint).items()]:
            most = MOST_LAYERS if "layers" in key or "blocks" in key else MOST_WIDTH
            if isinstance(value, (int, float)) and not abs(value) <= most:
                raise ValueError(f"{key} is {value!r:.20}")
        return sizes
    except OSError as error:
        raise DinoError(f"{file} cannot be read: {error.strerror}") from None
    except (*NONSENSE, yaml.YAMLError) as error:
        raise DinoError(f"{file} is no clip_model_config.yaml of a dino.txt training ({first_line(error)})") from None


def vocabulary(path_or_url: str | os.PathLike[str] | None, size: int) -> Tokenizer:
    """The tokenizer of a vocabulary file that must give `size` ids; None for the published file."""
    source = os.fspath(path_or_url) if path_or_url is not None else _published(VOCABULARY_FILE)
    try:
        tokenizer = Tokenizer.from_file(source)
    except DinoError as error:
        if path_or_url is not None:
            raise
        how = f"pass CLIP's {os.path.basename(source)} as bpe_path_or_url=PATH (in evaluations model.bpe)"
        raise type(error)(f"{error}; or {how}") from None
    if tokenizer.vocab_size != size:
        raise DinoError(
            f"{without_secrets(source)} gives {tokenizer.vocab_size} ids, the text tower knows {size}: "
            "pass CLIP's bpe_simple_vocab_16e6.txt.gz"
        )
    return tokenizer


def assemble(
    backbone: VisionTransformer,
    state: Mapping[str, Tensor],
    text: TextConfig,
    config: DinoTxtConfig,
    *,
    source: str,
    notes: list[str] | None = None,
) -> DinoTxt:
    """The joint model over a loaded backbone with the values of a head file, in evaluation mode.

    Every parameter outside the backbone must be in the file, or `WeightsMismatch` says in a few lines what is not. A
    backbone in the file replaces the one given, as in the reference. Anything else is left over: a warning, and a note
    in `origin`.
    """
    notes, shown = list(notes or ()), without_secrets(source)
    with torch.device("meta"):
        model = build(backbone, text, config)
    own = [key for key in state if key.startswith(BACKBONE)]
    dtype = backbone.cls_token.dtype  # one for both files: half a model in another would not run
    what = "dino.txt's head and text tower"
    left = fill(model, state, what=what, source=source, dtype=dtype, optional=BACKBONE, leftover=True)
    if left:
        notes.append(f"left over in {shown}: {some(left)}")
        warnings.warn(notes[-1], stacklevel=3)
    if own:
        notes.append(f"{shown} holds a backbone of its own ({len(own)} entries), which is used")
    else:
        n = sum(key.startswith(BACKBONE) for key in model.state_dict())
        notes.append(f"{n} entries of the backbone are not in {shown}; they come from {_origin(backbone)}")
    mean, std = _statistics(backbone)
    form = "dinov3" if shown.endswith(".safetensors") else "meta"
    model.origin = Origin(NAME, f"{source} over {_origin(backbone)}", form, mean, std, tuple(notes))  # type: ignore[assignment]
    return model.eval()


def fresh(backbone: VisionTransformer, text: TextConfig, config: DinoTxtConfig) -> DinoTxt:
    """The joint model with initial weights over a backbone, in evaluation mode."""
    with torch.device("meta"):  # init_weights fills everything, so nothing is drawn twice
        model = build(backbone, text, config)
    model.visual_model.head.to_empty(device="cpu")
    model.text_model.to_empty(device="cpu")
    model.logit_scale = nn.Parameter(torch.empty(1), requires_grad=not config.freeze_logit_scale)
    model.init_weights()
    mean, std = _statistics(backbone)
    model.origin = Origin(NAME, f"random over {_origin(backbone)}", "random", mean, std)  # type: ignore[assignment]
    return model.eval()


def _published(file: str) -> str:
    return f"{os.environ.get('DINOV3_DOWNLOAD_BASE', catalog.DOWNLOAD_BASE)}/{file}"


def _origin(backbone: VisionTransformer) -> str:
    return str(getattr(backbone, "origin", "the backbone given"))


def _statistics(backbone: VisionTransformer) -> Any:
    origin = getattr(backbone, "origin", None)
    return (origin.mean, origin.std) if origin is not None else catalog.STATISTICS["lvd1689m"]
