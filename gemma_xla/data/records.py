"""What a record of a file or data set holds: text, a prompt with its completion, or a chat.

Whatever it is, it travels on as one text; that of an example to fine-tune on is compact JSON.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from gemma_xla.config_data import SourceSection
from gemma_xla.data.sources import has_text
from gemma_xla.errors import UserError, nearest

# Says where a record is; only asked when something is wrong with it.
Where = Callable[[], str]

# The keys of the config that name a format's columns; "auto" takes the first format whose columns are there.
_KEYS = {"text": ("column",), "messages": ("messages",), "prompt_completion": ("prompt", "completion")}
_SHAPES = {
    "text": '{{"{0}": "..."}}',
    "messages": '{{"{0}": [{{"role": "user", "content": "..."}}, {{"role": "assistant", "content": "..."}}]}}',
    "prompt_completion": '{{"{0}": "...", "{1}": "..."}}',
}
# Characters of a bad record that a message shows.
_SHOWN = 60


@dataclass(frozen=True)
class RecordFormat:
    """What the records of a source are, and the columns that hold it."""

    name: str = "text"
    column: str = "text"
    prompt: str = "prompt"
    completion: str = "completion"
    messages: str = "messages"

    @property
    def columns(self) -> dict[str, str]:
        """The columns that are read, by the keys of the config that name them."""
        return {key: getattr(self, key) for key in _KEYS[self.name]}

    @property
    def shape(self) -> str:
        """A record as it should be, for messages."""
        return _SHAPES[self.name].format(*self.columns.values())

    def take(self, record: Any, field: str, where: Where) -> str | None:
        """Return the text of a record, None for null; of an example, its JSON.

        Raises:
            UserError: it is no record, or not what the config says that it is.
        """
        self.check(record, field, where)
        self.check_columns(record, field, where)
        if self.name == "text":
            return self._text(record, "column", field, where)
        if self.name == "messages":
            found = {"messages": self._turns(record[self.messages], field, where)}
        else:
            found = {key: self._text(record, key, field, where) for key in self.columns}
            if not has_text(found["completion"]):
                raise UserError(
                    f"{field}.completion: column {self.completion!r} of {where()} is empty, so there is nothing to "
                    "learn; complete or remove the record"
                )
        return _encodable(json.dumps(found, ensure_ascii=False, separators=(",", ":")), field, where)

    def check(self, record: Any, field: str, where: Where) -> None:
        """Make sure that what was parsed is a record.

        Raises:
            UserError: it is not.
        """
        if not isinstance(record, Mapping):
            raise UserError(
                f"{field}.path: {where()} holds no record but {shown(json.dumps(record))}; write it as {self.shape} "
                "or remove it"
            )

    def check_columns(self, names: Iterable[str], field: str, where: Where) -> None:
        """Make sure that all columns are there.

        Raises:
            UserError: one is missing.
        """
        for key, column in self.columns.items():
            if column not in names:
                raise UserError(_no_column(f"{field}.{key}", column, names, where()))

    def _text(self, record: Mapping[str, Any], key: str, field: str, where: Where) -> str | None:
        column = self.columns[key]
        value = record[column]
        if not isinstance(value, str) and not (value is None and self.name == "text"):
            raise UserError(
                f"{field}.{key}: column {column!r} of {where()} holds {_kind(value)}, not text: {shown(str(value))}; "
                "name another column or correct the record"
            )
        return _encodable(value, field, where) if value else value

    def _turns(self, messages: Any, field: str, where: Where) -> list[dict[str, str]]:
        if problem := _problem(messages):
            raise UserError(
                f"{field}.messages: column {self.messages!r} of {where()} is not a chat: {problem}; write it as "
                f"{self.shape} or remove the record"
            )
        return [{"role": message["role"], "content": message["content"]} for message in messages]


def record_format(section: SourceSection, field: str, names: Iterable[str], where: str) -> RecordFormat:
    """Return the format of a source whose first record has the columns ``names``.

    Raises:
        UserError: a column is missing.
    """
    names = list(names)
    wanted = [section.format] if section.format != "auto" else list(_KEYS)
    columns = (section.column, section.prompt, section.completion, section.messages)
    formats = [RecordFormat(name, *columns) for name in wanted]
    for found in formats:
        if all(column in names for column in found.columns.values()):
            return found
    # A column that was chosen, or misspelt, leaves no doubt about what is meant.
    if len(formats) > 1 and section.column == "text" and not nearest("text", names):
        raise UserError(
            f"{_no_column(f'{field}.column', 'text', names, where)}; name the one with the text, or for examples have "
            f"{section.messages!r}, or {section.prompt!r} and {section.completion!r}"
        )
    formats[0].check_columns(names, field, lambda: where)
    raise AssertionError("unreachable")


def plain_text(format: str, record: str) -> str:
    """Return what there is to read in what `RecordFormat.take` returned."""
    if format == "text":
        return record
    tree = json.loads(record)
    return "\n".join([m["content"] for m in tree["messages"]] if format == "messages" else tree.values())


def shown(text: str) -> str:
    """Return a text in quotes, shortened for a message."""
    return repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]} ...")


def _no_column(name: str, column: str, names: Iterable[str], where: str) -> str:
    names = list(names)
    return f"{name}: {where} has no column {column!r}{nearest(column, names)}; it has {', '.join(names[:10]) or 'none'}"


def _problem(messages: Any) -> str | None:
    """What is wrong with the messages of a chat."""
    if not isinstance(messages, list):
        return f"it holds {_kind(messages)}"
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict):
            return f"message {number} is {_kind(message)}"
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                return f"the {key} of message {number} is {_kind(message.get(key))}, not text"
        if message["role"] == "assistant" and not has_text(message["content"]):
            return f"message {number}, the assistant's, is empty"
    if not messages:
        return "it is empty"
    if all(message["role"] != "assistant" for message in messages):
        return 'no message has the role "assistant", so there is nothing to learn'
    return None


def _kind(value: Any) -> str:
    return "nothing" if value is None else type(value).__name__


def _encodable(text: str, field: str, where: Where) -> str:
    try:
        # JSON can spell halves of characters, which are no text.
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{field}.path: {where()} holds half a surrogate pair, {text[error.start]!a}, which is no character; "
            "correct or remove the record"
        ) from error
    return text
