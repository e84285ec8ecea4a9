"""A model as a graph that runs without this package: ONNX, OpenVINO, torch.export, or ExecuTorch.

    export(dinov3.load("dinov3_vitt16"), "out", "onnx")                    # any batch, any size in whole patches
    export(model, "out", "openvino", size=(224, 224), output="pooled")
    export(open_task_model("segment", "street.safetensors"), "out", "onnx")
    export(open_towers("head.pth", "vitl16.pth"), "out", "onnx")           # dino.txt: out/image and out/text

The folder holds the model, and `dinov3.json`: inputs and outputs, how images become inputs, and how far the file's outputs
are from the model's at several sizes and batches. It appears whole or not at all: a file that computes something else
is not written. RoPE is part of the graph; for a fixed size its tables are constants.
"""

from __future__ import annotations

import copy
import importlib
import importlib.metadata
import json
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dinov3
from dinov3.data import names as known_names
from dinov3.data.transforms.inputs import Preprocessing
from dinov3.errors import DinoError, MissingExtra, one_of, require
from dinov3.export.convert import empty_folder
from dinov3.features import default_preprocessing, evaluating
from dinov3.files import atomically
from dinov3.heads.detr import DetectorWithProcessor, to_xyxy
from dinov3.heads.dinotxt import DinoTxt, TextTower, TextTransformer, VisionHead, VisionTower
from dinov3.heads.dpt import Depther
from dinov3.heads.mask2former import Mask2FormerSegmentor
from dinov3.hub import HEADS
from dinov3.hub.own_heads import without_folder
from dinov3.inference.fold import before_scale
from dinov3.models import convnext, low_precision, vit
from dinov3.weights import identity

TARGETS = {"onnx": "model.onnx", "openvino": "model.xml", "torch-export": "model.pt2", "executorch": "model.pte"}
ONNX = ("onnx", "onnxscript", "onnxruntime")
LIBRARIES = {"onnx": ONNX, "openvino": (*ONNX, "openvino")}  # those that write and check
OUTPUTS = {  # of a backbone
    "cls": ("cls",),
    "patches": ("patches",),
    "pooled": ("cls", "mean"),
    "all": ("cls", "mean", "registers", "patches"),
}
# of every token, to the model in float32
LEAST_COSINE = {"fp32": 0.99999, "fp16": 0.9999, "bf16": 0.999, "int8": 0.999}
LEAST_QUERY = 0.99  # the median of a detector's, however much a rounding changes the model
ROUNDING = {"fp32": 2**-23, "fp16": 2**-10, "bf16": 2**-7, "int8": 2**-7}  # relative, of one number
PRECISIONS = {
    "onnx": ("fp32", "fp16", "int8"),
    "openvino": ("fp32", "fp16", "int8"),
    "torch-export": ("fp32", "fp16", "bf16", "int8"),
    "executorch": ("fp32",),
}
INSTEAD = {  # of what a target does not take
    ("onnx", "bf16"): "onnxruntime computes no bf16 on a CPU, so that the file could not be checked",
    ("openvino", "bf16"): "an OpenVINO file gains nothing from bf16: INFERENCE_PRECISION_HINT=bf16 of the runtime "
    "computes in it from a file of fp32 or, at half the size, of fp16",
}
OPSET = 20
EXECUTORCH = "pip install --no-deps executorch && pip install flatbuffers tabulate ruamel.yaml torchao"
BACKBONES = (vit.VisionTransformer, convnext.ConvNeXt)
# of published heads
CLASSES = {"classify": known_names.imagenet1k, "segment": known_names.ade20k, "detect": known_names.coco}
Run = Callable[[Tensor], list[np.ndarray]]


class Outputs(nn.Module):
    """One input → the chosen tensors of `function(model, input)`, in float32."""

    def __init__(
        self, model: nn.Module, function: Callable[[Any, Tensor], dict[str, Tensor]], names: Sequence[str]
    ) -> None:
        super().__init__()
        self.model, self.function, self.names = model, function, tuple(names)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        found = self.function(self.model, x)
        return tuple(found[name].float() for name in self.names)


def backbone_outputs(backbone: Any, images: Tensor) -> dict[str, Tensor]:
    """Images [B, 3, H, W] → cls [B, D], mean (of the patches) [B, D], registers [B, R, D] and patches [B, h, w, D], after the
    final norm."""
    features = backbone.forward_features(images)
    patches = features["x_norm_patchtokens"]
    return {
        "cls": features["x_norm_clstoken"],
        "mean": patches.mean(1),
        "registers": features["x_storage_tokens"],
        "patches": patches.unflatten(1, backbone.patch_grid(images.shape[-2], images.shape[-1])),
    }


def task_outputs(model: Any, images: Tensor) -> dict[str, Tensor]:
    """What a task model finds in images [B, 3, H, W]: "logits" of classes (of images, places or boxes), "depth", and with a
    Mask2Former "masks" [B, Q, H/4, W/4] (logits), with a detector "boxes" [B, Q, 4] (xyxy, pixels of the input)."""
    if isinstance(model, DetectorWithProcessor):
        found = model.detector(images)
        return {"logits": found["pred_logits"], "boxes": to_xyxy(found["pred_boxes"])}
    if isinstance(model, Mask2FormerSegmentor):
        found = model.outputs(images, every_layer=False)
        return {"logits": found["pred_logits"], "masks": found["pred_masks"]}
    return {"depth" if isinstance(model, Depther) else "logits": model(images)}


def image_tower(tower: VisionTower, images: Tensor) -> dict[str, Tensor]:
    """ "features" [B, E] of length one, and "patches" [B, h, w, D'], which compare with the second half of a text's."""
    features, patches, _ = tower(images)
    grid = tower.backbone.patch_grid(images.shape[-2], images.shape[-1])
    return {"features": F.normalize(features, dim=-1), "patches": patches.unflatten(1, grid)}


def text_tower(tower: TextTower, tokens: Tensor) -> dict[str, Tensor]:
    """ "features" [B, E] of length one of token ids [B, n]."""
    return {"features": F.normalize(tower(tokens), dim=-1)}


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


def in_precision(model: nn.Module, precision: str) -> nn.Module:
    """The model, or a copy whose backbone (of dino.txt: both towers) multiplies in half precision or has matrices of 8 bits.
    The residual stream, norms, positions and heads stay in float32."""
    if precision == "fp32":
        return model
    model = copy.deepcopy(model)
    towers = [m for m in model.modules() if isinstance(m, (*BACKBONES, VisionHead, TextTransformer))]
    if precision == "int8":
        for tower in towers:
            low_precision.quantise(tower, "int8")
    else:
        halve(model, towers, {"fp16": torch.float16, "bf16": torch.bfloat16}[precision])
    return model.eval()


def halve(model: nn.Module, towers: Sequence[nn.Module], dtype: torch.dtype) -> None:
    """Linear layers and convolutions of the towers in `dtype`.

    Layer scales are multiplied into the layer before them: register tokens of large models leave float16's range before
    they are scaled down.
    """
    for block in [m for m in model.modules() if isinstance(m, vit.Block)]:
        mlp: Any = block.mlp
        for scale, linear in (("ls1", block.attn.proj), ("ls2", mlp.w3 if isinstance(mlp, vit.SwiGLU) else mlp.fc2)):
            bias = linear.bias if linear.bias is not None else linear.weight.new_zeros(linear.out_features)
            weight, bias = before_scale((linear.weight, bias), getattr(block, scale))
            linear.weight = nn.Parameter(weight)
            linear.bias = nn.Parameter(bias)
            setattr(block, scale, nn.Identity())
    for tower in towers:
        for parent in list(tower.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, (nn.Linear, nn.Conv2d)):  # after a linear layer comes what takes half precision
                    setattr(parent, name, Half(child, dtype, back=isinstance(child, nn.Conv2d)))


@dataclass(frozen=True)
class Part:
    """What becomes one file: a module of one input, and what is written and checked about it."""

    module: Outputs
    input: str  # its name
    shape: list[Any]  # of the input after the batch, for people
    free: dict[int, Any]  # dimensions of the input that stay free
    examples: list[Tensor]
    facts: dict[str, Any]
    rows: bool = False  # of the outputs every row is compared, not the image as a whole
    queries: bool = False  # of a detector: `_in_order`, and the median of the rows counts


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

    size: (height, width) in pixels; None: any size in whole patches. The batch is free (ExecuTorch: one image of a fixed
    size). output: of a backbone, a key of `OUTPUTS`. precision: of products, or int8: of matrices; inputs and outputs are
    float32. dino.txt becomes two folders, and the result {"image": …, "text": …}. Raises `DinoError` if something is
    unknown, `folder` is not empty, or the file's outputs are not the model's (`LEAST_COSINE`), and `MissingExtra`.
    """
    one_of("the target", to, TARGETS)
    one_of("the precision", precision, LEAST_COSINE)
    one_of("the output", output, OUTPUTS)
    if precision not in PRECISIONS[to]:
        why = INSTEAD.get((to, precision), f"{to} files are not written in {precision}")
        raise DinoError(f"{why}; take --precision {' or '.join(PRECISIONS[to])}")
    if to == "executorch" and size is None:
        raise DinoError("ExecuTorch plans its memory ahead: give a fixed size (--size 224,224)")
    for module in LIBRARIES.get(to, ()):
        require(module, "openvino" if to == "openvino" else "export", f"--to {to}")
    if to == "executorch":
        _executorch()
    out = empty_folder(folder)
    if any(p.dtype != torch.float32 or p.is_cuda for p in model.parameters()):
        model = copy.deepcopy(model).cpu().float()
    with evaluating(model), torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch, about torch
        parts = _parts(model, size, output)
        with atomically(out) as work:
            work.mkdir()
            for name in parts:
                (work / name).mkdir(exist_ok=True)
            every = {name: _write(part, work / name, to, size, precision) for name, part in parts.items()}
    return every.get("", every)


def _preprocessing(model: Any, backbone: Any, task: str, size: tuple[int, int] | None) -> Preprocessing:
    """How images become inputs of that size: as the head itself states it, or as is usual for the task. A centre crop stays
    the same share of the image where the size is a square, else the image is resized."""
    origin, info = getattr(model, "origin", None), getattr(model, "head_info", None)
    changes: dict[str, Any] = {} if origin is None else {"mean": origin.mean, "std": origin.std}
    if info is not None:
        own = info.preprocessing
    elif task == "classify" or isinstance(model, DinoTxt):
        own = Preprocessing.named("classification", **changes, multiple=backbone.stride)
    else:
        own = default_preprocessing(backbone, **changes)
    if size is None:
        return own
    if own.center_crop and size[0] == size[1]:
        return own.with_(size=round(own.size * size[0] / own.center_crop), center_crop=size[0])
    return own.with_(size=size, center_crop=None)


def _parts(model: Any, size: tuple[int, int] | None, output: str) -> dict[str, Part]:
    """The files of a model by their folder: "" or, of dino.txt, "image" and "text"."""
    backbone: Any = next(m for m in model.modules() if isinstance(m, BACKBONES))
    stride = backbone.stride
    sizes = [size] if size else [tuple(stride * n for n in hw) for hw in ((8, 8), (7, 12), (14, 14))]
    for h, w in sizes:
        if h % stride or w % stride or min(h, w) < stride:
            raise DinoError(f"the size {h},{w} is no multiple of the patch: height and width in steps of {stride} px")
    origin, info = getattr(model, "origin", None), getattr(model, "head_info", None)
    task = HEADS[origin.name].task if origin is not None and origin.name in HEADS else ""
    origins = [o for o in (origin, getattr(backbone, "origin", None)) if o is not None]
    named = re.split("( from | over )", str(origins[0] if origins else type(backbone).__name__))
    facts: dict[str, Any] = {
        "model": "".join(map(without_folder, named)),
        "licence": next((o.licence for o in origins if o.licence), ""),  # "" where nothing states it
        "fingerprint": identity.fingerprint(backbone.state_dict()),
        "patch": stride,
        "registers": backbone.n_storage_tokens,
        "preprocessing": asdict(_preprocessing(model, backbone, task, size)),
    }
    if info is not None:
        facts |= {"task": info.task, "classes": list(info.class_names)}
    elif task:
        facts |= {"task": task} | ({"classes": list(CLASSES[task]())} if task in CLASSES else {})
    sides = {2: stride * torch.export.Dim("rows", max=1024), 3: stride * torch.export.Dim("columns", max=1024)}
    images = [_images(b, *hw) for hw in sizes for b in (1, 3)]
    seen = ("images", [3, *(size or (f"multiple of {stride}",) * 2)], {} if size else sides, images)
    if isinstance(model, DinoTxt):
        n, ids = model.text_config.context_length, model.text_config.vocab_size
        facts["logit_scale"] = model.logit_scale.exp().item()  # of the cosines of both files' features
        text = {"model": facts["model"], "logit_scale": facts["logit_scale"], "vocabulary": ids}
        tokens = [torch.randint(ids, (b, n), generator=torch.Generator().manual_seed(b)) for b in (1, 3)]
        return {
            "image": Part(Outputs(model.visual_model, image_tower, ("features", "patches")), *seen, facts, rows=True),
            "text": Part(
                Outputs(model.text_model, text_tower, ["features"]), "tokens", [n], {}, tokens, text, rows=True
            ),
        }
    if model is backbone:
        names = [n for n in OUTPUTS[output] if n != "registers" or backbone.n_storage_tokens]
        return {"": Part(Outputs(model, backbone_outputs, names), *seen, facts, rows=True)}
    detector = isinstance(model, DetectorWithProcessor)
    whole = Outputs(model, task_outputs, list(task_outputs(model, images[0])))
    return {"": Part(whole, *seen, facts, rows=detector, queries=detector)}


def _write(part: Part, folder: Path, to: str, size: tuple[int, int] | None, precision: str) -> dict[str, Any]:
    """One file and its `dinov3.json` in `folder`, compared with the module."""
    names, last = list(part.module.names), part.examples[-1]
    expected = [[y.numpy() for y in part.module(x)] for x in part.examples]
    computed = in_precision(part.module, precision)
    with _constant_positions(computed) if size else nullcontext():
        computed(last)
        program = _traced(computed, last[:1] if to == "executorch" else last, part)
    facts = part.facts | {
        "version": dinov3.__version__,
        "target": to,
        "precision": precision,
        "inputs": {part.input: [1 if to == "executorch" else "batch", *part.shape]},
        "outputs": names,
    }
    run, about = WRITERS[to](program, last, folder, names, facts)
    facts |= about | {"parity": [_compared(part, x, e, run) for x, e in zip(part.examples, expected)]}
    least, bound = _least(facts["parity"]), LEAST_COSINE[precision]
    if part.queries and least < bound:  # a rounding makes other proposals the best, in the model as well

        def rounded(x: Tensor) -> list[np.ndarray]:
            return [y.numpy() for y in part.module(x * (1 + ROUNDING[precision]))]

        itself = _least([_compared(part, x, e, rounded) for x, e in zip(part.examples, expected)])
        bound = min(bound, max(LEAST_QUERY, itself))
    if not least >= bound:
        raise DinoError(
            f"the {to} file differs from the model: a cosine of {least:.6f}, below {bound:.6g}; nothing was "
            "written. Please report it with the model's name and the versions of torch and the runtime"
        )
    text = json.dumps(facts, indent=1) + "\n"
    (folder / "dinov3.json").write_text(text)
    return json.loads(text)


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


def _traced(model: nn.Module, x: Tensor, part: Part) -> Any:
    if part.free:
        # odd grids take the general path through heads that double and halve maps, and a side of 1 is no symbol
        stride = part.facts["patch"]
        x = x[..., : 13 * stride, : 11 * stride].contiguous()
    shapes = {"x": {0: torch.export.Dim("batch", max=65536)} | part.free} if len(x) > 1 else None
    try:
        program = torch.export.export(model, (x,), dynamic_shapes=shapes)
    except Exception as error:  # torch's exporter raises many kinds
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        hint = "give a fixed size (--size 224,224)" if part.free else "this model's operators cannot be exported"
        raise DinoError(f"torch.export does not trace this model ({reason[:200]}); {hint}") from error
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine, which the file would hold
    return program


def _least(parity: list[dict[str, Any]]) -> float:
    return min(row["cosine"] for place in parity for row in place["outputs"].values())


def _compared(part: Part, x: Tensor, expected: list[np.ndarray], run: Run) -> dict[str, Any]:
    """Differences and the cosine for one input: the least of all rows (tokens) or of all images, of queries the median."""
    try:
        found = run(x)
    except Exception as error:  # each runtime has its own kinds
        hint = "please report it"
        if x.ndim == 4:
            hint = "give the size you need (--size {},{})".format(*x.shape[2:])
        raise DinoError(f"the exported file does not take {part.input} of the shape {list(x.shape)}; {hint}") from error
    if part.queries:
        found = _in_order(expected, found)
    rows = {}
    for name, e, f in zip(part.module.names, expected, found, strict=True):
        if e.shape != f.shape:
            raise DinoError(f"the exported {name} has the shape {list(f.shape)}, the model's {list(e.shape)}")
        e, f = e.astype(np.float64), f.astype(np.float64)
        u, v = (a.reshape(-1, a.shape[-1]) if part.rows else a.reshape(len(a), -1) for a in (e, f))
        norms = np.linalg.norm(u, axis=1) * np.linalg.norm(v, axis=1)
        cosines = (u * v).sum(1) / np.maximum(norms, 1e-30)
        cosine = float(np.median(cosines) if part.queries else cosines.min())
        rows[name] = {"max": float(abs(e - f).max()), "mean": float(abs(e - f).mean()), "cosine": cosine}
    return {"batch": len(x), "size": list(x.shape[2:] or x.shape[1:]), "outputs": rows}


def _in_order(expected: list[np.ndarray], found: list[np.ndarray]) -> list[np.ndarray]:
    """A detector's queries in the order of those expected: two proposals of nearly one score may change places."""
    e, f = (torch.from_numpy(np.concatenate(arrays, axis=-1)) for arrays in (expected, found))  # [B, Q, K + 4]
    nearest = torch.cdist(e, f, compute_mode="donot_use_mm_for_euclid_dist").argmin(-1).numpy()
    return [np.take_along_axis(array, nearest[..., None], axis=1) for array in found]


# ---- the forms -----------------------------------------------------------------------------------------------------


def _name_dimensions(graph: Any, stride: int) -> None:
    """torch's symbols of free dimensions by what they are: batch, height and width in pixels, rows and columns of patches."""
    named: dict[str, str] = {}
    for size, name in zip(graph.inputs[0].shape, ("batch", "", "rows", "columns")):
        if (symbol := re.search(r"s\d+", str(size))) is not None:
            named[symbol[0]] = name
    pixels = {f"{stride}*rows": "height", f"{stride}*columns": "width"}
    for value in [*graph.inputs, *(v for node in graph for v in node.outputs if v.shape is not None)]:
        for axis, size in enumerate(value.shape):
            if not isinstance(size, int) and size.value is not None:
                text = re.sub(r"s\d+", lambda symbol: named.get(symbol[0], symbol[0]), str(size.value))
                value.shape[axis] = pixels.get(text, text)


def _write_onnx(
    program: Any, x: Tensor, work: Path, names: list[str], facts: dict[str, Any]
) -> tuple[Run, dict[str, Any]]:
    import onnx
    import onnxruntime

    (source,) = facts["inputs"]
    # a line for each operator that is left as it is, and for each of torchvision's, if that is not installed
    loggers = [logging.getLogger(n) for n in ("onnxscript", "torch.onnx._internal.exporter._registration")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        made = torch.onnx.export(
            program, (x,), dynamo=True, opset_version=OPSET, input_names=[source], output_names=names, verbose=False
        )
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)
    assert made is not None
    graph = made.model.graph
    outputs = {id(value) for value in graph.outputs}
    for value in [v for node in graph for v in node.outputs if v.name in names and id(v) not in outputs]:
        value.name = f"{value.name}_inside"  # torch calls a mean "mean" as well
    _name_dimensions(graph, facts.get("patch", 0))
    made.model.metadata_props["dinov3"] = json.dumps(facts)
    path = work / TARGETS["onnx"]
    large = sum(v.numel() * v.element_size() for v in program.state_dict.values()) > 1.8e9
    made.save(path, external_data=large)  # protobuf holds 2 GB: the weights then lie beside it
    written = onnx.load(path, load_external_data=False).graph
    operators = sorted({node.op_type for node in written.node})
    branches = {"If", "Loop", "Scan"} & set(operators)
    if branches or [i.name for i in written.input] != [source]:
        raise DinoError(
            f"the ONNX graph has {', '.join(branches) or 'inputs beside ' + source}: a defect, please report it"
        )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(x: Tensor) -> list[np.ndarray]:
        return session.run(names, {source: x.numpy()})

    about = {"opset": OPSET, "operators": operators, "runtime": f"onnxruntime {onnxruntime.__version__}"}
    return run, about


def _write_openvino(
    program: Any, x: Tensor, work: Path, names: list[str], facts: dict[str, Any]
) -> tuple[Run, dict[str, Any]]:
    import openvino

    _write_onnx(program, x, work, names, facts)
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
    program: Any, x: Tensor, work: Path, names: list[str], facts: dict[str, Any]
) -> tuple[Run, dict[str, Any]]:
    path = work / TARGETS["torch-export"]
    torch.export.save(program, path, extra_files={"dinov3.json": json.dumps(facts)})
    loaded = torch.export.load(path).module()
    return (lambda x: [y.numpy() for y in loaded(x)]), {"runtime": f"torch {torch.__version__}"}


def _executorch() -> None:
    """Raises `MissingExtra` where ExecuTorch lacks. It is no extra of ours: what its package requires takes omegaconf back
    to a version that training cannot use, and it needs none of that to write a file."""
    try:
        importlib.import_module("executorch.exir")
    except ModuleNotFoundError as error:
        raise MissingExtra(f"--to executorch needs {error.name}; install it with: {EXECUTORCH}") from None


def _write_executorch(
    program: Any, x: Tensor, work: Path, names: list[str], facts: dict[str, Any]
) -> tuple[Run, dict[str, Any]]:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime

    try:
        lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch()
    except Exception as error:  # as torch's exporter, many kinds
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DinoError(f"ExecuTorch does not take this model ({reason[:200]}); take --to onnx") from error
    path = work / TARGETS["executorch"]
    path.write_bytes(lowered.buffer)
    method = Runtime.get().load_program(path).load_method("forward")
    assert method is not None

    def run(x: Tensor) -> list[np.ndarray]:
        each = [[y.clone() for y in method.execute([one])] for one in x.split(1)]
        return [torch.cat(ys).numpy() for ys in zip(*each)]

    return run, {"runtime": f"executorch {importlib.metadata.version('executorch')}"}


WRITERS = {
    "onnx": _write_onnx,
    "openvino": _write_openvino,
    "torch-export": _write_torch,
    "executorch": _write_executorch,
}
