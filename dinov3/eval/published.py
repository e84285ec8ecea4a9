"""Published figures of the models, to print beside one's own (arXiv 2508.10104 and the model card).

The families' tables stand in `weights.catalog` (`Row.scores`); here are the rest: the 7B's global and dense tasks (Tab. 3-12)
and dino.txt (Tab. 16). ↓ lower is better. Each is at its own protocol: docs/evaluation.md says where ours differs.
"""

from __future__ import annotations

from collections.abc import Mapping

from dinov3.weights import catalog

_7B, _L = "dinov3_vit7b16_lvd1689m", "dinov3_vitl16_lvd1689m"

# model id → benchmark → number
FIGURES: dict[str, dict[str, float]] = {
    _7B: {
        "IN-1k linear": 88.4, "IN-V2": 81.4, "IN-ReaL": 90.4, "IN-R": 91.1, "IN-Sketch": 71.3, "IN-A": 86.9,
        "IN-C mCE↓": 19.6, "ObjectNet": 79.0,
        "Fine-S": 93.0, "Places205": 70.0, "iNat18": 85.6, "iNat21": 89.8,
        "Food-101": 96.9, "CIFAR-10": 99.6, "CIFAR-100": 96.0, "SUN397": 81.1, "Cars": 95.0, "Aircraft": 88.2,
        "VOC2007 cls": 88.2, "DTD": 87.2, "Pets": 97.0, "Caltech-101": 94.8, "Flowers": 99.7, "CUB": 92.4,
        "Oxford-M": 81.1, "Oxford-H": 60.7, "Paris-M": 93.3, "Paris-H": 87.1,
        "Met GAP": 55.4, "Met GAP-": 77.7, "Met ACC": 80.7, "AmsterTime": 56.5,
        "ADE20k": 55.9, "Cityscapes": 81.1, "VOC12 seg": 86.6, "NYU↓": 0.309, "KITTI↓": 2.346,
        "NAVI": 64.4, "SPair": 58.7, "VOC07 CorLoc": 66.1, "VOC12 CorLoc": 69.5, "COCO20k CorLoc": 55.1,
        "DAVIS-S": 71.1, "DAVIS": 79.7, "DAVIS-L": 83.3, "YouTube-VOS": 80.2, "MOSE": 53.9,
        "UCF101": 93.5, "SSv2": 70.1, "K400": 87.8,
        "COCO AP": 65.6, "COCO-O AP": 66.4, "ADE20k m2f": 62.6, "COCO-Stuff m2f": 53.8, "Cityscapes m2f": 86.1,
        "VOC12 m2f": 90.1,
        "NYU ARel↓": 4.3, "NYU δ1": 98.0, "KITTI ARel↓": 7.3, "KITTI δ1": 96.7, "ETH3D ARel↓": 5.4, "ETH3D δ1": 97.5,
        "ScanNet ARel↓": 4.4, "ScanNet δ1": 98.1, "DIODE ARel↓": 25.6, "DIODE δ1": 82.2,
    },
    "dinov3_vith16plus_lvd1689m": {"IN-1k linear": 87.9, "Cityscapes": 81.6},
    _L: {
        "text IN-1k": 82.3, "text IN-A": 85.4, "text IN-R": 93.0, "text ObjectNet": 80.5, "text COCO I→T": 63.7,
        "text COCO T→I": 45.6, "text ADE20k": 24.7, "text Cityscapes": 36.9,
    },
}  # fmt: skip

# evaluation (the verb's name) → which figures belong to it
BENCHMARKS: dict[str, tuple[str, ...]] = {
    "linear": ("IN-1k linear", "IN-V2", "IN-ReaL", "IN-R", "IN-Sketch", "IN-A", "IN-C mCE↓", "ObjectNet"),
    "log_regression": ("Fine-S", "Food-101", "CIFAR-10", "CIFAR-100", "SUN397", "Cars", "Aircraft", "VOC2007 cls", "DTD",
                       "Pets", "Caltech-101", "Flowers", "CUB"),
    "segmentation": ("ADE20k", "Cityscapes", "VOC12 seg"),
    "semantic_segmentation": ("ADE20k", "Cityscapes", "VOC12 seg"),  # the name of its result files
    "depth": ("NYU↓", "KITTI↓"),
    "retrieval": ("Oxford-M", "Oxford-H", "Paris-M", "Paris-H", "Met GAP", "Met GAP-", "Met ACC", "AmsterTime"),
    "keypoints": ("NAVI", "SPair"),
    "discovery": ("VOC07 CorLoc", "VOC12 CorLoc", "COCO20k CorLoc"),
    "tracking": ("DAVIS-S", "DAVIS", "DAVIS-L", "YouTube-VOS", "MOSE"),
    "video": ("UCF101", "SSv2", "K400"),
    "detection": ("COCO AP", "COCO-O AP"),
    "zero_shot": ("text IN-1k", "text IN-A", "text IN-R", "text ObjectNet", "text ADE20k", "text Cityscapes"),
}  # fmt: skip


def figures(model_id: str) -> Mapping[str, float]:
    """Every published figure of a catalogue id; empty for what is not in the catalogue."""
    row = next((row for row in catalog.ROWS if row.id == model_id), None)
    known = dict(row.scores) if row is not None else {}
    return {k: v for k, v in (known | FIGURES.get(model_id, {})).items() if v == v}


def published(model_id: str, benchmark: str) -> dict[str, float] | None:
    """What was published of a model: for an evaluation's name all its figures, for a benchmark's name that one.

    None where nothing was.
    """
    known = figures(model_id)
    wanted = BENCHMARKS.get(benchmark, (benchmark,))
    found = {name: known[name] for name in wanted if name in known}
    return found or None
