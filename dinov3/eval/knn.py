"""k nearest neighbours vote on frozen features (Caron et al. 2021; ablations of the DINOv2 and DINOv3 papers).

    python -m dinov3.run.submit dinov3/eval/knn.py model.name=dinov3_vits16 model.weights=FILE \\
        train.dataset=ImageNet:split=TRAIN:root=…:extra=… eval.test_dataset=ImageNet:split=VAL:root=…:extra=…

The normalised CLS token of every training image is the bank; a test image's neighbours by cosine vote with weights
softmax(cosine / 0.07). Nothing is trained. Results are per cent, one column for each k. Published check of the training
recipe: ViT-L on ImageNet-1k, 82.0. Legend: Q test images, K neighbours, C classes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from dinov3.config.bounds import setting
from dinov3.eval import session as common
from dinov3.eval.arguments import ClassifierConfig
from dinov3.eval.features import class_count, over_tries, training_rows
from dinov3.eval.session import Session
from dinov3.metrics import Metric, Numbers
from dinov3.metrics import evaluate as measure
from dinov3.neighbours import knn_scores


@dataclass
class TrainSection:
    dataset: str = setting("", required="a folder or dataset spec, as in dinov3 eval knn TRAIN TEST")
    batch_size: int = 256
    num_workers: int = 5
    ks: list[int] = setting([10, 20, 100, 200], at_least=1, required="numbers of neighbours")
    temperature: float = setting(0.07, above=0)
    skip_first_nn: bool = False  # the best neighbour is the image itself: train = test


@dataclass
class TestSection:
    test_dataset: str = setting("", required="a second folder or dataset spec, as in dinov3 eval knn TRAIN TEST")
    test_metric_type: Metric = Metric.MEAN_ACCURACY
    batch_size: int | None = None
    num_workers: int = 5


@dataclass
class KnnConfig(ClassifierConfig):
    POSITIONAL = (("TRAIN", "train.dataset"), ("TEST", "eval.test_dataset"))

    train: TrainSection = field(default_factory=TrainSection)
    eval: TestSection = field(default_factory=TestSection)


def evaluate(config: KnnConfig, session: Session) -> Numbers:
    c = config
    train, train_labels, ((test, targets),) = session.sets(c, c.train.dataset, c.eval.test_dataset)
    shots = c.few_shot
    tries: list[Numbers] = []
    for number, rows in enumerate(training_rows(shots, train_labels)):
        row: Numbers = {}
        bank = len(train_labels[rows]) - c.train.skip_first_nn
        if number == 0 and (large := [k for k in c.train.ks if k > bank]):
            session.log(f"warning: only {bank} training images: k = {bank} instead of {', '.join(map(str, large))}")
        found = knn_scores(
            train[rows],
            torch.from_numpy(train_labels[rows]),
            test,
            c.train.ks,
            temperature=c.train.temperature,
            skip_first=c.train.skip_first_nn,
            n_classes=class_count(train_labels),
            device=session.device,
            split=True,
        )
        for k, scores in found:
            values = targets.chosen(scores.cpu().numpy())
            numbers = measure(c.eval.test_metric_type, values, targets.labels, groups=targets.groups)
            row |= {f"{k} {name.replace('top-', 'Top ')}": 100 * v for name, v in numbers.items()}
            if c.save_results:
                suffix = f"try_{number}_k_{k}" if shots.enable else f"k_{k}"
                session.save_arrays(suffix, values.argmax(1), targets.labels)
        tries.append(row)
    result = over_tries(tries) if shots.enable else tries[0]
    if shots.enable:  # the documented columns hold the mean
        result = {k.removesuffix("_mean"): v for k, v in result.items()}
    for key, value in result.items():
        session.append_json({key: value})
    return result


def main(argv: Sequence[str] | None = None) -> int:
    return common.main("knn", KnnConfig, evaluate, argv)


if __name__ == "__main__":
    sys.exit(main())
