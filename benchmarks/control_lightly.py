"""A control for learning from scratch: images, crops, network and schedules of a recipe, with lightly's DINO loss and head.

    pip install --no-deps lightly
    python benchmarks/control_lightly.py OUT --recipe small_cpu.yaml train.dataset_path=photographs.txt key=value …

Everything but the loss is `dinov3 train`'s own: only the CLS tokens of the student and of its average go into lightly's
`DINOProjectionHead` and `DINOLoss` (centring instead of Sinkhorn-Knopp; no iBOT, no KoLeo). Metrics, dumps and k-NN are
written as in any run, so that two curves can be laid side by side.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinov3 import distributed
from dinov3.config.train import load_config
from dinov3.data.crops import CropBatch
from dinov3.hub.foreign import mend_torchvision
from dinov3.losses import LossTerms
from dinov3.optim import StepValues
from dinov3.runlog import RunDir
from dinov3.train.assembly import assemble, setup
from dinov3.train.loop import loop
from dinov3.train.method import SelfDistillation, copy_weights

mend_torchvision()
from lightly.loss import DINOLoss  # noqa: E402
from lightly.models.modules import DINOProjectionHead  # noqa: E402


class LightlyDINO(SelfDistillation):
    """Our networks and average; lightly's head and loss."""

    def __init__(self, *networks: Any, **options: Any) -> None:
        super().__init__(*networks, **options)
        c, width = self.dino, self.student.backbone.embed_dim
        sizes = (width, c.head_hidden_dim, c.head_bottleneck_dim, c.head_n_prototypes)
        self.student.dino_head = DINOProjectionHead(*sizes)  # type: ignore[arg-type]
        self.ema.dino_head = DINOProjectionHead(*sizes).requires_grad_(False)  # type: ignore[arg-type]
        copy_weights(self.ema.dino_head, self.student.dino_head)
        self.student.ibot_head.requires_grad_(False)
        self.loss = DINOLoss(c.head_n_prototypes, teacher_temp=0.04)

    @torch.no_grad()
    def targets(self, batch: CropBatch, values: StepValues) -> Any:
        cls = self.ema.backbone(batch.global_crops, is_training=True)["x_norm_clstoken"]
        return list(self.ema.dino_head(cls.float()).chunk(2))

    def predict(self, batch: CropBatch, targets: list[Tensor], values: StepValues) -> LossTerms:  # type: ignore[override]
        globals_, locals_ = self.student.backbone(
            [batch.global_crops, batch.local_crops], [None, None], is_training=True
        )
        cls = torch.cat([globals_["x_norm_clstoken"], locals_["x_norm_clstoken"]])
        views = self.student.dino_head(cls.float()).split(batch.batch_size)
        terms = LossTerms()
        terms.add("dino_loss", 1.0, self.loss(targets, list(views), teacher_temp=values.teacher_temp))
        return terms


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("out", type=Path)
    p.add_argument("--recipe", default="small_cpu.yaml")
    p.add_argument("overrides", nargs="*")
    o = p.parse_intermixed_args()
    config, _ = load_config(o.recipe, o.overrides)
    config = replace(config, train=replace(config.train, output_dir=str(o.out.absolute())))
    device = setup(config)
    run = RunDir(o.out)
    with run.claimed():
        trainer = assemble(config, run, device, method=LightlyDINO)
        run.start(config, iteration=0, sinks=config.run.sinks)
        try:
            print(loop(trainer, 0))
        finally:
            run.close()
            distributed.shutdown()


if __name__ == "__main__":
    main()
