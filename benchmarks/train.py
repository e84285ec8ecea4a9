"""CPU seconds of a training step, each choice against its alternative: A B A B in one process, medians, and the ratio.

    python benchmarks/train.py                  # vit_tiny, 48 px, 16 images; a minute
    python benchmarks/train.py --device cuda --arch vit_large --size 224 --batch 32

Measured: the Gram forward that is not run while its weight is 0; activation checkpointing; the loop around the step
(finiteness test, clipping, average, agreeing); saving a checkpoint. CPU time of the process on a CPU, so that a busy machine
disturbs less; wall time on a GPU, after waiting for it.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from dinov3 import checkpoint
from dinov3.config.train import TrainConfig
from dinov3.data.crops import CropBatch, MaskConfig, batch_masks
from dinov3.optim import StepValues, build_optimizer, clip_per_module
from dinov3.parallel import parallelize
from dinov3.train.method import SelfDistillation, build_network, copy_weights

VALUES = StepValues(1e-4, 1e-4, 0.04, 0.99, 0.07, 1.0, 1.0)


def settings(options: argparse.Namespace) -> TrainConfig:
    config = TrainConfig()
    config.student.arch, config.student.patch_size = options.arch, options.patch
    config.student.drop_path_rate = 0.0
    for head in (config.dino, config.ibot):
        head.head_n_prototypes, head.head_hidden_dim, head.head_bottleneck_dim = options.prototypes, 512, 128
    config.gram.use_loss = config.gram.img_level = True
    return config


def made_batch(options: argparse.Namespace, device: torch.device) -> CropBatch:
    import random

    side = options.size // options.patch
    masks = batch_masks(2 * options.batch, (side, side), MaskConfig(), random.Random(0))
    size, n = options.size, options.batch
    return CropBatch(
        global_crops=torch.randn(2 * n, 3, size, size),
        local_crops=torch.randn(8 * n, 3, size // 2, size // 2),
        gram_crops=torch.randn(2 * n, 3, 2 * size, 2 * size),
        masks=masks.masks,
        mask_indices=masks.indices,
        masks_weight=masks.weight,
        n_masked=len(masks.indices),
    ).to(device)


def made_method(config: TrainConfig, device: torch.device, checkpointing: str = "none") -> SelfDistillation:
    torch.manual_seed(0)
    with torch.device(device):
        student, ema, gram = build_network(config), build_network(config), build_network(config, heads=False)
    student.init_weights()
    copy_weights(ema, student)
    copy_weights(gram.backbone, student.backbone)
    parallelize(student.parts(), device=device, trained=True, checkpointing=checkpointing)
    return SelfDistillation(student, ema, dino=config.dino, ibot=config.ibot, gram=config.gram, gram_teacher=gram)


def step(method: SelfDistillation, optimizer: torch.optim.Optimizer, batch: CropBatch, values: StepValues) -> None:
    optimizer.zero_grad(set_to_none=True)
    method.predict(batch, method.targets(batch, values), values).total().backward()
    clip_per_module(method.student.parts(), 3.0)
    optimizer.step()
    method.update_ema(values.momentum)


def compare(names: tuple[str, str], a: Callable[[], None], b: Callable[[], None], rounds: int, cuda: bool) -> None:
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds + 1):
        for kept, run in zip(times, (a, b)):
            if cuda:
                torch.cuda.synchronize()
            began = time.perf_counter() if cuda else time.process_time()
            run()
            if cuda:
                torch.cuda.synchronize()
            kept.append((time.perf_counter() if cuda else time.process_time()) - began)
    first, second = (statistics.median(t[1:]) for t in times)  # the first round warms up
    print(f"{names[0]}: {first:.3f} s   {names[1]}: {second:.3f} s   ratio {second / first:.2f}", flush=True)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--arch", default="vit_tiny")
    p.add_argument("--patch", type=int, default=8)
    p.add_argument("--size", type=int, default=48)
    p.add_argument("--batch", type=int, default=16)
    p.add_argument("--prototypes", type=int, default=4096)
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--device", default="cpu")
    options = p.parse_args()
    device = torch.device(options.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    config, batch = settings(options), made_batch(options, device)
    method = made_method(config, device)
    optimizer = build_optimizer(method.student.parts(), config.optim)
    cuda = device.type == "cuda"
    print(f"{options.arch}, {options.batch} images of {options.size} px, Gram crops of {2 * options.size} px, {device}")

    without = replace(VALUES, gram_loss_weight=0.0)
    compare(
        ("step, Gram weight 0", "step, Gram weight 1"),
        lambda: step(method, optimizer, batch, without),
        lambda: step(method, optimizer, batch, VALUES),
        options.rounds,
        cuda,
    )
    for kind in ("selective", "full"):
        other = made_method(config, device, kind)
        other_optimizer = build_optimizer(other.student.parts(), config.optim)
        compare(
            ("step, all activations kept", f"{kind} checkpointing"),
            lambda: step(method, optimizer, batch, without),
            lambda other=other, o=other_optimizer: step(other, o, batch, without),  # type: ignore[misc]
            options.rounds,
            cuda,
        )

    def around() -> None:
        clip_per_module(method.student.parts(), 3.0)
        method.update_ema(0.99)

    compare(
        ("step", "of which clipping and average"),
        lambda: step(method, optimizer, batch, without),
        around,
        options.rounds,
        cuda,
    )
    tensors = checkpoint.module_tensors(method.student, "s.") | checkpoint.module_tensors(method.ema, "e.")
    tensors |= checkpoint.optimizer_tensors(optimizer, method.student)
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        checkpoint.Checkpoints(Path(folder)).save(0, tensors, {})
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        print(f"checkpoint of {size / 1e6:.0f} MB saved in {time.perf_counter() - began:.2f} s (wall)")


if __name__ == "__main__":
    main()
