"""Process groups: who started us, one process alone, and two or three ranks on this machine."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from torch import Tensor

from dinov3 import distributed
from dinov3.distributed import Launch
from dinov3.errors import DinoError, WeightsError

TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "none",
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node7",
    "MASTER_PORT": "29400",
}
SLURM = {
    "SLURM_JOB_ID": "123456",
    "SLURM_PROCID": "9",
    "SLURM_NTASKS": "16",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_JOB_NODELIST": "gpu[012-013]",
}


# ---- who started us ------------------------------------------------------------------------------------------------


def test_torchrun_is_recognised_even_inside_a_slurm_job() -> None:
    expected = Launch("torchrun", rank=5, world=8, local_rank=1, local_world=4, address="node7", port=29400)
    assert distributed.detect(TORCHRUN) == expected
    assert distributed.detect(SLURM | TORCHRUN) == expected


def test_other_launchers_that_set_rank_and_world_size_count_as_torchrun() -> None:
    env = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    assert distributed.detect(env) == Launch("torchrun", rank=1, world=2, address="a", port=1)


def test_a_slurm_step_is_recognised() -> None:
    port = 10_000 + 123_456 % 20_000
    expected = Launch("slurm", rank=9, world=16, local_rank=1, local_world=8, address="gpu012", port=port)
    assert distributed.detect(SLURM) == expected
    assert distributed.detect(SLURM | {"MASTER_PORT": "1234"}).port == 1234


def test_the_port_of_a_slurm_job_is_none_that_the_system_gives_away() -> None:
    ports = [distributed.detect(SLURM | {"SLURM_JOB_ID": str(job)}).port for job in range(0, 100_000, 7)]
    assert min(ports) >= 1024
    assert max(ports) < 32_768  # ephemeral ports of Linux begin here


def test_python_typed_inside_an_allocation_is_a_single_process() -> None:
    assert distributed.detect({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "16"}) == Launch("single")
    assert distributed.detect({}) == Launch("single")


@pytest.mark.parametrize(
    "nodelist, host",
    [
        ("gpu7", "gpu7"),
        ("a1,b2", "a1"),
        ("gpu[012-014,020],cpu3", "gpu012"),
        ("gpu[7,9]", "gpu7"),
        ("rack[1-2]node[05-08]", "rack1node05"),
        ("a-b-[3-4].cluster", "a-b-3.cluster"),
    ],
)
def test_the_first_host_of_a_slurm_list(nodelist: str, host: str) -> None:
    assert distributed.first_host(nodelist) == host


@pytest.mark.parametrize(
    "env, sentence",
    [
        ({k: v for k, v in TORCHRUN.items() if k != "MASTER_ADDR"}, "MASTER_ADDR is not; start with torchrun"),
        ({k: v for k, v in TORCHRUN.items() if k != "MASTER_PORT"}, "MASTER_PORT is not set"),
        (TORCHRUN | {"WORLD_SIZE": "many"}, "WORLD_SIZE is 'many'"),
        (TORCHRUN | {"RANK": "8"}, "rank 8 of 8"),
        (SLURM | {"SLURM_JOB_NODELIST": "["}, "names no machine"),
    ],
)
def test_a_broken_launch_is_answered_with_a_sentence(env: dict[str, str], sentence: str) -> None:
    with pytest.raises(DinoError, match=sentence):
        distributed.detect(env)


# ---- devices -------------------------------------------------------------------------------------------------------


def test_each_process_takes_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = Launch("torchrun", rank=5, world=8, local_rank=1, local_world=4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert distributed._device(None, launch) == torch.device("cuda", 1)
    assert distributed._device("cpu", launch) == torch.device("cpu")
    assert distributed._device("cuda:3", Launch("single")) == torch.device("cuda", 3)
    with pytest.raises(DinoError, match="cannot all use cuda:3"):
        distributed._device("cuda:3", launch)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # the launcher shows each process one GPU
    assert distributed._device("cuda", launch) == torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(DinoError, match=r"4 processes .* 2 GPUs"):
        distributed._device("cuda", launch)


def test_cuda_without_a_gpu_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(DinoError, match="device=cpu"):
        distributed._device("cuda", Launch("single"))


# ---- alone ---------------------------------------------------------------------------------------------------------


def test_everything_works_alone() -> None:
    assert not distributed.together()
    assert (distributed.rank(), distributed.world(), distributed.is_main()) == (0, 1, True)
    x = torch.arange(3.0, requires_grad=True)
    for op in ("sum", "mean", "max", "min"):
        assert distributed.all_reduce(x, op).tolist() == [0, 1, 2]
    assert distributed.all_gather(x).tolist() == [0, 1, 2]
    assert not distributed.all_gather(x).requires_grad
    assert distributed.all_gather_with_gradient(x) is x
    assert distributed.gather_objects("a") == ["a"]
    assert distributed.broadcast_object("a") == "a"
    assert distributed.average({"a": torch.tensor(2.0), "b": 0.1}) == {"a": 2.0, "b": 0.1}
    assert distributed.average({}) == {}
    assert distributed.subgroup([[0]]) is None
    distributed.barrier()
    distributed.shutdown()


def test_an_unknown_reduction_is_refused() -> None:
    with pytest.raises(DinoError, match="not 'product'"):
        distributed.all_reduce(torch.zeros(1), "product")


def test_a_single_process_joins_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*TORCHRUN, *SLURM):
        monkeypatch.delenv(name, raising=False)
    assert distributed.setup("cpu") == torch.device("cpu")
    assert not distributed.together()


# ---- together ------------------------------------------------------------------------------------------------------


def reductions() -> dict[str, object]:
    rank = distributed.rank()
    mine = torch.tensor([1.0 + rank, -2.0 * rank])
    results: dict[str, object] = {op: distributed.all_reduce(mine, op).tolist() for op in ("sum", "mean", "max", "min")}
    results["untouched"] = mine.tolist()
    results["average"] = distributed.average({"a": float(rank), "b": torch.tensor(3.0 * rank)})
    results["objects"] = distributed.gather_objects({"rank": rank})
    results["broadcast"] = distributed.broadcast_object("main" if distributed.is_main() else None)
    results["who"] = (rank, distributed.world(), distributed.local_rank(), distributed.is_main())
    return results


def test_two_ranks_add_up() -> None:
    for rank, results in enumerate(run_ranks(reductions, 2)):
        assert results["sum"] == [3, -2]
        assert results["mean"] == [1.5, -1]
        assert results["max"] == [2, 0]
        assert results["min"] == [1, -2]
        assert results["untouched"] == [1 + rank, -2 * rank]
        assert results["average"] == {"a": 0.5, "b": 1.5}
        assert results["objects"] == [{"rank": 0}, {"rank": 1}]
        assert results["broadcast"] == "main"
        assert results["who"] == (rank, 2, rank, rank == 0)


def made_once(folder: str) -> tuple[object, str, list[float]]:
    def make() -> int:
        with open(f"{folder}/read", "a") as file:
            file.write("x")
        return 7

    def fail() -> int:
        raise WeightsError("no such weights")

    value, error = distributed.once(make), ""
    try:
        distributed.once(fail)
    except DinoError as raised:
        error = f"{type(raised).__name__}: {raised}"
    x = torch.full((2,), float(distributed.rank()))
    distributed.broadcast([x])
    return value, error, x.tolist()


def test_what_is_made_once_reaches_all_and_so_does_its_error(tmp_path: Path) -> None:
    first, second = run_ranks(made_once, 2, str(tmp_path))
    assert first == (7, "WeightsError: no such weights", [0, 0])
    assert second == (7, "ErrorElsewhere: no such weights", [0, 0])
    assert (tmp_path / "read").read_text() == "x"
    assert distributed.once(lambda: 3) == 3


def gathers(uneven: list[Tensor]) -> tuple[list[Tensor], Tensor, Tensor]:
    rank = distributed.rank()
    dtypes = (torch.float32, torch.bfloat16, torch.int64, torch.bool)
    gathered = [distributed.all_gather(uneven[rank].to(dtype)) for dtype in dtypes]
    alike = distributed.all_gather(torch.tensor([rank], dtype=torch.uint8), equal=True)
    assert alike.tolist() == [*range(distributed.world())]
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).T + 10 * rank  # a transposed view: not contiguous
    x.requires_grad_()
    everybody = distributed.all_gather_with_gradient(x)
    weights = torch.arange(12.0).view(6, 2) * (rank + 1)  # every rank has its own loss of everybody's rows
    (everybody * weights).sum().backward()
    assert x.grad is not None
    return gathered, everybody.detach(), x.grad


def test_rows_are_gathered_in_rank_order_though_uneven_and_gradients_come_back() -> None:
    uneven = [torch.randn(2, 3), torch.randn(0, 3), torch.randn(3, 3)]
    whole = torch.cat(uneven)
    for rank, (gathered, everybody, gradient) in enumerate(run_ranks(gathers, 3, uneven)):
        for same in gathered:
            assert torch.equal(same, whole.to(same.dtype))
        assert everybody.tolist() == [[1 + r, 3 + r] if k == 0 else [2 + r, 4 + r] for r in (0, 10, 20) for k in (0, 1)]
        summed = torch.arange(12.0).view(6, 2) * (1 + 2 + 3)
        assert torch.equal(gradient, summed[2 * rank : 2 * rank + 2])


def shares() -> list[list[int]]:
    return [list(distributed.share(range(n))) for n in (5, 1, 0)]


def test_a_list_is_shared_so_that_each_item_is_taken_once() -> None:
    assert run_ranks(shares, 2) == [[[0, 2, 4], [0], []], [[1, 3], [], []]]


def groups() -> tuple[int, int, float, list[float], list[str]]:
    group = distributed.subgroup([[0], [1, 2]])
    mine = torch.tensor([float(distributed.rank())])
    total = distributed.all_reduce(mine, "sum", group).item()
    rows = distributed.all_gather(mine, group).tolist()
    return distributed.rank(group), distributed.world(group), total, rows, distributed.gather_objects("x", group)


def wrong_groups() -> str:
    try:
        distributed.subgroup([[0], [0, 1]])
    except DinoError as error:
        return str(error)
    return "no error"


def test_subgroups_count_for_themselves() -> None:
    assert run_ranks(groups, 3) == [
        (0, 1, 0.0, [0.0], ["x"]),
        (0, 2, 3.0, [1.0, 2.0], ["x", "x"]),
        (1, 2, 3.0, [1.0, 2.0], ["x", "x"]),
    ]


def test_groups_must_name_each_rank_once() -> None:
    assert (
        run_ranks(wrong_groups, 2) == ["the groups name ranks [0, 0, 1], but must name each of 0 to 1 exactly once"] * 2
    )


def broken() -> None:
    if distributed.rank() == 1:
        raise DinoError("rank 1 stumbled")
    distributed.barrier()


def test_a_rank_that_fails_is_heard_and_the_others_do_not_wait() -> None:
    with pytest.raises(AssertionError, match=r"rank 1 failed:(.|\n)*stumbled"):
        run_ranks(broken, 2)


JOIN = """
import torch
from dinov3 import distributed
device = distributed.setup("cpu")
distributed.setup("cpu")
print(distributed.rank(), distributed.world(), int(distributed.all_reduce(torch.ones(1))), flush=True)
distributed.shutdown()
"""


@pytest.mark.parametrize("how", ["torchrun", "slurm"])
def test_setup_joins_what_the_launcher_started(how: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ours = {k: v for k, v in os.environ.items() if k not in TORCHRUN and k not in SLURM} | {"OMP_NUM_THREADS": "1"}
    processes = []
    for rank in ("0", "1"):
        if how == "torchrun":
            env = {"RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        else:
            env = {"SLURM_PROCID": rank, "SLURM_NTASKS": "2", "SLURM_LOCALID": rank, "MASTER_PORT": port}
            env |= {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "127.0.0.1", "SLURM_JOB_NUM_NODES": "1"}
        command = [sys.executable, "-c", JOIN]
        processes.append(subprocess.Popen(command, env=ours | env, stdout=subprocess.PIPE, text=True))
    said = [process.communicate(timeout=120)[0] for process in processes]
    assert said == ["0 2 2\n", "1 2 2\n"]  # both speak: nothing is silenced
