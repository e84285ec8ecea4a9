"""What a training step needs, before it is run: memory by part, operations, and from them hours on a device.

    need = step(config, world=1)        # Need: bytes by part at the peak, floating-point operations
    need.bytes, need.flops

Nothing here estimates a network by a formula. One step of the real method (targets, predict, backward, as in `train.loop`)
runs on the meta device, where tensors have shapes and no values; every storage that the step creates is counted while it
lives, and every matrix product by torch's own formulas. So drop path, crops, masks, prototypes, Gram anchoring,
checkpointing, accumulation and recomputation are in: they happen. Added by rule: AdamW's two moments, what other ranks hold
taken out, the memory of the process itself.

Not in: scratch memory of kernels, fragmentation of a GPU's allocator, the k-NN evaluation, what compilation saves.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dinov3 import losses
from dinov3.config.loading import to_dict
from dinov3.config.train import SIZES_OF_THE_NAME, Resolution, TrainConfig, check_scale, load_config, resolutions
from dinov3.data.crops import CropBatch, MaskConfig, mask_grid, masked_counts
from dinov3.errors import DinoError, did_you_mean, require
from dinov3.files import atomically
from dinov3.inference.linear import arithmetic_of
from dinov3.models import vit
from dinov3.models.architectures import PUBLISHED
from dinov3.optim import StepValues, build_schedules, matrices_of
from dinov3.parallel import DTYPES, KEPT_BYTES, checkpoint_activations, units
from dinov3.train.method import Network, SelfDistillation, build_network, copy_weights
from dinov3.weights.catalog import resolve

PROCESS_BYTES = 360_000_000  # a CPU's: Python, torch and what training imports; Linux x86, torch 2.13
HEAP = 1.15  # what glibc's heap takes for activations and gradients that come and go, times their bytes
PARTS = ("student", "average", "Gram teacher", "AdamW", "gradients", "half-precision weights", "activations")


@dataclass(frozen=True)
class Need:
    """What one process needs in a step."""

    parts: dict[str, int]  # bytes at the peak, by PARTS
    flops: float  # of a step: forward of teacher and student, backward, recomputation; all accumulated batches
    images: int  # that a process takes in a step
    saved: int  # bytes of what a checkpoint copies while training goes on

    @property
    def bytes(self) -> int:
        """Of all tensors at the step's peak; without the process itself."""
        return sum(self.parts.values())

    @property
    def on_cpu(self) -> int:
        """The same with what the heap of a CPU process holds back."""
        return self.bytes + round((HEAP - 1) * (self.parts["activations"] + self.parts["gradients"]))


class Live(TorchDispatchMode):
    """Bytes of all storages alive, their peak, and what lives at it; floating-point operations of what ran."""

    def __init__(self) -> None:
        from torch.utils.flop_counter import flop_registry

        super().__init__()
        aten: Any = torch.ops.aten
        self.formulas = dict(flop_registry)
        for end in ("", "_backward"):
            fused, on_cpu = (f"_scaled_dot_product_flash_attention{name}{end}" for name in ("", "_for_cpu"))
            self.formulas[getattr(aten, on_cpu)] = flop_registry[getattr(aten, fused)]
        self.now = self.peak = 0
        self.flops = 0.0
        self.sizes: dict[int, int] = {}  # storage → bytes
        self.names: dict[int, str] = {}  # storage → part, where it is not an activation
        self.named = dict.fromkeys(PARTS[:-1], 0)  # bytes alive of each part
        self.at_peak: dict[str, int] = {}
        self.moments: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in [out] if isinstance(out, Tensor) else tree_leaves(out):
            if isinstance(x, Tensor):
                self._add(x)
        formula = self.formulas.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        return out

    def _add(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            weakref.finalize(storage, self._drop, key)
            self._grow(self.sizes[key])

    def _grow(self, n: int) -> None:
        self.now += n
        if self.now > self.peak:
            self.peak, self.at_peak = self.now, dict(self.named)

    def _drop(self, key: int) -> None:
        n = self.sizes.pop(key)
        self.now -= n
        part = self.names.pop(key, None)
        if part is not None:
            self.named[part] -= n

    def name(self, x: Tensor, part: str, share: int = 1) -> None:
        """Puts a tensor down as of `part`; of several ranks' tensor only one's share is counted."""
        key = x.untyped_storage()._cdata
        if key in self.names:
            return
        kept = -(-self.sizes[key] // share)
        self.now += kept - self.sizes[key]
        self.named[part] += kept
        self.sizes[key], self.names[key] = kept, part

    def parts(self) -> dict[str, int]:
        """What was alive at the peak."""
        return self.at_peak | {"activations": self.peak - sum(self.at_peak.values())}


class _Gathered(nn.Module):
    """The copy of a weight that a step computes with, as sharding makes it; its gradient comes back in float32."""

    def __init__(self, dtype: torch.dtype, live: Live) -> None:
        super().__init__()
        self.dtype, self.live = dtype, live

    def forward(self, x: Tensor) -> Tensor:
        copy = x.to(self.dtype, copy=True)
        self.live.name(copy, "half-precision weights")
        return copy


# ---- one step ---------------------------------------------------------------------------------------------------------


def step(config: TrainConfig, *, world: int = 1, card: bool = False) -> Need:
    """What each of `world` processes needs in a step of `config`: of several resolutions the one that needs most.

    `card`: on a GPU, where attention in half precision is fused and losses take more rows at a time. Raises `DinoError`
    for runs of several students or with a teacher of its own.
    """
    if config.distillation.enabled or config.multidistillation.enabled:
        raise DinoError("a plan is for self-distillation: leave distillation and multidistillation off")
    rows = resolutions(config.crops)
    needs = [_step(config, row, world, card) for row in rows]
    most = max(needs, key=lambda need: need.bytes)
    return replace(most, flops=sum(row.ratio * need.flops for row, need in zip(rows, needs)))


def _step(config: TrainConfig, row: Resolution, world: int, card: bool) -> Need:
    c, n = config, config.optim.accumulation_steps
    dtype = DTYPES[c.compute_precision.param_dtype]
    own_gram = c.gram.use_loss and not c.gram.ema_teacher
    values = build_schedules(c, world).at(c.iterations - 1)
    values = replace(values, gram_loss_weight=1.0 if c.gram.use_loss else 0.0)
    live = Live()
    with _as_on_device(card, dtype), torch.device("meta"), live:
        names = {"student": "student", "average": "ema"} | ({"Gram teacher": "gram_teacher"} if own_gram else {})
        networks: dict[str, Any] = {key: build_network(c, heads=part != "Gram teacher") for part, key in names.items()}
        if c.teacher.ema == "heads":
            networks["ema"] = build_network(c, backbone=networks["student"].backbone)
        count = {key: _place(live, networks[key], part, world) for part, key in names.items()}
        _moments(live, networks["student"], world, muon=c.optim.optimizer == "muon", accumulated=n > 1)
        if c.train.checkpointing or c.train.checkpointing_full:
            checkpoint_activations(networks["student"].backbone, selective=not c.train.checkpointing_full)
        if world > 1 or dtype != torch.float32:
            for network in networks.values():
                _gather(live, network, dtype)
        method = SelfDistillation(
            **networks, dino=c.dino, ibot=c.ibot, gram=c.gram, teacher_scale=c.crops.teacher_to_student_resolution_scale
        )
        live.flops = 0.0
        # the loader's: this one, on a GPU also the next
        waiting = [_batch(c, row, torch.uint8) for _ in range(1 + card)]
        _gradients(method, c, row, dtype, values, min(n, 2))  # the third batch is like the second
        del waiting
    parts = live.parts()
    whole = count["student"] * dtype.itemsize
    if world > 1 and whole > KEPT_BYTES:  # gathered again in the backward pass, a unit or two at a time
        held = 2 * max(sum(p.numel() for p in m.parameters()) for u in units(networks["student"].backbone) for m in u)
        parts["half-precision weights"] = min(parts["half-precision weights"], held * dtype.itemsize)
    saved = 4 * (3 * count["student"] + count["ema"] + count.get("gram_teacher", 0)) // world
    return Need(parts, live.flops * n / min(n, 2), c.train.batch_size_per_gpu * n, saved)


@contextlib.contextmanager
def _as_on_device(card: bool, dtype: torch.dtype) -> Iterator[None]:
    """What depends on the device, on the meta device: rows that losses take at a time (on a CPU at least 4 MB, which is
    nothing and runs sooner), and what attention keeps for the backward pass."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if card or dtype != torch.bfloat16 or not q.requires_grad:
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0]
        return (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).softmax(-1) @ v

    before, vit.attend = vit.attend, attend
    losses.CHUNK["meta"] = losses.CHUNK["cuda"] if card else max(losses.CHUNK["cpu"], 2**20)
    try:
        yield
    finally:
        vit.attend = before
        del losses.CHUNK["meta"]


def _place(live: Live, network: Network, part: str, world: int) -> int:
    """Puts a network's tensors down as of `part`; how many parameters it has."""
    for x in [*network.parameters(), *network.buffers()]:
        live.name(x, part, world)
    return sum(p.numel() for p in network.parameters())


def _moments(live: Live, student: Network, world: int, *, muon: bool, accumulated: bool) -> None:
    """AdamW's two moments, or Muon's one of a matrix, of the second step on; gradients are put down when they arrive."""
    share = 1 if accumulated else world  # those of several batches are added up whole

    def arrived(p: Tensor) -> None:
        assert p.grad is not None
        live.name(p.grad, "gradients", share)

    for name, p in student.named_parameters():
        part, _, rest = name.partition(".")
        for _ in range(1 if muon and matrices_of(part, rest, p) else 2):
            moment = torch.empty_like(p)
            live.name(moment, "AdamW", world)
            live.moments.append(moment)
        p.register_post_accumulate_grad_hook(arrived)


def _gather(live: Live, network: Network, dtype: torch.dtype) -> None:
    own = [m for m in network.modules() if not isinstance(m, (_Gathered, parametrize.ParametrizationList))]
    for module in own:
        for name in [name for name, _ in module.named_parameters(recurse=False)]:
            parametrize.register_parametrization(module, name, _Gathered(dtype, live), unsafe=True)


def _batch(c: TrainConfig, row: Resolution, dtype: torch.dtype) -> CropBatch:
    """A batch of crops with as many masked patches as the loader masks."""
    B, channels = c.train.batch_size_per_gpu, c.student.in_chans
    masks = MaskConfig(c.ibot.mask_sample_probability, c.ibot.mask_ratio_min_max)
    h, w = mask_grid(row.global_px, c.student.patch_size, c.crops.teacher_to_student_resolution_scale)
    masked = sum(masked_counts(2 * B, h * w, masks))

    def crops(n: int, side: int) -> Tensor:
        return torch.zeros(n * B, channels, side, side, dtype=dtype)

    return CropBatch(
        global_crops=crops(2, row.global_px),
        local_crops=crops(c.crops.local_crops_number, row.local_px),
        gram_crops=crops(2, row.gram_px) if row.gram_px and c.gram.use_loss and not c.gram.ema_teacher else None,
        masks=torch.zeros(2 * B, h * w, dtype=torch.bool),
        mask_indices=torch.zeros(masked, dtype=torch.int64),
        masks_weight=torch.ones(masked),
        n_masked=masked,
    )


def _gradients(
    method: SelfDistillation, c: TrainConfig, row: Resolution, dtype: torch.dtype, values: StepValues, n: int
) -> None:
    """`train.loop.gradients`, statement by statement: what is alive beside what decides the peak."""
    for _ in range(n):
        batch = _batch(c, row, dtype)
        with parametrize.cached():  # a network that runs forward only gives its copies back, a trained one keeps them
            targets = method.targets(batch, values)
        with parametrize.cached():
            terms = method.predict(batch, targets, values)
            (terms.total() / n).backward()


# ---- devices ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Card:
    """A GPU: memory in GiB, and dense bfloat16 FLOP/s that its maker states, in 1e12."""

    memory: float
    tflops: float


CARDS: dict[str, Card] = {
    "l4": Card(24, 121), "a10": Card(24, 125), "3090": Card(24, 71), "4090": Card(24, 165), "5090": Card(32, 210),
    "a100-40gb": Card(40, 312), "a6000": Card(48, 155), "l40s": Card(48, 362), "a100": Card(80, 312),
    "h100": Card(80, 989), "h200": Card(141, 989), "b200": Card(180, 2250),
}  # fmt: skip
# Shares of that which are reached. The published ViT-L/16 recipe (vitl_im1k_lin834.yaml) took 125,000 steps of 64 images on
# each of its H100s in 14 hours: 159 images/s of 1.154e12 operations, as `step` counts them, are 18.5 %.
TRAINING = 0.185
# Compiled forward passes at 256 px on an RTX 4090, in timm's tables: 5,530, 2,027, 662 and 275 images/s. No training was
# measured to reach it.
FORWARD = {"vit_small": 0.42, "vit_base": 0.58, "vit_large": 0.66, "vit_huge2": 0.75}
GIB = 2**30
USABLE = 0.9  # of a device's memory: the rest is the driver's, the allocator's, other programs'


@dataclass(frozen=True)
class Devices:
    """What one trains on."""

    count: int
    bytes: int  # of one device's memory
    card: str | None  # a name of CARDS; None: a GPU known by its memory alone, or the CPU
    cpu: bool

    @property
    def usable(self) -> int:
        return round(USABLE * self.bytes)


def devices(text: str) -> Devices:
    """`cpu`, `cpu:16GB`, `24GB`, `1x24GB`, `h100`, `8xh100`. Raises `DinoError` with suggestions."""
    text = text.lower().strip()
    cpu = re.fullmatch(r"cpu(?::(\d+(?:\.\d+)?)\s*gi?b?)?", text)
    if cpu:
        return Devices(1, round(float(cpu[1]) * GIB) if cpu[1] else physical_memory(), None, True)
    several = re.fullmatch(r"(\d+)\s*[x×*]\s*(.+)", text)
    count, what = (several[1], several[2]) if several else ("1", text)
    if not int(count):
        raise DinoError("0 GPUs train nothing; write --gpus 1x24GB, or --gpus cpu")
    size = re.fullmatch(r"(\d+(?:\.\d+)?)\s*gi?b?", what) if what not in CARDS else None
    if size:
        return Devices(int(count), round(float(size[1]) * GIB), None, False)
    name = re.sub(r"nvidia|geforce|rtx|[\s_]+", "", what)
    if name not in CARDS:
        near = did_you_mean(name, CARDS)
        raise DinoError(
            f"no card is called {what!r}{near} (there are {', '.join(CARDS)}); or write its memory, as in 1x24GB"
        )
    return Devices(int(count), round(CARDS[name].memory * GIB), name, False)


def physical_memory() -> int:
    """Bytes of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def images_per_second(config: TrainConfig, *, seconds: float = 3.0, most: int = 8) -> float:
    """Measured here: steps on the CPU with blank crops, `most` images at a time, for about so many seconds after a first."""
    batch, dtype = min(config.train.batch_size_per_gpu, most), DTYPES[config.compute_precision.param_dtype]
    c = replace(config, train=replace(config.train, batch_size_per_gpu=batch))
    row, values = resolutions(c.crops)[0], build_schedules(c, 1).at(0)
    student, ema = build_network(c), build_network(c)
    student.init_weights()
    copy_weights(ema, student)
    gram = replace(c.gram, use_loss=False)
    method = SelfDistillation(student.to(dtype), ema.to(dtype), dino=c.dino, ibot=c.ibot, gram=gram)
    _gradients(method, c, row, dtype, values, 1)  # torch prepares its kernels
    began, done = time.perf_counter(), 0
    while done == 0 or time.perf_counter() - began < seconds:
        _gradients(method, c, row, dtype, values, 1)
        done += batch
    return done / (time.perf_counter() - began)


# ---- a plan -----------------------------------------------------------------------------------------------------------

DROP_PATH = {"vit_tiny": 0.0, "vit_small": 0.1, "vit_base": 0.2}  # 0.3 for larger ones
MODELS = ("vitt16", "vits16", "vitb16", "vitl16")  # of what-if rows, by size
FEWEST = 8  # images a process takes at a time: KoLeo looks for neighbours among them, Sinkhorn balances over them
MORE = 64  # images of the larger of the two batches that are counted for the others
PASSES = 100  # over the images, at most, where a recipe has more steps
LEVELS = ("none", "selective", "full")  # of activation checkpointing


@dataclass(frozen=True)
class Row:
    """A way to train that was considered."""

    what: str  # the model, or the size of global crops
    batch: int  # images of a process at a time
    steps: int  # batches that are accumulated
    checkpointing: str
    bytes: int  # of a device, at the peak
    flops: float  # an image
    fits: bool


@dataclass(frozen=True)
class Speed:
    """What is known of how fast devices are."""

    name: str
    flops: float  # a second, of all devices
    best: float | None  # the same, which a run has not been seen to pass
    source: str


@dataclass(frozen=True)
class Plan:
    config: TrainConfig
    devices: Devices
    need: Need
    row: Row
    rows: list[Row]  # what if; the chosen one is among them
    images: int
    speeds: list[Speed]

    @property
    def batch(self) -> int:
        """Images in a step."""
        return self.need.images * self.devices.count

    @property
    def views(self) -> int:
        """Images in the whole run."""
        return self.batch * self.config.iterations

    def hours(self, speed: float, flops: float | None = None) -> float:
        """Of the run at so many operations a second, were it one of so many an image."""
        return self.views * (flops or self.row.flops) / speed / 3600


def default_model(images: int) -> str:
    """A rule of thumb, not a measurement: larger networks want more images."""
    return "vits16" if images < 1_000_000 else "vitb16" if images < 10_000_000 else "vitl16"


def recipe_of(model: str | None) -> str:
    """The shipped recipe that a plan begins with; None: for a CPU."""
    return "small_cpu.yaml" if model is None else f"{model if model in ('vits16', 'vitb16') else 'vitb16'}_one_gpu.yaml"


class Planner:
    """Looks for the largest batch of a recipe that fits.

    recipe, overrides: as `load_config` takes them; what they say of the batch is that of the whole step. `images`: how many
    there are. `batch`, `steps`: in the place of the recipe's.
    """

    def __init__(
        self, recipe: str, overrides: Sequence[str], on: Devices, images: int, *, batch: int | None, steps: int | None
    ) -> None:
        self.recipe, self.overrides, self.on, self.images = recipe, list(overrides), on, images
        base, _ = load_config(recipe, ["train.dataset_path=.", *self.overrides])
        self.batch = batch or base.train.batch_size_per_gpu * base.optim.accumulation_steps
        if self.batch % on.count:
            raise DinoError(f"a batch of {self.batch} images cannot be split among {on.count} devices; try --batch "
                            f"{-(-self.batch // on.count) * on.count}")  # fmt: skip
        self.steps = steps or min(base.iterations, max(PASSES * images // self.batch, 1))
        self.known: dict[Any, Need] = {}

    def config(self, batch: int, checkpointing: str, given: Sequence[str] = ()) -> TrainConfig:
        """With so many images of a process at a time."""
        own = [
            f"train.batch_size_per_gpu={batch}",
            f"optim.accumulation_steps={self.batch // self.on.count // batch}",
            f"optim.iterations={self.steps}",
            f"train.checkpointing={str(checkpointing == 'selective').lower()}",
            f"train.checkpointing_full={str(checkpointing == 'full').lower()}",
        ]
        config, _ = load_config(self.recipe, ["train.dataset_path=.", *self.overrides, *given, *own])
        check_scale(config, self.on.count)
        return config

    def need(self, batch: int, checkpointing: str, given: Sequence[str] = ()) -> Need:
        key = (batch, checkpointing, *given)
        if key not in self.known:
            config = self.config(batch, checkpointing, given)
            self.known[key] = step(config, world=self.on.count, card=not self.on.cpu)
        return self.known[key]

    def bytes(self, need: Need) -> int:
        """Of a device; on a CPU with the process."""
        return PROCESS_BYTES + need.on_cpu if self.on.cpu else need.bytes

    def batches(self) -> list[int]:
        """How many images a process may take at a time, most first."""
        own = self.batch // self.on.count
        return [own // n for n in range(1, own + 1) if own % n == 0 and (own // n >= min(FEWEST, own))]

    def row(self, what: str, batch: int, checkpointing: str, given: Sequence[str] = (), *, exact: bool = False) -> Row:
        """`exact` counts this batch. Else memory is a straight line through two others, which it is within 1 %."""
        n = self.batch // self.on.count // batch
        fewest, more = self.batches()[-1], max(b for b in self.batches() if b <= MORE or b == self.batches()[-1])
        need = self.need(batch if exact else more, checkpointing, given)
        size = float(self.bytes(need))
        if not exact and more > fewest:
            slope = (size - self.bytes(self.need(fewest, checkpointing, given))) / (more - fewest)
            size += (batch - more) * slope
        copied = need.saved if self.on.cpu else 0  # while a checkpoint is written
        fits = size + copied <= self.on.usable
        return Row(what, batch, n, checkpointing, round(size), need.flops / need.images, fits)

    def best(self, what: str, given: Sequence[str] = ()) -> Row | None:
        """The row with the fewest accumulated batches, then the least recomputation; None if nothing fits."""
        ways = [(batch, level) for batch in self.batches() for level in LEVELS[:2]] + [(self.batches()[-1], "full")]
        for batch, level in ways:
            if self.row(what, batch, level, given).fits:
                row = self.row(what, batch, level, given, exact=True)
                if row.fits:
                    return row
        return None


def plan(
    images: int,
    on: Devices,
    *,
    model: str | None = None,
    recipe: str | None = None,
    overrides: Sequence[str] = (),
    batch: int | None = None,
    steps: int | None = None,
    rate: float | None = None,
    on_progress: Callable[[str], object] = lambda _: None,
) -> Plan:
    """What to train on so many images, and what it takes.

    `model`: by default one that suits the number of images and fits. `recipe`: one's own; only batch, accumulation and
    checkpointing are chosen then. `batch`: images in a step. `rate`: images a second that were measured. Raises `DinoError`
    where nothing fits, with what would help.
    """
    overrides = list(overrides)
    if on.cpu:
        overrides.append("run.device=cpu")
        if arithmetic_of("bf16", torch.device("cpu")) != "bf16":
            overrides.append("compute_precision.param_dtype=fp32")  # a CPU without bfloat16 units is slower with it
    names = [model] if model or recipe or on.cpu else list(reversed(MODELS[: MODELS.index(default_model(images)) + 1]))
    for name in names:
        chosen = recipe or recipe_of(None if on.cpu else name)
        given = student_of(name) if name else []
        p = Planner(chosen, [*given, *overrides], on, images, batch=batch, steps=steps)
        what = name or p.config(p.batches()[-1], "none").student.arch
        on_progress(f"counting a step of {what}")
        row = p.best(what)
        if row is not None:
            break
    else:
        raise DinoError(too_large(p, what))
    if name and not on.cpu and not recipe and name in MODELS:
        at = MODELS.index(name)
        others = [(other, student_of(other)) for other in MODELS[max(at - 1, 0) : at + 2] if other != name]
    else:
        others = crop_sizes(p.config(row.batch, row.checkpointing))
    on_progress("counting " + ", ".join(other for other, _ in others))
    need = p.need(row.batch, row.checkpointing)
    batches = [b for b in p.batches() if b <= 2 * row.batch][:4]
    rows = [p.row(what, b, level) for level in dict.fromkeys([*LEVELS[:2], row.checkpointing]) for b in batches]
    rows += [p.row(other, b, row.checkpointing, own) for other, own in others for b in batches[:3]]
    rows = [row if (r.what, r.batch, r.checkpointing) == (what, row.batch, row.checkpointing) else r for r in rows]
    config = p.config(row.batch, row.checkpointing)
    speeds = known_speeds(on, need, config.student.arch, rate)
    if on.cpu and rate is None:
        on_progress("measuring this machine")
        measured = images_per_second(config) * row.flops
        speeds = [
            Speed("this machine", measured, None, f"measured for a few seconds, threads: {torch.get_num_threads()}")
        ]
    return Plan(config, on, need, row, rows, images, speeds)


def student_of(model: str) -> list[str]:
    """Overrides of a recipe for another model, whatever sizes the recipe sets itself (small_cpu: a depth)."""
    arch = model if model.startswith(("vit_", "convnext_")) else resolve(model)[0].arch
    size = PUBLISHED[arch][0] if arch in PUBLISHED else arch
    chosen = [f"student.arch={size}", f"student.drop_path_rate={DROP_PATH.get(size, 0.3)}"]
    chosen += [f"student.{key}={value}" for key, value in PUBLISHED[arch][1].items()] if arch in PUBLISHED else []
    if size.startswith("convnext"):
        chosen.append("student.patch_size=32")
    return chosen + SIZES_OF_THE_NAME


def crop_sizes(config: TrainConfig) -> list[tuple[str, list[str]]]:
    """Global crops of two thirds and three halves of the size, for one resolution."""
    size = config.crops.global_crops_size
    unit = round(config.student.patch_size * config.crops.teacher_to_student_resolution_scale)
    if not isinstance(size, int) or config.crops.gram_teacher_crops_size is not None:
        return []
    sizes = {max(round(size * share / unit), 1) * unit for share in (2 / 3, 3 / 2)} - {size}
    return [(f"{n} px", [f"crops.global_crops_size={n}"]) for n in sorted(sizes)]


def too_large(p: Planner, what: str) -> str:
    need = p.bytes(p.need(p.batches()[-1], "full"))
    smaller = MODELS[max(MODELS.index(what) - 1, 0)] if what in MODELS else "vits16"
    return (
        f"{what} does not fit: {p.batches()[-1]} images at a time with full checkpointing need {need / 1e9:.1f} GB and "
        f"{p.on.usable / 1e9:.1f} of {p.on.bytes / 1e9:.1f} GB are counted on. A smaller model (--model {smaller}), fewer "
        "prototypes (dino.head_n_prototypes=16384 ibot.head_n_prototypes=16384), smaller crops (crops.global_crops_size=160) "
        "or a smaller --batch would help" + (", and so would more devices" if not p.on.cpu else "")
    )


def known_speeds(on: Devices, need: Need, arch: str, rate: float | None) -> list[Speed]:
    """Of a card by name, or of the cards with that memory; a measured rate in their place."""
    if rate is not None:
        return [Speed("measured", rate * need.flops / need.images, None, f"{rate:g} images/s, as given")]
    found = [on.card] if on.card else [n for n, c in CARDS.items() if c.memory * GIB == on.bytes and not on.cpu]
    source = (
        f"an estimate: {TRAINING:.1%} of the maker's bfloat16 figure, as the published ViT-L recipe on H100; at least: as "
        "compiled forward passes on RTX 4090"
    )
    stated = {name: CARDS[name].tflops * 1e12 * on.count for name in found}
    return [Speed(n, TRAINING * f, FORWARD.get(arch, 0.66) * f, source) for n, f in stated.items()]


# ---- the recipe -------------------------------------------------------------------------------------------------------


def differences(config: TrainConfig) -> dict[str, Any]:
    """What a configuration has that the defaults have not; without data and folders, which a command names."""

    def unlike(own: Any, default: Any) -> Any:
        if not isinstance(own, dict) or not isinstance(default, dict):
            return own
        parts = {key: unlike(value, default[key]) for key, value in own.items() if value != default[key]}
        return {key: value for key, value in parts.items() if value != {}}

    found = unlike(to_dict(config), to_dict(TrainConfig()))
    for key in ("dataset_path", "output_dir"):
        found.get("train", {}).pop(key, None)
    return found


def lines(made: Plan) -> list[str]:
    """The plan in words, a line a subject."""
    c, on, need = made.config, made.devices, made.need
    crops, accumulated = c.crops, made.row.steps
    peak = build_schedules(c, on.count).lr
    highest = max(peak(it) for it in range(0, c.iterations, max(c.iterations // 100, 1)))
    device = (
        ("the CPU" if on.cpu else on.card or f"a GPU of {on.bytes / GIB:g} GiB")
        if on.count == 1
        else (f"{on.count} × {on.card or f'{on.bytes / GIB:g} GiB'}")
    )
    batch = f"{made.batch} images a step" + (
        f": {on.count} × {made.row.batch}" if on.count > 1 or accumulated > 1 else ""
    )
    shares = need.parts | ({"process": PROCESS_BYTES} if on.cpu else {})
    parts = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in shares.items() if size)
    copied = f"; {need.saved / 1e9:.2f} GB more of the machine's memory while a checkpoint is written"
    row, high, low = made.row, crops.global_crops_size, crops.local_crops_size
    scaled = f" (optim.lr {c.optim.lr:g}, scaled by {c.optim.scaling_rule})" if c.optim.lr != highest else ""
    passes = f"{made.views / made.images:.1f} passes over {made.images:,} images"
    effort = f"{row.flops / 1e9:.1f} GFLOP an image and step, {row.flops * made.views / 1e18:.3g} EFLOP in all"
    found = [
        ("Device", f"{device}; {on.usable / 1e9:.1f} of {on.bytes / 1e9:.1f} GB are counted on"),
        ("Model", f"{row.what} ({c.student.arch})"),
        ("Crops", f"2 × {high} px and {crops.local_crops_number} × {low} px an image"),
        ("Batch", batch + (f" × {accumulated} accumulated" if accumulated > 1 else "")),
        ("Recompute", f"activation checkpointing {row.checkpointing}; {c.compute_precision.param_dtype}"),
        ("Heads", f"{c.dino.head_n_prototypes} prototypes for DINO, {c.ibot.head_n_prototypes} for iBOT"),
        ("Rate", f"learning rate {highest:.3g} at its peak{scaled}"),
        ("Steps", f"{c.iterations:,}: {made.views:,} views, {passes}"),
        ("Memory", f"{row.bytes / 1e9:.2f} GB a device at the peak of a step{copied}"),
        ("", parts),
        ("Work", effort),
    ]
    for s in made.speeds:
        least = f" (at least {made.hours(s.best):.3g})" if s.best else ""
        short = f" ({60 * made.hours(s.flops):.0f} min)" if 1 / 60 < made.hours(s.flops) < 1 else ""
        images = f"{s.flops / row.flops:.3g} images/s"
        found.append(("Hours", f"{made.hours(s.flops):.3g}{short} on {s.name}{least}: {images}"))
    unknown = "unknown: name a card (--gpus 4090), or give images/s of benchmarks/accept_gpu.py as --rate"
    found.append(("Source", made.speeds[0].source) if made.speeds else ("Hours", unknown))
    return [f"{name + ':' if name else '':11}{text}" for name, text in found]


def table(made: Plan) -> list[str]:
    """The what-if rows as Markdown."""
    first = made.speeds[0] if made.speeds else None
    heading = f"hours, {first.name}" if first else "EFLOP"
    rows = [
        f"| | batch a device | accumulated | checkpointing | GB | {heading} | fits |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in made.rows:
        work = made.hours(first.flops, r.flops) if first else r.flops * made.views / 1e18
        what = f"{r.what} (the plan)" if r == made.row else r.what
        size, fits = f"{r.bytes / 1e9:.1f}", "yes" if r.fits else "no"
        rows.append(f"| {what} | {r.batch} | {r.steps} | {r.checkpointing} | {size} | {work:.3g} | {fits} |")
    return rows


def write(made: Plan, path: str | os.PathLike[str], data: str) -> None:
    """The plan as a recipe: a header comment, and what differs from the defaults."""
    text = require("omegaconf", "train", "writing recipes").OmegaConf.to_yaml
    header = [f"# A plan of `dinov3 plan` for {made.images:,} images.", "#"]
    header += [f"# {line}" for line in lines(made)]
    header += ["#", f"# Command:   dinov3 train {data} --recipe {os.fspath(path)} --out RUN"]
    with atomically(path) as file:
        file.write_text("\n".join(header) + "\n" + text(differences(made.config)), encoding="utf-8")
