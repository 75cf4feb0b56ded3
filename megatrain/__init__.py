"""Distributed pretraining of decoder language models that proves itself before you spend the GPU hours."""

__version__ = "0.1.0"
