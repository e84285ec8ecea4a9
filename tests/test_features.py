"""Images to Features: the same numbers as the bare model, the way back to pixels, and what may not be mixed."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dinov3
from dinov3.dense.pca import fit, rainbow
from dinov3.errors import DinoError, ImageError, IncompatibleFeatures
from dinov3.features import batched, check_patches, default_preprocessing, outputs, prepare, run
from dinov3.models.architectures import ConvNeXtConfig, ViTConfig
from dinov3.models.convnext import ConvNeXt
from dinov3.models.vit import VisionTransformer
from dinov3.weights import writing


@pytest.fixture(scope="module")
def vit() -> VisionTransformer:
    torch.manual_seed(0)
    options = {"embed_dim": 32, "depth": 3, "num_heads": 2, "n_storage_tokens": 4, "pos_embed_rope_rescale_coords": 2.0}
    model = VisionTransformer(ViTConfig.of(**options))
    model.init_weights()
    return model.eval()


@pytest.fixture(scope="module")
def convnext() -> ConvNeXt:
    torch.manual_seed(0)
    model = ConvNeXt(ConvNeXtConfig(depths=(1, 1, 1, 1), dims=(8, 12, 16, 24)))
    model.init_weights()
    return model.eval()


@pytest.fixture(scope="module")
def photo(skimage_images: Path) -> Path:
    return skimage_images / "chelsea.png"  # 451 × 300


def test_shapes_and_metadata_of_features(vit, photo) -> None:
    f = dinov3.embed(vit, [photo, photo], size=64)
    assert f.cls.shape == (2, 32)
    assert f.registers.shape == (2, 4, 32)
    assert f.patches.shape == (2, 4, 4, 32)
    assert f.grid_hw == (4, 4)
    assert (f.layer, f.n_layers, f.normed) == (2, 3, True)
    assert f.preprocessing.startswith("square64-")
    assert torch.equal(f.pooled, f.cls)
    assert "grid 4×4" in repr(f)


def test_all_forms_of_an_image_give_the_same_features(vit, photo) -> None:
    image = Image.open(photo)
    pixels = np.asarray(image)
    tensor = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    buffer = io.BytesIO()
    image.save(buffer, "png")
    forms = [photo, str(photo), buffer.getvalue(), image, pixels, tensor, tensor.float() / 255]
    first = dinov3.embed(vit, forms[0], size=64, order="float")
    for form in forms[1:]:
        torch.testing.assert_close(dinov3.embed(vit, form, size=64, order="float").patches, first.patches)
    batch = dinov3.embed(vit, torch.stack([tensor, tensor]), size=64, order="float")
    torch.testing.assert_close(batch.cls[1], first.cls[0])


@torch.no_grad()
def test_features_are_those_of_the_bare_model(vit, photo) -> None:
    preprocessing = default_preprocessing(vit, size=64)
    x, _ = prepare(photo, preprocessing)
    out = vit.forward_features(x[None])
    f = dinov3.embed(vit, photo, preprocessing=preprocessing)
    torch.testing.assert_close(f.cls, out["x_norm_clstoken"])
    torch.testing.assert_close(f.registers, out["x_storage_tokens"])
    torch.testing.assert_close(f.patches.flatten(1, 2), out["x_norm_patchtokens"])
    patches, cls, registers = vit.get_intermediate_layers(
        x[None], n=[1], return_class_token=True, return_extra_tokens=True, norm=False
    )[0]
    f = dinov3.embed(vit, photo, preprocessing=preprocessing, layer=1, norm=False)
    torch.testing.assert_close(f.cls, cls)
    torch.testing.assert_close(f.registers, registers)
    torch.testing.assert_close(f.patches.flatten(1, 2), patches)
    assert (f.layer, f.normed) == (1, False)


@torch.no_grad()
def test_convnext_features_have_no_registers_and_a_norm_on_the_last_stage_only(convnext, photo) -> None:
    f = dinov3.embed(convnext, photo, size=64)
    x, _ = prepare(photo, default_preprocessing(convnext, size=64))
    assert f.patches.shape == (1, 2, 2, 24)
    assert f.registers.shape == (1, 0, 24)
    torch.testing.assert_close(f.cls, convnext(x[None]))
    earlier = dinov3.embed(convnext, photo, size=64, layer=1)
    assert earlier.patches.shape == (1, 8, 8, 12)
    assert not earlier.normed
    assert earlier.pixel_of_patch(0, 0) == pytest.approx((451 / 16, 300 / 16))


def test_a_model_in_training_mode_is_evaluated_and_left_in_training_mode(vit, photo) -> None:
    expected = dinov3.embed(vit, photo, size=64).patches
    vit.train()
    try:
        torch.testing.assert_close(dinov3.embed(vit, photo, size=64).patches, expected)
        assert vit.training
    finally:
        vit.eval()


def test_pooled_is_refused_where_it_would_be_something_else(vit, photo) -> None:
    for options in ({"layer": 0}, {"norm": False}):
        with pytest.raises(IncompatibleFeatures, match="last layer"):
            _ = dinov3.embed(vit, photo, size=64, **options).pooled


@pytest.mark.parametrize(
    "options",
    [
        {"size": 64},
        {"size": 64, "shape": "short"},
        {"size": 90, "shape": "long", "fit": "pad"},
        {"shape": "native"},
        {"size": 64, "shape": "short", "center_crop": 48},
    ],
)
def test_patches_and_pixels_lead_to_each_other(vit, photo, options) -> None:
    f = dinov3.embed(vit, photo, **options)
    h, w = f.grid_hw
    for row in range(h):
        for col in range(w):
            x, y = f.pixel_of_patch(row, col)
            if 0 <= x < 451 and 0 <= y < 300:  # a patch of padding has its centre outside
                assert f.patch_of_pixel(x, y) == (row, col)
            x0, y0, x1, y1 = f.box_of_patch(row, col)
            assert ((x0 + x1) / 2, (y0 + y1) / 2) == pytest.approx((x, y))


def test_the_patch_that_sees_a_bright_spot_is_the_one_that_changes(vit) -> None:
    """The map is checked against the image itself: a spot painted at (x, y) changes that input patch and no other."""
    image = np.zeros((200, 300, 3), np.uint8)
    preprocessing = default_preprocessing(vit, size=96, shape="short", fit="pad")
    black, _ = prepare(image, preprocessing)
    for x, y in ((5, 5), (150, 100), (290, 190), (37, 161)):
        spot = image.copy()
        spot[y - 1 : y + 2, x - 1 : x + 2] = 255
        changed = (prepare(spot, preprocessing)[0] - black).abs().sum(0)
        v, u = np.unravel_index(int(changed.argmax()), changed.shape)
        f = dinov3.embed(vit, spot, preprocessing=preprocessing)
        assert f.patch_of_pixel(x + 0.5, y + 0.5) == (v // 16, u // 16)


def test_pixels_outside_and_pixels_cropped_away_are_told_apart(vit, photo) -> None:
    f = dinov3.embed(vit, photo, shape="native", fit="crop")
    with pytest.raises(DinoError, match="outside the image, which is 451×300"):
        f.patch_of_pixel(451, 10)
    with pytest.raises(DinoError, match="cropped away"):
        f.patch_of_pixel(450, 10)


@pytest.mark.parametrize("difference", ["layer", "normed", "preprocessing", "model"])
def test_different_features_are_not_compared_or_joined(vit, photo, difference) -> None:
    a = dinov3.embed(vit, photo, size=64)
    options = {"layer": {"layer": 1}, "normed": {"norm": False}, "preprocessing": {"interpolation": "bicubic"}}
    other = vit
    if difference == "model":
        other = VisionTransformer(vit.config).eval()
        other.init_weights()
    b = dinov3.embed(other, photo, size=64, **options.get(difference, {}))
    for act in (lambda: a.similarity(b), lambda: dinov3.Features.cat([a, b]), lambda: a.patch_similarity(0, 0, b)):
        with pytest.raises(IncompatibleFeatures, match=f"differ in {difference}"):
            act()
    assert a.similarity(b, ignore=[difference]).shape == (1, 1)


def test_similarity_is_cosine(vit, photo, skimage_images) -> None:
    a = dinov3.embed(vit, [photo, skimage_images / "coffee.png"], size=64)
    s = a.similarity(a)
    assert s.diagonal().tolist() == pytest.approx([1, 1])
    expected = torch.nn.functional.cosine_similarity(a.cls[0], a.cls[1], dim=0)
    assert s[0, 1].item() == pytest.approx(expected.item(), abs=1e-6)
    p = a.patch_similarity(1, 2, image=1)
    assert p.shape == (2, 4, 4)
    assert p[1, 1, 2].item() == pytest.approx(1)


def test_joining_keeps_order_and_refuses_other_grids(vit, photo, skimage_images) -> None:
    coffee = skimage_images / "coffee.png"  # 600 × 400
    a, b = dinov3.embed(vit, photo, size=64), dinov3.embed(vit, coffee, size=64)
    both = dinov3.Features.cat([a, b])
    together = dinov3.embed(vit, [photo, coffee], size=64)
    torch.testing.assert_close(both.patches, together.patches)
    assert both.geometry == together.geometry
    assert [g.width for g in both.geometry] == [451, 600]
    assert torch.equal(both[1].cls, both.cls[1:])
    assert both[-1].geometry == both.geometry[1:]
    with pytest.raises(IncompatibleFeatures, match="patch grids"):
        dinov3.embed(vit, [photo, np.zeros((64, 200, 3), np.uint8)], size=64, shape="short")


def test_batch_size_does_not_change_the_result(vit, photo) -> None:
    images = [np.random.default_rng(i).integers(0, 256, (50, 60, 3), dtype=np.uint8) for i in range(5)]
    one, all = (dinov3.embed(vit, images, size=32, batch_size=n) for n in (1, 5))
    torch.testing.assert_close(one.patches, all.patches)


def test_statistics_follow_the_weights(photo) -> None:
    model = dinov3.load("dinov3_vits16", "random")
    web = default_preprocessing(model)
    object.__setattr__(model.origin, "mean", (0.430, 0.411, 0.296))
    satellite = default_preprocessing(model)
    assert web.id != satellite.id
    assert satellite.mean == (0.430, 0.411, 0.296)


def test_mistakes_are_sentences(vit, photo, tmp_path) -> None:
    with pytest.raises(DinoError, match="this model has 3"):
        dinov3.embed(vit, photo, layer=3, size=32)
    with pytest.raises(DinoError, match="no images were given"):
        dinov3.embed(vit, [])
    with pytest.raises(ImageError):
        dinov3.embed(vit, tmp_path / "none.jpg")
    (tmp_path / "page.jpg").write_text("<!DOCTYPE html>")
    with pytest.raises(ImageError, match="not an image"):
        dinov3.embed(vit, tmp_path / "page.jpg")


def test_the_rainbow_is_the_same_on_every_machine_and_sees_two_halves(vit) -> None:
    """Two flat halves must get two colours; the directions are those of a plain eigendecomposition."""
    image = np.zeros((64, 64, 3), np.uint8)
    image[:, 32:] = (250, 30, 60)
    f = dinov3.embed(vit, image, size=64)
    colours = rainbow(f)
    assert colours.shape == (1, 4, 4, 3)
    assert colours.min() >= 0
    assert colours.max() <= 1
    left, right = colours[0, :, :2, 0].mean(), colours[0, :, 2:, 0].mean()
    assert abs(left - right) > 0.5
    x = f.patches.flatten(0, 2).double()
    values, vectors = torch.linalg.eigh((x - x.mean(0)).T @ (x - x.mean(0)))
    pca = fit(f)
    assert abs((pca.directions[:, 0].double() @ vectors[:, -1]).item()) == pytest.approx(1, abs=1e-4)
    assert pca.variance_share[0].item() == pytest.approx((values[-1] / values.sum()).item(), abs=1e-4)


def test_some_of_the_images_keep_their_own_geometry(vit, photo, skimage_images) -> None:
    three = [photo, skimage_images / "coffee.png", skimage_images / "rocket.jpg"]
    f = dinov3.embed(vit, three, size=32)
    for chosen in (
        [0, 2],
        [True, False, True],
        torch.tensor([0, 2]),
        torch.tensor([True, False, True]),
        np.array([0, -1]),
    ):
        some = f[chosen]
        assert torch.equal(some.cls, f.cls[[0, 2]])
        assert some.geometry == (f.geometry[0], f.geometry[2])
    assert f[np.int64(1)].geometry == f[1].geometry == (f.geometry[1],)
    with pytest.raises(IndexError, match="a mask of 3 images"):
        f[[True, False]]


def test_a_model_is_known_by_its_weights_not_by_its_file(tmp_path, photo) -> None:
    """The same weights in two places are one model; other weights in the same place are another."""

    model = dinov3.load()
    (tmp_path / "moved").mkdir()
    files = [tmp_path / "a.safetensors", tmp_path / "moved" / "b.safetensors"]
    for file in files:
        writing.save(model, file)
    a, b = (dinov3.embed(dinov3.load(weights=file), photo, size=32) for file in files)
    assert a.model == b.model
    assert float(a.similarity(b)) == pytest.approx(1)
    with torch.no_grad():
        model.blocks[3].mlp.fc1.weight.mul_(1.01)
    writing.save(model, files[0])
    with pytest.raises(IncompatibleFeatures):
        a.similarity(dinov3.embed(dinov3.load(weights=files[0]), photo, size=32))
    before = dinov3.embed(model, photo, size=32).model
    with torch.no_grad():
        model.norm.bias.add_(1)
    assert dinov3.embed(model, photo, size=32).model != before


# ---- the loop -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_hold_images_of_one_size_in_order(vit, workers: int) -> None:
    heights = [32, 32, 32, 48, 32]
    preprocessing = default_preprocessing(vit, shape="native")

    def read(i: int) -> np.ndarray:
        return np.full((heights[i], 32, 3), 40 * i, np.uint8)

    batches = list(batched(range(5), preprocessing, 2, workers=workers, read=read))
    assert [tuple(x.shape) for x, _ in batches] == [(2, 3, 32, 32), (1, 3, 32, 32), (1, 3, 48, 32), (1, 3, 32, 32)]
    assert [g.height for _, geometry in batches for g in geometry] == heights
    for i, x in enumerate(image for inputs, _ in batches for image in inputs):
        assert torch.equal(x, prepare(read(i), preprocessing)[0])


@pytest.mark.parametrize("name", ["vit", "convnext"])
def test_several_layers_in_one_pass_are_those_of_each_alone(name: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(name)
    batches = [torch.randn(n, 3, 64, 64) for n in (2, 1)]
    model.train()
    found = list(outputs(model, batches, [1, -1]))
    assert model.training, "the mode is restored"
    model.eval()
    for x, layers in zip(batches, found, strict=True):
        for out in layers:
            with torch.no_grad():
                alone = run(model, x, layer=out["layer"])
            assert (out["normed"], out["n_layers"]) == (alone["normed"], alone["n_layers"])
            for part in ("cls", "registers", "patches"):
                torch.testing.assert_close(out[part], alone[part])


def test_a_side_that_is_no_multiple_of_the_patch_is_refused_with_one_that_is() -> None:
    check_patches("size", 224, 16)
    with pytest.raises(DinoError, match=r"size=230 is no multiple of the patch \(16\); try 224"):
        check_patches("size", 230, 16)


# ---- lists with a bad image -----------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path):
    for i in range(5):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(
            tmp_path / f"{i}.png"
        )
    (tmp_path / "2.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    return [tmp_path / f"{i}.png" for i in range(5)]


@pytest.mark.parametrize("workers", [None, 0, 3])
def test_the_error_of_a_list_names_the_file(vit, files, workers) -> None:
    with pytest.raises(ImageError, match=r"2\.png: (broken|truncated)") as caught:
        dinov3.embed(vit, files, size=32, workers=workers)
    assert (caught.value.path, caught.value.index) == (str(files[2]), 2)
    with pytest.raises(ImageError, match=r"^image 1: "):
        dinov3.encode(vit, [files[0].read_bytes(), b"no image"], size=32, workers=workers)


def test_bad_images_are_skipped_and_the_result_says_which(vit, files) -> None:
    features = dinov3.embed(vit, files, size=32, on_error="skip", batch_size=2)
    assert list(features.missing) == [2]
    assert "2.png" in str(features.missing[2])
    good = dinov3.embed(vit, [f for f in files if f.name != "2.png"], size=32, workers=0)
    assert good.missing == features[:2].missing == {}
    torch.testing.assert_close(features.cls, good.cls)
    with pytest.raises(ImageError, match=r"2\.png"):
        dinov3.embed(vit, [files[2]], size=32, on_error="skip")
    with pytest.raises(dinov3.DinoError, match="on_error is one of raise, skip, not 'ignore'"):
        dinov3.embed(vit, files, on_error="ignore")


def test_slices_and_concatenations_say_which_images_are_missing(vit, files) -> None:
    (files[4]).write_bytes(b"")
    features = dinov3.embed(vit, files, size=32, on_error="skip")  # rows of images 0, 1, 3; 2 and 4 are missing
    assert [list(features[s].missing) for s in (slice(None), slice(2), slice(1, 2), slice(2, None))] == [
        [2, 4], [], [], [0, 2],
    ]  # fmt: skip
    assert features[2:].missing[0] is features.missing[2]
    for k in range(1, 3):
        joined = dinov3.Features.cat([features[:k], features[k:]])
        assert joined.missing == features.missing
    assert list(dinov3.Features.cat([features, features]).missing) == [2, 4, 7, 9]
    assert [dict(features[i].missing) for i in (0, -1, [0, 2], slice(None, None, 2), slice(0, 0))] == [{}] * 5
    assert features.to(torch.float64).missing == features.missing


def test_encode_gives_an_array_whose_rows_are_those_of_the_list(vit, files) -> None:
    vectors = dinov3.encode(vit, files, size=32, on_error="skip", normalize=True, pooling="cls+mean")
    assert vectors.shape == (5, 2 * vit.embed_dim)
    assert np.isnan(vectors[2]).all()
    kept = [0, 1, 3, 4]
    np.testing.assert_allclose(np.linalg.norm(vectors[kept], axis=1), 1, atol=1e-6)
    found = dinov3.embed(vit, [files[i] for i in kept], size=32)
    expected = torch.nn.functional.normalize(torch.cat([found.cls, found.mean], 1), dim=1)
    np.testing.assert_allclose(vectors[kept], expected.numpy(), atol=1e-5)
    one = dinov3.encode(vit, files[0], size=32, shape="short", convert_to="tensor")
    assert isinstance(one, torch.Tensor)
    assert one.shape == (1, vit.embed_dim)


def test_encode_takes_one_layer(vit, photo) -> None:
    vectors = dinov3.encode(vit, photo, size=32, layer=-2)
    np.testing.assert_allclose(vectors, dinov3.embed(vit, photo, size=32, layer=-2).cls.numpy(), atol=1e-5)
    with pytest.raises(dinov3.DinoError, match=r"encode takes one layer, not \[0, 1\]: embed takes a list"):
        dinov3.encode(vit, photo, size=32, layer=[0, 1])  # type: ignore[arg-type]
    with pytest.raises(dinov3.DinoError, match=r"encode's vectors are normed; embed\(…, norm=False\)"):
        dinov3.encode(vit, photo, size=32, norm=False)


def test_both_docstrings_say_at_once_what_becomes_of_a_skipped_image() -> None:
    for function in (dinov3.embed, dinov3.encode):
        first = (function.__doc__ or "").split("\n\n")[0]
        assert "no\n    row" in first or "no row" in first
        assert "NaN" in first


def test_progress_is_a_line_on_stderr(vit, files, capsys, monkeypatch) -> None:
    monkeypatch.setattr("dinov3.features.time.perf_counter", iter(range(0, 1000, 3)).__next__)
    dinov3.embed(vit, files[:2], size=32, progress=True, workers=0)
    assert "1 of 2 images" in capsys.readouterr().err
