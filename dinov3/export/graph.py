"""A model as a graph that runs without this package: ONNX, OpenVINO, or torch.export.

    export(dinov3.load("dinov3_vitt16"), "out", "onnx")                    # any batch, any size in whole patches
    export(model, "out", "openvino", size=(224, 224), output="pooled")
    export(open_task_model("segment", "street.safetensors"), "out", "onnx")

The folder holds the model, and `dinov3.json`: inputs and outputs, how images become inputs, and how far the file's outputs
are from the model's at several sizes and batches. It appears whole or not at all: a file that computes something else
is not written. RoPE is part of the graph; for a fixed size its tables are constants.
"""

from __future__ import annotations

import copy
import json
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dinov3
from dinov3.errors import DinoError, one_of, require
from dinov3.export.convert import empty_folder
from dinov3.features import default_preprocessing, evaluating
from dinov3.files import atomically
from dinov3.inference.fold import before_scale
from dinov3.models import convnext, vit
from dinov3.weights import identity

TARGETS = {"onnx": "model.onnx", "openvino": "model.xml", "torch-export": "model.pt2"}
ONNX = ("onnx", "onnxscript", "onnxruntime")
LIBRARIES = {"onnx": ONNX, "openvino": (*ONNX, "openvino"), "torch-export": ()}  # those that write and check
OUTPUTS = {  # of a backbone
    "cls": ("cls",),
    "patches": ("patches",),
    "pooled": ("cls", "mean"),
    "all": ("cls", "mean", "registers", "patches"),
}
LEAST_COSINE = {"fp32": 0.99999, "fp16": 0.9999, "bf16": 0.999}  # of every token, to the model in float32
OPSET = 20
BACKBONES = (vit.VisionTransformer, convnext.ConvNeXt)
Run = Callable[[Tensor], list[np.ndarray]]


class BackboneOutputs(nn.Module):
    """Images [B, 3, H, W] → the chosen ones of cls [B, D], mean (of the patches) [B, D], registers [B, R, D] and patches
    [B, h, w, D], after the final norm."""

    def __init__(self, backbone: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.backbone, self.names = backbone, tuple(names)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        features = self.backbone.forward_features(images)  # type: ignore[operator]
        patches = features["x_norm_patchtokens"]
        grid = self.backbone.patch_grid(images.shape[-2], images.shape[-1])  # type: ignore[operator]
        named = {
            "cls": features["x_norm_clstoken"],
            "mean": patches.mean(1),
            "registers": features["x_storage_tokens"],
            "patches": patches.unflatten(1, grid),
        }
        return tuple(named[name] for name in self.names)


class TaskOutputs(nn.Module):
    """Images [B, 3, H, W] → the output tensors of a task model, in order of their names."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(value for _, value in named_outputs(self.model(images)))


def named_outputs(output: Any, name: str = "output") -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of a tensor, or of dictionaries and sequences of tensors."""
    if isinstance(output, Tensor):
        yield name, output
    elif isinstance(output, dict):
        for key, value in output.items():
            yield from named_outputs(value, str(key))
    elif isinstance(output, (tuple, list)):
        for i, value in enumerate(output):
            yield from named_outputs(value, f"{name}_{i}")


class FixedRope(nn.Module):
    """Position tables computed once for each grid: constants of a graph of fixed size."""

    draws = False

    def __init__(self, rope: vit.RopeEmbedding) -> None:
        super().__init__()
        self.rope = rope
        self.tables: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def forward(self, height: int, width: int, draws: Any = None) -> tuple[Tensor, Tensor]:
        if (height, width) not in self.tables:
            self.tables[height, width] = self.rope(height, width, [[]])
        return self.tables[height, width]


class Half(nn.Module):
    """A linear layer or a convolution that computes in half precision inside a model of float32."""

    def __init__(self, module: nn.Module, dtype: torch.dtype, *, back: bool) -> None:
        super().__init__()
        self.module, self.dtype, self.back = module.to(dtype), dtype, back

    def forward(self, x: Tensor) -> Tensor:
        y = self.module(x.to(self.dtype))
        return y.float() if self.back else y


def halved(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy whose backbone multiplies in `dtype`; the residual stream, norms, positions and heads stay in float32.

    Layer scales are multiplied into the layer before them: register tokens of large models leave float16's range before
    they are scaled down.
    """
    model = copy.deepcopy(model)
    for block in [m for m in model.modules() if isinstance(m, vit.Block)]:
        mlp: Any = block.mlp
        for scale, linear in (("ls1", block.attn.proj), ("ls2", mlp.w3 if isinstance(mlp, vit.SwiGLU) else mlp.fc2)):
            bias = linear.bias if linear.bias is not None else linear.weight.new_zeros(linear.out_features)
            weight, bias = before_scale((linear.weight, bias), getattr(block, scale))
            linear.weight = nn.Parameter(weight)
            linear.bias = nn.Parameter(bias)
            setattr(block, scale, nn.Identity())
    for backbone in [m for m in model.modules() if isinstance(m, BACKBONES)]:
        for parent in list(backbone.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, (nn.Linear, nn.Conv2d)):  # after a linear layer comes what takes half precision
                    setattr(parent, name, Half(child, dtype, back=isinstance(child, nn.Conv2d)))
    return model


def export(
    model: nn.Module,
    folder: str | os.PathLike[str],
    to: str = "onnx",
    *,
    size: tuple[int, int] | None = None,
    output: str = "all",
    precision: str = "fp32",
) -> dict[str, Any]:
    """Writes `model` (a backbone, or a task model with its backbone) as `to`; the contents of `dinov3.json`.

    size: (height, width) in pixels; None: any size in whole patches. The batch is always free. output: of a backbone, a
    key of `OUTPUTS`. precision: of products; inputs and outputs are float32. Raises `DinoError` if something is unknown,
    `folder` is not empty, or the file's outputs are not the model's (`LEAST_COSINE`), and `MissingExtra`.
    """
    one_of("the target", to, TARGETS)
    one_of("the precision", precision, LEAST_COSINE)
    one_of("the output", output, OUTPUTS)
    for module in LIBRARIES[to]:
        require(module, "openvino" if to == "openvino" else "export", f"--to {to}")
    out = empty_folder(folder)
    if precision == "bf16" and to != "torch-export":
        raise DinoError(
            f"no {to} runtime computes bf16 graphs on a CPU, so they could not be checked: export fp32 and let it choose "
            "(OpenVINO: INFERENCE_PRECISION_HINT=bf16), or take --precision fp16"
        )
    if any(p.dtype != torch.float32 or p.is_cuda for p in model.parameters()):
        model = copy.deepcopy(model).cpu().float()
    with evaluating(model), torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch, about torch
        return _export(model, out, to, size, output, precision)


def _export(
    model: nn.Module, out: Path, to: str, size: tuple[int, int] | None, output: str, precision: str
) -> dict[str, Any]:
    backbone: Any = next(m for m in model.modules() if isinstance(m, BACKBONES))
    sizes = [size] if size else [tuple(backbone.stride * n for n in hw) for hw in ((8, 8), (7, 12), (14, 14))]
    for h, w in sizes:
        if h % backbone.stride or w % backbone.stride or min(h, w) < backbone.stride:
            raise DinoError(
                f"the size {h},{w} is no multiple of the patch: height and width in steps of {backbone.stride} px"
            )
    batches = [_images(b, *hw) for hw in sizes for b in (1, 3)]
    if model is backbone:
        names: list[str] = [n for n in OUTPUTS[output] if n != "registers" or backbone.n_storage_tokens]
        whole: nn.Module = BackboneOutputs(model, names)
    else:
        names = [name for name, _ in named_outputs(model(batches[0]), _task(model))]
        whole = TaskOutputs(model)
    expected = [[y.numpy() for y in whole(x)] for x in batches]
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    computed = whole if precision == "fp32" else halved(whole, dtype).eval()
    with _constant_positions(computed) if size else nullcontext():
        computed(batches[-1])
        program = _traced(computed, batches[-1], backbone.stride, free=size is None)
    info = getattr(model, "head_info", None)
    preprocessing = default_preprocessing(backbone) if info is None else info.preprocessing
    facts: dict[str, Any] = {
        "model": str(getattr(backbone, "origin", type(backbone).__name__)),
        "fingerprint": identity.fingerprint(backbone.state_dict()),
        "version": dinov3.__version__,
        "target": to,
        "precision": precision,
        "inputs": {"images": ["batch", 3, *(size or (f"multiple of {backbone.stride}",) * 2)]},
        "outputs": names,
        "patch": backbone.stride,
        "registers": backbone.n_storage_tokens,
        "preprocessing": asdict(preprocessing.with_(size=size) if size else preprocessing),
    }
    if info is not None:
        facts |= {"task": info.task, "classes": list(info.class_names)}
    with atomically(out) as work:
        work.mkdir()
        run, about = WRITERS[to](program, batches[-1], work, names, facts)
        facts |= about | {"parity": [_compared(names, x, e, run, model is backbone) for x, e in zip(batches, expected)]}
        least = min(row["cosine"] for place in facts["parity"] for row in place["outputs"].values())
        if not least >= LEAST_COSINE[precision]:
            raise DinoError(
                f"the {to} file differs from the model: a cosine of {least:.6f}, below {LEAST_COSINE[precision]}; nothing "
                "was written. Please report it with the model's name and the versions of torch and the runtime"
            )
        text = json.dumps(facts, indent=1) + "\n"
        (work / "dinov3.json").write_text(text)
    return json.loads(text)


def _task(model: nn.Module) -> str:
    return "depth" if getattr(getattr(model, "head_info", None), "task", "") == "depth" else "logits"


@contextmanager
def _constant_positions(model: nn.Module) -> Iterator[None]:
    """`FixedRope` in place of the tables' formula, for a time."""
    ropes = [m for m in model.modules() if isinstance(m, vit.VisionTransformer)]
    kept = [m.rope_embed for m in ropes]
    for m in ropes:
        m.rope_embed = FixedRope(m.rope_embed)  # type: ignore[assignment]
    try:
        yield
    finally:
        for m, rope in zip(ropes, kept):
            m.rope_embed = rope


def _images(batch: int, height: int, width: int) -> Tensor:
    """Noise that is smooth over a few pixels, as images are, normalised."""
    noise = torch.randn(batch, 3, height // 4, width // 4, generator=torch.Generator().manual_seed(batch))
    return F.interpolate(noise, (height, width), mode="bilinear")


def _traced(model: nn.Module, images: Tensor, stride: int, *, free: bool) -> Any:
    if free:  # odd grids take the general path through heads that double and halve maps
        images = images[..., : 7 * stride, : 5 * stride].contiguous()
    sides = {2: stride * torch.export.Dim("rows", max=1024), 3: stride * torch.export.Dim("columns", max=1024)}
    shapes = {"images": {0: torch.export.Dim("batch", max=65536)} | (sides if free else {})}
    try:
        program = torch.export.export(model, (images,), dynamic_shapes=shapes)
    except Exception as error:  # torch's exporter raises many kinds
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        hint = "give a fixed size (--size 224,224)" if free else "this model's operators cannot be exported"
        raise DinoError(f"torch.export does not trace this model ({reason[:200]}); {hint}") from error
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine, which the file would hold
    return program


def _compared(names: list[str], images: Tensor, expected: list[np.ndarray], run: Run, tokens: bool) -> dict[str, Any]:
    """Differences and the least cosine for one input: of every token of a backbone, of every image of a task model."""
    try:
        found = run(images)
    except Exception as error:  # each runtime has its own kinds
        h, w = images.shape[2:]
        raise DinoError(
            f"the exported file does not take {len(images)} images of {h},{w} px; give the size you need (--size {h},{w})"
        ) from error
    rows = {}
    for name, e, f in zip(names, expected, found, strict=True):
        if e.shape != f.shape:
            raise DinoError(f"the exported {name} has the shape {list(f.shape)}, the model's {list(e.shape)}")
        e, f = e.astype(np.float64), f.astype(np.float64)
        x, y = (a.reshape(-1, a.shape[-1]) if tokens else a.reshape(len(a), -1) for a in (e, f))
        norms = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
        cosine = float(((x * y).sum(1) / np.maximum(norms, 1e-30)).min())
        rows[name] = {"max": float(abs(e - f).max()), "mean": float(abs(e - f).mean()), "cosine": cosine}
    return {"batch": images.shape[0], "size": list(images.shape[2:]), "outputs": rows}


# ---- the forms -----------------------------------------------------------------------------------------------------


def _name_dimensions(graph: Any, stride: int) -> None:
    """torch's symbols of free dimensions by what they are: batch, height and width in pixels, rows and columns of patches."""
    named: dict[str, str] = {}
    for axis, name in ((0, "batch"), (2, "rows"), (3, "columns")):
        if (symbol := re.search(r"s\d+", str(graph.inputs[0].shape[axis]))) is not None:
            named[symbol[0]] = name
    pixels = {f"{stride}*rows": "height", f"{stride}*columns": "width"}
    for value in [*graph.inputs, *(v for node in graph for v in node.outputs if v.shape is not None)]:
        for axis, size in enumerate(value.shape):
            if not isinstance(size, int) and size.value is not None:
                text = re.sub(r"s\d+", lambda symbol: named.get(symbol[0], symbol[0]), str(size.value))
                value.shape[axis] = pixels.get(text, text)


def _write_onnx(
    program: Any, images: Tensor, work: Path, names: list[str], facts: dict[str, Any]
) -> tuple[Run, dict[str, Any]]:
    import onnx
    import onnxruntime

    made = torch.onnx.export(
        program, (images,), dynamo=True, opset_version=OPSET, input_names=["images"], output_names=names, verbose=False
    )
    assert made is not None
    graph = made.model.graph
    outputs = {id(value) for value in graph.outputs}
    for value in [v for node in graph for v in node.outputs if v.name in names and id(v) not in outputs]:
        value.name = f"{value.name}_inside"  # torch calls a mean "mean" as well
    _name_dimensions(graph, facts["patch"])
    made.model.metadata_props["dinov3"] = json.dumps(facts)
    path = work / TARGETS["onnx"]
    large = sum(v.numel() * v.element_size() for v in program.state_dict.values()) > 1.8e9
    made.save(path, external_data=large)  # protobuf holds 2 GB: the weights then lie beside it
    written = onnx.load(path, load_external_data=False).graph
    operators = sorted({node.op_type for node in written.node})
    branches = {"If", "Loop", "Scan"} & set(operators)
    if branches or [i.name for i in written.input] != ["images"]:
        raise DinoError(
            f"the ONNX graph has {', '.join(branches) or 'inputs beside the images'}: a defect, please report it"
        )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(x: Tensor) -> list[np.ndarray]:
        return session.run(names, {"images": x.numpy()})

    about = {"opset": OPSET, "operators": operators, "runtime": f"onnxruntime {onnxruntime.__version__}"}
    return run, about


def _write_openvino(
    program: Any, images: Tensor, work: Path, names: list[str], facts: dict[str, Any]
) -> tuple[Run, dict[str, Any]]:
    import openvino

    _write_onnx(program, images, work, names, facts)
    source = list(work.iterdir())
    model = openvino.convert_model(work / TARGETS["onnx"])
    model.set_rt_info(json.dumps(facts), "dinov3")
    path = work / TARGETS["openvino"]
    openvino.save_model(model, path, compress_to_fp16=facts["precision"] == "fp16")
    for p in source:
        p.unlink()
    compiled = openvino.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def run(x: Tensor) -> list[np.ndarray]:
        found = compiled(x.numpy())
        return [np.asarray(found[name]) for name in names]

    return run, {"runtime": f"openvino {openvino.__version__}"}


def _write_torch(
    program: Any, images: Tensor, work: Path, names: list[str], facts: dict[str, Any]
) -> tuple[Run, dict[str, Any]]:
    path = work / TARGETS["torch-export"]
    torch.export.save(program, path, extra_files={"dinov3.json": json.dumps(facts)})
    loaded = torch.export.load(path).module()
    return (lambda x: [y.numpy() for y in loaded(x)]), {"runtime": f"torch {torch.__version__}"}


WRITERS = {"onnx": _write_onnx, "openvino": _write_openvino, "torch-export": _write_torch}
