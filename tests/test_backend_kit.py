"""SGLang's own unit tests of attention backends, which ship in its wheel, with this backend under test."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("sglang")

from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.test.kits.attention_unittest.attention_methods import dense_attention as kit

from flashcore_sglang.plugin import BACKEND, register
from flashcore_sglang.refusals import UnsupportedFeatureError

# The kit's tolerance is made for half precision; in fp32 both sides compute the same sums in another order.
FP32_TOLERANCE = 1e-5

SWA_CASES = kit.make_swa_no_prefix_input_config_cases(BACKEND) + kit.make_swa_prefix_input_config_cases(BACKEND)
PAGE_SIZES = (1, 5, 8, 64)
CONTEXT = 320  # a multiple of every page size: the kit lays requests out end to end, and pages must not straddle them


class Testcase:
    """What the kit wants of unittest: it skips where a backend cannot be built, which is a failure here."""

    def skipTest(self, reason: str) -> None:  # noqa: N802
        pytest.fail(reason)


@pytest.fixture(autouse=True)
def _backend() -> Iterator[None]:
    register()
    with torch.no_grad():
        yield


def other_page_sizes() -> list[Any]:
    """The ragged extend and decode of the kit with page sizes that it does not try."""
    cases = {case.name: case for case in kit.make_dense_cases(BACKEND)}
    chosen = (cases["mha_extend_ragged_page_boundary"], cases["gqa_decode_page_boundary"])
    return [replace(case, page_size=size, name=f"{case.name}_p{size}") for case in chosen for size in PAGE_SIZES]


@pytest.mark.parametrize(
    "case", [*kit.make_dense_cases(BACKEND), *other_page_sizes(), *SWA_CASES], ids=lambda case: case.name
)
def test_dense_case(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kit, "_SWA_DECODE_EXTEND_WINDOW", kit._SWA_DECODE_EXTEND_WINDOW | {BACKEND})
    monkeypatch.setattr(kit, "DENSE_ATOL", FP32_TOLERANCE)
    monkeypatch.setattr(kit, "DENSE_RTOL", FP32_TOLERANCE)
    kit.run_dense_attention_case(
        Testcase(), case, head_dim=64, max_context_len=CONTEXT, dtype=torch.float32, device="cpu"
    )


def test_mixed_batch_of_extends_and_decodes() -> None:
    """SGLang sends them to forward_extend, a decode being an extend of one token."""
    case = kit.DenseAttentionCase(
        name="mixed",
        backend=BACKEND,
        forward_mode=ForwardMode.MIXED,
        num_heads=10,
        num_kv_heads=2,
        page_size=16,
        prefix_lens=(20, 0, 30, 16),
        extend_lens=(18, 7, 1, 1),
    )
    kit.run_dense_attention_case(
        Testcase(), case, head_dim=64, max_context_len=CONTEXT, dtype=torch.float32, device="cpu"
    )


def test_batches_that_outgrow_the_first_buffers() -> None:
    """Small, large, small again: the buffers grow once and the plans stay right."""
    for batch in (2, 40, 3):
        case = kit.DenseAttentionCase(
            name=f"decode_{batch}",
            backend=BACKEND,
            forward_mode=ForwardMode.DECODE,
            num_heads=4,
            num_kv_heads=2,
            page_size=1,
            prefix_lens=tuple(3 + 2 * i for i in range(batch)),
        )
        fixture = kit.build_dense_attention_fixture(
            Testcase(), case, head_dim=64, max_context_len=CONTEXT, dtype=torch.float32, device="cpu"
        )
        torch.testing.assert_close(
            kit.run_dense_fixture_eager(fixture),
            kit.expected_dense_fixture_output(fixture),
            atol=FP32_TOLERANCE,
            rtol=FP32_TOLERANCE,
        )


def padded(tensor: torch.Tensor, size: int, value: int = 0) -> torch.Tensor:
    return torch.nn.functional.pad(tensor, (0, size - tensor.shape[0]), value=value)


@pytest.mark.parametrize("size", [3, 4, 8])
def test_padded_batch_on_the_way_of_a_graph(size: int) -> None:
    """What a decode graph runs, without the graph: static buffers, and rows behind the batch that read one key."""
    case = kit.DenseAttentionCase(
        name="padded",
        backend=BACKEND,
        forward_mode=ForwardMode.DECODE,
        num_heads=8,
        num_kv_heads=2,
        page_size=16,
        prefix_lens=(14, 15, 40),
    )
    fixture = kit.build_dense_attention_fixture(
        Testcase(), case, head_dim=64, max_context_len=CONTEXT, dtype=torch.float32, device="cpu"
    )
    backend, batch = fixture.backend, fixture.forward_batch
    backend.init_cuda_graph_state(8, 8)
    # SGLang's view of a replay has these fields only.
    view = SimpleNamespace(
        forward_mode=batch.forward_mode,
        req_pool_indices=padded(batch.req_pool_indices, size),
        seq_lens=padded(batch.seq_lens, size, backend.get_cuda_graph_seq_len_fill_value()),
        seq_lens_cpu=None,
    )
    backend.init_forward_metadata_out_graph(view)
    backend.init_forward_metadata_in_graph(view)
    batch.out_cache_loc = padded(batch.out_cache_loc, size)
    hidden = torch.cat([fixture.input_hidden, torch.zeros(size - 3, fixture.input_hidden.shape[1])])
    with kit.forward_context(kit.ForwardContext(attn_backend=backend)):
        out = fixture.actual_module(hidden, batch)
    assert out.isfinite().all()
    expected = kit.expected_dense_fixture_output(fixture)
    torch.testing.assert_close(out[:3], expected, atol=FP32_TOLERANCE, rtol=FP32_TOLERANCE)


def test_other_graphs_than_decode_are_refused() -> None:
    fixture = kit.build_dense_attention_fixture(
        Testcase(), kit.make_dense_cases(BACKEND)[0], head_dim=64, dtype=torch.float32, device="cpu"
    )
    with pytest.raises(UnsupportedFeatureError, match="captures decode graphs only, got EXTEND: use --cuda-graph"):
        fixture.backend.init_forward_metadata_out_graph(fixture.forward_batch)


@pytest.mark.parametrize("check", [True, False])
def test_a_slot_outside_of_the_pool_is_found_on_request(check: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under FLASHCORE_CHECK=1 before a kernel reads there; without it, planning waits for nothing and says nothing."""
    monkeypatch.setenv("FLASHCORE_CHECK", str(int(check)))
    case = kit.DenseAttentionCase(
        name="wild-slot",
        backend=BACKEND,
        forward_mode=ForwardMode.DECODE,
        num_heads=8,
        num_kv_heads=2,
        page_size=16,
        prefix_lens=(14, 40),
    )
    fixture = kit.build_dense_attention_fixture(
        Testcase(), case, head_dim=64, max_context_len=CONTEXT, dtype=torch.float32, device="cpu"
    )
    backend, batch = fixture.backend, fixture.forward_batch
    wild = backend.num_pages + 7
    backend.req_to_token_pool.req_to_token[batch.req_pool_indices[1], 16:32] = wild * 16 + torch.arange(16)
    with pytest.raises(ValueError, match=f"got {wild}") if check else nullcontext():
        backend.init_forward_metadata(batch)
