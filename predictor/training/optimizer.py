"""AdamW and its learning rate. Must not know data or files."""

from __future__ import annotations

import math

import torch

# The cosine ends at this share of the peak: 0 would waste the last steps.
FINAL_SHARE = 0.1


def make_optimizer(model: torch.nn.Module, weight_decay: float) -> torch.optim.AdamW:
    """AdamW that decays matrices only: biases and layer norms have nothing to shrink to.

    beta2 = 0.99 and not 0.999: runs here are short, and a long memory keeps the first steps' gradients.
    """
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.99))


def learning_rate(step: int, steps: int, warmup_steps: int, peak: float) -> float:
    """The rate of a step in 0..steps-1: linear up to `peak`, then half a cosine down to a tenth of it."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - 1 - warmup_steps)
    return peak * (FINAL_SHARE + (1 - FINAL_SHARE) * 0.5 * (1 + math.cos(math.pi * progress)))
