"""The shadow check: both versions get the same prompts with the same seed, beside their real traffic."""

from __future__ import annotations

from typing import Any

import httpx

from predictor.errors import PredictorError
from predictor.rollout.evidence import Shadow
from predictor.rollout.rules import ShadowRule, one_line

_NO_ANSWER = (httpx.HTTPError, httpx.InvalidURL, LookupError, TypeError, ValueError)
_BUSY = (429, 503)  # come again, it says


class ShadowUnavailable(PredictorError):
    """A version cannot be asked now, so there is nothing to compare."""

    code = "shadow"


def compare(rule: ShadowRule, model: str, stable_url: str | None, canary_url: str | None) -> Shadow:
    """Ask both; a canary that answers with an error differs. Raises `ShadowUnavailable`."""
    stable_url, canary_url = rule.stable_url or stable_url, rule.canary_url or canary_url
    if stable_url is None or canary_url is None:
        raise ShadowUnavailable(
            "shadow: the revisions have no addresses of their own; set serving.kserve.io/enable-tag-routing, or "
            "stable_url and canary_url in the rules"
        )
    try:
        wanted = _ask(rule, model, stable_url)
    except _NO_ANSWER as error:
        raise ShadowUnavailable(
            f"shadow: the stable version at {stable_url} does not answer: {_told(error)}"
        ) from error
    try:
        given = _ask(rule, model, canary_url)
    except _NO_ANSWER as error:
        if isinstance(error, httpx.HTTPStatusError) and error.response.status_code in _BUSY:
            raise ShadowUnavailable(f"shadow: the canary at {canary_url} is busy: {_told(error)}") from error
        return Shadow(0, len(wanted), f"the canary at {canary_url} does not answer ({_told(error)}): all of it")
    different = [index for index, (want, got) in enumerate(zip(wanted, given, strict=True)) if want != got]
    first = f"prompts[{different[0]}]" if different else ""
    return Shadow(len(wanted) - len(different), len(wanted), first)


def _ask(rule: ShadowRule, model: str, url: str) -> list[Any]:
    parameters = {"seed": rule.seed, "max_new_tokens": rule.max_new_tokens}
    response = httpx.post(
        f"{url.rstrip('/')}/v1/models/{model}:predict",
        json={"instances": rule.prompts, "parameters": parameters},
        timeout=rule.timeout_s,
    )
    answers: list[Any] = response.raise_for_status().json()["predictions"]
    if len(answers) != len(rule.prompts):
        raise ValueError(f"{len(answers)} answers to {len(rule.prompts)} prompts")
    return answers


def _told(error: Exception) -> str:
    if isinstance(error, httpx.HTTPStatusError):
        return f"HTTP {error.response.status_code}"
    return one_line(f"{type(error).__name__}: {error}", 200)
