"""What an exported file holds beside the graph, and sizes that a head's graph takes."""

from __future__ import annotations

import pytest
import torch
from paths import ROOT

from dinov3.export.graph import export
from dinov3.hub.own_heads import build_head
from dinov3.models import build
from dinov3.models.architectures import ViTConfig
from tests.weights.test_formats import TINY, filled


def test_a_file_holds_no_paths_of_the_machine_that_made_it(tmp_path):
    export(filled(TINY["convnext"]), tmp_path / "out", "torch-export", size=(64, 64))
    assert str(ROOT).encode() not in (tmp_path / "out" / "model.pt2").read_bytes()


@pytest.mark.slow
def test_dpt_takes_even_and_odd_grids_in_onnx(tmp_path):
    torch.manual_seed(0)
    backbone = build.backbone(ViTConfig(embed_dim=32, depth=4, num_heads=2, n_storage_tokens=4))
    backbone.init_weights()
    options = {"channels": 16, "post_process_channels": (16, 16, 16, 16)}
    model = build_head("depth", "dpt", backbone, **options).eval()
    facts = export(model, tmp_path / "out", "onnx")
    assert {tuple(place["size"]) for place in facts["parity"]} == {(128, 128), (112, 192), (224, 224)}
