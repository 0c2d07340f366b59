"""The attention backend of SGLang: from a ForwardBatch to planned work, and from a layer's q, k, v to its output.

    once a forward   req_to_token -> page table -> plan        (init_forward_metadata*, outside of captured graphs)
    once a layer     store k, v -> attend over the plan -> out (forward_decode, forward_extend)

All reads of what the scheduler owns end with the plan, so that it may rewrite ``req_to_token`` while a graph replays.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import RadixAttention

from flashcore_sglang import compat, config, cublaslt, ops, refusals, variants
from flashcore_sglang.metrics import PlanMetrics
from flashcore_sglang.phase import Batch, Phase
from flashcore_sglang.planner import Capacity, PlannerOptions, Policy, Summaries, SummaryKind, SummarySpec
from flashcore_sglang.plugin import BACKEND

logger = logging.getLogger(__name__)

PADDED_SEQ_LEN = 1  # of the rows that pad a captured batch: they read the one key of the dummy page
NO_WINDOW = -1


class FlashcoreBackend(AttentionBackend):
    """Decode and extend for GQA, MHA and MQA models over SGLang's paged KV pool.

    Args:
        runner: SGLang's model runner, its model loaded and its KV pools allocated.

    Raises:
        UnsupportedFeatureError: the server or a layer asks for what the backend does not do.
        UnsupportedError: no kernel for the model's shape.
        ConfigError: the configuration cannot be used.
    """

    def __init__(self, runner: Any) -> None:
        super().__init__()
        args = compat.resolved_args(runner.server_args)
        self.config = config.load()
        if args.enable_deterministic_inference:
            self.config = self.config.model_copy(update={"deterministic": True})
        self.req_to_token_pool = runner.req_to_token_pool
        self.token_to_kv_pool = pool = runner.token_to_kv_pool
        refusals.check_server(
            refusals.Server(runner, args, pool, self.config, compat.attention_backends(args), BACKEND)
        )
        self.device = runner.device
        self.page_size = runner.page_size
        layers = _attention_layers(runner.model)
        tp_size = compat.attention_tp_size()
        self.num_qo_heads = layers[0].tp_q_head_num if layers else runner.model_config.num_attention_heads // tp_size
        self.num_kv_heads = pool.head_num
        self.head_dim = pool.head_dim
        self.num_pages = pool.k_buffer[0].shape[0] // self.page_size
        self.max_columns = -(-self.req_to_token_pool.req_to_token.shape[1] // self.page_size)
        # Here the whole model is at hand; a layer that is not of it is checked when it is first seen.
        self._checked: set[int] = set()
        for layer in layers:
            self._check_layer(layer)
        self.windows = tuple(sorted({_window(layer) for layer in layers})) or (NO_WINDOW,)
        self.features = _features(layers)

        self.options = PlannerOptions.from_config(
            self.config, self.page_size, self.max_columns, may_share=not args.disable_radix_cache
        )
        self.summaries = self._make_summaries(layers) if self.options.policy is Policy.TOPK else None
        self.machine = variants.device_of(self.device, self.config.cpu_threads)
        self.graph_decode: Phase | None = None
        self.eager_decode = self._make_phase("decode", batch=16, tokens=16, pages=1024)
        chunk = args.chunked_prefill_size or 0  # -1: not chunked
        self.extend = self._make_phase("prefill", batch=16, tokens=max(chunk, 1024), pages=self.num_pages)
        self.phase: Phase | None = None  # of the present forward
        self.metrics = PlanMetrics(self._wants_metrics(args.enable_metrics))

    # -----------------------------------------------------------------------------------------------------------------
    # Once a forward
    # -----------------------------------------------------------------------------------------------------------------

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Plans an eager forward; the buffers grow to what it needs."""
        mode = forward_batch.forward_mode
        if mode.is_idle():
            return
        if mode.is_decode():
            self._begin(self.eager_decode, self._decode_batch(forward_batch), grow=True)
        else:
            self._begin(self.extend, self._extend_batch(forward_batch), grow=True)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Buffers that every captured graph reads; the largest batch at full context fits."""
        self.graph_decode = self._make_phase(
            "decode", batch=max_bs, tokens=max_num_tokens, pages=max_bs * self.max_columns
        )

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        """Plans the padded batch of a decode graph, before it is captured and before every replay."""
        if not forward_batch.forward_mode.is_decode():
            raise refusals.UnsupportedFeatureError(
                f"flashcore_sparse captures decode graphs only, got {forward_batch.forward_mode.name}: use "
                "--cuda-graph-backend-prefill breakable (or disabled)"
            )
        assert self.graph_decode is not None  # SGLang calls init_cuda_graph_state first
        self._begin(self.graph_decode, self._decode_batch(forward_batch), grow=False, observe=not in_capture)

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        """Keys of a row that pads a batch."""
        return PADDED_SEQ_LEN

    def shared_read_ends(self, fm: Any) -> Any:
        """Where reads of the scheduler's tensors end (asked by 0.5.23): before the replay, whatever the graph."""
        return compat.reads_end_before_replay() if fm.is_decode() else super().shared_read_ends(fm)

    def _begin(self, phase: Phase, batch: Batch, grow: bool, observe: bool = True) -> None:
        if grow:
            phase.reserve(batch)
        phase.begin(batch, self.windows)
        self.phase = phase
        planner = phase.planner(self.windows[0])
        if phase.decode and observe and self.metrics.enabled:
            self.metrics.observe(planner.layer_plans())
        if self.config.check:
            plan = planner.plan
            table = plan.kv_indptr[: batch.size + 1], plan.kv_indices, plan.last_page_len[: batch.size]
            ops.check_page_table(*table, self.page_size, self.num_pages)

    def _decode_batch(self, forward_batch: Any) -> Batch:
        size = forward_batch.seq_lens.shape[0]
        return Batch(num_tokens=size, num_pages=self._pages(forward_batch), **self._requests(forward_batch))

    def _extend_batch(self, forward_batch: Any) -> Batch:
        lens = forward_batch.extend_seq_lens
        qo_indptr = torch.nn.functional.pad(lens.cumsum(0, dtype=torch.int32), (1, 0))
        qo_lens, seq_lens_cpu = forward_batch.extend_seq_lens_cpu, forward_batch.seq_lens_cpu
        return Batch(
            # extend_num_tokens may count padding, for which there is no request
            num_tokens=sum(qo_lens),
            num_pages=self._pages(forward_batch),
            qo_indptr=qo_indptr,
            qo_lens=qo_lens,
            kv_lens=None if seq_lens_cpu is None else seq_lens_cpu[: len(qo_lens)].tolist(),
            **self._requests(forward_batch),
        )

    def _requests(self, forward_batch: Any) -> dict[str, torch.Tensor]:
        return {
            "req_to_token": self.req_to_token_pool.req_to_token,
            "req_pool_indices": forward_batch.req_pool_indices.to(torch.int64),
            "seq_lens": forward_batch.seq_lens.to(torch.int64),
        }

    def _pages(self, forward_batch: Any) -> int:
        """An upper bound of the pages of all requests, without asking the device."""
        size = forward_batch.seq_lens.shape[0]
        if forward_batch.seq_lens_cpu is None:
            return size * self.max_columns
        return int(forward_batch.seq_lens_cpu.sum()) // self.page_size + size

    # -----------------------------------------------------------------------------------------------------------------
    # Once a layer
    # -----------------------------------------------------------------------------------------------------------------

    def forward_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Attention of one new token of each request. q ``[tokens, heads * head_dim]``; returns the same shape."""
        return self._forward(q, k, v, layer, forward_batch, save_kv_cache, kwargs)

    def forward_extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Attention of the new tokens of each request over its cached prefix and themselves; mixed batches too."""
        if q.is_cuda and torch.cuda.is_current_stream_capturing():
            raise refusals.UnsupportedFeatureError(
                "flashcore_sparse plans each extend and cannot be captured with it: use "
                "--cuda-graph-backend-prefill breakable (or disabled)"
            )
        return self._forward(q, k, v, layer, forward_batch, save_kv_cache, kwargs)

    def _forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool,
        kwargs: dict[str, Any],
    ) -> torch.Tensor:
        refusals.check_arguments(layer, kwargs)
        self._check_layer(layer)
        phase = self.phase
        assert phase is not None  # SGLang calls init_forward_metadata first
        window = _window(layer)

        k_cache = self._paged(self.token_to_kv_pool.get_key_buffer(layer.layer_id))
        v_cache = self._paged(self.token_to_kv_pool.get_value_buffer(layer.layer_id))
        queries = self._heads(q, self.num_qo_heads)
        out = self._output(queries, forward_batch)

        if save_kv_cache and k is not None and v is not None:
            new_k, new_v = (self._heads(tensor, self.num_kv_heads) for tensor in (k, v))
            slots = forward_batch.out_cache_loc
            if not phase.store(window, layer.layer_id, new_k, new_v, slots, k_cache, v_cache):
                self.token_to_kv_pool.set_kv_buffer(layer, slots, new_k, new_v)
        else:
            phase.after_store(window, layer.layer_id, k_cache)
        used = phase.num_tokens
        if used < queries.shape[0]:  # padded, under DP attention, with tokens of no request
            out[used:].zero_()
        phase.attend(
            queries[:used],
            k_cache,
            v_cache,
            out[:used],
            layer_id=layer.layer_id,
            window=window,
            sm_scale=layer.scaling,
            logits_soft_cap=layer.logit_cap,
        )
        return out.view(-1, self.num_qo_heads * self.head_dim)

    def _heads(self, tensor: torch.Tensor, num_heads: int) -> torch.Tensor:
        """``[tokens, heads * head_dim]`` by heads; a copy only where the channels of a head do not lie side by side."""
        heads = tensor.reshape(-1, num_heads, self.head_dim)
        return heads if heads.stride(-1) == 1 else heads.contiguous()

    def _paged(self, buffer: torch.Tensor) -> torch.Tensor:
        """``[slots, kv_heads, head_dim]`` as ``[pages, page_size, kv_heads, head_dim]``."""
        slots = self.num_pages * self.page_size
        return buffer[:slots].view(-1, self.page_size, self.num_kv_heads, self.head_dim)

    def _output(self, queries: torch.Tensor, forward_batch: Any) -> torch.Tensor:
        """The output that a breakable prefill graph goes on to read, where there is one."""
        given = getattr(forward_batch, "_attn_output", None)
        if given is None:
            return torch.empty(queries.shape, dtype=queries.dtype, device=queries.device)
        return given.view(queries.shape)

    # -----------------------------------------------------------------------------------------------------------------
    # Once a server
    # -----------------------------------------------------------------------------------------------------------------

    def _check_layer(self, layer: Any) -> None:
        if id(layer) in self._checked:
            return
        refusals.check_layer(layer, self.num_qo_heads, self.num_kv_heads, self.head_dim)
        self._checked.add(id(layer))

    def _make_phase(self, name: variants.Phase, batch: int, tokens: int, pages: int) -> Phase:
        shape = variants.Shape(
            num_qo_heads=self.num_qo_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            page_size=self.page_size,
            dtype=ops.DTYPES[self.token_to_kv_pool.dtype],
            phase=name,
            features=self.features,
        )
        forced, note = self.config.variant, ""
        if forced != "auto" and not variants.BY_NAME[forced].tilings(name):
            forced, note = "auto", f" ({forced} has no {name} kernel)"
        choice = variants.choose(shape, self.machine, forced)
        _log_once(
            f"flashcore_sparse: {name} by {choice.variant.name}{note}, policy {self.config.policy}, page size "
            f"{self.page_size}, {choice.num_ctas} CTAs"
        )
        capacity = Capacity(
            batch=batch,
            tokens=tokens,
            pages=pages,
            num_pages=self.num_pages,
            num_kv_heads=self.num_kv_heads,
            group=self.num_qo_heads // self.num_kv_heads,
            page_size=self.page_size,
            split_keys=self.options.split_keys,
            **choice.plan_sizes,
        )
        matmuls = self._make_matmuls() if choice.variant.name == "cublaslt" else None
        return Phase(name, choice, self.options, capacity, self.head_dim, self.device, self.summaries, matmuls)

    def _make_matmuls(self) -> cublaslt.Matmuls:
        heads = self.num_qo_heads, self.num_kv_heads, self.head_dim
        dtype, scores = self.token_to_kv_pool.dtype, self.config.cublaslt_scores
        like = cublaslt.layer_shape(*heads, dtype, causal=True, scores=scores)
        device = torch.device("cuda", torch.cuda.current_device())
        return cublaslt.Matmuls(cublaslt.Workspace(device, self.config.cublaslt_ws_mb), like)

    def _make_summaries(self, layers: list[Any]) -> Summaries:
        pool = self.token_to_kv_pool
        known = [layer.layer_id for layer in layers if _window(layer) < 0]
        spec = SummarySpec(
            layers=known or range(pool.start_layer, pool.start_layer + pool.layer_num),
            head_dim=self.head_dim,
            dtype=pool.dtype,
            max_columns=self.max_columns,
            dense_layers=self.config.dense_layers,
            reuse_layers=self.config.reuse_layers,
            kind=SummaryKind[self.config.summary_kind.upper()],
            fp8=self.config.summary_dtype == "fp8",
        )
        size = spec.num_bytes(self.num_pages, self.num_kv_heads)
        _log_once(f"flashcore_sparse: page summaries take {size >> 20} MiB")
        return Summaries(spec, self.num_pages, self.num_kv_heads, self.device)

    def _wants_metrics(self, server_has_them: bool) -> bool:
        """Every rank plans the same batch, so the first one counts."""
        return _first_rank() and (server_has_them if self.config.metrics == "auto" else self.config.metrics)


def _attention_layers(model: torch.nn.Module) -> list[RadixAttention]:
    """The attention layers of ``model``, each once.

    Around models of Transformers (``--model-impl transformers``) SGLang keeps them in a dict, where ``modules()`` does
    not look.
    """
    modules = [
        layer for module in model.modules() for layer in (module, *getattr(module, "attention_instances", {}).values())
    ]
    return [layer for layer in dict.fromkeys(modules) if isinstance(layer, RadixAttention)]


def _window(layer: Any) -> int:
    """Keys to the left of a query that ``layer`` sees; -1: all."""
    size = layer.sliding_window_size
    return NO_WINDOW if size is None or size < 0 else int(size)


def _features(layers: list[Any]) -> tuple[str, ...]:
    """What ``layers`` ask of a kernel."""
    asked = {
        "causal": True,
        "window_left": any(_window(layer) >= 0 for layer in layers),
        "logits_soft_cap": any(layer.logit_cap > 0 for layer in layers),
    }
    return tuple(feature for feature, needed in asked.items() if needed)


def _first_rank() -> bool:
    distributed = torch.distributed
    return not distributed.is_initialized() or distributed.get_rank() == 0


@cache
def _log_once(message: str) -> None:
    """Several backends live in a process (two-batch overlap has three) and several processes serve a model."""
    if _first_rank():
        logger.info(message)
