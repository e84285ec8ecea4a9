"""Projections of a student's tokens to a teacher's widths, standardised targets, and the terms of the loss.

Legend: B images, H × W student patches, d student's width, D a teacher's width, K classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3 import distributed
from dinov3.distill.teachers import Targets, Teacher
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
