"""Runs exported folders in whichever `transformers` this process finds: `run_transformers.py OUT FOLDER...`.

Token ids (``ids``) and a text (``text``) come as JSON on standard input; what the models and their tokenizers make of
them goes to OUT. It needs nothing but `torch` and `transformers` 4.38, so it imports nothing of this project.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import transformers


def answer(folder: str, ids: list[int], text: str) -> dict[str, Any]:
    """Log-probabilities ``[T, V]`` after each of the ids, and the ids of the text."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, torch_dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        log_probs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return {"log_probs": log_probs, "tokens": tokenizer(text).input_ids}


def main(out: str, *folders: str) -> None:
    asked = json.load(sys.stdin)
    answers = {folder: answer(folder, **asked) for folder in folders}
    torch.save({"version": transformers.__version__, "answers": answers}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
