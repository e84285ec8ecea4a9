"""The configuration: what wins, what is refused, and whether a person can tell why."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from dinov3.config import loading
from dinov3.config.loading import dump, find_file, load
from dinov3.config.train import (
    Resolution,
    StudentConfig,
    TrainConfig,
    check_scale,
    load_config,
    load_model_config,
    load_student,
    load_teacher,
    resolutions,
    vit_config,
)
from dinov3.errors import DinoError
from dinov3.models.architectures import PUBLISHED, ConvNeXtConfig, ViTConfig
from dinov3.weights import catalog

IMAGES = "train.dataset_path=/images"


def yaml(folder: Path, text: str, name: str = "recipe.yaml") -> Path:
    (folder / name).write_text(text)
    return folder / name


def mistakes(*overrides: str, file: Path | None = None, data: str = IMAGES) -> list[str]:
    with pytest.raises(DinoError) as caught:
        load_config(file, [*([data] if data else []), *overrides])
    return [line.strip() for line in str(caught.value).splitlines()[1:]]


def test_the_command_line_wins_over_the_file_and_the_file_over_the_defaults(tmp_path):
    file = yaml(tmp_path, "optim: {lr: 2.0e-4, epochs: 11}\ntrain: {dataset_path: /a}\n")
    config, notes = load_config(file, ["optim.lr=3e-4"])
    assert (config.optim.lr, config.optim.epochs, config.optim.clip_grad) == (3e-4, 11, 3.0)
    assert notes == ["teacher.warmup_teacher_temp_epochs 30 is longer than the run: the temperature never arrives"]


def test_the_forms_of_values_in_public_commands_are_understood():
    config, _ = load_config(
        None,
        shlex.split(
            "train.dataset_path=ImageNet22k:root=/d:extra=/e optim.lr=3e-4 "
            "crops.global_crops_size=[256,512] crops.local_crops_size=[96,112] "
            "crops.global_local_crop_pairs_ratios=[0.25,0.75] gram.ckpt=null train.compile=false"
        ),
    )
    assert config.train.dataset_path == "ImageNet22k:root=/d:extra=/e"
    assert config.optim.lr == 3e-4
    assert config.gram.ckpt is None
    assert config.train.compile is False
    assert resolutions(config.crops) == [Resolution(256, 96, None, 0.25), Resolution(512, 112, None, 0.75)]


def test_all_mistakes_of_all_sources_are_reported_at_once_with_their_source(tmp_path):
    file = yaml(tmp_path, "optimm: {lr: 1}\ncrops: {local_crops_number: 0}\nstudent: {drop_path_rate: many}\n")
    lines = mistakes("gram.ckp=x", "optim.lr=abc", "train.num_worker=3", file=file)
    assert [line.split(":")[0] for line in lines] == [
        "optimm.lr (recipe.yaml)",
        "student.drop_path_rate (recipe.yaml)",
        "gram.ckp (command line)",
        "optim.lr (command line)",
        "train.num_worker (command line)",
        "crops.local_crops_number (recipe.yaml)",
    ]
    assert "did you mean 'gram.ckpt'" in lines[2]
    assert "expected a number or null, not 'abc'" in lines[3]
    assert "did you mean 'train.num_workers'" in lines[4]


def test_text_that_looks_like_yaml_stays_text_and_a_loose_reference_is_a_mistake():
    for path in ("{000..099}.tar", "/a: b # c", "{a,b}.tar", "[x]"):
        assert load_config(None, [f"train.dataset_path={path}"])[0].train.dataset_path == path
    assert load_config(None, ["train.dataset_path=/x", "run.note=${train.dataset_path}"])[0].run.note == "/x"
    with pytest.raises(DinoError, match="nowhere"):
        load_config(None, [IMAGES, "run.note=${nowhere.at}"])
    (line,) = mistakes("optim.lr={1")
    assert "expected a number or null, not '{1'" in line


@dataclass(frozen=True)
class Inner:
    a: int = 1


@dataclass(frozen=True)
class Middle:
    inner: Inner = field(default_factory=Inner)


@dataclass
class Outer:
    middle: Middle = field(default_factory=Middle)
    absent: Inner | None = None


def test_keys_of_a_frozen_section_are_set():
    outer, _ = load(Outer, None, ["middle.inner.a=2", "absent.a=3"])
    assert (outer.middle.inner.a, outer.absent.a) == (2, 3)


def test_a_key_in_the_wrong_section_is_found_where_it_belongs():
    (line,) = mistakes("train.layerwise_decay=0.9")
    assert "did you mean 'optim.layerwise_decay'" in line


def test_an_option_after_an_override_is_refused_instead_of_swallowed():
    lines = mistakes("optim.epochs=1", "--output-dir", "x")
    assert "--output-dir (command line): is an option" in lines[0]
    assert "key.sub=value" in lines[1]


@pytest.mark.parametrize(
    "override, expected",
    [
        ("crops.global_crops_size=225", "nearest: 224 or 240"),
        ("crops.global_crops_size=[224,448]", "lists of one length"),
        ("crops.global_local_crop_pairs_ratios=0.5", "must add up to 1"),
        ("crops.gram_teacher_crops_size=500", "nearest: 496 or 512"),
        ("crops.local_crops_size=8", "smaller than one patch"),
        ("crops.local_crops_scale=[0.4,0.1]", "two rising numbers"),
        ("crops.rgb_mean=[0.5]", "one number for each of 3 channels"),
        ("ibot.mask_ratio_min_max=[0.5,0.5]", "two rising numbers"),
        ("dino.koleo_topk=2", "need dino.koleo_loss_distributed=true"),
        ("optim.scaling_rule=sqrt_wrt_1025", "did you mean 'sqrt_wrt_1024'"),
        ("optim.warmup_epochs=101", "do not fit into optim.epochs 100"),
        ("optim.lr=null", "is null and there is no schedules section; give a number (default 0.001)"),
        ("student.arch=vit_smal", "did you mean 'vit_small'"),
        ("student.num_heads=7", "multiple of 4 × heads"),
        ("student.pos_embed_rope_min_period=2", "give either pos_embed_rope_base"),
        ("student.fp8_filter=(", ""),
        ("distillation.enabled=true", "teacher's"),
        ("multidistillation.enabled=true", "META_ARCHITECTURE"),
        ("evaluation.knn_train_dataset=/a", "needs both"),
        ("run.sinks=[tensorbord]", "did you mean 'tensorboard'"),
        ("optim.accumulation_steps=0", "above 0"),
        ("compute_precision.param_dtype=float32", "expected 'bf16' or 'fp16' or 'fp32'"),
        ("dino=3", "is a section with keys of its own"),
    ],
)
def test_every_condition_is_a_sentence_that_names_the_key(override, expected):
    if override.startswith("student.fp8_filter"):
        lines = mistakes(override, "student.fp8_enabled=true")
        assert "no regular expression" in lines[0]
        return
    lines = mistakes(override)
    assert any(expected in line for line in lines), lines
    assert lines[0].split(".")[0].split(" ")[0] == override.replace("=", ".").split(".")[0]


def test_fp8_names_the_width_that_does_not_fit_and_a_remedy():
    (line,) = mistakes(
        "student.fp8_enabled=true", "student.ffn_layer=swiglu", "student.arch=vit_giant2", "student.ffn_ratio=3.9"
    )
    assert "hidden width of the FFN is" in line
    assert "swiglu64" in line
    config, _ = load_config(None, [IMAGES, "student.fp8_enabled=true"])
    assert config.student.fp8_enabled


@pytest.mark.parametrize(
    "overrides, expected",
    [
        (["gram.use_loss=true"], "which Gram teacher?"),
        (["gram.use_loss=true", "gram.ckpt=ignore"], "place-holder"),
        (["gram.use_loss=true", "gram.ckpt=x", "gram.it_load_ema_teacher=5"], "not both"),
        (["gram.remove_neg=true", "gram.remove_only_teacher_neg=true"], "exclude each other"),
        (["gram.tokens_used=masked", "gram.img_level=true"], "gram.img_level=false"),
        (["gram.use_loss=true", "gram.ema_teacher=true"], "gram.rep_update=false"),
        (
            shlex.split(
                "gram.use_loss=true gram.ema_teacher=true gram.rep_update=false crops.gram_teacher_crops_size=448"
            ),
            "same crops",
        ),
    ],
)
def test_gram_options_that_contradict_each_other_are_refused(overrides, expected):
    (line,) = mistakes(*overrides)
    assert expected in line


def test_the_gram_teacher_may_be_taken_from_the_ema_teacher_at_an_iteration():
    config, _ = load_config(None, [IMAGES, "gram.use_loss=true", "gram.it_load_ema_teacher=100"])
    assert config.gram.it_load_ema_teacher == 100


def test_a_koleo_group_must_be_whole_processes_and_divide_the_batch():
    overrides = [IMAGES, "dino.koleo_loss_distributed=true", "train.batch_size_per_gpu=8"]
    config, _ = load_config(None, [*overrides, "dino.koleo_distributed_loss_group_size=16"])
    check_scale(config, 4)
    with pytest.raises(DinoError, match="24 images of a step on 3 processes"):
        check_scale(config, 3)
    (line,) = mistakes(*overrides[1:], "dino.koleo_distributed_loss_group_size=12")
    assert "whole processes" in line


# ---- data sets ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "ImageNet:root=/d:split=TRAIN",
        "Folder:root=/d",
        "/a/folder",
        "a.tar",
        "C:\\images",
        "s3://bucket/a",
        "p-{0..9}.tar",
    ],
)
def test_data_sets_and_paths_are_left_to_their_reader(path):
    config, _ = load_config(
        None,
        [f"train.dataset_path={path}", f"evaluation.knn_train_dataset={path}", f"evaluation.knn_val_dataset={path}"],
    )
    assert config.train.dataset_path == config.evaluation.knn_val_dataset == path


@pytest.mark.parametrize(
    "path, expected", [("", "name the images"), ("ImageNet:split=VAL:extra=/e", "add :root=/folder")]
)
def test_a_data_set_without_a_folder_is_an_error_before_anything_starts(path, expected):
    (line,) = mistakes(data=f"train.dataset_path={path}")
    assert expected in line


def test_the_default_data_set_without_a_root_is_an_error():
    (line,) = mistakes(data="")
    assert line.startswith("train.dataset_path (default): 'ImageNet:split=TRAIN' does not name the folder")


# ---- keys of the reference that do nothing --------------------------------------------------------------------------


def test_a_retired_key_is_a_note_at_its_neutral_value_and_refused_at_any_other(tmp_path):
    file = yaml(
        tmp_path,
        "train: {centering: sinkhorn_knopp}\nstudent: {block_chunks: 4}\noptim: {dump_fsdp_weights_path: ''}\n",
    )
    _, notes = load_config(file, [IMAGES])
    assert [n.split(" ")[0] for n in notes] == [
        "train.centering",
        "student.block_chunks",
        "optim.dump_fsdp_weights_path",
    ]
    (line,) = mistakes("train.centering=softmax")
    assert "only 'sinkhorn_knopp' is accepted" in line


def test_no_retired_key_is_also_a_key():
    assert not {k for k in loading.keys_of(TrainConfig) for pattern in TrainConfig.RETIRED if k == pattern}


def test_options_that_the_reference_overlooks_reach_the_model():
    overrides = ["student.ffn_ratio=6", "student.ffn_layer=swiglu", "student.pos_embed_rope_dtype=fp32"]
    config, notes = load_config(None, [IMAGES, *overrides])
    vit = vit_config(config.student)
    assert isinstance(vit, ViTConfig)
    assert (vit.ffn_ratio, vit.ffn_layer, vit.pos_embed_rope_dtype) == (6.0, "swiglu", "fp32")
    assert len(notes) == 2
    assert all("takes effect here" in note for note in notes)


# ---- two forms of schedules -----------------------------------------------------------------------------------------

V2 = """
schedules:
  lr: {start: 0, peak: 1.0e-3, end: 1.0e-6, warmup_epochs: 1, freeze_last_layer_epochs: 2}
  weight_decay: {start: 0.04, peak: 0.04, end: 0.04}
  momentum: {start: 0.99, peak: 0.99, end: 1}
  teacher_temp: {start: 0.04, peak: 0.07, end: 0.07, warmup_epochs: 3}
"""


def test_both_forms_of_schedules_load_and_the_unused_one_is_empty(tmp_path):
    v1, _ = load_config(None, [IMAGES])
    assert v1.schedules is None
    assert v1.optim.lr == 1e-3
    v2, notes = load_config(yaml(tmp_path, V2 + "optim: {lr: null}\nteacher: {teacher_temp: null}\n"), [IMAGES])
    assert v2.schedules is not None
    assert v2.schedules.lr.freeze_last_layer_epochs == 2
    assert (v2.optim.lr, v2.teacher.momentum_teacher) == (None, None)
    assert notes == []


def test_a_v1_key_typed_beside_v2_schedules_is_refused_and_the_right_key_named(tmp_path):
    (line,) = mistakes("optim.lr=3e-4", file=yaml(tmp_path, V2))
    assert "set schedules.lr.peak" in line
    _, notes = load_config(yaml(tmp_path, V2 + "optim: {lr: 3.0e-4}\n"), [IMAGES])
    assert notes == ["optim.lr (recipe.yaml): ignored, the schedules section is used"]


def test_half_a_schedule_is_refused_with_the_missing_keys(tmp_path):
    lines = mistakes("crops.local_crops_number=0", file=yaml(tmp_path, V2.replace("start: 0, ", "")))
    assert "schedules.lr.start (recipe.yaml): must be given" in lines
    assert any(line.startswith("crops.local_crops_number") for line in lines)


def test_a_schedule_longer_than_the_run_is_refused(tmp_path):
    (line,) = mistakes("optim.epochs=5", "schedules.lr.cosine_epochs=5", file=yaml(tmp_path, V2))
    assert "warmup_epochs 1 + cosine_epochs 5 is longer than optim.epochs 5" in line


# ---- writing, reading back ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["", V2, "crops: {global_crops_size: 64, local_crops_size: 32}\nstudent: {arch: dinov3_vit7b16}"]
)
def test_a_written_configuration_reads_back_equal_and_silently(tmp_path, text):
    config, first = load_config(yaml(tmp_path, text or "{}"), [IMAGES, "run.note=a: b # c"])
    dump(config, tmp_path / "resolved.yaml")
    again, notes = load_config(tmp_path / "resolved.yaml")
    assert again == config
    assert notes == first == []
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_the_error_of_a_missing_or_broken_file_lists_the_recipes(tmp_path):
    with pytest.raises(DinoError, match=r"did you mean 'toy_cpu.yaml'"):
        load_config("toy_cpux.yaml")
    with pytest.raises(DinoError, match="line 1"):
        load_config(yaml(tmp_path, "optim: {lr: 1\n"))
    with pytest.raises(DinoError, match="sections with keys"):
        load_config(yaml(tmp_path, "- 1\n"))


def test_a_recipe_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_file("dinov3/configs/train/toy_cpu.yaml") == find_file("toy_cpu.yaml")


def test_empty_sections_set_nothing(tmp_path):
    config, _ = load_config(yaml(tmp_path, "optim:\ncrops: {}\nschedules:\n"), [IMAGES])
    assert config.optim == TrainConfig().optim


def test_when_a_later_file_overrules_an_earlier_one_it_is_noted(tmp_path):
    first = yaml(tmp_path, "optim: {epochs: 50, clip_grad: 1}", "a.yaml")
    second = yaml(tmp_path, "optim: {epochs: 60, clip_grad: 1}", "b.yaml")
    config, notes = load_config([first, second], [IMAGES])
    assert config.optim.epochs == 60
    assert notes == ["optim.epochs: b.yaml sets 60 and wins over a.yaml (50)"]


# ---- models ---------------------------------------------------------------------------------------------------------


def test_published_names_describe_the_models_of_the_catalogue():
    seen = set()
    for row in catalog.ROWS:
        if row.dataset == "sat493m":
            continue
        config, _ = load_config(
            None,
            [
                IMAGES,
                f"student.arch={row.arch}",
                "student.drop_path_rate=0",
                "student.pos_embed_rope_dtype=fp32",
                *(["crops.teacher_to_student_resolution_scale=2"] if isinstance(row.config, ConvNeXtConfig) else []),
            ],
        )
        built, published = vit_config(config.student), row.config
        if isinstance(built, ConvNeXtConfig):
            assert isinstance(published, ConvNeXtConfig)
            assert (built.depths, built.dims) == (published.depths, published.dims)
        else:
            assert built == published, row.arch
        seen.add(row.arch)
    assert seen == set(PUBLISHED)


def test_what_is_written_wins_over_a_published_name(tmp_path):
    config, _ = load_config(
        yaml(tmp_path, "student: {n_storage_tokens: 0}"), [IMAGES, "student.arch=dinov3_vits16plus"]
    )
    assert (config.student.n_storage_tokens, config.student.ffn_ratio) == (0, 6.0)


def test_a_convnext_gets_its_drop_path_and_a_vit_may_be_cut_down():
    arch = ["student.arch=convnext_tiny", "student.drop_path_rate=0.2", "crops.teacher_to_student_resolution_scale=2"]
    convnext = vit_config(load_config(None, [IMAGES, *arch])[0].student)
    assert isinstance(convnext, ConvNeXtConfig)
    assert convnext.drop_path_rate == 0.2
    (line,) = mistakes("student.arch=convnext_tiny")
    assert "must be 32" in line
    vit = vit_config(StudentConfig(arch="vit_tiny", depth=2, embed_dim=32, num_heads=2))
    assert isinstance(vit, ViTConfig)
    assert (vit.embed_dim, vit.depth, vit.num_heads) == (32, 2, 2)


def test_a_file_that_only_describes_a_model_need_not_be_trainable(tmp_path):
    file = yaml(tmp_path, "student: {arch: vit_small}\ntrain: {dataset_path: null}\ngram: {use_loss: true}\n")
    config, _ = load_model_config(file)
    assert config.student.arch == "vit_small"
    with pytest.raises(DinoError, match=r"student\.arch"):
        load_model_config(file, ["student.arch=vit_smal"])


# ---- several students -----------------------------------------------------------------------------------------------

STUDENTS = """
MODEL: {META_ARCHITECTURE: MultiDistillationMetaArch}
distillation: {enabled: true, full_cfg_path: a.yaml, checkpoint_path: ignore}
multidistillation:
  enabled: true
  global_batch_size: 8
  students:
    - {name: a, config_path: x.yaml, ranks_range: [0, 1]}
    - {name: b, config_path: x.yaml, ranks_range: [RANGE]}
"""


@pytest.mark.parametrize(
    "ranks, expected",
    [("2, 4", "belong to no student"), ("0, 2", "belong to two"), ("1, 4", "does not divide"), ("1, 1", "none")],
)
def test_students_must_share_the_processes_without_gap_or_overlap(tmp_path, ranks, expected):
    (line,) = mistakes(file=yaml(tmp_path, STUDENTS.replace("RANGE", ranks)))
    assert expected in line


def test_a_student_has_its_own_file_under_the_shared_one(tmp_path):
    yaml(
        tmp_path,
        "student: {arch: vit_tiny}\noptim: {epochs: 3, warmup_epochs: 1}\nteacher: {warmup_teacher_temp_epochs: 1}\n",
        "x.yaml",
    )
    shared = yaml(tmp_path, STUDENTS.replace("RANGE", "1, 3") + "optim: {epochs: 4}\n")
    config, _ = load_config(
        shared, [IMAGES, "train.output_dir=/out", "optim.warmup_epochs=2", "teacher.warmup_teacher_temp_epochs=1"]
    )
    check_scale(config, 3)
    with pytest.raises(DinoError, match="ranks end at 3, but 4 processes run"):
        check_scale(config, 4)
    who, own, notes = load_student(config, 2, 3, shared, [IMAGES, "train.output_dir=/out"])
    assert who.name == "b"
    assert (own.student.arch, own.optim.epochs, own.train.batch_size_per_gpu) == ("vit_tiny", 4, 2)
    assert own.train.output_dir == str(Path("/out/b"))
    assert any("optim.epochs" in note for note in notes)


def test_the_teacher_must_have_the_prototypes_and_the_patch_of_the_student(tmp_path):
    yaml(tmp_path, "student: {arch: vit_base, patch_size: 8}\ndino: {head_n_prototypes: 7}\n", "teacher.yaml")
    distil = ["distillation.enabled=true", "distillation.full_cfg_path=teacher.yaml", "distillation.checkpoint_path=x"]
    config, _ = load_config(None, [IMAGES, *distil])
    with pytest.raises(DinoError) as caught:
        load_teacher(config, base_dir=tmp_path)
    assert "dino.head_n_prototypes: 65536 here, 7 in the teacher's teacher.yaml" in str(caught.value)
    assert "student.patch_size: 16 here, 8" in str(caught.value)
    same, _ = load_config(None, [IMAGES, *distil, "dino.head_n_prototypes=7", "student.patch_size=8"])
    assert load_teacher(same, base_dir=tmp_path).student.arch == "vit_base"


def test_gram_on_the_distilled_teachers_own_patches_is_allowed():
    distil = ["distillation.enabled=true", "distillation.full_cfg_path=teacher.yaml", "distillation.checkpoint_path=x"]
    config, _ = load_config(
        None, [IMAGES, *distil, "gram.use_loss=true", "gram.ema_teacher=true", "gram.rep_update=false"]
    )
    assert config.gram.ema_teacher


# ---- other activities -----------------------------------------------------------------------------------------------


@dataclass
class _Inner:
    k: int = 20
    names: list[str] = field(default_factory=list)


@dataclass
class _Activity:
    inner: _Inner = field(default_factory=_Inner)
    metric: str | None = None

    def problems(self):
        if self.inner.k < 1:
            yield "inner.k", "must be above 0"


def test_other_activities_load_their_own_dataclasses():
    config, notes = load(_Activity, None, ["inner.k=5", "inner.names=[a,b]"])
    assert config == _Activity(_Inner(5, ["a", "b"]))
    assert notes == []
    with pytest.raises(DinoError, match=r"inner.k \(command line\): must be above 0"):
        load(_Activity, None, ["inner.k=0"])
    with pytest.raises(DinoError, match="unknown key; did you mean 'metric'"):
        load(_Activity, None, ["metrik=1"])
