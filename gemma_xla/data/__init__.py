"""Text or examples in, packed batches out.

`opening` opens them (`files`, `readers`, `hub`, `records`) as `sources`; `documents` and `streams` decide which
document comes when, `packing` puts documents into rows, `loader` makes batches ahead of time (`prefetch`) and keeps
their position, `tokenizer` trains and loads tokenizers. `examples` turns prompts, completions and chats (`chat`) into
tokens that are learnt and tokens that are not, `survey` looks at all of them before training, `preview` shows some.
"""
