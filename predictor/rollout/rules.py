"""What a rollout is judged by: a YAML file whose every field has a default."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from predictor.errors import ConfigurationError

Percent = Annotated[int, Field(strict=True, ge=1, le=100)]
Share = Annotated[float, Field(gt=0, lt=1)]


class _Rule(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class RewardRule(_Rule):
    """Compare the rewards that users sent back, each between 0 and 1."""

    metric: str = Field(
        "predictor_feedback_reward",
        pattern=r"^[a-zA-Z_:][a-zA-Z0-9_:]*$",
        description="a histogram or summary, without its _sum and _count",
    )
    max_drop: Share = Field(0.1, description="how much lower the mean reward may be")


class ShadowRule(_Rule):
    """Send both versions the same prompts with the same seed; their answers must be the same.

    For a new image of the same model. A new model answers differently: leave it out there.
    """

    prompts: list[Annotated[str, Field(min_length=1)]] = Field(
        min_length=1, max_length=64, description="what both versions are asked"
    )
    seed: int = Field(0, ge=0, lt=2**64, description="of every prompt")
    max_new_tokens: int = Field(16, ge=1, le=1024, description="tokens of each answer")
    min_agreement: float = Field(1.0, ge=0, le=1, description="share of equal answers that passes")
    timeout_s: float = Field(30, gt=0, le=600, description="for a version to connect, and again to answer")
    stable_url: str | None = Field(None, description="by default the revision's own, of tag routing")
    canary_url: str | None = Field(None, description="likewise")


class Rules(_Rule):
    """When a canary gets more traffic, all of it, or none."""

    steps: tuple[Percent, ...] = Field((10, 25, 50, 100), description="shares of the traffic; the last is 100")
    min_step_s: float = Field(60, ge=0, description="seconds at a step before the next")
    min_samples: int = Field(100, ge=1, description="answers of each version at a step before the next")
    step_timeout_s: float | None = Field(None, gt=0, description="roll back a step undecided this long; null: hold")
    ready_timeout_s: float = Field(1800, gt=0, description="roll back a revision that is not ready by then")

    tolerated_errors: int = Field(
        0, ge=0, description="errors of a canary at a step that may be chance while the stable version has none"
    )
    max_error_increase: Share = Field(0.02, description="how much higher the share of errors may be")
    error_codes: str = Field("5..", min_length=1, description="HTTP codes that are errors, a regular expression")

    max_ttft_ratio: float = Field(1.5, gt=1, description="time to first token: 'slow' is past this x the stable p95")
    max_itl_ratio: float = Field(1.5, gt=1, description="time between tokens: likewise")
    max_slow_increase: Share = Field(0.1, description="how much higher the share of slow answers may be")

    promote_risk: Share = Field(0.05, description="chance that a canary past a margin gets all the traffic")
    rollback_risk: Share = Field(
        0.05, description="chance, in each comparison at each step, that a canary within its margin is rolled back"
    )
    selector: str = Field("", description='more label matchers for every query, such as cluster="north"')

    reward: RewardRule | None = None
    shadow: ShadowRule | None = None

    @field_validator("steps")
    @classmethod
    def _rising_to_all(cls, steps: tuple[int, ...]) -> tuple[int, ...]:
        if list(steps) != sorted(set(steps)) or len(steps) < 2 or steps[-1] != 100:
            raise ValueError("must be two or more, rise, and end with 100")
        return steps

    @field_validator("error_codes")
    @classmethod
    def _regular_expression(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"is no regular expression: {error}") from error
        return pattern

    def after(self, percent: int) -> int:
        """The step that follows this share of the traffic."""
        return next(step for step in self.steps if step > percent)


def load_rules(path: Path | None) -> Rules:
    """Rules from a YAML file, or the defaults; raises `ConfigurationError` naming the field."""
    try:
        return Rules.model_validate((yaml.safe_load(path.read_text()) or {}) if path else {})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        message = first["msg"].removeprefix("Value error, ")
        raise ConfigurationError(f"--rules {path}: {where}: {message}, got {first['input']!r}") from error
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:  # what YAML's own types raise, too
        raise ConfigurationError(f"--rules {path} cannot be read: {one_line(str(error))}") from error


def one_line(text: str, most: int = 500) -> str:
    """`text` without its line breaks, and no longer than a line should be."""
    text = " ".join(text.split())
    return text if len(text) <= most else text[:most] + "..."
