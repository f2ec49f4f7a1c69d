"""Gemma in plain PyTorch."""
