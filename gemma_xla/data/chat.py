"""Chats: the template that turns one into text, and the parts of that text that the model is to learn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import jinja2
from transformers import PreTrainedTokenizerBase

from gemma_xla.config_data import DataSection
from gemma_xla.errors import UserError
from gemma_xla.storage import replace_text

# The turns that the Gemma models know, as their published template writes them.
GEMMA_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
  {%- if message.role == "system" -%}
    {{- raise_exception("Gemma has no system role: put the instructions into the first user message") -}}
  {%- endif -%}
  {%- set role = "model" if message.role == "assistant" else message.role -%}
  {%- if role != ("model" if loop.index0 % 2 else "user") -%}
    {{- raise_exception("messages must alternate: user, assistant, user, assistant, ...") -}}
  {%- endif -%}
  {{- "<start_of_turn>" + role + "\\n" + message.content | trim + "<end_of_turn>\\n" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- "<start_of_turn>model\\n" -}}
{%- endif -%}
"""

Message = dict[str, str]


class ChatError(Exception):
    """A chat that the template refuses, or writes in a way that nothing can be learnt from."""


class Segment(NamedTuple):
    """A part of a chat's text, and whether it is learnt."""

    text: str
    trained: bool


def set_chat_template(tokenizer: PreTrainedTokenizerBase, data: DataSection) -> None:
    """Give the tokenizer the template that ``data.chat_template`` names; without one it keeps its own.

    Raises:
        UserError: it cannot be read, or is no template.
    """
    if data.chat_template is None:
        return
    template = GEMMA_TEMPLATE if data.chat_template == "gemma" else _read(data.chat_template)
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}], chat_template=template, tokenize=False)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(
            f"data.chat_template: {data.chat_template}:{error.lineno} is not a Jinja template: {error.message}; "
            "correct it, or set data.chat_template=gemma"
        ) from error
    except Exception:  # whatever the template has against this chat: those of the data may suit it
        pass
    tokenizer.chat_template = template


def write_chat_template(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the tokenizer's template into a folder of tokenizer files, for what is exported from there."""
    replace_text(folder / "chat_template.jinja", tokenizer.chat_template)
    # Programs that do not know that file look here.
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"chat_template": tokenizer.chat_template}
    replace_text(path, json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def segments(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> list[Segment]:
    """Cut a chat's text into what the model is given and what it is to learn: each answer up to its last token.

    An answer begins where the template, asked for one, stops; so its tokens follow those that a chat program hands to
    the model. White space behind an answer's end is not learnt.

    Raises:
        ChatError: the template refuses the chat, or does not write it answer by answer.
    """
    turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    whole, *earlier = _render(tokenizer, [messages, *(messages[: turn + 1] for turn in turns[:-1])], prompt=False)
    last = whole if turns[-1] + 1 == len(messages) else _render(tokenizer, [messages[: turns[-1] + 1]], prompt=False)[0]
    begins = _render(tokenizer, [messages[:turn] for turn in turns], prompt=True)
    found, place = [], 0
    for begin, end in zip(begins, [*earlier, last], strict=True):
        if not (len(begin) >= place and end.startswith(begin) and whole.startswith(end)):
            raise ChatError("it writes a turn in another way when it is the last, so answers cannot be told apart")
        answer = end[len(begin) :].rstrip()
        found += [Segment(whole[place : len(begin)], False), Segment(answer, True)]
        place = len(begin) + len(answer)
    return [*found, Segment(whole[place:], False)]


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, prompt: str, chat: bool) -> list[int]:
    """The tokens of a prompt, as training has them: the prompt or, of a chat, a user's turn and an answer's beginning.

    Raises:
        UserError: the tokenizer has no chat template, or that refuses the prompt.
    """
    if not chat:
        return tokenizer(prompt)["input_ids"]
    if not tokenizer.chat_template:
        raise UserError("the tokenizer has no chat template; leave --chat out, or use a model trained on chats")
    try:
        (text,) = _render(tokenizer, [[{"role": "user", "content": prompt}]], prompt=True)
    except ChatError as error:
        raise UserError(f"the chat template cannot be used for {prompt!r}: {error}") from error
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    return tokens if tokens[:1] == [tokenizer.bos_token_id] else [tokenizer.bos_token_id, *tokens]


def _render(tokenizer: PreTrainedTokenizerBase, chats: list[list[Message]], *, prompt: bool) -> list[str]:
    """The text of each chat, with or without what asks the model for an answer."""
    try:
        return tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=prompt)
    except Exception as error:  # of the template's own making, or of what it does with the messages
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ChatError(reason) from error


def _read(path: str) -> str:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UserError(
            f"data.chat_template: {path!r} cannot be read ({reason}); name a Jinja file, or 'gemma' for Gemma's turns"
        ) from error
