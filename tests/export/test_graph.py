"""Graphs written by `dinov3 export`, run by the runtimes they are for, without this package."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from paths import ROOT
from PIL import Image
from torch import Tensor

from dinov3.cli import main
from dinov3.errors import DinoError
from dinov3.export import graph
from dinov3.export.graph import export
from tests.weights.test_formats import TINY, filled

FOREIGN = """
import sys, numpy as np
kind, file, source, out = sys.argv[1:]
x = np.load(source)
if kind == "onnx":
    import onnxruntime
    session = onnxruntime.InferenceSession(file)
    assert [i.name for i in session.get_inputs()] == ["images"]
    found = dict(zip([o.name for o in session.get_outputs()], session.run(None, {"images": x})))
elif kind == "openvino":
    import openvino
    model = openvino.compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    results = model(x)
    found = {port.get_any_name(): results[port] for port in model.outputs}
else:
    import torch
    names = ["cls", "mean", "registers", "patches"]
    found = dict(zip(names, (y.detach() for y in torch.export.load(file).module()(torch.from_numpy(x)))))
assert not [m for m in sys.modules if m.split(".")[0] == "dinov3"]
np.savez(out, **{name: np.asarray(value) for name, value in found.items()})
"""


def dinov3_export(*arguments: object, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["dinov3", "export", *map(str, arguments)])
    with pytest.raises(SystemExit) as done:
        main()
    return int(done.value.code or 0)


def run_elsewhere(kind: str, folder: Path, x: Tensor) -> dict[str, np.ndarray]:
    """Outputs of an exported file in a fresh process that has only its runtime."""
    np.save(folder / "x.npy", x.numpy())
    arguments = [kind, str(folder / graph.TARGETS[kind]), str(folder / "x.npy"), str(folder / "y.npz")]
    subprocess.run([sys.executable, "-c", FOREIGN, *arguments], check=True, cwd=folder)
    return dict(np.load(folder / "y.npz"))


@pytest.mark.parametrize(
    ("kind", "name", "size"),
    [("onnx", "mlp", None), ("openvino", "convnext", (96, 64)), ("torch-export", "7b-like", None)],
)
@torch.no_grad()
def test_the_runtime_computes_what_the_model_does(kind, name, size, tmp_path):
    model = filled(TINY[name])
    facts = export(model, tmp_path / "out", kind, size=size)
    x = torch.randn(2, 3, *(size or (5 * model.stride, 3 * model.stride)))
    found, expected = run_elsewhere(kind, tmp_path / "out", x), model.forward_features(x)
    np.testing.assert_allclose(found["cls"], expected["x_norm_clstoken"], atol=2e-5)
    patches = expected["x_norm_patchtokens"]
    np.testing.assert_allclose(found["patches"].reshape(patches.shape), patches, atol=5e-5)
    np.testing.assert_allclose(found["mean"], patches.mean(1), atol=2e-5)
    assert found["patches"].shape[1:3] == tuple(model.patch_grid(*x.shape[2:]))
    assert facts == json.loads((tmp_path / "out/dinov3.json").read_text())
    assert facts["fingerprint"] == graph.identity.fingerprint(model)
    assert len(facts["parity"]) == (2 if size else 6)
    if kind == "onnx":
        import onnx

        written = onnx.load(tmp_path / "out/model.onnx").graph
        values = [(v.name, v.type.tensor_type.shape.dim) for v in (*written.input, *written.output)]
        shapes = {name: [d.dim_param or d.dim_value for d in sizes] for name, sizes in values}
        assert shapes["images"] == ["batch", 3, "height", "width"]
        assert shapes["patches"] == ["batch", "rows", "columns", model.embed_dim]


def test_half_precision_keeps_what_float16_cannot_hold(tmp_path):
    """A register token whose residual leaves float16's range, as in large models."""
    model = filled(TINY["mlp"])
    with torch.no_grad():
        model.cls_token.mul_(1e5 / model.cls_token.abs().max())
    facts = export(model, tmp_path / "out", "torch-export", size=(64, 64), output="cls", precision="fp16")
    assert min(place["outputs"]["cls"]["cosine"] for place in facts["parity"]) > 0.9999
    assert facts["outputs"] == ["cls"]


def test_a_file_that_computes_something_else_is_not_written(tmp_path, monkeypatch):
    def wrong(program, images, work, names, facts):
        run, about = graph._write_torch(program, images, work, names, facts)
        return (lambda x: [y + 0.1 for y in run(x)]), about

    monkeypatch.setitem(graph.WRITERS, "torch-export", wrong)
    with pytest.raises(DinoError, match=r"differs from the model: a cosine of 0.9.*nothing was written"):
        export(filled(TINY["convnext"]), tmp_path / "out", "torch-export", size=(64, 64))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--size", "225,224"], "the size 225,224 is no multiple of the patch: height and width in steps of 16 px"),
        (["--size", "big"], "HEIGHT,WIDTH in pixels or dynamic, not 'big'"),
        (["--precision", "bf16"], "could not be checked; take --precision fp32 or fp16 or int8"),
        (["--to", "tensorrt"], "'tensorrt' is not one of 'onnx', 'openvino', 'torch-export'"),
    ],
)
def test_what_cannot_be_exported_is_one_sentence(arguments, sentence, tmp_path, capsys, monkeypatch):
    assert dinov3_export("dinov3_vitt16", tmp_path / "out", *arguments, monkeypatch=monkeypatch) != 0
    assert sentence in " ".join(capsys.readouterr().err.split())
    assert list(tmp_path.iterdir()) == []


def test_a_missing_runtime_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(DinoError, match=r"needs onnxruntime; install it with: pip install .*\[export\]"):
        export(filled(TINY["convnext"]), tmp_path / "out", "onnx", size=(64, 64))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_shipped_head_for_masks_is_one_graph(tmp_path, capsys, monkeypatch):
    head = Path(graph.dinov3.__file__).parent / "weights/files/dinov3_vitt16_segment.safetensors"
    assert dinov3_export(head, tmp_path / "out", "--json", monkeypatch=monkeypatch) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["classes"] == ["background", "foreground"]
    assert facts["outputs"] == ["logits"]


@pytest.mark.slow
def test_the_page_runs_as_printed(tmp_path, skimage_images):
    page = (ROOT / "docs/export.md").read_text()
    Image.open(skimage_images / "chelsea.png").save(tmp_path / "photo.jpg")
    (command,) = re.findall(r"```sh\n(.*?)\n```", page)
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-m", *command.split()]
    subprocess.run(words, check=True, cwd=tmp_path, env=environment)
    done = subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "(1, 192) (1, 16, 16, 192)\n"
