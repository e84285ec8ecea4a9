"""Warnings of a run that does not learn: losses that stay where they began, equal CLS tokens, a teacher that stands still."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from dinov3.config.train import TrainConfig
from dinov3.optim import Schedules

PLATEAU = 0.995  # of a loss's value for targets and predictions that are uniform
ALIKE = 4.0  # KoLeo: the nearest of a batch's CLS tokens lie e⁻⁴ = 0.018 apart, on a sphere of radius 1
PATIENCE = 200  # iterations


class Health:
    """Looks at the logged means of losses; gives each warning once in a process.

    A run gets `max(PATIENCE, its warm-up)` iterations before a loss that has not fallen is worth a warning.
    """

    def __init__(self, config: TrainConfig, schedules: Schedules) -> None:
        self.schedules = schedules
        peak = max(range(schedules.total), key=schedules.lr) if schedules.total <= 10_000 else schedules.total // 10
        self.patience = max(PATIENCE, peak)
        dino, ibot = (math.log(head.head_n_prototypes) for head in (config.dino, config.ibot))
        self.uniform = {"dino_global_crops_loss": dino}
        if not config.distillation.enabled:  # only so many of the crops are masked
            self.uniform["ibot_loss"] = ibot * config.ibot.mask_sample_probability
        self.warned: set[str] = set()

    def at_start(self) -> Iterator[str]:
        """Whether the teacher can follow the student in this run at all."""
        total = self.schedules.total
        kept = math.prod(self.schedules.momentum(it) for it in range(total)) if PATIENCE <= total <= 10_000 else 0.0
        if kept > 0.5:
            yield (
                f"warning: after {total} iterations the teacher still is {kept:.0%} of its first weights; "
                "lower teacher.momentum_teacher (0.99 for a few hundred iterations)"
            )

    def of(self, iteration: int, means: Mapping[str, float]) -> Iterator[str]:
        """Sentences about a log line's means."""
        if iteration < self.patience:
            return
        for name, uniform in self.uniform.items():
            if means.get(name, 0.0) >= PLATEAU * uniform and name not in self.warned:
                self.warned.add(name)
                yield (
                    f"warning: {name} is {means[name]:.4g} after {iteration + 1} iterations, as for a network that has "
                    f"learned nothing ({uniform:.4g}); try another learning rate (optim.lr), a lower "
                    "teacher.momentum_teacher, fewer prototypes (dino.head_n_prototypes), or more images"
                )
        if means.get("koleo_loss", 0.0) > ALIKE and "koleo_loss" not in self.warned:
            self.warned.add("koleo_loss")
            yield (
                f"warning: the CLS tokens of different images are nearly equal (KoLeo {means['koleo_loss']:.3g}), a "
                "collapse; try a lower learning rate (optim.lr) or a larger dino.koleo_loss_weight"
            )
