"""The body of `POST /v1/jobs`: that of a synchronous request, with `model` and `webhook` beside its fields."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from predictor.errors import InvalidRequest
from predictor.jobs.job import Job, new_id
from predictor.jobs.webhook import check_webhook
from predictor.protocols import v1
from predictor.protocols.openai import CHAT, COMPLETIONS
from predictor.protocols.strict_json import object_of, printable
from predictor.protocols.wire import Exchange, Limits, WireFormat

FORMATS: dict[str, WireFormat] = {form.name: form for form in (v1.FORMAT, COMPLETIONS, CHAT)}

# A key's length in the field: a UUID has 36 characters.
_LONGEST_KEY = 255


@dataclass(frozen=True, slots=True)
class Submission:
    """A job that was asked for, and what it asks of the model."""

    job: Job
    exchange: Exchange


def form_of(body: Any) -> WireFormat:
    """The wire format that a body is in; V1 for all that cannot be told."""
    if not isinstance(body, dict):
        return v1.FORMAT
    return COMPLETIONS if "prompt" in body else CHAT if "messages" in body else v1.FORMAT


def submit(body: Any, default_model: str, limits: Limits, webhook_hosts: Collection[str]) -> Submission:
    """Check a parsed body as far as it can be without the model; raises `InvalidRequest` or `Forbidden`."""
    form = form_of(body)
    own = {key: value for key, value in object_of(body).items() if key not in ("model", "webhook")}
    model = body.get("model", default_model)
    if not isinstance(model, str):
        raise InvalidRequest(f"model must be a string, got {printable(model)}", param="model")
    if form is not v1.FORMAT:
        own["model"] = model
    webhook = check_webhook(body["webhook"], webhook_hosts) if "webhook" in body else None
    exchange = form.parse(own, limits)
    if exchange.stream:
        raise InvalidRequest("stream: a job does not stream; leave it out, and ask for the job's url", param="stream")
    digest = hashlib.sha256(json.dumps([model, webhook, own], sort_keys=True).encode()).hexdigest()
    return Submission(Job(new_id(), model, form.name, json.dumps(own), digest, webhook), exchange)


def key_of(header: str | None, caller: str) -> str | None:
    """What a store keeps of the header `Idempotency-Key`: a hash, since each caller has keys of their own."""
    if header is None:
        return None
    if not 0 < len(header) <= _LONGEST_KEY:
        raise InvalidRequest(
            f"Idempotency-Key must have 1 to {_LONGEST_KEY} characters, got {len(header)}", param="Idempotency-Key"
        )
    return hashlib.sha256(json.dumps([caller, header]).encode()).hexdigest()
