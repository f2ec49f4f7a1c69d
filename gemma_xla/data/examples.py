"""From an example's record to tokens, with those marked that are learnt: the completion, or the assistant's turns.

What is learnt and what precedes it are tokenized apart from each other. So the marks are exact, and a model that is
asked later gets the tokens that it has seen in training.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

import numpy as np
from transformers import PreTrainedTokenizerBase

from gemma_xla.config_data import DataSection
from gemma_xla.data.chat import ChatError, Segment, segments
from gemma_xla.data.packing import Encode, Example
from gemma_xla.data.sources import Source
from gemma_xla.data.tokenizer import document_encoder, text_encoder
from gemma_xla.errors import UserError


def source_encoder(tokenizer: PreTrainedTokenizerBase, source: Source, config: DataSection) -> Encode:
    """Return what turns the documents of a source into tokens.

    Raises:
        UserError: they are chats, and the tokenizer has no template for them.
    """
    return document_encoder(tokenizer) if source.format == "text" else ExampleEncoder(tokenizer, source, config)


def end_tokens(tokenizer: PreTrainedTokenizerBase, sources: Iterable[Source], config: DataSection) -> list[int]:
    """The tokens that end what a model generates once it has learnt from these sources.

    The end of a sequence and, of chats, what the template ends an answer with: the last token learnt of an example.
    """
    found = {tokenizer.eos_token_id}
    for source in (source for source in sources if source.format == "messages"):
        example = ExampleEncoder(tokenizer, source, config).whole(next(iter(source.texts())))
        found.add(int(example.tokens[example.trained][-1]))
    return sorted(found)


class ExampleEncoder:
    """Turns the records of a source into examples that fit into a row."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, source: Source, config: DataSection):
        if source.format == "messages" and not tokenizer.chat_template:
            raise UserError(
                f"{source.field}: it holds chats, but the tokenizer has no chat template; set data.chat_template=gemma "
                "or data.chat_template=FILE.jinja"
            )
        self._source, self._seq_len, self._drop = source, config.seq_len, config.too_long == "drop"
        self._encode = text_encoder(tokenizer)
        self._bos, self._eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        self._tokenizer = tokenizer

    def __call__(self, record: str) -> Example:
        """Return the example of a record, made to fit.

        Raises:
            UserError: see `whole` and `fitted`.
        """
        return self.fitted(self.whole(record), record)

    def whole(self, record: str) -> Example:
        """Return the example of a record at its full length.

        Raises:
            UserError: the chat template refuses it.
        """
        tree = json.loads(record)
        if self._source.format == "prompt_completion":
            parts = [Segment(tree["prompt"], False), Segment(tree["completion"], True)]
        else:
            parts = self._chat(tree["messages"], record)
        tokens, trained = [], []
        for ids, part in zip(self._encode([part.text for part in parts]), parts, strict=True):
            tokens += ids
            trained += [part.trained] * len(ids)
        if self._source.format == "prompt_completion":
            tokens, trained = [self._bos, *tokens, self._eos], [False, *trained, True]
        elif tokens[:1] != [self._bos]:
            # Gemma needs it, also where the template does not write it.
            tokens, trained = [self._bos, *tokens], [False, *trained]
        return Example(np.array(tokens, dtype=np.int32), np.array(trained))

    def fitted(self, example: Example, record: str) -> Example:
        """Return what is trained on of an example: all of it, its beginning, or a single token if it is dropped.

        Raises:
            UserError: no token is left to learn.
        """
        pairs, seq_len = len(example.tokens) - 1, self._seq_len
        if pairs > seq_len and self._drop:
            return Example(example.tokens[:1], example.trained[:1])
        if example.trained[1 : seq_len + 1].any():
            return Example(example.tokens[: seq_len + 1], example.trained[: seq_len + 1])
        where = self._source.where(record)
        if not example.trained.any():
            raise UserError(
                f"{self._source.field}: the chat template writes nothing to learn for {where}; correct the record or "
                "data.chat_template"
            )
        raise UserError(
            f"{self._source.field}: of {where} nothing is left to learn: what comes before it takes "
            f"{example.trained.argmax()} tokens, and data.seq_len is {seq_len}; raise data.seq_len, or set "
            "data.too_long=drop"
        )

    def _chat(self, messages: list[dict[str, str]], record: str) -> list[Segment]:
        try:
            return segments(self._tokenizer, messages)
        except ChatError as error:
            raise UserError(
                f"{self._source.field}: the chat template cannot be used for {self._source.where(record)}: {error}; "
                "correct the record, or set data.chat_template to another template"
            ) from error
