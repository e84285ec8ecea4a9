"""The `dinov3` command: outputs, exit codes, and one sentence for every mistake."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from paths import ROOT
from PIL import Image
from typer import Typer
from typer.testing import CliRunner

from dinov3 import cli
from dinov3.cli.shared import Progress, config_options, log
from dinov3.config.bounds import setting
from dinov3.drawing import TILE
from dinov3.errors import DinoError, install
from dinov3.weights.catalog import ROWS


class Result:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


def dinov3(*arguments: object, capsys) -> Result:
    """The command in this process (an import of torch saved for every call), through its real door."""
    argv = sys.argv
    sys.argv = ["dinov3", *map(str, arguments)]
    try:
        cli.main()
        code = 0
    except SystemExit as exit:
        code = exit.code if isinstance(exit.code, int) else 1
    finally:
        sys.argv = argv
    captured = capsys.readouterr()
    return Result(code, captured.out, captured.err)


@pytest.fixture(scope="module")
def images(tmp_path_factory, skimage_images: Path) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for name in ("chelsea.png", "coffee.png", "rocket.jpg", "astronaut.png"):
        Image.open(skimage_images / name).convert("RGB").resize((96, 80)).save(folder / f"{Path(name).stem}.jpg")
    return folder


@pytest.fixture(scope="module")
def store(tmp_path_factory, images: Path) -> Path:
    place = tmp_path_factory.mktemp("store") / "s"
    options = shlex.split("--weights random --model dinov3_vits16 --size 32 --pooling mean --device cpu")
    argv, sys.argv = sys.argv, ["dinov3", "embed", str(images), "--out", str(place), *options]
    try:
        with pytest.raises(SystemExit) as exit:
            cli.main()
        assert exit.value.code in (0, None)
    finally:
        sys.argv = argv
    return place


def test_search_prints_the_image_itself_first(store, images, capsys, tmp_path) -> None:
    sheet = tmp_path / "sheet.png"
    result = dinov3("search", store, "--image", images / "coffee.jpg", "--top", 2, "--sheet", sheet, capsys=capsys)
    assert result.code == 0
    rank, score, path = result.out.splitlines()[0].split("\t")
    assert (rank, score, path) == ("1", "1.0000", str(images / "coffee.jpg"))
    assert len(result.out.splitlines()) == 2
    assert "RANDOM" in result.err
    assert Image.open(sheet).width > 500


def test_search_as_json_with_a_filter(store, images, capsys) -> None:
    result = dinov3(
        "search",
        store,
        "--image",
        images / "coffee.jpg",
        "--where",
        "path NOT LIKE '%coffee%'",
        "--json",
        capsys=capsys,
    )
    hits = json.loads(result.out)
    assert [h["rank"] for h in hits] == [1, 2, 3]
    assert all("coffee" not in h["path"] for h in hits)
    assert hits[0]["width"] == 96


def test_frames_of_a_video_are_drawn_and_are_queries(tmp_path, capsys) -> None:
    av = pytest.importorskip("av")
    clip = tmp_path / "demo.mp4"
    with av.open(str(clip), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for colour in ("red", "lime", "blue"):
            for _ in range(10):
                frame = av.VideoFrame.from_image(Image.new("RGB", (64, 48), colour))
                container.mux(stream.encode(frame))
        container.mux(stream.encode())
    options = ["--model", "vitt16", "--size", 32, "--device", "cpu"]
    assert dinov3("embed", clip, "--out", tmp_path / "store", *options, capsys=capsys).code == 0
    query, sheet = f"{clip}#2.000s", tmp_path / "sheet.png"
    found = dinov3("search", tmp_path / "store", "--image", query, "--sheet", sheet, capsys=capsys)
    assert found.out.splitlines()[0] == f"1\t1.0000\t{query}"
    pixels = np.asarray(Image.open(sheet).convert("RGB")).astype(int)
    for channel in range(3):
        area = (pixels[..., channel] - np.delete(pixels, channel, 2).max(2) > 150).sum()
        assert area > 0.7 * TILE**2
    wrong = dinov3("search", tmp_path / "store", "--image", tmp_path / "dmeo.mp4", capsys=capsys)
    assert wrong.code == 1
    assert wrong.err.splitlines()[-1].endswith("dmeo.mp4; did you mean 'demo.mp4'?")


def test_info_says_the_preprocessing_in_words(store, capsys) -> None:
    for verb in (["store", "info"], ["info"]):
        lines = dinov3(*verb, store, capsys=capsys).out.splitlines()
        assert [line for line in lines if "{" in line] == []
        assert (
            "input: 32 × 32 px, bilinear on 8-bit values, sides resized to multiples of 16, "
            "mean 0.485 0.456 0.406, std 0.229 0.224 0.225"
        ) in lines
        facts = json.loads(dinov3(*verb, store, "--json", capsys=capsys).out)
        assert json.loads(facts["preprocessing_json"])["size"] == 32


def test_embedding_again_adds_nothing_and_reports_as_json(store, images, capsys) -> None:
    options = ["--weights", "random", "--model", "dinov3_vits16", "--size", 32, "--pooling", "mean", "--device", "cpu"]
    result = dinov3("embed", images, "--out", store, *options, "--json", capsys=capsys)
    report = json.loads(result.out)
    assert (report["embedded"], report["skipped"], report["failed"]) == (0, 4, [])


def test_videos_of_a_folder_are_not_left_out_without_a_word(images, tmp_path, capsys) -> None:
    shutil.copytree(images, tmp_path / "both")
    (tmp_path / "both" / "clip.mp4").write_bytes(b"a film")
    result = dinov3(
        "embed", tmp_path / "both", "--out", tmp_path / "store", "--size", 32, "--device", "cpu", capsys=capsys
    )
    assert result.code == 0
    assert f"note: videos are taken where they are named: '{tmp_path}/both/*.mp4'" in result.err


def test_another_size_into_the_same_store_is_one_sentence(store, images, capsys) -> None:
    options = ["--weights", "random", "--model", "dinov3_vits16", "--size", 48, "--pooling", "mean", "--device", "cpu"]
    result = dinov3("embed", images, "--out", store, *options, capsys=capsys)
    assert result.code == 1
    error = [line for line in result.err.splitlines() if line.startswith("error:")]
    assert len(error) == 1
    assert "preprocessing" in error[0]


def test_without_pyarrow_nothing_is_loaded_and_no_folder_is_left(tmp_path, images, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    result = dinov3("embed", images, "--out", tmp_path / "s", capsys=capsys)
    assert result.code == 1
    assert "pip install" in result.err
    assert "dinov3_vitt16" not in result.err
    assert not (tmp_path / "s").exists()


def test_unreadable_images_give_exit_code_three(tmp_path, images, capsys) -> None:
    folder = tmp_path / "p"
    folder.mkdir()
    (folder / "a.jpg").write_bytes((images / "coffee.jpg").read_bytes())
    (folder / "b.jpg").write_bytes(b"")
    options = ["--weights", "random", "--model", "dinov3_vits16", "--size", 32, "--device", "cpu"]
    result = dinov3("embed", folder, "--out", tmp_path / "s", *options, capsys=capsys)
    assert result.code == 3
    assert "b.jpg: empty file (0 bytes)" in result.err
    info = dinov3("info", tmp_path / "s", "--failed", "--json", capsys=capsys)
    facts = json.loads(info.out)
    assert (facts["images"], facts["unreadable"]) == (1, 1)
    assert "empty" in facts["failed"][0]


def test_the_table_of_models_lists_every_row(capsys) -> None:
    text = dinov3("models", capsys=capsys).out
    for row in ROWS:
        assert row.id in text
        assert (row.file or row.hf) in text
    rows = json.loads(dinov3("models", "--json", "--size", 224, capsys=capsys).out)
    assert len(rows) == len(ROWS)
    assert rows[0]["tokens"] == 201
    assert rows[0]["scores"]["ADE20k"] == 47.0


def test_info_describes_a_file_and_convert_rewrites_it(tmp_path, capsys) -> None:
    import dinov3 as package
    from dinov3.weights.writing import save

    save(package.load("dinov3_vits16", "random"), tmp_path / "own.safetensors")
    facts = json.loads(dinov3("info", tmp_path / "own.safetensors", "--json", capsys=capsys).out)
    assert facts["model"] == "dinov3_vits16_lvd1689m"
    assert facts["values"] == ROWS[0].parameters
    done = dinov3("convert", tmp_path / "own.safetensors", tmp_path / "hf", "--to", "transformers", capsys=capsys)
    assert done.code == 0
    assert done.out.strip() == str(tmp_path / "hf")
    again = json.loads(dinov3("info", tmp_path / "hf", "--json", capsys=capsys).out)
    assert again["form"] == "transformers"
    assert again["fingerprint"] == facts["fingerprint"]


def test_info_names_weights_as_stores_do_and_keeps_its_lines_short(capsys) -> None:
    import dinov3 as package
    from dinov3.weights import identity

    lines = dinov3("info", "vitt16", capsys=capsys).out.splitlines()
    fingerprint = identity.name_of(package.load()).split("@")[1]  # of the float16 file, as it is loaded
    assert f"fingerprint: {fingerprint}" in lines
    assert max(map(len, lines)) < 240
    assert lines[-1] == "notes: none"
    whole = json.loads(dinov3("info", "vitt16", "--json", capsys=capsys).out)
    assert "qkv_bias=True" in whole["config"]


def test_info_describes_a_head_and_weights_refuse_it_by_what_it_is(tmp_path, images, capsys) -> None:
    from dinov3.hub.own_heads import shipped_head

    file = shipped_head("segment")
    lines = dinov3("info", file, capsys=capsys).out.splitlines()
    assert lines[0] == "kind: linear head for segmentation"
    assert "classes: 2 (background, foreground)" in lines
    refused = dinov3("embed", images, "--out", tmp_path / "s", "--weights", file, capsys=capsys)
    assert refused.code == 1
    assert "holds only a head of your own, no backbone" in refused.err


def test_info_describes_an_exported_model_and_weights_refuse_it(tmp_path, images, capsys) -> None:
    import dinov3 as package
    from dinov3.export.graph import export

    export(package.load(), tmp_path / "out", "torch-export", size=(32, 32), output="cls")
    lines = dinov3("info", tmp_path / "out", capsys=capsys).out.splitlines()
    assert lines[0] == "kind: exported model"
    assert {"target: torch-export", "outputs: cls", "least cosine to the model: 1.0000000"} <= set(lines)
    assert any(line.startswith("input: 32 × 32 px (height × width), bilinear") for line in lines)
    refused = dinov3("embed", images, "--out", tmp_path / "s", "--weights", tmp_path / "out", capsys=capsys)
    assert "is an exported model for another runtime: name the weights that it was made of" in refused.err
    (tmp_path / "out" / "dinov3.json").write_text("[]")
    wrong = dinov3("info", tmp_path / "out", capsys=capsys)
    assert "is not what `dinov3 export` writes" in wrong.err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["embed", "nowhere", "--out", "s"], "nowhere"),
        (["embed", ".", "--out", "s", "--model", "dinov3_vits17"], "did you mean"),
        (["search", "nowhere", "--image", "x.jpg"], "no embedding store"),
        (["info", "nowhere.pth"], "no such file"),
        (["convert", "nowhere.pth", "out", "--to", "timm"], "no such file"),
        (["train", "nofolder", "--out", "run", "--device", "cpu"], "there is no folder, list, tar or table 'nofolder'"),
        (["train", ".", "--out", "run", "--weights", "nowhere.pth"], "no such file"),
        (["train-head", "classification", "nofolder", "--out", "run"], "no such file or folder: nofolder"),
        (["distill", ".", "--out", "run", "--teacher", "dinov3:vitt16", "--device", "meta"], "holds no numbers"),
        (["train", "phtos", "--out", "run", "--device", "cpu"], "did you mean 'photos'"),
        (["train-head", "classification", "phtos", "--out", "run"], "did you mean 'photos'"),
        (["eval", "knn", "photos", "phtos"], "did you mean 'photos'"),
        (["embed", ".", "--out", "s", "--model", "vits61"], "did you mean 'vits16'"),
        (["distill", ".", "--out", "run", "--teacher", "dinov3:dinov3_vits61"], "did you mean 'dinov3_vits16'"),
        (["train-head", "classification", ".", "--out", "h.safetensors"], "is the name of a file, but results go into"),
        (
            ["convert", "vits16.pth", "out.safetensors", "--to", "timm"],
            "is the name of a file, but results go into a folder: name one, such as out",
        ),
        (
            ["train", ".", "--out", "model.pth"],
            "is the name of a file, but results go into a folder: name one, such as model",
        ),
    ],
)
def test_every_mistake_is_one_sentence_and_exit_code_one(
    arguments, message, capsys, tmp_path, monkeypatch, images
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "a.jpg").write_bytes((images / "coffee.jpg").read_bytes())
    result = dinov3(*arguments, capsys=capsys)
    assert result.code == 1
    errors = [line for line in result.err.splitlines() if line]
    assert errors[-1].startswith("error: ")
    assert message in errors[-1]
    assert "Traceback" not in result.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["embed", ".", "--out", "s", "--batch", "many"],
        ["embed", ".", "--out", "s", "--workers", "-3"],
        ["embed", ".", "--shape", "round"],
        ["frobnicate"],
    ],
)
def test_wrong_usage_is_exit_code_two(arguments) -> None:
    assert CliRunner().invoke(cli.app, arguments).exit_code == 2


def test_an_error_of_ours_never_shows_a_traceback(monkeypatch, capsys) -> None:
    def fail() -> None:
        raise DinoError("this and that")

    monkeypatch.setattr(cli, "app", fail)
    result = dinov3(capsys=capsys)
    assert (result.code, result.err.strip()) == (1, "error: this and that")


def test_ctrl_c_is_a_sentence(monkeypatch, capsys) -> None:
    def pressed(_name: str) -> None:
        raise KeyboardInterrupt("5 of 12 steps are done and saved")

    monkeypatch.setattr("dinov3.cli.plan.count_of", pressed)
    result = dinov3("plan", "--data", "5000", "--gpus", "1x24GB", "--model", "vits16", capsys=capsys)
    assert result.code == 130
    assert result.err == "interrupted: 5 of 12 steps are done and saved; the same command starts again or continues\n"


# what a command that loads a backbone has no use for; each would cost a tenth of a second or more
LIBRARIES = "scipy sklearn matplotlib transformers timm torchvision onnx huggingface_hub torch._dynamo torch._inductor"
ROOMS = (
    "dinov3.heads dinov3.fit dinov3.train.train dinov3.eval dinov3.export dinov3.predict dinov3.explorer dinov3.serve"
)


def imported_by(*arguments: str, folder: Path, names: str) -> list[str]:
    """Which of these modules (or modules inside them) a command imports in a process of its own."""
    code = (
        "import json, sys\nfrom dinov3 import cli\n"
        "try:\n    cli.main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "print('\\n' + json.dumps([*sys.modules]))"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=folder, env=env)
    assert done.returncode == 0, done.stderr
    modules = json.loads(done.stdout.splitlines()[-1])
    assert "dinov3.cli.embedding" in modules
    return [module for module in modules for name in names.split() if f"{module}.".startswith(f"{name}.")]


@pytest.mark.parametrize("arguments", [["--help"], ["embed", "--help"], ["--version"]], ids=" ".join)
def test_help_imports_no_library_but_the_command_line_s(arguments, tmp_path) -> None:
    unused = "torch numpy PIL rich.console lancedb pyarrow dinov3.weights dinov3.models dinov3.data dinov3.embedding"
    assert imported_by(*arguments, folder=tmp_path, names=unused) == []


def test_no_thread_of_a_command_spins_for_its_neighbours(tmp_path) -> None:
    code = (
        "import os, sys\nfrom dinov3 import cli\nassert 'numpy' not in sys.modules\n"
        "try:\n    cli.main()\nexcept SystemExit:\n    pass\n"
        "print(os.environ['OMP_WAIT_POLICY'], os.environ['OPENBLAS_NUM_THREADS'])"
    )
    env = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "OPENBLAS_NUM_THREADS")}
    for given, expected in (({}, "passive 1"), ({"OPENBLAS_NUM_THREADS": "3"}, "passive 3")):
        done = subprocess.run(
            [sys.executable, "-c", code, "--version"],
            capture_output=True,
            text=True,
            env=env | given | {"PYTHONPATH": str(ROOT)},
        )
        assert done.stdout.splitlines()[-1] == expected, done.stderr


def test_info_of_weights_imports_neither_images_nor_the_store(tmp_path) -> None:
    file = str(next(row for row in ROWS if row.packaged).packaged_path)
    unused = f"PIL lancedb pyarrow pandas dinov3.embedding dinov3.hub dinov3.features {LIBRARIES} {ROOMS}"
    assert imported_by("info", file, folder=tmp_path, names=unused) == []


def test_embed_and_search_import_no_head_and_no_other_activity(tmp_path) -> None:
    Image.new("RGB", (32, 32), "olive").save(tmp_path / "image.png")
    unused = f"lance_namespace_urllib3_client.api fastapi {LIBRARIES} {ROOMS}"
    assert imported_by("embed", "image.png", "--out", "store", folder=tmp_path, names=unused) == []
    assert imported_by("search", "store", "--image", "image.png", folder=tmp_path, names=unused) == []


def test_without_typer_the_command_names_what_to_install() -> None:
    code = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "typer":
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Hidden())
import dinov3.cli
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip().endswith(install("cli"))


@pytest.mark.parametrize("recipe", ["toy_cpu", "vits16_one_gpu", "vitb16_one_gpu"])
@pytest.mark.parametrize("steps", [1, 7, 149, 250, 1040])
def test_steps_are_the_steps_that_are_run(recipe: str, steps: int) -> None:
    pytest.importorskip("omegaconf")
    from dinov3.cli.training import training_overrides
    from dinov3.config.train import load_config
    from dinov3.optim import build_schedules

    chosen = training_overrides("photos", None, f"{recipe}.yaml", steps, None, "cpu", [])
    config, _ = load_config(f"{recipe}.yaml", chosen)
    schedules = build_schedules(config, 1)
    assert config.iterations == schedules.total == steps
    assert config.evaluation.eval_period_iterations == max(25, steps // 4)  # a short run writes its teacher once
    usual = build_schedules(load_config(f"{recipe}.yaml", ["train.dataset_path=photos"])[0], 1)
    warm = max(range(usual.total), key=lambda it: usual.lr(it)) / usual.total
    assert max(range(steps), key=lambda it: schedules.lr(it)) == pytest.approx(warm * steps, abs=3)


def test_a_named_model_has_its_own_sizes_whatever_the_recipe_sets() -> None:
    pytest.importorskip("omegaconf")
    from dinov3.cli.training import training_overrides
    from dinov3.config.train import load_config
    from dinov3.train.planner import student_of

    assert load_config("small_cpu.yaml", ["train.dataset_path=p"])[0].student.depth == 6
    for chosen in (
        training_overrides("p", "vits16", "small_cpu.yaml", 1, None, "cpu", []),
        ["train.dataset_path=p", *student_of("vits16")],
    ):
        assert load_config("small_cpu.yaml", chosen)[0].student.depth is None


def test_a_plan_shows_the_seconds_that_pass(monkeypatch, capsys) -> None:
    def slow(*_given: object, **_options: object) -> None:
        time.sleep(0.8)
        raise DinoError("enough")

    monkeypatch.setattr(Progress, "wait", 0.1)
    monkeypatch.setattr("dinov3.train.planner.plan", slow)
    result = dinov3("plan", "--data", "5000", "--gpus", "cpu", capsys=capsys)
    assert result.err == "planning · 1 s\nerror: enough\n"


@pytest.mark.parametrize("bf16", [True, False])
def test_only_a_recipe_for_gpus_is_made_smaller_on_a_cpu(bf16: bool, tmp_path, monkeypatch) -> None:
    pytest.importorskip("omegaconf")
    monkeypatch.setattr("dinov3.inference.linear.has_bf16", lambda: bf16)
    from dinov3.cli.training import training_overrides

    own = tmp_path / "own.yaml"
    own.write_text("train: {batch_size_per_gpu: 48}\nrun: {device: cpu}\n")
    assert "compute_precision.param_dtype=fp32" in training_overrides(
        "p", None, "vits16_one_gpu.yaml", 1, None, "cpu", []
    )
    for recipe in (str(own), "toy_cpu.yaml"):
        chosen = " ".join(training_overrides("p", None, recipe, 1, None, "cpu", []))
        assert "batch_size" not in chosen
        assert ("param_dtype=fp32" in chosen) is not bf16


def test_train_runs_from_a_folder_to_a_loadable_model_and_goes_on_where_it_stopped(images, tmp_path, capsys) -> None:
    pytest.importorskip("omegaconf")
    small = [
        "student.depth=1", "crops.global_crops_size=32", "crops.local_crops_size=16", "crops.local_crops_number=2",
        "dino.head_n_prototypes=32", "dino.head_hidden_dim=32", "ibot.head_n_prototypes=32", "ibot.head_hidden_dim=32",
        "train.batch_size_per_gpu=2", "train.num_workers=0", "optim.epochs=2",
    ]  # fmt: skip
    run = tmp_path / "run"
    command = ["train", images, "--out", run, "--recipe", "toy_cpu", "--steps", 2, "--device", "cpu", *small]
    first = dinov3(*command, capsys=capsys)
    assert first.code == 0, first.err
    assert "finished: 2 of 2 steps" in first.err
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["total_loss"] > 0
    teacher = next((run / "eval").rglob("teacher_checkpoint.pth"))
    facts = json.loads(dinov3("info", teacher, "--json", capsys=capsys).out)
    assert "embed_dim=192" in facts["config"]
    again = dinov3(*command, capsys=capsys)
    assert again.code == 0
    assert "finished: 2 of 2 steps" in again.err
    # the run's folder is weights: of its newest teacher for features, of all of it to start from
    own = json.loads(dinov3("info", run, "--json", capsys=capsys).out)
    dump = json.loads(dinov3("info", teacher.parent, "--json", capsys=capsys).out)
    assert own["fingerprint"] == dump["fingerprint"] == facts["fingerprint"]
    other = [
        "train",
        images,
        "--out",
        tmp_path / "other",
        *command[4:],
        "--weights",
        run,
        "optim.lr=0",
        "optim.min_lr=0",
    ]
    result = dinov3(*(a for a in other if not str(a).startswith("student.")), capsys=capsys)
    assert result.code == 0, result.err
    assert "holds no dino_head" not in result.err
    moved = json.loads(dinov3("info", tmp_path / "other", "--json", capsys=capsys).out)
    assert moved["config"] == own["config"]
    wrong = dinov3(*command, "optim.leraning_rate=1", capsys=capsys)
    assert wrong.code == 1
    assert "did you mean" in wrong.err


# ---- the command itself, in a fresh process ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--version"], "0.1.0"),
        (["-V"], "0.1.0"),
        (["-h"], "embed"),
        (["-h"], "DINOV3_MAX_IMAGE_MB, the largest image file that is read (512)"),
        (["embed", "-h"], "--weights"),
        (["eval", "-h"], "log-regression"),
        (["eval", "knn", "-h"], "train.ks=[10,20,100,200]"),
    ],
)
def test_the_module_is_the_command(arguments: list[str], expected: str) -> None:
    done = subprocess.run([sys.executable, "-m", "dinov3", *arguments], capture_output=True, text=True, check=True)
    assert expected in done.stdout


@dataclass
class Config:
    steps: int = setting(5, help="Batches.", at_least=1)
    names: list[str] = setting([], help="Repeatable.", flag="--name")
    exact: bool = setting(False, help="A flag.")
    recursive: bool = setting(True, help="Two flags.")
    hidden: int = 7  # without help no option


def test_options_of_a_command_are_the_fields_of_its_configuration() -> None:
    app = Typer()
    seen = []

    @app.command()
    @config_options(Config)
    def run(config: Config, folder: str, device: str = "auto") -> None:
        seen.append((config, folder, device))

    runner = CliRunner()
    assert runner.invoke(app, ["photos"]).exit_code == 0
    given = ["photos", "--steps", "9", "--name", "a", "--name", "b", "--exact", "--no-recursive", "--device", "cpu"]
    assert runner.invoke(app, given).exit_code == 0
    assert seen == [(Config(), "photos", "auto"), (Config(9, ["a", "b"], True, False), "photos", "cpu")]
    assert runner.invoke(app, ["photos", "--steps", "0"]).exit_code == 2
    assert runner.invoke(app, ["photos", "--hidden", "1"]).exit_code == 2


def test_progress_without_a_terminal_is_a_line_after_two_seconds_and_then_every_thirty(monkeypatch, capsys) -> None:
    now = iter([0.0, 1.0, 3.0, 10.0, 34.0])
    monkeypatch.setattr("dinov3.cli.shared.time", SimpleNamespace(monotonic=lambda: next(now)))
    with Progress("comparing", 100) as bar:
        for done in (10, 30, 40, 60):
            bar(done)
    assert [line.split(" · ")[0] for line in capsys.readouterr().err.splitlines()] == ["30 of 100", "60 of 100"]


def test_a_step_that_reports_nothing_shows_its_seconds(monkeypatch, capsys) -> None:
    monkeypatch.setattr(Progress, "wait", 0.1)
    with Progress("compacting"):
        time.sleep(1.0)
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["compacting · 1 s"]  # and the next one after half a minute


def test_counts_are_not_followed_by_seconds(monkeypatch, capsys) -> None:
    monkeypatch.setattr(Progress, "wait", 0.1)
    with Progress("segmenting", 9) as bar:
        time.sleep(0.2)
        bar(3)
        time.sleep(1.0)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" · ")[0] for line in lines] == ["3 of 9"]


def test_of_several_processes_the_first_speaks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        log(f"from {rank}")
    assert capsys.readouterr().err == "from 0\n"
