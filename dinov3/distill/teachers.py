"""Teachers of a distillation: any network that says something of an image, and what several have said kept on disk.

DINOv3 distils its small models from the 7B (paper section 5.1); here the teacher may be any backbone, and there may be
several of different kinds (as in AM-RADIO, arXiv 2312.06709). A teacher gives `Targets`: one vector an image, a map of
patches, the logits of a classifier, or some of those. Widths are the student's business (`distill`: learned
projections), grids are agreed here: a teacher that gives patches sees the image at the size where its grid is the
student's.

A teacher is named by a line, `KIND:WHAT[,option=value…]`:

    dinov3:FILE_OR_NAME           a DINOv3 or own checkpoint, all that `dinov3.load` takes
    transformers:FOLDER_OR_NAME   a transformers model with hidden states: CLS first, patches last
    timm:NAME                     a timm model; checkpoint=FILE for weights of its own (default: timm's pretrained ones)
    mobilenetv2:FILE              torchvision's MobileNetV2 classifier, its .pth

options:

    layer, normed   0-based block, default the last · whether the final norm follows (true)
    side            pixels of its input, where no grid has to agree
    views           how many views of an image are cached; the rest go without this teacher
    online          true: it looks at the student's own pixels, nothing is cached
    share           of a batch that an online teacher is asked about
    isometry        true: the student's global vector is held against the teacher's strongest directions by a fixed map
                    that keeps angles, not by a learned projection
    cls, patches, logits, relations     weights of its loss terms

Legend: B images, h×w grid, Dg and Dp widths of the global vector and of a patch, K classes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from dinov3 import distributed
from dinov3.data.crops import draw_box, generator, normalised
from dinov3.data.images import open_image
from dinov3.data.sources import Source
from dinov3.data.transforms.inputs import LVD_MEAN, LVD_STD, to_pixels
from dinov3.errors import DinoError, ImageError, UnknownName, did_you_mean, require

Triple = tuple[float, float, float]


# ---- what a teacher says --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Targets:
    """cls [B, Dg] · patches [B, h, w, Dp] · logits [B, K]; None where the teacher has no such thing."""

    cls: Tensor
    patches: Tensor | None = None
    logits: Tensor | None = None

    def fields(self) -> dict[str, Tensor]:
        named = {"cls": self.cls, "patches": self.patches, "logits": self.logits}
        return {name: value for name, value in named.items() if value is not None}


@dataclass(frozen=True)
class TeacherLine:
    """A teacher's line, understood but not opened."""

    kind: str
    what: str
    layer: int = -1
    normed: bool = True
    side: int | None = None
    views: int | None = None
    online: bool = False
    share: float = 1.0
    checkpoint: str | None = None
    cls: float = 1.0
    patches: float = 1.0
    logits: float = 0.0
    relations: float = 0.0
    isometry: bool = False

    @classmethod
    def parse(cls, line: str) -> TeacherLine:
        """Raises `UnknownName` for a kind or an option that does not exist."""
        head, *options = line.split(",")
        kind, _, what = head.partition(":")
        if kind not in KINDS or not what:
            raise UnknownName(
                f"a teacher is KIND:WHAT with KIND one of {', '.join(KINDS)}, not {line!r}{did_you_mean(kind, KINDS)}"
            )
        values: dict[str, Any] = {}
        for option in options:
            name, _, text = option.partition("=")
            if name not in _OPTIONS:
                raise UnknownName(f"a teacher has no option {name!r} ({line}){did_you_mean(name, _OPTIONS)}")
            try:
                values[name] = _OPTIONS[name](text)
            except ValueError:
                raise DinoError(f"the teacher's option {option!r} has no value it can take ({line})") from None
        return cls(kind, what, **values)


def _truth(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError(text)
    return text.lower() == "true"


def _share(text: str) -> float:
    if not 0 < float(text) <= 1:
        raise ValueError(text)
    return float(text)


_OPTIONS: dict[str, Callable[[str], Any]] = {
    "layer": int, "normed": _truth, "side": int, "views": int, "checkpoint": str,
    "online": _truth, "share": _share, "isometry": _truth,
    "cls": float, "patches": float, "logits": float, "relations": float,
}  # fmt: skip


class Teacher:
    """A frozen network with its way of looking. `id` names the weights and what is taken from them."""

    def __init__(
        self,
        line: TeacherLine,
        network: nn.Module,
        look: Callable[[Tensor], Targets],
        *,
        patch: int | None,
        mean: Triple = LVD_MEAN,
        std: Triple = LVD_STD,
    ) -> None:
        self.line, self.network, self.look = line, network.eval().requires_grad_(False), look
        self.patch, self.mean, self.std = patch, mean, std
        self.id = f"{line.kind}-{_fingerprint(network)}"
        if line.kind != "mobilenetv2":
            self.id += f"-layer{line.layer}" + ("" if line.normed else "-prenorm")

    def side(self, grid: int) -> int:
        """Pixels of its input for a student's grid of grid × grid patches."""
        if self.patch is not None and self.line.side is None:
            return grid * self.patch
        return self.line.side or 16 * grid

    @torch.inference_mode()
    def __call__(self, pixels: Tensor, *, bf16: bool = False) -> Targets:
        """uint8 [B, 3, side, side] → targets in float32."""
        weight = next(self.network.parameters())
        x = normalised(pixels.to(weight.device), self.mean, self.std)
        with torch.autocast(weight.device.type, torch.bfloat16, enabled=bf16):
            said = self.look(x)
        return Targets(**{name: value.float() for name, value in said.fields().items()})


def _fingerprint(network: nn.Module) -> str:
    """Of all weights, whatever the family: first bytes of every tensor and its sum, which no retraining leaves alone."""
    digest = hashlib.sha256()
    for key, value in sorted(network.state_dict().items()):
        digest.update(f"{key} {tuple(value.shape)} {value.double().sum().item():.9e}".encode())
    return digest.hexdigest()[:12]


# ---- the kinds ------------------------------------------------------------------------------------------------------


def open_teacher(line: str | TeacherLine, *, device: str | torch.device = "cpu") -> Teacher:
    """The teacher of a line, on a device. Raises `DinoError` where it cannot be had."""
    parsed = TeacherLine.parse(line) if isinstance(line, str) else line
    teacher = KINDS[parsed.kind](parsed)
    teacher.network.to(device)
    return teacher


def _dinov3(line: TeacherLine) -> Teacher:
    from dinov3.features import run
    from dinov3.hub import load
    from dinov3.weights import catalog

    known = line.what.lower() in catalog.aliases()
    network = load(line.what) if known else load(weights=line.what)

    def look(x: Tensor) -> Targets:
        said = run(network, x, layer=line.layer, norm=line.normed)
        return Targets(said["cls"], said["patches"])

    net: Any = network
    return Teacher(line, network, look, patch=net.stride, mean=net.origin.mean, std=net.origin.std)


def _transformers(line: TeacherLine) -> Teacher:
    transformers = require("transformers", "distill", "a transformers teacher")
    if Path(line.what).is_dir() and "dinov2" in json.loads((Path(line.what) / "config.json").read_text())["model_type"]:
        # by its own class: AutoModel imports every processor there is
        from transformers.models.dinov2.modeling_dinov2 import Dinov2Model

        network = Dinov2Model.from_pretrained(line.what, dtype=torch.float32, attn_implementation="sdpa")
    else:
        network = transformers.AutoModel.from_pretrained(line.what, dtype=torch.float32)
    about: Any = network.config
    norm = getattr(network, "layernorm", None) or getattr(network, "norm", None)
    patch = int(about.patch_size)
    blocks = about.num_hidden_layers
    if not -blocks <= line.layer < blocks:
        raise DinoError(f"layer {line.layer} does not exist: {line.what} has {blocks} blocks (0 to {blocks - 1})")
    block = range(blocks)[line.layer]

    def look(x: Tensor) -> Targets:
        tokens = network(pixel_values=x, output_hidden_states=True).hidden_states[block + 1]
        if line.normed and norm is not None:
            tokens = norm(tokens)
        h, w = x.shape[-2] // patch, x.shape[-1] // patch
        return Targets(tokens[:, 0], tokens[:, -h * w :].unflatten(1, (h, w)))

    return Teacher(line, network, look, patch=patch)


def _timm(line: TeacherLine) -> Teacher:
    timm = require("timm", "distill", "a timm teacher")
    network = timm.create_model(line.what, pretrained=line.checkpoint is None, checkpoint_path=line.checkpoint or "")
    config = network.pretrained_cfg
    patch = int(network.patch_embed.patch_size[0]) if hasattr(network, "num_prefix_tokens") else None

    def look(x: Tensor) -> Targets:
        maps = network.forward_features(x)  # [B, N, D], or [B, D, h, w]
        pooled = network.forward_head(maps, pre_logits=True)
        logits = network.forward_head(maps) if network.num_classes else None
        if patch is None:
            return Targets(pooled, maps.permute(0, 2, 3, 1) if maps.ndim == 4 else None, logits)
        h, w = x.shape[-2] // patch, x.shape[-1] // patch
        return Targets(pooled, maps[:, network.num_prefix_tokens :].unflatten(1, (h, w)), logits)

    return Teacher(line, network, look, patch=patch, mean=tuple(config["mean"]), std=tuple(config["std"]))


def _mobilenetv2(line: TeacherLine) -> Teacher:
    from dinov3.weights import loading

    state, _ = loading.read(line.what)
    network = MobileNetV2()
    missing = network.load_state_dict(state, strict=False)
    if missing.missing_keys or missing.unexpected_keys:
        raise DinoError(f"{line.what} is not torchvision's MobileNetV2 (its keys differ: {missing})")
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def look(x: Tensor) -> Targets:
        return network.look(x.contiguous(memory_format=torch.channels_last))

    teacher = Teacher(line, network, look, patch=None)  # named by the file's weights, then made faster
    without_norms(network)
    return teacher


def without_norms(network: nn.Module) -> None:
    """Multiplies every batch norm that follows a convolution in a `Sequential` into it: 40 % less work on a CPU."""
    for module in network.modules():
        if isinstance(module, nn.Sequential):
            for i, (first, second) in enumerate(pairwise(list(module))):
                if isinstance(first, nn.Conv2d) and isinstance(second, nn.BatchNorm2d):
                    module[i], module[i + 1] = fuse_conv_bn_eval(first, second), nn.Identity()


class MobileNetV2(nn.Module):
    """MobileNetV2 1.0 (arXiv 1801.04381) with the attribute names of torchvision's files. Patches are its last map, /32."""

    # expansion, channels, repeats, stride of the first (Table 2)
    TABLE = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        layers: list[nn.Module] = [_conv_norm_act(3, 32, 3, stride=2)]
        width = 32
        for expansion, channels, repeats, stride in self.TABLE:
            for i in range(repeats):
                layers.append(InvertedResidual(width, channels, stride if i == 0 else 1, expansion))
                width = channels
        layers.append(_conv_norm_act(width, 1280, 1))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, classes))

    def look(self, x: Tensor) -> Targets:
        maps = self.features(x)  # [B, 1280, h, w]
        pooled = maps.mean((2, 3))
        return Targets(pooled, maps.permute(0, 2, 3, 1), self.classifier(pooled))


class InvertedResidual(nn.Module):
    def __init__(self, width: int, out: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = width * expansion
        widen = [_conv_norm_act(width, hidden, 1)] if expansion != 1 else []
        depthwise = _conv_norm_act(hidden, hidden, 3, stride=stride, groups=hidden)
        self.conv = nn.Sequential(*widen, depthwise, nn.Conv2d(hidden, out, 1, bias=False), nn.BatchNorm2d(out))
        self.residual = stride == 1 and width == out

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


def _conv_norm_act(width: int, out: int, kernel: int, *, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(width, out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out), nn.ReLU6())


KINDS: dict[str, Callable[[TeacherLine], Teacher]] = {
    "dinov3": _dinov3,
    "transformers": _transformers,
    "timm": _timm,
    "mobilenetv2": _mobilenetv2,
}


# ---- what teacher and student look at -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Views:
    """Views of images as a function of (seed, image, view number): the same box for every network, at any size.

    `scale`: the box's share of the image's area. `count`: how many views an image has; epoch e shows view e mod count.
    """

    count: int = 4
    scale: tuple[float, float] = (0.35, 1.0)
    seed: int = 0

    @property
    def id(self) -> str:
        low, high = self.scale
        return f"box{low:g}-{high:g}-seed{self.seed}"

    def cut(self, image: Tensor, index: int, view: int, side: int) -> Tensor:
        """uint8 [3, H, W] → [3, side, side]."""
        top, left, h, w = draw_box(image.shape[2], image.shape[1], self.scale, generator(self.seed, view, index))
        box = image[None, :, top : top + h, left : left + w].contiguous(memory_format=torch.channels_last)
        return F.interpolate(box, size=(side, side), mode="bicubic", antialias=True)[0].contiguous()


class Images:
    """A source's images by number, decoded at need. One that cannot be read is replaced by the next that can."""

    def __init__(self, source: Source, *, target_short_side: int = 256, keep: bool = False) -> None:
        self.items = list(source)
        self.kept: dict[int, Tensor] | None = {} if keep else None
        self.target_short_side = target_short_side
        self.unreadable: dict[str, str] = {}
        if not self.items:
            raise DinoError(f"{source.name} holds no images")

    def __len__(self) -> int:
        return len(self.items)

    @property
    def id(self) -> str:
        digest = hashlib.sha256("\n".join(f"{Path(i.path).name} {i.stamp}" for i in self.items).encode())
        return digest.hexdigest()[:12]

    def __getitem__(self, index: int) -> Tensor:
        """uint8 [3, H, W]."""
        if self.kept is None:
            return self._decoded(index)
        if index not in self.kept:
            self.kept[index] = self._decoded(index)
        return self.kept[index]

    def _decoded(self, index: int) -> Tensor:
        for step in range(len(self.items)):
            item = self.items[(index + step) % len(self.items)]
            try:
                image = open_image(item.read(), target_short_side=self.target_short_side).image
                return to_pixels(image)
            except ImageError as error:
                self.unreadable[item.path] = str(error)
        raise DinoError(f"none of the {len(self.items)} images can be read; the first: {self.items[0].path}")

    def views(self, views: Views, indices: np.ndarray, view: int, side: int) -> Tensor:
        """uint8 [B, 3, side, side]."""
        return torch.stack([views.cut(self[int(i)], int(i), view, side) for i in indices])


# ---- kept on disk ---------------------------------------------------------------------------------------------------

SHARD = 256  # images a file


class TargetCache:
    """What one teacher says of every view of every image: float16 shards in a folder named by all that decides them.

    `fill` computes what is missing, shard by shard; a shard appears whole or not at all, so it can be killed and run
    again. `read` gives the targets of some images in one view. float16 keeps 11 bits: relative 5e-4.
    """

    def __init__(self, folder: Path, teacher: Teacher, views: Views, images: Images, grid: int) -> None:
        self.teacher, self.views, self.images, self.grid = teacher, views, images, grid
        name = f"{teacher.id}-{teacher.side(grid)}px-{views.id}-{images.id}"
        self.folder = Path(folder) / name
        self.count = min(views.count, teacher.line.views or views.count)
        self._open: dict[tuple[int, int], Any] = {}

    def __contains__(self, view: int) -> bool:
        return view < self.count

    def _shard(self, view: int, number: int) -> Path:
        return self.folder / f"view-{view}" / f"shard-{number:05d}.safetensors"

    def missing(self) -> Iterator[tuple[int, int]]:
        """(view, shard) pairs not yet on disk."""
        for view in range(self.count):
            for number in range(-(-len(self.images) // SHARD)):
                if not self._shard(view, number).is_file():
                    yield view, number

    def fill(self, *, bf16: bool = False, batch: int = 64, tell: Callable[[str], None] = lambda text: None) -> int:
        """Computes the missing shards, each process its share; how many there were for this one."""
        from dinov3.weights.loading import write_safetensors

        missing = distributed.broadcast_object(list(self.missing()))[distributed.rank() :: distributed.world()]
        for done, (view, number) in enumerate(missing):
            everything = np.arange(number * SHARD, min((number + 1) * SHARD, len(self.images)))
            parts: dict[str, list[Tensor]] = {}
            for indices in np.split(everything, range(batch, len(everything), batch)):
                pixels = self.images.views(self.views, indices, view, self.teacher.side(self.grid))
                for name, value in self.kept(self.teacher(pixels, bf16=bf16)).fields().items():
                    parts.setdefault(name, []).append(value.half().cpu())
            write_safetensors({k: torch.cat(v) for k, v in parts.items()}, self._shard(view, number))
            tell(f"{self.teacher.id}: view {view}, shard {number} ({done + 1} of {len(missing)} missing ones)")
        distributed.barrier()
        return len(missing)

    def kept(self, said: Targets) -> Targets:
        """Only what has a weight is stored."""
        line = self.teacher.line
        return replace(
            said, patches=said.patches if line.patches else None, logits=said.logits if line.logits else None
        )

    def read(self, indices: np.ndarray, view: int) -> Targets:
        """The targets of images `indices` in this view, float32."""
        safetensors = require("safetensors", "hub", "reading cached targets")
        rows: dict[str, list[Tensor]] = {}
        for index in indices:
            number, row = divmod(int(index), SHARD)
            file = self._open.get((view, number))
            if file is None:
                file = self._open[view, number] = safetensors.safe_open(self._shard(view, number), "pt")
            for name in file.keys():  # noqa: SIM118  (not a mapping)
                rows.setdefault(name, []).append(file.get_slice(name)[row])
        return Targets(**{name: torch.stack(values).float() for name, values in rows.items()})


class OnlineTargets:
    """The same without a disk: the teacher looks at every view when it is asked for, or at the student's own pixels."""

    def __init__(self, teacher: Teacher, views: Views, images: Images, grid: int, *, bf16: bool = False) -> None:
        self.teacher, self.views, self.images, self.grid, self.bf16 = teacher, views, images, grid, bf16
        self.sees_students_pixels = teacher.line.online

    def __contains__(self, view: int) -> bool:
        return True

    def look(self, pixels: Tensor) -> Targets:
        """uint8 [B, 3, side, side] → targets."""
        return self.teacher(pixels, bf16=self.bf16)

    def read(self, indices: np.ndarray, view: int) -> Targets:
        pixels = self.images.views(self.views, indices, view, self.teacher.side(self.grid))
        parts = [self.look(some).fields() for some in pixels.split(64)]
        return Targets(**{name: torch.cat([p[name] for p in parts]) for name in parts[0]})
