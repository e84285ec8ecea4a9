"""A planned step counts what a real one allocates; a plan fits, is written as a recipe, and that recipe trains."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from paths import ROOT
from toy_training import TOY, write_config, write_images

from dinov3.config.train import TrainConfig, load_config
from dinov3.data.crops import CropBatch
from dinov3.errors import DinoError
from dinov3.optim import build_schedules
from dinov3.train import planner
from dinov3.train.method import SelfDistillation, build_network
from dinov3.train.planner import GIB, Devices, Live, devices, plan, step


def toy(tmp_path: Path, *overrides: str) -> TrainConfig:
    return load_config(write_config(tmp_path), ["train.dataset_path=.", *overrides])[0]


def test_bytes_alive_are_counted_while_they_live() -> None:
    with Live() as live, torch.device("meta"):
        x = torch.empty(100, 10)  # 4000 bytes
        y = x * 2  # 4000
        view = y[:50]
        del y  # the view keeps it
        assert (live.now, live.peak) == (8000, 8000)
        del view
        assert (live.now, live.peak) == (4000, 8000)
        x @ torch.empty(10, 7)
    assert live.flops == 2 * 100 * 10 * 7


def test_a_planned_step_allocates_what_a_real_one_does(tmp_path) -> None:
    """The twin: real tensors on the CPU, sizes taken from the storages that torch made."""
    c = toy(tmp_path, "student.drop_path_rate=0")
    B, P = 4, 16
    masked = 4 * 1 + 2  # as the loader draws them for 8 crops: see below
    need = step(c)
    with Live() as live:
        student, ema = build_network(c), build_network(c)
        student.init_weights()
        ema.init_weights()
        moments = [torch.empty_like(p) for p in student.parameters() for _ in range(2)]
        method = SelfDistillation(student, ema, dino=c.dino, ibot=c.ibot, gram=c.gram)
        waiting = [torch.zeros(2 * B, 3, 32, 32, dtype=torch.uint8), torch.zeros(2 * B, 3, 16, 16, dtype=torch.uint8)]
        planned = planner._batch(c, planner.resolutions(c.crops)[0], torch.float32)
        masked = planned.n_masked
        assert 0 < masked < 2 * B * P
        batch = CropBatch(
            torch.randn(2 * B, 3, 32, 32), torch.randn(2 * B, 3, 16, 16), None, torch.zeros(2 * B, P, dtype=torch.bool),
            torch.arange(masked), torch.ones(masked), masked,
        )  # fmt: skip
        del planned
        live.peak = 0
        values = build_schedules(c, 1).at(3)
        targets = method.targets(batch, values)
        terms = method.predict(batch, targets, values)
        terms.total().backward()
    assert moments  # alive until here
    assert waiting
    assert need.bytes == pytest.approx(live.peak, rel=0.01)


def test_parts_follow_the_configuration(tmp_path) -> None:
    plain = step(toy(tmp_path))
    weights = sum(p.numel() for p in build_network(toy(tmp_path)).parameters())
    assert plain.parts["AdamW"] == 8 * weights
    assert plain.parts["student"] == pytest.approx(4 * weights, rel=0.01)  # and tables of positions
    assert plain.parts["average"] == plain.parts["student"]
    assert plain.parts["Gram teacher"] == 0
    assert plain.saved == 16 * weights

    larger = step(toy(tmp_path, "train.batch_size_per_gpu=16"))
    assert larger.parts["activations"] == pytest.approx(4 * plain.parts["activations"], rel=0.1)
    assert larger.flops == pytest.approx(4 * plain.flops, rel=0.1)  # drop path keeps whole images

    four = step(toy(tmp_path), world=4)
    assert four.parts["student"] == pytest.approx(plain.parts["student"] / 4, rel=0.01)
    assert four.parts["half-precision weights"] > 0  # gathered copies

    heads = step(toy(tmp_path, "teacher.ema=heads"), world=4)  # the backbone is the student's, and counted once
    assert 0 < heads.parts["average"] < four.parts["average"]

    gram = step(toy(tmp_path, "gram.use_loss=true", "gram.it_load_ema_teacher=0"))
    assert 0 < gram.parts["Gram teacher"] < gram.parts["student"]  # it has no heads
    assert gram.flops > plain.flops


def test_recomputation_takes_less_memory_and_more_work(tmp_path) -> None:
    large = ("train.batch_size_per_gpu=32",)
    none = step(toy(tmp_path, *large))
    selective = step(toy(tmp_path, *large, "train.checkpointing=true"))
    full = step(toy(tmp_path, *large, "train.checkpointing_full=true"))
    assert none.bytes > selective.bytes > full.bytes
    assert none.flops == selective.flops < full.flops  # matrix products are kept by the one, repeated by the other

    accumulated = step(toy(tmp_path, *large, "optim.accumulation_steps=3"))
    assert accumulated.flops == pytest.approx(3 * none.flops)
    assert accumulated.bytes > none.bytes  # the gradients of the batches before, and their targets


def test_devices_are_read_as_people_write_them() -> None:
    assert devices("1x24GB") == devices("24gb") == Devices(1, 24 * GIB, None, False)
    assert devices("8xH100") == Devices(8, 80 * GIB, "h100", False)
    assert devices("RTX 4090").card == devices("4090").card == "4090"
    assert devices("cpu:16GB") == Devices(1, 16 * GIB, None, True)
    assert devices("cpu").bytes > GIB
    for text, near in (("h1000", "h100"), ("2x409", "4090"), ("0x24GB", "0 GPUs")):
        with pytest.raises(DinoError, match=near):
            devices(text)


def made_up(config: TrainConfig, *, world: int = 1, card: bool = False) -> planner.Need:
    """1000 bytes, and 100, 60 or 30 an image of a batch, by recomputation."""
    assert card
    c = config.train
    an_image = 30 if c.checkpointing_full else 60 if c.checkpointing else 100
    n = c.batch_size_per_gpu * config.optim.accumulation_steps
    return planner.Need({"student": 1000, "activations": an_image * c.batch_size_per_gpu}, 5.0 * n, n, 0)


def planner_of(folder: Path, size: float, count: int = 1) -> planner.Planner:
    """Of a recipe of 32 images a step, on devices of which so many bytes are counted on."""
    recipe = write_config(folder, TOY.replace("batch_size_per_gpu: 4", "batch_size_per_gpu: 32"))
    return planner.Planner(
        recipe, [], Devices(count, round(size / planner.USABLE), None, False), 100, batch=None, steps=None
    )


def test_the_largest_batch_that_fits_is_chosen_and_nothing_that_does_not(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(planner, "step", made_up)
    chosen, p = {}, planner_of(tmp_path, 0)
    for size in (4200, 4199, 2919, 2599, 1800, 1480, 1479, 1240):
        p.on = Devices(1, round(size / planner.USABLE), None, False)
        row = p.best("toy")
        assert row is not None
        assert row.fits
        chosen[size] = (row.batch, row.steps, row.checkpointing, row.bytes)
    assert chosen == {
        4200: (32, 1, "none", 4200),
        4199: (32, 1, "selective", 2920),
        2919: (16, 2, "none", 2600),
        2599: (16, 2, "selective", 1960),
        1800: (8, 4, "none", 1800),
        1480: (8, 4, "selective", 1480),
        1479: (8, 4, "full", 1240),
        1240: (8, 4, "full", 1240),
    }
    p.on = Devices(1, round(1239 / planner.USABLE), None, False)
    assert p.best("toy") is None
    assert planner_of(tmp_path, 9999, count=2).batches() == [16, 8]
    assert p.steps == 12  # the recipe's
    with pytest.raises(DinoError, match=r"^vit_tiny does not fit: 8 images .*--model vits16.*would help"):
        plan(100, p.on, recipe=p.recipe)
    with pytest.raises(DinoError, match="try --batch 33"):
        planner_of(tmp_path, 9999, count=3)
    with pytest.raises(DinoError, match="vits16"):
        plan(100, p.on, model="vits61")


def test_a_plan_shows_other_ways_and_the_hours_of_a_measured_rate(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(planner, "step", made_up)
    p = planner_of(tmp_path, 2919)
    made = plan(100, p.on, recipe=p.recipe, steps=7, rate=50)
    assert {(r.what, r.batch, r.checkpointing, r.bytes, r.fits) for r in made.rows if r.what == "vit_tiny"} == {
        ("vit_tiny", 32, "none", 4200, False),
        ("vit_tiny", 16, "none", 2600, True),
        ("vit_tiny", 8, "none", 1800, True),
        ("vit_tiny", 32, "selective", 2920, False),
        ("vit_tiny", 16, "selective", 1960, True),
        ("vit_tiny", 8, "selective", 1480, True),
    }
    assert {r.what for r in made.rows} == {"vit_tiny", "24 px", "48 px"}  # crops of two thirds and three halves
    assert made.hours(made.speeds[0].flops) == pytest.approx(7 * 32 / 50 / 3600)
    assert any("| vit_tiny (the plan) | 16 | 2 | none |" in line for line in planner.table(made))


@pytest.mark.slow
def test_lines_between_two_batches_are_those_that_are_counted(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(planner, "MORE", 16)
    p = planner_of(tmp_path, GIB)
    for level in ("none", "selective"):
        line, counted = (p.row("toy", 32, level, exact=exact).bytes for exact in (False, True))
        assert line == pytest.approx(counted, rel=0.02)


def test_this_machine_is_measured(tmp_path) -> None:
    assert 1 < planner.images_per_second(toy(tmp_path), seconds=0.01) < 1e5


def run(*arguments: object) -> str:
    argv = [sys.executable, "-m", "dinov3", *map(str, arguments)]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_plan_becomes_a_recipe_that_trains(tmp_path) -> None:
    images, file = write_images(tmp_path / "photos"), tmp_path / "plan.yaml"
    out = run(
        "plan", "--data", images, "--gpus", "cpu:4GB", "--recipe", write_config(tmp_path), "--steps", 2, "--rate", 8,
        "--out", file,
    )  # fmt: skip
    assert re.search(r"^Hours: +0.000278 on measured: 8 images/s$", out, re.MULTILINE)  # 2 steps of 4 images
    assert "over 12 images" in out
    assert "(the plan) | 4 | 1 | none |" in out
    config, _ = load_config(file, ["train.dataset_path=."])
    assert replace(config.train, batch_size_per_gpu=0) == replace(toy(tmp_path).train, batch_size_per_gpu=0)
    assert config.iterations == 2
    assert file.read_text().startswith("# A plan of `dinov3 plan` for 12 images.\n")
    run("train", images, "--recipe", file, "--out", tmp_path / "run")
    assert (tmp_path / "run" / "ckpt" / "1").is_dir()


def test_the_page_shows_eight_configurations_within_a_tenth() -> None:
    rows = re.findall(
        r"^\| .+? \| \d+ \| (\d+) \| (\d+) \| ([\d.]+) \|", (ROOT / "docs/plan.md").read_text(), re.MULTILINE
    )
    assert len(rows) == 8
    for predicted, measured, ratio in rows:
        assert float(ratio) == pytest.approx(int(predicted) / int(measured), abs=0.002)
        assert 0.9 <= float(ratio) <= 1.1


@pytest.mark.slow
def test_the_published_run_reached_the_share_that_estimates_use() -> None:
    config, _ = load_config("vitl_im1k_lin834.yaml", ["train.dataset_path=."])
    need = step(config, world=32, card=True)
    images_per_second = 125_000 * 64 / (14 * 3600)
    assert images_per_second * need.flops / need.images / 989e12 == pytest.approx(planner.TRAINING, abs=0.001)
