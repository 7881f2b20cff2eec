"""Every knob of the server, typed, with its unit and its limits. The only reader of the environment.

A knob is a flag of `predictor serve` and a variable `PREDICTOR_<NAME>`; the flag wins.
"""

from __future__ import annotations

import difflib
import os
import re
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from predictor.errors import ConfigurationError

PREFIX = "PREDICTOR_"

_MODEL = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)=(.+)")


class Settings(BaseSettings):
    """The settings of one server process."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="forbid", frozen=True)

    model: str = Field("aitextgen=models/bard", description="NAME=SOURCE; SOURCE is a folder or a Hugging Face hub id")
    revision: str | None = Field(None, description="branch, tag or commit of the model's hub id")
    backend: Literal["engine", "transformers", "aitextgen"] = Field("engine", description="what generates the tokens")
    dtype: Literal["auto", "float32", "bfloat16", "float16", "int8"] = Field(
        "auto",
        description="width of weights, keys and values; auto is float16 on CUDA and float32 on CPU; int8, for CPU, "
        "keeps keys and values in bfloat16",
    )
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    host: str = Field("0.0.0.0", description="address to listen on")
    port: int = Field(8080, ge=1, le=65535, description="HTTP port")
    grace_period_s: int = Field(
        30, ge=1, le=3600, description="seconds after SIGTERM in which running requests are finished"
    )
    kv_memory_mib: int | None = Field(
        None,
        ge=1,
        description="MiB for keys and values; by default at most 2048 on CPU and 90% of what is free on CUDA, "
        "and no more than max_running full contexts",
    )
    max_running: int = Field(64, ge=1, le=4096, description="sequences generated together")
    queue_limit: int = Field(512, ge=1, le=100_000, description="prompts that may wait; past it 429")
    prefill_chunk_tokens: int = Field(128, ge=1, le=65536, description="prompt tokens computed at a time")
    step_tokens: int = Field(
        256,
        ge=1,
        le=65536,
        description="rows a step aims at: every decoding sequence, then prefill; one chunk always fits",
    )
    speculation: bool = Field(
        True, description="guess tokens ahead where that is faster; the text is the same with it and without"
    )
    draft: str | None = Field(
        None,
        description="folder or hub id of a smaller model of the same vocabulary, which guesses ahead, in int8 on CPU, "
        "where that is faster",
    )
    max_instances: int = Field(64, ge=1, le=4096, description="prompts per request")
    max_body_bytes: int = Field(2**20, ge=1024, le=2**30, description="bytes of a request's body; past it 413")
    timeout_s: float = Field(300, gt=0, le=3600, description="seconds a request may take; past it 504")
    threads: int | None = Field(
        None, ge=1, le=1024, description="CPU threads of the model; by default one per physical core that it may use"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least severe log lines shown")
    log_format: Literal["text", "json"] = Field("text", description="one line of text, or one JSON object, per event")

    @field_validator("model")
    @classmethod
    def _name_and_source(cls, value: str) -> str:
        if not _MODEL.fullmatch(value):
            raise ValueError("must be NAME=SOURCE, the name in letters, digits, '.', '_' and '-'")
        return value

    @property
    def model_name(self) -> str:
        return self.model.split("=", 1)[0]

    @property
    def model_source(self) -> str:
        return self.model.split("=", 1)[1]


def load_settings(flags: dict[str, Any]) -> Settings:
    """Settings from flags (None = not given), then `PREDICTOR_*`, then defaults; raises `ConfigurationError`."""
    _refuse_unknown_variables()
    given = {name: value for name, value in flags.items() if value is not None}
    try:
        return Settings(**given)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = str(first["loc"][0])
        source = flag(name) if name in given else PREFIX + name.upper()
        message = first["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
        raise ConfigurationError(f"{source} {message}, got {first['input']!r}") from error


def knative_revision() -> str:
    """The revision this process belongs to, as Knative tells every container; empty elsewhere."""
    return os.environ.get("K_REVISION", "")


def flag(name: str) -> str:
    """The command line's spelling of a setting."""
    return "--" + name.replace("_", "-")


def _refuse_unknown_variables() -> None:
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    for variable in os.environ:
        if variable.upper().startswith(PREFIX) and variable.upper() not in known:
            near = difflib.get_close_matches(variable.upper(), known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            if re.search(r"_SERVICE_(HOST|PORT)|_PORT_\d+_(TCP|UDP|SCTP)", variable):
                hint = "; Kubernetes sets it for a Service called predictor: set enableServiceLinks: false in the pod"
            raise ConfigurationError(f"the variable {variable} is no setting of this server{hint}")
