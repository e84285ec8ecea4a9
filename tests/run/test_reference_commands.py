"""Every command of the reference's README, through the launcher, with its outcome; and the keys that its files hold."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from dinov3.config.loading import load
from dinov3.config.train import check_scale, load_config
from dinov3.errors import DinoError
from dinov3.eval.arguments import read_arguments, split_arguments
from dinov3.eval.depth.run import DepthConfig
from dinov3.eval.knn import KnnConfig
from dinov3.eval.linear import LinearConfig
from dinov3.eval.log_regression import LogRegressionConfig
from dinov3.eval.segmentation.run import SegmentationConfig
from dinov3.eval.text.train_dinotxt import TextTrainConfig, text_config
from dinov3.run import submit
from dinov3.train.train import parser


def training(arguments: Sequence[str]) -> Any:
    options = parser().parse_intermixed_args(list(arguments))
    config, _ = load_config(options.config_file, options.overrides)
    check_scale(config, 1)
    config.train.output_dir = options.output_dir
    return config


def text_training(arguments: Sequence[str]) -> TextTrainConfig:
    split = split_arguments(arguments)
    return load(TextTrainConfig, split.file, split.overrides)[0]


def evaluation(cls: type[Any]) -> Callable[[Sequence[str]], Any]:
    return lambda arguments: read_arguments(cls, arguments)[0]


READERS: dict[str, Callable[[Sequence[str]], Any]] = {
    "dinov3/train/train.py": training,
    "dinov3/eval/knn.py": evaluation(KnnConfig),
    "dinov3/eval/log_regression.py": evaluation(LogRegressionConfig),
    "dinov3/eval/linear.py": evaluation(LinearConfig),
    "dinov3/eval/segmentation/run.py": evaluation(SegmentationConfig),
    "dinov3/eval/depth/run.py": evaluation(DepthConfig),
    "dinov3/eval/text/train_dinotxt.py": text_training,
}

TRAIN = "dinov3/train/train.py --nodes {nodes} --config-file dinov3/configs/train/{file} --output-dir OUT"
DATA = "train.dataset_path=ImageNet22k:root=R:extra=E"
STAGE = "gram.ckpt=G student.resume_from_teacher_chkpt=T"
IMAGENET = "ImageNet:split={}:root=R:extra=E"
MODEL = "model.config_file=OUT/config.yaml model.pretrained_weights=OUT/eval/training_9/teacher_checkpoint.pth output_dir=OUT"
SETS = f"train.dataset={IMAGENET.format('TRAIN')} eval.test_dataset={IMAGENET.format('VAL')}"
LINEAR_SETS = f"train.dataset={IMAGENET.format('TRAIN')} train.val_dataset={IMAGENET.format('VAL')}"

# (command behind `python -m dinov3.run.submit`, keys and their values, or a part of the sentence that ends it)
COMMANDS: list[tuple[str, dict[str, Any] | str]] = [
    # training
    (
        f"{TRAIN} {DATA}".format(nodes=1, file="vitl_im1k_lin834.yaml"),
        {"student.arch": "vit_large", "train.output_dir": "OUT"},
    ),
    (f"{TRAIN} {DATA}".format(nodes=4, file="vitl_im1k_lin834.yaml"), "4 nodes need a cluster"),
    (f"{TRAIN} {DATA}".format(nodes=1, file="dinov3_vit7b16_pretrain.yaml"), {"student.arch": "vit_7b"}),
    (f"{TRAIN} {DATA} gram.ckpt=G".format(nodes=1, file="dinov3_vit7b16_gram_anchor.yaml"), {"gram.ckpt": "G"}),
    (
        f"{TRAIN} {DATA} {STAGE}".format(nodes=1, file="dinov3_vit7b16_high_res_adapt.yaml"),
        "dino.koleo_loss_distributed=false",
    ),
    (
        f"{TRAIN} {DATA} {STAGE} dino.koleo_loss_distributed=false".format(
            nodes=1, file="dinov3_vit7b16_high_res_adapt.yaml"
        ),
        {"gram.ckpt": "G", "student.resume_from_teacher_chkpt": "T"},
    ),
    (
        f"{TRAIN} {DATA}".format(nodes=1, file="dinov3_vitl16_lvd1689m_distilled.yaml"),
        "their ranks end at 296, but 1 processes run",
    ),
    (
        f"{TRAIN} --multi-distillation {DATA}".format(nodes=1, file="multi_distillation_test.yaml"),
        "start 8 (--ngpus 8, also without a GPU), or give the students fewer ranks",
    ),
    # evaluation of a training run
    (f"dinov3/eval/knn.py {MODEL} {SETS}", {"model.config_file": "OUT/config.yaml", "output_dir": "OUT"}),
    (f"dinov3/eval/log_regression.py {MODEL} {SETS}", {"transform.resize_size": 224, "output_dir": "OUT"}),
    (f"dinov3/eval/linear.py {MODEL} {LINEAR_SETS}", {"train.epochs": 10, "output_dir": "OUT"}),
    # heads
    (
        "dinov3/eval/segmentation/run.py model.dino_hub=dinov3_vit7b16 "
        "config=dinov3/eval/segmentation/configs/config-ade20k-linear-training.yaml datasets.root=R --output-dir OUT",
        {"decoder_head.type": "linear", "optimizer.weight_decay": 1e-3, "output_dir": "OUT"},
    ),
    (
        "dinov3/eval/segmentation/run.py config=dinov3/eval/segmentation/configs/config-ade20k-m2f-inference.yaml "
        "datasets.root=R load_from=dinov3_vit7b16_ms --output-dir OUT",
        {"decoder_head.type": "m2f", "load_from": "dinov3_vit7b16_ms", "eval.use_tta": True},
    ),
    (
        "dinov3/eval/segmentation/run.py model.dino_hub=dinov3_vits16 datasets.root=R output_dir=null",
        "Mask2Former heads are scored here, not fitted: give load_from, or decoder_head.type=linear",
    ),
    (
        "dinov3/eval/depth/run.py model.dino_hub=dinov3_vit7b16 config=dinov3/eval/depth/configs/config-nyu.yaml "
        "datasets.root=R --output-dir OUT",
        {"scheduler.total_iter": 38400, "output_dir": "OUT"},
    ),
    (
        "dinov3/eval/depth/run.py config=dinov3/eval/depth/configs/config-nyu-synthmix-dpt-inference.yaml "
        "datasets.root=R load_from=dinov3_vit7b16_dd --output-dir OUT",
        {"load_from": "dinov3_vit7b16_dd"},
    ),
    # text
    (
        "dinov3/eval/text/train_dinotxt.py --nodes 1 trainer_config_file=dinov3/eval/text/configs/dinov3_vitl_text.yaml "
        "output-dir=OUT train_dataset_str=CocoCaptions:split=TRAIN:root=R",
        {"batch_size": 256, "output_dir": "OUT"},
    ),
]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the launcher would run on a machine without SLURM: [(configuration, what it announced)]."""
    found: list[Any] = []

    def call(script: str, function: str, arguments: Sequence[str]) -> int:
        assert Path(script).is_file()
        found.append(READERS[script](arguments))
        return 0

    monkeypatch.setattr(submit.shutil, "which", lambda name: None)
    monkeypatch.setattr(submit, "call", call)
    return found


@pytest.mark.parametrize(
    ("command", "outcome"), COMMANDS, ids=[f"{i} {c.split()[0]}" for i, (c, _) in enumerate(COMMANDS)]
)
def test_a_command_of_the_reference_has_the_recorded_outcome(
    command: str, outcome: dict[str, Any] | str, launched: list[Any], capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(Path(submit.PACKAGE).parent)
    status = submit.main(shlex.split(command))
    said = capsys.readouterr().err
    if isinstance(outcome, str):
        assert status == 1
        assert outcome in said
        return
    assert status == 0, said
    (config,) = launched
    for key, value in outcome.items():
        found = config
        for part in key.split("."):
            found = getattr(found, part)
        assert found == value, key
    assert "results go to OUT\n" in said  # where they do go


def test_keys_of_the_references_files_that_nothing_reads_are_accepted(tmp_path: Path) -> None:
    file = tmp_path / "train.yaml"
    file.write_text("student: {arch: vit_large, pos_embed_type: ropenew}\ntrain: {dataset_path: D}\n")
    config, notes = load_config(file)
    assert config.student.arch == "vit_large"
    assert any("pos_embed_type" in note for note in notes)
    file.write_text("student: {pos_embed_type: learnable}\n")
    with pytest.raises(DinoError, match="pos_embed_type"):
        load_config(file)

    file.write_text("output_dir: null\nscheduler: {constructor_kwargs: {warmup_iters: 1500, update_momentum: false}}\n")
    for cls in (SegmentationConfig, DepthConfig):
        read, _, _ = read_arguments(cls, [f"config={file}", "decoder_head.type=linear"])
        assert read.output_dir is None
        assert read.scheduler.constructor_kwargs["warmup_iters"] == 1500

    file.write_text("model_name: text_transformer\ncontext_length: 12\n")
    assert text_config(str(file)).context_length == 12
    file.write_text("modelname: x\n")
    with pytest.raises(DinoError, match="modelname"):
        text_config(str(file))


def test_results_of_a_configuration_without_a_folder_go_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dinov3.eval import session as common

    monkeypatch.chdir(tmp_path)
    assert common.main("knn", KnnConfig, lambda config, session: {"number": 1.0}, [
        "train.dataset=x", "eval.test_dataset=x", "output_dir=null", "model.device=cpu",
    ]) == 0  # fmt: skip
    assert (tmp_path / "results-knn.csv").is_file()
