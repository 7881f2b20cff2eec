"""The commands. Flags of `serve` come from settings.py, so each is a PREDICTOR_* variable too."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from predictor import __version__
from predictor.cli import rollout
from predictor.cli.flags import make_way, setting, settings_of
from predictor.cli.worker import worker
from predictor.errors import PredictorError
from predictor.evaluation.options import ParityOptions, ReferenceName, defaults, limits_of
from predictor.settings import flag, load_settings
from predictor.training.options import FinetuneOptions

app = typer.Typer(
    name="gpt2-predictor",
    help="Serve, try and train GPT-2: a KServe custom predictor.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_show_locals=False,  # they would print prompts
)


app.add_typer(rollout.app, name="rollout")
app.command()(worker)


@app.callback(invoke_without_command=False)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit


@app.command()
def serve(
    model: Annotated[list[str] | None, setting("model")] = None,
    revision: Annotated[str | None, setting("revision")] = None,
    backend: Annotated[str | None, setting("backend")] = None,
    dtype: Annotated[str | None, setting("dtype")] = None,
    device: Annotated[str | None, setting("device")] = None,
    host: Annotated[str | None, setting("host")] = None,
    port: Annotated[int | None, setting("port")] = None,
    grace_period_s: Annotated[int | None, setting("grace_period_s")] = None,
    kv_memory_mib: Annotated[int | None, setting("kv_memory_mib")] = None,
    max_running: Annotated[int | None, setting("max_running")] = None,
    queue_limit: Annotated[int | None, setting("queue_limit")] = None,
    prefill_chunk_tokens: Annotated[int | None, setting("prefill_chunk_tokens")] = None,
    step_tokens: Annotated[int | None, setting("step_tokens")] = None,
    speculation: Annotated[bool | None, setting("speculation")] = None,
    draft: Annotated[str | None, setting("draft")] = None,
    chat_template: Annotated[str | None, setting("chat_template")] = None,
    compat: Annotated[str | None, setting("compat")] = None,
    cors: Annotated[list[str] | None, setting("cors")] = None,
    jobs: Annotated[str | None, setting("jobs")] = None,
    job_concurrency: Annotated[int | None, setting("job_concurrency")] = None,
    job_limit: Annotated[int | None, setting("job_limit")] = None,
    job_expiry_s: Annotated[int | None, setting("job_expiry_s")] = None,
    webhook_host: Annotated[list[str] | None, setting("webhook_host")] = None,
    api_keys: Annotated[str | None, setting("api_keys")] = None,
    admin_key: Annotated[str | None, setting("admin_key")] = None,
    rate_limit: Annotated[int | None, setting("rate_limit")] = None,
    banned: Annotated[str | None, setting("banned")] = None,
    strikes: Annotated[int | None, setting("strikes")] = None,
    strikes_expiry_s: Annotated[int | None, setting("strikes_expiry_s")] = None,
    max_instances: Annotated[int | None, setting("max_instances")] = None,
    max_body_bytes: Annotated[int | None, setting("max_body_bytes")] = None,
    timeout_s: Annotated[float | None, setting("timeout_s")] = None,
    threads: Annotated[int | None, setting("threads")] = None,
    log_level: Annotated[str | None, setting("log_level")] = None,
    log_format: Annotated[str | None, setting("log_format")] = None,
) -> None:
    """Serve models over TensorFlow's V1, KServe's V2, OpenAI's and older protocols, until SIGTERM.

    The port opens at once and answers 503 until the model is loaded. Try it with
    curl -d '{"instances": ["To be"]}' localhost:8080/v1/models/aitextgen:predict
    """
    settings = settings_of(locals())
    make_way(settings)
    from predictor.server.server import serve as serve_forever

    serve_forever(settings)


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    model: Annotated[str, typer.Option(help="A folder, or a Hugging Face hub id.")] = "models/bard",
    max_new_tokens: Annotated[
        int | None, typer.Option(help="New tokens at most; by default 64, or what the context leaves.")
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 to 100; 0 is greedy.")] = 0.7,
    top_k: Annotated[int, typer.Option(help="Draw among this many likeliest tokens; 0 is off.")] = 50,
    top_p: Annotated[float, typer.Option(help="Draw among the likeliest tokens of this mass; 1 is off.")] = 1.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1 makes repeats less likely.")] = 1.0,
    context_overflow: Annotated[
        str, typer.Option(help="error, or slide: go on past the context with a window that moves.")
    ] = "error",
    stop: Annotated[list[str] | None, typer.Option(help="End before this string; may be repeated.")] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same text; by default a new one.")] = None,
    n: Annotated[int, typer.Option(help="How many samples.")] = 1,
    backend: Annotated[str, typer.Option(help="engine, transformers or aitextgen.")] = "engine",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16 or int8.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    draft: Annotated[str | None, typer.Option(help="A smaller model that guesses ahead, as of serve.")] = None,
) -> None:
    """Continue a prompt in the terminal, as the tokens come."""
    settings = load_settings(
        {"model": f"terminal={model}", "backend": backend, "dtype": dtype, "device": device, "draft": draft}
    )
    parameters: dict[str, Any] = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "repetition_penalty": repetition_penalty,
        "context_overflow": context_overflow,
        "n": n,
    }
    if max_new_tokens is not None:
        parameters["max_new_tokens"] = max_new_tokens
    if stop:
        parameters["stop"] = stop
    if seed is not None:
        parameters["seed"] = seed
    from predictor.terminal import stream_to_terminal

    asyncio.run(stream_to_terminal(prompt, parameters, settings))


def training(name: str) -> Any:
    """The typer option of a training option: its help comes from training/options.py, its default from there too."""
    field = FinetuneOptions.__dataclass_fields__[name]
    default = f" [default: {field.default}]" if isinstance(field.default, int | float | str) and field.default else ""
    return typer.Option(flag(name), help=f"{field.metadata['help']}.{default}", show_default=False)


@app.command()
def finetune(
    data: Annotated[list[Path], training("data")],
    out: Annotated[Path, training("out")],
    init: Annotated[str | None, training("init")] = None,
    layers: Annotated[int | None, training("layers")] = None,
    heads: Annotated[int | None, training("heads")] = None,
    width: Annotated[int | None, training("width")] = None,
    vocabulary: Annotated[int | None, training("vocabulary")] = None,
    context: Annotated[int | None, training("context")] = None,
    dropout: Annotated[float | None, training("dropout")] = None,
    steps: Annotated[int | None, training("steps")] = None,
    batch_size: Annotated[int | None, training("batch_size")] = None,
    learning_rate: Annotated[float | None, training("learning_rate")] = None,
    warmup_steps: Annotated[int | None, training("warmup_steps")] = None,
    weight_decay: Annotated[float | None, training("weight_decay")] = None,
    gradient_clip: Annotated[float | None, training("gradient_clip")] = None,
    evaluate_every: Annotated[int | None, training("evaluate_every")] = None,
    seed: Annotated[int | None, training("seed")] = None,
    dtype: Annotated[str | None, training("dtype")] = None,
    precision: Annotated[str | None, training("precision")] = None,
    device: Annotated[str | None, training("device")] = None,
    resume: Annotated[bool, training("resume")] = False,
) -> None:
    """Train GPT-2 on text files, from scratch or from a checkpoint; leaves a folder that `serve` takes.

    The folder also gets loss.csv and loss.png. An interrupted run goes on with --resume.
    """
    given = {name: value for name, value in locals().items() if value is not None}
    options = FinetuneOptions(**given | {"data": tuple(data)})
    from predictor.training.finetune import finetune as run

    report = run(options)
    print(
        f"{report.out}: {report.parameters:,} parameters, validation loss {report.validation_loss:.4f} nats per token, "
        f"{report.bits_per_byte:.4f} bits per byte at step {report.best_step} of {report.steps}, "
        f"in {report.duration_s:.0f} s on {report.device}"
    )


@app.command()
def parity(
    text: Annotated[
        Path, typer.Option(help="UTF-8 text file to compare on, the nearer to the model's own the better.")
    ],
    model: Annotated[str, typer.Option(help="A folder, or a Hugging Face hub id.")] = "models/bard",
    dtype: Annotated[str, typer.Option(help="The width to judge; auto is what serve would choose.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N; the reference runs there too.")] = "auto",
    windows: Annotated[
        int | None, typer.Option(help="Windows at most, from the text's start; by default all of it.", min=1)
    ] = None,
    rows: Annotated[
        int, typer.Option(help="Tokens computed at a time; 1 is how a text is generated, slowly.", min=1)
    ] = 128,
    reference: Annotated[
        ReferenceName, typer.Option(help="Whose float32: this predictor's, or transformers' as an outside oracle.")
    ] = "predictor",
    max_perplexity_loss: Annotated[
        float | None,
        typer.Option(help=f"Perplexity / reference - 1 that passes. [default: {defaults('max_perplexity_loss')}]"),
    ] = None,
    min_top1: Annotated[
        float | None,
        typer.Option(help=f"Share of equal likeliest tokens that passes. [default: {defaults('min_top1')}]"),
    ] = None,
    max_kl: Annotated[
        float | None,
        typer.Option(help=f"Mean KL(reference || dtype) in nats that passes. [default: {defaults('max_kl')}]"),
    ] = None,
    json: Annotated[Path | None, typer.Option(help="File to write the figures to.")] = None,
    plot: Annotated[Path | None, typer.Option(help="PNG to draw, by position and by size of difference.")] = None,
) -> None:
    """Compare a number format with float32 on a text; exit code 1 if it is past a limit or makes a NaN.

    Perplexity is over the predictions inside consecutive windows of the model's whole context. Try it with
    predictor parity --dtype bfloat16 --text plays.txt
    """
    settings = load_settings({"model": f"parity={model}", "dtype": dtype, "device": device})
    from predictor.backends.device import choose_device, choose_width
    from predictor.evaluation.parity import parity as run
    from predictor.evaluation.parity import write_files
    from predictor.evaluation.report import told

    chosen = choose_device(settings.device)
    width = choose_width(settings.dtype, chosen)
    limits = limits_of(width, max_perplexity_loss=max_perplexity_loss, min_top1=min_top1, max_kl=max_kl)
    options = ParityOptions(model, width, str(chosen), text, windows, rows, reference, limits, json, plot)
    report = run(options)
    Console().print(told(report))
    write_files(report, options)
    for failure in report.failures:
        Console(stderr=True, soft_wrap=True).print(f"failed: {failure}", style="red", markup=False, highlight=False)
    if report.failures:
        raise typer.Exit(1)


def main() -> None:
    """Run the command line; our errors are one line on stderr and exit code 1."""
    try:
        app()
    except PredictorError as error:
        Console(stderr=True, soft_wrap=True).print(f"error: {error}", style="red", markup=False, highlight=False)
        sys.exit(1)
