"""Block masks: exact counts, the reference's masks from the reference's generators, its statistics from ours."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence

import numpy as np
import pytest
from paths import GOLDEN_LOSSES
from safetensors.numpy import load_file

from dinov3.data.crops import MaskConfig, batch_masks, block_mask, mask_grid, masked_counts, reference_max_block
from dinov3.errors import DinoError


class LegacyGenerators:
    """The generators of the recorded masks: Python's global one, and NumPy's for the last patches."""

    def __init__(self, seed: int):
        self.python, self.numpy = random.Random(seed), np.random.RandomState(seed)
        self.uniform, self.randint, self.shuffle = self.python.uniform, self.python.randint, self.python.shuffle

    def sample(self, population: Sequence[int], k: int) -> list[int]:
        return self.numpy.choice(np.asarray(population), k, replace=False).tolist()


@pytest.mark.parametrize("side", (4, 14, 16, 32))
def test_recorded_masks_are_reproduced_exactly(side: int) -> None:
    wanted = load_file(GOLDEN_LOSSES / "masks.safetensors")[f"masks_{side}x{side}_seed7"]
    rng = LegacyGenerators(7)
    for share, mask in zip((0, 0.1, 0.25, 0.5), wanted):
        np.testing.assert_array_equal(block_mask(int(side * side * share), (side, side), rng), mask.astype(bool))


@pytest.mark.parametrize("key, crops, shift", (("", 10, False), ("circular_", 10, True), ("local_batch4_", 8, False)))
def test_recorded_batches_of_masks_are_reproduced_exactly(key: str, crops: int, shift: bool) -> None:
    golden = load_file(GOLDEN_LOSSES / "masks.safetensors")
    masks = batch_masks(crops, (8, 8), MaskConfig(circular_shift=shift), LegacyGenerators(21))
    np.testing.assert_array_equal(masks.masks.numpy(), golden[f"collate_{key}collated_masks"].astype(bool))
    if f"collate_{key}mask_indices_list" in golden:
        np.testing.assert_array_equal(masks.indices.numpy(), golden[f"collate_{key}mask_indices_list"])
        np.testing.assert_array_equal(masks.weight.numpy(), golden[f"collate_{key}masks_weight"])


@pytest.mark.parametrize("case", list(json.loads((GOLDEN_LOSSES / "mask_statistics.json").read_text())))
def test_statistics_match_the_recorded_ones_within_sampling_error(case: str) -> None:
    recorded = json.loads((GOLDEN_LOSSES / "mask_statistics.json").read_text())[case]
    side = int(case.split("x")[0])
    rng = random.Random(5)
    n = 400
    masks = np.stack([block_mask(recorded["requested"], (side, side), rng) for _ in range(n)])
    assert set(masks.sum((1, 2)).tolist()) == {recorded["requested"]}

    padded = np.pad(masks, ((0, 0), (1, 1), (1, 1)))
    neighbours = sum(padded[:, 1 + dy : side + 1 + dy, 1 + dx : side + 1 + dx].astype(int) for dy, dx in STEPS)
    fractions = (neighbours * masks).sum((1, 2)) / 4 / masks.sum((1, 2))
    standard_error = fractions.std() / n**0.5 * 2**0.5
    difference = fractions.mean() - recorded["mean_fraction_of_masked_4_neighbours"]
    assert abs(difference) < 4 * standard_error + 1e-9

    for where, at in (("centre", side // 2), ("corner", 0)):
        p = recorded[f"marginal_{where}"]
        assert abs(masks[:, at, at].mean() - p) < 4 * (2 * max(p * (1 - p), 0.01) / n) ** 0.5, where


STEPS = ((0, 1), (0, -1), (1, 0), (-1, 0))


def test_a_batch_covers_the_range_of_ratios_evenly_and_masks_half_of_its_crops() -> None:
    assert masked_counts(10, 64, MaskConfig()) == [11, 16, 21, 26, 32]
    masks = batch_masks(10, (8, 8), MaskConfig(), random.Random(0))
    assert sorted(masks.masks.sum(1).tolist()) == [0] * 5 + [11, 16, 21, 26, 32]


def test_weights_of_each_masked_crop_sum_to_one() -> None:
    masks = batch_masks(6, (4, 4), MaskConfig(), random.Random(0))
    rows = masks.indices // 16
    for row in rows.unique():
        assert masks.weight[rows == row].sum().item() == pytest.approx(1)
    assert masks.masks.flatten()[masks.indices].all()


def test_equal_seeds_give_equal_masks_and_others_do_not() -> None:
    one, two, three = (batch_masks(8, (14, 14), MaskConfig(), random.Random(s)).masks for s in (1, 1, 2))
    assert one.equal(two)
    assert not one.equal(three)


def test_the_largest_block_is_half_the_grid_where_the_reference_slips_on_odd_grids() -> None:
    class Watched(random.Random):
        budgets: list[float]

        def uniform(self, a: float, b: float) -> float:
            self.budgets.append(b)
            return super().uniform(a, b)

    assert [reference_max_block(g, 16) for g in (224, 256, 112)] == [98, 128, 21]
    for given, largest in ((None, 24.5), (21, 21)):
        rng = Watched(0)
        rng.budgets = []
        block_mask(49, mask_grid(112, 16), rng, max_block=given)
        assert max(rng.budgets) == largest


def test_a_crop_that_is_no_multiple_of_the_patch_is_refused_with_the_nearest_size() -> None:
    with pytest.raises(DinoError, match=r"70 px is no multiple of the patch size 16; try 64"):
        mask_grid(70, 16)
    assert mask_grid(256, 4, scale=4) == (16, 16)


def test_no_masking_at_all_is_an_empty_list_of_indices() -> None:
    masks = batch_masks(4, (4, 4), MaskConfig(probability=0), random.Random(0))
    assert not masks.masks.any()
    assert masks.indices.numel() == masks.weight.numel() == 0


def test_nonsense_ratios_are_refused() -> None:
    with pytest.raises(DinoError, match="within 0 … 1"):
        MaskConfig(ratio=(0.5, 0.1))
    with pytest.raises(DinoError, match="17 patches cannot be masked on a grid of 4 × 4"):
        block_mask(17, (4, 4), random.Random(0))
