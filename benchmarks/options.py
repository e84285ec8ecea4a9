"""Synthetic proofs of the newer options of training (docs/options.md), on a CPU: tiny networks, minutes.

    python benchmarks/options.py --out OUT             # all runs, one after the other: 25 CPU minutes
    python benchmarks/options.py --out OUT sigreg      # one of them; `plain` comes first
    python benchmarks/options.py --out OUT1 --seed 1 plain follow both     # with other images and batches

Images are 48 px: small shapes of a random grey (the task) spread over a background of one of two opposite hues (the
nuisance). Brightness says nothing of the hue. `plain` trains 300 steps from random weights; every other run continues it
for 150 steps (`longer`, `follow`, `forget`, `both`: 1,200), `control` without an option; those of `FROM_RANDOM` train 450
from random weights. Printed, on images that were not trained on: k-NN and linear probe of shape and hue, what SIGReg is
about, and how alike student and teacher are at visible patches.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dinov3.checkpoint import Checkpoints, read_tensors
from dinov3.config.train import TrainConfig, load_config
from dinov3.errors import one_of
from dinov3.losses import sigreg_directions, sigreg_loss
from dinov3.neighbours import knn_accuracy
from dinov3.optim import logistic_regression
from dinov3.train.assembly import build_loader
from dinov3.train.method import Network, build_network
from dinov3.train.train import train

SHAPES, HUES, SIDE = ("bar across", "bar down", "disc", "cross"), 2, 48

CONFIG: dict[str, Any] = {
    "student": {
        "arch": "vit_tiny", "embed_dim": 64, "depth": 3, "num_heads": 2, "patch_size": 8, "drop_path_rate": 0.0,
        "layerscale": None, "pos_embed_rope_dtype": "fp32",
    },
    "compute_precision": {"param_dtype": "fp32"},
    "dino": {"head_n_prototypes": 64, "head_bottleneck_dim": 32, "head_hidden_dim": 128, "koleo_loss_weight": 0.02},
    "ibot": {"head_n_prototypes": 64, "head_bottleneck_dim": 32, "head_hidden_dim": 128},
    "train": {"batch_size_per_gpu": 32, "num_workers": 0, "OFFICIAL_EPOCH_LENGTH": 50, "compile": False},
    "optim": {"epochs": 6, "warmup_epochs": 1, "freeze_last_layer_epochs": 0, "scaling_rule": "none", "lr": 2e-3,
              "weight_decay": 0.04, "weight_decay_end": 0.04, "layerwise_decay": 1.0, "patch_embed_lr_mult": 1.0},
    "teacher": {"warmup_teacher_temp_epochs": 0, "teacher_temp": 0.04, "momentum_teacher": 0.98},
    "crops": {"global_crops_size": 32, "local_crops_size": 16, "local_crops_number": 2, "blur_sigma": [0.1, 0.3]},
    "evaluation": {"eval_period_iterations": 100000},
    "checkpointing": {"period": 100000},
    "run": {"device": "cpu", "log_every": 25},
}  # fmt: skip


# a teacher that follows, and global crops near the images that are measured: as large, with half of the colour jitter
FASTER = [
    "teacher.momentum_teacher=0.9", "teacher.final_momentum_teacher=0.9", "dino.koleo_loss_weight=0.1",
    "optim.iterations=1200", "crops.global_crops_scale=[0.6,1]", "crops.global_crops_size=48", "crops.local_crops_size=24",
    "crops.color_jitter_strength=0.5",
]  # fmt: skip
GUIDED = ["guide.enabled=true", "guide.metadata={out}/train.csv", "guide.lambda_schedule.warmup_iterations=30"]
FOLLOWED, FORGOTTEN = "{{name: shape, loss_weight: 0.3}}", "{{name: hue, grl: true, method: ridge, loss_weight: 0.6}}"
RUNS: dict[str, list[str]] = {
    "plain": [],
    "control": [],
    "guide": [*GUIDED, f"guide.guides=[{FOLLOWED}]"],
    "longer": FASTER,  # what `forget` is compared with
    "forget": [*GUIDED, *FASTER, f"guide.guides=[{FORGOTTEN}]"],
    "follow": [*GUIDED, *FASTER, f"guide.guides=[{FOLLOWED}]"],  # what `both` is compared with
    "both": [*GUIDED, *FASTER, f"guide.guides=[{FOLLOWED}, {FORGOTTEN}]"],
    "visible": ["ibot.visible_loss_weight=1"],
    "sigreg": ["dino.sigreg_loss_weight=1"],
    "heads": ["teacher.ema=heads"],
}
FROM_RANDOM: dict[str, list[str]] = {  # what holds the CLS tokens apart, 450 steps
    "nothing": ["dino.koleo_loss_weight=0"],
    "koleo": [],
    "bottleneck": ["dino.sigreg_loss_weight=0.05"],
    "cls": ["dino.sigreg_loss_weight=2", "dino.sigreg_on=cls"],
}


def draw(shape: int, hue: int, rng: np.random.Generator) -> np.ndarray:
    """uint8 [48, 48, 3]: sixteen shapes at random places of a grid, slightly moved, on a coloured background."""
    y, x = np.mgrid[:SIDE, :SIDE]
    angle, chroma = 2 * np.pi * (hue / HUES + rng.uniform(-0.05, 0.05)), rng.uniform(30, 70)
    # two directions orthogonal to grey: brightness says nothing of the hue
    colour = chroma * (np.cos(angle) * np.array([2, -1, -1]) / 6**0.5 + np.sin(angle) * np.array([0, 1, -1]) / 2**0.5)
    pixels = np.ones((SIDE, SIDE, 1)) * (rng.uniform(95, 160) + colour)
    grey = rng.choice([rng.uniform(0, 30), rng.uniform(225, 255)])
    for row in range(4):
        for column in range(4):
            dy = y - (12 * row + 6 + rng.uniform(-1, 1))
            dx = x - (12 * column + 6 + rng.uniform(-1, 1))
            size = rng.uniform(4.5, 5.5)
            inside = (
                (abs(dy) <= size / 2.5) & (abs(dx) <= 6),
                (abs(dx) <= size / 2.5) & (abs(dy) <= 6),
                np.hypot(dx, dy) <= size * 0.8,
                (abs(abs(dx) - abs(dy)) <= 1.6) & (np.maximum(abs(dx), abs(dy)) <= size),
            )[shape]
            pixels[inside] = grey
    return (pixels + rng.normal(0, 6, pixels.shape)).clip(0, 255).astype(np.uint8)


def write_images(folder: Path, each: int, seed: int) -> Path:
    """`each` images of every shape and hue, in sub-folders by shape, and a table beside the folder."""
    rng = np.random.default_rng(seed)
    rows = []
    for s, shape in enumerate(SHAPES):
        (folder / shape).mkdir(parents=True, exist_ok=True)
        for h in range(HUES):
            for i in range(each):
                name = f"{shape}/{h}{i:04}.png"
                Image.fromarray(draw(s, h, rng)).save(folder / name)
                rows.append((name, ("warm", "cold")[h], shape))
    with open(folder.with_suffix(".csv"), "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([("path", "hue", "shape"), *rows])
    return folder


def images_of(folder: Path) -> tuple[Tensor, Tensor, Tensor]:
    """(normalised pixels [N, 3, 48, 48], shapes [N], hues [N])"""
    files = sorted(folder.rglob("*.png"))
    pixels = torch.from_numpy(np.stack([np.asarray(Image.open(f)) for f in files])).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    shapes = torch.tensor([SHAPES.index(f.parent.name) for f in files])
    return (pixels - mean) / std, shapes, torch.tensor([int(f.name[0]) for f in files])


def networks(run: Path, config: TrainConfig) -> tuple[Network, Network]:
    """(student, average) of a run's newest checkpoint."""
    path = Checkpoints(run / "ckpt").latest()
    assert path is not None
    found = build_network(config), build_network(config)
    for network, prefix in zip(found, ("model.student.", "model.model_ema.")):
        tensors = read_tensors(path, prefix)
        network.load_state_dict({k: v for k, v in tensors.items() if not k.startswith("guides.")})
    return found


def entropy_rank(x: Tensor) -> float:
    """RankMe of the rows of x [N, D], centred."""
    spectrum = torch.linalg.svdvals(x - x.mean(0))
    share = spectrum / spectrum.sum()
    return float((-share * (share + 1e-12).log()).sum().exp())


def kappa(a: Tensor, b: Tensor, n: int) -> Tensor:
    """How often two assignments to n prototypes agree, from 0, what chance gives, to 1."""
    chance = (a.bincount(minlength=n) / len(a)) @ (b.bincount(minlength=n) / len(b))
    return ((a == b).float().mean() - chance) / (1 - chance)


@torch.no_grad()
def measured(run: Path, config: TrainConfig, out: Path) -> dict[str, float]:
    """The average's CLS tokens on images without augmentation, and what each option is about."""
    student, ema = networks(run, config)
    student.eval()
    ema.eval()
    found = []
    for folder in (out / "train", out / "test"):
        pixels, shapes, hues = images_of(folder)
        found.append((torch.cat([ema.backbone(x) for x in pixels.split(256)]), shapes, hues))
    (x, shape, hue), (x_test, shape_test, hue_test) = found

    def probe(y: Tensor, y_test: Tensor) -> float:
        with torch.enable_grad():
            weight, bias = logistic_regression(x / x.std(), y, 1.0, int(y.max()) + 1)
        return float((x_test / x.std() @ weight.T + bias).argmax(1).eq(y_test).float().mean())

    raw = ema.dino_head(x_test, part="both")[1]
    variances = torch.linalg.eigvalsh(raw.T.cov()).clamp(min=0)
    loader = build_loader(config, torch.device("cpu"), 0, 1)
    same = []
    for batch in islice(loader, 8):  # the run's first: the same images, crops and masks for every run
        batch = batch.to()
        mine, theirs = (
            network.ibot_head(network.backbone(batch.global_crops, masks, is_training=True)["x_norm_patchtokens"])
            for network, masks in ((student, batch.masks), (ema, None))
        )
        same.append(kappa(mine.argmax(-1)[~batch.masks], theirs.argmax(-1)[~batch.masks], mine.shape[-1]))
    return {
        "shape k-NN": knn_accuracy(x, shape, x_test, shape_test, k=10),
        "shape probe": probe(shape, shape_test),
        "hue k-NN": knn_accuracy(x, hue, x_test, hue_test, k=10),
        "hue probe": probe(hue, hue_test),
        "rank of CLS": entropy_rank(x_test),
        "rank of the bottleneck": entropy_rank(raw),
        "isotropy": float(variances.mean() ** 2 / variances.square().mean()),  # 1: equal in all directions
        "SIGReg": float(sigreg_loss(raw, sigreg_directions(raw.shape[1], 0))),
        "visible patches alike": float(torch.stack(same).mean()),
    }


def run(name: str, out: Path, seed: int = 0) -> dict[str, float]:
    """Trains, or takes what was trained, and measures."""
    file = out / "config.yaml"
    file.write_text(json.dumps(CONFIG))  # JSON is YAML
    of_run = (RUNS | FROM_RANDOM)[name]
    overrides = [f"train.dataset_path={out / 'train'}", f"train.seed={seed}", *(o.format(out=out) for o in of_run)]
    if name in FROM_RANDOM:
        overrides = ["optim.iterations=450", *overrides]
    elif name != "plain":
        first = f"student.resume_from_teacher_chkpt={out / 'plain' / 'eval' / 'training_299'}"
        overrides = [first, "optim.iterations=150", "optim.lr=1e-3", *overrides]
    config, _ = load_config(file, overrides)
    began = time.process_time()
    outcome = train(config, out / name.replace(" ", "-"))
    if not outcome.finished:  # figures of half a run would look like those of a whole one
        sys.exit(f"{name} was stopped ({outcome.reason}): nothing is measured. The same command goes on from there.")
    seconds = time.process_time() - began
    result = measured(out / name.replace(" ", "-"), config, out)
    print(f"{name:12}" + "".join(f"  {k} {v:.3f}" for k, v in result.items()) + f" ({seconds:.0f} CPU s)", flush=True)
    return result


if __name__ == "__main__":
    p = argparse.ArgumentParser(description="Synthetic proofs of the newer options of training.")
    p.add_argument("runs", nargs="*", help=", ".join(RUNS | FROM_RANDOM))
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--seed", type=int, default=0, help="of images and batches")
    options = p.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    kept = options.out / "seed"
    if kept.is_file() and kept.read_text() != str(options.seed):
        sys.exit(f"{options.out} holds the images of seed {kept.read_text()}: give seed {options.seed} another --out.")
    for part, each, seed in (("train", 100, 10 * options.seed), ("test", 150, 10 * options.seed + 1)):
        if not (options.out / part).is_dir():
            write_images(options.out / part, each, seed)
    kept.write_text(str(options.seed))
    for name in options.runs or RUNS | FROM_RANDOM:
        run(one_of("the run", name, RUNS | FROM_RANDOM), options.out, options.seed)
