"""Finds the compiled library `_C.so` on the package's path and loads it once.

It is a library of torch operators on libtorch's stable ABI, not a Python module: nothing of it is tied to a version
of Python, and one build serves every supported torch.
"""

from functools import cache
from pathlib import Path

import flashcore_sglang

MIN_TORCH = "2.11"
BUILD_COMMAND = "pip install --no-build-isolation -e ."


class LibraryError(ImportError):
    """The compiled library is missing, or this torch cannot load it; the message says what to do."""


def library_path() -> Path:
    """Path of `_C.so`. An editable install has two folders on the package's path, so all of them are searched.

    Raises:
        LibraryError: no folder of the package holds the library.
    """
    folders = [Path(folder) for folder in flashcore_sglang.__path__]
    for folder in folders:
        library = folder / "_C.so"
        if library.is_file():
            return library
    searched = ", ".join(map(str, folders))
    raise LibraryError(
        f"flashcore_sglang: expected the compiled library _C.so in {searched}; it is in none of them. "
        f"Build it in a checkout with `{BUILD_COMMAND}` (torch, cmake, ninja and scikit-build-core must be installed)."
    )


@cache
def load_library() -> Path:
    """Loads the library, which registers `torch.ops.flashcore`, and returns its path. Later calls do nothing.

    Raises:
        LibraryError: the library is missing, or the loader refused it (its reason is in the message).
    """
    import torch

    library = library_path()
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        reason = str(error.__cause__ or error)  # torch keeps the loader's own words in the cause
        raise LibraryError(_explain(library, reason, torch.__version__)) from error
    return library


def _explain(library: Path, reason: str, torch_version: str) -> str:
    """One message for a refused library: what the loader said, and the next action."""
    if "undefined symbol" in reason:
        action = (
            f"Its symbols are those of torch {MIN_TORCH}: install torch>={MIN_TORCH}, or, where torch is newer than "
            f"that, build the library again with `{BUILD_COMMAND}`."
        )
    elif "cannot open shared object" in reason:
        action = "A library that it needs is missing: install it, or torch again, which brings libtorch.so."
    else:
        action = f"Build the library again with `{BUILD_COMMAND}`."
    return f"flashcore_sglang: {library} did not load with torch {torch_version}: {reason}. {action}"
