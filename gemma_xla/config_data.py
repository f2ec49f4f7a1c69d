"""The part of the config that says what to train and evaluate on."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from gemma_xla.config_base import Positive, PositiveFloat, Section, Text


class SourceSection(Section):
    """Where text, or examples to fine-tune on, come from."""

    # A data set name on the Hugging Face hub, or a file, folder or glob, local or a URL that fsspec knows, such as
    # gs://bucket/folder/*.jsonl. "{stdlib}" stands for the folder of Python's standard library, "~" for the home
    # folder.
    path: Text
    weight: PositiveFloat = 1.0
    # What a record of a .jsonl or .parquet file or of a hub data set is: plain text, a prompt and its completion, or a
    # chat. "auto": what the columns of the first record say.
    format: Literal["auto", "text", "prompt_completion", "messages"] = "auto"
    # The columns that hold these. A chat is a list of {"role": ..., "content": ...}.
    column: str = "text"
    prompt: str = "prompt"
    completion: str = "completion"
    messages: str = "messages"
    # What of a text file is a document: all of it, what stands between blank lines, or a line.
    sample_by: Literal["document", "paragraph", "line"] = "document"
    # For hub data sets: the split, the subset, and whether to read it without downloading it first.
    split: str = "train"
    subset: str | None = None
    streaming: bool = False


def _as_sources(value: Any) -> Any:
    """Accept a path, a source, or a list of either."""
    if isinstance(value, (str, dict)):
        value = [value]
    if isinstance(value, list):
        value = [{"path": item} if isinstance(item, str) else item for item in value]
    return value


Sources = Annotated[list[SourceSection], BeforeValidator(_as_sources), Field(min_length=1)]


class DataSection(Section):
    """What to train and evaluate on."""

    train: Sources
    # Held-out text; when absent, `eval_fraction` of the training documents is held out instead.
    eval: Sources | None = None
    eval_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.01
    # A folder or hub name with a tokenizer; when absent, one is trained on the training text with `vocab_size` tokens.
    tokenizer: Text | None = None
    vocab_size: Positive | None = None
    seq_len: Annotated[int, Field(ge=2, lt=2**31)] = 8192
    shuffle: bool = True
    # Examples (prompt and completion, chats) are never cut in two. Whether several may share a row:
    packing: bool = True
    # What becomes of an example that is longer than a row.
    too_long: Literal["truncate", "drop"] = "truncate"
    # A Jinja file to use instead of the tokenizer's chat template, or "gemma" for Gemma's own turns.
    chat_template: Text | None = None
    # Batches made ready ahead of the step that needs them.
    prefetch: Positive = 2
