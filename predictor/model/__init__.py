"""Tensors: GPT-2's configuration, kernels and forward pass. Knows nothing of files, sequences or requests."""
