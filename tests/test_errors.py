"""Messages show what helps and no secrets."""

from __future__ import annotations

from pathlib import Path

import pytest
from paths import ROOT

from dinov3.errors import DinoError, ImageError, WeightsError, install, printable, without_secrets


@pytest.mark.parametrize(
    "text, shown",
    [
        ("https://host/a/w.pth?Signature=s3cret&x=1", "https://host/a/w.pth"),
        ("cannot fetch 'https://me:s3cret@host/w.pth?Policy=s3cret': gone", "cannot fetch 'https://host/w.pth': gone"),
        ('{"weights": "s3://bucket/w.pth?token=s3cret#s3cret", "n": 1}', '{"weights": "s3://bucket/w.pth", "n": 1}'),
        ("a https://h/x?s3cret b http://h/y#s3cret", "a https://h/x b http://h/y"),
        ("what? me@home #1", "what? me@home #1"),
    ],
)
def test_queries_and_passwords_of_urls_are_not_shown(text: str, shown: str) -> None:
    assert without_secrets(text) == shown
    assert str(WeightsError(text)) == str(DinoError(text)) == shown


def test_a_missing_extra_is_installed_from_the_checkout_or_the_index(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert install("hub") == "pip install -e '.[hub]'"
    monkeypatch.setattr("dinov3.errors.__file__", "/usr/lib/python3/site-packages/dinov3/errors.py")
    assert install("hub") == "pip install 'dinov3[hub]'"


def test_logs_and_resolved_configurations_hold_no_secrets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from dinov3.config.loading import dump
    from dinov3.config.train import TrainConfig
    from dinov3.hub import Origin
    from dinov3.runlog import RunDir

    url = "https://me:s3cret@host/w.pth?Signature=s3cret"
    RunDir(tmp_path).log(f"weights from {url}")
    config = TrainConfig()
    config.student.resume_from_teacher_chkpt = url
    dump(config, tmp_path / "resolved.yaml")
    written = [p.read_text() for p in tmp_path.iterdir()] + [capsys.readouterr().err]
    written.append(str(Origin("custom", url, "meta", (0.0,) * 3, (1.0,) * 3)))
    assert len(written) == 4
    for text in written:
        assert "https://host/w.pth" in text
        assert "s3cret" not in text


def test_control_characters_are_escaped_in_messages_and_logs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from dinov3.cli.shared import log, log_failures
    from dinov3.runlog import RunDir

    name = "a\n\x1b[2Jb\u202ec.jpg"
    assert printable(name) == r"a\n\x1b[2Jb\u202ec.jpg"
    assert printable("größer 猫 😀\udcff") == r"größer 猫 😀\udcff"
    assert str(ImageError(name)) == printable(name)
    assert str(DinoError("one\ntwo\x1b[2J")) == "one\ntwo" + r"\x1b[2J"
    log("\x1b[2J")
    log_failures([(name, "gone")])
    RunDir(tmp_path).log(name)
    shown = capsys.readouterr().err + (tmp_path / "log.txt").read_text()
    assert "\x1b" not in shown
    assert "\u202e" not in shown
    assert len(shown.splitlines()) == 4
