"""The distribution as users meet it: metadata, entry points, a light import, and errors of the loader that help."""

import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import flashcore_sglang
from flashcore_sglang._load import LibraryError, library_path, load_library

DISTRIBUTION = metadata.distribution("flashcore-sglang")


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def test_metadata() -> None:
    assert DISTRIBUTION.version == flashcore_sglang.__version__
    assert DISTRIBUTION.metadata["License-Expression"] == "Apache-2.0"
    assert "Tag: py3-none-" in (DISTRIBUTION.read_text("WHEEL") or "")


def test_dependencies() -> None:
    required = [line for line in DISTRIBUTION.requires or [] if "extra ==" not in line]
    names = {re.split(r"[<>=]", line)[0] for line in required}
    assert names == {"torch", "pydantic", "pydantic-settings", "PyYAML", "rich"}


def test_licence_is_shipped() -> None:
    shipped = [file for file in DISTRIBUTION.files or [] if file.name == "LICENSE"]
    assert len(shipped) == 1
    assert "Apache License" in shipped[0].read_text()


def test_entry_points() -> None:
    entries = {(entry.group, entry.name): entry.value for entry in DISTRIBUTION.entry_points}
    assert entries == {
        ("sglang.srt.plugins", "flashcore"): "flashcore_sglang.plugin:register",
        ("sglang.srt.platforms", "flashcore_cpu"): "flashcore_sglang.plugin:activate_cpu_platform",
        ("console_scripts", "flashcore"): "flashcore_sglang.cli:main",
    }
    assert all(callable(entry.load()) for entry in DISTRIBUTION.entry_points)


def test_console_script() -> None:
    script = shutil.which("flashcore", path=str(Path(sys.executable).parent))
    assert script, "the install made no flashcore command"
    assert "doctor" in subprocess.run([script, "--help"], check=True, capture_output=True, text=True).stdout


def test_import_is_light() -> None:
    """Nothing heavy at import: no torch, no SGLang, and so no CUDA context and no library."""
    code = "import sys, flashcore_sglang; print(sorted({'torch', 'sglang', 'pydantic', 'rich'} & set(sys.modules)))"
    assert run_python(code) == "[]"


def test_plugin_import_loads_no_library_and_no_cuda() -> None:
    """SGLang imports the plugin in every process, before it chooses devices."""
    code = (
        "import flashcore_sglang.plugin, sys, pathlib\n"
        "torch = sys.modules.get('torch')\n"
        "assert torch is None or not torch.cuda.is_initialized()\n"
        "print('_C.so' in pathlib.Path('/proc/self/maps').read_text().replace('torch/_C', ''))\n"
    )
    assert run_python(code) == "False"


def test_a_missing_library_names_the_folder_and_the_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flashcore_sglang, "__path__", [str(tmp_path)])
    with pytest.raises(LibraryError, match=rf"_C\.so in {tmp_path}.*pip install --no-build-isolation"):
        library_path()


def test_a_library_for_another_torch_says_which_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "other.cpp"
    source.write_text('extern "C" int aoti_torch_of_the_future();\nint f() { return aoti_torch_of_the_future(); }\n')
    subprocess.run(["c++", "-shared", "-fPIC", "-o", tmp_path / "_C.so", source], check=True)
    monkeypatch.setattr(flashcore_sglang, "__path__", [str(tmp_path)])
    with pytest.raises(LibraryError, match=r"undefined symbol: aoti_torch_of_the_future.*install torch>=2\.11"):
        load_library.__wrapped__()


def test_a_broken_library_says_to_build_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "_C.so").write_bytes(b"not a library")
    monkeypatch.setattr(flashcore_sglang, "__path__", [str(tmp_path)])
    with pytest.raises(LibraryError, match=r"did not load with torch .*Build the library again"):
        load_library.__wrapped__()
