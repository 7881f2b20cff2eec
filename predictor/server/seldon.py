"""Seldon's routes: predictions, and rewards that users send back."""

from __future__ import annotations

import re

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from predictor.errors import InvalidRequest
from predictor.observability import FEEDBACK_REWARD
from predictor.protocols import seldon
from predictor.protocols.strict_json import printable
from predictor.server.ask import Asker
from predictor.server.body import aside
from predictor.server.errors import answer
from predictor.server.openapi import documented
from predictor.settings import knative_revision

# A label's values that callers may choose, of which each is a series for as long as the process lives.
_MAX_REVISIONS = 32


def mount_seldon(router: APIRouter, ask: Asker) -> None:
    """Add the routes of Seldon's wrapper, and of its gateway."""
    tag = "Seldon"
    form = seldon.wire_format(ask.default_model, knative_revision())
    revisions: set[str] = set()  # other than ours for which rewards have come
    FEEDBACK_REWARD.labels(ask.default_model, knative_revision())  # there before the first, so that a rate sees it
    predictions = documented(
        "Continue every text of a message",
        tag=tag,
        examples={
            "texts": {"data": {"ndarray": ["To be, or not to be"]}},
            "rows": {
                "data": {"names": ["text"], "ndarray": [["To be"], ["or not"]]},
                "meta": {"puid": "1", "tags": {"max_new_tokens": 16, "seed": 7}},
            },
            "string": {"strData": "To be", "meta": {"tags": {"max_new_tokens": 16}}},
        },
    )
    feedbacks = documented(
        "Send a reward back",
        tag=tag,
        examples={
            "reward": {
                "request": {"data": {"ndarray": ["To be"]}},
                "response": {"data": {"ndarray": [", or not to be"]}},
                "reward": 1.0,
            }
        },
    )

    @router.post("/predict", **predictions)
    @router.post("/api/v1.0/predictions", **predictions)
    async def predict(request: Request) -> Response:
        """Our parameters stand in `meta.tags`; `max_new_tokens` is 100."""
        return await ask(request, form)

    @router.post("/send-feedback", **feedbacks)
    @router.post("/api/v1.0/feedback", **feedbacks)
    async def feedback(request: Request) -> Response:
        """A `reward` from 0 to 1 goes into the metric `predictor_feedback_reward`; the messages are not kept."""
        try:
            predictor = ask.find(ask.default_model)
            body, size_bytes = await ask.read(request, form, predictor)
            told = await aside(size_bytes, seldon.parse_feedback, body, predictor.name)
            await ask.admit(request, told, predictor)
            revision = _rewarded(told.revision, knative_revision(), revisions)
        except Exception as error:  # as `ask` answers it
            return answer(error, form.error)
        FEEDBACK_REWARD.labels(predictor.name, revision).observe(told.reward)
        return JSONResponse(told.render())


def _rewarded(told: str | None, ours: str, others: set[str]) -> str:
    """The revision that a reward counts for; raises `InvalidRequest` for one that is none of this service's."""
    if told is None or told == ours:
        return ours
    # Knative's names: the service's and the generation. Without it no answer of ours tells a revision.
    service = re.escape(ours.rpartition("-")[0])
    if not ours or not re.fullmatch(rf"{service}-\d{{5,9}}", told, re.ASCII):
        raise InvalidRequest(
            f"response.meta.requestPath: {printable(told)} is no revision of this service", param="requestPath"
        )
    if told not in others and len(others) >= _MAX_REVISIONS:
        raise InvalidRequest(
            f"response.meta.requestPath: this replica counts rewards for {_MAX_REVISIONS} other revisions, and no more",
            param="requestPath",
        )
    others.add(told)
    return told
