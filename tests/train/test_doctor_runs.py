"""Illnesses planted in real training runs get their names, healthy runs none, and the advice can be followed."""

from __future__ import annotations

from pathlib import Path

import pytest
from planted_illnesses import ON_PHOTOGRAPHS, OVERRIDES, run

from dinov3.config.train import load_config
from dinov3.runlog import read_metrics
from dinov3.train.doctor import facts_of, verdicts
from dinov3.train.train import train

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.mark.parametrize(
    "illness", [pytest.param(name, marks=pytest.mark.data if name in ON_PHOTOGRAPHS else ()) for name in OVERRIDES]
)
def test_what_was_planted_is_named_and_nothing_else(
    illness: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    photographs = request.getfixturevalue("development_data") / "caltech101" if illness in ON_PHOTOGRAPHS else None
    folder = run(illness, tmp_path, photographs)
    config, _ = load_config(str(folder / "resolved.yaml"), [])
    found = verdicts(facts_of(config, str(folder)), list(read_metrics(folder / "metrics.jsonl")))
    name = illness.partition(",")[0]
    assert found[-1].name == name, found
    assert {v.name for v in found} <= {name, "too early"}
    log = (folder / "log.txt").read_text()
    assert (f". {name}: " in log) or (f"warning: {name}: " in log)
    if illness == "patch similarity decayed":  # the overrides that it prints start a run
        advised = [word.strip(",") for word in found[-1].advice.split() if "=" in word and "." in word]
        assert len(advised) == 4
        more = ["optim.iterations=2", *advised]
        again, _ = load_config(str(folder / "resolved.yaml"), more)
        assert train(again, tmp_path / "anchored").finished
        assert any("gram_loss" in r for r in read_metrics(tmp_path / "anchored" / "metrics.jsonl"))
