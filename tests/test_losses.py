"""Every loss against recorded numbers of the reference, a plain-loop twin, and the same batch spread over two ranks."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from paths import GOLDEN_LOSSES
from ranks import run_ranks
from safetensors.torch import load_file
from torch import Tensor

from dinov3 import distributed, losses
from dinov3.errors import DinoError, UnknownName
from dinov3.losses import (
    GRAM_NEGATIVES,
    LossTerms,
    SoftmaxCenter,
    dino_loss,
    dino_scales,
    gram_loss,
    ibot_patch_loss,
    image_text_loss,
    koleo_loss,
    koleo_loss_distributed,
    masked_patch_weights,
    resize_patches,
    sigreg_directions,
    sigreg_loss,
    sinkhorn_knopp,
    some_positions,
    visible_patches,
)

VALUE, GRADIENT = 1e-5, 2e-4  # of the tensor's largest magnitude


def normal(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    """The recipe of the recorded inputs."""
    draw = np.random.Generator(np.random.PCG64(seed)).standard_normal(shape) * scale
    return torch.from_numpy(draw.astype(np.float32))


class Recorded:
    """One file of recorded tensors that knows which of them were compared."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.tensors = load_file(GOLDEN_LOSSES / f"{name}.safetensors")
        self.missing = set(self.tensors)

    def input(self, name: str, expected: Tensor | None = None) -> Tensor:
        """A recorded input, which is itself compared with the recipe that made it."""
        if expected is not None:
            self.same(name, expected, 1e-6)
        self.missing.discard(name)
        return self.tensors[name]

    def same(self, name: str, value: Tensor, tolerance: float = VALUE) -> None:
        expected = self.tensors[name]
        assert value.shape == expected.shape, f"{name}: {value.shape} instead of {expected.shape}"
        worst = (value.detach().float() - expected.float()).abs().max().item()
        allowed = tolerance * expected.float().abs().max().item()
        assert worst <= allowed, f"{name}: off by {worst:.2e}, allowed {allowed:.2e}"
        self.missing.discard(name)

    def all_compared(self) -> None:
        assert not self.missing, f"{self.name}: never compared: {sorted(self.missing)}"


def value_and_gradient(loss: Callable[..., Tensor], x: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    value = loss(x, *args, **kwargs)
    value.backward()
    assert x.grad is not None
    return value.detach(), x.grad


def close(a: Tensor, b: Tensor | float, tolerance: float = 1e-5) -> bool:
    return torch.allclose(a, torch.as_tensor(b, dtype=a.dtype), rtol=tolerance, atol=tolerance)


# ---- recorded numbers ----------------------------------------------------------------------------------------------


def test_dino_gives_the_recorded_numbers() -> None:
    r = Recorded("dino_cls")
    teacher = r.input("teacher_logits", normal(101, 12, 16, scale=0.5))
    student_global = r.input("student_global_logits", normal(102, 2, 6, 16))
    student_local = r.input("student_local_logits", normal(103, 3, 6, 16))
    for temperature in (0.04, 0.07):
        for n in (1, 3):
            r.same(f"sk_temp{temperature}_iter{n}", sinkhorn_knopp(teacher, temperature, n_iterations=n))
    targets = sinkhorn_knopp(teacher, 0.07).view(2, 6, 16)
    r.same("teacher_probs", targets)
    for name, logits, ignore in (
        ("local", student_local, False),
        ("global_all_pairs", student_global, False),
        ("global_ignore_diagonal", student_global, True),
    ):
        value, gradient = value_and_gradient(dino_loss, logits, targets, ignore_diagonal=ignore)
        r.same(f"loss_{name}", value)
        r.same(f"grad_{name}", gradient, GRADIENT)
    center = SoftmaxCenter(16)
    r.same("softmax_center_temp0.07", center(teacher, 0.07))
    center.update(teacher)
    r.same("center_after_one_update", center.center)
    r.all_compared()


def test_ibot_gives_the_recorded_numbers() -> None:
    r = Recorded("ibot_patch")
    expected = torch.from_numpy(np.random.Generator(np.random.PCG64(201)).random((8, 16)) < 0.3)
    expected[[1, 2, 4, 6]] = False
    expected[2, 5] = True
    masks = r.input("masks", expected).bool()
    teacher = r.input("teacher_logits", normal(202, 26, 12, scale=0.5))
    student = r.input("student_logits", normal(203, 26, 12))
    r.same("sk_temp0.04", sinkhorn_knopp(teacher, 0.04))
    targets = sinkhorn_knopp(teacher, 0.07)
    r.same("sk_temp0.07", targets)
    weights = masked_patch_weights(masks)
    r.same("masks_weight", weights)
    value, gradient = value_and_gradient(ibot_patch_loss, student, targets, weights, len(masks))
    r.same("loss", value)
    r.same("loss_default_weights", value)
    r.same("grad", gradient, GRADIENT)
    # the reference's unused function over all patches: the same loss, once the masked ones are taken out
    masks = r.input("dense_masks", masks[:4]).bool()
    dense_teacher = r.input("dense_teacher_probs", normal(204, 4, 16, 12).softmax(-1))
    dense_student = r.input("dense_student_logits", normal(205, 4, 16, 12))
    dense = ibot_patch_loss(dense_student[masks], dense_teacher[masks], masked_patch_weights(masks), 4)
    r.same("dense_loss_unused_path", dense)
    r.all_compared()


def test_koleo_gives_the_recorded_numbers() -> None:
    r = Recorded("koleo")
    x = r.input("x", normal(301, 8, 12))
    value, gradient = value_and_gradient(koleo_loss, x)
    r.same("loss", value)
    r.same("grad", gradient, GRADIENT)
    for topk in (1, 2, 3):
        value, gradient = value_and_gradient(koleo_loss_distributed, x, topk=topk)
        r.same(f"dist_world1_topk{topk}_loss", value)
        r.same(f"dist_world1_topk{topk}_grad", gradient, GRADIENT)
    r.same("loss_identical_rows", koleo_loss(x[:1].repeat(4, 1)))
    r.same("loss_batch_of_one", koleo_loss(normal(302, 1, 12)))
    # The reference computes these two in bfloat16, at least up to the distances (all near 1, so rounded by 2⁻⁹ each);
    # ours is float32 from the first operation, and may differ from them by that much and no more.
    in_bf16, in_float32 = koleo_loss(x.bfloat16()), koleo_loss(x.bfloat16().float())
    assert in_bf16.dtype == torch.float32
    assert torch.equal(in_bf16, in_float32)
    for name in ("loss_bf16_input", "dist_loss_bf16_input"):
        r.same(name, in_bf16, 2**-9 / 0.0489)
    # the neighbour each row runs away from is the one recorded: only it and the row itself get a gradient
    neighbours = r.input("nearest_neighbour")
    for i, j in enumerate(neighbours.tolist()):
        unit = F.normalize(x, dim=-1)
        others = [(unit[i] - unit[k]).norm() if k != i else torch.tensor(torch.inf) for k in range(8)]
        assert int(torch.stack(others).argmin()) == j
    expected = -torch.log((unit - unit[neighbours]).norm(dim=-1)).mean()
    assert close(koleo_loss(x), expected)
    r.all_compared()


def test_gram_gives_the_recorded_numbers() -> None:
    r = Recorded("gram")
    student = r.input("student", normal(401, 3, 16, 10))
    teacher = r.input("teacher", normal(402, 3, 16, 10))
    hires = r.input("teacher_hires", normal(404, 3, 64, 10))
    expected = torch.from_numpy(np.random.Generator(np.random.PCG64(403)).random((3, 16)) < 0.4)
    masks = r.input("masks", expected)
    for recorded, negatives in (("plain", "keep"), ("remove_neg", "zero"), ("only_teacher_neg", "zero_teacher")):
        for normalized in (True, False):
            for img_level in (True, False):
                name = f"{recorded}_{'norm' if normalized else 'raw'}_{'image' if img_level else 'batch'}"
                options = {"normalized": normalized, "img_level": img_level, "negatives": negatives}
                value, gradient = value_and_gradient(gram_loss, student, teacher, **options)
                r.same(f"{name}_loss", value)
                r.same(f"{name}_grad", gradient, GRADIENT)
    for used in ("masked", "unmasked"):
        r.same(f"{used}_loss", gram_loss(student, teacher, img_level=False, tokens_used=used, masks=masks))
    for antialias in (False, True):
        resized = resize_patches(hires, (4, 4), antialias=antialias)
        r.same(f"teacher_downsampled_antialias_{str(antialias).lower()}", resized)
    r.same("hires_loss_image", gram_loss(student, resize_patches(hires, (4, 4))))
    r.all_compared()


def sinkhorn_on_a_rank(logits: list[Tensor]) -> Tensor:
    return sinkhorn_knopp(logits[distributed.rank()], 0.07)


def test_sinkhorn_over_two_ranks_gives_the_recorded_numbers() -> None:
    r = Recorded("sinkhorn_2ranks")
    cls_logits, patch_logits = normal(111, 12, 16, scale=0.5), normal(211, 11, 12, scale=0.5)
    for name, parts in (("cls", cls_logits.split([6, 6])), ("patch", patch_logits.split([4, 7]))):
        alone = sinkhorn_knopp(torch.cat(parts), 0.07)
        r.same(f"{name}_logits_global", torch.cat(parts))
        for rank, mine in enumerate(run_ranks(sinkhorn_on_a_rank, 2, list(parts))):
            r.same(f"{name}_rank{rank}", mine)
            assert close(mine, alone.split([len(p) for p in parts])[rank], 1e-6)
    r.all_compared()


def koleo_on_a_rank(x: Tensor, topk: int, group_size: int | None) -> tuple[Tensor, Tensor]:
    mine = x.chunk(distributed.world())[distributed.rank()]
    return value_and_gradient(koleo_loss_distributed, mine, topk=topk, group_size=group_size)


def test_koleo_over_two_ranks_gives_the_recorded_numbers() -> None:
    r = Recorded("koleo_2ranks")
    x = r.input("x_global", normal(303, 8, 10))
    cases = {"topk1_all": (1, None), "topk2_all": (2, None), "topk1_group4": (1, 4), "topk1_group8": (1, 8)}
    for name, (topk, group_size) in cases.items():
        for rank, (value, gradient) in enumerate(run_ranks(koleo_on_a_rank, 2, x, topk, group_size)):
            r.same(f"{name}_loss_rank{rank}", value)
            r.same(f"{name}_grad_rank{rank}", gradient, GRADIENT)
    r.all_compared()


def text_on_a_rank(image: Tensor, text: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rank, world = distributed.rank(), distributed.world()
    leaves = [t.clone().requires_grad_() for t in (image.chunk(world)[rank], text.chunk(world)[rank], scale)]
    value = image_text_loss(*leaves)
    value.backward()
    return (value.detach(), *(leaf.grad for leaf in leaves))  # type: ignore[return-value]


def test_text_alignment_over_two_ranks_gives_the_recorded_numbers() -> None:
    r = Recorded("text_alignment")
    image = r.input("image_features", F.normalize(normal(8401, 6, 8), dim=-1))
    text = r.input("text_features", F.normalize(normal(8402, 6, 8), dim=-1))
    scale = r.input("logit_scale", torch.tensor([1 / 0.07]))
    for rank, (value, image_gradient, text_gradient, scale_gradient) in enumerate(
        run_ranks(text_on_a_rank, 2, image, text, scale)
    ):
        r.same(f"clip_loss_rank{rank}", value)
        r.same(f"clip_grad_image_rank{rank}", image_gradient, GRADIENT)
        r.same(f"clip_grad_text_rank{rank}", text_gradient, GRADIENT)
        r.same(f"clip_grad_scale_rank{rank}", scale_gradient, GRADIENT)
    a = r.input("gram_a", normal(8403, 2, 9, 6))
    b = r.input("gram_b", normal(8404, 2, 9, 5))
    r.same("gram_normalized", gram_loss(a, b))
    r.same("gram_raw", gram_loss(a, b, normalized=False))
    r.all_compared()


def test_total_of_a_recorded_training_step() -> None:
    # first step of the recorded tiny model: 2 global and 3 local crops, KoLeo weight 0.1 times 2 crops
    scale_g, scale_l = dino_scales(2, 3)
    terms = LossTerms()
    terms.add("dino_local_crops_loss", scale_l, torch.tensor(6.142908096313477))
    terms.add("dino_global_crops_loss", scale_g, torch.tensor(6.800425052642822))
    terms.add("koleo_loss", 0.1 * 2, torch.tensor(0.6783612966537476))
    terms.add("ibot_loss", 1.0, torch.tensor(3.4856436252593994))
    assert close(terms.total(), 9.928603172302246, 1e-6)


# ---- the slow versions, which are the definitions ------------------------------------------------------------------


def sinkhorn_by_loops(logits: list[list[float]], temperature: float, n_iterations: int) -> list[list[float]]:
    n, K = len(logits), len(logits[0])
    Q = [[math.exp(value / temperature) for value in row] for row in logits]
    for _ in range(n_iterations):
        for k in range(K):
            mass = sum(Q[i][k] for i in range(n))
            for i in range(n):
                Q[i][k] /= mass
        for i in range(n):
            mass = sum(Q[i])
            Q[i] = [value / mass for value in Q[i]]
    return Q


@pytest.mark.parametrize("n_iterations", [1, 2, 3, 10])
def test_sinkhorn_is_its_plain_loop(n_iterations: int) -> None:
    logits = normal(1, 5, 7)
    expected = torch.tensor(sinkhorn_by_loops(logits.tolist(), 0.1, n_iterations))
    assert close(sinkhorn_knopp(logits, 0.1, n_iterations=n_iterations), expected)


def cross_entropy(target: Tensor, logits: Tensor, temperature: float) -> float:
    z = [math.exp(value / temperature) for value in logits.tolist()]
    return -sum(t * math.log(value / sum(z)) for t, value in zip(target.tolist(), z))


@pytest.mark.parametrize("ignore_diagonal", [True, False])
@pytest.mark.parametrize("n_student", [1, 2, 3])
def test_dino_is_its_plain_loop(n_student: int, ignore_diagonal: bool) -> None:
    student, teacher = normal(2, n_student, 3, 5), normal(3, 2, 3, 5).softmax(-1)
    values = [
        cross_entropy(teacher[c_teacher, b], student[c, b], 0.1)
        for c in range(n_student)
        for c_teacher in range(2)
        for b in range(3)
        if not (ignore_diagonal and c == c_teacher)
    ]
    assert close(dino_loss(student, teacher, ignore_diagonal=ignore_diagonal), sum(values) / len(values))


def test_ibot_is_its_plain_loop() -> None:
    masks = torch.tensor([[1, 0, 1], [0, 0, 0], [0, 1, 0]]).bool()
    student, teacher = normal(4, 3, 3, 6), normal(5, 3, 3, 6).softmax(-1)  # [crops, patches, K]
    total = 0.0
    for crop in range(3):
        masked = [p for p in range(3) if masks[crop, p]]
        for p in masked:
            total += cross_entropy(teacher[crop, p], student[crop, p], 0.1) / len(masked)
    value = ibot_patch_loss(student[masks], teacher[masks], masked_patch_weights(masks), 3)
    assert close(value, total / 3)


def whole_sinkhorn(logits: Tensor, temperature: float) -> Tensor:
    q = (logits.double() / temperature).exp()
    for _ in range(3):
        q /= q.sum(0)
        q /= q.sum(1, keepdim=True)
    return q.float()


@pytest.mark.parametrize("entries", [1, 20, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_computed_a_few_rows_at_a_time_are_the_whole_ones(
    entries: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(losses.CHUNK, "cpu", entries)
    teacher, student = normal(50, 11, 7).to(dtype), normal(51, 11, 7).to(dtype)
    before = teacher.clone(), student.clone()
    targets, weights = sinkhorn_knopp(teacher, 0.1), normal(52, 11).abs()
    assert close(targets, whole_sinkhorn(teacher, 0.1), 1e-6)
    found = value_and_gradient(ibot_patch_loss, student, targets, weights, 3)

    def whole(x: Tensor) -> Tensor:
        return -((targets * (x.float() / 0.1).log_softmax(-1)).sum(-1) * weights).sum() / 3

    for a, b in zip(found, value_and_gradient(whole, student)):
        assert a.dtype == b.dtype
        assert close(a, b, 1e-6 if dtype == torch.float32 else 1e-2)
    found = value_and_gradient(dino_loss, student[:10].view(2, 5, 7), targets[:10].view(2, 5, 7), ignore_diagonal=True)

    def crosswise(x: Tensor) -> Tensor:
        return -(targets[:10].view(2, 5, 7).flip(0) * (x.float() / 0.1).log_softmax(-1)).sum() / 10

    for a, b in zip(found, value_and_gradient(crosswise, student[:10].view(2, 5, 7))):
        assert close(a, b, 1e-6 if dtype == torch.float32 else 1e-2)
    assert torch.equal(teacher, before[0])
    assert torch.equal(student, before[1])


def test_cross_entropies_keep_their_inputs_and_nothing_else_for_the_gradient() -> None:
    """Logits of a step have billions of entries; a copy in float32 is gigabytes."""
    student, targets = normal(53, 12, 64).bfloat16().requires_grad_(), normal(54, 12, 64).softmax(-1)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ibot_patch_loss(student, targets, torch.ones(12), 3)
        dino_loss(student.view(4, 3, 64), targets.view(4, 3, 64)[:2])
    inputs = {t.untyped_storage().data_ptr() for t in (student, targets)}
    other = [t for t in saved if t.untyped_storage().data_ptr() not in inputs]
    assert all(t.numel() <= 3 * 64 for t in other)  # the sum of the targets of an image's crops


@pytest.mark.parametrize("topk", [1, 2])
def test_koleo_is_its_plain_loop(topk: int) -> None:
    x = normal(6, 5, 4)
    unit = [row / row.norm() for row in x.double()]
    logs = []
    for i in range(5):
        distances = sorted(float((unit[i] - unit[j]).norm()) for j in range(5) if j != i)
        logs += [-math.log(d) for d in distances[:topk]]
    assert close(koleo_loss_distributed(x, topk=topk), sum(logs) / len(logs))


@pytest.mark.parametrize("negatives", list(GRAM_NEGATIVES))
@pytest.mark.parametrize("img_level", [True, False])
def test_gram_is_its_plain_loop(img_level: bool, negatives: str) -> None:
    student, teacher = normal(32, 2, 4, 4), normal(132, 2, 4, 5)
    crops = [range(0, 4), range(4, 8)] if img_level else [range(0, 8)]
    squares, signs = [], set()
    x, y = student.flatten(0, 1).double(), teacher.flatten(0, 1).double()
    for crop in crops:
        for i in crop:
            for j in crop:
                s = float(x[i] @ x[j] / x[i].norm() / x[j].norm())
                g = float(y[i] @ y[j] / y[i].norm() / y[j].norm())
                signs.add((s < 0, g < 0))
                if negatives == "zero" or (negatives == "zero_teacher_and_shared" and g < 0):
                    s = max(s, 0)
                if negatives != "keep":
                    g = max(g, 0)
                squares.append((s - g) ** 2)
    assert len(signs) == 4  # every combination occurs, so that the choices differ
    assert close(gram_loss(student, teacher, img_level=img_level, negatives=negatives), sum(squares) / len(squares))


def test_text_alignment_is_its_plain_loop() -> None:
    image, text, scale = F.normalize(normal(9, 4, 5), dim=-1), F.normalize(normal(10, 4, 5), dim=-1), 10.0
    total = 0.0
    for i in range(4):
        for a, b in ((image, text), (text, image)):
            weights = [math.exp(scale * float(a[i] @ b[j])) for j in range(4)]
            total -= 0.5 * math.log(weights[i] / sum(weights))
    assert close(image_text_loss(image, text, scale), total / 4)


def test_sigreg_is_its_plain_loop() -> None:
    x, directions = 2 * normal(14, 5, 6) + 0.5, sigreg_directions(6, 3, count=7)
    t = torch.linspace(-5, 5, 17)
    total = 0.0
    for m in range(7):
        heights = []
        for knot in t.tolist():
            p = [sum(x[i, d].item() * directions[d, m].item() for d in range(6)) for i in range(5)]
            cos, sin = (sum(f(knot * value) for value in p) / 5 for f in (math.cos, math.sin))
            target = math.exp(-(knot**2) / 2)
            heights.append(target * ((cos - target) ** 2 + sin**2))
        total += sum((a + b) / 2 * 10 / 16 for a, b in pairwise(heights))
    assert close(sigreg_loss(x, directions), total / 7)


@pytest.mark.parametrize("n_masked", [0, 3, 12])
def test_visible_patches_are_those_without_a_mask(n_masked: int) -> None:
    masks = torch.zeros(3, 4, dtype=torch.bool)
    masks.view(-1)[[1, 6, 4] if n_masked == 3 else slice(n_masked)] = True
    positions, weights = [], []
    for c in range(3):
        for p in range(4):
            if not masks[c, p]:
                positions.append(4 * c + p)
                weights.append(1 / sum(not masked for masked in masks[c].tolist()))
    found, weight = visible_patches(masks, n_masked)
    assert found.tolist() == positions
    assert weight.tolist() == pytest.approx(weights)


# ---- the same batch on two ranks -----------------------------------------------------------------------------------


def test_koleo_over_two_ranks_is_koleo_of_the_whole_batch() -> None:
    x = normal(11, 6, 5)
    whole, whole_gradient = value_and_gradient(koleo_loss, x)
    ranks = run_ranks(koleo_on_a_rank, 2, x, 1, None)
    assert close((ranks[0][0] + ranks[1][0]) / 2, whole)
    assert close(torch.cat([gradient for _, gradient in ranks]) / 2, whole_gradient)  # data parallelism's average


def test_text_alignment_over_two_ranks_is_that_of_the_whole_batch() -> None:
    image, text, scale = F.normalize(normal(12, 6, 5), dim=-1), F.normalize(normal(13, 6, 5), dim=-1), torch.tensor(9.0)
    whole = text_on_a_rank(image, text, scale)
    (value, image_gradient, text_gradient, scale_gradient), other = run_ranks(text_on_a_rank, 2, image, text, scale)
    assert close((value + other[0]) / 2, whole[0])
    assert close(torch.cat([image_gradient, other[1]]) / 2, whole[1])
    assert close(torch.cat([text_gradient, other[2]]) / 2, whole[2])
    assert close((scale_gradient + other[3]) / 2, whole[3])


def sigreg_on_a_rank(x: Tensor, directions: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """Rank 0 has the rows before `first`, rank 1 the rest."""
    mine = x if distributed.world() == 1 else (x[:first], x[first:])[distributed.rank()]
    return value_and_gradient(sigreg_loss, mine, directions)


def test_sigreg_over_two_ranks_is_that_of_all_rows() -> None:
    x, directions = normal(15, 7, 6) + 1, sigreg_directions(6, 0, count=50)
    whole, gradient = sigreg_on_a_rank(x, directions, 3)
    ranks = run_ranks(sigreg_on_a_rank, 2, x, directions, 3)
    assert all(close(value, whole) for value, _ in ranks)
    assert close(torch.cat([g for _, g in ranks]) / 2, gradient)  # data parallelism's average
    assert not close(sigreg_loss(x[:3], directions), whole)  # a rank alone would have another


def three_ranks_in_two_groups(x: Tensor, bf16: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    group = distributed.subgroup([[0], [1, 2]])
    mine = x.chunk(3)[distributed.rank()]
    return (
        sinkhorn_knopp(mine, 0.1, group=group),
        koleo_loss_distributed(mine, group=group),
        koleo_loss_distributed(bf16.chunk(3)[distributed.rank()], group_size=2),
    )


def test_losses_stay_within_their_subgroup() -> None:
    x = normal(14, 6, 4)
    balanced, spread, own = zip(*run_ranks(three_ranks_in_two_groups, 3, x, x.bfloat16()))
    assert close(balanced[0], sinkhorn_knopp(x[:2], 0.1))
    assert close(torch.cat(balanced[1:]), sinkhorn_knopp(x[2:], 0.1))
    assert close(spread[0], koleo_loss(x[:2]))
    assert close((spread[1] + spread[2]) / 2, koleo_loss(x[2:]))
    assert all(close(value, koleo_loss(x.bfloat16()[2 * r : 2 * r + 2])) for r, value in enumerate(own))


def sinkhorn_with_nothing_on_rank_0(logits: Tensor) -> Tensor:
    return sinkhorn_knopp(logits if distributed.rank() else logits[:0], 0.1)


def test_a_rank_without_masked_patches_takes_part_in_sinkhorn() -> None:
    logits = normal(15, 4, 3)
    nothing, everything = run_ranks(sinkhorn_with_nothing_on_rank_0, 2, logits)
    assert nothing.shape == (0, 3)
    assert close(everything, sinkhorn_knopp(logits, 0.1))
    assert sinkhorn_knopp(logits[:0], 0.1).shape == (0, 3)


# ---- where the reference breaks ------------------------------------------------------------------------------------


def test_sinkhorn_survives_the_recorded_overflow() -> None:
    logits = torch.zeros(4, 8)
    logits[0, 0] = 3.6  # exp(90)
    assert torch.exp(logits / 0.04).isinf().any()
    expected = torch.tensor(sinkhorn_by_loops(logits.tolist(), 0.04, 3))  # Python's floats are wide enough
    assert close(sinkhorn_knopp(logits, 0.04), expected)


@pytest.mark.parametrize("axis", [0, 1])
def test_sinkhorn_stays_finite_when_one_row_or_prototype_towers_over_the_rest(axis: int) -> None:
    logits = normal(16, 6, 5)
    logits.select(axis, 0).add_(20.0)  # exp(500); with one maximum for all, float32 would make the other rows 0/0
    expected = torch.tensor(sinkhorn_by_loops(logits.tolist(), 0.04, 3))
    assert close(sinkhorn_knopp(logits, 0.04), expected, 1e-4)
    logits.select(axis, 0).add_(1e5)
    assert close(sinkhorn_knopp(logits, 0.04).sum(1), torch.ones(6))


def test_sinkhorn_uses_all_prototypes_equally() -> None:
    q = sinkhorn_knopp(normal(17, 12, 4), 0.5, n_iterations=50)
    assert close(q.sum(0), torch.full((4,), 3.0), 1e-3)


def test_koleo_never_takes_a_row_for_its_own_neighbour() -> None:
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])  # similarity −1, which is what the reference writes over the own entry
    assert close(koleo_loss(x), -math.log(2))


def test_a_single_row_gets_no_gradient_from_koleo() -> None:
    _, gradient = value_and_gradient(koleo_loss, normal(18, 1, 4))
    assert not gradient.any()


def test_sigreg_is_smallest_for_normal_rows_and_largest_for_equal_ones() -> None:
    directions = sigreg_directions(16, 0)
    n, rows = 2000, normal(16, 2000, 16)
    of = {
        "normal": sigreg_loss(rows, directions),
        "too narrow": sigreg_loss(rows / 10, directions),
        "too wide": sigreg_loss(rows * 10, directions),
        "flat": sigreg_loss(torch.cat([rows[:, :8], torch.zeros(n, 8)], 1), directions),
        "unit": sigreg_loss(F.normalize(rows, dim=1), directions),
        "equal": sigreg_loss((10 * normal(17, 16)).expand(n, 16), directions),
    }
    assert of["normal"] == pytest.approx(1.06 / n, rel=0.3)  # (√2π − √(2π/3)) / N
    assert min(of, key=of.get) == "normal"  # type: ignore[arg-type]
    assert max(of, key=of.get) == "equal"  # type: ignore[arg-type]
    assert of["equal"] > 2.5
    zeros = (
        math.sqrt(2 * math.pi) - 2 * math.sqrt(math.pi) + math.sqrt(2 * math.pi / 3)
    )  # ∫ e^(−t²/2)(1 − e^(−t²/2))² dt
    assert sigreg_loss(torch.zeros(5, 16), directions) == pytest.approx(zeros, abs=1e-4)


def test_sigreg_does_not_depend_on_a_rotation_in_expectation() -> None:
    x = normal(18, 40, 4) * torch.tensor([3.0, 1.0, 0.1, 0.1])
    rotation = torch.linalg.qr(normal(19, 4, 4)).Q
    few = sigreg_directions(4, 0, count=3)
    assert close(sigreg_loss(x @ rotation, rotation.T @ few), sigreg_loss(x, few), 1e-4)  # exactly, where both rotate
    assert not close(sigreg_loss(x @ rotation, few), sigreg_loss(x, few), 1e-2)
    many = sigreg_directions(4, 0, count=20_000)
    assert close(sigreg_loss(x @ rotation, many), sigreg_loss(x, many), 1e-2)


def test_sigreg_spreads_collapsed_rows_evenly_over_all_directions() -> None:
    x = torch.cat([normal(20, 64, 2), 0.01 * normal(21, 64, 4)], 1).requires_grad_()  # of 6 directions 2 are used
    optimizer = torch.optim.Adam([x], lr=0.05)
    for it in range(150):
        optimizer.zero_grad()
        sigreg_loss(x, sigreg_directions(6, it, count=32)).backward()
        optimizer.step()
    variances = torch.linalg.eigvalsh(x.detach().T.cov())
    assert 0.5 < variances.min() < variances.max() < 1.5


def test_directions_are_a_function_of_the_iteration_and_draw_nothing_from_the_run() -> None:
    before = torch.get_rng_state()
    directions = sigreg_directions(8, 5)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(directions, sigreg_directions(8, 5))
    assert not torch.equal(directions, sigreg_directions(8, 6))
    assert directions.norm(dim=0).sub(1).abs().max() < 1e-6
    assert directions.shape == (8, 1024)


def test_gram_without_a_selected_token_is_zero_and_not_nan() -> None:
    x, masks = normal(19, 2, 3, 4), torch.zeros(2, 3)
    value, gradient = value_and_gradient(gram_loss, x, x, img_level=False, tokens_used="masked", masks=masks)
    assert value == 0
    assert not gradient.any()


def test_ibot_without_a_masked_patch_is_zero() -> None:
    value, _ = value_and_gradient(ibot_patch_loss, torch.zeros(0, 5), torch.zeros(0, 5), torch.zeros(0), 4)
    assert value == 0


def test_losses_compute_in_float32_under_autocast() -> None:
    x, y = normal(20, 2, 4, 6), normal(21, 2, 4, 6)
    masks = torch.ones(2, 4)

    def everything() -> list[Tensor]:
        return [
            dino_loss(x, y.softmax(-1), ignore_diagonal=True),
            ibot_patch_loss(x.flatten(0, 1), y.flatten(0, 1).softmax(-1), masked_patch_weights(masks), 2),
            koleo_loss(x[0]),
            koleo_loss_distributed(x[0], topk=2),
            gram_loss(x, y),
            image_text_loss(x[0], y[0], 3.0),
        ]

    plain = everything()
    with torch.autocast("cpu", torch.bfloat16):
        inside = everything()
    assert all(torch.equal(a, b) for a, b in zip(plain, inside))
    assert all(a.dtype == torch.float32 for a in inside)


def test_sinkhorn_gives_no_gradient_to_the_teacher() -> None:
    assert not sinkhorn_knopp(normal(22, 3, 4).requires_grad_(), 0.1).requires_grad


# ---- small pieces --------------------------------------------------------------------------------------------------


def test_dino_scales_are_the_shares_of_pairs() -> None:
    assert dino_scales(2, 8) == (2 / 18, 16 / 18)
    assert dino_scales(2, 8, ignore_diagonal=False) == (4 / 20, 16 / 20)
    assert dino_scales(2, 0) == (1.0, 0.0)
    with pytest.raises(DinoError, match="no pair"):
        dino_scales(1, 0)


def test_resizing_patches_of_an_oblong_grid_keeps_rows_and_columns_apart() -> None:
    rows = torch.arange(4.0).repeat_interleave(2)  # a 4×2 grid whose patches hold their row number
    resized = resize_patches(rows.view(1, 8, 1), (2, 2), from_hw=(4, 2), method="bilinear")
    assert resized.flatten().tolist() == [0.5, 0.5, 2.5, 2.5]


def test_some_positions_are_different_and_repeatable() -> None:
    drawn = some_positions(10, 0.75, torch.Generator().manual_seed(3))
    assert len(drawn) == 7
    assert len(set(drawn.tolist())) == 7
    assert torch.equal(drawn, some_positions(10, 0.75, torch.Generator().manual_seed(3)))
    assert sorted(some_positions(4, 1.0).tolist()) == [0, 1, 2, 3]


def center_on_a_rank(parts: list[Tensor]) -> Tensor:
    center = SoftmaxCenter(3, momentum=0.5)
    center.update(parts[distributed.rank()])
    return center.center


def test_the_center_moves_to_the_mean_of_all_ranks_rows() -> None:
    logits = normal(23, 5, 3)
    for center in run_ranks(center_on_a_rank, 2, list(logits.split([1, 4]))):
        assert close(center, 0.5 * logits.mean(0, keepdim=True))


def test_the_sum_of_the_terms_is_the_loss_and_the_list_is_the_log() -> None:
    terms, x = LossTerms(), torch.tensor(2.0, requires_grad=True)
    terms.add("a", 3.0, x)
    terms.add("b", 0.5, x * x)
    terms.total().backward()
    assert x.grad == 3 + 0.5 * 2 * 2
    assert {name: value.item() for name, value in terms.log().items()} == {"total_loss": 8.0, "a": 2.0, "b": 4.0}
    assert not any(value.requires_grad for value in terms.log().values())


def test_a_term_that_is_only_watched_cannot_poison_the_loss() -> None:
    terms = LossTerms()
    terms.add("a", 1.0, torch.tensor(1.0))
    terms.add("stats_only/masked_gram_loss", 0.0, torch.tensor(math.inf))
    assert terms.total() == 1.0
    assert terms.log()["stats_only/masked_gram_loss"] == math.inf


# ---- mistakes ------------------------------------------------------------------------------------------------------

X = torch.zeros
MISTAKES: dict[str, tuple[Callable[[], object], str]] = {
    "sinkhorn, three axes": (lambda: sinkhorn_knopp(X(2, 3, 4), 0.1), r"\[2, 3, 4\]; flatten"),
    "sinkhorn, no iteration": (lambda: sinkhorn_knopp(X(3, 4), 0.1, n_iterations=0), "at least 1 iteration"),
    "sinkhorn, temperature 0": (lambda: sinkhorn_knopp(X(3, 4), 0.0), "above 0"),
    "dino, other images": (lambda: dino_loss(X(2, 3, 4), X(2, 5, 4)), r"\[2, 3, 4\] and \[2, 5, 4\]"),
    "dino, flat": (lambda: dino_loss(X(6, 4), X(6, 4)), "crops, images, prototypes"),
    "dino, no pair": (lambda: dino_loss(X(1, 3, 4), X(1, 3, 4), ignore_diagonal=True), "no pair of crops"),
    "ibot, other patches": (lambda: ibot_patch_loss(X(3, 4), X(2, 4), X(3), 2), r"\[3, 4\], \[2, 4\] and \[3\]"),
    "ibot, other weights": (lambda: ibot_patch_loss(X(3, 4), X(3, 4), X(2), 2), "one weight per patch"),
    "koleo, three axes": (lambda: koleo_loss(X(2, 3, 4)), r"one feature vector per image.*\[2, 3, 4\]"),
    "koleo, nothing": (lambda: koleo_loss(X(0, 4)), "one feature vector per image"),
    "koleo, topk": (lambda: koleo_loss_distributed(X(3, 4), topk=3), "3 neighbours among 3 rows; each has 2"),
    "koleo, group size": (lambda: koleo_loss_distributed(X(4, 4), group_size=6), "group size 6 must be a multiple"),
    "sigreg, other width": (lambda: sigreg_loss(X(3, 4), X(5, 8)), r"\[3, 4\] and \[5, 8\]"),
    "gram, other patches": (lambda: gram_loss(X(2, 4, 3), X(2, 16, 3)), "resize_patches"),
    "gram, flat": (lambda: gram_loss(X(4, 3), X(4, 3)), "crops, patches, width"),
    "gram, negatives": (lambda: gram_loss(X(2, 4, 3), X(2, 4, 3), negatives="zeros"), "did you mean 'zero'"),
    "gram, tokens": (lambda: gram_loss(X(2, 4, 3), X(2, 4, 3), tokens_used="some"), "'unmasked', not 'some'"),
    "gram, level": (lambda: gram_loss(X(2, 4, 3), X(2, 4, 3), tokens_used="masked"), "img_level to false"),
    "gram, no masks": (
        lambda: gram_loss(X(2, 4, 3), X(2, 4, 3), tokens_used="masked", img_level=False),
        r"masks of shape \[2, 4\], and got none",
    ),
    "resize, no square": (lambda: resize_patches(X(1, 6, 2), (1, 1)), "6 patches are no grid of 2×2"),
    "text, unpaired": (lambda: image_text_loss(X(2, 4), X(3, 4), 1.0), r"\[2, 4\] and \[3, 4\]"),
    "terms, a vector": (lambda: LossTerms().add("a", 1.0, X(2)), "one number"),
    "terms, none": (lambda: LossTerms().total(), "nothing to train on"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_answered_with_a_sentence(mistake: str) -> None:
    call, sentence = MISTAKES[mistake]
    with pytest.raises(DinoError, match=sentence):
        call()


def test_a_misspelt_choice_is_an_unknown_name() -> None:
    with pytest.raises(UnknownName):
        gram_loss(X(2, 4, 3), X(2, 4, 3), negatives="zeros")


def test_a_name_is_logged_once() -> None:
    terms = LossTerms()
    terms.add("a", 1.0, torch.tensor(1.0))
    with pytest.raises(AssertionError, match="already"):
        terms.add("a", 1.0, torch.tensor(1.0))
