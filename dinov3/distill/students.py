"""What ties a student to one teacher: projections of its tokens, standardised targets, and the terms of the loss.

Legend: B images, H × W student patches, d student's width, D a teacher's width, K classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3 import distributed
from dinov3.distill.inherit import ridge
from dinov3.distill.teachers import Targets, Teacher
from dinov3.errors import DinoError
from dinov3.losses import LossTerms, resize_patches


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


class Pupil(nn.Module):
    """What ties the student to one teacher: the projections of its tokens, and the scale of the targets."""

    def __init__(self, teacher: Teacher, width: int, sample: Targets) -> None:
        super().__init__()
        self.line = teacher.line
        self.scale_cls = Standardised(sample.cls)
        self.cls = nn.Linear(width, sample.cls.shape[-1]).requires_grad_(not self.line.isometry)
        if sample.patches is not None and self.line.patches:
            self.scale_patches = Standardised(sample.patches)
            self.patches = nn.Linear(width, sample.patches.shape[-1])
        if sample.logits is not None and self.line.logits:
            self.logits = nn.Linear(width, sample.logits.shape[-1])

    @torch.no_grad()
    def fit(self, cls: Tensor, patches: Tensor, said: Targets) -> None:
        """The projections in closed form for what the student gives now: random ones would teach it noise at first. Where it
        gives the same for every image they stay random."""
        for name, x, targets in (
            ("cls", cls, self.scale_cls(said.cls)),
            ("patches", patches.flatten(0, 2), said.patches),
            ("logits", cls, said.logits),
        ):
            layer = getattr(self, name, None)
            if layer is None or targets is None:
                continue
            if name == "cls" and self.line.isometry:
                layer.weight.copy_(isometry(x.float(), targets.float()))
                layer.bias.zero_()
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
        if self.line.cls:
            terms.add(f"{name}/cls", self.line.cls, difference(self.cls(cls), wanted))
        if self.line.relations:
            together = distributed.all_gather_with_gradient(cls), distributed.all_gather(wanted)
            terms.add(f"{name}/relations", self.line.relations, relations_loss(*together))
        if self.line.patches and targets.patches is not None:
            grid = resized_grid(targets.patches, (patches.shape[1], patches.shape[2]))
            terms.add(f"{name}/patches", self.line.patches, difference(self.patches(patches), self.scale_patches(grid)))
        if self.line.logits and targets.logits is not None:
            terms.add(f"{name}/logits", self.line.logits, softened_kl(self.logits(cls), targets.logits))


def isometry(x: Tensor, target: Tensor) -> Tensor:
    """[D, d]: the map of x [n, d] into the strongest directions of the targets [n, D] that keeps angles and comes nearest.

    A student that learns through it has the teacher's angles in its own features, not in a projection that is thrown away.
    """
    d = x.shape[1]
    _, spectrum, directions = torch.linalg.svd(target - target.mean(0), full_matrices=False)
    strongest = directions[:d]
    if len(strongest) < d or spectrum[d - 1] < 1e-6 * spectrum[0]:
        raise DinoError(f"isometry needs more than {d} images and teachers of more than {d} dimensions")
    aimed = target @ strongest.T
    U, _, V = torch.linalg.svd(aimed.T @ (x - x.mean(0)), full_matrices=False)
    scale = (aimed.square().mean() / x.square().mean()).sqrt()
    return scale * strongest.T @ U @ V


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
