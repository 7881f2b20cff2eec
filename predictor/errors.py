"""Every error this project raises on purpose.

A class carries the HTTP status and the stable code that a client may rely on; `server` maps them to answers in
one place. Statuses follow TensorFlow Serving's table of gRPC codes to HTTP. Nothing here knows HTTP libraries.
"""

from __future__ import annotations


class PredictorError(Exception):
    """The family. `str(error)` is written for the caller: no class names, no paths of ours, no prompts."""

    status: int = 500
    code: str = "internal"
    retry_after_s: int | None = None


class InvalidRequest(PredictorError):
    """The request breaks the contract. `param` is the field to blame, as the client wrote it."""

    status = 400
    code = "invalid_argument"

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ContextExceeded(InvalidRequest):
    """Prompt and new tokens do not fit the model's context."""

    code = "context_length_exceeded"


class Unprocessable(InvalidRequest):
    """As `InvalidRequest`, for what a wire format answers with 422."""

    status = 422


class Unauthenticated(PredictorError):
    """No key, or none that this server knows."""

    status = 401
    code = "invalid_api_key"


class Forbidden(PredictorError):
    """Exists, but this server does not offer it to callers."""

    status = 403
    code = "permission_denied"


class BannedPrompt(Forbidden):
    """A prompt that matches what the operator has banned."""

    code = "banned_prompt"


class TooManyStrikes(Forbidden):
    """The caller has sent too many banned prompts."""

    code = "too_many_strikes"


class NotFound(PredictorError):
    """No such model or route."""

    status = 404
    code = "not_found"


class TooLarge(PredictorError):
    """The body is over the limit of bytes."""

    status = 413
    code = "too_large"


class UnsupportedMediaType(PredictorError):
    """The body is in a format this server does not read."""

    status = 415
    code = "unsupported_media_type"


class QueueFull(PredictorError):
    """The waiting queue is at its limit; the client should come back."""

    status = 429
    code = "resource_exhausted"
    retry_after_s = 1


class RateLimited(PredictorError):
    """The caller asks more often than it may."""

    status = 429
    code = "rate_limit_exceeded"

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Cancelled(PredictorError):
    """The client went away. Nobody reads this answer; the status keeps the books right."""

    status = 499
    code = "cancelled"


class EngineFailed(PredictorError):
    """A fault of ours while generating. The details are in the log, never in the answer."""

    status = 500
    code = "internal"


class Unimplemented(PredictorError):
    """Part of the protocol that this server does not serve."""

    status = 501
    code = "unimplemented"


class NotReady(PredictorError):
    """Loading, or shutting down."""

    status = 503
    code = "unavailable"
    retry_after_s = 5


class DeadlineExceeded(PredictorError):
    """The request ran out of its own time."""

    status = 504
    code = "deadline_exceeded"


class ConfigurationError(PredictorError):
    """A flag, a variable or a combination of them that cannot work. Raised before anything is served."""

    code = "configuration"


class CheckpointError(PredictorError):
    """A checkpoint that cannot be loaded: missing file, wrong shape, code inside, another architecture."""

    code = "checkpoint"


class NotEnoughMemory(CheckpointError):
    """The model does not fit; the message says how much it needs and how much there is."""

    code = "not_enough_memory"


class LoadCancelled(PredictorError):
    """The server was told to stop while it was loading."""

    code = "load_cancelled"
