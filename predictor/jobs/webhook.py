"""The call to a job's webhook once it has ended."""

from __future__ import annotations

import asyncio
from collections.abc import Collection

import httpx

from predictor.errors import Forbidden, InvalidRequest
from predictor.jobs.job import Job, shown
from predictor.protocols.strict_json import printable

DELIVERED = "delivered"

_LONGEST_URL = 2_048

# Seconds before each further attempt: a receiver that restarts is back by the last.
_PAUSES_S = (1.0, 5.0, 25.0)

# From the connection to the answer's status. A receiver has to take the job and answer; what it does then, or what else
# it answers, is not waited for.
_TIMEOUT_S = 5.0


def check_webhook(url: object, hosts: Collection[str]) -> str:
    """A webhook that may be called; raises `InvalidRequest`, or `Forbidden` with the setting that would allow it."""
    wanted = f"webhook must be an http or https URL of at most {_LONGEST_URL} characters, got {printable(url)}"
    if not isinstance(url, str) or len(url) > _LONGEST_URL:
        raise InvalidRequest(wanted, param="webhook")
    try:
        # Checked by the library that will call it: two might not see the same host in a URL.
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, ValueError) as error:
        raise InvalidRequest(wanted, param="webhook") from error
    if parsed.scheme not in ("http", "https") or not parsed.host or not 0 < (parsed.port or 80) < 65_536:
        raise InvalidRequest(wanted, param="webhook")
    if parsed.userinfo:
        raise InvalidRequest("webhook must hold no user and password: jobs are kept as they are", param="webhook")
    if "*" not in hosts and parsed.host.lower() not in {host.lower() for host in hosts}:
        raise Forbidden(f"webhook: this server calls no webhook of {printable(parsed.host)}; --webhook-host allows it")
    return url


async def deliver(client: httpx.AsyncClient, job: Job) -> str:
    """Send the job to its webhook, again where that may help; what came of it, for the job's `delivery`."""
    assert job.webhook is not None
    body = shown(job)
    for pause_s in (0.0, *_PAUSES_S):
        await asyncio.sleep(pause_s)
        try:
            status = await asyncio.wait_for(_call(client, job.webhook, body), _TIMEOUT_S)
        except asyncio.TimeoutError:
            outcome = f"failed: no answer within {_TIMEOUT_S:g} s"
            continue
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            outcome = f"failed: {type(error).__name__}"
            continue
        if 200 <= status < 300:
            return DELIVERED
        outcome = f"failed: HTTP {status}"
        if status < 500 and status != 429:
            break  # it has understood, and will say the same again; redirects are not followed
    return outcome


async def _call(client: httpx.AsyncClient, url: str, body: bytes) -> int:
    """The answer's status; the rest of it is not read."""
    async with client.stream("POST", url, content=body, headers={"content-type": "application/json"}) as answer:
        return answer.status_code


def new_client() -> httpx.AsyncClient:
    """Follows no redirect and asks no proxy of the environment: the host that was allowed is the one that is called."""
    # Its own timeouts are per read: a receiver that sends a byte now and then would never meet them.
    return httpx.AsyncClient(timeout=None, follow_redirects=False, trust_env=False)
