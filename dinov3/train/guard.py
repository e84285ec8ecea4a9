"""A run that must not fall below its start: measured every so often, brought back to the last good state where it fell.

The average is measured whenever it is written (`evaluation.eval_period_iterations`, and after the last iteration):

    k-NN        where `evaluation.knn_*_dataset` name labelled images: accuracy, in points
    unlabelled  on `guard.images` of the training images, always the same ones:
                rank       RankMe of their CLS tokens, in per cent of the start's
                structure  correlation of the cosines between an image's patches with the start's, in per cent

A fall is answered with the last good state: networks, optimiser and average come from its checkpoint, all learning rates are
multiplied by `guard.lr_factor`, and the run goes on with the next iteration and the next images: schedules end where they
would have, and no image is seen twice. After `guard.max_reverts` of these the next fall ends the run. Either way the state
that is saved and written is a good one, so that the newest teacher of the run's folder, which `--weights RUN` takes, is too.

While the backbone is frozen its average is the start, and is not measured. What the guard knows is in the checkpoints: a
run that is killed decides as if it had not been.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dinov3 import distributed
from dinov3.config.train import GuardConfig, TrainConfig
from dinov3.data.datasets.base import ImageDataset
from dinov3.distributed import Group
from dinov3.metrics import pattern_kept, rank_me
from dinov3.train.monitor import fixed_images, knn, watching

START = -1  # the iteration before the first
MAPPED = 32  # images whose patches are compared
WORDS = {"knn": "k-NN accuracy", "rank": "RankMe", "structure": "the structure of patches"}


@dataclass
class GuardState:
    """What checkpoints hold beside the tensors."""

    start: dict[str, float] = field(default_factory=dict)  # what the start measured; empty: not measured yet
    good: int = START  # the iteration whose checkpoint is the last good state
    lr_factor: float = 1.0
    falls: int = 0


class Guard:
    """Measures and decides; what follows is the loop's. All ranks measure together and decide alike."""

    def __init__(
        self, config: TrainConfig, images: ImageDataset, backbone: nn.Module, device: torch.device, group: Group = None
    ) -> None:
        self.config, self.images, self.device, self.group = config, images, device, group
        self.state = GuardState()
        self.seconds = 0.0  # of this start
        self.n = min(config.guard.images, len(images))
        self.cosines: Tensor | None = None  # [MAPPED, P, P], between the start's patches
        if config.evaluation.knn_train_dataset is None:
            grid: Any = backbone.patch_grid
            rows, columns = grid(*(watching(backbone, config).input_hw or ()))
            self.cosines = torch.zeros(min(self.n, MAPPED), rows * columns, rows * columns)

    def tensors(self) -> dict[str, Tensor]:
        return {} if self.cosines is None else {"guard.cosines": self.cosines}

    def saved(self) -> dict[str, Any]:
        return asdict(self.state)

    def load(self, saved: dict[str, Any]) -> None:
        self.state = GuardState(**saved)
        if ("knn" in self.state.start) == (self.cosines is not None):
            self.state.start = {}  # it was measured otherwise: what the run resumes with is measured

    @property
    def labelled(self) -> bool:
        return self.cosines is None

    @property
    def ended(self) -> bool:
        """Whether the run has fallen once too often."""
        return self.state.falls > self.config.guard.max_reverts

    def begin(self, backbone: nn.Module) -> dict[str, float]:
        """Measures the start."""
        side = self.config.evaluation.knn_image_size
        with torch.no_grad():  # what FSDP2 allocates at first use in inference mode could not be used in training
            backbone(torch.zeros(1, self.config.student.in_chans, side, side, device=self.device))
        if self.cosines is None:
            self.state.start = {"knn": 100 * knn(backbone, self.config, self.device, self.group)[0]}
        else:
            cls, cosines = self._fixed(backbone)
            self.cosines.copy_(cosines)
            self.state.start = self._agreed({"rank": rank_me(cls), "structure": 100.0})
        return self.state.start

    def measure(self, backbone: nn.Module, accuracy: float | None) -> dict[str, float]:
        """What the start was measured by; `accuracy`: of k-NN, where it is known already."""
        if self.cosines is not None:
            cls, cosines = self._fixed(backbone)
            return self._agreed({"rank": rank_me(cls), "structure": 100 * pattern_kept(self.cosines, cosines)})
        if accuracy is None:
            accuracy = knn(backbone, self.config, self.device, self.group)[0]
        return {"knn": 100 * accuracy}

    def _fixed(self, backbone: nn.Module) -> tuple[Tensor, Tensor]:
        assert self.cosines is not None
        return fixed_images(backbone, self.images, self.n, len(self.cosines), self.config, self.device, self.group)

    def _agreed(self, values: dict[str, float]) -> dict[str, float]:
        """The first rank's: ranks may round differently."""
        agreed: dict[str, float] = distributed.gather_objects(values, self.group)[0]
        return agreed

    def words(self, values: dict[str, float]) -> str:
        return ", ".join(f"{WORDS[name]} {value:.1f}" for name, value in values.items())

    def fall(self, values: dict[str, float]) -> str | None:
        """What fell too far, as part of a sentence; None of a good state."""
        for name, value in values.items():
            lowest = limit(name, self.state.start[name], self.config.guard)
            if not value >= lowest:  # NaN too
                return f"{WORDS[name]} is {value:.1f}, below {lowest:.1f} (the start has {self.state.start[name]:.1f})"
        return None

    def lower(self) -> None:
        """Notes a fall."""
        self.state.falls += 1
        self.state.lr_factor *= self.config.guard.lr_factor

    def consequence(self) -> str:
        """What follows from a fall, as the end of a sentence."""
        most = self.config.guard.max_reverts
        if self.ended:
            return f"where the run ends: it fell {self.state.falls} times (guard.max_reverts={most})"
        return f"and on with learning rates × {self.state.lr_factor:.3g} (fall {self.state.falls}, {most} are allowed)"

    def cost(self, seconds: float) -> str:
        """What measuring took of a start of so many seconds."""
        less = "evaluation.knn_max_images" if self.labelled else "guard.images"
        return (
            f"guard: measuring took {self.seconds:.0f} s, {self.seconds / max(seconds, 1e-9):.0%} of this start; a smaller "
            f"{less} or a larger evaluation.eval_period_iterations takes less"
        )

    def last_word(self, iteration: int) -> str:
        return (
            f"the guard ended this run at iteration {iteration}; its model is the last good state. To go on from there with "
            f"learning rates × {self.state.lr_factor:.3g}: the same command with guard.max_reverts={self.state.falls} or more"
        )


def limit(name: str, start: float, guard: GuardConfig) -> float:
    """The lowest value of a measure that is still good."""
    if name == "knn":
        return start - guard.knn_points
    percent = guard.rank_percent if name == "rank" else guard.structure_percent
    return start * (1 - percent / 100)
