"""SGLang on a machine without a GPU: the whole server, with attention in this project's C++ kernels.

SGLang's own CPU engine needs a build of sgl-kernel for the CPU. An out-of-tree platform does not: for it, SGLang takes
the plain PyTorch form of every layer, and Triton's interpreter runs the few kernels of its book-keeping.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.platforms.cpu import CpuSRTPlatform
from sglang.srt.platforms.device_mixin import PlatformEnum

from flashcore_sglang.plugin import BACKEND


class CpuPlatform(CpuSRTPlatform):
    """The CPU, as a platform that SGLang does not build in."""

    _enum = PlatformEnum.OOT
    device_name = "cpu"
    device_type = "cpu"

    def get_default_attention_backend(self) -> str:
        return BACKEND

    def get_dispatch_key_name(self) -> str:
        return "native"

    def get_kv_pool_cls(self, *, kind: str) -> type | None:
        """None: SGLang's own pool, which is correct on any device (0.5.23)."""
        return None

    def get_mha_kv_pool_cls(self) -> type:
        """The same for 0.5.17, which wants the class itself."""
        from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

        return MHATokenToKVPool

    def get_paged_allocator_cls(self) -> Any:
        from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator

        return PagedTokenToKVPoolAllocator
