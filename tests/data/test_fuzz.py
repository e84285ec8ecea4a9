"""Mutated images and containers, opened in child processes: every one gives an image or a reason, none hangs or aborts.

The whole run (1,050 images of 15 formats, each in a process of its own, and 800 of each container) takes minutes; the
default suite opens a few of each. Every case is a function of its seed, so a failure is repeated by its number. A child
has 4 GB of address space and 20 seconds of processor time; "lost" is any end but an image or a reason.

    python tests/data/test_fuzz.py            the whole run, and its table
"""

from __future__ import annotations

import io
import os
import random
import resource
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinov3.data.images import FORMATS, open_image
from dinov3.data.sources import open_source
from dinov3.errors import DinoError, ImageError

SECONDS, MEMORY = 20, 4 << 30
CONTAINERS = ("tar", "tar.gz", "zip", "parquet", "arrow")
SPECIAL = (0, 1, 0x7F, 0x80, 0xFF)


# ---- cases ----------------------------------------------------------------------------------------------------------


def sound_image(kind: str, rng: random.Random) -> bytes:
    side = rng.choice([1, 7, 24, 65])
    mode = {"JPEG": ["RGB", "L", "CMYK"], "QOI": ["RGB", "RGBA"], "PPM": ["RGB", "L", "1"], "BMP": ["RGB", "P", "1"]}
    values = np.random.default_rng(rng.randrange(1 << 30)).integers(0, 256, (side, side + 3, 4), dtype=np.uint8)
    image = Image.fromarray(values, "RGBA").convert(rng.choice(mode.get(kind, ["RGB", "RGBA", "L"])))
    if kind == "PSD":  # Pillow does not write it: header, three empty sections, raw planes
        planes = np.asarray(image.convert("RGB")).transpose(2, 0, 1).tobytes()
        header = (
            b"8BPS\0\1" + bytes(6) + b"\0\3" + side.to_bytes(4, "big") + (side + 3).to_bytes(4, "big") + b"\0\x08\0\3"
        )
        return header + bytes(12) + b"\0\0" + planes
    out = io.BytesIO()
    options = {"TIFF": {"compression": rng.choice([None, "tiff_lzw", "tiff_deflate", "jpeg", "packbits"])}}
    if kind in ("GIF", "WEBP", "PNG", "TIFF", "AVIF") and rng.random() < 0.3:
        options.setdefault(kind, {})["save_all"] = True
        options[kind]["append_images"] = [image]
    image = image if kind != "TIFF" or options["TIFF"]["compression"] != "jpeg" else image.convert("RGB")
    image.save(out, kind, **options.get(kind, {}))
    return out.getvalue()


def sound_container(kind: str, rng: random.Random) -> bytes:
    members = [(f"{i}.png", sound_image("PNG", rng)) for i in range(rng.randint(1, 6))]
    out = io.BytesIO()
    if kind.startswith("tar"):
        form = rng.choice([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
        with tarfile.open(fileobj=out, mode="w:gz" if kind.endswith("gz") else "w", format=form) as archive:
            for name, data in members:
                info = tarfile.TarInfo(name if form == tarfile.USTAR_FORMAT else "ä" * rng.choice([1, 120]) + name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    elif kind == "zip":
        with zipfile.ZipFile(out, "w", rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])) as archive:
            for name, data in members:
                archive.writestr(name, data)
    else:
        pa = pytest.importorskip("pyarrow")
        table = pa.table(
            {"image": [{"bytes": data, "path": name} for name, data in members], "label": [0] * len(members)}
        )
        if kind == "parquet":
            pq = pytest.importorskip("pyarrow.parquet")
            pq.write_table(table, out, compression=rng.choice(["none", "snappy", "zstd"]), row_group_size=2)
        else:
            ipc = pytest.importorskip("pyarrow.ipc")
            options = ipc.IpcWriteOptions(compression=rng.choice([None, "zstd"]))
            with rng.choice([ipc.new_file, ipc.new_stream])(out, table.schema, options=options) as writer:
                writer.write_table(table)
    return out.getvalue()


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Some bytes changed, most of them in headers; or cut, repeated, moved, lengthened by zeros."""
    b = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 4, 16])):
        end = len(b) if rng.random() < 0.4 else min(len(b), 256)
        start = 0 if rng.random() < 0.7 else max(0, len(b) - 512)
        at = rng.randrange(start, max(start + 1, end if start < end else len(b))) if b else 0
        how = rng.random()
        if not b or how < 0.05:
            b += bytes(rng.randrange(1, 5000))
        elif how < 0.45:
            b[at] = rng.choice(SPECIAL) if rng.random() < 0.5 else rng.randrange(256)
        elif how < 0.65:
            b[at] ^= 1 << rng.randrange(8)
        elif how < 0.8:  # a length or an offset
            width = rng.choice([2, 4, 8])
            b[at : at + width] = rng.choice([0, 1, 2**15, 2**31 - 1, 2**32 - 1, 2**63]).to_bytes(9, "little")[:width]
        elif how < 0.9:
            del b[at:]
        else:
            length = rng.randrange(1, 64)
            b[at:at] = b[rng.randrange(len(b)) :][:length]
    return bytes(b)


def case(kind: str, seed: int) -> bytes:
    rng = random.Random(f"{kind} {seed}")
    sound = sound_container(kind, rng) if kind in CONTAINERS else sound_image(kind, rng)
    return mutated(sound, rng)


# ---- one case in a child --------------------------------------------------------------------------------------------


def opened(kind: str, path: Path) -> str:
    """What came of a file: "image" or the reason; of a container one such for each of its items."""
    try:
        results = [result(item.read) for item in open_source(path)] if kind in CONTAINERS else [result(lambda: path)]
    except DinoError as error:  # what is no container is an error of the whole
        results = [str(error)]
    assert all(results)
    assert "\n" not in "".join(results), results
    return "; ".join(results)


def result(read: Callable[[], bytes | Path]) -> str:
    try:
        open_image(read())
        return "image"
    except ImageError as error:
        return str(error)


def limited() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def run_child(kind: str, paths: list[Path]) -> str:
    """ "" if the child came to its end with a result for each, else how it was lost."""
    command = [sys.executable, __file__, "--child", kind, *map(str, paths)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=6 * SECONDS, preexec_fn=limited, env=environment
        )
    except subprocess.TimeoutExpired:
        return "hung"
    if done.returncode or len(done.stdout.splitlines()) != len(paths):
        return f"exit {done.returncode}: {' '.join(done.stderr.split())[-300:]}"
    return ""


def fuzz(kind: str, seeds: range, folder: Path, *, together: int) -> Counter[str]:
    """Counts of tried, images and reasons; and `lost` cases, each named by its seed and what happened."""
    counts: Counter[str] = Counter()
    for start in range(seeds.start, seeds.stop, together):
        paths = []
        for seed in range(start, min(start + together, seeds.stop)):
            paths.append(folder / f"{seed}.{kind.lower()}")
            paths[-1].write_bytes(case(kind, seed))
        lost = run_child(kind, paths)
        for path in paths:  # one by one to find which
            alone = run_child(kind, [path]) if lost and together > 1 else lost
            counts["tried"] += 1
            counts["lost" if alone else "survived"] += 1
            if alone:
                counts[f"{kind} {path.stem}: {alone}"] += 1
            path.unlink()
    return counts


def check(kind: str, seeds: range, folder: Path, *, together: int) -> None:
    counts = fuzz(kind, seeds, folder, together=together)
    assert counts["tried"] == len(seeds)
    assert counts["lost"] == 0, [name for name in counts if ":" in name]


@pytest.mark.parametrize("kind", FORMATS)
def test_mutated_images_give_an_image_or_a_reason(kind: str, tmp_path: Path) -> None:
    for seed in range(4):
        (tmp_path / "x").write_bytes(case(kind, seed))
        assert opened(kind, tmp_path / "x")


@pytest.mark.parametrize("kind", [k for k in CONTAINERS if k != "arrow"])
def test_mutated_containers_give_images_or_reasons(kind: str, tmp_path: Path) -> None:
    for seed in range(5):
        path = tmp_path / f"{seed}.{kind}"
        path.write_bytes(case(kind, seed))
        assert opened(kind, path)


def test_arrow_files_that_crash_their_reader_are_failures(tmp_path: Path) -> None:
    for seed in (5, 19, 349):  # a segmentation fault, an abort and a bus error, without the check in a child process
        (tmp_path / f"{seed}.arrow").write_bytes(case("arrow", seed))
    assert run_child("arrow", [tmp_path]) == ""


@pytest.mark.slow
@pytest.mark.parametrize("kind", FORMATS)
def test_70_mutated_images_in_fresh_processes(kind: str, tmp_path: Path) -> None:
    check(kind, range(70), tmp_path, together=1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", CONTAINERS)
def test_800_mutated_containers_in_child_processes(kind: str, tmp_path: Path) -> None:
    check(kind, range(800), tmp_path, together=50)


def main(argv: list[str]) -> None:
    if argv[:1] == ["--child"]:
        for name in argv[2:]:
            print(opened(argv[1], Path(name)))
        return
    kinds: tuple[str, ...] = tuple(argv) or (*FORMATS, *CONTAINERS)
    print(f"{'kind':10} {'tried':>6} {'survived':>9} {'lost':>5}")
    with tempfile.TemporaryDirectory() as folder:
        for kind in kinds:
            n, together = (800, 50) if kind in CONTAINERS else (70, 1)
            counts = fuzz(kind, range(n), Path(folder), together=together)
            print(f"{kind:10} {counts['tried']:6} {counts['survived']:9} {counts['lost']:5}", flush=True)
            for name in counts:
                if ":" in name:
                    print("  ", name, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
