"""What the backend does not do, and what to serve it with instead.

SGLang stops none of this for a plugin's backend, and a feature that is silently ignored is a wrong answer. So the
server is checked when the backend is built, every layer of the model then or when it is first seen. All checks read
plain attributes: nothing of SGLang is imported.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from flashcore_sglang.config import Config

OTHER_BACKEND = "--attention-backend fa3"
MIN_SUMMARY_PAGE = 16  # tokens: there summaries take 6 % of the KV cache, and reading them as much of the time
KV_DTYPES = ("torch.bfloat16", "torch.float16", "torch.float32")


class UnsupportedFeatureError(ValueError):
    """The server, the model or a layer asks for what the backend does not do; the message says what to use instead."""


@dataclass(frozen=True)
class Server:
    """What the checks look at.

    Attributes:
        runner: SGLang's model runner.
        args: the server's arguments after all defaults.
        pool: the KV pool.
        config: this project's configuration.
        backends: the (prefill, decode) attention backends.
        own: the name of this one.
    """

    runner: Any
    args: Any
    pool: Any
    config: Config
    backends: tuple[str | None, str | None]
    own: str

    def arg(self, name: str, default: Any = None) -> Any:
        return getattr(self.args, name, default)


@dataclass(frozen=True)
class Rule:
    """Refuses when ``found`` gives something: what came. ``instead`` is the way out."""

    feature: str
    found: Callable[[Any], object]
    instead: str


def _foreign_backend(server: Server) -> str | None:
    prefill, decode = server.backends
    if prefill == decode == server.own:
        return None
    return f"--prefill-attention-backend {prefill} --decode-attention-backend {decode}"


def _pool_name(server: Server) -> str:
    return type(server.pool).__name__


def _unallocatable_page_size(server: Server) -> str | None:
    """A page size that SGLang fails on at the first request: its Triton kernels index a page by powers of two."""
    page_size, allocator = server.pool.page_size, server.runner.token_to_kv_pool_allocator
    paged = type(allocator).__name__ == "PagedTokenToKVPoolAllocator"
    # 0.5.23 says whether it uses them; 0.5.17 always does, on the CPU too.
    by_triton = paged and getattr(allocator, "use_triton_kernels", True)
    return f"--page-size {page_size}" if by_triton and page_size & (page_size - 1) else None


# Policy topk keeps a summary of each page, written where K is stored. It must see every store.
_EXACT = "FLASHCORE_POLICY=exact (or window)"
SERVER_RULES = (
    Rule("MLA attention", lambda s: s.runner.use_mla_backend, "serve without --attention-backend"),
    Rule("encoder-decoder models", lambda s: s.runner.model_config.is_encoder_decoder, OTHER_BACKEND),
    # Models with that method make a mask for the triton backend. Under any other they attend causally and say nothing.
    Rule(
        "images whose tokens see each other (Gemma 3)",
        lambda s: s.runner.model_config.is_multimodal and hasattr(s.runner.model, "prepare_attn_masks"),
        "no --enable-multimodal, or --attention-backend triton",
    ),
    Rule(
        "speculative decoding",
        lambda s: s.arg("speculative_algorithm"),
        f"no --speculative-algorithm, or {OTHER_BACKEND}",
    ),
    Rule("diffusion language models", lambda s: s.arg("dllm_algorithm"), f"no --dllm-algorithm, or {OTHER_BACKEND}"),
    Rule(
        "dual chunk attention (Qwen-1M)",
        lambda s: getattr(s.runner.model_config.hf_config, "dual_chunk_attention_config", None),
        "SGLang 0.5.17 with --attention-backend dual_chunk_flash_attn",
    ),
    Rule(
        "variant cublaslt with deterministic inference",
        lambda s: s.config.variant == "cublaslt" and s.config.deterministic,
        "FLASHCORE_VARIANT=auto",
    ),
    Rule(
        "mixed chunks with deterministic inference, because on a GPU prefill and decode are other kernels:",
        lambda s: (
            s.config.deterministic
            and s.arg("enable_mixed_chunk")
            and str(s.runner.device).startswith("cuda")
            and "--enable-mixed-chunk"
        ),
        "no --enable-mixed-chunk",
    ),
    Rule("decode context parallelism", lambda s: s.arg("dcp_size", 1) > 1 and s.arg("dcp_size"), "--dcp-size 1"),
    Rule("prefill context parallelism", lambda s: s.arg("enable_prefill_cp"), "no --enable-prefill-cp"),
    Rule("page-major KV pools", lambda s: s.arg("enable_page_major_kv_layout"), "no --enable-page-major-kv-layout"),
    Rule("the unified memory pool", lambda s: s.arg("enable_unified_memory"), "no --enable-unified-memory"),
    Rule(
        "KV pools split for sliding windows",
        lambda s: "SWA" in _pool_name(s) and _pool_name(s),
        "--disable-hybrid-swa-memory",
    ),
    Rule(
        "quantised KV pools",
        lambda s: _pool_name(s) in ("MHATokenToKVPoolFP4", "MHATokenToKVPoolMXFP8") and _pool_name(s),
        "--kv-cache-dtype auto",
    ),
    Rule(
        "hybrid models and other KV pools than MHATokenToKVPool",
        lambda s: _pool_name(s) != "MHATokenToKVPool" and _pool_name(s),
        OTHER_BACKEND,
    ),
    Rule(
        "KV pools in another layout than NHD",
        lambda s: s.pool.kv_cache_layout != "nhd" and s.pool.kv_cache_layout,
        "SGLANG_USE_HND_KVCACHE=0",
    ),
    Rule(
        "a page size that SGLang's allocator does not take (powers of two only):",
        _unallocatable_page_size,
        "--page-size 64",
    ),
    # Not `auto`: that is FP8 where the checkpoint says so.
    Rule(
        "a KV cache of",
        lambda s: str(s.pool.dtype) not in KV_DTYPES and str(s.pool.dtype),
        "--kv-cache-dtype bf16 --dtype bfloat16",
    ),
    Rule(
        "a KV cache of another dtype than the model's:",
        lambda s: s.pool.dtype != s.runner.dtype and f"{s.pool.dtype} for {s.runner.dtype}",
        "--kv-cache-dtype auto",
    ),
    Rule(
        "--enable-torch-compile without a GPU",
        lambda s: s.arg("enable_torch_compile") and not str(s.runner.device).startswith("cuda"),
        "no --enable-torch-compile",
    ),
    Rule(
        "V heads of another size than K heads, in the KV pool:",
        lambda s: s.pool.v_head_dim != s.pool.head_dim and s.pool.v_head_dim,
        OTHER_BACKEND,
    ),
)
TOPK_RULES = (
    Rule(
        f"policy topk with pages of fewer than {MIN_SUMMARY_PAGE} tokens, whose summaries would cost more than they "
        "save:",
        lambda s: s.pool.page_size < MIN_SUMMARY_PAGE and s.pool.page_size,
        f"--page-size 64, or {_EXACT}",
    ),
    Rule("policy topk with HiCache", lambda s: s.arg("enable_hierarchical_cache"), _EXACT),
    Rule("policy topk with LMCache", lambda s: s.arg("enable_lmcache"), _EXACT),
    Rule("policy topk with FlexKV", lambda s: s.arg("enable_flexkv"), _EXACT),
    Rule("policy topk with an external KV store", lambda s: s.arg("enable_unified_cache_external_linker"), _EXACT),
    Rule(
        "policy topk with another radix cache, which may bring pages from elsewhere:",
        lambda s: s.arg("radix_cache_backend"),
        f"no --radix-cache-backend, or {_EXACT}",
    ),
    Rule(
        "policy topk with PD disaggregation",
        lambda s: s.arg("disaggregation_mode", "null") != "null" and s.arg("disaggregation_mode"),
        _EXACT,
    ),
    Rule("policy topk beside another attention backend", _foreign_backend, f"one backend for both phases, or {_EXACT}"),
    Rule("policy topk with two-batch overlap", lambda s: s.arg("enable_two_batch_overlap"), _EXACT),
    Rule("policy topk with PD multiplexing", lambda s: s.arg("enable_pdmux"), _EXACT),
)
# Not among them: the scales of K and V that FP8 checkpoints bring. They are for a quantised pool, which is refused; one
# of the model's own dtype stores K and V as they come, and SGLang's other backends leave the scales aside there, too.
LAYER_RULES = (
    Rule("cross attention", lambda layer: layer.is_cross_attention, OTHER_BACKEND),
    Rule(
        "attention that is not causal",
        lambda layer: layer.attn_type.value != "decoder" and layer.attn_type.value,
        OTHER_BACKEND,
    ),
    Rule("chunked local attention (iRoPE)", lambda layer: layer.use_irope, OTHER_BACKEND),
    Rule(
        "V heads of another size than Q and K heads:",
        lambda layer: layer.v_head_dim != layer.qk_head_dim and f"{layer.v_head_dim} for {layer.qk_head_dim}",
        OTHER_BACKEND,
    ),
    Rule(
        "a logit cap by",
        lambda layer: layer.logit_cap > 0 and _other(layer.logit_capping_method, "tanh"),
        OTHER_BACKEND,
    ),
    Rule(
        "temperature by length (xAI)",
        lambda layer: layer.xai_temperature_len > 0 and layer.xai_temperature_len,
        "--attention-backend triton",
    ),
    Rule("position encoding in attention:", lambda layer: _other(layer.pos_encoding_mode, "NONE"), OTHER_BACKEND),
)


def check_server(server: Server) -> None:
    """Stops a server that asks for what the backend does not do.

    Raises:
        UnsupportedFeatureError: the first such feature.
    """
    for rule in SERVER_RULES + (TOPK_RULES if server.config.policy == "topk" else ()):
        _apply(rule, server, "")


def check_layer(layer: Any, num_qo_heads: int, num_kv_heads: int, head_dim: int) -> None:
    """Stops an attention layer that the backend cannot compute, or that differs in shape from the KV pool.

    Raises:
        UnsupportedFeatureError: the first such feature.
    """
    where = f" in layer {layer.layer_id}"
    for rule in LAYER_RULES:
        _apply(rule, layer, where)
    shape = (layer.tp_q_head_num, layer.tp_k_head_num, layer.qk_head_dim)
    if shape != (num_qo_heads, num_kv_heads, head_dim):
        raise UnsupportedFeatureError(
            f"flashcore_sparse expects (query heads, KV heads, head size) {(num_qo_heads, num_kv_heads, head_dim)} in "
            f"every layer, got {shape}{where}: use {OTHER_BACKEND}"
        )


def check_arguments(layer: Any, arguments: dict[str, Any]) -> None:
    """Stops further inputs of an attention layer (``sinks``, ``q_rope`` ...), all of which would change its output.

    Raises:
        UnsupportedFeatureError: an argument that is not None.
    """
    for name, value in arguments.items():
        if value is not None:
            raise UnsupportedFeatureError(
                f"flashcore_sparse does not support the attention input `{name}` in layer {layer.layer_id}: "
                f"use {OTHER_BACKEND}"
            )


def _apply(rule: Rule, subject: Any, where: str) -> None:
    found = rule.found(subject)
    if found:
        came = "" if found is True else f" {found}" if rule.feature.endswith((":", "of", "by")) else f" ({found})"
        raise UnsupportedFeatureError(
            f"flashcore_sparse does not support {rule.feature}{came}{where}: use {rule.instead}"
        )


def _other(value: str, expected: str) -> str | None:
    return value if value != expected else None
