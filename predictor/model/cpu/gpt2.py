"""GPT-2 over the compiled kernels: the same rows in, the same logits out as predictor.model.gpt2.GPT2."""

from __future__ import annotations

import ctypes
import weakref
from array import array

import torch
from torch import Tensor

from predictor.model.config import GPT2Config
from predictor.model.cpu.library import (
    ACTIVATIONS,
    BLOCKS_PER_GROUP,
    FORMATS,
    OUTPUTS_PER_BLOCK,
    TOKENS_PER_BLOCK,
    WIDTHS,
    Draw,
    Shape,
    Step,
    open_library,
)
from predictor.model.cpu.library import instruction_set as find_instruction_set
from predictor.model.gpt2 import Fetch, Rows, attention_scale


def _shape(config: GPT2Config, width: str) -> Shape:
    return Shape(
        layers=config.layers, width=config.width, heads=config.heads, inner=config.inner_width,
        vocabulary=config.vocabulary, context=config.context, number_width=WIDTHS[width],
        activation=ACTIVATIONS[config.activation], tied=int(config.tied_embeddings), epsilon=config.epsilon,
    )  # fmt: skip


def packed_bytes(config: GPT2Config, width: str) -> int:
    """Bytes the packed weights occupy."""
    return int(open_library().gpt2_weight_bytes(_shape(config, width)))


def unsupported(config: GPT2Config) -> str | None:
    """Why these kernels cannot run a model of this shape; None where they can."""
    for name, size in (
        ("n_embd", config.width),
        ("n_embd / n_head", config.head_width),
        ("n_inner", config.inner_width),
    ):
        if size % 16:
            return f"{name} is {size}, no multiple of 16"
    return None


def _check(name: str, number: int, end: int) -> None:
    """The kernels read where they are told to."""
    if not 0 <= number < end:
        raise IndexError(f"{name} {number} is outside 0..{end - 1}")


class CPUGPT2:
    """The packed weights and the step over them. Not for two threads at once."""

    slot_multiple = TOKENS_PER_BLOCK

    def __init__(self, config: GPT2Config, fetch: Fetch, width: str, threads: int, instruction_set: str = "") -> None:
        """Pack what `fetch` gives, tensor by tensor, as `width` (float32, bfloat16 or int8).

        `threads` compute; `instruction_set` is the best there is, or the one named (for tests).
        """
        self.config, self.width = config, width
        self._library, self.device = open_library(), torch.device("cpu")
        found = find_instruction_set(instruction_set)
        if found is None:
            raise OSError(f"this CPU lacks {instruction_set}")
        self.instruction_set = found
        scales = (ctypes.c_float * config.layers)(*(attention_scale(config, i) for i in range(config.layers)))
        handle = self._library.gpt2_new(_shape(config, width), scales, instruction_set.encode(), threads)
        if not handle:
            raise MemoryError(f"no memory or no threads for the CPU kernels ({threads} threads)")
        self._handle = ctypes.c_void_p(handle)
        # Not at the end of the process, which takes it all with it: another thread may be in the midst of a step.
        weakref.finalize(self, self._library.gpt2_free, self._handle).atexit = False
        self._logits = torch.empty((0, -(-config.vocabulary // OUTPUTS_PER_BLOCK) * OUTPUTS_PER_BLOCK))
        self._load(fetch)

    def _load(self, fetch: Fetch) -> None:
        c, E, N = self.config, self.config.width, self.config.inner_width

        def matrix(number: int, name: str, shape: tuple[int, int], by_output: bool = False) -> None:
            stored = fetch(name, shape)
            if str(stored.dtype).removeprefix("torch.") not in FORMATS or not stored.is_contiguous():
                stored = stored.float().contiguous()
            kind = FORMATS[str(stored.dtype).removeprefix("torch.")]
            self._library.gpt2_load_matrix(self._handle, number, stored.data_ptr(), kind, int(by_output))

        def vector(address: int, name: str, *shape: int) -> None:
            stored = fetch(name, shape).float().contiguous()
            ctypes.memmove(address, stored.data_ptr(), stored.nbytes)

        def norm(number: int, name: str) -> None:
            for bias, part in enumerate(("weight", "bias")):
                vector(self._library.gpt2_norm(self._handle, number, bias), f"{name}.{part}", E)

        def linear(number: int, name: str, inputs: int, outputs: int) -> None:
            matrix(number, f"{name}.weight", (inputs, outputs))
            vector(self._library.gpt2_bias(self._handle, number), f"{name}.bias", outputs)

        matrix(0, "wte.weight", (c.vocabulary, E), by_output=True)
        vector(self._library.gpt2_positions(self._handle), "wpe.weight", c.context, E)
        for i in range(c.layers):
            first = 2 + 4 * i
            norm(1 + 2 * i, f"h.{i}.ln_1")
            linear(first, f"h.{i}.attn.c_attn", E, 3 * E)
            linear(first + 1, f"h.{i}.attn.c_proj", E, E)
            norm(2 + 2 * i, f"h.{i}.ln_2")
            linear(first + 2, f"h.{i}.mlp.c_fc", E, N)
            linear(first + 3, f"h.{i}.mlp.c_proj", N, E)
        norm(0, "ln_f")
        if not c.tied_embeddings:
            matrix(1, "lm_head.weight", (c.vocabulary, E), by_output=True)

    def new_kv(self, slots: int) -> Tensor:
        """Keys and values of `slots` tokens: [groups, L, 2, H, 8 blocks, 16 * D]; pages are touched when written.

        See model.h for what a block holds.
        """
        c = self.config
        groups = -(-slots // (TOKENS_PER_BLOCK * BLOCKS_PER_GROUP))
        dtype = torch.float32 if self.width == "float32" else torch.bfloat16
        shape = (groups, c.layers, 2, c.heads, BLOCKS_PER_GROUP, TOKENS_PER_BLOCK * c.head_width)
        kv = torch.empty(shape, dtype=dtype)
        self._library.gpt2_use_large_pages(kv.data_ptr(), kv.nbytes)
        return kv

    def copy_kv(self, kv: Tensor, source: int, target: int, tokens: int) -> None:
        """Copy the keys and values of `tokens` slots from `source` to `target`, both multiples of 16."""
        first, to = source // TOKENS_PER_BLOCK, target // TOKENS_PER_BLOCK
        for block in range(-(-tokens // TOKENS_PER_BLOCK)):
            (from_group, from_place), (to_group, to_place) = (
                divmod(start + block, BLOCKS_PER_GROUP) for start in (first, to)
            )
            kv[to_group, ..., to_place, :] = kv[from_group, ..., from_place, :]

    def forward(self, rows: Rows, kv: Tensor) -> Tensor:
        """Run one step, write its keys and values into `kv`, return the wanted logits [W, V] in fp32.

        They are valid until the next step.
        """
        V, W = self.config.vocabulary, len(rows.wanted)
        stride = self._logits.shape[1]
        if len(self._logits) < W:
            self._logits = torch.empty((W, stride))
        logits = self._logits[:W]
        slots = len(kv) * BLOCKS_PER_GROUP * TOKENS_PER_BLOCK
        flat: list[int] = []
        R = 0
        for span in rows.spans:
            first = span.positions.start
            flat += (R, span.rows, span.first_slot // TOKENS_PER_BLOCK, first)
            R += span.rows
            _check("position", first, self.config.context)
            _check("position", span.context - 1, self.config.context)
            _check("slot", span.first_slot, slots)
            _check("slot", span.first_slot + span.context - 1, slots)
        if len(rows.token_ids) != R:
            raise IndexError(f"{len(rows.token_ids)} tokens for spans of {R} rows")
        for name, numbers, end in (("token", rows.token_ids, V), ("row", rows.wanted, len(rows.token_ids))):
            if numbers:
                _check(name, min(numbers), end)
                _check(name, max(numbers), end)
        token_ids, spans, wanted = (array("i", numbers) for numbers in (rows.token_ids, flat, rows.wanted))
        step = Step(
            len(token_ids), len(rows.spans), W, token_ids.buffer_info()[0], spans.buffer_info()[0],
            wanted.buffer_info()[0], logits.data_ptr(), stride,
        )  # fmt: skip
        if self._library.gpt2_step(self._handle, kv.data_ptr(), step):
            raise MemoryError(f"no memory for a step of {len(token_ids)} rows")
        return logits[:, :V]

    def sample(self, logits: Tensor, draws: list[Draw]) -> list[int]:
        """A token for each draw from its row of `logits`, as `forward` returned them; -1 where none is finite."""
        tokens = (ctypes.c_int32 * len(draws))()
        array = (Draw * len(draws))(*draws)
        self._library.gpt2_sample(self._handle, logits.data_ptr(), logits.stride(0), array, len(draws), tokens)
        return list(tokens)
