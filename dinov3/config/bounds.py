"""Choices and ranges of configuration fields, stated where the field is.

    steps: int = setting(1000, at_least=1)
    schedule: Literal["constant", "cosine"] = "cosine"
    root: str = setting("", required="root=FOLDER of the benchmark's files")

`violations` walks a configuration and gives (key, sentence) for every field that is out of bounds. Conditions between
fields are a `problems()` method of the configuration.
"""

from __future__ import annotations

import copy
import dataclasses
import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

from dinov3.errors import DinoError, choices_sentence

Problem = tuple[str, str]  # a key and what is wrong with it


def setting(
    default: Any,
    *,
    help: str = "",
    flag: str = "",
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    choices: Iterable[Any] = (),
    rising: bool = False,
    required: str = "",
) -> Any:
    """A dataclass field with bounds; those of a list hold for each element, of a dict for each key; None is in all bounds.

    rising: the value is [low, high], low ≤ high. required: the value must not be empty; the text is an example.
    help, flag: for the command line, where a field without help is no option.
    """
    bounds = {"at_least": at_least, "above": above, "at_most": at_most, "below": below}
    metadata = {"help": help, "flag": flag, "required": required, "rising": rising, "choices": tuple(choices)} | bounds
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: copy.copy(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def violations(config: Any, prefix: str = "") -> Iterator[Problem]:
    """(key, sentence) of every field of a dataclass, and of the dataclasses in it, that is out of its bounds."""
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value, key = getattr(config, field.name), prefix + field.name
        if dataclasses.is_dataclass(value):
            yield from violations(value, f"{key}.")
            continue
        if field.metadata.get("required") and not value:
            yield key, f"must be given: {field.metadata['required']}"
            continue
        if field.metadata.get("rising") and value is not None and (len(value) != 2 or not value[0] <= value[1]):
            yield key, f"must be two rising numbers, [low, high], not {list(value)}"
            continue
        choices = field.metadata.get("choices") or literals(hints[field.name])
        for element in value if isinstance(value, (list, tuple, dict)) else [value]:
            wrong = sentence(element, field.metadata, choices)
            if wrong:
                yield key, wrong
                break


def sentence(value: Any, bounds: typing.Mapping[str, Any], choices: Sequence[Any] = ()) -> str:
    """What is wrong with one value, or an empty string."""
    if value is None:
        return ""
    if choices and value not in choices:
        return choices_sentence(value, choices)
    if isinstance(value, (int, float)) and not in_range(value, bounds):
        return f"must be {range_text(bounds)}, not {value}"
    return ""


def in_range(value: float, bounds: typing.Mapping[str, Any]) -> bool:
    low, above, high, below = (bounds.get(name) for name in ("at_least", "above", "at_most", "below"))
    return (
        (low is None or value >= low)
        and (above is None or value > above)
        and (high is None or value <= high)
        and (below is None or value < below)
    )  # not so for a NaN


def range_text(bounds: typing.Mapping[str, Any]) -> str:
    """ "at least 0 and below 1" """
    names = ("at_least", "above", "at_most", "below")
    return " and ".join(f"{n.replace('_', ' ')} {bounds[n]}" for n in names if bounds.get(n) is not None)


def literals(hint: Any) -> tuple[Any, ...]:
    """The choices of `Literal[…]` or `Literal[…] | None`; () for every other type."""
    return next((typing.get_args(o) for o in alternatives(hint) if typing.get_origin(o) is Literal), ())


def alternatives(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the type itself."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def check(config: Any, what: str = "configuration", error: type[DinoError] = DinoError) -> None:
    """Raises one error with every violation and every entry of `config.problems()`, for configurations made in code."""
    found = [*violations(config), *(config.problems() if hasattr(config, "problems") else ())]
    if found:
        raise error(f"{what}: " + "; ".join(f"{key} {why}" for key, why in found))
