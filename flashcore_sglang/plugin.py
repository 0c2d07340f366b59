"""Entry points for SGLang: the attention backend's name, and a platform for machines without a GPU.

SGLang runs ``register`` in every process, before the command line is parsed, and only logs what it raises. So it
stays tiny: it touches neither CUDA nor the compiled library. What can go wrong goes wrong, loudly, in the factory.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from typing import Any

from flashcore_sglang import compat

BACKEND = "flashcore_sparse"
PLATFORM = "flashcore_cpu"


@cache
def register() -> None:
    """Registers the backend's name and its default page size. Later calls do nothing.

    Raises:
        UnsupportedSGLangError: this SGLang has no such extension points.
    """
    try:
        from sglang.srt.layers.attention.attention_registry import register_attention_backend

        compat.add_backend_choices(BACKEND)
        compat.hook_default_page_size(default_page_size)
    except (ImportError, AttributeError) as error:
        raise compat.unsupported(compat.installed_version()) from error
    register_attention_backend(BACKEND)(create_backend)


def create_backend(runner: Any) -> Any:
    """The backend for a model runner whose KV pools exist.

    Raises:
        UnsupportedSGLangError: SGLang is outside the supported range.
        ConfigError: the configuration cannot be used.
        LibraryError: the compiled library is missing or does not load.
        UnsupportedFeatureError: the server or the model asks for what the backend does not do.
    """
    compat.check_version()
    from flashcore_sglang.backend import FlashcoreBackend

    return FlashcoreBackend(runner)


def default_page_size(original: Callable[[Any], dict], view: Any) -> dict:
    """The configured page size where the user gave none and the backend serves; else SGLang's own default."""
    if view.page_size is not None or BACKEND not in compat.attention_backends(view):
        return original(view)
    from flashcore_sglang import config

    return {"page_size": config.load().page_size}


def activate_cpu_platform() -> str | None:
    """The platform class when ``SGLANG_PLATFORM`` names it, else None: installed beside others, it must not take over.

    Raises:
        RuntimeError: the environment would send CPU tensors to GPU kernels.
    """
    if os.environ.get("SGLANG_PLATFORM") != PLATFORM:
        return None
    import torch

    if os.environ.get("TRITON_INTERPRET") != "1" or torch.cuda.is_available():
        raise RuntimeError(
            f"SGLANG_PLATFORM={PLATFORM} expects TRITON_INTERPRET=1 and no visible GPU, got "
            f"TRITON_INTERPRET={os.environ.get('TRITON_INTERPRET')!r} and {torch.cuda.device_count()} GPUs: start the "
            f"server with SGLANG_PLATFORM={PLATFORM} TRITON_INTERPRET=1 CUDA_VISIBLE_DEVICES="
        )
    return "flashcore_sglang.cpu_platform:CpuPlatform"
