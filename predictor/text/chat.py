"""Messages into one text, by the template that a chat model was trained with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2

from predictor.errors import CheckpointError, ConfigurationError, InvalidRequest
from predictor.text.request import ChatMessage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What a template is tried with as it is loaded.
_TRIAL = ChatMessage("user", "hello")


def read_template(path: str) -> str:
    """The text of `--chat-template`'s file; raises `ConfigurationError`."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"--chat-template {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"--chat-template {path} is no UTF-8: {error}") from error


class ChatTemplate:
    """A Jinja template, run by transformers in its sandbox; a model may have none."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, given: str | None = None) -> None:
        """`given` stands in for the tokenizer's own. Raises `PredictorError` for one that is broken."""
        own = tokenizer.chat_template
        self._tokenizer = tokenizer
        # A tokenizer may bring several, by name.
        self._source: str | None = given or (own.get("default") if isinstance(own, dict) else own)
        if self._source is None:
            return
        try:
            self._render(self._source, [_TRIAL])
        except jinja2.TemplateSyntaxError as error:
            fault = f"is no Jinja template: line {error.lineno}: {error.message}"
            if given is not None:
                raise ConfigurationError(f"--chat-template {fault}") from error
            raise CheckpointError(
                f"the tokenizer's chat template {fault}; give another with --chat-template"
            ) from error
        except jinja2.TemplateError:
            pass  # it may want another first message; a request is told so

    def render(self, messages: Sequence[ChatMessage]) -> str:
        """The prompt, up to where the assistant's answer begins; raises `InvalidRequest`."""
        if self._source is None:
            raise InvalidRequest(
                "this model completes text and has no chat template; send the text as prompt to /v1/completions",
                param="messages",
            )
        try:
            return self._render(self._source, messages)
        except jinja2.TemplateError as error:
            raise InvalidRequest(f"messages: the chat template refuses them: {error}", "messages") from error

    def _render(self, source: str, messages: Sequence[ChatMessage]) -> str:
        told = [
            {"role": each.role, "content": each.content} | ({} if each.name is None else {"name": each.name})
            for each in messages
        ]
        rendered = self._tokenizer.apply_chat_template(
            told, chat_template=source, tokenize=False, add_generation_prompt=True
        )
        return str(rendered)
