"""Hugging Face model folders and peft adapter folders, in and out."""

from gemma_xla.hf.adapter import AdapterReader, export_adapter, is_adapter_folder
from gemma_xla.hf.card import model_card
from gemma_xla.hf.config import read_config, read_end_tokens
from gemma_xla.hf.folder import ADAPTER, MODEL, TOKENIZER_FILES
from gemma_xla.hf.hub import check_push, push
from gemma_xla.hf.load import copy_tokenizer, load_model, model_from, resolve
from gemma_xla.hf.merge import MergedReader
from gemma_xla.hf.reader import HfReader, TensorReader, check_tensors
from gemma_xla.hf.writer import export

__all__ = [
    "ADAPTER",
    "MODEL",
    "TOKENIZER_FILES",
    "AdapterReader",
    "HfReader",
    "MergedReader",
    "TensorReader",
    "check_push",
    "check_tensors",
    "copy_tokenizer",
    "export",
    "export_adapter",
    "is_adapter_folder",
    "load_model",
    "model_card",
    "model_from",
    "push",
    "read_config",
    "read_end_tokens",
    "resolve",
]
