"""transformers' forward under our scheduler and sampler: the oracle, and the way to serve any causal LM it can load.

One sequence at a time, one cache object each: right before fast.
"""

from __future__ import annotations

import copy
import logging
import threading
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from predictor.backends.base import BackendOptions, Progress
from predictor.backends.device import choose_device, choose_dtype
from predictor.backends.engine import WorkerBackend
from predictor.engine.cache import SlotAllocator, SlotRange
from predictor.engine.sampler import Choose
from predictor.engine.scheduler import Batch, PromptCopy
from predictor.errors import CheckpointError

logger = logging.getLogger(__name__)


class TransformersBackend(WorkerBackend):
    def __init__(self, options: BackendOptions, progress: Progress, stop: threading.Event) -> None:
        try:
            config = AutoConfig.from_pretrained(options.folder, trust_remote_code=False)
        except Exception as error:  # over a damaged file every library below raises what it likes
            raise CheckpointError(f"transformers cannot read {options.folder}: {error}") from error
        context = _context(config)
        super().__init__(options, int(config.vocab_size), context)
        device = choose_device(options.device)
        dtype = choose_dtype(options.dtype, device)
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        # transformers 4 and 5 spell it differently, and this package runs beside both.
        keyword = "dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                options.folder, output_loading_info=True, trust_remote_code=False, **{keyword: dtype}
            )
        except Exception as error:  # as above
            raise CheckpointError(f"transformers cannot load {options.folder}: {error}") from error
        model, told = loaded
        if told["missing_keys"]:  # it would go on with random numbers in their place
            raise CheckpointError(f"the checkpoint lacks the tensors {', '.join(sorted(told['missing_keys']))}")
        self.dtype, self.device = str(dtype).removeprefix("torch."), str(device)
        self._start(TransformersForward(model.to(device).eval(), options.max_running * context))


def _context(config: Any) -> int:
    """Positions the model was trained with; 2,048 where the configuration has no limit."""
    return int(getattr(config, "max_position_embeddings", None) or 2048)


class TransformersForward:
    """A transformers model as an engine's forward. Its cache objects are kept by the slot their range begins at."""

    def __init__(self, model: Any, slots: int) -> None:
        self._model = model
        self._caches: dict[int, Any] = {}
        self.slots: SlotAllocator = _Slots(slots, self._caches)
        self.choose: Choose | None = None
        self.rows_are_exact = False

    def copy_prompts(self, copies: list[PromptCopy]) -> None:
        for each in copies:
            cache = copy.deepcopy(self._caches[each.source])
            _shorten(cache, each.tokens)
            self._caches[each.target] = cache

    def logits(self, batch: Batch) -> Tensor:
        rows, scoring = [], []
        for work in batch.work:
            assert work.sequence.slots is not None
            first_slot = work.sequence.slots.first
            cache = self._caches.get(first_slot) if work.first_position else None
            if cache is not None:
                _shorten(cache, work.first_position)  # drop what an earlier owner of the prompt wrote behind it
            ids = torch.tensor([work.token_ids], device=self._model.device)
            output = self._model(input_ids=ids, past_key_values=cache, use_cache=True)
            self._caches[first_slot] = output.past_key_values
            if work.samples:
                rows.append(output.logits[0, -1].float())
            scoring += output.logits[0, : work.scores].float()
        rows += scoring
        if not rows:
            return torch.empty((0, self._model.config.vocab_size), device=self._model.device)
        return torch.stack(rows)


def _shorten(cache: Any, tokens: int) -> None:
    excess = cache.get_seq_length() - tokens
    if excess > 0:
        cache.crop(-excess)  # the one spelling that both transformers 4 and 5 take


class _Slots(SlotAllocator):
    """Slots that stand for a cache object: freeing the range drops the object."""

    def __init__(self, slots: int, caches: dict[int, Any]) -> None:
        super().__init__(slots)
        self._caches = caches

    def free(self, slots: SlotRange) -> None:
        self._caches.pop(slots.first, None)
        super().free(slots)
