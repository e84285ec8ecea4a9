"""Distillation: teachers of several families, their words on disk, a run that can be killed, a student that learns."""

from __future__ import annotations

import json
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from kills import killed_until_done
from PIL import Image
from ranks import run_ranks

import dinov3
from dinov3.data.sources import open_source
from dinov3.distill import run
from dinov3.distill import run as module
from dinov3.distill.config import DistillConfig
from dinov3.distill.run import Distillation, distill
from dinov3.distill.teachers import (
    Images,
    Standardised,
    TargetCache,
    TeacherSpec,
    Views,
    difference,
    open_teacher,
    relations_loss,
)
from dinov3.errors import DinoError, UnknownName
from dinov3.models.vit import VisionTransformer
from dinov3.runlog import RunDir
from dinov3.weights import catalog, reading, writing
from dinov3.weights.writing import save
from tests.distill.conftest import TINY, rows_with_a_tiny_one

pytest.importorskip("omegaconf")


def config_for(folder: Path, teacher: Path, **changes) -> DistillConfig:
    base = DistillConfig(
        images=str(folder), teachers=[f"dinov3:{teacher},relations=0.5"], steps=6, batch=3, sizes="32:1", views=2,
        warmup=1, cached_grid=2, save_every=2, log_every=1, lr=1e-3,
    )  # fmt: skip
    return replace(base, **changes)


# ---- teachers -------------------------------------------------------------------------------------------------------


def test_a_wrong_teacher_spec_is_an_error() -> None:
    line = TeacherSpec.parse("transformers:/some/folder,layer=9,cls=0.5,normed=false")
    assert (line.kind, line.what, line.layer, line.cls, line.normed) == ("transformers", "/some/folder", 9, 0.5, False)
    with pytest.raises(UnknownName, match="did you mean 'transformers'"):
        TeacherSpec.parse("transformer:x")
    with pytest.raises(UnknownName, match="did you mean 'patches'"):
        TeacherSpec.parse("timm:x,patch=1")
    with pytest.raises(DinoError, match="layer=last"):
        TeacherSpec.parse("timm:x,layer=last")


def tiny_dinov2(**changes):
    from transformers import Dinov2Config
    from transformers.models.dinov2.modeling_dinov2 import Dinov2Model

    torch.manual_seed(0)
    options = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 56, "mlp_ratio": 4}
    return Dinov2Model(Dinov2Config(**(options | changes))).eval()


def test_a_dinov2_folder_gives_the_requested_block(oracles, tmp_path: Path) -> None:
    model = tiny_dinov2()
    model.save_pretrained(tmp_path / "dinov2")
    teacher = open_teacher(f"transformers:{tmp_path / 'dinov2'},layer=1")
    assert teacher.side(3) == 42
    pixels = torch.randint(0, 256, (2, 3, 42, 42), dtype=torch.uint8)
    ran = []
    for i, block in enumerate(teacher.network._blocks):
        block.register_forward_pre_hook(lambda *_, i=i: ran.append(i))
    said = teacher(pixels)
    assert ran == [0, 1]  # the block behind the requested one is not computed
    assert said.patches.shape == (2, 3, 3, 64)
    mean, std = (torch.tensor(v)[:, None, None] for v in catalog.STATISTICS["lvd1689m"])
    with torch.no_grad():
        states = model(pixel_values=(pixels / 255 - mean) / std, output_hidden_states=True).hidden_states
        expected = model.layernorm(states[2])
    torch.testing.assert_close(said.cls, expected[:, 0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(said.patches.flatten(1, 2), expected[:, 1:], atol=1e-4, rtol=1e-4)
    with pytest.raises(DinoError, match="3 blocks"):
        open_teacher(f"transformers:{tmp_path / 'dinov2'},layer=3")


def test_a_timm_model_is_a_teacher_by_its_name(oracles, tmp_path: Path) -> None:
    import timm

    torch.save(timm.create_model("mobilenetv2_050").state_dict(), tmp_path / "w.pth")
    said = open_teacher(f"timm:mobilenetv2_050,checkpoint={tmp_path / 'w.pth'}")(
        torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    )
    assert (said.cls.shape, said.patches.shape, said.logits.shape) == ((2, 1280), (2, 2, 2, 1280), (2, 1000))


# ---- views and the cache --------------------------------------------------------------------------------------------


def test_a_view_is_the_same_box_at_every_size(folder: Path) -> None:
    images, views = Images(open_source(folder)), Views(scale=(0.3, 0.6))
    large = views.cut(images[0], 0, 1, 64).float()
    small = views.cut(images[0], 0, 1, 32).float()
    assert F.l1_loss(F.avg_pool2d(large, 2), small) < 6
    assert torch.equal(views.cut(images[0], 0, 1, 32).float(), small)
    assert F.l1_loss(views.cut(images[0], 0, 0, 32).float(), small) > 6


def test_cached_targets_are_those_of_the_teacher_within_float16(folder: Path, teacher_file: Path, tmp_path) -> None:
    images, views = Images(open_source(folder)), Views(count=2)
    teacher = open_teacher(f"dinov3:{teacher_file}")
    cache = TargetCache(tmp_path / "cache", teacher, views, images, grid=2)
    assert cache.fill() == 2
    some = np.array([4, 0, 5])
    for view in range(2):
        online = teacher(images.views(views, some, view, teacher.side(2)))
        kept = cache.read(some, view)
        torch.testing.assert_close(kept.cls, online.cls, atol=2e-3, rtol=2e-3)
        torch.testing.assert_close(kept.patches, online.patches, atol=2e-3, rtol=2e-3)


def test_a_cache_computes_only_what_is_missing(folder: Path, teacher_file: Path, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("dinov3.distill.teachers.SHARD", 4)
    images, views = Images(open_source(folder)), Views(count=2)
    teacher = open_teacher(f"dinov3:{teacher_file},views=1")
    cache = TargetCache(tmp_path / "cache", teacher, views, images, grid=2)
    assert (0 in cache, 1 in cache) == (True, False)
    assert cache.fill() == 2
    before = cache.read(np.arange(6), 0)
    (cache.folder / "view-0" / "shard-00001.safetensors").unlink()
    again = TargetCache(tmp_path / "cache", teacher, views, images, grid=2)
    assert again.fill() == 1
    assert torch.equal(again.read(np.arange(6), 0).cls, before.cls)
    assert TargetCache(tmp_path / "cache", teacher, replace(views, seed=1), images, grid=2).folder != cache.folder


def test_files_are_looked_at_only_for_the_name_of_a_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stamped: list[str] = []
    monkeypatch.setattr("dinov3.data.sources.listing.stamp_of", lambda path: stamped.append(str(path)) or "1")
    images = Images(open_source(folder))
    assert images[0].shape[0] == 3
    assert stamped == []
    assert images.id
    assert len(stamped) == len(images)


def test_an_unreadable_image_is_replaced_by_the_next_and_logged(folder: Path) -> None:
    (folder / "2.png").write_bytes(b"not an image at all, but long enough to be looked at")
    images = Images(open_source(folder))
    assert torch.equal(images[2], images[3])
    assert [Path(p).name for p in images.unreadable] == ["2.png"]


# ---- losses ---------------------------------------------------------------------------------------------------------


def test_the_losses_are_what_their_names_say() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(5, 8), torch.randn(5, 8)
    assert difference(x, x).item() == pytest.approx(0, abs=1e-6)
    slow = np.mean([1 - float(a @ b / a.norm() / b.norm()) for a, b in zip(x, y)])
    assert difference(x, y).item() == pytest.approx(0.9 * slow + 0.1 * F.smooth_l1_loss(x, y).item(), abs=1e-5)
    assert relations_loss(x, 3 * x).item() == pytest.approx(0, abs=1e-5)
    assert relations_loss(x, y).item() > 0.1
    scaled = Standardised(5 + 3 * torch.randn(400, 8))(5 + 3 * torch.randn(400, 8))
    assert scaled.mean().abs() < 0.2
    assert scaled.std() == pytest.approx(1, abs=0.1)


# ---- the run --------------------------------------------------------------------------------------------------------


def test_a_run_that_was_killed_gives_the_same_student(tiny_student, folder: Path, teacher_file: Path, tmp_path) -> None:
    whole = distill(config_for(folder, teacher_file), tmp_path / "whole")

    class Killed(Exception):
        pass

    original = Distillation.train_step

    def dying(self, batch):
        if self.step == 5:
            raise Killed
        return original(self, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Distillation, "train_step", dying)
        with pytest.raises(Killed):
            distill(config_for(folder, teacher_file), tmp_path / "killed")
    resumed = distill(config_for(folder, teacher_file), tmp_path / "killed")
    a, b = (dinov3.load(weights=path).state_dict() for path in (whole, resumed))
    assert all(torch.equal(a[k], b[k]) for k in a)
    lines = [json.loads(line) for line in (tmp_path / "killed" / "metrics.jsonl").read_text().splitlines()]
    assert [r["iteration"] for r in lines] == list(range(6))


def test_ctrl_c_saves_the_step_that_was_under_way(tiny_student, folder: Path, teacher_file: Path, tmp_path) -> None:
    config, original = config_for(folder, teacher_file, save_every=6, log_every=50), Distillation.train_step
    whole = distill(config, tmp_path / "whole")

    def pressed(self, batch):
        if self.step == 2:
            signal.raise_signal(signal.SIGINT)
        return original(self, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Distillation, "train_step", pressed)
        with pytest.raises(KeyboardInterrupt, match="3 of 6 steps are done and saved"):
            distill(config, tmp_path / "torn")
    resumed = distill(config, tmp_path / "torn")
    a, b = (dinov3.load(weights=path).state_dict() for path in (whole, resumed))
    assert all(torch.equal(a[k], b[k]) for k in a)
    log = (tmp_path / "torn" / "log.txt").read_text()
    assert "step 1/6, " in log  # the first one shows how fast it is
    assert "resumed at step 3" in log


@pytest.mark.slow
def test_a_run_killed_twenty_times_gives_the_same_student(
    tiny_student, folder: Path, teacher_file: Path, tmp_path
) -> None:
    config = config_for(folder, teacher_file, steps=60, save_every=5, cache=str(tmp_path / "cache"))
    began = time.monotonic()
    whole = reading.read(distill(config, tmp_path / "whole"))[0]
    killed = killed_until_done(distill, config, tmp_path / "torn", seconds=time.monotonic() - began)
    assert killed >= 12
    torn = reading.read(tmp_path / "torn" / "student.safetensors")[0]
    assert all(torch.equal(whole[name], torn[name]) for name in whole)
    lines = [json.loads(line) for line in (tmp_path / "torn" / "metrics.jsonl").read_text().splitlines()]
    assert [r["iteration"] for r in lines] == list(range(60))


def test_a_damaged_newest_checkpoint_gives_way_to_the_older_one(
    tiny_student, folder: Path, teacher_file: Path, tmp_path
) -> None:
    config = config_for(folder, teacher_file)
    config.save_every = 2
    whole = reading.read(distill(config, tmp_path / "run"))[0]
    whole = {name: tensor.clone() for name, tensor in whole.items()}  # the file is written again
    checkpoints = tmp_path / "run" / "ckpt"
    size = (checkpoints / "distill.pth").stat().st_size
    for damage in (b"", b"\0" * size, (checkpoints / "distill.pth").read_bytes()[: size // 2]):
        (checkpoints / "distill.pth").write_bytes(damage)
        again = reading.read(distill(config, tmp_path / "run"))[0]
        assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert "resuming from the older distill.older.pth" in (tmp_path / "run" / "log.txt").read_text()
    for name in ("distill.pth", "distill.older.pth"):
        (checkpoints / name).write_bytes(b"")
    with pytest.raises(DinoError, match=r"cannot be read: .*and there is no older one that can: take another --out"):
        distill(config, tmp_path / "run")


def three_steps(config: DistillConfig, out: str) -> tuple[dict[str, torch.Tensor], list[dict[str, float]], int]:
    """(the student's weights as exported, the run's records, shards of the cache this process had computed)."""
    catalog.ROWS = rows_with_a_tiny_one()  # the ranks are processes of their own
    catalog.aliases.cache_clear()
    written: list[Path] = []
    write = writing.write_safetensors

    def noted(state: Any, path: Path, *rest: Any) -> None:
        written.append(path)
        write(state, path, *rest)

    writing.write_safetensors = noted
    try:
        state = reading.read(distill(config, out))[0]
    finally:
        writing.write_safetensors = write
    records = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return state, records, sum("shard" in path.name for path in written)


def test_two_processes_learn_what_one_learns_of_the_whole_batch(
    folder: Path, teacher_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def settings(name: str) -> DistillConfig:
        return config_for(
            folder,
            teacher_file,
            batch=4,
            steps=3,
            workers=2,
            teachers=[f"dinov3:{teacher_file},relations=0.5"],
            weights=str(start),
            cache=str(tmp_path / name / "cache"),
        )

    torch.manual_seed(2)
    awake = VisionTransformer(replace(TINY, layerscale_init=1.0))
    awake.init_weights()
    start = save(awake, tmp_path / "start.safetensors")
    for path in list(folder.iterdir()):  # three batches of four in an epoch
        Image.open(path).rotate(90).save(folder / f"turned-{path.name}")
    monkeypatch.setattr(catalog, "ROWS", catalog.ROWS)
    try:
        state, records, shards = three_steps(settings("one"), str(tmp_path / "one"))
    finally:
        monkeypatch.undo()
        catalog.aliases.cache_clear()
    assert (len(records), shards) == (3, 2)
    for their_state, their_records, their_shards in run_ranks(three_steps, 2, settings("two"), str(tmp_path / "two")):
        assert their_shards == 1  # two views of one shard each, shared out
        for mine, theirs in zip(records, their_records, strict=True):
            for name in (k for k in mine if "loss" in k or "/" in k):
                assert theirs[name] == pytest.approx(mine[name], rel=1e-4), name
        for name, value in state.items():
            torch.testing.assert_close(their_state[name].float(), value.float(), rtol=2e-2, atol=2e-3, msg=name)


def stopped_after_two_steps(config: DistillConfig, out: str) -> dict[str, torch.Tensor]:
    """The student of a run whose second process alone is stopped in the second step, after the run resumed."""
    catalog.ROWS = rows_with_a_tiny_one()
    catalog.aliases.cache_clear()
    original = Distillation.train_step

    def pressed(self: Distillation, batch: Any) -> Any:
        if self.step == 1 and run.distributed.rank() == 1:
            signal.raise_signal(signal.SIGINT)
        return original(self, batch)

    Distillation.train_step = pressed  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt, match="2 of 3 steps are done and saved"):
        distill(config, out)
    Distillation.train_step = original  # type: ignore[method-assign]
    return three_steps(config, out)[0]


@pytest.mark.slow
def test_a_stop_of_one_process_stops_both_after_the_same_step(folder: Path, teacher_file: Path, tmp_path: Path) -> None:
    config = config_for(folder, teacher_file, batch=4, steps=3, save_every=3)
    whole = run_ranks(three_steps, 2, config, str(tmp_path / "whole"))[0][0]
    for torn in run_ranks(stopped_after_two_steps, 2, config, str(tmp_path / "torn")):
        assert all(torch.equal(torn[name], value) for name, value in whole.items())
    assert "resumed at step 2" in (tmp_path / "torn" / "log.txt").read_text()


def test_a_batch_must_go_round(tiny_student, folder: Path, teacher_file: Path, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(run.distributed, "world", lambda group=None: 2)
    with pytest.raises(DinoError, match="3 images a batch do not go round 2 processes"):
        run.Batches(config_for(folder, teacher_file), Images(open_source(folder)), Views(), [])


def test_cached_and_online_runs_learn_the_same(tiny_student, folder: Path, teacher_file: Path, tmp_path) -> None:
    online = distill(config_for(folder, teacher_file), tmp_path / "online")
    cached = distill(config_for(folder, teacher_file, cache=str(tmp_path / "cache")), tmp_path / "cached")
    a, b = (dinov3.load(weights=path).state_dict() for path in (online, cached))
    assert max((a[k].float() - b[k].float()).abs().max().item() for k in a) < 5e-3


def test_the_loss_falls_and_the_student_resembles_its_teacher(
    tiny_student, folder: Path, teacher_file: Path, tmp_path
) -> None:
    distill(config_for(folder, teacher_file, steps=80, lr=3e-3, batch=6, save_every=1000), tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [r["total_loss"] for r in lines]
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:5])


def test_the_projections_begin_where_regression_puts_them(tiny_student, folder, teacher_file, tmp_path) -> None:
    """The teacher's own weights as the student's: fitted projections have next to nothing left to learn."""
    own = config_for(folder, teacher_file, weights=str(teacher_file), batch=6, steps=2, lr=1e-9, views=1)
    own.teachers = [f"dinov3:{teacher_file},cls=0,patches=1"]
    distill(own, tmp_path / "run")
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["0-dinov3/patches"] < 0.2


def test_the_first_steps_of_an_untrained_student_do_not_explode(tiny_student, folder, teacher_file, tmp_path) -> None:
    """CLS of random weights is one vector for all images; projections fitted to its noise gave losses of 70 to 700."""
    distill(config_for(folder, teacher_file), tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert max(r["0-dinov3/cls"] for r in lines) < 3


def test_the_export_has_metadata_without_folders(tiny_student, folder: Path, teacher_file: Path, tmp_path) -> None:
    path = distill(config_for(folder, teacher_file, steps=2), tmp_path / "run")
    opened = reading.open(path)
    assert opened.metadata["steps"] == 2
    assert opened.metadata["recipe"]["teachers"] == ["dinov3:teacher.safetensors,relations=0.5"]
    assert str(tmp_path) not in json.dumps(opened.metadata)
    dtypes = {v.dtype for k, v in opened.state_dict.items() if k != "rope_embed.periods"}
    assert dtypes == {torch.float16}


def test_a_run_without_teachers_is_an_error(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DinoError, match="needs a teacher"):
        distill(DistillConfig(images=str(folder)), tmp_path / "run")


def test_a_teacher_that_is_not_here_is_one_sentence_with_the_way_to_it(
    folder: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    given = DistillConfig(images=str(folder), teachers=["dinov3:dinov3_vits16"], student="dinov3_vitt16")
    with pytest.raises(
        DinoError, match=r"the teacher dinov3:dinov3_vits16 cannot be opened: .*request access at"
    ) as caught:
        distill(given, tmp_path / "run")
    assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(DinoError, match="did you mean 'dinov3_vits16'"):
        distill(replace(given, teachers=["dinov3:dinov3_vits61"]), tmp_path / "run")
    with pytest.raises(UnknownName, match="did you mean 'dinov3_vitt16'"):  # before the teacher
        distill(replace(given, student="dinov3_vitt61"), tmp_path / "run")


def test_knn_reads_a_labelled_folder(teacher_file: Path, tmp_path: Path) -> None:
    for label, colour in enumerate(((250, 20, 20), (20, 20, 250))):
        (tmp_path / "labelled" / str(label)).mkdir(parents=True)
        for i in range(6):
            Image.new("RGB", (40, 40), tuple(c - i if c > 30 else c + i for c in colour)).save(
                tmp_path / "labelled" / str(label) / f"{i}.png"
            )
    student = dinov3.load(weights=teacher_file)
    assert module.knn(student, tmp_path / "labelled", size=32, k=3) == 1.0


def test_the_distill_command_trains_and_resumes(tiny_student, folder, teacher_file, tmp_path, capsys) -> None:
    from dinov3.cli import app

    typer = pytest.importorskip("typer.testing")
    line = [
        "distill",
        str(folder),
        "--out",
        str(tmp_path / "run"),
        "--teacher",
        f"dinov3:{teacher_file}",
        "--steps",
        "3",
    ]
    line += ["--batch", "3", "--sizes", "32:1", "--device", "cpu", "--cache", str(tmp_path / "cache")]
    done = typer.CliRunner().invoke(app, line)
    assert done.exit_code == 0, done.output
    assert (tmp_path / "run" / "student.safetensors").is_file()
    again = typer.CliRunner().invoke(app, line)
    assert "resumed at step 3" in (tmp_path / "run" / "log.txt").read_text(), again.output
    model = dinov3.load(weights=tmp_path / "run" / "student.safetensors")
    assert dinov3.embed(model, folder / "0.png", size=32).cls.shape == (1, 32)
    for change in (["--seed", "1"], ["--teacher", f"dinov3:{teacher_file},layer=0"]):
        with pytest.raises(DinoError, match="was started with"):
            typer.CliRunner().invoke(app, [*line, *change], catch_exceptions=False)
    with pytest.raises(DinoError, match="is no folder"):
        typer.CliRunner().invoke(app, [*line, "--knn", str(tmp_path / "nowhere")], catch_exceptions=False)


# ---- the model that ships -------------------------------------------------------------------------------------------


def test_the_packaged_model_loads_without_a_network_and_recognises_an_image_by_its_part(skimage_images: Path) -> None:
    row = catalog.resolve("dinov3_vitt16")[0]
    assert row.packaged_path.stat().st_size < 12e6
    model = dinov3.load("dinov3_vitt16")
    assert model.origin.name == "dinov3_vitt16_own"
    assert not model.origin.random
    assert sum(p.numel() for p in model.parameters()) == row.parameters
    names = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png")
    images = [Image.open(skimage_images / name).convert("RGB") for name in names]
    parts = [p.crop((p.width // 6, p.height // 6, p.width * 5 // 6, p.height * 5 // 6)) for p in images]
    similarity = dinov3.embed(model, parts, size=224).similarity(dinov3.embed(model, images, size=224))
    assert similarity.argmax(1).tolist() == list(range(len(names)))


# ---- teachers that see the student's own pixels -----------------------------------------------------------------------


def online(teacher: Path, **options: object) -> list[str]:
    said = "".join(f",{k}={v}" for k, v in options.items())
    return [f"dinov3:{teacher},online=true,relations=0.5{said}"]


@pytest.mark.parametrize("mix", ["cutout:0.5", "cutmix:much", "cutmix:0.8,mixup:0.4", "mixup:-1"])
def test_an_impossible_mix_is_an_error(mix: str) -> None:
    with pytest.raises(DinoError, match=r"cutmix:0\.5,mixup:0\.2"):
        DistillConfig(mix=mix).mixing()


def test_teacher_and_student_see_the_same_mixed_pixels(tiny_student, folder, teacher_file, tmp_path) -> None:
    config = config_for(folder, teacher_file, mix="cutmix:0.5,mixup:0.5", steps=3)
    config.teachers = online(teacher_file)
    work = Distillation(config, RunDir(tmp_path / "run"))
    batch = work.batches.at(1)
    teacher = open_teacher(online(teacher_file)[0])
    torch.testing.assert_close(batch.targets[0].cls, teacher(batch.pixels).cls)
    assert torch.equal(work.batches.at(1).pixels, batch.pixels)
    assert not torch.equal(work.batches.at(2).pixels, batch.pixels)
    config.mix = ""
    assert not torch.equal(work.batches.at(1).pixels, batch.pixels)


def test_an_expensive_teacher_gets_a_share_of_the_batch(tiny_student, folder, teacher_file, tmp_path) -> None:
    config = config_for(folder, teacher_file, batch=5)
    config.teachers = online(teacher_file, share=0.25)
    work = Distillation(config, RunDir(tmp_path / "run"))
    batch = work.batches.at(0)
    assert len(batch.pixels) == 5
    assert batch.targets[0].cls.shape == (2, 32)
    terms = work.terms(batch)
    work.batches.sources[0].teacher.spec = replace(work.teachers[0].spec, share=1.0)
    everything = work.terms(work.batches.at(0))
    assert terms.total().item() != everything.total().item()
    with pytest.raises(DinoError, match="share=2"):
        TeacherSpec.parse("timm:x,share=2")


def test_mixed_images_need_online_teachers(tiny_student, folder, teacher_file, tmp_path) -> None:
    with pytest.raises(DinoError, match="online=true"):
        distill(config_for(folder, teacher_file, mix="cutmix:0.5"), tmp_path / "run")


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_mixed_run_that_was_killed_gives_the_same_student(
    tiny_student, folder, teacher_file, tmp_path, optimizer: str
) -> None:
    config = config_for(folder, teacher_file, mix="cutmix:0.5,mixup:0.3", optimizer=optimizer, in_memory=True, views=9)
    config.teachers = online(teacher_file)
    whole = distill(config, tmp_path / "whole")
    original = Distillation.train_step

    def dying(self, batch):
        if self.step == 5:
            raise KeyboardInterrupt
        return original(self, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Distillation, "train_step", dying)
        with pytest.raises(KeyboardInterrupt):
            distill(config, tmp_path / "killed")
    resumed = distill(config, tmp_path / "killed")
    a, b = (dinov3.load(weights=path).state_dict() for path in (whole, resumed))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_muon_moves_the_blocks_matrices_and_adamw_the_rest(tiny_student, folder, teacher_file, tmp_path) -> None:
    work = Distillation(config_for(folder, teacher_file, optimizer="muon"), RunDir(tmp_path / "run"))
    adamw, muon = ({id(p) for g in o.param_groups for p in g["params"]} for o in work.optimizers)
    names = {id(p): n for n, p in work.student.named_parameters()}
    assert {names[i].split(".", 2)[2] for i in muon} == {
        "attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight",
    }  # fmt: skip
    everything = {id(p) for p in [*work.student.parameters(), *work.projectors.parameters()] if p.requires_grad}
    assert adamw | muon == everything
    assert not adamw & muon
    with pytest.raises(DinoError, match="one of adamw, muon"):
        Distillation(config_for(folder, teacher_file, optimizer="sgd"), RunDir(tmp_path / "other"))


def test_images_in_memory_are_decoded_once(folder: Path) -> None:
    images = Images(open_source(folder), keep=True)
    first = images[1]
    (folder / "1.png").write_bytes(b"no longer an image, which nobody will notice")
    assert images[1] is first
    assert not images.unreadable


def test_a_flat_schedule_falls_in_its_last_share_whatever_the_total() -> None:
    short, long = (DistillConfig(schedule="flat:0.25", steps=n, warmup=10, lr=1.0, final_lr=0.0) for n in (100, 200))
    assert [short.lr_at(i) for i in (0, 5, 10, 75)] == [0.0, 0.5, 1.0, 1.0]
    assert short.lr_at(90) == pytest.approx(0.4)
    assert short.lr_at(99) == pytest.approx(0.04)
    assert [short.lr_at(i) == long.lr_at(i) for i in (3, 75, 76)] == [True, True, False]
    for wrong in ("step", "flat", "flat:2", "flat:much"):
        with pytest.raises(DinoError, match="cosine or flat:SHARE"):
            DistillConfig(schedule=wrong).lr_at(1)


@pytest.mark.slow
def test_a_compiled_student_learns_the_same(tiny_student, folder, teacher_file, tmp_path) -> None:
    plain = distill(config_for(folder, teacher_file, steps=3), tmp_path / "plain")
    compiled = distill(config_for(folder, teacher_file, steps=3, compile=True), tmp_path / "compiled")
    a, b = (dinov3.load(weights=path).state_dict() for path in (plain, compiled))
    assert max((a[k].float() - b[k].float()).abs().max().item() for k in a) < 3e-3


def test_a_student_that_compiles_holds_no_lock_that_a_teacher_waits_for(
    tiny_student, folder, teacher_file, tmp_path, monkeypatch
) -> None:
    """torch keeps the casts of all threads behind one lock: tracing under it while the teachers' thread leaves its own
    autocast stood still for ever."""
    config = config_for(folder, teacher_file, bf16=True)
    run = RunDir(tmp_path / "run")
    run.checkpoints.mkdir(parents=True)
    work = Distillation(config, run)
    seen = []
    forward = work.forward
    monkeypatch.setattr(work, "forward", lambda x: (seen.append(torch.is_autocast_cache_enabled()), forward(x))[1])
    work.train_step(work.batches.at(0))
    assert seen == [False]
