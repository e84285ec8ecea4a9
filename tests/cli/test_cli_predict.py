"""The verbs end to end on real photographs with small untrained heads; what they write is opened again and checked."""

from __future__ import annotations

import csv
import errno
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from paths import GOLDEN, ROOT
from PIL import Image
from typer.testing import CliRunner

from dinov3 import cli, hub
from dinov3.data.tokenizer import Tokenizer
from dinov3.errors import DinoError
from dinov3.files import Lock
from dinov3.heads.dinotxt import DinoTxtConfig, TextConfig
from dinov3.hub import published_heads
from dinov3.hub.own_heads import build_head, save_head
from dinov3.predict.common import OutputNames
from dinov3.predict.dense import DepthMap
from dinov3.weights.writing import write_safetensors

VOCABULARY = GOLDEN / "tiny_bpe.txt.gz"
SIZES: dict[str, tuple[int, int]] = {"chelsea": (300, 451), "rocket": (427, 640)}


def run(*arguments: Any, code: int = 0) -> Any:
    result = CliRunner().invoke(cli.app, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


@pytest.fixture
def photos(skimage_images: Path) -> list[Path]:
    return [skimage_images / "chelsea.png", skimage_images / "rocket.jpg"]


@pytest.fixture(scope="module")
def head_file(tmp_path_factory) -> Path:
    """A linear head for three classes over the small backbone that comes with the package."""
    path = tmp_path_factory.mktemp("head") / "ours.safetensors"
    torch.manual_seed(0)
    model = build_head("segmentation", "linear", hub.load(), n_classes=3)
    model.segmentation_model[1].conv.weight.data.normal_()  # type: ignore[union-attr, index]
    return save_head(
        path,
        model.eval(),
        task="segmentation",
        head="linear",
        options={"n_classes": 3},
        class_names=["sky", "rocket", "cat"],
        colours=[(10, 20, 30), (200, 100, 0), (0, 255, 7)],
    )


# ---- one verb after the other --------------------------------------------------------------------------------------


def test_segment_with_a_head_of_ones_own(photos: list[Path], head_file: Path, tmp_path: Path) -> None:
    result = run("segment", *photos, "--head", head_file, "--out", tmp_path / "out", "--size", 96, "--device", "cpu")
    for name, (height, width) in SIZES.items():
        mask = Image.open(tmp_path / "out" / f"{name}_classes.png")
        assert (mask.mode, mask.size) == ("P", (width, height))
        assert set(np.unique(np.asarray(mask))) <= {0, 1, 2}
        assert mask.getpalette()[:9] == [10, 20, 30, 200, 100, 0, 0, 255, 7]  # type: ignore[index]
        legend = json.loads((tmp_path / "out" / f"{name}_classes.json").read_text())
        assert legend["classes"] == {"0": "sky", "1": "rocket", "2": "cat"}
        assert Image.open(tmp_path / "out" / f"{name}_segments.png").height >= 28
    lines = result.stdout.splitlines()
    assert [line.split("\t")[0] for line in lines] == [str(p) for p in photos]
    assert "linear head" in result.stderr
    assert "2 images, 0 unreadable" in result.stderr


def test_depth_and_canopy_are_metres_in_the_images_pixels(photos: list[Path], tmp_path: Path) -> None:
    result = run("depth", photos[0], "--weights", "random", "--out", tmp_path, "--size", 64)
    depth = np.load(tmp_path / "chelsea_depth.npy")
    assert (depth.shape, depth.dtype) == (SIZES["chelsea"], np.float32)
    assert 0.001 <= depth.min() <= depth.max() <= 10
    assert result.stdout.strip().endswith(" m")
    assert "RANDOM" in result.stderr
    result = run("canopy", photos[0], "--weights", "random", "--out", tmp_path, "--size", 64, "--window", 48)
    assert np.load(tmp_path / "chelsea_canopy.npy").shape == SIZES["chelsea"]
    assert "m in the mean" in result.stdout
    run("depth", photos[0], "--weights", "random", "--out", tmp_path / "half", "--size", 48, "--dtype", "bfloat16")
    assert np.load(tmp_path / "half" / "chelsea_depth.npy").dtype == np.float32


def test_boxes_are_in_cocos_form(photos: list[Path], tmp_path: Path) -> None:
    more = ("--weights", "random", "--out", tmp_path, "--size", 64, "--threshold", 0, "--most", 7)
    result = run("detect", *photos, *more)
    coco = json.loads((tmp_path / "detections.json").read_text())
    assert [Path(i["file_name"]).name for i in coco["images"]] == ["chelsea.png", "rocket.jpg"]
    sizes = {i["id"]: (i["width"], i["height"]) for i in coco["images"]}
    assert list(sizes.values()) == [(451, 300), (640, 427)]
    categories = {c["id"]: c["name"] for c in coco["categories"]}
    assert (len(categories), categories[17]) == (80, "cat")
    annotations = coco["annotations"]
    assert len(annotations) == 14
    assert [a["id"] for a in annotations] == list(range(1, 15))
    for a in annotations:
        x, y, width, height = a["bbox"]
        most = sizes[a["image_id"]]
        assert width >= 0
        assert height >= 0
        assert x >= -0.01
        assert x + width <= most[0] + 0.1
        assert y + height <= most[1] + 0.1
        assert a["area"] == pytest.approx(width * height, abs=0.01)
    assert result.stdout.splitlines()[0].split("\t")[1] == "7"
    assert Image.open(tmp_path / "rocket_boxes.png").size == (640, 427)
    (tmp_path / "clip.avi").write_bytes(b"RIFF")
    shutil.copy(photos[0], tmp_path)
    none = run("detect", tmp_path, *more[:2], "--out", tmp_path / "none", *more[4:6], "--threshold", 1)
    assert none.stdout.endswith("\t0\tnothing above the threshold\n")
    assert f"note: videos are taken where they are named: '{tmp_path}/*.avi'" in none.stderr


def test_a_cat_is_classified_and_found_by_the_heads_that_ship(photos: list[Path], tmp_path: Path) -> None:
    code = "import sys; from dinov3.cli import main; sys.argv = ['dinov3', *sys.argv[1:]]; main()"
    command = [sys.executable, "-c", code, "classify", photos[0], "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "cat" in done.stdout.split("\t")[1].split(", ")[0]  # tabby cat, Egyptian cat
    assert "small model that ships" in done.stderr
    assert "float32 on cpu" in done.stderr  # the file holds float16, which nothing computes in
    assert "trained at" not in run("segment", photos[0], "--out", tmp_path).stderr
    other = run("segment", photos[0], "--out", tmp_path / "other", "--size", 128).stderr
    assert "note: the head was trained at 256 pixels, not at --size 128" in other
    classes = np.asarray(Image.open(tmp_path / "chelsea_classes.png"))
    legend = json.loads((tmp_path / "chelsea_classes.json").read_text())
    assert "foreground" in str(legend)
    assert classes.shape == (300, 451)
    assert (classes[50:250, 130:330] == 1).mean() > 0.8  # its face
    assert (classes == 1).mean() < 0.8


@pytest.mark.parametrize(
    "verb, meta", [("depth", "dinov3_vit7b16_dd"), ("detect", "dinov3_vit7b16_de"), ("canopy", "dinov3_vitl16_chmv2"),
                   ("zero-shot", "dino.txt")],
)  # fmt: skip
def test_without_weights_the_others_say_in_two_lines_what_to_get(
    verb: str, meta: str, photos: list[Path], tmp_path: Path
) -> None:
    more = ["--labels", "a,b"] if verb == "zero-shot" else ["--out", tmp_path]
    with pytest.raises(DinoError) as caught:
        run(verb, photos[0], *more)
    first, second = str(caught.value).splitlines()
    assert f"needs weights that do not ship: Meta's {meta}, free to request at https://ai.meta.com/" in first
    assert ("--head FILE" in first) == (verb != "zero-shot")
    assert second == "To see the form of the output without them: --weights random"


def test_classes_go_to_stdout_and_one_table(photos: list[Path], tmp_path: Path) -> None:
    more = ("--weights", "random", "--size", 32, "--labels", "cat,rocket,cup", "--top", 2)
    result = run("classify", *photos, *more, "--out", tmp_path)
    with (tmp_path / "classes.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [r["rank"] for r in rows] == ["1", "2", "1", "2"]
    assert {r["name"] for r in rows} <= {"cat", "rocket", "cup"}
    assert result.stdout.splitlines()[0].startswith(f"{photos[0]}\t{rows[0]['name']} ")
    assert run("classify", photos[0], *more).stdout.startswith(f"{photos[0]}\t")
    (tmp_path / "names.txt").write_text("cat\nrocket\ncup\n")
    run("classify", photos[0], "--weights", "random", "--size", 32, "--labels", tmp_path / "names.txt")


def test_a_table_keeps_the_rows_of_other_runs(photos: list[Path], tmp_path: Path) -> None:
    more = ("--weights", "random", "--size", 32, "--labels", "cat,rocket", "--top", 1, "--out", tmp_path)
    for chosen in (photos, photos[:1], photos[:1]):
        run("classify", *chosen, *more)
    with (tmp_path / "classes.csv").open() as file:
        assert sorted(row["image"] for row in csv.DictReader(file)) == sorted(map(str, photos))


def test_results_are_not_taken_for_images(photos: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for photo in photos:
        (folder / photo.name).write_bytes(photo.read_bytes())
    more = ("--weights", "random", "--size", 32, "--labels", "cat,rocket")
    for _ in range(2):
        result = run("classify", folder, *more, "--out", folder / "results")
        assert len(result.stdout.splitlines()) == len(photos)
    with pytest.raises(DinoError, match="is the images' own folder"):
        run("classify", folder, *more, "--out", folder)
    run("classify", folder / photos[0].name, *more, "--out", folder)  # one image, named by itself


def test_a_misspelt_file_of_labels_is_no_class(photos: list[Path]) -> None:
    with pytest.raises(DinoError, match=r"--labels nofile\.txt: no such file"):
        run("classify", photos[0], "--weights", "random", "--labels", "nofile.txt")


def test_a_device_that_is_not_there_is_a_sentence(photos: list[Path], tmp_path: Path) -> None:
    with pytest.raises(DinoError, match="device 'cda': cpu, cuda, cuda:1, mps or auto"):
        run("embed", photos[0].parent, "--out", tmp_path / "s", "--device", "cda")
    if not torch.cuda.is_available():
        with pytest.raises(DinoError, match="there is no CUDA device here"):
            run("segment", photos[0], "--weights", "random", "--out", tmp_path / "m", "--device", "cuda")


# ---- words ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dino_txt(tmp_path_factory) -> dict[str, Path]:
    """A small dino.txt of one's own: a head file and its sizes, over the backbone of the package."""
    folder = tmp_path_factory.mktemp("dinotxt")
    backbone: Any = hub.load()
    text = TextConfig(
        vocab_size=Tokenizer.from_file(VOCABULARY).vocab_size, context_length=12, dim=64, num_heads=1, num_layers=1
    )
    config = DinoTxtConfig(embed_dim=2 * backbone.embed_dim)
    torch.manual_seed(0)
    model = published_heads.fresh(backbone, text, config)
    state = {k: v for k, v in model.state_dict().items() if not k.startswith(published_heads.BACKBONE)}
    write_safetensors(state, folder / "head.safetensors")
    sizes = {"text_backbone": vars(text), "vision_backbone": "dinov3_vitt16"} | vars(config)
    (folder / "clip_model_config.yaml").write_text(yaml.safe_dump(sizes))
    return {"head": folder / "head.safetensors"}


def test_zero_shot_prints_probabilities_and_saves_cosines(
    dino_txt: dict[str, Path], photos: list[Path], tmp_path: Path
) -> None:
    more = ("--weights", dino_txt["head"], "--vocabulary", VOCABULARY, "--templates", "none", "--device", "cpu")
    result = run(
        "zero-shot", photos[0], "--labels", "cat,rocket,dog", *more, "--size", 64, "--out", tmp_path, "--top", 3
    )
    with (tmp_path / "words.csv").open() as file:
        cosine = {r["name"]: float(r["cosine"]) for r in csv.DictReader(file)}
    model, tokenizer = published_heads.open_model(dino_txt["head"], vocabulary_file=VOCABULARY)
    from dinov3.data.transforms.inputs import Preprocessing
    from dinov3.predict.common import see

    preprocessing = Preprocessing.named("classification", size=64, center_crop=64)
    x = see(model, photos[0], preprocessing).x
    with torch.no_grad():
        tokens = tokenizer.tokenize(["cat", "rocket", "dog"], 12)
        expected = (model.encode_image(x, normalize=True) @ model.encode_text(tokens, normalize=True).T)[0]
    assert list(map(cosine.get, ["cat", "rocket", "dog"])) == pytest.approx(expected.tolist(), abs=1e-5)
    assert result.stdout.count("%") == 3
    assert Image.open(tmp_path / "chelsea_words.png").width > 451


def test_zero_shot_places(dino_txt: dict[str, Path], photos: list[Path], tmp_path: Path) -> None:
    more = ("--weights", dino_txt["head"], "--vocabulary", VOCABULARY, "--size", 64, "--window", 48, "--out", tmp_path)
    (tmp_path / "templates.txt").write_text("a {}.\nmany {}\n")
    run("zero-shot", *photos, "--labels", "cat,sky", "--dense", "--templates", tmp_path / "templates.txt", *more)
    for name, (height, width) in SIZES.items():
        mask = Image.open(tmp_path / f"{name}_words_classes.png")
        assert (mask.mode, mask.size) == ("P", (width, height))
    from dinov3.heads.dinotxt import OpenVocabulary
    from dinov3.predict.classify import predict_places, words

    # all at once, at the image's own size: the arg-max of the cosines, place by place
    model, tokenizer = published_heads.open_model(dino_txt["head"], vocabulary_file=VOCABULARY)
    classes = words(model, tokenizer, ["cat", "sky"], ["{}"])
    image = Image.open(photos[0]).convert("RGB").resize((96, 64))
    found = predict_places(model, image, classes, size=64, window=None)
    from dinov3.predict.common import preprocessing_of, see

    x = see(model, image, preprocessing_of(model, 64, interpolation="bicubic")).x
    maps = OpenVocabulary(model, classes.patch).predict(x, (64, 96))  # type: ignore[arg-type]
    assert (found.classes == maps.argmax(1)[0].numpy()).mean() > 0.999


def service_over(store: Path) -> Any:
    """A client of what `dinov3 serve --store` runs."""
    pytest.importorskip("fastapi")
    from starlette.testclient import TestClient

    from dinov3 import serve
    from dinov3.embedding.pipeline import both_sides
    from dinov3.embedding.store import EmbeddingStore

    opened = EmbeddingStore.open(store)
    model, preprocessing, vector_of = both_sides(opened, vocabulary=str(VOCABULARY))
    app = serve.application(model, preprocessing, pooling="cls+mean", store=opened, vector_of=vector_of)
    return TestClient(app, base_url="http://localhost")


def test_a_store_filled_by_dino_txt_is_searched_with_a_text(
    dino_txt: dict[str, Path], photos: list[Path], tmp_path: Path
) -> None:
    pytest.importorskip("lancedb")
    folder = tmp_path / "photos"
    folder.mkdir()
    for path in photos:
        Image.open(path).convert("RGB").save(folder / f"{path.stem}.png")
    store, model = tmp_path / "store", published_heads.NAME
    run(
        "embed",
        folder,
        *shlex.split(f"--out {store} --model {model} --weights {dino_txt['head']} --size 64 --device cpu"),
    )
    result = run("search", store, "--text", "a cat", "--vocabulary", VOCABULARY, "--device", "cpu", "--json")
    hits = json.loads(result.stdout)
    opened, tokenizer = published_heads.open_model(dino_txt["head"], vocabulary_file=VOCABULARY)
    from dinov3.features import default_preprocessing
    from dinov3.predict.common import see

    text = opened.encode_text(tokenizer.tokenize(["a cat"], 12), normalize=True)
    preprocessing = default_preprocessing(published_heads.ImageSide(opened), size=64)
    for hit in hits:
        with torch.no_grad():
            image = opened.encode_image(see(opened, hit["path"], preprocessing).x, normalize=True)
        assert hit["score"] == pytest.approx(float((image @ text.T).detach()), abs=1e-5)
    assert len(hits) == 2
    sheet = tmp_path / "sheet.png"
    result = run("search", store, "--image", folder / "chelsea.png", "--device", "cpu", "--sheet", sheet)
    assert result.stdout.splitlines()[0].split("\t")[1] == "1.0000"
    run("search", store, "--text", "a cat", "--vocabulary", VOCABULARY, "--device", "cpu", "--sheet", sheet)
    assert Image.open(sheet).width > 400

    with service_over(store) as client:
        assert client.get("/health").json()["text"] is True
        served = client.post("/search", json={"text": "a cat", "top": 5}).json()["hits"]
        assert [(h["path"], h["score"]) for h in served] == [(h["path"], pytest.approx(h["score"])) for h in hits]
        for wrong, sentence in (
            ({"text": "cat " * 40}, "more than 12 tokens"),
            ({"text": 3}, '"text" must be a sentence'),
            ({"text": "a", "vector": [1]}, 'either "vector" or "text"'),
        ):
            refused = client.post("/search", json=wrong)
            assert refused.status_code == 400
            assert sentence in refused.json()["error"]

    with pytest.raises(DinoError, match="either --image"):
        run("search", store)
    with pytest.raises(DinoError, match="more than 12 tokens"):
        run("search", store, "--text", "cat " * 40, "--vocabulary", VOCABULARY, "--device", "cpu")
    run("embed", folder, "--out", tmp_path / "plain", "--size", 32, "--device", "cpu")
    with pytest.raises(DinoError, match=r"filled by dinov3_vitt16\w*, which has no text tower"):
        run("search", tmp_path / "plain", "--text", "a cat")
    with pytest.raises(DinoError, match="has no text tower: give the head"):
        run("embed", folder, "--out", tmp_path / "x", "--model", model, "--weights", "random")


# ---- what goes wrong -----------------------------------------------------------------------------------------------


def test_unreadable_images_are_named_counted_and_do_not_stop_the_rest(photos: list[Path], tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "broken.png").write_bytes(photos[0].read_bytes()[:500])
    (tmp_path / "a" / "text.jpg").write_text("no image")
    Image.open(photos[0]).resize((20, 12)).save(tmp_path / "a" / "small.png")
    out = tmp_path / "out"
    result = run("depth", tmp_path / "a", "--weights", "random", "--out", out, "--size", 32, code=3)
    assert "broken.png: truncated PNG" in result.stderr
    assert "text.jpg: not an image" in result.stderr
    assert "1 images, 2 unreadable" in result.stderr
    assert np.load(out / "small_depth.npy").shape == (12, 20)


def test_images_of_one_name_do_not_overwrite_each_other(photos: list[Path], tmp_path: Path) -> None:
    for i, folder in enumerate(("a", "b")):
        (tmp_path / folder).mkdir()
        Image.open(photos[0]).resize((20 + i, 12)).save(tmp_path / folder / "x.png")
    out, more = tmp_path / "out", ("--weights", "random", "--size", 32, "--device", "cpu")
    run("depth", tmp_path / "a", tmp_path / "a" / "x.png", "--out", out, *more)  # twice the same image is once
    run("depth", tmp_path / "b" / "x.png", "--out", out, *more)
    assert np.load(out / "x_depth.npy").shape == (12, 20)
    assert np.load(out / "b-x_depth.npy").shape == (12, 21)
    with (out / "images.csv").open() as file:
        assert {r["name"]: Path(r["image"]).parent.name for r in csv.DictReader(file)} == {"x": "a", "b-x": "b"}


def test_one_bad_image_stops_no_verb(photos: list[Path], tmp_path: Path, monkeypatch) -> None:
    folder, out = tmp_path / "a", tmp_path / "out"
    folder.mkdir()
    small = Image.open(photos[0]).convert("RGB").resize((20, 12))
    for name in ("first", "n" * 251, "unlucky", "z"):
        small.save(folder / f"{name}.png")
    Image.new("RGB", (100_000, 1)).save(folder / "strip.png")
    saved = DepthMap.save

    def save(self: DepthMap, where: Path, name: str = "image") -> list[Path]:
        if name == "unlucky":
            raise ValueError("no place for it")
        return saved(self, where, name)

    monkeypatch.setattr(DepthMap, "save", save)
    result = run("depth", folder, "--weights", "random", "--out", out, "--size", 32, code=3)
    assert len(result.stdout.splitlines()) == 3
    assert "strip.png: an image of 100000×1 would be enlarged" in result.stderr
    assert "unlucky.png: ValueError: no place for it" in result.stderr
    assert "3 images, 2 unreadable" in result.stderr
    assert {f"{name}_depth.npy" for name in ("first", "n" * 200, "z")} == {p.name for p in out.glob("*.npy")}

    def full(self: DepthMap, where: Path, name: str = "image") -> list[Path]:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(DepthMap, "save", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*'"):
        run("depth", folder, "--weights", "random", "--out", out, "--size", 32)


def test_a_second_run_overwrites_nothing_of_the_first(photos: list[Path], tmp_path: Path) -> None:
    out, more = tmp_path / "out", ("--weights", "random", "--size", 32, "--device", "cpu")
    run("detect", photos[0], "--out", out, "--threshold", 0, "--most", 3, *more)
    run("detect", photos[1], "--out", out, "--threshold", 0, "--most", 2, *more)
    run("detect", photos[1], "--out", out, "--threshold", 0, "--most", 2, *more)
    coco = json.loads((out / "detections.json").read_text())
    assert [Path(i["file_name"]).name for i in coco["images"]] == ["chelsea.png", "rocket.jpg"]
    numbers = [i["id"] for i in coco["images"]]
    assert [a["image_id"] for a in coco["annotations"]] == [numbers[0]] * 3 + [numbers[1]] * 2
    assert [a["id"] for a in coco["annotations"]] == [1, 2, 3, 4, 5]
    run("detect", photos[1], "--out", out, "--labels", "a,b", *more)  # other classes: another file
    assert json.loads((out / "detections.1.json").read_text()) == coco
    (out / "classes.csv").write_text("mine,too\n1,2\n")
    run("classify", photos[0], "--labels", "cat,rocket", "--out", out, *more)
    assert (out / "classes.1.csv").read_text() == "mine,too\n1,2\n"
    lock = Lock(out / ".running.lock", "a test")
    with pytest.raises(DinoError, match=r"process \d+ on .* is writing to .*; wait for it, or give another --out"):
        run("depth", photos[0], "--out", out, *more)
    lock.release()
    run("depth", photos[0], "--out", out, *more)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_verbs_that_share_a_folder_share_no_file(
    order: tuple[int, ...], dino_txt: dict[str, Path], photos: list[Path], tmp_path: Path
) -> None:
    random, text = ["--weights", "random", "--size", 32], ["--weights", dino_txt["head"], "--vocabulary", VOCABULARY]
    commands: list[list[Any]] = [
        ["classify", "--labels", "cat,rocket", *random],
        ["segment", "--labels", "a,b", *random],
        ["zero-shot", "--labels", "cat,sky", "--dense", "--templates", "none", "--size", 64, *text],
    ]
    written: dict[str, bytes] = {}
    for i in order:
        run(commands[i][0], photos[0], *commands[i][1:], "--out", tmp_path, "--device", "cpu")
        assert {name: (tmp_path / name).read_bytes() for name in written} == written
        written |= {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.suffix in (".png", ".json")}
    images = {"chelsea_probabilities.png", "chelsea_classes.png", "chelsea_words_classes.png"}
    assert images < written.keys()
    assert len(written) == 7


VERBS = ("segment", "depth", "canopy", "detect", "classify", "zero-shot")


@pytest.mark.parametrize("verb", VERBS)
def test_mistakes_in_the_images_and_the_folder_are_found_before_a_model_is_opened(
    verb: str, photos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(*given: Any) -> Any:
        raise AssertionError("a model was opened")

    monkeypatch.setattr("dinov3.cli.predict.model_for", opened)
    monkeypatch.setattr("dinov3.cli.predict.text_model", opened)
    more = ["--labels", "a,b"] if verb == "zero-shot" else []
    with pytest.raises(DinoError, match=r"no such file or folder: .*chelsea\.pgn; did you mean 'chelsea\.png'"):
        run(verb, photos[0].with_suffix(".pgn"), "--out", tmp_path / "out", *more)
    with pytest.raises(
        DinoError, match=r"c\.csv is the name of a file, but results go into a folder: .* such as .*/c$"
    ):
        run(verb, photos[0], "--out", tmp_path / "c.csv", *more)
    assert list(tmp_path.iterdir()) == []


def test_every_name_that_is_taken_gives_another_one(tmp_path: Path) -> None:
    digits = hashlib.sha256(b"/b/x.png").hexdigest()[:8]
    taken = ["x", "b-x", f"x-{digits}", f"x-{digits}-2"]
    rows = "".join(f"{name},/other/{i}\n" for i, name in enumerate(taken))
    (tmp_path / "images.csv").write_text("name,image\n" + rows)
    names = OutputNames(tmp_path)
    assert names("/b/x.png") == f"x-{digits}-3"
    long = [names(f"/{folder}/{'ä' * 120}.png") for folder in "abc"]
    assert len(set(long)) == 3
    assert max(len(os.fsencode(name)) for name in long) < 230
    (tmp_path / "images.csv").write_text("a,b\n1,2\n")
    with pytest.raises(DinoError, match="is a table of something else"):
        OutputNames(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["segment", "{empty}", "--weights", "random", "--out", "{out}"], "empty"),
        (["segment", "{cat}", "--model", "dinov3_vit7b16_dd", "--out", "{out}"], "use `dinov3 depth`"),
        (["depth", "{cat}", "--model", "dinov3_vit7b16_ddd", "--out", "{out}"], "did you mean 'dinov3_vit7b16_dd'"),
        (["depth", "{cat}", "--head", "{head}", "--out", "{out}"], "not for depth: use `dinov3 segment`"),
        (["segment", "{cat}", "--head", "{head}", "--model", "x", "--out", "{out}"], "give one of them"),
        (["segment", "{cat}", "--head", "{head}", "--labels", "a,b", "--out", "{out}"], "2 class names for a model of 3"),
        (["segment", "{cat}", "--head", "{head}", "--backbone-weights", "{other}", "--out", "{out}"], "was trained on"),
        (["segment", "{cat}", "--head", "{cat}.nothing", "--out", "{out}"], "there is no head file"),
        (["segment", "{nothing}", "--weights", "random", "--out", "{out}"], "nothing"),
        (["classify", "{cat}", "--weights", "random", "--labels", "a,,b"], "has an empty name"),
        (["zero-shot", "{cat}", "--labels", "a,b", "--weights", "random", "--vocabulary", "{bpe}", "--dense"], "with --out"),
        (["zero-shot", "{cat}", "--labels", "a", "--weights", "random", "--vocabulary", "{bpe}", "--templates", "{t}"],
         "needs {}"),
    ],
)  # fmt: skip
def test_mistakes_are_one_sentence(
    arguments: list[str], sentence: str, photos: list[Path], head_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "t.txt").write_text("no place for a class\n")
    if "{other}" in arguments:
        torch.save(hub.load("dinov3_vitt16", "random").state_dict(), tmp_path / "other.pth")
    places = {"cat": photos[0], "head": head_file, "out": tmp_path / "out", "bpe": VOCABULARY}
    places |= {n: tmp_path / n for n in ("empty", "nothing")} | {
        "t": tmp_path / "t.txt",
        "other": tmp_path / "other.pth",
    }
    with pytest.raises(DinoError) as caught:
        run(*(a.format(**places) if a != "needs {}" else a for a in arguments))
    assert sentence in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_texts_that_are_cut_give_a_note(photos: list[Path], tmp_path: Path) -> None:
    long = "cat " * 120
    more = ("--weights", "random", "--vocabulary", VOCABULARY, "--templates", "none", "--size", 32)
    result = run("zero-shot", photos[0], "--labels", f"cat,{long}", *more)
    assert "note: 1 of 2 texts have more than 77 tokens" in result.stderr


def test_help_of_the_verbs_needs_no_torch() -> None:
    code = (
        "import sys; from dinov3.cli import app; from typer.testing import CliRunner; "
        "r = CliRunner().invoke(app, ['segment', '--help']); assert r.exit_code == 0, r.output; "
        "assert '--backbone-weights' in r.output; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.data
def test_the_two_cats_have_as_many_pixels_as_their_image(
    development_data: Path, head_file: Path, tmp_path: Path
) -> None:
    image = development_data / "coco-cats" / "COCO" / "000000039769.png"
    run("segment", image, "--head", head_file, "--out", tmp_path, "--size", 128)
    (mask,) = tmp_path.glob("*_classes.png")
    assert Image.open(mask).size == Image.open(image).size
