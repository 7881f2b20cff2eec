"""llama.cpp through llama-cpp-python's low-level bindings: one llama_batch per step, a sequence id per prompt.

The high-level `Llama` class knows one sequence only.
"""

from __future__ import annotations

import ctypes
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

from benchmarks.contestants.engine import Sizes

PACKAGES = ("llama-cpp-python", "gguf")

_STEP_TOKENS = 2048  # most tokens of one llama_decode
_FILE = "model.gguf"


@llama_cpp.llama_log_callback
def _ignore_log(level: int, text: bytes, user_data: ctypes.c_void_p) -> None:
    """Its log is hundreds of lines a load."""


class LlamaCpp:
    def __init__(self, model: Any, sizes: Sizes) -> None:
        self._model, self._sizes = model, sizes
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        self._batch = llama_cpp.llama_batch_init(_STEP_TOKENS, 0, 1)
        self._context: Any = None
        self._shape = (0, 0)  # sequences, tokens each may have

    def generate(self, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        self._make_room(len(prompts), len(prompts[0]) + new_tokens)
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), False)
        newest = self._prefill(prompts)
        generated = [newest]
        for position in range(len(prompts[0]), len(prompts[0]) + new_tokens - 1):
            rows = [(sequence, position, token) for sequence, token in enumerate(newest)]
            newest = self._decode(rows, wanted=range(len(rows)))
            generated.append(newest)
        return [list(tokens) for tokens in zip(*generated, strict=True)]

    def _make_room(self, sequences: int, tokens: int) -> None:
        """A context for this shape, kept until a larger one, or one of another batch, is asked for."""
        if self._context is not None:
            if sequences == self._shape[0] and tokens <= self._shape[1]:
                return
            llama_cpp.llama_free(self._context)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = sequences * -(-tokens // 256) * 256  # it rounds each sequence's share to 256
        params.n_seq_max = sequences
        params.n_batch = _STEP_TOKENS
        # Left as it is by default: keys and values in f16, flash attention, 512 tokens of a prompt at a time.
        params.n_threads = params.n_threads_batch = self._sizes.threads
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError(f"llama.cpp made no context for {sequences} sequences of {tokens} tokens")
        self._shape = (sequences, tokens)

    def _prefill(self, prompts: list[list[int]]) -> list[int]:
        """The first new token of every prompt; as many whole prompts a step as fit."""
        length = len(prompts[0])
        per_step = max(1, _STEP_TOKENS // length)
        first: list[int] = []
        for begin in range(0, len(prompts), per_step):
            rows = [
                (sequence, position, token)
                for sequence, prompt in enumerate(prompts[begin : begin + per_step], begin)
                for position, token in enumerate(prompt)
            ]
            first += self._decode(rows, wanted=range(length - 1, len(rows), length))
        return first

    def _decode(self, rows: list[tuple[int, int, int]], wanted: range) -> list[int]:
        """Compute (sequence, position, token) rows; the likeliest next token of the `wanted` ones, which ascend."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for row, (sequence, position, token) in enumerate(rows):
            batch.token[row] = token
            batch.pos[row] = position
            batch.n_seq_id[row] = 1
            batch.seq_id[row][0] = sequence
            batch.logits[row] = row in wanted
        status = llama_cpp.llama_decode(self._context, batch)
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status} for {len(rows)} tokens")
        # The logits of the wanted rows lie in one block, in order.
        logits = llama_cpp.llama_get_logits(self._context)
        return np.ctypeslib.as_array(logits, shape=(len(wanted), self._vocabulary)).argmax(axis=1).tolist()


def load(model: Path, settings: Mapping[str, Any], sizes: Sizes) -> LlamaCpp:
    llama_cpp.llama_log_set(_ignore_log, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    opened = llama_cpp.llama_model_load_from_file(str(model / _FILE).encode(), llama_cpp.llama_model_default_params())
    if not opened:
        raise RuntimeError(f"llama.cpp cannot load {model / _FILE}: delete its folder to convert again")
    return LlamaCpp(opened, sizes)


_TENSORS = {  # Hugging Face's names to GGUF's
    "transformer.": "",
    "wte": "token_embd",
    "wpe": "position_embd",
    "ln_f": "output_norm",
    "h.": "blk.",
    "ln_1": "attn_norm",
    "ln_2": "ffn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
_FILE_TYPES = {
    "bf16": llama_cpp.LLAMA_FTYPE_MOSTLY_BF16,
    "q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
    "q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
}


def convert(checkpoint: Path, out: Path, conversion: str) -> None:
    """Write f32 with the gguf package; anything narrower by llama.cpp's own quantizer, as its tool does."""
    if conversion == "f32":
        _write_f32(checkpoint, out / _FILE)
        return
    wide, narrow = out / "f32.gguf", out / _FILE
    _write_f32(checkpoint, wide)
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = _FILE_TYPES[conversion]
    params.nthread = 1  # others may be measuring
    status = llama_cpp.llama_model_quantize(str(wide).encode(), str(narrow).encode(), ctypes.byref(params))
    wide.unlink()
    if status != 0:
        raise RuntimeError(f"llama_model_quantize returned {status}")


def _write_f32(checkpoint: Path, file: Path) -> None:
    import gguf
    from safetensors import safe_open

    config = json.loads((checkpoint / "config.json").read_text())
    writer = gguf.GGUFWriter(file, "gpt2")
    writer.add_context_length(config["n_positions"])
    writer.add_embedding_length(config["n_embd"])
    writer.add_feed_forward_length(4 * config["n_embd"])
    writer.add_block_count(config["n_layer"])
    writer.add_head_count(config["n_head"])
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])
    writer.add_tokenizer_model("none")  # it is fed ids
    writer.add_vocab_size(config["vocab_size"])
    shards = [safe_open(shard, "numpy") for shard in sorted(checkpoint.glob("*.safetensors"))]
    tensors = [(shard, name) for shard in shards for name in shard.keys()]  # noqa: SIM118 - not a dictionary
    for shard, name in tensors:
        shape = shard.get_slice(name).get_shape()
        shape = shape[::-1] if _is_transposed(name) else shape
        writer.add_tensor_info(_gguf_name(name), shape, np.dtype(np.float32), 4 * math.prod(shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for shard, name in tensors:  # one at a time in memory
        tensor = shard.get_tensor(name)
        writer.write_tensor_data(np.ascontiguousarray(tensor.T) if _is_transposed(name) else tensor)
    writer.close()


def _is_transposed(name: str) -> bool:
    """GPT-2's linear layers are stored [inputs, outputs], GGUF's [outputs, inputs]."""
    return ".c_" in name and name.endswith(".weight")


def _gguf_name(name: str) -> str:
    for ours, theirs in _TENSORS.items():
        name = name.replace(ours, theirs)
    return name
