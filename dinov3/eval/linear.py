"""Linear classifiers on a frozen backbone, trained with augmentation; a grid of heads in one pass (paper §6.1.1, Tab. 7).

    python -m dinov3.run.submit dinov3/eval/linear.py --ngpus 8 model.name=dinov3_vitl16 model.weights=FILE \\
        train.dataset=ImageNet:split=TRAIN:root=…:extra=… train.val_dataset=ImageNet:split=VAL:root=…:extra=… \\
        eval.test_datasets=[ImageNetV2:root=…,ImageNetReaL:root=…:labels=real.json]

Every batch of random crops goes through the backbone once and then through all heads: one for each learning rate, number
of last blocks, pooling and weight decay. Their losses are added, so heads train independently. The head that is best on the
validation images at the end is measured on the test sets. Validation and test images are always seen the same
way, so their features are computed once. A stopped run resumes exactly where it was: crops are functions of (seed,
epoch, image) and the schedule's state is in the checkpoint.

A head's input is the CLS tokens of the last n blocks, then (`avgpool`) the mean patch of the last, all normed. Published:
ViT-L trained on ImageNet-1k by the README's recipe 83.5. Legend: B images, N patches, D width, C classes, H heads.
"""

from __future__ import annotations

import itertools
import math
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3 import distributed
from dinov3.config.bounds import Problem, setting
from dinov3.data.crops import generator, random_crop
from dinov3.data.datasets import make_dataset
from dinov3.data.datasets.base import ImageDataset
from dinov3.data.loading import Order
from dinov3.data.transforms.inputs import normalised, to_pixels
from dinov3.errors import DinoError
from dinov3.eval import session as common
from dinov3.eval.arguments import ClassifierConfig
from dinov3.eval.features import (
    Column,
    Targets,
    check_classes,
    class_count,
    decoded,
    labels_of,
    over_tries,
    test_targets,
    training_rows,
)
from dinov3.eval.session import Session
from dinov3.features import outputs
from dinov3.metrics import Link, Metric, Numbers
from dinov3.metrics import evaluate as measure
from dinov3.runlog import StopRequest, Ticker
from dinov3.threads import prefetched
from dinov3.weights.writing import write_torch

MANY_VIEWS = 1000  # of an image; the published probe of ImageNet sees each some ten times
RATES = [1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1]


@dataclass
class TrainSection:
    dataset: str = setting("", required="a folder or dataset spec, as in dinov3 eval linear TRAIN VAL")
    val_dataset: str = setting("", required="a second folder or dataset spec, as in dinov3 eval linear TRAIN VAL")
    val_metric_type: Metric = Metric.MEAN_ACCURACY
    batch_size: int = setting(128, at_least=1)  # of each process
    num_workers: int = 8
    learning_rates: list[float] = setting(list(RATES), required="at least one value")  # at a batch of 256
    n_last_blocks_list: list[int] = setting([1], required="at least one value")
    # ours: false is the paper's CLS-only probe
    avgpool_list: list[bool] = setting([True], required="at least one value")
    weight_decays: list[float] = setting([0.0], required="at least one value")  # ours: the paper's grid has 0 and 1e-5
    loss_type: Literal["cross_entropy", "binary_cross_entropy"] = "cross_entropy"
    optimizer_type: Literal["sgd", "adamw"] = "sgd"
    scheduler_type: Literal["cosine_annealing", "one_cycle"] = "cosine_annealing"
    epochs: int = setting(10, at_least=1)
    epoch_length: int = setting(1250, at_least=1)  # iterations
    save_checkpoint_iterations: int | None = None  # null: an epoch
    eval_period_iterations: int | None = None  # null: an epoch
    checkpoint_retention_policy: Literal["none", "all", "best", "last", "last_and_best"] = "none"
    resume: bool = True
    classifier_fpath: str | None = None  # a folder of checkpoints to begin from
    seed: int = 0  # of the order and the crops


@dataclass
class TestSection:
    test_datasets: list[str] = field(default_factory=list)
    test_metric_types: list[Metric] = field(default_factory=list)  # empty: the set's own, else validation's
    batch_size: int = 256
    num_workers: int = 8


@dataclass
class LinearConfig(ClassifierConfig):
    POSITIONAL = (("TRAIN", "train.dataset"), ("VAL", "train.val_dataset"))

    train: TrainSection = field(default_factory=TrainSection)
    eval: TestSection = field(default_factory=TestSection)

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        f = self.features  # only dtype and cache have a meaning here
        if (list(f.layers), f.pool, f.norm) != ([-1], "cls", True):
            yield "features", "what heads see is set by train.n_last_blocks_list and train.avgpool_list"
        if self.eval.test_metric_types and len(self.eval.test_metric_types) != len(self.eval.test_datasets):
            yield "eval.test_metric_types", "names one metric for each of eval.test_datasets, or none"


# ---- heads ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HeadKind:
    """A head's input and optimiser settings; `lr` after scaling with the batch."""

    blocks: int
    avgpool: bool
    lr: float
    weight_decay: float = 0.0


def scaled(rate: float, batch_per_process: int, processes: int) -> float:
    return rate * batch_per_process * processes / 256


def grid(train: TrainSection, processes: int) -> dict[str, HeadKind]:
    """{name: head}: n, pooling and rate in the reference's words, with as many decimals as keep all names apart."""
    kinds = [
        HeadKind(n, pool, scaled(rate, train.batch_size, processes), decay)
        for n in train.n_last_blocks_list
        for pool in train.avgpool_list
        for rate in train.learning_rates
        for decay in train.weight_decays
    ]
    for decimals in range(5, 16):  # the reference stays at five, where 5e-6 and 1e-5 have one name
        names = [_name(kind, decimals, with_decay=len(train.weight_decays) > 1) for kind in kinds]
        if len(set(names)) == len(names):
            return dict(zip(names, kinds))
    raise DinoError("train.learning_rates (or another list of the grid) holds a value twice")


def _name(kind: HeadKind, decimals: int, *, with_decay: bool) -> str:
    text = f"classifier_{kind.blocks}_blocks_avgpool_{kind.avgpool}_lr_{kind.lr:.{decimals}f}"
    return (text + (f"_wd_{kind.weight_decay:.{decimals}f}" if with_decay else "")).replace(".", "_")


def head_input(kind: HeadKind, cls: Sequence[Tensor], mean: Tensor) -> Tensor:
    """[B, (n + 1)·D] from the CLS tokens [B, D] of the blocks, first to last, and the mean patch [B, D] of the last."""
    return torch.cat([*cls[len(cls) - kind.blocks :], *([mean] if kind.avgpool else [])], dim=-1)


class Heads(nn.Module):
    """All heads of the grid: linear layers, weights N(0, 0.01²), bias 0."""

    def __init__(self, kinds: Mapping[str, HeadKind], width: int, n_classes: int, seed: int = 0) -> None:
        super().__init__()
        self.kinds = dict(kinds)
        self.layers = nn.ModuleDict()
        for name, kind in self.kinds.items():
            layer = nn.Linear(width * (kind.blocks + kind.avgpool), n_classes)
            nn.init.normal_(layer.weight, std=0.01, generator=torch.Generator().manual_seed(seed))
            nn.init.zeros_(layer.bias)
            self.layers[name] = layer

    def forward(self, cls: Sequence[Tensor], mean: Tensor) -> dict[str, Tensor]:
        """{name: logits [B, C]}."""
        inputs: dict[tuple[int, bool], Tensor] = {}
        for kind in self.kinds.values():
            if (kind.blocks, kind.avgpool) not in inputs:
                inputs[kind.blocks, kind.avgpool] = head_input(kind, cls, mean).float()
        return {name: self.layers[name](inputs[kind.blocks, kind.avgpool]) for name, kind in self.kinds.items()}

    def groups(self) -> list[dict[str, Any]]:
        return [
            {"params": list(self.layers[name].parameters()), "lr": kind.lr, "weight_decay": kind.weight_decay}
            for name, kind in self.kinds.items()
        ]


def make_optimizer(heads: Heads, train: TrainSection, total: int) -> tuple[torch.optim.Optimizer, Any]:
    """(optimiser, schedule over `total` iterations)."""
    if train.optimizer_type == "sgd":
        optimiser: torch.optim.Optimizer = torch.optim.SGD(heads.groups(), momentum=0.9, weight_decay=0)
    else:
        optimiser = torch.optim.AdamW(heads.groups(), weight_decay=0)
    if train.scheduler_type == "cosine_annealing":
        return optimiser, torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, total, eta_min=0)
    rates = [kind.lr for kind in heads.kinds.values()]
    return optimiser, torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=rates, total_steps=total)


def loss_of(kind: str, logits: Tensor, target: Tensor) -> Tensor:
    if kind == "cross_entropy":
        if target.ndim == 2:
            raise DinoError("images with several labels need train.loss_type=binary_cross_entropy")
        return F.cross_entropy(logits, target)
    if target.ndim == 1:
        target = F.one_hot(target, logits.shape[1])
    return F.binary_cross_entropy_with_logits(logits, target.to(logits.dtype))


# ---- images -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Augmented:
    """Random crops (area 8 to 100 %, aspect 3/4 to 4/3, bicubic) and flips, as a function of (seed, epoch, image)."""

    dataset: ImageDataset
    rows: np.ndarray  # the images that train
    size: int
    seed: int = 0

    def crop(self, draw: tuple[int, int]) -> Tensor:
        """uint8 [3, size, size] of (epoch, position in `rows`)."""
        epoch, position = draw
        index = int(self.rows[position])
        image = to_pixels(decoded(self.dataset, index).image)
        return random_crop(image, self.size, (0.08, 1.0), generator(self.seed, epoch, index))

    def draws(self, batch: int, first: int, last: int) -> Iterator[list[tuple[int, int]]]:
        """This process's batches of iterations first … last − 1."""
        order = Order(len(self.rows), self.seed)
        rank, world = distributed.rank(), distributed.world()
        for step in range(first, last):
            epochs, positions = order.at(step * batch * world + np.arange(rank, batch * world, world))
            yield list(zip(epochs.tolist(), positions.tolist()))

    def batches(self, batch: int, first: int, last: int, workers: int) -> Iterator[tuple[list[int], Tensor]]:
        """(rows of the data set, uint8 [B, 3, size, size])."""
        draws = itertools.chain.from_iterable(self.draws(batch, first, last))
        crops = prefetched(lambda draw: (int(self.rows[draw[1]]), self.crop(draw)), draws, workers, 2 * batch)
        while made := list(itertools.islice(crops, batch)):
            rows, pixels = zip(*made)
            yield list(rows), torch.stack(pixels)


# ---- checkpoints ----------------------------------------------------------------------------------------------------


class SavedHeads:
    """`<folder>/{<iteration>, best, final}/checkpoint.pth`: iteration, linear_classifiers, optimizer, best_accuracy, and
    (ours) scheduler, so that a resumed run resumes with the same learning rates."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def numbered(self) -> list[int]:
        if not self.folder.is_dir():
            return []
        names = [p.parent.name for p in self.folder.glob("*/checkpoint.pth")]
        return sorted(int(n) for n in names if n.isdecimal())

    def save(self, name: str, state: Mapping[str, Any]) -> None:
        if distributed.is_main():
            write_torch(dict(state), self.folder / name / "checkpoint.pth")

    def load(self, name: str) -> dict[str, Any]:
        return torch.load(self.folder / name / "checkpoint.pth", map_location="cpu", weights_only=True)

    def newest(self) -> str | None:
        numbers = self.numbered()
        return str(numbers[-1]) if numbers else None

    def keep_only(self, names: set[str]) -> None:
        if distributed.is_main() and self.folder.is_dir():
            for path in self.folder.iterdir():
                if path.name not in names:
                    shutil.rmtree(path)


def retained(policy: str, numbers: Sequence[int]) -> set[str]:
    """The folders that stay after a run."""
    return {
        "none": set(),
        "all": {*map(str, numbers), "best", "final"},
        "best": {"best"},
        "last": {"final"},
        "last_and_best": {"final", "best"},
    }[policy]


# ---- the evaluation -------------------------------------------------------------------------------------------------


@dataclass
class TestSet:
    """Images that are seen the same way every time: features once, then only heads."""

    line: str
    cls: list[Tensor]
    mean: Tensor
    targets: Targets
    metric: Metric
    link: Link = "softmax"  # from logits to the probabilities that some metrics take

    def scores(self, heads: Heads, name: str, rows: int = 8192) -> np.ndarray:
        kind, layer = heads.kinds[name], heads.layers[name]
        device = next(heads.parameters()).device
        parts = [
            layer(head_input(kind, [c[i : i + rows] for c in self.cls], self.mean[i : i + rows]).float().to(device))
            for i in range(0, len(self.mean), rows)
        ]
        return self.targets.chosen(torch.cat(parts).cpu().numpy())

    @torch.no_grad()
    def numbers(self, heads: Heads, name: str) -> Numbers:
        return measure(
            self.metric, self.scores(heads, name), self.targets.labels, groups=self.targets.groups, link=self.link
        )


def best_head(accuracies: Mapping[str, float]) -> str:
    """The first of the best; also where all are 0."""
    return max(accuracies, key=lambda name: accuracies[name])


class LinearEvaluation:
    """Model, data sets and metrics of an evaluation; `one_try` is the algorithm."""

    def __init__(self, config: LinearConfig, session: Session) -> None:
        c, t = config, config.train
        self.config, self.session = config, session
        self.train_set = make_dataset(t.dataset)
        self.labels = labels_of(self.train_set, t.dataset)
        lines = t.val_dataset, *c.eval.test_datasets
        sets = [self.opened(line) for line in lines]
        targets = list(map(test_targets, sets, lines))
        self.model: Any = session.model(c.model)  # after the data: mistakes in them are found first
        self.preprocessing = session.preprocessing(self.model, c.transform)
        self.blocks: int = max(t.n_last_blocks_list)
        n_blocks: Any = self.model.n_blocks
        if self.blocks > n_blocks:
            raise DinoError(f"train.n_last_blocks_list holds {self.blocks} blocks; this model has {n_blocks}")
        if len(set(getattr(self.model, "embed_dims", [self.model.embed_dim])[-self.blocks :])) > 1:
            raise DinoError("the last stages of a ConvNeXt differ in width; take train.n_last_blocks_list=[1]")
        metrics: list[Any] = list(c.eval.test_metric_types) or [None] * len(c.eval.test_datasets)
        self.val, *self.tests = map(self.test_set, lines, sets, targets, [t.val_metric_type, *metrics])

    def opened(self, line: str) -> ImageDataset:
        dataset = make_dataset(line)
        if not hasattr(dataset, "get_imagenet_class_mapping"):
            check_classes(self.train_set, dataset, line)
        return dataset

    def test_set(self, line: str, dataset: ImageDataset, targets: Targets, metric: Metric | None) -> TestSet:
        c, n = self.config, self.model.n_blocks
        batch = {"batch_size": c.eval.batch_size, "workers": c.eval.num_workers}
        columns: list[Tensor] = []
        wanted: list[tuple[Any, int]] = [*(("cls", i) for i in range(n - self.blocks, n)), ("mean", n - 1)]
        self.session.same_pass = (list(range(n - self.blocks, n)), ["cls+mean"])  # all in one pass
        for token, layer in wanted:
            section = replace(c.features, layers=[layer], pool=token)
            x = self.session.features(self.model, dataset, self.preprocessing, section, **batch)
            columns.append(torch.from_numpy(np.array(x)))
        self.session.same_pass = ([], [])
        metric = metric or self.metric_of(dataset)
        link: Link = "softmax" if c.train.loss_type == "cross_entropy" else "sigmoid"
        return TestSet(line, columns[:-1], columns[-1], targets, metric, link)

    def metric_of(self, dataset: ImageDataset) -> Metric:
        """The data set's own metric (ReaL, ImageNet-C), else the validation's."""
        own = getattr(dataset, "metric", "mean_accuracy")
        return Metric(own) if own != "mean_accuracy" else self.config.train.val_metric_type

    def tokens(self, crops: Tensor) -> tuple[list[Tensor], Tensor]:
        """uint8 crops → (CLS of the last blocks, mean patch of the last one)."""
        x = normalised(crops.to(self.session.device), self.preprocessing.mean, self.preprocessing.std)
        (found,) = outputs(self.model, [x], range(-self.blocks, 0))
        return [out["cls"] for out in found], Column("mean", -1).of(found[-1])

    # -- one training of all heads

    def one_try(self, rows: np.ndarray, suffix: str = "") -> tuple[Numbers, str, Heads]:
        """({column: fraction}, the winner's name, the heads) after training on these images."""
        t, session = self.config.train, self.session
        total = t.epochs * t.epoch_length
        save_every = t.save_checkpoint_iterations or t.epoch_length
        eval_every = t.eval_period_iterations or t.epoch_length
        kinds = grid(t, distributed.world())
        n_classes = class_count(self.labels)
        heads = Heads(kinds, self.model.embed_dim, n_classes).to(session.device)
        optimiser, schedule = make_optimizer(heads, t, total)
        saved = SavedHeads(session.output / f"checkpoints{suffix}")
        first, best = self.resume(heads, optimiser, schedule, saved)
        data = Augmented(self.train_set, rows, self.config.transform.crop_size, t.seed)
        labels = torch.from_numpy(self.labels)

        def state(iteration: int) -> dict[str, Any]:
            return {
                "iteration": iteration, "linear_classifiers": heads.state_dict(), "optimizer": optimiser.state_dict(),
                "scheduler": schedule.state_dict(), "best_accuracy": best,
            }  # fmt: skip

        if first < total:
            each = f"{t.batch_size} images on each of {distributed.world()} processes"
            session.log(f"{len(kinds)} heads, iterations {first} to {total}, {each}")
        images = t.batch_size * distributed.world()
        if (views := total * images / len(rows)) > MANY_VIEWS:
            once = math.ceil(len(rows) / images)
            session.log(f"note: each image is seen {views:,.0f} times; train.epoch_length={once} is a pass over them")
        ticker = Ticker(session.log, "iteration", total, first=first, each=images)
        with StopRequest() as stop:
            for step, (numbers, crops) in enumerate(
                data.batches(t.batch_size, first, total, t.num_workers), start=first
            ):
                cls, mean = self.tokens(crops)
                target = labels[numbers].to(session.device)
                # clones: tensors of inference mode take no part in a backward pass
                logits = heads([x.clone() for x in cls], mean.clone())
                loss = torch.stack([loss_of(t.loss_type, one, target) for one in logits.values()]).sum()
                optimiser.zero_grad()
                loss.backward()
                distributed.average_gradients(list(heads.parameters()))
                optimiser.step()
                schedule.step()
                done = step + 1
                if ticker.due(done):  # reading a loss waits for the device
                    ticker(done, f"  mean loss of the heads {float(loss.detach()) / len(kinds):.4g}")
                if done % eval_every == 0 and done < total:  # the last one follows anyway
                    _, accuracy = self.validate(heads, done)
                    if accuracy > best:
                        best = accuracy
                        saved.save("best", state(done))
                stopping = stop.agreed(session.device) and done < total
                if stopping or done % save_every == 0:
                    older = saved.numbered()
                    saved.save(str(done), state(done))
                    if t.checkpoint_retention_policy != "all":
                        saved.keep_only({str(done), "best", "final"} - {str(n) for n in older if n != done})
                if stopping:
                    raise KeyboardInterrupt(f"{done} of {total} iterations are done and saved")
        winner, accuracy = self.validate(heads, total)
        if accuracy >= best:
            best = accuracy
            saved.save("best", state(total))
        saved.save("final", state(total))
        distributed.barrier()
        saved.keep_only(retained(t.checkpoint_retention_policy, saved.numbered()))
        results: Numbers = {}
        for test in [self.val, *self.tests]:
            for key, value in test.numbers(heads, winner).items():
                if key != "top-5":
                    results[f"{test.line}_accuracy" if key == "top-1" else f"{test.line} {key}"] = value
            if self.config.save_results:
                with torch.no_grad():
                    predictions = test.scores(heads, winner).argmax(1)
                session.save_arrays(test.line.replace("/", "_") + suffix, predictions, test.targets.labels)
        return results, winner, heads

    def resume(self, heads: Heads, optimiser: Any, schedule: Any, saved: SavedHeads) -> tuple[int, float]:
        """(first iteration, best accuracy so far): from this run's checkpoints, or heads from another's."""
        t = self.config.train
        if t.resume and (newest := saved.newest()) is not None:
            state = saved.load(newest)
            heads.load_state_dict(state["linear_classifiers"])
            optimiser.load_state_dict(state["optimizer"])
            schedule.load_state_dict(state["scheduler"])
            self.session.log(f"resuming from iteration {state['iteration']} ({saved.folder / newest})")
            return int(state["iteration"]), float(state["best_accuracy"])
        if t.classifier_fpath is not None:
            other = SavedHeads(Path(t.classifier_fpath))
            name = "final" if (other.folder / "final").is_dir() else other.newest()
            if name is None:
                raise DinoError(
                    f"train.classifier_fpath={t.classifier_fpath} holds no checkpoint (final/ or <iteration>/)"
                )
            try:
                heads.load_state_dict(other.load(name)["linear_classifiers"])
            except RuntimeError as error:
                raise DinoError(
                    f"the heads in {t.classifier_fpath} are not this grid's: {str(error).splitlines()[1]}"
                ) from None
        return 0, -1.0

    @torch.no_grad()
    def validate(self, heads: Heads, iteration: int) -> tuple[str, float]:
        """The best head on the validation images and its accuracy, also written to results_eval_linear.json."""
        accuracies = {name: self.val.numbers(heads, name)["top-1"] for name in heads.kinds}
        name = best_head(accuracies)
        best = {"best_classifier": {"name": name, "accuracy": accuracies[name]}}
        self.session.append_json(best, before=f"iter: {iteration}\n", after="\n\n")
        self.session.log(f"iteration {iteration}: best on validation {name}, {100 * accuracies[name]:.2f}")
        return name, accuracies[name]

    def save_winner(self, heads: Heads, winner: str, accuracy: float) -> None:
        """The winner as a head file that `dinov3 predict` opens, where it has the published classifier's form."""
        kind = heads.kinds[winner]
        if not self.session.run.writer or (kind.blocks, kind.avgpool) != (1, True):
            return
        from dinov3.heads.linear import LinearClassifier
        from dinov3.hub.own_heads import save_head

        if self.model.origin.form in ("transformers", "timm") and not hasattr(self.model, "config"):
            return  # another library's backbone: a head file could not name it
        layer = heads.layers[winner]
        assert isinstance(layer, nn.Linear)
        names = list(getattr(self.train_set, "class_names", [])) or None
        path = self.session.output / "head.safetensors"
        save_head(
            path,
            LinearClassifier(self.model, layer),
            task="classification",
            head="linear",
            options={"n_classes": layer.out_features},
            class_names=names,
            preprocessing=self.preprocessing,
            metrics={"val top-1": round(100 * accuracy, 2)},
        )
        self.session.log(f"the winner is in {path}")


def evaluate(config: LinearConfig, session: Session) -> dict[str, Any]:
    run = LinearEvaluation(config, session)
    shots = config.few_shot
    if not shots.enable:
        results, winner, heads = run.one_try(np.arange(len(run.labels)))
        run.save_winner(heads, winner, results[f"{config.train.val_dataset}_accuracy"])
        return {key: 100 * value for key, value in results.items()} | {"best_classifier": winner}
    tries = [run.one_try(rows, f"_{i}")[0] for i, rows in enumerate(training_rows(shots, run.labels))]
    return over_tries([{key: 100 * value for key, value in numbers.items()} for numbers in tries])


def main(argv: Sequence[str] | None = None) -> int:
    return common.main("linear", LinearConfig, evaluate, argv)


if __name__ == "__main__":
    sys.exit(main())
