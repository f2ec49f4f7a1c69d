"""Hugging Face model folders, in and out."""

from gemma_xla.hf.card import model_card
from gemma_xla.hf.config import read_config
from gemma_xla.hf.load import copy_tokenizer, load_model, resolve
from gemma_xla.hf.reader import HfReader, TensorReader, check_tensors
from gemma_xla.hf.writer import export

__all__ = [
    "HfReader",
    "TensorReader",
    "check_tensors",
    "copy_tokenizer",
    "export",
    "load_model",
    "model_card",
    "read_config",
    "resolve",
]
