"""The attentive probe and its evaluation: frames, squares, parameters, positions, and clips from files to numbers."""

from __future__ import annotations

import itertools
import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dinov3.data.datasets.video import Clips, n_frames, read_frames, stream_frames
from dinov3.errors import DinoError, MissingExtra, UnknownName
from dinov3.eval import video
from dinov3.eval.video import (
    ProbeSection,
    Reader,
    candidates,
    held_out_rows,
    interleaved_frames,
    main,
    probabilities,
    squares,
    train_step,
    uniform_frames,
)
from dinov3.heads.linear import AttentiveProbe, clip_coordinates, position_embedding
from dinov3.metrics import accuracy

# ---- the probe ------------------------------------------------------------------------------------------------------


def probe(**options: object) -> AttentiveProbe:
    return AttentiveProbe(8, 5, **{"width": 48, "depth": 4, "heads": 4, **options})  # type: ignore[arg-type]


def test_the_order_of_tokens_means_nothing_their_coordinates_do() -> None:
    torch.manual_seed(0)
    x, coordinates = torch.randn(1, 16 * 256, 8), clip_coordinates(torch.arange(16.0)[None] / 5, (16, 16))
    net = probe(depth=1).eval()
    with torch.no_grad():
        for block in net.blocks:  # as trained: fresh attention hardly looks at anything
            block.qkv.weight.mul_(20)
    order = torch.randperm(16 * 256)
    logits = net(x, coordinates)
    torch.testing.assert_close(net(x[:, order], coordinates[:, order]), logits, atol=1e-5, rtol=0)
    assert not torch.allclose(net(x[:, order], coordinates), logits, atol=2e-4)


def test_parameters_by_hand() -> None:
    D, W, K, L = 8, 48, 5, 4
    expected = D * W + W + L * (12 * W * W + 13 * W) + 12 * W * W + 15 * W + W + 2 * W + W * K + K
    assert sum(p.numel() for p in probe().parameters()) == expected


def test_rotations_see_differences_of_positions_only() -> None:
    net = probe()
    q, k = torch.randn(1, 4, 1, 12), torch.randn(1, 4, 1, 12)
    from dinov3.heads.linear import rotated

    def score(a: Tensor, b: Tensor) -> Tensor:
        return (rotated(q, net.rotary(a)) * rotated(k, net.rotary(b))).sum(-1)

    a, b = torch.tensor([[[0.2, 0.7, 1.0]]]), torch.tensor([[[0.5, 0.1, 3.0]]])
    moved = torch.tensor([0.3, 0.2, 5.0])
    torch.testing.assert_close(score(a, b), score(a + moved, b + moved), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(score(a, b), score(a, b + moved), atol=1e-3)
    assert len(net.rotary.turn.unique()) == 4  # every head its own angle


def test_coordinates_are_centres_of_patches_and_seconds() -> None:
    c = clip_coordinates(torch.tensor([[0.0, 0.5]]), (2, 4))
    assert c.shape == (1, 16, 3)
    torch.testing.assert_close(c[0, 0], torch.tensor([0.125, 0.25, 0]))
    torch.testing.assert_close(c[0, -1], torch.tensor([0.875, 0.75, 0.5]))
    assert position_embedding(c, 50).shape == (1, 16, 50)
    assert float(position_embedding(c, 50)[..., 48:].abs().max()) == 0


def test_probes_that_cannot_be_are_refused() -> None:
    with pytest.raises(DinoError, match="cannot have 5 heads"):
        probe(heads=5)
    with pytest.raises(DinoError, match="need coordinates"):
        probe()(torch.zeros(1, 4, 8), torch.zeros(1, 3, 3))


def moving_dots(n: int, seed: int, *, still_time: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """n clips of 4 frames of 1 × 4 patches, a little noisy: a dot goes right (class 0) or left (1)."""
    rng = np.random.default_rng(seed)
    tokens, labels = torch.zeros(n, 4, 1, 4, 2), torch.from_numpy(rng.integers(0, 2, n))
    for i in range(n):
        row = 0
        for t in range(4):
            column = t if labels[i] == 0 else 3 - t
            tokens[i, t, row, column, 0] = 3
        tokens[i] += torch.from_numpy(rng.normal(0, 0.05, (4, 1, 4, 2))).float()
    seconds = torch.arange(4.0).expand(n, 4) * (0 if still_time else 1)
    return tokens.flatten(1, 3), clip_coordinates(seconds, (1, 4)), labels


@pytest.mark.parametrize("still_time, low, high", [(False, 95, 100), (True, 0, 75)])
def test_the_direction_of_a_dot_needs_the_time(still_time: bool, low: float, high: float) -> None:
    section = ProbeSection(width=36, depth=1, heads=2)
    (c,) = candidates(2, 2, section, [3e-3], [1e-3])
    tokens, coordinates, labels = moving_dots(200, 0, still_time=still_time)
    for step in range(100):
        rows = torch.from_numpy(np.random.default_rng(step).permutation(200)[:32])
        train_step([c], (tokens[rows], coordinates[rows], labels[rows]), step, 100)
    tokens, coordinates, labels = moving_dots(100, 1, still_time=still_time)
    assert low <= 100 * accuracy(probabilities(c.probe, tokens, coordinates), labels) <= high


def test_candidates_begin_alike_and_learn_at_their_own_rates() -> None:
    every = candidates(2, 2, ProbeSection(width=36, depth=1, heads=2), [1e-4, 1e-2], [1e-3, 0.1])
    assert [(c.lr, c.weight_decay) for c in every] == [(1e-4, 1e-3), (1e-4, 0.1), (1e-2, 1e-3), (1e-2, 0.1)]
    start = every[0].probe.project.weight.clone()
    assert all(torch.equal(c.probe.project.weight, start) for c in every)
    train_step(every, moving_dots(8, 0), 0, 10)
    moved = [float((c.probe.project.weight - start).detach().abs().max()) for c in every]
    assert moved[0] < 3e-4
    assert moved[2] > 5e-3


def test_a_probe_that_blows_up_leaves_the_others_alone() -> None:
    every = candidates(2, 2, ProbeSection(width=36, depth=1, heads=2), [1e-3, 2e-3], [0.0])
    with torch.no_grad():
        every[0].probe.classifier.weight.fill_(float("inf"))
    losses = train_step(every, moving_dots(8, 0), 0, 10)
    assert not np.isfinite(losses[0])
    assert np.isfinite(losses[1])
    assert bool(every[0].probe.project.weight.isfinite().all())


# ---- frames and squares ---------------------------------------------------------------------------------------------


def test_sixteen_of_a_hundred_frames() -> None:
    assert uniform_frames(100, 16) == [0, 7, 13, 20, 26, 33, 40, 46, 53, 59, 66, 73, 79, 86, 92, 99]
    assert uniform_frames(1, 4) == [0, 0, 0, 0]
    a, b = interleaved_frames(100, 16)
    assert sorted(a + b) == uniform_frames(100, 32)
    assert a[0] == 0
    assert b[-1] == 99


def test_three_squares() -> None:
    assert squares(100, 60) == [(0, 0, 60, 60), (20, 0, 80, 60), (40, 0, 100, 60)]
    assert squares(60, 100)[2] == (0, 40, 60, 100)


def test_a_tenth_chooses_and_does_not_train() -> None:
    train, choose = held_out_rows(50, 0.1)
    assert len(choose) == 5
    assert sorted([*train, *choose]) == list(range(50))
    with pytest.raises(DinoError, match="two training videos"):
        held_out_rows(1, 0.1)


# ---- files ----------------------------------------------------------------------------------------------------------


def write_clips(root: Path, n: int, *, frames: int = 8, seed: int = 0) -> Path:
    """Folders of frames: a bright block that goes right or down."""
    rng = np.random.default_rng(seed)
    for name, (dx, dy) in {"right": (1, 0), "down": (0, 1)}.items():
        for i in range(n):
            folder = root / name / f"clip{i}"
            folder.mkdir(parents=True)
            x0, y0 = rng.integers(0, 16, 2)
            for t in range(frames):
                image = rng.integers(0, 40, (64, 64, 3))
                x, y = x0 + 5 * t * dx, y0 + 5 * t * dy
                image[y : y + 16, x : x + 16] = (250, 220, 60)
                Image.fromarray(image.astype(np.uint8)).save(folder / f"{t:04d}.png")
    return root


def write_video(path: Path, frames: int = 20, rate: int = 10, size: tuple[int, int] = (64, 48)) -> Path:
    av = pytest.importorskip("av")
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for t in range(frames):
            image = np.full((size[1], size[0], 3), 10 * t, np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


def test_frames_of_a_video_file_are_the_requested_ones(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4")
    assert n_frames(path) == 20
    clip = read_frames(path, [3, 19, 0])
    assert [round(float(np.asarray(f).mean()) / 10) for f in clip.frames] == [3, 19, 0]
    assert clip.seconds.tolist() == pytest.approx([0.3, 1.9, 0], abs=1e-3)
    assert clip.size_wh == (64, 48)
    # a file that promised more than it has: the last frame stands in
    assert round(float(np.asarray(read_frames(path, [19, 25]).frames[1]).mean()) / 10) == 19


def test_files_that_are_no_videos_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("av")
    (tmp_path / "a.mp4").write_bytes(b"no video")
    with pytest.raises(DinoError, match="cannot be read as a video"):
        n_frames(tmp_path / "a.mp4")
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises((MissingExtra, ImportError)):
        n_frames(tmp_path / "a.mp4")


def test_folders_and_lists_of_clips(tmp_path: Path) -> None:
    write_clips(tmp_path / "train", 2, frames=3)
    clips = Clips(tmp_path / "train")
    assert clips.class_names == ["down", "right"]
    assert clips.labels.tolist() == [0, 0, 1, 1]
    assert n_frames(clips.paths[0]) == 3
    listed = tmp_path / "train" / "list.txt"
    listed.write_text("right/clip0 10\ndown/clip1 9\n")
    by_list = Clips(listed)
    assert by_list.class_names == ["9", "10"]
    assert by_list.labels.tolist() == [1, 0]
    with pytest.raises(UnknownName, match="'10' is not among"):
        Clips(listed, class_names=["9"])
    with pytest.raises(DinoError, match="holds no videos"):
        Clips(tmp_path / "train" / "right" / "clip0")


def test_a_clips_draws_depend_on_the_epoch_and_repeat(tmp_path: Path) -> None:
    reader = Reader(Clips(write_clips(tmp_path, 1)), frames=4, side=32, fps=25, area=(0.4, 1.0), seed=0)
    (a, ta), (b, tb), (c, _) = reader.random(0, 0), reader.random(0, 0), reader.random(0, 1)
    assert torch.equal(a, b)
    assert torch.equal(ta, tb)
    assert a.shape == (4, 3, 32, 32)
    assert not torch.equal(a, c)
    assert bool((ta.diff() > 0).all())
    x, seconds = reader.views(0, tta=True)
    assert x.shape == (6, 4, 3, 32, 32)
    assert seconds.shape == (6, 4)
    assert reader.views(0)[0].shape == (1, 4, 3, 32, 32)


WORDS = [
    "frames=4", "patches=4", "batch_size=4", "lrs=[3e-3]", "weight_decays=[1e-3]", "probe.width=36", "probe.depth=1",
    "probe.heads=2", "held_out=0.2", "model.device=cpu", "num_workers=1",
]  # fmt: skip


def test_clips_of_files_end_to_end_and_a_run_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, val = write_clips(tmp_path / "train", 5), write_clips(tmp_path / "val", 2, seed=1)
    out = tmp_path / "out"
    words = [f"train={train}", f"val={val}", f"output_dir={out}", *WORDS]
    assert main([*words, "epochs=2"]) == 0
    results = json.loads((out / "results-video.json").read_text())["results"]
    assert {"top-1", "top-1 TTA", "lr", "held-out top-1"} <= set(results)
    once = capsys.readouterr().out
    assert main([*words, "epochs=2"]) == 0  # everything is there: the same numbers from the kept probes
    again = capsys.readouterr()
    assert "resuming at step 4 of 4" in again.err
    assert again.out == once
    assert main([*words, "epochs=3"]) == 1
    assert "another length" in capsys.readouterr().err

    step, calls = video.train_step, itertools.count()

    def pressed(*given: Any) -> Any:
        if next(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return step(*given)

    (val / "right" / "broken.mp4").write_bytes(b"junk")
    assert main([*words, "epochs=2"]) == 1
    error = capsys.readouterr().err
    assert f"1 of 15 videos: {val / 'right' / 'broken.mp4'} cannot be read as a video" in error
    assert " on cpu" in again.err  # the line of the opened model
    assert " on cpu" not in error
    (val / "right" / "broken.mp4").unlink()

    words[2] = f"output_dir={tmp_path / 'torn'}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(video, "train_step", pressed)
        with pytest.raises(KeyboardInterrupt, match="3 of 4 steps are done and saved"):
            main([*words, "epochs=2"])
    assert main([*words, "epochs=2"]) == 0
    torn = capsys.readouterr()
    assert "resuming at step 3 of 4" in torn.err
    assert torn.out == once


def test_a_broken_clip_is_named_without_the_decoder_s_number(tmp_path: Path) -> None:
    clip = tmp_path / "clip.mp4"
    write_video(clip)
    whole = clip.read_bytes()
    first, end = whole.index(b"mdat") + 4, whole.index(b"moov") - 4
    clip.write_bytes(whole[:first] + b"\xff" * (end - first) + whole[end:])
    for read in (lambda: read_frames(clip, [0]), lambda: list(stream_frames(clip))):
        with pytest.raises(DinoError, match=r"clip.mp4 is broken: a frame cannot be decoded \(Invalid data found"):
            read()
    clip.write_bytes(b"junk")
    with pytest.raises(DinoError, match=r"clip.mp4 cannot be read as a video \(Invalid data found"):
        read_frames(clip, [0])


def test_missing_keys_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"output_dir={tmp_path}"]) == 1
    assert "one sub-folder of videos per class" in capsys.readouterr().err


@pytest.mark.data
def test_real_videos_are_decoded(development_data: Path) -> None:
    pytest.importorskip("av")
    files = sorted((development_data / "video").glob("*.mp4"))
    if not files:
        pytest.skip("no videos among the development data")
    for path in files[:3]:
        n = n_frames(path)
        chosen = uniform_frames(min(n, 60), 4)
        clip = read_frames(path, chosen)
        assert len(clip.frames) == 4
        assert bool((np.diff(clip.seconds) > 0).all())
        assert float(np.asarray(clip.frames[0]).std()) > 5
