"""Guides: heads on the student's CLS token that make it follow metadata of the images, or forget them (arXiv 2606.05107).

A guide predicts one column from the CLS tokens of the global crops, before the projection head. Its gradient reaches
the backbone times λ, which rises from 0; a guide that *forgets* (`grl`) sends it with the opposite sign, and its weight is
a tenth (not that of `ridge`, which has nothing to learn). The head itself learns with the plain gradient. It predicts with:

    classification    a linear layer or an MLP; cross-entropy, or binary cross-entropy of several values at once
    regression        the same; squared error of the value, brought to a range
    prototypical      no parameters: cosine to each value's centroid, an average of the teacher's CLS tokens of all ranks
    ridge             ours, no parameters: ridge regression of the value in closed form (`Ridge`). It is at its optimum
                      in every step, so no backbone is too fast for it: what `--forget` takes

With `optim.grad_norm_normalization` each guide's gradient at the CLS tokens is brought to that norm, and is then multiplied
by λ and the weight. (Mended: in the published form the weights cancel.) Images without a value do not count.

Heads are a part of the student (`student.guides`): trained, clipped, sharded and saved with it, and no part of the teacher.
Legend: B images, D width, K values of a column.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3 import distributed
from dinov3.config.train import GuideConfig, LambdaConfig, TrainConfig, vit_config
from dinov3.data.loading import Images
from dinov3.data.metadata import metadata_of
from dinov3.distributed import Group
from dinov3.errors import DinoError
from dinov3.losses import LossTerms
from dinov3.models.vit import init_layers

REVERSED = 0.1  # times the weight of a guide that forgets and has to learn to predict
SEVERAL = "|"  # between values of one cell, with use_bce
ACTIVATIONS = {"sigmoid": nn.Sigmoid, "tanh": nn.Tanh}


# ---- gradients -----------------------------------------------------------------------------------------------------


@dataclass
class Passage:
    """How a guide's gradient leaves its head for the backbone: times `scale`, brought to `norm` before that unless None."""

    scale: float
    norm: float | None = None
    group: Group = None
    weight: Tensor | None = None  # of the loss in the sum, noted in the backward pass


class _Gate(torch.autograd.Function):
    """The identity; its gradient goes through a `Passage`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, passage: Passage) -> Tensor:
        ctx.passage = passage
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (gradient,), p = grads, ctx.passage
        if p.norm is None:
            return gradient * p.scale, None
        assert p.weight is not None, "the loss of a guide goes through _Weighed"
        # gradients of ranks are averaged later: their norm is that of all ranks' rows, divided by the number of ranks
        square = distributed.all_reduce(gradient.float().square().sum(), "sum", p.group)
        length = square.sqrt().clamp(min=1e-20) / distributed.world(p.group)
        return gradient * (p.scale * p.norm * p.weight / length).to(gradient.dtype), None


class _Weighed(torch.autograd.Function):
    """The identity on a loss, which notes with what weight it is in the sum (accumulation of batches included)."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, passage: Passage) -> Tensor:
        ctx.passage = passage
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.passage.weight = grads[0].float()
        return grads[0], None


def lambda_at(schedule: LambdaConfig, iteration: float) -> float:
    """The scale of guides' gradients: sigmoid 2 / (1 + e^(−10 p)) − 1, linear p, or 1; p = iteration / warm-up, at most 1."""
    if schedule.type == "constant" or schedule.warmup_iterations == 0:
        return 1.0
    p = min(iteration / schedule.warmup_iterations, 1.0)
    return p if schedule.type == "linear" else 2 / (1 + math.exp(-10 * p)) - 1


# ---- columns as targets --------------------------------------------------------------------------------------------


@dataclass
class Target:
    """A column, one entry for each image of the data set."""

    config: GuideConfig
    values: Tensor  # int64 [N], −1 where missing; with use_bce float [N, K], regression [N, 1], NaN where missing
    classes: tuple[str, ...] = ()

    @property
    def outputs(self) -> int:
        return self.config.n_outputs or len(self.classes) or 1


def as_target(config: GuideConfig, column: Sequence[Any]) -> Target:
    """A column of a table as a guide's target. Raises `DinoError` where the values do not suit the method."""
    c, nothing = config, math.nan
    if all(value is None for value in column):
        raise DinoError(f"guide {c.name!r}: no image has a value in this column")
    if c.method == "regression":
        try:
            values = torch.tensor([nothing if v is None else float(v) for v in column])
        except (TypeError, ValueError) as error:
            raise DinoError(
                f"guide {c.name!r}: regression needs numbers ({error}); for words take classification"
            ) from None
        there = values[~values.isnan()]
        low, high = there.min(), there.max()
        if low == high:
            raise DinoError(f"guide {c.name!r}: all images have the value {low:g}; there is nothing to predict")
        t = c.target_normalization
        return Target(c, ((values - low) / (high - low) * (t.output_max - t.output_min) + t.output_min)[:, None])
    if c.use_bce:
        several = [v if isinstance(v, list) else None if v is None else str(v).split(SEVERAL) for v in column]
        classes = tuple(sorted({str(x) for v in several if v is not None for x in v}))
    else:
        classes = tuple(sorted({str(v) for v in column if v is not None}))
    if len(classes) < 2:
        raise DinoError(f"guide {c.name!r}: all images have the value {classes[0]}; there is nothing to predict")
    if c.n_outputs is not None and c.n_outputs < len(classes):
        raise DinoError(
            f"guide {c.name!r}: n_outputs is {c.n_outputs} and the column has {len(classes)} values; leave it out"
        )
    number = {name: k for k, name in enumerate(classes)}
    if not c.use_bce:
        return Target(c, torch.tensor([-1 if v is None else number[str(v)] for v in column]), classes)
    hot = torch.zeros(len(column), c.n_outputs or len(classes))
    for i, values_ in enumerate(several):
        hot[i, [number[str(x)] for x in values_ or ()]] = 1
        if values_ is None:
            hot[i] = nothing
    return Target(c, hot, classes)


# ---- what predicts -------------------------------------------------------------------------------------------------


class GuideHeads(nn.Module):
    """The heads of the guides that have one: a list of CLS tokens [n, D], one for each, to their outputs [n, K]."""

    def __init__(self, width: int, targets: Sequence[Target]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(self._head(width, t.config, t.outputs) for t in targets)

    @staticmethod
    def _head(width: int, c: GuideConfig, outputs: int) -> nn.Sequential:
        hidden: list[nn.Module] = [nn.Linear(width, c.hidden_dim), nn.GELU()] if c.hidden_dim else []
        last = [nn.Dropout(c.dropout), nn.Linear(c.hidden_dim or width, outputs)]
        activation = [] if c.output_activation == "none" else [ACTIVATIONS[c.output_activation]()]
        return nn.Sequential(*hidden, *last, *activation)

    @torch.no_grad()
    def init_weights(self) -> None:
        init_layers(self)

    def forward(self, cls: list[Tensor]) -> list[Tensor]:
        return [head(x) for head, x in zip(self.heads, cls, strict=True)]


class Centroids(nn.Module):
    """The mean direction and the spread of the teacher's CLS tokens of each value; buffers only, the same on all ranks."""

    def __init__(self, width: int, n: int, config: GuideConfig) -> None:
        super().__init__()
        self.config = config
        self.total: Tensor  # [K, D]; averages that begin at 0, so all three are divided by the first's weight
        self.spread: Tensor  # [K]
        self.weight: Tensor  # [K]
        for name, shape in (("total", (n, width)), ("spread", (n,)), ("weight", (n,))):
            self.register_buffer(name, torch.zeros(shape))

    @property
    def directions(self) -> Tensor:
        return F.normalize(self.total, dim=-1)  # [K, D]

    @torch.no_grad()
    def update(self, cls: Tensor, values: Tensor, group: Group = None) -> None:
        """cls [n, D] with its values [n], −1 where there is none. Values that no rank has keep what they have."""
        unit = F.normalize(cls.float(), dim=-1)
        member = F.one_hot(values.clamp(min=0), len(self.weight)).float() * (values >= 0).unsqueeze(1)  # [n, K]
        sums = distributed.all_reduce(torch.cat([member.T @ unit, member.sum(0)[:, None]], 1), "sum", group)
        count = sums[:, -1]
        part = (1 - self.config.proto_centroid_momentum) * (count > 0).float()  # of the new in the average
        self.total.lerp_(sums[:, :-1] / count.clamp(min=1).unsqueeze(1), part.unsqueeze(1))
        self.weight.lerp_(torch.ones_like(self.weight), part)
        distance = (unit - self.directions[values.clamp(min=0)]).norm(dim=-1)  # [n]
        spread = distributed.all_reduce(member.T @ distance, "sum", group) / count.clamp(min=1)
        self.spread.lerp_(spread, part)

    def forward(self, cls: Tensor) -> Tensor:
        """Logits [n, K]: cosine / φ. φ is the temperature times the value's spread by the mean one's, at least the floor; a
        value that was never seen has −10⁴ (the concentration of PCL, without its factor for small clusters)."""
        seen = self.weight > 0
        spread = self.spread / self.weight.clamp(min=1e-12)
        mean = spread.sum() / seen.sum().clamp(min=1)
        phi = (self.config.proto_temperature * spread / mean.clamp(min=1e-12)).clamp(min=self.config.proto_phi_min)
        return (F.normalize(cls.float(), dim=-1) @ self.directions.T / phi).masked_fill(~seen, -1e4)


class Ridge(nn.Module):
    """Ridge regression of a column's values from CLS tokens, solved in closed form; buffers only, the same on all ranks.

    A linear probe is at chance exactly where all values have the same mean token (LEACE, Belrose et al. 2023), which is where
    the best regression explains no variance: R² = 0. Random Fourier features of the tokens, beside the tokens, compare
    distributions and not means alone. Covariances are averages over the batches of all ranks that decay by `ridge_momentum`,
    so that there are many more rows than dimensions.

    The loss is 1 − R. (R² alone has a gradient that vanishes with R.) The regression's weights are constants in the backward
    pass: at its optimum the gradient through them is zero.
    """

    def __init__(self, width: int, n: int, config: GuideConfig) -> None:
        super().__init__()
        self.config, self.n = config, n
        self.frequencies: Tensor  # [D, M]; cos(x · frequencies + phases): a Gaussian kernel of width √D
        self.phases: Tensor  # [M]
        self.sums: Tensor  # [F + 1 + K, F + 1 + K], F = D + M: of the outer products of (features, 1, one-hot values)
        draw, count = torch.Generator().manual_seed(0), config.ridge_features
        frequencies = torch.randn(width, count, generator=draw, device="cpu")
        phases = torch.rand(count, generator=draw, device="cpu")
        device = torch.empty(0).device  # of the surrounding context
        # sums of many rows, whose means are subtracted: not for float32; Apple's GPUs have nothing else
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.register_buffer("frequencies", (frequencies / math.sqrt(width)).to(device, dtype))
        self.register_buffer("phases", (2 * math.pi * phases).to(device, dtype))
        self.register_buffer("sums", torch.zeros(width + count + 1 + n, width + count + 1 + n, dtype=dtype))

    def forward(self, cls: Tensor, values: Tensor, group: Group = None) -> Tensor:
        """1 − R, a scalar, for cls [n, D] with values [n], −1 where there is none. Takes the rows into the averages first."""
        with torch.autocast(cls.device.type, enabled=False):
            cls = cls.to(self.sums.dtype)
            x = torch.cat([cls, (cls @ self.frequencies + self.phases).cos()], 1)  # [n, F]
            y = F.one_hot(values.clamp(min=0), self.n).to(x.dtype)  # [n, K]
            there = (values >= 0).to(x.dtype)
            with torch.no_grad():
                rows = torch.cat([x, torch.ones_like(x[:, :1]), y], 1) * there.unsqueeze(1)
                new = distributed.all_reduce(rows.T @ rows, "sum", group)
                self.sums.mul_(self.config.ridge_momentum).add_(new)
                mean_x, mean_y, weight, variance, r = self._solution()
            errors = (y - mean_y - (x - mean_x) @ weight).square().sum(1) / variance  # [n]; their mean is 1 − R²
            count = new[x.shape[1], x.shape[1]].clamp(min=1)  # labelled rows of this batch
            share = (errors * there).sum() * distributed.world(group) / count
            return (1 - r + (share - share.detach()) / (2 * r.clamp(min=0.03))).float()

    def _solution(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(mean features [F], mean values [K], weights [F, K], total variance of the values, R)."""
        F_ = len(self.sums) - 1 - self.n
        count = self.sums[F_, F_].clamp(min=1)
        mean = self.sums[F_] / count
        covariance = self.sums / count - mean.outer(mean)
        inner, cross = covariance[:F_, :F_], covariance[:F_, F_ + 1 :]
        strength = (self.config.ridge_strength * inner.diagonal().mean()).clamp(min=1e-8)
        weight = torch.linalg.solve(inner + strength * torch.eye(F_, dtype=inner.dtype, device=inner.device), cross)
        variance = covariance[F_ + 1 :, F_ + 1 :].trace().clamp(min=1e-8)
        return mean[:F_], mean[F_ + 1 :], weight, variance, ((weight * cross).sum() / variance).clamp(0, 1).sqrt()


# ---- all guides of a run -------------------------------------------------------------------------------------------


class Guides:
    """See the top of the file."""

    def __init__(
        self, targets: Sequence[Target], width: int, schedule: LambdaConfig, *, accumulation: int = 1,
        norm: float | None = None, group: Group = None,
    ) -> None:  # fmt: skip
        """`accumulation`: batches of an iteration. `norm`: of each guide's gradient at the CLS tokens before weights."""
        self.targets, self.schedule, self.group = list(targets), schedule, group
        self.accumulation, self.norm = accumulation, norm
        # by its place, as names of columns may hold anything
        kinds = [(str(i), t, t.config.method) for i, t in enumerate(self.targets)]
        self.centroids, self.ridges = (
            nn.ModuleDict({i: kind(width, t.outputs, t.config) for i, t, method in kinds if method == name})
            for name, kind in (("prototypical", Centroids), ("ridge", Ridge))
        )
        with_head = [t for i, t, _ in kinds if i not in self.centroids and i not in self.ridges]
        self.heads = GuideHeads(width, with_head) if with_head else None

    def observe(self, teacher_cls: Tensor, indices: Sequence[int]) -> None:
        """The teacher's CLS tokens of both global crops [2B, D], for the centroids; before `add`."""
        for i, centroids in self.centroids.items():
            assert isinstance(centroids, Centroids)
            centroids.update(teacher_cls, self._values(self.targets[int(i)], indices, teacher_cls.device), self.group)

    @staticmethod
    def _values(target: Target, indices: Sequence[int], device: torch.device) -> Tensor:
        return target.values[list(indices)].repeat((2,) + (1,) * (target.values.ndim - 1)).to(device)  # crop-major

    def add(self, terms: LossTerms, cls: Tensor, heads: GuideHeads | None, indices: Sequence[int], step: int) -> None:
        """A term for each guide, from the student's CLS tokens of both global crops [2B, D]; `step`: the batch's number."""
        scale = lambda_at(self.schedule, step // self.accumulation)
        passages = [Passage(-scale if t.config.grl else scale, self.norm, self.group) for t in self.targets]
        inputs = [_Gate.apply(cls, p) for p in passages]
        outputs = iter(())
        if heads is not None:
            plain = (x for i, x in enumerate(inputs) if str(i) not in self.centroids and str(i) not in self.ridges)
            outputs = iter(heads(list(plain)))
        for i, (target, x, passage) in enumerate(zip(self.targets, inputs, passages)):
            values = self._values(target, indices, cls.device)
            if str(i) in self.ridges:
                loss = self.ridges[str(i)](x, values, self.group)
            else:
                output = self.centroids[str(i)](x) if str(i) in self.centroids else next(outputs)
                loss = self._mean(*_errors(target.config, output.float(), values))
            weight = target.config.loss_weight * (REVERSED if target.config.grl and str(i) not in self.ridges else 1)
            terms.add(f"guide_{target.config.name}_loss", weight, _Weighed.apply(loss, passage))

    def _mean(self, errors: Tensor, there: Tensor) -> Tensor:
        """Over the labelled rows of all ranks, once ranks are averaged."""
        count = distributed.all_reduce(there.float().sum(), "sum", self.group).clamp(min=1)
        return errors.masked_fill(~there, 0).sum() * distributed.world(self.group) / count


def _errors(c: GuideConfig, output: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """(error of each row [n], whether it has a value [n]) for outputs [n, K]."""
    if values.ndim == 1:
        there = values >= 0
        return F.cross_entropy(output, values.clamp(min=0), reduction="none"), there
    there = ~values[:, 0].isnan()
    wanted = values.nan_to_num(0.0)
    if c.method == "regression":
        return (output - wanted).square().mean(1), there
    return F.binary_cross_entropy_with_logits(output, wanted, reduction="none").mean(1), there


def build_guides(
    config: TrainConfig, images: Images, notes: list[str], device: torch.device, group: Group = None
) -> Guides | None:
    """The guides of a configuration, their columns read; None where there are none."""
    g = config.guide
    chosen = [guide for guide in g.guides if guide.enabled]
    if not g.enabled or not chosen:
        return None
    assert g.metadata is not None
    columns, remarks = metadata_of(g.metadata, [guide.name for guide in chosen], images)
    notes += remarks
    targets = [as_target(guide, columns[guide.name]) for guide in chosen]
    for t in targets:
        what = f"{len(t.classes)} values ({', '.join(t.classes[:5])}{', …' if len(t.classes) > 5 else ''})"
        there = int((t.values >= 0).sum()) if t.values.ndim == 1 else int((~t.values[:, 0].isnan()).sum())
        notes.append(
            f"guide {t.config.name!r}: {t.config.method}{f' of {what}' if t.classes else ''}, "
            f"{'forgotten' if t.config.grl else 'followed'}; {there} of {len(images)} images have a value"
        )
    with torch.device(device):
        guides = Guides(
            targets, vit_config(config.student).embed_dim, g.lambda_schedule, accumulation=config.optim.accumulation_steps,
            norm=config.optim.grad_norm_normalization, group=group,
        )  # fmt: skip
    if guides.heads is not None:
        guides.heads.init_weights()
    return guides
