"""What a run writes: nothing twice after a resume, nothing from a process that is not the writer."""

from __future__ import annotations

import io
import json
import math

import pytest
import torch
from PIL import Image

from dinov3 import runlog
from dinov3.config.train import TrainConfig, load_config
from dinov3.errors import DinoError, UnknownName
from dinov3.runlog import Progress, RunDir, cut_metrics, read_metrics


class Shelf:
    """A sink that keeps what it is given."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, dict[str, float]]] = []
        self.closed = False

    def config(self, values):
        self.values = values

    def scalars(self, iteration, values):
        self.seen.append((iteration, dict(values)))

    def close(self):
        self.closed = True


def started(folder, **options) -> tuple[RunDir, io.StringIO]:
    console = io.StringIO()
    run = RunDir(folder / "run", console=console)
    run.start(TrainConfig(), **options)
    return run, console


def iterations(run: RunDir) -> list[int]:
    return [r["iteration"] for r in read_metrics(run.metrics_file)]


def test_making_the_object_touches_nothing(tmp_path):
    RunDir(tmp_path / "run").log("hello")
    assert list(tmp_path.iterdir()) == []


def test_the_folder_holds_the_configuration_that_reads_back(tmp_path):
    config, _ = load_config(None, ["train.dataset_path=/images"])
    run = RunDir(tmp_path / "run", console=io.StringIO())
    run.start(config)
    assert load_config(run.config_file)[0] == config
    assert sorted(p.name for p in run.path.iterdir()) == ["ckpt", "eval", "plots", "resolved.yaml"]


def test_an_earlier_configuration_that_differs_is_renamed(tmp_path):
    run, console = started(tmp_path)
    first = run.config_file.read_text()
    run.start(TrainConfig())
    assert not list(run.path.glob("resolved.*.yaml"))
    changed = TrainConfig()
    changed.optim.epochs = 7
    run.start(changed)
    assert (run.path / "resolved.1.yaml").read_text() == first
    assert "epochs: 7" in run.config_file.read_text()
    assert "kept as resolved.1.yaml" in console.getvalue()


def test_an_event_is_one_line_on_the_console_and_in_the_log(tmp_path):
    run, console = started(tmp_path)
    run.log("two\nlines")
    assert console.getvalue().endswith(" two lines\n")
    assert run.log_file.read_text() == console.getvalue()


def test_a_process_that_is_not_the_writer_writes_nothing(tmp_path):
    run = RunDir(tmp_path / "run", writer=False, console=io.StringIO())
    run.start(TrainConfig(), sinks=["no such sink"])
    run.log("hello")
    run.record(0, {"total_loss": 1.0})
    run.close()
    assert not run.path.exists()
    assert run.console.getvalue() == ""


def test_a_record_is_valid_json_with_the_iteration_first_and_null_for_what_is_not_finite(tmp_path):
    shelf = Shelf()
    run, _ = started(tmp_path, sinks=[shelf])
    run.record(3, {"a": torch.tensor(1.5), "b": math.nan, "c": math.inf, "d": 2})
    line = run.metrics_file.read_text()
    assert line == '{"iteration": 3, "a": 1.5, "b": null, "c": null, "d": 2}\n'
    assert shelf.seen == [(3, {"a": 1.5, "d": 2})]
    assert shelf.values["optim"]["clip_grad"] == 3.0
    run.close()
    assert shelf.closed


def test_a_resumed_run_has_every_iteration_once(tmp_path):
    run, _ = started(tmp_path)
    for it in (0, 10, 20, 30):
        run.record(it, {"total_loss": 1.0})
    run.record(20, {"knn_top1": 0.5})
    again = RunDir(run.path, console=io.StringIO())
    again.start(TrainConfig(), iteration=20)
    assert iterations(again) == [0, 10]
    again.record(20, {"total_loss": 2.0})
    assert iterations(again) == [0, 10, 20]
    assert "3 records" in again.console.getvalue()


def test_a_line_torn_by_a_crash_is_removed_at_resume(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"iteration": 0, "a": 1}\n{"iteration": 10, "a"')
    assert [r["iteration"] for r in read_metrics(file)] == [0]
    assert cut_metrics(file, 50) == 0
    assert file.read_text() == '{"iteration": 0, "a": 1}\n'
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_crash_while_cutting_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "metrics.jsonl"
    text = '{"iteration": 0}\n{"iteration": 10}\n'
    file.write_text(text)

    def no(*_):
        raise OSError("the disk is gone")

    monkeypatch.setattr(runlog.os, "replace", no)
    with pytest.raises(OSError, match="gone"):
        cut_metrics(file, 5)
    assert file.read_text() == text


def test_an_unknown_sink_is_refused(tmp_path):
    with pytest.raises(UnknownName, match="did you mean 'tensorboard'"):
        started(tmp_path, sinks=["tensorbord"])


def test_tensorboard_gets_the_numbers(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run, _ = started(tmp_path, sinks=["tensorboard"])
    run.record(4, {"total_loss": 2.0, "bad": math.nan})
    run.close()
    events = EventAccumulator(str(run.path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["total_loss"]
    assert [(e.step, e.value) for e in events.Scalars("total_loss")] == [(4, 2.0)]


class Gallery:
    """A sink that keeps what it is shown."""

    def __init__(self) -> None:
        self.images: list[tuple[int, str, tuple[int, int]]] = []

    def config(self, values): ...

    def scalars(self, iteration, values): ...

    def image(self, iteration, name, image):
        self.images.append((iteration, name, image.size))

    def close(self): ...


def test_a_drawing_is_a_file_and_goes_to_the_sinks(tmp_path):
    sink = Gallery()
    run, _ = started(tmp_path, sinks=[sink])
    run.image(7, "pca", Image.new("RGB", (30, 20), (200, 10, 10)))
    with Image.open(run.path / "images" / "pca_7.png") as drawn:
        assert (drawn.size, drawn.getpixel((3, 3))) == ((30, 20), (200, 10, 10))
    assert sink.images == [(7, "pca", (30, 20))]
    silent = RunDir(tmp_path / "other", writer=False)
    silent.image(7, "pca", Image.new("RGB", (30, 20)))
    assert not silent.path.exists()


def test_tensorboard_gets_drawings(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run, _ = started(tmp_path, sinks=["tensorboard"])
    run.image(4, "crops", Image.new("RGB", (30, 20)))
    run.close()
    events = EventAccumulator(str(run.path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.width, e.height) for e in events.Images("crops")] == [(4, 30, 20)]


def test_wandb_and_trackio_get_drawings_as_their_images(tmp_path, monkeypatch):
    """Against a client of the same interface: both take `log({name: Image(…)}, step=…)`."""
    logged = []

    class Client:
        Image = staticmethod(lambda image: ("image", image.size))

        @staticmethod
        def init(**options):
            return Client

        @staticmethod
        def log(values, step):
            logged.append((step, values))

    monkeypatch.setattr(runlog, "require", lambda *_: Client)
    runlog.Wandb(tmp_path, 0).image(3, "pca", Image.new("RGB", (8, 6)))
    assert logged == [(3, {"pca": ("image", (8, 6))})]


# ---- the progress line ----------------------------------------------------------------------------------------------

SCHEDULES = {"lr": 1e-3, "wd": 0.04, "mom": 0.99, "last_layer_lr": 0.0, "teacher_temp": 0.05}


def test_a_line_every_so_often_with_means_since_the_last_one_and_schedules_of_that_step(tmp_path):
    run, console = started(tmp_path)
    progress = Progress(run, total=25, images_per_step=8)
    for it in range(25):
        progress.fetched()
        progress.stepped(
            it, SCHEDULES | {"lr": float(it)}, {"total_loss": torch.tensor(float(it)), "backbone_grad_norm": 1}
        )
    records = list(read_metrics(run.metrics_file))
    assert [r["iteration"] for r in records] == [0, 10, 20, 24]
    assert [r["lr"] for r in records] == [0.0, 10.0, 20.0, 24.0]
    assert [r["total_loss"] for r in records] == [0.0, 5.5, 15.5, 22.5]
    assert list(records[0]) == [
        *["iteration", "iter_time", "data_time", "lr", "wd", "mom", "last_layer_lr", "total_loss"],
        *["backbone_grad_norm", "teacher_temp", "images_per_second", "data_share", "memory_gb"],
    ]
    assert console.getvalue().count("\n") == 4
    assert "[11/25]  eta 0:00:00  total 5.5  lr 10" in console.getvalue()


def test_values_are_read_all_at_once_when_the_line_is_due(tmp_path, monkeypatch):
    run, _ = started(tmp_path)
    progress = Progress(run, total=100, images_per_step=1, every=10)
    progress.stepped(0, SCHEDULES, {"total_loss": torch.ones(())})
    read = []
    monkeypatch.setattr(torch.Tensor, "__float__", lambda self: read.append("one") or 0.0)
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: read.append("all") or tolist(self))
    terms = {"total_loss": torch.ones(()), "koleo_loss": torch.tensor(2.0), "weight": 0.5}
    for it in range(1, 10):
        progress.stepped(it, SCHEDULES, terms)
    assert read == []
    record = progress.stepped(10, SCHEDULES, {**terms, "koleo_loss": torch.tensor(math.nan)})  # left out of the mean
    assert read == ["all"]
    assert {name: record[name] for name in terms} == {"total_loss": 1.0, "koleo_loss": 2.0, "weight": 0.5}


def test_time_is_divided_between_waiting_and_working(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(runlog.time, "perf_counter", lambda: clock[0])
    run, console = started(tmp_path)
    progress = Progress(run, total=4, images_per_step=6, every=100, first=1)
    for it, (wait, work) in zip((1, 2, 3), [(1.0, 9.0), (1.0, 2.0), (1.0, 2.0)]):
        clock[0] += wait
        progress.fetched()
        clock[0] += work
        progress.stepped(it, SCHEDULES, {"total_loss": 1.0})
    (record,) = read_metrics(run.metrics_file)
    assert record["data_time"] == 1.0
    assert record["iter_time"] == pytest.approx(16 / 3)
    assert record["images_per_second"] == pytest.approx(6 * 3 / 16)
    progress.close()
    assert "3 iterations in 0:00:16, 5.33 s each" in console.getvalue()


@pytest.mark.parametrize(("seconds", "shown"), [(5.0, "0.4 images/s"), (0.4, "5 images/s"), (0.005, "400 images/s")])
def test_a_slow_first_step_is_not_nought_images_a_second(seconds, shown, tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(runlog.time, "perf_counter", lambda: clock[0])
    run, console = started(tmp_path)
    progress = Progress(run, total=9, images_per_step=2)
    clock[0] += seconds
    progress.stepped(0, SCHEDULES, {"total_loss": 1.0})
    assert f"  {shown}  " in console.getvalue()


def test_the_estimate_leaves_the_first_step_out(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(runlog.time, "perf_counter", lambda: clock[0])
    run, console = started(tmp_path)
    progress = Progress(run, total=13, images_per_step=1, every=2)
    for it, seconds in enumerate([100.0, 2.0, 2.0]):
        clock[0] += seconds
        progress.fetched()
        progress.stepped(it, SCHEDULES, {"total_loss": 1.0})
    assert "eta 0:00:20" in console.getvalue().splitlines()[-1]


@pytest.mark.parametrize("seconds, words", [(7.4, "0:00:07"), (50530, "14:02:10"), (266400, "3 d 02:00:00")])
def test_time_is_spoken_plainly(seconds, words):
    assert runlog.time_text(seconds) == words


# ---- the steps ------------------------------------------------------------------------------------------------------


def test_losses_and_knn_are_plotted(tmp_path):
    pytest.importorskip("matplotlib")
    from PIL import Image

    run, _ = started(tmp_path)
    for it in range(5):
        run.record(it, {"total_loss": 5.0 - it, "ibot_loss": math.nan if it == 2 else 1.0, "lr": 1.0})
    one = runlog.plot(run.metrics_file, run.plots / "one.png")
    assert one.startswith("plotted total_loss, ibot_loss to")
    run.record(4, {"knn_top1": 0.5})
    runlog.plot(run.metrics_file, run.plots / "two.png")
    with Image.open(run.plots / "one.png") as a, Image.open(run.plots / "two.png") as b:
        assert b.height > a.height  # a second panel
    assert len(list(run.plots.iterdir())) == 2


def test_without_matplotlib_or_losses_the_log_line_has_the_reason(tmp_path, monkeypatch):
    run, _ = started(tmp_path)
    assert "holds no losses" in runlog.plot(run.metrics_file, tmp_path / "x.png")
    run.record(0, {"total_loss": 1.0})

    def missing(*_):
        raise DinoError("plotting needs matplotlib; install it with: pip install 'dinov3[plots]'")

    monkeypatch.setattr(runlog, "require", missing)
    assert "pip install 'dinov3[plots]'" in runlog.plot(run.metrics_file, tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()
    assert json.loads(run.metrics_file.read_text())["total_loss"] == 1.0


def test_a_folder_belongs_to_one_run_at_a_time(tmp_path):
    run = RunDir(tmp_path / "run")
    with run.claimed():
        with (
            pytest.raises(
                DinoError, match=r"process \d+ on .* is writing to .*run; wait for it, or give another --out"
            ),
            RunDir(tmp_path / "run").claimed(),
        ):
            pass
        with RunDir(tmp_path / "other").claimed(), RunDir(tmp_path / "run", writer=False).claimed():
            pass
    with run.claimed():
        pass
