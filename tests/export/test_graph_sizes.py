"""What an exported file holds beside the graph, and sizes that a head's graph takes."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from paths import ROOT
from PIL import Image

import dinov3
from dinov3.data.images import open_image
from dinov3.data.transforms.inputs import Preprocessing
from dinov3.export import graph
from dinov3.export.graph import export
from dinov3.hub.own_heads import build_head, open_task_model, shipped_head
from dinov3.models import build
from dinov3.models.architectures import ViTConfig
from tests.weights.test_formats import TINY, filled


def test_a_file_holds_no_paths_of_the_machine_that_made_it(tmp_path):
    export(filled(TINY["convnext"]), tmp_path / "out", "torch-export", size=(64, 64))
    assert str(ROOT).encode() not in (tmp_path / "out" / "model.pt2").read_bytes()


def test_the_facts_name_the_weights_without_their_folder_and_their_licence():
    (part,) = graph._parts(dinov3.load(), None, "cls").values()
    assert part.facts["model"] == "dinov3_vitt16_own from dinov3_vitt16.safetensors"
    assert part.facts["licence"].startswith("Apache-2.0")


@pytest.mark.parametrize("size", [(224, 224), (320, 320), (224, 320)])
def test_the_preprocessing_of_a_head_makes_inputs_of_the_graph_s_size(size):
    model = open_task_model("classify", str(shipped_head("classify")))
    own = model.head_info.preprocessing
    assert (own.shape, own.size, own.center_crop) == ("short", 256, 224)
    (part,) = graph._parts(model, size, "all").values()
    stated = Preprocessing(**part.facts["preprocessing"])
    assert stated.input_hw == size
    if size == (224, 224):
        assert stated == own
    assert stated.plan(640, 320).lost == (size[0] == size[1])  # a square is cut from the middle, as in training


@pytest.mark.parametrize(
    "verb, size", [("", None), ("", (96, 160)), ("classify", None), ("classify", (320, 320)), ("segment", None)]
)
def test_the_page_s_snippet_makes_inputs_as_the_package_does(verb, size, tmp_path, monkeypatch, skimage_images):
    model = open_task_model(verb, str(shipped_head(verb))) if verb else dinov3.load()
    (part,) = graph._parts(model, size, "all").values()
    exif = Image.Exif()
    exif[0x112] = 6  # stored turned by 90 degrees
    Image.open(skimage_images / "chelsea.png").save(tmp_path / "photo.jpg", exif=exif, quality=95)
    (tmp_path / "exported").mkdir()
    (tmp_path / "exported" / "dinov3.json").write_text(json.dumps(part.facts))
    (code,) = re.findall(r"```python\n(.*?)session =", (ROOT / "docs/export.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    exec(code.replace("import onnxruntime", ""), scope)
    x, _ = Preprocessing(**part.facts["preprocessing"])(open_image("photo.jpg").image)
    np.testing.assert_allclose(scope["x"].transpose(2, 0, 1), x, atol=2.1 / 255 / 0.224)


@pytest.mark.slow
def test_dpt_takes_even_and_odd_grids_in_onnx(tmp_path):
    torch.manual_seed(0)
    backbone = build.backbone(ViTConfig(embed_dim=32, depth=4, num_heads=2, n_storage_tokens=4))
    backbone.init_weights()
    options = {"channels": 16, "post_process_channels": (16, 16, 16, 16)}
    model = build_head("depth", "dpt", backbone, **options).eval()
    facts = export(model, tmp_path / "out", "onnx")
    assert {tuple(place["size"]) for place in facts["parity"]} == {(128, 128), (112, 192), (224, 224)}
