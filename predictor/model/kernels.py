"""Matrix products and attention, in the form each device runs fastest.

Every kernel here treats rows alike: a row's bits do not depend on which other rows share the call. On CPU that
holds for the oneDNN path from two rows up, and for the MKL path at multiples of four rows (measured, and held by
tests/test_kernels.py), hence `ROW_MULTIPLE` and the padding. On CUDA cuBLAS chooses its kernel by shape, so every
product there has one shape, `DEVICE_ROWS` rows (held by tests/gpu).
"""

from __future__ import annotations

import logging
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from predictor.model.config import Activation

logger = logging.getLogger(__name__)

# Rows are padded to this multiple. oneDNN needs 2 (a single row takes a dot-product kernel that sums in another
# order); MKL, which serves where oneDNN has no kernel, needs 4.
ROW_MULTIPLE = 4

# On CUDA every product has exactly this many rows, and more rows are more products. Reading the weights takes longer
# than the arithmetic up to 110 rows on V100 (97 TFLOP/s, 900 GB/s) and 180 on H200, so padding to 64 is nearly free.
DEVICE_ROWS = 64

# Rows of a half-precision weight that are widened to fp32 at once: 2,048 x 1,600 x 4 B = 13 MB, inside an L3.
_UPCAST_ROWS = 2048


class Linear(Protocol):
    """y = activation(x W^T + b): x [R, K] -> [R, N], in the dtype the kernel was made for."""

    def __call__(self, x: Tensor) -> Tensor: ...


class PackedLinear:
    """oneDNN with the weight reordered once at load time: three times MKL's speed at one row on an AVX-512 CPU."""

    def __init__(self, weight: Tensor, bias: Tensor | None, activation: Activation | None) -> None:
        # _reorder_linear_weight and _linear_pointwise are what torch.compile emits for CPU linears. They are not
        # public: pinned with torch 2.13.0, and `make_linear` falls back where they are missing.
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, 32)
        self._bias = bias
        self._attribute, self._algorithm = {
            None: ("none", ""),
            "gelu_tanh": ("gelu", "tanh"),
            "gelu": ("gelu", "none"),
            "relu": ("relu", ""),
        }[activation]

    def __call__(self, x: Tensor) -> Tensor:
        result: Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self._weight, self._bias, self._attribute, [], self._algorithm
        )
        return result


class UpcastLinear:
    """CPU without a packed kernel for the dtype: the weight stays narrow, the arithmetic is fp32."""

    def __init__(self, weight: Tensor, bias: Tensor | None, activation: Activation | None) -> None:
        self._weight = weight
        self._bias = None if bias is None else bias.float()
        self._activation = activation

    def __call__(self, x: Tensor) -> Tensor:
        wide = x.float()
        parts = [F.linear(wide, weight.float()) for weight in self._weight.split(_UPCAST_ROWS)]
        y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        if self._bias is not None:
            y = y + self._bias
        return activate(y, self._activation).to(x.dtype)


class DeviceLinear:
    """The device's own library (cuBLAS), `DEVICE_ROWS` rows at a time; x is padded to a multiple of them."""

    def __init__(self, weight: Tensor, bias: Tensor | None, activation: Activation | None) -> None:
        self._weight, self._bias = weight.t(), bias
        # cuBLASLt's product can end in this GELU, in fp32; on CPU the same call is the other GELU.
        self._fused = activation == "gelu_tanh" and weight.is_cuda and bias is not None
        self._activation = None if self._fused else activation

    def __call__(self, x: Tensor) -> Tensor:
        y = torch.empty((len(x), self._weight.shape[1]), dtype=x.dtype, device=x.device)
        for part, out in zip(x.split(DEVICE_ROWS), y.split(DEVICE_ROWS), strict=True):
            if self._bias is None:
                torch.mm(part, self._weight, out=out)
            elif self._fused:
                # Not public; pinned with torch 2.13.0.
                torch._addmm_activation(self._bias, part, self._weight, use_gelu=True, out=out)
            else:
                torch.addmm(self._bias, part, self._weight, out=out)
        return activate(y, self._activation)


class DeviceLogits:
    """Half-precision operands, fp32 sums and fp32 result: logits are never rounded to the weights' width."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight.t()

    def __call__(self, x: Tensor) -> Tensor:
        y = torch.empty((len(x), self._weight.shape[1]), dtype=torch.float32, device=x.device)
        for part, out in zip(x.split(DEVICE_ROWS), y.split(DEVICE_ROWS), strict=True):
            torch.mm(part, self._weight, out_dtype=torch.float32, out=out)
        return y


def activate(x: Tensor, activation: Activation | None) -> Tensor:
    if activation is None:
        return x
    if activation == "relu":
        return F.relu(x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def make_linear(weight: Tensor, bias: Tensor | None, activation: Activation | None = None) -> Linear:
    """The fastest linear for where `weight` [N, K] lies and its dtype."""
    if weight.device.type != "cpu":
        return DeviceLinear(weight, bias, activation)
    try:
        return PackedLinear(weight, bias, activation)
    except (RuntimeError, AttributeError, NotImplementedError) as error:
        logger.debug("no packed kernel for %s: %s", weight.dtype, str(error).splitlines()[0])
        return UpcastLinear(weight, bias, activation)


def make_logits(weight: Tensor) -> Linear:
    """The output matrix [V, E] as a linear whose result is fp32 whatever the weight's dtype."""
    if weight.dtype == torch.float32:
        return make_linear(weight, None)
    if weight.device.type == "cpu":
        # The embedding table itself, widened block by block: no second copy of the largest matrix.
        upcast = UpcastLinear(weight, None, None)
        return lambda x: upcast(x.float())
    return DeviceLogits(weight)


def pad_rows(rows: int, device_type: str = "cpu") -> int:
    """How many rows a step of `rows` real ones runs with."""
    multiple = ROW_MULTIPLE if device_type == "cpu" else DEVICE_ROWS
    return -(-rows // multiple) * multiple


def attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """One sequence's attention: query [C, H, D] over keys and values [T, H, D] -> [C, H, D].

    The C queries are the last C of the T positions; `mask` [C, T] is true where a query may look, None for C = 1.
    Sums are fp32 inside. The call's shape depends on this sequence alone, so its bits do too.
    """
    attended = F.scaled_dot_product_attention(
        query.transpose(0, 1)[None],
        keys.transpose(0, 1)[None],
        values.transpose(0, 1)[None],
        attn_mask=mask,
        scale=scale,
    )
    return attended[0].transpose(0, 1)
