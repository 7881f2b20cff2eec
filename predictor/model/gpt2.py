"""GPT-2's forward pass, written for inference over rows.

A row is one token of one sequence at one position. A prefill chunk is many rows of a sequence, a decode step is
one row of each; they run together, and a row's result does not depend on its neighbours (see kernels.py).
Source: Radford et al. 2019; the layout of OpenAI's weights as Hugging Face stores them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from predictor.model.config import GPT2Config
from predictor.model.kernels import Linear, attend, make_linear, make_logits, pad_rows

# fetch(name, shape) -> the checkpoint's tensor of that name, on CPU, in the checkpoint's dtype.
Fetch = Callable[[str, tuple[int, ...]], Tensor]


class Span(NamedTuple):
    """Consecutive rows of one sequence, and where its keys and values lie in the KV memory."""

    first_row: int
    rows: int
    first_slot: int
    context: int  # tokens its last row may look at, itself included


@dataclass(frozen=True, slots=True)
class Rows:
    """What one step computes: R rows in S spans, and the W rows whose logits are wanted."""

    token_ids: Tensor  # [R] int64
    positions: Tensor  # [R] int64
    slots: Tensor  # [R] int64: where each row's key and value go
    spans: list[Span]
    wanted: Tensor  # [W] int64, indices of rows


class LayerNorm:
    """Layer norm over the fp32 residual, in fp32; the result in the weights' dtype."""

    def __init__(self, weight: Tensor, bias: Tensor, epsilon: float, dtype: torch.dtype) -> None:
        self._weight, self._bias, self._epsilon, self._dtype = weight, bias, epsilon, dtype

    def __call__(self, x: Tensor) -> Tensor:
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
        E, N = config.width, config.inner_width

        def vector(name: str, size: int, wide: bool = False) -> Tensor:
            # copy=True: what fetch returns may be a view of the file.
            return fetch(name, (size,)).to(device, torch.float32 if wide else dtype, copy=True)

        def norm(name: str) -> LayerNorm:
            weight, bias = vector(f"{name}.weight", E, wide=True), vector(f"{name}.bias", E, wide=True)
            return LayerNorm(weight, bias, config.epsilon, dtype)

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

    def copy_kv(self, kv: Tensor, source: int, target: int, tokens: int) -> None:
        """Copy the keys and values of `tokens` slots."""
        kv[:, :, target : target + tokens] = kv[:, :, source : source + tokens]

    @torch.inference_mode()
    def forward(self, rows: Rows, kv: Tensor) -> Tensor:
        """Run one step, write its keys and values into `kv`, return the wanted logits [W, V] in fp32."""
        H, D = self.config.heads, self.config.head_width
        R, R_padded = len(rows.token_ids), pad_rows(len(rows.token_ids))
        x = F.embedding(rows.token_ids, self._token_table).float()
        x = x + F.embedding(rows.positions, self._position_table).float()
        if R_padded > R:
            x = F.pad(x, (0, 0, 0, R_padded - R))
        masks = {span: self._causal_mask(span) for span in rows.spans if span.rows > 1}
        attended = torch.zeros((R_padded, H, D), dtype=self.dtype, device=self.device)
        for layer, (keys, values) in zip(self._layers, kv, strict=True):
            qkv = layer.qkv(layer.norm_attention(x)).view(R_padded, 3, H, D)
            keys.index_copy_(0, rows.slots, qkv[:R, 1])
            values.index_copy_(0, rows.slots, qkv[:R, 2])
            for span in rows.spans:
                here = slice(span.first_row, span.first_row + span.rows)
                seen = slice(span.first_slot, span.first_slot + span.context)
                attended[here] = attend(qkv[here, 0], keys[seen], values[seen], masks.get(span), layer.attention_scale)
            x = x + layer.project(attended.view(R_padded, H * D)).float()
            x = x + layer.contract(layer.expand(layer.norm_mlp(x))).float()
        return self._wanted_logits(x, rows.wanted)

    def _wanted_logits(self, x: Tensor, wanted: Tensor) -> Tensor:
        W = len(wanted)
        if W == 0:
            return torch.empty((0, self.config.vocabulary), dtype=torch.float32, device=self.device)
        chosen = F.pad(x[wanted], (0, 0, 0, pad_rows(W) - W))
        return self._logits(self._norm_final(chosen))[:W]

    def _causal_mask(self, span: Span) -> Tensor:
        """[rows, context], true where a row may look: its own position and those before it."""
        context = torch.arange(span.context, device=self.device)
        return context[None, :] <= context[span.context - span.rows :, None]


def attention_scale(config: GPT2Config, layer: int) -> float:
    scale = 1.0 / math.sqrt(config.head_width) if config.scale_attention else 1.0
    return scale / (layer + 1) if config.scale_by_inverse_layer else scale
