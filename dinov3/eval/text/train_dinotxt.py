"""dino.txt: teaches a text tower, and two blocks over a frozen backbone, to meet (paper §5.3; arXiv 2412.16334).

    python dinov3/eval/text/train_dinotxt.py trainer_config_file=dinov3_vitl_text.yaml output_dir=OUT …
    python -m dinov3.run.submit dinov3/eval/text/train_dinotxt.py --nodes 4 --config-file … --output-dir OUT key=value …
    python -m dinov3.eval.text.train_dinotxt --output-dir OUT vision_backbone=dinov3_vits16 \\
        train_dataset_str=Captions:root=photos text_backbone_config=small.yaml text_vocab_path_or_url=bpe.txt.gz …

The keys are the reference's (its example recipe ships as configs/eval/dinov3_vitl_text.yaml) and a few of ours, at the end
of `TextTrainConfig`. The loop is `fit.fit`: batches are functions of (seed, step), so that a run that was killed
resumes exactly where it was, on one process or on many; each has its own share of every batch, negatives come
from all of them, and gradients are averaged over whole copies of the towers (no sharding: `use_fsdp` has no effect).
A loss that is not finite is left out on all processes together. What the reference lacks and this has: shuffling, an
`output_dir` that is honoured, an evaluation that runs (retrieval among held-out captions, zero-shot classes of a folder).

In the end OUT holds head.safetensors (everything but the backbone, Meta's key names: what the hub function takes as
`weights`) and clip_model_config.yaml (the sizes, for `dinov3.eval.text.zero_shot`).

Legend: B pairs a step and process, E shared width, n text positions.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3 import distributed, losses
from dinov3.config.bounds import setting
from dinov3.config.loading import ANY, find_file, load
from dinov3.data.crops import generator, random_crop
from dinov3.data.datasets import make_dataset
from dinov3.data.datasets.captions import Captioned
from dinov3.data.images import open_image
from dinov3.data.loading import Order
from dinov3.data.tokenizer import Tokenizer
from dinov3.data.transforms.inputs import normalised, to_pixels
from dinov3.errors import DinoError, ImageError
from dinov3.eval import session as common
from dinov3.eval.arguments import EvalConfig, ModelSection, help_text, split_arguments
from dinov3.eval.text import zero_shot
from dinov3.fit import FitConfig, FitReport, fit, head_tensors, seed_of
from dinov3.heads.dinotxt import LOGIT_SCALE, DinoTxt, DinoTxtConfig, TextConfig, class_vectors, text_features
from dinov3.hub import published_heads as hub
from dinov3.losses import LossTerms
from dinov3.models.vit import VisionTransformer
from dinov3.runlog import RunDir
from dinov3.weights.filling import fill
from dinov3.weights.writing import write_safetensors

AREA = (0.08, 1.0)  # of a training crop, as a share of the image
REPLACEMENTS = 8  # other pairs that are tried in place of one whose image cannot be read
HEAD_FILE, MODEL_FILE = "head.safetensors", "clip_model_config.yaml"
_NEVER = "has no effect in the reference"
_DEAD = (
    *("lr_scheduler_type", "use_full_ac", "param_dtype_str", "reduce_dtype_str", "dtype_str", "eval_only"),
    *("eval_pretrained_weights", "output_dict", "profiling", "init_logit_bias"),
)


@dataclass
class TextTrainConfig:
    """The reference's keys with its recipe's values; ours after the blank line."""

    train_dataset_str: str = setting("", required="CocoCaptions:root=…:split=TRAIN, or Captions:root=…")
    embed_dim: int = 2048
    vision_backbone_config: str | None = None
    vision_backbone_pretrained_weights: str | None = None
    vision_model_train_img_size: int = 224
    vision_model_use_class_token: bool = True
    vision_model_use_patch_tokens: bool = True
    vision_model_freeze_backbone: bool = True
    vision_model_num_head_blocks: int = 2
    vision_model_head_blocks_drop_path: float = 0.3
    vision_model_use_linear_projection: bool = False
    vision_model_patch_tokens_pooler_type: str = "mean"
    vision_model_patch_token_layer: int = 1
    vision_model_use_gram_loss: bool = False
    vision_model_gram_loss_weight: float = 1.0
    vision_model_patch_sampling_rate_for_gram_loss: float = setting(1.0, above=0, at_most=1)
    vision_model_normalize_patch_tokens_for_gram_loss: bool = True
    text_backbone_config: str | None = None
    text_backbone_pretrained_weights: str | None = None
    text_model_freeze_backbone: bool = False
    text_model_num_head_blocks: int = 0
    text_model_head_blocks_is_causal: bool = False
    text_model_head_blocks_drop_prob: float = 0.0
    text_model_tokens_pooler_type: str = "argmax"
    text_model_use_linear_projection: bool = True
    text_vocab_path_or_url: str | None = None
    init_logit_scale: float = LOGIT_SCALE
    freeze_logit_scale: bool = False
    lr: float = 7e-4
    weight_decay: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.99
    eps: float = 1e-8
    batch_size: int = setting(256, at_least=2)  # pairs of each process
    max_iteration: int = setting(50_000, at_least=1)
    warmup_length: int = 2000
    checkpointing_period: int = 500
    max_checkpoints_to_keep: int = 5
    eval_freq: int = 5000  # 0: at the end only
    seed: int = 11
    do_compile: bool = True  # on an accelerator
    use_fsdp: bool = True
    use_ac: bool = True  # recompute activations of the text tower in backward, on an accelerator
    no_resume: bool = False
    output_dir: str | None = "."

    vision_backbone: str | None = None  # any name `dinov3.load` takes, instead of a training configuration
    vision_backbone_weights: str | None = None
    # bfloat16 autocast on an accelerator, float32 on a CPU; or one of them by name
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    device: str = "auto"
    workers: int = 4  # threads that decode
    clip_grad: float | None = None
    log_every: int = 10
    val_dataset_str: str | None = None  # captions for retrieval; null: none
    val_max_images: int = 1000
    zero_shot_dataset_str: str | None = None  # a folder of class folders, whose names are the class names
    zero_shot_template: str = "a photo of a {}."

    RETIRED: ClassVar[Mapping[str, tuple[Any, str]]] = {
        **dict.fromkeys(_DEAD, (ANY, _NEVER)),
        "gc_freq": (ANY, "Python collects when it wants to"),
        "use_cuda_graphs": (False, "compiled blocks run without CUDA graphs here"),
        "dataset_use_cache": (False, "the order of the data is a function of the step, cached or not"),
    }

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.vision_backbone and (self.vision_backbone_config or self.vision_backbone_pretrained_weights):
            yield "vision_backbone", "excludes vision_backbone_config and vision_backbone_pretrained_weights"
        if not self.vision_model_freeze_backbone:
            yield "vision_model_freeze_backbone", "is always true, as in the reference: the backbone is not trained"
        if not 0 <= self.warmup_length <= self.max_iteration:
            yield "warmup_length", f"must be between 0 and max_iteration, not {self.warmup_length}"
        if self.eps != 1e-8:
            yield "eps", "is always 1e-8"
        if "{}" not in self.zero_shot_template:
            yield "zero_shot_template", "needs {} where the class goes"

    def remarks(self) -> Iterator[str]:
        if self.use_fsdp:
            yield "use_fsdp: towers are not sharded here; every process holds a copy, and gradients are averaged"


# ---- the model ------------------------------------------------------------------------------------------------------


def build(config: TextTrainConfig, device: torch.device) -> tuple[DinoTxt, Tokenizer]:
    """A frozen backbone with fresh towers over it (drawn from the seed), and the tokenizer of the vocabulary file."""
    section = ModelSection(
        config_file=config.vision_backbone_config,
        pretrained_weights=config.vision_backbone_pretrained_weights,
        name=config.vision_backbone,
        weights=config.vision_backbone_weights,
    )
    if wrong := [f"{key} {why}" for key, why in EvalConfig(model=section).problems()]:
        raise DinoError("; ".join(wrong).replace("model.config_file", "vision_backbone_config"))
    text = text_config(config.text_backbone_config)
    tokenizer = hub.vocabulary(config.text_vocab_path_or_url, text.vocab_size)
    backbone = common.open_model(section, "cpu", plain=True)
    if not isinstance(backbone, VisionTransformer):
        raise DinoError("dino.txt's vision blocks read the CLS token, registers and patches of a ViT; this is no ViT")
    joint = DinoTxtConfig.of(**{f.name: getattr(config, f.name) for f in fields(DinoTxtConfig)})
    torch.manual_seed(config.seed)
    model = hub.fresh(backbone, text, joint)
    if config.text_backbone_pretrained_weights:
        _load_text(model, config.text_backbone_pretrained_weights)
    return model.to(device), tokenizer


def text_config(file: str | None) -> TextConfig:
    """The text tower's sizes from a YAML of `TextConfig`'s keys; None: the released ones."""
    if file is None:
        return TextConfig()
    import yaml

    path = find_file(file)
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise DinoError(f"{file} must hold keys of a text tower ({', '.join(f.name for f in fields(TextConfig))})")
    return TextConfig.of(**content)


def _load_text(model: DinoTxt, source: str) -> None:
    from dinov3.weights import reading

    state, _ = reading.read(source)
    state = {k.removeprefix("text_model.").removeprefix("backbone."): v for k, v in state.items() if "head." not in k}
    backbone = model.text_model.backbone
    fill(backbone, state, what="the text tower", source=source, leftover=True)


# ---- pairs ----------------------------------------------------------------------------------------------------------


class Pairs(NamedTuple):
    """pixels uint8 [B, 3, s, s] · tokens int64 [B, n] · step."""

    pixels: Tensor
    tokens: Tensor
    step: int


class PairLoader:
    """The pairs of this process at any step: a random resized crop, mirrored by chance, a caption."""

    def __init__(self, config: TextTrainConfig, data: Captioned, tokenizer: Tokenizer, context: int) -> None:
        self.config, self.data, self.tokenizer, self.context = config, data, tokenizer, context
        self.order = Order(len(data), config.seed)
        self.rank, self.world = distributed.rank(), distributed.world()
        self.unreadable: dict[str, str] = {}

    def __call__(self, step: int) -> Pairs:
        B = self.config.batch_size
        first = (step * self.world + self.rank) * B
        epochs, indices = self.order.at(np.arange(first, first + B))
        drawn = [self._pair(first + i, int(e), int(k)) for i, (e, k) in enumerate(zip(epochs, indices))]
        tokens = self.tokenizer.tokenize([caption for _, caption in drawn], self.context, too_long="cut")
        return Pairs(torch.stack([pixels for pixels, _ in drawn]), tokens, step)

    def _pair(self, position: int, epoch: int, index: int) -> tuple[Tensor, str]:
        tried = index
        for attempt in range(REPLACEMENTS + 1):
            try:
                return self._pixels(epoch, tried, position), self.data.caption(
                    tried, seed=self.config.seed, epoch=epoch
                )
            except ImageError as error:
                self.unreadable[self.data.name(tried)] = str(error)
                tried = self.order.replacement(position, attempt + 1)
        name, why = next(iter(self.unreadable.items()))
        raise DinoError(f"{len(self.unreadable)} images cannot be read, the first: {name}: {why}")

    def _pixels(self, epoch: int, index: int, position: int) -> Tensor:
        side = self.config.vision_model_train_img_size
        image = to_pixels(open_image(self.data.read(index), target_short_side=2 * side).image)
        return random_crop(image, side, AREA, generator(self.config.seed, epoch, position))


# ---- the loss -------------------------------------------------------------------------------------------------------


def objective(
    config: TextTrainConfig, mean: Sequence[float], std: Sequence[float]
) -> Callable[[nn.Module, Pairs], LossTerms]:
    """The symmetric contrastive term over all processes and, if switched on, the Gram term of the patch tokens."""

    def loss(module: nn.Module, pairs: Pairs) -> LossTerms:
        model = cast(DinoTxt, module)
        model.clamp_logit_scale()  # after the last step too, see `train`
        weight = next(model.text_model.parameters())
        pixels = normalised(pairs.pixels, mean, std, weight.dtype)
        images, texts, scale, patches, backbone_patches = model(pixels, pairs.tokens)
        terms = LossTerms()
        terms.add("contrastive_loss", 1.0, losses.image_text_loss(images, texts, scale))
        if config.vision_model_use_gram_loss:
            rate = config.vision_model_patch_sampling_rate_for_gram_loss
            rng = torch.Generator().manual_seed(seed_of(config.seed, pairs.step, distributed.rank()))
            some = losses.some_positions(patches.shape[1], rate, rng).to(patches.device)
            gram = losses.gram_loss(
                patches[:, some],
                backbone_patches[:, some],
                normalized=config.vision_model_normalize_patch_tokens_for_gram_loss,
            )
            terms.add("gram_loss", config.vision_model_gram_loss_weight, gram)
        return terms

    return loss


# ---- the evaluation hook --------------------------------------------------------------------------------------------


@dataclass
class HeldOut:
    """Data of the periodic evaluation, prepared once: held-out images with captions, a folder of classes."""

    retrieval: tuple[Captioned, list[int]] | None = None
    classes: tuple[Any, list[str]] | None = None
    numbers: dict[str, float] = field(default_factory=dict)


def held_out(config: TextTrainConfig) -> HeldOut:
    held_out_data = HeldOut()
    if config.val_dataset_str:
        data = captioned(config.val_dataset_str)
        n = min(len(data), config.val_max_images)
        held_out_data.retrieval = data, np.linspace(0, len(data) - 1, n).round().astype(int).tolist()
    if config.zero_shot_dataset_str:
        folder: Any = make_dataset(config.zero_shot_dataset_str)
        names = list(getattr(folder, "class_names", []))
        if not names:
            raise DinoError(f"zero_shot_dataset_str={config.zero_shot_dataset_str} has no class folders to name")
        held_out_data.classes = folder, [name.replace("_", " ").replace("-", " ") for name in names]
    return held_out_data


def evaluation(
    config: TextTrainConfig, held_out_data: HeldOut, tokenizer: Tokenizer, context: int
) -> Callable[[nn.Module], dict[str, float]] | None:
    """module → recall of images and captions, top-1 of classes by their names; every process computes all of it."""
    if held_out_data.retrieval is None and held_out_data.classes is None:
        return None

    def evaluate(module: nn.Module) -> dict[str, float]:
        model = cast(DinoTxt, module)
        size = config.vision_model_train_img_size
        numbers: dict[str, float] = {}
        if held_out_data.retrieval is not None:
            data, rows = held_out_data.retrieval
            images = zero_shot.image_features(model, data, rows, size=size)
            captions = [(i, caption) for i, row in enumerate(rows) for caption in data.captions[row]]
            texts = F.normalize(text_features(model, tokenizer, [c for _, c in captions], context), dim=-1)
            numbers |= zero_shot.retrieval(images, texts, torch.tensor([i for i, _ in captions]))
        if held_out_data.classes is not None:
            folder, names = held_out_data.classes
            rows = [i for i in range(len(folder)) if folder.label(i) is not None]
            images = zero_shot.image_features(model, folder, rows, size=size)
            words = class_vectors(model, tokenizer, names, [config.zero_shot_template], context)
            numbers |= zero_shot.classification(images @ words.T, torch.tensor([folder.label(i) for i in rows]))
        return numbers

    return evaluate


# ---- the run --------------------------------------------------------------------------------------------------------


def captioned(line: str) -> Captioned:
    data = make_dataset(line)
    if not isinstance(data, Captioned):
        raise DinoError(f"{line} has no captions; CocoCaptions:root=… and Captions:root=… do")
    return data


def train(config: TextTrainConfig, *, notes: Sequence[str] = ()) -> FitReport:
    """Trains, evaluates, resumes; writes head and sizes in the end. Raises `DinoError` with one sentence."""
    device = distributed.setup(None if config.device == "auto" else config.device)
    model, tokenizer = build(config, device)
    origin: Any = model.origin
    context = model.text_config.context_length
    data, held_out_data = captioned(config.train_dataset_str), held_out(config)
    out = Path(config.output_dir or ".")
    run = RunDir(out, writer=distributed.is_main())
    for note in [*notes, *origin.notes]:
        run.log(f"note: {note}")
    run.log(f"{origin}; {len(data)} images, {sum(map(len, data.captions))} captions")
    total = config.batch_size * distributed.world()
    if len(data) < total:
        run.log(
            f"note: a batch of {total} pairs holds images of {len(data)} more than once: they are each other's negatives"
        )
    accelerated = device.type != "cpu"
    if config.use_ac and accelerated:
        from dinov3.parallel import checkpoint_activations

        checkpoint_activations(model.text_model.backbone, selective=True)
    if config.do_compile and accelerated:
        for block in [*model.visual_model.head.blocks, *model.text_model.backbone.blocks]:
            block.compile(dynamic=False)
    chosen = config.precision if config.precision != "auto" else "bfloat16" if accelerated else "float32"
    loader = PairLoader(config, data, tokenizer, context)
    report = fit(
        model,
        loader,
        objective(config, origin.mean, origin.std),
        FitConfig(
            steps=config.max_iteration, lr=config.lr, weight_decay=config.weight_decay, beta1=config.beta1,
            beta2=config.beta2, schedule="cosine", warmup=config.warmup_length, decay="matrices", clip=config.clip_grad,
            batch=total, log_every=config.log_every, save_every=config.checkpointing_period,
            keep=config.max_checkpoints_to_keep, evaluate_every=config.eval_freq, precision=chosen,
            workers=config.workers, seed=config.seed,
        ),
        run,
        evaluation(config, held_out_data, tokenizer, context),
        resume=not config.no_resume,
        about=config,
    )  # fmt: skip
    model.clamp_logit_scale()
    if loader.unreadable:
        name, why = next(iter(loader.unreadable.items()))
        run.log(f"{len(loader.unreadable)} images could not be read and were replaced, the first: {name}: {why}")
    if run.writer:
        tensors = {k: v.cpu().contiguous() for k, v in head_tensors(model).items()}
        write_safetensors(tensors, out / HEAD_FILE, {"dinov3.dinotxt": "head", "backbone": str(origin)})
        _write_sizes(model, config, out / MODEL_FILE)
    distributed.barrier()
    return report


def _write_sizes(model: DinoTxt, config: TextTrainConfig, path: Path) -> None:
    import yaml

    joint = {f.name: getattr(model.config, f.name) for f in fields(DinoTxtConfig)}
    text = {f.name: getattr(model.text_config, f.name) for f in fields(TextConfig)}
    backbone = {k: v for k, v in vars(config).items() if k.startswith("vision_backbone") and v is not None}
    content = joint | backbone | {"text_backbone": text, "text_vocab_path_or_url": config.text_vocab_path_or_url}
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status; every mistake is a sentence on stderr."""
    given = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(given):
        print(help_text("train-dinotxt", cast(Any, TextTrainConfig), __doc__))
        return 0
    try:
        arguments = split_arguments([a.removeprefix("--") if a == "--no-resume" else a for a in given])
        overrides = ["no_resume=true" if a == "no-resume" else a for a in arguments.overrides]
        config, notes = load(TextTrainConfig, arguments.file, overrides)
        report = train(config, notes=notes)
    except DinoError as error:
        who = "" if distributed.is_main() else f"[rank {distributed.rank()}] "
        print(f"error: {who}{error}", file=sys.stderr)
        return 1
    finally:
        if argv is None:
            distributed.shutdown()
    if distributed.is_main():
        for name, value in (report.evaluations[-1][1] if report.evaluations else report.last).items():
            if math.isfinite(value):
                print(f"{name}\t{value:.4f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
