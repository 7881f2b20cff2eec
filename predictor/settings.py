"""Every knob of the server, typed, with its unit and its limits. The only reader of the environment.

A knob is a flag of `predictor serve` and a variable `PREDICTOR_<NAME>`; the flag wins.
"""

from __future__ import annotations

import difflib
import os
import re
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from predictor.errors import ConfigurationError

PREFIX = "PREDICTOR_"

_MODEL = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)=(.+)")

_HOST = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9._-]*[A-Za-z0-9])?|[0-9A-Fa-f:.]+")

Compat = Literal["cloud-run", "huggingface-gpt", "seldon", "nanogpt"]
COMPAT: tuple[Compat, ...] = ("cloud-run", "huggingface-gpt", "seldon", "nanogpt")

# A setting that may be given several times; its variable separates the values by spaces.
_Several = Annotated[tuple[str, ...], NoDecode]


class NamedModel(NamedTuple):
    """A model to serve: its name in paths, and the folder or hub id it comes from."""

    name: str
    source: str


class Settings(BaseSettings):
    """The settings of one server process."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="forbid", frozen=True)

    model: _Several = Field(
        ("aitextgen=models/bard",),
        description="NAME=SOURCE; SOURCE is a folder or a Hugging Face hub id; several share the KV memory, and a "
        "request that names none goes to the first",
    )
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
    chat_template: str | None = Field(
        None,
        description="file with the Jinja template that makes a prompt of chat/completions' messages; by default the "
        "tokenizer's own, and without either they are refused",
    )
    max_instances: int = Field(64, ge=1, le=4096, description="prompts per request")
    max_body_bytes: int = Field(2**20, ge=1024, le=2**30, description="bytes of a request's body; past it 413")
    timeout_s: float = Field(300, gt=0, le=3600, description="seconds a request may take; past it 504")
    threads: int | None = Field(
        None, ge=1, le=1024, description="CPU threads of the model; by default one per physical core that it may use"
    )
    compat: Annotated[tuple[Compat, ...], NoDecode] = Field(
        COMPAT, description="older servers' routes to answer: cloud-run, huggingface-gpt, seldon, nanogpt, or none"
    )
    cors: _Several = Field((), description="origin that browsers may call from; * is any; none: CORS is off")
    jobs: str | None = Field(
        None,
        description="where asynchronous requests are kept: sqlite:///PATH (one server's) or redis://HOST:PORT/DB (of "
        "several); by default a SQLite file of this port in the folder for temporary files; none: no /v1/jobs",
    )
    job_concurrency: int = Field(
        4, ge=0, le=4096, description="jobs that this process runs together; 0 leaves all of them to workers"
    )
    job_limit: int = Field(10_000, ge=1, le=1_000_000, description="jobs that may wait; past it 429")
    job_expiry_s: int = Field(86_400, ge=1, le=30 * 86_400, description="seconds that an ended job is kept")
    webhook_host: _Several = Field(
        (), description="host that a job's webhook may name; * is any; none: webhooks are refused"
    )
    api_keys: str | None = Field(None, description="file with a line per API key, NAME:KEY; read again when it changes")
    admin_key: str | None = Field(
        None, description="file with the key that may load and unload models; without it both are switched off"
    )
    rate_limit: int | None = Field(
        None, ge=1, le=1_000_000, description="requests per minute of one API key, or of one address where keys are off"
    )
    banned: str | None = Field(
        None,
        description="file with a regular expression a line; a prompt that matches is a strike; read again when changed",
    )
    strikes: int = Field(10, ge=1, le=1_000_000, description="strikes after which a user gets 403")
    strikes_expiry_s: int = Field(86_400, ge=1, le=365 * 86_400, description="seconds until a strike is forgotten")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least severe log lines shown")
    log_format: Literal["text", "json"] = Field("text", description="one line of text, or one JSON object, per event")

    @field_validator("model", "cors", "webhook_host", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        """A variable's text into values. A model's folder may hold spaces: what begins anew is NAME=."""
        return re.split(r"\s+(?=\S+=)" if "=" in value else r"\s+", value.strip()) if isinstance(value, str) else value

    @field_validator("compat", mode="before")
    @classmethod
    def _compat(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        return () if value == "none" else tuple(name.strip() for name in value.split(","))

    @field_validator("model")
    @classmethod
    def _names_and_sources(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value or not all(_MODEL.fullmatch(each) for each in value):
            raise ValueError("must be NAME=SOURCE, the name in letters, digits, '.', '_' and '-'")
        names = [each.split("=", 1)[0] for each in value]
        if len(set(names)) < len(names):
            raise ValueError("must give every model a name of its own")
        return value

    @field_validator("compat")
    @classmethod
    def _each_once(cls, value: tuple[Compat, ...]) -> tuple[Compat, ...]:
        return tuple(dict.fromkeys(value))

    @field_validator("webhook_host")
    @classmethod
    def _hosts(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for host in value:
            if host != "*" and not _HOST.fullmatch(host):
                raise ValueError("must be a host's name or address, without scheme, port and path, or *")
        return tuple(host.lower() for host in value)

    @field_validator("jobs")
    @classmethod
    def _a_store(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"none|(sqlite:///|rediss?://).+", value):
            raise ValueError("must be sqlite:///PATH, redis://HOST:PORT/DB or none")
        return value

    @model_validator(mode="after")
    def _together(self) -> Settings:
        for name in ("revision", "draft", "chat_template"):
            if getattr(self, name) is not None and len(self.model) > 1:
                raise ConfigurationError(f"{flag(name)} belongs to one model, and {len(self.model)} are to be served")
        for name in ("strikes", "strikes_expiry_s"):
            if name in self.model_fields_set and self.banned is None:
                raise ConfigurationError(f"{flag(name)} does nothing without --banned; leave it out")
        return self

    @property
    def models(self) -> list[NamedModel]:
        """What `model` names, in order; the first is the one of requests that name none."""
        return [NamedModel(*each.split("=", 1)) for each in self.model]

    @property
    def redis(self) -> str | None:
        """The address that `jobs` names, if that is a Redis: what replicas share is there."""
        return self.jobs if self.jobs is not None and self.jobs.startswith(("redis://", "rediss://")) else None


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
