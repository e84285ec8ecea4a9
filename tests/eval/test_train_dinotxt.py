"""dino.txt learns colours and shapes by their names, stops and goes on, alone and in company."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from paths import GOLDEN
from PIL import Image
from ranks import run_ranks

from dinov3.config.loading import load
from dinov3.data.datasets import make_dataset
from dinov3.data.datasets.captions import Captioned
from dinov3.data.tokenizer import Tokenizer
from dinov3.errors import DinoError
from dinov3.eval.text import zero_shot
from dinov3.eval.text.train_dinotxt import PairLoader, TextTrainConfig, build, captioned, main, train
from dinov3.heads.dinotxt import averaged, class_vectors
from dinov3.runlog import read_metrics
from dinov3.weights.reading import read

COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (40, 60, 220), "grey": (128, 128, 128)}
TINY = GOLDEN / "tiny_bpe.txt.gz"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """photos/<colour>/<i>.png with a .txt beside each, and the two YAML files of tiny towers."""
    root = tmp_path_factory.mktemp("dinotxt")
    rng = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (root / "photos" / name).mkdir(parents=True)
        for i in range(4):
            pixels = np.clip(np.array(colour) + rng.normal(0, 12, (40, 48, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / "photos" / name / f"{i}.png")
            (root / "photos" / name / f"{i}.txt").write_text(f"{name} paper\n\na {name} wall\n")
    vocabulary = Tokenizer.from_file(TINY).vocab_size
    sizes = {"context_length": 20, "vocab_size": vocabulary, "dim": 32, "num_heads": 2, "num_layers": 2}
    (root / "text.yaml").write_text(yaml.safe_dump(sizes))
    (root / "vision.yaml").write_text("student: {arch: vit_tiny, embed_dim: 48, patch_size: 16, layerscale: 1.0}\n")
    return root


def words(files: Path, out: Path, *more: str) -> list[str]:
    return [
        f"output_dir={out}", f"train_dataset_str=Captions:root={files}/photos", "embed_dim=64",
        f"vision_backbone_config={files}/vision.yaml", "vision_model_train_img_size=32",
        "vision_model_head_blocks_drop_path=0", "vision_model_num_head_blocks=1",
        f"text_backbone_config={files}/text.yaml", f"text_vocab_path_or_url={TINY}", "batch_size=8", "max_iteration=60",
        "warmup_length=5", "lr=3e-3", "checkpointing_period=20", "eval_freq=30", "workers=1", "device=cpu", *more,
    ]  # fmt: skip


def settings(files: Path, out: Path, *more: str) -> TextTrainConfig:
    return load(TextTrainConfig, None, words(files, out, *more))[0]


def test_it_learns_colours_by_their_names_and_its_file_loads_again(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = files / "photos"
    told = [
        f"val_dataset_str=Captions:root={photos}",
        f"zero_shot_dataset_str={photos}",
        "zero_shot_template=a {} wall",
    ]
    assert main(words(files, tmp_path / "run", *told)) == 0
    numbers = dict(line.split("\t") for line in capsys.readouterr().out.splitlines())
    assert float(numbers["top-1"]) == 100
    assert float(numbers["image_to_text_R@10"]) >= 60  # 8 captions of each colour are equally right; 25 by chance
    losses = [
        r["contrastive_loss"] for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if "contrastive_loss" in r
    ]
    assert losses[-1] < 0.8 * losses[0]

    config = settings(files, tmp_path / "again")
    model, tokenizer = build(config, torch.device("cpu"))
    state, about = read(tmp_path / "run" / "head.safetensors")
    assert about["dinov3.dinotxt"] == "head"
    assert not any("visual_model.backbone" in k for k in state)
    missing = model.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys
    assert all(k.startswith("visual_model.backbone.") for k in missing.missing_keys)
    model.eval()
    data = make_dataset(str(photos))
    images = zero_shot.image_features(model, data, range(len(data)), size=32)
    vectors = class_vectors(model, tokenizer, sorted(COLOURS), ["a {} wall"])
    labels = torch.tensor([data.label(i) for i in range(len(data))])
    assert zero_shot.classification(images @ vectors.T, labels)["top-1"] == 100
    sizes = yaml.safe_load((tmp_path / "run" / "clip_model_config.yaml").read_text())
    assert sizes["text_backbone"]["dim"] == 32
    assert sizes["embed_dim"] == 64


def test_a_stopped_run_resumes_to_the_same_numbers(files: Path, tmp_path: Path) -> None:
    short = ["max_iteration=12", "checkpointing_period=6", "vision_model_use_gram_loss=true",
             "vision_model_patch_sampling_rate_for_gram_loss=0.5"]  # fmt: skip
    train(settings(files, tmp_path / "whole", *short))
    train(settings(files, tmp_path / "cut", *short))
    shutil.rmtree(tmp_path / "cut" / "ckpt" / "11")  # as if it had been killed after step 5 was saved
    report = train(settings(files, tmp_path / "cut", *short))
    assert report.resumed_at == 6
    one, other = (read(tmp_path / name / "head.safetensors")[0] for name in ("whole", "cut"))
    assert all(torch.equal(one[k], other[k]) for k in one)
    assert any("gram_loss" in r for r in read_metrics(tmp_path / "cut" / "metrics.jsonl"))


def one_of_two(files: str, out: str, batch: int) -> dict[str, float]:
    config = settings(
        Path(files), Path(out), "max_iteration=3", f"batch_size={batch}", "log_every=1", "warmup_length=0"
    )
    return train(config).last


def test_two_processes_learn_what_one_learns_from_the_same_pairs(files: Path, tmp_path: Path) -> None:
    alone = one_of_two(str(files), str(tmp_path / "one"), 8)
    both = run_ranks(one_of_two, 2, str(files), str(tmp_path / "two"), 4)
    assert both[0]["contrastive_loss"] == pytest.approx(alone["contrastive_loss"], rel=1e-4)
    one, two = (read(tmp_path / name / "head.safetensors")[0] for name in ("one", "two"))
    for name in one:
        # Adam's first steps have the size of the rate whatever the gradient's: compare against that
        assert (one[name] - two[name]).abs().max() < 1e-3, name


def test_pairs_are_shuffled_and_a_function_of_the_step(files: Path, tmp_path: Path) -> None:
    config = settings(files, tmp_path)
    loader = PairLoader(config, captioned(config.train_dataset_str), Tokenizer.from_file(TINY), 20)
    first, again, second = loader(3), loader(3), loader(4)
    assert torch.equal(first.pixels, again.pixels)
    assert torch.equal(first.tokens, again.tokens)
    assert not torch.equal(first.tokens, second.tokens)
    epoch = torch.cat([loader(0).pixels, loader(1).pixels]).float().mean((2, 3)).argmax(1)
    assert len(set(epoch[:8].tolist())) > 1  # not folder after folder


def test_an_unreadable_image_is_replaced_and_named(files: Path, tmp_path: Path) -> None:
    shutil.copytree(files / "photos", tmp_path / "photos")
    (tmp_path / "photos" / "red" / "0.png").write_bytes(b"no image")
    config = settings(files, tmp_path / "out", f"train_dataset_str=Captions:root={tmp_path}/photos", "max_iteration=5")
    train(config)
    assert "red/0.png" in (tmp_path / "out" / "log.txt").read_text()


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["train_dataset_str="], "train_dataset_str"),
        (["train_dataset_st=x"], "did you mean 'train_dataset_str'"),
        (["use_cuda_graphs=true"], "use_cuda_graphs"),
        (["vision_model_freeze_backbone=false"], "is always true"),
        (["train_dataset_str=/nowhere/at/all"], "nowhere"),
    ],
)
def test_mistakes_are_reported_before_anything_runs(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], sentence: str
) -> None:
    assert main(words(files, tmp_path / "out", *more)) == 1
    told = capsys.readouterr().err
    assert sentence in told
    assert "Traceback" not in told


def test_a_folder_without_captions_is_an_error(files: Path, tmp_path: Path) -> None:
    with pytest.raises(DinoError, match="has no captions; CocoCaptions"):
        captioned(f"Folder:root={files}/photos")
    (tmp_path / "a").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "a" / "x.png")
    with pytest.raises(DinoError, match=r"\.txt file beside it"):
        captioned(f"Captions:root={tmp_path}")


# ---- data sets ------------------------------------------------------------------------------------------------------


def coco(root: Path, split: str) -> None:
    year = "2014" if split == "TRAIN" else "2017"
    what = "train" if split == "TRAIN" else "val"
    folder = root / f"{what}{year}" / f"{what}{year}"
    notes = root / f"annotations_trainval{year}" / "annotations"
    folder.mkdir(parents=True)
    notes.mkdir(parents=True)
    for i in range(3):
        Image.new("RGB", (20, 20), (i * 80, 0, 0)).save(folder / f"{i}.jpg")
    images = [{"id": 10 + i, "file_name": f"{i}.jpg"} for i in range(3)]
    rows = [{"image_id": 10 + i % 2, "caption": f" caption  {i} \n"} for i in range(6)]
    (notes / f"captions_{what}{year}.json").write_text(json.dumps({"images": images, "annotations": rows}))


@pytest.mark.parametrize("split", ["TRAIN", "VAL"])
def test_coco_captions_in_their_published_places(tmp_path: Path, split: str) -> None:
    coco(tmp_path, split)
    data: Any = make_dataset(f"CocoCaptions:root={tmp_path}:split={split}")
    assert isinstance(data, Captioned)
    assert len(data) == 2  # the third has no caption
    assert data.captions[0] == ["caption 0", "caption 2", "caption 4"]
    image, caption = data[1]
    assert image.size == (20, 20)
    assert caption == "caption 1"
    drawn = {data.caption(0, seed=1, epoch=e) for e in range(30)}
    assert drawn == set(data.captions[0])
    assert data.caption(0, seed=1, epoch=5) == data.caption(0, seed=1, epoch=5)


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl"])
def test_tables_of_captions(tmp_path: Path, ending: str) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    rows = [("a.png", "one, two"), ("a.png", "three")]
    if ending == "jsonl":
        text = "\n".join(json.dumps({"image": p, "caption": c}) for p, c in rows)
    else:
        comma = "," if ending == "csv" else "\t"
        text = "\n".join(comma.join(f'"{x}"' for x in row) for row in [("image", "caption"), *rows])
    (tmp_path / f"captions.{ending}").write_text(text)
    data: Any = make_dataset(f"Captions:root={tmp_path}:captions=captions.{ending}")
    assert data.captions == [["one, two", "three"]]
    (tmp_path / f"captions.{ending}").write_text(text.replace("a.png", "b.png"))
    with pytest.raises(DinoError, match=r"names b\.png, which"):
        make_dataset(f"Captions:root={tmp_path}:captions=captions.{ending}")


# ---- numbers --------------------------------------------------------------------------------------------------------


def test_retrieval_finds_any_caption_of_a_image_and_the_image_of_a_caption() -> None:
    images = torch.eye(4)
    perfect = zero_shot.retrieval(images, images, torch.arange(4))
    assert set(perfect.values()) == {100.0}
    # five captions an image, only one of them right: enough for the image, a fifth for the captions
    texts = torch.stack([images[i] if j == 3 else images[(i + 1) % 4] for i in range(4) for j in range(5)])
    numbers = zero_shot.retrieval(images, texts, torch.arange(4).repeat_interleave(5), ks=(1,))
    assert numbers["text_to_image_R@1"] == pytest.approx(20)
    with pytest.raises(DinoError, match="a caption for each of 4 images"):
        zero_shot.retrieval(images, texts[:5], torch.zeros(5, dtype=torch.long))


def test_orthogonal_words_classify_perfectly_and_equal_prompts_average_to_themselves() -> None:
    vectors = torch.eye(6)
    assert zero_shot.classification(vectors @ vectors.T, torch.arange(6)) == {"top-1": 100.0, "top-5": 100.0}
    assert zero_shot.classification(vectors, torch.tensor([1, 0, 2, 3, 4, 5]))["top-1"] == pytest.approx(400 / 6)
    prompts = torch.nn.functional.normalize(torch.randn(3, 1, 8), dim=-1).expand(3, 7, 8)
    assert torch.allclose(averaged(prompts), prompts[:, 0])


def test_the_shipped_recipe_is_read_strictly_and_holds_the_references_values() -> None:
    line = ["train_dataset_str=CocoCaptions:root=/data/coco:split=TRAIN"]
    config, _ = load(TextTrainConfig, "dinov3_vitl_text.yaml", line)
    assert config == load(TextTrainConfig, None, line)[0]
