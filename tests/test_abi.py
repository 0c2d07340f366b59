"""The compiled library asks for nothing but libtorch's stable C shims and the C++ runtime: one build, every torch."""

import ctypes
import re
import subprocess
from functools import cache
from pathlib import Path

import torch

from flashcore_sglang._load import library_path, load_library

# The oldest torch that the library promises to load on; TORCH_TARGET_VERSION in csrc/CMakeLists.txt.
TARGET_VERSION = "0x020b000000000000"

ALLOWED_LIBRARIES = {
    "libtorch.so",
    "libc.so.6",
    "libdl.so.2",
    "libgcc_s.so.1",
    "libm.so.6",
    "libpthread.so.0",
    "librt.so.1",
    "libstdc++.so.6",
    "ld-linux-x86-64.so.2",
    "ld-linux-aarch64.so.1",
}

# Absent from a CPU-only torch, where the library must load too.
STREAM_SHIM = "aoti_torch_get_current_cuda_stream"


def run(*command: str, stdin: str = "") -> str:
    return subprocess.run(command, input=stdin, check=True, capture_output=True, text=True).stdout


@cache
def undefined_symbols() -> dict[str, bool]:
    """Names that the library leaves to others, without versions -> whether the reference is weak."""
    symbols = {}
    for line in run("nm", "-D", "--undefined-only", str(library_path())).splitlines():
        kind, name = line.split()
        symbols[name.split("@")[0]] = kind in "wv"
    return symbols


@cache
def stable_shims() -> set[str]:
    """The C functions that this torch's headers declare to code with our target."""
    include = Path(torch.__file__).parent / "include"
    source = "#include <torch/csrc/stable/c/shim.h>\n#include <torch/csrc/inductor/aoti_torch/c/shim.h>\n"
    flags = (f"-DTORCH_TARGET_VERSION={TARGET_VERSION}ULL", "-DUSE_CUDA", f"-I{include}")
    text = run("c++", "-E", "-P", "-x", "c++", *flags, "-", stdin=source)
    return set(re.findall(r"\b((?:aoti_)?torch_\w+)\s*\(", text))


def in_cxx_runtime(symbol: str) -> bool:
    """Whether libstdc++ or a library that it needs (libc, libm, libgcc) has the symbol."""
    return hasattr(ctypes.CDLL("libstdc++.so.6"), symbol)


def test_only_torch_and_the_cxx_runtime_are_needed() -> None:
    needed = set(re.findall(r"\(NEEDED\).*\[(.+)\]", run("readelf", "-d", str(library_path()))))
    assert "libtorch.so" in needed
    assert needed <= ALLOWED_LIBRARIES, f"not allowed: {sorted(needed - ALLOWED_LIBRARIES)}"


def test_every_symbol_is_a_stable_shim_or_of_the_cxx_runtime() -> None:
    assert {"aoti_torch_get_data_ptr", "aoti_torch_library_def"} <= stable_shims()
    required = [name for name, weak in undefined_symbols().items() if not weak]
    strangers = [name for name in required if name not in stable_shims() and not in_cxx_runtime(name)]
    assert not strangers, f"neither stable shims of torch 2.11 nor of the C++ runtime: {strangers}"


def test_the_stream_shim_is_the_only_optional_part_of_torch() -> None:
    weak = {name for name, is_weak in undefined_symbols().items() if is_weak}
    assert {name for name in weak if "torch_" in name} == {STREAM_SHIM}


def test_the_target_is_the_one_that_the_build_uses() -> None:
    build = Path(__file__).parents[1] / "csrc" / "CMakeLists.txt"
    assert f"TORCH_TARGET_VERSION={TARGET_VERSION}" in build.read_text()


def test_torch_stops_at_the_ops() -> None:
    folder = Path(__file__).parents[1] / "csrc"
    sources = {path.relative_to(folder): path.read_text() for path in folder.rglob("*.[chc]*") if path.is_file()}
    users = {str(path) for path, text in sources.items() if re.search(r"#include [<\"](torch|ATen|c10)/", text)}
    assert "ops.cpp" in users
    assert {name for name in users if not name.startswith("ops")} == set()


def test_it_loads_and_registers_its_ops() -> None:
    assert load_library() == library_path()
    for op in ("page_table", "plan", "attend", "summarize", "select", "cublaslt_workspace", "build_info"):
        assert torch.ops.flashcore.__getattr__(op).default._schema.name == f"flashcore::{op}"
