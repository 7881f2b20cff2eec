"""Settings as flags of a command that serves."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import typer

from predictor.errors import ConfigurationError
from predictor.settings import PREFIX, Settings, flag, load_settings


def setting(name: str) -> Any:
    """The typer option of a setting: no default of its own, so that a variable can take effect."""
    field = Settings.model_fields[name]
    several = isinstance(field.default, tuple)
    shown = " ".join(field.default) if several else field.default
    default = "" if shown in (None, "") else f" [default: {shown}]"
    spelled = f"{flag(name)}/--no-{flag(name)[2:]}" if field.annotation is bool else flag(name)
    return typer.Option(
        spelled, help=f"{field.description}. [env: {PREFIX}{name.upper()}]{default}", show_default=False
    )


def settings_of(flags: dict[str, Any]) -> Settings:
    """Settings from flags as typer gives them, a list that nobody began left out; refuses a bundled model that is not
    there."""
    settings = load_settings({name: value for name, value in flags.items() if value not in (None, [])})
    (default,) = Settings.model_fields["model"].default
    source = default.split("=", 1)[1]
    if settings.model == (default,) and not Path(source).is_dir():
        raise ConfigurationError(f"{source}, the bundled model, is not here; give --model NAME=SOURCE")
    return settings


def make_way(settings: Settings) -> None:
    """Set up the logs, and take the flags out of KServe's sight: before anything of `server` is imported."""
    from predictor.observability import configure_logging

    configure_logging(settings.log_level, settings.log_format)
    # KServe parses sys.argv when it is imported, and would take our flags for abbreviations of its own.
    sys.argv = sys.argv[:1]
