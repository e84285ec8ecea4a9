"""One table of every published backbone file and every name people call it by, and one of the published heads.
Cheap to import: no torch.

Two other projects published weights of DINOv3's form, under other licences: EUPE (arXiv 2603.22387) and LingBot-Vision
(arXiv 2607.05247). Their shapes are those of Meta's files, so their names tell them apart: those of the file or its folder,
config.json, or the name one loads them by.

A name may mean one file ("facebook/dinov3-vitl16-pretrain-sat493m") or an architecture of which several files exist
("dinov3_vitl16"): `resolve` gives the rows in the order of preference, the file's content then decides. Published
scores are copied from the paper and the model card (arXiv 2508.10104, Tab. 3-9, 14, 15, 17, 18); where the two
contradict each other the paper is cited.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from dinov3.errors import UnknownName, did_you_mean
from dinov3.models.architectures import BackboneConfig, ConvNeXtConfig, ViTConfig, published

# What `dinov3 embed` and `make demo` use when no model is named: the small one that ships with the package. ("random"
# would be logged as random wherever it is used.)
DEFAULT_MODEL: str = "dinov3_vitt16"
DEFAULT_WEIGHTS: str | None = None

# Statistics of the training images, RGB in [0, 1].
STATISTICS: dict[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "lvd1689m": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "sat493m": ((0.430, 0.411, 0.296), (0.213, 0.156, 0.143)),
    "own": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "eupe": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "lingbot": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


@dataclass(frozen=True)
class Licence:
    """The terms of published weights."""

    name: str
    slug: str  # as timm's configurations and model cards have it
    url: str
    notice: str = ""  # what else its redistributors say

    def __str__(self) -> str:
        return f"{self.name}, {self.url}" + (f"; {self.notice}" if self.notice else "")


_DINOV3 = Licence(
    "DINOv3 License", "dinov3-license", "https://ai.meta.com/resources/models-and-libraries/dinov3-license/"
)
_APACHE = Licence("Apache License 2.0", "apache-2.0", "https://www.apache.org/licenses/LICENSE-2.0")
LICENCES: dict[str, Licence] = {  # by data set
    "lvd1689m": _DINOV3,
    "sat493m": _DINOV3,
    "own": _APACHE,
    "eupe": Licence(
        "FAIR Noncommercial Research License",
        "fair-noncommercial-research-license",
        "https://huggingface.co/facebook/fair-noncommercial-research-license",
        "no commercial use",
    ),
    "lingbot": replace(
        _APACHE,
        url="https://github.com/robbyant/lingbot-vision",
        notice=f"one redistributor states that the {_DINOV3.name} ({_DINOV3.url}) applies as well",
    ),
}

FILES = Path(__file__).parent / "files"  # weights of our own, in the package
DOWNLOAD_BASE = "https://dl.fbaipublicfiles.com/dinov3"  # DINOV3_DOWNLOAD_BASE in the environment overrides it
DOWNLOAD_PAGE = "https://ai.meta.com/resources/models-and-libraries/dinov3-downloads/"
# How people come by Meta's files: the end of every message about one that is not here.
ACCESS = (
    f"Meta's files are gated: request access at {DOWNLOAD_PAGE}, then pass as weights the link from the e-mail or what you "
    "downloaded (Meta's .pth, a .safetensors file, a folder of transformers or timm)"
)


@dataclass(frozen=True)
class Row:
    """A published file of a backbone."""

    arch: str  # the hub function's name
    dataset: str  # a key of STATISTICS
    config: BackboneConfig = field(repr=False)
    parameters: int
    hash: str | None  # first 8 hex digits of the published file's sha256
    released: bool = True
    timm: tuple[str, ...] = ()
    scores: Mapping[str, float] = field(default_factory=dict, repr=False)
    packaged: str | None = None  # a file of our own in dinov3/weights/files
    repository: str | None = None  # on Hugging Face, where it is not Meta's

    @property
    def id(self) -> str:
        return f"{self.arch}_{self.dataset}"

    @property
    def file(self) -> str | None:
        """Meta's file name, or that of the file in the package."""
        if self.packaged:
            return self.packaged
        return f"{self.arch}_pretrain_{self.dataset}-{self.hash}.pth" if self.hash else None

    @property
    def packaged_path(self) -> Path | None:
        """The file that ships with the package."""
        return FILES / self.packaged if self.packaged else None

    @property
    def url(self) -> str | None:
        """Where Meta serves the file; gated, see DOWNLOAD_PAGE."""
        base = os.environ.get("DINOV3_DOWNLOAD_BASE", DOWNLOAD_BASE)
        return f"{base}/{self.arch}/{self.file}" if self.hash else None

    @property
    def hf(self) -> str | None:
        """The Hugging Face repository: Meta's in transformers' layout, others in timm's."""
        if self.repository:
            return self.repository
        name = self.arch.replace("_", "-")
        return f"facebook/{name}-pretrain-{self.dataset}" if self.released and not self.packaged else None

    @property
    def licence(self) -> Licence:
        return LICENCES[self.dataset]

    @property
    def known_by_name(self) -> bool:
        """Whether only a name tells this file from one of Meta's: no hash of it is known."""
        return self.repository is not None

    @property
    def mean(self) -> tuple[float, float, float]:
        return STATISTICS[self.dataset][0]

    @property
    def std(self) -> tuple[float, float, float]:
        return STATISTICS[self.dataset][1]

    def tokens(self, size: int) -> int:
        """Length of the sequence for a size × size image: CLS + registers + patches (ConvNeXt: pooled + pixels)."""
        if isinstance(self.config, ConvNeXtConfig):
            return 1 + (size // 32) ** 2
        return 1 + self.config.n_storage_tokens + (size // self.config.patch_size) ** 2


_VIT_SCORES = ("IN-ReaL", "IN-R", "ObjectNet", "Oxford-H", "ADE20k", "NYU↓", "DAVIS", "NAVI", "SPair")
_CNX_SCORES = ("IN-ReaL", "IN-R", "ObjectNet", "ADE20k", "NYU↓")
_SAT_SCORES = ("GEO-Bench cls", "GEO-Bench seg", "Open-Canopy MAE↓")


def _vit(
    arch: str,
    parameters: int,
    hash: str,
    timm: str | None = None,
    scores: tuple[float, ...] = (),
    dataset: str = "lvd1689m",
    **options: Any,
) -> Row:
    names = [f"vit_{timm}_patch16_dinov3{bias}" for bias in ("", "_qkvb")][: 1 if timm == "7b" else 2] if timm else []
    timm_names = tuple(f"{name}.{dataset}" for name in names)
    named = dict(zip(_SAT_SCORES if dataset == "sat493m" else _VIT_SCORES, scores))
    return Row(arch, dataset, published(arch, **options), parameters, hash, timm is not None, timm_names, named)


def _convnext(size: str, parameters: int, hash: str, scores: tuple[float, ...]) -> Row:
    arch, timm_names = f"dinov3_convnext_{size}", (f"convnext_{size}.dinov3_lvd1689m",)
    return Row(arch, "lvd1689m", published(arch), parameters, hash, True, timm_names, dict(zip(_CNX_SCORES, scores)))


def _relative(arch: str, dataset: str, parameters: int, timm: str, owner: str = "timm") -> Row:
    """A file of another project, in timm's form."""
    return Row(arch, dataset, published(arch), parameters, None, timm=(timm,), repository=f"{owner}/{timm}")


_UNTIED = {"untie_global_and_local_cls_norm": True}
# fmt: off
ROWS: tuple[Row, ...] = (
    _vit("dinov3_vits16", 21_601_152, "08c60483", "small", (87.0, 60.4, 50.9, 49.5, 47.0, .403, 72.7, 56.3, 50.4)),
    _vit("dinov3_vits16plus", 28_697_472, "4057cbaa", "small_plus", (88.0, 68.8, 54.6, 50.0, 48.8, .399, 75.5, 57.1, 55.2)),
    _vit("dinov3_vitb16", 85_669_632, "73cec8be", "base", (89.3, 76.7, 64.1, 58.5, 51.8, .373, 77.2, 58.8, 57.2)),
    _vit("dinov3_vitl16", 303_154_176, "8aa4cbdd", "large", (90.2, 88.1, 74.8, 63.1, 54.9, .352, 79.9, 62.3, 61.2)),
    _vit("dinov3_vitl16plus", 403_915_776, "46503df0"),
    _vit("dinov3_vith16plus", 840_633_600, "7c1da9a5", "huge_plus", (90.3, 90.0, 78.6, 64.5, 54.8, .352, 79.3, 63.3, 56.3)),
    _vit("dinov3_vit7b16", 6_716_043_264, "a955f4ea", "7b", (90.4, 91.1, 79.0, 60.7, 55.9, .309, 79.7, 64.4, 58.7)),
    _vit("dinov3_vitl16", 303_156_224, "eadcf0ff", "large", (79.6, 74.5, 2.07), "sat493m", **_UNTIED),
    _vit("dinov3_vit7b16", 6_716_043_264, "a6675841", "7b", (81.1, 75.0, 2.02), "sat493m"),
    _convnext("tiny", 27_820_128, "21b726bb", (87.7, 74.1, 58.7, 42.7, .448)),
    # the published IN-R and ObjectNet of Small repeat Tiny's, probably a copying error: left out
    _convnext("small", 49_454_688, "296db49d", (88.7, float("nan"), float("nan"), 44.8, .432)),
    _convnext("base", 87_566_464, "801f2ba9", (89.2, 78.2, 61.3, 46.3, .420)),
    _convnext("large", 196_230_336, "61fa432d", (89.4, 82.4, 65.2, 47.8, .403)),
    # our own, distilled by `dinov3 distill`: docs/model-card-vitt16.md
    Row("dinov3_vitt16", "own", published("dinov3_vitt16"), 5_492_160, None, packaged="dinov3_vitt16.safetensors"),
    _relative("dinov3_vits16", "lingbot", 21_601_152, "vit_small_patch16_lingbot.robbyant", "belfner"),
    _relative("dinov3_vitb16", "lingbot", 85_669_632, "vit_base_patch16_lingbot.robbyant", "belfner"),
    _relative("dinov3_vitl16", "lingbot", 303_154_176, "vit_large_patch16_lingbot.robbyant", "belfner"),
    _relative("dinov3_vitt16", "eupe", 5_492_160, "vit_tiny_patch16_dinov3_qkvb.eupe_lvd1689m"),
    _relative("dinov3_vits16", "eupe", 21_601_152, "vit_small_patch16_dinov3_qkvb.eupe_lvd1689m"),
    _relative("dinov3_vitb16", "eupe", 85_669_632, "vit_base_patch16_dinov3_qkvb.eupe_lvd1689m"),
    _relative("dinov3_convnext_tiny", "eupe", 27_820_128, "convnext_tiny.eupe_lvd1689m"),
    _relative("dinov3_convnext_small", "eupe", 49_454_688, "convnext_small.eupe_lvd1689m"),
    _relative("dinov3_convnext_base", "eupe", 87_566_464, "convnext_base.eupe_lvd1689m"),
)
# fmt: on
ARCHITECTURES: tuple[str, ...] = tuple(dict.fromkeys(row.arch for row in ROWS))


@dataclass(frozen=True)
class HeadRow:
    """A published head: a hub function, the file it loads, and the backbone that file was trained on."""

    name: str  # of the hub function
    task: str  # "classify", "depth", "canopy", "detect", "segment", "text"
    trained_on: str  # the enum member that names the published file
    backbone: str  # an id of the catalogue
    file: str  # below the download base
    mean: tuple[float, float, float] | None = None  # where it is not the backbone's
    hf: str | None = None  # the Hugging Face repository in transformers' layout, backbone included

    @property
    def url(self) -> str:
        """Where Meta serves the file; gated, see `DOWNLOAD_PAGE`."""
        return f"{os.environ.get('DINOV3_DOWNLOAD_BASE', DOWNLOAD_BASE)}/{self.file}"

    @property
    def statistics(self) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
        """(mean, std) of the images the head was trained on."""
        (row,) = (row for row in ROWS if row.id == self.backbone)
        return self.mean or row.mean, row.std


_VIT7B, _VITL = "dinov3_vit7b16", "dinov3_vitl16"
HEADS: tuple[HeadRow, ...] = (
    HeadRow(
        f"{_VIT7B}_lc", "classify", "IMAGENET1K", f"{_VIT7B}_lvd1689m",
        f"{_VIT7B}/{_VIT7B}_imagenet1k_linear_head-90d8ed92.pth",
    ),
    HeadRow(
        f"{_VIT7B}_dd", "depth", "SYNTHMIX", f"{_VIT7B}_lvd1689m",
        f"{_VIT7B}/{_VIT7B}_synthmix_dpt_head-02040be1.pth",
    ),
    HeadRow(
        f"{_VIT7B}_de", "detect", "COCO2017", f"{_VIT7B}_lvd1689m",
        f"{_VIT7B}/{_VIT7B}_coco2017_detr_head-b0235ff7.pth",
    ),
    HeadRow(
        f"{_VIT7B}_ms", "segment", "ADE20K", f"{_VIT7B}_lvd1689m",
        f"{_VIT7B}/{_VIT7B}_ade20k_m2f_head-bf307cb1.pth",
    ),
    HeadRow(
        f"{_VITL}_dinotxt_tet1280d20h24l", "text", "LVTD2300M", f"{_VITL}_lvd1689m",
        f"{_VITL}/{_VITL}_dinotxt_vision_head_and_text_encoder-a442d8f5.pth",
    ),
    HeadRow(
        f"{_VITL}_chmv2", "canopy", "CHMV2", f"{_VITL}_sat493m", f"chmv2/{_VITL}_chmv2_dpt_head-3703d643.pth",
        mean=(0.420, 0.411, 0.296),  # not the satellite backbone's 0.430
        hf="facebook/dinov3-vitl16-chmv2-dpt-head",
    ),
)  # fmt: skip
DINOTXT = (f"{_VITL}_dinotxt_tet1280d20h24l", "dinotxt")  # names of models with a text tower: published, other sizes


@lru_cache(maxsize=1)
def aliases() -> dict[str, tuple[Row, ...]]:
    """Every name, lower case, with the rows it may mean (preferred first)."""
    table: dict[str, list[Row]] = {}
    for row in ROWS:
        names = {row.arch, row.arch.removeprefix("dinov3_"), row.id, row.id.removeprefix("dinov3_")}
        names |= {row.arch.replace("_", "-"), row.arch.replace("_", "-").removeprefix("dinov3-")}
        if row.file:
            names |= {row.file, row.file.removesuffix(".pth")}
        if row.hf:
            names |= {row.hf, row.hf.removeprefix("facebook/")}
        if row.known_by_name:
            names.add(row.arch.replace("dinov3", row.dataset))
        for name in row.timm:
            names |= {name, f"timm/{name}"}
            if isinstance(row.config, ViTConfig):  # without its tag the name says only the architecture
                names.add(name.split(".")[0])
        for name in names:
            table.setdefault(name.lower(), []).append(row)
    return {name: tuple(rows) for name, rows in table.items()}


def resolve(name: str) -> tuple[Row, ...]:
    """The rows a name may mean; more than one when several files of that architecture are published.

    Raises `UnknownName` with the nearest names.
    """
    rows = aliases().get(str(name).lower())
    if rows is None:
        hub = [row.arch for row in ROWS] + [n for row in ROWS for n in (*row.timm, row.hf or row.arch)]
        hint = did_you_mean(str(name), hub) or did_you_mean(re.sub(r"[-_ ]", "_", str(name)), ARCHITECTURES)
        hint = hint or did_you_mean(str(name), [row.arch.removeprefix("dinov3_") for row in ROWS])
        raise UnknownName(f"unknown model {name!r}{hint or '; `dinov3 models` lists them'}")
    return rows
