"""The engine's nouns: a request, and the sequences it asks for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from predictor.engine.params import SamplingParams, Scored, Token
from predictor.engine.speculation import Lookup, Reach

if TYPE_CHECKING:
    from torch import Tensor

    from predictor.engine.cache import SlotRange

# Stands in `output_ids` for a token that the device has been told to draw and the host has not read yet.
PENDING = -1

# Called in the engine's thread with each token, or with the error that ended the sequence.
Sink = Callable[[Token | Exception], None]


@dataclass(eq=False, slots=True)
class Request:
    """One prompt and its n sequences. They share the prompt's prefill: the leader runs it, the others copy it."""

    prompt_ids: list[int]
    params: SamplingParams
    leader: Sequence = field(init=False)
    pending: list[Sequence] = field(default_factory=list)  # siblings that have not started
    prompt_slots: SlotRange | None = None  # where the prompt's keys and values lie; None: the leader has to compute it
    prompt_slots_orphaned: bool = False  # their owner has ended: the next sibling takes them over
    prompt_logits: Tensor | None = None  # [V] of the prompt's last position, for the siblings' first token
    prompt_logprobs: list[Scored] = field(default_factory=list)  # from the second token on, as far as computed

    @property
    def slots_needed(self) -> int:
        """KV slots of one sequence at its longest; the last token's keys and values are never read."""
        prompt, window = len(self.prompt_ids), self.params.window
        needed = prompt - start_of_window(prompt, window) + self.params.draws - 1
        return needed if window is None else min(needed, window)


@dataclass(eq=False, slots=True)
class Sequence:
    """One sample in the making. Mutable; owned by the engine's thread.

    The model sees a window of its tokens, as a rule all of them: the token at `window_start` is at position 0.
    """

    request: Request
    seed: int
    sink: Sink
    output_ids: list[int] = field(default_factory=list)
    window_start: int = field(init=False)
    prompt_ids: list[int] = field(init=False)  # the request's, as the next
    params: SamplingParams = field(init=False)
    draws: int = field(init=False)  # as the params'
    computed: int = field(init=False)  # positions whose keys and values are in the KV memory
    drafted: int = field(init=False)  # likewise in the draft's (draft.py), never more
    slots: SlotRange | None = None
    turn: int = 0  # when its window joined the line for prefill
    lookup: Lookup = field(default_factory=Lookup)
    reach: Reach = field(default_factory=Reach)
    done: bool = False

    def __post_init__(self) -> None:
        self.prompt_ids, self.params = self.request.prompt_ids, self.request.params
        self.draws = self.params.draws
        self.slide()

    @property
    def leads(self) -> bool:
        return self.request.leader is self

    @property
    def length(self) -> int:
        """Tokens so far, prompt included."""
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def uncomputed(self) -> int:
        """Tokens of the window that are still to be computed: 1 while decoding, more in a prefill."""
        return len(self.prompt_ids) + len(self.output_ids) - self.window_start - self.computed

    @property
    def undrafted(self) -> int:
        """Tokens of the window that the draft has not computed, the newest included."""
        return self.length - self.window_start - self.drafted

    @property
    def drawn_out(self) -> bool:
        """Whether its last token is drawn, though perhaps not read."""
        return len(self.output_ids) >= self.draws

    @property
    def window_full(self) -> bool:
        """Whether the newest token has no position left."""
        window = self.params.window
        return window is not None and self.length - self.window_start > window

    @property
    def room_for_guesses(self) -> int:
        """Guesses that could all hold: a token follows them, and what is computed for them has its place."""
        room = self.draws - len(self.output_ids) - 1
        window = self.params.window
        return room if window is None else min(room, window - self.computed - 1)

    def scoring(self, rows: int) -> int:
        """How many of the next `rows`, from the first on, score the prompt's next token: all before its last token."""
        return max(min(rows, len(self.prompt_ids) - 1 - self.computed), 0)

    def slide(self) -> None:
        """Begin the window that the tokens so far call for; nothing of it is computed."""
        self.window_start, self.computed, self.drafted = start_of_window(self.length, self.params.window), 0, 0

    def tokens_from(self, position: int, most: int) -> list[int]:
        """The first `most` tokens of the window from `position` on."""
        first = self.window_start + position
        prompt = self.prompt_ids
        if first >= len(prompt):
            return self.output_ids[first - len(prompt) : first - len(prompt) + most]
        return (prompt[first : first + most] + self.output_ids[:most])[:most]


def start_of_window(length: int, window: int | None) -> int:
    """How many of `length` tokens the model no longer sees when it draws the next one.

    A full window moves on by half, so between half of it and all of it is seen. Each move computes the half that stays
    again, at its new positions: one prefill row for each token generated. The count depends on `length` alone: a text
    goes on the same whether it was sent or generated.
    """
    if window is None or length <= window:
        return 0
    stride = window - window // 2
    return -(-(length - window) // stride) * stride


def new_request(prompt_ids: list[int], params: SamplingParams, sinks: list[Sink]) -> Request:
    """A request with one sequence per sink; sample k is drawn with seed + k, wrapping at 2^64."""
    request = Request(prompt_ids, params)
    request.leader, *request.pending = (
        Sequence(request, (params.seed + k) % 2**64, sink) for k, sink in enumerate(sinks)
    )
    return request
