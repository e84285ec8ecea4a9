"""What only a GPU can show; skipped without one: `pytest -m gpu`."""

from __future__ import annotations

import os
import socket
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from test_parallel import share
from toy_training import write_images

from dinov3 import distributed
from dinov3.config.train import OptimConfig
from dinov3.data.crops import CropConfig
from dinov3.data.datasets import Folder
from dinov3.data.loading import CropLoader
from dinov3.models.low_precision import REFERENCE, fp8_linear, torchao_product
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
    batch = share(recorded_batch(0), distributed.rank(), distributed.world()).to(device)
    results = []
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
            if device.type == "cuda":
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


def test_compiled_steps_give_the_numbers_of_plain_ones() -> None:
    for compiled, plain in zip(steps(DEVICE, compile=True), steps(DEVICE)):
        expected = {k: float(v) for k, v in plain.items()}
        assert {k: float(v) for k, v in compiled.items()} == pytest.approx(expected, rel=1e-3)


def test_batches_copied_ahead_are_those_of_the_loader(tmp_path: Path) -> None:
    images, busy = Folder(write_images(tmp_path)), torch.randn(2048, 2048, device=DEVICE)

    def batches(device: torch.device) -> CropLoader:
        return CropLoader(images, CropConfig(32, 16, 2), patch=8, batch_size=4, workers=2, device=device)

    for batch, expected in zip(islice(batches(DEVICE), 20), batches(torch.device("cpu"))):
        for _ in range(20):  # so that copies and steps overlap
            busy = (busy @ busy).div_(100).tanh_()
        total = batch.to(DEVICE).global_crops.sum()
        assert batch.global_crops.is_cuda
        assert torch.equal(batch.global_crops.cpu(), expected.global_crops)
        assert torch.equal(batch.masks.cpu(), expected.masks)
        assert float(total) == pytest.approx(float(expected.to().global_crops.sum()), rel=1e-3, abs=1)


@pytest.mark.parametrize("library", ["ours", "torchao"])
def test_products_in_8_bits_are_those_of_a_cpu(library: str) -> None:
    if library == "torchao":
        pytest.importorskip("torchao")
        if DEVICE.type == "cuda" and torch.cuda.get_device_capability() < (8, 9):
            pytest.skip("this GPU has no 8-bit products")
    multiply = REFERENCE if library == "ours" else torchao_product(emulate=DEVICE.type == "cpu")
    torch.manual_seed(0)
    x, weight, back = torch.randn(64, 128), torch.randn(192, 128), torch.randn(64, 192).bfloat16()
    results = []
    for device, product in ((DEVICE, multiply), (torch.device("cpu"), REFERENCE)):
        own = [t.detach().to(device).requires_grad_() for t in (x, weight)]
        y = fp8_linear(*own, None, product)
        y.backward(back.to(device))
        results.append([y.detach(), *(t.grad for t in own)])
    for on_gpu, on_cpu in zip(*results):
        assert torch.dist(on_gpu.cpu().float(), on_cpu.float()) < 1e-2 * torch.linalg.vector_norm(on_cpu.float())


def one_of_two(rank: int, port: int, file: str) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    device = distributed.setup(DEVICE.type)
    mean = [distributed.average(result) for result in steps(device)]
    if rank == 0:
        torch.save(mean, file)
    distributed.shutdown()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
def test_two_gpus_over_nccl_compute_what_one_computes_on_the_whole_batch(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(one_of_two, (port, str(tmp_path / "mean.pt")), nprocs=2)
    names = ("dino_global_crops_loss", "dino_local_crops_loss", "ibot_loss")
    for two, one in zip(torch.load(tmp_path / "mean.pt"), steps(DEVICE)):
        assert {n: two[n] for n in names} == pytest.approx({n: float(one[n]) for n in names}, rel=1e-3)
