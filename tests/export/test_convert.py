"""Folders written by `convert`, loaded by the libraries they are for."""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path

import pytest
import torch

from dinov3.errors import DinoError, WeightsError
from dinov3.export.convert import convert, save_pretrained
from dinov3.hub import load
from dinov3.models.architectures import ViTConfig
from dinov3.models.build import backbone
from dinov3.weights import catalog, filling, formats, identity, reading, writing
from tests.weights.test_formats import HUB, TINY, filled, images, same

SIZES = [(64, 64), (64, 96)]


def pth(folder: Path, name: str, **options) -> tuple[torch.nn.Module, Path]:
    model = filled(TINY[name], **options)
    torch.save(model.state_dict(), folder / f"{name}.pth")
    return model, folder / f"{name}.pth"


def their_model(form: str, folder: Path) -> torch.nn.Module:
    if form == "transformers":
        from transformers import AutoModel

        return AutoModel.from_pretrained(folder).eval()
    import timm

    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


def their_cls(form: str, model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).pooler_output if form == "transformers" else model(x)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("form", ["transformers", "timm"])
@torch.no_grad()
def test_the_other_library_loads_the_folder_and_agrees(form, name, tmp_path, oracles):
    model, source = pth(tmp_path, name)
    report = convert(source, tmp_path / "out", form)
    theirs = their_model(form, tmp_path / "out")
    for x in (images(*size) for size in SIZES):
        torch.testing.assert_close(their_cls(form, theirs, x), model(x), atol=1e-5, rtol=0)
    assert report.fingerprint == identity.fingerprint(model)
    assert "NOTICE" in report.files
    assert (reading.RESIDUE_FILE in report.files) == (name != "convnext")


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize(("a", "b"), list(itertools.permutations(formats.FORMS, 2)))
def test_any_form_to_any_form_and_back_to_meta_is_bit_for_bit(name, a, b, tmp_path):
    model, source = pth(tmp_path, name, rounded_periods=name != "convnext")
    if a != "meta":
        convert(source, tmp_path / "a", a)
        source = tmp_path / "a"
    convert(source, tmp_path / "b", b)
    convert(tmp_path / "b", tmp_path / "c", "meta")
    assert same(reading.open(tmp_path / "c").state_dict, dict(model.state_dict()))


@torch.no_grad()
def test_what_the_library_itself_saves_comes_back(tmp_path, oracles):
    """from_pretrained → save_pretrained → ours, by its own config.json and without any residue."""
    for name in TINY:
        model, source = pth(tmp_path, name)
        convert(source, tmp_path / name / "a", "transformers")
        their_model("transformers", tmp_path / name / "a").save_pretrained(tmp_path / name / "b")
        opened = reading.open(tmp_path / name / "b")
        x = images(77, 101)
        torch.testing.assert_close(filling.build(opened.config, opened)(x), model(x), atol=1e-5, rtol=0)
        assert identity.fingerprint(opened.state_dict) == identity.fingerprint(model)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_small_shards_are_indexed_and_load_in_transformers_and_here(dtype, tmp_path, oracles):
    model, source = pth(tmp_path, "mlp")
    report = convert(source, tmp_path / "out", "transformers", dtype=dtype, max_shard_size="200 kB")
    shards = [f for f in report.files if f.startswith("model-")]
    assert len(shards) > 1
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(shards)
    assert max((tmp_path / "out" / f).stat().st_size for f in shards) < 210_000
    x = images(64, 96)
    theirs = their_model("transformers", tmp_path / "out")
    assert theirs.dtype == dtype
    torch.testing.assert_close(
        theirs.float()(x).pooler_output, model(x), atol=1e-5 if dtype == torch.float32 else 0.1, rtol=0
    )
    opened = reading.open(tmp_path / "out").state_dict
    expected = {k: v if k.endswith("periods") else v.to(dtype) for k, v in model.state_dict().items()}
    assert same(opened, expected)
    again = save_pretrained(load(weights=source), tmp_path / "again", dtype=dtype, max_shard_size=200_000)
    assert [f for f in again.files if f.startswith("model-")] == shards


def test_a_shard_size_that_is_none_is_one_sentence(tmp_path):
    with pytest.raises(DinoError, match="a number of bytes or a text such as 5GB or 200MB, not 'large'"):
        convert(pth(tmp_path, "mlp")[1], tmp_path / "out", max_shard_size="large")


def test_metas_file_is_named_by_its_own_hash_and_loads_strictly(tmp_path):
    for name in TINY:
        model, source = pth(tmp_path, name)
        convert(source, tmp_path / name / "tf", "transformers")
        report = convert(tmp_path / name / "tf", tmp_path / name / "meta", "meta")
        (file,) = [tmp_path / name / "meta" / f for f in report.files if f.endswith(".pth")]
        assert file.stem.rsplit("-", 1)[1] == hashlib.sha256(file.read_bytes()).hexdigest()[:8]
        state = torch.load(file, weights_only=True)
        backbone(TINY[name]).load_state_dict(state, strict=True)
        assert same(state, dict(model.state_dict()))
        reading.open(file, check_hash=True)


def test_a_published_model_gets_its_published_names(tmp_path):
    row = catalog.resolve("dinov3_vits16")[0]
    model = backbone(row.config)
    model.init_weights()
    torch.save(model.state_dict(), tmp_path / "w.pth")
    report = convert(tmp_path / "w.pth", tmp_path / "timm", "timm")
    about = json.loads((tmp_path / "timm" / "config.json").read_text())
    assert about["architecture"] == "vit_small_patch16_dinov3"  # biases are zero at initialisation
    assert about["pretrained_cfg"]["tag"] == "lvd1689m"
    assert report.row == row
    report = convert(tmp_path / "timm", tmp_path / "meta", "meta")
    assert [f for f in report.files if f.startswith("dinov3_vits16_pretrain_lvd1689m-")]


@torch.no_grad()
def test_rounded_periods_survive_through_the_residue_and_are_reported(tmp_path, oracles):
    model, source = pth(tmp_path, "swiglu", rounded_periods=True)
    report = convert(source, tmp_path / "out", "transformers")
    assert any("rope periods" in note for note in report.notes)
    opened, x = reading.open(tmp_path / "out"), images(64, 96)
    assert torch.equal(filling.build(opened.config, opened)(x), model(x))
    difference = (their_model("transformers", tmp_path / "out")(x).pooler_output - model(x)).abs().max()
    assert 1e-5 < difference < 2e-2
    convert(source, tmp_path / "exact", "meta", periods="exact")
    exact = reading.open(tmp_path / "exact")
    theirs = their_model("transformers", tmp_path / "out")(x).pooler_output
    torch.testing.assert_close(filling.build(exact.config, exact)(x), theirs, atol=1e-5, rtol=0)
    assert not any("rope periods" in n for n in convert(source, tmp_path / "e", "timm", periods="exact").notes)


def test_an_eps_of_1e_6_goes_to_transformers_and_not_to_timm(tmp_path, oracles):
    config = ViTConfig(embed_dim=64, depth=2, num_heads=2, **(HUB | {"norm_layer": "layernorm"}))
    model = filled(config)
    writing.save(model, tmp_path / "w.safetensors")
    convert(tmp_path / "w.safetensors", tmp_path / "tf", "transformers")
    with torch.no_grad():
        x = images(64, 64)
        theirs = their_model("transformers", tmp_path / "tf")
        torch.testing.assert_close(theirs(x).pooler_output, model(x), atol=1e-5, rtol=0)
    assert reading.open(tmp_path / "tf").config.norm_layer == "layernorm"
    with pytest.raises(WeightsError, match="eps"):
        convert(tmp_path / "w.safetensors", tmp_path / "timm", "timm")
    assert not (tmp_path / "timm").exists()


@pytest.mark.parametrize("name", ["mlp", "convnext"])
def test_a_dtype_converts_everything_but_the_periods(name, tmp_path):
    _, source = pth(tmp_path, name)
    for form in formats.FORMS:
        convert(source, tmp_path / form, form, dtype=torch.bfloat16)
        state = reading.open(tmp_path / form).state_dict
        kept = {k for k, v in state.items() if v.dtype != torch.bfloat16}
        assert kept <= {"rope_embed.periods"}, form
    prints = {identity.fingerprint(reading.open(tmp_path / form).state_dict) for form in formats.FORMS}
    assert len(prints) == 1


def test_statistics_of_the_source_are_written(tmp_path, oracles):
    from transformers import AutoImageProcessor

    model = filled(TINY["mlp"])
    sat = {"mean": [0.43, 0.411, 0.296], "std": [0.213, 0.156, 0.143]}
    writing.save(model, tmp_path / "w.safetensors", sat)
    convert(tmp_path / "w.safetensors", tmp_path / "tf", "transformers")
    written = json.loads((tmp_path / "tf" / "preprocessor_config.json").read_text())
    assert written["image_processor_type"] == "DINOv3ViTImageProcessorFast"  # opens in transformers 4.56 and 5
    processor = AutoImageProcessor.from_pretrained(tmp_path / "tf")
    assert (list(processor.image_mean), list(processor.image_std)) == (sat["mean"], sat["std"])
    convert(tmp_path / "tf", tmp_path / "timm", "timm")
    assert reading.open(tmp_path / "timm").mean == (0.43, 0.411, 0.296)
    assert their_model("timm", tmp_path / "timm").pretrained_cfg["std"] == sat["std"]


def test_transformers_sees_an_image_as_embed_does(tmp_path, oracles, skimage_images):
    from PIL import Image
    from transformers import AutoImageProcessor, AutoModel

    import dinov3

    model = dinov3.load()
    convert(model.origin.source, tmp_path / "tf", "transformers")
    assert json.loads((tmp_path / "tf" / "preprocessor_config.json").read_text())["image_processor_type"].endswith(
        "Fast"
    )
    image = Image.open(skimage_images / "coffee.png")
    inputs = AutoImageProcessor.from_pretrained(tmp_path / "tf")(images=image, return_tensors="pt")
    with torch.no_grad():
        theirs = AutoModel.from_pretrained(tmp_path / "tf", dtype=torch.float32).eval()(**inputs).pooler_output
    assert torch.cosine_similarity(theirs, dinov3.embed(model, image).cls).item() > 0.9995  # 0.992 at 224


@pytest.mark.parametrize("form", formats.FORMS)
def test_a_model_in_memory_is_saved_and_loaded_again(form, tmp_path):
    import dinov3

    model = dinov3.load("dinov3_vits16", "random")
    with torch.no_grad():
        model.norm.weight.mul_(2)  # trained since
    dinov3.save_pretrained(model, tmp_path / "out", form)
    again = dinov3.load(None, tmp_path / "out")
    assert identity.fingerprint(again) == identity.fingerprint(model)
    with pytest.raises(DinoError, match="is not an empty folder"):
        dinov3.save_pretrained(model, tmp_path / "out", form)
    with pytest.raises(DinoError, match="a Linear is no backbone"):
        dinov3.save_pretrained(torch.nn.Linear(1, 1), tmp_path / "x")


def test_what_is_pushed_is_the_saved_folder(tmp_path, monkeypatch):
    import huggingface_hub

    import dinov3

    calls = {}

    class Api:
        def __init__(self, token):
            calls["token"] = token

        def create_repo(self, repository, *, private, exist_ok):
            calls["repository"] = (repository, private, exist_ok)
            return f"https://huggingface.co/{repository}"

        def upload_folder(self, *, repo_id, folder_path):
            calls["files"] = sorted(p.name for p in folder_path.iterdir())

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert dinov3.push_to_hub(dinov3.load(), "me/small", private=True, token="t") == "https://huggingface.co/me/small"
    assert (calls["token"], calls["repository"]) == ("t", ("me/small", True, True))
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "NOTICE"} <= set(calls["files"])


def test_our_own_model_keeps_its_licence(tmp_path):
    import dinov3

    source = dinov3.load().origin.source
    for form in ("transformers", "timm"):
        convert(source, tmp_path / form, form)
        notice = (tmp_path / form / "NOTICE").read_text()
        assert "Apache License 2.0" in notice
        assert "DINOv3 License" not in notice
    assert json.loads((tmp_path / "timm" / "config.json").read_text())["pretrained_cfg"]["license"] == "apache-2.0"


def test_timm_takes_the_file_as_a_checkpoint_path_too(tmp_path, oracles):
    import timm

    model, source = pth(tmp_path, "swiglu")
    convert(source, tmp_path / "out", "timm")
    about = json.loads((tmp_path / "out" / "config.json").read_text())
    theirs = timm.create_model(
        about["architecture"], checkpoint_path=str(tmp_path / "out" / "model.safetensors"), **about["model_args"]
    )
    with torch.no_grad():
        x = images(64, 64)
        torch.testing.assert_close(theirs.eval()(x), model(x), atol=1e-5, rtol=0)


def test_the_licence_goes_with_the_weights(tmp_path):
    _, source = pth(tmp_path, "mlp")
    convert(source, tmp_path / "a", "transformers")
    assert "DINOv3 License" in (tmp_path / "a" / "NOTICE").read_text()
    (tmp_path / "LICENSE.md").write_text("terms")
    convert(source, tmp_path / "b", "transformers")
    assert (tmp_path / "b" / "LICENSE.md").read_text() == "terms"
    assert not (tmp_path / "b" / "NOTICE").exists()


def test_nothing_is_overwritten_and_nothing_half_is_left(tmp_path, monkeypatch):
    _, source = pth(tmp_path, "mlp")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    with pytest.raises(DinoError, match="not an empty folder"):
        convert(source, tmp_path / "full", "timm")
    with pytest.raises(DinoError, match="did you mean 'transformers'"):
        convert(source, tmp_path / "x", "transformer")
    (tmp_path / "empty").mkdir()

    def fails(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", fails)
    with pytest.raises(OSError, match="no space"):
        convert(source, tmp_path / "empty", "timm")
    assert not list((tmp_path / "empty").iterdir())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "full", "mlp.pth"]
