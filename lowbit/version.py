"""The version, for the package, for pyproject.toml and for torch's caches of compiled code."""

__version__ = "0.1.0"
