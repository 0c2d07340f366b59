#!/usr/bin/env bash
# Sets up both ends of the supported SGLang range, then lints, and runs every test that this machine can run.
set -euo pipefail
source "$(dirname "$0")/setup.sh"

export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

make_environment .venv 0.5.17 '[dev]'

say "Lint"
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
git ls-files -z '*.h' '*.cpp' '*.cuh' '*.cu' | xargs -0 .venv/bin/clang-format --dry-run -Werror

# Two processes on one thread each are faster than one on two: most cases are too small for threads.
say "Unit tests, SGLang 0.5.17"
OMP_NUM_THREADS=1 .venv/bin/pytest -n 2 -m 'not server'

say "Server tests, SGLang 0.5.17"
.venv/bin/pytest -m server

# The same library, built against the oldest torch, under the newest SGLang and its torch.
TORCH_PYTHON=$PWD/.venv/bin/python make_environment .venv-newest 0.5.23 '[test]'

say "What depends on SGLang and torch, SGLang 0.5.23"
.venv-newest/bin/pytest tests/test_{abi,package,plugin,backend_kit,backend_inputs,paged_attention}.py \
  tests/server/test_{serving,policies,sliding_window,configurations}.py
