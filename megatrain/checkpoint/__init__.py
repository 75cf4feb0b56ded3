"""Checkpoints without a layout: named shards of tensors in safetensors files, a manifest, one rename."""
