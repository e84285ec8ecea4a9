"""Guides: gradients that are reversed and brought to a norm, targets from a table, centroids, and whole runs."""

from __future__ import annotations

import csv
import math
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ranks import run_ranks
from torch import Tensor
from toy_training import write_config, write_images

from dinov3 import checkpoint, distributed
from dinov3.cli.training import TrainOptions, guide_overrides
from dinov3.config.train import GuideConfig, LambdaConfig, TargetRange, load_config
from dinov3.data.metadata import metadata_of
from dinov3.errors import DinoError
from dinov3.losses import LossTerms
from dinov3.train.guides import Centroids, GuideHeads, Guides, Ridge, as_target, lambda_at
from dinov3.train.loop import Outcome
from dinov3.train.train import train

ALWAYS = LambdaConfig("constant")
HUES = ["red", "green", None, "red", "blue", "green"]


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def guides(*configs: GuideConfig, columns: Any = HUES, schedule: LambdaConfig = ALWAYS, **options: Any) -> Guides:
    made = Guides([as_target(c, columns) for c in configs], 4, schedule, **options)
    torch.manual_seed(1)
    if made.heads is not None:
        for p in made.heads.parameters():
            torch.nn.init.normal_(p)
    return made


def gradients(made: Guides, indices: list[int], step: int = 0, share: float = 1.0) -> tuple[dict[str, float], Tensor]:
    """{term: value}, the gradient of `share` times the sum at the CLS tokens."""
    cls = normal(2, 2 * 6, 4).unflatten(0, (2, 6))[:, indices].flatten(0, 1).requires_grad_()
    terms = LossTerms()
    made.observe(normal(3, 2 * 6, 4).unflatten(0, (2, 6))[:, indices].flatten(0, 1), indices)
    made.add(terms, cls, made.heads, indices, step)
    (terms.total() * share).backward()
    assert cls.grad is not None
    return {t.name: float(t.value.detach()) for t in terms}, cls.grad


# ---- gradients -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, expected",
    [
        ("sigmoid", [0, 2 / (1 + math.exp(-5)) - 1, 2 / (1 + math.exp(-10)) - 1]),
        ("linear", [0, 0.5, 1]),
        ("constant", [1] * 3),
    ],
)
def test_lambda_rises_over_its_warm_up_and_stays(kind: Any, expected: list[float]) -> None:
    schedule = LambdaConfig(kind, warmup_iterations=200)
    assert [lambda_at(schedule, it) for it in (0, 100, 200)] == pytest.approx(expected)
    assert lambda_at(schedule, 5000) == lambda_at(schedule, 200)
    assert lambda_at(LambdaConfig(kind, warmup_iterations=0), 0) == 1


@pytest.mark.parametrize("method", ["classification", "prototypical"])
def test_forgetting_reverses_a_tenth_of_the_gradient_at_the_tokens_and_the_head_learns(method: Any) -> None:
    indices = [0, 1, 2, 3, 4, 5]
    follow, forget = (guides(GuideConfig("hue", method=method, grl=grl)) for grl in (False, True))
    (value, plain), (again, reversed_) = gradients(follow, indices), gradients(forget, indices)
    assert value == again
    torch.testing.assert_close(reversed_, -0.1 * plain)
    assert plain.abs().sum() > 0
    if follow.heads is not None and forget.heads is not None:
        for a, b in zip(follow.heads.parameters(), forget.heads.parameters()):
            torch.testing.assert_close(b.grad, 0.1 * a.grad)  # type: ignore[operator]
    half = guides(GuideConfig("hue", method=method), schedule=LambdaConfig("linear", 20), accumulation=3)
    torch.testing.assert_close(gradients(half, indices, step=31)[1], 0.5 * plain)  # iteration 10


def test_a_normalised_gradient_has_the_norm_times_lambda_times_the_weight() -> None:
    indices = [0, 1, 2, 3, 4, 5]
    for c, weight in ((GuideConfig("hue", loss_weight=3.0), 3.0), (GuideConfig("hue", grl=True, loss_weight=5.0), 0.5)):
        free = gradients(guides(c), indices)[1]
        _, bound = gradients(guides(c, norm=0.25), indices)
        assert float(bound.norm()) == pytest.approx(0.25 * weight)
        torch.testing.assert_close(F.normalize(bound.flatten(), dim=0), F.normalize(free.flatten(), dim=0))
        accumulated = gradients(guides(c, norm=0.25), indices, share=0.5)[1]
        torch.testing.assert_close(accumulated, bound / 2)  # a half of two batches' sum
    assert not gradients(guides(GuideConfig("hue"), norm=0.25), [2])[1].any()  # no label: nothing, and no NaN


# ---- errors against their plain loops ------------------------------------------------------------------------------


def test_errors_are_those_of_the_plain_loop_over_labelled_rows() -> None:
    indices = [5, 2, 0, 1]
    cls = normal(2, 2 * 6, 4).unflatten(0, (2, 6))[:, indices]
    cells = ["a|b", "c", None, "a", "b|c", ""]
    numbers = ["-1", "3", None, "1", "0", "2"]
    cases: list[tuple[GuideConfig, Any]] = [
        (GuideConfig("x", hidden_dim=5), HUES),
        (GuideConfig("x", use_bce=True), cells[:5] + [None]),
        (
            GuideConfig("x", method="regression", output_activation="tanh", target_normalization=TargetRange(-1, 1)),
            numbers,
        ),
    ]
    for config, column in cases:
        made = guides(config, columns=column)
        assert made.heads is not None
        total = []
        for crop in range(2):
            for place, index in enumerate(indices):
                if column[index] is None:
                    continue
                out = made.heads([cls[crop, place]])[0].detach()
                if config.method == "regression":
                    wanted = (float(column[index]) + 1) / 4 * 2 - 1
                    total.append(float((out - wanted) ** 2))
                elif config.use_bce:
                    p = out.sigmoid()
                    on = [name in column[index].split("|") for name in "abc"]
                    total.append(-sum(float((q if o else 1 - q).log()) for q, o in zip(p, on)) / 3)
                else:
                    total.append(-float(out.log_softmax(0)[["blue", "green", "red"].index(column[index])]))
        values, _ = gradients(made, indices)
        assert values["guide_x_loss"] == pytest.approx(sum(total) / len(total), rel=1e-5)


def test_centroids_are_averages_of_the_teachers_directions_and_the_loss_is_protonce() -> None:
    c = GuideConfig("hue", method="prototypical", proto_centroid_momentum=0.9, n_outputs=4)
    centroids = Centroids(4, 4, c)
    total, spread, weight = torch.zeros(4, 4), torch.zeros(4), torch.zeros(4)
    for step in range(3):
        cls, values = normal(step, 6, 4), torch.tensor([0, 1, -1, 1, 0, 0] if step else [0, 0, 0, -1, 0, 0])
        centroids.update(cls, values)
        for k in range(4):
            rows = [F.normalize(cls[i], dim=0) for i in range(6) if values[i] == k]
            if rows:
                total[k] = 0.9 * total[k] + 0.1 * sum(rows) / len(rows)  # type: ignore[operator]
                weight[k] = 0.9 * weight[k] + 0.1
                middle = F.normalize(total[k], dim=0)
                spread[k] = 0.9 * spread[k] + 0.1 * sum((row - middle).norm() for row in rows) / len(rows)  # type: ignore[operator]
    x = normal(9, 4)
    found = centroids(x[None])[0]
    size = [float(spread[k] / weight[k]) for k in range(2)]
    for k in range(2):
        phi = max(0.07 * size[k] / (sum(size) / 2), 0.01)
        assert float(found[k]) == pytest.approx(float(F.cosine_similarity(x, total[k], dim=0)) / phi, rel=1e-4)
    assert found[2:].tolist() == [-1e4, -1e4]  # never seen
    tight = Centroids(4, 2, GuideConfig("hue", method="prototypical"))
    tight.update(torch.eye(4)[:2], torch.tensor([0, 1]))
    assert float(tight(torch.eye(4)[:1])[0, 0]) == pytest.approx(1 / 0.01)  # no spread: the floor


def test_the_ridge_is_that_of_plain_least_squares_and_its_gradient_that_of_the_whole_solution() -> None:
    config = GuideConfig("hue", method="ridge", ridge_features=0, ridge_strength=1e-9)
    x, values = normal(4, 200, 4).double(), torch.arange(200) % 3
    x[values == 1] += 0.7

    def explained(tokens: Tensor) -> Tensor:
        """R by least squares with an intercept, gradient through the solution."""
        y = F.one_hot(values).double()
        inputs = torch.cat([tokens, torch.ones_like(tokens[:, :1])], 1)
        rest = y - inputs @ torch.linalg.solve(inputs.T @ inputs, inputs.T @ y)
        return (1 - rest.square().sum() / (y - y.mean(0)).square().sum()).sqrt()

    tokens, twin = x.clone().requires_grad_(), x.clone().requires_grad_()
    value = Ridge(4, 3, config)(tokens, values)
    value.backward()
    (1 - explained(twin)).backward()
    assert float(value.detach()) == pytest.approx(1 - float(explained(x)), abs=1e-5)
    torch.testing.assert_close(tokens.grad, twin.grad, rtol=1e-4, atol=1e-8)
    step = torch.zeros_like(x)
    step[7, 2] = 1e-4
    slope = float(explained(x - step) - explained(x + step)) / 2e-4
    assert float(tokens.grad[7, 2]) == pytest.approx(slope, rel=1e-3)  # type: ignore[index]


def test_the_ridge_finds_nothing_where_means_are_equal_and_its_features_find_other_distributions() -> None:
    values = torch.arange(400) % 2
    x = normal(5, 400, 4)
    for k in range(2):
        x[values == k] -= x[values == k].mean(0)
    x[values == 1] *= 3  # equal means, another spread
    assert float(Ridge(4, 2, GuideConfig("hue", method="ridge", ridge_features=0))(x, values)) == pytest.approx(
        1, abs=1e-3
    )
    assert float(Ridge(4, 2, GuideConfig("hue", method="ridge"))(x, values)) < 0.6
    missing = torch.full_like(values, -1)
    alone = Ridge(4, 2, GuideConfig("hue", method="ridge"))
    assert float(alone(x, missing)) == 1


def on_a_rank(configs: list[GuideConfig], norm: float) -> tuple[dict[str, float], Tensor, list[Tensor]]:
    rank, world = distributed.rank(), distributed.world()
    made = guides(*configs, norm=norm)
    values, gradient = gradients(made, [[0, 1, 2, 3, 4, 5], [0, 1, 2], [3, 4, 5]][0 if world == 1 else 1 + rank])
    if made.heads is not None:
        distributed.average_gradients(list(made.heads.parameters()))
    learned = [] if made.heads is None else [p.grad for p in made.heads.parameters()]
    return distributed.average(values), gradient, [*learned, *made.centroids.buffers(), *made.ridges.buffers()]  # type: ignore[list-item]


def test_two_ranks_with_unequally_many_labels_compute_what_one_computes() -> None:
    norm = 0.5
    configs = [GuideConfig("hue", grl=True), GuideConfig("hue2", method="prototypical")]
    configs.append(GuideConfig("hue3", method="ridge", grl=True))
    values, gradient, learned = on_a_rank(configs, norm)
    parts = run_ranks(on_a_rank, 2, configs, norm)
    both = torch.cat([p[1].unflatten(0, (2, 3)) for p in parts], 1).flatten(0, 1) / 2  # data parallelism's average
    torch.testing.assert_close(both, gradient)
    for other, _, tensors in parts:
        assert other == pytest.approx(values)
        for a, b in zip(tensors, learned, strict=True):
            torch.testing.assert_close(a, b)


# ---- tables --------------------------------------------------------------------------------------------------------


class Named:
    def __init__(self, *names: str) -> None:
        self.names = names

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int) -> bytes:
        raise AssertionError("pixels are not needed")

    def name(self, index: int) -> str:
        return self.names[index]


@pytest.mark.parametrize("ending", ["csv", "tsv", "parquet"])
def test_columns_come_in_the_order_of_the_images_and_what_does_not_match_is_counted(
    ending: str, tmp_path: Path
) -> None:
    file = tmp_path / f"table.{ending}"
    rows = [("b/2.jpg", "x", 1), ("./a/1.jpg", "", 2), ("c.jpg", "z", 3)]
    if ending == "parquet":
        arrow = pytest.importorskip("pyarrow")
        import pyarrow.parquet as parquet

        path, word, n = (list(column) for column in zip(*rows))
        parquet.write_table(arrow.table({"path": path, "word": [w or None for w in word], "n": n, "more": n}), file)
    else:
        with open(file, "w", newline="") as stream:
            csv.writer(stream, delimiter="\t" if ending == "tsv" else ",").writerows([("path", "word", "n"), *rows])
    columns, notes = metadata_of(file, ["word", "n"], Named("a/1.jpg", "b/2.jpg", "d.jpg"))
    assert columns["word"] == [None, "x", None]
    assert [n if n is None else int(n) for n in columns["n"]] == [2, 1, None]
    assert [note.partition(": ")[2] for note in notes] == [
        "1 of 3 images have no row, such as d.jpg", "1 of 3 rows have no image, such as c.jpg",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "name, text, columns, sentence",
    [
        ("a.csv", "path,hue\n1.jpg,red\n", ["hew"], "has no column 'hew'; did you mean 'hue'"),
        ("a.csv", "file,hue\n1.jpg,red\n", ["hue"], "has no column 'path'"),
        ("a.csv", "path,hue\n1.jpg,red\n./1.jpg,blue\n", ["hue"], "two rows of 1.jpg"),
        ("a.csv", "path,hue\n/data/1.jpg,red\n", ["hue"], r"such as '/data/1.jpg', the images are called '1.jpg'; paths are"),
        ("a.csv", "path,hue\n", ["hue"], "no image has a row"),
        ("a.parquet", "no table", ["hue"], "cannot be read"),
        ("a.xlsx", "", ["hue"], "must end in .csv, .tsv, .parquet"),
        ("gone.csv", None, ["hue"], "there is no file"),
    ],
)  # fmt: skip
def test_a_table_that_does_not_fit_is_one_sentence(
    name: str, text: str | None, columns: list[str], sentence: str, tmp_path: Path
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(DinoError, match=sentence):
        metadata_of(tmp_path / name, columns, Named("1.jpg"))


@pytest.mark.parametrize(
    "options, column, sentence",
    [
        ({"method": "regression"}, ["1", "two"], r"regression needs numbers .*for words take classification"),
        ({"method": "regression"}, ["1", "1", None], "all images have the value 1"),
        ({}, ["a", "a"], "all images have the value a"),
        ({}, [None, None], "no image has a value"),
        ({"n_outputs": 2}, ["a", "b", "c"], "n_outputs is 2 and the column has 3 values"),
    ],
)
def test_a_column_that_does_not_suit_its_method_is_one_sentence(options: Any, column: Any, sentence: str) -> None:
    with pytest.raises(DinoError, match=sentence):
        as_target(GuideConfig("x", **options), column)


@pytest.mark.parametrize(
    "overrides, sentence",
    [
        (["guide.guides=[{name: a, grl_space: embedding}]"], "grl_space"),
        (["guide.guides=[{name: a}, {name: a}]"], "two guides have the column 'a'"),
        (["guide.guides=[{name: a, dropout: 2}]"], r"guides\[0\].dropout .*below 1"),
        (["guide.guides=[{name: a, method: prototypical, hidden_dim: 8}]"], "hidden_dim .*no meaning for the method"),
        (["guide.guides=[{name: a, output_activation: tanh}]"], "output_activation .*no meaning for the method"),
        (["guide.guides=[]"], "name at least one column"),
        (["guide.guides=[{name: a}]", "guide.metadata=null"], "name the CSV or Parquet file"),
        (["guide.guides=[{name: a}]", "guide.enabled=false"], "guide.enabled .*would do nothing"),
        (["guide.guides=[{name: a}]", "distillation.enabled=true"], "guide.enabled .*self-distillation"),
    ],
)
def test_settings_of_guides_that_do_not_fit_are_refused(overrides: list[str], sentence: str) -> None:
    with pytest.raises(DinoError, match=sentence):
        load_config(None, ["train.dataset_path=/i", "guide.enabled=true", "guide.metadata=a.csv", *overrides])


# ---- whole runs ----------------------------------------------------------------------------------------------------

SETTINGS = [
    "guide.enabled=true", "guide.lambda_schedule.warmup_iterations=4",
    "guide.guides=[{name: hue, grl: true, hidden_dim: 8, dropout: 0.1}, {name: shade, method: prototypical}, "
    "{name: third, grl: true, method: ridge}]",
]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    folder = tmp_path_factory.mktemp("guided")
    images = write_images(folder / "images")
    with open(folder / "table.csv", "w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(("path", "hue", "shade", "third"))
        for i, path in enumerate(sorted(images.rglob("*.png"))):
            writer.writerow((path.relative_to(images), "rgb"[i % 3], "" if i == 5 else i % 2, i % 4 // 2))
    return write_config(folder), images, folder / "table.csv"


def run(data: tuple[str, Path, Path], out: Path, *overrides: str) -> Outcome:
    toy, images, table = data
    config, notes = load_config(toy, [f"train.dataset_path={images}", f"guide.metadata={table}", *SETTINGS, *overrides])
    return train(config, out, notes=notes)


def test_guides_are_trained_saved_and_resumed_to_the_bit_and_not_in_the_teacher(
    data: tuple[str, Path, Path], tmp_path: Path
) -> None:
    run(data, tmp_path / "whole", "evaluation.eval_period_iterations=12")
    assert run(data, tmp_path / "parts", "run.time_limit_minutes=1e-6").iterations == 1
    assert run(data, tmp_path / "parts").finished
    a, b = (checkpoint.read_tensors(tmp_path / name / "ckpt" / "11") for name in ("whole", "parts"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert a["model.guide_centroids.1.total"].shape == (2, 32)
    ridge = [a[name] for name in a if name.startswith("model.guide_ridges.2.")]
    assert ridge
    assert all(x.isfinite().all() for x in ridge)
    assert any((x != 0).any() for x in ridge)
    assert a["model.student.guides.heads.0.0.weight"].shape == (8, 32)
    assert (a["optimizer.state.guides.heads.0.0.weight.exp_avg"] != 0).any()
    dumped = torch.load(tmp_path / "whole" / "eval" / "training_11" / "teacher_checkpoint.pth", weights_only=True)
    assert {name.split(".")[0] for name in dumped["teacher"]} == {"backbone", "dino_head", "ibot_head"}
    log = (tmp_path / "whole" / "log.txt").read_text()
    assert "guide 'hue': classification of 3 values (b, g, r), forgotten; 12 of 12 images have a value" in log
    assert "guide 'shade': prototypical of 2 values (0, 1), followed; 11 of 12 images have a value" in log
    metrics = (tmp_path / "whole" / "metrics.jsonl").read_text()
    assert all(
        name in metrics for name in ("guide_hue_loss", "guide_shade_loss", "guide_third_loss", "guides_grad_norm")
    )


def sharded(config_file: str, overrides: list[str], out: str) -> dict[str, Tensor]:
    config, notes = load_config(config_file, overrides)
    train(config, out, notes=notes)
    return checkpoint.read_tensors(Path(out) / "ckpt" / "3")


@pytest.mark.slow
def test_guides_on_two_ranks_are_sharded_and_end_as_on_one(data: tuple[str, Path, Path], tmp_path: Path) -> None:
    toy, images, table = data
    fixed = [
        "student.drop_path_rate=0",
        "student.pos_embed_rope_rescale_coords=null",
        "dino.koleo_loss_distributed=true",
    ]
    fixed += ["ibot.mask_sample_probability=1.0", "ibot.mask_ratio_min_max=[0.3,0.31]", "optim.epochs=1"]
    settings = [text.replace("dropout: 0.1", "dropout: 0") for text in SETTINGS]
    overrides = [f"train.dataset_path={images}", f"guide.metadata={table}", *settings, *fixed]
    alone = sharded(toy, overrides, str(tmp_path / "alone"))
    both, _ = run_ranks(
        sharded, 2, toy, [*overrides, "train.batch_size_per_gpu=2"], str(tmp_path / "both"), timeout_s=300
    )
    assert alone.keys() == both.keys()
    name = "model.guide_centroids.1.total"
    torch.testing.assert_close(both[name], alone[name], atol=1e-4, rtol=0)


@pytest.mark.slow
def test_the_command_forgets_a_column(data: tuple[str, Path, Path], tmp_path: Path) -> None:
    """In a fresh process, as it is typed."""
    toy, images, table = data
    command = [sys.executable, "-m", "dinov3", "train", str(images), "--out", str(tmp_path / "run"), "--recipe", toy]
    options = shlex.split(f"--forget hue --guide shade=regression,loss_weight=0.5 --metadata {table} --steps 2")
    done = subprocess.run([*command, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "guide 'hue': ridge of 3 values (b, g, r), forgotten" in done.stderr
    assert "guide 'shade': regression, followed" in done.stderr
    resolved = (tmp_path / "run" / "resolved.yaml").read_text()
    assert "loss_weight: 0.5" in resolved


def test_options_of_the_command_become_guides() -> None:
    given = TrainOptions(None, ["a", "b=prototypical,loss_weight=0.03"], ["c"], "t.csv")
    config, _ = load_config(None, ["train.dataset_path=/i", *guide_overrides(given)])
    assert [(g.name, g.method, g.grl, g.loss_weight) for g in config.guide.guides] == [
        ("a", "classification", False, 1.0), ("b", "prototypical", False, 0.03), ("c", "ridge", True, 1.0),
    ]  # fmt: skip
    assert guide_overrides(TrainOptions()) == []
    with pytest.raises(DinoError, match="need --metadata FILE"):
        guide_overrides(TrainOptions(None, ["a"]))
    with pytest.raises(DinoError, match="no key 'los_weight'; did you mean 'loss_weight'"):
        guide_overrides(TrainOptions(None, ["a=regression,los_weight=3"], [], "t.csv"))
    with pytest.raises(DinoError, match="write COLUMN"):
        guide_overrides(TrainOptions(None, ["a=regression,b"], [], "t.csv"))


def test_the_heads_of_guides_begin_small() -> None:
    heads = GuideHeads(8, [as_target(GuideConfig("hue", hidden_dim=5), HUES)])
    heads.init_weights()
    assert max(float(p.detach().abs().max()) for p in heads.parameters()) < 0.1
