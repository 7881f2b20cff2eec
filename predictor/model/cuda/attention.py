"""The attention of rows that are one token of a sequence each: all of them in one kernel a layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from predictor.model.cuda.library import Kernels


class DecodeAttention:
    """Stores the new keys and values of B sequences and attends; `gpt2.Attention` for steps of such rows alone."""

    def __init__(
        self,
        kernels: Kernels,
        kv: Tensor,
        first_slots: Tensor,
        positions: Tensor,
        scales: Sequence[float],
        context: int,
        rows: int,
    ) -> None:
        """kv [L, 2, slots, H, D]; first_slots, positions [B] int64, as in `Kernels.decode_attention`; scales [L].

        `context`: no position reaches it; `rows`: how many rows, B or more, a step has.
        """
        _, _, _, H, D = kv.shape
        self._kernels, self._kv, self._scales = kernels, kv, scales
        self._first_slots, self._positions = first_slots, positions
        self._attended = torch.zeros((rows, H, D), dtype=kv.dtype, device=kv.device)
        self._workspace = kernels.workspace(len(positions), H, D, context, kv.device)

    def __call__(self, layer: int, qkv: Tensor) -> Tensor:
        """qkv [R, 3, H, D] -> [R, H, D], zero past the first B rows; the next call overwrites it."""
        keys, values = self._kv[layer]
        self._kernels.decode_attention(
            qkv, keys, values, self._first_slots, self._positions, self._attended, self._workspace, self._scales[layer]
        )
        return self._attended
