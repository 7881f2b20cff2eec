"""Messages into one text, by the template that a chat model was trained with."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2

from predictor.errors import ConfigurationError, InvalidRequest
from predictor.text.request import ChatMessage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# What a template is tried with as it is loaded.
_TRIAL = ChatMessage("user", "hello")


def read_template(path: str) -> str:
    """The text of `--chat-template`'s file; raises `ConfigurationError`."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigurationError(f"--chat-template {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"--chat-template {path} is no UTF-8: {error}") from error
    if not text.strip():
        raise ConfigurationError(f"--chat-template {path} is empty")
    return text


class ChatTemplate:
    """A Jinja template, run by transformers in its sandbox; a model may have none."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, given: str | None = None) -> None:
        """`given` stands in for the tokenizer's own, and raises `ConfigurationError` if it is broken.

        Without a template of its own that works, a tokenizer is still good for completions.
        """
        own = tokenizer.chat_template
        if isinstance(own, dict):  # several, by name
            own = own.get("default")
        self._tokenizer = tokenizer
        self._source: str | None = own if given is None else given
        if self._source is None:
            return
        fault = self._fault(self._source)
        if fault is not None and given is not None:
            raise ConfigurationError(f"--chat-template is broken: {fault}")
        if fault is not None:
            logger.warning("chats are refused: the tokenizer's chat template is broken: %s", fault)
            self._source = None

    def render(self, messages: Sequence[ChatMessage]) -> str:
        """The prompt, up to where the assistant's answer begins; raises `InvalidRequest`."""
        if self._source is None:
            raise InvalidRequest(
                "this model completes text and has no chat template; send the text as prompt to /v1/completions",
                param="messages",
            )
        try:
            return self._render(self._source, messages)
        except Exception as error:  # a template is a program, and may fail in any way
            raise InvalidRequest(f"messages: the chat template refuses them: {error}", "messages") from error

    def _fault(self, source: str) -> str | None:
        try:
            self._render(source, [_TRIAL])
        except jinja2.TemplateSyntaxError as error:
            return f"line {error.lineno}: {error.message}"
        except jinja2.TemplateError:  # it may want another first message; a request is told so
            return None
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return None

    def _render(self, source: str, messages: Sequence[ChatMessage]) -> str:
        told = [
            {"role": each.role, "content": each.content} | ({} if each.name is None else {"name": each.name})
            for each in messages
        ]
        rendered = self._tokenizer.apply_chat_template(
            told, chat_template=source, tokenize=False, add_generation_prompt=True
        )
        return str(rendered)
