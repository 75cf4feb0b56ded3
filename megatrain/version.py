"""The version of all three packages."""

__version__ = "0.2.0"
