"""Tensors of the Open Inference protocol: as JSON, and as the bytes of its binary extension.

Little-endian, row-major; an element of BYTES is a length of four bytes and then as many bytes.
Source: Triton's extension_binary_data.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import orjson

from predictor.errors import InvalidRequest
from predictor.protocols import strict_json
from predictor.protocols.strict_json import printable
from predictor.protocols.wire import RawAnswer

Datatype = Literal["BYTES", "INT64", "UINT64"]

BINARY = "application/octet-stream"
JSON_LENGTH = "Inference-Header-Content-Length"  # the header that tells where the JSON ends and raw data begins

_LENGTH = struct.Struct("<I")
_CODES = {"INT64": "q", "UINT64": "Q"}  # of `struct`


@dataclass(frozen=True, slots=True)
class Tensor:
    """An output. `data` is flat: str for BYTES, int for the others."""

    name: str
    datatype: Datatype
    shape: tuple[int, ...]
    data: Sequence[Any]

    def as_json(self) -> dict[str, Any]:
        """With its data."""
        return self._head() | {"data": list(self.data)}

    def as_binary(self) -> tuple[dict[str, Any], bytes]:
        """What stands in the JSON, and the data that follows it."""
        if self.datatype == "BYTES":
            raw = write_strings(self.data)
        else:
            raw = struct.pack(f"<{len(self.data)}{_CODES[self.datatype]}", *self.data)
        return self._head() | {"parameters": {"binary_data_size": len(raw)}}, raw

    def _head(self) -> dict[str, Any]:
        return {"name": self.name, "datatype": self.datatype, "shape": list(self.shape)}


def write_strings(strings: Sequence[str]) -> bytes:
    """BYTES elements, each after its length."""
    encoded = [each.encode() for each in strings]
    return b"".join(_LENGTH.pack(len(each)) + each for each in encoded)


def read_strings(raw: bytes, count: int, name: str) -> list[str]:
    """`count` BYTES elements of UTF-8 text, which take all of `raw`; `InvalidRequest` calls the tensor `name`."""
    strings, start = [], 0
    for place in range(count):
        element, left = f"{name}[{place}]", len(raw) - start
        if left < _LENGTH.size:
            raise InvalidRequest(f"{element}: its length takes {_LENGTH.size} bytes, and {left} are left", param=name)
        (length,) = _LENGTH.unpack_from(raw, start)
        start, left = start + _LENGTH.size, left - _LENGTH.size
        if length > left:
            raise InvalidRequest(f"{element} says that it has {length} bytes, and {left} are left", param=name)
        try:
            strings.append(raw[start : start + length].decode())
        except UnicodeDecodeError as error:
            raise InvalidRequest(f"{element} is not UTF-8: byte {error.start} cannot be decoded", param=name) from error
        start += length
    if start < len(raw):
        raise InvalidRequest(
            f"{name}: {len(raw) - start} bytes are left after the {count} elements of shape", param=name
        )
    return strings


def flatten_strings(data: Any, shape: Sequence[int], name: str) -> list[str]:
    """JSON data of text, flat or nested as `shape` is; `InvalidRequest` calls it `name`."""
    if not isinstance(data, list):
        raise InvalidRequest(f"{name} must be a list of strings, got {printable(data)}", param=name)
    if len(shape) > 1 and any(isinstance(each, list) for each in data):
        if len(data) != shape[0]:
            raise InvalidRequest(f"{name} must hold {shape[0]} lists, as shape says, got {len(data)}", param=name)
        return [
            text
            for place, each in enumerate(data)
            for text in flatten_strings(each, shape[1:], f"{name}[{place}]")
        ]  # fmt: skip
    if len(data) != prod(shape):
        raise InvalidRequest(f"{name} must hold {prod(shape)} strings, as shape says, got {len(data)}", param=name)
    for place, each in enumerate(data):
        if not isinstance(each, str):
            raise InvalidRequest(f"{name}[{place}] must be a string, got {printable(each)}", param=name)
    return data


@dataclass(frozen=True, slots=True)
class Message:
    """A body: its JSON, and the raw data after it."""

    json: Any
    raw: bytes


def decode(body: bytes, headers: Mapping[str, str]) -> Message:
    """Part the JSON from raw data, by the header that tells where; without it the body is all JSON."""
    told = headers.get(JSON_LENGTH.lower())
    if told is None:
        return Message(strict_json.loads(body), b"")
    # Twenty digits are more than any body has bytes, and int() refuses over 4,300.
    if not (told.isascii() and told.isdigit() and len(told) < 20 and int(told) <= len(body)):
        raise InvalidRequest(
            f"the header {JSON_LENGTH} must be the length of the JSON, at most the {len(body)} bytes of the body, "
            f"got {printable(told)}"
        )
    return Message(strict_json.loads(body[: int(told)]), body[int(told) :])


def encode(head: Mapping[str, Any], outputs: Sequence[tuple[Tensor, bool]]) -> dict[str, Any] | RawAnswer:
    """An answer that begins with `head`; those of `outputs` that are marked so go after the JSON as raw data."""
    shown, raw = [], []
    for tensor, binary in outputs:
        if binary:
            told, data = tensor.as_binary()
            shown.append(told)
            raw.append(data)
        else:
            shown.append(tensor.as_json())
    answer = dict(head) | {"outputs": shown}
    if not raw:
        return answer
    encoded = orjson.dumps(answer)
    return RawAnswer(b"".join((encoded, *raw)), BINARY, {JSON_LENGTH: str(len(encoded))})
