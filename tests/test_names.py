"""What users of other libraries type works, or the error names what to type here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dinov3
from dinov3.errors import DinoError, MissingExtra, UnknownName, install
from dinov3.models.architectures import ConvNeXtConfig, ViTConfig
from dinov3.models.build import backbone

MODEL = backbone(ViTConfig(embed_dim=24, depth=4, num_heads=2, patch_size=8, n_storage_tokens=2))
MODEL.init_weights()
MODEL.eval()


def image(width: int = 48, height: int = 32) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_several_layers_come_from_one_pass_in_the_order_given(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = [dinov3.embed(MODEL, [image(), image()], size=32, layer=i) for i in (3, 1)]
    passes = []
    monkeypatch.setattr(MODEL, "tokens", lambda x, _tokens=MODEL.tokens: passes.append(1) or _tokens(x))
    several = dinov3.embed(MODEL, [image(), image()], size=32, layer=[-1, 1])
    assert [f.layer for f in several] == [3, 1]
    assert len(passes) == 1
    for f, g in zip(several, alone):
        assert torch.equal(f.patches, g.patches)
        assert torch.equal(f.cls, g.cls)


def test_size_may_be_height_and_width() -> None:
    f = dinov3.embed(MODEL, image(), size=(32, 64))
    assert f.patches.shape == (1, 4, 8, 24)
    assert f.preprocessing.startswith("32x64-")
    rule = dinov3.default_preprocessing(MODEL, size=(32, 64))
    assert dinov3.Preprocessing.from_json(rule.to_json()) == rule
    assert rule.with_(size=32).size_hw is None
    with pytest.raises(DinoError, match="leave shape out, or give size as one number"):
        dinov3.embed(MODEL, image(), size=(32, 64), shape="short")
    with pytest.raises(DinoError, match="a positive number of pixels, not 'big'"):
        rule.with_(size="big")
    with pytest.raises(DinoError, match=r"a number of pixels or \(height, width\), not \(3, 4, 5\)"):
        rule.with_(size=(3, 4, 5))


@pytest.mark.parametrize(
    "name, way_out",
    [("image_size", "write size="), ("device", r"model\.to"), ("pooling", r"\.cls, \.mean"), ("normalize", "functional"),
     ("sise", "did you mean 'size'")],
)  # fmt: skip
def test_options_of_other_libraries_are_named_in_the_error(name: str, way_out: str) -> None:
    with pytest.raises(UnknownName, match=way_out):
        dinov3.embed(MODEL, image(), **{name: 32})  # type: ignore[call-overload]


def test_arrays_may_have_their_channels_first() -> None:
    first, last = (dinov3.embed(MODEL, x, size=32).cls for x in (image().transpose(2, 0, 1), image()))
    assert torch.equal(first, last)


def test_a_data_loader_collates_the_preprocessing() -> None:
    transform = dinov3.default_preprocessing(MODEL, size=32).to_tensor
    images = [Image.fromarray(image(40 + i)) for i in range(4)]
    loader = torch.utils.data.DataLoader([transform(x) for x in images], batch_size=4)
    (batch,) = loader
    assert batch.shape == (4, 3, 32, 32)
    assert torch.equal(MODEL(batch), dinov3.embed(MODEL, images, size=32).cls)


@pytest.mark.parametrize("config", [MODEL.config, ConvNeXtConfig(depths=(1, 1, 1, 1), dims=(8, 8, 16, 24))])
def test_feature_maps_are_those_of_the_layers(config: object) -> None:
    model = backbone(config).eval()  # type: ignore[arg-type]
    model.init_weights()
    x = torch.randn(1, 3, 64, 96)
    maps = model.feature_maps(x, [1, 3])
    assert len(maps) == 2
    for layer, got in zip((1, 3), maps):
        (wanted,) = model.get_intermediate_layers(x, n=[layer], reshape=True)
        assert torch.equal(got, wanted)
    assert model.device == torch.device("cpu")


def test_random_weights_and_devices_by_the_names_of_timm() -> None:
    a, b = (dinov3.load("dinov3_vits16", **o) for o in ({"pretrained": False}, {"weights": "random", "device": "auto"}))
    assert a.origin.random  # type: ignore[union-attr]
    assert torch.equal(a.norm.weight, b.norm.weight.cpu())  # type: ignore[union-attr]
    with pytest.raises(DinoError, match=r"pretrained=False means random weights, and weights='x.pth' is a file"):
        dinov3.load("dinov3_vits16", "x.pth", pretrained=False)
    with pytest.raises(DinoError, match="device 'meta' holds no numbers"):
        dinov3.load(device="meta")


def test_models_are_listed_by_pattern() -> None:
    assert "dinov3_vits16" in dinov3.list_models()
    assert dinov3.list_models("*vits16") == ["dinov3_vits16"]
    assert dinov3.list_models("nothing*") == []


def test_a_hugging_face_id_without_its_extra_names_the_extra(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['huggingface_hub'] = None\n"
        "import dinov3\n"
        "try: dinov3.load('facebook/dinov3-vits16-pretrain-lvd1689m')\n"
        "except dinov3.DinoError as error: print(type(error).__name__, error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert install("hub") in done.stdout, done.stderr
    assert done.stdout.startswith(MissingExtra.__name__)
