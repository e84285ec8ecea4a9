"""Which query is matched to which target: the cheapest one-to-one assignment (the Hungarian method; DETR, Mask2Former).

Legend: Q queries, T targets. The costs are the criteria's business (`mask2former_loss`, `detr_loss`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from dinov3.errors import DinoError, require


@torch.no_grad()
def hungarian(cost: Tensor) -> tuple[Tensor, Tensor]:
    """cost [Q, T] → (rows, cols), both [min(Q, T)] of int64 on the cost's device, rows ascending: query rows[i] takes
    target cols[i], every target at most once, and no other choice has a smaller sum of costs.

    Raises `DinoError` for costs that are NaN or infinite: the method would fail or, worse, give any assignment.
    """
    optimize = require("scipy.optimize", "heads", "matching queries with targets")
    if cost.ndim != 2:
        raise DinoError(f"the matching takes costs [queries, targets], not {list(cost.shape)}; call it once an image")
    matrix = cost.detach().to("cpu", torch.float64)
    if bad := int((~matrix.isfinite()).sum()):
        raise DinoError(
            f"{bad} of the {cost.numel()} matching costs ({cost.shape[0]} queries, {cost.shape[1]} targets) are NaN or "
            "infinite: the training has diverged (lower the learning rate, clip gradients) or a target is broken"
        )
    rows, cols = optimize.linear_sum_assignment(matrix.numpy())
    return (torch.as_tensor(rows, device=cost.device), torch.as_tensor(cols, device=cost.device))
