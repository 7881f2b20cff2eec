"""The engine's nouns: a request, and the sequences it asks for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from predictor.engine.params import SamplingParams, Token

if TYPE_CHECKING:
    from torch import Tensor

    from predictor.engine.cache import SlotRange

# Called in the engine's thread with each token, or with the error that ended the sequence.
Sink = Callable[[Token | Exception], None]


@dataclass(eq=False, slots=True)
class Request:
    """One prompt and its n sequences. They share the prompt's prefill: the leader runs it, the others copy it."""

    prompt_ids: list[int]
    params: SamplingParams
    leader: Sequence = field(init=False)
    pending: list[Sequence] = field(default_factory=list)  # siblings that have not started
    prompt_slots: SlotRange | None = None  # where the prompt's keys and values lie
    prompt_slots_orphaned: bool = False  # their owner has ended: the next sibling takes them over
    prompt_logits: Tensor | None = None  # [V] of the prompt's last position, for the siblings' first token

    @property
    def slots_needed(self) -> int:
        """KV slots of one sequence at its longest; the last token's keys and values are never read."""
        return len(self.prompt_ids) + self.params.max_new_tokens - 1


@dataclass(eq=False, slots=True)
class Sequence:
    """One sample in the making. Mutable; owned by the engine's thread."""

    request: Request
    seed: int
    sink: Sink
    output_ids: list[int] = field(default_factory=list)
    computed: int = 0  # positions whose keys and values are in the KV memory
    slots: SlotRange | None = None
    done: bool = False

    @property
    def prompt_ids(self) -> list[int]:
        return self.request.prompt_ids

    @property
    def params(self) -> SamplingParams:
        return self.request.params

    @property
    def leads(self) -> bool:
        return self.request.leader is self

    @property
    def in_prefill(self) -> bool:
        return self.computed < len(self.prompt_ids)


def new_request(prompt_ids: list[int], params: SamplingParams, sinks: list[Sink]) -> Request:
    """A request with one sequence per sink; sample k is drawn with seed + k, wrapping at 2^64."""
    request = Request(prompt_ids, params)
    request.leader, *request.pending = (
        Sequence(request, (params.seed + k) % 2**64, sink) for k, sink in enumerate(sinks)
    )
    return request
