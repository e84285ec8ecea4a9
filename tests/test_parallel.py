"""Spreading a model over processes changes where things happen, not what they come to."""

from __future__ import annotations

import gc
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor
from toy_training import write_config, write_images

from dinov3 import checkpoint, distributed
from dinov3.config.train import DinoConfig, GramConfig, OptimConfig, load_config
from dinov3.data.crops import CropBatch, summary
from dinov3.errors import DinoError
from dinov3.optim import apply_schedules, build_optimizer, clip_per_module, plain_name
from dinov3.parallel import full_state, parallelize, reduce_gradients, whole
from dinov3.runlog import RunDir, read_metrics
from dinov3.train import teacher_files
from dinov3.train.assembly import assemble
from dinov3.train.loop import Outcome
from dinov3.train.method import SelfDistillation
from dinov3.train.teacher_files import read_network
from dinov3.train.train import train
from tests.train.test_method import VARIANTS, Variant, recorded_batch, step_values, tiny_network

CPU = torch.device("cpu")
# all terms that cross ranks: KoLeo with neighbours anywhere, Gram of large crops
SETTING = Variant(
    dino={"koleo_loss_distributed": True},
    gram={"use_loss": True, "img_level": True},
    gram_crops=True,
    gram_teacher_seed=7000,
)
ROW = {
    "lr": 1e-3,
    "wd": 0.1,
    "momentum": 0.99,
    "teacher_temp": 0.06,
    "dino_local_loss_weight": 1.0,
    "gram_loss_weight": 1.0,
}


def share(batch: CropBatch, rank: int, world: int) -> CropBatch:
    """The rows of a rank's images: crops are crop-major."""

    def mine(x: Tensor | None, crops: int) -> Any:
        return None if x is None else x.unflatten(0, (crops, -1)).chunk(world, 1)[rank].flatten(0, 1)

    masks = summary(mine(batch.masks, 2))
    return replace(
        batch,
        global_crops=mine(batch.global_crops, 2),
        local_crops=mine(batch.local_crops, 3),
        gram_crops=mine(batch.gram_crops, 2),
        masks=masks.masks,
        mask_indices=masks.indices,
        masks_weight=masks.weight,
    )


def two_steps(setting: Variant = SETTING, optimizer_name: str = "adamw", **options: Any) -> dict[str, Any]:
    """Losses, first gradients, norms and final weights of two steps on this process's share of the recorded batch."""
    method = setting.build()
    for network, trained in ((method.student, True), (method.ema, False), (method.gram_teacher, False)):
        assert network is not None
        own = {n: p for n, p in network.parts().items() if trained or p is not method.student.backbone}
        parallelize(own, device=CPU, trained=trained, **options)
    parts = method.student.parts()
    optimizer = build_optimizer(parts, OptimConfig(optimizer=optimizer_name))  # type: ignore[arg-type]
    rank, world = distributed.rank(), distributed.world()
    values = step_values(ROW)
    result: dict[str, Any] = {"losses": []}
    for step in range(2):
        batch = share(recorded_batch(step, gram=True), rank, world)
        apply_schedules(optimizer, values)
        optimizer.zero_grad()
        targets = method.targets(batch, values)
        torch.manual_seed(5)
        terms = method.predict(batch, targets, values)
        terms.total().backward()
        result["losses"].append(distributed.average(terms.log()))
        if step == 0:
            result["gradients"] = {
                plain_name(n): whole(p.grad).clone() for n, p in method.student.named_parameters() if p.grad is not None
            }
        norms = clip_per_module(parts, 3.0)
        result.setdefault("norms", []).append({k: float(v) for k, v in norms.items()})
        optimizer.step()
        method.update_ema(0.9)
    result["student"], result["ema"] = full_state(method.student), full_state(method.ema)
    return result


def assert_equal_runs(a: dict[str, Any], b: dict[str, Any], tolerance: float) -> None:
    for one, other in zip(a["losses"] + a["norms"], b["losses"] + b["norms"]):
        assert one == pytest.approx(other, rel=tolerance)
    for kind in ("gradients", "student", "ema"):
        assert a[kind].keys() == b[kind].keys()
        for name, value in a[kind].items():
            scale = float(value.abs().max().clamp(min=1e-6))
            # after AdamW's first steps the sign of a gradient near 0 decides: compare to the step's size too
            slack = 0.0 if kind == "gradients" else 2e-4
            torch.testing.assert_close(
                b[kind][name], value, rtol=0, atol=tolerance * scale + slack, msg=lambda m, n=name: f"{n}: {m}"
            )


NEWER = replace(
    SETTING,
    dino={"koleo_loss_distributed": True, "sigreg_loss_weight": 0.5},
    ibot={"visible_loss_weight": 0.5},
    head_only_ema=True,
)


@pytest.mark.parametrize("setting", [SETTING, NEWER], ids=["plain", "newer options"])
def test_two_ranks_compute_what_one_computes_on_the_whole_batch(setting: Variant) -> None:
    alone = two_steps(setting)
    for rank in run_ranks(two_steps, 2, setting):
        assert_equal_runs(alone, rank, 2e-4)


def test_muon_on_two_ranks_moves_as_on_one() -> None:
    alone, adamw = two_steps(optimizer_name="muon"), two_steps()
    name = "backbone.blocks.0.attn.qkv.weight"
    assert (alone["student"][name] - adamw["student"][name]).abs().max() > 5e-4
    for rank in run_ranks(two_steps, 2, SETTING, "muon"):
        assert_equal_runs(alone, rank, 2e-4)


def on_machines_of(ranks: int, over: str) -> dict[str, Any]:
    os.environ["LOCAL_WORLD_SIZE"] = str(ranks)
    result = two_steps(over=over)
    os.environ["LOCAL_WORLD_SIZE"] = "3"
    with pytest.raises(DinoError, match="4 processes are not a multiple of the 3 of this machine"):
        two_steps(over="machine")
    return result


@pytest.mark.parametrize("over", ["machine", pytest.param("none", marks=pytest.mark.slow)])
def test_copies_on_several_machines_compute_what_one_process_computes(over: str) -> None:
    """Four ranks, two a machine: weights sharded over a machine, or not at all; gradients reduced over all."""
    alone = two_steps()
    for rank in run_ranks(on_machines_of, 4, 2, over):
        assert_equal_runs(alone, rank, 2e-4)


def objects_after_steps(counts: tuple[int, ...]) -> list[int]:
    """Tensors that exist after so many steps, the last batch and its graph being gone."""
    method = SETTING.build()
    for network, trained in ((method.student, True), (method.ema, False), (method.gram_teacher, False)):
        assert network is not None
        parallelize(network.parts(), device=CPU, trained=trained, param_dtype="bf16")
    optimizer, values, found = build_optimizer(method.student.parts(), OptimConfig()), step_values(ROW), []
    batch = share(recorded_batch(0, gram=True), distributed.rank(), distributed.world())
    for step in range(1, max(counts) + 1):
        optimizer.zero_grad()
        method.predict(batch, method.targets(batch, values), values).total().backward()
        clip_per_module(method.student.parts(), 3.0)
        optimizer.step()
        method.update_ema(0.9)
        if step in counts:
            gc.collect()
            found.append(sum(isinstance(o, torch.Tensor) for o in gc.get_objects()))
    return found


@pytest.mark.parametrize("world", [1, 2])
def test_sharded_steps_leave_no_tensors_behind(world: int) -> None:
    for after_two, after_six in run_ranks(objects_after_steps, world, (2, 6)):
        assert after_six == after_two


def accumulated() -> tuple[bool, dict[str, Tensor]]:
    """(whether anything was reduced after the first of two batches, gradients after both)."""
    method = SETTING.build()
    for network, trained in ((method.student, True), (method.ema, False), (method.gram_teacher, False)):
        assert network is not None
        parallelize(network.parts(), device=CPU, trained=trained)
    for nth in range(2):
        batch = share(recorded_batch(nth, gram=True), distributed.rank(), distributed.world())
        targets = method.targets(batch, step_values(ROW))
        torch.manual_seed(5)
        terms = method.predict(batch, targets, step_values(ROW))
        reduce_gradients(method.student.parts(), nth == 1)
        terms.total().backward()
        if nth == 0:
            reduced = any(p.grad is not None for p in method.student.parameters())
    return reduced, {
        plain_name(n): whole(p.grad).clone() for n, p in method.student.named_parameters() if p.grad is not None
    }


def test_accumulated_batches_cross_the_network_once_and_add_up() -> None:
    (_, alone), ranks = accumulated(), run_ranks(accumulated, 2)
    for reduced, gradients in ranks:
        assert not reduced
        assert gradients.keys() == alone.keys()
        for name, value in alone.items():
            atol = 2e-4 * float(value.abs().max().clamp(min=1e-6))
            torch.testing.assert_close(gradients[name], value, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("checkpointing", ["selective", "full"])
def test_recomputed_activations_change_no_bit(checkpointing: str) -> None:
    """With stochastic depth and position augmentation on: the draws are the same when a block runs again."""
    setting = replace(VARIANTS["stochastic_seed99"], gram=SETTING.gram, gram_crops=True, gram_teacher_seed=7000)
    plain, again = two_steps(setting), two_steps(setting, checkpointing=checkpointing)
    assert plain["gradients"].keys() == again["gradients"].keys()
    assert all(torch.equal(plain["gradients"][n], again["gradients"][n]) for n in plain["gradients"])
    assert plain["student"].keys() == again["student"].keys()
    assert all(torch.equal(plain["student"][n], again["student"][n]) for n in plain["student"])


def test_compilation_sees_one_graph_and_changes_no_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the compiler's front end alone: what is traced is what runs, without minutes of code generation."""
    compiled = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **options: compiled(self, backend="eager", fullgraph=True, **options)
    )
    plain, other = two_steps(), two_steps(compile=True)
    assert_equal_runs(plain, other, 1e-5)


def test_checkpointing_saves_only_where_something_is_trained() -> None:
    network = tiny_network()
    parallelize(network.parts(), device=CPU, trained=False, checkpointing="full")
    assert [n for n, _ in network.named_parameters()] == [n for n, _ in tiny_network().named_parameters()]
    with pytest.raises(DinoError, match="none, selective or full"):
        parallelize(network.parts(), device=CPU, trained=True, checkpointing="some")


BF16 = {"param_dtype": "bf16", "reduce_dtype": "fp32"}
MIXED = replace(SETTING, vit={"pos_embed_rope_dtype": "fp32"})


def bf16_types() -> dict[str, str]:
    method: SelfDistillation = MIXED.build()
    for network, trained in ((method.student, True), (method.ema, False), (method.gram_teacher, False)):
        assert network is not None
        parallelize(network.parts(), device=CPU, trained=trained, **BF16)
    batch = share(recorded_batch(0), distributed.rank(), distributed.world())
    values, inside = step_values(ROW), {}
    block = method.student.backbone.blocks[1]
    block.norm1.register_forward_pre_hook(lambda _, args: inside.update(residual=args[0].dtype))
    block.attn.register_forward_pre_hook(lambda _, args: inside.update(positions=args[1][0].dtype))
    terms = method.predict(batch, method.targets(batch, values), values)
    terms.total().backward()
    weight = block.mlp.fc1.weight
    seen = method.student.backbone(batch.local_crops)
    types = inside | {"weight": weight.dtype, "gradient": weight.grad.dtype, "output": seen.dtype}
    return {name: str(dtype) for name, dtype in (types | {"loss": terms.total().dtype}).items()}


def test_types_in_bf16_are_the_same_on_one_process_and_on_two() -> None:
    """Weights, gradients and losses stay in float32; tables of positions in the type that they were configured with."""
    expected = dict.fromkeys(("positions", "weight", "gradient", "loss"), "torch.float32")
    expected |= dict.fromkeys(("residual", "output"), "torch.bfloat16")
    assert run_ranks(bf16_types, 2) == [expected] * 2
    try:
        assert bf16_types() == expected  # without a launcher: no group exists before
    finally:
        distributed.shutdown()


def test_two_ranks_compute_in_bf16_what_one_computes() -> None:
    """Up to the order of sums in bf16: where gradients of images are added before or after rounding."""
    try:
        alone = two_steps(MIXED, **BF16)
    finally:
        distributed.shutdown()
    for rank in run_ranks(two_steps, 2, MIXED, **BF16):
        assert alone["losses"][0] == pytest.approx(rank["losses"][0], rel=1e-6)  # forward passes are the same
        assert alone["norms"][0] == pytest.approx(rank["norms"][0], rel=1e-2)
        for name, value in alone["gradients"].items():
            assert (rank["gradients"][name] - value).abs().max() <= 0.03 * value.abs().max(), name


def test_a_run_in_bf16_on_one_process_leaves_no_group_behind(tmp_path: Path) -> None:
    config, images = write_config(tmp_path), str(write_images(tmp_path / "images"))
    outcome = whole_run(config, images, str(tmp_path / "run"), ["compute_precision.param_dtype=bf16", "optim.epochs=1"])
    assert outcome.finished
    assert not distributed.together()
    assert read_network(tmp_path / "run" / "ckpt" / "3").has_heads


# ---- whole runs -----------------------------------------------------------------------------------------------------

FIXED = ("student.drop_path_rate=0", "student.pos_embed_rope_rescale_coords=null", "dino.koleo_loss_distributed=true")


def whole_run(config_file: str, images: str, out: str, overrides: list[str]) -> Outcome:
    config, notes = load_config(config_file, [f"train.dataset_path={images}", *FIXED, *overrides])
    return train(config, out, notes=notes)


def test_a_run_of_one_process_resumes_with_two_and_ends_as_with_one(tmp_path: Path) -> None:
    """Everything is resharded; k-NN, dumps and checkpoints work sharded; the global batch stays 4."""
    config, images = write_config(tmp_path), str(write_images(tmp_path / "images"))
    knn = [f"evaluation.knn_train_dataset={images}", f"evaluation.knn_val_dataset={images}", "evaluation.knn_k=3"]
    knn += [
        "evaluation.eval_period_iterations=6",
        "ibot.mask_sample_probability=1.0",
        "ibot.mask_ratio_min_max=[0.3,0.31]",
    ]
    alone = whole_run(config, images, str(tmp_path / "alone"), knn)
    out = tmp_path / "both"
    first = whole_run(config, images, str(out), [*knn, "run.time_limit_minutes=1e-6"])
    assert first.iterations == 1
    both, other = run_ranks(
        whole_run,
        2,
        config,
        images,
        str(out),
        [*knn, "train.batch_size_per_gpu=2", "train.sharded_eval_checkpoint=true"],
        timeout_s=120,
    )
    assert both.finished
    assert both.knn == other.knn
    assert both.knn.keys() == alone.knn.keys() == {5, 11}
    assert "was saved by 1 processes and 2 resume" in (out / "log.txt").read_text()
    records = {r["iteration"]: r for r in read_metrics(out / "metrics.jsonl") if "total_loss" in r}
    assert sorted(records) == list(range(12))
    assert records[3]["local_batch_size"] == 2
    assert records[3]["global_batch_size"] == 4
    a, b = (checkpoint.read_tensors(p / "ckpt" / "11") for p in (tmp_path / "alone", out))
    assert a.keys() == b.keys()
    dump = read_network(out / "eval" / "training_11")  # sharded, read by one process
    assert (out / "eval" / "training_11" / "sharded_teacher_checkpoint" / ".metadata").is_file()
    for part, state in dump.parts.items():
        assert all(torch.equal(v, b[f"model.model_ema.{part}.{k}"]) for k, v in state.items())
    assert dump.has_heads
    # and back again: two ranks' checkpoint on one process
    last = whole_run(config, images, str(out), [*knn, "optim.epochs=4"])
    assert last.iterations == 16


def readings(config_file: str, images: str, out: str, source: str) -> tuple[int, list[str], dict[str, Tensor]]:
    """How often this rank read the file, the notes, and the weights it begins with."""
    read, count = teacher_files.read_network, []
    teacher_files.read_network = lambda *a: (count.append(a), read(*a))[1]
    try:
        config, _ = load_config(
            config_file, [f"train.dataset_path={images}", f"student.resume_from_teacher_chkpt={source}"]
        )
        trainer = assemble(config, RunDir(out, writer=distributed.is_main()), CPU)
    finally:
        teacher_files.read_network = read
    state = full_state(trainer.method.student, keep=True)
    return len(count), trainer.notes, state


def test_a_file_of_weights_is_read_by_one_rank(tmp_path: Path) -> None:
    config, images = write_config(tmp_path), str(write_images(tmp_path / "images"))
    whole_run(config, images, str(tmp_path / "first"), ["optim.epochs=1", "evaluation.eval_period_iterations=4"])
    source = str(tmp_path / "first" / "eval" / "training_3" / "teacher_checkpoint.pth")
    (count, notes, state), (other_count, other_notes, other) = run_ranks(
        readings, 2, config, images, str(tmp_path / "both"), source
    )
    assert (count, other_count) == (1, 0)
    assert notes == other_notes
    parts = read_network(source).parts
    expected = {f"{part}.{k}": v for part, values in parts.items() for k, v in values.items()}
    for found in (state, other):
        assert all(torch.equal(found[k], v) for k, v in expected.items())


def silent_head(config_file: str, images: str, out: str) -> list[str]:
    """Runs whose first or second head no loss reaches; an image that ends all ranks with an error."""
    for section in ("dino", "ibot"):
        assert whole_run(
            config_file, images, f"{out}/{section}", ["optim.epochs=1", f"{section}.loss_weight=0"]
        ).finished
    if distributed.is_main():
        (Path(images) / "dots" / "0.png").write_bytes(b"no image")
    distributed.barrier()
    with pytest.raises(DinoError) as raised:
        whole_run(config_file, images, f"{out}/stop", ["data.unreadable=stop", "train.batch_size_per_gpu=2"])
    return [str(raised.value)]


@pytest.mark.slow
def test_two_ranks_train_with_a_head_of_weight_zero_and_fail_together(tmp_path: Path) -> None:
    config, images = write_config(tmp_path), str(write_images(tmp_path / "images"))
    first, second = run_ranks(silent_head, 2, config, images, str(tmp_path / "run"), timeout_s=120)
    assert first == second
    assert "could not be read, such as" in first[0]
    assert len(checkpoint.Checkpoints(tmp_path / "run" / "stop" / "ckpt").all()) > 0


def test_settings_that_do_not_fit_the_number_of_processes_are_errors() -> None:
    from dinov3.config.train import TrainConfig, check_scale

    config = TrainConfig(dino=DinoConfig(koleo_loss_distributed=True, koleo_distributed_loss_group_size=48))
    with pytest.raises(DinoError, match="koleo_distributed_loss_group_size"):
        check_scale(config, 2)
    assert GramConfig().use_loss is False
