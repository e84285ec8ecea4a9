"""The loop that fits heads, and the losses of dense heads: plain re-statements, exact resumption, several processes."""

from __future__ import annotations

import copy
import io
import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor, nn
from toy_models import tiny_vit

from dinov3 import distributed
from dinov3 import fit as fitting
from dinov3.errors import DinoError
from dinov3.fit import FitConfig, fit, head_tensors, shuffled
from dinov3.heads import objectives
from dinov3.heads.linear import LinearSegmentor, build_linear_segmentor
from dinov3.losses import LossTerms
from dinov3.models.vit import VisionTransformer
from dinov3.runlog import RunDir, read_metrics


def vit(seed: int = 0) -> VisionTransformer:
    return tiny_vit(seed, depth=2, drop_path_rate=0.5).train()


def segmentor(seed: int = 0, **options: Any) -> LinearSegmentor:
    return build_linear_segmentor(vit(seed), backbone_out_layers="LAST", num_classes=3, **options)


def drawn(step: int, rank: int = 0) -> dict[str, Tensor]:
    """Images whose class is their brightness."""
    rng = torch.Generator().manual_seed(fitting.seed_of(7, step, rank))
    target = torch.randint(0, 3, (2, 2, 2), generator=rng)
    x = (target.float() - 1)[:, None].expand(-1, 3, -1, -1).repeat_interleave(16, 2).repeat_interleave(16, 3)
    return {"x": x + 0.1 * torch.randn(x.shape, generator=rng), "target": target}


def loss(module: nn.Module, batch: dict[str, Tensor]) -> LossTerms:
    return objectives.segmentation_terms(module(batch["x"]), batch["target"])


def quiet(folder: Path) -> RunDir:
    return RunDir(folder, console=io.StringIO())


# ---- the loop -------------------------------------------------------------------------------------------------------


def test_a_head_learns_and_the_backbone_stays_as_it_was(tmp_path: Path) -> None:
    model = segmentor()
    before = copy.deepcopy(model.state_dict())
    report = fit(model, drawn, loss, FitConfig(steps=40, lr=3e-2, warmup=4, batch=2), quiet(tmp_path))
    after = model.state_dict()
    for name in after:
        changed = not torch.equal(before[name], after[name])
        assert changed == name.startswith("segmentation_model.1."), name
    losses = [r["ce_loss"] for r in read_metrics(tmp_path / "metrics.jsonl")]
    assert losses[0] > 0.9
    assert report.last["ce_loss"] < 0.25
    assert not model.training
    said = (tmp_path / "log.txt").read_text()
    assert (tmp_path / "plots" / "loss.png").is_file() or "plotting needs matplotlib" in said


def test_the_loop_is_what_the_plain_loop_is() -> None:
    config = FitConfig(steps=6, lr=1e-2, weight_decay=0.1, warmup=2, clip=0.05, seed=5)
    fitted, plain = segmentor(dropout=0.3), segmentor(dropout=0.3)
    fit(fitted, drawn, loss, config)
    head = plain.segmentation_model[1]
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.0, weight_decay=0.1)
    plain.train()
    for step in range(6):
        optimizer.param_groups[0]["lr"] = config.lr_at(step)
        torch.manual_seed(fitting.seed_of(5, step, 0))
        optimizer.zero_grad()
        loss(plain, drawn(step)).total().backward()
        nn.utils.clip_grad_norm_(head.parameters(), 0.05)
        optimizer.step()
    for name, value in head_tensors(plain).items():
        assert torch.equal(value, head_tensors(fitted)[name]), name


class Killed(BaseException):
    pass


@pytest.mark.parametrize("killed_after, best_is", [(5, "highest"), (8, "lowest"), (11, "highest")])
def test_a_killed_fit_that_is_started_again_ends_as_one_that_was_not(
    tmp_path: Path, killed_after: int, best_is: str
) -> None:
    config = FitConfig(
        steps=12,
        lr=1e-2,
        save_every=3,
        evaluate_every=2,
        best_by="score",
        best_is=best_is,
        log_every=1,
        batch=2,
        warmup=3,
    )

    def score(module: nn.Module) -> dict[str, float]:
        return {"score": -float(loss(module, drawn(1000)).total())}

    def dying(step: int) -> Any:
        if step == killed_after:
            raise Killed
        return drawn(step)

    whole, torn = segmentor(dropout=0.2), segmentor(dropout=0.2)
    expected = fit(whole, drawn, loss, config, quiet(tmp_path / "whole"), score)
    with pytest.raises(Killed):
        fit(torn, dying, loss, config, quiet(tmp_path / "torn"), score)
    again = segmentor(seed=0, dropout=0.2)
    report = fit(again, drawn, loss, config, quiet(tmp_path / "torn"), score)
    assert report.resumed_at == (killed_after // 3) * 3
    assert expected.best is not None
    assert (expected.best[0] < 6) == (best_is == "lowest")  # found before the crash, or after it
    assert (report.evaluations, report.best, report.last) == (expected.evaluations, expected.best, expected.last)
    for name, value in head_tensors(whole).items():
        assert torch.equal(value, head_tensors(again)[name]), name

    def numbers(folder: str) -> list[tuple[int, Any, Any]]:
        records = read_metrics(tmp_path / folder / "metrics.jsonl")
        return [(r["iteration"], r.get("ce_loss"), r.get("score")) for r in records]

    assert numbers("torn") == numbers("whole")


def test_ctrl_c_saves_the_step_that_was_under_way(tmp_path: Path) -> None:
    config = FitConfig(steps=12, lr=1e-2, save_every=12, batch=2)

    def pressed(step: int) -> Any:
        if step == 4:
            signal.raise_signal(signal.SIGINT)
        return drawn(step)

    whole, torn = segmentor(), segmentor()
    fit(whole, drawn, loss, config, quiet(tmp_path / "whole"))
    with pytest.raises(KeyboardInterrupt, match="5 of 12 steps are done and saved"):
        fit(torn, pressed, loss, config, quiet(tmp_path / "torn"))
    again = segmentor()
    assert fit(again, drawn, loss, config, quiet(tmp_path / "torn")).resumed_at == 5
    assert all(torch.equal(value, head_tensors(again)[name]) for name, value in head_tensors(whole).items())


def test_the_best_head_is_kept_and_is_what_the_module_has_in_the_end(tmp_path: Path) -> None:
    scores, seen = iter([0.1, 0.9, 0.5]), []

    def evaluate(module: nn.Module) -> dict[str, float]:
        assert not module.training
        seen.append({k: v.clone() for k, v in head_tensors(module).items()})
        return {"mIoU": next(scores)}

    config = FitConfig(steps=6, lr=1e-2, evaluate_every=2, best_by="mIoU")
    model = segmentor()
    report = fit(model, drawn, loss, config, quiet(tmp_path), evaluate)
    assert report.best == (4, {"mIoU": 0.9})
    assert all(torch.equal(v, seen[1][k]) for k, v in head_tensors(model).items())
    assert (tmp_path / "ckpt" / "best.safetensors").is_file()
    scores = iter([0.1, 0.9, 0.5])
    fit(model, drawn, loss, FitConfig(**{**vars(config), "best_is": "lowest"}), None, evaluate)
    assert all(torch.equal(v, seen[3][k]) for k, v in head_tensors(model).items())


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_parameters() -> None:
    seen = []

    def watched(module: nn.Module, batch: Any) -> LossTerms:
        logits = module(batch["x"])
        seen.append(logits.dtype)
        return objectives.segmentation_terms(logits, batch["target"])

    model = segmentor()
    report = fit(model, drawn, watched, FitConfig(steps=40, lr=3e-2, precision="bfloat16"))
    assert set(seen) == {torch.bfloat16}
    assert {v.dtype for v in head_tensors(model).values() if v.is_floating_point()} == {torch.float32}
    assert report.last["ce_loss"] < 0.6


def test_threads_that_fetch_batches_change_nothing() -> None:
    models = [segmentor(), segmentor()]
    for model, workers in zip(models, (0, 2)):
        fit(model, drawn, loss, FitConfig(steps=5, lr=1e-2, workers=workers))
    assert all(torch.equal(v, head_tensors(models[1])[k]) for k, v in head_tensors(models[0]).items())


def test_a_step_that_is_not_finite_is_left_out_and_too_many_end_the_fit(tmp_path: Path) -> None:
    def sometimes(module: nn.Module, batch: Any) -> LossTerms:
        terms = loss(module, batch)
        terms.add("odd_loss", 1.0, terms[0].value * (math.nan if batch["step"] in bad else 0.0))
        return terms

    def batches(step: int) -> Any:
        return drawn(step) | {"step": step}

    bad = {2, 3}
    model = segmentor()
    report = fit(model, batches, sometimes, FitConfig(steps=6, lr=1e-2), quiet(tmp_path))
    assert report.skipped_steps == 2
    assert all(bool(v.isfinite().all()) for v in head_tensors(model).values())
    assert "odd_loss" in (tmp_path / "log.txt").read_text()
    bad = set(range(100))
    with pytest.raises(
        DinoError, match=r"at step 4: .*odd_loss.* not finite 5 times in a row; lower the learning rate"
    ):
        fit(segmentor(), batches, sometimes, FitConfig(steps=50))


@pytest.mark.parametrize(
    "wrong, says",
    [
        ({"schedule": "cosin"}, "did you mean 'cosine'"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"warmup": 2000}, "warmup must be between 0 and the 1000 steps"),
        (
            {"schedule": "polynomial", "schedule_options": {"pover": 2}},
            "polynomial has no 'pover'; did you mean 'power'",
        ),
        ({"precision": "fp8"}, "precision is one of float32, bfloat16"),
    ],
)
def test_a_wrong_configuration_is_a_sentence(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(DinoError, match=says):
        fit(segmentor(), drawn, loss, FitConfig(**wrong))


def test_a_best_number_that_no_evaluation_gives_is_an_error() -> None:
    with pytest.raises(DinoError, match="best_by is one of mIoU, not 'miou'; did you mean 'mIoU'"):
        fit(segmentor(), drawn, loss, FitConfig(steps=1, best_by="miou"), None, lambda _: {"mIoU": 1.0})


def test_a_module_without_a_head_has_nothing_to_fit() -> None:
    with pytest.raises(DinoError, match="nothing to fit"):
        fit(vit(), drawn, loss, FitConfig(steps=1))


# ---- schedules ------------------------------------------------------------------------------------------------------


def test_the_published_recipes_have_the_recorded_rates() -> None:
    seg = FitConfig(
        steps=40_000, lr=1e-3, warmup=1500, schedule="one_cycle",
        schedule_options={"ratio": 1e-6, "final_div_factor": math.inf, "late": 1},
    )  # fmt: skip
    recorded = {
        0: 1e-9, 1: 1e-9, 2: 6.6765e-7, 100: 6.58376e-5, 750: 4.89984e-4, 1499: 9.61267e-4, 1500: 9.61883e-4,
        1501: 9.96530e-4, 10000: 8.53553e-4, 20000: 5e-4, 30000: 1.46447e-4, 39999: 1.54e-12,
    }  # fmt: skip
    for step, rate in recorded.items():
        assert seg.lr_at(step) == pytest.approx(rate, rel=2e-3 if rate < 1e-11 else 1e-5), step
    assert seg.beta1_at(0) == 0.9
    depth = FitConfig(
        steps=38_400, lr=3e-4, warmup=12_800, schedule="one_cycle",
        schedule_options={"final_div_factor": 1000, "base_momentum": 0.85, "max_momentum": 0.95},
    )  # fmt: skip
    recorded = {
        0: 3e-7, 1: 3.23437e-7, 100: 2.64371e-6, 6400: 1.40252e-4, 12799: 2.25293e-4, 12800: 2.24992e-4,
        19200: 1.49994e-4, 25600: 7.49984e-5, 38399: 1.2e-8,
    }  # fmt: skip
    for step, rate in recorded.items():
        assert depth.lr_at(step) == pytest.approx(rate, rel=1e-5), step
    momenta = {0: 0.0, 12799: 0.0, 12800: 0.85, 19200: 0.864645, 25600: 0.9, 38399: 0.95}
    for step, beta in momenta.items():
        assert depth.beta1_at(step) == pytest.approx(beta, abs=1e-6), step


@pytest.mark.parametrize("schedule", fitting.SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 5])
def test_every_schedule_warms_up_and_never_wastes_a_step(schedule: str, warmup: int) -> None:
    options = {"one_cycle": {"ratio": 1e-3}, "steps": {"at": [15], "factor": 0.1}}.get(schedule, {})
    config = FitConfig(steps=20, lr=2.0, warmup=warmup, schedule=schedule, schedule_options=options)
    rates = [config.lr_at(step) for step in range(20)]
    assert all(0 < r <= 2.0 for r in rates)
    assert rates[:warmup] == sorted(rates[:warmup])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    assert max(rates) > 1.4
    if schedule == "steps":
        assert rates[14:16] == [2.0, 0.2]


# ---- what a step sees -----------------------------------------------------------------------------------------------


def test_every_epoch_shows_each_image_once_over_all_ranks() -> None:
    seen = [i for step in range(7) for rank in range(2) for i in shuffled(7, 2, step, rank=rank, world=2)]
    for epoch in range(4):
        assert sorted(seen[7 * epoch : 7 * (epoch + 1)]) == list(range(7))
    assert seen[:7] != seen[7:14]
    assert shuffled(3, 8, 0)[:3] == shuffled(3, 3, 0)  # fewer images than a batch has


# ---- several processes ----------------------------------------------------------------------------------------------


def fitted_on_a_rank(steps: int) -> dict[str, Tensor]:
    torch.set_num_threads(1)
    model = segmentor(seed=distributed.rank(), dropout=0.0)  # other initial heads: the first rank's counts
    model.segmentation_model[0].load_state_dict(segmentor().segmentation_model[0].state_dict())
    config = FitConfig(steps=steps, lr=1e-2)
    fit(model, lambda step: drawn(step, distributed.rank()), loss, config)
    return head_tensors(model)


def test_two_processes_fit_the_head_of_their_joined_batch() -> None:
    both = run_ranks(fitted_on_a_rank, 2, 4)

    def joined(step: int) -> dict[str, Tensor]:
        a, b = drawn(step, 0), drawn(step, 1)
        return {name: torch.cat([a[name], b[name]]) for name in a}

    alone = segmentor(dropout=0.0)
    fit(alone, joined, loss, FitConfig(steps=4, lr=1e-2))
    for name, value in head_tensors(alone).items():
        assert torch.equal(both[0][name], both[1][name]), name
        torch.testing.assert_close(both[0][name], value, atol=2e-6, rtol=1e-5, msg=name)


def stopped_on_a_rank(folder: str | None) -> tuple[dict[str, Tensor], int]:
    """(the head after 12 steps, the step that it resumed at). With a folder the second process alone is stopped in step 4."""
    torch.set_num_threads(1)
    config, asked = FitConfig(steps=12, lr=1e-2, save_every=12), distributed.rank() == 1

    def pressed(step: int) -> dict[str, Tensor]:
        if step == 4 and asked and folder is not None:
            signal.raise_signal(signal.SIGINT)
        return drawn(step, distributed.rank())

    run = None if folder is None else RunDir(folder, writer=distributed.is_main(), console=io.StringIO())
    if folder is not None:
        with pytest.raises(KeyboardInterrupt, match="5 of 12 steps are done and saved"):
            fit(segmentor(), pressed, loss, config, run)
        asked = False
    model = segmentor()
    return head_tensors(model), fit(model, pressed, loss, config, run).resumed_at


def test_a_stop_of_one_process_stops_both_after_the_same_step(tmp_path: Path) -> None:
    whole, torn = run_ranks(stopped_on_a_rank, 2, None), run_ranks(stopped_on_a_rank, 2, str(tmp_path))
    assert [resumed for _, resumed in torn] == [5, 5]
    for name, value in whole[0][0].items():
        assert torch.equal(torn[0][0][name], value), name
        assert torch.equal(torn[1][0][name], value), name


# ---- losses of segmentation -----------------------------------------------------------------------------------------


def random_map(seed: int = 0) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 4, 5, 6, generator=rng, dtype=torch.float64).float()
    target = torch.randint(0, 4, (2, 5, 6), generator=rng)
    target[torch.rand(2, 5, 6, generator=rng) < 0.3] = 255
    return logits, target


def test_cross_entropy_counts_void_pixels_in_its_mean_only_where_configured() -> None:
    logits, target = random_map()
    total = valid = 0.0
    for b in range(2):
        for y in range(5):
            for x in range(6):
                if (k := int(target[b, y, x])) != 255:
                    total -= float(logits[b, :, y, x].log_softmax(0)[k])
                    valid += 1
    assert float(objectives.cross_entropy_map(logits, target)) == pytest.approx(total / 60, rel=1e-5)
    assert float(objectives.cross_entropy_map(logits, target, mean_over="valid")) == pytest.approx(
        total / valid, rel=1e-5
    )


def test_dice_is_its_plain_restatement() -> None:
    logits, target = random_map()
    scores = []
    for b in range(2):
        p, valid = logits[b].softmax(0), target[b] != 255
        for k in range(4):
            t = (target[b] == k).float()
            overlap = float((p[k] * t)[valid].sum())
            squares = float((p[k][valid] ** 2).sum() + t[valid].sum())
            scores.append(1 - (2 * overlap + 1) / (squares + 1))
    assert float(objectives.dice_map(logits, target)) == pytest.approx(sum(scores) / 8, rel=1e-5)
    perfect = torch.nn.functional.one_hot(target.clamp_max(3), 4).movedim(-1, 1) * 100.0
    assert float(objectives.dice_map(perfect, target)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("odd, says", [(4, "class 4, but the head has 4"), (-1, "class -1")])
def test_a_class_without_an_output_is_an_error(odd: int, says: str) -> None:
    logits, target = random_map()
    target[0, 0, 0] = odd
    for objective in (objectives.cross_entropy_map, objectives.dice_map):
        with pytest.raises(DinoError, match=says):
            objective(logits, target)


# ---- losses of depth ------------------------------------------------------------------------------------------------


def random_depth(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    p, t = (0.5 + 3 * torch.rand(2, 1, 13, 15, generator=rng) for _ in range(2))
    valid = torch.rand(2, 1, 13, 15, generator=rng) > 0.3
    return p, torch.where(valid, t, 0.0), valid


def test_the_scale_forgiving_loss_is_its_plain_restatement() -> None:
    p, t, valid = random_depth()
    g = [math.log(float(a) + 0.001) - math.log(float(b) + 0.001) for a, b in zip(p[valid], t[valid])]
    mean = sum(g) / len(g)
    variance = sum((x - mean) ** 2 for x in g) / (len(g) - 1)
    depth = objectives.DepthLoss({"SIGLOSS": 1.0})
    assert float(depth(p, t, step=99).total()) == pytest.approx(math.sqrt(0.15) * abs(mean), rel=1e-4)
    assert float(depth(p, t, step=100).total()) == pytest.approx(math.sqrt(variance + 0.15 * mean**2), rel=1e-5)
    assert float(objectives.sig_loss(t, t, valid)) < 1e-5


@pytest.mark.parametrize("logarithmic", [True, False])
def test_the_gradient_loss_is_its_plain_restatement(logarithmic: bool) -> None:
    p, t, valid = random_depth()
    total = 0.0
    for stride in (1, 2, 4, 6):
        summed, count = 0.0, 0
        for b in range(2):
            rows, columns = range(0, 13, stride), range(0, 15, stride)
            error = {}
            for i, y in enumerate(rows):
                for j, x in enumerate(columns):
                    if valid[b, 0, y, x]:
                        a, c = float(p[b, 0, y, x]), float(t[b, 0, y, x])
                        error[i, j] = math.log(a + 0.001) - math.log(c + 0.001) if logarithmic else a - c
            count += len(error)
            for (i, j), e in error.items():
                summed += sum(abs(error[n] - e) for n in ((i + 2, j), (i, j + 2)) if n in error)
        total += summed / count
    assert float(objectives.gradient_loss(p, t, valid, logarithmic=logarithmic)) == pytest.approx(total, rel=1e-4)


def test_relative_losses_do_not_see_scale_and_shift() -> None:
    p, t, valid = random_depth()
    wanted = float(objectives.scale_and_shift_invariant(p, t, valid))
    assert wanted > 0.1
    assert float(objectives.scale_and_shift_invariant(3 * p + 2, 0.5 * t - 1, valid)) == pytest.approx(wanted, rel=1e-4)
    assert float(objectives.scale_and_shift_invariant(5 * t + 1, t, valid)) == pytest.approx(0, abs=1e-5)
    assert float(objectives.gradient_matching(5 * t + 1, t, valid)) == pytest.approx(0, abs=1e-4)
    assert float(objectives.gradient_matching(p, t, valid)) > 0.1
    # the plain version, of the first image alone
    a, b = (x[0][valid[0]] for x in (p, t))
    a, b = ((x - x.median()) / (x - x.median()).abs().mean() for x in (a, b))
    alone = objectives.scale_and_shift_invariant(p[:1], t[:1], valid[:1])
    assert float(alone) == pytest.approx(float((a - b).abs().mean()), rel=1e-5)


def test_pixels_without_truth_have_no_gradient_and_a_image_without_any_no_loss() -> None:
    weights = dict.fromkeys(objectives.DEPTH_LOSSES, 1.0)
    depth = objectives.DepthLoss(weights, max_depth=20.0)
    p, t, valid = random_depth()
    p.requires_grad_()
    terms = depth(p, t, step=1000)
    assert [term.name for term in terms] == [
        "sig_loss", "gradient_log_loss", "gradient_loss", "l1_loss", "ssi_loss", "gradient_matching_loss",
    ]  # fmt: skip
    terms.total().backward()
    assert p.grad is not None
    assert bool(p.grad.isfinite().all())
    assert float(p.grad[~valid].abs().max()) == 0
    assert float(p.grad[valid].abs().max()) > 0
    empty = depth(p, torch.zeros_like(t), step=1000)
    assert float(empty.total().detach()) == 0


def test_an_unknown_depth_loss_is_an_error() -> None:
    with pytest.raises(DinoError, match="no depth loss 'SIGLOS'; did you mean 'SIGLOSS'"):
        objectives.DepthLoss({"SIGLOS": 1.0})
