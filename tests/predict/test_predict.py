"""Predictions come back in the image's own geometry, through windows or at once, and are saved so that others read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from toy_models import tiny_vit

from dinov3.data import names as known_names
from dinov3.errors import DinoError, ImageError
from dinov3.heads.dpt import build_depther
from dinov3.heads.encoder import class_maps
from dinov3.heads.linear import LinearClassifier, build_linear_segmentor
from dinov3.predict.classify import predict_classes
from dinov3.predict.common import OutputNames, Prepared, best_class, predicted_map, preprocessing_of, see, to_original
from dinov3.predict.dense import predict_canopy, predict_depth, predict_segments, shares_of, softmax


@pytest.fixture(scope="module")
def depther() -> nn.Module:
    torch.manual_seed(1)
    options: dict[str, Any] = {"channels": 8, "post_process_channels": (4, 6, 8, 10), "n_output_channels": 16}
    model = build_depther(tiny_vit(), head_type="dpt", max_depth=10.0, **options)
    for p in model.decoder.parameters():
        p.data.normal_(std=0.4)
    return model.eval()


@pytest.fixture(scope="module")
def segmentor() -> nn.Module:
    model = build_linear_segmentor(tiny_vit(), num_classes=5)
    model.segmentation_model[1].conv.weight.data.normal_(std=0.5)
    return model.eval()


def photograph(folder: Path, name: str = "chelsea.png") -> Image.Image:
    return Image.open(folder / name).convert("RGB")


@pytest.fixture
def cat(skimage_images: Path) -> Image.Image:
    """130 × 87 pixels: no side is a multiple of anything."""
    return photograph(skimage_images).resize((130, 87))


# ---- geometry ------------------------------------------------------------------------------------------------------


def test_depth_has_the_images_pixels_whatever_the_model_saw(depther: nn.Module, cat: Image.Image) -> None:
    for size in (40, 87, 100):
        result = predict_depth(depther, cat, size=size)
        assert result.depth_m.shape == (87, 130)
        assert result.depth_m.dtype == np.float32
        assert 0.001 <= result.depth_m.min() < result.depth_m.max() <= 10
    # at the image's own size nothing is resized: the depth is that of the model, padding cut off
    preprocessing = preprocessing_of(depther, 87)
    x, _ = preprocessing(cat)
    np.testing.assert_allclose(
        predict_depth(depther, cat, size=87).depth_m, depther.in_image(x[None])[0, 0].numpy(), atol=1e-6
    )


def test_the_mirrored_image_has_the_mirrored_depth(depther: nn.Module, cat: Image.Image) -> None:
    both = predict_depth(depther, cat, size=64, flip=True).depth_m
    mirrored = predict_depth(depther, cat.transpose(Image.Transpose.FLIP_LEFT_RIGHT), size=64, flip=True).depth_m
    np.testing.assert_allclose(both, mirrored[:, ::-1], atol=1e-4)
    assert np.abs(both - predict_depth(depther, cat, size=64).depth_m).max() > 1e-4


def test_a_marked_corner_stays_where_it_is(cat: Image.Image) -> None:
    """A model that returns what it sees: after every way of looking, the map lies over the image."""
    array = np.zeros((87, 130, 3), np.uint8)
    array[60:, 100:] = 255  # far from the origin, where a wrong scale shows
    for changes in ({}, {"fit": "pad", "multiple": 16}, {"multiple": 16}):
        preprocessing = preprocessing_of(nn.Identity(), 60, **changes)
        x, geometry = preprocessing(array)
        seen = Prepared(Image.fromarray(array), x[None], geometry)
        for window in (None, 32):
            maps = predicted_map(seen.x, lambda x, size_hw: x, 3, window)
            back = to_original(maps, seen)[0, 0].numpy() > 0
            wrong = np.argwhere(back != (array[..., 0] > 0))
            assert back.shape == (87, 130)
            assert len(wrong) < 100  # the blurred edge only
            assert all(abs(y - 60) < 3 or abs(x - 100) < 3 for y, x in wrong)


def test_strips_give_what_one_piece_gives(cat: Image.Image, monkeypatch) -> None:
    torch.manual_seed(0)
    model = nn.Linear(1, 1)
    seen = see(model, cat, preprocessing_of(model, 40))
    maps = torch.randn(1, 7, *seen.x.shape[-2:])
    whole = to_original(maps, seen).softmax(1).max(1)
    for values in (1 << 26, 7 * 130 * 10, 1):
        monkeypatch.setattr("dinov3.predict.common.STRIP_VALUES", values)
        classes, weight = best_class(maps, seen, softmax)
        np.testing.assert_allclose(weight, whole.values[0].numpy(), atol=1e-5)
        assert (classes == whole.indices[0].numpy()).mean() > 0.999
    assert classes.dtype == np.uint8


def test_windows_are_used_for_large_images_and_leave_no_hole(segmentor: nn.Module, cat: Image.Image) -> None:
    seen_sizes: list[tuple[int, int]] = []
    hook = segmentor.segmentation_model[0].register_forward_pre_hook(
        lambda module, args: seen_sizes.append(tuple(args[0].shape[-2:]))
    )
    result = predict_segments(segmentor, cat, size=64)
    assert seen_sizes == [(64, 64)] * 2  # 64 × 96, a window every 42 pixels
    seen_sizes.clear()
    predict_segments(segmentor, cat, size=64, whole=True)
    assert seen_sizes == [(64, 96)]
    seen_sizes.clear()
    predict_segments(segmentor, cat, size=64, window=32, stride=16)
    assert len(seen_sizes) == 3 * 5
    hook.remove()
    assert result.classes.shape == result.probability.shape == (87, 130)
    assert 0.2 <= result.probability.min() <= result.probability.max() <= 1
    assert sum(result.shares().values()) == pytest.approx(1)
    with pytest.raises(DinoError, match="stride is between 1 and"):
        predict_segments(segmentor, cat, size=64, window=32, stride=40)


def test_probabilities_of_queries_are_shares() -> None:
    maps = torch.tensor([3.0, 1.0, 0.0]).view(1, 3, 1, 1)
    assert shares_of(maps).flatten().tolist() == [0.75, 0.25, 0.0]


# ---- unusual images ----------------------------------------------------------------------------------------------


def test_unusual_images_are_handled(depther: nn.Module, cat: Image.Image, tmp_path: Path) -> None:
    grey, rgba = cat.convert("L"), cat.convert("RGBA")
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    grey.save(tmp_path / "grey.png")
    rgba.save(tmp_path / "rgba.png")
    deep.save(tmp_path / "deep.png")
    of_grey = predict_depth(depther, tmp_path / "grey.png", size=48).depth_m
    np.testing.assert_allclose(predict_depth(depther, tmp_path / "deep.png", size=48).depth_m, of_grey, atol=1e-5)
    np.testing.assert_allclose(predict_depth(depther, np.asarray(grey), size=48).depth_m, of_grey, atol=1e-5)
    of_colour = predict_depth(depther, cat, size=48).depth_m
    np.testing.assert_allclose(predict_depth(depther, tmp_path / "rgba.png", size=48).depth_m, of_colour, atol=1e-5)
    tensor = torch.from_numpy(np.array(cat)).permute(2, 0, 1)
    np.testing.assert_allclose(predict_depth(depther, tensor, size=48).depth_m, of_colour, atol=1e-5)
    np.testing.assert_allclose(predict_depth(depther, tensor.float() / 255, size=48).depth_m, of_colour, atol=1e-5)
    assert predict_depth(depther, cat.resize((9, 5)), size=32).depth_m.shape == (5, 9)  # smaller than a patch
    assert predict_canopy(depther, cat.resize((9, 5))).height_m.shape == (5, 9)
    with pytest.raises(ImageError, match="not an image"):
        predict_depth(depther, b"hello, I am a text")
    with pytest.raises(ImageError, match="no such file"):
        predict_depth(depther, tmp_path / "nothing.png")


def test_a_wrong_head_gets_one_sentence(depther: nn.Module, segmentor: nn.Module, cat: Image.Image) -> None:
    with pytest.raises(DinoError, match="depth needs a depth head on a backbone, not a LinearSegmentor"):
        predict_depth(segmentor, cat)
    with pytest.raises(DinoError, match="segmentation needs a segmentation head on a backbone, not a Depther"):
        predict_segments(depther, cat)
    with pytest.raises(DinoError, match="classification needs a classifier"):
        predict_classes(depther, cat, size=32)
    with pytest.raises(DinoError, match="4 class names for a model of 5 classes"):
        predict_segments(segmentor, cat, size=32, names=["a", "b", "c", "d"])


def test_a_mask2former_head_names_every_pixel(cat: Image.Image) -> None:
    from dinov3.hub.own_heads import build_head

    model: Any = build_head("segmentation", "mask2former", tiny_vit(), n_classes=4, hidden_dim=64, ffn=64, n_queries=6)
    torch.manual_seed(0)
    for p in model.segmentation_model[1].parameters():
        if p.ndim > 1:
            p.data.normal_(std=p[0].numel() ** -0.5)
    model.eval()
    result = predict_segments(model, cat, size=64, names=["a", "b", "c", "d"])  # two windows
    assert result.classes.shape == (87, 130)
    assert 0.25 <= result.probability.min() <= result.probability.max() <= 1
    # at once and at the image's own size: the arg-max of the class maps
    whole = predict_segments(model, cat, size=87, whole=True)
    x = see(model, cat, preprocessing_of(model, 87)).x
    maps = class_maps(model.predict(x, rescale_to=(87, 130)), "m2f")
    assert (whole.classes == maps.argmax(1)[0].numpy()).all()


def test_boxes_are_in_the_images_pixels(cat: Image.Image) -> None:
    from dinov3.hub.own_heads import build_head
    from dinov3.predict.detect import predict_objects

    sizes = {"width": 64, "n_heads": 4, "encoder_ffn": 32, "decoder_ffn": 32, "encoder_layers": 1, "decoder_layers": 1}
    torch.manual_seed(0)
    model: Any = build_head(
        "detection", "detr", tiny_vit(), n_classes=91, n_queries=5, topk=5, bias_hidden=16, **sizes
    ).eval()
    found = predict_objects(model, cat, size=64, threshold=0.0)
    assert len(found) == 5
    x = see(model, cat, preprocessing_of(model, 64, multiple=16)).x
    (raw,) = model([x[0]])
    scale = np.array([130 / x.shape[-1], 87 / x.shape[-2]] * 2)
    np.testing.assert_allclose(found.boxes_xyxy_px, raw["boxes"].detach().numpy() * scale, rtol=1e-4, atol=1e-2)
    assert found.names[0] == known_names.coco()[found.labels[0]] or found.names[0] == f"class {found.labels[0]}"
    assert len(predict_objects(model, cat, size=64, threshold=1.0)) == 0
    assert predict_objects(model, cat, size=64, threshold=1.0).drawing().size == (130, 87)  # nothing found, drawn


# ---- files ---------------------------------------------------------------------------------------------------------


def test_class_masks_are_indexed_pngs_that_any_reader_understands(
    segmentor: nn.Module, cat: Image.Image, tmp_path: Path
) -> None:
    words = ["sky", "tree", "road", "car", "cat"]
    result = predict_segments(segmentor, cat, size=48, names=words)
    mask, legend, seen = result.save(tmp_path, "cat")
    opened = Image.open(mask)
    assert opened.mode == "P"
    assert (np.asarray(opened) == result.classes).all()
    number = int(result.classes[0, 0])
    assert opened.convert("RGB").getpixel((0, 0)) == tuple(result.colours[number].tolist())
    facts = json.loads(legend.read_text())
    assert list(facts["classes"].values()) == words
    assert sum(facts["shares"].values()) == pytest.approx(1)
    assert Image.open(seen).size[0] > 130  # the legend stands beside
    many = build_linear_segmentor(tiny_vit(), num_classes=300).eval()
    many.segmentation_model[1].conv.weight.data.normal_()
    wide = predict_segments(many, cat, size=48)
    mask, *_ = wide.save(tmp_path, "many")
    assert wide.classes.dtype == np.uint16
    assert (np.asarray(Image.open(mask)) == wide.classes).all()
    assert wide.classes.max() > 255


def test_depth_is_saved_in_metres(depther: nn.Module, cat: Image.Image, tmp_path: Path) -> None:
    result = predict_depth(depther, cat, size=48)
    data, seen = result.save(tmp_path / "new" / "folder", "cat")
    assert (np.load(data) == result.depth_m).all()
    assert Image.open(seen).size[1] >= 87


def test_canopy_of_a_geotiff_lies_on_the_same_ground(depther: nn.Module, cat: Image.Image, tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    ground = {
        33550: (0.6, 0.6, 0.0),
        33922: (0.0, 0.0, 0.0, 500_000.0, 4_100_000.0, 0.0),
        34735: (1, 1, 0, 1, 3072, 0, 1, 32632),
    }
    extra = [(33550, "d", 3, ground[33550], True), (33922, "d", 6, ground[33922], True)]
    extra += [(34735, "H", 8, ground[34735], True), (42113, "s", 2, "0", True)]
    pixels = np.array(cat)
    pixels[:10, :40] = 0  # no data there
    source = tmp_path / "aerial.tif"
    tifffile.imwrite(source, pixels, photometric="rgb", extratags=extra, metadata=None)
    result = predict_canopy(depther, source)
    data, seen = result.save(tmp_path / "out", "aerial")
    assert data.name == "aerial_canopy.tif"
    with tifffile.TiffFile(data) as file:
        page = file.pages[0]
        heights = page.asarray()
        for tag, value in ground.items():
            assert tuple(page.tags[tag].value) == pytest.approx(value)
        assert page.tags[42113].value.strip("\0") == "nan"
        assert page.geotiff_tags["ProjectedCSTypeGeoKey"] == 32632
    assert heights.dtype == np.float32
    assert np.isnan(heights[:10, :40]).all()
    assert np.isfinite(heights[10:]).all()
    np.testing.assert_array_equal(heights, result.height_m)
    assert Image.open(seen).size[1] >= 87
    # the same image that lies nowhere
    plain = predict_canopy(depther, pixels)
    assert plain.save(tmp_path / "out", "plain")[0].suffix == ".npy"
    np.testing.assert_array_equal(plain.height_m[10:], heights[10:])


def test_canopy_has_no_height_where_the_image_is_transparent(
    depther: nn.Module, cat: Image.Image, tmp_path: Path
) -> None:
    tifffile = pytest.importorskip("tifffile")
    pixels = np.array(cat.convert("RGBA"))
    pixels[50:, 90:, 3] = 0
    geo = [(33550, "d", 3, (0.6, 0.6, 0.0), True), (33922, "d", 6, (0.0, 0.0, 0.0, 5e5, 4e6, 0.0), True)]
    more = {"photometric": "rgb", "extrasamples": ["UNASSALPHA"], "compression": "zlib", "tile": (32, 32)}
    tifffile.imwrite(tmp_path / "edge.tif", pixels, extratags=geo, metadata=None, **more)
    by_path = predict_canopy(depther, tmp_path / "edge.tif")
    assert np.isnan(by_path.height_m).sum() == 37 * 40
    data = (tmp_path / "edge.tif").read_bytes()
    from dinov3.data.images import open_image

    opened = predict_canopy(depther, open_image(data), file=data)  # as the verb does
    np.testing.assert_array_equal(opened.height_m, by_path.height_m)
    assert opened.geo == by_path.geo
    assert "in the mean" in opened.summary()


def test_canopy_of_a_large_image_comes_through_windows(depther: nn.Module, cat: Image.Image) -> None:
    whole = predict_canopy(depther, cat, window=None).height_m
    assert (predict_canopy(depther, cat, window=200).height_m == whole).all()
    pieces = predict_canopy(depther, cat, window=64, stride=32).height_m
    assert pieces.shape == (87, 130)
    assert np.isfinite(pieces).all()
    assert not np.array_equal(pieces, whole)


def test_classes_come_with_names_and_probabilities(cat: Image.Image, tmp_path: Path) -> None:
    vit = tiny_vit()
    model = LinearClassifier(vit, nn.Linear(64, 1000)).eval()
    result = predict_classes(model, cat, size=32)
    assert result.probabilities.sum() == pytest.approx(1, abs=1e-5)
    (number, name, p), *_ = result.best()
    assert name == known_names.imagenet1k()[number]
    assert p == result.probabilities.max()
    data, seen = result.save(tmp_path, "cat")
    lines = data.read_text().splitlines()
    assert lines[0] == "rank,class,name,probability"
    assert len(lines) == 101
    assert Image.open(seen).size[0] > 130
    assert predict_classes(LinearClassifier(vit, nn.Linear(64, 2)).eval(), cat, size=32).names == ("class 0", "class 1")


def test_names_for_outputs_are_never_shared(tmp_path: Path) -> None:
    names = OutputNames(tmp_path / "out")
    assert names("/a/cat.jpg") == "cat"
    assert names("/a/cat.png") == "a-cat"
    assert names("/b/Cat.jpg") == "b-Cat"
    third = names("/c/a/cat.jpg")
    assert third.startswith("cat-")
    again = OutputNames(tmp_path / "out")  # another run
    assert again("/a/cat.png") == "a-cat"
    assert again("/c/a/cat.jpg") == third
    assert again("/d/cat.jpg") == "d-cat"
    assert len(set(again.name_of.values())) == 5


def test_lists_of_names_are_whole() -> None:
    assert len(known_names.imagenet1k()) == 1000
    assert known_names.imagenet1k()[281] == "tabby cat"
    assert len(set(known_names.ade20k())) == 150
    assert known_names.ade20k()[12] == "person"
    coco = known_names.coco()
    assert (len(coco), sum(map(bool, coco)), coco[17], coco[90]) == (91, 80, "cat", "toothbrush")
    assert len(set(known_names.templates())) == 80
    assert all("{}" in t for t in known_names.templates())


def test_half_precision_is_asked_for_not_hidden(cat: Image.Image) -> None:
    model = build_linear_segmentor(tiny_vit(), num_classes=5).eval()
    inside: list[torch.dtype] = []
    model.segmentation_model[1].register_forward_pre_hook(lambda m, a: None)
    model.segmentation_model[1].batchnorm_layer.register_forward_hook(lambda m, a, y: inside.append(y.dtype))
    predict_segments(model, cat, size=32, whole=True)
    predict_segments(model.to(torch.bfloat16), cat, size=32, whole=True)
    assert inside == [torch.float32, torch.bfloat16]
