"""The heads that ship with the small model: 1,000 classes, and masks that teach foreground from background.

    python -m projects.vitt16.heads classes FOLDER … --classifier mobilenet_v2-b0353104.pth --out classify.safetensors
    python -m projects.vitt16.heads masks FOLDER --teacher dinov2-small --out MASKED

`classes`: a linear head on [CLS ; mean patch] of the frozen student learns the classifier's probabilities (KL) on random
crops; no label is used. The training images show some of the 1,000 kinds far more often than others, so half the logarithm
of the classifier's mean probability is taken off the biases (logit adjustment, arXiv 2007.07314).
`masks`: the object of each photograph by TokenCut on a teacher's patches, as a folder that `dinov3 train-head` takes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from PIL import Image
from torch import Tensor, nn

import dinov3
from dinov3.data import names
from dinov3.data.crops import generator, random_crop
from dinov3.data.images import open_image
from dinov3.data.sources import open_source
from dinov3.data.transforms.inputs import normalised
from dinov3.dense.discovery import token_cut
from dinov3.distill.teachers import Images, Teacher, TeacherSpec
from dinov3.errors import DinoError
from dinov3.features import outputs
from dinov3.fit import FitConfig, fit, shuffled
from dinov3.hub.own_heads import build_head, save_head
from dinov3.losses import LossTerms
from dinov3.predict.classify import classification_preprocessing
from dinov3.weights.writing import write_safetensors
from projects.vitt16.mobilenetv2 import open_mobilenetv2

SIDE, BATCH, CUTMIX = 224, 32, 0.3
app = typer.Typer(add_completion=False, help=__doc__)


@app.command()
def classes(
    folders: list[str],
    classifier: Annotated[str, typer.Option(help="torchvision's MobileNetV2, a .pth.")],
    out: Annotated[Path, typer.Option(help="The head's file.")],
    cache: Annotated[Path, typer.Option(help="A folder for the features.")] = Path("features"),
    views: Annotated[int, typer.Option(help="Random crops of an image.")] = 2,
    epochs: int = 40,
) -> None:
    """Fit the classifier of 1,000 classes."""
    from safetensors.torch import load_file

    student = dinov3.load()
    teacher = open_mobilenetv2(TeacherSpec("mobilenetv2", classifier))
    parts = []
    for folder in folders:
        file = cache / f"{Path(folder).name}.safetensors"
        if not file.is_file():
            write_safetensors(seen_by_both(student, teacher, Images(open_source(folder)), views), file, {})
        parts.append(load_file(file))
    x = torch.cat([part["pooled"] for part in parts]).float()  # [N, 2D]
    logits = torch.cat([part["logits"] for part in parts]).float()  # [N, K]
    print(f"{len(x)} views of {len(folders)} folders", flush=True)

    model = build_head("classification", "linear", student, n_classes=logits.shape[1])
    linear = model.get_submodule("linear_head")
    assert isinstance(linear, nn.Linear)
    with torch.no_grad():  # begins at the least squares solution
        centred = x - x.mean(0)
        gram = centred.T @ centred + 30 * torch.eye(x.shape[1])
        linear.weight.copy_(torch.linalg.solve(gram, centred.T @ (logits - logits.mean(0))).T)
        linear.bias.copy_(logits.mean(0) - linear.weight @ x.mean(0))

    def loss(_: nn.Module, rows: list[int]) -> LossTerms:
        log_p = linear(x[rows]).log_softmax(-1)
        terms = LossTerms()
        terms.add("kl", 1.0, F.kl_div(log_p, logits[rows].softmax(-1), reduction="batchmean"))
        return terms

    config = FitConfig(steps=epochs * len(x) // 1024, lr=1e-3, weight_decay=0.0, batch=1024)
    report = fit(model, lambda step: shuffled(len(x), 1024, step), loss, config)
    print(f"KL {report.last['kl']:.3f}", flush=True)
    with torch.no_grad():
        linear.bias.sub_(0.5 * logits.softmax(-1).mean(0).log())
    linear.half()
    save_head(
        out, model, task="classification", head="linear", options={"n_classes": logits.shape[1]},
        class_names=names.imagenet1k(), preprocessing=classification_preprocessing(student, SIDE), steps=config.steps,
        data={"distilled from": Path(classifier).name},
    )  # fmt: skip
    print(out)


def seen_by_both(student: nn.Module, teacher: Teacher, images: Images, views: int) -> dict[str, Tensor]:
    """{"pooled" [N, 2D], "logits" [N, K]} float16: random crops as the student and the classifier see them."""
    origin: Any = student.origin
    pooled, logits = [], []
    order = [(view, i) for view in range(views) for i in range(len(images))]
    for first in range(0, len(order), BATCH):
        draws = [generator(0, view, i) for view, i in order[first : first + BATCH]]
        chosen = zip(order[first : first + BATCH], draws)
        pixels = torch.stack([random_crop(images[i], SIDE, (0.35, 1.0), draw) for (_, i), draw in chosen])
        if draws[0].random() < CUTMIX:
            side = round(SIDE * draws[0].uniform(0.3, 0.7) ** 0.5)
            top, left = (int(draws[0].uniform(0, SIDE - side)) for _ in "yx")
            box = (slice(None), slice(None), slice(top, top + side), slice(left, left + side))
            pixels[box] = pixels.roll(1, 0)[box]
        (((out,)),) = outputs(student, [normalised(pixels, origin.mean, origin.std)])
        pooled.append(torch.cat([out["cls"], out["patches"].flatten(1, -2).mean(1)], -1).half())
        found = teacher(pixels).logits
        assert found is not None
        logits.append(found.half())
        if first // BATCH % 50 == 0:
            print(f"{first} of {len(order)} views", flush=True)
    return {"pooled": torch.cat(pooled), "logits": torch.cat(logits)}


@app.command()
def masks(
    folder: str,
    teacher: Annotated[str, typer.Option(help="A DINOv2-small folder.")],
    out: Annotated[Path, typer.Option(help="Gets images/ and masks/ (0 ground, 1 object).")],
    most: Annotated[int, typer.Option(help="Images of one sub-folder.")] = 14,
    layer: int = 10,
) -> None:
    """Object masks of photographs, without labels; what looks like no single object is left out."""
    model = dinov3.load(f"transformers:{teacher},layer={layer}")
    for name in ("images", "masks"):
        (out / name).mkdir(parents=True, exist_ok=True)
    number, taken = 0, dict[str, int]()
    for item in open_source(folder):
        group = str(Path(item.path).parent)
        taken[group] = taken.get(group, 0) + 1
        if taken[group] > most:
            continue
        image = open_image(item.read()).image
        mask = token_cut(dinov3.embed(model, image, size=336)).mask.numpy()
        border = np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]])
        if not 0.05 < mask.mean() < 0.7 or border.mean() > 0.35:
            continue
        image.save(out / "images" / f"photograph-{number:05d}.jpg", quality=92)
        smooth = Image.fromarray((255 * mask).astype(np.uint8)).resize(image.size, Image.Resampling.BILINEAR)
        smooth.point(lambda v: int(v > 127)).save(out / "masks" / f"photograph-{number:05d}.png")
        number += 1
    if number == 0:
        raise DinoError(f"no image of {folder} has one object that stands out")
    print(f"{number} images and masks in {out}")


if __name__ == "__main__":
    app()
