"""Sampling without a word to the host: for equal logits the same tokens as engine/sampler.py chooses.

Every row is drawn by each method that some row of the step uses, and keeps the result of its own: the shapes are fixed,
so all of it may be captured in a graph. Penalties, bias, bans and log-probabilities are left to the engine's sampler.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

# Up to this top_k the candidates are picked out; past it all tokens are sorted.
MOST_CANDIDATES = 64


class Method(IntEnum):
    """How a row's token is chosen."""

    ELSEWHERE = -1  # not here
    GREEDY = 0
    CANDIDATES = 1  # a small top_k, with top_p or without
    VOCABULARY = 2  # neither top_k nor top_p: all tokens, in the order of their ids
    SORTED = 3  # top_p alone, or a large top_k: all tokens, best first


METHODS = [method for method in Method if method is not Method.ELSEWHERE]


@dataclass(frozen=True, slots=True)
class Draw:
    """What one token is drawn with. `count`: the tokens drawn before it; top_k 0 and top_p 1 are off."""

    seed: int = 0
    count: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    elsewhere: bool = False

    def method(self, vocabulary: int) -> Method:
        if self.elsewhere:
            return Method.ELSEWHERE
        if self.temperature == 0:
            return Method.GREEDY
        if 0 < self.top_k < vocabulary:
            return Method.CANDIDATES if self.top_k <= MOST_CANDIDATES else Method.SORTED
        return Method.VOCABULARY if self.top_p == 1 else Method.SORTED


def choose(method: Method, logits: Tensor, u: Tensor, top_k: Tensor, temperature: Tensor, top_p: Tensor) -> Tensor:
    """Each row's token [B] int64, as if `method` were its own.

    logits [B, V] fp32; u [B] fp64 in [0, 1), a random number each; top_k [B] int64; temperature, top_p [B] fp64.
    """
    V = logits.shape[-1]
    if method is Method.GREEDY:
        return logits.argmax(dim=-1)
    if method is Method.VOCABULARY:
        return _draw(logits, u, torch.full_like(top_k, V), temperature, top_p)
    best: tuple[Tensor, Tensor] = (
        torch.topk(logits, min(MOST_CANDIDATES, V))
        if method is Method.CANDIDATES
        else torch.sort(logits, descending=True, stable=True)
    )
    kept = torch.where((top_k > 0) & (top_k < V), top_k, V)
    return best[1].gather(1, _draw(best[0], u, kept, temperature, top_p)[:, None])[:, 0]


def _draw(candidates: Tensor, u: Tensor, kept: Tensor, temperature: Tensor, top_p: Tensor) -> Tensor:
    """Draw one index per row from the first `kept` [B] of its candidates [B, k]; see engine/sampler.py `draw`."""
    wide = candidates.double()
    weights = torch.exp((wide - wide.amax(dim=-1, keepdim=True)) / temperature[:, None])
    weights = weights * (torch.arange(candidates.shape[-1], device=candidates.device) < kept[:, None])
    mass = torch.cumsum(weights, dim=-1)
    nucleus = (mass - weights < top_p[:, None] * mass[:, -1:]).sum(dim=-1, keepdim=True).clamp_(min=1)
    nucleus_mass = mass.gather(1, nucleus - 1)
    return torch.minimum((mass <= u[:, None] * nucleus_mass).sum(dim=-1, keepdim=True), nucleus - 1)[:, 0]
