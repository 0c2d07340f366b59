#!/usr/bin/env bash
# Starts an SGLang server whose attention is flashcore_sparse, after setting up all that it needs. Flags are SGLang's:
#   scripts/serve.sh --model-path meta-llama/Llama-3.1-8B-Instruct --page-size 64
# Without --model-path it serves a small model that answers questions about long texts, reading few of their pages;
# without a GPU it serves on the CPU.
set -euo pipefail
source "$(dirname "$0")/setup.sh"

make_environment .venv 0.5.17 ''

flags=(--attention-backend flashcore_sparse)
if ! .venv/bin/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  say "No NVIDIA GPU: serving on the CPU platform"
  export SGLANG_PLATFORM=flashcore_cpu TRITON_INTERPRET=1
  flags+=(--device cpu)
fi
example=
if [[ ! " $* " =~ " --model"(-path)?[=\ ] ]]; then
  example=.cache/retrieval-model
  .venv/bin/python -m flashcore_sglang.examples.retrieval_model "$example" >/dev/null
  answer=$(.venv/bin/python -m flashcore_sglang.eval.prompt "$example" .cache/question.json 2>/dev/null)
  # Left to itself SGLang would give the KV cache of a small model most of the memory.
  flags+=(--model-path "$example" --max-total-tokens 131072 --max-running-requests 64 --enable-metrics)
  if [ -z "${FLASHCORE_CONFIG:-}${FLASHCORE_POLICY:-}" ]; then
    export FLASHCORE_POLICY=topk FLASHCORE_BUDGET_TOKENS=1024 FLASHCORE_DENSE_LAYERS=0
  fi
fi

port=$(sed -nE 's/.*--port[= ]([0-9]+).*/\1/p' <<<"$*")
url=http://127.0.0.1:${port:-30000}

# Ends with the server, which takes over this process below.
show_request_when_ready() {
  until curl --silent --fail "$url/health" >/dev/null; do
    sleep 3
    kill -0 $$ 2>/dev/null || exit 0
  done
  if [ "$example" ]; then
    say "Ready. Ask it about a text of 8192 tokens:"
    echo "curl -s $url/generate -H 'Content-Type: application/json' -d @.cache/question.json"
    echo "  expect: $answer"
    echo "curl -s $url/metrics | grep ^flashcore:kv_read_ratio"
    echo "  expect, under policy topk with a budget of 1024 tokens: about 0.125, the share of the KV cache that it read"
  else
    say "Ready. Ask it something:"
    echo "curl $url/generate -H 'Content-Type: application/json' \\"
    echo "  -d '{\"text\": \"The capital of France is\", \"sampling_params\": {\"max_new_tokens\": 16, \"temperature\": 0}}'"
  fi
}

show_request_when_ready &
exec .venv/bin/python -m sglang.launch_server "${flags[@]}" "$@"
