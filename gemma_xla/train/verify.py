"""Whether other programs make of an adapter what we do."""

from __future__ import annotations

import contextlib
import warnings
from pathlib import Path
from typing import Any

import torch

from gemma_xla import hf
from gemma_xla.data.loader import EvalLoader
from gemma_xla.storage import fetched
from gemma_xla.train.run import Run
from gemma_xla.weights import Weights

# Nats that float32 on another path through the same model may differ by.
TOLERANCE = 1e-3
_ROWS, _LENGTH = 4, 256


def load_with_peft(base: Path, adapter: Path) -> Any:
    """A model that transformers loads and peft adapts, in float32 on the CPU."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    with fetched(base) as local:
        model = AutoModelForCausalLM.from_pretrained(local, dtype=torch.float32)
    with fetched(adapter) as local, warnings.catch_warnings():
        # peft asks transformers for what it has renamed.
        warnings.simplefilter("ignore", FutureWarning)
        return PeftModel.from_pretrained(model, local).eval()


def verify(run: Run, ours: Weights, base: Path, adapter: Path) -> str:
    """Compare log-probabilities of held-out tokens, ours with those of the exported adapter; say how they compare.

    A difference is told, not raised: the checkpoints hold what was learnt all the same.

    Args:
        ours: the merged model.
        base: the Hugging Face folder that the adapter belongs to.
        adapter: its folder.
    """
    texts = _held_out(run)
    if not texts:
        return "warning: export.verify: there is no held-out text to compare on; set data.eval or data.eval_fraction"
    # One model is in memory at a time.
    expected = _log_probabilities(hf.model_from(ours.reader, ours.config, ours.description), texts)
    found = _log_probabilities(load_with_peft(base, adapter), texts)
    difference = (found - expected).abs().max().item()
    compared = f"log-probabilities of {len(expected):,} held-out tokens, {adapter} with peft and ours: they differ by "
    if difference <= TOLERANCE:
        return f"{compared}at most {difference:.1e}"
    return (
        f"warning: export.verify: {compared}up to {difference:.1e}, more than {TOLERANCE:.0e}; compare the versions of "
        "peft and transformers with those in constraints.txt before using the adapter elsewhere"
    )


def _held_out(run: Run) -> list[torch.Tensor]:
    """The beginnings of a few held-out rows, each of one document: token ids ``[1, T]``."""
    if not run.corpus.has_eval:
        return []
    loader = EvalLoader(run.corpus, run.tokenizer, num_rows=_ROWS, rows=range(_ROWS))
    with contextlib.closing(iter(loader)) as batches:
        batch = next(batches)
    rows = zip(batch["input_ids"].long(), batch["segment_ids"], strict=True)
    firsts = (ids[segments == 1][None, :_LENGTH] for ids, segments in rows)
    return [ids for ids in firsts if ids.shape[1] > 1]


@torch.no_grad()
def _log_probabilities(model: torch.nn.Module, texts: list[torch.Tensor]) -> torch.Tensor:
    """Those of each token after the first of its text, one after the other."""
    found = []
    for ids in texts:
        logits = model(input_ids=ids)
        logits = getattr(logits, "logits", logits)[0, :-1].float()
        found.append(logits.log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0])
    return torch.cat(found)
