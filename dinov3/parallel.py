"""How one model runs on many devices: activation checkpointing → compile → FSDP2, applied from outside, in that order.

The order is not free. Checkpointing wraps a block, so that what is compiled includes the recomputation; compilation comes
before sharding, so that gathering weights stays outside the compiled graph. The model knows nothing of any of it: names in
state dicts stay the plain ones (`optim.plain_name` removes what checkpointing puts in).

Sharding is full (weights, gradients, optimiser state), over all ranks or over those of one machine, or there is none and
only gradients travel. Units: every transformer block (or ConvNeXt stage and down-sampling), the rest of the backbone, each
head. One process takes the same path wherever it does not compute in float32, as a mesh of one: weights, residual stream
and gradients then have the types they have on many.

Left out: tensor and pipeline parallelism.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dinov3 import distributed
from dinov3.distributed import Group
from dinov3.errors import DinoError, one_of

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

SHARDED_OVER = ("all", "machine", "none")
WITHOUT_COLLECTIVES = ("mps",)  # devices of one process, which cannot be a mesh
KEPT_BYTES = 2**30  # weights of a trained network that stay whole between forward and backward pass: ViT-L has 0.6 GiB
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def parallelize(
    parts: dict[str, nn.Module],
    *,
    device: torch.device,
    trained: bool,
    group: Group = None,
    checkpointing: str = "none",
    compile: bool = False,
    cudagraphs: bool = False,
    param_dtype: str = "fp32",
    reduce_dtype: str = "fp32",
    over: str = "all",
) -> None:
    """Prepares {"backbone": …, "dino_head": …, …}, or heads alone, in place and on `device`, holding the values they are to
    begin with.

    `trained`: activations are stored for a backward pass; only then is there anything to checkpoint. `checkpointing`:
    "none" | "selective" (keep the results of matrix products and attention, recompute the rest) | "full". `param_dtype`
    is what weights are gathered and computed in; parameters stay float32. `over`: the ranks that share one copy of weights
    and optimiser state: "all" | "machine" (copies on several machines are kept alike by reducing gradients) | "none".
    """
    if checkpointing not in ("none", "selective", "full"):
        raise DinoError(f"checkpointing is none, selective or full, not {checkpointing!r}")
    if trained and checkpointing != "none":
        checkpoint_activations(parts["backbone"], selective=checkpointing == "selective")
    if compile:
        compile_units(parts, cudagraphs=cudagraphs)
    if distributed.world(group) > 1 or (param_dtype != "fp32" and device.type not in WITHOUT_COLLECTIVES):
        mesh = device_mesh(device, group, over)
        shard(parts, mesh, param_dtype=param_dtype, reduce_dtype=reduce_dtype, trained=trained)


def units(backbone: nn.Module) -> list[nn.ModuleList | nn.Sequential]:
    """The lists whose members are a backbone's repeated units: blocks, or stages and down-sampling layers."""
    names = ("blocks",) if hasattr(backbone, "blocks") else ("downsample_layers", "stages")
    return [getattr(backbone, name) for name in names]


# ---- 1: activation checkpointing ------------------------------------------------------------------------------------

# Expensive to compute and small to store.
SAVED_OPS = (
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_mm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
)


def checkpoint_activations(backbone: nn.Module, *, selective: bool) -> None:
    """Every unit recomputes in backward what it did not keep, with the same random draws."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    def policy(_context: Any, op: Any, *_args: Any, **_options: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op in SAVED_OPS else CheckpointPolicy.PREFER_RECOMPUTE

    options: dict[str, Any] = {"checkpoint_impl": CheckpointImpl.NO_REENTRANT, "preserve_rng_state": True}
    if selective:
        options["context_fn"] = lambda: create_selective_checkpoint_contexts(policy)
    for unit in units(backbone):
        for i, module in enumerate(unit):
            unit[i] = checkpoint_wrapper(module, **options)


# ---- 2: compilation -------------------------------------------------------------------------------------------------


def compile_units(parts: dict[str, nn.Module], *, cudagraphs: bool = False) -> None:
    """Each unit of the backbone and each head by itself: blocks share one graph, and no name changes.

    Shapes are static, one graph for each crop size; hence the raised limit. CUDA graphs are for transformer blocks.
    """
    torch._dynamo.config.recompile_limit = 1024
    backbone = parts.get("backbone")
    graphs: dict[str, Any] = {"fullgraph": True, "options": {"triton.cudagraphs": True}} if cudagraphs else {}
    for unit in units(backbone) if backbone is not None else ():
        for module in unit:
            module.compile(dynamic=False, **(graphs if hasattr(backbone, "blocks") else {}))
    for name, head in parts.items():
        if name != "backbone":
            head.compile(dynamic=False)


# ---- 3: sharding ----------------------------------------------------------------------------------------------------


def device_mesh(device: torch.device, group: Group, over: str) -> DeviceMesh:
    """The ranks of `group`, [W], or [W/n, n]: n neighbours share one copy, W/n copies are trained alike."""
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

    one_of("sharding over", over, SHARDED_OVER)
    distributed.join_alone(device)
    if group is not None and over == "all":
        return DeviceMesh.from_group(group, device.type)
    world, n = distributed.world(), {"all": distributed.world(), "machine": distributed.local_world(), "none": 1}[over]
    if group is not None and distributed.world(group) != world:
        raise DinoError(
            f"one of several students is sharded over all of its ranks; run.shard_over={over} is for one model"
        )
    if world % n:
        raise DinoError(f"{world} processes are not a multiple of the {n} of this machine; use run.shard_over=all")
    if n == world:
        return init_device_mesh(device.type, (world,))
    return init_device_mesh(device.type, (world // n, n), mesh_dim_names=("replicate", "shard"))


def shard(parts: dict[str, nn.Module], mesh: DeviceMesh, *, param_dtype: str, reduce_dtype: str, trained: bool) -> None:
    """FSDP2 over `mesh`: gradients come back averaged over its ranks."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    # outputs are views, and none is changed in place
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    policy = MixedPrecisionPolicy(param_dtype=DTYPES[param_dtype], reduce_dtype=DTYPES[reduce_dtype])
    size = sum(p.numel() for part in parts.values() for p in part.parameters()) * DTYPES[param_dtype].itemsize
    options: dict[str, Any] = {"mesh": mesh, "mp_policy": policy}
    options["reshard_after_forward"] = not trained or size > KEPT_BYTES
    backbone = parts.get("backbone")
    members: list[Any] = [] if backbone is None else [module for unit in units(backbone) for module in unit]
    # what comes in has the type of the root's weights; only tables of positions may have another, and keep it
    inside = options | {"mp_policy": replace(policy, cast_forward_inputs=False)}
    for module in members:
        fully_shard(module, **inside)
    for before, after in pairwise(members):
        before.set_modules_to_forward_prefetch([after])
        after.set_modules_to_backward_prefetch([before])
    for module in parts.values():
        # a backbone that runs forward only gives its root's weights back too; a trained one needs them again at once
        fully_shard(module, **(options | {"reshard_after_forward": not trained}))
    if backbone is None:
        return
    for method in ("forward_features", "get_intermediate_layers"):
        register_fsdp_forward_method(backbone, method)  # features.extract calls them


def reduce_gradients(parts: dict[str, nn.Module], wanted: bool) -> None:
    """Whether backward passes from here on end with gradients averaged over the ranks; without, each rank adds up its own.

    For accumulated batches: one reduction a step instead of one a batch, at the price of a whole gradient on each rank.
    Nothing to do for parts that are not sharded.
    """
    for part in parts.values():
        set_sync = getattr(part, "set_requires_gradient_sync", None)  # what FSDP2 adds to a module
        if set_sync is not None:
            set_sync(wanted)


def reshard(parts: dict[str, nn.Module]) -> None:
    """After the backward pass: a head that no loss with a weight reached, or a frozen backbone, still holds its weights
    whole. Shards them again."""
    for module in (module for part in parts.values() for module in part.modules()):
        again = getattr(module, "reshard", None)  # what FSDP2 adds to a module
        if again is not None:
            again()


@contextlib.contextmanager
def precision(device: torch.device, param_dtype: str) -> Iterator[None]:
    """Matrix products in `param_dtype` by autocast, on devices that cannot be a mesh; elsewhere sharding brings the types."""
    wanted = device.type in WITHOUT_COLLECTIVES and param_dtype != "fp32"
    with torch.autocast(device.type, DTYPES[param_dtype], enabled=wanted):
        yield


# ---- seeing through it ----------------------------------------------------------------------------------------------


def whole(x: Tensor) -> Tensor:
    """A sharded tensor's full value, on every rank (all of them must call); a plain one as it is."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def full_state(module: nn.Module, *, keep: bool = True) -> dict[str, Tensor]:
    """The unsharded state dict under plain names, on the CPU; ranks with `keep` false take part and keep nothing."""
    from dinov3.optim import plain_name

    state = {}
    for name, value in module.state_dict().items():
        value = whole(value.detach())
        if keep:
            state[plain_name(name)] = value.cpu().clone() if value.device.type == "cpu" else value.cpu()
    return state
