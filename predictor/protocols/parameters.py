"""The generation parameters of a request: names, types, ranges. Every limit of DESIGN's table stands here once."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from predictor.errors import InvalidRequest
from predictor.protocols.strict_json import object_of, printable
from predictor.text.request import ContextOverflow, TextRequest

MAX_STOPS, MAX_STOP_CHARACTERS = 16, 256
MAX_BAD_WORDS = 256
MAX_LOGIT_BIAS = 1_024
MAX_LOGPROBS = 20
MAX_SAMPLES = 16

_MAX_FIELDS = 100  # there are some twenty

# Aliases that other APIs' users write, and our name for them.
_ALIASES = {"max_tokens": "max_new_tokens", "num_return_sequences": "n"}

_MOST = {"stop": MAX_STOPS, "bad_words": MAX_BAD_WORDS, "logit_bias": MAX_LOGIT_BIAS}

_TOKEN_ID = re.compile(r"0|[1-9][0-9]{0,8}")

_Checked = TypeVar("_Checked", bound=BaseModel)

_Text = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]


class Parameters(BaseModel):
    """What one row asks for. Strict: a JSON integer is an integer, true is not 1, "0.7" is not 0.7, null is nothing."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    max_new_tokens: int | None = Field(None, ge=1, validation_alias=AliasChoices("max_new_tokens", "max_tokens"))
    context_overflow: ContextOverflow = "error"
    min_new_tokens: int = Field(0, ge=0)
    do_sample: bool = True
    temperature: float = Field(0.7, ge=0, le=100)
    top_k: int | None = Field(None, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0, le=10)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] = Field(
        {}, json_schema_extra={"maxProperties": MAX_LOGIT_BIAS}
    )
    bad_words: list[_Text] = Field([], json_schema_extra={"maxItems": MAX_BAD_WORDS})
    stop: list[_Text] = Field([], json_schema_extra={"maxItems": MAX_STOPS})
    seed: int | None = Field(None, ge=0, le=2**64 - 1)
    n: int = Field(1, ge=1, le=MAX_SAMPLES, validation_alias=AliasChoices("n", "num_return_sequences"))
    ignore_eos: bool = False
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    return_full_text: bool = False
    details: bool = False
    stream: bool = False
    timeout_s: float | None = Field(None, gt=0)

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    # Before each element is looked at, of which pydantic would tell the faults of all.
    @field_validator("stop", "bad_words", "logit_bias", mode="before")
    @classmethod
    def _not_too_many(cls, value: Any, info: ValidationInfo) -> Any:
        most = _MOST[str(info.field_name)]
        if isinstance(value, list | dict) and len(value) > most:
            raise ValueError(f"must have at most {most} items, not {len(value)}")
        return value

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _token_ids(cls, value: Any) -> Any:
        if isinstance(value, dict):
            for key in value:
                if not _TOKEN_ID.fullmatch(key):
                    raise ValueError(f"keys must be token ids as decimal integers, got {printable(key)}")
        return value

    def check_together(self, where: str, logprobs_shown: bool = False) -> None:
        """Rules that join two fields; for a row's final parameters. `logprobs_shown`: also without `details`."""
        if self.max_new_tokens is not None and self.min_new_tokens > self.max_new_tokens:
            raise InvalidRequest(
                f"{where}: min_new_tokens must be at most max_new_tokens ({self.max_new_tokens}), "
                f"got {self.min_new_tokens}",
                param="min_new_tokens",
            )
        if self.logprobs is not None and not self.details and not logprobs_shown:
            raise InvalidRequest(
                f"{where}: logprobs needs details: true, which is where they are told", param="logprobs"
            )

    def request(self, prompt: str, name: str, max_total_tokens: int | None = None) -> TextRequest:
        """The row as the language model takes it."""
        return TextRequest(
            prompt=prompt,
            max_new_tokens=self.max_new_tokens,
            max_total_tokens=max_total_tokens,
            context_overflow=self.context_overflow,
            min_new_tokens=self.min_new_tokens,
            temperature=self.temperature if self.do_sample else 0.0,
            top_k=self.top_k,
            top_p=self.top_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias={int(token_id): bias for token_id, bias in self.logit_bias.items()},
            bad_words=tuple(self.bad_words),
            stop=tuple(self.stop),
            seed=self.seed,
            n=self.n,
            ignore_eos=self.ignore_eos,
            logprobs=self.logprobs,
            timeout_s=self.timeout_s,
            name=name,
        )


def parse_parameters(fields: Mapping[str, Any], where: str, max_timeout_s: float) -> Parameters:
    """Check `fields`; `where` ("parameters", "instances[2]") tells the client which object is wrong."""
    for alias, name in _ALIASES.items():
        if alias in fields and name in fields:
            raise InvalidRequest(f"{where}: {alias} and {name} mean the same; give one", param=alias)
    if len(fields) > _MAX_FIELDS:
        raise InvalidRequest(f"{where} must have at most {_MAX_FIELDS} fields, got {len(fields)}")
    for key, value in fields.items():
        if value is None:
            raise InvalidRequest(f"{where}.{key} must not be null; leave it out for its default", param=key)
    parameters = validated(Parameters, dict(fields), where)
    if parameters.timeout_s is not None and parameters.timeout_s > max_timeout_s:
        raise InvalidRequest(
            f"{where}.timeout_s must be at most this server's {max_timeout_s:g}, got {parameters.timeout_s:g}",
            param="timeout_s",
        )
    return parameters


def override(shared: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """`shared` with the fields of `own` in place of its own, whichever of a field's names each uses."""
    replaced = {_ALIASES.get(key, key) for key in own}
    return {key: value for key, value in shared.items() if _ALIASES.get(key, key) not in replaced} | dict(own)


def validated(kind: type[_Checked], value: Any, where: str) -> _Checked:
    """The JSON object `value` as that class; raises `InvalidRequest`, which calls it `where`."""
    try:
        return kind.model_validate(object_of(value, where))
    except ValidationError as error:
        raise _invalid_request(error, where) from error


def _invalid_request(error: ValidationError, where: str) -> InvalidRequest:
    """The first thing pydantic found, in our words: the field as the client wrote it, the limit, the value."""
    first = error.errors(include_url=False)[0]
    field = str(first["loc"][0])
    path = where + "".join(
        f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"] if part != "[key]"
    )
    if first["type"] == "extra_forbidden":
        field = ".".join(str(part) for part in first["loc"])
        return InvalidRequest(f"{where}: unknown field {printable(field)}", param=field)
    if first["type"] == "missing":
        return InvalidRequest(f"{where} lacks {field}", param=field)
    message = first["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    message = (
        message.replace("Dictionary should", "must").replace("List should", "must").replace("String should", "must")
    )
    return InvalidRequest(f"{path} {message}, got {printable(first['input'])}", param=field)
