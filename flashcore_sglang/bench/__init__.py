"""`flashcore bench`: kernels and servers against their peers, in one run on one machine."""

from __future__ import annotations

import argparse
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    """Runs one benchmark, prints its tables and writes its JSON.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(prog="flashcore bench", description=__doc__)
    commands = parser.add_subparsers(dest="what", required=True)
    for name, suites in (("decode", "quick grid shapes shared"), ("prefill", "quick dense chunked")):
        kernel = commands.add_parser(name, help=f"{name} kernels (needs a GPU)")
        kernel.add_argument("--suite", nargs="+", default=["quick"], choices=suites.split(), help="cases to run")
        kernel.add_argument(
            "--variants", nargs="+", default=["auto"], help="flashcore variants, 'auto' is the chooser's"
        )
        kernel.add_argument("--no-peers", action="store_true", help="leave FA3, FlashInfer and the others out")
        kernel.add_argument("--repeats", type=int, default=20, help="timed runs of a cell")
        kernel.add_argument("--json", type=Path, help="result file")
        if name == "decode":
            kernel.add_argument("--plot", help="picture: time against unique bytes")
    server = commands.add_parser("e2e", help="a real SGLang server under load (needs a GPU)")
    server.add_argument("--model", required=True, help="folder with config.json and a tokenizer; weights are dummy")
    server.add_argument("--backends", nargs="+", default=["fa3", "flashcore_sparse"], help="--attention-backend values")
    server.add_argument("--workloads", nargs="+", default=["W1", "W2", "W3", "W4"])
    server.add_argument("--max-running", type=int, default=512, help="concurrent requests of the server")
    server.add_argument("--logs", type=Path, default=Path("bench_logs"), help="folder for server and client logs")
    server.add_argument("--json", type=Path, help="result file")
    server.add_argument("server_flags", nargs="*", help="after --: further flags of the server")
    args = parser.parse_args(argv)

    from . import decode, e2e, prefill, results
    from .cases import DECODE_SUITES, PREFILL_SUITES

    measured = results.Results()
    try:
        if args.what == "decode":
            cases = [case for suite in args.suite for case in DECODE_SUITES[suite]]
            decode.run(measured, cases, args.variants, not args.no_peers, args.repeats)
        elif args.what == "prefill":
            shapes = [case for suite in args.suite for case in PREFILL_SUITES[suite]]
            prefill.run(measured, shapes, args.variants, not args.no_peers, args.repeats)
        else:
            e2e.run(measured, args.model, args.backends, args.workloads, args.max_running, args.logs, args.server_flags)
    finally:  # what was measured before an error or an interrupt counts, too
        if args.json:
            measured.save(args.json)
    for metric, digits in {"decode": {"time_us": 1}, "prefill": {"tflops": 0}}.get(
        args.what, dict.fromkeys(e2e.METRICS, 2)
    ).items():
        results.show(measured.rows, metric, digits)
    if args.what == "decode" and args.plot:
        decode.plot(measured, args.plot)
    return 0
