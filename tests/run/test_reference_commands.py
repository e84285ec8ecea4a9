"""Every command of the reference's README, through the launcher, with its outcome; those that one machine can carry also
to their end, with a toy's sizes; and the keys that its files hold."""

from __future__ import annotations

import json
import shlex
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from paths import GOLDEN
from PIL import Image
from toy_dense import write_depths, write_scenes
from toy_training import PATTERNS, write_images

from dinov3.config.loading import load
from dinov3.config.train import check_scale, load_config
from dinov3.data.datasets import ImageNet, ImageNet22k
from dinov3.data.tokenizer import Tokenizer
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


# ---- to the end -----------------------------------------------------------------------------------------------------

SMALL = (
    "student.arch=vit_tiny student.embed_dim=64 student.depth=2 student.num_heads=2 student.patch_size=8 "
    "student.layerscale=0.1 dino.head_n_prototypes=32 dino.head_bottleneck_dim=16 dino.head_hidden_dim=32 "
    "ibot.head_n_prototypes=32 ibot.head_bottleneck_dim=16 ibot.head_hidden_dim=32 compute_precision.param_dtype=fp32 "
    "train.batch_size_per_gpu=4 train.num_workers=0 train.compile=false run.device=cpu crops.local_crops_number=2 "
)
CROPS = "crops.global_crops_size=32 crops.local_crops_size=16 crops.gram_teacher_crops_size=64"
SHORT = (  # of the recipes with `schedules`
    "student.fp8_enabled=false train.OFFICIAL_EPOCH_LENGTH=1 schedules.lr.warmup_epochs=1 "
    "schedules.lr.freeze_last_layer_epochs=0 schedules.teacher_temp.warmup_epochs=1 "
    "dino.local_loss_weight_schedule.warmup_epochs=1 evaluation.eval_period_iterations=2 "
)
FEATURES = "transform.resize_size=36 transform.crop_size=32 model.device=cpu"
HEAD = (
    "model.dino_hub=dinov3_vitt16 model.device=cpu num_workers=0 scheduler.total_iter=4 eval.eval_interval=4 "
    "scheduler.constructor_kwargs.warmup_iters=1"
)
FIRST, SECOND = (f"../stages/OUT/eval/training_{n}/teacher_checkpoint.pth" for n in (1, 5))

# (part of the command, the folder where it runs, what makes it small, a file that it leaves)
RUNS: list[tuple[str, str, str, str]] = [
    (
        "vitl_im1k_lin834", "one", f"{SMALL} {CROPS} train.OFFICIAL_EPOCH_LENGTH=2 optim.epochs=5 optim.warmup_epochs=1 "
        "teacher.warmup_teacher_temp_epochs=1 evaluation.eval_period_iterations=10",
        "eval/training_9/teacher_checkpoint.pth",
    ),
    ("dinov3/eval/knn.py", "one", FEATURES, "results-knn.csv"),
    ("dinov3/eval/log_regression.py", "one", f"{FEATURES} train.max_train_iters=20", "results-log-regression.csv"),
    (
        "dinov3/eval/linear.py", "one", f"{FEATURES} train.epochs=1 train.epoch_length=3 train.batch_size=4 "
        "train.n_last_blocks_list=[1] train.num_workers=0", "results-linear.csv",
    ),
    ("7b16_pretrain", "stages", f"{SMALL} {CROPS} {SHORT} optim.epochs=4", "eval/training_3/teacher_checkpoint.pth"),
    (  # resumes it
        "gram_anchor", "stages", f"{SMALL} {CROPS} {SHORT} optim.epochs=6 gram.ckpt={FIRST} gram.it_first_update=5 "
        "gram.update_frequency=1 gram.loss_weight_schedule.warmup_epochs=1", "eval/training_5/teacher_checkpoint.pth",
    ),
    (
        "high_res_adapt", "third", f"{SMALL} {SHORT} optim.epochs=2 "
        f"schedules.lr.warmup_epochs=0 schedules.lr.cosine_epochs=1 gram.ckpt={SECOND} "
        f"student.resume_from_teacher_chkpt={SECOND} crops.global_crops_size=[32,48,48,48,48] "
        "crops.local_crops_size=[16,16,24,24,32] crops.gram_teacher_crops_size=[48,64,64,64,64]",
        "eval/training_1/teacher_checkpoint.pth",
    ),
    (
        "ade20k-linear-training", "classes", f"{HEAD} transforms.train.img_size=64 transforms.train.crop_size=[64,64] "
        "transforms.eval.img_size=64 eval.crop_size=64 eval.stride=48", "results-semantic-segmentation.csv",
    ),
    ("config-nyu.yaml", "metres", HEAD, "results-depth.csv"),
    (
        "train_dinotxt", "text", "vision_backbone=dinov3_vitt16 text_backbone_config=../text.yaml embed_dim=384 "
        f"text_vocab_path_or_url={GOLDEN / 'tiny_bpe.txt.gz'} vision_model_train_img_size=32 vision_model_num_head_blocks=1 "
        "batch_size=4 max_iteration=3 warmup_length=1 eval_freq=3 checkpointing_period=3 workers=0 device=cpu",
        "head.safetensors",
    ),
]  # fmt: skip


def write_data(root: Path, extra: Path) -> None:
    """One folder that is ImageNet-1k, ImageNet-22k, ADE20K, NYU and COCO captions, with a dozen images of each."""
    images = write_images(root / "patterns")
    captions: dict[str, list[dict[str, Any]]] = {"images": [], "annotations": []}
    coco = root / "train2014" / "train2014", root / "annotations_trainval2014" / "annotations"
    for folder in coco:
        folder.mkdir(parents=True)
    for number, pattern in enumerate(PATTERNS):
        name = f"n{number:08}"
        for i in range(3):
            image = Image.open(images / pattern / f"{i}.png")
            k = 3 * number + i
            for place in (f"train/{name}/{name}_{i}.JPEG", f"val/{name}/ILSVRC2012_val_{k + 1:08}.JPEG"):
                (root / place).parent.mkdir(parents=True, exist_ok=True)
                image.save(root / place)
            image.save(coco[0] / f"{k}.jpg")
            captions["images"].append({"id": k, "file_name": f"{k}.jpg"})
            captions["annotations"].append({"image_id": k, "caption": f"a photo of {pattern}"})
        with tarfile.open(root / f"{name}.tar", "w") as tar:
            for file in sorted((root / "train" / name).iterdir()):
                tar.add(file, file.name)
    (coco[1] / "captions_train2014.json").write_text(json.dumps(captions))
    (root / "labels.txt").write_text("".join(f"n{i:08},{pattern}\n" for i, pattern in enumerate(PATTERNS)))
    for split in (ImageNet.Split.TRAIN, ImageNet.Split.VAL):
        ImageNet(split=split, root=root, extra=extra).dump_extra()
    ImageNet22k(root=root, extra=extra).dump_extra()
    write_scenes(root, {"training": 4, "validation": 2}, ade=True)
    for file in write_depths(root / "nyu", 4).iterdir():
        Image.open(file).resize((640, 480), Image.Resampling.NEAREST).save(file)
    for split in ("train", "test"):
        lines = (f"/nyu/{i:03}.color.png /nyu/{i:03}.depth.png 518.8\n" for i in range(4))
        (root / f"nyu_{split}.txt").write_text("".join(lines))


@pytest.mark.slow
def test_the_commands_of_one_machine_run_to_the_end_at_a_toys_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(submit.shutil, "which", lambda name: None)
    monkeypatch.setenv("DINOV3_CACHE", str(tmp_path / "cache"))
    write_data(tmp_path / "R", tmp_path / "E")
    vocabulary = Tokenizer.from_file(GOLDEN / "tiny_bpe.txt.gz").vocab_size
    sizes = {"context_length": 20, "vocab_size": vocabulary, "dim": 32, "num_heads": 2, "num_layers": 2}
    (tmp_path / "text.yaml").write_text(yaml.safe_dump(sizes))
    for part, where, small, left in RUNS:
        command = next(c for c, outcome in COMMANDS if part in c and not isinstance(outcome, str))
        folder = tmp_path / where
        folder.mkdir(exist_ok=True)
        monkeypatch.chdir(folder)
        for name in ("R", "E"):
            if not (folder / name).exists():
                (folder / name).symlink_to(tmp_path / name)
        assert not (folder / "OUT" / left).exists()
        status = submit.main(shlex.split(f"{command} {small}"))
        assert status == 0, f"{command}\n{capsys.readouterr().err}"
        assert (folder / "OUT" / left).is_file(), command


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
