"""What layers and batches bring: strided q, k and v, keys that the model has stored, every mask and shape at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("sglang")

import kit
from sglang.srt.layers.attention import base_attn_backend
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.test.kits.attention_unittest.attention_methods import dense_attention as sglang_kit

from flashcore_sglang import reference
from flashcore_sglang.plugin import BACKEND, create_backend, register

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
CONTEXT = 320  # a multiple of every page size
DECODE = {"forward_mode": ForwardMode.DECODE, "prefix_lens": (0, 63, 130, 299)}
EXTEND = {"forward_mode": ForwardMode.EXTEND, "prefix_lens": (0, 63, 130, 250), "extend_lens": (40, 1, 0, 70)}
MIXED = {"forward_mode": ForwardMode.MIXED, "prefix_lens": (60, 0, 130, 299), "extend_lens": (30, 70, 1, 1)}
BATCHES = {"decode": DECODE, "graph": DECODE, "extend": EXTEND, "mixed": MIXED}


@dataclass(frozen=True)
class Shape:
    """An attention layer and its pages; ``scale`` None: 1 / sqrt(head_dim)."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    window: int = -1
    cap: float = 0.0
    scale: float | None = None

    def __str__(self) -> str:
        masks = f"w{self.window}-cap{self.cap}"
        return f"h{self.num_heads}-kv{self.num_kv_heads}-d{self.head_dim}-p{self.page_size}-{masks}"


SHAPES = (
    Shape(8, 1, 64, 1, window=50, cap=3.0),
    Shape(16, 1, 96, 5, window=63, scale=0.2),
    Shape(10, 2, 256, 5, cap=5.0, scale=0.1),
    Shape(12, 2, 128, 8, window=7, cap=2.0),
    Shape(14, 2, 96, 8, scale=0.05),
    Shape(4, 4, 256, 16, window=100, cap=4.0),
    Shape(7, 1, 64, 64, window=0, scale=0.3),
)


def contiguous(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return tensors


def fused(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Slices of one projection, as Llama's and Qwen's."""
    return list(torch.cat(tensors, dim=1).split([tensor.shape[1] for tensor in tensors], dim=1))


def transposed(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """The channels of a head lie apart."""
    return [tensor.t().contiguous().t() for tensor in tensors]


Layout = Callable[[list[torch.Tensor]], list[torch.Tensor]]
CASES: list[tuple[Shape, Layout]] = [(shape, fused) for shape in SHAPES] + [
    (SHAPES[0], contiguous),
    (SHAPES[3], transposed),
]


@pytest.fixture(autouse=True)
def _backend() -> Iterator[None]:
    register()
    with torch.no_grad():
        yield


def make_fixture(shape: Shape, batch: str, device: str) -> Any:
    """SGLang's runner, pools and batch; the backend of a model with one layer of ``shape``; a pool full of NaN."""
    case = sglang_kit.DenseAttentionCase(
        name=batch,
        backend=BACKEND,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        page_size=shape.page_size,
        **BATCHES[batch],  # type: ignore[arg-type]
    )
    fixture = sglang_kit.build_dense_attention_fixture(
        SimpleNamespace(skipTest=pytest.fail),
        case,
        head_dim=shape.head_dim,
        max_context_len=CONTEXT,
        dtype=DTYPES[device],
        device=device,
    )
    layer = fixture.actual_module.attn
    layer.sliding_window_size, layer.logit_cap = shape.window, shape.cap
    layer.scaling = shape.scale or shape.head_dim**-0.5
    fixture.runner.model = fixture.actual_module
    fixture.backend = create_backend(fixture.runner)
    pool = fixture.runner.token_to_kv_pool
    pool.k_buffer[0].fill_(torch.nan)
    pool.v_buffer[0].fill_(torch.nan)
    return fixture


def slots_of(fixture: Any) -> torch.Tensor:
    """Pool slots of the tokens of all requests, one request after the other."""
    table = fixture.runner.req_to_token_pool.req_to_token
    return torch.cat([table[request, :n].long() for request, n in enumerate(fixture.case.seq_lens)])


def fill(fixture: Any) -> torch.Tensor:
    """Random K and V of all requests; their slots."""
    slots, pool = slots_of(fixture), fixture.runner.token_to_kv_pool
    for buffer in (pool.k_buffer[0], pool.v_buffer[0]):
        buffer[slots] = torch.randn(len(slots), *buffer.shape[1:]).to(buffer)
    return slots


def expected(fixture: Any, shape: Shape, slots: torch.Tensor, q: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Attention over the pool as it is, token by token: no page table is involved."""
    pool = fixture.runner.token_to_kv_pool
    lens = torch.tensor([fixture.case.input_lens, fixture.case.seq_lens])
    qo_indptr, kv_indptr = torch.nn.functional.pad(lens.cumsum(1), (1, 0))
    out, _ = reference.paged_attention(
        q.reshape(-1, shape.num_heads, shape.head_dim).to(dtype),
        pool.k_buffer[0].unsqueeze(1),
        pool.v_buffer[0].unsqueeze(1),
        qo_indptr,
        kv_indptr,
        slots,
        torch.ones(len(fixture.case.seq_lens), dtype=torch.int32),
        causal=True,
        sm_scale=shape.scale,
        window_left=shape.window,
        logits_soft_cap=shape.cap,
        dtype=dtype,
    )
    return out.flatten(1)


def plan(fixture: Any, batch: str, padded: int) -> None:
    """Eagerly, or as before the replay of a graph for ``padded`` requests."""
    backend, forward_batch = fixture.backend, fixture.forward_batch
    if batch != "graph":
        backend.init_forward_metadata(forward_batch)
        return
    more = padded - forward_batch.batch_size
    fill = backend.get_cuda_graph_seq_len_fill_value()
    view = SimpleNamespace(
        forward_mode=forward_batch.forward_mode,
        req_pool_indices=torch.nn.functional.pad(forward_batch.req_pool_indices, (0, more)),
        seq_lens=torch.nn.functional.pad(forward_batch.seq_lens, (0, more), value=fill),
        seq_lens_cpu=None,
    )
    backend.init_cuda_graph_state(padded, padded)
    backend.init_forward_metadata_out_graph(view)
    # Once a decode graph is planned the scheduler goes on to the next batch, in the same tensors.
    for tensor in (view.req_pool_indices, view.seq_lens, fixture.runner.req_to_token_pool.req_to_token):
        tensor.fill_(7)


def replayed(forward: Callable[[], torch.Tensor]) -> torch.Tensor:
    """What a captured ``forward`` writes when it is replayed."""
    forward()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = forward()
    out.fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    return out


@pytest.mark.parametrize("saves", [True, False], ids=["saves", "saved"])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("shape, layout", CASES, ids=lambda value: value.__name__ if callable(value) else str(value))
@pytest.mark.parametrize("device", DEVICES)
def test_against_the_truth(device: str, shape: Shape, layout: Layout, batch: str, saves: bool) -> None:
    """With ``save_kv_cache=False`` the model has stored K and V: what else it passes must not be read."""
    fixture = make_fixture(shape, batch, device)
    pool, forward_batch = fixture.runner.token_to_kv_pool, fixture.forward_batch
    present = fill(fixture)
    tokens = padded = fixture.case.num_input_tokens
    if batch == "graph":
        padded += 2
        forward_batch.out_cache_loc = torch.nn.functional.pad(forward_batch.out_cache_loc, (0, 2))  # the dummy page
    heads = (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
    values = [torch.randn(padded, n * shape.head_dim).to(pool.k_buffer[0]) for n in heads]
    q, k, v = layout(values if saves else [values[0], *(x.fill_(torch.nan) for x in values[1:])])

    plan(fixture, batch, padded)
    decodes = batch in ("decode", "graph")
    forward = fixture.backend.forward_decode if decodes else fixture.backend.forward_extend

    def call() -> torch.Tensor:
        return forward(q, k, v, fixture.actual_module.attn, forward_batch, save_kv_cache=saves)

    out = replayed(call) if batch == "graph" and device == "cuda" else call()

    assert out.shape == q.shape
    if saves:
        stored = pool.k_buffer[0][forward_batch.out_cache_loc[:tokens]]
        assert torch.equal(stored.flatten(1), k[:tokens])
    truth, plain = (expected(fixture, shape, present, q[:tokens], dtype) for dtype in (torch.float64, q.dtype))
    kit.assert_close("out", out[:tokens], truth, plain, shape)
    assert out[tokens:].isfinite().all()


def test_a_padded_extend_fills_the_output_that_it_is_given() -> None:
    """As breakable prefill graphs give it; DP attention pads with tokens of no request."""
    shape = SHAPES[0]
    fixture = make_fixture(shape, "extend", "cpu")
    forward_batch = fixture.forward_batch
    present = fill(fixture)
    tokens = fixture.case.num_input_tokens
    q = torch.randn(tokens + 3, shape.num_heads * shape.head_dim)
    forward_batch._attn_output = torch.full_like(q, torch.nan)
    plan(fixture, "extend", tokens)
    fixture.backend.forward_extend(q, None, None, fixture.actual_module.attn, forward_batch)
    out = forward_batch._attn_output
    truth = expected(fixture, shape, present, q[:tokens], torch.float64)
    torch.testing.assert_close(out[:tokens], truth.float(), atol=1e-5, rtol=1e-5)
    assert not out[tokens:].any()


def test_reads_of_the_schedulers_tensors_end_before_a_replay() -> None:
    """What 0.5.23 asks, to let the scheduler rewrite them; 0.5.17 takes it for granted."""
    ends = getattr(base_attn_backend, "SharedReadEnds", None)
    if ends is None:
        pytest.skip("this SGLang does not ask")
    backend = make_fixture(SHAPES[0], "decode", "cpu").backend
    assert backend.shared_read_ends(ForwardMode.DECODE) is ends.PRE_REPLAY


@pytest.mark.parametrize("device", DEVICES)
def test_scales_of_an_fp8_cache_change_nothing(device: str) -> None:
    """Checkpoints bring them; in a cache of the model's dtype K and V stand as they are."""
    shape = SHAPES[3]
    outs, stored = [], []
    for scale in (None, 0.25):
        torch.manual_seed(0)
        fixture = make_fixture(shape, "extend", device)
        pool, layer = fixture.runner.token_to_kv_pool, fixture.actual_module.attn
        fill(fixture)
        layer.k_scale = layer.v_scale = None if scale is None else torch.tensor(scale, device=device)
        layer.k_scale_float = layer.v_scale_float = scale
        fixture.backend = create_backend(fixture.runner)
        tokens = fixture.case.num_input_tokens
        heads = (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
        q, k, v = (torch.randn(tokens, n * shape.head_dim).to(pool.k_buffer[0]) for n in heads)
        plan(fixture, "extend", tokens)
        outs.append(fixture.backend.forward_extend(q, k, v, layer, fixture.forward_batch))
        stored.append(pool.k_buffer[0][fixture.forward_batch.out_cache_loc])
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(stored[0], stored[1])


def test_layers_that_modules_does_not_find_are_known_at_start() -> None:
    """As SGLang's wrapper of Transformers models keeps them."""
    shape = SHAPES[0]
    fixture = make_fixture(shape, "decode", "cpu")
    fixture.runner.model = torch.nn.Module()
    fixture.runner.model.attention_instances = {0: fixture.actual_module.attn}
    backend = create_backend(fixture.runner)
    assert backend.windows == (shape.window,)
    assert backend.features == ("causal", "window_left", "logits_soft_cap")


def test_a_window_that_no_layer_had_at_start_is_planned_for_every_batch() -> None:
    shape = SHAPES[0]
    fixture = make_fixture(shape, "decode", "cpu")
    batch, layer = fixture.forward_batch, fixture.actual_module.attn
    fixture.runner.model = torch.nn.Module()
    backend = create_backend(fixture.runner)
    slots = fill(fixture)
    q = torch.randn(batch.batch_size, shape.num_heads * shape.head_dim)
    backend.init_forward_metadata(batch)
    first = backend.forward_decode(q, None, None, layer, batch)
    for name in ("req_pool_indices", "seq_lens", "seq_lens_cpu"):
        setattr(batch, name, getattr(batch, name).flip(0))
    backend.init_forward_metadata(batch)
    flipped = backend.forward_decode(q.flip(0), None, None, layer, batch)
    truth = expected(fixture, shape, slots, q, torch.float64).float()
    torch.testing.assert_close(first, truth, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(flipped.flip(0), truth, atol=1e-5, rtol=1e-5)


def test_an_idle_batch_has_an_empty_output() -> None:
    """What a rank without requests runs, between batches of others."""
    shape = SHAPES[0]
    fixture = make_fixture(shape, "decode", "cpu")
    idle = SimpleNamespace(forward_mode=ForwardMode.IDLE)
    fixture.backend.init_forward_metadata(idle)
    q, k, v = (torch.empty(0, n * shape.head_dim) for n in (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads))
    assert fixture.backend.forward(q, k, v, fixture.actual_module.attn, idle).shape == q.shape
