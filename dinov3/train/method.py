"""What is learned: self-distillation with DINO, iBOT, KoLeo and Gram terms (paper §3.2, §4.2, §5.2), and newer options.

    targets = method.targets(batch, values)          # the teachers' outputs; no gradient
    terms = method.predict(batch, targets, values)   # the student's predictions: LossTerms
    terms.total().backward()
    …                                                # clip, optimiser step
    method.update_ema(values.momentum)
    method.refresh_gram(iteration)

Four networks with four names. `student` learns by gradients. `ema` is its moving average, and the result of a run.
`teacher` gives the targets: it is the ema itself, unless one distils, then a frozen network that may be wider.
`gram_teacher` is an earlier teacher whose patch similarities the student keeps; backbone only. With head-only EMA
(`teacher.ema: heads`) the ema's backbone *is* the student's module, in evaluation mode where it acts as the teacher.

`values` are this iteration's scheduled numbers (`optim.StepValues`). Nothing here knows of iterations to come, files,
devices, sharding or precision; the ranks are met only in sums, through `group`.

Legend: B images, n_l local crops, P patches of a global crop, D width, K prototypes, n masked patches. Crops are
crop-major: row c·B + b is crop c of image b.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3 import losses
from dinov3.config.train import DinoConfig, GramConfig, IbotConfig, TrainConfig, vit_config
from dinov3.data.crops import CropBatch
from dinov3.distributed import Group
from dinov3.errors import DinoError
from dinov3.heads.projection import ProjectionHead
from dinov3.losses import LossTerms
from dinov3.models.build import backbone as build_backbone
from dinov3.optim import StepValues, ema_update
from dinov3.train.guides import Guides

# ---- the networks ---------------------------------------------------------------------------------------------------


class Network(nn.Module):
    """A backbone and, unless it is a Gram teacher, the two heads that training needs; a student may have `guides` beside."""

    licence = ""  # of the weights that it began with

    def __init__(
        self, backbone: nn.Module, dino_head: nn.Module | None = None, ibot_head: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.backbone = backbone
        if dino_head is not None and ibot_head is not None:
            self.dino_head = dino_head
            self.ibot_head = ibot_head

    def parts(self) -> dict[str, nn.Module]:
        """{"backbone": …, "dino_head": …, "ibot_head": …}: clipped, and given rates, one by one."""
        return dict(self.named_children())

    def init_weights(self) -> None:
        for part in self.children():
            part.init_weights()  # type: ignore[operator]


def build_network(config: TrainConfig, *, heads: bool = True, backbone: nn.Module | None = None) -> Network:
    """The network of a configuration's `student` section, with uninitialised values; around a given backbone, or its own."""
    shape = vit_config(config.student)
    if not heads:
        return Network(build_backbone(shape))

    def head(c: DinoConfig | IbotConfig) -> ProjectionHead:
        return ProjectionHead(
            shape.embed_dim,
            c.head_n_prototypes,
            n_layers=c.head_nlayers,
            hidden_dim=c.head_hidden_dim,
            bottleneck_dim=c.head_bottleneck_dim,
        )

    return Network(build_backbone(shape) if backbone is None else backbone, head(config.dino), head(config.ibot))


@torch.no_grad()
def copy_weights(to: nn.Module, source: nn.Module) -> None:
    """to ← source, parameters and buffers; both plain, or sharded alike. Of a network its parts: a student may have more."""
    if isinstance(to, Network):
        for name, part in to.parts().items():
            copy_weights(part, getattr(source, name))
        return
    for own, theirs in zip([*to.parameters(), *to.buffers()], [*source.parameters(), *source.buffers()], strict=True):
        own.copy_(theirs)


# ---- the method -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Targets:
    """Outputs of the teachers for a batch."""

    dino: Tensor  # [2, B, K] probabilities
    ibot: Tensor  # [n, K'] probabilities, in mask order; then, with ibot.visible_loss_weight, of the visible patches
    gram: Tensor | None  # [2B, P, D'] patch tokens on the student's grid; None while Gram anchoring is not active


class SelfDistillation:
    """See the top of the file. Networks are handed in, on their device and wrapped as they run."""

    def __init__(
        self,
        student: Network,
        ema: Network,
        *,
        dino: DinoConfig,
        ibot: IbotConfig,
        gram: GramConfig,
        teacher: Network | None = None,
        gram_teacher: Network | None = None,
        teacher_scale: float = 1.0,
        guides: Guides | None = None,
        group: Group = None,
    ) -> None:
        """`teacher`: a frozen one, to distil from. `gram_teacher`: where `gram.use_loss` and not `gram.ema_teacher`.

        `teacher_scale`: the teacher sees the global crops smaller by this factor, so that a teacher of patch 16 has as
        many tokens as a student of stride 32 (crops.teacher_to_student_resolution_scale). `guides`: their heads are in
        the student. `group`: the ranks that train
        this student.
        """
        self.student, self.ema, self.gram_teacher = student, ema, gram_teacher
        self.distilling = teacher is not None
        self.teacher = ema if teacher is None else teacher
        self.dino, self.ibot, self.gram = dino, ibot, gram
        self.teacher_scale, self.guides, self.group = teacher_scale, guides, group
        for other in (self.ema, self.teacher, self.gram_teacher):
            if other is not None:
                other.eval().requires_grad_(False)
        self.shares_backbone = ema.backbone is student.backbone  # head-only EMA
        if self.shares_backbone:
            student.backbone.requires_grad_(True)
        student.train()
        if gram.use_loss and not gram.ema_teacher and gram_teacher is None:
            raise DinoError("gram.use_loss needs a Gram teacher; hand one in, or set gram.ema_teacher")

    # -- targets

    def receive(self, batch: CropBatch, dtype: torch.dtype) -> CropBatch:
        """The batch that this rank's student trains on, normalised, from the one that this rank loaded, on the device."""
        return batch.to(batch.global_crops.device, dtype)

    @torch.no_grad()
    def targets(self, batch: CropBatch, values: StepValues) -> Targets:
        """Both global crops through the teacher, unmasked; logits balanced over all ranks by Sinkhorn-Knopp."""
        B, T = batch.batch_size, values.teacher_temp
        crops = self._seen_by_teacher(batch.global_crops)
        if self.shares_backbone:  # without the student's drop path and drawn positions
            self.student.backbone.eval()
        out = self.teacher.backbone(crops, is_training=True)
        if self.shares_backbone:
            self.student.backbone.train()
        cls, patches = out["x_norm_clstoken"], out["x_norm_patchtokens"]  # [2B, D], [2B, P, D]
        self._check_grid("teacher", patches, batch.masks)
        if self.guides is not None:
            self.guides.observe(cls, batch.indices)
        dino = losses.sinkhorn_knopp(self.teacher.dino_head(cls), T, group=self.group)
        compared = patches.flatten(0, 1).index_select(0, self._compared(batch))  # [n, D]
        ibot = losses.sinkhorn_knopp(self.teacher.ibot_head(compared), T, group=self.group)
        return Targets(dino.unflatten(0, (2, B)), ibot, self._gram_target(batch, patches, values))

    def _compared(self, batch: CropBatch) -> Tensor:
        """Positions of the patches that the iBOT losses compare: the masked ones, then, with a weight, the visible ones."""
        if self.ibot.visible_loss_weight == 0:
            return batch.mask_indices
        visible, _ = losses.visible_patches(batch.masks, len(batch.mask_indices))
        return torch.cat([batch.mask_indices, visible])

    def _check_grid(self, who: str, patches: Tensor, masks: Tensor) -> None:
        if patches.shape[1] != masks.shape[1]:
            raise DinoError(
                f"the {who} has {patches.shape[1]} patches of a global crop, the masks have {masks.shape[1]}; "
                "crops.teacher_to_student_resolution_scale must be the ratio of the two models' strides"
            )

    def _seen_by_teacher(self, crops: Tensor) -> Tensor:
        if self.teacher_scale == 1:
            return crops
        side = round(crops.shape[-1] / self.teacher_scale)
        small = F.interpolate(crops.float(), (side, side), mode="bicubic", align_corners=False, antialias=True)
        return small.to(crops.dtype)

    def _gram_target(self, batch: CropBatch, teacher_patches: Tensor, values: StepValues) -> Tensor | None:
        if not self.gram.use_loss or values.gram_loss_weight == 0:
            return None  # a term of weight 0 adds nothing: its forward pass is saved (up to a third of a step)
        if self.gram.ema_teacher:
            return teacher_patches  # these crops, this network: already computed
        assert self.gram_teacher is not None
        crops = batch.global_crops if batch.gram_crops is None else batch.gram_crops
        patches = self.gram_teacher.backbone(crops, is_training=True)["x_norm_patchtokens"]
        grid = self._grid(crops)
        wanted = self._grid(batch.global_crops)
        if grid == wanted:
            return patches
        return losses.resize_patches(
            patches,
            wanted,
            from_hw=grid,
            method=self.gram.global_teacher_resize_method,
            antialias=self.gram.global_teacher_resize_antialias,
        )

    def _grid(self, crops: Tensor) -> tuple[int, int]:
        return self.student.backbone.patch_grid(*crops.shape[-2:])  # type: ignore[operator]

    # -- losses

    def predict(self, batch: CropBatch, targets: Targets, values: StepValues) -> LossTerms:
        """The student sees the global crops with patches masked, and the local crops, in one pass."""
        B, K = batch.batch_size, targets.dino.shape[-1]
        masks = None if self.distilling else batch.masks  # a distilled student sees everything
        with torch.set_grad_enabled(torch.is_grad_enabled() and not values.frozen):
            globals_, locals_ = self.student.backbone(
                [batch.global_crops, batch.local_crops], [masks, None], is_training=True
            )
        cls, local_cls = globals_["x_norm_clstoken"], locals_["x_norm_clstoken"]  # [2B, D], [n_l·B, D]
        patches = globals_["x_norm_patchtokens"]  # [2B, P, D]
        self._check_grid("student", patches, batch.masks)
        c = self.dino
        every_cls, bottleneck = torch.cat([cls, local_cls]), None
        if c.sigreg_loss_weight:
            logits, bottleneck = self.student.dino_head(every_cls, part="both")
        else:
            logits = self.student.dino_head(every_cls)
        logits = logits.view(-1, B, K)  # [2 + n_l, B, K]
        compared = patches.flatten(0, 1).index_select(0, self._compared(batch))  # [n, D]
        n_local = len(logits) - 2

        terms = LossTerms()
        scale_g, scale_l = losses.dino_scales(2, n_local, ignore_diagonal=c.global_ignore_diagonal)
        terms.add(
            "dino_local_crops_loss",
            c.loss_weight * scale_l * values.local_loss_weight,
            losses.dino_loss(logits[2:], targets.dino),
        )
        terms.add(
            "dino_global_crops_loss",
            c.loss_weight * scale_g,
            losses.dino_loss(logits[:2], targets.dino, ignore_diagonal=c.global_ignore_diagonal),
        )
        # each global crop by itself; the weight counts both, as in the reference: 0.1 becomes 0.2 on their mean
        koleo = torch.stack([self._koleo(x) for x in cls.chunk(2)]).mean()
        terms.add("koleo_loss", 2 * c.koleo_loss_weight if bottleneck is None else 0.0, koleo)
        if bottleneck is not None:
            spread = cls if c.sigreg_on == "cls" else bottleneck[: 2 * B]
            directions = losses.sigreg_directions(spread.shape[1], batch.step)
            terms.add("sigreg_loss", c.sigreg_loss_weight, losses.sigreg_loss(spread, directions, group=self.group))
        self._add_ibot(terms, self.student.ibot_head(compared), targets.ibot, batch)
        if self.guides is not None:
            self.guides.add(terms, cls, getattr(self.student, "guides", None), batch.indices, batch.step)
        if targets.gram is not None:
            self._add_gram(terms, patches, targets.gram, batch.masks, values.gram_loss_weight)
        return terms

    def _add_ibot(self, terms: LossTerms, student: Tensor, teacher: Tensor, batch: CropBatch) -> None:
        """Logits [n, K'] and targets of the patches in `_compared`."""
        n, crops, c = len(batch.mask_indices), len(batch.masks), self.ibot
        if c.visible_loss_weight == 0:
            terms.add("ibot_loss", c.loss_weight, losses.ibot_patch_loss(student, teacher, batch.masks_weight, crops))
            return
        _, weights = losses.visible_patches(batch.masks, n)
        masked = losses.ibot_patch_loss(student[:n], teacher[:n], batch.masks_weight, crops)
        terms.add("ibot_loss", c.loss_weight, masked)
        visible = losses.ibot_patch_loss(student[n:], teacher[n:], weights, crops)
        terms.add("ibot_visible_loss", c.visible_loss_weight, visible)

    def _koleo(self, x: Tensor) -> Tensor:
        c = self.dino
        if not c.koleo_loss_distributed:
            return losses.koleo_loss(x)
        return losses.koleo_loss_distributed(
            x, topk=c.koleo_topk, group_size=c.koleo_distributed_loss_group_size, group=self.group
        )

    def _add_gram(self, terms: LossTerms, student: Tensor, teacher: Tensor, masks: Tensor, weight: float) -> None:
        c = self.gram
        negatives = "zero" if c.remove_neg else "zero_teacher" if c.remove_only_teacher_neg else "keep"
        loss = partial(losses.gram_loss, teacher=teacher, normalized=c.normalized, negatives=negatives, masks=masks)
        terms.add("gram_loss", weight, loss(student, img_level=c.img_level, tokens_used=c.tokens_used))
        if c.compute_stats:
            for used in ("masked", "unmasked"):
                watched = loss(student.detach(), img_level=False, tokens_used=used)
                terms.add(f"stats_only/{used}_gram_loss", 0.0, watched)

    # -- what moves without gradients

    def update_ema(self, momentum: float) -> None:
        """ema ← momentum · ema + (1 − momentum) · student, all three parts; with head-only EMA the heads."""
        for name, part in self.ema.parts().items():
            if part is not self.student.parts()[name]:
                ema_update(part.parameters(), self.student.parts()[name].parameters(), momentum)

    def refresh_gram(self, iteration: int) -> bool:
        """After `iteration`'s EMA update: the Gram teacher becomes a copy of the teacher, where it is due."""
        if self.gram_teacher is None or not gram_refresh_due(self.gram, iteration):
            return False
        copy_weights(self.gram_teacher.backbone, self.teacher.backbone)
        return True


def gram_refresh_due(gram: GramConfig, iteration: int) -> bool:
    """Whether the Gram teacher is refreshed after `iteration`: a function of it alone, so that resuming cannot miscount.

    With k = iteration + 1: at k = it_load_ema_teacher (the first copy, where there was no file), and at multiples of
    update_frequency from it_first_update on, the first max_updates of them.
    """
    k = iteration + 1
    if gram.it_load_ema_teacher == k:
        return True
    if not gram.rep_update or k % gram.update_frequency or k < gram.it_first_update or k < gram.it_load_ema_teacher:
        return False
    first = max(-(-gram.it_first_update // gram.update_frequency), 1)  # the first multiple that counts
    return gram.max_updates is None or k // gram.update_frequency - first < gram.max_updates


def gram_active(gram: GramConfig, iteration: int) -> bool:
    """Whether there is a Gram teacher to follow yet: with it_load_ema_teacher = k, from iteration k on."""
    return gram.use_loss and iteration >= gram.it_load_ema_teacher
