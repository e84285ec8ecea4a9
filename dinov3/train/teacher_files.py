"""Networks on their way in and out of training: first weights, frozen teachers, dumps of the average.

In: `read_network` takes whatever holds a trained network: a dump of an evaluation (file or folder, consolidated or
sharded), a training checkpoint, a run's folder, or a backbone in any published form (`reading.open`). `fill` puts it into
a network and returns notes on what was missing. Published files hold no heads: a note, not an error.

Out: `write_teacher` writes the average as the reference does (`teacher_checkpoint.pth`: {"teacher": {"backbone.…",
"dino_head.…", "ibot_head.…"}}) and, beside it, the backbone alone as our own safetensors, which `dinov3.load`, embedding
and export open. `consolidate` makes either from a training checkpoint, also as a command:

    python -m dinov3.train.teacher_files OUT/ckpt/3749 teacher.pth          # with heads, as the reference writes them
    python -m dinov3.train.teacher_files OUT/ckpt/3749 model.safetensors    # the backbone alone
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dinov3 import checkpoint
from dinov3.config.train import TrainConfig, load_model_config, vit_config
from dinov3.errors import DinoError, WeightsError, WeightsMismatch
from dinov3.models.architectures import BackboneConfig
from dinov3.parallel import full_state
from dinov3.train.method import Network
from dinov3.weights import configs, filling, formats, reading, writing
from dinov3.weights.filling import difference
from dinov3.weights.reading import OpenedWeights, read
from dinov3.weights.writing import write_torch

HEADS = ("dino_head", "ibot_head")
TEACHER_FILE = "teacher_checkpoint.pth"
SHARDED_FOLDER = "sharded_teacher_checkpoint"
BACKBONE_FILE = "backbone.safetensors"
State = dict[str, Tensor]


@dataclass
class TrainedNetwork:
    """A trained network, as a file holds it."""

    parts: dict[str, State]  # "backbone", and "dino_head" and "ibot_head" where they are
    opened: OpenedWeights | None  # where the backbone came in a published form
    source: str

    @property
    def has_heads(self) -> bool:
        return all(head in self.parts for head in HEADS)


# ---- in -------------------------------------------------------------------------------------------------------------


def read_network(source: str | os.PathLike[str]) -> TrainedNetwork:
    """Opens a file, folder, URL or Hugging Face id that holds a trained network. Raises `WeightsError`."""
    path = Path(source)
    if path.is_dir():
        if checkpoint.is_checkpoint(path):
            return _from_checkpoint(path)
        for inside in (TEACHER_FILE, SHARDED_FOLDER):
            if (path / inside).exists():
                return read_network(path / inside)
        if (path / "ckpt").is_dir():
            known = checkpoint.Checkpoints(path / "ckpt").all()
            if known:
                return read_network(known[-1][1])
            raise WeightsError(f"{path} is the folder of a run without a checkpoint")
    opened = reading.open(source)
    parts = {"backbone": opened.state_dict}
    if opened.form == "meta" and opened.path.is_file():
        tensors, _ = read(opened.path)
        parts |= _heads({formats.unwrapped(k): v for k, v in tensors.items()})
    return TrainedNetwork(parts, opened, str(source))


def _from_checkpoint(path: Path) -> TrainedNetwork:
    """A training checkpoint's average (ours or the reference's), or a sharded dump of the reference's evaluation."""
    tensors = checkpoint.read_tensors(path, checkpoint.teacher_prefix(path))
    backbone = {k.removeprefix("backbone."): v for k, v in tensors.items() if k.startswith("backbone.")}
    return TrainedNetwork({"backbone": backbone} | _heads(tensors), None, str(path))


def _heads(tensors: Mapping[str, Tensor]) -> dict[str, State]:
    """{"dino_head": …, "ibot_head": …}, of the teacher or the average if there are several."""
    heads: dict[str, State] = {}
    for head in HEADS:
        for prefix in ("", "teacher.", "model_ema.", "model.model_ema."):
            start = f"{prefix}{head}."
            state = {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}
            if state:
                heads[head] = state
                break
    return heads


def fill(network: Network, found: TrainedNetwork, config: BackboneConfig, *, needs_heads: bool = False) -> list[str]:
    """Puts weights into a network (not yet sharded); what is worth saying. Raises `WeightsMismatch`.

    The backbone must fit in every key and shape. Heads that the file lacks, or that have other sizes, stay as they are;
    with `needs_heads` they must be there and fit: a frozen teacher's prototypes are the targets of distillation.
    """
    if needs_heads and not found.has_heads:
        raise DinoError(
            f"{found.source} holds a backbone without heads, and distillation needs the teacher's: its prototypes are the "
            "targets. Published files have none; give a teacher_checkpoint.pth or a training checkpoint, or first train "
            "heads by continuing from this file (student.resume_from_teacher_chkpt)"
        )
    state = found.parts["backbone"]
    if found.opened is not None and found.opened.form != "meta":
        state = formats.complete(state, config)
    if lines := difference(network.backbone.state_dict(), state):
        opened = found.opened or OpenedWeights(
            state, "meta", configs.infer_config(state), (), found.source, Path(found.source)
        )
        raise WeightsMismatch(filling.explain_mismatch(lines, config, opened))
    network.backbone.load_state_dict(state, strict=True)
    # the opener checks the backbone only; the heads follow below
    notes = [n for n in (found.opened.notes if found.opened else ()) if not n.startswith("left out, not part of")]
    absent = []
    for head in HEADS:
        module = getattr(network, head, None)
        if module is None:
            continue
        there = found.parts.get(head)
        if there is None:
            absent.append(head)
        elif difference(module.state_dict(), there):
            if needs_heads:
                raise WeightsMismatch(
                    f"{found.source}: its {head} has other sizes than distillation.full_cfg_path; give the "
                    "configuration that the teacher was trained with (a run keeps it as resolved.yaml)"
                )
            notes.append(
                f"{found.source}: its {head} has other sizes than this configuration; it keeps its initial weights"
            )
        else:
            module.load_state_dict(there, strict=True)
    if absent:
        notes.append(
            f"{found.source} holds no {' and no '.join(absent)}: what is missing begins with random weights (published "
            "files hold backbones only); a few warm-up epochs with a low rate let the heads catch up"
        )
    return notes


# ---- out ------------------------------------------------------------------------------------------------------------


def describe(config: TrainConfig) -> dict[str, Any]:
    """Metadata of our own files: the backbone's configuration and the statistics of its input."""
    shape = dataclasses.replace(vit_config(config.student), drop_path_rate=0.0)
    about: dict[str, Any] = {"config": dataclasses.asdict(shape)}
    return about | {"mean": list(config.crops.rgb_mean), "std": list(config.crops.rgb_std)}


def write_teacher(network: nn.Module, folder: Path, config: TrainConfig, *, writer: bool, iteration: int) -> Path:
    """The average as `teacher_checkpoint.pth` and `backbone.safetensors`; all of its ranks call, one writes."""
    state = full_state(network, keep=writer)
    if writer:
        folder.mkdir(parents=True, exist_ok=True)
        save_pth(state, folder / TEACHER_FILE)
        about = describe(config) | {"iteration": iteration, "licence": getattr(network, "licence", "")}
        save_backbone(state, folder / BACKBONE_FILE, about)
        shutil.rmtree(folder / SHARDED_FOLDER, ignore_errors=True)  # of an earlier start: `read_network` takes either
    return folder


def adopt_sharded(saved: Path) -> Path:
    """Renames a sharded dump to `sharded_teacher_checkpoint` beside it; what an earlier start left there goes."""
    where = saved.with_name(SHARDED_FOLDER)
    old = where.with_name(f".{SHARDED_FOLDER}.old")
    shutil.rmtree(old, ignore_errors=True)
    if where.exists():
        where.rename(old)
    saved.rename(where)
    shutil.rmtree(old, ignore_errors=True)
    for other in (TEACHER_FILE, BACKBONE_FILE):
        where.with_name(other).unlink(missing_ok=True)
    return where


def save_pth(state: State, path: Path) -> None:
    """{"teacher": state}, atomically."""
    write_torch({"teacher": state}, path)


def save_backbone(state: State, path: Path, about: Mapping[str, Any]) -> None:
    backbone = {k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")}
    writing.save(backbone, path, about)


def consolidate(source: str | os.PathLike[str], out: str | os.PathLike[str], config: TrainConfig | None = None) -> Path:
    """A training checkpoint (or a sharded dump) to one file: `.pth` with heads, or `.safetensors` with the backbone alone.

    Needs no process group and no model, so a checkpoint of 256 ranks becomes a file on one machine. Without `config`,
    the model is inferred from the file's shapes (not the LayerNorm's epsilon and the statistics of its input).
    """
    found, out = read_network(source), Path(out)
    state = {f"{part}.{k}": v for part, values in found.parts.items() for k, v in values.items()}
    if out.suffix == ".pth":
        save_pth(state, out)
    elif out.suffix == ".safetensors":
        shape = configs.infer_config(found.parts["backbone"])
        save_backbone(state, out, describe(config) if config is not None else {"config": dataclasses.asdict(shape)})
    else:
        raise DinoError(f"{out.name}: the ending chooses the form, .pth (with heads) or .safetensors (backbone alone)")
    return out


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m dinov3.train.teacher_files", description="A checkpoint to one file.")
    p.add_argument("source", help="ckpt/<it> of a run, a sharded dump, or a run's folder (its newest checkpoint)")
    p.add_argument("out", help="ending in .pth (with heads) or .safetensors (the backbone alone)")
    options = p.parse_args(None if argv is None else list(argv))
    try:
        beside = [f / "resolved.yaml" for f in (Path(options.source), *Path(options.source).absolute().parents[:2])]
        known = next((file for file in beside if file.is_file()), None)
        config = load_model_config(known)[0] if known is not None else None
        print(consolidate(options.source, options.out, config))
    except (DinoError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
