"""Features made by other libraries, and by hand with usual mistakes, are named."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

import dinov3
from dinov3.cli import app
from dinov3.data.transforms.inputs import Preprocessing
from dinov3.errors import DinoError, ImageError
from dinov3.export.convert import convert
from dinov3.verification import RESIZES, Inputs, read_tensor, verify
from dinov3.weights import writing
from tests.weights.test_formats import TINY, filled

SAT = {"mean": (0.430, 0.411, 0.296), "std": (0.213, 0.156, 0.143)}


@pytest.fixture(scope="module")
def photos(tmp_path_factory, skimage_images) -> list[Path]:
    """Four photographs of different shapes."""
    folder = tmp_path_factory.mktemp("photos")
    for i, name in enumerate(("chelsea.png", "coffee.png", "rocket.jpg", "astronaut.png")):
        image = Image.open(skimage_images / name).convert("RGB")
        image.resize((270 + 40 * i, 300)).save(folder / f"{i}.png")
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return writing.save(filled(TINY["mlp"]), tmp_path_factory.mktemp("tiny") / "tiny.safetensors")


@pytest.fixture(scope="module")
def model(tiny):
    return dinov3.load(weights=tiny)


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "dinov3", "verify-features", *map(str, arguments)]
    return subprocess.run(argv, capture_output=True, text=True)


@torch.no_grad()
def test_features_of_transformers_are_named_in_a_fresh_process(photos, tiny, tmp_path, oracles):
    from transformers import AutoModel, DINOv3ViTImageProcessor

    convert(tiny, tmp_path / "hf", "transformers")
    network = AutoModel.from_pretrained(tmp_path / "hf").eval()
    processor = DINOv3ViTImageProcessor(size={"height": 224, "width": 224})
    x = processor([Image.open(p) for p in photos], return_tensors="pt")["pixel_values"]
    states = network(x, output_hidden_states=True)
    np.save(tmp_path / "pooled.npy", states.pooler_output.numpy())
    save_file({"tokens": states.hidden_states[1].half()}, tmp_path / "hidden.safetensors")

    done = command(tmp_path / "pooled.npy", "--images", photos[0].parent, "--weights", tmp_path / "hf")
    assert done.returncode == 0, done.stderr
    first, code = done.stdout.splitlines()[:2]
    assert first == (
        "pooled.npy [4, 64]: block 1, after the norm, CLS, 224 px with LVD statistics, bilinear on floats, cosine 1.0000"
    )
    assert code.strip().startswith("dinov3.embed(model, images, layer=1, norm=True, size=224, order='float', ")
    ours = eval(code, {"dinov3": dinov3, "model": dinov3.load(weights=tmp_path / "hf"), "images": photos})
    torch.testing.assert_close(ours, states.pooler_output, atol=1e-4, rtol=0)

    verdict = verify(dinov3.load(weights=tmp_path / "hf"), read_tensor(tmp_path / "hidden.safetensors"), photos)
    found = json.loads(json.dumps(verdict.to_dict()))
    (match,) = found["matches"]
    assert (match["layer"], match["normed"], match["pooling"]) == (0, False, "CLS, registers and patches")
    assert match["preprocessing"]["order"] == "float"
    assert found["notes"] == ["values are rounded to float16"]
    assert found["fits"]


@torch.no_grad()
def test_features_of_timm_are_named(photos, tiny, model, tmp_path, oracles):
    import timm

    convert(tiny, tmp_path / "timm", "timm")
    network = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True, num_classes=0, global_pool="avg")
    about = {"input_size": (3, 256, 256), "interpolation": "bicubic", "crop_pct": 1.0}
    transform = timm.data.create_transform(**timm.data.resolve_data_config(about, model=network))
    x = torch.stack([transform(Image.open(p)) for p in photos])
    verdict = verify(model, network.eval()(x), photos)
    assert str(verdict).startswith(
        "block 1, after the norm, mean of patches, 256 px (centre of short side 256) with LVD"
    )
    assert verdict.matches[0].inputs.preprocessing.interpolation == "bicubic"


@pytest.mark.parametrize(
    "pool, changes, sentence",
    [
        (
            lambda f: f.mean,
            {"size": 224, "layer": 0, "norm": False, **SAT},
            "block 0, before the norm, mean of patches, 224 px with SAT statistics, bilinear on 8-bit values, cosine 1.0000",
        ),
        (
            lambda f: torch.cat([f.cls[:, None], f.registers, f.patches.flatten(1, 2)], 1)[:, 1:].mean(1),
            {"size": 256, "mean": (0.0,) * 3, "std": (1.0,) * 3},
            "block 1, after the norm, mean of registers and patches, 256 px with no (0 to 1) statistics, bilinear on 8-bit "
            "values, cosine 1.0000",
        ),
        (
            lambda f: torch.cat([f.cls, f.mean], 1),
            {"size": 256, "shape": "short", "center_crop": 224, "rounding": "down", "interpolation": "bicubic"},
            "; ".join(
                f"columns {columns}: block 1, after the norm, {pooling}, 224 px (centre of short side 256) with LVD "
                "statistics, bicubic on 8-bit values, cosine 1.0000"
                for columns, pooling in (("0 to 63", "CLS"), ("64 to 127", "mean of patches"))
            ),
        ),
        (
            lambda f: f.patches.permute(0, 3, 1, 2),
            {"size": (192, 160), "norm": False},
            "block 1, before the norm, patches, 192 × 160 px (height × width) with LVD statistics, bilinear on 8-bit values, "
            "cosine 1.0000",
        ),
    ],
    ids=["layer, norm, SAT", "registers in the mean, not normalised", "concatenated crop", "map of another size"],
)
def test_usual_mistakes_are_named(pool, changes, sentence, model, photos):
    assert str(verify(model, pool(dinov3.embed(model, photos, **changes)), photos)) == sentence


def test_channels_in_the_wrong_order_and_a_resize_without_antialias_are_named(model, photos):
    bgr = [np.ascontiguousarray(np.array(Image.open(p))[..., ::-1]) for p in photos]
    verdict = verify(model, dinov3.embed(model, bgr, size=224).cls, photos)
    assert (verdict.matches[0].inputs.pixels, verdict.fits) == ("BGR", True)
    assert verdict.matches[0].code() is None
    small = [
        F.interpolate(
            torch.from_numpy(np.array(Image.open(p))).permute(2, 0, 1)[None] / 255, (224, 224), mode="bilinear"
        )
        for p in photos
    ]
    verdict = verify(model, dinov3.embed(model, torch.cat(small), size=224).cls, photos)
    assert (verdict.matches[0].inputs.resize, verdict.fits) == ("bilinear without antialias", True)


@pytest.mark.parametrize("resize", RESIZES, ids=str)
def test_no_setting_is_compared_twice_from_another_start(resize):
    starts = [
        Inputs(Preprocessing(interpolation=i, order=o)) for i in ("bilinear", "bicubic") for o in ("uint8", "float")
    ]
    assert len({start.with_(resize) for start in starts}) == 1


def test_exif_orientation_that_was_ignored_is_named(model, photos, tmp_path):
    files = []
    for photo in photos[:3]:
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.open(photo).save(tmp_path / photo.name, exif=exif)
        files.append(tmp_path / photo.name)
    verdict = verify(model, dinov3.embed(model, photos[:3], size=224).cls, files)
    assert str(verdict).endswith("8-bit values, not turned by EXIF, cosine 1.0000")


def test_order_scale_and_length_are_remarks(model, photos):
    vectors = dinov3.embed(model, photos, size=224).cls
    verdict = verify(model, 0.1 * vectors[[2, 0, 1, 3]], photos)
    assert verdict.order == [2, 0, 1, 3]
    assert verdict.notes == [
        "the rows are in another order than the images: row 0 is of image 2, row 1 is of image 0, row 2 is of image 1",
        "vectors are the features times 0.1",
    ]
    verdict = verify(model, F.normalize(vectors, dim=-1).bfloat16(), photos)
    assert verdict.notes == ["vectors are L2-normalised", "values are rounded to bfloat16"]


def test_convnext_has_stages(photos):
    net = filled(TINY["convnext"])
    verdict = verify(net, dinov3.embed(net, photos, size=224, layer=2).mean, photos)
    assert str(verdict).startswith("stage 2, before the norm, CLS, 224 px")


def test_what_fits_nothing_says_so(photos, tmp_path, tiny):
    noise = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    np.savetxt(tmp_path / "noise.csv", noise, delimiter=",", header="x", comments="")
    arguments = ["verify-features", tmp_path / "noise.csv", "--images", photos[0].parent, "--weights", tiny]
    done = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    found = json.loads(done.stdout)
    assert (done.exit_code, found["fits"]) == (1, False)
    assert found["sentence"].startswith("nothing fits; the nearest is block ")


def test_an_unreadable_image_is_named(model, photos, tmp_path):
    (tmp_path / "bad.png").write_bytes(photos[0].read_bytes()[:500])
    with pytest.raises(ImageError, match=r"image 1 \(.*bad.png\): "):
        verify(model, torch.ones(2, 64), [photos[0], tmp_path / "bad.png"])


@pytest.mark.parametrize(
    "shape, message",
    [
        ((4, 1024), "width is 1024, this model's 64; 1024 is the width of dinov3_vitl16 or dinov3_vitl16plus"),
        ((4, 100), "no published architecture has it"),
        ((3, 64), "cannot be of 4 images"),
        ((4, 7, 64), "no size that was tried gives 7 tokens an image"),
    ],
)
def test_shapes_that_cannot_fit_are_one_sentence(shape, message, model, photos):
    with pytest.raises(DinoError, match=message):
        verify(model, torch.ones(shape), photos)


def test_tables_are_read_with_and_without_names(tmp_path):
    (tmp_path / "a.csv").write_text("path,f0,f1\nx.jpg,1,2\ny.jpg,3,4\n")
    (tmp_path / "b.csv").write_text("1,2\n3,4\n")
    (tmp_path / "c.csv").write_text("0,1,2\n1,3,4\n")
    for name in "abc":
        assert read_tensor(tmp_path / f"{name}.csv").tolist() == [[1, 2], [3, 4]]
    np.savez(tmp_path / "d.npz", a=np.ones(2), b=np.zeros(3))
    assert read_tensor(tmp_path / "d.npz", "b").tolist() == [0, 0, 0]
    with pytest.raises(DinoError, match=r"holds 2 tensors \(a, b\): name one with --key"):
        read_tensor(tmp_path / "d.npz")
    (tmp_path / "e.npy").write_bytes(b"nothing")
    with pytest.raises(DinoError, match="no tensor that can be read"):
        read_tensor(tmp_path / "e.npy")
