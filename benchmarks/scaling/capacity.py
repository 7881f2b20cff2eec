"""What fits into a GPU beside GPT-2 XL in FP16, how fast it then is, and what a token costs. Pure arithmetic.

All of it is computed from datasheets and a share of the memory's bandwidth; nothing here was measured on any GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import floor

from benchmarks.scaling.service import ServiceCurve

WEIGHTS_BYTES = 3.112e9  # GPT-2 XL in FP16; all of them are read in every step
KV_BYTES_PER_TOKEN = 307_200  # 2 (K, V) * 48 layers * 1600 * 2 bytes
FLOP_PER_TOKEN = 3.112e9  # 2 per weight
CONTEXT = 1024

# Assumption: CUDA's context (0.5 GB), torch's and cuBLAS' workspaces (0.3), the CUDA graphs' buffers and the logits of
# 256 rows in fp32 (0.3), and what an allocator loses. With the memory that nvidia-smi reports this gives 39, 93 and 464
# full contexts on V100-16, V100-32 and H200.
RESERVED_BYTES = 1.5e9
# Assumption: of the datasheet's bandwidth, while decoding. The project's targets ask for 0.63 on V100 (3,000 tokens/s
# at batch 32, context 300) and 0.61 on H200 (25,000 at batch 256, context 300, of 4.3 TB/s).
BANDWIDTH_SHARE = 0.6
# Assumption: of the datasheet's dense FP16 products, while prompts are computed.
COMPUTE_SHARE = 0.5
# The server takes this share of what is free once the weights are there (backends/engine.py).
SERVER_KV_SHARE = 0.9
CUDA_CONTEXT_BYTES = 0.5e9
# The rows that CUDA graphs exist for; any other number is padded to the next (model/cuda/graphs.py).
GRAPH_ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
# benchmarks/gpu.py measures up to here.
MOST_ROWS = 256
# Weights are multiplied with 64 rows at a time (model/kernels.py). More rows read them again, from the L2 cache where
# it holds the largest matrix (1600 x 6400 in FP16), else from memory.
ROWS_PER_PRODUCT = 64
LARGEST_MATRIX_BYTES = 20.5e6

# An assumption of 2026-11-21, round, and no provider's quote: replace it with `--price NAME=USD`.
PRICES_DATED = "2026-11-21"


@dataclass(frozen=True, slots=True)
class Gpu:
    name: str
    memory_bytes: float  # as nvidia-smi reports it
    bytes_per_s: float  # the datasheet's, but H200: as measured elsewhere, 4.3 of 4.8 TB/s
    flop_per_s: float  # FP16 on tensor cores, dense, sums in FP32
    l2_bytes: float
    usd_per_hour: float  # see PRICES_DATED


MIB = 2**20
GPUS = (
    Gpu("V100-16", 16_160 * MIB, 900e9, 125e12, 6e6, 2.00),
    Gpu("V100-32", 32_510 * MIB, 900e9, 125e12, 6e6, 2.50),
    Gpu("T4-16", 15_360 * MIB, 320e9, 65e12, 4e6, 0.50),
    Gpu("L4-24", 23_034 * MIB, 300e9, 121e12, 48e6, 0.75),
    Gpu("A100-40", 40_960 * MIB, 1_555e9, 312e12, 40e6, 2.00),
    Gpu("A100-80", 81_920 * MIB, 2_039e9, 312e12, 40e6, 2.50),
    Gpu("H100-80", 81_559 * MIB, 3_350e9, 989e12, 50e6, 3.00),
    Gpu("H200-141", 143_771 * MIB, 4_300e9, 989e12, 50e6, 4.00),
)


@dataclass(frozen=True, slots=True)
class Mix:
    """The mean request, in tokens."""

    prompt: float
    new: float

    @property
    def reserved(self) -> float:
        """KV slots that a sequence holds from its start to its end; the last token's is never written."""
        return self.prompt + self.new - 1

    @property
    def mean_context(self) -> float:
        """Tokens whose keys and values a step reads, on average over a request's steps."""
        return self.prompt + self.new / 2


# A mean context of 300, at which the project's targets are given.
REFERENCE = Mix(prompt=200, new=200)


def sequences_that_fit(gpu: Gpu, tokens: float) -> int:
    """So many sequences that hold `tokens` slots each fit beside the weights."""
    return floor((gpu.memory_bytes - WEIGHTS_BYTES - RESERVED_BYTES) / (tokens * KV_BYTES_PER_TOKEN))


def sequences_by_server(gpu: Gpu, tokens: float) -> int:
    """The same in the KV memory that the server takes by itself, where --max-running does not cap it."""
    free = gpu.memory_bytes - CUDA_CONTEXT_BYTES - WEIGHTS_BYTES
    return floor(SERVER_KV_SHARE * free / (tokens * KV_BYTES_PER_TOKEN))


def container_concurrency(gpu: Gpu) -> int:
    """Requests at once per replica: the largest CUDA graph of which every row can be a sequence of a full context.

    So nobody ever waits for KV memory inside the engine, whatever is asked.
    """
    most = min(sequences_that_fit(gpu, CONTEXT), sequences_by_server(gpu, CONTEXT), MOST_ROWS)
    if gpu.l2_bytes < LARGEST_MATRIX_BYTES:
        most = min(most, ROWS_PER_PRODUCT)  # past it the weights are read from memory once more
    return max(rows for rows in GRAPH_ROWS if rows <= most)


def step_s(gpu: Gpu, running: float, context: float, bandwidth_share: float = BANDWIDTH_SHARE) -> float:
    """A decode step: weights and every running sequence's keys and values, read once."""
    return (WEIGHTS_BYTES + running * context * KV_BYTES_PER_TOKEN) / (gpu.bytes_per_s * bandwidth_share)


def service_curve(gpu: Gpu, mix: Mix, bandwidth_share: float = BANDWIDTH_SHARE) -> ServiceCurve:
    """Seconds per token among n running: the step, and everybody's prompts, spread over the tokens they lead to."""
    prompt_s = mix.prompt / mix.new * FLOP_PER_TOKEN / (gpu.flop_per_s * COMPUTE_SHARE)
    ends = (1, container_concurrency(gpu))  # a straight line in between
    token_s = tuple(step_s(gpu, n, mix.mean_context, bandwidth_share) + n * prompt_s for n in ends)
    return ServiceCurve(f"1.5B float16 on {gpu.name}", ends, token_s, measured_on=None)


def usd_per_million(usd_per_hour: float, tokens_per_s: float) -> float:
    """Of new tokens, from a replica that makes so many a second all the time."""
    return usd_per_hour / 3600 / tokens_per_s * 1e6
