"""Text in, packed batches out.

`opening` opens text (`files`, `readers`, `hub`) as `sources`; `documents` and `streams` decide which document comes
when, `packing` cuts documents into rows, `loader` makes batches ahead of time (`prefetch`) and keeps their position,
`tokenizer` trains and loads tokenizers.
"""
