"""Classes, places and sentences by words alone, with a small model trained here to know four colours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from paths import GOLDEN
from PIL import Image
from result_tables import read_table

from dinov3.data.tokenizer import Tokenizer
from dinov3.errors import DinoError
from dinov3.eval.text.train_dinotxt import main as train_main
from dinov3.eval.text.zero_shot import ZeroShotConfig, main, place_maps
from dinov3.heads.dinotxt import OpenVocabulary, averaged, patch_part, prompt_features
from dinov3.hub.published_heads import open_model

COLOURS = {"blue": (40, 60, 220), "green": (40, 200, 60), "red": (220, 40, 40)}
TINY = GOLDEN / "tiny_bpe.txt.gz"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("zero_shot")
    rng = np.random.default_rng(1)
    for name, colour in COLOURS.items():
        (root / "photos" / name).mkdir(parents=True)
        for i in range(4):
            pixels = np.clip(np.array(colour) + rng.normal(0, 12, (64, 64, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / "photos" / name / f"{i}.png")
            (root / "photos" / name / f"{i}.txt").write_text(name)
    size = Tokenizer.from_file(TINY).vocab_size
    sizes = {"context_length": 12, "vocab_size": size, "dim": 32, "num_heads": 2, "num_layers": 1}
    (root / "text.yaml").write_text(yaml.safe_dump(sizes))
    status = train_main([
        f"output_dir={root}/run", f"train_dataset_str=Captions:root={root}/photos", "vision_backbone=dinov3_vitt16",
        "embed_dim=384", "vision_model_train_img_size=32", "vision_model_num_head_blocks=1",
        "vision_model_head_blocks_drop_path=0", f"text_backbone_config={root}/text.yaml",
        f"text_vocab_path_or_url={TINY}", "batch_size=6", "max_iteration=40", "warmup_length=4", "lr=2e-3", "eval_freq=0",
        "workers=0", "device=cpu",
    ])  # fmt: skip
    assert status == 0
    (root / "masks").mkdir()
    (root / "scenes" / "images").mkdir(parents=True)
    (root / "scenes" / "masks").mkdir()
    left, right = np.array(COLOURS["blue"], np.uint8), np.array(COLOURS["red"], np.uint8)
    scene = np.where(np.arange(96)[None, :, None] < 48, left, right) * np.ones((64, 1, 1), np.uint8)
    mask = np.where(np.arange(96) < 48, 0, 2) * np.ones((64, 1), int)
    mask[:8] = 255
    Image.fromarray(scene.astype(np.uint8)).save(root / "scenes" / "images" / "a.png")
    Image.fromarray(mask.astype(np.uint8)).save(root / "scenes" / "masks" / "a.png")
    (root / "names.txt").write_text("blue\ngreen\nred\n")
    return root


def words(trained: Path, out: Path, *more: str) -> list[str]:
    run = trained / "run"
    model = [f"model.sizes={run}/clip_model_config.yaml", f"model.weights={run}/head.safetensors", "model.device=cpu"]
    return [f"output_dir={out}", *model, "templates=none", *more]


def test_class_folders_are_recognised_by_their_names(trained: Path, tmp_path: Path) -> None:
    assert main(words(trained, tmp_path, f"dataset={trained}/photos", "size=32")) == 0
    (row,) = read_table(tmp_path / "results-zero-shot.csv")
    assert row["top-1"] == 100
    about = json.loads((tmp_path / "results-zero-shot.json").read_text())
    assert about["config"]["size"] == 32


def test_captions_find_their_images(trained: Path, tmp_path: Path) -> None:
    line = f"dataset=Captions:root={trained}/photos"
    assert main(words(trained, tmp_path, line, "task=retrieval", "size=32")) == 0
    (row,) = read_table(tmp_path / "results-zero-shot.csv")
    assert row["text_to_image_R@10"] == 100  # the four images of a colour are among the first ten
    assert row["text_to_image_R@1"] >= 100 / 12


@pytest.mark.parametrize("mode", ["slide", "whole"])
def test_places_are_named_in_the_masks_own_pixels(trained: Path, tmp_path: Path, mode: str) -> None:
    more = [f"dataset=DenseFolder:root={trained}/scenes", "task=segmentation", f"names={trained}/names.txt"]
    more += [f"mode={mode}", "resize=64", "side=32", "stride=16"]
    rows = {}
    for tokens in ("head", "backbone"):
        assert main(words(trained, tmp_path, *more, f"tokens={tokens}")) == 0
        (rows[tokens],) = read_table(tmp_path / "results-zero-shot.csv")
        assert rows[tokens]["mIoU"] == rows[tokens][f"mIoU {tokens}"]
    assert rows["head"]["aAcc"] > 70  # 50 for one colour everywhere
    for kind in ("head", "backbone"):  # both are in the results of either
        assert rows["head"][f"mIoU {kind}"] == rows["backbone"][f"mIoU {kind}"]
    assert ZeroShotConfig(dataset="x").tokens == "backbone"  # as in the published notebook


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ([], "dataset"),
        (["dataset=/nowhere/x"], "/nowhere/x"),
        (["dataset={photos}", "task=retrieval"], "has no captions"),
        (["dataset={photos}", "task=segmentation"], "has no class masks"),
        (["dataset={photos}", "size=30"], "no multiple of the patch (16); try 32"),
        (["dataset={photos}", "tasks=x"], "did you mean 'task'"),
        (["dataset={photos}", "model.sizes=/nowhere.yaml"], "/nowhere.yaml cannot be read"),
    ],
)
def test_mistakes_are_one_sentence(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], sentence: str
) -> None:
    arguments = [word.format(photos=trained / "photos") for word in more]
    assert main(words(trained, tmp_path, *arguments)) == 1
    error = capsys.readouterr().err
    assert sentence in error
    assert "Traceback" not in error


def test_windows_that_see_everything_are_the_whole_image(trained: Path) -> None:
    model, _, vectors = opened(trained)
    x = torch.randn(1, 3, 32, 32)
    config: dict[str, Any] = {"dataset": "x", "side": 32, "stride": 32}
    slid = place_maps(model, vectors, x, ZeroShotConfig(mode="slide", **config))
    whole = place_maps(model, vectors, x, ZeroShotConfig(mode="whole", **config))
    assert torch.allclose(slid, whole.softmax(1), atol=1e-6)
    odd = OpenVocabulary(model, vectors).predict(torch.randn(1, 3, 40, 50), (40, 50))
    assert odd.shape == (1, 3, 40, 50)


def test_maps_of_both_kinds_of_tokens_stand_one_after_the_other(trained: Path) -> None:
    model, _, vectors = opened(trained)
    x = torch.randn(1, 3, 32, 32)
    both = OpenVocabulary(model, vectors, tokens=("backbone", "head")).predict(x, (32, 32))
    with torch.inference_mode():
        _, _, own = model.visual_model.get_class_and_patch_tokens(x)
    slow = (F.normalize(own, dim=-1) @ vectors.T).mT.reshape(1, 3, 2, 2)
    slow = F.interpolate(slow, (32, 32), mode="bilinear", align_corners=False)
    assert torch.allclose(both[:, :3], slow, atol=1e-6)
    assert torch.equal(both[:, 3:], OpenVocabulary(model, vectors).predict(x, (32, 32)))
    with pytest.raises(DinoError, match="only tokens=head"):
        OpenVocabulary(model, vectors[:, :8], tokens=("backbone",))


def opened(trained: Path) -> tuple[Any, Any, torch.Tensor]:
    run = trained / "run"
    model, tokenizer = open_model(run / "head.safetensors", sizes=run / "clip_model_config.yaml")
    prompts = prompt_features(model, tokenizer, list(COLOURS), ["{}", "a {}"])
    return model, tokenizer, patch_part(model, prompts)


def test_places_are_compared_with_the_second_half_of_texts(trained: Path) -> None:
    model, tokenizer, vectors = opened(trained)
    prompts = prompt_features(model, tokenizer, list(COLOURS), ["{}", "a {}"])
    assert prompts.shape == (3, 2, 384)
    slow = torch.stack([F.normalize(sum(F.normalize(p[192:], dim=0) for p in each) / 2, dim=0) for each in prompts])
    assert torch.allclose(vectors, slow, atol=1e-6)
    assert averaged(prompts).norm(dim=-1) == pytest.approx(1, abs=1e-6)
    with pytest.raises(DinoError, match="name at least one"):
        prompt_features(model, tokenizer, [], ["{}"])
    with pytest.raises(DinoError, match=r"needs \{\} where the class goes"):
        prompt_features(model, tokenizer, ["red"], ["a photo"])
