"""Measurements of a run have known answers; every planted illness gets its name and healthy runs none."""

from __future__ import annotations

import json
import math
import random
import re
import shlex
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from paths import ROOT
from PIL import Image
from ranks import run_ranks
from toy_training import write_config, write_images

from dinov3.cli.training import doctor
from dinov3.config.train import load_config
from dinov3.errors import DinoError
from dinov3.runlog import read_metrics
from dinov3.train import doctor as d
from dinov3.train.train import train

# ---- measures ---------------------------------------------------------------------------------------------------------


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_lidar_is_the_plain_twin_and_counts_what_tells_images_apart() -> None:
    means = torch.zeros(50, 12)
    means[:, :3] = 20 * randn(50, 3, seed=1)  # three directions tell images apart; views differ in all twelve
    x = means[:, None] + randn(50, 6, 12, seed=2)
    found = d.lidar(x)
    assert found == pytest.approx(3, abs=0.4)
    y = x.double()
    mean = y.mean(1)
    within = sum(torch.outer(v, v) for v in (y - mean[:, None]).flatten(0, 1)) / 300
    within = within + 1e-4 * within.diagonal().mean() * torch.eye(12)
    between = sum(torch.outer(m, m) for m in mean - mean.mean(0))
    values, vectors = torch.linalg.eigh(within)
    root = vectors @ torch.diag(values**-0.5) @ vectors.T
    p = torch.linalg.eigvalsh(root @ between @ root).clamp_min(0)
    p = p / p.sum()
    assert found == pytest.approx(float(torch.special.entr(p).sum().exp()), rel=1e-6)
    assert d.lidar(torch.zeros(5, 4, 3)) >= 0  # a collapsed network is no error
    assert math.isnan(d.lidar(torch.full((5, 4, 3), math.nan)))


def test_mean_cosine_is_that_of_different_rows() -> None:
    x = randn(7, 5)
    rows = torch.nn.functional.normalize(x, dim=1)
    pairs = [float(rows[i] @ rows[j]) for i in range(7) for j in range(7) if i != j]
    assert d.mean_cosine(x) == pytest.approx(np.mean(pairs), abs=1e-6)
    assert d.mean_cosine(torch.ones(4, 3)) == pytest.approx(1)


def test_structure_is_one_for_patches_that_follow_the_image_and_chance_for_those_that_follow_positions() -> None:
    content = randn(2, 6, 6, 32)
    assert d.structure(content, content.flip(2)) == 1
    assert d.structure(content, content) < 0.5  # features of positions: the mirrored image has them in the same places
    shifted = content.flip(2).roll(1, dims=2)
    assert d.structure(content, shifted) > 0.8  # the next patch is near enough
    assert d.structure(content, content.flip(2).roll(2, dims=2)) < 0.4


def test_the_gap_is_the_relative_distance_of_all_weights() -> None:
    a, b = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    x, y = (torch.cat([p.detach().flatten() for p in m.parameters()]) for m in (a, b))
    assert float(d.relative_distance(a, b)) == pytest.approx(float((x - y).norm() / y.norm()), rel=1e-6)


def test_different_images_are_counted_by_what_they_show() -> None:
    rng = np.random.default_rng(0)
    originals = torch.from_numpy(rng.integers(0, 256, (40, 3, 8, 8)))
    noisy = (originals + torch.from_numpy(rng.integers(-2, 3, originals.shape))).clamp(0, 255)  # encoded again
    assert d.distinct(originals, 40) == 40
    assert d.distinct(torch.cat([originals, noisy]), 80) == 40
    assert d.distinct(originals, 10_000) == 10_000  # no copy seen
    drawn = originals[torch.from_numpy(rng.integers(0, 40, 60))]
    assert 30 < d.distinct(drawn, 100_000) < 50  # from a sample


# ---- verdicts ---------------------------------------------------------------------------------------------------------


def facts(tmp_path, *overrides: str) -> d.Facts:
    config, _ = load_config(write_config(tmp_path), ["train.dataset_path=photos", "optim.iterations=600", *overrides])
    return d.facts_of(config)


GOOD = {"rankme": 12.0, "lidar": 9.0, "cls_cosine": 0.2, "patch_structure": 0.6, "patch_drift": 0.05, "teacher_gap": 0.05,
        "dino_prototypes_used": 0.9, "dino_target_entropy": math.log(32), "dino_targets": 2000.0,
        "images_seen": 2400, "images_distinct": 5000.0, "images_listed": 5000}  # fmt: skip
START = {**GOOD, "rankme": 11.0, "patch_structure": 0.52, "patch_drift": None}
LOSSES = {
    "total_loss": 5.0,
    "dino_global_crops_loss": 3.2,
    "ibot_loss": 1.5,
    "koleo_loss": 0.3,
    "backbone_grad_norm": 0.5,
}


def records(now: dict, losses: dict, before: dict = GOOD) -> list[dict]:
    logs = [{"iteration": it, **(losses if it > 200 else LOSSES)} for it in range(0, 300, 10)]
    return [*logs, {"iteration": 0, **START}, {"iteration": 149, **before}, {"iteration": 299, **GOOD, **now}]


PLANTED: dict[str, tuple[dict, dict]] = {
    "healthy": ({}, {}),
    "learning rate too high": ({}, {"dino_global_crops_loss": 3.9}),
    "repeated data": ({"images_distinct": 20.0, "images_listed": 20}, {}),
    "full collapse": ({"cls_cosine": 0.99, "rankme": 1.1, "dino_prototypes_used": 0.03}, {}),
    "dimensional collapse": ({"rankme": 2.0}, {}),
    "plateau": ({}, {"dino_global_crops_loss": math.log(32) * 0.999, "ibot_loss": math.log(32) / 2}),
    "unused prototypes": ({"dino_prototypes_used": 0.06}, {}),
    "patch similarity decayed": ({"patch_structure": 0.5}, {}),
}


@pytest.mark.parametrize("name", PLANTED)
def test_each_illness_is_named_and_health_is_not_accused(tmp_path, name: str) -> None:
    now, losses = PLANTED[name]
    found = d.verdicts(facts(tmp_path), records(now, {**LOSSES, **losses}))
    assert [v.iteration for v in found] == [0, 149, 299]
    assert [v.name for v in found] == ["too early", "too early", name]
    assert found[-1].ill == (name != "healthy")


@pytest.mark.parametrize("bad", [{"total_loss": None}, {"backbone_grad_norm": 50.0, "dino_global_crops_loss": 3.3}])
def test_losses_that_are_not_finite_and_exploding_gradients_are_a_learning_rate_too_high(tmp_path, bad: dict) -> None:
    found = d.verdicts(
        facts(tmp_path), records({}, LOSSES)[:-3] + [{"iteration": i, **LOSSES, **bad} for i in (300, 310)]
    )
    assert found[-1].name == "learning rate too high"


def test_a_backbone_that_begins_to_move_and_a_new_loss_term_are_no_explosion(tmp_path) -> None:
    frozen = [{**r, "backbone_grad_norm": 0.0} if "total_loss" in r else r for r in records({}, LOSSES)]
    for more in ({}, {"backbone_grad_norm": 50.0}):  # as where Gram anchoring begins: DINO's loss stays
        later = [{"iteration": i, **LOSSES, **more} for i in range(300, 460, 10)]
        assert d.verdicts(facts(tmp_path), [*frozen, *later])[-1].name == "healthy"


def test_copies_among_the_files_are_repeated_data(tmp_path) -> None:
    found = d.verdicts(facts(tmp_path), records({"images_distinct": 2000.0}, LOSSES))
    assert found[-1].name == "repeated data"
    assert "about 2000 of 5000 images differ" in found[-1].finding


def test_a_teacher_that_cannot_follow_is_frozen(tmp_path) -> None:
    assert d.verdicts(facts(tmp_path, "teacher.momentum_teacher=1"), records({}, LOSSES))[-1].name == "teacher frozen"


def test_all_images_with_one_target_are_a_full_collapse(tmp_path) -> None:
    one = {"dino_target_entropy": 0.1, "dino_prototypes_used": 0.03}
    assert d.verdicts(facts(tmp_path), records(one, LOSSES))[-1].name == "full collapse"


def test_cls_tokens_that_were_equal_at_the_start_are_no_collapse(tmp_path) -> None:
    """So they are with a layer scale of 1e-5."""
    alike = [{**r, "cls_cosine": 0.99} if "rankme" in r else r for r in records({}, LOSSES)]
    assert d.verdicts(facts(tmp_path), alike)[-1].name == "healthy"


def test_the_advice_for_decayed_patches_names_the_best_teacher(tmp_path) -> None:
    (*_, found) = d.verdicts(facts(tmp_path), records({"patch_structure": 0.5}, LOSSES))
    assert "gram.ckpt=RUN/eval/training_149" in found.advice
    assert "step 149" in found.advice
    started = facts(tmp_path, "student.resume_from_teacher_chkpt=good.pth")
    (*_, found) = d.verdicts(
        started, records({"patch_structure": 0.54}, LOSSES, before={**GOOD, "patch_structure": 0.3})
    )
    assert found.name == "healthy"  # 0.54 is above the start's 0.52
    (*_, found) = d.verdicts(
        started, records({"patch_structure": 0.3}, LOSSES, before={**GOOD, "patch_structure": 0.3})
    )
    assert "gram.ckpt=good.pth" in found.advice
    on = replace(started, gram=True)
    assert d.verdicts(on, records({"patch_structure": 0.3}, LOSSES))[-1].name == "healthy"


@pytest.mark.parametrize("now", [{"patch_structure": 0.3}, {"dino_prototypes_used": 0.19}])
def test_young_networks_are_not_accused(tmp_path, now: dict) -> None:
    """As in `toy_cpu` and `small_cpu` after 240 steps: 40 → 28 % of the patches, 19 % of the prototypes."""
    before = {**GOOD, "patch_structure": 0.41}
    seen = [{**r, "patch_structure": 0.41} if r.get("patch_structure") else r for r in records({}, LOSSES, before)[:-1]]
    assert (
        d.verdicts(facts(tmp_path), [*seen, {**records({}, LOSSES)[-1], "patch_structure": 0.41, **now}])[-1].name
        == "healthy"
    )


@pytest.mark.parametrize("off", ["ibot.loss_weight=0", "ibot.mask_sample_probability=0"])
def test_a_loss_that_is_not_trained_is_no_plateau(tmp_path, off: str) -> None:
    for value in (0.0, math.log(32) / 2):
        assert d.verdicts(facts(tmp_path, off), records({}, {**LOSSES, "ibot_loss": value}))[-1].name == "healthy"


def test_a_run_without_measurements_is_judged_by_its_losses(tmp_path) -> None:
    logs = [r for r in records({}, {**LOSSES, "dino_global_crops_loss": 3.4649}) if "total_loss" in r]
    (found,) = d.verdicts(facts(tmp_path), logs)
    assert (found.name, found.iteration) == ("plateau", 290)
    assert d.verdicts(facts(tmp_path), []) == []


# ---- warnings in the log ----------------------------------------------------------------------------------------------


def live(tmp_path, *overrides: str) -> d.Doctor:
    config, _ = load_config(write_config(tmp_path), ["train.dataset_path=photos", "optim.iterations=600", *overrides])
    doctor = object.__new__(d.Doctor)
    doctor.facts, doctor.logs, doctor.warned, doctor.measured = d.facts_of(config), [], set(), []
    return doctor


@pytest.mark.parametrize("name, uniform", [("dino_global_crops_loss", math.log(32)), ("ibot_loss", math.log(32) / 2)])
def test_a_loss_that_stays_where_it_began_is_a_warning_once_and_not_at_once(
    tmp_path, name: str, uniform: float
) -> None:
    h = live(tmp_path)
    stays = {name: 0.999 * uniform}
    assert list(h.warnings(d.PATIENCE - 1, stays)) == []
    (warning,) = h.warnings(d.PATIENCE + 10, stays)
    assert name in warning
    assert "optim.lr" in warning
    assert list(h.warnings(d.PATIENCE + 20, stays)) == []
    assert list(live(tmp_path).warnings(d.PATIENCE + 10, {name: 0.97 * uniform})) == []


def test_equal_cls_tokens_are_a_warning(tmp_path) -> None:
    (warning,) = live(tmp_path).warnings(300, {"koleo_loss": 6.0})
    assert "nearly equal" in warning
    assert list(live(tmp_path).warnings(300, {"koleo_loss": 2.0})) == []


@pytest.mark.parametrize("momentum, warned", [(0.9995, 1), (0.99, 0)])
def test_a_teacher_that_cannot_follow_is_a_warning_at_the_start(tmp_path, momentum: float, warned: int) -> None:
    warnings = list(live(tmp_path, f"teacher.momentum_teacher={momentum}").at_start())
    assert len(warnings) == warned
    assert all("teacher.momentum_teacher" in w for w in warnings)


def test_a_run_that_stands_still_warns_in_its_log(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(d, "PATIENCE", 40)
    images = write_images(tmp_path / "images")
    still = ["optim.lr=1e-9", "teacher.momentum_teacher=0.9999", "optim.iterations=45", "run.log_every=10"]
    config, _ = load_config(write_config(tmp_path), [f"train.dataset_path={images}", *still])
    train(config, tmp_path / "run")
    log = (tmp_path / "run/log.txt").read_text()
    assert "of its first weights" in log
    assert "warning: teacher frozen" in log


# ---- in a run ---------------------------------------------------------------------------------------------------------

RUN = ["optim.iterations=6", "evaluation.eval_period_iterations=3", "run.log_every=2"]


def trained(tmp_path, name: str, *overrides: str):
    images = tmp_path / "images"
    if not images.exists():
        write_images(images)
    config, _ = load_config(write_config(tmp_path), [f"train.dataset_path={images}", *RUN, *overrides])
    train(config, tmp_path / name)
    return tmp_path / name


def test_measuring_and_drawing_change_nothing_of_what_is_learned(tmp_path) -> None:
    on, off = (
        trained(tmp_path, "on", "evaluation.doctor_images=12"),
        trained(tmp_path, "off", "evaluation.doctor_images=0"),
    )
    states = [torch.load(r / "eval/training_5/teacher_checkpoint.pth", weights_only=True)["teacher"] for r in (on, off)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[1])
    losses = [[r["total_loss"] for r in read_metrics(r / "metrics.jsonl") if "total_loss" in r] for r in (on, off)]
    assert losses[0] == losses[1]
    measured = [r for r in read_metrics(on / "metrics.jsonl") if "rankme" in r]
    assert [r["iteration"] for r in measured] == [0, 2, 5]
    assert measured[0]["images_listed"] == 12
    assert measured[0]["doctor_images"] == 12
    assert measured[1]["dino_targets"] == 16  # two global crops of four images in two steps
    assert 0 < measured[2]["teacher_moved"] < 1
    assert measured[2]["teacher_gap"] > 0
    assert not [r for r in read_metrics(off / "metrics.jsonl") if "rankme" in r]
    for name, size in (("crops_5", 3), ("pca_5", 2)):
        with Image.open(on / "images" / f"{name}.png") as image:
            assert image.height > 128 * size
    assert not (off / "images").exists()

    # the verdicts, from the folder alone, in a fresh process, as the page prints the command
    (block,) = re.findall(r"```sh\n(.*?)```", (ROOT / "docs/doctor.md").read_text(), re.DOTALL)
    plain, plotted = (shlex.split(line) for line in block.splitlines())
    assert plotted[: len(plain)] == plain == ["dinov3", "doctor", "run"]
    on.rename(tmp_path / "run")
    done = subprocess.run([sys.executable, "-m", *plotted], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].startswith("step 0  too early:")
    assert "RankMe" in done.stdout
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_a_run_of_another_command_is_refused_in_a_sentence(tmp_path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 0, "total_loss": 1.0}\n')
    (tmp_path / "resolved.yaml").write_text("task: classification\nhead: linear\ndevice: cpu\n")
    with pytest.raises(DinoError, match="run of another command; the doctor reads those of `dinov3 train`"):
        doctor(tmp_path)


@pytest.mark.slow
def test_an_interrupted_run_measures_what_an_uninterrupted_one_measures(tmp_path) -> None:
    through = trained(tmp_path, "through", "evaluation.doctor_images=12")
    for limit in ("1e-6", "null"):  # interrupted after a step, and resumed
        stopped = trained(tmp_path, "twice", "evaluation.doctor_images=12", f"run.time_limit_minutes={limit}")
    measured, resumed = ([r for r in read_metrics(f / "metrics.jsonl") if "rankme" in r] for f in (through, stopped))
    window = ("doctor_seconds", "dino_", "ibot_")  # prototypes are counted from the restart
    kept = [{k: v for k, v in r.items() if not k.startswith(window)} for r in measured]
    assert [{k: v for k, v in r.items() if not k.startswith(window)} for r in resumed] == kept


def test_a_measurement_draws_nothing_from_the_run_and_does_not_depend_on_it(tmp_path) -> None:
    """The sample is the same in a later start, whatever the generators' states."""
    from dinov3.runlog import RunDir
    from dinov3.train.assembly import assemble

    images = write_images(tmp_path / "images", each=6)
    config, _ = load_config(
        write_config(tmp_path), [f"train.dataset_path={images}", *RUN, "evaluation.doctor_images=10"]
    )
    samples = []
    for seed in (1, 2):
        trainer = assemble(config, RunDir(tmp_path / "run"), torch.device("cpu"))
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        before = (random.getstate(), torch.get_rng_state())
        samples.append(trainer.doctor.sample)
        assert random.getstate() == before[0]
        assert torch.equal(torch.get_rng_state(), before[1])
    for name, x in vars(samples[0]).items():
        assert torch.equal(x, getattr(samples[1], name)), name
    assert samples[0].images.shape == (10, 3, 32, 32)
    assert samples[0].views.shape == (1, 4, 3, 32, 32)
    assert samples[0].fixed.shape == (6, 3, 128, 128)


@pytest.mark.parametrize(
    "steps, batch, listed, size",
    [(100, 32, 10_643, 128), (5, 32, 10_643, 0), (12_500, 64, 10**6, 768), (12_500, 64, 300, 300)],
)
def test_the_sample_is_as_large_as_two_per_cent_of_a_run_pay(steps: int, batch: int, listed: int, size: int) -> None:
    given = ["train.dataset_path=photos", f"evaluation.eval_period_iterations={steps}", "optim.iterations=50000"]
    config, _ = load_config("toy_cpu.yaml", given)
    assert d.sample_size(config, batch, listed) == size
    assert d.sample_size(config, batch, listed, ranks=7) == size // 7 * 7


def short_run(config: str, images: str, out: str, overrides: list[str]) -> None:
    train(load_config(config, [f"train.dataset_path={images}", *RUN, *overrides])[0], out)


@pytest.mark.slow
def test_two_ranks_measure_what_one_measures(tmp_path) -> None:
    """Each with half of the sample, weights sharded; the masks are the same in number only, so the first step is compared."""
    config, images = write_config(tmp_path), str(write_images(tmp_path / "images"))
    overrides = ["optim.iterations=1", "evaluation.doctor_images=12", "student.drop_path_rate=0"]
    short_run(config, images, str(tmp_path / "one"), overrides)
    run_ranks(short_run, 2, config, images, str(tmp_path / "two"), [*overrides, "train.batch_size_per_gpu=2"])
    one, two = (next(r for r in read_metrics(tmp_path / n / "metrics.jsonl") if "rankme" in r) for n in ("one", "two"))
    assert one.keys() == two.keys()
    for name in (
        "rankme",
        "cls_cosine",
        "patch_structure",
        "dino_targets",
        "images_distinct",
        "images_seen",
        "doctor_images",
    ):
        assert two[name] == pytest.approx(one[name], rel=0.01), name
    assert two["dino_prototypes_used"] == pytest.approx(one["dino_prototypes_used"], abs=0.1)


def test_a_folder_without_a_run_is_an_error_with_a_way_out(tmp_path, capsys) -> None:
    from dinov3.cli.training import doctor
    from dinov3.errors import DinoError

    with pytest.raises(DinoError, match="name the --out of"):
        doctor(tmp_path)
    run = trained(tmp_path, "plain")
    doctor(run)
    out = capsys.readouterr()
    assert "nothing was measured" in out.err
    assert out.out.startswith("step 5  too early")
    with open(run / "metrics.jsonl", "a") as file:  # a run that is writing
        file.write(json.dumps({"iteration": 6, "total_loss": 1.0})[:9])
    doctor(run)
