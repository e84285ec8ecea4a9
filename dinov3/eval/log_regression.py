"""Logistic regression on frozen features, its strength chosen on validation images (paper §6.1.3: the Fine-S suite).

    python -m dinov3.run.submit dinov3/eval/log_regression.py model.name=dinov3_vits16 model.weights=FILE \\
        train.dataset=/data/flowers/train eval.test_dataset=/data/flowers/test

Multinomial, L2, L-BFGS: ½‖w‖² + C Σ cross-entropy, for 45 strengths C = 1e-6 … 1e5. Without a validation set, a tenth
of each class is set apart for choosing C and joins the training set for the last fit. Several labels an image are
as many yes-or-no regressions. Results are per cent.

The solver is scikit-learn's, which the reference uses and which is the faster one for small problems, or torch's L-BFGS
(`train.solver=torch`), which runs on any device (`train.train_features_device=cuda`); "auto" takes the first on the cpu
where it is installed. Both minimise the same convex function, and a test holds them together.
Legend: N images, D width, C classes.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dinov3 import distributed
from dinov3.config.bounds import Problem, setting
from dinov3.errors import DinoError, require
from dinov3.eval import session as common
from dinov3.eval.arguments import ClassifierConfig, TransformSection
from dinov3.eval.features import Targets, class_count, over_tries, training_rows
from dinov3.eval.session import Session
from dinov3.metrics import Link, Metric, Numbers
from dinov3.metrics import evaluate as measure
from dinov3.optim import logistic_regression
from dinov3.runlog import ticked

STRENGTHS: tuple[float, ...] = tuple(10 ** (e / 4) for e in range(-24, 21))  # 1e-6, 1.7783e-6, …, 1e5


@dataclass
class TrainSection:
    dataset: str = setting("", required="a folder or dataset spec, as in dinov3 eval log-regression TRAIN TEST")
    val_dataset: str | None = None  # null: a tenth of each class of `dataset` (few shots: a hundredth)
    val_metric_type: Metric = Metric.MEAN_ACCURACY
    batch_size: int = 256
    num_workers: int = 5
    tol: float = 1e-12
    max_train_iters: int = setting(1000, at_least=1)
    train_features_device: str = "cpu"
    train_dtype: Literal["float64", "float32"] = "float64"
    solver: Literal["auto", "torch", "sklearn"] = "auto"


@dataclass
class TestSection:
    test_dataset: str = setting(
        "", required="a second folder or dataset spec, as in dinov3 eval log-regression TRAIN TEST"
    )
    test_metric_type: Metric | None = None  # null: as for validation
    batch_size: int | None = None
    num_workers: int = 5


@dataclass
class LogRegressionConfig(ClassifierConfig):
    POSITIONAL = (("TRAIN", "train.dataset"), ("TEST", "eval.test_dataset"))

    train: TrainSection = field(default_factory=TrainSection)
    eval: TestSection = field(default_factory=TestSection)
    transform: TransformSection = field(default_factory=lambda: TransformSection(resize_size=224, crop_size=224))

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        if self.train.solver == "sklearn" and self.train.train_features_device != "cpu":
            yield "train.train_features_device", "scikit-learn computes on the cpu; take train.solver=torch"


# ---- the fit --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fitted:
    """weight [C, D], bias [C]; `classes` are those that training images had."""

    weight: Tensor
    bias: Tensor
    classes: Tensor
    n_classes: int

    def scores(self, x: np.ndarray, rows: int = 8192) -> np.ndarray:
        """Log-odds [N, C] of features [N, D]; −inf for a class that no training image had."""
        out = np.full((len(x), self.n_classes), -np.inf)
        columns = self.classes.cpu().numpy()
        for i in range(0, len(x), rows):
            part = torch.from_numpy(np.array(x[i : i + rows])).to(self.weight)
            out[i : i + rows, columns] = F.linear(part, self.weight, self.bias).cpu().numpy()
        return out


def fit(
    x: Tensor,
    labels: Tensor,
    strength: float,
    n_classes: int,
    *,
    tol: float = 1e-12,
    max_iter: int = 1000,
    start: Fitted | None = None,
    solver: str = "torch",
) -> Fitted:
    """Features [N, D] and labels int [N] or multi-hot [N, C] → the regression of strength C.

    `start`: the fit of another strength on the same data, from which the search begins.
    """
    multi = labels.ndim == 2
    classes = torch.arange(n_classes, device=x.device) if multi else labels.unique()
    if len(classes) < 2:
        raise DinoError("logistic regression needs images of at least two classes")
    if solver == "sklearn":
        return _fit_sklearn(x, labels, strength, n_classes, classes, tol, max_iter)
    two = not multi and len(classes) == 2  # one row of weights, as scikit-learn: two would halve the penalty
    target = labels.to(x.dtype) if multi else torch.searchsorted(classes, labels)
    begin = None if start is None else torch.cat([start.weight, start.bias[:, None]], 1)
    if two:
        target, begin = target[:, None].to(x.dtype), None if begin is None else 2 * begin[1:]
    rows = 1 if two else len(classes)
    weight, bias = logistic_regression(x, target, strength, rows, start=begin, tol=tol, max_iter=max_iter)
    if two:
        weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
    return Fitted(weight, bias, classes, n_classes)


def _fit_sklearn(
    x: Tensor, labels: Tensor, strength: float, n_classes: int, classes: Tensor, tol: float, max_iter: int
) -> Fitted:
    require("sklearn", "eval", "train.solver=sklearn")
    import warnings

    from sklearn.linear_model import LogisticRegression

    def one(y: np.ndarray) -> Any:
        with warnings.catch_warnings(action="ignore"):  # that max_iter was reached: usual at large C, and no error
            return LogisticRegression(C=strength, tol=tol, max_iter=max_iter).fit(x.numpy(), y)

    y = labels.numpy()
    if labels.ndim == 2:
        models = [one(y[:, c]) for c in range(n_classes)]
    else:
        models = [one(y)]
    weight, bias = np.concatenate([m.coef_ for m in models]), np.concatenate([m.intercept_ for m in models])
    if labels.ndim == 1 and len(classes) == 2:  # one row there: the difference of two
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    return Fitted(torch.from_numpy(weight).to(x), torch.from_numpy(bias).to(x), classes, n_classes)


def solver_of(config: LogRegressionConfig) -> str:
    if config.train.solver != "auto":
        return config.train.solver
    there = importlib.util.find_spec("sklearn") is not None
    return "sklearn" if there and config.train.train_features_device == "cpu" else "torch"


def validation_rows(labels: np.ndarray, share: float = 0.1, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(training rows, validation rows): of the shuffled images the first max(1, ⌊share·n_c⌋) of each class.

    A class of one image keeps it for training. Multi-hot labels: by the first label of an image.
    """
    single = labels.argmax(1) if labels.ndim == 2 else labels
    order = torch.randperm(len(single), generator=torch.Generator().manual_seed(seed)).numpy()
    apart: list[np.ndarray] = []
    for c in np.unique(single):
        members = order[single[order] == c]
        apart.append(members[: max(1, int(share * len(members))) if len(members) > 1 else 0])
    validation = np.sort(np.concatenate(apart))
    return np.setdiff1d(np.arange(len(single)), validation), validation


def best_strength(accuracies: Sequence[tuple[float, float]]) -> float:
    """Of (C, accuracy) pairs the C with the best accuracy; the smallest of equals."""
    return min(accuracies, key=lambda pair: (-pair[1], pair[0]))[0]


def measured(metric: Metric, logits: np.ndarray, targets: Targets, train_labels: Tensor) -> Numbers:
    """The metric of log-odds [N, C]; several labels an image are as many yes-or-no regressions, each with its sigmoid."""
    link: Link = "sigmoid" if train_labels.ndim == 2 else "softmax"
    return measure(metric, logits, targets.labels, groups=targets.groups, link=link)


def select(
    x: Tensor,
    labels: Tensor,
    val: np.ndarray,
    val_targets: Targets,
    metric: Metric,
    n_classes: int,
    log: Callable[[str], None],
    **options: Any,
) -> list[tuple[float, float]]:
    """(C, validation top-1) for all 45 strengths, each process taking its share of them."""
    pairs: list[tuple[float, float]] = []
    fitted: Fitted | None = None
    for strength in ticked(distributed.share(STRENGTHS), log, "strengths"):
        fitted = fit(x, labels, strength, n_classes, start=fitted, **options)
        numbers = measured(metric, val_targets.chosen(fitted.scores(val)), val_targets, labels)
        pairs.append((strength, numbers["top-1"]))
    return distributed.gather_shares(pairs)


# ---- the evaluation -------------------------------------------------------------------------------------------------


def evaluate(config: LogRegressionConfig, session: Session) -> Numbers:
    c = config
    specs = [spec for spec in (c.eval.test_dataset, c.train.val_dataset) if spec is not None]
    train, labels, ((test, targets), *others) = session.sets(c, c.train.dataset, *specs)
    if others:
        ((val, val_targets),) = others
        pool = np.arange(len(labels))
    else:
        pool, apart = validation_rows(labels, 0.01 if c.few_shot.enable else 0.1)
        val, val_targets = np.asarray(train[apart]), Targets(labels[apart])
    metric = c.eval.test_metric_type or c.train.val_metric_type
    n_classes = class_count(labels)
    options: dict[str, Any] = {"tol": c.train.tol, "max_iter": c.train.max_train_iters, "solver": solver_of(c)}

    def on_device(rows: np.ndarray) -> tuple[Tensor, Tensor]:
        x = torch.from_numpy(np.asarray(train[rows], np.float32))
        device = c.train.train_features_device
        return x.to(device, getattr(torch, c.train.train_dtype)), torch.from_numpy(labels[rows]).to(device)

    tries: list[Numbers] = []
    shots = c.few_shot
    for number, rows in enumerate(training_rows(shots, labels[pool])):
        x, y = on_device(pool[rows])
        pairs = select(x, y, val, val_targets, c.train.val_metric_type, n_classes, session.log, **options)
        strength = best_strength(pairs)
        best = dict(pairs)[strength]
        session.log(f"C = {strength:.4g}: validation top-1 {100 * best:.2f}")
        if strength in (min(STRENGTHS), max(STRENGTHS)):
            equal = sum(accuracy == best for _, accuracy in pairs)
            session.log(
                f"note: this is the end of the {len(pairs)} values of C; {equal} of them are as good on the {len(val)} "
                "validation images, which may be too few to choose by: name more with train.val_dataset"
            )
        if not shots.enable and (len(val_targets.labels) and c.train.val_dataset is None):
            x, y = on_device(np.arange(len(labels)))  # training and validation images together
        elif not shots.enable:
            x = torch.cat([x, torch.from_numpy(np.array(val, np.float32)).to(x)])
            y = torch.cat([y, torch.from_numpy(val_targets.labels).to(y.device)])
        scores = fit(x, y, strength, n_classes, **options).scores(test)
        chosen = targets.chosen(scores)
        numbers = measured(metric, chosen, targets, y)
        tries.append({k: 100 * v for k, v in numbers.items()})
        session.append_json({"C": strength, **tries[-1]})
        if c.save_results:
            session.save_arrays(str(number) if shots.enable else "", chosen.argmax(1), targets.labels)
    return over_tries(tries) if shots.enable else tries[0]


def main(argv: Sequence[str] | None = None) -> int:
    return common.main("log_regression", LogRegressionConfig, evaluate, argv)


if __name__ == "__main__":
    sys.exit(main())
