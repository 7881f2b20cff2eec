"""What a run trains: model, tokenizer, data, and the arithmetic they are used with. Must not know steps or files."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import GPT2LMHeadModel, PreTrainedTokenizerBase

from predictor.errors import ConfigurationError
from predictor.training import folder
from predictor.training.data import (
    TokenData,
    check_length,
    encode_text,
    read_text,
    train_tokenizer,
    validation_batches,
)
from predictor.training.options import FinetuneOptions


@dataclass(frozen=True, slots=True)
class Trainee:
    """A model on its device, with the ids it learns; `precision` is the dtype of its matrix products."""

    model: GPT2LMHeadModel
    tokenizer: PreTrainedTokenizerBase
    data: TokenData
    context: int
    device: torch.device
    precision: torch.dtype

    def loss(self, inputs: Tensor, targets: Tensor, precision: torch.dtype) -> Tensor:
        """Summed cross entropy, fp32, in nats, of inputs [B, T] and targets [B, T]."""

        with torch.autocast(self.device.type, torch.bfloat16, enabled=precision == torch.bfloat16):
            logits: Tensor = self.model(input_ids=inputs.to(self.device), use_cache=False).logits
        return F.cross_entropy(logits.float().flatten(0, 1), targets.to(self.device).flatten(), reduction="sum")

    @torch.no_grad()
    def validation_loss(self, batch_size: int, precision: torch.dtype) -> float:
        """Mean over the whole validation part, in nats per token."""
        self.model.train(False)
        ids = self.data.validation
        total = 0.0
        for inputs, targets in validation_batches(ids, self.context, batch_size):
            total += self.loss(inputs, targets, precision).item()
        return total / (ids.numel() - 1)


def choose_device(options: FinetuneOptions) -> torch.device:
    """Turn `auto` into a device; raises ConfigurationError for a CUDA that is not there."""
    available = torch.cuda.is_available()
    if options.device == "cuda" and not available:
        raise ConfigurationError("device: cuda was asked for, and torch finds no CUDA device")
    if options.device == "cpu" or not available:
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def choose_precision(options: FinetuneOptions, device: torch.device) -> torch.dtype:
    """Turn `auto` into bfloat16 where it is native, and float32 elsewhere.

    By what the processor has and not by a measurement: a run and its resumption must choose alike.
    """
    if options.precision != "auto":
        return torch.bfloat16 if options.precision == "bfloat16" else torch.float32
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        features = torch.cpu.get_capabilities()
        # 4 x 256 on 2 cores of an EPYC with AVX512_BF16: 9,469 tokens/s, against 5,180 in fp32
        native = bool(features.get("avx512_bf16") or features.get("amx_bf16"))
    return torch.bfloat16 if native else torch.float32


def prepare(options: FinetuneOptions, device: torch.device) -> Trainee:
    """Read the data and make or load the model; fresh weights come from torch's seed.

    Raises InvalidRequest for the data or the context, CheckpointError for `init`.
    """
    text = read_text(options.data)
    if options.init is None:
        context = options.context or 256
        tokenizer: PreTrainedTokenizerBase = train_tokenizer(text.train, options.vocabulary or 1024, context)
        data = encode_text(text, tokenizer)
        check_length(data, context)
        model = folder.new_model(options, tokenizer, context)
    else:
        config = folder.open_config(options.init)
        context = folder.window_length(options, config)
        tokenizer = folder.open_tokenizer(options.init, config)
        data = encode_text(text, tokenizer)
        check_length(data, context)
        model = folder.open_model(options.init, config, options.dropout)
    torch.nn.Module.to(model, device)
    return Trainee(model, tokenizer, data, context, device, choose_precision(options, device))
