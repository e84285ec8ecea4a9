"""The names `torch.hub` sees: re-exports of dinov3.hub, nothing else. Loading needs only torch.

model = torch.hub.load("path/to/this/repository", "dinov3_vits16", source="local", weights="weights.pth")
"""

from dinov3.hub.backbones import (
    Weights,
    dinov3_convnext_base,
    dinov3_convnext_large,
    dinov3_convnext_small,
    dinov3_convnext_tiny,
    dinov3_vit7b16,
    dinov3_vitb16,
    dinov3_vith16plus,
    dinov3_vitl16,
    dinov3_vitl16plus,
    dinov3_vits16,
    dinov3_vits16plus,
    dinov3_vitt16,
)
from dinov3.hub.published_heads import (
    ClassifierWeights,
    DepthWeights,
    DetectionWeights,
    DINOTxtWeights,
    SegmentorWeights,
    dinov3_vit7b16_dd,
    dinov3_vit7b16_de,
    dinov3_vit7b16_lc,
    dinov3_vit7b16_ms,
    dinov3_vitl16_chmv2,
    dinov3_vitl16_dinotxt_tet1280d20h24l,
)

dependencies = ["torch"]

__all__ = [
    "ClassifierWeights",
    "DINOTxtWeights",
    "DepthWeights",
    "DetectionWeights",
    "SegmentorWeights",
    "Weights",
    "dinov3_convnext_base",
    "dinov3_convnext_large",
    "dinov3_convnext_small",
    "dinov3_convnext_tiny",
    "dinov3_vit7b16",
    "dinov3_vit7b16_dd",
    "dinov3_vit7b16_de",
    "dinov3_vit7b16_lc",
    "dinov3_vit7b16_ms",
    "dinov3_vitb16",
    "dinov3_vith16plus",
    "dinov3_vitl16",
    "dinov3_vitl16_chmv2",
    "dinov3_vitl16_dinotxt_tet1280d20h24l",
    "dinov3_vitl16plus",
    "dinov3_vits16",
    "dinov3_vits16plus",
    "dinov3_vitt16",
]
