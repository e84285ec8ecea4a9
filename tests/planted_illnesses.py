"""Small training runs with one illness planted in each, and healthy ones of the same network and images."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from dinov3 import losses
from dinov3.config.train import load_config
from dinov3.heads.projection import ProjectionHead
from dinov3.models.vit import VisionTransformer
from dinov3.train.train import train
from dinov3.weights.catalog import resolve

# 32 px crops of 8 px patches, a model of 50 thousand weights
SMALL = """
student: {arch: vit_tiny, embed_dim: 48, depth: 2, num_heads: 3, patch_size: 8, drop_path_rate: 0.0, n_storage_tokens: 1,
          layerscale: null, pos_embed_rope_dtype: fp32}
compute_precision: {param_dtype: fp32}
dino: {head_n_prototypes: 64, head_bottleneck_dim: 32, head_hidden_dim: 64, koleo_loss_weight: 0.02}
ibot: {head_n_prototypes: 64, head_bottleneck_dim: 32, head_hidden_dim: 64}
train: {batch_size_per_gpu: 16, num_workers: 0, OFFICIAL_EPOCH_LENGTH: 20, compile: false}
optim: {epochs: 12, warmup_epochs: 1, freeze_last_layer_epochs: 0, lr: 2.0e-3, scaling_rule: none, layerwise_decay: 1.0,
        patch_embed_lr_mult: 1.0}
teacher: {warmup_teacher_temp_epochs: 0, teacher_temp: 0.04, momentum_teacher: 0.97}
crops: {global_crops_size: 32, local_crops_size: 16, local_crops_number: 2}
evaluation: {eval_period_iterations: 120, doctor_images: 128, doctor_draws: false}
checkpointing: {period: 1000}
run: {device: cpu, log_every: 10}
"""


def write_images(folder: Path, n: int = 512, seed: int = 0) -> Path:
    """Two discs, boxes or triangles of any colour on a striped ground: no two alike."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for i in range(n):
        y, x = np.mgrid[:56, :56]
        wave = np.sin(x * rng.uniform(-1, 1) + y * rng.uniform(-1, 1))[..., None]
        ground = rng.uniform(40, 215, 3) + wave * rng.uniform(0, 40, 3)
        image = Image.fromarray(ground.clip(0, 255).astype(np.uint8))
        draw = ImageDraw.Draw(image)
        for _ in range(2):
            (a, b), r, colour = rng.uniform(8, 48, 2), rng.uniform(5, 18), tuple(rng.integers(0, 256, 3).tolist())
            kind = rng.integers(3)
            if kind == 0:
                draw.ellipse((a - r, b - r, a + r, b + r), fill=colour)
            elif kind == 1:
                draw.rectangle((a - r, b - r / 2, a + r, b + r / 2), fill=colour)
            else:
                draw.polygon([(a - r, b + r), (a + r, b + r), (a, b - r)], fill=colour)
        image.save(folder / f"{i}.png")
    return folder


# the model that ships, further trained on photographs
SHIPPED = ["student.arch=dinov3_vitt16", "student.layerscale=1e-5", "student.patch_size=16", "student.mask_k_bias=true",
           "student.norm_layer=layernormbf16", "student.embed_dim=null", "student.depth=null", "student.num_heads=null",
           "student.n_storage_tokens=4", "student.resume_from_teacher_chkpt=vitt16", "crops.global_crops_size=64",
           "crops.local_crops_size=32", "train.batch_size_per_gpu=8"]  # fmt: skip

OVERRIDES: dict[str, list[str]] = {
    "healthy": [],
    "plateau": ["optim.lr=1e-7", "optim.min_lr=1e-7"],
    "full collapse": ["dino.koleo_loss_weight=0"],  # and targets without centring
    "dimensional collapse": [],  # all but three of the features' dimensions are dead
    "unused prototypes": ["dino.head_n_prototypes=512"],
    "teacher frozen": ["teacher.momentum_teacher=1.0"],
    "learning rate too high": ["optim.lr=0.5"],
    "repeated data": [],
    "patch similarity decayed": [
        *SHIPPED,
        "optim.lr=1e-3",
        "optim.iterations=80",
        "evaluation.eval_period_iterations=20",
    ],
    "healthy, continue": [
        *SHIPPED,
        "optim.iterations=240",
        "gram.use_loss=false",  # with it nothing could decay
        "guard.enabled=false",
        "compute_precision.param_dtype=fp32",
        "train.compile=false",
        "run.device=cpu",
    ],
    "healthy, toy_cpu": ["optim.iterations=240", "train.batch_size_per_gpu=8"],
    "healthy, small_cpu": ["optim.iterations=240", "train.batch_size_per_gpu=8", "compute_precision.param_dtype=fp32"],
}
ON_PHOTOGRAPHS = ("patch similarity decayed", "healthy, continue", "healthy, toy_cpu", "healthy, small_cpu")


def run(illness: str, folder: Path, photographs: Path | None = None, *overrides: str) -> Path:
    """Trains with that illness, on drawn images or (those of ON_PHOTOGRAPHS) on a folder; the run's folder."""
    images = photographs if illness in ON_PHOTOGRAPHS else None
    images = images or write_images(folder / "images", 6 if illness == "repeated data" else 512)
    (folder / "small.yaml").write_text(SMALL)
    recipe = f"{illness.split(', ')[1]}.yaml" if ", " in illness else str(folder / "small.yaml")
    watched = [
        "evaluation.eval_period_iterations=120",
        "evaluation.doctor_images=128",
        "train.num_workers=0",
        "checkpointing.period=1000",
    ]
    given = [f"train.dataset_path={images}", *watched, *OVERRIDES[illness], *overrides]
    shipped = row_weights() if "vitt16" in str(given) else ""
    config, _ = load_config(recipe, [g.replace("chkpt=vitt16", f"chkpt={shipped}") for g in given])
    with contextlib.ExitStack() as stack:
        if illness == "full collapse":
            stack.enter_context(without_centring())
        if illness == "unused prototypes":
            stack.enter_context(first_weights(ProjectionHead, equal_prototypes))
        if illness == "dimensional collapse":
            stack.enter_context(first_weights(VisionTransformer, dead_channels))
        train(config, folder / "run")
    return folder / "run"


def row_weights() -> Path:
    """The file of the model that ships."""
    path = resolve("dinov3_vitt16")[0].packaged_path
    assert path is not None
    return Path(path)


@contextlib.contextmanager
def without_centring() -> Iterator[None]:
    """Targets by a plain softmax: nothing keeps one prototype from taking all images (DINO, §5.3)."""
    balanced = losses.sinkhorn_knopp
    losses.sinkhorn_knopp = lambda logits, temperature, **_: (logits.float() / temperature).softmax(-1)  # type: ignore[assignment]
    try:
        yield
    finally:
        losses.sinkhorn_knopp = balanced


@contextlib.contextmanager
def first_weights(cls: type[Any], plant: Callable[[Any], None]) -> Iterator[None]:
    """What is done to the first weights of each network of that class."""
    init = cls.init_weights

    def planted(self: Any) -> None:
        init(self)
        with torch.no_grad():
            plant(self)

    cls.init_weights = planted
    try:
        yield
    finally:
        cls.init_weights = init


def equal_prototypes(head: Any) -> None:
    """Nine of ten prototypes begin equal, and what is equal stays equal."""
    weight = head.last_layer.weight
    weight[len(weight) // 10 :] = weight[0]


def dead_channels(backbone: Any) -> None:
    """All but three of the features' dimensions are zero."""
    backbone.norm.register_forward_hook(lambda _module, _inputs, out: out * (torch.arange(out.shape[-1]) < 3))
