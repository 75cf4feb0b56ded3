"""Starting runs on a cluster. The command `megatrain-launch` will live here; so far it does not exist.

Until then a run is started by `megatrain train` on one machine, and by any of the ecosystem's launchers on several: see
"On a cluster" in README.md.
"""
