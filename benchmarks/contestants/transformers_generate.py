"""transformers' own `generate`, without compilation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.contestants.engine import Sizes

PACKAGES = ("transformers", "torch")


class Transformers:
    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model.eval()

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        ids = torch.tensor(prompts)
        out = self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        return out[:, ids.shape[1] :].tolist()


def load(model: Path, settings: Mapping[str, Any], sizes: Sizes) -> Transformers:
    torch.set_num_threads(sizes.threads)
    dtype = getattr(torch, settings["dtype"])
    return Transformers(
        AutoModelForCausalLM.from_pretrained(model, dtype=dtype, attn_implementation=settings["attention"])
    )
