"""Text in, packed batches out.

`sources` opens text, `documents` decides which document comes when, `packing` cuts documents into rows, `loader`
makes batches ahead of time and keeps their position, `tokenizer` trains and loads tokenizers.
"""
