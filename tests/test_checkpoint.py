"""Checkpoints: whole or not there, the keep policy, leftovers of crashes, generators, and refusals in words."""

from __future__ import annotations

import errno
import json
import os
import pickle
import random
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import run_ranks
from torch import Tensor, nn
from toy_training import write_config, write_images

from dinov3 import checkpoint, distributed
from dinov3.checkpoint import Checkpoints
from dinov3.errors import DinoError, UnsafeFile


def some(value: float = 1.0) -> dict[str, Tensor]:
    return {"model.weight": torch.full((3, 2), value), "count": torch.tensor(7)}


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_what_is_loaded_is_what_was_saved(tmp_path: Path) -> None:
    path = Checkpoints(tmp_path).save(41, some(2.5), {"iteration": 41, "loader": {"consumed": 82}})
    loaded = {"model.weight": torch.zeros(3, 2), "count": torch.tensor(0), "new": torch.ones(1)}
    assert checkpoint.load(path, loaded) == ["new"]
    assert torch.equal(loaded["model.weight"], torch.full((3, 2), 2.5))
    assert loaded["count"] == 7
    assert loaded["new"] == 1
    assert checkpoint.read_state(path)["loader"] == {"consumed": 82}
    assert checkpoint.read_tensors(path, "model.")["weight"].shape == (3, 2)


def test_only_the_newest_and_every_nth_checkpoint_stay(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path, max_to_keep=2, keep_every=20)
    for iteration in (9, 19, 29, 39, 49):
        kept.save(iteration, some(iteration), {})
    assert names(tmp_path) == ["19_keep", "39", "39_keep", "49"]
    assert [it for it, _ in kept.all()] == [39, 49]  # a kept copy is never resumed from
    assert checkpoint.read_tensors(tmp_path / "19_keep")["model.weight"][0, 0] == 19
    inodes = [os.stat(tmp_path / n / ".metadata").st_ino for n in ("39", "39_keep")]
    assert inodes[0] == inodes[1]  # hard links: the copy costs nothing


def test_numbers_are_compared_as_numbers(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path)
    for iteration in (99, 1000):
        kept.save(iteration, some(), {})
    assert kept.latest() == tmp_path / "1000"


def test_leftovers_of_crashes_are_no_checkpoints_and_are_cleaned(tmp_path: Path) -> None:
    """R8: and a folder whose name happens to be a number is one only if its last-written file is there."""
    kept = Checkpoints(tmp_path)
    kept.save(9, some(), {})
    (tmp_path / ".19.partial").mkdir()
    (tmp_path / ".19.partial" / "__0_0.distcp").write_bytes(b"half")
    (tmp_path / "1912345678").mkdir()
    assert kept.latest() == tmp_path / "9"
    assert kept.clean() == [".19.partial"]
    assert names(tmp_path) == ["1912345678", "9"]  # what we did not write is not ours to delete


def test_a_crash_between_two_renames_loses_nothing(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path)
    kept.save(9, some(3.0), {}).rename(tmp_path / ".9.old")
    assert kept.latest() is None
    assert kept.clean() == []
    assert kept.latest() == tmp_path / "9"


class Crash(Exception):
    pass


@pytest.mark.parametrize("where", ["save", "rename", "mkdir"])
def test_a_save_that_breaks_off_leaves_the_older_checkpoint(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Checkpoints(tmp_path)
    kept.save(9, some(1.0), {})

    def crash(*_: Any, **__: Any) -> None:
        raise Crash

    if where == "save":
        monkeypatch.setattr(checkpoint.dcp, "save", crash)
    else:
        monkeypatch.setattr(Path, where, crash)
    with pytest.raises((Crash, DinoError)):
        kept.save(19, some(2.0), {})
    monkeypatch.undo()
    kept.clean()
    assert [it for it, _ in kept.all()] == [9]
    assert checkpoint.read_tensors(tmp_path / "9")["model.weight"][0, 0] == 1
    kept.save(19, some(2.0), {})
    assert kept.latest() == tmp_path / "19"


def tensor_file(folder: Path) -> Path:
    return next(folder.glob("*.distcp"))


DAMAGES: dict[str, Any] = {
    "no metadata": lambda path: (path / ".metadata").unlink(),
    "empty metadata": lambda path: (path / ".metadata").write_bytes(b""),
    "torn metadata": lambda path: os.truncate(path / ".metadata", (path / ".metadata").stat().st_size // 2),
    "zeros for metadata": lambda path: (path / ".metadata").write_bytes(bytes((path / ".metadata").stat().st_size)),
    "no state": lambda path: (path / "state.json").unlink(),
    "torn state": lambda path: os.truncate(path / "state.json", 9),
    "state of another kind": lambda path: (path / "state.json").write_text("[1]"),
    "state without a key": lambda path: (path / "state.json").write_text("{}"),
    "no tensors": lambda path: tensor_file(path).unlink(),
    "empty tensors": lambda path: tensor_file(path).write_bytes(b""),
    "torn tensors": lambda path: os.truncate(tensor_file(path), tensor_file(path).stat().st_size // 2),
    "zeros for tensors": lambda path: tensor_file(path).write_bytes(bytes(tensor_file(path).stat().st_size)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_checkpoint_gives_way_to_the_older_one(damage: str, tmp_path: Path) -> None:
    both = Checkpoints(tmp_path)
    for iteration in (9, 19):
        both.save(iteration, some(iteration), {"iteration": iteration})
    DAMAGES[damage](tmp_path / "19")
    tensors, lines = some(0.0), []

    def read(path: Path) -> int:
        state = checkpoint.read_state(path, "iteration")
        assert checkpoint.load(path, tensors) == []
        return state["iteration"]

    assert both.resume(read, lines.append) == 9
    assert tensors["model.weight"][0, 0] == 9
    (line,) = lines
    assert "resuming from the older 9, and keeping the damaged one as 19.damaged" in line
    assert str(tmp_path / "19") in line
    assert names(tmp_path) == ["19.damaged", "9"]
    both.save(19, some(19), {"iteration": 19})  # the run gets there again
    assert both.resume(read, lines.append) == 19
    for path in (tmp_path / "19", tmp_path / "9"):
        DAMAGES[damage](path)
    with pytest.raises(
        checkpoint.Damaged, match=r"none of the 2 checkpoints in .* can be read; the newest: .*--no-resume"
    ):
        both.resume(read, lines.append)
    assert names(tmp_path) == ["19", "19.damaged", "9"]


def test_a_checkpoint_of_another_configuration_is_not_damaged(tmp_path: Path) -> None:
    both = Checkpoints(tmp_path)
    for iteration in (9, 19):
        both.save(iteration, some(), {})
    with pytest.raises(DinoError, match="was made by another configuration"):
        both.resume(lambda path: checkpoint.load(path, {"model.weight": torch.zeros(4, 2)}), print)
    assert names(tmp_path) == ["19", "9"]


def test_saving_an_iteration_again_replaces_it(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path)
    kept.save(9, some(1.0), {})
    kept.save(9, some(2.0), {})
    assert checkpoint.read_tensors(tmp_path / "9")["model.weight"][0, 0] == 2
    assert names(tmp_path) == ["9"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_tensor_that_is_not_finite_is_refused(value: float, tmp_path: Path) -> None:
    tensors = some() | {"bad": torch.tensor([1.0, value])}
    with pytest.raises(DinoError, match="no checkpoint of iteration 9: bad hold"):
        Checkpoints(tmp_path).save(9, tensors, {})
    assert names(tmp_path) == []


def test_a_checkpoint_of_other_shapes_is_an_error(tmp_path: Path) -> None:
    path = Checkpoints(tmp_path).save(9, some(), {})
    with pytest.raises(DinoError, match=r"another configuration: model.weight is \[3, 2\] there and \[4, 2\] here"):
        checkpoint.load(path, {"model.weight": torch.zeros(4, 2)})


def test_a_checkpoint_of_another_program_is_named_as_one(tmp_path: Path) -> None:
    path = Checkpoints(tmp_path).save(9, some(), {})
    (path / "state.json").unlink()
    with pytest.raises(DinoError, match=r"not written by this program.*student.resume_from_teacher_chkpt="):
        checkpoint.read_state(path)


# ---- no code from .metadata ----------------------------------------------------------------------------------------


class Payload:
    """Unpickling it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.folder,)


@pytest.fixture
def crafted(tmp_path: Path) -> tuple[Path, Path]:
    """(a sound run's checkpoint whose .metadata now holds a payload, the folder that the payload would make)."""
    path = Checkpoints(tmp_path / "run" / "ckpt").save(0, some(), {"step": 0})
    (path / ".metadata").write_bytes(pickle.dumps({"state_dict_metadata": Payload(tmp_path / "pwned")}))
    pickle.loads(pickle.dumps(Payload(tmp_path / "works")))
    assert (tmp_path / "works").is_dir()
    return path, tmp_path / "pwned"


def entrances(path: Path, folder: Path) -> dict[str, Any]:
    """Everything that opens a sharded checkpoint, by name."""
    from dinov3.eval.knn import main as knn
    from dinov3.train.train import main as train
    from dinov3.train_head.run import HeadConfig, train_head

    run, config = path.parent.parent, write_config(folder)
    images = str(write_images(folder / "images"))
    command = ["--config-file", config, "--output-dir"]
    data = f"train.dataset_path=Folder:root={images}"
    fresh = [*command, str(folder / "fresh"), data]
    model = [f"model.config_file={config}", f"model.pretrained_weights={path}"]
    return {
        "read_tensors": lambda: checkpoint.read_tensors(path),
        "load": lambda: checkpoint.load(path, some()),
        "resume": lambda: train([*command, str(run), data]),
        "teacher": lambda: train([*fresh, f"student.resume_from_teacher_chkpt={path}"]),
        "gram": lambda: train([*fresh, "gram.use_loss=true", "gram.ema_teacher=false", f"gram.ckpt={path}"]),
        "eval": lambda: knn([f"train.dataset=Folder:root={images}", f"eval.test_dataset=Folder:root={images}", *model,
                             "--output-dir", str(folder / "knn")]),
        "train-head": lambda: train_head(
            HeadConfig(task="classification", head="linear", data=images, size=32, steps=1), run
        ),
    }  # fmt: skip


@pytest.mark.parametrize("entrance", ["read_tensors", "load", "resume", "teacher", "gram", "eval", "train-head"])
def test_code_in_a_checkpoints_metadata_is_never_run(
    entrance: str, crafted: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, pwned = crafted
    try:
        assert entrances(path, tmp_path)[entrance]() == 1  # a command's exit status
        said = capsys.readouterr().err
    except UnsafeFile as error:
        said = str(error)
    assert "is no description of tensors (it would run posix.mkdir)" in said
    assert not pwned.exists()


def test_members_of_enums_are_read_as_every_python_writes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING as Format

    for written in (lambda self, _: (getattr, (Format, self.name)), lambda self, _: (Format, (self.value,))):
        monkeypatch.setattr(Format, "__reduce_ex__", written)  # 3.11.0 to 3.11.3, and the others
        path = Checkpoints(tmp_path).save(0, some(), {})
        assert checkpoint.load(path, some(0.0)) == []


def test_metadata_may_not_change_classes_or_leave_the_folder(tmp_path: Path) -> None:
    path = Checkpoints(tmp_path).save(0, some(), {})
    raw = (path / ".metadata").read_bytes()
    protocol2 = b"\x80\x02ctorch.distributed.checkpoint.metadata\nMetadata\nN}X\x01\x00\x00\x00aK\x01s\x86b."
    (path / ".metadata").write_bytes(protocol2)  # GLOBAL, (None, {"a": 1}), BUILD: sets an attribute of the class
    with pytest.raises(UnsafeFile, match="would change a class"):
        checkpoint.stored(path)
    (path / ".metadata").write_bytes(pickle.dumps(7))
    with pytest.raises(UnsafeFile, match="it holds a int"):
        checkpoint.stored(path)
    attribute = b"\x80\x02cbuiltins\ngetattr\nctorch\nSize\nX\x05\x00\x00\x00numel\x86R."
    (path / ".metadata").write_bytes(attribute)  # getattr of anything but an enum
    with pytest.raises(UnsafeFile, match=r"would run builtins\.getattr"):
        checkpoint.stored(path)
    assert b"__0_0.distcp" in raw
    (path / ".metadata").write_bytes(raw.replace(b"__0_0.distcp", b"../../a.disc"))
    with pytest.raises(UnsafeFile, match="a file outside the checkpoint"):
        checkpoint.stored(path)
    (path / ".metadata").write_bytes(raw)
    assert checkpoint.load(path, some(0.0)) == []


def test_all_generators_are_restored() -> None:
    def draw() -> list[float]:
        return [random.random(), float(np.random.standard_normal()), float(torch.rand(())), random.gauss(0, 1)]

    draw()  # leaves a second Gaussian waiting, in Python and in NumPy
    states = json.loads(json.dumps(checkpoint.random_states()))
    expected = [draw(), draw()]
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    assert checkpoint.restore_random_states(states)
    assert [draw(), draw()] == expected
    assert not checkpoint.restore_random_states(states * 2)  # saved by two processes: this one has no share


def test_the_optimiser_resumes_bit_identical(tmp_path: Path) -> None:
    def fresh() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        return model, torch.optim.AdamW(model.parameters(), lr=0.1)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, n: int) -> None:
        for i in range(n):
            optimizer.zero_grad()
            model(torch.arange(3.0) + i).square().sum().backward()
            optimizer.step()

    model, optimizer = fresh()
    step(model, optimizer, 2)
    tensors = checkpoint.module_tensors(model, "m.") | checkpoint.optimizer_tensors(optimizer, model)
    assert "optimizer.state.weight.exp_avg_sq" in tensors
    path = Checkpoints(tmp_path).save(1, tensors, {})
    step(model, optimizer, 3)
    again, other = fresh()
    checkpoint.load(path, checkpoint.module_tensors(again, "m.") | checkpoint.optimizer_tensors(other, again))
    step(again, other, 3)
    assert torch.equal(model.weight, again.weight)


def test_a_checkpoint_in_the_background_counts_when_it_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, write = threading.Event(), checkpoint.FileSystemWriter.write_data

    def slow(*arguments: Any) -> Any:
        assert go_on.wait(30)
        return write(*arguments)

    kept, tensors = Checkpoints(tmp_path, max_to_keep=2), some(1.0)
    kept.save(1, tensors, {})
    monkeypatch.setattr(checkpoint.FileSystemWriter, "write_data", slow)
    assert kept.save(2, tensors, {"iteration": 2}, wait=False) == tmp_path / "2"
    tensors["model.weight"].fill_(7)  # training goes on
    assert names(tmp_path) == [".2.partial", "1"]
    assert [it for it, _ in Checkpoints(tmp_path).all()] == [1]
    shutil.copytree(tmp_path, crashed := tmp_path.with_name("crashed"))
    assert Checkpoints(crashed).clean() == [".2.partial"]
    go_on.set()
    assert kept.latest() == tmp_path / "2"
    assert names(tmp_path) == ["1", "2"]
    assert checkpoint.read_tensors(tmp_path / "2")["model.weight"][0, 0] == 1
    with kept:
        kept.save(3, tensors, {}, wait=False)
    assert names(tmp_path) == ["2", "3"]


def test_a_failure_in_the_background_is_raised_at_the_next_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    kept = Checkpoints(tmp_path)
    kept.save(1, some(1.0), {})
    monkeypatch.setattr(checkpoint.FileSystemWriter, "write_data", full)
    kept.save(2, some(2.0), {}, wait=False)
    with pytest.raises(
        DinoError, match=r"checkpoint of iteration 2 could not be written to .* disk is full .*No space left"
    ):
        kept.save(3, some(3.0), {}, wait=False)
    assert kept.latest() == tmp_path / "1"


def test_ctrl_c_in_a_save_is_no_failure_of_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pressed(*_: Any) -> Any:
        raise KeyboardInterrupt("steps are lost")

    monkeypatch.setattr(checkpoint.FileSystemWriter, "write_data", pressed)
    with pytest.raises(KeyboardInterrupt, match="steps are lost"):
        Checkpoints(tmp_path).save(1, some(1.0), {})


def _save_sharded(folder: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    odd = distribute_tensor(torch.arange(15.0).view(5, 3), mesh, [Shard(0)])
    tiny = distribute_tensor(torch.ones(1, 4), mesh, [Shard(0)])  # fewer rows than ranks
    kept = Checkpoints(folder)
    kept.save(3, {"odd": odd, "tiny": tiny}, {"random": checkpoint.random_states()})
    kept.save(2, {"odd": odd + 1}, {}, wait=False)
    distributed.all_reduce(torch.ones(3))  # training goes on meanwhile
    kept.finish()
    checkpoint.load(Path(folder) / "2", {"odd": (later := distribute_tensor(torch.zeros(5, 3), mesh, [Shard(0)]))})
    assert torch.equal(later.full_tensor(), torch.arange(15.0).view(5, 3) + 1)
    bad = distribute_tensor(torch.tensor([1.0, 2.0, float("nan"), 4.0]), mesh, [Shard(0)])  # on the second rank only
    with pytest.raises(DinoError, match="bad hold"):
        kept.save(4, {"bad": bad}, {})
    zeros = distribute_tensor(torch.zeros(5, 3), mesh, [Shard(0)])
    checkpoint.load(kept.latest(), {"odd": zeros})  # type: ignore[arg-type]
    assert torch.equal(zeros.full_tensor(), torch.arange(15.0).view(5, 3))


def test_two_ranks_save_and_one_process_reads(tmp_path: Path) -> None:
    """R10 among it: tensors with fewer rows than ranks."""
    run_ranks(_save_sharded, 2, str(tmp_path))
    path = Checkpoints(tmp_path).latest()
    assert path == tmp_path / "3"
    tensors = checkpoint.read_tensors(path)
    assert torch.equal(tensors["odd"], torch.arange(15.0).view(5, 3))
    assert tensors["tiny"].shape == (1, 4)
    assert len(checkpoint.read_state(path)["random"]) == 2
