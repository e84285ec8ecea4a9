"""How the first runs of the shipped model began: inherited weights, a fixed projection, the last block in closed form.

`Start` is handed to `dinov3.distill.run.distill` as `prepare`; it changes the student and its projectors before the first
step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dinov3.data.loading import permuted
from dinov3.data.transforms.inputs import normalised
from dinov3.distill.run import STATISTICS_FROM, Distillation
from dinov3.distill.teachers import ridge
from dinov3.errors import DinoError
from dinov3.weights import catalog, reading
from projects.vitt16.inherit import inherit_dinov2, write_linear


@dataclass
class Start:
    """What happens before the first step, in this order. A resumed run only freezes the isometric projection again.

    inherit: a DINOv2 folder or file whose ViT the student becomes a compressed copy of, fitted on `inherit_images` images.
    last_block_images: initialise the last block in closed form on so many images; needs `isometric`.
    isometric: the kind of the teacher whose global vector the student meets through a fixed map that keeps angles.
    """

    inherit: str | None = None
    inherit_images: int = 320
    last_block_images: int = 0
    isometric: str | None = None

    @torch.no_grad()
    def __call__(self, work: Distillation, fresh: bool) -> None:
        projectors: list[Any] = [p for p in work.projectors if p.spec.kind == self.isometric]
        if self.isometric is not None and len(projectors) != 1:
            raise DinoError(f"isometric={self.isometric} fits {len(projectors)} teachers; name the kind of one")
        if self.last_block_images and (not projectors or not hasattr(work.student, "blocks")):
            raise DinoError("initialising the last block needs a vision transformer and a teacher named by isometric=")
        for projector in projectors:
            projector.cls.requires_grad_(False)
        if not fresh:
            return
        if self.inherit is not None:
            self._inherit(work, self.inherit)
        for projector in projectors:
            source = work.targets[list(work.projectors).index(projector)]
            if self.last_block_images:
                _last_block(work, projector, source, self.last_block_images)
            some = sample(work, STATISTICS_FROM)
            cls = torch.cat([work.tokens(pixels)[0] for pixels in views(work, some).split(64)])
            wanted = projector.scale_cls(source.read(some, 0).cls.to(work.device))
            projector.cls.weight.copy_(isometry(cls.float(), wanted.float()))
            projector.cls.bias.zero_()

    def _inherit(self, work: Distillation, source: str) -> None:
        path = Path(source)
        state, _ = reading.read(path / "model.safetensors" if path.is_dir() else path)
        patch = state["embeddings.patch_embeddings.projection.weight"].shape[-1]
        some, grid = sample(work, self.inherit_images), work.config.cached_grid
        student: Any = work.student
        ours, theirs = (work.images.views(work.views, some, 0, grid * p) for p in (student.stride, patch))
        inherit_dinov2(student, state, ours, theirs, log=work.run.log)


def sample(work: Distillation, count: int) -> np.ndarray:
    """Numbers of `count` images, the same for every caller."""
    count = min(count, len(work.images))
    return permuted(np.arange(count), len(work.images), work.config.seed, 0)


def views(work: Distillation, some: np.ndarray) -> Tensor:
    """uint8 [n, 3, s, s] at the size of the first steps."""
    return work.images.views(work.views, some, 0, work.config.side(0)).to(work.device)


def _last_block(work: Distillation, projector: Any, source: Any, count: int) -> None:
    some = sample(work, count)
    wanted = projector.scale_cls(source.read(some, 0).cls.to(work.device))

    def aim(cls: Tensor) -> Tensor:
        turn = isometry(cls, wanted)
        return wanted @ turn / turn.square().sum(0).mean()

    inputs = (normalised(part, *catalog.STATISTICS["lvd1689m"]) for part in views(work, some).split(64))
    before, after = initialise_last_block(work.student, inputs, aim, bf16=work.config.bf16)
    work.run.log(f"last block initialised: cosine of CLS with its target {before:.3f} before, {after:.3f} after")


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


@torch.no_grad()
def initialise_last_block(
    student: Any,
    inputs: Iterable[Tensor],
    aim: Callable[[Tensor], Tensor],
    *,
    strength: float = 1e-3,
    patch_weight: float = 0.3,
    bf16: bool = False,
) -> tuple[float, float]:
    """The last block in closed form: CLS tokens point where they are aimed, patch tokens stay where they are.

    A block that inherits nothing begins with a layer scale of 1e-5 and stays untrained in a short run. Here its scales
    become 1, and its second feed-forward layer the ridge regression, on its own hidden values, of what CLS lacks; eight
    patches of every image ask for no change. inputs: batches [B, 3, s, s], normalised; `aim` maps the CLS tokens [n, d]
    that the student gives now to those it should give. Returns the mean cosine of the two, before and after, for the last
    tenth of the images, which nothing is fitted on.
    """
    block = student.blocks[-1]
    first = 1 + student.n_storage_tokens
    hidden: list[Tensor] = []
    ends: list[Tensor] = []

    def some(x: Tensor) -> Tensor:  # CLS and eight patches
        rows = torch.linspace(first, x.shape[1] - 1, 8).long().tolist()
        return x[:, [0, *rows]].float()

    hook = block.mlp.fc2.register_forward_hook(lambda m, given, out: hidden.append(some(given[0])))
    was_training = student.training
    student.eval()
    for part in inputs:
        with torch.autocast(part.device.type, torch.bfloat16, enabled=bf16):
            ends.append(some(student.forward_features(part)["x_prenorm"]))
    hook.remove()
    student.train(was_training)
    h, end = torch.cat(hidden), torch.cat(ends)  # [n, 9, 4d], [n, 9, d]
    for scale, layer in (
        (block.ls1, block.attn.proj),
        (block.ls2, block.mlp.fc2),
    ):  # the same function with scales of 1
        layer.weight.mul_(scale.gamma[:, None])
        layer.bias.mul_(scale.gamma)
        scale.gamma.fill_(1.0)
    given = F.linear(h, block.mlp.fc2.weight, block.mlp.fc2.bias)
    is_now = student.norm(end[:, 0])
    aims = aim(is_now)
    wanted = (aims - student.norm.bias) / student.norm.weight
    wanted = F.layer_norm(wanted, wanted.shape[-1:]) * end[:, 0].std(-1).mean()  # at CLS's usual length
    fitted = slice(0, round(0.9 * len(h)))
    before = (end - given)[:, 0]
    x = torch.cat([h[fitted, 0], h[fitted, 1:].flatten(0, 1)])
    y = torch.cat([(wanted - before)[fitted], given[fitted, 1:].flatten(0, 1)])
    weight = torch.full((len(x),), patch_weight**2, device=x.device)
    weight[: fitted.stop] = 1.0
    W, b = ridge(x, y, weight, strength=strength)
    write_linear(block.mlp.fc2, W, b)
    becomes = student.norm(before + F.linear(h[:, 0], W, b))
    was, now = (F.cosine_similarity(z, aims)[fitted.stop :].mean().item() for z in (is_now, becomes))
    return was, now
