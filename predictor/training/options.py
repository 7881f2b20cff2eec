"""What a training run may be asked to do: each field with its default, limits and one line of help.

The command line builds its flags from here: `fields(FinetuneOptions)`, `metadata["help"]`, and for numbers
`metadata["low"]` and `metadata["high"]`, both allowed. Must not know torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from predictor.errors import InvalidRequest

SavedDtype = Literal["float32", "bfloat16", "float16"]
Precision = Literal["auto", "float32", "bfloat16"]
Device = Literal["auto", "cpu", "cuda"]

# A byte-level vocabulary: the 256 bytes and <|endoftext|>.
SMALLEST_VOCABULARY = 257
SHAPE_FIELDS = ("layers", "heads", "width", "vocabulary")


def _number(default: float | None, low: float, high: float, help: str) -> Any:
    return field(default=default, metadata={"help": help, "low": low, "high": high})


@dataclass(frozen=True, slots=True)
class FinetuneOptions:
    """One run. None means "not said": the defaults that depend on `init` are the properties below."""

    data: tuple[Path, ...] = field(metadata={"help": "UTF-8 text file to train on; may be given more than once"})
    out: Path = field(metadata={"help": "folder to write the finished model to"})
    init: str | None = field(
        default=None, metadata={"help": "folder or hub id of the GPT-2 to start from; absent = from scratch"}
    )
    layers: int | None = _number(None, 1, 96, "layers of a model from scratch (default: 4)")
    heads: int | None = _number(None, 1, 128, "attention heads of a model from scratch (default: 4)")
    width: int | None = _number(
        None, 4, 8192, "width (n_embd) of a model from scratch, a multiple of heads (default: 256)"
    )
    vocabulary: int | None = _number(
        None, SMALLEST_VOCABULARY, 131_072, "most tokens of a new byte-level BPE, from scratch only (default: 1024)"
    )
    context: int | None = _number(None, 2, 8192, "tokens per training window (default: 256; with init its own context)")
    dropout: float | None = _number(
        None, 0.0, 0.9, "dropout of embeddings and residuals, none in attention (default: 0.1; with init its own)"
    )
    steps: int = _number(2000, 1, 10_000_000, "optimizer steps")
    batch_size: int = _number(16, 1, 4096, "windows per step")
    learning_rate: float | None = _number(
        None, 1e-9, 1.0, "peak learning rate; a cosine takes it to a tenth (default: 1e-3; with init 5e-5)"
    )
    warmup_steps: int | None = _number(
        None, 0, 10_000_000, "steps of linear warm-up, at most steps (default: a tenth of steps, at most 100)"
    )
    weight_decay: float = _number(0.1, 0.0, 10.0, "AdamW's weight decay, on matrices only")
    gradient_clip: float = _number(1.0, 1e-6, 1e6, "largest norm of the gradient")
    evaluate_every: int = _number(100, 1, 10_000_000, "steps between validations; each also saves what --resume needs")
    seed: int = _number(0, 0, 2**63 - 1, "seed of the weights, the batches and the dropout")
    dtype: SavedDtype = field(
        default="float32", metadata={"help": "dtype of the saved weights: float32, bfloat16 or float16"}
    )
    precision: Precision = field(
        default="auto",
        metadata={
            "help": "arithmetic of training: float32, bfloat16 (autocast), or auto = bfloat16 where it is native"
        },
    )
    device: Device = field(default="auto", metadata={"help": "cpu, cuda, or auto = cuda where there is one"})
    resume: bool = field(default=False, metadata={"help": "go on from the state that an interrupted run left in out"})

    @property
    def peak_learning_rate(self) -> float:
        """The learning rate at the end of the warm-up."""
        if self.learning_rate is not None:
            return self.learning_rate
        return 1e-3 if self.init is None else 5e-5

    @property
    def warmup(self) -> int:
        """Steps of linear warm-up."""
        return min(100, self.steps // 10) if self.warmup_steps is None else self.warmup_steps


def check_options(options: FinetuneOptions) -> None:
    """Refuse what cannot work; raises InvalidRequest with the field and its limit."""
    for option in fields(options):
        value, low = getattr(options, option.name), option.metadata.get("low")
        if low is None or value is None:
            continue
        high = option.metadata["high"]
        if not low <= value <= high:  # also refuses NaN
            raise InvalidRequest(f"{option.name} must be in {low:,}..{high:,}, got {value}", param=option.name)
    for name, allowed in (("dtype", SavedDtype), ("precision", Precision), ("device", Device)):
        if getattr(options, name) not in get_args(allowed):
            names = ", ".join(get_args(allowed))
            raise InvalidRequest(f"{name} must be one of {names}, got {getattr(options, name)}", param=name)
    if not options.data:
        raise InvalidRequest("data must name at least 1 text file, got none", param="data")
    if options.warmup > options.steps:
        raise InvalidRequest(
            f"warmup_steps must be at most steps ({options.steps:,}), got {options.warmup:,}",
            param="warmup_steps",
        )
    if options.init is None:
        width, heads = options.width or 256, options.heads or 4
        if width % heads:
            raise InvalidRequest(f"width must be a multiple of heads ({heads}), got {width}", param="width")
        return
    for name in SHAPE_FIELDS:
        if getattr(options, name) is not None:
            raise InvalidRequest(
                f"{name} is for a model from scratch; with init it is the checkpoint's own", param=name
            )
    if Path(options.init).resolve() == options.out.resolve():
        raise InvalidRequest("out must be another folder than init", param="out")
