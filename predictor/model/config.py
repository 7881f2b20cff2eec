"""GPT-2's shape, read from a Hugging Face `config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from predictor.errors import CheckpointError

Activation = Literal["gelu_tanh", "gelu", "relu"]

# How the weights are stored. int8 has a scale per output, and computes with 8-bit activations, a scale per row.
Width = Literal["float32", "bfloat16", "float16", "int8"]

_ACTIVATIONS: dict[str, Activation] = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
}


@dataclass(frozen=True, slots=True)
class GPT2Config:
    """The numbers that fix the forward pass. Names follow the paper, not the file."""

    vocabulary: int
    context: int  # positions the model was trained with, in tokens
    width: int
    layers: int
    heads: int
    inner_width: int
    epsilon: float
    activation: Activation
    scale_attention: bool
    scale_by_inverse_layer: bool
    tied_embeddings: bool
    end_token: int | None

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def parameters(self) -> int:
        """How many numbers the weights hold; the tied output matrix counts once."""
        E, N = self.width, self.inner_width
        layer = (3 * E * E + 3 * E) + (E * E + E) + 2 * E * N + N + E + 4 * E
        tables = self.vocabulary * E * (1 if self.tied_embeddings else 2) + self.context * E
        return tables + self.layers * layer + 2 * E

    def kv_bytes_per_token(self, bytes_per_number: int) -> int:
        """Bytes of keys and values one token occupies over all layers."""
        return 2 * self.layers * self.width * bytes_per_number


def parse_config(fields: Mapping[str, Any]) -> GPT2Config:
    """Read `config.json`; raises `CheckpointError` naming the field that is missing, wrong or not supported."""
    model_type = fields.get("model_type", "gpt2")
    if model_type != "gpt2":
        raise CheckpointError(
            f"this is a {model_type!r} checkpoint and the engine runs GPT-2 only; serve it with --backend transformers"
        )

    def integer(*names: str) -> int:
        for name in names:
            value = fields.get(name)
            if value is not None:
                if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                    raise CheckpointError(f"config.json: {name} must be a positive integer, got {value!r}")
                return value
        raise CheckpointError(f"config.json lacks {names[0]}")

    width, heads = integer("n_embd"), integer("n_head")
    if width % heads:
        raise CheckpointError(f"config.json: n_embd {width} is not a multiple of n_head {heads}")
    activation = fields.get("activation_function", "gelu_new")
    if not isinstance(activation, str) or activation not in _ACTIVATIONS:
        known = ", ".join(sorted(_ACTIVATIONS))
        raise CheckpointError(f"config.json: activation_function {activation!r} is not one of {known}")
    if fields.get("add_cross_attention"):
        raise CheckpointError("config.json: add_cross_attention is not supported")
    epsilon = fields.get("layer_norm_epsilon", 1e-5)
    if not isinstance(epsilon, int | float) or isinstance(epsilon, bool):
        raise CheckpointError(f"config.json: layer_norm_epsilon must be a number, got {epsilon!r}")
    end_token = fields.get("eos_token_id")
    return GPT2Config(
        vocabulary=integer("vocab_size"),
        context=integer("n_positions", "n_ctx"),
        width=width,
        layers=integer("n_layer"),
        heads=heads,
        inner_width=integer("n_inner") if fields.get("n_inner") is not None else 4 * width,
        epsilon=float(epsilon),
        activation=_ACTIVATIONS[activation],
        scale_attention=bool(fields.get("scale_attn_weights", True)),
        scale_by_inverse_layer=bool(fields.get("scale_attn_by_inverse_layer_idx", False)),
        tied_embeddings=bool(fields.get("tie_word_embeddings", True)),
        end_token=end_token if isinstance(end_token, int) and not isinstance(end_token, bool) else None,
    )
