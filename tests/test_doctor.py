"""The doctor in broken environments: each one is named, with what to do, and the rest of the report still comes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flashcore_sglang import compat, doctor, ops, probes
from flashcore_sglang.probes import Check

ROOT = Path(__file__).parents[1]
PACKAGES = Path(torch.__file__).parents[1]


def report(*path: Path | str, **env: str) -> tuple[int, dict[str, Check]]:
    """Exit status and checks of a doctor that finds packages on ``path`` alone (-S: no site-packages)."""
    code = "import sys; from flashcore_sglang.cli import main; sys.exit(main(['doctor', '--json']))"
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("FLASHCORE_", "SGLANG_"))}
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],
        env={**clean, "PYTHONPATH": os.pathsep.join(map(str, path)), **env},
        capture_output=True,
        text=True,
        timeout=120,
        cwd="/",
    )
    assert done.returncode in (0, 1), done.stderr
    shown = json.loads(done.stdout)
    assert shown["ok"] is (done.returncode == 0)
    return done.returncode, {check["name"]: Check(**check) for check in shown["checks"]}


def package_with(folder: Path, library: bytes | None) -> Path:
    """A copy of the package by links, with another compiled library."""
    package = folder / "flashcore_sglang"
    package.mkdir()
    for entry in (ROOT / "flashcore_sglang").iterdir():
        if entry.name not in ("_C.so", "__pycache__"):
            (package / entry.name).symlink_to(entry)
    if library is not None:
        (package / "_C.so").write_bytes(library)
    return folder


def distribution(folder: Path, name: str, version: str, entry_points: str = "") -> Path:
    """The metadata of an installed distribution, and an empty package of its name."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(entry_points)
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text("")
    return folder


def module(folder: Path, name: str, code: str) -> Path:
    (folder / f"{name}.py").write_text(code)
    return folder


def test_nothing_is_installed() -> None:
    status, checks = report(ROOT)
    assert status == 1
    assert checks["torch"] == Check("torch", "fail", "not installed", "pip install 'torch>=2.11,<2.16'")
    assert checks["extension"].status == "skip"
    assert checks["sglang"].status == "warn"
    assert checks["sglang"].fix == "pip install 'sglang>=0.5.17,<=0.5.23'"
    assert checks["config"].status == "fail"  # pydantic and PyYAML are missing, too
    assert "No module named" in checks["config"].detail
    assert checks["config"].fix == "in a checkout: pip install --no-build-isolation -e ."
    assert checks["self-test"].status == "skip"
    assert checks["python"].status == "ok"


def test_torch_does_not_import(tmp_path: Path) -> None:
    broken = module(tmp_path, "torch", "raise ImportError('libtorch_cpu.so: cannot open shared object file')")
    status, checks = report(broken, ROOT)
    assert status == 1
    assert checks["torch"].status == "fail"
    assert "libtorch_cpu.so: cannot open shared object file" in checks["torch"].detail
    assert "--force-reinstall" in checks["torch"].fix
    assert checks["sglang"].status == "warn", "the probes after the failed one ran"


@pytest.mark.parametrize("version, expected", [("2.10.1", "fail"), ("2.11.0+cu130", "ok"), ("2.16.0", "warn")])
def test_torch_range(version: str, expected: str, tmp_path: Path) -> None:
    fake = f"""
import types
__version__ = {version!r}
version = types.SimpleNamespace(cuda=None)
cuda = types.SimpleNamespace(is_available=lambda: False)
ops = types.SimpleNamespace(flashcore=object())
def get_num_threads(): return 2
"""
    _, checks = report(module(tmp_path, "torch", fake), package_with(tmp_path, None))
    assert checks["torch"].status == expected
    assert version in checks["torch"].detail
    assert checks["extension"].status == "fail"
    assert "expected the compiled library _C.so" in checks["extension"].detail


def test_ranges_are_those_of_the_package() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert f"torch>={doctor.TORCH_OLDEST},<{doctor.TORCH_BELOW}" in text
    assert f"sglang>={compat.OLDEST},<={compat.NEWEST}" in text
    for group, name in doctor.ENTRY_POINTS.items():
        assert re.search(rf'entry-points."{re.escape(group)}"\]\n{name} =', text)


@pytest.mark.parametrize("damage", ["garbage", "truncated"])
def test_damaged_library(damage: str, tmp_path: Path) -> None:
    from flashcore_sglang._load import library_path

    library = b"not a library" * 100 if damage == "garbage" else library_path().read_bytes()[:20000]
    status, checks = report(package_with(tmp_path, library), PACKAGES)
    assert status == 1
    assert checks["extension"].status == "fail"
    assert str(tmp_path / "flashcore_sglang" / "_C.so") in checks["extension"].detail
    assert checks["extension"].fix
    assert checks["self-test"] == Check("self-test", "skip", "needs the extension")
    assert checks["config"].status == "ok"


@pytest.mark.parametrize(
    "version, expected", [("0.5.16", "fail"), ("0.5.17", "ok"), ("0.5.23", "ok"), ("0.6.0", "fail")]
)
def test_sglang_range(version: str, expected: str, tmp_path: Path) -> None:
    status, checks = report(distribution(tmp_path, "sglang", version), ROOT)
    assert status == 1  # there is no torch
    assert checks["sglang"].status == expected
    assert checks["sglang"].detail == f"{version} (supported: 0.5.17 to 0.5.23)"
    assert checks["entry point flashcore"].status == "fail", "SGLang is there and does not see the plugin"


REGISTERED = "[sglang.srt.plugins]\nflashcore = x:y\n[sglang.srt.platforms]\nflashcore_cpu = x:z\n"


@pytest.mark.parametrize(
    "env, expected",
    [
        ({}, ("ok", "ok")),
        ({"SGLANG_PLUGINS": "flashcore,flashcore_cpu"}, ("ok", "ok")),
        ({"SGLANG_PLUGINS": "flashcore"}, ("ok", "warn")),
        ({"SGLANG_PLUGINS": "__none__"}, ("warn", "warn")),
    ],
)
def test_entry_points(env: dict[str, str], expected: tuple[str, str], tmp_path: Path) -> None:
    _, checks = report(distribution(tmp_path, "other", "1.0", REGISTERED), ROOT, **env)
    found = [checks["entry point flashcore"], checks["entry point flashcore_cpu"]]
    assert tuple(check.status for check in found) == expected
    assert all(check.fix.startswith("unset SGLANG_PLUGINS") for check in found if check.status == "warn")


def test_bad_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHCORE_POLICI", "topk")
    (check,) = doctor.configuration()
    assert check.status == "fail"
    assert "FLASHCORE_POLICI; did you mean FLASHCORE_POLICY?" in check.detail


def test_configuration_names_what_was_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHCORE_CONFIG", "wmma")
    assert list(doctor.configuration()) == [Check("config", "ok", "variant=wmma_sm80 (preset wmma)")]


def test_a_probe_that_raises_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def some_probe() -> list[Check]:
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(doctor, "PROBES", {"some probe": some_probe, "python": probes.python})
    failed, after = doctor.diagnose()
    assert failed.name == "some probe"
    assert (failed.status, failed.detail) == ("fail", "RuntimeError: first line second line")
    assert after.name == "python"


def program(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_toolchain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path, "nvcc", "echo 'Cuda compilation tools, release 12.4, V12.4.131'")
    program(tmp_path, "g++", "echo 'g++ (Debian) 12.2.0'")
    program(tmp_path, "cmake", "echo 'libssl.so: cannot open' >&2; exit 127")
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "ninja").write_bytes(b"\x7fELF cut off")
    (tmp_path / "ninja").chmod(0o755)
    nvcc, gxx, cmake, ninja = probes.toolchain()
    assert (nvcc.status, nvcc.fix) == ("warn", "install the CUDA toolkit 13 to build from source")
    assert (gxx.status, gxx.detail) == ("ok", f"12.2.0 ({tmp_path}/g++)")
    assert (cmake.status, cmake.detail) == ("warn", f"{tmp_path}/cmake --version: exit 127, libssl.so: cannot open")
    assert (ninja.status, ninja.fix) == ("warn", "install ninja again, or take it off PATH")
    assert "Exec format error" in ninja.detail
    monkeypatch.setenv("PATH", "")
    assert {check.status for check in probes.toolchain()} == {"skip"}


def test_stub_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stubs = tmp_path / "lib64" / "stubs"
    stubs.mkdir(parents=True)
    (stubs / "libcuda.so").touch()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("LD_LIBRARY_PATH", "")
    (found,) = probes.stub_libraries()
    assert found.status == "ok"
    assert str(stubs / "libcuda.so") in found.detail
    monkeypatch.setenv("LD_LIBRARY_PATH", f"{stubs}:{tmp_path}/gone:")
    on_path, dangling = probes.stub_libraries()
    assert on_path.status == "fail"
    assert f"remove {stubs} from LD_LIBRARY_PATH" in on_path.fix
    assert (dangling.status, dangling.detail) == ("warn", f"no such folder: {tmp_path}/gone")


class FakeDriver:
    """libcuda with one GPU, as far as the probe asks it."""

    def __init__(self, status: int = 0, version: int = 13000, capability: tuple[int, int] = (9, 0)) -> None:
        self.status, self.version, self.capability = status, version, capability

    def cuInit(self, flags: int) -> int:  # noqa: N802
        return self.status

    def __getattr__(self, name: str) -> Callable[..., int]:
        values = {"cuDriverGetVersion": self.version, "cuDeviceGetCount": 1, "cuGetErrorString": b"some error"}

        def call(*arguments: Any) -> int:
            target = arguments[1] if name == "cuGetErrorString" else arguments[0]
            if name == "cuDeviceGetAttribute":
                target._obj.value = self.capability[arguments[1] - 75]
            elif name == "cuDeviceGetName":
                target.value = b"Some GPU"
            elif name in values:
                target._obj.value = values[name]
            return 0

        return call


DRIVERS = [
    (FakeDriver(), {"driver": "ok", "gpu 0": "ok"}, "Some GPU, sm_90"),
    (FakeDriver(capability=(7, 5)), {"driver": "ok", "gpu 0": "warn"}, "compute capability 8.0 or newer"),
    (FakeDriver(version=12080), {"driver": "fail", "gpu 0": "ok"}, "install a driver for CUDA 13"),
    (FakeDriver(status=100), {"driver": "skip"}, "cuInit finds no GPU"),
    (FakeDriver(status=34), {"driver": "fail"}, "a stub library was loaded: see `stub libraries`"),
    (FakeDriver(status=999), {"driver": "fail"}, "cuInit: 999 some error"),
]


@pytest.mark.parametrize("driver, statuses, words", DRIVERS)
def test_driver(driver: FakeDriver, statuses: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes.ctypes, "CDLL", lambda name: driver)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    checks = list(probes.driver())
    assert {check.name: check.status for check in checks} == statuses
    assert any(words in f"{check.detail} {check.fix}" for check in checks)


def test_a_gpu_that_torch_does_not_see(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes.ctypes, "CDLL", lambda name: FakeDriver())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    *_, last = probes.driver()
    assert (last.name, last.status) == ("gpu in torch", "warn")
    assert "CUDA_VISIBLE_DEVICES is ''" in last.detail
    assert last.fix.startswith("unset CUDA_VISIBLE_DEVICES")


def test_loaded_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    maps = tmp_path / "maps"
    row = "7f00-7f01 r-xp 00000000 08:01 42   {}\n"
    loaded = tmp_path / "env" / "libcudart.so.13"
    other = tmp_path / "old" / "libcudart.so.12"
    for library in (loaded, other):
        library.parent.mkdir()
        library.touch()
    monkeypatch.setenv("LD_LIBRARY_PATH", str(loaded.parent))
    maps.write_text(row.format(loaded) * 2)
    cudart, cublaslt = probes.loaded_libraries(maps)
    assert (cudart.status, cudart.fix) == ("ok", "")
    assert str(loaded) in cudart.detail
    assert cublaslt.status == "skip"
    monkeypatch.setenv("LD_LIBRARY_PATH", str(other.parent))
    cudart, _ = probes.loaded_libraries(maps)
    assert cudart.status == "warn"
    assert cudart.fix.startswith(f"MISMATCH: LD_LIBRARY_PATH names {other}")
    maps.write_text(row.format(loaded) + row.format(other))
    cudart, _ = probes.loaded_libraries(maps)
    assert cudart.fix.startswith("MISMATCH: two copies in one process")


def test_self_test_fails_on_wrong_values(monkeypatch: pytest.MonkeyPatch) -> None:
    from flashcore_sglang._load import load_library
    from flashcore_sglang.paged_attention import PagedAttention

    load_library()  # as the extension's check does before
    right = PagedAttention.run
    monkeypatch.setattr(PagedAttention, "run", lambda *args, out: right(*args, out=out).add_(1e-2))
    checks = [check for check in doctor.self_test() if "max error" in check.detail]
    assert checks
    assert {check.status for check in checks} == {"fail"}
    assert all("report it" in check.fix for check in checks)


def test_healthy_machine() -> None:
    checks = {check.name: check for check in doctor.diagnose()}
    assert [check for check in checks.values() if check.status == "fail"] == []
    assert checks["variant cpu"].status == "ok"
    for name in ("self-test cpu decode", "self-test cpu prefill"):
        assert checks[name].status == "ok"
    read, dense = map(int, re.findall(r"\d+", checks["self-test cpu shared prefix"].detail))
    assert (read, dense) == (256 + 8, 8 * 257)


def test_operators_that_a_stale_library_lacks_are_all_asked_for() -> None:
    assert set(ops.NAMES) <= set(doctor.OPS)
