"""Chat templates: Jinja in the sandbox that transformers uses, with its filters and globals, without transformers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError, TemplateSyntaxError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from appliance.errors import InvalidRequest, ModelError

Message = dict[str, Any]


class ChatTemplate:
    """A compiled template. Immutable and thread-safe."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], *, origin: str = "the model") -> None:
        """Compile `source`. Raises ModelError where it is no Jinja; `origin` says in the message where it came from."""
        try:
            self._template = _environment().from_string(source)
        except TemplateSyntaxError as error:
            raise ModelError(f"the chat template of {origin} does not compile: line {error.lineno}: {error.message}") from error
        self.source = source
        self._special_tokens = dict(special_tokens)
        self._knows_developer = "developer" in source

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        extra: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt of a conversation. Raises InvalidRequest with the template's own words where it refuses the messages.

        `extra` are further variables (chat_template_kwargs); they cannot replace the messages or special tokens.
        """
        conversation = [self._prepare(message) for message in messages]
        variables = {
            **(extra or {}),
            **self._special_tokens,
            "messages": conversation,
            "add_generation_prompt": add_generation_prompt and not continue_final_message,
        }
        variables.setdefault("tools", None)
        variables.setdefault("documents", None)
        try:
            prompt = self._template.render(variables)
        except SecurityError as error:
            raise InvalidRequest(f"the chat template did something unsafe: {error}", param="messages") from error
        except (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
            raise InvalidRequest(f"the model's chat template refuses these messages: {error}", param="messages") from error
        return _cut_after_final_message(prompt, conversation) if continue_final_message else prompt

    def _prepare(self, message: Message) -> Message:
        """Templates know `system` but rarely `developer`, and concatenate content: None would not do."""
        prepared = dict(message)
        if prepared.get("role") == "developer" and not self._knows_developer:
            prepared["role"] = "system"
        if prepared.get("content") is None:
            prepared["content"] = ""
        return prepared


def _cut_after_final_message(prompt: str, conversation: Sequence[Message]) -> str:
    """`prompt` up to the end of the last message's content, so that the model goes on with it."""
    final = str(conversation[-1]["content"]).strip()
    at = prompt.rfind(final) if final else -1
    if at < 0:
        raise InvalidRequest("continue_final_message: the chat template does not keep the final message as it is", param="continue_final_message")
    return prompt[: at + len(final)]


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    """Local time, as transformers has it: templates print today's date."""
    return datetime.now().astimezone().strftime(pattern)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON; Jinja's own filter escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _GenerationBlock(Extension):
    """`{% generation %}...{% endgeneration %}` marks the assistant's tokens for training; here it is its content."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own interface

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_render"), [], [], body).set_lineno(lineno)

    def _render(self, caller: Callable[[], str]) -> str:
        return caller()


def _environment() -> ImmutableSandboxedEnvironment:
    # Autoescape is off because the output is a prompt, not HTML.
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationBlock])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment
