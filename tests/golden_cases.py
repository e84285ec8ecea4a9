"""Recorded numbers in tests/golden: the recipe "fill-v1" that makes their weights and inputs, and the comparison.

Unit values for a name and a count n: seed = crc32(name); n raw 64-bit outputs of NumPy's PCG64(seed);
u = (raw >> 11)·2⁻⁵³; value = (2u − 1)·√3, uniform with mean 0 and variance 1.
"""

from __future__ import annotations

import json
import zlib
from math import prod, sqrt
from typing import Any

import numpy as np
import torch
from paths import GOLDEN
from safetensors.torch import load_file
from torch import Tensor, nn

HERE = GOLDEN
KEPT = ("rope_embed.periods", "bias_mask", "num_batches_tracked")


def unit(name: str, shape: tuple[int, ...] | list[int]) -> np.ndarray:
    raw = np.random.PCG64(zlib.crc32(name.encode())).random_raw(prod(shape))
    u = (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return ((2 * u - 1) * sqrt(3)).reshape(shape)


class Case:
    def __init__(self, name: str) -> None:
        self.spec: dict[str, Any] = json.loads((HERE / f"{name}.json").read_text())
        self.golden = load_file(HERE / f"{name}.safetensors")
        self.config: dict[str, Any] = self.spec["config"]
        self.checked: set[str] = set()

    def input(self, name: str) -> Tensor:
        spec = self.spec["inputs"][name]
        return self.raw_input(spec["name"], spec["shape"])

    @staticmethod
    def raw_input(name: str, shape: tuple[int, ...] | list[int]) -> Tensor:
        return torch.from_numpy(unit("input/" + name, shape)).float()

    def fill(self, module: nn.Module) -> None:
        """Gives the module the recipe's weights; its keys and shapes must be those recorded."""
        rows = {row["key"]: row for row in self.spec["state_dict"]}
        state = module.state_dict()
        assert {k: list(v.shape) for k, v in state.items()} == {k: r["shape"] for k, r in rows.items()}
        aliases = self.spec["aliases"]
        for key, value in state.items():
            if key.endswith(KEPT) or key in aliases:
                continue
            x, last = unit(key, tuple(value.shape)), key.rsplit(".", 1)[-1]
            factor = rows[key].get("scale_factor", 1.0)
            if value.ndim >= 2:
                x = x * factor / sqrt(prod(value.shape[1:]))
            elif last in ("weight", "gamma", "running_var"):
                x = 1 + 0.1 * factor * x
            else:
                x = 0.1 * factor * x
            value.copy_(torch.from_numpy(x))
        module.load_state_dict(state)

    def compare(self, name: str, value: Tensor) -> None:
        expected, spec = self.golden[name], self.spec["outputs"][name]
        self.checked.add(name)
        assert list(value.shape) == spec["shape"], f"{name}: {list(value.shape)} instead of {spec['shape']}"
        if not expected.is_floating_point():
            assert torch.equal(value.to(expected.dtype), expected), name
            return
        atol = spec.get("atol", self.spec["tolerance"]["default_atol"])
        rtol = self.spec["tolerance"]["rtol"]
        worst = ((value.float() - expected).abs() - rtol * expected.abs()).max().item()
        assert worst <= atol, f"{name}: off by {worst:.2e}, allowed {atol:.2e}"

    def all_checked(self) -> None:
        assert self.checked == set(self.golden), f"never compared: {sorted(set(self.golden) - self.checked)}"
