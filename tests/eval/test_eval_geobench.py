"""GEO-Bench: files, measures, the grid of linear layers, and both kinds of tasks from files to numbers."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from dinov3.data.datasets.geo import TASKS, GeoBench, rgb_keys
from dinov3.errors import DinoError, UnknownName
from dinov3.eval.geobench import linear_probes, main
from dinov3.metrics import accuracy, confusion_matrix, iou_scores, multilabel_f1

h5py = pytest.importorskip("h5py")


class BandInfo:
    """Stands for a class of the benchmark's library, which readers do not have."""

    def __init__(self, name: str) -> None:
        self.name = name


def write_task(root: Path, task: str, labels: list, *, side: int = 24, suffix: str = "", seed: int = 0) -> Path:  # type: ignore[type-arg]
    """Samples 0, 1, … in thirds for train, valid, test; the class shows in the colours. Maps: the left part is class 1."""
    kind = "segmentation_v1.0" if TASKS[task].kind == "map" else "classification_v1.0"
    folder = root / kind / task
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    names = [f"sample_{i}" for i in range(len(labels))]
    for name, label in zip(names, labels):
        shown = int(np.argmax(label)) if TASKS[task].kind == "labels" else label
        bands = {f"{n} - {c}{suffix}": 100 * k + rng.normal(0, 5, (side, side)) for k, (n, c) in enumerate(
            [("02", "Blue"), ("03", "Green"), ("04", "Red"), ("05", "Vegetation Red Edge")], 1)}  # fmt: skip
        info: dict = {"bands_order": list(bands), **{k: {"band_info": BandInfo(k)} for k in bands}}  # type: ignore[type-arg]
        if TASKS[task].kind == "map":
            target = np.zeros((side, side), np.uint8)
            target[:, :shown] = 1
            bands[f"04 - Red{suffix}"][target == 1] += 120
            info["bands_order"].append("label")
        else:
            bands[f"04 - Red{suffix}"] += 60 * shown
            info["label"] = np.asarray(label) if TASKS[task].kind == "labels" else label
        with h5py.File(folder / f"{name}.hdf5", "w") as file:
            for key, value in bands.items():
                file.create_dataset(key, data=value)
            if TASKS[task].kind == "map":
                file.create_dataset("label", data=target)
            file.attrs["pickle"] = str(pickle.dumps(info))
    n = len(names) // 3
    (folder / "default_partition.json").write_text(
        json.dumps({"train": names[:n], "valid": names[n : 2 * n], "test": names[2 * n :]})
    )
    stats = {k: {"mean": 100.0 * i, "std": 50.0} for i, k in enumerate(("02 - Blue", "03 - Green", "04 - Red"), 1)}
    (folder / "band_stats.json").write_text(json.dumps(stats | {"label": {"mean": 0, "std": 1}}))
    return root


@pytest.mark.parametrize("suffix", ["", "_2019-07-03"])
def test_samples_are_red_green_blue_whatever_their_order_and_date(tmp_path: Path, suffix: str) -> None:
    write_task(tmp_path, "m-eurosat", [0, 3, 1, 2, 0, 1], suffix=suffix)
    data = GeoBench(tmp_path, "m_eurosat", "train")
    assert len(data) == 2
    bands, label = data[1]
    assert label == 3
    assert bands.shape == (3, 24, 24)
    assert [round(float(b.mean()), -1) for b in bands] == [480, 200, 100]
    assert data.band_stats()[0].tolist() == [300, 200, 100]
    assert len(GeoBench(tmp_path / "classification_v1.0" / "m-eurosat", "m-eurosat", "test")) == 2


def test_labels_and_maps(tmp_path: Path) -> None:
    several = np.zeros(43, int)
    several[[2, 5]] = 1
    write_task(tmp_path, "m-bigearthnet", [several] * 3)
    assert np.flatnonzero(GeoBench(tmp_path, "m-bigearthnet", "valid")[0][1]).tolist() == [2, 5]
    write_task(tmp_path, "m-nz-cattle", [5, 6, 7])
    target = GeoBench(tmp_path, "m-nz-cattle", "valid")[0][1]
    assert target.sum(1).tolist() == [6] * 24


def test_nothing_in_a_sample_is_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self):  # type: ignore[no-untyped-def]
            return os.system, (f"touch {tmp_path}/run",)

    write_task(tmp_path, "m-eurosat", [0, 1, 2])
    with h5py.File(tmp_path / "classification_v1.0" / "m-eurosat" / "sample_0.hdf5", "a") as file:
        file.attrs["pickle"] = str(pickle.dumps({"label": 4, "bands_order": [Evil()]}))
    assert GeoBench(tmp_path, "m-eurosat", "train")[0][1] == 4
    assert not (tmp_path / "run").exists()


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    write_task(tmp_path, "m-eurosat", [0, 1, 2])
    with pytest.raises(UnknownName, match="did you mean 'm-eurosat'"):
        GeoBench(tmp_path, "m-euroset", "train")
    with pytest.raises(DinoError, match="no folder m-so2sat"):
        GeoBench(tmp_path, "m-so2sat", "train")
    with pytest.raises(UnknownName, match=r"no partition '0\.1x'; there: default"):
        GeoBench(tmp_path, "m-eurosat", "train", partition="0.1x")
    with pytest.raises(DinoError, match="no red band"):
        rgb_keys(["02 - Blue", "05 - Vegetation Red Edge"], "here")
    (tmp_path / "classification_v1.0" / "m-eurosat" / "sample_0.hdf5").write_bytes(b"x")
    with pytest.raises(DinoError, match="no GEO-Bench sample"):
        GeoBench(tmp_path, "m-eurosat", "train")[0]


def test_measures_equal_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    rng = torch.Generator().manual_seed(0)
    scores, labels = torch.randn(50, 6, generator=rng), (torch.rand(50, 6, generator=rng) > 0.6).long()
    theirs = metrics.f1_score(labels.numpy(), (scores > 0).numpy(), average="micro")
    assert multilabel_f1(scores, labels, macro=False, threshold=0) == pytest.approx(theirs)
    predicted, true = torch.randint(0, 4, (200,), generator=rng), torch.randint(0, 4, (200,), generator=rng)
    theirs = metrics.jaccard_score(true.numpy(), predicted.numpy(), average="macro")
    assert 100 * iou_scores(confusion_matrix(predicted, true, 4))["mIoU"] == pytest.approx(100 * theirs)
    # absent classes do not count
    assert 100 * iou_scores(confusion_matrix(predicted, true, 7))["mIoU"] == pytest.approx(100 * theirs)
    assert accuracy(scores, scores.argmax(1)) == 1
    assert multilabel_f1(-torch.ones(2, 3), torch.zeros(2, 3), macro=False, threshold=0) == 0


def test_a_layer_of_the_grid_is_what_sgd_alone_gives() -> None:
    rng = torch.Generator().manual_seed(0)
    x, y = torch.randn(20, 1, 5, generator=rng), torch.randint(0, 3, (20,), generator=rng)
    grid = linear_probes(x, y, 3, [0.03, 0.3], steps=25, batch_size=8, seed=1)
    from dinov3.fit import shuffled

    alone = torch.nn.Linear(5, 3)
    torch.nn.init.zeros_(alone.weight)
    torch.nn.init.zeros_(alone.bias)
    sgd = torch.optim.SGD(alone.parameters(), lr=0.3, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, 25)
    for step in range(25):
        rows = shuffled(20, 8, step, seed=1)
        sgd.zero_grad()
        torch.nn.functional.cross_entropy(alone(x[rows, 0]), y[rows]).backward()
        sgd.step()
        schedule.step()
    torch.testing.assert_close(grid[1].weight, alone.weight, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(grid[1].bias, alone.bias, atol=1e-5, rtol=1e-4)
    assert float((grid[0].weight - grid[1].weight).detach().abs().max()) > 0.01


def test_several_labels_are_learnt(tmp_path: Path) -> None:
    rng = torch.Generator().manual_seed(0)
    y = (torch.rand(40, 3, generator=rng) > 0.5).long()
    x = (2.0 * y - 1)[:, None]
    (layer,) = linear_probes(x, y, 3, [1.0], steps=60, batch_size=16)
    assert multilabel_f1(layer(x[:, 0]), y, macro=False, threshold=0) == 1


def run(tmp_path: Path, *words: str) -> dict[str, float]:
    out = tmp_path / "out"
    assert main([f"root={tmp_path}", f"output_dir={out}", "model.device=cpu", "batch_size=6", *words]) == 0
    found: dict[str, float] = json.loads((out / "results-geobench.json").read_text())["results"]
    return found


def test_colours_are_classified_end_to_end(tmp_path: Path) -> None:
    write_task(tmp_path, "m-eurosat", [0, 3, 6] * 6)
    results = run(tmp_path, "task=m-eurosat", "patches=2", "steps=60", "pool=mean", "class_lrs=[0.01,0.3]")
    assert results["accuracy"] >= 80
    assert results["lr"] in (0.01, 0.3)


def test_maps_are_segmented_end_to_end(tmp_path: Path) -> None:
    write_task(tmp_path, "m-nz-cattle", [6, 12, 18, 6, 12, 18])
    results = run(
        tmp_path, "task=m-nz-cattle", "patches=3", "steps=25", "map_lrs=[3e-3]", "dpt_channels=16",
        "dpt_levels=[8,8,16,16]", "batch_size=2",
    )  # fmt: skip
    assert results["mIoU"] > 60
    assert results["IoU 1"] > 50


def test_a_command_with_a_class_too_many(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_task(tmp_path, "m-nz-cattle", [6, 12, 18])
    words = [f"root={tmp_path}", f"output_dir={tmp_path / 'o'}", "model.device=cpu", "task=m-nz-cattle", "dropped=[2]"]
    assert main(words) == 1
    assert "dropped=2 is no class" in capsys.readouterr().err
