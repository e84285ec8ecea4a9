"""Every recipe loads with the command in its header, has a complete header comment, and keeps its recorded schedule."""

from __future__ import annotations

import json
import re
import shlex

import pytest
from paths import GOLDEN_LOSSES

from dinov3.config.loading import TRAINING
from dinov3.config.train import TrainConfig, load_config, load_model_config, load_student, vit_config
from dinov3.optim import build_schedules

GOLDEN = json.loads((GOLDEN_LOSSES / "schedules.json").read_text())["recipes"]
ALL = sorted(p.relative_to(TRAINING).as_posix() for p in TRAINING.rglob("*.yaml"))
STUDENTS = [name for name in ALL if "/" in name]
LETTERS = [name for name in ALL if name not in STUDENTS]
DESCRIPTION = "dinov3_vitl16_lvd1689m_distilled.yaml"


def header(name: str) -> str:
    lines = (TRAINING / name).read_text().splitlines()
    return "\n".join(line[1:] for line in lines[: next(i for i, x in enumerate(lines) if not x.startswith("#"))])


def command(name: str) -> list[str]:
    return shlex.split(header(name).split("Command:")[1].replace("\\\n", " "))


def overrides(name: str) -> list[str]:
    arguments = command(name)
    return arguments[arguments.index("--output-dir") + 2 :]


def loaded(name: str) -> TrainConfig:
    if name in STUDENTS:
        scale = 2 if "convnext" in name else 1
        return load_config(name, ["train.dataset_path=D", f"crops.teacher_to_student_resolution_scale={scale}"])[0]
    if name == DESCRIPTION:
        return load_config(name, ["train.dataset_path=D"])[0]
    return load_config(name, overrides(name))[0]


@pytest.mark.parametrize("name", ALL)
def test_a_recipe_loads_strictly_and_describes_a_model(name):
    config = loaded(name)
    assert vit_config(config.student).embed_dim > 0
    load_model_config(name)


@pytest.mark.parametrize("name", LETTERS)
def test_a_header_comment_has_hardware_hours_expectation_and_command(name):
    text = header(name)
    for word in ("Hardware:", "Hours:", "Expect:", "Command:"):
        assert re.search(rf"^ {word} +\S", text, re.MULTILINE), word
    assert f"dinov3/configs/train/{name}" in " ".join(command(name))


@pytest.mark.parametrize("name", ALL)
def test_a_recipe_holds_only_differences(name):
    import yaml

    defaults = TrainConfig()
    # written although equal to the default: they belong to the sentence that stands there
    allowed = {"optim.lr", "student.patch_size", "student.arch", "dino.local_loss_weight_schedule"}
    sections = yaml.safe_load((TRAINING / name).read_text())
    assert sections
    for section, keys in sections.items():
        if section == "schedules":
            continue
        for key, value in keys.items():
            default = getattr(getattr(defaults, section), key)
            if f"{section}.{key}" not in allowed:
                assert value != default, f"{section}.{key} {value}"


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_the_schedule_of_a_recipe_is_the_recorded_one(name):
    row = GOLDEN[name]
    config = loaded(name)
    if name not in STUDENTS and name != DESCRIPTION:
        assert config.train.batch_size_per_gpu == row["batch_size_per_gpu"]
    config.train.batch_size_per_gpu = row["batch_size_per_gpu"]  # what a student gets in multi-distillation
    assert config.iterations == row["total_iterations"]
    assert (config.schedules is None) == (row["version"] == "v1")
    schedules = build_schedules(config, row["world_size"])
    assert row["rows"]
    for expected in row["rows"]:
        values = schedules.at(expected["iteration"])
        for field in ("lr", "last_layer_lr", "weight_decay", "momentum", "teacher_temp"):
            assert getattr(values, field) == pytest.approx(expected[field], rel=1e-9, abs=1e-15), (field, expected)


def test_the_gram_stage_switches_both_weights_on_at_a_million():
    schedules = build_schedules(loaded("dinov3_vit7b16_gram_anchor.yaml"), 256)
    before, after = schedules.at(999_999), schedules.at(1_001_000)
    assert (before.gram_loss_weight, before.local_loss_weight) == (0.0, 1.0)
    assert (after.gram_loss_weight, after.local_loss_weight) == (2.0, 0.5)


@pytest.mark.parametrize("name", [n for n in LETTERS if n.startswith("multi_")])
def test_every_process_of_a_multi_distillation_finds_its_student(name):
    config = loaded(name)
    for student in config.multidistillation.students:
        for rank in range(*student.ranks_range):
            who, own, _ = load_student(config, rank, 8, name, overrides(name))
            assert who.name == student.name
            assert own.student.arch.endswith({"vits": "small", "vitb": "base"}.get(who.name, who.name))
            assert own.train.output_dir.endswith(who.name)
