"""A student that begins as a compressed copy of its teacher."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import dinov3
from dinov3.data.sources.listing import open_source
from dinov3.data.transforms.inputs import normalised
from dinov3.distill import teachers
from dinov3.distill.run import Distillation, distill
from dinov3.distill.teachers import Images, Views, open_teacher, ridge
from dinov3.errors import DinoError
from dinov3.models.vit import VisionTransformer
from dinov3.runlog import RunDir
from dinov3.weights import reading
from dinov3.weights.writing import save
from projects.vitt16.inherit import inherit_dinov2, slow_first
from projects.vitt16.mobilenetv2 import MobileNetV2, open_mobilenetv2
from projects.vitt16.start import Start, initialise_last_block, isometry
from tests.distill.test_distill import TINY, config_for, tiny_dinov2


@pytest.fixture(autouse=True)
def mobilenetv2_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(teachers.KINDS, "mobilenetv2", open_mobilenetv2)


def test_ridge_finds_the_map_that_made_the_data() -> None:
    torch.manual_seed(0)
    x, W, b = torch.randn(500, 6), torch.randn(4, 6), torch.randn(4)
    found, offset = ridge(x, x @ W.T + b, torch.rand(500) + 0.5, strength=1e-8)
    torch.testing.assert_close(found, W, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(offset, b, atol=1e-4, rtol=1e-4)


def test_turning_queries_and_keys_changes_no_product_and_puts_the_strongest_where_rope_is_slowest() -> None:
    torch.manual_seed(0)
    scale = torch.logspace(1, -1, 16)[torch.randperm(16)]
    q, k = torch.randn(300, 16) * scale, torch.randn(300, 16) * scale
    periods = torch.tensor([1.0, 3.0, 9.0, 27.0])
    turn = slow_first(q, k, periods)
    torch.testing.assert_close((q @ turn.T) @ (k @ turn.T).T, q @ k.T, atol=1e-3, rtol=1e-3)
    energy = (q @ turn.T).var(0).unflatten(0, (4, 4)).sum(0)  # by period
    assert energy.argsort().tolist() == [0, 1, 2, 3]


def test_a_student_of_the_same_width_inherits_nearly_everything_and_half_the_width_a_good_part(
    oracles, tmp_path: Path
) -> None:
    tiny_dinov2(layerscale_value=0.5).save_pretrained(tmp_path)
    state, _ = reading.read(tmp_path / "model.safetensors")
    torch.manual_seed(3)
    blobs = F.interpolate(torch.rand(24, 3, 5, 5) * 255, size=(64, 64), mode="bicubic").clamp(0, 255)
    mine = blobs.to(torch.uint8)
    its = F.interpolate(blobs, size=(56, 56), mode="bicubic", antialias=True).clamp(0, 255).to(torch.uint8)
    for width, heads, least in ((64, 4, 0.8), (32, 2, 0.4)):
        config = replace(TINY, embed_dim=width, num_heads=heads, depth=3)
        torch.manual_seed(0)
        student = VisionTransformer(config)
        student.init_weights()
        explained = inherit_dinov2(student, state, mine, its, fresh=0)
        assert explained[-1] > least
        assert all(torch.isfinite(p).all() for p in student.parameters())
    with pytest.raises(DinoError, match="cannot inherit"):
        inherit_dinov2(VisionTransformer(replace(TINY, depth=9)), state, mine, its)


def test_our_mobilenet_computes_what_timms_computes(oracles) -> None:
    """Same parameters in the same order; the file's names are torchvision's."""
    import timm

    torch.manual_seed(0)
    theirs, ours = timm.create_model("mobilenetv2_100").eval(), MobileNetV2().eval()
    for norm in (m for m in theirs.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        norm.running_mean.normal_(std=0.1)
        norm.weight.data.uniform_(0.5, 1.5)
    values = list(theirs.state_dict().values())
    ours.load_state_dict(dict(zip(ours.state_dict(), values, strict=True)))
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours.targets(x).logits, theirs(x), atol=1e-4, rtol=1e-4)


def test_norms_vanish_into_convolutions_and_nothing_changes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = MobileNetV2().eval()
    for norm in (m for m in plain.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        norm.running_mean.normal_(std=0.1)
        norm.running_var.uniform_(0.5, 2)
        norm.weight.data.uniform_(0.5, 1.5)
        norm.bias.data.normal_(std=0.1)
    torch.save(plain.state_dict(), tmp_path / "w.pth")
    pixels = torch.randint(0, 256, (11, 3, 64, 64), dtype=torch.uint8)  # more than it takes at once
    teacher = open_teacher(f"mobilenetv2:{tmp_path / 'w.pth'},side=64")
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in teacher.network.modules())
    with torch.no_grad():
        known = plain.targets(normalised(pixels, teacher.mean, teacher.std))
    torch.testing.assert_close(teacher(pixels).logits, known.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(teacher(pixels).patches, known.patches, atol=1e-4, rtol=1e-4)


def test_a_torchvision_file_opens_and_another_is_refused(tmp_path: Path) -> None:
    torch.save(MobileNetV2().state_dict(), tmp_path / "mobilenet_v2.pth")
    said = open_teacher(f"mobilenetv2:{tmp_path / 'mobilenet_v2.pth'},side=64")(
        torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    )
    assert (said.cls.shape, said.logits.shape) == ((1, 1280), (1, 1000))
    torch.save({"features.0.0.weight": torch.zeros(32, 3, 3, 3)}, tmp_path / "other.pth")
    with pytest.raises(DinoError, match="not torchvision's MobileNetV2"):
        open_teacher(f"mobilenetv2:{tmp_path / 'other.pth'}")


@pytest.mark.data
def test_the_real_mobilenet_knows_imagenettes_classes(development_data: Path) -> None:
    file = development_data / "mobilenetv2" / "mobilenet_v2-b0353104.pth"
    val = development_data / "imagenette" / "val"
    if not file.is_file() or not val.is_dir():
        pytest.skip("MobileNetV2's file or Imagenette is not present")
    teacher = open_teacher(f"mobilenetv2:{file},side=224")
    indices = [0, 217, 482, 491, 497, 566, 569, 571, 574, 701]  # of the ten classes, in the order of their WordNet ids
    right, total = 0, 0
    for label, place in enumerate(sorted(p for p in val.iterdir() if p.is_dir())):
        images = Images(open_source(place))
        pixels = images.views(Views(scale=(1.0, 1.0)), np.arange(8), 0, 224)
        right += int((teacher(pixels).logits[:, indices].argmax(1) == label).sum())
        total += len(pixels)
    assert right / total > 0.9


def test_an_isometry_keeps_angles_and_finds_the_rotation() -> None:
    torch.manual_seed(0)
    x = torch.randn(400, 6)
    x = x - x.mean(0)
    turned = torch.linalg.qr(torch.randn(20, 6))[0]
    W = isometry(x, 3 * x @ turned.T + 0.01 * torch.randn(400, 20))
    torch.testing.assert_close(W.T @ W, W.T.norm(dim=1).square().mean() * torch.eye(6), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(W, 3 * turned, atol=0.05, rtol=0.05)
    with pytest.raises(DinoError, match="more than 6 images"):
        isometry(x[:4], x[:4])


def of_a_wider_teacher(folder: Path, n: int, **options: Any) -> Any:
    place = folder / "many"
    place.mkdir()
    for i in range(n):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(place / f"{i}.png")
    torch.manual_seed(1)
    model = VisionTransformer(replace(TINY, embed_dim=64, layerscale_init=1.0))
    model.init_weights()
    wide = save(model, folder / "wide.safetensors")
    config = config_for(place, wide, **options)
    config.teachers = [f"dinov3:{wide},patches=0"]
    return config


def test_an_isometric_projection_is_fitted_once_and_stays(tiny_student, tmp_path) -> None:
    config = of_a_wider_teacher(tmp_path, 40)
    work = Distillation(config, RunDir(tmp_path / "run"), Start(isometric="dinov3"))
    before = work.projectors[0].cls.weight.clone()
    gram = before.T @ before
    torch.testing.assert_close(gram, gram.diagonal().mean() * torch.eye(32), atol=1e-4, rtol=1e-3)
    work.train_step(work.batches.at(0))
    work.train_step(work.batches.at(1))
    assert torch.equal(work.projectors[0].cls.weight, before)


def test_the_last_block_points_where_the_teacher_points(tiny_student, folder, tmp_path) -> None:
    torch.manual_seed(0)
    model = VisionTransformer(replace(TINY, layerscale_init=1.0))
    model.init_weights()
    for scale in (model.blocks[-1].ls1, model.blocks[-1].ls2):
        scale.gamma.data.fill_(1e-5)
    inputs = torch.randn(600, 3, 32, 32) + 2 * torch.randn(600, 3, 1, 1)
    turn = torch.linalg.qr(torch.randn(32, 32))[0]
    with torch.no_grad():
        patches = model.eval().forward_features(inputs)["x_norm_patchtokens"]

    def aim(cls):
        return (cls - cls.mean(0)) @ turn

    was, now = initialise_last_block(model, inputs.split(100), aim, patch_weight=1.0)
    assert was < 0.3
    assert now > 0.8
    assert all(bool((scale.gamma == 1).all()) for scale in (model.blocks[-1].ls1, model.blocks[-1].ls2))
    with torch.no_grad():
        after = model.forward_features(inputs)["x_norm_patchtokens"]
    assert F.cosine_similarity(patches, after, dim=-1).mean() > 0.95


def test_the_last_block_can_be_initialised_in_a_run_of_no_steps(tiny_student, tmp_path) -> None:
    config = of_a_wider_teacher(tmp_path, 60, steps=0)
    start = Start(isometric="dinov3", last_block_images=60)
    state = dinov3.load(weights=distill(config, tmp_path / "run", prepare=start)).state_dict()
    assert bool((state["blocks.1.ls2.gamma"] == 1).all())
    assert float(state["blocks.0.ls2.gamma"].max()) < 1e-4
    assert "last block initialised" in (tmp_path / "run" / "log.txt").read_text()


def test_initialising_the_last_block_needs_a_fixed_projection(tiny_student, folder, teacher_file, tmp_path) -> None:
    with pytest.raises(DinoError, match="isometric="):
        distill(config_for(folder, teacher_file), tmp_path / "run", prepare=Start(last_block_images=6))
