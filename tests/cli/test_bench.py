"""`dinov3 bench`: every form has its row, and a case that makes no sense is one sentence."""

from __future__ import annotations

import sys

import pytest

from dinov3.cli.bench import bench, memory_of, table
from dinov3.errors import DinoError
from dinov3.inference.linear import has_bf16

PEERS = ("transformers", "timm", "onnxruntime", "openvino")


def test_every_form_has_a_row_beside_eager() -> None:
    steps: list[str] = []
    rows = bench(["dinov3_vitt16:32:2"], rounds=2, skip=PEERS, memory=False, on_progress=steps.append)
    assert {"eager", "fp32, torch", *["bf16, torch"] * has_bf16()} <= {row["form"] for row in rows}
    assert all(row["cpu_ms"] >= 0 and row["least"] <= row["ratio"] <= row["most"] for row in rows)
    (exact,) = [row for row in rows if row["form"] == "fp32, torch"]
    assert exact["cosine"] > 0.999999
    assert 0 < exact["error"] < 1e-5
    assert {row["peak_mib"] for row in rows} == {None}
    assert table(rows).count("\n| ") == len(rows) + 1
    assert len(steps) == 2 + len(rows)  # no long step without a line
    assert steps[-1].startswith(f"accuracy of {rows[-1]['form']}")


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is counted on Linux")
def test_memory_is_at_least_that_of_weights_images_and_tokens() -> None:
    weights, images, tokens = 22e6, 4 * 16 * 3 * 224**2, 4 * 16 * 201 * 192  # bytes; ViT-T, a batch of 16 at 224 px
    found = memory_of("eager", "dinov3_vitt16:224:16", 1, "")
    assert found is not None
    assert (weights + images + 3 * tokens) / 2**20 < found < 200  # three: before and after a sum, and the norm of it


@pytest.mark.slow
def test_files_of_other_libraries_are_read_with_the_shipped_weights() -> None:
    for library in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(library)
    rows = {row["form"]: row for row in bench(["dinov3_vitt16:32:2"], rounds=1, skip=["transformers", "timm"])}
    assert 0 < rows["onnxruntime"]["error"] < 1e-5
    assert rows["onnxruntime"]["peak_mib"] > 20
    if "OpenVINO bf16" in rows:
        assert rows["OpenVINO f32"]["error"] < 1e-5
        assert rows["OpenVINO bf16"]["cosine"] > 0.999


@pytest.mark.parametrize(
    "case", ["dinov3_vits16", "dinov3_vits16:224:0", "dinov3_vits16:225:8", "dinov3_convnext_tiny:224:8"]
)
def test_a_case_is_a_vit_a_size_and_a_batch(case: str) -> None:
    with pytest.raises(DinoError, match="such as dinov3_vits16:224:8"):
        bench([case])
