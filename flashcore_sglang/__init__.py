"""flashcore-sglang: attention over pages of a KV cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flashcore_sglang.paged_attention import PagedAttention

__version__ = "0.1.0"
__all__ = ["PagedAttention", "__version__"]


def __getattr__(name: str) -> object:
    # Importing the package imports neither torch nor the library: the command line has to work where they are broken.
    if name == "PagedAttention":
        from flashcore_sglang.paged_attention import PagedAttention

        return PagedAttention
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
