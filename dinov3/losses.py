"""The losses of self-supervised training (paper §3.2, §4.2) and of image-text alignment (§5.3).

Legend: B images, C crops, K prototypes, D width, P patches, n rows of this rank, N rows of all ranks, W ranks.

Every loss is a function of tensors and plain numbers, computes in float32 whatever its inputs and also under autocast,
and returns a float32 scalar. Those that need other ranks take a `group` (None: all processes) and work alone too.
Where the reference has a defect, the docstring says "Mended" and what was changed.

What is not here: when a term is computed and how its weight moves (`train.method`), masks and their sampling
(`data.crops`), and the logits themselves (`heads.projection`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dinov3 import distributed
from dinov3.distributed import Group
from dinov3.errors import DinoError, UnknownName, one_of

STUDENT_TEMPERATURE = 0.1
KOLEO_EPS = 1e-8
SIGREG_DIRECTIONS = 1024
SIGREG_KNOTS = 17  # of t, in [−5, 5]

Loss = TypeVar("Loss", bound=Callable[..., Tensor])


def _float32(loss: Loss) -> Loss:
    """Switches autocast off inside: it would turn the matrix products of a float32 loss into bfloat16 ones."""

    @functools.wraps(loss)
    def wrapped(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if x.is_meta:  # which has no autocast: a step that is only planned
            return loss(x, *args, **kwargs)
        with torch.autocast(x.device.type, enabled=False):
            return loss(x, *args, **kwargs)

    return wrapped  # type: ignore[return-value]


def _shape(x: Tensor) -> str:
    return "[" + ", ".join(map(str, x.shape)) + "]"


# Logits over prototypes are the largest tensors of a step (15,000 × 65,536 at batch 256): what is computed of them in
# float32 is computed for a few rows at a time, which stay in the cache between operations.
CHUNK = {"cpu": 2**17, "cuda": 2**23}  # entries


def _chunks(x: Tensor, axis: int = 0) -> list[slice]:
    """Consecutive parts of an axis of x, of about CHUNK entries each."""
    n = x.shape[axis]
    step = max(CHUNK.get(x.device.type, 2**23) * n // max(x.numel(), 1), 1)
    return [slice(i, i + step) for i in range(0, n, step)]


class _CrossEntropy(torch.autograd.Function):
    """−Σ_k targets · log softmax(logits / temperature), [C, n], for logits [C, n, K] and targets [C or 1, n, K].

    Keeps the two inputs for the gradient, targets − softmax, and nothing else. No gradient for targets.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
        ctx.save_for_backward(logits, targets)
        ctx.temperature = temperature
        values = torch.empty(logits.shape[:2], device=logits.device)
        for rows in _chunks(logits, 1):
            log_p = F.log_softmax(logits[:, rows].float() / temperature, dim=-1)
            values[:, rows] = -log_p.mul_(targets[:, rows]).sum(-1)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        logits, targets = ctx.saved_tensors
        scale = (grads[0] / ctx.temperature).unsqueeze(-1)  # [C, n, 1]
        gradient = torch.empty_like(logits)
        for rows in _chunks(logits, 1):
            p, t = (logits[:, rows].float() / ctx.temperature).softmax(-1), targets[:, rows]
            gradient[:, rows] = p.mul_(t.sum(-1, keepdim=True)).sub_(t).mul_(scale[:, rows])
        return gradient, None, None


# ---- targets -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def sinkhorn_knopp(logits: Tensor, temperature: float, *, n_iterations: int = 3, group: Group = None) -> Tensor:
    """Teacher logits [n, K] to soft assignments [n, K] that use all prototypes about equally (SwAV; paper §3.2).

    The rows of all ranks of `group` are balanced together; n may differ between ranks and be 0. The definition:

        Q = exp(logits / temperature)
        repeat n_iterations times:
            Q = Q / Q.sum(over the N rows of all ranks)   # every prototype gets the same mass
            Q = Q / Q.sum(over the K prototypes)          # every row is a distribution

    (The reference also divides by N, K and the sum of everything; these cancel, so the count N is never needed.)

    Mended: the exponential cannot overflow, nor can a sum vanish. The first round subtracts each prototype's largest
    logit over all ranks, which the division by the prototype's sum cancels, and ends in a softmax. One maximum for
    everything would not do: rows far below it would become 0/0. After a round all sums are at least 1/(N·K), so the
    later rounds need no logarithms.
    """
    if logits.ndim != 2:
        raise DinoError(
            f"Sinkhorn-Knopp takes logits [rows, prototypes], not {_shape(logits)}; flatten crops and images"
        )
    if n_iterations < 1 or temperature <= 0:
        raise DinoError(
            f"Sinkhorn-Knopp needs at least 1 iteration and a temperature above 0, not {n_iterations} and {temperature}"
        )
    K = logits.shape[1]
    highest = logits.amax(0).float() if len(logits) else logits.new_full((K,), -math.inf, dtype=torch.float32)
    highest = distributed.all_reduce(highest, "max", group)  # [K]
    q = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
    mass = highest.new_zeros(K)
    for rows in _chunks(logits):
        mass += (logits[rows].float() - highest).div_(temperature).exp_().sum(0)  # of numbers that are at most 1
    log_mass = distributed.all_reduce(mass, "sum", group).log()
    mass = torch.zeros_like(mass)
    for rows in _chunks(logits):
        log_q = (logits[rows].float() - highest).div_(temperature).sub_(log_mass)
        torch.softmax(log_q, 1, out=q[rows])
        mass += q[rows].sum(0)
    if n_iterations == 1:
        return q
    # further rounds only change a factor for each row and one for each prototype, Q = of_row · q · of_prototype, and
    # those come from products of a matrix and a vector
    of_row = q.new_ones(len(q))
    for round_ in range(1, n_iterations):
        mass = mass if round_ == 1 else of_row @ q
        of_prototype = 1 / distributed.all_reduce(mass, "sum", group)
        of_row = 1 / (q @ of_prototype)
    for rows in _chunks(q):
        q[rows] *= of_prototype
        q[rows] *= of_row[rows, None]
    return q


class SoftmaxCenter(nn.Module):
    """The older targets (DINO, iBOT): a softmax of logits from which a moving average was subtracted.

    DINOv3 trains with `sinkhorn_knopp`; this exists because checkpoints of the reference carry the buffer `center`
    (`dino_loss.center` [1, K]) and because it needs no balanced batch. Call for targets, then `update`.
    """

    def __init__(self, n_prototypes: int, momentum: float = 0.9) -> None:
        super().__init__()
        self.momentum = momentum
        self.center: Tensor
        self.register_buffer("center", torch.zeros(1, n_prototypes))

    @torch.no_grad()
    def forward(self, logits: Tensor, temperature: float) -> Tensor:
        """Targets [n, K] for teacher logits [n, K]."""
        return ((logits.float() - self.center) / temperature).softmax(-1)

    @torch.no_grad()
    def update(self, logits: Tensor, group: Group = None) -> None:
        """Moves the center towards the mean of all ranks' rows."""
        total = distributed.all_reduce(logits.float().sum(0, keepdim=True), "sum", group)
        rows = distributed.all_reduce(torch.tensor(float(len(logits)), device=logits.device), "sum", group)
        self.center.lerp_(total / rows, 1 - self.momentum)


# ---- the image: DINO -----------------------------------------------------------------------------------------------


@_float32
def dino_loss(
    student_logits: Tensor,
    teacher_probs: Tensor,
    *,
    student_temperature: float = STUDENT_TEMPERATURE,
    ignore_diagonal: bool = False,
) -> Tensor:
    """Cross-entropy of every student crop with every teacher crop of the same image (paper §3.2, L_DINO).

    `student_logits` [C, B, K] · `teacher_probs` [C', B, K]. Global terms leave out the pairs that are the same crop
    (`ignore_diagonal`: c = c'). Mean over the pairs that are left and over images; fresh weights give about ln K.
    """
    if student_logits.ndim != 3 or teacher_probs.ndim != 3 or student_logits.shape[1:] != teacher_probs.shape[1:]:
        raise DinoError(
            "the DINO loss takes student logits [crops, images, prototypes] and teacher probabilities of as many images "
            f"and prototypes, not {_shape(student_logits)} and {_shape(teacher_probs)}"
        )
    C, B = student_logits.shape[:2]
    C_teacher = len(teacher_probs)
    pairs = C * C_teacher - (min(C, C_teacher) if ignore_diagonal else 0)
    if pairs == 0 or B == 0:
        raise DinoError(f"no pair of crops to compare: {C} student and {C_teacher} teacher crops of {B} images")
    targets = teacher_probs.float()
    if ignore_diagonal:  # the other crops' targets, summed
        targets = torch.stack([torch.cat([targets[:c], targets[c + 1 :]]).sum(0) for c in range(C)])  # [C, B, K]
    else:
        targets = targets.sum(0, keepdim=True)  # [1, B, K]
    return _CrossEntropy.apply(student_logits, targets, student_temperature).sum() / (B * pairs)


def dino_scales(n_global: int, n_local: int, *, ignore_diagonal: bool = True) -> tuple[float, float]:
    """(scale_g, scale_l): the shares of global and local pairs of crops; 2/18 and 16/18 for 2 global and 8 local."""
    global_pairs = n_global * n_global - (n_global if ignore_diagonal else 0)
    local_pairs = n_global * n_local
    if global_pairs + local_pairs == 0:
        raise DinoError(f"{n_global} global and {n_local} local crops give no pair to compare; use 2 global crops")
    return global_pairs / (global_pairs + local_pairs), local_pairs / (global_pairs + local_pairs)


# ---- the patches: iBOT ---------------------------------------------------------------------------------------------


def masked_patch_weights(masks: Tensor) -> Tensor:
    """Masks [C, P] to one weight per masked patch [n], row-major: 1 / (masked patches of its crop)."""
    per_crop = masks.sum(1, keepdim=True).expand_as(masks)
    return 1 / per_crop[masks.bool()].float()


@_float32
def ibot_patch_loss(
    student_logits: Tensor,
    teacher_probs: Tensor,
    weights: Tensor,
    n_crops: int,
    *,
    student_temperature: float = STUDENT_TEMPERATURE,
) -> Tensor:
    """Cross-entropy at the masked patches, averaged within each crop, then over crops (paper §3.2, L_iBOT).

    `student_logits`, `teacher_probs` [n, K] in mask order · `weights` [n] from `masked_patch_weights` · `n_crops`: all
    of the batch. Crops without a mask add 0 but are counted, so that fresh weights give (share of masked crops)·ln K.
    (The iBOT paper averages over patches at once; this is the reference's way, and DINOv2's.)
    """
    if (
        student_logits.ndim != 2
        or student_logits.shape != teacher_probs.shape
        or weights.shape != student_logits.shape[:1]
    ):
        raise DinoError(
            "the iBOT loss takes student logits and teacher probabilities [masked patches, prototypes] and one weight per "
            f"patch, not {_shape(student_logits)}, {_shape(teacher_probs)} and {_shape(weights)}"
        )
    cross_entropy = _CrossEntropy.apply(student_logits[None], teacher_probs[None], student_temperature)[0]  # [n]
    return (cross_entropy * weights.float()).sum() / n_crops


def visible_patches(masks: Tensor, n_masked: int) -> tuple[Tensor, Tensor]:
    """Masks [C, P] with n_masked true entries to (positions in the flattened masks, weights) of the visible patches.

    Both [C·P − n_masked], row-major; a weight is 1 / (visible patches of its crop). Nothing waits for the device.
    """
    visible = masks.flatten().to(torch.uint8).argsort(stable=True)[: masks.numel() - n_masked]
    per_crop = (masks.shape[1] - masks.sum(1)).float()
    return visible, 1 / per_crop[visible // masks.shape[1]]


# ---- spread: KoLeo -------------------------------------------------------------------------------------------------


@_float32
def koleo_loss(x: Tensor) -> Tensor:
    """Pushes each row of x [n, D] away from its nearest neighbour among this rank's rows (paper §3.2, L_KoLeo).

    x: CLS tokens of one global crop per image, before the head. The definition, on rows of length 1:

        mean over i of −ln(min over j ≠ i of ‖x_i − x_j‖)

    No gradient through the choice of the neighbour. A single row has no neighbour and gives a constant, 16.9.

    Mended: always float32 (the reference computes bf16 input in bf16: 3 digits, and log of rounded distances); a row
    is never its own neighbour, not even when all others lie opposite to it.
    """
    x = _unit_rows(x)
    return _koleo(x, x, first=0, topk=1)


@_float32
def koleo_loss_distributed(x: Tensor, *, topk: int = 1, group_size: int | None = None, group: Group = None) -> Tensor:
    """KoLeo with neighbours on other ranks: `topk` of them for each row, among `group_size` rows (default: all).

    x [n, D], n the same on all ranks of `group`. The ranks form consecutive blocks of `group_size / n`, and each looks
    within its block (to gather no more than a block, make the block the `group`). Returns the mean over this rank's
    rows; as the gather is differentiable, a rank's gradient holds the contributions of every rank's loss, and data
    parallelism's average divides the sum by W.

    Mended: gathers within `group` (the reference always takes the world, which mixes students of different widths).
    """
    x = _unit_rows(x)  # float32 before gathering: the ranks' gradients are added up in the dtype that travels
    n, W = len(x), distributed.world(group)
    rows = n * W if group_size is None else group_size
    if rows < 1 or rows % n or (n * W) % rows:
        raise DinoError(
            f"KoLeo's group size {rows} must be a multiple of the {n} rows of a rank and divide the {n * W} rows of all ranks"
        )
    pool = distributed.all_gather_with_gradient(x, group)  # [W·n, D]
    first = distributed.rank(group) * n
    block = first // rows * rows
    return _koleo(x, pool[block : block + rows], first=first - block, topk=topk)


def _unit_rows(x: Tensor) -> Tensor:
    if x.ndim != 2 or len(x) == 0:
        raise DinoError(f"KoLeo takes one feature vector per image, [images, width], not {_shape(x)}")
    return F.normalize(x.float(), dim=-1, eps=KOLEO_EPS)


def _koleo(x: Tensor, pool: Tensor, *, first: int, topk: int) -> Tensor:
    """KoLeo of unit rows x [n, D] against `pool` [m, D], of which they are the rows from `first` on."""
    n, m = len(x), len(pool)
    if not 1 <= topk <= max(m - 1, 1):
        raise DinoError(f"KoLeo cannot find {topk} neighbours among {m} rows; each has {m - 1}")
    with torch.no_grad():
        similarity = x @ pool.T  # [n, m]
        own = torch.arange(n, device=x.device)
        similarity[own, first + own] = -math.inf
        neighbours = similarity.topk(topk, dim=1).indices  # [n, topk]
    distances = torch.linalg.vector_norm(x.unsqueeze(1) - pool[neighbours] + KOLEO_EPS, dim=-1)  # [n, topk]
    return -(distances + KOLEO_EPS).log().mean()


# ---- spread: SIGReg, in place of KoLeo -----------------------------------------------------------------------------


def sigreg_directions(width: int, iteration: int, *, count: int = SIGREG_DIRECTIONS) -> Tensor:
    """Random unit vectors, [width, count]: a function of the iteration, so the same on all ranks and after a resume.

    Drawn by a generator of their own; those of the run are left alone.
    """
    generator = torch.Generator().manual_seed(iteration)
    return F.normalize(torch.randn(width, count, generator=generator), dim=0)


@_float32
def sigreg_loss(x: Tensor, directions: Tensor, *, group: Group = None) -> Tensor:
    """Distance of the rows of all ranks from a standard normal distribution, along random directions (LeJEPA's SIGReg).

    x [n, w]: vectors before the division by their length; n may differ between ranks · `directions` [w, M], unit
    columns. With the N·M projections p = x @ directions and 17 knots t in [−5, 5], the mean over directions of

        ∫ e^(−t²/2) · ((mean of cos(t·p) − e^(−t²/2))² + (mean of sin(t·p))²) dt        # trapezoid rule

    the distance of two characteristic functions (Epps and Pulley's statistic, not multiplied by N). About 1.06 / N for N
    normal rows; 0.41 for rows of zeros; the largest, 2.7, for equal rows far from zero. The same value on all ranks; a
    rank's gradient is W times its part, and data parallelism's average divides by W.
    """
    if x.ndim != 2 or directions.ndim != 2 or x.shape[1] != directions.shape[0]:
        raise DinoError(
            f"SIGReg takes one vector per image, [images, width], and directions [width, count], not {_shape(x)} and "
            f"{_shape(directions)}"
        )
    # the two sums over −t and t are equal: only knots from 0 on, the others counted twice
    t = torch.linspace(0, 5, SIGREG_KNOTS // 2 + 1, device=x.device)
    normal = (-t.square() / 2).exp()
    weights = normal * (2 * t[1])
    weights[[0, -1]] /= 2
    angles = (x.float() @ directions.float().to(x.device)).unsqueeze(-1) * t  # [n, M, knots]
    own = torch.stack([angles.cos().sum(0), angles.sin().sum(0)])  # [2, M, knots]
    counted = torch.cat([own.detach().flatten(), own.new_full((1,), len(x))])
    total = distributed.all_reduce(counted, "sum", group)
    if (W := distributed.world(group)) > 1:  # alone, the sums are as they are, to the bit
        own = total[:-1].view_as(own) + W * (own - own.detach())
    cos, sin = own / total[-1]
    return (((cos - normal).square() + sin.square()) @ weights).mean()


# ---- dense features that stay: Gram anchoring ----------------------------------------------------------------------

# What becomes of negative similarities, and the configuration keys of the reference that mean it.
GRAM_NEGATIVES = {
    "keep": "neither key",
    "zero": "gram.remove_neg",
    "zero_teacher": "gram.remove_only_teacher_neg, as it acts in the reference",
    "zero_teacher_and_shared": "what the code of gram.remove_only_teacher_neg meant to do",
}


@_float32
def gram_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    normalized: bool = True,
    img_level: bool = True,
    negatives: str = "keep",
    tokens_used: str = "all",
    masks: Tensor | None = None,
) -> Tensor:
    """Mean squared difference of the similarities between patches, student against teacher (paper §4.2, L_Gram).

    `student` [C, P, D] · `teacher` [C, P, D'], which may have another width; patch tokens after the final norm. (The
    paper writes the squared Frobenius norm, a sum; the reference takes the mean, as here.)

    `normalized`: cosine instead of dot product · `img_level`: one P×P matrix per crop, else one over all C·P tokens ·
    `negatives`: "keep" | "zero" in both matrices | "zero_teacher" in the teacher's only | "zero_teacher_and_shared":
    also in the student's where the teacher's is negative as well (Mended: the reference tests that after zeroing, so
    it never holds; its recipes were trained with "zero_teacher") · `tokens_used`: "all", or the "masked" or "unmasked"
    ones of `masks` [C, P]; these need `img_level=False`. No token selected: 0.
    """
    one_of("negatives", negatives, GRAM_NEGATIVES)
    if student.ndim != 3 or student.shape[:2] != teacher.shape[:2] or teacher.ndim != 3:
        raise DinoError(
            f"the Gram loss compares [crops, patches, width] of equal crops and patches, not {_shape(student)} and "
            f"{_shape(teacher)}; bring the teacher to the student's grid with resize_patches"
        )
    x, y = student.float(), teacher.float()
    if tokens_used != "all":
        x, y = _selected(x, y, tokens_used, masks, img_level)
    elif not img_level:
        x, y = x.flatten(0, 1)[None], y.flatten(0, 1)[None]
    if x.shape[1] == 0:
        return x.sum()  # an empty mean would be NaN; this 0 still belongs to the graph
    if normalized:
        x, y = F.normalize(x, dim=-1), F.normalize(y, dim=-1)
    s, g = x @ x.mT, y @ y.mT  # [C, P, P]
    if negatives == "zero":
        s, g = s.clamp(min=0), g.clamp(min=0)
    elif negatives == "zero_teacher":
        g = g.clamp(min=0)
    elif negatives == "zero_teacher_and_shared":
        s, g = s.masked_fill((s < 0) & (g < 0), 0), g.clamp(min=0)
    return F.mse_loss(s, g)


def _selected(x: Tensor, y: Tensor, tokens_used: str, masks: Tensor | None, img_level: bool) -> tuple[Tensor, Tensor]:
    """The tokens under the masks (or not under them) of both, as one long crop [1, n, D]."""
    if tokens_used not in ("masked", "unmasked"):
        raise UnknownName(f"tokens_used is 'all', 'masked' or 'unmasked', not {tokens_used!r}")
    if img_level:
        raise DinoError(f"crops have different numbers of {tokens_used} tokens: set gram.img_level to false")
    if masks is None or masks.shape != x.shape[:2]:
        came = "none" if masks is None else _shape(masks)
        raise DinoError(f"{tokens_used} tokens need masks of shape {_shape(x[..., 0])}, and got {came}")
    chosen = masks.bool() if tokens_used == "masked" else ~masks.bool()
    return x[chosen][None], y[chosen][None]


@_float32
def resize_patches(
    patches: Tensor,
    to_hw: tuple[int, int],
    *,
    from_hw: tuple[int, int] | None = None,
    method: str = "bicubic",
    antialias: bool = False,
) -> Tensor:
    """Patch tokens [C, h·w, D] of a larger image to another grid [C, H·W, D], in float32 (paper §4.3: high-res teacher).

    `from_hw`: the grid they are on; None means a square one. Comes before any normalisation.
    """
    C, P, D = patches.shape
    if from_hw is None:
        from_hw = (math.isqrt(P), math.isqrt(P))
    if from_hw[0] * from_hw[1] != P:
        raise DinoError(f"{P} patches are no grid of {from_hw[0]}×{from_hw[1]}; say the grid they are on (from_hw)")
    image = patches.float().mT.reshape(C, D, *from_hw)
    image = F.interpolate(image, to_hw, mode=method, align_corners=False, antialias=antialias)
    return image.flatten(2).mT


def some_positions(n: int, rate: float, generator: torch.Generator | None = None) -> Tensor:
    """int(n·rate) different positions below n, drawn on the CPU: the patches dino.txt's Gram term compares in a step."""
    return torch.randperm(n, generator=generator)[: int(n * rate)]


# ---- images and texts ----------------------------------------------------------------------------------------------


@_float32
def image_text_loss(image: Tensor, text: Tensor, scale: Tensor | float, *, group: Group = None) -> Tensor:
    """Symmetric contrastive loss with the pairs of all ranks as negatives (CLIP; paper §5.3 dino.txt).

    `image`, `text` [n, D], unit rows; row i of one belongs to row i of the other; n the same on all ranks · `scale`:
    the factor of the cosines, exp of the learned number. The mean over this rank's pairs of

        ½ (cross-entropy of its image against all texts + of its text against all images)

    Gradients are those of the sum of all ranks' losses with respect to this rank's rows and to the scale of its
    images; averaged over ranks they are the gradient of the mean over all pairs. Keeps two [n, W·n] matrices of
    similarities (the reference passes the features round in a ring, which needs less memory and gives the same).
    """
    if image.ndim != 2 or image.shape != text.shape or len(image) == 0:
        raise DinoError(f"image and text features must both be [pairs, width], not {_shape(image)} and {_shape(text)}")
    image, text = scale * image.float(), text.float()  # scaled once, so that both directions share its gradient
    all_images = distributed.all_gather_with_gradient(image, group)  # [W·n, D]
    all_texts = distributed.all_gather_with_gradient(text, group)
    own = distributed.rank(group) * len(image) + torch.arange(len(image), device=image.device)
    image_to_text = F.cross_entropy(image @ all_texts.T, own)
    text_to_image = F.cross_entropy(text @ all_images.T, own)
    return (image_to_text + text_to_image) / 2


# ---- adding up -----------------------------------------------------------------------------------------------------


class LossTerm(NamedTuple):
    name: str
    weight: float
    value: Tensor


class LossTerms(list[LossTerm]):
    """The list of (name, weight, value) whose weighted sum is the loss and which itself is the log.

    A term of weight 0 is logged and never added, so that what is only watched cannot poison the loss (0·inf is NaN).
    The names are those of the metrics file: dino_local_crops_loss, dino_global_crops_loss, koleo_loss, ibot_loss,
    gram_loss, stats_only/masked_gram_loss, …
    """

    def add(self, name: str, weight: float, value: Tensor) -> None:
        if value.ndim:
            raise DinoError(f"the loss term {name} must be one number, not a tensor of shape {_shape(value)}")
        assert name not in {term.name for term in self}, f"{name} is already in {[term.name for term in self]}"
        self.append(LossTerm(name, weight, value))

    def total(self) -> Tensor:
        """Σ weight · value, ready for `backward`."""
        counted = [weight * value for _, weight, value in self if weight != 0]
        if not counted:
            raise DinoError(
                f"nothing to train on: no loss term has a weight ({', '.join(t.name for t in self) or 'none'})"
            )
        return torch.stack(counted).sum()

    def log(self) -> dict[str, Tensor]:
        """`total_loss` and every term, unweighted and detached; still on the device, so that nothing waits."""
        return {"total_loss": self.total().detach()} | {name: value.detach() for name, _, value in self}
