"""Distributed pretraining of decoder language models that proves itself before you spend the GPU hours."""

__version__ = "0.2.0"
