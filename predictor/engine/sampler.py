"""From logits to tokens.

Order of operations, as transformers': repetition penalty, presence and frequency penalties, logit bias, banned
tokens, minimum length, temperature, top-k, top-p, draw. Each row is treated by itself: no result depends on which
other rows share the call.
"""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from typing import Protocol

import torch
from torch import Tensor

from predictor.engine.params import Sampled, SamplingParams, Scored
from predictor.engine.philox import uniform

# Penalties may push a logit past fp32 (a repetition penalty of 1e-300 is legal); it is held at this.
_LARGEST = 3e38


class Draws(Protocol):
    """What the sampler needs to know of a sequence (engine/sequence.py's Sequence, seen from here)."""

    @property
    def seed(self) -> int: ...

    @property
    def output_ids(self) -> list[int]: ...

    @property
    def prompt_ids(self) -> list[int]: ...

    @property
    def params(self) -> SamplingParams: ...


# choose(logits [W, V], sequences) -> the token of each row; None where its largest logit is not finite.
Choose = Callable[[Tensor, SequenceOf[Draws]], list["int | None"]]


def sample(logits: Tensor, sequences: SequenceOf[Draws], choose: Choose | None = None) -> list[Sampled]:
    """Choose one token per row. logits [W, V] fp32, edited in place; row i belongs to sequences[i].

    `choose` draws from the edited logits; by default `choose_with_torch`.
    """
    if not sequences:
        return []
    logprobs = {
        row: torch.log_softmax(logits[row], dim=-1)
        for row, sequence in enumerate(sequences)
        if sequence.params.logprobs is not None
    }
    chosen = sample_tokens(logits, sequences, choose)
    return [
        Sampled(None) if token_id is None else _sampled(token_id, sequence.params, logprobs.get(row))
        for row, (token_id, sequence) in enumerate(zip(chosen, sequences, strict=True))
    ]


def sample_tokens(logits: Tensor, sequences: SequenceOf[Draws], choose: Choose | None = None) -> list[int | None]:
    """`sample` without log-probabilities: the tokens alone, None where a row's largest logit is not finite."""
    for row, sequence in enumerate(sequences):
        if sequence.params.edits_logits:
            edit_logits(logits[row], sequence)
    return (choose or choose_with_torch)(logits, sequences)


def _sampled(token_id: int, params: SamplingParams, logprobs: Tensor | None) -> Sampled:
    if logprobs is None or params.logprobs is None:
        return Sampled(token_id)
    return Sampled(token_id, float(logprobs[token_id]), _likeliest(logprobs, params.logprobs))


def _likeliest(logprobs: Tensor, count: int) -> tuple[tuple[int, float], ...]:
    """The `count` largest of a row [V] with their ids, best first."""
    if not count:
        return ()
    top = torch.topk(logprobs, min(count, len(logprobs)))
    return tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))


def score(logits: Tensor, token_ids: SequenceOf[int], alternatives: int) -> list[Scored]:
    """The log-probability of token_ids[i] by row i of logits [R, V] fp32, and of the likeliest `alternatives`."""
    scored = []
    for row, token_id in zip(logits, token_ids, strict=True):  # each by itself, as in `sample`: for equal bits
        logprobs = torch.log_softmax(row, dim=-1)
        scored.append(Scored(token_id, float(logprobs[token_id]), _likeliest(logprobs, alternatives)))
    return scored


def edit_logits(logits: Tensor, sequence: Draws) -> None:
    """Apply penalties, bias and bans to one row [V] in place."""
    params, output = sequence.params, sequence.output_ids
    if params.repetition_penalty != 1:
        # What stands in it twice is written twice, with the same value.
        seen = _tensor([*sequence.prompt_ids, *output], logits.device)
        scores = logits[seen].double()
        penalty = params.repetition_penalty
        _put(logits, seen, torch.where(scores < 0, scores * penalty, scores / penalty))
    if output and (params.presence_penalty or params.frequency_penalty):
        ids, counts = _tensor(output, logits.device).unique(return_counts=True)
        cost = params.presence_penalty + params.frequency_penalty * counts.double()
        _put(logits, ids, logits[ids].double() - cost)
    if params.logit_bias:
        ids = torch.tensor(list(params.logit_bias), device=logits.device)
        bias = torch.tensor(list(params.logit_bias.values()), dtype=torch.float64, device=logits.device)
        _put(logits, ids, logits[ids].double() + bias)
    if params.token_filter is not None:
        banned = params.token_filter.banned_after([*sequence.prompt_ids, *output])
        if len(banned):
            logits[torch.as_tensor(banned, device=logits.device)] = -torch.inf
    if len(output) < params.min_new_tokens and not params.ignore_eos:
        logits[list(params.end_tokens)] = -torch.inf


def _tensor(ids: list[int], device: torch.device) -> Tensor:
    """int64 [n]; from an array it is made in a fifth of the time that a list takes."""
    return torch.frombuffer(array("q", ids), dtype=torch.int64).to(device)


def _put(logits: Tensor, ids: Tensor, values: Tensor) -> None:
    logits[ids] = values.clamp(-_LARGEST, _LARGEST).float()


def choose_with_torch(logits: Tensor, sequences: SequenceOf[Draws]) -> list[int | None]:
    """Greedy rows together; sampled rows grouped by how many candidates they keep."""
    V = logits.shape[-1]
    groups: dict[tuple[str, int], list[int]] = defaultdict(list)
    for row, sequence in enumerate(sequences):
        params = sequence.params
        if params.greedy:
            groups["greedy", 1].append(row)
        elif 0 < params.top_k < V:
            groups["top_k", params.top_k].append(row)
        else:
            groups["all" if params.top_p == 1 else "sorted", V].append(row)
    chosen = [0] * len(sequences)
    for (kind, k), rows in groups.items():
        part = logits if len(rows) == len(sequences) else logits[rows]
        if kind == "greedy":
            tokens = part.argmax(dim=-1)
        else:
            members = [sequences[row] for row in rows]
            if kind == "all":
                tokens = draw(part, members)
            else:
                # A full sort is a top-k with k = V; both come best first.
                top = torch.topk(part, k) if kind == "top_k" else torch.sort(part, descending=True, stable=True)
                tokens = top[1].gather(1, draw(top[0], members)[:, None])[:, 0]
        for row, token in zip(rows, tokens.tolist(), strict=True):
            chosen[row] = token
    finite = torch.isfinite(logits.amax(dim=-1)).tolist()
    return [token if finite[row] else None for row, token in enumerate(chosen)]


def draw(candidates: Tensor, sequences: SequenceOf[Draws]) -> Tensor:
    """Draw one index per row from candidates [B, k], by inverting the cumulative distribution at one uniform number.

    Top-p needs the candidates best first; without it any order serves. All sums are fp64. The number is a function of
    (seed, tokens so far) alone. Top-p keeps the smallest set whose mass reaches p (Holtzman et al. 2020).
    """

    def column(values: SequenceOf[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=candidates.device)[:, None]

    temperature = column([sequence.params.temperature for sequence in sequences])
    top_p = column([sequence.params.top_p for sequence in sequences])
    u = column(uniform([s.seed for s in sequences], [len(s.output_ids) for s in sequences]).tolist())
    wide = candidates.double()
    # The best candidate becomes exp(0 / T) = 1 at any legal temperature, 1e-320 included.
    weights = torch.exp((wide - wide.amax(dim=-1, keepdim=True)) / temperature)
    mass = torch.cumsum(weights, dim=-1)
    kept = (mass - weights < top_p * mass[:, -1:]).sum(dim=-1, keepdim=True).clamp_(min=1)
    kept_mass = mass.gather(1, kept - 1)
    return torch.minimum((mass <= u * kept_mass).sum(dim=-1, keepdim=True), kept - 1)[:, 0]
