"""The configuration of a training run: dataclasses, YAML on top, dotted overrides on top of that, all of it strict.

    config, notes = load_config("vits16_one_gpu.yaml", ["train.dataset_path=/images", "optim.lr=3e-4"])

Keys and defaults are those of the public training code, so its files load here. Three things differ. A key nobody reads
is refused, and every mistake of every source is reported at once, with its source and suggestions. A key that the
reference reads past (RETIRED) is accepted only at the value that changes nothing, and noted as ignored; four that it
reads past by oversight work here: `student.ffn_ratio`, `student.in_chans`, `student.pos_embed_rope_dtype`,
`optim.dino_head_wd_multiplier`, and so does `student.drop_path_rate` for ConvNeXt. Conditions that are bare asserts
there are sentences here. Keys of our own are marked "ours".

Left out: checking that paths exist (the reader of the path does that) and everything that needs the number of
processes, which is `check_scale`, called once that number is known.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from dinov3.config.bounds import Problem, setting, violations
from dinov3.config.loading import ANY, find_file, load, report
from dinov3.errors import DinoError
from dinov3.models.architectures import NAMES, PUBLISHED, BackboneConfig, ConvNeXtConfig, ViTConfig, size_of

MISSING: Any = "???"  # OmegaConf's mark for a value that must be given
SINKS = ("tensorboard", "wandb", "trackio")

# ---- the sections ---------------------------------------------------------------------------------------------------


@dataclass
class ModelConfig:
    META_ARCHITECTURE: Literal["SSLMetaArch", "MultiDistillationMetaArch"] = "SSLMetaArch"


@dataclass
class PrecisionConfig:
    param_dtype: Literal["bf16", "fp16", "fp32"] = "bf16"  # of compute and of the crops; parameters stay fp32
    reduce_dtype: Literal["bf16", "fp16", "fp32"] = "fp32"  # of the gradients' reduction over processes


@dataclass
class ScheduleConfig:
    """start → peak linearly over warmup_epochs, peak → end in a cosine over cosine_epochs (null: the rest), then end."""

    start: float = MISSING
    peak: float = MISSING
    end: float = MISSING
    warmup_epochs: float = 0
    cosine_epochs: float | None = None


@dataclass
class LearningRateConfig(ScheduleConfig):
    freeze_last_layer_epochs: float = 0
    # the backbone has learning rate 0 for so long, while the heads learn; then so many iterations of rising rates
    freeze_student_epochs: float = setting(0, at_least=0)
    freeze_student_iterations: int | None = setting(None, at_least=0)  # wins over the epochs
    backbone_warmup_after_freeze: int = setting(0, at_least=0)  # iterations


@dataclass
class SchedulesConfig:
    """The second form of schedules; where a configuration has it, the v1 keys in `optim` and `teacher` do nothing."""

    lr: LearningRateConfig = field(default_factory=LearningRateConfig)  # peak and end are scaled with the batch
    weight_decay: ScheduleConfig = field(default_factory=ScheduleConfig)
    momentum: ScheduleConfig = field(default_factory=ScheduleConfig)
    teacher_temp: ScheduleConfig = field(default_factory=ScheduleConfig)


@dataclass
class DinoConfig:
    loss_weight: float = 1.0
    global_ignore_diagonal: bool = True  # a global crop is not compared with itself
    head_n_prototypes: int = setting(65536, above=0)
    head_bottleneck_dim: int = setting(256, above=0)
    head_nlayers: int = setting(3, above=0)
    head_hidden_dim: int = setting(2048, above=0)
    koleo_loss_weight: float = 0.1
    koleo_loss_distributed: bool = False  # neighbours over several processes instead of this one's crops
    koleo_topk: int = setting(1, above=0)
    # images that are compared; null: the global batch
    koleo_distributed_loss_group_size: int | None = setting(None, above=0)
    # ours; above 0: SIGReg takes KoLeo's place (published: 0.05). KoLeo is then logged and not added, whatever its weight
    sigreg_loss_weight: float = setting(0.0, at_least=0)
    sigreg_on: Literal["bottleneck", "cls"] = "bottleneck"  # of the head (published), or the CLS tokens, as KoLeo
    reweight_dino_local_loss: bool = False
    local_loss_weight_schedule: ScheduleConfig = field(
        default_factory=lambda: ScheduleConfig(start=0.5, peak=0.5, end=0.5)
    )


@dataclass
class IbotConfig:
    loss_weight: float = 1.0  # at the masked patches
    # ours (iBOT++); above 0: the same loss at the visible patches of all global crops, with this weight, averaged within each
    # crop and then over crops. Targets of masked and visible patches are balanced together
    visible_loss_weight: float = setting(0.0, at_least=0)
    mask_sample_probability: float = setting(0.5, at_least=0, at_most=1)  # share of global crops that are masked at all
    mask_ratio_min_max: tuple[float, float] = setting((0.1, 0.5), at_least=0, at_most=1, rising=True)
    mask_random_circular_shift: bool = False
    head_n_prototypes: int = setting(65536, above=0)
    head_bottleneck_dim: int = setting(256, above=0)
    head_nlayers: int = setting(3, above=0)
    head_hidden_dim: int = setting(2048, above=0)


@dataclass
class GramConfig:
    """Gram anchoring (paper §4): the student's patch similarities follow those of an earlier teacher."""

    use_loss: bool = False
    compute_stats: bool = False
    loss_weight: float = 1.0
    loss_weight_schedule: ScheduleConfig | None = None
    ema_teacher: bool = False  # follow the EMA teacher itself; no separate network
    ckpt: str | None = None  # a teacher: a dump of an evaluation, a checkpoint, or published weights
    it_load_ema_teacher: int = -1  # load the Gram teacher from the EMA teacher before this iteration
    rep_update: bool = True  # refresh the Gram teacher from the EMA teacher
    update_frequency: int = setting(50000, above=0)
    it_first_update: int = 0
    max_updates: int | None = setting(None, at_least=0)
    normalized: bool = True
    img_level: bool = False  # one matrix per crop instead of one per batch
    remove_neg: bool = False
    remove_only_teacher_neg: bool = False
    tokens_used: Literal["all", "masked", "unmasked"] = "all"
    global_teacher_resize_method: Literal["bicubic", "bilinear"] = "bicubic"
    global_teacher_resize_antialias: bool = False


@dataclass
class LoopConfig:
    batch_size_per_gpu: int = setting(64, above=0)
    dataset_path: str | None = "ImageNet:split=TRAIN"  # Name:key=value:…, or (ours) a folder, tar or parquet source
    output_dir: str = "."  # set from --output-dir
    seed: int = 0  # of the samplers
    num_workers: int = setting(10, at_least=0)  # of each process, for all resolutions together
    OFFICIAL_EPOCH_LENGTH: int = setting(1250, above=0)  # iterations; the unit of every *_epochs
    checkpointing: bool = False  # activation checkpointing: recompute what is cheap …
    checkpointing_full: bool = False  # … or everything
    compile: bool = True
    cudagraphs: bool = False
    sharded_eval_checkpoint: bool = False
    cache_dataset: bool = False  # caches nothing, as in the reference: it chooses the sampler that shards the order


@dataclass
class StudentConfig:
    # a size of dinov3.models.architectures, or a published name such as dinov3_vits16plus
    arch: str = setting("vit_large", choices=NAMES)
    patch_size: int = setting(16, above=0)  # ConvNeXt: pseudo patch size
    drop_path_rate: float = setting(0.3, at_least=0, below=1)
    layerscale: float | None = 1e-5  # ViT only; a ConvNeXt block begins at 1e-6
    ffn_layer: Literal["mlp", "swiglu", "swiglu32", "swiglu64", "swiglu128"] = "mlp"
    ffn_ratio: float | None = setting(None, above=0)  # null: the arch's own. The reference sets 4.0 and ignores it
    in_chans: int = setting(3, above=0)
    resume_from_teacher_chkpt: str = ""  # first weights, heads included
    qkv_bias: bool = True
    proj_bias: bool = True
    ffn_bias: bool = True
    norm_layer: Literal["layernorm", "layernormbf16", "rmsnorm"] = "layernorm"
    n_storage_tokens: int = setting(0, at_least=0)  # the paper's register tokens
    mask_k_bias: bool = False
    untie_cls_and_patch_norms: bool = False
    untie_global_and_local_cls_norm: bool = False
    pos_embed_rope_base: float | None = 100.0
    pos_embed_rope_min_period: float | None = None
    pos_embed_rope_max_period: float | None = None
    pos_embed_rope_normalize_coords: Literal["separate", "min", "max"] = "separate"
    pos_embed_rope_shift_coords: float | None = None
    pos_embed_rope_jitter_coords: float | None = setting(None, at_least=1)
    pos_embed_rope_rescale_coords: float | None = setting(None, at_least=1)
    pos_embed_rope_dtype: Literal["bf16", "fp16", "fp32"] = "bf16"  # of the tables; bf16 is what the reference trains
    fp8_enabled: bool = False
    fp8_filter: str = "blocks"  # a regular expression over module paths
    embed_dim: int | None = setting(None, above=0)  # these three are ours, for toys: null is the arch's own
    depth: int | None = setting(None, above=0)
    num_heads: int | None = setting(None, above=0)


@dataclass
class TeacherConfig:
    """What the teacher averages, and its v1 schedules."""

    # ours. "heads": the teacher's backbone is the student's (no gradient, masks or drop path), only the heads are averaged
    ema: Literal["all", "heads"] = "all"
    momentum_teacher: float | None = setting(0.992, at_least=0, at_most=1)
    final_momentum_teacher: float | None = setting(1.0, at_least=0, at_most=1)
    warmup_teacher_temp: float | None = setting(0.04, above=0)
    teacher_temp: float | None = setting(0.07, above=0)
    warmup_teacher_temp_epochs: float | None = 30


@dataclass
class DistillationConfig:
    enabled: bool = False
    full_cfg_path: str = ""  # the teacher's configuration
    checkpoint_path: str = ""  # its weights; `ignore`: random ones, for tests


@dataclass
class DistilledStudent:
    name: str = MISSING  # its folder inside the output folder
    config_path: str = MISSING
    ranks_range: tuple[int, int] = MISSING  # [first, end)


@dataclass
class MultiDistillationConfig:
    enabled: bool = False
    global_batch_size: int | None = None
    students: list[DistilledStudent] = field(default_factory=list)


@dataclass
class TargetRange:
    output_min: float = 0.0
    output_max: float = 1.0


@dataclass
class GuideConfig:
    """One guide: a head on the student's CLS token that predicts a column of `guide.metadata`."""

    name: str = MISSING  # the column
    enabled: bool = True
    # ridge is ours: linear regression in closed form, for what is forgotten
    method: Literal["classification", "regression", "prototypical", "ridge"] = "classification"
    # gradient reversal: the backbone forgets the column; the weight is then a tenth (but of ridge)
    grl: bool = False
    loss_weight: float = setting(1.0, at_least=0)
    n_outputs: int | None = setting(None, above=0)  # null: as many as the column has values
    hidden_dim: int | None = setting(None, above=0)  # null: a linear layer
    dropout: float = setting(0.0, at_least=0, below=1)  # before the last layer
    use_bce: bool = False  # classification: several values a cell, separated by "|", each yes or no
    output_activation: Literal["none", "sigmoid", "tanh"] = "none"  # regression
    target_normalization: TargetRange = field(
        default_factory=TargetRange
    )  # regression: the column's range becomes this
    proto_temperature: float = setting(0.07, above=0)  # these three: prototypical
    proto_centroid_momentum: float = setting(0.999, at_least=0, below=1)
    proto_phi_min: float = setting(0.01, above=0)
    ridge_features: int = setting(128, at_least=0)  # these three: ridge; random Fourier features beside the tokens
    ridge_strength: float = setting(0.01, above=0)  # of the penalty, by the features' mean variance
    ridge_momentum: float = setting(0.97, at_least=0, below=1)  # of the covariances, a batch


@dataclass
class LambdaConfig:
    """λ, the scale of guides' gradients: from 0 to 1 over the warm-up."""

    type: Literal["sigmoid", "linear", "constant"] = "sigmoid"
    warmup_iterations: int = setting(10000, at_least=0)


@dataclass
class MetadataConfig:
    """Metadata-guided training (arXiv 2606.05107)."""

    enabled: bool = False
    metadata: str | None = None  # ours: a CSV or Parquet file with a column `path`
    guides: list[GuideConfig] = field(default_factory=list)
    lambda_schedule: LambdaConfig = field(default_factory=LambdaConfig)


@dataclass
class OptimConfig:
    epochs: int = setting(100, above=0)
    # ours: in all, every *_epochs stretched; null: epochs × OFFICIAL_EPOCH_LENGTH
    iterations: int | None = setting(None, above=0)
    weight_decay: float | None = 0.04  # this and the next six: v1 schedules
    weight_decay_end: float | None = 0.4
    lr: float | None = 0.001  # before scaling with the batch
    warmup_epochs: float | None = 10
    min_lr: float | None = 1e-6
    schedule_trunc_extra: float | None = 0.0
    freeze_last_layer_epochs: float | None = 1
    clip_grad: float | None = setting(3.0, at_least=0)  # 0 or null: no clipping
    scaling_rule: Literal["sqrt_wrt_1024", "linear_wrt_256", "none"] | None = "sqrt_wrt_1024"
    patch_embed_lr_mult: float = 0.2
    layerwise_decay: float = setting(0.9, above=0)
    dino_head_wd_multiplier: float = 1.0
    multi_tensor_optim: bool = True
    # ours: "muon" moves the matrices of the backbone's blocks by Muon, all else by AdamW
    optimizer: Literal["adamw", "muon"] = "adamw"
    adamw_beta1: float = setting(0.9, at_least=0, below=1)
    adamw_beta2: float = setting(0.999, at_least=0, below=1)
    # every guide's gradient at the CLS tokens is brought to this norm before its weight multiplies; null: it stays as it is
    grad_norm_normalization: float | None = setting(None, above=0)
    # ours: batches whose gradients are added before a step; counted in the global batch
    accumulation_steps: int = setting(1, above=0)


@dataclass
class CropsConfig:
    global_crops_scale: tuple[float, float] = setting((0.32, 1.0), above=0, at_most=1, rising=True)
    local_crops_scale: tuple[float, float] = setting((0.05, 0.32), above=0, at_most=1, rising=True)
    local_crops_number: int = setting(8, above=0)
    global_crops_size: int | list[int] = 224  # a list: several resolutions, one drawn for each iteration
    local_crops_size: int | list[int] = 96
    global_local_crop_pairs_ratios: float | list[float] = 1.0
    gram_teacher_crops_size: int | list[int] | None = None
    localcrops_subset_of_globalcrops: bool = False
    share_color_jitter: bool = False
    gram_teacher_no_distortions: bool = False
    horizontal_flips: bool = True
    rgb_mean: list[float] = setting([0.485, 0.456, 0.406])
    rgb_std: list[float] = setting([0.229, 0.224, 0.225], above=0)
    # the teacher sees its crops smaller by this factor
    teacher_to_student_resolution_scale: float = setting(1.0, above=0)
    # ours; multiplies the ranges of brightness, contrast, saturation and hue (0.4, 0.4, 0.2, 0.1); 0: no jitter
    color_jitter_strength: float = setting(1.0, at_least=0, at_most=2.5)
    # Ours. "paper": blur with probability 1, 0.1, 0.5 (global 1, global 2, local). "applied": 0, 0.9, 0.5, which is
    # what the published training code does by an inversion, and so what the published models were trained with.
    blur_probabilities: Literal["applied", "paper"] = "applied"
    # ours; in pixels of the crop, made for 224
    blur_sigma: tuple[float, float] = setting((0.1, 2.0), above=0, rising=True)


@dataclass
class EvaluationConfig:
    eval_period_iterations: int = 12500  # write the EMA teacher; ≤ 0: never
    # Ours: k-NN while training, on the EMA teacher. Off unless both data sets are named.
    knn_train_dataset: str | None = None
    knn_val_dataset: str | None = None
    knn_period_iterations: int | None = setting(None, above=0)  # null: at every eval_period_iterations
    knn_k: int = setting(20, above=0)
    knn_temperature: float = setting(0.07, above=0)
    knn_image_size: int = setting(224, above=0)
    knn_batch_size: int = setting(64, above=0)
    knn_max_images: int | None = setting(50_000, above=0)  # at most that many of each data set, of all classes
    # ours: training images that `train.doctor` measures at every dump; null: as many as cost 2 % of the run; 0: it is off
    doctor_images: int | None = setting(None, at_least=0)
    doctor_draws: bool = True  # ours: and draws crops and PCA of three images, where it measures


@dataclass
class GuardConfig:
    """Ours: a run that must not fall below its start, measured whenever its teacher is written (`train.guard`)."""

    enabled: bool = False
    knn_points: float = setting(1.0, at_least=0)  # how far k-NN accuracy may be below the start's, if it is measured
    # without labels: how far RankMe, and the correlation of patch similarities, may be below the start's, in per cent
    rank_percent: float = setting(10.0, at_least=0, at_most=100)
    structure_percent: float = setting(2.0, at_least=0, at_most=100)
    images: int = setting(512, at_least=2)  # of the training images, for these two
    lr_factor: float = setting(0.3, above=0, below=1)  # on all learning rates, after each return to the last good state
    max_reverts: int = setting(3, at_least=0)  # returns; the next fall ends the run with the last good state


@dataclass
class CheckpointingConfig:
    period: int = setting(3750, above=0)
    max_to_keep: int = setting(3, above=0)
    keep_every: int = setting(99999999999999999, above=0)  # these are never deleted


@dataclass
class DataConfig:
    """Ours: what happens between the disk and the crops."""

    unreadable: Literal["skip", "stop"] = "skip"  # an image that cannot be read: take the next one, or stop the run
    max_unreadable: int = setting(1000, above=0)  # with "skip": so many, and the data is the problem
    prefetch_factor: int = setting(2, above=0)  # batches each worker keeps ready


@dataclass
class RunConfig:
    """Ours: where and how the loop runs, none of which is to change what is learned."""

    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    deterministic: bool = False  # same numbers twice on the same machine, at the price of speed
    time_limit_minutes: float | None = setting(None, above=0)  # then a checkpoint, and a clean end
    collective_timeout_minutes: float = setting(10, above=0)  # how long a process waits for the slowest (NCCL, gloo)
    log_every: int = setting(10, above=0)  # iterations between two log lines
    # the processes that share one copy of weights and optimiser state; with "none" each has its own
    shard_over: Literal["all", "machine", "none"] = "all"
    sinks: list[str] = setting([], choices=SINKS)  # beside metrics.jsonl
    note: str = ""  # free text, written to resolved.yaml


V1_KEYS = (
    *(f"optim.{k}" for k in ("weight_decay", "weight_decay_end", "lr", "warmup_epochs", "min_lr")),
    *(f"optim.{k}" for k in ("schedule_trunc_extra", "freeze_last_layer_epochs")),
    *(f"teacher.{f.name}" for f in fields(TeacherConfig) if f.name != "ema"),
)
V1_TO_V2 = {
    "optim.lr": "schedules.lr.peak",
    "optim.min_lr": "schedules.lr.end",
    "optim.warmup_epochs": "schedules.lr.warmup_epochs",
    "optim.freeze_last_layer_epochs": "schedules.lr.freeze_last_layer_epochs",
    "optim.weight_decay": "schedules.weight_decay.peak",
    "optim.weight_decay_end": "schedules.weight_decay.end",
    "optim.schedule_trunc_extra": "schedules.lr.cosine_epochs",
    "teacher.momentum_teacher": "schedules.momentum.peak",
    "teacher.final_momentum_teacher": "schedules.momentum.end",
    "teacher.teacher_temp": "schedules.teacher_temp.peak",
    "teacher.warmup_teacher_temp": "schedules.teacher_temp.start",
    "teacher.warmup_teacher_temp_epochs": "schedules.teacher_temp.warmup_epochs",
}

_NEVER = "never read by the public training code"
_STUDENT_LEFTOVERS = [
    "patch_drop",
    "block_chunks",
    "drop_path_uniform",
    "drop_path_shape",
    "sin_cos_embeddings",
    "fourier_*",
    "multiple_pos_embeddings",
    "cls_pos_embedding",
    "reg_pos_embedding",
    "mask_attention",
    "mask_register_attention",
    "interpolate_*",
    "init_std_*",
    "rescale_weights_by_layer_id",
    "pos_embed_grid_size",
    "pos_embed_rope_gamma",
    "pos_embed_rope_init_multi_frequencies",
]


@dataclass
class TrainConfig:
    MODEL: ModelConfig = field(default_factory=ModelConfig)
    compute_precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    dino: DinoConfig = field(default_factory=DinoConfig)
    ibot: IbotConfig = field(default_factory=IbotConfig)
    gram: GramConfig = field(default_factory=GramConfig)
    train: LoopConfig = field(default_factory=LoopConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    multidistillation: MultiDistillationConfig = field(default_factory=MultiDistillationConfig)
    guide: MetadataConfig = field(default_factory=MetadataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedules: SchedulesConfig | None = None
    crops: CropsConfig = field(default_factory=CropsConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    checkpointing: CheckpointingConfig = field(default_factory=CheckpointingConfig)
    data: DataConfig = field(default_factory=DataConfig)
    run: RunConfig = field(default_factory=RunConfig)

    # Keys of the reference that change nothing there: (the only value accepted, why).
    RETIRED: ClassVar[Mapping[str, tuple[Any, str]]] = {
        "MODEL.DEVICE": ("cuda", f"{_NEVER}; the device is run.device"),
        "MODEL.DTYPE": ("float32", f"{_NEVER}; parameters are float32, compute is compute_precision.param_dtype"),
        "MODEL.WEIGHTS": (
            "",
            "only read on a path that never worked; first weights: student.resume_from_teacher_chkpt",
        ),
        "compute_precision.sharding_strategy": (
            "SHARD_GRAD_OP",
            "the reference shards over all processes whatever the value; see run.shard_over",
        ),
        "dino.head_norm_last_layer": (False, "the last layer has no weight normalisation"),
        "dino.force_weight_norm": (False, "the last layer has no weight normalisation"),
        "dino.koleo_distributed_replicas": (0, "replicas do not exist"),
        "dino.koleo_distributed_loss_group_data": (True, _NEVER),
        "ibot.head_norm_last_layer": (False, "the last layer has no weight normalisation"),
        "ibot.force_masking_even_with_zero_weight": (False, _NEVER),
        "ibot.separate_head": (True, "DINO and iBOT always have separate heads"),
        "train.centering": ("sinkhorn_knopp", "Sinkhorn-Knopp is the only form"),
        "train.data_config": (None, _NEVER),
        "train.saveckp_freq": (20, f"{_NEVER}; see checkpointing.period"),
        "train.monitor_gradient_norm": (False, f"{_NEVER}; gradient norms are always logged"),
        "train.chunk_schedule": ([], _NEVER),
        "train.use_teacher_head": (True, _NEVER),
        "train.learn_from_teacher_tokens": (False, _NEVER),
        "train.cell_augmentation*": (ANY, _NEVER),
        "student.pretrained_weights": ("", f"{_NEVER}; first weights: student.resume_from_teacher_chkpt"),
        "student.pos_embed_type": (("rope", "ropenew"), "positions are rotary"),
        **{f"student.{name}": (ANY, _NEVER) for name in _STUDENT_LEFTOVERS},
        "teacher.in_chans": (3, f"{_NEVER}; see student.in_chans"),
        "hrft.enabled": (False, f"{_NEVER}; several resolutions are lists in crops"),
        "hrft.*": (ANY, _NEVER),
        "optim.dump_fsdp_weights_path": ("", _NEVER),
        "evaluation.low_freq_every": (5, _NEVER),
        "evaluation.config_files.*": (ANY, "no evaluation job is started by training"),
        "evaluation.config_files": (ANY, "no evaluation job is started by training"),
        "coding_rate_loss.*": (ANY, _NEVER),
    }

    SUPERSEDED: ClassVar[tuple[str, Mapping[str, str]]] = ("schedules", V1_TO_V2)

    @property
    def iterations(self) -> int:
        return self.optim.iterations or self.optim.epochs * self.train.OFFICIAL_EPOCH_LENGTH

    @classmethod
    def implied(cls, written: Mapping[str, Any]) -> dict[str, Any]:
        """Defaults that follow from what was written: a published architecture brings its options."""
        arch = written.get("student.arch")
        return {f"student.{k}": v for k, v in PUBLISHED[arch][1].items()} if arch in PUBLISHED else {}

    def problems(self) -> Iterator[Problem]:
        """Conditions between fields."""
        yield from _loop_problems(self)
        yield from student_problems(self.student)
        yield from _crop_problems(self)
        yield from _loss_problems(self)
        yield from _schedule_problems(self)
        yield from _distillation_problems(self)
        yield from _guide_problems(self)

    def remarks(self) -> Iterator[str]:
        """Notes on what is allowed but probably not intended."""
        s, optim = self.student, self.optim
        size = size_of(s.arch) if s.arch in NAMES else None
        if isinstance(size, ViTConfig):
            own = PUBLISHED[s.arch][1].get("ffn_ratio") if s.arch in PUBLISHED else size.ffn_ratio
            if s.ffn_ratio is not None and own is not None and s.ffn_ratio != own:
                yield f"student.ffn_ratio {s.ffn_ratio:g} takes effect here (the reference would use {own:g})"
            if s.pos_embed_rope_dtype != "bf16":
                yield f"student.pos_embed_rope_dtype {s.pos_embed_rope_dtype} takes effect here; the reference: bf16"
        if optim.dino_head_wd_multiplier != 1:
            yield f"optim.dino_head_wd_multiplier {optim.dino_head_wd_multiplier:g} takes effect here, not in the reference"
        warm = self.teacher.warmup_teacher_temp_epochs
        if self.schedules is None and warm is not None and warm > optim.epochs:
            yield f"teacher.warmup_teacher_temp_epochs {warm:g} is longer than the run: the temperature never arrives"
        if self.compute_precision.param_dtype == "fp16":
            yield "compute_precision.param_dtype fp16 runs without loss scaling: small gradients vanish; prefer bf16"
        if self.dino.koleo_loss_weight and not self.dino.koleo_loss_distributed and self.train.batch_size_per_gpu == 1:
            yield "dino.koleo: with one image per process a crop is its own neighbour and the loss a constant"
        if self.dino.sigreg_loss_weight and self.dino.koleo_loss_weight:
            yield "dino.koleo_loss_weight is not used: SIGReg (dino.sigreg_loss_weight) takes KoLeo's place"
        for size in as_list(self.crops.local_crops_size):
            if s.patch_size > 0 and size % s.patch_size:
                yield (
                    f"crops.local_crops_size {size} is no multiple of the patch size {s.patch_size}: "
                    f"{size % s.patch_size} px at the right and bottom of those crops are not seen"
                )
        if self.crops.gram_teacher_crops_size is not None and not self.gram.use_loss:
            yield "crops.gram_teacher_crops_size costs loading time and is not used: gram.use_loss is false"


# ---- crop sizes as rows ---------------------------------------------------------------------------------------------


def as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


@dataclass(frozen=True)
class Resolution:
    """Crop sizes in pixels that belong together, and how often they are drawn."""

    global_px: int
    local_px: int
    gram_px: int | None
    ratio: float


def resolutions(crops: CropsConfig) -> list[Resolution]:
    """The crop sizes as rows; one row when they are plain numbers."""
    columns = [as_list(crops.global_crops_size), as_list(crops.local_crops_size)]
    gram = as_list(crops.gram_teacher_crops_size)
    columns.append(gram * len(columns[0]) if gram == [None] else gram)
    columns.append(as_list(crops.global_local_crop_pairs_ratios))
    assert len({len(c) for c in columns}) == 1, columns
    return [Resolution(*row) for row in zip(*columns)]


# ---- the model a configuration describes ----------------------------------------------------------------------------


def vit_config(student: StudentConfig) -> BackboneConfig:
    """What `dinov3.models` builds for the `student` section."""
    s, size = student, size_of(student.arch)
    if isinstance(size, ConvNeXtConfig):
        return replace(size, in_chans=s.in_chans, drop_path_rate=s.drop_path_rate, patch_size=s.patch_size)
    shared = {f.name for f in fields(ViTConfig)} & {f.name for f in fields(StudentConfig)}
    given = {name: getattr(s, name) for name in shared}
    shape = ("embed_dim", "depth", "num_heads", "ffn_ratio")  # null: the architecture's own
    given = {name: value for name, value in given.items() if value is not None or name not in shape}
    return replace(size, **given, layerscale_init=s.layerscale)


# ---- conditions between fields: (key, sentence) of each that does not hold --------------------------------------------


def dataset_problem(path: str | None) -> str | None:
    """What can be checked of a dataset spec without its reader, or None: names and keys are checked by the reader."""
    if not path:
        return "name the images: a folder, or Name:key=value:…, such as ImageNet:split=TRAIN:root=/data/imagenet"
    if re.fullmatch(r"[A-Za-z]\w+(:\w+=[^:]*)+", path) and ":root=" not in path and not os.path.exists(path):
        return f"{path!r} does not name the folder of the files: add :root=/folder"
    return None


def _loop_problems(c: TrainConfig) -> Iterator[Problem]:
    if (wrong := dataset_problem(c.train.dataset_path)) is not None:
        yield "train.dataset_path", wrong
    e = c.evaluation
    if (e.knn_train_dataset is None) != (e.knn_val_dataset is None):
        yield "evaluation.knn_train_dataset", "k-NN needs both knn_train_dataset and knn_val_dataset, or neither"
    for name in ("knn_train_dataset", "knn_val_dataset"):
        path = getattr(e, name)
        if path is not None and (wrong := dataset_problem(path)) is not None:
            yield f"evaluation.{name}", wrong
    if c.guard.enabled and e.eval_period_iterations <= 0:
        yield "guard.enabled", "measures whenever a teacher is written: set evaluation.eval_period_iterations above 0"
    if c.guard.enabled and c.multidistillation.enabled:
        yield "guard.enabled", "must be false with several students: they step together"


def student_problems(s: StudentConfig) -> Iterator[Problem]:
    """Conditions on the model alone; also those of a configuration that only describes a model."""
    if s.arch not in NAMES:
        return  # an error of the field's choices
    if isinstance(size_of(s.arch), ConvNeXtConfig):
        for name in ("embed_dim", "depth", "num_heads"):
            if getattr(s, name) is not None:
                yield f"student.{name}", f"is for transformers; {s.arch} has its own stages"
        if s.fp8_enabled:
            yield "student.fp8_enabled", f"replaces the linear layers of transformer blocks; {s.arch} has none"
        return
    both = s.pos_embed_rope_min_period is not None and s.pos_embed_rope_max_period is not None
    either = s.pos_embed_rope_min_period is not None or s.pos_embed_rope_max_period is not None
    if (s.pos_embed_rope_base is None and not both) or (s.pos_embed_rope_base is not None and either):
        yield (
            "student.pos_embed_rope_base",
            "give either pos_embed_rope_base, or null and both pos_embed_rope_min_period and _max_period",
        )
    c = vit_config(s)
    assert isinstance(c, ViTConfig)
    if c.num_heads > 0 and c.embed_dim % (4 * c.num_heads):
        key = "student.num_heads" if s.num_heads else "student.embed_dim"
        yield key, f"width {c.embed_dim} must be a multiple of 4 × heads = {4 * c.num_heads} for rotary positions"
    if s.fp8_enabled:
        try:
            re.compile(s.fp8_filter)
        except re.error as error:
            yield "student.fp8_filter", f"{s.fp8_filter!r} is no regular expression: {error}"
        for what, dim in (("width", c.embed_dim), ("hidden width of the FFN", c.ffn_hidden)):
            if dim % 64:
                yield (
                    "student.fp8_enabled",
                    f"needs layers whose sides are multiples of 64; the {what} is {dim}"
                    + ("; student.ffn_layer=swiglu64 rounds it up" if "FFN" in what and c.ffn_layer != "mlp" else ""),
                )


def _crop_problems(c: TrainConfig) -> Iterator[Problem]:
    crops, patch = c.crops, c.student.patch_size
    for name in ("rgb_mean", "rgb_std"):
        if len(getattr(crops, name)) != c.student.in_chans:
            yield f"crops.{name}", f"needs one number for each of {c.student.in_chans} channels: {getattr(crops, name)}"
    scale = crops.teacher_to_student_resolution_scale
    names = ["global_crops_size", "local_crops_size", "global_local_crop_pairs_ratios"]
    names += ["gram_teacher_crops_size"] if crops.gram_teacher_crops_size is not None else []
    columns = {name: as_list(getattr(crops, name)) for name in names}
    if len({len(column) for column in columns.values()}) > 1:
        lengths = ", ".join(f"{name} {len(column)}" for name, column in columns.items())
        yield "crops.global_crops_size", f"several resolutions are lists of one length; here: {lengths}"
    if (
        abs(sum(columns["global_local_crop_pairs_ratios"]) - 1) > 1e-6
        or min(columns["global_local_crop_pairs_ratios"], default=0) < 0
    ):
        ratios = columns["global_local_crop_pairs_ratios"]
        yield "crops.global_local_crop_pairs_ratios", f"are probabilities and must add up to 1: {ratios}"
    # Masks are drawn on the grid of global crops, and Gram features are compared on it: no remainder there. The border
    # of a local crop may be lost, as in the published high-resolution recipe (168 px): that is a remark.
    for name, unit in (("global_crops_size", patch * scale), ("gram_teacher_crops_size", float(patch))):
        for size in columns.get(name, []):
            if size <= 0 or size % unit:
                at = f"{patch} px" + (f" × {scale:g}" if unit != patch else "")
                below = int(size // unit * unit)
                nearest = f"{below} or {int(below + unit)}" if below > 0 else f"{int(unit)}"
                yield f"crops.{name}", f"{size} is no multiple of the patch ({at}); nearest: {nearest}"
    for size in columns["local_crops_size"]:
        if size < patch:
            yield "crops.local_crops_size", f"{size} is smaller than one patch ({patch} px)"
    arch = c.student.arch
    if arch in NAMES and isinstance(size_of(arch), ConvNeXtConfig) and patch * scale != 32:
        yield (
            "crops.teacher_to_student_resolution_scale",
            f"a ConvNeXt has one token per 32 px, so student.patch_size × this must be 32, not {patch} × {scale:g}",
        )
    elif c.student.arch.startswith("vit_") and scale != 1 and not c.multidistillation.enabled:
        yield (
            "crops.teacher_to_student_resolution_scale",
            f"is for a student of another stride than the teacher's, a ConvNeXt; 1 for a ViT, not {scale:g}",
        )
    if crops.localcrops_subset_of_globalcrops:
        if crops.local_crops_number % 2:
            yield "crops.local_crops_number", "must be even with localcrops_subset_of_globalcrops: half of each crop"
        for g, n in zip(columns["global_crops_size"], columns["local_crops_size"]):
            if n >= g:
                yield "crops.local_crops_size", f"a window of {n} px does not fit into a global crop of {g} px"


def _loss_problems(c: TrainConfig) -> Iterator[Problem]:
    if c.ibot.mask_ratio_min_max[0] == c.ibot.mask_ratio_min_max[1]:
        yield "ibot.mask_ratio_min_max", "must be two rising numbers, not the same twice"
    dino, batch = c.dino, c.train.batch_size_per_gpu
    if not dino.koleo_loss_distributed and dino.koleo_topk != 1:
        yield "dino.koleo_topk", f"{dino.koleo_topk} neighbours need dino.koleo_loss_distributed=true; otherwise 1"
    group = dino.koleo_distributed_loss_group_size
    if dino.koleo_loss_distributed and group is not None:
        if group % batch:
            yield (
                "dino.koleo_distributed_loss_group_size",
                f"{group} images must be whole processes of train.batch_size_per_gpu {batch}: a multiple of it",
            )
        if dino.koleo_topk >= group:
            yield "dino.koleo_topk", f"{dino.koleo_topk} neighbours do not exist among {group} images"

    g = c.gram
    if g.remove_neg and g.remove_only_teacher_neg:
        yield "gram.remove_neg", "remove_neg and remove_only_teacher_neg exclude each other"
    if g.tokens_used != "all" and g.img_level:
        yield "gram.tokens_used", f"{g.tokens_used!r} differs in number per crop and needs gram.img_level=false"
    if not g.use_loss:
        return
    if g.ema_teacher:
        if g.ckpt is not None:
            yield "gram.ckpt", "gram.ema_teacher follows the EMA teacher; leave ckpt null, or ema_teacher false"
        if g.rep_update:
            yield "gram.rep_update", "the EMA teacher needs no refresh; set gram.rep_update=false with ema_teacher"
        if c.crops.gram_teacher_crops_size is not None:
            yield (
                "crops.gram_teacher_crops_size",
                "gram.ema_teacher sees the same crops as the student; leave this null",
            )
    elif g.ckpt == "ignore":
        yield (
            "gram.ckpt",
            "'ignore' is a place-holder: name the Gram teacher, e.g. gram.ckpt=/run/eval/training_199999",
        )
    elif not g.ckpt and g.it_load_ema_teacher < 0:
        yield (
            "gram.ckpt",
            "which Gram teacher? Name a file or folder here (the teacher of an earlier run), or set "
            "gram.it_load_ema_teacher=N to take the EMA teacher at iteration N, or gram.ema_teacher=true",
        )
    elif g.ckpt and g.it_load_ema_teacher >= 0:
        yield "gram.it_load_ema_teacher", "the Gram teacher comes from gram.ckpt or from the EMA teacher, not both"


def _schedule_problems(c: TrainConfig) -> Iterator[Problem]:
    total = c.optim.epochs
    v2: dict[str, ScheduleConfig] = {}
    if c.dino.reweight_dino_local_loss:
        v2["dino.local_loss_weight_schedule"] = c.dino.local_loss_weight_schedule
    if c.gram.loss_weight_schedule is not None:
        v2["gram.loss_weight_schedule"] = c.gram.loss_weight_schedule
    if c.schedules is not None:
        v2 |= {f"schedules.{f.name}": getattr(c.schedules, f.name) for f in fields(c.schedules)}
    else:
        for key in V1_KEYS:
            section, name = key.split(".")
            value = getattr(getattr(c, section), name)
            if value is None:
                yield key, f"is null and there is no schedules section; give a number (default {_default(key)})"
            elif "epochs" in name and value < 0:
                yield key, f"must be 0 or more, not {value:g}"
            elif name == "warmup_epochs" and value > total:
                yield key, f"{value:g} epochs do not fit into optim.epochs {total}"
    for key, s in v2.items():
        if s.warmup_epochs < 0 or (s.cosine_epochs or 0) < 0:
            yield key, "epochs must be 0 or more"
        elif s.warmup_epochs + (s.cosine_epochs or 0) > total:
            cosine = f" + cosine_epochs {s.cosine_epochs:g}" if s.cosine_epochs else ""
            yield key, f"warmup_epochs {s.warmup_epochs:g}{cosine} is longer than optim.epochs {total}"
    for key, name in (("schedules.teacher_temp", "teacher_temp"), ("schedules.momentum", "momentum")):
        if key in v2:
            values = [v2[key].start, v2[key].peak, v2[key].end]
            if name == "teacher_temp" and min(values) <= 0:
                yield key, f"temperatures must be above 0: {values}"
            if name == "momentum" and not all(0 <= v <= 1 for v in values):
                yield key, f"momenta must be from 0 to 1: {values}"


# options that only some methods of a guide have
GUIDE_OPTIONS = {
    "classification": ("use_bce", "hidden_dim", "dropout", "n_outputs"),
    "regression": ("output_activation", "target_normalization", "hidden_dim", "dropout"),
    "prototypical": ("proto_temperature", "proto_centroid_momentum", "proto_phi_min", "n_outputs"),
    "ridge": ("ridge_features", "ridge_strength", "ridge_momentum", "n_outputs"),
}


def _guide_problems(c: TrainConfig) -> Iterator[Problem]:
    g = c.guide
    if not g.enabled:
        if g.guides or g.metadata:
            yield (
                "guide.enabled",
                "is false, so guide.metadata and guide.guides would do nothing; set it or leave them out",
            )
        if c.optim.grad_norm_normalization is not None:
            yield "optim.grad_norm_normalization", "is of guides, and there are none (guide.enabled)"
        return
    if c.distillation.enabled:
        yield "guide.enabled", "is for self-distillation; with a frozen teacher (distillation.enabled) set it to false"
    if not g.metadata:
        yield "guide.metadata", "name the CSV or Parquet file with a column path and the guides' columns"
    if not any(guide.enabled for guide in g.guides):
        yield "guide.guides", "name at least one column: guide.guides=[{name: COLUMN}]"
    names = [guide.name for guide in g.guides if guide.enabled]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield "guide.guides", f"two guides have the column {name!r}; keep one"
    every = {name for options in GUIDE_OPTIONS.values() for name in options}
    for i, guide in enumerate(g.guides):
        yield from violations(guide, f"guide.guides[{i}].")
        default = GuideConfig(name=guide.name)
        for name in sorted(every.difference(GUIDE_OPTIONS.get(guide.method, every))):
            if getattr(guide, name) != getattr(default, name):
                yield f"guide.guides[{i}].{name}", f"has no meaning for the method {guide.method} ({guide.name!r})"
        if guide.target_normalization.output_min >= guide.target_normalization.output_max:
            yield f"guide.guides[{i}].target_normalization", "output_min must be below output_max"


def _default(key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(TrainConfig(), section), name)


def _distillation_problems(c: TrainConfig) -> Iterator[Problem]:
    d, m = c.distillation, c.multidistillation
    if d.enabled and c.teacher.ema == "heads":
        yield "teacher.ema", "heads has no meaning beside a frozen teacher (distillation.enabled); use all"
    if d.enabled:
        if not d.full_cfg_path:
            yield "distillation.full_cfg_path", "name the teacher's configuration, such as its run's resolved.yaml"
        if not d.checkpoint_path:
            yield "distillation.checkpoint_path", "name the teacher's weights ('ignore': random ones, for tests)"
    multi_student = c.MODEL.META_ARCHITECTURE == "MultiDistillationMetaArch"
    if multi_student != m.enabled:
        yield (
            "multidistillation.enabled",
            f"is {str(m.enabled).lower()}, but MODEL.META_ARCHITECTURE is {c.MODEL.META_ARCHITECTURE}",
        )
    if not m.enabled:
        return
    if not d.enabled:
        yield "distillation.enabled", "several students need a teacher: set it and its two paths"
    if c.gram.use_loss:
        yield "gram.use_loss", "must be false with several students"
    if c.dino.koleo_loss_distributed:
        yield "dino.koleo_loss_distributed", "would compare students of different width; use false"
    if not m.students:
        yield "multidistillation.students", "is empty"
        return
    G = m.global_batch_size
    if not G or G <= 0:
        yield "multidistillation.global_batch_size", f"must be above 0, not {G}"
        return
    if len({s.name for s in m.students}) < len(m.students):
        yield "multidistillation.students", f"two have one name: {', '.join(s.name for s in m.students)}"
    end = 0
    for s in sorted(m.students, key=lambda s: s.ranks_range):
        first, last = s.ranks_range
        if last <= first:
            yield "multidistillation.students", f"{s.name}: ranks [{first}, {last}) are none"
        elif first != end:
            what = "belong to no student" if first > end else "belong to two students"
            yield ("multidistillation.students", f"{s.name}: ranks begin at {first} where {end} is next; some {what}")
        elif G % (last - first):
            yield (
                "multidistillation.global_batch_size",
                f"{G} does not divide among the {last - first} processes of {s.name}",
            )
        end = max(end, last)


def check_scale(config: TrainConfig, world_size: int) -> None:
    """The conditions that need the number of processes (of this student); raises one DinoError with all of them."""
    wrong: list[str] = []
    c, batch = config, config.train.batch_size_per_gpu
    if c.dino.koleo_loss_distributed:
        group, everything = c.dino.koleo_distributed_loss_group_size or batch * world_size, batch * world_size
        if group % batch or everything % group:
            wrong.append(
                f"dino.koleo_distributed_loss_group_size: {group} images must be whole processes of {batch} and "
                f"divide the {everything} images of a step on {world_size} processes: start more, set a smaller group, or "
                "dino.koleo_loss_distributed=false"
            )
        if c.dino.koleo_topk >= group:
            wrong.append(f"dino.koleo_topk: {c.dino.koleo_topk} neighbours do not exist among {group} images")
    if c.multidistillation.enabled:
        ranks = max(s.ranks_range[1] for s in c.multidistillation.students)
        if ranks != world_size:
            wrong.append(
                f"multidistillation.students: their ranks end at {ranks}, but {world_size} processes run: "
                f"start {ranks} (--ngpus {ranks}, also without a GPU), or give the students fewer ranks (ranks_range) "
                "in a copy of the file"
            )
    if wrong:
        raise DinoError(report(wrong))


# ---- loading: defaults ← files ← command line -----------------------------------------------------------------------


# overrides beside `student.arch`: the model of that name, whatever sizes a recipe sets
SIZES_OF_THE_NAME = ["student.depth=null", "student.embed_dim=null", "student.num_heads=null"]


def load_config(
    file: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None, overrides: Sequence[str] = ()
) -> tuple[TrainConfig, list[str]]:
    """Defaults ← file(s), later ones winning ← `key.sub=value`; the configuration and notes worth printing.

    Raises one DinoError that lists every mistake of every source.
    """
    return load(TrainConfig, file, overrides)


def load_model_config(file: str | os.PathLike[str], overrides: Sequence[str] = ()) -> tuple[TrainConfig, list[str]]:
    """A training configuration that only describes a model: data, losses and schedules need not be sound."""
    return load(TrainConfig, file, overrides, check=lambda config: student_problems(config.student))


def load_student(
    config: TrainConfig, rank: int, world_size: int, file: str | os.PathLike[str], overrides: Sequence[str] = ()
) -> tuple[DistilledStudent, TrainConfig, list[str]]:
    """The student that `rank` trains and its own configuration, with several students (`config` is the shared one).

    Defaults ← student's file ← shared file ← command line: the shared file wins, as in the reference. Its
    folder is <output_dir>/<name>; the batch per process is global batch // processes, used for scaling the rate.
    """
    m = config.multidistillation
    for student in m.students:
        if student.ranks_range[0] <= rank < student.ranks_range[1]:
            break
    else:
        raise DinoError(f"multidistillation.students: no student has rank {rank}")
    assert m.global_batch_size is not None
    own = [
        f"train.output_dir={os.path.join(config.train.output_dir, student.name)}",
        f"train.batch_size_per_gpu={m.global_batch_size // world_size}",
    ]
    base_dir = find_file(file).parent
    files = [find_file(student.config_path, base_dir=base_dir), file]
    loaded, notes = load_config(files, [*overrides, *own])
    return student, loaded, notes


def load_teacher(config: TrainConfig, *, base_dir: Path | None = None) -> TrainConfig:
    """The configuration of the teacher one distils from; its prototypes and patch must be the student's.

    `base_dir` is the folder of the student's own configuration: the path may be relative to it.
    """
    path = find_file(config.distillation.full_cfg_path, base_dir=base_dir)
    teacher, _ = load_model_config(path)
    wrong = []
    for key in ("dino.head_n_prototypes", "ibot.head_n_prototypes", "student.patch_size"):
        section, name = key.split(".")
        ours, theirs = getattr(getattr(config, section), name), getattr(getattr(teacher, section), name)
        if ours != theirs:
            wrong.append(f"{key}: {ours} here, {theirs} in the teacher's {path.name}; they must be equal")
    if wrong:
        raise DinoError(report(wrong))
    return teacher
