"""What transformers' page on DINOv3 prints, run on a folder that this package wrote."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

import dinov3
from dinov3.models.architectures import ViTConfig
from tests.weights.test_formats import HUB, TINY, filled

pytestmark = pytest.mark.usefixtures("oracles")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A small ViT, whose width is a multiple of the groups of 128 below."""
    path = tmp_path_factory.mktemp("exported") / "vit"
    dinov3.save_pretrained(filled(ViTConfig(embed_dim=128, depth=2, num_heads=2, **HUB)), path)
    return str(path)


@pytest.fixture(scope="module")
def image(skimage_images: Path) -> Image.Image:
    return Image.open(skimage_images / "coffee.png").convert("RGB")


def test_pipeline(folder, image):
    from transformers import pipeline

    feature_extractor = pipeline(model=folder, task="image-feature-extraction")
    features = torch.tensor(feature_extractor(image))
    assert features.shape == (1, 1 + 4 + 256, 128)
    ours = dinov3.embed(dinov3.load(weights=folder), image, order="float")
    torch.testing.assert_close(features[0, 5:].unflatten(0, (16, 16)), ours.patches[0], atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", ["mlp", "convnext"])
def test_auto_model(name, image, tmp_path):
    pytest.importorskip("accelerate", reason="device_map needs accelerate")
    from transformers import AutoImageProcessor, AutoModel

    dinov3.save_pretrained(filled(TINY[name]), tmp_path / "m")
    pretrained_model_name = str(tmp_path / "m")
    processor = AutoImageProcessor.from_pretrained(pretrained_model_name)
    model = AutoModel.from_pretrained(pretrained_model_name, device_map="auto")
    inputs = processor(images=image, return_tensors="pt").to(model.device)
    with torch.inference_mode():
        outputs = model(**inputs)
    ours = dinov3.embed(dinov3.load(weights=tmp_path / "m"), image, order="float")
    torch.testing.assert_close(outputs.pooler_output.cpu(), ours.cls, atol=1e-3, rtol=0)


@pytest.mark.parametrize("option", ["torch_dtype", "dtype"])
def test_half_precision(option, folder, image):
    from transformers import AutoImageProcessor, AutoModel

    processor = AutoImageProcessor.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, attn_implementation="sdpa", **{option: torch.float16})
    inputs = processor(images=image, return_tensors="pt").to(torch.float16)
    with torch.inference_mode():
        pooled = model(**inputs).pooler_output
    ours = dinov3.embed(dinov3.load(weights=folder), image, order="float")
    assert pooled.dtype == torch.float16
    assert torch.cosine_similarity(pooled.float(), ours.cls).min() > 0.999


def quantised(folder: str, config, image: Image.Image, device: str) -> float:
    """The cosine of the quantised model's CLS to ours."""
    from transformers import AutoImageProcessor, AutoModel, TorchAoConfig

    processor = AutoImageProcessor.from_pretrained(folder)
    quantization_config = TorchAoConfig(quant_type=config)
    model = AutoModel.from_pretrained(
        folder, dtype=torch.bfloat16, device_map=device, quantization_config=quantization_config
    )
    inputs = processor(images=image, return_tensors="pt").to(model.device, torch.bfloat16)
    with torch.inference_mode():
        pooled = model(**inputs).pooler_output.float().cpu()
    return torch.cosine_similarity(pooled, dinov3.embed(dinov3.load(weights=folder), image, order="float").cls).item()


def test_torchao_int8(folder, image):
    pytest.importorskip("accelerate", reason="device_map needs accelerate")
    torchao = pytest.importorskip("torchao.quantization")
    assert quantised(folder, torchao.Int8WeightOnlyConfig(), image, "cpu") > 0.999


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="torchao's Int4WeightOnlyConfig has kernels for GPUs only (mslk)"
)
def test_torchao_int4(folder, image):
    torchao = pytest.importorskip("torchao.quantization")
    pytest.importorskip("mslk", reason="torchao's Int4WeightOnlyConfig needs mslk")
    assert quantised(folder, torchao.Int4WeightOnlyConfig(group_size=128), image, "cuda") > 0.9
