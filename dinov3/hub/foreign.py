"""Backbones of other libraries behind our protocol, so that everything that takes a backbone can measure and use them.

A model spec, `KIND:WHAT[,option=value…]`; the teachers of a distillation are named in the same way:

    transformers:FOLDER_OR_ID     a plain vision transformer of transformers (Dinov2, Dinov2-with-registers, ViT, …)
    timm:NAME                     a vision transformer of timm; checkpoint=FILE for weights of its own

options: `layer` (0-based: the model ends with that block, the final norm after it), `checkpoint` (timm).

Any transformer of equal blocks can be wrapped: its tokens are CLS, registers, patches in row order, and there is a list
of blocks and one final norm. A block's output is caught by a hook, so nothing depends on how a library returns its
hidden states. Left out: networks without a CLS token, hierarchical ones, and iBOT masks.

Legend: B images, N = 1 + R + h·w tokens, D width.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dinov3.errors import DinoError, UnknownName, did_you_mean, only_known, require
from dinov3.hub import Origin
from dinov3.models.base import TokenModel, chosen_layers, layer_output, named_features
from dinov3.weights.catalog import STATISTICS

Triple = tuple[float, float, float]


class _Enough(Exception):
    """Every requested block has run."""


class ForeignBackbone(TokenModel):
    """A vision transformer of another library that meets `Backbone`.

    network: the whole; call: runs it on images; blocks: its list of equal blocks (a part of `network`); norm: the
    final one. prefix: tokens before the patches, CLS first, the others taken for registers.
    """

    def __init__(
        self,
        network: nn.Module,
        call: Callable[[Tensor], Any],
        blocks: Sequence[nn.Module],
        norm: nn.Module,
        *,
        patch_size: int,
        embed_dim: int,
        prefix: int = 1,
    ) -> None:
        super().__init__()
        self.network = network
        self.head = nn.Identity()
        # not attributes of nn.Module's kind: the network already owns them, and a second name would double the keys
        self._call, self._blocks, self._norm = (call,), list(blocks), (norm,)
        self.patch_size = self.stride = patch_size
        self.embed_dim, self.n_storage_tokens, self.n_blocks = embed_dim, prefix - 1, len(self._blocks)

    def patch_grid(self, height: int, width: int) -> tuple[int, int]:
        return height // self.patch_size, width // self.patch_size

    def _tokens(self, x: Tensor, layers: Sequence[int], norm: bool) -> list[Tensor]:
        """[B, N, D] after each of the chosen blocks."""
        h, w = self.patch_grid(x.shape[-2], x.shape[-1])
        if 0 in (h, w):
            raise DinoError(
                f"an image of {x.shape[-1]}×{x.shape[-2]} pixels is smaller than one patch ({self.patch_size}); resize"
            )
        x = x[..., : h * self.patch_size, : w * self.patch_size]  # as our own models: what is no whole patch is lost
        outputs: dict[int, Tensor] = {}
        last = max(layers)

        def catch(layer: int) -> Callable[..., None]:
            def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
                outputs[layer] = output if isinstance(output, Tensor) else output[0]
                if layer == last < self.n_blocks - 1:
                    raise _Enough  # the blocks behind it are not wanted

            return hook

        hooks = [self._blocks[i].register_forward_hook(catch(i)) for i in layers]
        try:
            with suppress(_Enough):
                self._call[0](x)
        finally:
            for hook in hooks:
                hook.remove()
        tokens = [self._norm[0](outputs[i]) if norm else outputs[i] for i in layers]
        expected = 1 + self.n_storage_tokens + h * w
        if tokens[0].shape[1] != expected:
            raise DinoError(
                f"this network gives {tokens[0].shape[1]} tokens where {expected} were expected: no plain ViT"
            )
        return tokens

    def forward_features_list(self, x_list: list[Tensor], masks_list: list[Tensor | None]) -> list[dict[str, Any]]:
        if any(mask is not None for mask in masks_list):
            raise DinoError("masks are for training our own models; this one comes from another library")
        last = [self._tokens(x, [self.n_blocks - 1], norm=False)[0] for x in x_list]
        return [named_features(self._norm[0](raw), raw, None, self.n_storage_tokens) for raw in last]

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        *,
        reshape: bool = False,
        return_class_token: bool = False,
        return_extra_tokens: bool = False,
        norm: bool = True,
    ) -> tuple[Any, ...]:
        """As `VisionTransformer.get_intermediate_layers`."""
        layers = chosen_layers(n, self.n_blocks, "block")
        grid = self.patch_grid(x.shape[-2], x.shape[-1]) if reshape else None
        return tuple(
            layer_output(y, 1 + self.n_storage_tokens, grid, return_class_token, return_extra_tokens)
            for y in self._tokens(x, layers, norm)
        )


# ---- the spec -------------------------------------------------------------------------------------------------------


def parse(
    spec: str, kinds: Iterable[str], options: Mapping[str, Callable[[str], Any]]
) -> tuple[str, str, dict[str, Any]]:
    """(kind, what, options) of `KIND:WHAT[,option=value…]`; `options` are their converters by name.

    Raises `UnknownName` for another kind or option and `DinoError` for a value that its converter rejects.
    """
    head, *given = spec.split(",")
    kind, _, what = head.partition(":")
    if kind not in kinds or not what:
        names = ", ".join(kinds)
        raise UnknownName(
            f"a model spec is KIND:WHAT with KIND one of {names}, not {spec!r}{did_you_mean(kind, kinds)}"
        )
    values: dict[str, Any] = {}
    for option in given:
        name, _, text = option.partition("=")
        only_known(f"{spec}: {kind} has no option", [name], options)
        try:
            values[name] = options[name](text)
        except ValueError:
            raise DinoError(f"option {option!r} has no value it can take ({spec})") from None
    return kind, what, values


def is_spec(text: str | None) -> bool:
    """Whether a model's name is a spec of another library's model."""
    return text is not None and text.partition(":")[0] in KINDS and ":" in text


def load(spec: str, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> nn.Module:
    """The backbone of a spec, in evaluation mode, with `origin`. Raises `DinoError` where it cannot be opened."""
    kind, what, given = parse(spec, KINDS, {"layer": int, "checkpoint": str})
    layer = given.get("layer", -1)
    network, call, norm, facts, (mean, std) = KINDS[kind](what, given.get("checkpoint"))
    blocks = _blocks(network, facts.pop("blocks"), what)
    if not -len(blocks) <= layer < len(blocks):
        raise DinoError(f"layer {layer} does not exist: {what} has {len(blocks)} blocks (0 to {len(blocks) - 1})")
    kept = range(len(blocks))[layer] + 1
    del blocks[kept:]  # what is not used is not computed, and is not part of the fingerprint
    model = ForeignBackbone(network, call, blocks, norm, **facts).requires_grad_(False)
    model.origin = Origin(f"{kind}-{Path(what).name}" + f"-layer{kept - 1}" * ("layer" in given), spec, kind, mean, std)  # type: ignore[assignment]
    return model.to(device=device, dtype=dtype).eval()


def _blocks(network: nn.Module, count: int, what: str) -> Any:
    """The list of blocks inside of a network: the first list of modules that is as long as the network is deep."""
    for module in network.modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) == count > 0:
            return module
    raise DinoError(f"{what} has no list of {count} equal blocks; only plain vision transformers can be wrapped")


Found = tuple[nn.Module, Callable[[Tensor], Any], nn.Module, dict[str, int], tuple[Triple, Triple]]


def _transformers(what: str, checkpoint: str | None) -> Found:
    if checkpoint is not None:
        raise DinoError("checkpoint=… belongs to timm:NAME; for transformers, the folder holds the weights")
    mend_torchvision()
    transformers = require("transformers", "distill", "a model of transformers")
    transformers.utils.logging.disable_progress_bar()  # a file of this size needs none; loading is silent here
    folder = Path(what)
    about_file = folder / "config.json"
    if "/" in what and what.count("/") > 1 and not about_file.is_file():
        raise DinoError(f"{what} is no folder of transformers: there is no config.json in it")
    if about_file.is_file() and json.loads(about_file.read_text())["model_type"] == "dinov2":
        # by its own class: AutoModel imports every processor there is
        from transformers.models.dinov2.modeling_dinov2 import Dinov2Model

        network: Any = Dinov2Model.from_pretrained(what, dtype=torch.float32, attn_implementation="sdpa")
    else:
        try:
            network = transformers.AutoModel.from_pretrained(what, dtype=torch.float32)
        except (OSError, ValueError) as error:
            raise DinoError(f"transformers cannot open {what}: {str(error).splitlines()[0]}") from None
    about = network.config
    norm = next((getattr(network, n) for n in ("layernorm", "norm") if hasattr(network, n)), None)
    if norm is None or not hasattr(about, "patch_size") or not hasattr(about, "num_hidden_layers"):
        raise DinoError(f"{what} ({type(network).__name__}) is no plain vision transformer")
    facts = {
        "blocks": int(about.num_hidden_layers),
        "patch_size": int(about.patch_size),
        "embed_dim": int(about.hidden_size),
        "prefix": 1 + int(getattr(about, "num_register_tokens", 0)),
    }
    statistics: Any = STATISTICS["lvd1689m"]
    processor = folder / "preprocessor_config.json"
    if processor.is_file():
        stated = json.loads(processor.read_text())
        statistics = tuple(stated.get("image_mean", statistics[0])), tuple(stated.get("image_std", statistics[1]))
    # models with learned positions refuse other sizes unless it is requested
    extra = {n: True for n in inspect.signature(network.forward).parameters if n == "interpolate_pos_encoding"}
    return network, lambda x: network(pixel_values=x, **extra), norm, facts, statistics


def mend_torchvision() -> None:
    """Makes torchvision importable beside a CPU-only torch; both libraries import it where it is installed.

    The published torchvision wheel registers its operators from a CUDA library; where that cannot be loaded, the import
    fails because the schemas of two operators are missing. Declaring them is enough: nothing here calls them.
    """
    if "torchvision" in sys.modules or importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        for op in ("nms", "qnms"):
            _TORCHVISION.append(torch.library.Library("torchvision", "FRAGMENT"))
            _TORCHVISION[-1].define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        importlib.import_module("torchvision")


_TORCHVISION: list[Any] = []  # keeps the declarations alive


def create_timm(what: str, checkpoint: str | None, **options: Any) -> Any:
    """timm's model of that name, with its pretrained weights or those of a file."""
    mend_torchvision()
    timm = require("timm", "distill", "a model of timm")
    try:
        return timm.create_model(what, pretrained=checkpoint is None, checkpoint_path=checkpoint or "", **options)
    except (RuntimeError, TypeError, OSError) as error:
        raise DinoError(f"timm cannot build {what}: {str(error).splitlines()[0]}") from None


def _timm(what: str, checkpoint: str | None) -> Found:
    network = create_timm(what, checkpoint, num_classes=0, dynamic_img_size=True)
    prefix = int(getattr(network, "num_prefix_tokens", 0))
    if prefix < 1 or not hasattr(network, "blocks"):
        raise DinoError(f"timm's {what} has no CLS token and blocks; only plain vision transformers can be wrapped")
    facts = {
        "blocks": len(network.blocks),
        "patch_size": int(network.patch_embed.patch_size[0]),
        "embed_dim": int(network.embed_dim),
        "prefix": prefix,
    }
    stated = network.pretrained_cfg
    return network, network.forward_features, network.norm, facts, (tuple(stated["mean"]), tuple(stated["std"]))


KINDS: dict[str, Callable[[str, str | None], Found]] = {"transformers": _transformers, "timm": _timm}
