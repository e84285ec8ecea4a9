"""Schedules, groups, clipping and averaging against recorded numbers and plain re-statements."""

from __future__ import annotations

import copy
import json
import math
from functools import partial
from typing import Any

import pytest
import torch
from paths import GOLDEN_LOSSES
from torch import nn

from dinov3 import optim as O
from dinov3.config.train import OptimConfig, TrainConfig, load_config
from dinov3.errors import DinoError
from dinov3.models.architectures import ConvNeXtConfig, ViTConfig
from dinov3.models.convnext import ConvNeXt
from dinov3.models.vit import VisionTransformer

HERE = GOLDEN_LOSSES
SCHEDULES = json.loads((HERE / "schedules.json").read_text())
GROUPS = json.loads((HERE / "param_groups.json").read_text())
IMAGES = "train.dataset_path=/images"


# ---- schedules ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", SCHEDULES["cosine_v1"], ids=lambda c: str(sorted(c["args"])))
def test_the_first_generator_gives_the_recorded_values(case):
    words = {
        "base_value": "base",
        "final_value": "final",
        "total_iters": "total",
        "warmup_iters": "warmup",
        "start_warmup_value": "start",
        "freeze_iters": "freeze",
        "trunc_extra": "trunc_extra",
    }
    schedule = partial(O.cosine_v1, **{words[k]: v for k, v in case["args"].items()})
    total = case["args"]["total_iters"]
    assert [schedule(i) for i in range(total)] == pytest.approx(case["values"], rel=1e-12, abs=1e-18)
    assert schedule(total) == schedule(10 * total) == case["value_at_total_iters"]


@pytest.mark.parametrize("case", SCHEDULES["warmup_cosine_v2"], ids=lambda c: str(c["args"]))
def test_the_second_generator_gives_the_recorded_values(case):
    words = {"warmup_iterations": "warmup", "total_iterations": "total", "cosine_iterations": "cosine"}
    schedule = partial(O.warmup_cosine_v2, **{words.get(k, k): v for k, v in case["args"].items()})
    total = case["args"]["total_iterations"]
    assert [schedule(i) for i in range(total)] == pytest.approx(case["values"], rel=1e-12, abs=1e-18)


def test_a_schedule_that_does_not_fit_is_refused():
    with pytest.raises(DinoError, match="cannot hold 5 warm-up and 6 cosine"):
        O.warmup_cosine_v2(0, start=0, peak=1, end=0, warmup=5, total=10, cosine=6)
    with pytest.raises(DinoError, match="cannot hold"):
        O.cosine_v1(0, base=1, final=0, total=4, warmup=5)


def test_a_warm_up_of_one_step_is_its_start():
    assert O.cosine_v1(0, base=1.0, final=0.0, total=3, warmup=1, start=0.25) == 0.25


def test_the_rate_is_scaled_with_the_batch():
    assert 1e-3 * O.lr_factor("sqrt_wrt_1024", 2048) == pytest.approx(5.657e-3, rel=1e-4)
    assert 5e-5 * O.lr_factor("sqrt_wrt_1024", 4096) == pytest.approx(4e-4)
    assert O.lr_factor("linear_wrt_256", 512) == 2
    assert O.lr_factor("none", 512) == O.lr_factor(None, 512) == 1


def test_accumulated_batches_count_as_one_large_batch():
    def peak(*overrides):
        return O.build_schedules(load_config(None, [IMAGES, *overrides])[0], 2).lr(12_500)

    assert peak("train.batch_size_per_gpu=64") == peak("train.batch_size_per_gpu=16", "optim.accumulation_steps=4")


def test_the_start_and_the_v1_end_of_the_rate_are_not_scaled():
    config, _ = load_config(None, [IMAGES, "train.batch_size_per_gpu=4096"])
    assert O.build_schedules(config, 1).lr(10**9) == 1e-6
    overrides = [
        "schedules.lr={start: 1e-7, peak: 1e-4, end: 1e-5, warmup_epochs: 1}",
        "schedules.weight_decay={start: 0, peak: 0, end: 0}",
        "schedules.momentum={start: 1, peak: 1, end: 1}",
        "schedules.teacher_temp={start: 1, peak: 1, end: 1}",
    ]
    config, _ = load_config(None, [IMAGES, "train.batch_size_per_gpu=4096", *overrides])
    lr = O.build_schedules(config, 1).lr
    assert (lr(0), lr(1250), lr(10**9)) == pytest.approx((1e-7, 8e-4, 8e-5))


def test_the_last_layer_is_frozen_and_then_follows_the_rate():
    config, _ = load_config(None, [IMAGES])
    schedules = O.build_schedules(config, 1)
    assert schedules.at(1249).last_layer_lr == 0.0 < schedules.at(1249).lr
    assert schedules.at(1250).last_layer_lr == schedules.at(1250).lr


def test_loss_weights_are_constants_unless_scheduled():
    plain = O.build_schedules(load_config(None, [IMAGES])[0], 1).at(5)
    assert (plain.local_loss_weight, plain.gram_loss_weight) == (1.0, 0.0)
    overrides = ["gram.use_loss=true", "gram.ckpt=x", "gram.loss_weight=1.5", "dino.reweight_dino_local_loss=true"]
    weighted = O.build_schedules(load_config(None, [IMAGES, *overrides])[0], 1).at(5)
    assert (weighted.local_loss_weight, weighted.gram_loss_weight) == (0.5, 1.5)


def test_the_logged_fields_have_the_names_of_the_metrics_file():
    fields = O.build_schedules(load_config(None, [IMAGES])[0], 1).at(0).fields()
    assert list(fields) == ["lr", "wd", "mom", "last_layer_lr", "teacher_temp"]


# ---- groups ---------------------------------------------------------------------------------------------------------


def tiny_vit(depth: int = 2) -> VisionTransformer:
    return VisionTransformer(
        ViTConfig(
            patch_size=8,
            embed_dim=32,
            depth=depth,
            num_heads=2,
            n_storage_tokens=2,
            layerscale_init=1e-5,
            mask_k_bias=True,
            untie_global_and_local_cls_norm=True,
        )
    )


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(32, 20), nn.GELU(), nn.Linear(20, 20), nn.GELU(), nn.Linear(20, 12))
        self.last_layer = nn.Linear(12, 24, bias=False)


def rows(module: nn.Module, **options: float) -> dict[str, tuple[float, float, bool]]:
    return {r.name: (r.lr_multiplier, r.wd_multiplier, r.is_last_layer) for r in O.multipliers(module, **options)}


def recorded(entries: list[dict]) -> dict[str, tuple[float, float, bool]]:
    return {r["name"]: (pytest.approx(r["lr_multiplier"]), r["wd_multiplier"], r["is_last_layer"]) for r in entries}


def test_the_multipliers_of_a_vit_and_its_heads_are_the_recorded_ones():
    decays = {"layerwise_decay": 0.9, "patch_embed_lr_mult": 0.2}
    assert rows(tiny_vit(), **decays) == recorded(GROUPS["tiny_vit_depth2"]["backbone"])
    assert rows(Head(), **decays) == recorded(GROUPS["tiny_vit_depth2"]["dino_head"])
    assert rows(Head(), **decays) == recorded(GROUPS["tiny_vit_depth2"]["ibot_head"])


def test_the_multipliers_of_a_convnext_are_the_recorded_ones():
    with torch.device("meta"):
        model = ConvNeXt(ConvNeXtConfig())
    ours = rows(model, layerwise_decay=0.9, patch_embed_lr_mult=0.2)
    expected = recorded(GROUPS["convnext_tiny"])
    assert {name: ours[name] for name in expected} == expected
    assert sorted({row[:2] for row in ours.values()}) == [tuple(x) for x in GROUPS["convnext_tiny_distinct"]]


@pytest.mark.parametrize(
    "name, depth", [("vit_large_decay0.9", 24), ("vit_7b_decay0.98", 40), ("vit_large_decay0.99", 24)]
)
def test_layerwise_decay_has_its_closed_form(name, depth):
    decay, expected = float(name.split("decay")[1]), GROUPS["layerwise_decay_closed_form"][name]
    assert O.layer_lr("cls_token", depth, decay) == pytest.approx(expected["tokens_and_patch_embed_before_mult"])
    assert O.layer_lr("blocks.0.norm1.weight", depth, decay) == pytest.approx(expected["block_0"])
    assert O.layer_lr(f"blocks.{depth - 1}.norm1.weight", depth, decay) == pytest.approx(expected[f"block_{depth - 1}"])
    assert O.layer_lr("norm.weight", depth, decay) == expected["final_norms"]


def test_parameters_with_equal_multipliers_share_a_group_in_the_recorded_order():
    groups = O.param_groups({"backbone": tiny_vit()}, OptimConfig(layerwise_decay=0.9, patch_embed_lr_mult=0.2))
    ours = [(g["lr_multiplier"], g["wd_multiplier"], g["is_last_layer"], len(g["params"])) for g in groups]
    recorded_groups = [
        (pytest.approx(g["lr_multiplier"]), g["wd_multiplier"], g["is_last_layer"], g["n_tensors"])
        for g in GROUPS["fused_backbone"]
    ]
    assert ours == recorded_groups


def test_without_multi_tensor_every_parameter_has_its_group():
    model = tiny_vit()
    assert len(O.param_groups({"m": model}, OptimConfig(multi_tensor_optim=False))) == len(list(model.parameters()))


def test_the_head_decay_multiplier_acts_on_the_decayed_weights_of_the_dino_head_alone():
    modules = {"dino_head": Head(), "ibot_head": Head()}
    groups = O.param_groups(modules, OptimConfig(dino_head_wd_multiplier=0.5))
    decay = {id(p): g["wd_multiplier"] for g in groups for p in g["params"]}
    for part, factor in (("dino_head", 0.5), ("ibot_head", 1.0)):
        for name, p in modules[part].named_parameters():
            assert decay[id(p)] == (0.0 if name.endswith("bias") else factor), (part, name)


def test_wrappers_do_not_change_the_groups():
    model = tiny_vit()
    before = rows(model, layerwise_decay=0.9)
    model.blocks[0] = torch.compile(model.blocks[0])
    assert "blocks.0._orig_mod.norm1.weight" in dict(model.named_parameters())
    assert rows(model, layerwise_decay=0.9) == before


def test_schedules_reach_every_group_with_its_multipliers():
    modules = {"backbone": tiny_vit(), "dino_head": Head()}
    optimizer = O.build_optimizer(modules, OptimConfig())
    assert all(g["lr"] == 0 and g["weight_decay"] == 0 for g in optimizer.param_groups)
    values = O.StepValues(2.0, 0.0, 0.4, 0.99, 0.07, 1.0, 0.0)
    O.apply_schedules(optimizer, values)
    for group in optimizer.param_groups:
        assert group["lr"] == (0.0 if group["is_last_layer"] else 2.0) * group["lr_multiplier"]
        assert group["weight_decay"] == 0.4 * group["wd_multiplier"]
    assert {g["betas"] for g in optimizer.param_groups} == {(0.9, 0.999)}


def test_frozen_parameters_are_left_out_and_nothing_to_train_is_an_error():
    head = Head()
    head.mlp.requires_grad_(False)
    optimizer = O.build_optimizer({"dino_head": head}, OptimConfig())
    assert [p for g in optimizer.param_groups for p in g["params"]] == [head.last_layer.weight]
    with pytest.raises(DinoError, match="nothing to train"):
        O.build_optimizer({"dino_head": head.requires_grad_(False)}, OptimConfig())


def test_the_optimiser_takes_the_textbook_step():
    torch.manual_seed(0)
    layer = nn.Linear(3, 2)
    start = layer.weight.detach().clone()
    optimizer = O.build_optimizer({"backbone": layer}, OptimConfig())
    O.apply_schedules(optimizer, O.StepValues(0.1, 0.1, 0.5, 1, 1, 1, 1))
    layer.weight.grad, layer.bias.grad = torch.ones(2, 3) * 3, torch.zeros(2)
    optimizer.step()
    # decoupled decay, then the first step of Adam: m̂/√v̂ = sign of the gradient
    torch.testing.assert_close(layer.weight.detach(), start * (1 - 0.1 * 0.5) - 0.1, rtol=1e-6, atol=1e-6)


class OneMatrix(nn.Module):
    def __init__(self, rows: int, columns: int, name: str = "fc1") -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({name: nn.Linear(columns, rows)})])


def stepped(module: nn.Module, gradients: list[torch.Tensor], **options: Any) -> Any:
    """The optimiser after a step with each gradient of the matrix, rate 0.1 and decay 0.5."""
    optimizer = O.build_optimizer({"backbone": module}, OptimConfig(layerwise_decay=1, **options))
    O.apply_schedules(optimizer, O.StepValues(0.1, 0.1, 0.5, 1, 1, 1, 1))
    weight, bias = module.parameters()
    for gradient in gradients:
        weight.grad, bias.grad = gradient.clone(), torch.ones_like(bias)
        optimizer.step()
    return optimizer


def gradients_of(rows: int, columns: int, n: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(rows, columns, generator=generator) for _ in range(n)]


@pytest.mark.parametrize(("rows", "columns"), [(64, 24), (24, 64)])
def test_muon_takes_the_steps_of_torchs(rows: int, columns: int, monkeypatch: pytest.MonkeyPatch):
    """Which orthogonalises in bfloat16, and here in float32. AdamW moves the bias."""
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("torch.optim.Muon came with torch 2.9")
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)
    torch.manual_seed(0)
    module = OneMatrix(rows, columns)
    theirs = nn.Parameter(next(module.parameters()).detach().clone())
    other = torch.optim.Muon([theirs], lr=0.1, weight_decay=0.5, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    adamw = copy.deepcopy(module)
    gradients = gradients_of(rows, columns)
    stepped(module, gradients, optimizer="muon")
    stepped(adamw, gradients)
    for gradient in gradients:
        theirs.grad = gradient.clone()
        other.step()
    weight, bias = module.parameters()
    torch.testing.assert_close(weight, theirs, rtol=0, atol=1e-5)
    assert torch.equal(bias, list(adamw.parameters())[1])
    assert (weight - next(adamw.parameters())).abs().max() > 0.05


@pytest.mark.parametrize("shape", [(40, 100), (100, 40), (48, 48)])
def test_orthogonal_matrices_keep_their_directions_and_lose_their_lengths(shape: tuple[int, int]):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(O.orthogonal(x))
    assert values.min() > 0.5
    assert values.max() < 1.3
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    along = torch.einsum("ik,ij,kj->k", u, O.orthogonal(x), v)  # on its own singular vectors
    torch.testing.assert_close(along.sort()[0], values.sort()[0], rtol=1e-3, atol=1e-3)
    assert O.orthogonal(torch.zeros(shape)).abs().max() == 0


def test_q_k_and_v_are_three_matrices_to_muon_and_only_matrices_of_blocks_are_its():
    gradients = gradients_of(72, 24, 1)
    module = OneMatrix(72, 24, "qkv")
    before = next(module.parameters()).detach().clone()
    stepped(module, gradients, optimizer="muon")
    moved = (before * (1 - 0.1 * 0.5) - next(module.parameters())).detach() / 0.1
    for part, gradient in zip(moved.chunk(3), gradients[0].chunk(3)):
        torch.testing.assert_close(part, O.orthogonal(gradient) * 0.2 * 24**0.5, rtol=1e-4, atol=1e-4)
    optim = OptimConfig(optimizer="muon")
    modules = {"backbone": tiny_vit(), "dino_head": Head()}
    ours = {id(p) for group in O.param_groups(modules, optim) if group.get("matrices") for p in group["params"]}
    names = {n for n, p in modules["backbone"].named_parameters() if id(p) in ours}
    assert names == {f"blocks.{i}.{n}.weight" for i in (0, 1) for n in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
    assert len(ours) == 8


# ---- clipping and averaging -----------------------------------------------------------------------------------------


def with_gradients(seed: int, scale: float) -> Head:
    head = Head()
    generator = torch.Generator().manual_seed(seed)
    for p in head.parameters():
        p.grad = torch.randn(p.shape, generator=generator) * scale
    return head


def test_every_module_is_clipped_on_its_own_and_the_norm_before_is_returned():
    modules = {"large": with_gradients(0, 10.0), "small": with_gradients(1, 1e-4)}
    before = {n: [p.grad.clone() for p in m.parameters()] for n, m in modules.items()}
    norms = O.clip_per_module(modules, 3.0)
    for name, module in modules.items():
        whole = math.sqrt(sum(float(g.square().sum()) for g in before[name]))
        assert float(norms[name]) == pytest.approx(whole, rel=1e-5)
        factor = min(1.0, 3.0 / (whole + 1e-6))
        for p, g in zip(module.parameters(), before[name]):
            torch.testing.assert_close(p.grad, g * factor)
    assert float(O.clip_per_module(modules, 3.0)["large"]) == pytest.approx(3.0, rel=1e-5)


@pytest.mark.parametrize("off", [0, None])
def test_without_a_limit_norms_are_only_measured(off):
    head = with_gradients(0, 10.0)
    before = [p.grad.clone() for p in head.parameters()]
    norms = O.clip_per_module({"head": head}, off)
    assert float(norms["head"]) > 3
    assert all(torch.equal(p.grad, g) for p, g in zip(head.parameters(), before))


def test_a_module_without_gradients_has_norm_zero():
    assert float(O.clip_per_module({"head": Head()}, 3.0)["head"]) == 0.0


def test_the_average_is_the_plain_loop():
    student, ema = Head(), Head()
    slow = copy.deepcopy(ema)
    O.ema_update(ema.parameters(), student.parameters(), 0.9)
    with torch.no_grad():
        for e, s in zip(slow.parameters(), student.parameters()):
            e.lerp_(s, 1 - 0.9)
    assert all(torch.equal(a, b) for a, b in zip(ema.parameters(), slow.parameters()))
    before = [p.clone() for p in ema.parameters()]
    O.ema_update(ema.parameters(), student.parameters(), 1.0)
    assert all(torch.equal(a, b) for a, b in zip(ema.parameters(), before))
    assert all(p.grad is None for p in ema.parameters())


def test_averaging_networks_of_different_shape_is_refused():
    with pytest.raises(DinoError, match="shapes differ"):
        O.ema_update([torch.zeros(2)], [torch.zeros(3)], 0.5)


@pytest.fixture
def one_process():
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_sharded_tensors_give_the_same_as_plain_ones_without_dispatch(one_process, monkeypatch):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    kernels, types = ("_fused_adamw_", "_foreach_mul_", "_foreach_lerp_"), set()

    def spy(kernel, tensors, *args, **options):
        types.update((kernel.__name__, type(t)) for t in tensors)
        return kernel(tensors, *args, **options)

    for name in kernels:
        monkeypatch.setattr(torch, name, partial(spy, getattr(torch, name)))
    torch.manual_seed(0)
    plain = {"dino_head": Head()}
    sharded = copy.deepcopy(plain)
    fully_shard(sharded["dino_head"], mesh=one_process)
    results = []
    for modules in (plain, sharded):
        head = modules["dino_head"]
        average = [p.detach().clone() for p in head.parameters()]
        optimizer = O.build_optimizer(modules, OptimConfig())
        O.apply_schedules(optimizer, O.StepValues(0.1, 0.1, 0.04, 1, 1, 1, 1))
        generator = torch.Generator().manual_seed(5)
        for p in head.parameters():
            gradient = torch.randn(p.shape, generator=generator) * 10
            p.grad = DTensor.from_local(gradient, p.device_mesh, p.placements) if isinstance(p, DTensor) else gradient
        norm = O.clip_per_module(modules, 3.0)["dino_head"]
        assert not isinstance(norm, DTensor)
        optimizer.step()
        O.ema_update(average, head.parameters(), 0.9)
        whole = [t.full_tensor() if isinstance(t, DTensor) else t for t in (*head.parameters(), *average)]
        results.append([norm, *(t.detach() for t in whole)])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert {name for name, _ in types} == set(kernels)
    assert not [t for _, t in types if issubclass(t, DTensor)]


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_step_found_infinite_changes_nothing(kind):
    head = OneMatrix(8, 8)
    optimizer = stepped(head, gradients_of(8, 8, 1), optimizer=kind)
    before = copy.deepcopy(head.state_dict()), copy.deepcopy(optimizer.state_dict()["state"])
    next(head.parameters()).grad.fill_(math.nan)
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert all(torch.equal(v, before[0][k]) for k, v in head.state_dict().items())
    for i, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(v, before[1][i][k]) for k, v in state.items())


def test_the_default_configuration_has_the_defaults_of_the_optimiser():
    assert TrainConfig().optim == OptimConfig()
