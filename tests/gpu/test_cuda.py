"""What only a GPU can show; skipped without one: `pytest -m gpu`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dinov3 import distributed
from dinov3.config.train import OptimConfig
from dinov3.optim import apply_schedules, build_optimizer, clip_per_module
from dinov3.parallel import parallelize
from tests.train.test_method import VARIANTS, recorded_batch, step_values

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]
ROW = {"lr": 1e-3, "wd": 0.1, "teacher_temp": 0.06, "dino_local_loss_weight": 1.0}
DEVICE = torch.device("cuda")


def steps(device: torch.device, *, n: int = 2, unwatched: int = 2, **options: Any) -> list[dict[str, torch.Tensor]]:
    """Losses and norms of n steps; in those from `unwatched` on a wait for the device is an error."""
    method, values = VARIANTS["plain"].build(), step_values(ROW)
    for network in (method.student, method.ema):
        network.to(device)
        parallelize(network.parts(), device=device, trained=network is method.student, **options)
    optimizer = build_optimizer(method.student.parts(), OptimConfig())
    batch, results = recorded_batch(0).to(device), []
    apply_schedules(optimizer, values)
    for step in range(n):
        if device.type == "cuda" and step >= unwatched:
            torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.zero_grad()
            terms = method.predict(batch, method.targets(batch, values), values)
            terms.total().backward()
            norms = clip_per_module(method.student.parts(), 3.0)
            optimizer.found_inf = torch.zeros((), device=device)
            optimizer.step()
            method.update_ema(0.9)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        results.append(terms.log() | norms)
    return results


@pytest.fixture
def no_group() -> Any:
    yield
    distributed.shutdown()


def test_steps_give_the_numbers_of_a_cpu() -> None:
    for gpu, cpu in zip(steps(DEVICE), steps(torch.device("cpu"))):
        assert {k: float(v) for k, v in gpu.items()} == pytest.approx({k: float(v) for k, v in cpu.items()}, rel=1e-3)


def test_steps_in_bf16_on_a_mesh_of_one_are_near_those_in_float32(no_group: None) -> None:
    half, whole = (steps(DEVICE, param_dtype=dtype)[0]["total_loss"] for dtype in ("bf16", "fp32"))
    assert float(half) == pytest.approx(float(whole), rel=2e-2)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_no_step_waits_for_the_device(dtype: str, no_group: None) -> None:
    steps(DEVICE, n=4, param_dtype=dtype)


def test_memory_does_not_grow_from_step_to_step(no_group: None) -> None:
    steps(DEVICE, n=2, param_dtype="bf16")
    before = torch.cuda.memory_allocated(DEVICE)
    steps(DEVICE, n=6, param_dtype="bf16")
    assert torch.cuda.memory_allocated(DEVICE) <= before + 2**20
