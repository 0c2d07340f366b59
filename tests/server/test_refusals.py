"""A server that is asked for what the backend does not do ends at its start, and its log says what to change."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
from server.harness import START_SECONDS, Server

pytestmark = pytest.mark.server


@dataclass(frozen=True)
class Refused:
    name: str
    flags: str
    says: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)


REFUSED = (
    Refused(
        "topk-small-pages",
        "--page-size 8",
        ("policy topk with pages of fewer than 16 tokens", "--page-size 64"),
        {"FLASHCORE_POLICY": "topk"},
    ),
    Refused(
        "other-dtype",
        "--kv-cache-dtype bfloat16",
        ("a KV cache of another dtype than the model's: torch.bfloat16 for torch.float32", "--kv-cache-dtype auto"),
    ),
    Refused(
        "fp8-cache",
        "--kv-cache-dtype fp8_e4m3",
        ("a KV cache of torch.float8_e4m3fn", "--kv-cache-dtype bf16 --dtype bfloat16"),
    ),
    Refused(
        "unknown-setting",
        "",
        ("unknown environment variable FLASHCORE_BUDGET; did you mean FLASHCORE_BUDGET_TOKENS?",),
        {"FLASHCORE_BUDGET": "4096"},
    ),
)


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.name)
def test_server_ends_and_says_why(case: Refused, model: Path, logs: Path) -> None:
    flags = ("--dtype", "float32", "--max-total-tokens", "4096", *case.flags.split())
    server = Server(model, "flashcore_sparse", logs, *flags, environment=case.environment)
    try:
        server.process.wait(START_SECONDS)
        assert server.process.poll() not in (None, 0), server.tail()
    finally:
        server.stop()
    log = server.log.read_text()
    for part in case.says:
        assert part in log, server.tail()
