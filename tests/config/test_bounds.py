"""Bounds of configuration fields: each kind, lists, nested sections, and configurations made in code."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from dinov3.config.bounds import check, setting, violations
from dinov3.config.loading import load
from dinov3.errors import DinoError


@dataclass
class Part:
    rate: float | None = setting(0.5, above=0, at_most=1)


@dataclass
class Config:
    steps: int = setting(10, at_least=1)
    beta: float = setting(0.9, at_least=0, below=1)
    kind: Literal["cosine", "constant"] = "cosine"
    score: str = setting("mIoU", choices=("mIoU", "acc"))
    ks: list[int] = setting([10, 20], at_least=1, required="numbers of neighbours")
    losses: dict[str, float] = setting({"L1": 1.0}, choices=("L1", "SSI"))
    area: tuple[float, float] = setting((0.4, 1.0), above=0, at_most=1, rising=True)
    root: str = setting("here", required="root=FOLDER")
    part: Part = field(default_factory=Part)


@pytest.mark.parametrize(
    "change, expected",
    [
        ({}, []),
        ({"part": Part(None)}, []),
        ({"steps": 0}, [("steps", "must be at least 1, not 0")]),
        ({"beta": 1.0}, [("beta", "must be at least 0 and below 1, not 1.0")]),
        ({"kind": "cosin"}, [("kind", "is one of cosine, constant, not 'cosin'; did you mean 'cosine'?")]),
        ({"score": "miou"}, [("score", "is one of mIoU, acc, not 'miou'; did you mean 'mIoU'?")]),
        ({"ks": [5, 0, -1]}, [("ks", "must be at least 1, not 0")]),
        ({"ks": []}, [("ks", "must be given: numbers of neighbours")]),
        ({"beta": math.nan}, [("beta", "must be at least 0 and below 1, not nan")]),
        ({"losses": {"SI": 1.0}}, [("losses", "is one of L1, SSI, not 'SI'; did you mean 'SSI'?")]),
        ({"area": (0.4, 0.4)}, []),
        ({"area": (0.4, 0.1)}, [("area", "must be two rising numbers, [low, high], not [0.4, 0.1]")]),
        ({"area": (0.4,)}, [("area", "must be two rising numbers, [low, high], not [0.4]")]),
        ({"area": (0.0, 0.1)}, [("area", "must be above 0 and at most 1, not 0.0")]),
        ({"root": ""}, [("root", "must be given: root=FOLDER")]),
        ({"part": Part(0.0)}, [("part.rate", "must be above 0 and at most 1, not 0.0")]),
    ],
)
def test_a_field_out_of_bounds_gives_its_key_and_a_sentence(change: dict[str, Any], expected: list[Any]) -> None:
    assert list(violations(Config(**change))) == expected


def test_a_list_default_is_not_shared_between_configurations() -> None:
    Config().ks.append(99)
    assert Config().ks == [10, 20]


def test_a_configuration_made_in_code_is_checked_with_all_mistakes_at_once() -> None:
    check(Config())
    with pytest.raises(DinoError, match="fitting: steps must be at least 1, not 0; root must be given"):
        check(Config(steps=0, root=""), "fitting")


def test_the_loader_names_the_source_of_a_value_out_of_bounds() -> None:
    with pytest.raises(DinoError) as caught:
        load(Config, None, ["steps=0", "part.rate=2"])
    assert "steps (command line): must be at least 1, not 0" in str(caught.value)
    assert "part.rate (command line): must be above 0 and at most 1, not 2.0" in str(caught.value)
