"""dino.txt as `torch.hub` sees it: `dinov3_vitl16_dinotxt_tet1280d20h24l` gives (model, tokenizer).

    model, tokenizer = torch.hub.load(REPO, "dinov3_vitl16_dinotxt_tet1280d20h24l", source="local",
                                      weights="head.pth", backbone_weights="vitl16.pth", bpe_path_or_url="bpe.txt.gz")
    logits, _ = model.get_logits(images, tokenizer.tokenize(["a photo of a dog", "a photo of a cat"]))

Differences from the reference: a head file must hold every parameter of the head and the
text tower, and what else it holds is a warning; a vocabulary that is not the text tower's is refused; `check_hash` reaches
the backbone too where its name holds a hash; the model comes in evaluation mode also when it is not pretrained.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import replace
from enum import Enum
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from dinov3.data.tokenizer import Tokenizer
from dinov3.errors import DinoError, without_secrets
from dinov3.heads.dinotxt import DinoTxt, DinoTxtConfig, TextConfig, build
from dinov3.hub import Origin, head, published_heads
from dinov3.hub.backbones import Weights, dinov3_vitl16
from dinov3.models.vit import VisionTransformer
from dinov3.weights import catalog
from dinov3.weights.filling import fill, some
from dinov3.weights.reading import MOST_LAYERS, MOST_WIDTH, NONSENSE, first_line

NAME = "dinov3_vitl16_dinotxt_tet1280d20h24l"
OWN = "dinotxt"  # one of other sizes
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

    chosen = published_heads.member(DINOTxtWeights, weights)
    source = head(NAME).url if isinstance(chosen, Enum) else chosen
    state, notes = published_heads.read(source, check_hash=check_hash)
    below = published_heads.member(Weights, backbone_weights)
    if isinstance(below, str):
        check_hash = published_heads.checkable(below, check_hash)
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
    if isinstance(chosen, Weights):
        backbone: Any = dinov3_vitl16(weights=chosen, dtype=dtype)
    else:
        backbone = load(own.backbone, chosen, seed=0, dtype=dtype)
    if not isinstance(backbone, VisionTransformer):
        raise DinoError(f"dino.txt reads the tokens of a ViT, and {_origin(backbone)} is none")
    if weights == "random":
        torch.manual_seed(0)
        model = fresh(backbone, own.text, own.joint)
    else:
        state, notes = published_heads.read(source)
        model = assemble(backbone, state, own.text, own.joint, source=source, notes=notes)
        origin: Any = model.origin
        under: Any = backbone.origin
        below = _absolute(under.source)
        if any(str(row.packaged_path) == below for row in catalog.ROWS if row.packaged):
            below = ""  # it ships with the package, wherever that is installed
        published = (own.text, own.joint, backbone.embed_dim) == (TextConfig(), DinoTxtConfig(), 1024)
        model.origin = replace(origin, name=NAME if published else OWN, source=f"{source}{OVER}{below}")
    return cast(DinoTxt, published_heads.placed(model, device, dtype))


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
        raise type(error)(f"{error}; or pass CLIP's {os.path.basename(source)} as bpe_path_or_url=PATH") from None
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
    left = fill(
        model,
        state,
        what="dino.txt's head and text tower",
        source=source,
        dtype=dtype,
        optional=BACKBONE,
        leftover=True,
    )
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
