"""Decoders in plain PyTorch, written as if only one device existed."""
