#!/usr/bin/env bash
# Starts an SGLang server whose attention is flashcore_sparse, after setting up all that it needs. Flags are SGLang's:
#   scripts/serve.sh --model-path meta-llama/Llama-3.1-8B-Instruct --page-size 64
# Without --model-path it serves a small Llama of random weights, made on the spot; without a GPU it serves on the CPU.
set -euo pipefail
source "$(dirname "$0")/setup.sh"

make_environment .venv 0.5.17 ''

flags=(--attention-backend flashcore_sparse)
if ! .venv/bin/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  say "No NVIDIA GPU: serving on the CPU platform"
  export SGLANG_PLATFORM=flashcore_cpu TRITON_INTERPRET=1
  flags+=(--device cpu)
fi
if [[ " $*" != *" --model"* ]]; then
  [ -f .cache/small-llama/config.json ] || .venv/bin/python scripts/make_model.py .cache/small-llama
  # Left to itself SGLang would give the KV cache of a small model most of the memory.
  flags+=(--model-path .cache/small-llama --max-total-tokens 131072 --max-running-requests 64)
fi

port=$(sed -nE 's/.*--port[= ]([0-9]+).*/\1/p' <<<"$*")
url=http://127.0.0.1:${port:-30000}

# Ends with the server, which takes over this process below.
show_request_when_ready() {
  until curl --silent --fail "$url/health" >/dev/null; do
    sleep 3
    kill -0 $$ 2>/dev/null || exit 0
  done
  say "Ready. Ask it something:"
  echo "curl $url/generate -H 'Content-Type: application/json' \\"
  echo "  -d '{\"text\": \"t1 t2 t3\", \"sampling_params\": {\"max_new_tokens\": 16, \"temperature\": 0}}'"
}

show_request_when_ready &
exec .venv/bin/python -m sglang.launch_server "${flags[@]}" "$@"
