"""Configuration of evaluations: the sections they share, and the command line.

Arguments are those of the public scripts: `key.sub=value`, `config_file=FILE` or `--config-file FILE`, `output_dir=DIR` or
`--output-dir DIR`. Of our own: folders or dataset specs by their position (`POSITIONAL` of the configuration), `--model NAME`
`--weights FILE`, `--device NAME`, `--sweep AXES`. Everything else is an error with suggestions.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from dinov3.config.bounds import Problem, setting
from dinov3.config.loading import load
from dinov3.errors import DinoError, only_known
from dinov3.files import nonexistent

C = TypeVar("C", bound="EvalConfig")
Pool = Literal["cls", "mean", "cls+mean"]


# ---- sections of configurations -------------------------------------------------------------------------------------


@dataclass
class ModelSection:
    """Which backbone. The first three keys are those of the public scripts; without any key, the model that ships."""

    config_file: str | None = None  # a training configuration that describes the architecture …
    pretrained_weights: str | None = None  # … and weights for it (file, or a folder of a distributed checkpoint)
    dino_hub: str | None = None  # a hub function's name
    name: str | None = None  # ours: any name `dinov3.load` takes, also transformers:FOLDER,layer=9
    weights: str | None = None  # ours: any weights `dinov3.load` takes, or "random"
    device: str = "auto"
    # of the fast form (`inference`): fp32, bf16, int8, fp8; dense heads stand on the plain model
    precision: str = "fp32"


@dataclass
class TransformSection:
    """Short side to `resize_size` (bicubic), then a square of `crop_size` from the middle."""

    resize_size: int = 256
    crop_size: int = 224


@dataclass
class FeatureSection:
    """How the output of the backbone becomes one vector for each image.

    cls: the CLS tokens of the layers, one after the other; mean: their mean patches; cls+mean: the CLS tokens of all,
    then the mean patch of the last of them (the reference's linear evaluation).
    """

    # 0-based blocks; negative ones count from the end
    layers: list[int] = setting([-1], required="features.layers=[-1] is the last layer")
    pool: Pool = "cls"
    norm: bool = True  # the final norm, on every layer
    dtype: Literal["float32", "float16"] = "float32"  # on disk; float16 halves it
    cache: str | None = None  # a folder; null: $DINOV3_CACHE/features; "none": no cache


@dataclass
class FewShotSection:
    enable: bool = False
    k_or_percent: float | None = setting(None, above=0)  # < 1: share of each class; ≥ 1: images of each class
    n_tries: int = setting(1, at_least=1)


@dataclass
class EvalConfig:
    """Base class of all evaluations' configurations."""

    # what may stand without a key, in this order: (word for it, its key)
    POSITIONAL: ClassVar[tuple[tuple[str, str], ...]] = ()

    model: ModelSection = field(default_factory=ModelSection)
    output_dir: str | None = "."  # null: here
    save_results: bool = False  # save predictions and targets as .npy

    def problems(self) -> Iterator[Problem]:
        """Conditions between fields, for the loader; a subclass adds its own."""
        model = self.model
        theirs = [f"model.{k}" for k in ("config_file", "pretrained_weights") if getattr(model, k)]
        ours = [f"model.{k}" for k in ("name", "weights") if getattr(model, k)]
        if model.dino_hub and (theirs or ours):
            yield "model.dino_hub", f"excludes {', '.join(theirs + ours)}: it names architecture and weights"
        if theirs and ours:
            yield ours[0], f"excludes {', '.join(theirs)}; give one or the other"
        if model.pretrained_weights and not model.config_file:
            yield (
                "model.pretrained_weights",
                "needs model.config_file; a file that describes itself goes to model.weights",
            )
        root = getattr(self, "root", None)  # of a benchmark: noticed before a model is opened
        if root and not Path(root).expanduser().exists():
            yield "root", nonexistent(root)


@dataclass
class ClassifierConfig(EvalConfig):
    """The keys that k-NN, logistic regression and linear share; each has sections `train` and `eval` of its own."""

    transform: TransformSection = field(default_factory=TransformSection)
    features: FeatureSection = field(default_factory=FeatureSection)
    few_shot: FewShotSection = field(default_factory=FewShotSection)

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        if self.few_shot.enable and self.few_shot.k_or_percent is None:
            yield "few_shot.k_or_percent", "must be given with few_shot.enable: 5 images of each class, or 0.1 of them"


# ---- arguments ------------------------------------------------------------------------------------------------------

FILE_NAMES = ("config_file", "config", "trainer_config_file")
SHORT = {"output_dir": "output_dir", "model": "model.name", "weights": "model.weights", "device": "model.device"}
OPTIONS = "[--model NAME] [--weights FILE] [--output-dir DIR] [--config-file FILE] [--sweep AXES] key.sub=value …"
OVERRIDE = re.compile(r"[A-Za-z_][\w.\-\[\]]*=")  # a dataset spec has a colon before its first =


@dataclass
class Arguments:
    file: str | None
    overrides: list[str]
    sweep: str | None = None


def take_options(argv: Sequence[str], known: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """({name: value} of `--name value` and `--name=value`, the other arguments); names with _ for -."""
    found: dict[str, str] = {}
    rest, others = list(argv), []
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("-"):
            others.append(argument)
            continue
        name, equals, value = argument.partition("=")
        name = name.removeprefix("--").replace("-", "_")
        only_known("there is no option", [f"--{name.replace('_', '-')}"], [f"--{k.replace('_', '-')}" for k in known])
        if not equals and not rest:
            raise DinoError(f"{argument} needs a value")
        found[name] = value if equals else rest.pop(0)
    return found, others


def split_arguments(argv: Sequence[str], positional: Sequence[tuple[str, str]] = ()) -> Arguments:
    """Options and key=value overrides in any order, as the public scripts and the launcher write them; what has no key is
    given those of `positional`, in order."""
    options, rest = take_options(argv, (*FILE_NAMES, *SHORT, "sweep"))
    file = next((options[name] for name in FILE_NAMES if name in options), None)
    overrides = [f"{key}={options[name]}" for name, key in SHORT.items() if name in options]
    waiting = list(positional)
    for argument in rest:
        name, _, value = argument.partition("=")
        if name in FILE_NAMES:
            file = value
        elif name == "output-dir":  # the reference's command for dino.txt has no dashes before it
            overrides.append(f"output_dir={value}")
        elif positional and not OVERRIDE.match(argument):
            key = _next_key(argument, waiting, " ".join(word for word, _ in positional))
            overrides.append(f"{key}={argument}")
        else:
            overrides.append(argument)
    return Arguments(file, overrides, options.get("sweep"))


def _next_key(argument: str, waiting: list[tuple[str, str]], words: str) -> str:
    """The key of an argument without one: the next of those that are still `waiting`."""
    if not waiting:
        raise DinoError(f"{argument!r} is one too many: {words} may stand without a key, the rest is key=value")
    if ":" not in argument and not Path(argument).expanduser().exists():
        raise DinoError(f"{nonexistent(argument)} (write {words}, dataset specs, or key.sub=value)")
    return waiting.pop(0)[1]


def read_arguments(cls: type[C], argv: Sequence[str]) -> tuple[C, list[str], Arguments]:
    """(configuration, notes, the arguments in parts). Raises one `DinoError` with every mistake."""
    arguments = split_arguments(argv, cls.POSITIONAL)
    config, notes = load(cls, arguments.file, arguments.overrides)
    return config, notes, arguments


def help_text(name: str, cls: type[Any], doc: str | None) -> str:
    """Usage, the evaluation's description and every key with its default."""

    def keys(of: Any, prefix: str = "") -> Iterator[str]:
        for f in fields(of):
            value = getattr(of, f.name)
            if is_dataclass(value):
                yield from keys(value, f"{prefix}{f.name}.")
            else:
                yield f"  {prefix}{f.name}={_shown(value)}"

    verb = name.replace("_", "-").removeprefix("semantic-")  # results of segmentation have the reference's longer name
    words = " ".join(["dinov3 eval", verb, *(word for word, _ in getattr(cls, "POSITIONAL", ()))])
    usage = f"usage: {words} {OPTIONS}"
    return "\n".join([usage, "", (doc or "").strip(), "", "keys and defaults:", *keys(cls())])


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if hasattr(value, "value"):
        return str(value.value)
    return str(value) if not isinstance(value, (list, tuple)) else "[" + ",".join(map(_shown, value)) + "]"
