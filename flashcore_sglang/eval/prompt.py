"""Writes one request about a long document for `curl`, and prints the answer to expect.

python -m flashcore_sglang.eval.prompt MODEL FILE
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from flashcore_sglang.eval import tasks
from flashcore_sglang.eval.runner import TOKENS_PER_WORD, counter


def main() -> None:
    """Writes the body of a request to /generate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="whose tokenizer measures the document")
    parser.add_argument("file", type=Path)
    parser.add_argument("--task", choices=tasks.TASKS, default="needle")
    parser.add_argument("--length", type=int, default=8192, help="tokens (default: 8192)")
    options = parser.parse_args()
    prompt, question = next(tasks.make(options.task, options.length, counter(options.model), seed=0).prompts())
    sampling = {"temperature": 0, "max_new_tokens": TOKENS_PER_WORD * question.new_words}
    options.file.write_text(json.dumps({"text": prompt, "sampling_params": sampling}))
    print(f"{question.text} ... {' '.join(question.expected)}")


if __name__ == "__main__":
    main()
