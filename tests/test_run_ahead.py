"""Steps launched before the last one is read: the CUDA engine's order of things, on the CPU with torch for kernels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from predictor.checkpoints.load import load_gpt2
from predictor.engine.cuda import CUDAForward
from predictor.engine.engine import Engine
from predictor.engine.params import SamplingParams, Token
from predictor.engine.philox import uniform
from predictor.engine.runner import GPT2Forward
from predictor.engine.sequence import new_request
from predictor.model.kernels import attend

CPU = torch.device("cpu")


class TorchKernels:
    """What cuda/library.py's Kernels do, by torch and on the CPU."""

    def workspace(self, *_: object) -> None:
        return None

    def decode_attention(
        self, qkv: Tensor, keys: Tensor, values: Tensor, first_slots: Tensor, positions: Tensor, out: Tensor,
        workspace: None, scale: float,
    ) -> None:  # fmt: skip
        for row, (first, position) in enumerate(zip(first_slots.tolist(), positions.tolist(), strict=True)):
            keys[first + position], values[first + position] = qkv[row, 1], qkv[row, 2]
            seen = slice(first, first + position + 1)
            out[row] = attend(qkv[row : row + 1, 0], keys[seen], values[seen], None, scale)[0]

    def uniform(self, seeds: Tensor, counts: Tensor) -> Tensor:
        return torch.tensor(uniform([seed % 2**64 for seed in seeds.tolist()], counts.tolist()).tolist()).double()


def new_engine(checkpoint: Path, ahead: bool, **limits: int) -> Engine:
    model = load_gpt2(checkpoint, torch.float32, CPU)
    model.kernels = TorchKernels()  # type: ignore[assignment]
    slots = limits.pop("slots", 600)
    forward = CUDAForward(model, slots, 8) if ahead else GPT2Forward(model, slots)
    return Engine(forward, **{"context": 128, "max_running": 8, "chunk_tokens": 16, "step_tokens": 48} | limits)


KINDS = [
    {"temperature": 0.0},
    {"temperature": 1.0, "top_k": 0},
    {"temperature": 0.9, "top_k": 5},
    {"temperature": 2.0, "top_k": 0, "top_p": 0.8},
    {"temperature": 0.8, "top_k": 200},
]
BY_HOST = [{"temperature": 0.8, "repetition_penalty": 1.3}, {"temperature": 0.0, "logprobs": 2, "min_new_tokens": 4}]


def generate(
    engine: Engine, kinds: list[dict[str, float]], arrive_every: int = 1, **more: object
) -> list[list[object]]:
    """All tokens of 24 requests, of which one arrives every few steps; prompts, lengths and ends differ."""
    arrived: list[list[object]] = []
    step = 0
    while True:
        if step % arrive_every == 0 and step // arrive_every < 24:
            number = step // arrive_every
            n = 3 if number % 7 == 0 else 1
            params = SamplingParams(
                **{"max_new_tokens": 1 + 5 * number % 23, "seed": number, "n": n}
                | {"end_tokens": frozenset(range(0, 278, 17))}
                | kinds[number % len(kinds)]
                | more,  # type: ignore[arg-type]
            )
            sinks: list[list[object]] = [[] for _ in range(n)]
            arrived += sinks
            prompt = [(number * 31 + i * 7) % 250 for i in range(1 + number * 5 % 40)]
            engine.add(new_request(prompt, params, [each.append for each in sinks]))
        busy = engine.step()
        step += 1
        if not busy and step >= 24 * arrive_every:
            return arrived


@pytest.mark.parametrize("arrive_every", [1, 3])
@pytest.mark.parametrize("kinds", [KINDS, BY_HOST + KINDS], ids=["device", "mixed"])
@pytest.mark.parametrize("limits", [{}, {"max_running": 2}, {"slots": 130}], ids=str)
def test_running_ahead_changes_no_token(
    checkpoint: Path, kinds: list[dict[str, float]], arrive_every: int, limits: dict[str, int]
) -> None:
    wanted = generate(new_engine(checkpoint, ahead=False, **limits), kinds, arrive_every)
    ahead = new_engine(checkpoint, ahead=True, **limits)
    tokens = generate(ahead, kinds, arrive_every)
    assert [[each.id for each in sink] for sink in tokens] == [[each.id for each in sink] for sink in wanted]
    assert [sink[-1] for sink in tokens] == [sink[-1] for sink in wanted], "how they ended"
    assert ahead.load.used_slots == 0
    assert ahead.load.running_requests == ahead.load.waiting_requests == 0


def test_running_ahead_of_a_sliding_window(checkpoint: Path) -> None:
    more = {"window": 40, "max_new_tokens": 90, "end_tokens": frozenset()}
    wanted = generate(new_engine(checkpoint, ahead=False), KINDS, 2, **more)
    assert generate(new_engine(checkpoint, ahead=True), KINDS, 2, **more) == wanted


def test_a_step_is_launched_before_the_last_one_is_read(checkpoint: Path) -> None:
    engine, events = new_engine(checkpoint, ahead=True), []
    launch = engine._runner.launch

    def recorded(batch: object) -> object:
        events.append("launch")
        launched = launch(batch)  # type: ignore[arg-type]

        class Recorded:
            def result(self) -> object:
                events.append("read")
                return launched.result()

        return Recorded()

    engine._runner.launch = recorded  # type: ignore[method-assign, assignment]
    arrived: list[Token] = []
    engine.add(new_request([5, 6, 7], SamplingParams(max_new_tokens=4, temperature=0.0), [arrived.append]))
    while engine.step():
        pass
    assert events == ["launch", "launch", "read", "launch", "read", "launch", "read", "read"]
    assert len(arrived) == 4


def test_ending_a_sequence_whose_token_is_being_drawn(checkpoint: Path) -> None:
    engine, arrived = new_engine(checkpoint, ahead=True), []
    request = new_request([5, 6, 7], SamplingParams(max_new_tokens=50), [arrived.append])
    engine.add(request)
    for _ in range(5):
        engine.step()
    delivered = len(arrived)
    engine.end(request.leader)
    assert engine.load.used_slots == 0
    while engine.step():
        pass
    assert len(arrived) == delivered == 4
