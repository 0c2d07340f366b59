"""`flashcore doctor`: can this machine run it, and if not, what to do.

Runs where torch, SGLang or the compiled library is missing or broken: the imports at the top are the standard
library's, and a probe that raises is a finding like any other.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from importlib import metadata, util
from typing import Any

from flashcore_sglang import compat, probes
from flashcore_sglang.probes import Check, Status

TORCH_OLDEST, TORCH_BELOW = "2.11", "2.16"
OPS = (
    "page_table",
    "plan",
    "attend",
    "summarize",
    "store",
    "select",
    "select_attend",
    "cublaslt_workspace",
    "cublaslt_plan",
    "build_info",
)
ENTRY_POINTS = {"sglang.srt.plugins": "flashcore", "sglang.srt.platforms": "flashcore_cpu"}
INSTALL = "in a checkout: pip install --no-build-isolation -e ."


def diagnose() -> list[Check]:
    """Runs every probe. One that raises becomes a failed check; the others run all the same."""
    checks: list[Check] = []
    for name, probe in PROBES.items():
        try:
            checks.extend(probe())
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            missing = isinstance(error, ImportError)
            checks.append(Check(name, "fail", reason, INSTALL if missing else "see the checks before this one"))
    return checks


def main(as_json: bool = False) -> int:
    """Prints the checks; the exit status is 1 when one failed."""
    checks = diagnose()
    failed = sum(check.status == "fail" for check in checks)
    if as_json:
        print(json.dumps({"ok": not failed, "checks": [asdict(check) for check in checks]}, indent=2))
        return int(failed > 0)
    width = max(len(check.name) for check in checks)
    for check in checks:
        print(f"{check.status:<5} {check.name:<{width}}  {check.detail}")
        if check.fix:
            print(f"{'':<5} {'':<{width}}  -> {check.fix}")
    warned = sum(check.status == "warn" for check in checks)
    print(f"\n{len(checks)} checks, {failed} failed, {warned} with a warning")
    return int(failed > 0)


def torch_package() -> Iterator[Check]:
    """Torch is there, imports, and lies in the range the library was loaded with."""
    fix = f"pip install 'torch>={TORCH_OLDEST},<{TORCH_BELOW}'"
    if util.find_spec("torch") is None:
        yield Check("torch", "fail", "not installed", fix)
        return
    try:
        import torch
    except (ImportError, OSError, AttributeError) as error:
        yield Check("torch", "fail", f"does not import: {error}", f"{fix} --force-reinstall")
        return
    detail = f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}, {torch.get_num_threads()} threads"
    version = _release(torch.__version__)
    if version < _release(TORCH_OLDEST):
        yield Check("torch", "fail", detail, fix)
    elif version >= _release(TORCH_BELOW):
        yield Check("torch", "warn", f"{detail}: newer than any release tried", fix)
    else:
        yield Check("torch", "ok", detail)


def extension() -> Iterator[Check]:
    """The compiled library loads and registers its operators."""
    from flashcore_sglang._load import LibraryError, library_path, load_library

    torch: Any = sys.modules.get("torch")
    if torch is None:
        yield Check("extension", "skip", "needs torch")
        return
    try:
        path = library_path()
        killed = _signal_of(load_library)
        if killed:
            fix = "the file is damaged: install or build it again (pip install --no-build-isolation -e .)"
            yield Check("extension", "fail", f"{path}: loading it ends the process with {killed}", fix)
            return
        load_library()
    except LibraryError as error:
        yield Check("extension", "fail", str(error), INSTALL)
        return
    missing = [name for name in OPS if not hasattr(torch.ops.flashcore, name)]
    if missing:
        detail = f"{path}: operators are missing: {', '.join(missing)}"
        yield Check("extension", "fail", detail, f"it is of another version; {INSTALL}")
        return
    info = json.loads(torch.ops.flashcore.build_info())
    cuda = f"CUDA kernels for {info['archs']}, nvcc {info['nvcc']}" if info["cuda"] else "CPU kernels only"
    yield Check("extension", "ok", f"{path}: {len(OPS)} operators, {cuda}, variants {', '.join(info['variants'])}")


def variants() -> Iterator[Check]:
    """Each variant: whether it runs on this machine, and why not."""
    from flashcore_sglang.variants import VARIANTS, device_of, unavailable

    if not _library_loads():
        yield Check("variants", "skip", "needs the extension")
        return
    devices = {name: device_of(name) for name in _devices()}
    preferred = devices.get("cuda", devices["cpu"])
    for variant in VARIANTS:
        device = devices.get(variant.device, preferred)
        reason = unavailable(variant, device)
        yield Check(f"variant {variant.name}", "skip" if reason else "ok", reason or f"runs on {device}")
    if all(unavailable(variant, preferred) for variant in VARIANTS):
        fix = "build the library on this machine with nvcc on PATH: pip install --no-build-isolation -e ."
        yield Check("variants", "fail", f"none runs on {preferred}", fix)


def sglang() -> Iterator[Check]:
    """SGLang is there and inside the supported range."""
    wanted = compat.INSTALL
    try:
        version = compat.installed_version()
    except compat.UnsupportedSGLangError:
        detail = "not installed: PagedAttention works without it, serving does not"
        yield Check("sglang", "warn", detail, wanted)
        return
    supported = f"{version} (supported: {compat.OLDEST} to {compat.NEWEST})"
    if compat.is_supported(version):
        yield Check("sglang", "ok", supported)
    else:
        yield Check("sglang", "fail", supported, wanted)


def entry_points() -> Iterator[Check]:
    """SGLang will find the plugin, and is not told to leave it out."""
    needed = util.find_spec("sglang") is not None
    allowed = [name.strip() for name in os.environ.get("SGLANG_PLUGINS", "").split(",") if name.strip()]
    for group, name in ENTRY_POINTS.items():
        values = sorted({point.value for point in metadata.entry_points(group=group) if point.name == name})
        if not values:
            status: Status = "fail" if needed else "warn"
            yield Check(f"entry point {name}", status, f"not registered in {group}: SGLang does not see it", INSTALL)
        elif allowed and name not in allowed:
            detail = f"SGLANG_PLUGINS={os.environ['SGLANG_PLUGINS']} leaves it out"
            fix = f"unset SGLANG_PLUGINS, or add {','.join(ENTRY_POINTS.values())} to it"
            yield Check(f"entry point {name}", "warn", detail, fix)
        else:
            yield Check(f"entry point {name}", "ok", f"{group}: {', '.join(values)}")


def configuration() -> Iterator[Check]:
    """The configuration in force can be used."""
    from flashcore_sglang import config

    try:
        loaded = config.load()
    except config.ConfigError as error:
        yield Check("config", "fail", str(error), "correct or unset it; `flashcore config show` prints the outcome")
        return
    changed = {field: source for field, source in config.sources().items() if source != "default"}
    words = [f"{field}={getattr(loaded, field)} ({source})" for field, source in changed.items()]
    yield Check("config", "ok", ", ".join(words) or "the defaults")


def self_test() -> Iterator[Check]:
    """Small paged attention on each device, against the same in fp64, and what sharing saves."""
    if not _library_loads():
        yield Check("self-test", "skip", "needs the extension")
        return
    from flashcore_sglang.selftest import run

    for device in _devices():
        for result in run(device):
            good = result.error <= result.bound
            detail = f"{result.variant}, max error {result.error:.2e} (at most {result.bound:.2e}), {result.ms:.0f} ms"
            fix = "" if good else "the kernels compute wrong values here: report it with the output of this command"
            yield Check(f"self-test {device} {result.name}", "ok" if good else "fail", detail, fix)
            if result.pages_dense:
                saved = f"{result.pages_read} pages read instead of {result.pages_dense}"
                shares = result.pages_read < result.pages_dense
                fix = "" if shares else "nothing was shared: report it with the output of this command"
                yield Check(f"self-test {device} shared prefix", "ok" if shares else "fail", saved, fix)


PROBES: dict[str, Callable[[], Iterable[Check]]] = {
    "python": probes.python,
    "toolchain": probes.toolchain,
    "stub libraries": probes.stub_libraries,
    "torch": torch_package,  # before the probes that look at what it loads
    "driver": probes.driver,
    "loaded libraries": probes.loaded_libraries,
    "cublaslt": probes.cublaslt,
    "extension": extension,
    "variants": variants,
    "sglang": sglang,
    "entry points": entry_points,
    "config": configuration,
    "self-test": self_test,
}


def _devices() -> list[str]:
    import torch

    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def _library_loads() -> bool:
    """Whether the extension is loaded in this process; its own check has said why not."""
    torch: Any = sys.modules.get("torch")
    return torch is not None and hasattr(torch.ops.flashcore, "build_info")


def _signal_of(action: Callable[[], object]) -> str:
    """Name of the signal that ends a child process which runs ``action``, or "": a truncated library is a SIGBUS."""
    child = os.fork()
    if child == 0:
        try:
            action()
        finally:
            os._exit(0)
    status = os.waitpid(child, 0)[1]
    return signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else ""


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in version.split("+")[0].split(".")[:2])
