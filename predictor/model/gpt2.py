"""GPT-2's forward pass, written for inference over rows.

A row is one token of one sequence at one position. A prefill chunk is many rows of a sequence, a decode step is
one row of each; they run together, and a row's result does not depend on its neighbours (see kernels.py).
Source: Radford et al. 2019; the layout of OpenAI's weights as Hugging Face stores them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from predictor.model.config import GPT2Config
from predictor.model.cuda.attention import DecodeAttention
from predictor.model.cuda.library import Kernels, load_kernels
from predictor.model.kernels import Linear, attend, make_linear, make_logits, pad_rows

# fetch(name, shape) -> the checkpoint's tensor of that name, on CPU, in the checkpoint's dtype.
Fetch = Callable[[str, tuple[int, ...]], Tensor]


class Span(NamedTuple):
    """Consecutive rows of one sequence, and where its keys and values lie in the KV memory."""

    first_row: int
    rows: int
    first_slot: int
    context: int  # tokens its last row may look at, itself included

    @property
    def positions(self) -> range:
        """Of its rows, in the sequence."""
        return range(self.context - self.rows, self.context)


@dataclass(frozen=True, slots=True)
class Rows:
    """What one step computes: R rows in S spans, and the W rows whose logits are wanted."""

    token_ids: list[int]  # [R]
    spans: list[Span]  # [S], in the order of rows
    wanted: list[int]  # [W], indices of rows


class Attention(Protocol):
    """How the rows of a step look at keys and values."""

    def __call__(self, layer: int, qkv: Tensor) -> Tensor:
        """Store the rows' keys and values, and attend: qkv [R, 3, H, D] -> [R, H, D]."""


class LayerNorm:
    """Layer norm over the fp32 residual, in fp32; the result in the weights' dtype."""

    def __init__(
        self, weight: Tensor, bias: Tensor, epsilon: float, dtype: torch.dtype, kernels: Kernels | None = None
    ) -> None:
        self._weight, self._bias, self._epsilon, self._dtype = weight, bias, epsilon, dtype
        self._kernels = kernels

    def __call__(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """x += y in place, where there is a y; the norm of x."""
        if self._kernels is not None:
            normed = torch.empty_like(x, dtype=self._dtype)
            self._kernels.add_norm(x, y, self._weight, self._bias, self._epsilon, normed)
            return normed
        if y is not None:
            x += y
        return F.layer_norm(x, self._weight.shape, self._weight, self._bias, self._epsilon).to(self._dtype)


@dataclass(frozen=True, slots=True)
class Layer:
    norm_attention: LayerNorm
    qkv: Linear
    project: Linear
    norm_mlp: LayerNorm
    expand: Linear
    contract: Linear
    attention_scale: float


class GPT2:
    """The weights, laid out for inference, and the forward pass over them."""

    slot_multiple = 1  # sequences may begin at any slot

    def __init__(self, config: GPT2Config, fetch: Fetch, dtype: torch.dtype, device: torch.device) -> None:
        """Build from `fetch`, tensor by tensor: at no time are there two copies of more than one tensor."""
        self.config, self.dtype, self.device = config, dtype, device
        self.kernels = load_kernels(device, config.head_width, config.width) if device.type == "cuda" else None
        E, N = config.width, config.inner_width

        def vector(name: str, size: int, wide: bool = False) -> Tensor:
            # copy=True: what fetch returns may be a view of the file.
            return fetch(name, (size,)).to(device, torch.float32 if wide else dtype, copy=True)

        def norm(name: str) -> LayerNorm:
            weight, bias = vector(f"{name}.weight", E, wide=True), vector(f"{name}.bias", E, wide=True)
            return LayerNorm(weight, bias, config.epsilon, dtype, self.kernels)

        def linear(name: str, inputs: int, outputs: int, gelu: bool = False) -> Linear:
            stored = fetch(f"{name}.weight", (inputs, outputs))
            # The file holds [in, out] (TensorFlow's order). The bytes go to the device in the target dtype first,
            # so a wider file costs no memory there; then one transposed copy.
            weight = stored.to(device, dtype).t().contiguous()
            del stored
            return make_linear(weight, vector(f"{name}.bias", outputs), config.activation if gelu else None)

        self._token_table = fetch("wte.weight", (config.vocabulary, E)).to(device, dtype, copy=True)
        self._position_table = fetch("wpe.weight", (config.context, E)).to(device, dtype, copy=True)
        self._layers = [
            Layer(
                norm_attention=norm(f"h.{i}.ln_1"),
                qkv=linear(f"h.{i}.attn.c_attn", E, 3 * E),
                project=linear(f"h.{i}.attn.c_proj", E, E),
                norm_mlp=norm(f"h.{i}.ln_2"),
                expand=linear(f"h.{i}.mlp.c_fc", E, N, gelu=True),
                contract=linear(f"h.{i}.mlp.c_proj", N, E),
                attention_scale=attention_scale(config, i),
            )
            for i in range(config.layers)
        ]
        self._norm_final = norm("ln_f")
        output = self._token_table
        if not config.tied_embeddings:
            output = fetch("lm_head.weight", (config.vocabulary, E)).to(device, dtype, copy=True)
        self._logits = make_logits(output)

    def new_kv(self, slots: int) -> Tensor:
        """Preallocated keys and values: [L, 2, slots, H, D] in the weights' dtype; pages are touched when written."""
        c = self.config
        return torch.empty((c.layers, 2, slots, c.heads, c.head_width), dtype=self.dtype, device=self.device)

    def padded(self, rows: int) -> int:
        """How many rows a step of `rows` is computed with."""
        return pad_rows(rows, self.device.type)

    @property
    def attention_scales(self) -> list[float]:
        return [layer.attention_scale for layer in self._layers]

    def copy_kv(self, kv: Tensor, source: int, target: int, tokens: int) -> None:
        """Copy the keys and values of `tokens` slots."""
        kv[:, :, target : target + tokens] = kv[:, :, source : source + tokens]

    @torch.inference_mode()
    def forward(self, rows: Rows, kv: Tensor, token_ids: Tensor | None = None) -> Tensor:
        """Run one step, write its keys and values into `kv`, return the wanted logits [W, V] in fp32.

        `token_ids` [R] int64 stand for those of `rows` where the device knows some that the host does not.
        """
        W = len(rows.wanted)
        if token_ids is None:
            token_ids = on_device(rows.token_ids, self.device)
        positions = on_device([position for span in rows.spans for position in span.positions], self.device)
        y = self._last_norm(token_ids, positions, _SpanAttention(self, rows, positions, kv))
        if W == 0:
            return torch.empty((0, self.config.vocabulary), dtype=torch.float32, device=self.device)
        wanted = on_device(rows.wanted, self.device)
        return self._logits(F.pad(y[wanted], (0, 0, 0, self.padded(W) - W)))[:W]

    @torch.inference_mode()
    def decode(self, token_ids: Tensor, positions: Tensor, attention: Attention) -> Tensor:
        """The logits [B, V] fp32 of rows [B] that all want theirs. Nothing here waits for a device."""
        return self._logits(self._last_norm(token_ids, positions, attention))[: len(token_ids)]

    def _last_norm(self, token_ids: Tensor, positions: Tensor, attention: Attention) -> Tensor:
        """Everything but the output matrix: token_ids, positions [R] -> [R padded, E] in the weights' dtype."""
        H, D = self.config.heads, self.config.head_width
        R = len(token_ids)
        R_padded = self.padded(R)
        x = F.embedding(token_ids, self._token_table).float()
        x += F.embedding(positions, self._position_table)
        if R_padded > R:
            x = F.pad(x, (0, 0, 0, R_padded - R))
        y = self._layers[0].norm_attention(x)
        next_norms = [*(layer.norm_attention for layer in self._layers[1:]), self._norm_final]
        for i, (layer, next_norm) in enumerate(zip(self._layers, next_norms, strict=True)):
            qkv = layer.qkv(y).view(R_padded, 3, H, D)
            y = layer.norm_mlp(x, layer.project(attention(i, qkv).view(R_padded, H * D)))
            y = next_norm(x, layer.contract(layer.expand(y)))
        return y


class _SpanAttention:
    """Each span over its own keys and values; with our kernels, all spans of one row in one call."""

    def __init__(self, model: GPT2, rows: Rows, positions: Tensor, kv: Tensor) -> None:
        self._kv, self._scales = kv, model.attention_scales
        # Where each row's key and value go.
        self._slots = positions + on_device(
            [span.first_slot for span in rows.spans for _ in range(span.rows)], model.device
        )
        H, D = model.config.heads, model.config.head_width
        R_padded = model.padded(len(rows.token_ids))
        self._attended = torch.zeros((R_padded, H, D), dtype=model.dtype, device=model.device)
        self._spans, self._decode = rows.spans, None
        if model.kernels is not None:
            self._spans = [span for span in rows.spans if span.rows > 1]
            single = [span for span in rows.spans if span.rows == 1]
            if single:
                self._single = on_device([span.first_row for span in single], model.device)
                first_slots = on_device([span.first_slot for span in single], model.device)
                context = max(span.context for span in single)
                self._decode = DecodeAttention(
                    model.kernels, kv, first_slots, positions[self._single], self._scales, context, len(single)
                )
        self._masks = {span: _causal_mask(span, model.device) for span in self._spans if span.rows > 1}

    def __call__(self, layer: int, qkv: Tensor) -> Tensor:
        R = len(self._slots)
        keys, values = self._kv[layer]
        keys.index_copy_(0, self._slots, qkv[:R, 1])
        values.index_copy_(0, self._slots, qkv[:R, 2])
        for span in self._spans:
            here = slice(span.first_row, span.first_row + span.rows)
            seen = slice(span.first_slot, span.first_slot + span.context)
            mask, scale = self._masks.get(span), self._scales[layer]
            self._attended[here] = attend(qkv[here, 0], keys[seen], values[seen], mask, scale)
        if self._decode is not None:
            self._attended[self._single] = self._decode(layer, qkv[self._single])
        return self._attended


def on_device(values: list[int], device: torch.device) -> Tensor:
    """int64, sent without waiting for what the device is doing: from pinned memory a copy takes its turn."""
    if device.type == "cpu":
        return torch.tensor(values, dtype=torch.int64)
    return torch.tensor(values, dtype=torch.int64, pin_memory=True).to(device, non_blocking=True)


def _causal_mask(span: Span, device: torch.device) -> Tensor:
    """[rows, context], true where a row may look: its own position and those before it."""
    context = torch.arange(span.context, device=device)
    return context[None, :] <= context[span.context - span.rows :, None]


def attention_scale(config: GPT2Config, layer: int) -> float:
    scale = 1.0 / math.sqrt(config.head_width) if config.scale_attention else 1.0
    return scale / (layer + 1) if config.scale_by_inverse_layer else scale
