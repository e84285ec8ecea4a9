"""Several students of one teacher: who sees which images, the same losses as one student alone, a whole run, a crash."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from paths import GOLDEN_LOSSES
from ranks import run_ranks
from test_parallel import CPU, ROW, share
from toy_training import write_config, write_images

from dinov3 import checkpoint, distributed
from dinov3.config.train import DinoConfig, GramConfig, IbotConfig, TrainConfig, load_config
from dinov3.data.crops import CropBatch, summary
from dinov3.errors import DinoError
from dinov3.parallel import parallelize
from dinov3.runlog import read_metrics
from dinov3.train.assembly import Trainer
from dinov3.train.loop import Outcome
from dinov3.train.method import SelfDistillation
from dinov3.train.multi_distill import MultiDistillation, check_alike, common_iteration, redistributed, train_students
from dinov3.train.train import train
from tests.train.test_method import Variant, recipe_weights, recorded_batch, step_values, tiny_network

RECORDED: dict[str, Any] = json.loads((GOLDEN_LOSSES / "multidist_gather.json").read_text())


def recorded_dealing() -> dict[str, Any]:
    group = distributed.subgroup(RECORDED["subgroups"])
    x = torch.tensor(RECORDED["ranks"][str(distributed.rank())]["in"])
    return {
        "out": redistributed(x, 6, group, axis=1).tolist(),
        "out_global_batch_4": redistributed(x, 4, group, axis=1).tolist(),
        "subgroup_rank": distributed.rank(group),
        "subgroup_size": distributed.world(group),
    }


# ---- one student of several learns what it would learn alone --------------------------------------------------------


def distillation(**options: Any) -> SelfDistillation:
    students = [tiny_network() for _ in range(2)]
    for network in students:
        torch.manual_seed(3)
        network.init_weights()
    teacher = recipe_weights(tiny_network(), 8000)
    parallelize(teacher.parts(), device=CPU, trained=False)  # over all ranks, where there are several
    cls = MultiDistillation if options else SelfDistillation
    return cls(*students, dino=DinoConfig(), ibot=IbotConfig(), gram=GramConfig(), teacher=teacher, **options)


def loaded_by(rank: int, batch: CropBatch) -> CropBatch:
    """Four images on three ranks: 0 and 1, 2 and 3, and two more that are dropped."""
    return share(batch, rank % 2, 2)


def first_losses() -> dict[str, float]:
    group = distributed.subgroup([[0], [1, 2]])
    method = distillation(group=group, global_batch=4)
    whole, n = recorded_batch(0), distributed.world(group)
    mine = share(whole, distributed.rank(group), n)
    batch = replace(
        loaded_by(distributed.rank(), whole),
        masks=mine.masks,
        mask_indices=mine.mask_indices,
        masks_weight=mine.masks_weight,
    )
    values = step_values(ROW)
    batch = method.receive(batch, torch.float32)
    assert torch.equal(batch.global_crops, mine.global_crops)
    assert torch.equal(batch.local_crops, mine.local_crops)
    terms = method.predict(batch, method.targets(batch, values), values)
    terms.total().backward()
    return distributed.average(terms.log(), group)


def dealing_and_losses() -> tuple[dict[str, Any], dict[str, float]]:
    return recorded_dealing(), first_losses()


@pytest.fixture(scope="module")
def on_three_ranks() -> list[tuple[dict[str, Any], dict[str, float]]]:
    return run_ranks(dealing_and_losses, 3)


def test_images_are_dealt_as_recorded(on_three_ranks: list[Any]) -> None:
    for rank, (got, _) in enumerate(on_three_ranks):
        expected = dict(RECORDED["ranks"][str(rank)])
        expected.pop("in")
        assert got == expected


def test_every_student_has_the_losses_it_would_have_alone(on_three_ranks: list[Any]) -> None:
    method, batch, values = distillation(), recorded_batch(0), step_values(ROW)
    alone = {t.name: float(t.value.detach()) for t in method.predict(batch, method.targets(batch, values), values)}
    first, second, third = (found for _, found in on_three_ranks)
    for name in ("dino_local_crops_loss", "dino_global_crops_loss", "ibot_loss"):
        assert first[name] == pytest.approx(alone[name], rel=1e-5)
        assert second[name] == pytest.approx(alone[name], rel=1e-5)  # Sinkhorn over its two ranks: as over all images
    assert first["koleo_loss"] == pytest.approx(alone["koleo_loss"], rel=1e-5)
    assert second == third
    assert summary(batch.masks).indices.tolist() == batch.mask_indices.tolist()


def test_students_without_a_teacher_are_refused() -> None:
    with pytest.raises(DinoError, match="need a frozen teacher"):
        MultiDistillation(
            tiny_network(), tiny_network(), dino=DinoConfig(), ibot=IbotConfig(), gram=GramConfig(), global_batch=4
        )
    assert Variant().teacher_seed is None


# ---- a whole run ----------------------------------------------------------------------------------------------------


def three_ranks(file: str, overrides: list[str], out: str) -> Outcome:
    return train_students(file, overrides, out)


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, list[str], Path]:
    """A teacher of a few steps, two students of different width, images."""
    images = write_images(tmp_path / "images")
    toy = write_config(tmp_path)
    config, _ = load_config(toy, [f"train.dataset_path={images}", "optim.epochs=1", "student.embed_dim=48"])
    train(config, tmp_path / "teacher")
    text = Path(toy).read_text().replace("student: {arch: vit_tiny, embed_dim: 32,", "student: {arch: vit_tiny,")
    text += f"""
MODEL: {{META_ARCHITECTURE: MultiDistillationMetaArch}}
distillation: {{enabled: true, full_cfg_path: {tmp_path}/teacher/resolved.yaml, checkpoint_path: {tmp_path}/teacher/ckpt/3}}
multidistillation:
  enabled: true
  global_batch_size: 4
  students:
    - {{name: narrow, config_path: narrow.yaml, ranks_range: [0, 1]}}
    - {{name: wide, config_path: wide.yaml, ranks_range: [1, 3]}}
"""
    (tmp_path / "students.yaml").write_text(text)
    (tmp_path / "narrow.yaml").write_text("student: {embed_dim: 16}\n")
    (tmp_path / "wide.yaml").write_text("student: {embed_dim: 64}\n")
    return str(tmp_path / "students.yaml"), [f"train.dataset_path={images}"], tmp_path / "out"


@pytest.mark.slow
def test_two_students_of_different_width_train_stop_and_resume_together(files: tuple[str, list[str], Path]) -> None:
    file, overrides, out = files
    knn = [overrides[0], "evaluation.eval_period_iterations=12"]
    first = run_ranks(three_ranks, 3, file, [*knn, "run.time_limit_minutes=0.0001"], str(out), timeout_s=120)
    stopped = {o.iterations for o in first}
    assert len(stopped) == 1
    # one student's save is lost, as if the crash had come between the two
    done = stopped.pop()
    if done > 1:
        shutil.rmtree(out / "wide" / "ckpt" / str(done - 1))
    outcomes = run_ranks(three_ranks, 3, file, knn, str(out), timeout_s=120)
    assert all(o.finished for o in outcomes)
    for name, width in (("narrow", 16), ("wide", 64)):
        records = [r["iteration"] for r in read_metrics(out / name / "metrics.jsonl")]
        assert records == list(range(12)), name  # the reference writes metrics for the first student only
        tensors = checkpoint.read_tensors(out / name / "ckpt" / "11")
        assert tensors["model.model_ema.backbone.cls_token"].shape[-1] == width
        assert not any(n.startswith("model.teacher.") for n in tensors)
        teacher = torch.load(out / name / "eval" / "training_11" / "teacher_checkpoint.pth", weights_only=True)
        assert teacher["teacher"]["backbone.cls_token"].shape[-1] == width


def test_students_that_would_not_step_together_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = TrainConfig()
    check_alike("narrow", config)
    longer = replace(config, optim=replace(config.optim, epochs=7))

    def two(mine: Any) -> list[Any]:
        return [("narrow", {**mine[1], "optim.epochs": 100}), mine]

    monkeypatch.setattr(distributed, "gather_objects", two)
    with pytest.raises(DinoError, match=r"optim\.epochs: 100 for narrow, 7 for wide; set it in the shared file only"):
        check_alike("wide", longer)


def test_a_damaged_checkpoint_of_one_student_is_an_error_with_a_way_out(tmp_path: Path) -> None:
    def damaged(path: Path) -> None:
        raise checkpoint.Damaged(f"the checkpoint {path} cannot be read: torn")

    folder = checkpoint.Checkpoints(tmp_path)
    trainer: Any = SimpleNamespace(checkpoints=folder, multi_student=True, notes=[], read=damaged)
    with pytest.raises(DinoError, match=r"torn; rename .*/7, and all students resume from an older checkpoint"):
        Trainer.resume(trainer, 7)


def test_students_resume_from_an_iteration_that_all_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    assert common_iteration([]) is None
    monkeypatch.setattr(distributed, "gather_objects", lambda mine: [[4, 9, 14], [4, 9], mine])
    assert common_iteration([9, 14]) == 9
    assert common_iteration([]) is None
