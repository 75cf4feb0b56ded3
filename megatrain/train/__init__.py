"""The loop, and the place where all parts meet. `python -m megatrain.train` is a rank of a run."""
