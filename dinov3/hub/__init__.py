"""A model by name: `load` assembles the catalogue (what a name means), a weights file (what it really is) and a module."""

from __future__ import annotations

import fnmatch
import importlib
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dinov3.errors import DinoError, WeightsError, one_of, only_known, require, without_secrets
from dinov3.models.architectures import ConvNeXtConfig, ViTConfig
from dinov3.weights import catalog

if TYPE_CHECKING:
    from dinov3.models.architectures import BackboneConfig
    from dinov3.weights.reading import OpenedWeights


@dataclass(frozen=True)
class Origin:
    """Where a model's weights come from; kept on the model as `model.origin`."""

    name: str  # the catalogue's id ("dinov3_vits16_lvd1689m"), or "custom" for an architecture that is not published
    source: str  # what was opened, or "random (seed 0)"
    form: str  # "meta", "transformers", "timm", "dinov3" or "random"
    mean: tuple[float, float, float]  # statistics of the images the weights were trained on
    std: tuple[float, float, float]
    notes: tuple[str, ...] = ()
    licence: str = ""  # "" where the source does not state it

    def __post_init__(self) -> None:
        object.__setattr__(self, "source", without_secrets(self.source))

    @property
    def random(self) -> bool:
        return self.form == "random"

    def __str__(self) -> str:
        return f"{self.name} from {self.source}"


class Head(catalog.HeadRow):
    """A published head with the hub function that loads it."""

    @property
    def function(self) -> Callable[..., Any]:
        return getattr(importlib.import_module("dinov3.hub.published_heads"), self.name)


HEADS: dict[str, Head] = {row.name: Head(**vars(row)) for row in catalog.HEADS}


def head(name: str) -> Head:
    """The published head of a hub function's name."""
    return HEADS[one_of("the published head", name, HEADS)]


# of `load`: its own arguments, for suggestions, and those of a backbone's constructor
LOAD_OPTIONS = ("weights", "device", "dtype", "pretrained", "check_hash", "seed", "fast") + tuple(
    field.name for config in (ViTConfig, ConvNeXtConfig) for field in fields(config)
)


def load(
    name: str | None = None,
    weights: str | os.PathLike[str] | None = None,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str | None = None,
    pretrained: bool = True,
    check_hash: bool = False,
    seed: int = 0,
    fast: str | None = None,
    **options: Any,
) -> nn.Module:
    """A backbone in evaluation mode, with its weights.

    `name`: any public alias (hub, Hugging Face or timm; `dinov3 models` lists them), or None to go by the file.
    Also another library's vision transformer, `transformers:FOLDER[,layer=9]` or `timm:NAME` (`hub.foreign`).
    `weights`: a path to Meta's .pth, a transformers or timm file or folder, our own checkpoint, an http(s) URL, a Hugging
    Face id; the form is found by content. "random" (or `pretrained=False`) for fresh weights (`seed`), None for the published
    ones, which are looked for in the Hugging Face cache and fetched from there if you have access. Without any argument:
    the small model that ships with the package. `device`: "auto" is the accelerator if there is one. `options` change
    constructor arguments that leave the weights alone (`patch_size=16` for a ConvNeXt, `drop_path_rate=0.1`).

    `dtype`: default the file's; float32 for files of float16. `fast`: "fp32", "bf16", "int8" or "fp8" gives a frozen, faster
    form instead (`dinov3.inference`), which has the same methods but no weights to train or save.

    The model carries `model.origin`: what was loaded and from where. Raises `UnknownName`, `WeightsMismatch` (at most ten
    lines: what the file seems to be, what to call instead), `UnsafeFile` and other `WeightsError`s.
    """
    if fast is not None:
        from dinov3.inference import check_precision, faster

        if dtype not in (None, "float32", torch.float32):
            raise DinoError(f"fast={fast!r} says the precision already: leave out dtype={dtype}")
        check_precision(fast, device_of(device) if isinstance(device, str) else device)
        options |= {"device": device, "pretrained": pretrained, "check_hash": check_hash, "seed": seed}
        return faster(load(name, weights, dtype="float32", **options), fast)
    kind: Any = (
        getattr(torch, one_of("dtype", dtype, ("float32", "bfloat16", "float16"))) if isinstance(dtype, str) else dtype
    )
    device = device_of(device) if isinstance(device, str) else device
    if not pretrained:
        if weights not in (None, "random"):
            raise DinoError(
                f"pretrained=False means random weights, and weights={os.fspath(weights)!r} is a file: give one"
            )
        weights = "random"
    if name is None and weights is None:
        name, weights = catalog.DEFAULT_MODEL, catalog.DEFAULT_WEIGHTS
    from dinov3.hub import foreign

    if foreign.is_spec(name):
        assert name is not None
        if weights is not None or options:
            raise DinoError(
                f"{name.split(':')[0]}:… names its weights itself; options stand in the line: {name},layer=9"
            )
        return foreign.load(name, device=device, dtype=kind)
    only_known("load has no option", options, LOAD_OPTIONS)  # before anything is fetched
    rows = catalog.resolve(name) if name is not None else ()
    if weights == "random":
        if not rows:
            raise DinoError("random weights need a model's name, for example load('dinov3_vits16', 'random')")
        return fresh(rows[0], seed=seed, device=device, dtype=kind, **options)

    from dinov3.weights import reading

    if weights is None and name is not None and "/" in name and not rows[0].packaged:
        require("huggingface_hub", "hub", f"loading {name} from Hugging Face")
    source = os.fspath(weights) if weights is not None else published_source(rows[0])
    return assemble(reading.open(source, check_hash=check_hash), rows, device=device, dtype=kind, **options)


def device_of(name: str) -> str:
    """A device by name; "auto": cuda, else mps, else cpu. Raises `DinoError` for one that does not exist here."""
    if name != "auto":
        try:
            kind = torch.device(name).type
        except RuntimeError:
            raise DinoError(f"device {name!r}: cpu, cuda, cuda:1, mps or auto") from None
        if kind not in ("cpu", "cuda", "mps", "xpu"):
            raise DinoError(f"device {name!r} holds no numbers to compute with: cpu, cuda, cuda:1, mps or auto")
        if kind == "cuda" and not torch.cuda.is_available():
            raise DinoError(f"device {name!r}: there is no CUDA device here (or this torch was built without CUDA)")
        return name
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def list_models(pattern: str = "*") -> list[str]:
    """Names of backbones for `load` that match a pattern such as "*vits*", in the order of the catalogue."""
    names = dict.fromkeys(name for row in catalog.ROWS for name in (row.arch, row.id))
    return [name for name in names if fnmatch.fnmatch(name, pattern)]


def published_source(row: catalog.Row) -> str:
    """Where a catalogue row's file is looked for when no weights are named."""
    import importlib.util

    if row.packaged_path is not None:
        return str(row.packaged_path)
    if not row.released:
        raise WeightsError(f"no weights of {row.arch} were published; pass weights=PATH, or weights='random'")
    if row.hf and (row.url is None or importlib.util.find_spec("huggingface_hub")):
        return row.hf
    assert row.url is not None
    return row.url


def fresh(row: catalog.Row, *, seed: int | None, device: Any = "cpu", dtype: Any = None, **options: Any) -> nn.Module:
    """A model with initial weights. `seed` None draws from torch's current random state."""
    from dinov3.models.build import backbone

    with torch.device("meta"):  # init_weights fills everything, so nothing is drawn twice
        model = backbone(with_options(row.config, options))
    model.to_empty(device="cpu")
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        model.init_weights()
    source = f"random (seed {seed})" if seed is not None else "random"
    model.origin = Origin(row.id, source, "random", row.mean, row.std)  # type: ignore[assignment]
    return model.to(device=device, dtype=dtype).eval()


def with_options(config: BackboneConfig, options: dict[str, Any]) -> BackboneConfig:
    if not options:
        return config
    type(config).of(**options)  # raises on unknown names, with suggestions
    return replace(config, **options)


def assemble(
    opened: OpenedWeights, wanted: tuple[catalog.Row, ...], *, device: Any = "cpu", dtype: Any = None, **options: Any
) -> nn.Module:
    """The module of an opened file. `wanted` are the rows the user's name may mean; empty: whatever the file is."""
    from dinov3.weights import filling

    if dtype is None and any(value.dtype == torch.float16 for value in opened.state_dict.values()):
        dtype = torch.float32  # float16 keeps files small; nothing computes in it unless requested
    fitting = [row for row in opened.rows if not wanted or row in wanted]
    notes, licence = list(opened.notes), opened.licence
    if (
        wanted
        and not fitting
        and wanted[0].known_by_name
        and any(row.config == wanted[0].config for row in opened.rows)
    ):
        fitting, licence = [wanted[0]], str(wanted[0].licence)  # the name decides between files of the same shapes
    config = fitting[0].config if fitting else wanted[0].config if wanted else opened.config
    # where the keys do not fit this raises, saying in ten lines what the file is and what to call instead
    model = filling.build(with_options(config, options), opened, device=device, dtype=dtype, requested=wanted)
    if wanted and not fitting:
        # The keys fit, but the file states something that no key shows (eps, rope base): the file is right.
        differing = filling.differences(opened.config, config)
        notes.append(f"the file's configuration is not that of {wanted[0].arch}: {differing}; the file's is used")
        model = filling.build(with_options(opened.config, options), opened, device=device, dtype=dtype)
    chosen = fitting[0] if fitting else (wanted[0] if wanted else None)
    if len(fitting) > 1 and opened.mean is None and len({row.dataset for row in fitting}) > 1:
        ids = " or ".join(row.id for row in fitting)
        notes.append(f"this file can be {ids}; taken as {fitting[0].id}. Name the right one: their statistics differ")
        warnings.warn(f"{opened.source}: {notes[-1]}", stacklevel=3)
    mean = opened.mean or (chosen.mean if chosen else catalog.STATISTICS["lvd1689m"][0])
    std = opened.std or (chosen.std if chosen else catalog.STATISTICS["lvd1689m"][1])
    name = chosen.id if chosen else "custom"
    model.origin = Origin(name, opened.source, opened.form, mean, std, tuple(notes), licence)  # type: ignore[assignment]
    return model
