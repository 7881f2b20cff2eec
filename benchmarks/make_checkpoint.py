"""Write a random-weight GPT-2 checkpoint of a true shape, with GPT-2's real tokenizer.

Random weights of the true shape take the time and the memory of real ones; what they say is noise.

    python benchmarks/make_checkpoint.py --size gpt2-xl --out /path/to/folder
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors.torch import save_file
from tqdm import tqdm

from predictor.checkpoints.tokenizer import GPT2_VOCABULARY, gpt2_tokenizer

# OpenAI's four models: layers, width, heads.
SHAPES = {
    "gpt2": (12, 768, 12),
    "gpt2-medium": (24, 1024, 16),
    "gpt2-large": (36, 1280, 20),
    "gpt2-xl": (48, 1600, 25),
}
CONTEXT = 1024
SHARD_BYTES = 2 * 10**9  # the largest model never has more than this in memory at once

Size = Enum("Size", {name: name for name in SHAPES}, type=str)
Dtype = Enum("Dtype", {name: name for name in ("float32", "float16", "bfloat16")}, type=str)


def config(size: str, dtype: str) -> dict[str, object]:
    layers, width, heads = SHAPES[size]
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "n_layer": layers,
        "n_embd": width,
        "n_head": heads,
        "n_positions": CONTEXT,
        "n_ctx": CONTEXT,
        "vocab_size": GPT2_VOCABULARY,
        "layer_norm_epsilon": 1e-5,
        "bos_token_id": GPT2_VOCABULARY - 1,
        "eos_token_id": GPT2_VOCABULARY - 1,
        "torch_dtype": dtype,
    }


def shapes(size: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor, as Hugging Face's GPT2LMHeadModel stores them."""
    layers, width, _ = SHAPES[size]
    yield "transformer.wte.weight", (GPT2_VOCABULARY, width)
    yield "transformer.wpe.weight", (CONTEXT, width)
    for layer in range(layers):
        prefix = f"transformer.h.{layer}."
        for name, inputs, outputs in (
            ("attn.c_attn", width, 3 * width),
            ("attn.c_proj", width, width),
            ("mlp.c_fc", width, 4 * width),
            ("mlp.c_proj", 4 * width, width),
        ):
            yield f"{prefix}{name}.weight", (inputs, outputs)
            yield f"{prefix}{name}.bias", (outputs,)
        for name in ("ln_1", "ln_2"):
            yield f"{prefix}{name}.weight", (width,)
            yield f"{prefix}{name}.bias", (width,)
    yield "transformer.ln_f.weight", (width,)
    yield "transformer.ln_f.bias", (width,)


def random_tensor(name: str, shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> torch.Tensor:
    """Normal with GPT-2's own 0.02; layer norms near one, biases near zero."""
    values = torch.empty(shape).normal_(0, 0.02, generator=generator)
    is_gain = name.endswith("weight") and len(shape) == 1
    return (values + 1 if is_gain else values).to(dtype)


def make_checkpoint(
    size: Annotated[Size, typer.Option(help="Which of OpenAI's shapes.")],
    out: Annotated[Path, typer.Option(help="Folder to write; made if missing.")],
    seed: Annotated[int, typer.Option(help="Same seed, same weights.")] = 0,
    dtype: Annotated[Dtype, typer.Option(help="Width in the file.")] = Dtype["float32"],
) -> None:
    """Write config.json, tokenizer files and safetensors shards that AutoModelForCausalLM and AutoTokenizer open."""
    out.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    target = getattr(torch, dtype.value)
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    held = 0
    for name, shape in shapes(size.value):
        size_bytes = torch.Size(shape).numel() * target.itemsize
        if held and held + size_bytes > SHARD_BYTES:
            shards.append({})
            held = 0
        shards[-1][name] = shape
        held += size_bytes
    index: dict[str, str] = {}
    total = 0
    with tqdm(total=sum(map(len, shards)), desc=f"{size.value} {dtype.value}", unit=" tensors") as bar:
        for number, shard in enumerate(shards, 1):
            many = f"model-{number:05}-of-{len(shards):05}.safetensors"
            file = "model.safetensors" if len(shards) == 1 else many
            tensors = {}
            for name, shape in shard.items():
                tensors[name] = random_tensor(name, shape, generator, target)
                total += tensors[name].nbytes
                bar.update()
            save_file(tensors, out / file, metadata={"format": "pt"})
            index |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        weights = {"metadata": {"total_size": total}, "weight_map": index}
        (out / "model.safetensors.index.json").write_text(json.dumps(weights, indent=1))
    gpt2_tokenizer().save_pretrained(out)
    (out / "config.json").write_text(json.dumps(config(size.value, dtype.value), indent=1))
    print(f"{out}: {total / 1e9:.2f} GB in {len(shards)} file(s)")


if __name__ == "__main__":
    typer.run(make_checkpoint)
