"""Continued pretraining: heads first on a frozen backbone, then a guard that keeps a run from falling below its start."""

from __future__ import annotations

import math
import os
import re
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from paths import ROOT
from ranks import run_ranks
from test_train import assert_same, tensors, wait_for_iteration
from toy_training import start, write_config, write_images

from dinov3 import cli, hub, optim
from dinov3.cli.training import first_weights
from dinov3.config.train import GuardConfig, LearningRateConfig, OptimConfig, TrainConfig, load_config, vit_config
from dinov3.errors import DinoError
from dinov3.metrics import pattern_kept, rank_me
from dinov3.models.architectures import ViTConfig
from dinov3.models.build import backbone
from dinov3.runlog import read_metrics
from dinov3.train import loop
from dinov3.train.assembly import Trainer
from dinov3.train.guard import Guard, GuardState
from dinov3.train.loop import Outcome
from dinov3.train.method import build_network
from dinov3.train.teacher_files import fill, read_network
from dinov3.train.train import train
from dinov3.weights import reading, writing

# 8 iterations: frozen for two, a ramp of one, a teacher (and so a measurement) every two; the average follows at once
TEXT = """
student: {arch: vit_tiny, embed_dim: 32, depth: 1, num_heads: 2, patch_size: 8, drop_path_rate: 0.2, n_storage_tokens: 1,
          layerscale: 0.1, pos_embed_rope_rescale_coords: 2, pos_embed_rope_dtype: fp32}
compute_precision: {param_dtype: fp32}
dino: {head_n_prototypes: 32, head_bottleneck_dim: 16, head_hidden_dim: 32}
ibot: {head_n_prototypes: 32, head_bottleneck_dim: 16, head_hidden_dim: 32}
gram: {use_loss: true, it_load_ema_teacher: 0, rep_update: false}
train: {batch_size_per_gpu: 2, num_workers: 0, OFFICIAL_EPOCH_LENGTH: 8, compile: false}
optim: {epochs: 1}
schedules:
  lr: {start: 0.002, peak: 0.002, end: 0.002, freeze_student_iterations: 2, backbone_warmup_after_freeze: 1}
  weight_decay: {start: 0.04, peak: 0.04, end: 0.04}
  momentum: {start: 0.5, peak: 0.5, end: 0.5}
  teacher_temp: {start: 0.04, peak: 0.04, end: 0.04}
crops: {global_crops_size: 16, local_crops_size: 8, local_crops_number: 2}
evaluation: {eval_period_iterations: 2, knn_image_size: 32, doctor_images: 0}
guard: {enabled: true, images: 4, structure_percent: 10}
checkpointing: {period: 100, max_to_keep: 9}
run: {device: cpu, log_every: 1, deterministic: true}
"""
WILD = ("schedules.lr.start=1", "schedules.lr.peak=1", "schedules.lr.end=1", "guard.structure_percent=1")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"), each=2)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_config(tmp_path_factory.mktemp("config"), TEXT)


@pytest.fixture(autouse=True)
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a second each."""
    monkeypatch.setattr(loop, "plot", lambda *_: "no plot")


@pytest.fixture(scope="module")
def good(toy: str, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that stays good."""
    out = tmp_path_factory.mktemp("good")
    assert run(toy, images, out).finished
    return out


@pytest.fixture(scope="module")
def fallen(toy: str, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with far too high a learning rate, which nothing disturbed."""
    out = tmp_path_factory.mktemp("fallen")
    run(toy, images, out, *WILD)
    return out


def run(toy: str, images: Path, out: Path, *overrides: str) -> Outcome:
    config, notes = load_config(toy, [f"train.dataset_path={images}", *overrides])
    return train(config, out, notes=notes)


def log_of(out: Path) -> str:
    return (out / "log.txt").read_text()


def learning_rates(out: Path) -> dict[int, float]:
    return {r["iteration"]: r["lr"] for r in read_metrics(out / "metrics.jsonl") if "lr" in r}


def scripted(monkeypatch: pytest.MonkeyPatch, ranks: list[float]) -> None:
    """The start has rank 100; the measurements after it have these, one after the other."""
    left = list(ranks)
    monkeypatch.setattr(Guard, "begin", lambda guard, _: guard.state.start.update(rank=100.0) or guard.state.start)
    monkeypatch.setattr(Guard, "measure", lambda *_: {"rank": left.pop(0)})


# ---- what is measured -----------------------------------------------------------------------------------------------


def test_rank_me_counts_the_directions_that_features_use() -> None:
    basis = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)))[0]
    for k in (1, 5, 64):
        assert rank_me(basis[:, :k] @ basis[:k]) == pytest.approx(k, rel=1e-3)
    assert math.isnan(rank_me(torch.tensor([[1.0, math.inf]])))
    assert rank_me(torch.diag(torch.tensor([3.0, 1.0]))) == pytest.approx(4 / 3**0.75, rel=1e-4)  # e^H of (3/4, 1/4)


def test_patterns_are_compared_pair_by_pair() -> None:
    before, after = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    slow = []
    for x, y in zip(before, after):
        pairs = [(i, j) for i in range(5) for j in range(i + 1, 5)]
        slow.append(torch.corrcoef(torch.stack([torch.stack([s[i, j] for i, j in pairs]) for s in (x, y)]))[0, 1])
    assert pattern_kept(before, after) == pytest.approx(float(torch.stack(slow).mean()), abs=1e-6)
    assert pattern_kept(before, 3 * before + 1) == pytest.approx(1)
    assert pattern_kept(before, -before) == pytest.approx(-1)


def test_a_value_is_good_down_to_its_limit_and_nan_never() -> None:
    guard = object.__new__(Guard)
    guard.state = GuardState({"knn": 80.0, "rank": 50.0, "structure": 100.0})
    guard.config = TrainConfig(guard=GuardConfig(knn_points=1, rank_percent=10, structure_percent=10))
    assert guard.fall({"knn": 79.0}) is None
    assert guard.fall({"rank": 45.0, "structure": 90.0}) is None
    assert guard.fall({"knn": 78.9}) == "k-NN accuracy is 78.9, below 79.0 (the start has 80.0)"
    assert str(guard.fall({"rank": 44.9, "structure": 99.0})).startswith("RankMe is 44.9, below 45.0")
    assert str(guard.fall({"rank": 50.0, "structure": float("nan")})).startswith("the structure of patches is nan")


# ---- a frozen backbone ----------------------------------------------------------------------------------------------


def test_the_backbones_learning_rate_is_zero_then_rises_to_the_schedule() -> None:
    lr = [optim.frozen_then_ramp(3, 2, lambda step: 6.0, step) for step in range(8)]
    assert lr == [0, 0, 0, 2, 4, 6, 6, 6]
    assert optim.frozen_iterations(LearningRateConfig(freeze_student_epochs=1.5), 100) == 150
    assert optim.frozen_iterations(LearningRateConfig(freeze_student_epochs=1.5, freeze_student_iterations=7), 100) == 7
    parts = {"backbone": torch.nn.Linear(2, 2), "dino_head": torch.nn.Linear(2, 2)}
    optimizer = optim.build_optimizer(parts, OptimConfig())
    values = optim.StepValues(1.0, 1.0, 0.0, 0.9, 0.07, 1.0, 0.0, backbone_lr=0.25).slower(0.5)
    optim.apply_schedules(optimizer, values)
    assert {(g["is_backbone"], g["lr"]) for g in optimizer.param_groups} == {(True, 0.125), (False, 0.5)}


def test_a_frozen_backbone_stays_and_only_heads_learn(good: Path) -> None:
    begun, warm, last = (tensors(good / "ckpt" / n) for n in ("start/0", "1", "7"))
    for name, value in warm.items():
        still = ".backbone." in name or name.startswith("optimizer.state.backbone.")
        assert not still or torch.equal(value, begun[name]), name
    head, token = "model.student.dino_head.last_layer.weight", "model.model_ema.backbone.cls_token"
    assert not torch.equal(warm[head], begun[head])
    assert not torch.equal(last[token], begun[token])
    records = {r["iteration"]: r for r in read_metrics(good / "metrics.jsonl") if "lr" in r}
    assert [records[i]["backbone_lr"] / records[i]["lr"] for i in (1, 2, 3)] == pytest.approx([0, 1 / 2, 1])
    assert ["gram_loss" in records[i] for i in (1, 2)] == [False, True]


# ---- a run that falls -----------------------------------------------------------------------------------------------


def test_a_run_that_stays_good_is_the_run_without_a_guard(toy: str, images: Path, good: Path, tmp_path: Path) -> None:
    plain = tensors(run(toy, images, tmp_path, "guard.enabled=false").checkpoint)
    guarded = tensors(good / "ckpt" / "7")
    assert guarded.pop("guard.cosines").shape == (4, 16, 16)
    assert_same(plain, guarded)
    assert "below" not in log_of(good)
    measured = [r for r in read_metrics(good / "metrics.jsonl") if "guard_rank" in r]
    assert [r["iteration"] for r in measured] == [3, 5, 7]  # not while it is frozen
    assert all(90 < r["guard_structure"] < 100 for r in measured)


def test_a_fall_brings_back_the_last_good_state_with_lower_rates_and_a_sentence(
    toy: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, [95.0, 89.0, 91.0])  # at 3, 5 and 7
    assert run(toy, images, tmp_path, "checkpointing.period=1", "checkpointing.max_to_keep=1").finished
    assert (
        f"iteration 5: RankMe is 89.0, below 90.0 (the start has 100.0); back to {tmp_path}/ckpt/3, and on with learning "
        "rates × 0.3 (fall 1, 3 are allowed)"
    ) in log_of(tmp_path)
    rates = learning_rates(tmp_path)
    assert rates[6] == pytest.approx(0.3 * rates[5])
    three, five, seven = (reading.open(tmp_path / "eval" / f"training_{it}").state_dict for it in (3, 5, 7))
    assert_same(three, five)  # the newest teacher is a good one at any time
    assert_same(reading.open(tmp_path).state_dict, seven)


def test_the_first_fall_goes_back_to_the_start_and_one_too_many_ends_the_run(
    toy: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, [0.0] * 9)
    options = ["schedules.lr.freeze_student_iterations=0", "guard.max_reverts=1"]
    outcome = run(toy, images, tmp_path, *options)
    assert (outcome.iterations, outcome.reason, outcome.finished) == (4, "the guard", False)
    assert_same(tensors(tmp_path / "ckpt" / "start" / "0"), tensors(outcome.checkpoint))
    assert "where the run ends: it fell 2 times (guard.max_reverts=1)" in log_of(tmp_path)
    again = run(toy, images, tmp_path, *options)
    assert (again.iterations, again.reason) == (4, "the guard")
    assert "nothing to do: the guard ended this run at iteration 3" in log_of(tmp_path)
    scripted(monkeypatch, [100.0] * 9)
    assert run(toy, images, tmp_path, options[0], "guard.max_reverts=2").finished
    rates = learning_rates(tmp_path)
    assert rates[4] == pytest.approx(0.09 * rates[0])


@pytest.mark.slow
def test_steps_that_are_not_finite_are_a_fall(
    toy: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = loop.gradients, []

    def broken(t: Any, batches: Any, values: Any, *rest: Any) -> Any:
        logs = real(t, batches, values, *rest)
        calls.append(values.lr)
        if len(calls) in (4, 5, 6):
            head = t.method.student.dino_head.last_layer.weight
            head.grad.fill_(float("nan"))
        return logs

    monkeypatch.setattr(loop, "gradients", broken)
    assert run(toy, images, tmp_path, "evaluation.eval_period_iterations=8").finished
    assert "iteration 5: the loss or its gradient was not finite 3 times in a row; back to " in log_of(tmp_path)
    assert calls[6] == pytest.approx(0.3 * calls[5])


def test_k_nn_is_what_counts_where_there_are_labels(toy: str, images: Path, tmp_path: Path) -> None:
    knn = [f"evaluation.knn_{part}_dataset={images}" for part in ("train", "val")]
    outcome = run(toy, images, tmp_path, *knn, "evaluation.knn_k=1", "guard.knn_points=0", "optim.iterations=4")
    assert outcome.knn == {3: 1.0}  # every image finds itself; not at 1: the backbone is frozen there
    assert "guard: the start has k-NN accuracy 100.0; measured in" in log_of(tmp_path)
    assert re.search(r"guard: measuring took \d+ s, \d+% of this start; a smaller evaluation", log_of(tmp_path))
    assert not (tmp_path / "ckpt" / "3" / "guard.cosines").exists()


def test_a_guard_that_never_measures_is_an_error(toy: str) -> None:
    with pytest.raises(DinoError, match=r"guard\.enabled.*: measures whenever a teacher is written"):
        load_config(toy, ["train.dataset_path=/x", "evaluation.eval_period_iterations=0"])


# ---- interruptions --------------------------------------------------------------------------------------------------


def test_a_run_that_dies_in_every_phase_ends_as_if_it_had_not(
    toy: str, images: Path, fallen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While frozen, in the ramp, between return and checkpoint, after that checkpoint: what is on the disk at these moments
    is all that is left."""
    assert "iteration 3: the structure of patches is " in log_of(fallen)
    died = []

    def dying(name: str, at: int, after: bool) -> Any:
        real = getattr(Trainer, name)

        def method(trainer: Trainer, *arguments: Any, **options: Any) -> Any:
            here = trainer.loader.consumed // trainer.global_batch - 1 == at
            if here and not after:
                died.append((name, at))
                raise KeyboardInterrupt
            result = real(trainer, *arguments, **options)
            if here:
                trainer.checkpoints.finish()
                died.append((name, at))
                raise KeyboardInterrupt
            return result

        return method

    moments = [("agree", 0, False), ("agree", 2, True), ("restore", 3, True), ("save", 3, True)]
    for name, at, after in moments:
        with monkeypatch.context() as patched:
            patched.setattr(Trainer, name, dying(name, at, after))
            with pytest.raises(KeyboardInterrupt):
                run(toy, images, tmp_path, *WILD)
    assert died == [(name, at) for name, at, _ in moments]
    run(toy, images, tmp_path, *WILD)
    newest = max(int(p.name) for p in (fallen / "ckpt").iterdir() if p.name.isdecimal())
    assert_same(tensors(fallen / "ckpt" / str(newest)), tensors(tmp_path / "ckpt" / str(newest)))
    assert_same(reading.open(fallen).state_dict, reading.open(tmp_path).state_dict)
    assert [r["iteration"] for r in read_metrics(tmp_path / "metrics.jsonl") if "lr" in r] == list(range(newest + 1))


@pytest.mark.slow
def test_killed_while_frozen_in_the_ramp_and_after_a_fall_a_run_ends_bit_identical(
    toy: str, images: Path, fallen: Path, tmp_path: Path
) -> None:
    command = ["--config-file", toy, "--output-dir", str(tmp_path), f"train.dataset_path={images}", *WILD]
    for iteration in (0, 2, 4, 6, None):
        process = start(command)
        if iteration is not None:
            wait_for_iteration(process, tmp_path, iteration)
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
        process.join(120)
    assert process.exitcode == 0
    assert_same(tensors(fallen / "ckpt" / "7"), tensors(tmp_path / "ckpt" / "7"))
    assert_same(reading.open(fallen).state_dict, reading.open(tmp_path).state_dict)


# ---- several processes, and the command -----------------------------------------------------------------------------


def on_a_rank(toy: str, images: str, out: str) -> tuple[int, float, str]:
    few = ("train.batch_size_per_gpu=1", "run.deterministic=false", "optim.iterations=4")
    outcome = run(toy, Path(images), Path(out), *WILD, *few)
    state = torch.load(Path(out) / "eval" / "training_3" / "teacher_checkpoint.pth", weights_only=True)["teacher"]
    return outcome.iterations, float(sum(v.double().sum() for v in state.values())), log_of(Path(out))


@pytest.mark.slow
def test_two_processes_fall_and_return_together(toy: str, images: Path, tmp_path: Path) -> None:
    (n, total, log), (n2, total2, _) = run_ranks(on_a_rank, 2, toy, str(images), str(tmp_path), timeout_s=120)
    assert (n, total) == (n2, total2)
    assert f"back to {tmp_path}/ckpt/1, and on with learning rates × 0.3" in log
    begun = tensors(tmp_path / "ckpt" / "start" / "0")
    returned = reading.open(tmp_path / "eval" / "training_3").state_dict
    assert torch.equal(returned["cls_token"], begun["model.model_ema.backbone.cls_token"])


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """Weights of a size that was never published, in a file without heads, with statistics of its own."""
    shape = ViTConfig(embed_dim=32, depth=1, num_heads=2, patch_size=8, n_storage_tokens=2, layerscale_init=0.1)
    model = backbone(shape)
    model.init_weights()
    about = {"config": asdict(shape), "mean": [0.4, 0.4, 0.4], "std": [0.2, 0.2, 0.2]}
    writing.save({k: v.detach() for k, v in model.state_dict().items()}, tmp_path / "own.safetensors", about)
    return tmp_path / "own.safetensors"


def continued(images: Path, own: Path) -> list[str]:
    """Arguments that continue from weights for four steps, two of them frozen."""
    command = ["train", str(images), "--out", str(own.parent / "run"), "--continue", str(own), "--steps", "4"]
    command += ["--device", "cpu", "crops.global_crops_size=32", "crops.local_crops_size=16", "guard.images=4"]
    command += ["train.batch_size_per_gpu=2", "train.num_workers=0", "evaluation.knn_image_size=32"]
    return [*command, "schedules.lr.freeze_student_iterations=2"]


def test_continue_takes_size_and_statistics_from_the_weights(
    images: Path, own: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["dinov3", *continued(images, own)]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    assert "guard: the start has RankMe" in capsys.readouterr().err
    after = hub.load(weights=own.parent / "run")
    assert after.origin.mean == pytest.approx((0.4, 0.4, 0.4))
    assert 0 < float((after.cls_token - reading.open(own).state_dict["cls_token"]).abs().max().detach()) < 0.01
    monkeypatch.setattr(sys, "argv", [*command, "--weights", str(own)])
    with pytest.raises(SystemExit):
        cli.main()
    assert "give one" in capsys.readouterr().err


def test_a_published_model_begins_with_its_own_rope_periods() -> None:
    chosen = ["train.dataset_path=/x", *first_weights("vitt16", None)]
    assert load_config("small_cpu.yaml", chosen)[0].student.layerscale == 1e-5  # that recipe's own has none
    config = load_config("continue.yaml", chosen)[0]
    network = build_network(config)
    found = read_network(config.student.resume_from_teacher_chkpt)
    fill(network, found, vit_config(config.student))
    assert torch.equal(network.backbone.rope_embed.periods, found.parts["backbone"]["rope_embed.periods"])


@pytest.mark.slow
def test_continue_runs_in_a_fresh_process(images: Path, own: Path) -> None:
    command = [sys.executable, "-m", "dinov3", *continued(images, own)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "finished: 4 of 4 steps" in done.stderr
