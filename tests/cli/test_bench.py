"""`dinov3 bench`: every form has its row, and a case that makes no sense is one sentence."""

from __future__ import annotations

import pytest

from dinov3.cli.bench import bench, table
from dinov3.errors import DinoError
from dinov3.inference.linear import has_bf16

PEERS = ("transformers", "timm", "onnxruntime", "openvino")


def test_every_form_has_a_row_beside_eager() -> None:
    rows = bench(["dinov3_vitt16:32:2"], rounds=2, skip=PEERS)
    assert {"eager", "fp32, torch", *["bf16, torch"] * has_bf16()} <= {row["form"] for row in rows}
    assert all(row["cpu_ms"] >= 0 and row["least"] <= row["ratio"] <= row["most"] for row in rows)
    (exact,) = [row for row in rows if row["form"] == "fp32, torch"]
    assert exact["cosine"] > 0.999999
    assert table(rows).count("\n| ") == len(rows) + 1


@pytest.mark.parametrize(
    "case", ["dinov3_vits16", "dinov3_vits16:224:0", "dinov3_vits16:225:8", "dinov3_convnext_tiny:224:8"]
)
def test_a_case_is_a_vit_a_size_and_a_batch(case: str) -> None:
    with pytest.raises(DinoError, match="such as dinov3_vits16:224:8"):
        bench([case])
