"""Published heads, dino.txt, int8 and ExecuTorch as graphs, over a small backbone with random weights."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from dinov3.errors import DinoError
from dinov3.export import graph
from dinov3.export.graph import export
from dinov3.heads import dinotxt, mask2former
from dinov3.heads.detr import antialiased, build_detector, to_xyxy, triangles
from dinov3.heads.dpt import CHMV2, SYNTHMIX, build_depther
from dinov3.heads.linear import build_linear_classifier
from dinov3.heads.mask2former import build_segmentor
from dinov3.hub import HEADS, Origin
from dinov3.hub.published_heads import KINDS
from dinov3.models import build
from dinov3.models.architectures import ViTConfig
from tests.export.test_graph import dinov3_export
from tests.weights.test_formats import TINY, filled

SIZE = (96, 128)
TEXT = {"context_length": 9, "vocab_size": 50, "dim": 16, "num_heads": 2, "num_layers": 1}


def stirred(model: nn.Module) -> Any:
    """Every parameter drawn: fresh heads hold zeros that would hide mistakes."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.05)
    return model.eval()


def small_backbone(depth: int = 4) -> Any:
    backbone = build.backbone(ViTConfig(embed_dim=32, depth=depth, num_heads=2, n_storage_tokens=4))
    torch.manual_seed(0)
    backbone.init_weights()
    return backbone.eval()


def published(task: str) -> Any:
    """The head of a task as published, in small, with the origin that loading gives it."""
    narrow = {"backbone_out_layers": (0, 1, 2, 3), "channels": 16, "post_process_channels": (16,) * 4}
    m2f = {"hidden_dim": 32, "ffn": 64, "n_heads": 4, "n_queries": 7, "pixel_layers": 1, "decoder_layers": 2}
    detr = {"width": 32, "n_heads": 4, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn": 64, "decoder_ffn": 64}
    detr |= {"n_queries": 20, "n_queries_one2many": 4, "bias_hidden": 16, "windows": 2, "layers": (0,)}
    backbone = small_backbone(1 if task == "detect" else 4)  # five passes of a detector's
    make = {
        "classify": lambda: build_linear_classifier(backbone, 1000),
        "depth": lambda: build_depther(backbone, **(SYNTHMIX | narrow)),
        "canopy": lambda: build_depther(backbone, **(CHMV2 | narrow)),
        "segment": lambda: build_segmentor(backbone, 5, adapter={"n_heads": 4, "channels": 8}, **m2f),
        "detect": lambda: build_detector(backbone, 5, **detr),
    }
    model = stirred(make[task]())
    row = next(row for row in HEADS.values() if row.task == task)
    model.origin = Origin(row.name, "random", "random", *row.statistics)
    return model


def small_dinotxt() -> Any:
    joint = dinotxt.DinoTxtConfig(embed_dim=64, vision_model_num_head_blocks=1)
    model = dinotxt.build(small_backbone(1), dinotxt.TextConfig(**TEXT), joint)
    model.init_weights()
    return stirred(model)


def onnx_outputs(file: Path, x: torch.Tensor) -> list[np.ndarray]:
    import onnxruntime

    session = onnxruntime.InferenceSession(file)
    (source,) = [i.name for i in session.get_inputs()]
    return session.run(None, {source: x.numpy()})


def cosine(a: np.ndarray, b: torch.Tensor) -> float:
    return torch.cosine_similarity(torch.from_numpy(a).double(), b.double(), dim=-1).min().item()


@torch.no_grad()
def test_a_graph_samples_level_by_level_what_deformable_attention_does():
    torch.manual_seed(0)
    shapes = [(3, 5), (6, 10)]
    value, weights = torch.randn(2, 75, 4, 8), torch.rand(2, 11, 4, 2, 3)
    locations = torch.rand(2, 11, 4, 2, 3, 2) * 1.4 - 0.2  # some lie outside
    expected = mask2former.deformable_sampling(value, shapes, locations, weights)
    torch.testing.assert_close(mask2former.level_by_level(value, shapes, locations, weights), expected)


@pytest.mark.parametrize(("size", "out"), [((48, 48), (32, 16)), ((30, 41), (70, 41)), ((33, 7), (8, 19))])
def test_products_with_triangles_are_the_antialiased_resize(size, out):
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    found = triangles(size[0], out[0]) @ x @ triangles(size[1], out[1]).T
    torch.testing.assert_close(found, antialiased(x, out))


@torch.no_grad()
def test_dinotxt_becomes_two_graphs(tmp_path):
    model = small_dinotxt()
    facts = export(model, tmp_path / "out", "onnx", size=SIZE)
    images, tokens = torch.randn(2, 3, *SIZE), torch.randint(50, (4, 9))
    features, patches = onnx_outputs(tmp_path / "out/image/model.onnx", images)
    (texts,) = onnx_outputs(tmp_path / "out/text/model.onnx", tokens)
    np.testing.assert_allclose(
        facts["image"]["logit_scale"] * features @ texts.T, model.get_logits(images, tokens)[0], atol=1e-4
    )
    expected = model.encode_image_with_patch_tokens(images)[1]
    np.testing.assert_allclose(patches.reshape(expected.shape), expected, atol=2e-5)
    assert patches.shape[1:3] == (6, 8)
    assert facts["text"] == json.loads((tmp_path / "out/text/dinov3.json").read_text())
    assert facts["text"]["inputs"] == {"tokens": ["batch", 9]}
    assert facts["image"]["preprocessing"]["center_crop"] is None  # of a fixed size that is no square


@pytest.mark.slow
@pytest.mark.parametrize("task", ["segment", "detect"])
@torch.no_grad()
def test_a_torch_graph_has_a_head_s_outputs(task, tmp_path):
    model = published(task)
    facts = export(model, tmp_path / "out", "torch-export", size=SIZE)
    x = torch.randn(2, 3, *SIZE)
    logits, places = torch.export.load(tmp_path / "out/model.pt2").module()(x)
    if task == "segment":
        expected = model(x)
        torch.testing.assert_close(places, expected["pred_masks"], atol=1e-3, rtol=1e-4)
    else:
        expected = model.detector(x)
        torch.testing.assert_close(places, to_xyxy(expected["pred_boxes"]), atol=1e-2, rtol=1e-4)
    torch.testing.assert_close(logits, expected["pred_logits"], atol=1e-4, rtol=1e-4)
    assert facts["task"] == task
    assert facts["outputs"] == ["logits", "masks" if task == "segment" else "boxes"]
    assert len(facts["classes"]) == {"segment": 150, "detect": 91}[task]


def test_queries_in_another_order_are_the_same_and_others_are_not():
    generator = np.random.default_rng(0)
    logits, boxes = generator.normal(size=(2, 30, 5)), generator.normal(size=(2, 30, 4)) * 50
    order = generator.permutation(30)
    found = graph._in_order([logits, boxes], [logits[:, order], boxes[:, order]])
    assert (found[0] == logits).all()
    assert (found[1] == boxes).all()
    assert (graph._in_order([logits, boxes], [logits[:, order], boxes])[0] != logits).any()


@torch.no_grad()
def test_a_detector_may_differ_as_much_as_it_does_under_rounding_and_no_more(tmp_path, monkeypatch):
    """The file of a model that chooses other proposals after a rounding, and one whose boxes are wrong."""

    def written(change):
        def write(program, x, work, names, facts):
            return (lambda x: [y.numpy() for y in change(x)]), {}

        return write

    model = published("detect")
    part = graph._parts(model, SIZE, "all")[""]
    monkeypatch.setattr(graph, "_traced", lambda *_: None)
    monkeypatch.setitem(graph.ROUNDING, "fp32", 0.3)  # far enough for another choice
    monkeypatch.setitem(graph.WRITERS, "onnx", written(lambda x: part.module(x * 1.3)))
    facts = graph._write(part, tmp_path, "onnx", SIZE, "fp32")
    assert graph._least(facts["parity"]) < 0.99999
    monkeypatch.setitem(graph.WRITERS, "onnx", written(lambda x: [y.flip(-1) for y in part.module(x)]))
    with pytest.raises(DinoError, match="differs from the model"):
        graph._write(part, tmp_path, "onnx", SIZE, "fp32")
    # one that differs no more than the model itself does, but by too much for a detector
    monkeypatch.setitem(graph.ROUNDING, "fp32", -2.0)
    monkeypatch.setitem(graph.WRITERS, "onnx", written(lambda x: part.module(-x)))
    with pytest.raises(DinoError, match=r"a cosine of 0\.9[0-8]\d+, below 0\.99;"):
        graph._write(part, tmp_path, "onnx", SIZE, "fp32")


def test_a_canopy_file_states_the_head_s_own_statistics():
    (part,) = graph._parts(published("canopy"), (64, 64), "all").values()
    assert part.facts["preprocessing"]["mean"] == (0.420, 0.411, 0.296)
    assert part.module.names == ("depth",)
    (part,) = graph._parts(published("classify"), None, "all").values()
    assert (part.facts["preprocessing"]["size"], part.facts["preprocessing"]["center_crop"]) == (256, 224)


@torch.no_grad()
def test_int8_keeps_matrices_in_a_quarter_of_the_bytes(tmp_path):
    model = filled(TINY["mlp"])
    for precision in ("fp32", "int8"):
        facts = export(model, tmp_path / precision, "torch-export", size=(64, 64), precision=precision)
    state = torch.export.load(tmp_path / "int8/model.pt2").state_dict
    matrices = [v for k, v in state.items() if k.endswith("original0")]
    assert len(matrices) == 4 * model.n_blocks
    assert {v.dtype for v in matrices} == {torch.int8}
    assert 0.999 < min(place["outputs"]["cls"]["cosine"] for place in facts["parity"]) < 1 - 1e-9
    assert not any("parametrizations" in key for key in model.state_dict())  # the model itself stays


@pytest.mark.parametrize(
    ("to", "options", "sentence"),
    [
        (
            "openvino",
            {"precision": "bf16"},
            "INFERENCE_PRECISION_HINT=bf16 of the runtime.*take --precision fp32 or fp16",
        ),
        ("onnx", {"precision": "bf16"}, "computes no bf16 on a CPU.*take --precision fp32 or fp16 or int8"),
        ("executorch", {"precision": "int8"}, "executorch files are not written in int8; take --precision fp32"),
        ("executorch", {}, "plans its memory ahead: give a fixed size"),
    ],
)
def test_a_form_that_brings_nothing_is_one_sentence(to, options, sentence, tmp_path):
    with pytest.raises(DinoError, match=sentence):
        export(filled(TINY["convnext"]), tmp_path / "out", to, **options)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_executorch_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "executorch", None)
    with pytest.raises(
        DinoError, match=r"needs executorch.*pip install --no-deps executorch && pip install flatbuffers"
    ):
        export(filled(TINY["convnext"]), tmp_path / "out", "executorch", size=(64, 64))


# ---- dearer ones -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("task", list(KINDS))
@torch.no_grad()
def test_onnxruntime_and_openvino_compute_a_published_head(task, tmp_path):
    import openvino

    model = published(task)
    facts = export(model, tmp_path / "onnx", "onnx")  # any size
    assert {tuple(place["size"]) for place in facts["parity"]} == {(128, 128), (112, 192), (224, 224)}
    export(model, tmp_path / "openvino", "openvino", size=SIZE)
    x = torch.randn(2, 3, *SIZE)
    compiled = openvino.compile_model(tmp_path / "openvino/model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(
        x.numpy()
    )
    expected = graph.task_outputs(model, x)
    for found in (onnx_outputs(tmp_path / "onnx/model.onnx", x), [compiled[name] for name in expected]):
        for e, f in zip(expected.values(), found, strict=True):
            assert f.shape == e.shape
            assert cosine(f.reshape(2, -1), e.flatten(1)) > 0.99999


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "int8"])
@pytest.mark.parametrize("to", ["onnx", "openvino"])
def test_dinotxt_in_fewer_bits(to, precision, tmp_path):
    facts = export(small_dinotxt(), tmp_path / "out", to, size=SIZE, precision=precision)
    for part in facts.values():
        least = min(row["cosine"] for place in part["parity"] for row in place["outputs"].values())
        assert graph.LEAST_COSINE[precision] <= least < 1 - 1e-9


@pytest.mark.slow
@torch.no_grad()
def test_int8_of_onnx_and_openvino_is_smaller_and_near(tmp_path):
    from dinov3 import load

    model = load()
    full = 4 * sum(p.numel() for p in model.parameters())
    for to, weights in (("onnx", "model.onnx"), ("openvino", "model.bin")):
        export(model, tmp_path / to, to, size=(64, 96), output="cls", precision="int8")
        assert (tmp_path / to / weights).stat().st_size < full / 2.9


@pytest.mark.slow
@torch.no_grad()
def test_the_command_writes_both_towers_of_a_dinotxt_of_other_sizes(tmp_path, capsys, monkeypatch):
    config = ViTConfig(embed_dim=384, depth=12, num_heads=6, n_storage_tokens=4, layerscale_init=1e-5, mask_k_bias=True)
    config = replace(config, norm_layer="layernormbf16")
    backbone = build.backbone(config)
    backbone.init_weights()
    model = dinotxt.build(backbone, dinotxt.TextConfig(**TEXT), dinotxt.DinoTxtConfig(embed_dim=64))
    model.init_weights()
    torch.save(backbone.state_dict(), tmp_path / "vits16.pth")
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("visual_model.backbone.")}
    torch.save(state, tmp_path / "head.pth")
    sizes = {"embed_dim": 64, "text_backbone": TEXT, "vision_backbone": "dinov3_vits16"}
    (tmp_path / "clip_model_config.yaml").write_text(yaml.safe_dump(sizes))
    name = "dinov3_vitl16_dinotxt_tet1280d20h24l"
    files = ["--weights", tmp_path / "head.pth", "--backbone-weights", tmp_path / "vits16.pth"]
    options = ["--to", "torch-export", "--size", "64,64"]
    assert dinov3_export(name, tmp_path / "out", *files, *options, monkeypatch=monkeypatch) == 0
    err = capsys.readouterr().err
    assert "image torch-export, fp32" in err
    assert "3 × 9 tokens" in err
    tokens = torch.randint(50, (2, 9))
    text = torch.export.load(tmp_path / "out/text/model.pt2")
    (found,) = text.module()(tokens)
    assert not any("backbone.patch_embed" in key for key in text.state_dict)  # each file holds its own tower
    torch.testing.assert_close(found, model.eval().encode_text(tokens, normalize=True))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("executorch") is None, reason="executorch is not installed")
@pytest.mark.parametrize("what", ["mlp", "convnext", "classify", "depth"])
@torch.no_grad()
def test_executorch_computes_what_the_model_does(what, tmp_path):
    from executorch.runtime import Runtime

    model = filled(TINY[what]) if what in TINY else published(what)
    facts = export(model, tmp_path / "out", "executorch", size=(64, 96))
    assert facts["inputs"] == {"images": [1, 3, 64, 96]}
    x = torch.randn(1, 3, 64, 96)
    found = Runtime.get().load_program(tmp_path / "out/model.pte").load_method("forward").execute([x])[0]
    expected = model.forward_features(x)["x_norm_clstoken"] if what in TINY else model(x)
    assert cosine(found.numpy().reshape(1, -1), expected.flatten(1)) > 0.99999
