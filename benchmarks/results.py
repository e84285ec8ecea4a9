"""Measures models on small public sets and writes the tables of docs/results.md: one command, every number again.

    python benchmarks/results.py --data DATA                           # all rows, all models; what is known is not run again
    python benchmarks/results.py --data DATA --models shipped          # one model
    python benchmarks/results.py --data DATA --rows knn --print-only   # only what would be run
    python benchmarks/results.py --data DATA --known                   # the page from what is known; nothing is run

A row is a command of an evaluation and the number it leaves behind, so that everybody can type it. What was measured is
kept under --work by (row, command, weights). The order random < shipped < teacher is checked for each row and exceptions
are written into the page: they are facts, too.

To add a row: one `Row` in ROWS.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "results.md"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"


def csv_cell(file: str, column: str) -> Callable[[Path], float]:
    """Reads one column of the first row of a results table; `column` may end with * (the beginning is enough)."""

    def read(folder: Path) -> float:
        with open(folder / file, newline="") as lines:
            row = next(csv.DictReader(lines))
        for name, value in row.items():
            if (
                name == column
                or (column.endswith("*") and name.startswith(column[:-1]))
                or (column.startswith("*") and name.endswith(column[1:]))
            ):
                return float(value)
        raise KeyError(f"{folder / file} has no column {column}: {list(row)}")

    return read


def json_value(file: str, *keys: str) -> Callable[[Path], float]:
    """Reads a number of a JSON file, by its keys."""

    def read(folder: Path) -> float:
        value = json.loads((folder / file).read_text())
        for key in keys:
            value = value[key]
        return float(value)

    return read


@dataclass(frozen=True)
class Row:
    """A number. `command`: words after `python`; {data} is the folder of the data, {out} the folder of results, and the
    model's own words stand where {model} is."""

    id: str
    title: str  # what it is, with the number's unit
    command: str
    read: Callable[[Path], float]
    higher_is_better: bool = True
    digits: int = 1
    layers: bool = False  # whether `features.layers` has a meaning


IMAGENETTE = "train.dataset={data}/imagenette/train eval.test_dataset={data}/imagenette/val"
SPLIT = "FolderSplit:root={data}/caltech101:split=%s:train_per_class=5%s:exclude=BACKGROUND_Google"
CALTECH = f"train.dataset={SPLIT % ('train', '')} eval.test_dataset={SPLIT % ('test', ':test_per_class=5')}"
# 112 pixels: what the shipped model learned at, and a quarter of the time of 224
SMALL = "transform.resize_size=128 transform.crop_size=112"
LOADING = f"{SMALL} train.batch_size=32 train.num_workers=2 eval.num_workers=2"
LINEAR = (
    "train.batch_size=32 train.epochs=1 train.epoch_length=60 train.num_workers=2 eval.num_workers=2 "
    "train.learning_rates=[1e-3,3e-3,1e-2,3e-2,0.1,0.3,1.0] " + SMALL
)
# small: features once, 300 and 200 steps of 4 images of 336 × 448
CAMVID = "DenseFolder:root={data}/camvid:split=%s:ignore=11"
ROOM = "DenseFolder:root={data}/7scenes:select=%s"
DENSE = (
    "transforms.train.augment=false transforms.eval.img_size=336 scheduler.type=cosine scheduler.total_iter=%d "
    "optimizer.lr=%s bs=4 decoder_head.type=linear"
)

ROWS: list[Row] = [
    Row(
        "knn-imagenette",
        "Imagenette, k-NN (k = 20), top-1 %",
        f"-m dinov3 eval knn {{model}} {IMAGENETTE} train.ks=[20] {LOADING} --output-dir {{out}}",
        csv_cell("results-knn.csv", "20 Top 1"),
        layers=True,
    ),
    Row(
        "logreg-imagenette",
        "Imagenette, logistic regression, top-1 %",
        f"-m dinov3 eval log-regression {{model}} {IMAGENETTE} {LOADING} train.max_train_iters=200 "
        "--output-dir {out}",
        csv_cell("results-log-regression.csv", "top-1"),
        layers=True,
    ),
    Row(
        "linear-imagenette",
        "Imagenette, linear head with augmentation, 60 steps of 32, top-1 %",
        "-m dinov3 eval linear {model} train.dataset={data}/imagenette/train train.val_dataset={data}/imagenette/val "
        f"{LINEAR} --output-dir {{out}}",
        csv_cell("results-linear.csv", "*_accuracy"),
    ),
    Row(
        "knn-caltech",
        "Caltech-101 (5 + 5 a class), k-NN (k = 5), top-1 %",
        f"-m dinov3 eval knn {{model}} {CALTECH} train.ks=[5] {LOADING} --output-dir {{out}}",
        csv_cell("results-knn.csv", "5 Top 1"),
        layers=True,
    ),
    Row(
        "logreg-caltech",
        "Caltech-101 (5 + 5 a class), logistic regression, mean of classes %",
        f"-m dinov3 eval log-regression {{model}} {CALTECH} {LOADING} train.max_train_iters=200 "
        "eval.test_metric_type=mean_per_class_accuracy --output-dir {out}",
        csv_cell("results-log-regression.csv", "top-1"),
        layers=True,
    ),
    Row(
        "linear-caltech",
        "Caltech-101 (5 + 5 a class), linear head with augmentation, 60 steps of 32, top-1 %",
        f"-m dinov3 eval linear {{model}} train.dataset={SPLIT % ('train', '')} "
        f"train.val_dataset={SPLIT % ('test', ':test_per_class=5')} {LINEAR} --output-dir {{out}}",
        csv_cell("results-linear.csv", "*_accuracy"),
    ),
    Row(
        "segmentation-camvid",
        "CamVid (92 street scenes to train, 47 to test), linear segmentation, mIoU % of 11 classes",
        f"-m dinov3 eval segmentation {{model}} datasets.train={CAMVID % 'train'} datasets.val={CAMVID % 'test'} "
        f"{DENSE % (300, '3e-3')} decoder_head.num_classes=11 eval.crop_size=448 eval.stride=448 --output-dir {{out}}",
        csv_cell("results-semantic-segmentation.csv", "mIoU"),
    ),
    Row(
        "depth-7scenes",
        "7-Scenes (one room, 40 frames to train, 24 later ones to test), linear depth, RMSE in metres",
        f"-m dinov3 eval depth {{model}} datasets.train={ROOM % '0:80:2'} datasets.val={ROOM % '88:112'} "
        f"{DENSE % (200, '1e-2')} decoder_head.backbone_out_layers=LAST decoder_head.use_batchnorm=true "
        "decoder_head.max_depth=10 eval.use_tta=false --output-dir {out}",
        csv_cell("results-depth.csv", "DenseFolder_rmse"),
        higher_is_better=False,
        digits=3,
    ),
    Row(
        "tracking-davis",
        "Three DAVIS sequences at 20 patches, label propagation, J&F %",
        "-m dinov3 eval tracking {model} root={data}/davis2016 patches=20 --output-dir {out}",
        csv_cell("results-tracking.csv", "J&F"),
    ),
    Row(
        "discovery-raccoon",
        "60 raccoons at 15 patches, TokenCut at its best τ, CorLoc %",
        "-m dinov3 eval discovery {model} data=VocDetection:root={data}/raccoon patches=15 --output-dir {out}",
        csv_cell("results-discovery.csv", "CorLoc"),
    ),
    Row(
        "keypoints-7scenes",
        "7-Scenes, matches of patches within 5, 10, 20 cm, mean recall %",
        "-m dinov3 eval keypoints {model} benchmark=frames root={data}/7scenes cells=0.125 --output-dir {out}",
        csv_cell("results-keypoints.csv", "recall"),
    ),
]

# name in the table → the words that choose it
MODELS: dict[str, str] = {
    "random": "model.name=dinov3_vitt16 model.weights=random",
    "shipped": "model.name=dinov3_vitt16",
    "dinov2-small": "model.name=transformers:{data}/dinov2-small",
    # its last block was hurt by a tuning for saliency; the one before it is better
    "dinov2-small-block11": "model.name=transformers:{data}/dinov2-small features.layers=[10]",
}
# from the worst to the best, as one expects; of several teachers the first that was measured counts
ORDER = (("random",), ("shipped",), ("dinov2-small-block11", "dinov2-small"))


def words(row: Row, model: str, data: str, out: str) -> list[str]:
    """The command's words after `python`."""
    spec = MODELS[model].replace("{data}", data)
    return shlex.split(row.command.replace("{model}", spec).replace("{data}", data).replace("{out}", out))


def version_of(model: str) -> str:
    """Changes when the weights do: the shipped file may be replaced by a better one."""
    sys.path.insert(0, str(ROOT))
    from dinov3.weights import catalog

    if "weights=random" in MODELS[model] or "dinov3_vitt16" not in MODELS[model]:
        return model
    path = catalog.resolve("dinov3_vitt16")[0].packaged_path
    assert path is not None
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def measure(row: Row, model: str, data: str, work: Path, *, again: bool) -> float | None:
    """The number, run if it is not known yet; None where the command failed (its words are on stderr)."""
    if "features.layers" in MODELS[model] and not row.layers:
        return None
    out = work / model / row.id
    key = hashlib.sha256(f"{row.command} {MODELS[model]} {version_of(model)}".encode()).hexdigest()[:12]
    known = work / "known" / f"{row.id}-{model}-{key}.json"
    if known.is_file() and not again:
        return float(json.loads(known.read_text())["value"])
    command = [sys.executable, *words(row, model, data, str(out))]
    print(f"\n{row.title} · {model}\n  {shlex.join(command)}", file=sys.stderr, flush=True)
    subprocess.run(["rm", "-rf", str(out)], check=True)  # a linear head would otherwise go on from its checkpoint
    began = time.time()
    cache = os.environ.get("DINOV3_CACHE", str(work / "cache"))
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(command, env=os.environ | {"DINOV3_CACHE": cache, "PYTHONPATH": path}, check=False, cwd=ROOT)
    if done.returncode != 0:
        print(f"  failed with status {done.returncode}", file=sys.stderr)
        return None
    value = row.read(out)
    known.parent.mkdir(parents=True, exist_ok=True)
    known.write_text(json.dumps({"value": value, "seconds": round(time.time() - began), "model": model, "row": row.id}))
    return value


def exceptions(row: Row, values: dict[str, float | None]) -> list[str]:
    """Where the expected order random < shipped < teacher does not hold."""
    sentences = []
    known = {name: v for name, v in values.items() if v is not None}
    present = [next((n, known[n]) for n in names if n in known) for names in ORDER if set(names) & set(known)]
    for (worse, a), (better, b) in pairwise(present):
        if not (b > a if row.higher_is_better else b < a):
            sentences.append(
                f"{row.title}: {better} ({b:.{row.digits}f}) is not better than {worse} ({a:.{row.digits}f})."
            )
    return sentences


def table(rows: Sequence[Row], results: dict[str, dict[str, float | None]], models: Sequence[str]) -> str:
    lines = ["| | " + " | ".join(models) + " |", "|---|" + "---:|" * len(models)]
    for row in rows:
        cells = ["–" if (v := results[row.id].get(m)) is None else f"{v:.{row.digits}f}" for m in models]
        lines.append(f"| {row.title}{'' if row.higher_is_better else ' ↓'} | " + " | ".join(cells) + " |")
    sentences = [sentence for row in rows for sentence in exceptions(row, results[row.id])]
    lines += [
        "",
        "Expected in every row: random < shipped < teacher. "
        + ("It holds wherever they were measured (– was not)." if not sentences else "Exceptions:"),
        "",
    ]
    lines += [f"- {sentence}" for sentence in sentences] + [""] * bool(sentences)
    lines += [
        "Commands (`$DATA`: the folder of the data; `MODEL`: "
        + ", ".join(f"`{MODELS[m].replace('{data}', '$DATA')}`" for m in models)
        + "):",
        "",
        "```",
    ]
    lines += [
        "python " + row.command.replace("{data}", "$DATA").replace("{model}", "MODEL").replace("{out}", "OUT")
        for row in rows
    ]
    return "\n".join([*lines, "```"])


def write_page(text: str) -> None:
    page = PAGE.read_text(encoding="utf-8")
    before, after = page.split(BEGIN)[0], page.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--data", default=os.environ.get("DINOV3_DATA"), help="folder with imagenette/, caltech101/, …")
    p.add_argument(
        "--work", type=Path, default=Path("benchmarks-results"), help="where runs and known numbers are kept"
    )
    p.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    p.add_argument("--rows", nargs="+", help="rows whose id begins with one of these")
    p.add_argument("--again", action="store_true", help="measure again what is known")
    p.add_argument("--known", action="store_true", help="write the page from what is known; run nothing")
    p.add_argument("--print-only", action="store_true", help="print the commands and run nothing")
    o = p.parse_args()
    if not o.data:
        p.error("--data is needed: the folder that holds imagenette/, caltech101/, …")
    chosen = [] if o.known else [row for row in ROWS if not o.rows or any(row.id.startswith(r) for r in o.rows)]
    if o.print_only:
        for row in chosen:
            for model in o.models:
                print("python " + shlex.join(words(row, model, "$DATA", f"OUT/{model}/{row.id}")))
        return 0
    work = o.work.absolute()
    results: dict[str, dict[str, float | None]] = {row.id: {} for row in ROWS}
    for model in o.models:
        for row in chosen:
            results[row.id][model] = measure(row, model, o.data, work, again=o.again)
            print(f"{row.id}\t{model}\t{results[row.id][model]}", flush=True)
    for row in ROWS:  # numbers of earlier runs
        for model in MODELS:
            if model not in results[row.id]:
                key = hashlib.sha256(f"{row.command} {MODELS[model]} {version_of(model)}".encode()).hexdigest()[:12]
                known = work / "known" / f"{row.id}-{model}-{key}.json"
                results[row.id][model] = float(json.loads(known.read_text())["value"]) if known.is_file() else None
    write_page(table(ROWS, results, list(MODELS)))
    print(f"wrote {PAGE}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
