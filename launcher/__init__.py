"""Starting runs on a cluster: the command `megatrain-launch`. Uses no torch."""
