"""Registration with the installed SGLang, its default page size, and every refusal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flashcore_sglang import compat, config, plugin, refusals

# -- registration -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def registered() -> None:
    pytest.importorskip("sglang")
    from sglang.srt.plugins.hook_registry import HookRegistry

    plugin.register()
    plugin.register()
    HookRegistry.apply_hooks()


@pytest.mark.usefixtures("registered")
def test_backend_is_a_choice_once() -> None:
    from sglang.srt import server_args
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    for choices in (
        server_args.ATTENTION_BACKEND_CHOICES,
        server_args.DETERMINISTIC_ATTENTION_BACKEND_CHOICES,
        server_args.RADIX_SUPPORTED_DETERMINISTIC_ATTENTION_BACKEND,
    ):
        assert choices.count(plugin.BACKEND) == 1
    assert ATTENTION_BACKENDS[plugin.BACKEND] is plugin.create_backend


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(
    "given, expected",
    [
        ({"attention_backend": plugin.BACKEND}, 64),
        ({"decode_attention_backend": plugin.BACKEND, "attention_backend": "fa3"}, 64),
        ({"attention_backend": plugin.BACKEND, "page_size": 16}, None),
        ({"attention_backend": "fa3"}, 1),
    ],
    ids=["own", "own-decode", "user", "other"],
)
def test_default_page_size(given: dict[str, Any], expected: int | None) -> None:
    from sglang.srt.arg_groups import overrides

    names = ("attention_backend", "prefill_attention_backend", "decode_attention_backend", "page_size")
    view = SimpleNamespace(**{name: given.get(name) for name in names})
    assert overrides._page_size_default(view).get("page_size") == expected


@pytest.mark.usefixtures("registered")
def test_page_size_follows_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHCORE_PAGE_SIZE", "32")
    view = SimpleNamespace(
        attention_backend=plugin.BACKEND, prefill_attention_backend=None, decode_attention_backend=None, page_size=None
    )
    assert plugin.default_page_size(lambda view: {"page_size": 1}, view) == {"page_size": 32}


@pytest.mark.parametrize(
    "version, supported",
    [
        ("0.5.16", False),
        ("0.5.17", True),
        ("0.5.17.post1", True),
        ("0.5.20rc1", True),
        ("0.5.23", True),
        ("0.5.24", False),
        ("1.0", False),
    ],
)
def test_supported_range(version: str, supported: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "installed_version", lambda: version)
    if supported:
        compat.check_version()
    else:
        with pytest.raises(compat.UnsupportedSGLangError, match=rf"0\.5\.17 to 0\.5\.23, found {version}"):
            plugin.create_backend(None)


# -- the CPU platform -------------------------------------------------------------------------------------------------


def test_platform_waits_to_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SGLANG_PLATFORM", raising=False)
    assert plugin.activate_cpu_platform() is None


def test_platform_wants_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_PLATFORM", plugin.PLATFORM)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match="expects TRITON_INTERPRET=1 and no visible GPU"):
        plugin.activate_cpu_platform()


def test_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sglang")
    monkeypatch.setenv("SGLANG_PLATFORM", plugin.PLATFORM)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    module, name = str(plugin.activate_cpu_platform()).split(":")
    platform = getattr(__import__(module, fromlist=[name]), name)()
    assert platform.is_out_of_tree()
    assert platform.get_default_attention_backend() == plugin.BACKEND


# -- refusals ---------------------------------------------------------------------------------------------------------


class MHATokenToKVPool(SimpleNamespace):
    """Named as SGLang's, whose class the rules look at by name."""


class PagedTokenToKVPoolAllocator(SimpleNamespace):
    pass


class SWAKVPool(MHATokenToKVPool):
    pass


class MHATokenToKVPoolFP4(MHATokenToKVPool):
    pass


class HybridLinearKVPool(MHATokenToKVPool):
    pass


class MasksImages:
    def prepare_attn_masks(self) -> None:
        """As SGLang's Gemma 3 and 4."""


def make_pool(kind: type = MHATokenToKVPool, **changes: Any) -> Any:
    usual = {"kv_cache_layout": "nhd", "dtype": torch.bfloat16, "head_dim": 128, "v_head_dim": 128, "page_size": 64}
    return kind(**usual | changes)


def make_server(
    *,
    pool: Any = None,
    allocator: Any = None,
    policy: str = "exact",
    variant: str = "auto",
    deterministic: bool = False,
    backends: tuple[str, str] = (plugin.BACKEND, plugin.BACKEND),
    hf_config: Any = None,
    device: str = "cuda",
    dtype: torch.dtype | None = None,
    mla: bool = False,
    encoder_decoder: bool = False,
    model: Any = None,
    multimodal: bool = False,
    **args: Any,
) -> refusals.Server:
    model_config = SimpleNamespace(
        is_encoder_decoder=encoder_decoder, is_multimodal=multimodal, hf_config=hf_config or SimpleNamespace()
    )
    runner = SimpleNamespace(
        model=model,
        device=device,
        dtype=dtype or (pool or make_pool()).dtype,
        use_mla_backend=mla,
        model_config=model_config,
        token_to_kv_pool_allocator=allocator or PagedTokenToKVPoolAllocator(),
    )
    settings = config.Config(policy=policy, variant=variant, deterministic=deterministic)
    return refusals.Server(runner, SimpleNamespace(**args), pool or make_pool(), settings, backends, plugin.BACKEND)


def make_layer(**changes: Any) -> Any:
    layer = {
        "layer_id": 7,
        "tp_q_head_num": 32,
        "tp_k_head_num": 8,
        "qk_head_dim": 128,
        "v_head_dim": 128,
        "is_cross_attention": False,
        "attn_type": SimpleNamespace(value="decoder"),
        "use_irope": False,
        "logit_cap": 0.0,
        "logit_capping_method": "tanh",
        "xai_temperature_len": -1,
        "pos_encoding_mode": "NONE",
    }
    return SimpleNamespace(**layer | changes)


@dataclass(frozen=True)
class Refused:
    name: str
    make: Callable[[], Any]
    feature: str  # what the message names
    instead: str  # the way out that it names


SERVERS = (
    Refused("mla", lambda: make_server(mla=True), "MLA attention", "serve without --attention-backend"),
    Refused("encoder", lambda: make_server(encoder_decoder=True), "encoder-decoder", "--attention-backend fa3"),
    Refused(
        "image-masks",
        lambda: make_server(model=MasksImages(), multimodal=True),
        "images whose tokens see each other",
        "no --enable-multimodal, or --attention-backend triton",
    ),
    Refused("eagle", lambda: make_server(speculative_algorithm="EAGLE"), "(EAGLE)", "no --speculative-algorithm"),
    Refused("dllm", lambda: make_server(dllm_algorithm="LLaDA"), "diffusion", "no --dllm-algorithm"),
    Refused(
        "qwen-1m",
        lambda: make_server(hf_config=SimpleNamespace(dual_chunk_attention_config={"chunk_size": 1})),
        "dual chunk attention",
        "dual_chunk_flash_attn",
    ),
    Refused(
        "cublaslt-deterministic",
        lambda: make_server(variant="cublaslt", deterministic=True),
        "cublaslt with deterministic",
        "FLASHCORE_VARIANT=auto",
    ),
    Refused(
        "mixed-deterministic",
        lambda: make_server(deterministic=True, enable_mixed_chunk=True),
        "mixed chunks with deterministic",
        "no --enable-mixed-chunk",
    ),
    Refused("dcp", lambda: make_server(dcp_size=2), "decode context parallelism (2)", "--dcp-size 1"),
    Refused("prefill-cp", lambda: make_server(enable_prefill_cp=True), "prefill context", "no --enable-prefill-cp"),
    Refused(
        "page-major", lambda: make_server(enable_page_major_kv_layout=True), "page-major", "no --enable-page-major"
    ),
    Refused("unified", lambda: make_server(enable_unified_memory=True), "unified", "no --enable-unified-memory"),
    Refused("swa", lambda: make_server(pool=make_pool(SWAKVPool)), "(SWAKVPool)", "--disable-hybrid-swa-memory"),
    Refused("fp4", lambda: make_server(pool=make_pool(MHATokenToKVPoolFP4)), "quantised", "--kv-cache-dtype auto"),
    Refused("hybrid", lambda: make_server(pool=make_pool(HybridLinearKVPool)), "hybrid models", "fa3"),
    Refused(
        "other-dtype",
        lambda: make_server(dtype=torch.float16),
        "of another dtype than the model's: torch.bfloat16 for torch.float16",
        "--kv-cache-dtype auto",
    ),
    Refused(
        "cpu-compile",
        lambda: make_server(device="cpu", enable_torch_compile=True),
        "--enable-torch-compile without a GPU",
        "no --enable-torch-compile",
    ),
    Refused("hnd", lambda: make_server(pool=make_pool(kv_cache_layout="hnd")), "NHD (hnd)", "SGLANG_USE_HND_KVCACHE=0"),
    Refused(
        "fp8",
        lambda: make_server(pool=make_pool(dtype=torch.float8_e4m3fn)),
        "a KV cache of torch.float8_e4m3fn",
        "--kv-cache-dtype bf16 --dtype bfloat16",
    ),
    Refused(
        "page-5",
        lambda: make_server(pool=make_pool(page_size=5)),
        "powers of two only): --page-size 5",
        "--page-size 64",
    ),
    Refused("v-head", lambda: make_server(pool=make_pool(v_head_dim=64)), "V heads of another size", "fa3"),
    Refused(
        "topk-small-pages",
        lambda: make_server(policy="topk", pool=make_pool(page_size=8)),
        "policy topk with pages of fewer than 16 tokens, whose summaries would cost more than they save: 8",
        "--page-size 64",
    ),
    Refused(
        "topk-hicache",
        lambda: make_server(policy="topk", enable_hierarchical_cache=True),
        "policy topk with HiCache",
        "FLASHCORE_POLICY=exact",
    ),
    Refused(
        "topk-lmcache", lambda: make_server(policy="topk", enable_lmcache=True), "LMCache", "FLASHCORE_POLICY=exact"
    ),
    Refused("topk-flexkv", lambda: make_server(policy="topk", enable_flexkv=True), "FlexKV", "FLASHCORE_POLICY=exact"),
    Refused(
        "topk-linker",
        lambda: make_server(policy="topk", enable_unified_cache_external_linker=True),
        "external KV store",
        "FLASHCORE_POLICY=exact",
    ),
    Refused(
        "topk-radix-backend",
        lambda: make_server(policy="topk", radix_cache_backend="flexkv"),
        "from elsewhere: flexkv",
        "no --radix-cache-backend",
    ),
    Refused(
        "topk-pd",
        lambda: make_server(policy="topk", disaggregation_mode="decode"),
        "PD disaggregation (decode)",
        "FLASHCORE_POLICY=exact",
    ),
    Refused(
        "topk-foreign-prefill",
        lambda: make_server(policy="topk", backends=("fa3", plugin.BACKEND)),
        "--prefill-attention-backend fa3",
        "one backend for both phases",
    ),
    Refused("topk-tbo", lambda: make_server(policy="topk", enable_two_batch_overlap=True), "two-batch", "exact"),
    Refused("topk-pdmux", lambda: make_server(policy="topk", enable_pdmux=True), "PD multiplexing", "exact"),
)
LAYERS = (
    Refused("cross", lambda: make_layer(is_cross_attention=True), "cross attention", "fa3"),
    Refused("encoder-only", lambda: make_layer(attn_type=SimpleNamespace(value="encoder_only")), "encoder_only", "fa3"),
    Refused("irope", lambda: make_layer(use_irope=True), "iRoPE", "fa3"),
    Refused("v-head", lambda: make_layer(v_head_dim=64), "64 for 128", "fa3"),
    Refused("cap", lambda: make_layer(logit_cap=30.0, logit_capping_method="sigmoid"), "cap by sigmoid", "fa3"),
    Refused("xai", lambda: make_layer(xai_temperature_len=1024), "(xAI) (1024)", "--attention-backend triton"),
    Refused("alibi", lambda: make_layer(pos_encoding_mode="ALIBI"), "ALIBI", "fa3"),
    Refused("shape", lambda: make_layer(tp_k_head_num=4), "got (32, 4, 128) in layer 7", "fa3"),
)


@pytest.mark.parametrize("case", SERVERS, ids=lambda case: case.name)
def test_server_is_refused(case: Refused) -> None:
    with pytest.raises(refusals.UnsupportedFeatureError) as refusal:
        refusals.check_server(case.make())
    assert case.feature in str(refusal.value)
    assert case.instead in str(refusal.value)


def test_every_argument_that_a_rule_reads_is_one_of_sglangs() -> None:
    """One that SGLang renames would read as not given, and be ignored from then on."""
    arguments = pytest.importorskip("sglang.srt.server_args").ServerArgs
    asked = set()

    class Recorder:
        def __getattr__(self, name: str) -> Any:
            asked.add(name)
            raise AttributeError(name)

    server = replace(make_server(policy="topk", deterministic=True), args=Recorder())
    for rule in refusals.SERVER_RULES + refusals.TOPK_RULES:
        rule.found(server)
    assert {"speculative_algorithm", "enable_mixed_chunk", "disaggregation_mode"} <= asked
    later = {"enable_unified_cache_external_linker"} if version("sglang").startswith("0.5.17") else set()
    assert asked - set(arguments.__annotations__) == later


def test_the_method_that_tells_models_with_image_masks_is_sglangs() -> None:
    models = pytest.importorskip("sglang.srt.models.gemma3_mm")
    assert hasattr(models.Gemma3ForConditionalGeneration, "prepare_attn_masks")


@pytest.mark.parametrize("case", LAYERS, ids=lambda case: case.name)
def test_layer_is_refused(case: Refused) -> None:
    with pytest.raises(refusals.UnsupportedFeatureError) as refusal:
        refusals.check_layer(case.make(), 32, 8, 128)
    assert case.feature in str(refusal.value)
    assert case.instead in str(refusal.value)


@pytest.mark.parametrize(
    "server",
    [
        make_server(),
        make_server(policy="topk", disaggregation_mode="null", pool=make_pool(page_size=16)),
        make_server(enable_hierarchical_cache=True, disaggregation_mode="prefill", enable_two_batch_overlap=True),
        make_server(model=MasksImages(), multimodal=False),
        make_server(model=SimpleNamespace(), multimodal=True),
        make_server(backends=("fa3", plugin.BACKEND), pool=make_pool(dtype=torch.float16, page_size=1)),
        make_server(pool=make_pool(page_size=5), allocator=PagedTokenToKVPoolAllocator(use_triton_kernels=False)),
    ],
    ids=["plain", "topk", "exact-under-all", "image-masks-text-only", "images", "split", "page-5"],
)
def test_server_is_served(server: refusals.Server) -> None:
    refusals.check_server(server)


@pytest.mark.parametrize(
    "layer",
    [
        make_layer(),
        make_layer(logit_cap=50.0, sliding_window_size=4096),
    ],
    ids=["plain", "cap-and-window"],
)
def test_layer_is_served(layer: Any) -> None:
    refusals.check_layer(layer, 32, 8, 128)


def test_further_inputs_are_refused() -> None:
    refusals.check_arguments(make_layer(), {"sinks": None})
    with pytest.raises(refusals.UnsupportedFeatureError, match="`sinks` in layer 7"):
        refusals.check_arguments(make_layer(), {"sinks": torch.zeros(32)})
