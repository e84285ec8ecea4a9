"""The detector: recorded numbers, published key list, gradients, sizes, precision, detections."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_cases import Case

from dinov3.errors import DinoError, UnknownName
from dinov3.heads.boxes import deltas_between, overlap, refine, to_xyxy
from dinov3.heads.detr import DetectorWithProcessor, PostProcess, build_detector
from dinov3.heads.detr_features import batched, grid_position, nearest
from dinov3.heads.detr_transformer import BoxAttention, DetrConfig, Grid
from dinov3.models import ConvNeXt, ConvNeXtConfig, VisionTransformer, ViTConfig, backbone

KEYS = Path(__file__).parent / "keys"


def of_case(case: Case) -> DetectorWithProcessor:
    c = case.config["detection"]
    return build_detector(
        VisionTransformer(ViTConfig.of(**case.config["backbone"])),
        c["num_classes"],
        width=c["hidden_dim"],
        n_heads=c["nheads"],
        encoder_layers=c["num_encoder_layers"],
        decoder_layers=c["dec_layers"],
        decoder_ffn=c["dim_feedforward"],
        n_queries=c["num_queries_one2one"],
        n_queries_one2many=c["num_queries_one2many"],
        bias_hidden=c["decoder_rpe_hidden_dim"],
        bias_type=c["decoder_rpe_type"],
        proposal_min_size=c["proposal_min_size"],
        layers=c["layers_to_use"],
        windows=c["n_windows_sqrt"],
        layernorm=c["backbone_use_layernorm"],
        topk=c["topk"],
    ).eval()


# ---- recorded numbers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["detector", "detector_nowin_ln"])
@torch.no_grad()
def test_the_detector_gives_the_recorded_numbers(name: str) -> None:
    case = Case(name)
    model = of_case(case)
    case.fill(model.detector)
    pictures = [case.input("a"), case.input("b")]
    seen, padding, padded = model.detector.see(pictures)
    assert padded
    case.compare("backbone.features", seen)
    case.compare("backbone.mask", padding)
    case.compare("backbone.pos", grid_position(padding, model.detector.config.width))
    outputs = model.detector(pictures)
    for key in ("pred_logits", "pred_boxes", "pred_boxes_old", "pred_deltas"):
        case.compare(key, outputs[key])
        case.compare(f"enc.{key}", outputs["enc_outputs"][key])
        assert outputs[f"{key}_one2many"].shape[1] == 0
    case.compare("aux0.pred_boxes", outputs["aux_outputs"][0]["pred_boxes"])
    for i, found in enumerate(model(pictures)):
        for key, value in found.items():
            case.compare(f"post.{i}.{key}", value)
    case.all_checked()
