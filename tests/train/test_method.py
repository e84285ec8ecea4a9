"""The method against recorded steps of a tiny model: metrics, gradients, clipped norms, student and average afterwards."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from paths import GOLDEN_LOSSES
from safetensors.torch import load_file
from torch import Tensor

from dinov3.config.train import DinoConfig, GramConfig, IbotConfig, OptimConfig
from dinov3.data.crops import CropBatch
from dinov3.errors import DinoError
from dinov3.heads.projection import ProjectionHead
from dinov3.models.architectures import ViTConfig
from dinov3.models.vit import Block, RopeEmbedding, VisionTransformer
from dinov3.optim import StepValues, apply_schedules, build_optimizer, clip_per_module
from dinov3.train.method import Network, SelfDistillation, copy_weights, gram_refresh_due

RECORDED: dict[str, list[dict[str, float]]] = json.loads((GOLDEN_LOSSES / "step_metrics.json").read_text())
CLIP = 3.0


def normal(seed: int, shape: tuple[int, ...], scale: float = 1.0) -> np.ndarray:
    return np.random.Generator(np.random.PCG64(seed)).standard_normal(shape) * scale


def tiny_network(heads: bool = True, **options: Any) -> Network:
    config = ViTConfig(
        **{
            "patch_size": 8,
            "embed_dim": 32,
            "depth": 2,
            "num_heads": 2,
            "n_storage_tokens": 2,
            "layerscale_init": 1e-5,
            "mask_k_bias": True,
            "untie_global_and_local_cls_norm": True,
        }
        | options
    )
    if not heads:
        return Network(VisionTransformer(config))
    dino = ProjectionHead(32, 24, hidden_dim=20, bottleneck_dim=12)
    ibot = ProjectionHead(32, 18, hidden_dim=20, bottleneck_dim=12)
    return Network(VisionTransformer(config), dino, ibot)


def recorded_weights(network: Network) -> Network:
    weights = load_file(GOLDEN_LOSSES / "step_weights_init.safetensors")
    weights["backbone.rope_embed.periods"] = network.state_dict()["backbone.rope_embed.periods"]  # dtype may be bf16
    network.load_state_dict(weights, strict=True)
    return network


def recipe_weights(network: Network, seed: int) -> Network:
    """Weights from the recipe of the recorded numbers: a seed for each name, a scale by its kind."""
    state = network.state_dict()
    for i, name in enumerate(sorted(state)):
        shape = tuple(state[name].shape)
        if name.endswith(("periods", "bias_mask")):
            continue
        if name.endswith("gamma"):
            value = np.full(shape, 0.3)
        elif "norm" in name and name.endswith("weight"):
            value = 1 + normal(seed + i, shape, 0.05)
        elif "token" in name:
            value = normal(seed + i, shape, 0.2)
        elif "last_layer" in name:
            value = normal(seed + i, shape, 0.3)
        elif len(shape) == 1:
            value = normal(seed + i, shape, 0.02)
        else:
            value = normal(seed + i, shape, float(np.prod(shape[1:])) ** -0.5)
        state[name].copy_(torch.from_numpy(value.astype(np.float32)))
    return network


def recorded_batch(step: int, *, gram: bool = False) -> CropBatch:
    tensors = load_file(GOLDEN_LOSSES / "step_batches.safetensors")
    masks = tensors[f"step{step}.collated_masks"].bool()
    return CropBatch(
        global_crops=tensors[f"step{step}.collated_global_crops"],
        local_crops=tensors[f"step{step}.collated_local_crops"],
        gram_crops=tensors[f"step{step}.collated_gram_teacher_crops"] if gram else None,
        masks=masks,
        mask_indices=masks.flatten().nonzero().flatten(),
        masks_weight=(1 / masks.sum(1, keepdim=True).clamp(min=1).float()).expand_as(masks)[masks],
        n_masked=int(masks.sum()),
    )


def step_values(row: dict[str, float]) -> StepValues:
    return StepValues(
        lr=row.get("lr", 0.0),
        last_layer_lr=row.get("lr", 0.0),
        weight_decay=row.get("wd", 0.0),
        momentum=row.get("momentum", 1.0),
        teacher_temp=row.get("teacher_temp", 0.07),
        local_loss_weight=row["dino_local_loss_weight"],
        gram_loss_weight=row.get("gram_loss_weight", 0.0),
    )


@dataclass
class Variant:
    """A recorded setting: what differs from `plain`."""

    vit: dict[str, Any] | None = None
    dino: dict[str, Any] | None = None
    ibot: dict[str, Any] | None = None
    gram: dict[str, Any] | None = None
    gram_crops: bool = False
    gram_teacher_seed: int | None = None
    teacher_seed: int | None = None
    seed: int | None = None
    head_only_ema: bool = False
    rtol: float = 1e-5

    def build(self) -> SelfDistillation:
        vit = self.vit or {}
        student, ema = (recorded_weights(tiny_network(**vit)) for _ in range(2))
        if self.head_only_ema:
            ema = Network(student.backbone, ema.dino_head, ema.ibot_head)
        return SelfDistillation(
            student,
            ema,
            dino=DinoConfig(**(self.dino or {})),
            ibot=IbotConfig(**(self.ibot or {})),
            gram=GramConfig(**(self.gram or {})),
            teacher=recipe_weights(tiny_network(), self.teacher_seed) if self.teacher_seed is not None else None,
            gram_teacher=(
                recipe_weights(tiny_network(heads=False), self.gram_teacher_seed)
                if self.gram_teacher_seed is not None
                else None
            ),
        )


VARIANTS = {
    "plain": Variant(),
    "gram_hires": Variant(gram={"use_loss": True, "img_level": True}, gram_crops=True, gram_teacher_seed=7000),
    "gram_ema_masked": Variant(
        gram={
            "use_loss": True,
            "ema_teacher": True,
            "rep_update": False,
            "tokens_used": "masked",
            "compute_stats": True,
        }
    ),
    "all_pairs_reweighted_koleo_topk2": Variant(
        dino={"global_ignore_diagonal": False, "koleo_loss_distributed": True, "koleo_topk": 2}
    ),
    "stochastic_seed99": Variant(
        vit={
            "drop_path_rate": 0.3,
            "pos_embed_rope_shift_coords": 0.1,
            "pos_embed_rope_jitter_coords": 1.5,
            "pos_embed_rope_rescale_coords": 2.0,
        },
        seed=99,
    ),
    "plain_rope_bf16": Variant(vit={"pos_embed_rope_dtype": "bf16"}, rtol=2e-3),
    "distillation_seed8000": Variant(teacher_seed=8000),
}


def close(got: Tensor, expected: Tensor, tolerance: float, name: str) -> None:
    worst = (got - expected).abs().max() / expected.abs().max().clamp(min=1e-12)
    assert worst <= tolerance, f"{name}: relative error {worst:.2e} of the largest entry, allowed {tolerance:.0e}"


@pytest.mark.parametrize("name", VARIANTS)
def test_recorded_steps_are_reproduced(name: str) -> None:
    variant, rows = VARIANTS[name], RECORDED[name]
    method = variant.build()
    parts = method.student.parts()
    optimizer = build_optimizer(parts, OptimConfig(layerwise_decay=0.9, patch_embed_lr_mult=0.2))
    file = GOLDEN_LOSSES / f"step_{name}.safetensors"
    tensors = load_file(file) if file.exists() else {}
    for step, row in enumerate(rows):
        values, batch = step_values(row), recorded_batch(step, gram=variant.gram_crops)
        apply_schedules(optimizer, values)
        optimizer.zero_grad()
        targets = method.targets(batch, values)
        if variant.seed is not None:
            torch.manual_seed(variant.seed)
        terms = method.predict(batch, targets, values)
        log = terms.log()
        for key in row.keys() & log.keys():
            assert float(log[key]) == pytest.approx(row[key], rel=variant.rtol), key
        assert {k for k in row if k.endswith("_loss")} == log.keys()
        terms.total().backward()
        if step == 0:
            for key, p in method.student.named_parameters():
                if f"grad_step0.{key}" in tensors:
                    close(p.grad, tensors[f"grad_step0.{key}"], 2e-4, key)
        norms = clip_per_module(parts, CLIP)
        for part, norm in norms.items():
            if f"{part}_grad_norm" in row:
                assert float(norm) == pytest.approx(row[f"{part}_grad_norm"], rel=max(2e-4, variant.rtol)), part
        optimizer.step()
        method.update_ema(values.momentum)
    for kind, network in (("student", method.student), ("ema", method.ema)):
        for key, value in network.state_dict().items():
            if f"{kind}_after.{key}" in tensors:
                close(value, tensors[f"{kind}_after.{key}"], 5e-4, f"{kind} {key}")


def test_every_recorded_variant_is_tested() -> None:
    assert VARIANTS.keys() == RECORDED.keys()


def test_teachers_get_no_gradient() -> None:
    variant = replace(VARIANTS["gram_hires"], teacher_seed=8000)
    method = variant.build()
    values, batch = step_values(RECORDED["gram_hires"][0]), recorded_batch(0, gram=True)
    method.predict(batch, method.targets(batch, values), values).total().backward()
    assert all(p.grad is not None for p in method.student.parameters())
    for network in (method.ema, method.teacher, method.gram_teacher):
        assert network is not None
        assert all(p.grad is None and not p.requires_grad for p in network.parameters())
    assert method.student.training
    assert not method.teacher.training


def test_gram_teacher_is_not_run_while_its_weight_is_zero_and_nothing_else_changes() -> None:
    row = RECORDED["plain"][0]
    batch = recorded_batch(0, gram=True)
    gradients, calls = [], []
    for name in ("plain", "gram_hires"):
        method = VARIANTS[name].build()
        if method.gram_teacher is not None:
            method.gram_teacher.backbone.register_forward_hook(lambda *_: calls.append(1))
        values = step_values(row)
        terms = method.predict(batch, method.targets(batch, values), values)
        terms.total().backward()
        assert not calls
        gradients.append({k: p.grad for k, p in method.student.named_parameters()})
        if method.gram_teacher is not None:  # and with a weight it does run
            method.targets(batch, replace(values, gram_loss_weight=1.0))
            assert calls
    assert all(torch.equal(gradients[0][k], gradients[1][k]) for k in gradients[0])


def test_gram_loss_of_equal_networks_on_unmasked_crops_is_zero() -> None:
    method = VARIANTS["gram_hires"].build()
    assert method.gram_teacher is not None
    copy_weights(method.gram_teacher.backbone, method.student.backbone)
    batch, values = recorded_batch(0), step_values(RECORDED["gram_hires"][0])
    batch = replace(
        batch,
        masks=torch.zeros_like(batch.masks),
        mask_indices=batch.mask_indices[:0],
        masks_weight=batch.masks_weight[:0],
    )
    terms = {t.name: float(t.value.detach()) for t in method.predict(batch, method.targets(batch, values), values)}
    assert terms["gram_loss"] == pytest.approx(0, abs=1e-10)
    assert terms["ibot_loss"] == 0  # nothing masked: nothing to predict, and no NaN


def test_refresh_makes_the_gram_teacher_the_ema_teacher() -> None:
    method = VARIANTS["gram_hires"].build()
    method.gram = GramConfig(use_loss=True, update_frequency=10, it_first_update=20, max_updates=1)
    assert method.gram_teacher is not None
    before = method.gram_teacher.backbone.state_dict()["norm.weight"].clone()
    assert not method.refresh_gram(9)
    assert torch.equal(method.gram_teacher.backbone.state_dict()["norm.weight"], before)
    assert method.refresh_gram(19)
    for a, b in zip(method.gram_teacher.backbone.parameters(), method.ema.backbone.parameters()):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "options, due",
    [
        ({"update_frequency": 10}, [10, 20, 30, 40, 50]),
        ({"update_frequency": 10, "it_first_update": 30, "max_updates": 2}, [30, 40]),
        ({"update_frequency": 10, "it_first_update": 25, "max_updates": 2}, [30, 40]),
        ({"update_frequency": 10, "max_updates": 0}, []),
        ({"update_frequency": 10, "rep_update": False}, []),
        ({"update_frequency": 10, "it_load_ema_teacher": 23, "max_updates": 3}, [23, 30]),
    ],
)
def test_refreshes_are_a_function_of_the_iteration(options: dict[str, Any], due: list[int]) -> None:
    gram = GramConfig(use_loss=True, **options)
    assert [it + 1 for it in range(50) if gram_refresh_due(gram, it)] == due


def test_ema_moves_by_exactly_its_momentum() -> None:
    method = VARIANTS["plain"].build()
    with torch.no_grad():
        for p in method.student.parameters():
            p.add_(1.0)
    before = [p.clone() for p in method.ema.parameters()]
    method.update_ema(0.9)
    for e, was, s in zip(method.ema.parameters(), before, method.student.parameters()):
        torch.testing.assert_close(e, 0.9 * was + 0.1 * s)


def test_teacher_of_half_the_stride_sees_crops_of_half_the_size() -> None:
    """W13: a student of stride 16 on 64 px has the 4×4 tokens that a teacher of stride 8 has of 32 px."""
    student = tiny_network(patch_size=16)
    method = SelfDistillation(
        student,
        tiny_network(patch_size=16),
        dino=DinoConfig(),
        ibot=IbotConfig(),
        gram=GramConfig(),
        teacher=recipe_weights(tiny_network(), 8000),
        teacher_scale=2.0,
    )
    student.init_weights()
    seen: list[tuple[int, ...]] = []
    method.teacher.backbone.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)))
    batch = recorded_batch(0)
    batch = replace(batch, global_crops=torch.nn.functional.interpolate(batch.global_crops, (64, 64)))
    values = step_values(RECORDED["plain"][0])
    terms = method.predict(batch, method.targets(batch, values), values)
    assert seen == [(8, 3, 32, 32)]
    assert torch.isfinite(terms.total())
    with pytest.raises(DinoError, match="the student has 16 patches of a global crop, the masks have 4"):
        method.predict(replace(batch, masks=batch.masks[:, :4]), method.targets(batch, values), values)
    method.teacher_scale = 1.0  # what the reference does: 64 teacher patches, indices of 16
    with pytest.raises(DinoError, match="64 patches of a global crop, the masks have 16"):
        method.targets(batch, values)


def test_gram_loss_without_a_gram_teacher_is_refused() -> None:
    with pytest.raises(DinoError, match="needs a Gram teacher"):
        Variant(gram={"use_loss": True}).build()


# ---- what is random inside the student ------------------------------------------------------------------------------


def test_stochastic_depth_draws_and_adds_as_recorded() -> None:
    """Four permutations a block: attention of both groups, then FFN of both; the kept rows scaled by b / kept."""
    recorded = load_file(GOLDEN_LOSSES / "stochastic_layers.safetensors")
    config = ViTConfig(
        embed_dim=32, num_heads=2, depth=1, layerscale_init=1e-5, norm_layer="layernormbf16", drop_path_rate=0.4
    )
    block = Block(config)
    block.load_state_dict({k.removeprefix("block."): v for k, v in recorded.items() if k.startswith("block.")})
    groups = [recorded["x_a"], recorded["x_b"]]
    still = (torch.zeros(1, 16), torch.ones(1, 16))  # a rotation by nothing: the recorded block has no positions
    torch.manual_seed(41)
    for name, y in zip("ab", block.train()(groups, [still, still])):
        close(y, recorded[f"y_{name}"], 1e-5, name)
        changed = (y != recorded[f"x_{name}"]).flatten(1).any(1).nonzero().flatten().tolist()
        kept = {int(i) for branch in ("attn", "mlp") for i in recorded[f"keep_{branch}_{name}"]}
        assert set(changed) == kept
    for name, y in zip("ab", block.eval()(groups, [still, still])):
        close(y, recorded[f"y_{name}_eval"], 1e-5, name)


def test_positions_are_augmented_as_recorded_and_only_in_training() -> None:
    recorded = load_file(GOLDEN_LOSSES / "stochastic_layers.safetensors")
    rope = RopeEmbedding(
        ViTConfig(
            embed_dim=32,
            num_heads=2,
            pos_embed_rope_shift_coords=0.2,
            pos_embed_rope_jitter_coords=1.5,
            pos_embed_rope_rescale_coords=2.0,
        )
    )
    torch.manual_seed(31)
    sin, cos = rope.train()(3, 4)
    close(sin, recorded["rope_train_sin"], 1e-5, "sin")
    close(cos, recorded["rope_train_cos"], 1e-5, "cos")
    sin, cos = rope.eval()(3, 4)
    close(sin, recorded["rope_eval_sin"], 1e-6, "sin")
    close(cos, recorded["rope_eval_cos"], 1e-6, "cos")
