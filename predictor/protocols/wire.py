"""What every wire format has in common: a body becomes an `Exchange`, and the exchange shapes the answer.

A format is a module beside this one with a `WireFormat` in it. Nothing here or there knows HTTP, KServe or the model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from predictor.errors import PredictorError
from predictor.protocols import strict_json
from predictor.text.pieces import Piece
from predictor.text.request import Completion, TextRequest


@dataclass(frozen=True, slots=True)
class Limits:
    """What the server's settings allow."""

    max_instances: int
    max_timeout_s: float


@dataclass(frozen=True, slots=True)
class RawAnswer:
    """An answer that is no JSON."""

    content: bytes
    media_type: str
    headers: Mapping[str, str] = field(default_factory=dict)


class Exchange(ABC):
    """One checked request: what to generate, and how its answer looks in its wire format.

    It lives as long as the request and may remember what it has sent.
    """

    requests: list[TextRequest]
    stream: bool = False  # answer with server-sent events
    user: str | None = None  # whoever asks, by the body's own account

    @abstractmethod
    def render(self, results: Sequence[Sequence[Completion]]) -> Any:
        """The whole answer, JSON or a `RawAnswer`; `results[i]` are the n completions of `requests[i]`."""

    def events(self, piece: Piece) -> list[Any]:
        """The events a piece becomes, where `stream` is set: JSON objects, or text that is sent as it is."""
        raise NotImplementedError(f"{type(self).__name__} does not stream")

    def last_events(self) -> list[Any]:
        """What is sent after the last piece."""
        return []


def plain_error(error: PredictorError) -> Any:
    """TensorFlow's and KServe's error body."""
    return {"error": str(error)}


def json_body(body: bytes, headers: Mapping[str, str]) -> Any:
    """A body of strict JSON; `InvalidRequest` for any other."""
    return strict_json.loads(body)


def names_no_model(body: Any) -> str | None:
    """For formats whose path names the model, or whose bodies never do."""
    return None


@dataclass(frozen=True, slots=True)
class WireFormat:
    """A wire format as the server sees it."""

    name: str
    parse: Callable[[Any, Limits], Exchange]  # raises `InvalidRequest` naming the field and the limit
    error: Callable[[PredictorError], Any] = plain_error  # the body of an error, and the event of one
    model: Callable[[Any], str | None] = names_no_model  # the model that a body asks for; None: the first
    decode: Callable[[bytes, Mapping[str, str]], Any] = json_body  # lower-case header names
    media_types: tuple[str, ...] = ()  # read besides JSON's
