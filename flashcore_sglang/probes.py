"""What the doctor asks the machine: platform, toolchain, libraries, driver, cuBLASLt. Nothing but the standard library.

A probe returns checks. It may raise: the doctor turns whatever it raises into a failed check of its own.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Status = Literal["ok", "warn", "fail", "skip"]


@dataclass(frozen=True)
class Check:
    """One finding. ``fix`` says what to do, where there is something to do."""

    name: str
    status: Status
    detail: str
    fix: str = ""


def python() -> Iterator[Check]:
    """The interpreter and the system under it."""
    version = platform.python_version()
    detail = f"Python {version} ({sys.executable}), {platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    linux = platform.system() == "Linux"
    fix = "" if linux else "use Linux: the library is built for no other system"
    yield Check("python", "ok" if linux else "fail", detail, fix)


def toolchain() -> Iterator[Check]:
    """The programs that building from source takes; an installed wheel needs none of them."""
    for tool, needed_for in (
        ("nvcc", "the CUDA kernels"),
        ("g++", "the library"),
        ("cmake", "the library"),
        ("ninja", "the library"),
    ):
        path = shutil.which(tool)
        if path is None:
            yield Check(f"toolchain {tool}", "skip", f"not on PATH; only a build of {needed_for} from source needs it")
            continue
        version, failure = _version_of(path)
        if failure:
            fix = f"install {tool} again, or take it off PATH"
            yield Check(f"toolchain {tool}", "warn", f"{path} --version: {failure}", fix)
        elif tool == "nvcc" and int(version.split(".")[0]) < 13:
            fix = "install the CUDA toolkit 13 to build from source"
            yield Check("toolchain nvcc", "warn", f"{version} ({path})", fix)
        else:
            yield Check(f"toolchain {tool}", "ok", f"{version} ({path})")


def _version_of(program: str) -> tuple[str, str]:
    """What a program says its version is, or why it does not."""
    try:
        run = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return "", str(error)
    found = re.search(r"(?:release |version )?(\d+\.\d+(?:\.\d+)?)", run.stdout)
    if run.returncode == 0 and found:
        return found[1], ""
    said = (run.stderr or run.stdout).strip().splitlines() or ["no output"]
    return "", f"exit {run.returncode}, {said[0]}"


def stub_libraries() -> Iterator[Check]:
    """Stand-ins of libcuda are for linking; loaded in place of the driver, they fail at the first call."""
    places = ("lib64/stubs/libcuda.so", "targets/*/lib/stubs/libcuda.so")
    stubs = [path for root in toolkits() for place in places for path in root.glob(place)]
    on_path = [entry for entry in library_path() if (Path(entry) / "libcuda.so").is_file() and "stubs" in entry]
    dangling = [entry for entry in library_path() if not Path(entry).is_dir()]
    detail = ", ".join(map(str, stubs)) or "none; nothing here links libcuda"
    if on_path:
        fix = f"remove {', '.join(on_path)} from LD_LIBRARY_PATH: the driver's own libcuda.so.1 must be found"
        yield Check("stub libraries", "fail", f"on LD_LIBRARY_PATH: {', '.join(on_path)}", fix)
    else:
        yield Check("stub libraries", "ok", detail)
    if dangling:
        detail = f"no such folder: {', '.join(dangling)}"
        yield Check("LD_LIBRARY_PATH", "warn", detail, "remove the entries, or mount what they name")


def loaded_libraries(memory_map: Path = Path("/proc/self/maps")) -> Iterator[Check]:
    """Which file of each CUDA library this process loaded, beside the ones that lie around."""
    maps = memory_map.read_text()
    for name in ("libcudart", "libcublasLt"):
        loaded = sorted(set(re.findall(rf"(/\S*/{name}\.so\S*)", maps)))
        found = [path for folder in search_folders() for path in sorted(folder.glob(f"{name}.so.*"))]
        preferred = [path for entry in library_path() for path in sorted(Path(entry).glob(f"{name}.so.*"))]
        others = [path for path in dict.fromkeys(path.resolve() for path in found) if str(path) not in loaded]
        detail = f"loaded {', '.join(loaded) or 'none'}; also found {', '.join(map(str, others)) or 'none'}"
        fix = ""
        if len(loaded) > 1:
            fix = "MISMATCH: two copies in one process; keep one of them (LD_LIBRARY_PATH, or a package to uninstall)"
        elif loaded and preferred and str(preferred[0].resolve()) not in loaded:
            fix = f"MISMATCH: LD_LIBRARY_PATH names {preferred[0]}, another is loaded; remove the entry"
        yield Check(f"loaded {name}", "warn" if fix else "ok" if loaded else "skip", detail, fix)


def driver() -> Iterator[Check]:
    """The driver, asked itself: nvidia-smi may be missing where the GPU works."""
    smi = "" if shutil.which("nvidia-smi") else "; nvidia-smi is not installed"
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        yield Check("driver", "skip", f"no libcuda.so.1 ({error}){smi}: the CPU kernels are used")
        return
    status = cuda.cuInit(0)
    if status == 100:
        yield Check("driver", "skip", f"cuInit finds no GPU{smi}: the CPU kernels are used")
        return
    if status != 0:
        text = ctypes.c_char_p()
        cuda.cuGetErrorString(status, ctypes.byref(text))
        stub = "a stub library was loaded: see `stub libraries`; " if status == 34 else ""
        fix = f"{stub}check that the driver is loaded and the container sees the GPU"
        yield Check("driver", "fail", f"cuInit: {status} {(text.value or b'unknown').decode()}{smi}", fix)
        return
    version, count = ctypes.c_int(), ctypes.c_int()
    cuda.cuDriverGetVersion(ctypes.byref(version))
    cuda.cuDeviceGetCount(ctypes.byref(count))
    supported = f"CUDA {version.value // 1000}.{version.value % 1000 // 10}"
    old = version.value < 13000
    fix = "install a driver for CUDA 13 (580 or newer): the kernels are built with it" if old else ""
    yield Check("driver", "fail" if old else "ok", f"supports {supported}, {count.value} GPU{smi}", fix)
    for index in range(count.value):
        device, name = ctypes.c_int(), ctypes.create_string_buffer(128)
        cuda.cuDeviceGet(ctypes.byref(device), index)
        cuda.cuDeviceGetName(name, len(name), device)
        major, minor = ctypes.c_int(), ctypes.c_int()
        cuda.cuDeviceGetAttribute(ctypes.byref(major), 75, device)  # COMPUTE_CAPABILITY_MAJOR
        cuda.cuDeviceGetAttribute(ctypes.byref(minor), 76, device)  # COMPUTE_CAPABILITY_MINOR
        detail = f"{name.value.decode()}, sm_{major.value}{minor.value}"
        if major.value < 8:
            fix = "use a GPU of compute capability 8.0 or newer; on this one only the CPU kernels run"
            yield Check(f"gpu {index}", "warn", detail, fix)
        else:
            yield Check(f"gpu {index}", "ok", detail)
    torch: Any = sys.modules.get("torch")
    if count.value and torch is not None and not torch.cuda.is_available():
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        detail = f"torch {torch.__version__} sees none of them: CUDA_VISIBLE_DEVICES is {hidden!r}"
        fix = "unset CUDA_VISIBLE_DEVICES, or install a torch that is built for CUDA 13; the CPU kernels are used"
        yield Check("gpu in torch", "warn", detail, fix)


def cublaslt() -> Iterator[Check]:
    """The version of libcublasLt and, on a GPU, one small product through it."""
    found = open_cublaslt()
    if found is None:
        fix = "pip install nvidia-cublas, or put the toolkit's lib64 on LD_LIBRARY_PATH; only variant cublaslt needs it"
        yield Check("cublaslt", "warn", "libcublasLt.so.13 was not found", fix)
        return
    library, origin = found
    library.cublasLtGetVersion.restype = ctypes.c_size_t
    version = library.cublasLtGetVersion()
    yield Check("cublaslt", "ok", f"version {version} ({origin})")
    torch: Any = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        yield Check("cublaslt matmul", "skip", "no GPU that torch can use")
        return
    yield Check("cublaslt matmul", *_matmul(library, torch))


def open_cublaslt() -> tuple[ctypes.CDLL, str] | None:
    """libcublasLt: the copy that is loaded already, else the first that is found."""
    try:
        return ctypes.CDLL("libcublasLt.so.13", mode=os.RTLD_NOLOAD | os.RTLD_LAZY), "already loaded"
    except OSError:
        names = ["libcublasLt.so.13", *(str(folder / "libcublasLt.so.13") for folder in search_folders())]
    for name in names:
        try:
            return ctypes.CDLL(name, mode=os.RTLD_LAZY), name
        except OSError:
            continue
    return None


def _matmul(library: ctypes.CDLL, torch: Any) -> tuple[Status, str, str]:
    """A 64 x 64 fp16 product of small whole numbers, which fp16 holds exactly."""
    n, handle, operation, layout = 64, ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p()
    a, b = (torch.randint(-2, 3, (n, n), device="cuda", dtype=torch.int32).half() for _ in range(2))
    out = torch.full((n, n), float("nan"), device="cuda", dtype=torch.float16)
    one, zero = ctypes.c_float(1), ctypes.c_float(0)
    compute_32f, real_32f, real_16f = 68, 0, 2
    factors = [argument for x in (a, b) for argument in (ctypes.c_void_p(x.data_ptr()), layout)]
    product = [ctypes.c_void_p(out.data_ptr()), layout]
    defaults = (None, None, ctypes.c_size_t(0), None)  # algorithm, workspace and its size, stream
    calls: list[tuple[str, tuple[Any, ...]]] = [
        ("cublasLtCreate", (ctypes.byref(handle),)),
        ("cublasLtMatmulDescCreate", (ctypes.byref(operation), compute_32f, real_32f)),
        (
            "cublasLtMatrixLayoutCreate",
            (ctypes.byref(layout), real_16f, ctypes.c_uint64(n), ctypes.c_uint64(n), ctypes.c_int64(n)),
        ),
        (
            "cublasLtMatmul",  # D = alpha A B + beta C, with C = D
            (handle, operation, ctypes.byref(one), *factors, ctypes.byref(zero), *product, *product, *defaults),
        ),
    ]
    torch.cuda.synchronize()
    for name, arguments in calls:
        status = getattr(library, name)(*arguments)
        if status != 0:
            return "fail", f"{name} returned status {status}", "use the libcublasLt that came with torch"
    torch.cuda.synchronize()
    library.cublasLtMatrixLayoutDestroy(layout)
    library.cublasLtMatmulDescDestroy(operation)
    library.cublasLtDestroy(handle)
    # Layouts are column-major, so that a row-major reader sees the factors exchanged.
    error = float((out.float() - b.float() @ a.float()).abs().max())
    if error != 0:
        return "fail", f"{n} x {n} fp16: maximum error {error}", "use the libcublasLt that came with torch"
    return "ok", f"{n} x {n} fp16, exact", ""


def library_path() -> list[str]:
    """The entries of LD_LIBRARY_PATH."""
    return [entry for entry in os.environ.get("LD_LIBRARY_PATH", "").split(":") if entry]


def toolkits() -> list[Path]:
    """CUDA toolkits of this machine, the ones that the environment names first."""
    named = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    found = [root.resolve() for root in [*named, *sorted(Path("/usr/local").glob("cuda*"))] if root.is_dir()]
    return list(dict.fromkeys(found))


def search_folders() -> list[Path]:
    """Where CUDA libraries may lie: the environment's folders, the packages beside torch, toolkits, the system."""
    packages = [folder for root in sys.path for folder in sorted(Path(root or ".").glob("nvidia/*/lib"))]
    system = [Path("/usr/lib/x86_64-linux-gnu"), Path("/usr/lib64")]
    folders = [*map(Path, library_path()), *packages, *(root / "lib64" for root in toolkits()), *system]
    return [folder for folder in dict.fromkeys(folders) if folder.is_dir()]
