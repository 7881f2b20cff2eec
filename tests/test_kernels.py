"""Rows are treated alike: the foundation of the determinism promise, and the accuracy of each linear."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from predictor.model.kernels import (
    PackedLinear,
    UpcastLinear,
    activate,
    attend,
    make_linear,
    make_logits,
    pad_rows,
)

# (inputs, outputs): the tiny model's, the 124M's and the 1.5B's.
SHAPES = [(64, 192), (256, 1024), (768, 2304), (3072, 768), (1600, 4800), (6400, 1600)]


def weights(inputs: int, outputs: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(inputs * outputs)
    weight = (torch.randn(outputs, inputs, generator=generator) * 0.02).to(dtype)
    bias = torch.randn(outputs, generator=generator).to(dtype)
    x = torch.randn(96, inputs, generator=generator).to(dtype)
    return weight, bias, x


@pytest.mark.parametrize("kernel", [PackedLinear, UpcastLinear])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_rows_bits_do_not_depend_on_its_company(kernel: type, shape: tuple[int, int]) -> None:
    weight, bias, x = weights(*shape)
    linear = kernel(weight, bias, "gelu_tanh")
    whole = linear(x)
    for rows in (1, 2, 3, 5, 8, 13, 31, 32, 33, 64, 95):
        padded = F.pad(x[:rows], (0, 0, 0, pad_rows(rows) - rows))
        assert torch.equal(linear(padded)[:rows], whole[:rows]), f"{rows} rows"
    order = torch.randperm(96, generator=torch.Generator().manual_seed(1))
    assert torch.equal(linear(x[order]), whole[order])


@pytest.mark.parametrize("activation", [None, "gelu_tanh", "gelu", "relu"])
@pytest.mark.parametrize("kernel", [PackedLinear, UpcastLinear])
def test_linear_and_activation_match_torch_in_fp64(kernel: type, activation: str | None) -> None:
    weight, bias, x = weights(768, 3072)
    wanted = activate(F.linear(x.double(), weight.double(), bias.double()), activation)
    torch.testing.assert_close(kernel(weight, bias, activation)(x).double(), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_weights_give_narrow_results_with_wide_sums(dtype: torch.dtype) -> None:
    weight, bias, x = weights(768, 2304, dtype)
    y = make_linear(weight, bias)(x)
    wanted = F.linear(x.double(), weight.double(), bias.double())
    assert y.dtype == dtype
    # The result is rounded once: half a unit in the last place, of numbers up to about 8.
    assert (y.double() - wanted).abs().max() <= 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logits_are_never_rounded_to_the_weights_width(dtype: torch.dtype) -> None:
    table, _, _ = weights(256, 5000, dtype)
    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(0)).to(dtype)
    logits = make_logits(table)(x)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), x.double() @ table.double().t(), rtol=0, atol=1e-5)


def test_attention_matches_the_formula() -> None:
    C, T, H, D = 5, 12, 3, 16
    generator = torch.Generator().manual_seed(0)
    query, keys, values = (torch.randn(n, H, D, generator=generator) for n in (C, T, T))
    mask = torch.arange(T)[None, :] <= torch.arange(T - C, T)[:, None]
    scores = torch.einsum("chd,thd->hct", query.double(), keys.double()) * 0.25
    wanted = torch.einsum("hct,thd->chd", scores.masked_fill(~mask, -torch.inf).softmax(-1), values.double())
    torch.testing.assert_close(attend(query, keys, values, mask, 0.25).double(), wanted, rtol=0, atol=1e-5)


def test_unpacked_kernel_serves_where_packing_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no such kernel on this CPU")

    monkeypatch.setattr(PackedLinear, "__init__", fail)
    weight, bias, x = weights(64, 192)
    linear = make_linear(weight, bias)
    assert isinstance(linear, UpcastLinear)
    torch.testing.assert_close(linear(x), F.linear(x, weight, bias), rtol=0, atol=1e-5)
