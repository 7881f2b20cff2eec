"""The original system: the model as aitextgen holds it, and the `generate` that aitextgen calls.

aitextgen's own `generate` takes one prompt as text and tokenizes it; its model is asked directly, so that what is
compared is the computing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from aitextgen import aitextgen

from benchmarks.contestants.engine import Sizes
from benchmarks.contestants.transformers_generate import Transformers

PACKAGES = ("aitextgen", "transformers", "torch")


def load(model: Path, settings: Mapping[str, Any], sizes: Sizes) -> Transformers:
    torch.set_num_threads(sizes.threads)
    return Transformers(aitextgen(model=str(model)).model)
