"""A small model that guesses what a large one will draw: keys and values of its own, in the large one's slots.

It draws each token as the model will: by the same sampler, with the position's own random number. So its guesses hold
as often as both models' distributions agree. What it computes changes nothing but speed (speculation.py).
"""

from __future__ import annotations

import torch

from predictor.engine.runner import GPT2Forward
from predictor.engine.sampler import sample_tokens
from predictor.engine.scheduler import Ahead, Batch, Work
from predictor.engine.sequence import Sequence


class Draft:
    """Guesses for running sequences. Each sequence's `drafted` counts what of its window is computed here.

    A sequence's slots are the same in both memories: what stands where is known from the large model's allocator.
    """

    def __init__(self, forward: GPT2Forward, chunk_tokens: int) -> None:
        """`forward` has as many slots as the large model's; `chunk_tokens`: the most that one step catches up on."""
        self._forward = forward
        self._chunk_tokens = chunk_tokens

    def catch_up(self, sequences: list[Sequence]) -> bool:
        """Compute what has been said since the draft last guessed, up to a chunk; whether that was all of it."""
        work, room = list[Work](), self._chunk_tokens
        for sequence in sequences:
            if _lags(sequence) and room:
                # All but the newest token, from which the first guess is drawn.
                tokens = sequence.tokens_from(sequence.drafted, min(sequence.undrafted - 1, room))
                work.append(Work(sequence, sequence.drafted, tokens, samples=0))
                room -= len(tokens)
        if work:
            self._compute(work)
        return not any(_lags(sequence) for sequence in sequences)

    def guess(self, sequences: list[Sequence], most: list[int]) -> list[list[int]]:
        """What follows each sequence, up to `most` of its `room_for_guesses`; nothing where the draft lags."""
        guesses: list[list[int]] = [[] for _ in sequences]
        going = [place for place, sequence in enumerate(sequences) if most[place] > 0 and not _lags(sequence)]
        while going:
            drawing = [Ahead(sequences[place], guesses[place]) for place in going]
            chosen = self._compute(
                [Work(each.sequence, each.sequence.drafted, _unseen(each), samples=1) for each in drawing],
                drawing,
            )
            for place, token in zip(list(going), chosen, strict=True):
                if token is not None:
                    guesses[place].append(token)
                if token is None or len(guesses[place]) == most[place]:
                    going.remove(place)
        return guesses

    def _compute(self, work: list[Work], drawing: list[Ahead] | None = None) -> list[int | None]:
        """Run one step of the draft, and draw a token for each of `drawing`, to which its works belong."""
        with torch.inference_mode():
            logits = self._forward.logits(Batch(work=work))
            for each in work:
                each.sequence.drafted += len(each.token_ids)
            return sample_tokens(logits, drawing, self._forward.choose) if drawing else []


def _lags(sequence: Sequence) -> bool:
    """Whether the draft has missed more than its own last guess, which it never computes, and the newest token."""
    return sequence.undrafted > 2


def _unseen(ahead: Ahead) -> list[int]:
    """The tokens to compute before the next guess: the newest ones, or the guess before."""
    return ahead.guesses[-1:] or ahead.sequence.tokens_from(ahead.sequence.drafted, ahead.sequence.undrafted)
