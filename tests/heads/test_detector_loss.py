"""The detector's losses: the plain loop, known numbers, who is matched with whom, and that a detector can be fitted."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from toy_models import tiny_vit

from dinov3.errors import DinoError, UnknownName
from dinov3.heads.detr import build_detector, to_cxcywh
from dinov3.heads.objectives import DetrCriterion, Weights, focal_loss, ia_bce_loss

pytest.importorskip("scipy", reason="the matching needs scipy")


# ---- the plain loop ------------------------------------------------------------------------------------------------


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def plain_focal(x: float, positive: bool) -> float:
    p = sigmoid(x)
    return -0.25 * (1 - p) ** 2 * math.log(p) if positive else -0.75 * p**2 * math.log(1 - p)


def plain_overlap(a: list[float], b: list[float]) -> tuple[float, float]:
    def size(box: list[float]) -> float:
        return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])

    both = size([max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])])
    hull = size([min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3])])
    union = size(a) + size(b) - both
    return both / union, both / union - (hull - union) / hull


def plain_deltas(before: list[float], wanted: list[float]) -> list[float]:
    cx, cy, w, h = before
    x, y = (wanted[0] + wanted[2]) / 2, (wanted[1] + wanted[3]) / 2
    return [(x - cx) / w, (y - cy) / h, math.log((wanted[2] - wanted[0]) / w), math.log((wanted[3] - wanted[1]) / h)]


def corners(box: list[float]) -> list[float]:
    cx, cy, w, h = box
    return [cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]


def plain_branch(prediction: dict[str, Tensor], targets: list[dict[str, Tensor]], kind: str) -> list[float]:
    """[class, L1, GIoU], by trying every assignment."""
    sums = [0.0, 0.0, 0.0]
    for i, target in enumerate(targets):
        logits, boxes, before, deltas = (
            prediction[f"pred_{n}"][i].tolist() for n in ("logits", "boxes", "boxes_old", "deltas")
        )
        truth, labels = target["boxes_xyxy_px"].tolist(), target["labels"].tolist()
        Q, T = len(logits), len(labels)

        def l1(q: int, t: int) -> float:
            return sum(abs(a - b) for a, b in zip(deltas[q], plain_deltas(before[q], truth[t])))  # noqa: B023

        def cost(q: int, t: int) -> float:
            x = logits[q][labels[t]]  # noqa: B023
            giou = plain_overlap(corners(boxes[q]), truth[t])[1]  # noqa: B023
            return 2 * (plain_focal(x, True) - plain_focal(x, False)) + l1(q, t) - 2 * giou

        best = min(itertools.permutations(range(Q), T), key=lambda qs: sum(cost(q, t) for t, q in enumerate(qs)))
        owner = {q: t for t, q in enumerate(best)}
        for q in range(Q):
            for k in range(len(logits[q])):
                positive = q in owner and labels[owner[q]] == k
                if kind == "focal":
                    sums[0] += plain_focal(logits[q][k], positive)
                    continue
                p = sigmoid(logits[q][k])
                if positive:
                    t = max(0.01, p**0.25 * plain_overlap(corners(boxes[q]), truth[owner[q]])[0] ** 0.75)
                    sums[0] += -t * math.log(p) - (1 - t) * math.log(1 - p)
                else:
                    sums[0] += -(p**2) * math.log(1 - p)
        for q, t in owner.items():
            sums[1] += l1(q, t)
            sums[2] += 1 - plain_overlap(corners(boxes[q]), truth[t])[1]
    return sums


def prediction(Q: int, K: int = 3, B: int = 2, seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)

    def boxes() -> Tensor:
        centre = 20 + 60 * torch.rand(B, Q, 2, generator=g)
        return torch.cat([centre, 8 + 30 * torch.rand(B, Q, 2, generator=g)], -1)

    return {
        "pred_logits": torch.randn(B, Q, K, generator=g),
        "pred_boxes": boxes(),
        "pred_boxes_old": boxes(),
        "pred_deltas": torch.randn(B, Q, 4, generator=g),
    }


TARGETS = [
    {"boxes_xyxy_px": torch.tensor([[10.0, 12, 40, 44], [50, 20, 90, 90]]), "labels": torch.tensor([0, 2])},
    {"boxes_xyxy_px": torch.tensor([[30.0, 30, 60, 50]]), "labels": torch.tensor([1])},
]


def outputs_of(many: int = 7) -> dict[str, Any]:
    last, first, proposals = prediction(5, seed=1), prediction(5, seed=2), prediction(6, seed=3)
    outputs: dict[str, Any] = dict(last)
    outputs |= {f"{k}_one2many": v for k, v in prediction(many, seed=4).items()}
    return outputs | {
        "aux_outputs": [first],
        "aux_outputs_one2many": [prediction(many, seed=5)],
        "enc_outputs": proposals,
    }


@pytest.mark.parametrize("kind", ["focal", "ia_bce"])
def test_the_losses_are_the_plain_loop(kind: str) -> None:
    outputs = outputs_of()
    terms = DetrCriterion(classification=kind, one2many=2)(outputs, TARGETS)
    log = {name: float(value) for name, _, value in terms}
    repeated = [{k: torch.cat([v, v]) for k, v in t.items()} for t in TARGETS]
    objects = [t | {"labels": torch.zeros_like(t["labels"])} for t in TARGETS]
    last = {k: outputs[k] for k in prediction(1)}
    many = {k: outputs[f"{k}_one2many"] for k in prediction(1)}
    expected = {
        "": [x / 3 for x in plain_branch(last, TARGETS, kind)],
        "auxiliary_": [x / 3 for x in plain_branch(outputs["aux_outputs"][0], TARGETS, kind)],
        "one2many_": [
            (a + b) / 6
            for a, b in zip(
                plain_branch(many, repeated, kind), plain_branch(outputs["aux_outputs_one2many"][0], repeated, kind)
            )
        ],
        "proposal_": [x / 3 for x in plain_branch(outputs["enc_outputs"], objects, kind)],
    }
    for branch, values in expected.items():
        for name, value in zip(("class_loss", "l1_loss", "giou_loss"), values):
            assert log[branch + name] == pytest.approx(value, rel=1e-4), branch + name
    assert float(terms.total()) == pytest.approx(sum(2 * c + a + 2 * g for c, a, g in expected.values()), rel=1e-4)


def test_weights_are_those_given() -> None:
    terms = DetrCriterion(Weights(giou=4.0), one2many_weight=0.5)(outputs_of(many=12), TARGETS)
    weights = {name: weight for name, weight, _ in terms}
    assert (weights["class_loss"], weights["l1_loss"], weights["giou_loss"]) == (2, 1, 4)
    assert weights["one2many_giou_loss"] == 2


# ---- known numbers -------------------------------------------------------------------------------------------------


def test_focal_loss_of_an_undecided_query() -> None:
    zero = torch.zeros(1)
    assert focal_loss(zero, torch.ones(1)).item() == pytest.approx(0.25 * 0.25 * math.log(2))
    assert focal_loss(zero, zero).item() == pytest.approx(0.75 * 0.25 * math.log(2))


def test_the_iou_aware_loss_is_least_where_the_score_is_the_overlap() -> None:
    """p = p^¼ · IoU^¾ only at p = IoU: there the gradient vanishes."""
    for iou in (0.3, 0.8):
        x = torch.tensor([math.log(iou / (1 - iou))], requires_grad=True)
        ia_bce_loss(x, torch.ones(1), torch.tensor([iou])).sum().backward()
        assert x.grad is not None
        assert x.grad.item() == pytest.approx(0, abs=1e-6)


def test_a_perfect_prediction_costs_nothing_but_its_class() -> None:
    truth = TARGETS[0]
    perfect = {
        "pred_logits": torch.full((1, 2, 3), -12.0),
        "pred_boxes": to_cxcywh(truth["boxes_xyxy_px"])[None],
        "pred_boxes_old": to_cxcywh(truth["boxes_xyxy_px"])[None],
        "pred_deltas": torch.zeros(1, 2, 4),
    }
    perfect["pred_logits"][0, 0, 0] = perfect["pred_logits"][0, 1, 2] = 12.0
    none = {k: v[:, :0] for k, v in perfect.items()}
    outputs: dict[str, Any] = dict(perfect) | {f"{k}_one2many": v for k, v in none.items()}
    outputs |= {"aux_outputs": [], "aux_outputs_one2many": [], "enc_outputs": perfect}
    log = {name: float(value) for name, _, value in DetrCriterion()(outputs, [truth])}
    assert "one2many_class_loss" not in log  # evaluation mode has no such queries
    assert log["l1_loss"] == pytest.approx(0, abs=1e-6)
    assert log["giou_loss"] == pytest.approx(0, abs=1e-6)
    assert log["class_loss"] == pytest.approx(0, abs=1e-6)
    assert log["proposal_class_loss"] > 1  # class 2 was said where only "object" counts


def test_a_batch_without_any_box_still_has_a_loss_and_a_gradient() -> None:
    outputs = outputs_of()
    outputs["pred_deltas"].requires_grad_(True)
    outputs["pred_logits"].requires_grad_(True)
    empty = [{"boxes_xyxy_px": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}] * 2
    terms = DetrCriterion()(outputs, empty)
    terms.total().backward()
    assert float(terms.log()["l1_loss"]) == 0
    assert float(terms.log()["class_loss"]) > 0
    assert outputs["pred_deltas"].grad is not None
    assert outputs["pred_logits"].grad.abs().sum() > 0


def test_a_proposal_on_padding_is_the_last_to_get_a_target() -> None:
    outputs = outputs_of()
    terms = DetrCriterion()(outputs, TARGETS).log()
    valid = torch.zeros(2, 6, dtype=torch.bool)
    valid[:, :2] = True
    outputs["enc_outputs"]["valid"] = valid
    restricted = DetrCriterion()(outputs, TARGETS).log()
    two = {k: v[:, :2] for k, v in outputs["enc_outputs"].items()}
    outputs["enc_outputs"] = two
    expected = DetrCriterion()(outputs, TARGETS).log()
    assert restricted["proposal_l1_loss"] == expected["proposal_l1_loss"]
    assert restricted["proposal_l1_loss"] != terms["proposal_l1_loss"]


# ---- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (TARGETS[:1], "2 images came with 1 targets"),
        ([TARGETS[0], TARGETS[1] | {"labels": torch.tensor([3])}], "target 1 has labels from 3 to 3"),
        ([TARGETS[0], TARGETS[1] | {"labels": torch.tensor([0, 1])}], "1 boxes and 2 labels"),
        ([TARGETS[0], TARGETS[1] | {"boxes_xyxy_px": torch.tensor([[5.0, 5, 5, 9]])}], "without area"),
    ],
)
def test_wrong_targets_are_one_sentence(targets: list[dict[str, Tensor]], said: str) -> None:
    with pytest.raises(DinoError, match=said):
        DetrCriterion()(outputs_of(), targets)


def test_an_unknown_classification_is_refused() -> None:
    with pytest.raises(UnknownName, match="did you mean 'ia_bce'"):
        DetrCriterion(classification="iabce")


# ---- fitting --------------------------------------------------------------------------------------------------------


def painted(boxes: list[tuple[int, int, int, int]], colours: list[int], size: int = 96) -> Tensor:
    """Grey noise with filled boxes, one channel each."""
    g = torch.Generator().manual_seed(len(boxes))
    x = 0.1 * torch.randn(3, size, size, generator=g)
    for (left, top, right, bottom), channel in zip(boxes, colours):
        x[:, top:bottom, left:right] = -1.0
        x[channel, top:bottom, left:right] = 2.0
    return x


def test_a_tiny_detector_learns_two_images() -> None:
    model = build_detector(
        tiny_vit(), 2, width=64, n_heads=4, encoder_layers=1, decoder_layers=2, encoder_ffn=96, decoder_ffn=96, n_queries=16,
        n_queries_one2many=24, bias_hidden=32, proposal_min_size=16, encoder_dropout=0.0, class_names=["red", "blue"],
    ).train()  # fmt: skip
    boxes = [[(8, 10, 50, 40), (56, 48, 90, 92)], [(30, 20, 70, 80)]]
    colours = [[0, 2], [2]]
    batch = [painted(b, c) for b, c in zip(boxes, colours)]
    targets = [
        {"boxes_xyxy_px": torch.tensor(b, dtype=torch.float32), "labels": torch.tensor([c // 2 for c in cs])}
        for b, cs in zip(boxes, colours)
    ]
    criterion = DetrCriterion(one2many=4)
    optimizer = torch.optim.AdamW([p for n, p in model.named_parameters() if "backbone" not in n], lr=2e-3)
    first = None
    for _ in range(80):
        loss = criterion(model.detector(batch), targets).total()
        first = first or loss.item()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert loss.item() < first / 5
    for found, wanted in zip(model.eval().detect(batch, score_threshold=0.4), targets):
        order = found.labels.argsort()
        assert found.labels[order].tolist() == sorted(wanted["labels"].tolist())
        assert (found.boxes_xyxy_px[order] - wanted["boxes_xyxy_px"][wanted["labels"].argsort()]).abs().max() < 6
