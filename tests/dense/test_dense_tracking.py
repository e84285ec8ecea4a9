"""Label propagation: known answers, the plain definition, and videos whose answer is known."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dinov3.dense.tracking import PAPER_GRID, Propagation, masks, patch_labels, propagate, track, within_reach
from dinov3.errors import DinoError, UnknownName


def angles(*degrees: float) -> Tensor:
    a = torch.tensor(degrees) * math.pi / 180
    return torch.stack([a.cos(), a.sin()], -1)


GRID = angles(0, 30, 60, 90, 120, 150).view(2, 3, 2)
LABELS = F.one_hot(torch.tensor([[0, 0, 1], [1, 1, 2]]), 3).float()
CURRENT = angles(5, 35, 65, 95, 125, 155).view(2, 3, 2)


def slow(current: Tensor, context: Tensor, labels: Tensor, s: Propagation) -> Tensor:
    """The definition: every patch against every patch of every frame."""
    h, w, _ = current.shape
    out = torch.zeros(h, w, labels.shape[-1])
    for r in range(h):
        for c in range(w):
            found = []
            for t in range(len(context)):
                for y in range(h):
                    for x in range(w):
                        far = max(abs(y - r), abs(x - c)) if s.shape == "square" else math.hypot(y - r, x - c)
                        if far <= s.radius:
                            found.append((float(current[r, c] @ context[t, y, x]), labels[t, y, x]))
            found.sort(key=lambda pair: -pair[0])
            limit = found[min(s.k, len(found)) - 1][0]
            kept = [(math.exp(v / s.temperature), label) for v, label in found if v >= limit]
            out[r, c] = sum(e * label for e, label in kept) / sum(e for e, _ in kept)
    return out


def test_the_recorded_example_with_two_matches() -> None:
    got = propagate(CURRENT, GRID[None], LABELS[None], Propagation(radius=math.inf, k=2))
    expected = [[1, 0, 0], [0.6105, 0.3895, 0], [0, 1, 0], [0, 1, 0], [0, 0.6105, 0.3895], [0, 0.2921, 0.7079]]
    torch.testing.assert_close(got.view(6, 3), torch.tensor(expected), atol=6e-5, rtol=0)


def test_the_recorded_example_with_five_matches() -> None:
    got = propagate(CURRENT, GRID[None], LABELS[None], Propagation(radius=math.inf, k=5)).view(6, 3)
    torch.testing.assert_close(got[0], torch.tensor([0.9253, 0.0747, 0]), atol=6e-5, rtol=0)
    torch.testing.assert_close(got[5], torch.tensor([2.6467e-4, 0.32144, 0.67830]), atol=6e-6, rtol=0)


def test_the_recorded_example_with_a_small_neighbourhood() -> None:
    got = propagate(CURRENT, GRID[None], LABELS[None], Propagation(radius=1, k=2))
    torch.testing.assert_close(got[1, 2], torch.tensor([0, 0.2921, 0.7079]), atol=6e-5, rtol=0)
    # the third patch of the first row sees only its left, its lower neighbour and itself
    torch.testing.assert_close(got[0, 2], torch.tensor([0.2921, 0.7079, 0]), atol=6e-5, rtol=0)


def test_ties_keep_everything() -> None:
    same = torch.ones(2, 3, 4) / 2
    got = propagate(same, same[None], LABELS[None], Propagation(radius=math.inf, k=2))
    torch.testing.assert_close(got, torch.tensor([1 / 3, 1 / 2, 1 / 6]).expand(2, 3, 3))


def test_more_matches_wanted_than_there_are_neighbours_gives_no_nan() -> None:
    got = propagate(CURRENT, GRID[None], LABELS[None], Propagation(radius=0, k=50))
    torch.testing.assert_close(got, LABELS)


@pytest.mark.parametrize("settings", [Propagation(radius=2, k=3), Propagation(radius=1.5, shape="square", k=7)])
def test_row_by_row_equals_the_definition(settings: Propagation) -> None:
    generator = torch.Generator().manual_seed(0)
    x = F.normalize(torch.randn(4, 5, 6, 8, generator=generator), dim=-1)
    labels = torch.rand(3, 5, 6, 4, generator=generator)
    labels = labels / labels.sum(-1, keepdim=True)
    got = propagate(x[0], x[1:], labels, settings)
    torch.testing.assert_close(got, slow(x[0], x[1:], labels, settings))


def test_sizes_of_neighbourhoods() -> None:
    rows, columns = torch.meshgrid(torch.arange(30), torch.arange(40), indexing="ij")
    count = {s: int(within_reach(rows - 15, columns - 20, 12, s).sum()) for s in ("circle", "square")}
    assert count == {"circle": 441, "square": 625}
    assert int(within_reach(rows, columns, 12).sum()) == 123  # of the corner


def test_nothing_moves_in_a_static_video() -> None:
    generator = torch.Generator().manual_seed(1)
    frame = torch.randn(12, 16, 256, generator=generator)
    mask = torch.zeros(12, 16, dtype=torch.long)
    mask[4:8, 5:9] = 1
    results = list(track([frame] * 12, mask))
    assert len(results) == 12
    for labels in results:
        assert torch.equal(masks(labels, (12, 16)), mask)


def moving_object() -> tuple[list[Tensor], list[Tensor]]:
    """A 4×4 object with features of its own, one patch a frame to the right over a fixed background of 12×16."""
    generator = torch.Generator().manual_seed(2)
    background = torch.randn(12, 16, 256, generator=generator)
    thing = torch.randn(4, 4, 256, generator=generator)
    frames, truth = [], []
    for t in range(10):
        frame, mask = background.clone(), torch.zeros(12, 16, dtype=torch.long)
        frame[4:8, 2 + t : 6 + t] = thing
        mask[4:8, 2 + t : 6 + t] = 1
        frames.append(frame)
        truth.append(mask)
    return frames, truth


def test_an_object_that_moves_is_followed() -> None:
    frames, truth = moving_object()
    known = torch.ones(12, 16, dtype=torch.bool)
    known[4:8, 2:6] = False  # what the object hid in frame 0 was never seen as background: chance decides there
    results = list(track(frames, truth[0]))
    assert len(results) == len(truth) == 10
    for labels, mask in zip(results, truth):
        assert torch.equal(labels.argmax(-1)[known], mask[known])
        assert int((labels.argmax(-1) != mask).sum()) <= 2


def test_an_object_that_moves_out_of_reach_stays_where_it_was() -> None:
    frames, truth = moving_object()
    found = [labels.argmax(-1) for labels in track(frames, truth[0], Propagation(radius=0.5))]
    right = [int((a == b).sum()) for a, b in zip(found[1:], truth[1:])]
    assert right == [184, 176, 168, 160, 160, 160, 160, 160, 160]


def test_frame_zero_is_never_forgotten() -> None:
    e = torch.eye(4)
    first, other = e[[0, 1]][None], e[[2, 3]][None]  # [1, 2, 4]
    mask = torch.tensor([[0, 1]])
    *_, last = track([first, other, other, other, first], mask, Propagation(n_context=2, k=1))
    assert last.argmax(-1).tolist() == [[0, 1]]


def test_old_frames_are_forgotten() -> None:
    generator = torch.Generator().manual_seed(3)
    frames = list(torch.randn(6, 3, 4, 16, generator=generator))
    mask = torch.randint(0, 2, (3, 4), generator=generator)
    settings = Propagation(n_context=2, k=3)
    *_, last = track(frames, mask, settings)
    units = F.normalize(torch.stack(frames), dim=-1)
    every = list(track(frames, mask, settings))
    expected = propagate(units[5], units[[0, 3, 4]], torch.stack([every[i] for i in (0, 3, 4)]), settings)
    torch.testing.assert_close(last, expected)


def test_a_patch_takes_the_label_at_its_centre() -> None:
    mask = torch.zeros(6, 6, dtype=torch.long)
    mask[1, 4] = 2  # the centre of the upper right 3×3 patch
    assert patch_labels(mask, (2, 2)).argmax(-1).tolist() == [[0, 2], [0, 0]]
    assert patch_labels(mask, (2, 2)).shape == (2, 2, 3)


def test_stretching_lets_a_faint_object_win() -> None:
    labels = torch.tensor([[[0.9, 0.1], [0.6, 0.4]]])
    assert masks(labels, (1, 2), stretch=False).tolist() == [[0, 0]]
    assert masks(labels, (1, 2)).tolist() == [[0, 1]]
    # constant maps become 0, and the background wins the tie
    assert masks(torch.full((2, 2, 3), 1 / 3), (4, 4)).unique().tolist() == [0]


def test_upsampling_between_patches() -> None:
    labels = F.one_hot(torch.tensor([[0, 1]]), 2).float()
    assert masks(labels, (1, 8), upsampling="nearest").tolist() == [[0] * 4 + [1] * 4]
    assert masks(labels, (1, 8), upsampling="bilinear").tolist() == [[0] * 4 + [1] * 4]
    with pytest.raises(UnknownName):
        masks(labels, (1, 8), upsampling="cubic")


def test_the_papers_grid_has_its_eighteen_rows() -> None:
    assert len(PAPER_GRID) == len(set(PAPER_GRID)) == 18
    assert Propagation() in PAPER_GRID


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(UnknownName, match="did you mean 'circle'"):
        Propagation(shape="circl")
    with pytest.raises(DinoError, match="k at least 1"):
        Propagation(k=0)
    with pytest.raises(DinoError, match="do not fit a frame"):
        propagate(GRID, GRID[None, :, :2], LABELS[None])
    with pytest.raises(DinoError, match="one image, got 2"):
        list(track([torch.zeros(2, 3, 4, 8)], torch.zeros(3, 4)))
