"""Ranks, process groups, gather and reduce.

Everything here works alone: with no process group every reduction is the identity, every gather returns what came in,
and `rank()` is 0 of `world()` 1. So the losses and the training loop are written once, for any number of processes,
and run in a plain `python` on a laptop. Where a function takes `group`, None means all processes.

Collectives run over NCCL for CUDA tensors and gloo for CPU tensors. Nothing is silenced: a process that must not
log checks `is_main()`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dinov3.errors import DinoError

Group = Any  # a torch.distributed.ProcessGroup, or None for all processes; the class is absent from some torch builds
T = TypeVar("T")

# ---- the launcher --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """This process's place, from the environment that its launcher set."""

    how: str  # "torchrun" (or another launcher with the same variables) | "slurm" | "single"
    rank: int = 0
    world: int = 1
    local_rank: int = 0  # on this machine
    local_world: int = 1
    address: str = "127.0.0.1"  # where rank 0 listens
    port: int = 0


def detect(environ: Mapping[str, str] | None = None) -> Launch:
    """The first that applies: torchrun's variables, a SLURM step's variables, a single process.

    RANK and WORLD_SIZE without torchrun count as torchrun: Kubernetes operators and Ray set them. SLURM needs
    SLURM_PROCID, so that `python` typed inside an allocation is one process without a group.
    """
    env = os.environ if environ is None else environ

    def number(name: str, default: int | None = None) -> int:
        value = env.get(name)
        if value is None and default is not None:
            return default
        if value is None or not value.isdecimal():
            came = "is not set" if value is None else f"is {value!r}"
            raise DinoError(f"the environment variable {name} {came}; the launcher must set it to a whole number")
        return int(value)

    if "TORCHELASTIC_RUN_ID" in env or ("RANK" in env and "WORLD_SIZE" in env):
        if "MASTER_ADDR" not in env:
            raise DinoError("RANK and WORLD_SIZE are set but MASTER_ADDR is not; start with torchrun, or unset them")
        launch = Launch(
            how="torchrun",
            rank=number("RANK"),
            world=number("WORLD_SIZE"),
            local_rank=number("LOCAL_RANK", 0),
            local_world=number("LOCAL_WORLD_SIZE", 1),
            address=env["MASTER_ADDR"],
            port=number("MASTER_PORT"),
        )
    elif "SLURM_JOB_ID" in env and "SLURM_PROCID" in env:
        world = number("SLURM_NTASKS")
        launch = Launch(
            how="slurm",
            rank=number("SLURM_PROCID"),
            world=world,
            local_rank=number("SLURM_LOCALID"),
            local_world=max(world // number("SLURM_JOB_NUM_NODES", 1), 1),
            address=env.get("MASTER_ADDR") or first_host(env.get("SLURM_JOB_NODELIST", "127.0.0.1")),
            # every rank must arrive at the same port without talking; two jobs on one machine should differ; the system
            # gives ports from 32768 on to whoever connects
            port=number("MASTER_PORT", 10_000 + number("SLURM_JOB_ID") % 20_000),
        )
    else:
        return Launch(how="single")
    if launch.rank >= launch.world:
        raise DinoError(f"{launch.how} gives rank {launch.rank} of {launch.world} processes; ranks count from 0")
    return launch


def first_host(nodelist: str) -> str:
    """The first name of a SLURM node list: "gpu[012-014,020],cpu3" → "gpu012". (`scontrol` is absent in containers.)"""
    outside_brackets = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodelist.strip())
    if outside_brackets is None:
        raise DinoError(f"SLURM_JOB_NODELIST is {nodelist!r}, which names no machine")
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", outside_brackets.group())


def setup(device: str | torch.device | None = None, timeout: timedelta = timedelta(minutes=10)) -> torch.device:
    """Joins the processes the launcher started, and gives the device this one should use.

    `device`: "cuda", "cpu", …; None takes CUDA where there is one, else the CPU. "cuda" without a number becomes this
    process's own GPU. A single process joins nothing. Calling it twice is harmless. `timeout`: how long a collective
    waits for the slowest rank before it raises.
    """
    launch = detect()
    chosen = _device(device, launch)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if launch.how != "single" and not together():
        if chosen.type not in ("cuda", "cpu"):
            raise DinoError(f"{launch.world} processes work together on cuda or cpu, not on {chosen.type}; start one")
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo",
            # torchrun's agent already listens at the address; env:// is how to use its store
            init_method="env://" if launch.how == "torchrun" else f"tcp://{launch.address}:{launch.port}",
            rank=launch.rank,
            world_size=launch.world,
            timeout=timeout,
            device_id=chosen if chosen.type == "cuda" else None,
        )
        barrier()  # a rank that cannot talk fails here, with its name, and not in the first step
    return chosen


def _device(device: str | torch.device | None, launch: Launch) -> torch.device:
    chosen = torch.device(device if device is not None else ("cuda" if torch.cuda.is_available() else "cpu"))
    if chosen.type != "cuda":
        return chosen
    there = torch.cuda.device_count()
    if there == 0:
        raise DinoError("device cuda was requested, but torch sees no GPU; try device=cpu")
    if chosen.index is not None:
        if launch.local_world > 1:
            raise DinoError(
                f"{launch.local_world} processes on this machine cannot all use {chosen}; pass cuda, each takes its own"
            )
        return chosen
    if 1 < there < launch.local_world:
        raise DinoError(f"{launch.local_world} processes were started on this machine, but it has {there} GPUs")
    return torch.device("cuda", launch.local_rank % there)  # one visible GPU per process is then number 0


def join_alone(device: torch.device) -> None:
    """A group of this process only, where there is none: for what is written for many processes and needs a group."""
    if not together():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def shutdown() -> None:
    """Leaves the group, if there is one; the last thing a program does."""
    if together():
        dist.destroy_process_group()


# ---- ranks ---------------------------------------------------------------------------------------------------------


def together() -> bool:
    """Whether there is a process group (it may have one member)."""
    return dist.is_available() and dist.is_initialized()


def rank(group: Group = None) -> int:
    """This process's number within `group`, from 0."""
    return dist.get_rank(group) if together() else 0


def world(group: Group = None) -> int:
    """How many processes `group` has."""
    return dist.get_world_size(group) if together() else 1


def local_rank() -> int:
    """This process's number on its machine, from 0."""
    return detect().local_rank


def local_world() -> int:
    """How many of all processes run on this machine."""
    return detect().local_world


def is_main() -> bool:
    """True on exactly one process: the one that logs and writes."""
    return rank() == 0


def share(items: Sequence[T], group: Group = None) -> Sequence[T]:
    """Every `world`-th of the items, from this process's rank on: over all processes each is taken once."""
    return items[rank(group) :: world(group)]


def gather_shares(values: Sequence[T], group: Group = None) -> list[T]:
    """One value for each item of this process's `share` → those of all items in the items' order, on every process."""
    parts = gather_objects(list(values), group)
    return [parts[i % len(parts)][i // len(parts)] for i in range(sum(map(len, parts)))]


def subgroup(parts: Sequence[Sequence[int]]) -> Group:
    """Splits all ranks into `parts` and returns the group of the part this rank is in.

    `parts`: e.g. `[range(0, 2), range(2, 8)]`; every rank in exactly one. All ranks call this, with the same parts.
    """
    named = sorted(r for part in parts for r in part)
    if named != list(range(world())):
        raise DinoError(f"the groups name ranks {named}, but must name each of 0 to {world() - 1} exactly once")
    if len(parts) == 1 or not together():
        return dist.group.WORLD if together() else None
    own = None
    for part in parts:  # creating a group is itself collective: every rank creates all of them, in the same order
        group = dist.new_group(list(part))
        if rank() in part:
            own = group
    return own


def twin(group: Group = None) -> Group:
    """The processes of `group` once more, for collectives on the CPU in another thread; None for a single process."""
    if not together():
        return None
    return dist.new_group(dist.get_process_group_ranks(group), backend="gloo", use_local_synchronization=True)


# ---- reductions ----------------------------------------------------------------------------------------------------


def barrier(group: Group = None) -> None:
    """Waits until every process of `group` is here."""
    if together():
        dist.barrier(group)


def all_reduce(x: Tensor, op: str = "sum", group: Group = None) -> Tensor:
    """The element-wise "sum", "mean", "max" or "min" over ranks, in a new tensor; no gradient."""
    if op not in ("sum", "mean", "max", "min"):
        raise DinoError(f"all_reduce knows sum, mean, max and min, not {op!r}")
    if world(group) == 1:
        return x.detach()
    reduce = {"sum": dist.ReduceOp.SUM, "mean": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}
    x = x.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, reduce[op], group)
    return x / world(group) if op == "mean" else x


def average(values: Mapping[str, Tensor | float], group: Group = None) -> dict[str, float]:
    """Scalars averaged over ranks, as numbers. One collective and one device synchronisation for all of them."""
    if not values:
        return {}
    device = next((v.device for v in values.values() if isinstance(v, Tensor)), torch.device("cpu"))
    dtype = torch.float32 if device.type == "mps" else torch.float64  # Apple's GPUs have no float64
    stacked = torch.stack([torch.as_tensor(v, dtype=dtype, device=device).detach() for v in values.values()])
    return dict(zip(values, all_reduce(stacked, "mean", group).tolist()))


# ---- gathering -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def average_gradients(parameters: Sequence[Tensor]) -> None:
    """Each gradient becomes the mean over all processes. A parameter that had none on some of them counts zero there;
    one that had none anywhere stays without (AdamW leaves it alone)."""
    if world() == 1:
        return
    used = torch.tensor([float(p.grad is not None) for p in parameters], device=parameters[0].device)
    chosen = [p for p, any_has in zip(parameters, all_reduce(used, "max").tolist()) if any_has]
    flat = torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten().float() for p in chosen])
    for p, mean in zip(chosen, all_reduce(flat, "mean").split([p.numel() for p in chosen])):
        p.grad = mean.view_as(p).to(p.dtype)


@torch.no_grad()
def all_gather(x: Tensor, group: Group = None, *, equal: bool = False) -> Tensor:
    """All ranks' rows in rank order, [n_r, …] → [Σ n_r, …]; n_r may differ between ranks and be 0. No gradient.

    `equal`: n_r is known to be the same on all, and nobody waits for the device to learn it.
    """
    x = x.detach()
    if world(group) == 1:
        return x
    if equal:
        parts = [torch.empty_like(x) for _ in range(world(group))]
        dist.all_gather(parts, x, group)
        return torch.cat(parts)
    counts = [torch.zeros(1, dtype=torch.int64, device=x.device) for _ in range(world(group))]
    dist.all_gather(counts, torch.tensor([len(x)], device=x.device), group)
    rows = [int(n) for n in counts]
    padded = x.new_zeros(max(rows), *x.shape[1:])  # collectives want equal shapes
    padded[: len(x)] = x
    parts = [torch.empty_like(padded) for _ in rows]
    dist.all_gather(parts, padded, group)
    return torch.cat([part[:n] for part, n in zip(parts, rows)])


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group, ctx.rows = group, len(x)
        parts = [torch.empty_like(x) for _ in range(world(group))]
        dist.all_gather(parts, x, group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        # A reduce-scatter would move half as much, but gloo lacks it before torch 2.8; what is gathered here is small.
        total = all_reduce(gradients[0], "sum", ctx.group)
        return total[rank(ctx.group) * ctx.rows :][: ctx.rows], None


def all_gather_with_gradient(x: Tensor, group: Group = None) -> Tensor:
    """All ranks' rows in rank order, [n, …] → [W·n, …], n the same on every rank; the gradient comes back.

    A rank's rows receive the sum of the gradients of *all* ranks' losses, so every rank must run backward. After the
    average over ranks that data parallelism takes, this is the gradient of the mean of the ranks' losses.
    """
    return x if world(group) == 1 else _AllGather.apply(x.contiguous(), group)  # NCCL refuses views with gaps


def gather_objects(item: Any, group: Group = None) -> list[Any]:
    """One picklable object from each rank, in rank order, on every rank."""
    if not together():
        return [item]
    items: list[Any] = [None] * world(group)
    dist.all_gather_object(items, item, group)
    return items


@torch.no_grad()
def broadcast(tensors: Iterable[Tensor], group: Group = None) -> None:
    """Every process of `group` gets the first one's values, in place."""
    if together():
        for x in tensors:
            dist.broadcast(x, group=group, group_src=0)


def broadcast_object(item: Any, group: Group = None) -> Any:
    """The object of the first process of `group`; the others' `item` is ignored."""
    if not together():
        return item
    box = [item]
    dist.broadcast_object_list(box, group=group, group_src=0)
    return box[0]


class ErrorElsewhere(DinoError):
    """What another process raised: it reports the error itself."""


def once(make: Callable[[], T], group: Group = None) -> T:
    """`make()` of the first process of `group`, on all of them; what it raises, all raise. The others wait."""
    result: T | None = None
    error: Exception | None = None
    if rank(group) == 0:
        try:
            result = make()
        except (DinoError, OSError) as raised:
            error = raised
    result, message = broadcast_object((result, None if error is None else str(error)), group)
    if error is not None:
        raise error
    if message is not None:
        raise ErrorElsewhere(message)
    return result
