"""GPT-2's shape out of config.json, held against transformers' own reading of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config as TheirConfig
from transformers import GPT2LMHeadModel
from transformers.activations import ACT2FN

from predictor.errors import CheckpointError
from predictor.model.config import parse_config
from predictor.model.kernels import activate

SMALL = {"model_type": "gpt2", "vocab_size": 300, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}


def refusal(**changes: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        parse_config(SMALL | changes)
    return str(caught.value)


def test_gpt2s_own_config_is_read_as_the_124m_shape() -> None:
    config = parse_config(TheirConfig().to_dict())
    assert (config.vocabulary, config.context, config.width) == (50257, 1024, 768)
    assert (config.layers, config.heads, config.inner_width, config.head_width) == (12, 12, 3072, 64)
    assert (config.activation, config.epsilon, config.end_token) == ("gelu_tanh", 1e-5, 50256)
    assert config.scale_attention
    assert not config.scale_by_inverse_layer
    assert config.tied_embeddings
    assert config.parameters == 124_439_808  # OpenAI's smallest model


@given(
    vocabulary=st.integers(10, 90), context=st.integers(1, 40), heads=st.integers(1, 4), head_width=st.integers(1, 8),
    layers=st.integers(1, 3), inner=st.one_of(st.none(), st.integers(1, 50)), tied=st.booleans(),
)  # fmt: skip
@settings(deadline=None, max_examples=25)
def test_parameters_are_as_many_as_transformers_counts(
    vocabulary: int, context: int, heads: int, head_width: int, layers: int, inner: int | None, tied: bool
) -> None:
    theirs = TheirConfig(
        vocab_size=vocabulary, n_positions=context, n_embd=heads * head_width, n_layer=layers, n_head=heads,
        n_inner=inner, tie_word_embeddings=tied, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    with torch.device("meta"):
        model = GPT2LMHeadModel(theirs)
    counted = sum(parameter.numel() for parameter in model.transformer.parameters())
    counted += 0 if tied else vocabulary * heads * head_width
    assert parse_config(theirs.to_dict()).parameters == counted


def test_kv_bytes_per_token_of_gpt2_xl_in_half_precision() -> None:
    xl = parse_config(TheirConfig(n_embd=1600, n_layer=48, n_head=25).to_dict())
    assert xl.kv_bytes_per_token(2) == 300 * 2**10


def test_absent_fields_have_transformers_defaults() -> None:
    config = parse_config({key: value for key, value in SMALL.items() if key != "model_type"})
    theirs = TheirConfig(**SMALL)
    assert config.inner_width == 4 * config.width
    assert config.epsilon == theirs.layer_norm_epsilon
    assert config.activation == "gelu_tanh"
    assert config.scale_attention == theirs.scale_attn_weights
    assert config.scale_by_inverse_layer == theirs.scale_attn_by_inverse_layer_idx
    assert config.tied_embeddings == theirs.tie_word_embeddings
    assert config.end_token is None


def test_what_the_file_says_is_read() -> None:
    config = parse_config(SMALL | {
        "n_inner": 100, "layer_norm_epsilon": 1e-6, "activation_function": "relu", "scale_attn_weights": False,
        "scale_attn_by_inverse_layer_idx": True, "tie_word_embeddings": False, "eos_token_id": 7,
    })  # fmt: skip
    assert (config.inner_width, config.epsilon, config.activation, config.end_token) == (100, 1e-6, "relu", 7)
    assert not config.scale_attention
    assert config.scale_by_inverse_layer
    assert not config.tied_embeddings


def test_null_means_the_default_where_transformers_writes_it() -> None:
    assert parse_config(SMALL | {"n_inner": None, "eos_token_id": None}).inner_width == 128


def test_n_ctx_stands_in_for_n_positions() -> None:
    old = {key: value for key, value in SMALL.items() if key != "n_positions"} | {"n_ctx": 48}
    assert parse_config(old).context == 48
    assert parse_config(SMALL | {"n_ctx": 48}).context == 64


@pytest.mark.parametrize("name", ["gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu", "relu"])
def test_every_supported_activation_is_transformers_own(name: str) -> None:
    x = torch.linspace(-8, 8, 1001)
    ours = activate(x, parse_config(SMALL | {"activation_function": name}).activation)
    assert torch.allclose(ours, ACT2FN[name](x), atol=1e-6)


@pytest.mark.parametrize("name", ["silu", "quick_gelu", "tanh", "", None, 5, ["gelu"], {}])
def test_an_unsupported_activation_is_refused_with_those_that_are(name: Any) -> None:
    message = refusal(activation_function=name)
    assert "activation_function" in message
    assert repr(name) in message
    assert "gelu_new" in message


@pytest.mark.parametrize("model_type", ["llama", "gpt_neo", "gpt2-custom", "bert", None, 2, ["gpt2"]])
def test_another_architecture_is_refused_with_the_way_out(model_type: Any) -> None:
    message = refusal(model_type=model_type)
    assert repr(model_type) in message
    assert "--backend transformers" in message


def test_cross_attention_is_refused() -> None:
    assert "add_cross_attention" in refusal(add_cross_attention=True)


@pytest.mark.parametrize("field", ["vocab_size", "n_positions", "n_embd", "n_layer", "n_head"])
def test_a_missing_number_is_named(field: str) -> None:
    with pytest.raises(CheckpointError, match=f"lacks {field}"):
        parse_config({key: value for key, value in SMALL.items() if key != field})


@pytest.mark.parametrize("field", ["vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner"])
@pytest.mark.parametrize("value", [0, -1, 2.0, "4", True, [4], {}])
def test_a_number_that_is_no_positive_integer_is_named(field: str, value: Any) -> None:
    message = refusal(**{field: value})
    assert field in message
    assert repr(value) in message


def test_a_width_that_heads_do_not_divide_is_refused() -> None:
    message = refusal(n_embd=30)
    assert "30" in message
    assert "n_head 4" in message


@pytest.mark.parametrize("value", ["small", None, [1e-5], {}])
def test_an_epsilon_that_is_no_number_is_named(value: Any) -> None:
    assert "layer_norm_epsilon" in refusal(layer_norm_epsilon=value)


@pytest.mark.parametrize("value", [[0], "0", True, 1.5])
def test_an_end_token_that_is_no_integer_is_left_to_the_tokenizer(value: Any) -> None:
    assert parse_config(SMALL | {"eos_token_id": value}).end_token is None
