"""The benchmarks' own arithmetic: cases, log parsing, tables. No figure of the README without its file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flashcore_sglang import reference
from flashcore_sglang.bench import e2e, results
from flashcore_sglang.bench.accuracy import sample, token_error
from flashcore_sglang.bench.cases import DECODE_SUITES, DecodeCase, Heads

ROOT = Path(__file__).resolve().parents[1]

TREES = [
    DecodeCase(levels=((3, 100),), page_size=16),
    DecodeCase(levels=((1, 64), (4, 40)), page_size=16),
    DecodeCase(levels=((1, 32), (2, 64), (3, 17)), page_size=16),
    DecodeCase(lens=(1, 16, 17), page_size=16),
]


@pytest.mark.parametrize("case", TREES, ids=lambda c: c.name)
def test_page_table_is_the_tree(case: DecodeCase) -> None:
    table, lens, num_pages = case.page_table("cpu")
    used: set[int] = set()
    tokens: dict[int, int] = {}
    for row, length in zip(table.tolist(), lens.tolist(), strict=True):
        pages = row[: -(-length // case.page_size)]
        assert len(set(pages)) == len(pages), f"{case.name}: a request holds a page twice"
        used.update(pages)
        for column, page in enumerate(pages):
            tokens[page] = min(case.page_size, length - column * case.page_size)
    assert used == set(range(num_pages)), case.name
    assert sum(tokens.values()) == case.unique_tokens, case.name
    assert case.unique_bytes == case.unique_tokens * 2 * 2 * case.heads.kv * case.heads.dim


def test_shared_levels_are_shared() -> None:
    case = DecodeCase(levels=((1, 32), (2, 64), (3, 17)), page_size=16)
    table, _, _ = case.page_table("cpu")
    assert torch.equal(table[:, :2], table[:1, :2].expand(6, 2))
    assert torch.equal(table[0, 2:6], table[2, 2:6])
    assert not set(table[0, 2:6].tolist()) & set(table[3, 2:6].tolist())
    assert len(set(table[:, 6].tolist())) == 6


def test_a_shared_node_of_broken_pages_is_refused() -> None:
    with pytest.raises(ValueError, match="33 % 16"):
        DecodeCase(levels=((1, 33), (2, 16)), page_size=16).page_table("cpu")


def test_names_are_unique() -> None:
    for name, suite in DECODE_SUITES.items():
        names = [case.name for case in suite]
        assert len(set(names)) == len(names), name
    assert (
        DecodeCase(levels=((1, 5760), (64, 2432)), heads=Heads()).name == "decode/b64/ctx8192/shared5760/h32kv8d128/p64"
    )


def test_steady_speed_is_the_median_of_the_fullest_batch() -> None:
    line = "Decode batch, #running-req: {}, #token: 1, gen throughput (token/s): {:.2f}, #queue-req: 0"
    log = "\n".join(line.format(n, s) for n, s in [(4, 1.0), (512, 10.0), (512, 30.0), (511, 20.0), (100, 99.0)])
    assert e2e.steady_tokens_per_s(log) == 20.0
    assert e2e.steady_tokens_per_s("no such line") == 0.0


def test_markdown_shows_where_we_lose() -> None:
    rows = [results.Row("c", "fa3", "time_us", 100.0), results.Row("c", "flashcore", "time_us", 150.0)]
    assert results.markdown(rows, "time_us").splitlines()[-1] == "| c | 100.0 | 150.0 | 1.50 |"


def test_saved_rows_come_back(tmp_path: Path) -> None:
    made = results.Results()
    made.add("decode/x", "flashcore", "time_us", 12.3456789, 0.5)
    made.save(tmp_path / "deep" / "r.json")
    assert results.load(tmp_path / "deep" / "r.json") == made.rows
    assert set(json.loads((tmp_path / "deep" / "r.json").read_text())) == {"command", "host", "date", "rows"}


def test_readme_tables_are_what_the_result_files_say() -> None:
    done = subprocess.run([sys.executable, ROOT / "scripts/bench/readme_tables.py", "--check"], check=False)
    assert done.returncode == 0, "run scripts/bench/readme_tables.py"


def test_errors_are_found_and_nan_is_infinite() -> None:
    k, v = (torch.randn(5, 16, 2, 64, dtype=torch.float64) for _ in range(2))
    q = torch.randn(1, 8, 64, dtype=torch.float64)
    pages = torch.tensor([3, 0, 4], dtype=torch.int32)
    table = torch.tensor([0, 1]), torch.tensor([0, 3]), pages, torch.tensor([7])
    out, _ = reference.paged_attention(q, k, v, *table)
    visible = 2 * 16 + 7
    assert token_error(out[0], q[0], k, v, pages, visible) < 1e-12
    out[0, 5, 3] += 0.25
    assert token_error(out[0], q[0], k, v, pages, visible) == pytest.approx(0.25)
    out[0, 5, 3] = torch.nan
    assert token_error(out[0], q[0], k, v, pages, visible) == float("inf")
    assert sample(100, 3) == [0, 49, 99]
    assert sample(2, 4) == [0, 1]
