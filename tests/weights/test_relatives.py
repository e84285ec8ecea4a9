"""Weights of DINOv3's form by other projects (EUPE, LingBot-Vision): known by their names, computed as timm does, each
with its own licence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import dinov3
from dinov3.export.convert import convert
from dinov3.models.architectures import ViTConfig
from dinov3.weights import catalog, formats, reading
from tests.weights.test_formats import filled, images

RELATIVES = [row for row in catalog.ROWS if row.known_by_name]
LARGE = {"dinov3_vitb16", "dinov3_vitl16", "dinov3_convnext_base", "dinov3_convnext_small"}
FAIR, APACHE = "FAIR Noncommercial Research License", "Apache License 2.0"


def timm_folder(folder: Path, name: str, **args) -> torch.nn.Module:
    """A folder as timm's hub has them, with random values in which all counts; the model."""
    import timm

    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0, **args).eval()
    with torch.no_grad():
        for key, value in model.named_parameters():
            around = 1.0 if value.ndim < 2 and key.endswith(("weight", "gamma", "gamma_1", "gamma_2")) else 0.0
            value.copy_(torch.randn_like(value) * (0.1 if value.ndim < 2 else value[0].numel() ** -0.5) + around)
    folder.mkdir(parents=True)
    architecture, tag = name.split(".")
    cfg = {"tag": tag, "license": model.pretrained_cfg["license"]}
    (folder / "config.json").write_text(
        json.dumps({"architecture": architecture, "pretrained_cfg": cfg, "model_args": args})
    )
    save_file(model.state_dict(), folder / "model.safetensors")
    return model


@pytest.mark.parametrize(
    "row", [pytest.param(r, marks=[pytest.mark.slow] if r.arch in LARGE else [], id=r.id) for r in RELATIVES]
)
@torch.no_grad()
def test_a_folder_of_timm_is_known_and_computes_the_same(row, tmp_path, oracles):
    theirs = timm_folder(tmp_path / "x", row.timm[0])
    ours = dinov3.load(weights=tmp_path / "x")
    assert (ours.origin.name, ours.origin.form) == (row.id, "timm")
    assert ours.origin.licence == str(row.licence)
    assert sum(p.numel() for p in ours.parameters()) == row.parameters
    x = images(64, 96)
    ours_tokens = ours.forward_features(x)
    if isinstance(row.config, ViTConfig):
        tokens = theirs.forward_features(x)
        torch.testing.assert_close(ours_tokens["x_norm_clstoken"], tokens[:, 0], atol=1e-5, rtol=0)
        torch.testing.assert_close(ours_tokens["x_norm_patchtokens"], tokens[:, 5:], atol=1e-5, rtol=0)
    else:
        torch.testing.assert_close(ours_tokens["x_norm_clstoken"], theirs(x), atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_giant_is_read_by_its_content(tmp_path, oracles):
    """LingBot-Vision's largest has SwiGLU without alignment and no qkv bias: no published row, but the form."""
    small = {"depth": 2, "embed_dim": 96, "num_heads": 3}
    theirs = timm_folder(tmp_path / "x", "vit_giant_patch16_lingbot.robbyant", **small)
    ours = dinov3.load(weights=tmp_path / "x")
    assert ours.origin.name == "custom"
    assert ours.origin.licence == str(catalog.LICENCES["own"])  # Apache-2.0, as its config.json states
    x = images(64, 64)
    torch.testing.assert_close(
        ours.forward_features(x)["x_norm_patchtokens"], theirs.forward_features(x)[:, 5:], atol=1e-5, rtol=0
    )


@pytest.mark.parametrize(
    "name, id, licence",
    [
        ("eupe_vits16", "dinov3_vits16_eupe", FAIR),
        ("lingbot_vits16", "dinov3_vits16_lingbot", APACHE),
        ("belfner/vit_large_patch16_lingbot.robbyant", "dinov3_vitl16_lingbot", APACHE),
        ("vit_small_patch16_lingbot", "dinov3_vits16_lingbot", APACHE),
        ("timm/convnext_base.eupe_lvd1689m", "dinov3_convnext_base_eupe", FAIR),
        ("vit_tiny_patch16_dinov3_qkvb.eupe_lvd1689m", "dinov3_vitt16_eupe", FAIR),
    ],
)
def test_a_name_means_its_row(name, id, licence):
    row = catalog.resolve(name)[0]
    assert (row.id, row.licence.name) == (id, licence)


@pytest.fixture(scope="module")
def small() -> dict[str, torch.Tensor]:
    """ViT-S, of which three projects have files."""
    return {k: v.clone() for k, v in filled(catalog.resolve("dinov3_vits16")[0].config).state_dict().items()}


@pytest.mark.parametrize(
    "file, row",
    [
        ("eupe_vits16.pth", "dinov3_vits16_eupe"),
        ("LingBot-Vision-S.pth", "dinov3_vits16_lingbot"),
        ("lingbot/model.pth", "dinov3_vits16_lingbot"),
        ("eupe/experiments/model.pth", "dinov3_vits16_lvd1689m"),  # folders further up say nothing
        ("eupe/dinov3_vits16_pretrain_lvd1689m-08c60483.pth", "dinov3_vits16_lvd1689m"),
        ("renamed.pth", "dinov3_vits16_lvd1689m"),
    ],
)
def test_a_files_name_tells_whose_it_is(file, row, small, tmp_path):
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    torch.save(small, tmp_path / file)
    opened = reading.open(tmp_path / file)
    assert [r.id for r in opened.rows] == [row]
    assert opened.licence == str(opened.rows[0].licence)


def test_the_name_one_loads_by_decides(small, tmp_path):
    torch.save(small, tmp_path / "renamed.pth")
    model = dinov3.load("eupe_vits16", tmp_path / "renamed.pth")
    assert (model.origin.name, model.origin.licence.split(",")[0]) == ("dinov3_vits16_eupe", FAIR)
    assert dinov3.load("dinov3_vits16", tmp_path / "renamed.pth").origin.name == "dinov3_vits16_lvd1689m"


def test_a_licence_goes_wherever_the_weights_go(small, tmp_path):
    source = tmp_path / "eupe_vits16.pth"
    torch.save(small, source)
    for form in formats.FORMS:
        convert(source, tmp_path / form, form)
        assert FAIR in (tmp_path / form / "NOTICE").read_text()
        opened = reading.open(tmp_path / form)
        assert (opened.rows[0].id, opened.licence.split(",")[0]) == ("dinov3_vits16_eupe", FAIR)
    about = json.loads((tmp_path / "timm" / "config.json").read_text())
    assert about["pretrained_cfg"]["license"] == "fair-noncommercial-research-license"
    assert f"{about['architecture']}.{about['pretrained_cfg']['tag']}" == "vit_small_patch16_dinov3_qkvb.eupe_lvd1689m"
    assert reading.open(tmp_path / "timm").rows[0].id == "dinov3_vits16_eupe"


def test_info_prints_the_licence_and_what_else_it_may_be(small, tmp_path, capsys):
    from dinov3.cli.models import info

    torch.save(small, tmp_path / "lingbot_vits16.pth")
    info(str(tmp_path / "lingbot_vits16.pth"))
    out = capsys.readouterr().out
    assert f"licence: {APACHE}, https://github.com/robbyant/lingbot-vision" in out
    assert "DINOv3 License" in out  # the notice of a redistributor
    assert "same shapes" not in out
    torch.save(small, tmp_path / "renamed.pth")
    info(str(tmp_path / "renamed.pth"))
    out = capsys.readouterr().out
    assert "licence: DINOv3 License" in out
    assert "dinov3_vits16_lingbot and dinov3_vits16_eupe have the same shapes and other licences" in out
    info(str(catalog.FILES / "dinov3_vitt16.safetensors"))
    assert "licence: Apache-2.0" in capsys.readouterr().out
