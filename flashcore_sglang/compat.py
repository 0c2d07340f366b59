"""What differs between the supported releases of SGLang, and nothing else.

SGLang is imported inside the functions: the module itself loads where SGLang is missing.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import metadata
from typing import Any

OLDEST = "0.5.17"
NEWEST = "0.5.23"
INSTALL = f"pip install 'sglang>={OLDEST},<={NEWEST}'"


class UnsupportedSGLangError(RuntimeError):
    """SGLang is missing, or outside the range that the backend was built and tested for."""


def installed_version() -> str:
    """The version of the installed SGLang.

    Raises:
        UnsupportedSGLangError: SGLang is not installed.
    """
    try:
        return metadata.version("sglang")
    except metadata.PackageNotFoundError:
        raise UnsupportedSGLangError(
            f"flashcore_sglang needs SGLang {OLDEST} to {NEWEST}, and none is installed: {INSTALL}"
        ) from None


def is_supported(version: str) -> bool:
    """Whether ``version`` (its first three numbers) lies in the supported range."""
    return _release(OLDEST) <= _release(version) <= _release(NEWEST)


def check_version() -> None:
    """Stops an unsupported SGLang.

    Raises:
        UnsupportedSGLangError: SGLang is missing or outside the range.
    """
    version = installed_version()
    if not is_supported(version):
        raise unsupported(version)


def unsupported(version: str) -> UnsupportedSGLangError:
    """The error for an SGLang outside the range."""
    return UnsupportedSGLangError(
        f"flashcore_sglang supports SGLang {OLDEST} to {NEWEST}, found {version}: "
        f"{INSTALL}, or serve without --attention-backend flashcore_sparse"
    )


def add_backend_choices(name: str) -> None:
    """Makes ``name`` a legal attention backend: in general, in deterministic mode, and there with the radix cache on.

    The drafts of speculative decoding are left out: the backend does not run them.
    """
    from sglang.srt import server_args

    for add in (
        server_args.add_attention_backend_choices,
        server_args.add_deterministic_attention_backend_choices,
        server_args.add_radix_supported_deterministic_attention_backend_choices,
    ):
        add([name])


def hook_default_page_size(hook: Callable[[Callable[[Any], dict], Any], dict]) -> None:
    """Wraps the step that decides the page size when the user gave none: ``hook(original, view) -> {field: value}``."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register("sglang.srt.arg_groups.overrides._page_size_default", hook, HookType.AROUND)


def attention_backends(view: Any) -> tuple[str | None, str | None]:
    """``(prefill, decode)`` attention backends of a view of the server's arguments."""
    from sglang.srt.arg_groups.overrides import attention_backends_of

    return attention_backends_of(view)


def resolved_args(server_args: Any) -> Any:
    """The server's arguments after all defaults; 0.5.23 keeps what the user typed in the object itself."""
    from sglang.srt.arg_groups.overrides import resolved_view

    return resolved_view(server_args)


def reads_end_before_replay() -> Any:
    """The value of ``shared_read_ends`` for a backend that reads nothing of the scheduler's during a graph's replay.

    0.5.17 has no such question: there every decode graph is taken to have read all before its replay.
    """
    from sglang.srt.layers.attention import base_attn_backend

    return base_attn_backend.SharedReadEnds.PRE_REPLAY


def attention_tp_size() -> int:
    """Ranks that share the heads of an attention layer."""
    from sglang.srt.runtime_context import get_parallel

    return int(get_parallel().attn_tp_size)


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])
