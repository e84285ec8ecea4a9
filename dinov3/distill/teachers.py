"""Teachers of a distillation: any network with an output for an image, and the outputs of several cached on disk.

DINOv3 distils its small models from the 7B (paper section 5.1); here the teacher may be any backbone, and there may be
several of different kinds (as in AM-RADIO, arXiv 2312.06709). A teacher gives `Targets`: one vector an image, a map of
patches, the logits of a classifier, or some of those. Widths are the student's business (`Projector`); grids are agreed
here: a teacher that gives patches sees the image at the size where its grid is the student's.

A teacher is named by a spec, `KIND:WHAT[,option=value…]`:

    dinov3:FILE_OR_NAME           a DINOv3 or own checkpoint, all that `dinov3.load` takes
    transformers:FOLDER_OR_NAME   a plain vision transformer of transformers
    timm:NAME                     a timm model; checkpoint=FILE for weights of its own (default: timm's pretrained ones)

More kinds can be put into `KINDS`. Options:

    layer, normed   0-based block, default the last · whether the final norm follows (true)
    side            pixels of its input, where no grid has to agree
    views           how many views of an image are cached; the rest go without this teacher
    online          true: it sees the student's own pixels, nothing is cached
    share           of a batch that an online teacher processes
    cls, patches, logits, relations     weights of its loss terms

Legend: B images, h×w grid, Dg and Dp widths of the global vector and of a patch, K classes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3 import distributed
from dinov3.data.crops import draw_box, generator
from dinov3.data.images import open_image
from dinov3.data.sources.listing import Indexed
from dinov3.data.transforms.inputs import LVD_MEAN, LVD_STD, cropped, normalised, to_pixels
from dinov3.errors import DinoError, ImageError, WeightsError, require
from dinov3.features import run
from dinov3.hub import foreign, load
from dinov3.losses import LossTerms, resize_patches
from dinov3.threads import prefetched
from dinov3.weights import catalog
from dinov3.weights.identity import fingerprint

Triple = tuple[float, float, float]


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
class TeacherSpec:
    """A parsed teacher spec; nothing is opened."""

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

    @classmethod
    def parse(cls, spec: str) -> TeacherSpec:
        """Raises `UnknownName` for a kind or an option that does not exist, `DinoError` for a value of the wrong type."""
        kind, what, options = foreign.parse(spec, KINDS, _OPTIONS)
        return cls(kind, what, **options)


def _truth(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError(text)
    return text.lower() == "true"


def _share(text: str) -> float:
    if not 0 < float(text) <= 1:
        raise ValueError(text)
    return float(text)


_OPTIONS: dict[str, Callable[[str], Any]] = {
    "layer": int, "normed": _truth, "side": int, "views": int, "checkpoint": str, "online": _truth, "share": _share,
    "cls": float, "patches": float, "logits": float, "relations": float,
}  # fmt: skip


class Teacher:
    """A frozen network, and the function from its input to targets. `id` names the weights and what is taken from them."""

    def __init__(
        self,
        spec: TeacherSpec,
        network: nn.Module,
        forward: Callable[[Tensor], Targets],
        *,
        patch: int | None,
        mean: Triple = LVD_MEAN,
        std: Triple = LVD_STD,
    ) -> None:
        self.spec, self.network, self.forward = spec, network.eval().requires_grad_(False), forward
        self.patch, self.mean, self.std = patch, mean, std
        self.id = f"{spec.kind}-{fingerprint(network)}-layer{spec.layer}" + ("" if spec.normed else "-prenorm")

    def side(self, grid: int) -> int:
        """Pixels of its input for a student's grid of grid × grid patches."""
        if self.patch is not None and self.spec.side is None:
            return grid * self.patch
        return self.spec.side or 16 * grid

    @torch.inference_mode()
    def __call__(self, pixels: Tensor, *, bf16: bool = False) -> Targets:
        """uint8 [B, 3, side, side] → targets in float32."""
        weight = next(self.network.parameters())
        x = normalised(pixels.to(weight.device), self.mean, self.std).to(weight.dtype)
        with torch.autocast(weight.device.type, torch.bfloat16, enabled=bf16):
            targets = self.forward(x)
        return Targets(**{name: value.float() for name, value in targets.fields().items()})


# ---- the kinds ------------------------------------------------------------------------------------------------------


def open_teacher(spec: str | TeacherSpec, *, device: str | torch.device = "cpu") -> Teacher:
    """The teacher of a spec, on a device. Raises `DinoError` where it cannot be opened."""
    parsed = TeacherSpec.parse(spec) if isinstance(spec, str) else spec
    teacher = KINDS[parsed.kind](parsed)
    teacher.network.to(device)
    return teacher


def _backbone(spec: TeacherSpec) -> Teacher:
    try:
        if spec.kind != "dinov3":
            network: Any = load(f"{spec.kind}:{spec.what}")
        elif spec.what.lower() in catalog.aliases():
            network = load(spec.what)
        else:
            network = load(weights=spec.what)
    except WeightsError as error:
        raise type(error)(f"the teacher {spec.kind}:{spec.what} cannot be opened: {error}") from None
    if spec.layer not in range(-network.n_blocks, network.n_blocks):
        raise DinoError(f"layer {spec.layer} does not exist: {spec.what} has {network.n_blocks} blocks")

    def forward(x: Tensor) -> Targets:
        out = run(network, x, layer=spec.layer, norm=spec.normed)
        return Targets(out["cls"], out["patches"])

    return Teacher(spec, network, forward, patch=network.stride, mean=network.origin.mean, std=network.origin.std)


def _timm(spec: TeacherSpec) -> Teacher:
    """A timm model with its classifier; convolutional ones too, whose patches are their last map."""
    network = foreign.create_timm(spec.what, spec.checkpoint)
    config = network.pretrained_cfg
    patch = int(network.patch_embed.patch_size[0]) if hasattr(network, "num_prefix_tokens") else None

    def forward(x: Tensor) -> Targets:
        maps = network.forward_features(x)  # [B, N, D], or [B, D, h, w]
        pooled = network.forward_head(maps, pre_logits=True)
        logits = network.forward_head(maps) if network.num_classes else None
        if patch is None:
            return Targets(pooled, maps.permute(0, 2, 3, 1) if maps.ndim == 4 else None, logits)
        h, w = x.shape[-2] // patch, x.shape[-1] // patch
        return Targets(pooled, maps[:, network.num_prefix_tokens :].unflatten(1, (h, w)), logits)

    return Teacher(spec, network, forward, patch=patch, mean=tuple(config["mean"]), std=tuple(config["std"]))


KINDS: dict[str, Callable[[TeacherSpec], Teacher]] = {"dinov3": _backbone, "transformers": _backbone, "timm": _timm}


# ---- the images both of them see --------------------------------------------------------------------------------------


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
        box = draw_box(image.shape[2], image.shape[1], self.scale, generator(self.seed, view, index))
        return cropped(image, box, side).contiguous()


class Images:
    """A source's images by number, decoded at need. One that cannot be read is replaced by the next that can."""

    def __init__(self, source: Indexed, *, target_short_side: int = 256, keep: bool = False, workers: int = 0) -> None:
        self.source, self.workers = source, workers  # threads that decode; 0: the caller's
        self.cached: dict[int, Tensor] | None = {} if keep else None
        self.target_short_side = target_short_side
        self.unreadable: dict[str, str] = {}
        if not len(source):
            raise DinoError(f"{source.name} holds no images")

    def __len__(self) -> int:
        return len(self.source)

    @property
    def id(self) -> str:
        """Of names and stamps: looks at every file."""
        digest = hashlib.sha256("\n".join(f"{Path(i.path).name} {i.stamp}" for i in self.source).encode())
        return digest.hexdigest()[:12]

    def __getitem__(self, index: int) -> Tensor:
        """uint8 [3, H, W]."""
        if self.cached is None:
            return self._decoded(index)
        if index not in self.cached:
            self.cached[index] = self._decoded(index)
        return self.cached[index]

    def _decoded(self, index: int) -> Tensor:
        for step in range(len(self)):
            number = (index + step) % len(self)
            try:
                data = self.source.place_of(number).read()
                return to_pixels(open_image(data, target_short_side=self.target_short_side).image)
            except ImageError as error:
                self.unreadable[self.source.path_of(number)] = str(error)
        raise DinoError(f"none of the {len(self)} images can be read; the first: {self.source.path_of(0)}")

    def views(self, views: Views, indices: np.ndarray, view: int, side: int) -> Tensor:
        """uint8 [B, 3, side, side]."""

        def cut(index: int) -> Tensor:
            return views.cut(self[index], index, view, side)

        return torch.stack(list(prefetched(cut, indices.tolist(), self.workers)))


# ---- the cache -------------------------------------------------------------------------------------------------------

SHARD = 256  # images a file


class TargetCache:
    """One teacher's outputs for every view of every image: float16 shards in a folder named by all that decides them.

    `fill` computes what is missing, shard by shard; a shard appears whole or not at all, so it can be killed and run
    again. `read` gives the targets of some images in one view. float16 keeps 11 bits: relative 5e-4.
    """

    def __init__(self, folder: Path, teacher: Teacher, views: Views, images: Images, grid: int) -> None:
        self.teacher, self.views, self.images, self.grid = teacher, views, images, grid
        name = f"{teacher.id}-{teacher.side(grid)}px-{views.id}-{images.id}"
        self.folder = Path(folder) / name
        self.count = min(views.count, teacher.spec.views or views.count)
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

    def fill(self, *, bf16: bool = False, batch: int = 64, log: Callable[[str], None] = lambda text: None) -> int:
        """Computes the missing shards, each process its share; how many there were for this one."""
        from dinov3.weights.writing import write_safetensors

        missing = distributed.share(distributed.broadcast_object(list(self.missing())))
        for done, (view, number) in enumerate(missing):
            everything = np.arange(number * SHARD, min((number + 1) * SHARD, len(self.images)))
            parts: dict[str, list[Tensor]] = {}
            for indices in np.split(everything, range(batch, len(everything), batch)):
                pixels = self.images.views(self.views, indices, view, self.teacher.side(self.grid))
                for name, value in self.stored(self.teacher(pixels, bf16=bf16)).fields().items():
                    parts.setdefault(name, []).append(value.half().cpu())
            write_safetensors({k: torch.cat(v) for k, v in parts.items()}, self._shard(view, number))
            log(f"{self.teacher.id}: view {view}, shard {number} ({done + 1} of {len(missing)} missing ones)")
        distributed.barrier()
        return len(missing)

    def stored(self, targets: Targets) -> Targets:
        """Only what has a weight is stored."""
        spec = self.teacher.spec
        return replace(
            targets, patches=targets.patches if spec.patches else None, logits=targets.logits if spec.logits else None
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
    """The same without a disk: the teacher processes every view at need, or the student's own pixels."""

    def __init__(self, teacher: Teacher, views: Views, images: Images, grid: int, *, bf16: bool = False) -> None:
        self.teacher, self.views, self.images, self.grid, self.bf16 = teacher, views, images, grid, bf16
        self.sees_students_pixels = teacher.spec.online

    def __contains__(self, view: int) -> bool:
        return True

    def forward(self, pixels: Tensor) -> Targets:
        """uint8 [B, 3, side, side] → targets."""
        return self.teacher(pixels, bf16=self.bf16)

    def read(self, indices: np.ndarray, view: int) -> Targets:
        pixels = self.images.views(self.views, indices, view, self.teacher.side(self.grid))
        parts = [self.forward(some).fields() for some in pixels.split(64)]
        return Targets(**{name: torch.cat([p[name] for p in parts]) for name in parts[0]})


# ---- projectors ------------------------------------------------------------------------------------------------------
# Projections of a student's tokens to a teacher's widths, standardised targets, and the terms of the loss.
#
# Legend: B images, H × W student patches, d student's width, D a teacher's width, K classes.


class Standardised(nn.Module):
    """Targets minus their mean, over their spread, per dimension: without it the strongest dimensions are all there is."""

    def __init__(self, sample: Tensor) -> None:
        super().__init__()
        rows = sample.flatten(0, -2)
        self.mean: Tensor
        self.spread: Tensor
        self.register_buffer("mean", rows.mean(0))
        self.register_buffer("spread", rows.std(0).clamp_min(1e-3))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.spread


class Projector(nn.Module):
    """Linear projections of the student's tokens to one teacher's widths, and the scale of that teacher's targets."""

    def __init__(self, teacher: Teacher, width: int, sample: Targets) -> None:
        super().__init__()
        self.spec = teacher.spec
        self.scale_cls = Standardised(sample.cls)
        self.cls = nn.Linear(width, sample.cls.shape[-1])
        if sample.patches is not None and self.spec.patches:
            self.scale_patches = Standardised(sample.patches)
            self.patches = nn.Linear(width, sample.patches.shape[-1])
        if sample.logits is not None and self.spec.logits:
            self.logits = nn.Linear(width, sample.logits.shape[-1])

    @torch.no_grad()
    def fit(self, cls: Tensor, patches: Tensor, sample: Targets) -> None:
        """Initialises the projections by ridge regression on the student's present output: random ones would teach it noise.

        A frozen projection stays as it is, and so does every one where the output is the same for all images.
        """
        for name, x, targets in (
            ("cls", cls, self.scale_cls(sample.cls)),
            ("patches", patches.flatten(0, 2), sample.patches),
            ("logits", cls, sample.logits),
        ):
            layer = getattr(self, name, None)
            if layer is None or targets is None or not layer.weight.requires_grad:
                continue
            if x.var(0).mean() < 1e-2 * x.square().mean():
                continue  # the same for all images, as CLS before any training: a fit would magnify the noise in it
            if name == "patches":
                targets = self.scale_patches(resized_grid(targets, (patches.shape[1], patches.shape[2]))).flatten(0, 2)
            weight, bias = ridge(x.float(), targets.float(), strength=1e-2)
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)

    def terms(self, terms: LossTerms, name: str, cls: Tensor, patches: Tensor, targets: Targets) -> None:
        """Adds this teacher's terms. cls [B, d] and patches [B, H, W, d] of the student, targets of the first images."""
        cls, patches = cls[: len(targets.cls)], patches[: len(targets.cls)]
        wanted = self.scale_cls(targets.cls)
        if self.spec.cls:
            terms.add(f"{name}/cls", self.spec.cls, difference(self.cls(cls), wanted))
        if self.spec.relations:
            together = distributed.all_gather_with_gradient(cls), distributed.all_gather(wanted, equal=True)
            terms.add(f"{name}/relations", self.spec.relations, relations_loss(*together))
        if self.spec.patches and targets.patches is not None:
            grid = resized_grid(targets.patches, (patches.shape[1], patches.shape[2]))
            terms.add(f"{name}/patches", self.spec.patches, difference(self.patches(patches), self.scale_patches(grid)))
        if self.spec.logits and targets.logits is not None:
            terms.add(f"{name}/logits", self.spec.logits, softened_kl(self.logits(cls), targets.logits))


def ridge(x: Tensor, y: Tensor, weight: Tensor | None = None, strength: float = 1e-3) -> tuple[Tensor, Tensor]:
    """(W, b) with y ≈ x Wᵀ + b, each row counted `weight` times; `strength` is relative to the mean variance of x."""
    w = x.new_ones(len(x), 1) if weight is None else weight.reshape(-1, 1) / weight.mean()
    mean_x, mean_y = (w * x).mean(0), (w * y).mean(0)
    xc, yc = x - mean_x, y - mean_y
    gram = (xc.T @ (w * xc)).double()
    gram += torch.eye(len(gram), dtype=torch.double, device=x.device) * strength * gram.diagonal().mean()
    W = torch.linalg.solve(gram, (xc.T @ (w * yc)).double()).T.float()
    return W, mean_y - W @ mean_x


def resized_grid(patches: Tensor, to_hw: tuple[int, int]) -> Tensor:
    """[B, h, w, D] → [B, H, W, D]."""
    if tuple(patches.shape[1:3]) == to_hw:
        return patches
    smaller = resize_patches(patches.flatten(1, 2), to_hw, from_hw=(patches.shape[1], patches.shape[2]))
    return smaller.unflatten(1, to_hw)


def difference(x: Tensor, target: Tensor) -> Tensor:
    """0.9 · (1 − cosine) + 0.1 · smooth L1, mean over all rows [..., D]."""
    x, target = x.float(), target.float()
    return 0.9 * (1 - F.cosine_similarity(x, target, dim=-1)).mean() + 0.1 * F.smooth_l1_loss(x, target)


def softened_kl(x: Tensor, target: Tensor, temperature: float = 2.0) -> Tensor:
    """KL(teacher ‖ student) of logits [B, K] at a temperature T, times T² (Hinton et al., arXiv 1503.02531)."""
    p = F.log_softmax(target.float() / temperature, -1)
    q = F.log_softmax(x.float() / temperature, -1)
    return F.kl_div(q, p, reduction="batchmean", log_target=True) * temperature**2


def relations_loss(x: Tensor, target: Tensor, temperature: float = 0.1) -> Tensor:
    """KL between whom the teacher and whom the student finds alike within the batch; x [B, d], target [B, D]."""
    itself = torch.eye(len(x), dtype=torch.bool, device=x.device)

    def rows(z: Tensor) -> Tensor:
        z = F.normalize(z.float(), dim=-1)
        return F.log_softmax((z @ z.T / temperature).masked_fill(itself, -1e4), dim=-1)

    return F.kl_div(rows(x), rows(target), reduction="batchmean", log_target=True)
