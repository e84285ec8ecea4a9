"""What the tests of training share: images that can be learned, a model of a few thousand weights, a process to kill."""

from __future__ import annotations

import multiprocessing
import multiprocessing.process
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from dinov3.train.loop import Outcome

PATTERNS = ("stripes across", "stripes down", "checks", "dots")

# 32 px crops of 8 px patches, a model of 33 thousand weights: 30 ms a step on one core. The usual layer scale of 1e-5
# would leave the CLS token of so short a run the same for all images.
TOY = """
student: {arch: vit_tiny, embed_dim: 32, depth: 2, num_heads: 2, patch_size: 8, drop_path_rate: 0.2,
          n_storage_tokens: 2, layerscale: 0.1, pos_embed_rope_rescale_coords: 2, pos_embed_rope_dtype: fp32}
compute_precision: {param_dtype: fp32}
dino: {head_n_prototypes: 32, head_bottleneck_dim: 16, head_hidden_dim: 32}
ibot: {head_n_prototypes: 32, head_bottleneck_dim: 16, head_hidden_dim: 32}
train: {batch_size_per_gpu: 4, num_workers: 0, OFFICIAL_EPOCH_LENGTH: 4, compile: false}
optim: {epochs: 3, warmup_epochs: 1, freeze_last_layer_epochs: 0}
teacher: {warmup_teacher_temp_epochs: 1, momentum_teacher: 0.9}
crops: {global_crops_size: 32, local_crops_size: 16, local_crops_number: 2}
evaluation: {eval_period_iterations: 0, knn_image_size: 32}
checkpointing: {period: 4}
run: {device: cpu, log_every: 1, deterministic: true}
"""


def write_config(folder: Path, text: str = TOY) -> str:
    file = folder / "toy.yaml"
    file.write_text(text)
    return str(file)


def write_images(folder: Path, each: int = 3, side: int = 48, seed: int = 0) -> Path:
    """One sub-folder for each of four patterns, whatever their size and phase."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side]
    for pattern in PATTERNS:
        (folder / pattern).mkdir(parents=True, exist_ok=True)
        for i in range(each):
            width = rng.uniform(5, 8)
            a, b = (np.sin(np.pi * (z + rng.uniform(0, 20)) / width) for z in (x, y))
            value = {"stripes across": b, "stripes down": a, "checks": a * b, "dots": np.minimum(a, b)}[pattern] > 0
            # grey: by colour one image is told from another, and patterns need not be learned. Brightness and contrast,
            # which random features follow most, are what augmentation makes irrelevant
            light, contrast = rng.uniform(60, 195), rng.uniform(15, 60)
            noise = rng.normal(0, 10, (side, side, 1))
            pixels = (light + np.where(value, contrast, -contrast)[..., None] + noise).repeat(3, -1)
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / pattern / f"{i}.png")
    return folder


def run(toy: str, images: Path, out: Path, *overrides: str, **options: Any) -> Outcome:
    from dinov3.config.train import load_config
    from dinov3.train.train import train

    config, notes = load_config(toy, [f"train.dataset_path={images}", *overrides])
    return train(config, out, notes=notes, **options)


def train_main(arguments: list[str]) -> None:
    import torch

    torch.set_num_threads(1)
    from dinov3.train.train import main

    raise SystemExit(main(arguments))


def start(arguments: list[str]) -> multiprocessing.process.BaseProcess:
    """The training command in a process of its own, forked from one that has imported torch already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", "numpy"])
    process = context.Process(target=train_main, args=(arguments,))
    process.start()
    return process
