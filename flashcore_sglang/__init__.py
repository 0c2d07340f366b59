"""flashcore-sglang: attention over pages of a KV cache."""

__version__ = "0.1.0"
