"""Checkpoints without a layout: named pieces of tensors in safetensors files, a manifest, one rename."""
