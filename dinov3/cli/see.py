"""`dinov3 see VERB IMAGES`: what patch features show. Each verb draws one function of `dinov3.dense` on images or a video.

The loop over images is `predict_each`: unreadable images are named, counted, exit code 3. Pixels are the original image's.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from dinov3.cli.predict import Images, Listed, Out, list_images, predict_each
from dinov3.cli.shared import Progress, app, config_options, device_of, log, log_model
from dinov3.config.bounds import setting
from dinov3.errors import DinoError, printable
from dinov3.files import atomically

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image
    from torch import Tensor

    from dinov3.dense.debias import PositionBias
    from dinov3.features import Features

see_app = typer.Typer(
    no_args_is_help=True,
    help="Look at patch features: pca, similarity, match, track, discover, attention, example, foreground.",
)
app.add_typer(see_app, name="see")

Upsampling = Literal["nearest", "bilinear", "edges"]
At = Annotated[
    list[str] | None, typer.Option("--at", metavar="X,Y", help="A pixel of the first image; again for more.")
]
Box = Annotated[str | None, typer.Option("--box", metavar="X0,Y0,X1,Y1", help="A box in the first image, in pixels.")]
Mask = Annotated[
    Path | None, typer.Option("--mask", help="A mask of the first image, of its size: an image that is 0 outside.")
]


@dataclass
class SeeOptions:
    """Which features a verb draws."""

    weights: str | None = setting(
        None, help="Path, URL or Hugging Face id. Default: the small model that ships with the package."
    )
    model: str | None = setting(None, help="A name from `dinov3 models`. Default: what the weights are.")
    size: int = setting(448, at_least=16, help="Pixels of the short side that the model sees; more show finer things.")
    layer: int = setting(-1, help="Block whose patches are taken, from 0; -1 is the last.")
    precision: str = setting("fp32", help="fp32, bf16, int8 or fp8; as in `dinov3 embed`.")
    device: str = setting("auto", help="cpu, cuda, cuda:1, mps, or auto.")
    upsample: Upsampling = setting("edges", help="How patches become pixels; edges follows the image's.")
    debias: bool = setting(False, help="Take out what only says where a patch is.", flag="--debias")


class Eyes:
    """A model and options as one function: image → `Features` of one image."""

    def __init__(self, config: SeeOptions, *, plain: bool = False) -> None:
        """plain: the model itself, not its fast form (attention maps need its blocks)."""
        from dinov3 import hub
        from dinov3.features import default_preprocessing, layer_numbers

        kind: dict[str, Any] = {} if plain else {"fast": config.precision}
        self.config = config
        self.model: Any = hub.load(config.model, config.weights, device=device_of(config.device), **kind)
        layer_numbers(self.model, [config.layer])  # raises
        self.preprocessing = default_preprocessing(self.model, size=config.size, shape="short")
        self.biases: dict[tuple[int, int], PositionBias] = {}
        log_model(self.model, "what is drawn shows layout and colours, not meaning.", self.preprocessing)

    def __call__(self, image: Image.Image) -> Features:
        from dinov3.features import embed

        features = embed(self.model, image, preprocessing=self.preprocessing, layer=self.config.layer).to("cpu")
        return self.bias(features).remove(features) if self.config.debias else features

    def bias(self, features: Features) -> PositionBias:
        """The position bias at this input size, measured once."""
        from dinov3.dense import debias

        size_hw = features.geometry[0].input_hw
        if size_hw not in self.biases:
            log(f"measuring the position bias at {size_hw[1]}×{size_hw[0]} on noise images")
            self.biases[size_hw] = debias.measure(self.model, size_hw, layer=self.config.layer)
        return self.biases[size_hw]

    def pixels(self, values: Tensor, features: Features, image: Image.Image) -> np.ndarray:
        """Values of patches [h, w] or [h, w, C] at the image's pixels."""
        import torch

        from dinov3.dense import upsample

        if self.config.upsample == "edges":
            return upsample.edge_aware(values, features, image).numpy()
        if self.config.upsample == "bilinear":
            return upsample.bilinear(values, features).numpy()
        rows, columns = (
            torch.tensor([features.patch_of_pixel(*place)[i] for place in places])
            for i, places in enumerate(([(0, y) for y in range(image.height)], [(x, 0) for x in range(image.width)]))
        )
        return values[rows][:, columns].numpy()

    def first(self, images: Listed) -> tuple[Image.Image, Features]:
        """The first image, in which queries are given."""
        from dinov3.data.images import open_image

        image = open_image(images[0][1].read()).image
        return image, self(image)


def each(images: Listed, label: str, out: Path, ending: str, drawn: Callable[[Image.Image], tuple[Any, str]]) -> None:
    """`drawn` gives an image's drawing, or drawings by ending, and a line for stdout; saved as NAME_ENDING.png."""

    def save(path: str, name: str, found: Any) -> str:
        drawings, text = found
        for end, drawing in (drawings if isinstance(drawings, dict) else {ending: drawings}).items():
            drawing.save(out / f"{name}_{end}.png")
        return text

    predict_each(images, label, lambda opened, _: drawn(opened.image), out, save)


def numbers_of(text: str, count: int, option: str) -> tuple[float, ...]:
    """x,y or x0,y0,x1,y1 as people type them."""
    try:
        values = tuple(float(part) for part in text.replace(" ", "").split(","))
    except ValueError:
        values = ()
    if len(values) != count:
        example = ",".join(("120", "80", "300", "240")[:count])
        raise DinoError(f"{option} {text!r} is not {count} numbers in pixels of the first image, such as {example}")
    return values


def mask_of(path: Path, image: Image.Image, *, numbers: bool = False) -> Tensor:
    """A mask image as booleans [H, W] of the image's size, or as object numbers (0 and 255 only: one object)."""
    import numpy as np
    import torch

    from dinov3.data.datasets.dense import read_map

    values = read_map(path)
    if values.ndim != 2 or values.shape != (image.height, image.width):
        raise DinoError(
            f"{path} is {values.shape[1]}×{values.shape[0]} pixels, the image is {image.width}×{image.height}: a mask has "
            "the image's size"
        )
    if not values.any():
        raise DinoError(f"{path} is 0 everywhere: a mask is above 0 on the thing")
    if not numbers or values.max() == 255:
        return torch.from_numpy(values > (127 if values.max() == 255 else 0)).long()
    return torch.from_numpy(values.astype(np.int64))


def query_of(
    features: Features, image: Image.Image, at: list[str] | None, box: str | None, mask: Path | None
) -> Tensor:
    """The query [D] or queries [Q, D] of --at, --box or --mask."""
    import torch

    from dinov3.dense import similarity

    if sum(bool(given) for given in (at, box, mask)) != 1:
        raise DinoError("say what to look for in the first image: one of --at X,Y, --box X0,Y0,X1,Y1, --mask FILE")
    if at:
        places = [numbers_of(text, 2, "--at") for text in at]
        return torch.stack([similarity.at_pixel(features, x, y) for x, y in places])
    if box:
        x0, y0, x1, y1 = numbers_of(box, 4, "--box")
        return similarity.in_box(features, (x0, y0, x1, y1))
    assert mask is not None
    return similarity.in_mask(features, mask_of(mask, image))


# ---- verbs ---------------------------------------------------------------------------------------------------------


PALETTE_IMAGES = 64  # that a joint palette is fitted on, evenly spread over those given


@see_app.command()
@config_options(SeeOptions)
def pca(
    config: SeeOptions,
    images: Images,
    out: Out,
    separate: Annotated[bool, typer.Option("--separate", help="A palette for each image, not one for all.")] = False,
    foreground: Annotated[
        Path | None, typer.Option(help="Only the object: a classifier that `see foreground --save` wrote.")
    ] = None,
) -> None:
    """The three strongest directions of the patches as red, green and blue; one palette for all images."""
    from dinov3 import drawing
    from dinov3.data.images import open_image
    from dinov3.dense import pca as principal
    from dinov3.dense.foreground import Foreground

    listed = list_images(images, out)
    classifier = None if foreground is None else Foreground.load(foreground)
    eyes = Eyes(config)

    def masked(features: Features) -> Any:
        return None if classifier is None else classifier(features) > 0.5

    joint = None
    if not separate and len(listed) > 1:
        chosen = listed[:: max(1, -(-len(listed) // PALETTE_IMAGES))]
        found, masks = [], []
        with Progress("fitting the palette", len(chosen)) as progress:
            for i, (_, item) in enumerate(chosen):
                try:
                    features = eyes(open_image(item.read()).image)
                except (DinoError, OSError):
                    continue  # named when it is drawn
                found.append(features)
                masks.append(masked(features))
                progress(i + 1)
        if found:
            joint = principal.fit(found, 3, masks)

    def drawn(image: Image.Image) -> tuple[Any, str]:
        features = eyes(image)
        mask = masked(features)
        colours = (
            principal.rainbow(features, joint) if mask is None else principal.object_colours(features, mask, joint)
        )
        shares = (joint or principal.fit(features, 3, mask)).variance_share
        large = drawing.colours_of(eyes.pixels(colours[0], features, image))
        text = "directions hold " + ", ".join(f"{100 * s:.0f} %" for s in shares.tolist()) + " of the variance"
        return drawing.side_by_side(image, drawing.reduced(large)), text

    each(listed, "colouring", out, "pca", drawn)


@see_app.command()
@config_options(SeeOptions)
def similarity(config: SeeOptions, images: Images, out: Out, at: At = None, box: Box = None, mask: Mask = None) -> None:
    """Where images look like a pixel, a box or a mask of the first one: cosine of every patch with it."""
    from dinov3 import drawing
    from dinov3.dense.similarity import cosine_map

    listed = list_images(images, out)
    eyes = Eyes(config)
    seen, features = eyes.first(listed)
    query = query_of(features, seen, at, box, mask)
    there = cosine_map(features, query)
    low, high = float(there.flatten().quantile(0.02)), float(there.max())  # one scale for all, that of the first image

    def drawn(image: Image.Image) -> tuple[Any, str]:
        features = eyes(image)
        cosine = cosine_map(features, query)[0]
        best = divmod(int(cosine.argmax()), cosine.shape[1])
        x, y = features.pixel_of_patch(*best)
        heat = drawing.heat_over(image, (eyes.pixels(cosine, features, image) - low) / max(high - low, 1e-6))
        scale = heat.width / image.width
        marked = drawing.dot(heat, x * scale, y * scale)
        return drawing.side_by_side(image, marked), f"cosine up to {float(cosine.max()):.3f} at ({x:.0f}, {y:.0f})"

    each(listed, "comparing", out, "similarity", drawn)


@see_app.command()
@config_options(SeeOptions)
def match(
    config: SeeOptions,
    left: Annotated[Path, typer.Argument(help="An image.")],
    right: Annotated[Path, typer.Argument(help="Another image.")],
    out: Out,
    ratio: Annotated[float, typer.Option(min=0, max=1, help="Lowe's ratio; 1 keeps every mutual match.")] = 0.95,
    distance: Annotated[float, typer.Option(min=0, help="Pixels between the matches that are drawn.")] = 40,
    tolerance: Annotated[float, typer.Option(min=0, help="Pixels by which a match may miss the homography.")] = 16,
) -> None:
    """Patches of two images that find each other: lines between them, a table, and whether a plane explains them."""
    import torch

    from dinov3 import drawing
    from dinov3.data.images import open_file
    from dinov3.dense import matching, pca
    from dinov3.predict.common import make_folder

    a, b = map(open_file, (left, right))
    eyes = Eyes(config)
    fa, fb = eyes(a), eyes(b)
    found = matching.match(fa, fb, mutual=True, ratio=ratio if ratio < 1 else None)
    points, there = matching.pixels(fa, found.left), matching.pixels(fb, found.right)
    inliers = torch.zeros(len(found), dtype=torch.bool)
    if len(found) >= 4:
        inliers = matching.homography(points, there, tolerance=tolerance)[1]
    kept = matching.thin(points, distance)
    palette = (pca.rainbow(fa)[0].flatten(0, 1)[found.left] * 255).byte().numpy()
    make_folder(out)
    name = f"{left.stem}_{right.stem}_matches"
    drawing.matches_between(a, b, points[kept].numpy(), there[kept].numpy(), palette[kept]).save(out / f"{name}.png")
    with atomically(out / f"{name}.csv") as part, part.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("left_x", "left_y", "right_x", "right_y", "cosine", "on_homography"))
        for (x, y), (u, v), cosine, inlier in zip(
            points.tolist(), there.tolist(), found.similarity.tolist(), inliers.tolist()
        ):
            writer.writerow((round(x, 1), round(y, 1), round(u, 1), round(v, 1), round(cosine, 4), int(inlier)))
    share = float(inliers.float().mean()) if len(found) else 0.0
    print(
        f"{len(found)} matches\t{int(inliers.sum())} ({share:.0%}) agree on a homography\t{printable(str(out / name))}.png"
    )


@see_app.command()
@config_options(SeeOptions)
def track(
    config: SeeOptions,
    video: Annotated[Path, typer.Argument(help="A video file, or a folder of frames.")],
    out: Out,
    mask: Annotated[
        Path | None, typer.Option(help="The first frame's objects: an image of its size with 0 around them.")
    ] = None,
    box: Annotated[str | None, typer.Option(metavar="X0,Y0,X1,Y1", help="Or a box around one object.")] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Only so many frames.")] = None,
    fps: Annotated[
        float | None, typer.Option(min=0.1, help="Of the result. Default: the video's, 25 of a folder.")
    ] = None,
) -> None:
    """Follow the first frame's objects through a video: a video with outlines, and a mask for every frame."""
    import itertools

    import torch

    from dinov3 import drawing
    from dinov3.data.datasets.video import frame_rate, n_frames, stream_frames
    from dinov3.dense import tracking
    from dinov3.predict.common import make_folder

    if (mask is None) == (box is None):
        raise DinoError("say what to follow in the first frame: --mask FILE or --box X0,Y0,X1,Y1")
    if not video.exists():
        raise DinoError(f"no such file or folder: {video}")
    rate, total = fps or frame_rate(video), min(n_frames(video), frames or 10**9)
    eyes = Eyes(config)
    masks = make_folder(out / f"{video.stem}_masks")
    stream = itertools.islice(stream_frames(video), frames)
    start = next(stream, None)
    if start is None:
        raise DinoError(f"{video} holds no frame")
    if mask is not None:
        first = mask_of(mask, start, numbers=True)
    else:
        x0, y0, x1, y1 = (round(v) for v in numbers_of(box or "", 4, "--box"))
        first = torch.zeros(start.height, start.width, dtype=torch.long)
        first[max(0, y0) : max(0, y1), max(0, x0) : max(0, x1)] = 1
        if not bool(first.any()):
            raise DinoError(f"--box {box} has no pixel of the frame, which is {start.width}×{start.height}")
    waiting: list[Image.Image] = []

    def features() -> Any:
        for image in itertools.chain([start], stream):
            if image.size != start.size:
                raise DinoError(
                    f"{video} is no video: frame {done} has {image.width}×{image.height} pixels, the first one "
                    f"{start.width}×{start.height}"
                )
            waiting.append(image)
            yield eyes(image)

    result = out / f"{video.stem}_tracked.mp4"
    done = 0
    with drawing.VideoWriter(result, rate) as written, Progress("tracking", total) as progress:
        for labels in tracking.track(features(), first):
            image = waiting.pop()
            numbers = first if done == 0 else tracking.masks(labels, (image.height, image.width))
            _save_numbers(masks / f"{done:05d}.png", numbers.numpy())
            written.add(drawing.objects_over(image, numbers.numpy()))
            done += 1
            progress(done)
    print(f"{done} frames\t{printable(str(result))}")


def _save_numbers(path: Path, numbers: np.ndarray) -> None:
    import numpy as np
    from PIL import Image

    from dinov3 import drawing

    image = Image.fromarray(numbers.astype(np.uint8)).convert("P")
    image.putpalette([0, 0, 0] + [c for colour in drawing.palette(255) for c in colour])
    image.save(path)


@see_app.command()
@config_options(SeeOptions)
def discover(
    config: SeeOptions,
    images: Images,
    out: Out,
    tau: Annotated[
        float | None, typer.Option(help="Cosine above which two patches belong together. Default: the image's mean.")
    ] = None,
) -> None:
    """The object that stands out, without labels (TokenCut): its outline, its box and a mask."""
    from dinov3.dense import discovery

    listed = list_images(images, out)
    eyes = Eyes(config)

    def drawn(image: Image.Image) -> tuple[Any, str]:
        features = eyes(image)
        found = discovery.token_cut(features, tau=tau)
        box = ", ".join(f"{v:.0f}" for v in discovery.box_in_image(found, features))
        return _masked(eyes, image, features, found.mask.float(), "object"), f"object in ({box})"

    each(listed, "discovering", out, "object", drawn)


def _each_masked(
    eyes: Eyes, images: Listed, label: str, out: Path, ending: str, classify: Callable[[Features], Tensor]
) -> None:
    """What `classify` calls the object in every image: its probability [B, h, w], cut at one half."""

    def drawn(image: Image.Image) -> tuple[Any, str]:
        features = eyes(image)
        probability = classify(features)[0]
        share = float((probability > 0.5).float().mean())
        return _masked(eyes, image, features, probability, ending), f"{share:.1%} of the image"

    each(images, label, out, ending, drawn)


def _masked(
    eyes: Eyes, image: Image.Image, features: Features, probability: Tensor, ending: str
) -> dict[str, Image.Image]:
    """A drawing of the mask, and the mask as an image of 0 and 255."""
    import numpy as np
    from PIL import Image as pil

    from dinov3 import drawing

    mask = eyes.pixels(probability, features, image) > 0.5
    tinted = drawing.objects_over(image, mask.astype(np.int64))
    return {ending: drawing.side_by_side(image, tinted), "mask": pil.fromarray(mask.astype(np.uint8) * 255)}


@see_app.command()
@config_options(SeeOptions)
def attention(config: SeeOptions, images: Images, out: Out) -> None:
    """What the CLS token and the registers attend to in block --layer: a sheet of maps for each image."""
    from dinov3 import drawing
    from dinov3.dense.attention import attention_maps

    if config.precision != "fp32":
        raise DinoError("attention maps are computed in float32: leave --precision out")
    if config.debias:
        raise DinoError("attention is not a feature: there is nothing to --debias")
    listed = list_images(images, out)
    eyes = Eyes(config, plain=True)

    def drawn(image: Image.Image) -> tuple[Any, str]:
        maps, features = attention_maps(eyes.model, image, layer=config.layer, preprocessing=eyes.preprocessing)
        rows = [("CLS, mean of heads", maps.cls[0].mean(0))]
        rows += [(f"CLS, head {i}", head) for i, head in enumerate(maps.cls[0])]
        rows += [(f"register {i}, mean of heads", register.mean(0)) for i, register in enumerate(maps.registers[0])]
        tiles: list[tuple[str, Image.Image]] = [(f"block {maps.layer}", image)]
        for name, values in rows:
            top = float(values.flatten().quantile(0.99))  # a single patch may hold most of it
            heat = eyes.pixels((values.cpu() / max(top, 1e-12)).clamp(0, 1), features, image)
            tiles.append((name, drawing.heat_over(image, heat, alpha=0.8)))
        held = float(maps.cls[0].sum((1, 2)).mean())
        return drawing.sheet(tiles, across=4), f"CLS gives {held:.0%} of its attention to patches"

    each(listed, "attending", out, "attention", drawn)


@see_app.command()
@config_options(SeeOptions)
def example(
    config: SeeOptions,
    images: Images,
    out: Out,
    mask: Annotated[Path, typer.Option(help="The thing in the first image: an image of its size that is 0 outside.")],
) -> None:
    """One image and a mask → the same thing in all the others: an outline and a mask for each."""
    from dinov3.dense import example as by_example

    listed = list_images(images, out)
    eyes = Eyes(config)
    seen, features = eyes.first(listed)
    learnt = by_example.learn(features, mask_of(mask, seen).float())

    _each_masked(eyes, listed, "looking for it", out, "example", learnt)


@see_app.command()
@config_options(SeeOptions)
def foreground(
    config: SeeOptions,
    images: Images,
    out: Out,
    at: At = None,
    beside: Annotated[
        list[str] | None, typer.Option("--not", metavar="X,Y", help="A pixel beside it; again for more.")
    ] = None,
    masks: Annotated[Path | None, typer.Option(help="A folder of masks NAME.png; images of those names teach.")] = None,
    classifier: Annotated[Path | None, typer.Option(help="A classifier that --save wrote.")] = None,
    save: Annotated[Path | None, typer.Option(help="Write the classifier to this file (.safetensors).")] = None,
) -> None:
    """Object or background: from clicks in the first image, from some masks, or by a classifier saved before."""
    from dinov3.dense.foreground import Foreground

    if sum(bool(given) for given in (at, masks, classifier)) != 1:
        raise DinoError("say what the object is: one of --at X,Y (and --not X,Y), --masks FOLDER, --classifier FILE")
    listed = list_images(images, out)
    eyes = Eyes(config)
    found: Foreground
    if classifier is not None:
        found = Foreground.load(classifier)
    elif at:
        found = _from_clicks(eyes, listed, at, beside or [])
    else:
        assert masks is not None
        found = _from_masks(eyes, listed, masks)
    if save is not None:
        found.save(save)
        log(f"classifier: {save}")

    _each_masked(eyes, listed, "separating", out, "foreground", found)


def _from_clicks(eyes: Eyes, listed: Listed, at: Sequence[str], beside: Sequence[str]) -> Any:
    from dinov3.dense import foreground as logistic

    _, features = eyes.first(listed)
    inside, outside = (
        [numbers_of(text, 2, option) for text in given] for given, option in ((at, "--at"), (beside, "--not"))
    )
    labels = logistic.click_labels(features, inside, outside)  # type: ignore[arg-type]
    return logistic.fit([features], [labels], C=1.0)[0]


def _from_masks(eyes: Eyes, listed: Listed, masks: Path) -> Any:
    from dinov3.data.images import open_image
    from dinov3.dense import foreground as logistic
    from dinov3.dense.similarity import mask_on_grid

    features, labels = [], []
    for path, item in listed:
        mask = masks / f"{Path(path).stem}.png"
        if mask.is_file():
            image = open_image(item.read()).image
            features.append(eyes(image))
            share = mask_on_grid(features[-1], mask_of(mask, image).float())
            labels.append(logistic.labels_of_shares(share))
    if not features:
        raise DinoError(f"no image has a mask in {masks}: an image NAME.jpg is taught by NAME.png there")
    found, table = logistic.fit(features, labels, C=0.1 if len(features) < 3 else None)
    score = f", average precision {max(table.values()):.3f} on images left out" if table else ""
    log(f"a classifier from {len(features)} masks, C = {found.C:g}{score}")
    return found
