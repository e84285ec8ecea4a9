"""Video classification: an attentive probe on the patches of sixteen frames (paper §6.2.4, Tab. 6: UCF101, SSv2, K400).

Training: frames at random times, one random crop for the whole clip, features of the frozen backbone, and for every
learning rate and weight decay a probe of its own, all on the same features. A tenth of the training videos chooses among
them. Test: sixteen frames from the first to the last, the largest square of the middle; TTA: two interleaved sets of
frames × three squares, class probabilities averaged.

Left out by the paper and chosen here: AdamW's other settings, a cosine to zero without warm-up, no flips (directions are
classes in SSv2).

Legend: B clips, T frames, h×w patch grid, D width, K classes.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from dinov3 import distributed
from dinov3.config.bounds import setting
from dinov3.data.crops import draw_box, generator
from dinov3.data.datasets.video import Clip, Clips, n_frames, read_frames
from dinov3.data.transforms.inputs import standardised
from dinov3.errors import DinoError
from dinov3.eval import session as common
from dinov3.eval.arguments import EvalConfig
from dinov3.eval.session import Session
from dinov3.features import default_preprocessing, layer_numbers, outputs
from dinov3.fit import shuffled
from dinov3.heads.encoder import step_of, widths_of
from dinov3.heads.linear import AttentiveProbe, clip_coordinates
from dinov3.metrics import accuracy
from dinov3.optim import warmup_cosine_v2
from dinov3.runlog import StopRequest, Ticker
from dinov3.threads import prefetched
from dinov3.weights.writing import write_torch

Box = tuple[int, int, int, int]  # left, top, right, bottom
Batch = tuple[Tensor, Tensor, Tensor]  # tokens [B, N, D], coordinates [B, N, 3], labels [B]


@dataclass
class ProbeSection:
    width: int = 1024
    depth: int = 4  # self-attention blocks; one cross-attention block comes after them
    heads: int = 16
    mlp_ratio: float = 4.0


@dataclass
class VideoConfig(EvalConfig):
    POSITIONAL = (("TRAIN", "train"), ("VAL", "val"))

    # a folder of classes of videos (or of folders of frames), or a list of lines "path label"
    train: str = setting("", required="a folder with one sub-folder of videos per class")
    val: str = setting("", required="a folder with one sub-folder of videos per class")
    frames: int = setting(16, at_least=1)
    patches: int = setting(16, at_least=1)  # per side of a frame: 256 px at patch 16, 224 at patch 14
    layer: int = -1
    norm: bool = True
    fps: float = 25.0  # of folders of frames
    probe: ProbeSection = field(default_factory=ProbeSection)
    epochs: int = setting(20, at_least=1)
    batch_size: int = setting(64, at_least=1)  # of all processes
    lrs: list[float] = setting([1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3], required="at least one value")
    weight_decays: list[float] = setting([1e-3, 1e-2, 1e-1], required="at least one value")
    crop_area: list[float] = setting([0.4, 1.0], above=0, at_most=1, rising=True)  # shares of a frame's area
    held_out: float = setting(0.1, above=0, below=1)  # share of the training videos that chooses the probe
    tta: bool = True
    precision: Literal["float32", "bfloat16"] = "float32"  # of the probes
    num_workers: int = 4
    seed: int = 0


# ---- which frames, which pixels -------------------------------------------------------------------------------------


def uniform_frames(n: int, count: int) -> list[int]:
    """`count` frame numbers from the first to the last of n, both included."""
    return np.linspace(0, n - 1, count).round().astype(int).tolist()


def interleaved_frames(n: int, count: int, sets: int = 2) -> list[list[int]]:
    """`sets` lists of `count` frames each that together are evenly spread."""
    every = uniform_frames(n, count * sets)
    return [every[i::sets] for i in range(sets)]


def squares(width: int, height: int) -> list[Box]:
    """The largest squares at the left, in the middle, at the right (or top, middle, bottom of a tall frame)."""
    side = min(width, height)
    rest = max(width, height) - side
    offsets = (0, round(rest / 2), rest)
    if width >= height:
        return [(x, 0, x + side, side) for x in offsets]
    return [(0, y, side, y + side) for y in offsets]


def pixels(clip: Clip, box: Box, side: int) -> Tensor:
    """A clip's frames cut to a box and brought to a square, uint8 [T, 3, side, side]; bilinear, antialiased."""
    small = [np.asarray(f.resize((side, side), Image.Resampling.BILINEAR, box=box)) for f in clip.frames]
    return torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2)


@lru_cache(maxsize=1 << 20)
def _length(path: Path) -> int:
    return n_frames(path)


def check_opens(paths: Sequence[Path], workers: int) -> None:
    """Raises, before anything is computed, for videos that cannot be opened."""

    def wrong(i: int) -> str:
        try:
            return "" if _length(paths[i]) else f"{paths[i]} holds no frame"
        except DinoError as error:
            return str(error)

    mine = list(prefetched(wrong, distributed.share(range(len(paths))), workers, 2 * workers))
    found = [text for texts in distributed.gather_objects(mine) for text in texts if text]
    if found:
        raise DinoError(f"{len(found)} of {len(paths)} videos: {'; '.join(found[:3])}{'; …' * (len(found) > 3)}")


@dataclass(frozen=True)
class Reader:
    """Clips of a list of videos, as functions of their index."""

    clips: Clips
    frames: int
    side: int
    fps: float
    area: tuple[float, float]
    seed: int

    def random(self, index: int, epoch: int) -> tuple[Tensor, Tensor]:
        """(uint8 [T, 3, S, S], seconds [T]): random times and one random crop, drawn from (seed, epoch, index)."""
        rng, path = generator(self.seed, epoch, index), self.clips.paths[index]
        n = _length(path)
        chosen = sorted(rng.sample(range(n), self.frames)) if n >= self.frames else uniform_frames(n, self.frames)
        clip = read_frames(path, chosen, fps=self.fps)
        top, left, h, w = draw_box(*clip.size_wh, self.area, rng)
        return pixels(clip, (left, top, left + w, top + h), self.side), torch.from_numpy(clip.seconds).float()

    def views(self, index: int, *, tta: bool = False) -> tuple[Tensor, Tensor]:
        """(uint8 [V, T, 3, S, S], seconds [V, T]): the one view of a test, or the six of TTA."""
        path = self.clips.paths[index]
        n = _length(path)
        sets = interleaved_frames(n, self.frames) if tta else [uniform_frames(n, self.frames)]
        wanted = sorted({i for one in sets for i in one})
        clip = read_frames(path, wanted, fps=self.fps)
        place = {number: i for i, number in enumerate(wanted)}
        boxes = squares(*clip.size_wh)
        x, seconds = [], []
        for one in sets:
            part = Clip(tuple(clip.frames[place[i]] for i in one), clip.seconds[[place[i] for i in one]], clip.size_wh)
            for box in boxes if tta else boxes[1:2]:
                x.append(pixels(part, box, self.side))
                seconds.append(torch.from_numpy(part.seconds).float())
        return torch.stack(x), torch.stack(seconds)


# ---- probes, on features: tensors in, numbers out -------------------------------------------------------------------


@dataclass
class Candidate:
    """A probe with its own learning rate and weight decay."""

    lr: float
    weight_decay: float
    probe: AttentiveProbe
    optimizer: torch.optim.Optimizer

    @property
    def name(self) -> str:
        return f"lr {self.lr:g}, wd {self.weight_decay:g}"


def candidates(
    in_dim: int, n_classes: int, section: ProbeSection, lrs: Sequence[float], weight_decays: Sequence[float], *,
    device: torch.device | str = "cpu", seed: int = 0,
) -> list[Candidate]:  # fmt: skip
    """A probe for every learning rate and weight decay, all initialised alike."""
    out = []
    for lr, wd in itertools.product(lrs, weight_decays):
        probe = AttentiveProbe(
            in_dim, n_classes, width=section.width, depth=section.depth, heads=section.heads,
            mlp_ratio=section.mlp_ratio, seed=seed,
        ).to(device)  # fmt: skip
        out.append(Candidate(lr, wd, probe, torch.optim.AdamW(probe.parameters(), lr=0.0, weight_decay=wd)))
    return out


def train_step(
    every: Sequence[Candidate], batch: Batch, step: int, total: int, precision: str = "float32"
) -> list[float]:
    """One step of every probe on the same features; their losses. One after the other, to hold one probe's activations."""
    tokens, coordinates, labels = batch
    losses = []
    for c in every:
        for group in c.optimizer.param_groups:
            group["lr"] = warmup_cosine_v2(step, start=0.0, peak=c.lr, end=0.0, warmup=0, total=total + 1)
        c.probe.train()
        with torch.autocast(tokens.device.type, torch.bfloat16) if precision == "bfloat16" else nullcontext():
            loss = F.cross_entropy(c.probe(tokens, coordinates).float(), labels)
        c.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        distributed.average_gradients(list(c.probe.parameters()))
        # a learning rate too high for the head may diverge: that probe is not chosen, the others continue
        if all(bool(p.grad.isfinite().all()) for p in c.probe.parameters() if p.grad is not None):
            c.optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@torch.no_grad()
def probabilities(probe: AttentiveProbe, tokens: Tensor, coordinates: Tensor) -> Tensor:
    """Class probabilities [B, K]."""
    probe.eval()
    return probe(tokens, coordinates).float().softmax(-1)


def held_out_rows(n: int, share: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(training rows, validation rows), both sorted."""
    if n < 2:
        raise DinoError("at least two training videos are needed: one of them chooses the probe")
    order = np.random.default_rng(seed).permutation(n)
    k = min(n - 1, max(1, round(share * n)))
    return np.sort(order[k:]), np.sort(order[:k])


# ---- the evaluation -------------------------------------------------------------------------------------------------


class _Frozen:
    """The frozen backbone: clips of pixels → tokens and coordinates."""

    def __init__(self, model: nn.Module, config: VideoConfig) -> None:
        self.model, self.config = model, config
        self.preprocessing = default_preprocessing(model, shape="native")
        self.device = next(model.parameters()).device

    def __call__(self, frames: Tensor, seconds: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 [B, T, 3, S, S], [B, T] → tokens [B, N, D] float32, coordinates [B, N, 3]."""
        B, T = frames.shape[:2]
        mean, std = self.preprocessing.mean, self.preprocessing.std
        batches = (standardised(x.to(self.device).float() / 255, mean, std) for x in frames.flatten(0, 1).split(64))
        found = outputs(self.model, batches, [self.config.layer], norm=self.config.norm)
        patches = torch.cat([out["patches"].float() for (out,) in found])
        tokens = patches.reshape(B, T * patches.shape[1] * patches.shape[2], -1)
        return tokens, clip_coordinates(seconds.to(self.device), (patches.shape[1], patches.shape[2]))


def scored(
    frozen: _Frozen, every: Sequence[Candidate], reader: Reader, rows: Sequence[int], *, tta: bool, workers: int
) -> tuple[list[Tensor], Tensor]:
    """(probabilities [n, K] of every candidate, labels [n]) of some videos, shared among the processes."""
    share = distributed.share(rows)
    found: list[list[Tensor]] = [[] for _ in every]
    for frames, seconds in prefetched(lambda i: reader.views(i, tta=tta), share, workers, 2 * workers):
        tokens, coordinates = (t.clone() for t in frozen(frames, seconds))  # out of inference mode
        for place, c in zip(found, every):
            place.append(probabilities(c.probe, tokens, coordinates).mean(0))
    n_classes = len(reader.clips.class_names)
    device = frozen.device
    gathered = [
        distributed.all_gather(torch.stack(p) if p else torch.zeros(0, n_classes, device=device)) for p in found
    ]
    labels = torch.from_numpy(reader.clips.labels[share]).to(device)
    return gathered, distributed.all_gather(labels)


def fitted(
    frozen: _Frozen, every: Sequence[Candidate], reader: Reader, rows: np.ndarray, config: VideoConfig, session: Session
) -> None:
    """Trains all candidates; resumes from `probes.pt` in the output folder where a run was interrupted."""
    rank, world = distributed.rank(), distributed.world()
    each = max(1, config.batch_size // world)
    per_epoch = math.ceil(len(rows) / (each * world))
    total = config.epochs * per_epoch
    checkpoint = session.output / "probes.pt"
    first = _resumed(checkpoint, every, total)
    if first:
        session.log(f"resuming at step {first} of {total} ({checkpoint})")

    def batch(step: int) -> tuple[Tensor, Tensor, Tensor]:
        picked = [int(rows[i]) for i in shuffled(len(rows), each, step, seed=config.seed, rank=rank, world=world)]
        clips = [reader.random(i, step) for i in picked]
        labels = torch.from_numpy(reader.clips.labels[picked])
        return torch.stack([c[0] for c in clips]), torch.stack([c[1] for c in clips]), labels

    workers = config.num_workers
    batches = prefetched(batch, range(first, total), workers, 2 * workers)
    ticker = Ticker(session.log, "step", total, first=first, unit="clips", each=each * world)
    with StopRequest() as stop:
        for step, (frames, seconds, labels) in enumerate(batches, first):
            tokens, coordinates = (t.clone() for t in frozen(frames, seconds))
            losses = train_step(every, (tokens, coordinates, labels.to(tokens.device)), step, total, config.precision)
            done = step + 1
            ticker(done)
            stopping = stop.agreed(tokens.device) and done < total
            if done % per_epoch == 0:
                best = min(losses) if all(map(math.isfinite, losses)) else float(np.nanmin(losses))
                session.log(f"epoch {done // per_epoch} of {config.epochs}: lowest loss {best:.3f}")
            if stopping or done % per_epoch == 0:
                _save(checkpoint, every, done, total)
            if stopping:
                raise KeyboardInterrupt(f"{done} of {total} steps are done and saved")


def _save(path: Path, every: Sequence[Candidate], step: int, total: int) -> None:
    if distributed.is_main():
        state = {
            "step": step, "total": total, "names": [c.name for c in every],
            "probes": [c.probe.state_dict() for c in every], "optimizers": [c.optimizer.state_dict() for c in every],
        }  # fmt: skip
        write_torch(state, path)
    distributed.barrier()


def _resumed(path: Path, every: Sequence[Candidate], total: int) -> int:
    if not path.is_file():
        return 0
    state = torch.load(path, map_location="cpu", weights_only=True)
    if state["names"] != [c.name for c in every] or state["total"] != total:
        raise DinoError(f"{path} is of a run with other probes or another length; use another output_dir, or delete it")
    try:
        for c, probe, optimizer in zip(every, state["probes"], state["optimizers"]):
            c.probe.load_state_dict(probe)
            c.optimizer.load_state_dict(optimizer)
    except RuntimeError as error:
        raise DinoError(f"{path} does not fit these probes: {str(error).splitlines()[-1].strip()}") from None
    return int(state["step"])


def evaluate(config: VideoConfig, session: Session) -> Mapping[str, Any]:
    c = config
    train = Clips(c.train)
    val = Clips(c.val, class_names=train.class_names)
    check_opens([*train.paths, *val.paths], c.num_workers)
    model: Any = session.model(c.model)
    side = c.patches * step_of(model)
    area = (c.crop_area[0], c.crop_area[1])
    reading: Any = {"frames": c.frames, "side": side, "fps": c.fps, "area": area, "seed": c.seed}
    reader, test = Reader(train, **reading), Reader(val, **reading)
    rows, choosing = held_out_rows(len(train), c.held_out, c.seed)
    frozen = _Frozen(model, c)
    (width,) = widths_of(model, layer_numbers(model, [c.layer]))  # a ConvNeXt's earlier stages are narrower
    classes, device = len(train.class_names), frozen.device
    every = candidates(width, classes, c.probe, c.lrs, c.weight_decays, device=device, seed=c.seed)
    count = sum(p.numel() for p in every[0].probe.parameters())
    session.log(f"{len(rows)} videos train {len(every)} probes of {count:,} parameters, {len(choosing)} choose")
    fitted(frozen, every, reader, rows, c, session)
    found, labels = scored(frozen, every, reader, choosing.tolist(), tta=False, workers=c.num_workers)
    accuracies = [100 * accuracy(p, labels) for p in found]
    best = every[int(np.argmax(accuracies))]
    session.log(f"chosen: {best.name} ({max(accuracies):.1f} % of the held-out videos)")
    results: dict[str, Any] = {}
    for name, tta in (("top-1", False), ("top-1 TTA", True)):
        if tta and not c.tta:
            continue
        (probability,), labels = scored(frozen, [best], test, range(len(val)), tta=tta, workers=c.num_workers)
        results[name] = 100 * accuracy(probability, labels)
        if c.save_results:
            session.save_arrays("tta" if tta else "single", probability.cpu().numpy(), labels.cpu().numpy())
    return results | {"lr": best.lr, "weight_decay": best.weight_decay, "held-out top-1": max(accuracies)}


def main(argv: Sequence[str] | None = None) -> int:
    return common.main("video", VideoConfig, evaluate, argv)


if __name__ == "__main__":
    sys.exit(main())
