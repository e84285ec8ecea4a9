"""Options beyond the reference: iBOT at visible patches, head-only EMA, SIGReg. Off, the recorded steps are as they were."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from toy_training import run

from dinov3 import checkpoint, losses
from dinov3.config.train import IbotConfig, OptimConfig, load_config
from dinov3.errors import DinoError
from dinov3.optim import apply_schedules, build_optimizer
from tests.train.test_method import RECORDED, VARIANTS, Variant, recorded_batch, step_values

VALUES = step_values(RECORDED["plain"][0])


# ---- iBOT at visible patches -----------------------------------------------------------------------------------------


def test_the_visible_loss_is_its_plain_loop_and_unmasked_crops_count() -> None:
    method = Variant(ibot={"visible_loss_weight": 0.3}).build()
    batch = recorded_batch(0)
    masks = batch.masks.clone()
    masks[1] = False
    batch = replace(
        batch,
        masks=masks,
        mask_indices=masks.flatten().nonzero().flatten(),
        masks_weight=losses.masked_patch_weights(masks),
        n_masked=int(masks.sum()),
    )
    C, P = masks.shape
    with torch.no_grad():
        targets = method.targets(batch, VALUES)
        terms = {t.name: t for t in method.predict(batch, targets, VALUES)}
        teacher = method.ema.backbone(batch.global_crops, is_training=True)["x_norm_patchtokens"].flatten(0, 1)
        balanced = losses.sinkhorn_knopp(method.ema.ibot_head(teacher), VALUES.teacher_temp)  # all tokens together
        student = method.student.backbone([batch.global_crops, batch.local_crops], [masks, None], is_training=True)[0][
            "x_norm_patchtokens"
        ].flatten(0, 1)
        logits = method.student.ibot_head(student)
    totals = {"ibot_loss": 0.0, "ibot_visible_loss": 0.0}
    for c in range(C):
        for masked, name in ((True, "ibot_loss"), (False, "ibot_visible_loss")):
            errors = [
                -float((balanced[c * P + p] * (logits[c * P + p] / 0.1).log_softmax(-1)).sum())
                for p in range(P)
                if bool(masks[c, p]) == masked
            ]
            if errors:
                totals[name] += sum(errors) / len(errors) / C
    for name, total in totals.items():
        assert float(terms[name].value) == pytest.approx(total, rel=1e-5), name
    assert terms["ibot_loss"].weight == 1.0
    assert terms["ibot_visible_loss"].weight == 0.3


def visible_disagreement(weight: float) -> float:
    """Cross-entropy of student and teacher at visible patches after 20 steps with a weight of the loss there."""
    torch.manual_seed(0)
    method = Variant(ibot={"visible_loss_weight": weight}).build()
    optimizer = build_optimizer(method.student.parts(), OptimConfig())
    values = replace(VALUES, lr=3e-3, last_layer_lr=3e-3)
    apply_schedules(optimizer, values)
    for step in range(20):
        batch = recorded_batch(step % 2)
        optimizer.zero_grad()
        method.predict(batch, method.targets(batch, values), values).total().backward()
        optimizer.step()
        method.update_ema(0.9)
    method.ibot = IbotConfig(visible_loss_weight=1.0)
    with torch.no_grad():
        batch = recorded_batch(0)
        terms = method.predict(batch, method.targets(batch, values), values)
    return next(float(t.value) for t in terms if t.name == "ibot_visible_loss")


def test_student_and_teacher_agree_more_at_visible_patches_after_the_same_steps() -> None:
    without, with_ = visible_disagreement(0.0), visible_disagreement(1.0)
    assert with_ < 0.7 * without


# ---- SIGReg ----------------------------------------------------------------------------------------------------------


def test_sigreg_sees_the_bottleneck_of_global_crops_before_its_length_is_divided_out() -> None:
    method = Variant(dino={"sigreg_loss_weight": 0.05}).build()
    batch = replace(recorded_batch(0), step=7)
    terms = {t.name: t for t in method.predict(batch, method.targets(batch, VALUES), VALUES)}
    out = method.student.backbone([batch.global_crops, batch.local_crops], [batch.masks, None], is_training=True)[0][
        "x_norm_clstoken"
    ]
    directions = losses.sigreg_directions(12, 7)
    expected = losses.sigreg_loss(method.student.dino_head.mlp(out), directions)
    assert float(terms["sigreg_loss"].value.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    assert terms["sigreg_loss"].weight == 0.05
    assert terms["koleo_loss"].weight == 0  # logged, for the warning of a collapse
    assert math.isfinite(float(terms["koleo_loss"].value.detach()))


def test_sigreg_can_see_the_cls_tokens_of_global_crops() -> None:
    method = Variant(dino={"sigreg_loss_weight": 2.0, "sigreg_on": "cls"}).build()
    batch = replace(recorded_batch(0), step=7)
    terms = {t.name: t for t in method.predict(batch, method.targets(batch, VALUES), VALUES)}
    cls = method.student.backbone([batch.global_crops, batch.local_crops], [batch.masks, None], is_training=True)[0][
        "x_norm_clstoken"
    ]
    expected = losses.sigreg_loss(cls, losses.sigreg_directions(cls.shape[1], 7))
    assert float(terms["sigreg_loss"].value.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)


def test_a_koleo_weight_beside_sigreg_is_a_note() -> None:
    data = "train.dataset_path=/images"
    _, notes = load_config(None, [data, "dino.sigreg_loss_weight=0.05"])
    assert any("SIGReg" in note and "koleo" in note for note in notes)
    _, notes = load_config(None, [data, "dino.sigreg_loss_weight=0.05", "dino.koleo_loss_weight=0"])
    assert not any("SIGReg" in note for note in notes)


# ---- head-only EMA ---------------------------------------------------------------------------------------------------


def steps(variant: Variant, momentum: float) -> tuple[list[float], dict[str, torch.Tensor], int]:
    """Losses of two steps, the average's weights afterwards, bytes of both networks' parameters."""
    method = variant.build()
    optimizer = build_optimizer(method.student.parts(), OptimConfig())
    totals = []
    for step in range(2):
        values = replace(VALUES, lr=1e-2, last_layer_lr=1e-2)
        batch = recorded_batch(step)
        apply_schedules(optimizer, values)
        optimizer.zero_grad()
        torch.manual_seed(3)
        terms = method.predict(batch, method.targets(batch, values), values)
        terms.total().backward()
        totals.append(float(terms.total().detach()))
        optimizer.step()
        method.update_ema(momentum)
    state = {name: x.clone() for name, x in method.ema.state_dict().items()}
    storages = {p.data_ptr(): p.nbytes for n in (method.student, method.ema) for p in n.parameters()}
    return totals, state, sum(storages.values())


def test_head_only_ema_with_momentum_zero_is_the_plain_method_with_fewer_bytes() -> None:
    """With drop path and drawn positions, so that a teacher in training mode would be noticed."""
    variant = replace(VARIANTS["stochastic_seed99"], seed=None)
    plain, heads = (steps(replace(variant, head_only_ema=h), 0.0) for h in (False, True))
    assert plain[0] == heads[0]
    assert all(torch.equal(plain[1][name], x) for name, x in heads[1].items())
    method = variant.build()
    assert plain[2] - heads[2] == sum(p.nbytes for p in method.student.backbone.parameters())
    slower = steps(replace(variant, head_only_ema=True), 0.9)
    assert slower[0][0] == heads[0][0]
    assert slower[0][1] != heads[0][1]


def test_the_shared_backbone_is_trained_and_the_averaged_heads_are_not() -> None:
    method = replace(VARIANTS["stochastic_seed99"], head_only_ema=True).build()
    batch = recorded_batch(0)
    targets = method.targets(batch, VALUES)
    assert torch.equal(targets.dino, method.targets(batch, VALUES).dino)  # nothing was drawn
    assert all(module.training for module in method.student.modules())
    method.predict(batch, targets, VALUES).total().backward()
    assert all(p.grad is not None for p in method.student.parameters())
    for head in (method.ema.dino_head, method.ema.ibot_head):
        assert all(p.grad is None and not p.requires_grad for p in head.parameters())


def test_a_run_with_head_only_ema_dumps_the_students_backbone_and_resumes_bit_identical(
    toy: str, images: Path, tmp_path: Path
) -> None:
    knn = (f"evaluation.knn_train_dataset={images}", f"evaluation.knn_val_dataset={images}", "evaluation.knn_k=3")
    heads = ("teacher.ema=heads", "evaluation.eval_period_iterations=5", *knn)
    whole = run(toy, images, tmp_path / "whole", *heads)
    assert run(toy, images, tmp_path / "parts", *heads, "run.time_limit_minutes=1e-6").iterations == 1
    assert run(toy, images, tmp_path / "parts", *heads).finished
    a, b = (checkpoint.read_tensors(tmp_path / name / "ckpt" / "11") for name in ("whole", "parts"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert whole.knn.keys() == {4, 9, 11}
    dumped = torch.load(tmp_path / "whole" / "eval" / "training_11" / "teacher_checkpoint.pth", weights_only=True)
    for name, value in dumped["teacher"].items():
        assert torch.equal(value, a[f"model.model_ema.{name}"])
        assert torch.equal(value, a[f"model.student.{name}"]) == name.startswith("backbone."), name


def test_a_run_with_muon_resumes_bit_identical_and_keeps_one_moment_of_a_matrix(
    toy: str, images: Path, tmp_path: Path
) -> None:
    muon = "optim.optimizer=muon"
    run(toy, images, tmp_path / "whole", muon)
    assert run(toy, images, tmp_path / "parts", muon, "run.time_limit_minutes=1e-6").iterations == 1
    with pytest.raises(DinoError, match=r"no optimizer.state.*qkv.weight.step .*made by another configuration"):
        run(toy, images, tmp_path / "parts")
    assert run(toy, images, tmp_path / "parts", muon).finished
    a, b = (checkpoint.read_tensors(tmp_path / name / "ckpt" / "11") for name in ("whole", "parts"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    state = "optimizer.state.backbone.blocks.0.mlp.fc1"
    assert {name.removeprefix(state) for name in a if name.startswith(state)} == {
        ".weight.exp_avg", ".bias.step", ".bias.exp_avg", ".bias.exp_avg_sq",
    }  # fmt: skip


def test_a_run_that_averaged_everything_resumes_with_the_students_backbone(
    toy: str, images: Path, tmp_path: Path
) -> None:
    run(toy, images, tmp_path / "run", "optim.epochs=1")
    before = checkpoint.read_tensors(tmp_path / "run" / "ckpt" / "3")
    run(toy, images, tmp_path / "run", "optim.epochs=2", "teacher.ema=heads", "optim.lr=0", "optim.min_lr=0")
    after = checkpoint.read_tensors(tmp_path / "run" / "ckpt" / "7")
    name = "backbone.norm.weight"
    assert not torch.equal(before[f"model.model_ema.{name}"], before[f"model.student.{name}"])
    assert torch.equal(after[f"model.model_ema.{name}"], before[f"model.student.{name}"])


def test_head_only_ema_beside_a_frozen_teacher_is_refused() -> None:
    overrides = ["train.dataset_path=/i", "teacher.ema=heads", "distillation.enabled=true"]
    with pytest.raises(DinoError, match=r"teacher\.ema .*no meaning beside a frozen teacher"):
        load_config(None, [*overrides, "distillation.full_cfg_path=a", "distillation.checkpoint_path=b"])
