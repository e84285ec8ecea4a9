"""Malformed files of weights, configurations and heads: one sentence each, in little time and memory."""

from __future__ import annotations

import json
import math
import os
import random
import resource
import signal
import struct
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from toy_models import tiny_vit

from dinov3 import hub
from dinov3.distill.teachers import open_teacher
from dinov3.errors import DinoError, WeightsError
from dinov3.hub import own_heads, published_heads
from dinov3.hub.own_heads import build_head, load_head, save_head
from dinov3.train_head.config import HeadConfig
from dinov3.train_head.run import load_backbone
from dinov3.weights import reading, writing
from tests.weights.test_formats import TINY, filled
from tests.weights.test_reading import write_transformers


def refused(match: str, path: Path) -> None:
    before = time.monotonic()
    with pytest.raises(WeightsError, match=match) as caught:
        hub.load(weights=path)
    assert len(str(caught.value).splitlines()) <= 10
    assert time.monotonic() - before < 5


# ---- float16, NaN --------------------------------------------------------------------------------------------------


def test_float16_files_compute_in_float32(tmp_path: Path) -> None:
    model = filled(TINY["mlp"])
    writing.save(model.half(), tmp_path / "half.safetensors")
    loaded: Any = hub.load(weights=tmp_path / "half.safetensors")
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert torch.equal(loaded.cls_token, model.cls_token.float())
    asked = hub.load(weights=tmp_path / "half.safetensors", dtype="float16")
    assert {p.dtype for p in asked.parameters()} == {torch.float16}
    head = HeadConfig(task="classification", head="linear", weights=str(tmp_path / "half.safetensors"))
    assert next(load_backbone(head).parameters()).dtype == torch.float32
    pixels = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    assert open_teacher(f"dinov3:{tmp_path / 'half.safetensors'}")(pixels).cls.dtype == torch.float32
    writing.save(filled(TINY["mlp"]).bfloat16(), tmp_path / "bf16.safetensors")
    assert open_teacher(f"dinov3:{tmp_path / 'bf16.safetensors'}")(pixels).cls.dtype == torch.float32


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path: Path, value: float) -> None:
    model = filled(TINY["mlp"])
    model.blocks[1].mlp.fc2.weight.data[3, 5] = value
    writing.save(model, tmp_path / "w.safetensors")
    torch.save(model.state_dict(), tmp_path / "w.pth")
    refused(r"w\.safetensors: blocks\.1\.mlp\.fc2\.weight holds NaN or infinity", tmp_path / "w.safetensors")
    refused(r"w\.pth: blocks\.1\.mlp\.fc2\.weight holds NaN or infinity", tmp_path / "w.pth")
    head: Any = build_head("classification", "linear", tiny_vit(), n_classes=3)
    head.linear_head.bias.data[1] = value
    path = save_head(tmp_path / "h.safetensors", head, task="classification", head="linear", options={"n_classes": 3})
    with pytest.raises(WeightsError, match=r"h\.safetensors: linear_head\.bias holds NaN"):
        load_head(path, backbone=tiny_vit())
    torch.save({k: v.detach() for k, v in head.linear_head.state_dict().items()}, tmp_path / "lc.pth")
    with pytest.raises(WeightsError, match=r"lc\.pth: bias holds NaN"):
        hub.published_heads.read(str(tmp_path / "lc.pth"))  # type: ignore[attr-defined]


def test_large_values_are_finite() -> None:
    reading.check_finite({"x": torch.full((9,), 3e38), "y": torch.full((9,), 6e4).half(), "z": torch.tensor([])})
    with pytest.raises(WeightsError, match="y holds NaN"):
        reading.check_finite({"x": torch.ones(3), "y": torch.tensor(math.inf).expand(1 << 30)})


# ---- small files that ask for much ---------------------------------------------------------------------------------


def test_dictionaries_that_hold_each_other_are_refused(tmp_path: Path) -> None:
    inner: dict[str, Any] = {"x": torch.ones(1)}
    for _ in range(40):
        inner = {"a": inner, "b": inner}
    torch.save(inner, tmp_path / "w.pth")
    assert (tmp_path / "w.pth").stat().st_size < 20_000
    refused("dictionaries in dictionaries without end", tmp_path / "w.pth")
    loop: dict[str, Any] = {}
    loop["a"] = loop
    torch.save(loop, tmp_path / "loop.pth")
    refused("without end", tmp_path / "loop.pth")


def test_a_block_of_a_great_number_is_refused(tmp_path: Path) -> None:
    for name, key in (("mlp", "blocks.99999999.norm1.weight"), ("convnext", "stages.2.99999999.norm.weight")):
        state = dict(filled(TINY[name]).state_dict())
        torch.save(state | {key: torch.ones(3)}, tmp_path / f"{name}.pth")
        refused("up to 99999999, but holds", tmp_path / f"{name}.pth")


def test_a_compressed_or_repeated_archive_is_refused(tmp_path: Path) -> None:
    torch.save({"x": torch.zeros(1 << 22)}, tmp_path / "w.pth")
    with zipfile.ZipFile(tmp_path / "w.pth") as there, zipfile.ZipFile(tmp_path / "small.pth", "w") as archive:
        for entry in there.infolist():
            archive.writestr(entry.filename, there.read(entry), zipfile.ZIP_DEFLATED)
    assert (tmp_path / "small.pth").stat().st_size < 100_000
    refused("unpacks to", tmp_path / "small.pth")
    torch.save({"patch_embed.proj.weight": torch.ones(1).expand(1 << 20, 1 << 20)}, tmp_path / "view.pth")
    refused("stands for 1,099,511,627,776 values", tmp_path / "view.pth")


def test_a_long_header_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_bytes(struct.pack("<Q", 1 << 29) + b"{" + b" " * 2000)
    refused("no checkpoint", tmp_path / "w.safetensors")


@pytest.mark.parametrize("shard", ["../other.safetensors", "/etc/hostname", "a/b.safetensors", "..", 7])
def test_shards_outside_the_folder_are_refused(tmp_path: Path, shard: Any) -> None:
    write_transformers(tmp_path / "tf", TINY["mlp"], filled(TINY["mlp"]).state_dict())
    (tmp_path / "other.safetensors").write_bytes((tmp_path / "tf" / "model.safetensors").read_bytes())
    (tmp_path / "tf" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": shard}}))
    refused("is no name of a file in this folder", tmp_path / "tf")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"num_attention_heads": 0}, "heads"),
        ({"num_attention_heads": -2}, "heads"),
        ({"num_attention_heads": "many"}, "'many' heads"),
        ({"layerscale_value": "x"}, "layerscale_init = 'x'"),
        ({"drop_path_rate": math.nan}, "drop_path_rate = nan"),
        ({"image_size": [224]}, "img_size"),
        ({"layer_norm_eps": "1e-5x"}, "make no sense"),
        ({"pos_embed_rescale": {}}, "pos_embed_rope_rescale_coords"),
    ],
)  # fmt: skip
def test_a_configuration_that_makes_no_sense_is_one_sentence(tmp_path: Path, changes: dict, sentence: str) -> None:
    write_transformers(tmp_path / "tf", TINY["mlp"], filled(TINY["mlp"]).state_dict(), **changes)
    refused(sentence, tmp_path / "tf")


# ---- heads ---------------------------------------------------------------------------------------------------------


def head_with(folder: Path, **changes: Any) -> Path:
    """A head file of three classes whose metadata is changed."""
    if not (folder / "good.safetensors").is_file():
        head = build_head("segmentation", "linear", tiny_vit(), n_classes=3)
        save_head(folder / "good.safetensors", head, task="segmentation", head="linear", options={"n_classes": 3})
    tensors, metadata = reading.read(folder / "good.safetensors")
    info = json.loads(metadata[own_heads.METADATA]) | changes
    save_file(tensors, folder / "head.safetensors", {own_heads.METADATA: json.dumps(info)})
    return folder / "head.safetensors"


@pytest.mark.parametrize(
    "changes",
    [
        {"n_classes": 10**9},
        {"n_classes": "three"},
        {"class_names": None},
        {"class_names": [1, 2, 3]},
        {"options": {"backbone_out_layers": [10**9]}},
        {"options": {"use_batchnorm": {"a": 1}}},
        {"options": {"no_such": 1}},
        {"options": []},
        {"task": "segmentation", "head": "mask2former", "options": {"hidden_dim": 10**12}},
        {"task": "segmentation", "head": "mask2former", "options": {"decoder_layers": 10**9}},
        {"task": "segmentation", "head": "mask2former", "options": {"hidden_dim": -3}},
        {"task": ["x"]},
        {"preprocessing": 3},
        {"preprocessing": {"size": "x"}},
        {"colours": [[0, 0]]},
        {"layers": 7},
        {"backbone_dtype": "int8"},
        {"format": "new"},
    ],
)  # fmt: skip
def test_head_metadata_that_makes_no_sense_is_one_sentence(tmp_path: Path, changes: dict[str, Any]) -> None:
    load_head(head_with(tmp_path), backbone=tiny_vit())
    with pytest.raises(DinoError):
        load_head(head_with(tmp_path, **changes), backbone=tiny_vit())


@pytest.mark.parametrize(
    "sizes",
    [
        "text_backbone: {num_layers: 1000000000}",
        "text_backbone: {dim: .nan}",
        "text_backbone: 3",
        "[]",
        "a: &a [*a]",
        "{",
    ],
)
def test_sizes_of_dino_txt_that_make_no_sense_are_one_sentence(tmp_path: Path, sizes: str) -> None:
    (tmp_path / "clip_model_config.yaml").write_text(sizes)
    torch.save({}, tmp_path / "head.pth")
    with pytest.raises(DinoError, match=r"is no clip_model_config\.yaml of a dino\.txt training"):
        published_heads.open_towers(tmp_path / "head.pth")


# ---- the fuzzer ----------------------------------------------------------------------------------------------------

ODD: tuple[Any, ...] = (
    None, -1, 0, 1, 3, 10**9, 10**30, 0.5, math.nan, math.inf, "", "x", "9" * 5000, "0", True, [], [1, 2], {}, {"a": 1},
    "../x", "\0", [[[]]], -(2**63),
)  # fmt: skip


KINDS = (
    "bytes of .pth",
    "bytes of safetensors",
    "tensors",
    "header",
    "config",
    "index",
    "metadata",
    "head",
    "head bytes",
)


def changed_json(value: Any, rng: random.Random) -> Any:
    """A copy of a JSON value with one place changed, removed or renamed."""
    value = json.loads(json.dumps(value))
    places: list[tuple[Any, Any]] = []

    def walk(inner: Any) -> None:
        for key in list(inner) if isinstance(inner, dict) else range(len(inner)) if isinstance(inner, list) else ():
            places.append((inner, key))
            walk(inner[key])

    walk(value)
    if not places or rng.random() < 0.03:
        return rng.choice(ODD)
    for holder, key in rng.sample(places, min(len(places), rng.choice((1, 1, 2)))):
        if isinstance(holder, dict) and key in holder and rng.random() < 0.3:
            moved = holder.pop(key)
            if rng.random() < 0.5:
                holder[str(rng.choice(ODD))[:20]] = moved
        elif isinstance(holder, dict) or key < len(holder):
            holder[key] = rng.choice(ODD)
    return value


def changed_bytes(data: bytes, rng: random.Random, near: int) -> bytes:
    kind = rng.randrange(4)
    if kind == 0:
        return data[: rng.randrange(len(data))]
    out = bytearray(data)
    for _ in range(rng.choice((1, 3, 20))):
        out[rng.randrange(min(near, len(out)) if kind < 3 else len(out))] = rng.randrange(256)
    return bytes(out) + rng.randbytes(rng.choice((0, 0, 9)))


def changed_state(state: dict[str, torch.Tensor], rng: random.Random) -> dict[Any, Any]:
    out: dict[Any, Any] = dict(state)
    for _ in range(rng.choice((1, 1, 3))):
        key = rng.choice(list(out))
        value = out.pop(key)
        if not isinstance(value, torch.Tensor):
            continue
        kind = rng.randrange(8)
        if kind == 0:
            out[key] = rng.choice(ODD)
        elif kind == 1:
            out[key] = torch.zeros([rng.choice((0, 1, 2, 7, 64)) for _ in range(rng.randrange(6))])
        elif kind == 2:
            out[key] = torch.ones(1).expand(rng.choice((10, 10**6, 10**12)), rng.choice((1, 64)))
        elif kind == 3:
            out[str(key) + rng.choice((".x", ".0", ".99999999", ""))] = value
        elif kind == 4:
            parts = str(key).split(".")
            parts[rng.randrange(len(parts))] = rng.choice(("99999999", "-1", "", "norm", "7" * 5000, "blocks"))
            out[".".join(parts)] = value
        elif kind == 5:
            out[key] = value.to(
                rng.choice((torch.int8, torch.float64, torch.complex64, torch.bool, torch.float8_e4m3fn))
            )
        elif kind == 6:
            out[key] = {rng.choice(("a", "weight", 3)): value}
    return out


def malformed(folder: Path, rng: random.Random) -> tuple[str, Callable[[], Any]]:
    """(kind, what opens it) of one malformed file, written into an empty folder."""
    name = rng.choice(list(TINY))
    kind = rng.choice(KINDS)
    if kind in ("head", "head bytes"):
        path = head_with(folder.parent)
        tensors, metadata = reading.read(path)
        target = folder / "head.safetensors"
        if kind == "head":
            info = changed_json(json.loads(metadata[own_heads.METADATA]), rng)
            save_file(tensors, target, {own_heads.METADATA: json.dumps(info)})
        else:
            target.write_bytes(changed_bytes(path.read_bytes(), rng, 4000))
        return kind, lambda: load_head(target, backbone=tiny_vit())
    config, model = TINY[name], filled(TINY[name])
    state = dict(model.state_dict())
    if kind in ("config", "index", "header", "metadata", "bytes of safetensors"):
        tf = write_transformers(folder / "tf", config, state)
        weights = tf / "model.safetensors"
        if kind == "config":
            (tf / "config.json").write_text(json.dumps(changed_json(json.loads((tf / "config.json").read_text()), rng)))
        elif kind == "index":
            index = {
                "weight_map": dict.fromkeys(load_file(weights), "model.safetensors"),
                "metadata": {"total_size": 1},
            }
            (tf / "model.safetensors.index.json").write_text(json.dumps(changed_json(index, rng)))
        elif kind == "metadata":
            writing.save(model, folder / "ours.safetensors", {"mean": [0.4, 0.4, 0.4], "row": "x"})
            tensors, metadata = reading.read(folder / "ours.safetensors")
            about = changed_json(json.loads(metadata[reading.OURS]), rng)
            save_file(tensors, folder / "ours.safetensors", {reading.OURS: json.dumps(about)})
            return kind, lambda: hub.load(weights=folder / "ours.safetensors")
        elif kind == "header":
            data = weights.read_bytes()
            n = struct.unpack("<Q", data[:8])[0]
            text = json.dumps(changed_json(json.loads(data[8 : 8 + n]), rng)).encode()
            weights.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + n :])
        else:
            weights.write_bytes(changed_bytes(weights.read_bytes(), rng, 4000))
        source = tf
    else:
        source = folder / "w.pth"
        torch.save(changed_state(state, rng) if kind == "tensors" else state, source)
        if kind != "tensors":
            source.write_bytes(changed_bytes(source.read_bytes(), rng, 20_000))
    return kind, lambda: hub.load(weights=source)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_thousand_malformed_files_are_opened_or_refused_in_one_sentence(tmp_path: Path) -> None:
    rng, outcomes, wrong = random.Random(int(os.environ.get("DINOV3_SEED", "0"))), Counter(), []
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def too_long(*_: Any) -> None:
        raise SystemExit("longer than 20 s")

    signal.signal(signal.SIGALRM, too_long)
    for i in range(1000):
        folder = tmp_path / str(i)
        folder.mkdir()
        signal.alarm(20)
        kind, load = malformed(folder, rng)
        try:
            load()
            outcome = "opened"
        except DinoError as error:
            outcome = "refused"
            if len(str(error)) > 2000:
                wrong.append((i, kind, f"{len(str(error))} characters"))
        except (Exception, SystemExit) as error:
            outcome = "raised"
            wrong.append((i, kind, f"{type(error).__name__}: {error}"[:200]))
        finally:
            signal.alarm(0)
        outcomes[kind, outcome] += 1
    for kind in sorted({k for k, _ in outcomes}):
        print(f"{kind:24}" + "".join(f"{o} {outcomes[kind, o]:4}   " for o in ("opened", "refused", "raised")))
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) / 1024
    print(f"peak memory grew by {grown:.0f} MB")
    assert not wrong, "\n".join(map(str, wrong))
    assert grown < 1500
