"""Each CUDA kernel against torch on the same device, and its bits against themselves."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from predictor.engine.philox import uniform
from predictor.model.cuda.library import Kernels
from predictor.model.kernels import DEVICE_ROWS, DeviceLinear, activate
from tests.gpu.models import DEVICE

DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if torch.cuda.get_device_capability()[0] >= 8 else [])
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=DEVICE).to(dtype)


class Memory:
    """Sequences of the given lengths, one behind the other; what no kernel may read is NaN."""

    def __init__(self, contexts: list[int], H: int, D: int, dtype: torch.dtype) -> None:
        self.contexts, self.H, self.D = contexts, H, D
        self.qkv = randn(len(contexts), 3, H, D, seed=1, dtype=dtype)
        self.keys, self.values = torch.full((2, sum(contexts) + len(contexts), H, D), torch.nan, device=DEVICE).to(
            dtype
        )
        self.first_slots, place = [], 0
        for number, context in enumerate(contexts):
            self.first_slots.append(place)
            self.keys[place : place + context - 1] = randn(context - 1, H, D, seed=2 * number + 2, dtype=dtype)
            self.values[place : place + context - 1] = randn(context - 1, H, D, seed=2 * number + 3, dtype=dtype)
            place += context + 1

    def attend(self, kernels: Kernels, rows: slice = slice(None)) -> Tensor:
        """The attention of some of the sequences [B, H, D]."""
        contexts, qkv = self.contexts[rows], self.qkv[rows].contiguous()
        workspace = kernels.workspace(len(contexts), self.H, self.D, max(contexts), DEVICE)
        out = torch.full_like(qkv[:, 0], torch.inf)
        first_slots = torch.tensor(self.first_slots[rows], device=DEVICE)
        positions = torch.tensor(contexts, device=DEVICE) - 1
        kernels.decode_attention(qkv, self.keys, self.values, first_slots, positions, out, workspace, 0.125)
        assert not workspace.arrived.any()
        return out

    def reference(self, row: int) -> Tensor:
        """By torch, in fp64; after `attend` has stored the new token."""
        seen = slice(self.first_slots[row], self.first_slots[row] + self.contexts[row])
        query, keys, values = self.qkv[row, 0], self.keys[seen], self.values[seen]
        attended = F.scaled_dot_product_attention(
            query.double()[None, :, None],
            keys.double().transpose(0, 1)[None],
            values.double().transpose(0, 1)[None],
            scale=0.125,
        )
        return attended[0, :, 0]


CONTEXTS = {
    "short": list(range(1, 41)),
    "edges": [127, 128, 129, 255, 256, 257, 511, 512, 513, 1023, 1024],
    "one": [300],
    "many": [1 + 37 * i % 1024 for i in range(256)],
}


@pytest.mark.parametrize("contexts", CONTEXTS.values(), ids=CONTEXTS.keys())
@pytest.mark.parametrize(("H", "D"), [(25, 64), (3, 80)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decode_attention_is_torchs(kernels: Kernels, dtype: torch.dtype, H: int, D: int, contexts: list[int]) -> None:
    memory = Memory(contexts, H, D, dtype)
    attended = memory.attend(kernels)
    for row, first in enumerate(memory.first_slots):
        new = first + contexts[row] - 1
        assert torch.equal(torch.stack([memory.keys[new], memory.values[new]]), memory.qkv[row, 1:])
        torch.testing.assert_close(
            attended[row].double(), memory.reference(row), rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype]
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_has_the_same_bits_every_time_and_in_any_company(kernels: Kernels, dtype: torch.dtype) -> None:
    memory = Memory(CONTEXTS["many"], 12, 64, dtype)
    wanted = memory.attend(kernels)
    for _ in range(50):
        assert torch.equal(memory.attend(kernels), wanted)
    for row in range(0, 256, 17):
        assert torch.equal(memory.attend(kernels, slice(row, row + 1))[0], wanted[row])


@pytest.mark.parametrize("width", [64, 768, 1600, 8192])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_add_norm_is_torchs(kernels: Kernels, dtype: torch.dtype, width: int) -> None:
    x, y = randn(77, width, seed=1) * 10 + 3, randn(77, width, seed=2, dtype=dtype)
    weight, bias = randn(width, seed=3), randn(width, seed=4)
    for term in (y, None):
        given, out = x.clone(), torch.empty(77, width, dtype=dtype, device=DEVICE)
        kernels.add_norm(given, term, weight, bias, 1e-5, out)
        total = x if term is None else x + term
        assert torch.equal(given, total)
        wanted = F.layer_norm(total, (width,), weight, bias, 1e-5)
        torch.testing.assert_close(out.float(), wanted, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])


def test_uniform_numbers_are_the_engines_bit_for_bit(kernels: Kernels) -> None:
    seeds, counts = [0, 1, 2**32, 2**63, 2**64 - 1, *range(1000)], [0, 9, 2**31, 2**40, 1, *range(1000)]
    signed = torch.tensor([seed - 2**64 if seed >= 2**63 else seed for seed in seeds], device=DEVICE)
    assert kernels.uniform(signed, torch.tensor(counts, device=DEVICE)).tolist() == uniform(seeds, counts).tolist()


@pytest.mark.parametrize("activation", [None, "gelu_tanh", "gelu", "relu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("inputs", "outputs"), [(768, 3072), (1600, 6400), (6400, 1600)])
def test_products_are_exact_and_a_row_keeps_its_bits(
    inputs: int, outputs: int, dtype: torch.dtype, activation: str | None
) -> None:
    weight, bias = randn(outputs, inputs, seed=1, dtype=dtype) * 0.02, randn(outputs, seed=2, dtype=dtype)
    x = randn(3 * DEVICE_ROWS, inputs, seed=3, dtype=dtype)
    linear = DeviceLinear(weight, bias, activation)  # type: ignore[arg-type]
    y = linear(x)
    wanted = activate(F.linear(x.double(), weight.double(), bias.double()), activation)  # type: ignore[arg-type]
    torch.testing.assert_close(y.double(), wanted, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    assert torch.equal(linear(x[order]), y[order]), "a row's bits depend on its place among the rows"
    few = torch.zeros_like(x[:DEVICE_ROWS])
    few[:5] = x[:5]
    assert torch.equal(linear(few)[:5], y[:5]), "a row's bits depend on its neighbours"
