"""The model on CUDA: FP16 against FP32 and the CPU, graphs against eager steps, sampling, determinism."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from predictor.engine.params import SamplingParams
from predictor.engine.philox import uniform
from predictor.engine.sampler import sample
from predictor.model.cuda.graphs import DecodeRow, DecodeSteps
from predictor.model.cuda.library import Kernels
from predictor.model.cuda.sampling import MOST_CANDIDATES, Draw, choose
from predictor.model.gpt2 import GPT2
from tests.gpu.models import CPU, DEVICE, compute, new_model, shape, token_ids

# One sequence of the full context, in chunks as the engine computes it.
CHUNK = 128


def logits_of_all(model: GPT2, ids: list[int]) -> Tensor:
    """[T, V] on the CPU, computed chunk by chunk, the last five tokens one at a time."""
    kv, parts, place = model.new_kv(len(ids)), [], 0
    while place < len(ids):
        size = min(CHUNK, max(1, len(ids) - 5 - place))
        parts.append(compute(model, kv, [(ids[place : place + size], place, 0)]).cpu())
        place += size
    return torch.cat(parts)


@pytest.fixture(scope="module")
def wanted() -> Tensor:
    """FP32 on the CPU, at the full context."""
    config = shape()
    return logits_of_all(new_model(config, torch.float32, CPU), token_ids(config.context, config))


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.float16, 5e-3)], ids=str)
def test_logits_at_the_full_context_are_the_cpus(wanted: Tensor, dtype: torch.dtype, most: float) -> None:
    config = shape()
    logits = logits_of_all(new_model(config, dtype), token_ids(config.context, config))
    assert not logits.isnan().any()
    assert (logits - wanted).norm() / wanted.norm() <= most
    assert (logits.argmax(-1) == wanted.argmax(-1)).double().mean() >= 0.98
    divergence = torch.nn.functional.kl_div(
        logits.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="none"
    )
    assert divergence.sum(-1).mean() <= most


@pytest.fixture(scope="module")
def model() -> GPT2:
    return new_model(shape(), torch.float16)


class Served:
    """Sequences that are prefilled, each alone, and then decoded together."""

    CONTEXT = 320  # slots of each

    def __init__(self, model: GPT2, kernels: Kernels, lengths: list[int], most_rows: int = 100) -> None:
        self.model, self.lengths = model, list(lengths)
        slots = self.CONTEXT * len(lengths)
        self.kv = model.new_kv(slots + 1)
        self.kv.fill_(torch.nan)
        self.steps = DecodeSteps(model, kernels, self.kv, most_rows=most_rows, scratch_slot=slots)
        last = [
            compute(model, self.kv, [(token_ids(length, model.config, number), 0, number * self.CONTEXT)])[-1]
            for number, length in enumerate(lengths)
        ]
        self.first_logits = torch.stack(last)

    def rows(self, numbers: list[int], tokens: list[int], draws: list[Draw] | None = None) -> list[DecodeRow]:
        return [
            DecodeRow(tokens[number], self.lengths[number], number * self.CONTEXT, draws[number] if draws else Draw())
            for number in numbers
        ]


@pytest.fixture(scope="module")
def served(model: GPT2, kernels: Kernels) -> Served:
    return Served(model, kernels, [1 + 31 * i % 300 for i in range(100)])


def test_a_replayed_graph_gives_the_bits_of_an_eager_step(model: GPT2, served: Served) -> None:
    tokens = token_ids(100, model.config, seed=9)
    for numbers in ([5], [1, 2, 3], list(range(16)), list(range(64)), list(range(100))):
        launched = served.steps.launch(served.rows(numbers, tokens))
        assert launched.result() == launched.logits.argmax(-1).tolist()
        replayed = launched.logits.clone()
        eager = compute(model, served.kv, [([tokens[i]], served.lengths[i], i * served.CONTEXT) for i in numbers])
        assert torch.equal(replayed, eager), f"{len(numbers)} rows"


def test_a_rows_bits_do_not_depend_on_the_batch(model: GPT2, served: Served) -> None:
    tokens = token_ids(100, model.config, seed=10)
    together = served.steps.launch(served.rows(list(range(100)), tokens)).logits.clone()
    assert not together.isnan().any()
    for numbers in ([0], [41], [99], [7, 8, 9], list(range(30, 63))):
        launched = served.steps.launch(served.rows(numbers, tokens))
        assert torch.equal(launched.logits, together[numbers]), f"rows {numbers}"


def test_decoding_beside_prefill_changes_no_bits(model: GPT2, served: Served) -> None:
    """A mixed step runs eagerly: its decoding rows and its chunks are as they are alone."""
    config = model.config
    prompt, tokens = token_ids(200, config, seed=11), token_ids(100, config, seed=12)
    kv = torch.cat([served.kv, torch.zeros_like(served.kv[:, :, :400])], dim=2)
    place = served.kv.shape[2]
    alone = served.steps.launch(served.rows([3, 4], tokens)).logits.clone()
    decoding = [([tokens[i]], served.lengths[i], i * served.CONTEXT) for i in (3, 4)]
    mixed = compute(model, kv, [*decoding, (prompt[:128], 0, place)])
    assert torch.equal(mixed[:2], alone)
    assert torch.equal(mixed[2:], compute(model, kv, [(prompt[:128], 0, place + 200)]))
    here, there = (kv[:, :, first : first + 128] for first in (place, place + 200))
    assert torch.equal(here, there)


def test_a_launch_never_waits_for_the_device(model: GPT2, served: Served) -> None:
    rows = served.rows(list(range(20)), token_ids(100, model.config), [Draw(temperature=1.0, top_k=50)] * 100)
    served.steps.launch(rows).result()
    torch.cuda.set_sync_debug_mode("error")
    try:
        launched = served.steps.launch(rows)
        following = served.steps.launch(rows)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(launched.result()) == len(following.result()) == 20


@pytest.mark.parametrize("chained", [True, False])
def test_generation_is_the_same_each_time_however_it_is_driven(model: GPT2, kernels: Kernels, chained: bool) -> None:
    def generate(chained: bool) -> list[list[int]]:
        served = Served(model, kernels, [3, 150, 40], most_rows=4)
        kinds = [(0.0, 0, 1.0), (0.8, 50, 1.0), (1.2, 0, 0.9)]

        def draws(i: int) -> list[Draw]:
            return [Draw(7 + k, i, temperature, top_k, top_p) for k, (temperature, top_k, top_p) in enumerate(kinds)]

        launched = served.steps.draw(served.first_logits, draws(0))
        tokens: list[list[int]] = [[], [], []]
        for i in range(1, 60):
            known = [0, 0, 0] if chained else launched.result()
            rows = served.rows([0, 1, 2], known, draws(i))
            if chained:
                rows = [DecodeRow(0, row.position, row.first_slot, row.draw, source) for source, row in enumerate(rows)]
            following = served.steps.launch(rows)
            for each, token in zip(tokens, launched.result(), strict=True):
                each.append(token)
            launched = following
            served.lengths = [length + 1 for length in served.lengths]
        return tokens

    once = generate(chained)
    assert generate(chained) == once
    assert generate(not chained) == once
    assert all(token >= 0 for each in once for token in each)


def test_device_sampler_draws_what_the_cpu_draws() -> None:
    """From equal logits; fp64 sums in another order could differ only within 1e-15 of a boundary."""
    kinds = [
        (temperature, top_k, top_p)
        for temperature in (0.0, 0.7, 3.0)
        for top_k in (0, 1, 50, MOST_CANDIDATES, 1000)
        for top_p in (1.0, 0.9, 0.3)
    ]
    draws = [Draw(i * 2**57, i % 5, *kind) for i, kind in enumerate(kinds)]
    logits = torch.randn(len(kinds), 50257, generator=torch.Generator().manual_seed(0)) * 3

    class Row:
        def __init__(self, draw: Draw) -> None:
            self.seed, self.output_ids, self.prompt_ids = draw.seed, [0] * draw.count, [0]
            self.params = SamplingParams(9, temperature=draw.temperature, top_k=draw.top_k, top_p=draw.top_p)

    expected = [drawn.token_id for drawn in sample(logits.clone(), [Row(draw) for draw in draws])]
    u = torch.tensor(uniform([draw.seed for draw in draws], [draw.count for draw in draws]).tolist()).double()
    top_k = torch.tensor([draw.top_k for draw in draws], device=DEVICE)
    temperature, top_p = (
        torch.tensor([getattr(draw, name) for draw in draws], dtype=torch.float64, device=DEVICE)
        for name in ("temperature", "top_p")
    )
    given, drawn = logits.to(DEVICE), u.to(DEVICE)
    methods = [draw.method(50257) for draw in draws]
    chosen = {method: choose(method, given, drawn, top_k, temperature, top_p).tolist() for method in set(methods)}
    assert [chosen[method][row] for row, method in enumerate(methods)] == expected
