"""What trains beside the head: LoRA in the backbone, its last blocks, or all of it (`train-head --tune`).

    <run>/backbone.safetensors     the tuned backbone with LoRA merged, which `dinov3.load(weights=<run>)` opens
          head.safetensors         names it by its fingerprint; `load_head` finds it beside the head

Learning rates fall from the head to the first block by a factor a block, as in pretraining (`optim.layer_lr`). The backbone
stays in evaluation mode (no stochastic depth), and its features are not cached: they change with every step.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from dinov3.errors import DinoError
from dinov3.fit import backbones_in, seed_of
from dinov3.heads.encoder import FrozenLayers
from dinov3.hub.own_heads import TUNED
from dinov3.models.convnext import ConvNeXt
from dinov3.models.lora import LoRA, add_lora, merge_lora
from dinov3.models.low_precision import is_quantised
from dinov3.models.vit import VisionTransformer
from dinov3.optim import layer_lr
from dinov3.runlog import RunDir
from dinov3.train_head.config import HeadConfig, tuning
from dinov3.weights import identity, writing

UNUSED = ("mask_token", "local_cls_norm.")  # act in pretraining only
TUNE_LR = {"lora": 1.0, "last": 0.1, "all": 0.1}  # multiples of the head's learning rate, where none is given


def check_backbone(backbone: nn.Module) -> None:
    """Raises `DinoError` for a backbone whose weights cannot be tuned."""
    if not isinstance(backbone, (VisionTransformer, ConvNeXt)):
        raise DinoError(
            f"--tune changes the weights of a ViT or ConvNeXt of this package, and this is a {type(backbone).__name__} of "
            "another library: leave --tune out, or load the weights by their file (--weights FILE)"
        )
    if is_quantised(backbone.state_dict()):
        raise DinoError(
            "--tune needs the weights in full, and these are quantised: pass the original file as --weights"
        )


def tune(model: nn.Module, config: HeadConfig, lr: float) -> dict[str, float]:
    """Makes a task model's backbone trainable as `config.tune` has it, in place.

    lr: the head's. Returns {name of a parameter in the model: its learning rate as a multiple of the head's}, for `fit`.
    """
    ((prefix, backbone),) = backbones_in(model).items()
    kind, n = tuning(config.tune or "")
    if kind == "lora":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(config.seed, 0x10A))
            add_lora(backbone, n, config.tune_alpha, [name for name in config.tune_linears.split(",") if name])
    if kind == "last" and n > backbone.n_blocks:  # type: ignore[operator]
        raise DinoError(f"--tune last:{n} is more than the {backbone.n_blocks} blocks of the backbone: --tune all")
    for part in model.modules():
        if isinstance(part, FrozenLayers):
            part.tuned = True
    base = config.tune_lr / lr if config.tune_lr is not None else TUNE_LR[kind]
    return {f"{prefix}.{name}": base * by for name, by in learning_rates(backbone, kind, n, config.tune_decay).items()}


def learning_rates(backbone: Any, kind: str, n: int, decay: float) -> dict[str, float]:
    """{parameter of the backbone that trains: decay^(L − i) in block i of L, 1 behind the blocks}; 1 for all of LoRA.

    "last": the last `n` blocks and the final norm. The stages of a ConvNeXt are its blocks.
    """
    if kind == "lora":
        adapters = [name for name, part in backbone.named_modules() if isinstance(part, LoRA)]
        return {f"{name}.{matrix}": 1.0 for name in adapters for matrix in ("a", "b")}
    L, rates = backbone.n_blocks, {}
    for name, _ in backbone.named_parameters():
        rate = layer_lr(re.sub(r"^(stages|downsample_layers)\.", "blocks.", name), L, decay)
        block = re.match(r"(?:blocks|stages|downsample_layers)\.(\d+)\.", name)
        behind = "norm" in name.partition(".")[0]
        if not name.startswith(UNUSED) and (kind == "all" or behind or (block and int(block[1]) >= L - n)):
            rates[name] = rate
    return rates


def save_tuned(run: RunDir, model: nn.Module, config: HeadConfig, before: str) -> None:
    """Merges LoRA into the backbone inside `model` and writes it; its origin becomes the file. before: the identity of the
    backbone as it was."""
    ((_, backbone),) = backbones_in(model).items()
    merge_lora(backbone)
    for part in model.modules():
        if isinstance(part, FrozenLayers):
            part.tuned = False
    origin: Any = backbone.origin
    backbone.origin = replace(origin, source=TUNED, form="dinov3")
    if run.writer:
        about = {"row": origin.name, "mean": origin.mean, "std": origin.std, "licence": origin.licence}
        about |= {"tuned": config.tune, "tuned_from": before}
        path = writing.save(backbone, run.path / TUNED, about)
        run.log(f"{path}: the tuned backbone, {identity.name_of(backbone)}, from {before}")
