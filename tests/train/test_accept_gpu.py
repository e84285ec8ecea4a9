"""The acceptance run for a GPU, rehearsed on a CPU at toy size: profile, stop at the time limit, resume, verdict."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from paths import ROOT
from toy_training import write_config, write_images

pytestmark = pytest.mark.slow


def test_the_acceptance_run_resumes_and_gives_a_verdict(tmp_path) -> None:
    images, val = write_images(tmp_path / "train"), write_images(tmp_path / "val", seed=1)
    command = [
        sys.executable, ROOT / "benchmarks/accept_gpu.py", images, "--knn", f"{images}:{val}", "--out", tmp_path / "out",
        "--recipe", write_config(tmp_path), "--steps", "30", "--goal", "0.1", "--device", "cpu",
    ]  # fmt: skip
    stopped = subprocess.run([*command, "--minutes", "0.001"], cwd=ROOT, capture_output=True, text=True)
    assert stopped.returncode == 3, stopped.stderr
    assert "aten::" in (tmp_path / "out/profile.txt").read_text()
    finished = subprocess.run([*command, "train.batch_size_per_gpu=4"], cwd=ROOT, capture_output=True, text=True)
    result = json.loads(finished.stdout.splitlines()[-1])
    assert result == json.loads((tmp_path / "out/acceptance.json").read_text())
    assert result["steps"] == 30
    assert result["knn"][-1] >= 0.1
    learned = result["dino_loss"] < 0.95 * result["dino_plateau"]
    assert (finished.returncode, result["verdict"]) == ((0, "PASS") if learned else (1, "FAIL"))
