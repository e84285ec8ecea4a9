"""The launcher: here in one process or several, on a cluster through a stand-in for sbatch that keeps what it is given."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from paths import ROOT
from toy_training import write_config, write_images

from dinov3.checkpoint import Checkpoints
from dinov3.errors import install
from dinov3.run import submit
from dinov3.runlog import StopRequest

SCRIPT = """
import json, os, sys
from pathlib import Path

def main(arguments):
    out = Path(arguments[0].removeprefix("--output-dir="))
    out.mkdir(parents=True, exist_ok=True)
    rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    (out / f"rank{rank}.json").write_text(json.dumps({"world": world, "arguments": arguments[1:]}))
    return 0

def other(arguments):
    return 7
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


@pytest.fixture
def no_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit.shutil, "which", lambda name: None)


def test_without_slurm_the_script_runs_here_and_a_message_is_logged(
    script: Path, tmp_path: Path, no_slurm: None, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        str(script),
        "--nodes",
        "1",
        "--config-file",
        "c.yaml",
        "a.b=1",
        "--output-dir",
        str(tmp_path / "%j"),
        "--x",
    ]
    assert submit.main(arguments) == 0
    (out,) = tmp_path.glob("local-*")  # R4: %j is resolved, and the folder is not called %j
    assert json.loads((out / "rank0.json").read_text())["arguments"] == ["--config-file", "c.yaml", "a.b=1", "--x"]
    printed = capsys.readouterr().err
    assert "there is no SLURM on this machine" in printed
    assert "in one process" in printed


def test_another_function_may_be_called_and_its_status_is_the_exit_status(script: Path, no_slurm: None) -> None:
    assert submit.main([str(script), "--callable-name", "other"]) == 7


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--nodes", "4"], "4 nodes need a cluster, and there is no SLURM here"),
        (["--callable-name", "mian"], "has no function 'mian' to call"),
    ],
)
def test_what_cannot_be_done_here_is_an_error(
    arguments: list[str], sentence: str, script: Path, no_slurm: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit.main([str(script), *arguments]) == 1
    assert sentence in capsys.readouterr().err


def test_a_missing_script_is_named(no_slurm: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert submit.main(["dinov3/train/trian.py"]) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("error: no such file or folder: dinov3/train/trian.py; did you mean 'train.py'")


def test_an_evaluation_runs_from_any_folder_and_null_is_no_name_of_a_folder(
    tmp_path: Path, no_slurm: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DINOV3_CACHE", str(tmp_path / "cache"))
    write_images(tmp_path / "images")
    data = ["train.dataset=images", "eval.test_dataset=images", "train.ks=[1]", "model.device=cpu"]
    assert submit.main(["dinov3/eval/knn.py", *data, "output_dir=null"]) == 0
    (out,) = (tmp_path / "experiments").iterdir()
    assert (out / "results-knn.csv").is_file()
    assert not (tmp_path / "null").exists()
    assert f"results go to experiments/{out.name}" in capsys.readouterr().err


def test_several_local_processes_are_ranks_of_one_run(script: Path, tmp_path: Path) -> None:
    """R3: through the reference's launcher each of them believes to be the only one."""
    command = [sys.executable, "-m", "dinov3.run.submit", str(script), "--nprocs", "2", f"--output-dir={tmp_path}/out"]
    ran = subprocess.run([*command, "k=v"], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert ran.returncode == 0, ran.stderr
    found = sorted((tmp_path / "out").glob("rank*.json"))
    assert [f.name for f in found] == ["rank0.json", "rank1.json"]
    assert all(json.loads(f.read_text()) == {"world": "2", "arguments": ["k=v"]} for f in found)


@pytest.mark.slow
def test_training_in_two_local_processes_as_printed(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images")
    command = [sys.executable, "-m", "dinov3.run.submit", "dinov3/train/train.py", "--ngpus", "2"]
    command += ["--config-file", write_config(tmp_path), "--output-dir", str(tmp_path / "out")]
    command += [f"train.dataset_path={images}", "optim.epochs=1", "optim.warmup_epochs=0"]
    root = ROOT
    ran = subprocess.run(command, cwd=root, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert ran.returncode == 0, ran.stderr
    assert "on 2 processes (cpu)" in (tmp_path / "out" / "log.txt").read_text()
    assert [it for it, _ in Checkpoints(tmp_path / "out" / "ckpt").all()] == [3]


# ---- a cluster ------------------------------------------------------------------------------------------------------


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on PATH with an `sbatch` that keeps the file it is given and answers as SLURM does."""
    pytest.importorskip("submitit")
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "sbatch").write_text(f'#!/bin/sh\ncp "$1" {tools}/submitted.sh\necho "Submitted batch job 4242"\n')
    (tools / "srun").write_text("#!/bin/sh\n")
    for tool in tools.iterdir():
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    return tools


def test_with_slurm_one_job_is_queued_with_the_requested_resources(
    script: Path, tmp_path: Path, slurm: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(script), "--nodes", "3", "--slurm-account", "mine", "--output-dir", str(tmp_path / "runs" / "%j")]
    assert submit.main([*arguments, "--config-file", "c.yaml", "a.b=1"]) == 0
    asked = (slurm / "submitted.sh").read_text()
    for line in ("--nodes=3", "--ntasks-per-node=8", "--account=mine", "--time=2800", "--mem=0", "--signal=USR2@120"):
        assert line in asked, line
    assert "--partition" not in asked  # R2: nobody's private names
    assert "--qos" not in asked
    printed = capsys.readouterr()
    assert printed.out.strip() == "4242"
    assert f"{tmp_path}/runs/4242" in printed.err

    with open(tmp_path / "runs" / "4242" / "4242_submitted.pkl", "rb") as file:
        job = pickle.load(file).function
    monkeypatch.setenv("SLURM_JOB_ID", "4242")
    assert job() == 0
    found = json.loads((tmp_path / "runs" / "4242" / "rank0.json").read_text())
    assert found["arguments"] == ["--config-file", "c.yaml", "a.b=1"]
    assert job.checkpoint().function == job  # what is queued again is the same


def test_a_missing_submitit_is_named_with_its_extra(
    script: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(submit.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert submit.main([str(script)]) == 1
    assert install("slurm") in capsys.readouterr().err


def test_whoever_waited_for_the_signal_before_hears_of_it_when_all_is_saved() -> None:
    """Submitit's handler, which queues the job again, must not run in the middle of a step, and must run."""
    heard: list[Any] = []
    before = signal.signal(signal.SIGUSR2, lambda number, _: heard.append(number))
    try:
        with StopRequest() as stop:
            signal.raise_signal(signal.SIGUSR2)
            assert stop.requested()
            assert heard == []
        assert heard == [signal.SIGUSR2]
    finally:
        signal.signal(signal.SIGUSR2, before)
