"""Mask2Former's criterion: the plain definition, what does not count, points, and that a head learns by it."""

from __future__ import annotations

import math
from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor

from dinov3.errors import DinoError
from dinov3.heads.encoder import class_maps
from dinov3.heads.mask2former import build_segmentor
from dinov3.heads.objectives import Mask2FormerCriterion, Segments, at_points, dice_loss, mask_loss, pair_costs
from dinov3.models.architectures import ViTConfig
from dinov3.models.vit import VisionTransformer

pytest.importorskip("scipy")


class EveryPixel(Mask2FormerCriterion):
    """Its points are the centres of an h × w grid, so that it compares pixels and nothing is drawn."""

    def __init__(self, n_classes: int, h: int, w: int, **options: Any) -> None:
        super().__init__(n_classes, n_points=h * w, oversample=1, importance=0.0, **options)
        y, x = torch.meshgrid((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w, indexing="ij")
        self.grid = torch.stack([x, y], dim=-1).reshape(1, h * w, 2)

    def points(self, n: int, count: int, device: torch.device) -> Tensor:
        assert count == self.grid.shape[1]
        return self.grid.expand(n, -1, -1)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def plain(outputs: dict[str, Any], class_maps: Tensor, n_classes: int) -> dict[str, float]:
    """The definition, pixel by pixel, the best assignment by trying all."""

    def cross_entropy(mask: Tensor, truth: Tensor, counts: Tensor) -> float:
        pixels = [(m, t) for m, t, c in zip(mask.flatten().tolist(), truth.flatten().tolist(), counts.flatten()) if c]
        return -sum(math.log(sigmoid(m) if t else 1 - sigmoid(m)) for m, t in pixels) / len(pixels)

    def dice(mask: Tensor, truth: Tensor, counts: Tensor) -> float:
        pixels = [(sigmoid(m), t) for m, t, c in zip(mask.flatten().tolist(), truth.flatten(), counts.flatten()) if c]
        both, p, t = sum(p for p, t in pixels if t), sum(p for p, _ in pixels), sum(int(t) for _, t in pixels)
        return 1 - (2 * both + 1) / (p + t + 1)

    sums = {"class": 0.0, "mask": 0.0, "dice": 0.0}
    weighted = total_weight = n_segments = 0.0
    for logits, masks, class_map in zip(outputs["pred_logits"], outputs["pred_masks"], class_maps):
        counts = class_map != 255
        present = sorted(set(class_map[counts].tolist()))
        n_segments += len(present)
        probability = logits.softmax(-1).tolist()

        def cost(q: int, label: int) -> float:
            truth = class_map == label  # noqa: B023
            shape = cross_entropy(masks[q], truth, counts) + dice(masks[q], truth, counts)  # noqa: B023
            return -2 * probability[q][label] + 5 * shape  # noqa: B023

        costs = {(q, label): cost(q, label) for q in range(len(masks)) for label in present}
        best = min(
            permutations(range(len(masks)), len(present)),
            key=lambda chosen: sum(costs[q, label] for q, label in zip(chosen, present)),
        )
        wanted = dict(zip(best, present))
        for q in range(len(masks)):
            weight = 1.0 if q in wanted else 0.1
            weighted += weight * -math.log(probability[q][wanted.get(q, n_classes)])
            total_weight += weight
        for q, label in wanted.items():
            sums["mask"] += cross_entropy(masks[q], class_map == label, counts)
            sums["dice"] += dice(masks[q], class_map == label, counts)
    return {
        "class_loss": weighted / total_weight,
        "mask_loss": sums["mask"] / n_segments,
        "dice_loss": sums["dice"] / n_segments,
    }


def drawn(seed: int = 0) -> tuple[dict[str, Any], Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def said() -> dict[str, Tensor]:
        return {
            "pred_logits": torch.randn(2, 5, 4, generator=generator) * 2,
            "pred_masks": torch.randn(2, 5, 3, 4, generator=generator) * 3,
        }

    class_maps = torch.randint(0, 3, (2, 3, 4), generator=generator)
    class_maps[0, 0, :3] = 255
    class_maps[1][class_maps[1] == 1] = 2
    return said() | {"aux_outputs": [said(), said()]}, class_maps


def test_it_is_the_plain_definition() -> None:
    outputs, class_maps = drawn()
    terms = EveryPixel(3, 3, 4)(outputs, class_maps)
    assert [(t.name, t.weight) for t in terms] == [
        ("class_loss", 2.0), ("mask_loss", 5.0), ("dice_loss", 5.0),
        ("auxiliary_class_loss", 2.0), ("auxiliary_mask_loss", 5.0), ("auxiliary_dice_loss", 5.0),
    ]  # fmt: skip
    values = {t.name: t.value.item() for t in terms}
    for name, expected in plain(outputs, class_maps, 3).items():
        assert values[name] == pytest.approx(expected, rel=1e-4), name
    layers = [plain(said, class_maps, 3) for said in outputs["aux_outputs"]]
    for name in layers[0]:
        assert values[f"auxiliary_{name}"] == pytest.approx(sum(layer[name] for layer in layers), rel=1e-4), name


def test_costs_of_pairs_are_the_losses() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, truth = torch.randn(4, 9, generator=generator) * 3, (torch.rand(3, 9, generator=generator) > 0.5).float()
    counted = (torch.rand(9, generator=generator) > 0.3).float()
    masks, dice = pair_costs(logits, truth, counted)
    for q in range(4):
        for t in range(3):
            pair = (logits[q : q + 1], truth[t : t + 1], counted[None])
            assert torch.allclose(masks[q, t], mask_loss(*pair)[0], atol=1e-5)
            assert torch.allclose(dice[q, t], dice_loss(*pair)[0], atol=1e-5)


def test_pixels_that_do_not_count_teach_nothing() -> None:
    outputs, class_maps = drawn()
    criterion = EveryPixel(3, 3, 4)
    before = criterion(outputs, class_maps).total()
    outputs["pred_masks"][0, :, 0, :3] = 50.0  # all wrong, where nothing is known
    for said in outputs["aux_outputs"]:
        said["pred_masks"][0, :, 0, :3] = -50.0
    assert torch.allclose(criterion(outputs, class_maps).total(), before, atol=1e-4)
    outputs["pred_masks"][0, :, 1, :3] = 50.0
    assert not torch.allclose(criterion(outputs, class_maps).total(), before, atol=1e-2)


def test_a_perfect_prediction_has_nearly_no_loss() -> None:
    class_map = torch.tensor([[[0, 0, 2], [0, 2, 2]]])
    masks = torch.stack([class_map[0] == 2, class_map[0] == 9, class_map[0] == 0])[None] * 40.0 - 20
    logits = torch.full((1, 3, 4), -20.0)
    logits[0, [0, 1, 2], [2, 3, 0]] = 20.0
    said = {"pred_logits": logits, "pred_masks": masks}
    assert EveryPixel(3, 2, 3)(said, class_map).total() < 1e-4
    swapped = {"pred_logits": logits, "pred_masks": masks[:, [2, 1, 0]]}
    assert EveryPixel(3, 2, 3)(swapped, class_map).total() > 1


def test_images_without_a_segment_teach_only_that_there_is_nothing() -> None:
    outputs, class_maps = drawn()
    outputs["pred_masks"].requires_grad_()
    terms = EveryPixel(3, 3, 4)(outputs, torch.full_like(class_maps, 255))
    values = {t.name: t.value for t in terms}
    assert values["mask_loss"] == values["dice_loss"] == 0
    assert values["class_loss"] > 0
    terms.total().backward()
    assert not outputs["pred_masks"].grad.any()


def test_most_points_are_where_the_mask_is_unsure_and_counts() -> None:
    torch.manual_seed(0)
    masks = torch.full((1, 8, 8), 9.0)
    masks[0, :, 6:] = -9.0  # the border is at x = 0.75
    masks[0, :, 0] = 0.0  # quite unsure, and not counted
    counted = torch.ones(1, 8, 8)
    counted[0, :, :3] = 0
    criterion = Mask2FormerCriterion(3, n_points=400, importance=0.25)
    points = criterion.unsure_points(masks, counted)
    assert points.shape == (1, 400, 2)
    near = ((points[0, :100, 0] - 0.75).abs() < 0.13).float().mean()
    assert near > 0.9
    assert (points[0, 100:, 0] < 0.5).float().mean() > 0.3  # the rest is anywhere


def test_points_are_x_then_y_of_pixel_centres() -> None:
    maps = torch.tensor([[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]])
    points = torch.tensor([[[5 / 6, 0.25], [1 / 6, 0.75]]])
    assert torch.allclose(at_points(maps, points), torch.tensor([[3.0, 4.0]]), atol=1e-5)


def test_wrong_shapes_are_errors_of_one_sentence() -> None:
    outputs, class_maps = drawn()
    with pytest.raises(DinoError, match="made for 7 classes, the head has 3"):
        EveryPixel(7, 3, 4)(outputs, class_maps)
    with pytest.raises(DinoError, match="2 images came with 1 targets"):
        EveryPixel(3, 3, 4)(outputs, class_maps[:1])
    with pytest.raises(DinoError, match="a mask holds class 3"):
        EveryPixel(3, 3, 4)(outputs, class_maps.clamp(max=254) * 0 + 3)
    with pytest.raises(DinoError, match="multiples of 32"):
        EveryPixel(3, 3, 4)(outputs, torch.zeros(2, 3, 5, dtype=torch.long))
    broken = Segments(torch.tensor([4]), torch.ones(1, 3, 4), torch.ones(3, 4, dtype=torch.bool))
    with pytest.raises(DinoError, match="target 0 has labels from 4 to 4"):
        EveryPixel(3, 3, 4)(outputs, [broken, broken])
    outputs["pred_masks"][0] = float("nan")
    with pytest.raises(DinoError, match="NaN or infinite"):
        EveryPixel(3, 3, 4)(outputs, class_maps)
    with pytest.raises(DinoError, match="importance"):
        Mask2FormerCriterion(3, importance=2)


def test_a_head_learns_two_images_by_heart() -> None:
    torch.manual_seed(0)
    vit = VisionTransformer(ViTConfig.of(embed_dim=32, depth=4, num_heads=1, n_storage_tokens=1))
    vit.init_weights()
    model = build_segmentor(
        vit, 3, hidden_dim=32, ffn=64, n_heads=4, n_queries=6, pixel_layers=1, decoder_layers=2,
        adapter={"drop_path": 0.0, "channels": 16, "n_heads": 4, "n_points": 2}, n_points=2,
    )  # fmt: skip
    truth = torch.zeros(2, 64, 64, dtype=torch.long)
    truth[0, 16:48, 8:40], truth[1, :, 40:] = 1, 2
    truth[0, :6] = 255
    colours = torch.tensor([[-1.0, 0.5, 0.0], [1.0, -1.0, 0.5], [0.0, 1.0, -1.0]])
    x = colours[truth.clamp(max=2)].permute(0, 3, 1, 2) + 0.1 * torch.randn(2, 3, 64, 64)
    criterion = Mask2FormerCriterion(3, n_points=256)
    optimizer = torch.optim.AdamW([p for n, p in model.named_parameters() if "backbone" not in n], lr=4e-3)
    before = vit.norm.weight.clone()
    losses = []
    for _ in range(40):
        loss = criterion(model(x), truth).total()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.25 * sum(losses[:5]), losses[::10]
    with torch.no_grad():
        found = class_maps(model.predict(x, rescale_to=(64, 64)), "m2f").argmax(1)  # batch norm of these two images
    right = (found == truth)[truth != 255].float().mean()
    assert right > 0.95, right
    assert torch.equal(vit.norm.weight, before)
