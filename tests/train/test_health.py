"""Warnings of runs that do not learn, and none for a run that does."""

from __future__ import annotations

import math

import pytest
from toy_training import write_config, write_images

from dinov3.config.train import load_config
from dinov3.optim import build_schedules
from dinov3.train.monitor import PATIENCE, Health
from dinov3.train.train import train


def health(tmp_path, *overrides: str) -> Health:
    config, _ = load_config(write_config(tmp_path), ["train.dataset_path=photos", "optim.iterations=600", *overrides])
    return Health(config, build_schedules(config, 1))


@pytest.mark.parametrize("name, uniform", [("dino_global_crops_loss", math.log(32)), ("ibot_loss", math.log(32) / 2)])
def test_a_loss_that_stays_where_it_began_is_a_warning_once_and_not_at_once(
    tmp_path, name: str, uniform: float
) -> None:
    h = health(tmp_path)
    stays = {name: 0.999 * uniform}
    assert list(h.of(PATIENCE - 1, stays)) == []
    (warning,) = h.of(PATIENCE + 10, stays)
    assert name in warning
    assert "optim.lr" in warning
    assert list(h.of(PATIENCE + 20, stays)) == []
    assert list(health(tmp_path).of(PATIENCE + 10, {name: 0.97 * uniform})) == []


def test_equal_cls_tokens_are_a_warning(tmp_path) -> None:
    (warning,) = health(tmp_path).of(300, {"koleo_loss": 6.0})
    assert "nearly equal" in warning
    assert list(health(tmp_path).of(300, {"koleo_loss": 2.0})) == []


@pytest.mark.parametrize("momentum, warned", [(0.9995, 1), (0.99, 0)])
def test_a_teacher_that_cannot_follow_is_a_warning_at_the_start(tmp_path, momentum: float, warned: int) -> None:
    warnings = list(health(tmp_path, f"teacher.momentum_teacher={momentum}").at_start())
    assert len(warnings) == warned
    assert all("teacher.momentum_teacher" in w for w in warnings)


def test_a_run_that_stands_still_warns_in_its_log(tmp_path) -> None:
    images = write_images(tmp_path / "images")
    still = ["optim.lr=1e-9", "teacher.momentum_teacher=0.9999", f"optim.iterations={PATIENCE + 5}"]
    config, _ = load_config(write_config(tmp_path), [f"train.dataset_path={images}", "run.log_every=50", *still])
    train(config, tmp_path / "run")
    log = (tmp_path / "run/log.txt").read_text()
    assert "warning: dino_global_crops_loss is 3.4" in log
    assert "of its first weights" in log
