"""CPU milliseconds for the crops of one image (2 × 224, 8 × 96): ours, torchvision on Pillow, torchvision on tensors.

    python benchmarks/crops.py                       # A B C A B C …, one thread, a decoded 500 × 375 image
    python benchmarks/crops.py photo.jpg --size 0    # another image, at its own size, and the cost of decoding it

CPU time of the process, not wall time, so that a busy machine disturbs less; the median of the rounds is reported. Both
torchvision pipelines apply the reference's operations with the probabilities that it really applies; they normalise each
crop to float32, ours leaves that to the device (`--normalise` adds it here).
"""

from __future__ import annotations

import argparse
import io
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dinov3.data.crops import CropConfig, generator, render
from dinov3.data.images import open_image
from dinov3.data.transforms.inputs import normalised


def torchvision_crops(on_tensors: bool) -> Callable[[Any], list[torch.Tensor]]:
    """The reference's augmentation, built from torchvision's parts."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError:  # a wheel built for CUDA beside a torch without: two operator schemas are missing
        import sys

        for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        for op in ("nms", "qnms"):
            library.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        torchvision_crops.library = library  # type: ignore[attr-defined]
    from torchvision.transforms import InterpolationMode, v2

    crop_configs = CropConfig()

    def view(side: int, scale: tuple[float, float], blur_p: float, solarise_p: float) -> Any:
        first = [v2.ToImage()] if on_tensors else []
        return v2.Compose(
            [
                *first,
                v2.RandomResizedCrop(side, scale=scale, interpolation=InterpolationMode.BICUBIC, antialias=True),
                v2.RandomHorizontalFlip(),
                v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
                v2.RandomGrayscale(0.2),
                v2.RandomApply([v2.GaussianBlur(9, (0.1, 2.0))], p=blur_p),
                v2.RandomSolarize(128, p=solarise_p),
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(crop_configs.mean, crop_configs.std),
            ]
        )

    views = [view(224, (0.32, 1), 0.0, 0.0), view(224, (0.32, 1), 0.9, 0.2)] + 8 * [view(96, (0.05, 0.32), 0.5, 0.0)]
    return lambda image: [v(image) for v in views]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", nargs="?", help="without one: a smooth synthetic image")
    parser.add_argument("--size", type=int, default=500, help="width the image is resized to first; 0: leave it")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--images", type=int, default=40, help="crops of that many images a round")
    parser.add_argument("--normalise", action="store_true", help="ours: add normalising to float32 on the CPU")
    args = parser.parse_args()
    torch.set_num_threads(1)

    if args.path:
        data = Path(args.path).read_bytes()
        image = open_image(data).image
    else:
        coarse = np.random.Generator(np.random.PCG64(0)).integers(0, 256, (24, 32, 3), np.uint8)
        image = Image.fromarray(coarse).resize((1280, 960), Image.Resampling.BICUBIC)
        stream = io.BytesIO()
        image.save(stream, "JPEG", quality=90)
        data = stream.getvalue()
    if args.size:
        image = image.resize((args.size, round(args.size * image.height / image.width)), Image.Resampling.BICUBIC)
    crop_configs = CropConfig()
    count = iter(range(10**9))

    def ours() -> None:
        crops = render(image, crop_configs.plan(*image.size, generator(0, 0, next(count))), crop_configs)
        if args.normalise:
            normalised(crops.global_crops, crop_configs.mean, crop_configs.std)
            normalised(crops.local_crops, crop_configs.mean, crop_configs.std)

    on_pillow, on_tensors = torchvision_crops(False), torchvision_crops(True)
    contestants: dict[str, Callable[[], Any]] = {
        "ours": ours,
        "torchvision on Pillow": lambda: on_pillow(image),
        "torchvision on tensors": lambda: on_tensors(image),
        "(decoding the file in full)": lambda: open_image(data),
        "(decoding, as small as the crops allow)": lambda: open_image(
            data, target_short_side=crop_configs.target_short_side
        ),
    }
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for round_ in range(args.rounds + 1):  # the first warms up
        for name, run in contestants.items():
            start = time.process_time()
            for _ in range(args.images):
                run()
            if round_:
                times[name].append((time.process_time() - start) / args.images * 1e3)
    print(f"{image.width} × {image.height} pixels, {args.rounds} rounds of {args.images} images, one thread")
    for name, values in times.items():
        print(f"{name:42s} {statistics.median(values):6.2f} ms   ({min(values):.2f} … {max(values):.2f})")


if __name__ == "__main__":
    main()
