"""`flashcore bench`: kernels and servers against their peers, in one run on one machine."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    """Runs one benchmark, prints its tables and writes its JSON; or draws the picture of result files.

    Returns:
        The exit status: 0, 1 when a part of a run failed, 2 for a user's mistake.
    """
    args = _parser().parse_args(argv)
    try:
        return _plot(args) if args.what == "plot" else _measure(args)
    except (ValueError, ImportError) as error:
        print(f"flashcore bench {args.what}: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    from .e2e import WORKLOADS  # not peers, nor cases: they import torch, which plots and --help do without

    parser = argparse.ArgumentParser(prog="flashcore bench", description=__doc__)
    commands = parser.add_subparsers(dest="what", required=True)
    for name, suites, known in (
        ("decode", "quick grid shapes shared prompts", "fa3 flashinfer flashinfer_cascade"),
        ("prefill", "quick dense chunked", "fa3 fa3_paged flashinfer cudnn fa2"),
    ):
        kernel = commands.add_parser(name, help=f"{name} kernels (needs a GPU)")
        kernel.add_argument("--suite", nargs="+", default=["quick"], choices=suites.split(), help="cases to run")
        kernel.add_argument(
            "--variants", nargs="+", default=["auto"], help="flashcore variants, 'auto' is the chooser's"
        )
        _add_peers(kernel, known.split())
        kernel.add_argument("--repeats", type=int, default=20, help="timed runs of a cell")
        kernel.add_argument(
            "--flush",
            choices=["read", "write"],
            default="read",
            help="how the L2 is emptied before a run: by reading, as a server's weights do, or by writing, whose "
            "write-back is then measured, too, as in most published figures",
        )
        kernel.add_argument(
            "--order",
            choices=["turns", "runs"],
            default="turns",
            help="backends take turns, with cold instructions as in a server, or have their runs one after the other, "
            "as in most published figures",
        )
        _add_file(kernel)

    sparse = commands.add_parser("sparse", help="page selection and attention over the choice (needs a GPU)")
    _add_peers(sparse, ["fa3", "flashinfer"])
    sparse.add_argument("--repeats", type=int, default=20, help="timed runs of a cell")
    sparse.add_argument(
        "--model",
        help="as of e2e: then its servers, too, decode one and six requests of 129,000 tokens under topk-128k",
    )
    _add_servers(sparse)
    _add_file(sparse)

    server = commands.add_parser("e2e", help="a real SGLang server under load (needs a GPU)")
    server.add_argument("--model", required=True, help="folder with config.json and a tokenizer; weights are dummy")
    server.add_argument(
        "--backends",
        nargs="+",
        default=["fa3", "flashcore_sparse"],
        help="--attention-backend values; flashcore_sparse:PRESET is ours under FLASHCORE_CONFIG=PRESET",
    )
    server.add_argument(
        "--workloads", nargs="+", choices=WORKLOADS, default=["W1", "W2", "W3", "W4"], help="see bench/e2e.py"
    )
    server.add_argument("--max-running", type=int, default=512, help="concurrent requests of the server")
    _add_servers(server)
    _add_file(server)
    server.add_argument("server_flags", nargs="*", help="after --: further flags of the server")

    picture = commands.add_parser("plot", help="the picture of one kind of results")
    picture.add_argument("results", nargs="+", type=Path, help="result files of decode, prefill, or sparse and eval")
    picture.add_argument("-o", "--output", type=Path, required=True, help="picture.svg, or another format by its name")
    return parser


def _add_peers(command: argparse.ArgumentParser, known: list[str]) -> None:
    which = command.add_mutually_exclusive_group()
    which.add_argument("--peers", nargs="+", choices=known, default=known, help="what to measure beside ours")
    which.add_argument("--no-peers", dest="peers", action="store_const", const=[], help="none of them")


def _add_servers(command: argparse.ArgumentParser) -> None:
    command.add_argument("--port", type=int, default=30000, help="of the server")
    command.add_argument("--limit-s", type=float, default=300, help="seconds after which a workload counts as hung")
    command.add_argument("--logs", type=Path, default=Path("bench_logs"), help="folder for server and client logs")


def _add_file(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", type=Path, help="result file, written after each case")
    command.add_argument(
        "--resume", action="store_true", help="keep what --json has of this machine and measure what is missing"
    )


def _plot(args: argparse.Namespace) -> int:
    from . import plot

    plot.draw(args.results, args.output)
    return 0


def _measure(args: argparse.Namespace) -> int:
    from . import decode, e2e, prefill, results, sparse, timing
    from .cases import DECODE_SUITES, PREFILL_SUITES

    if args.resume and not args.json:
        raise ValueError("--resume: expected the file to go on with, got none; name it by --json")
    method = timing.Method(args.flush, args.order) if "flush" in args else timing.AS_IN_A_SERVER
    # In a server the model's own layers empty the L2.
    measured = results.Results(path=args.json, method={} if args.what == "e2e" else method.words)
    if args.resume:
        measured.resume()

    def serve(backends: list[str], workloads: list[str], max_running: int, flags: list[str]) -> list[str]:
        return e2e.run(
            measured, args.model, backends, workloads, max_running, args.logs, flags, args.limit_s, args.port
        )

    failures: list[str] = []
    try:
        if args.what == "decode":
            cases = [case for suite in args.suite for case in DECODE_SUITES[suite]]
            failures = decode.run(measured, cases, args.variants, args.peers, args.repeats, method)
        elif args.what == "prefill":
            shapes = [case for suite in args.suite for case in PREFILL_SUITES[suite]]
            failures = prefill.run(measured, shapes, args.variants, args.peers, args.repeats, method)
        elif args.what == "sparse":
            failures = sparse.run(measured, sparse.SPARSE_CASES, args.peers, args.repeats)
            if args.model:
                failures += serve([*args.peers, sparse.SERVED], sparse.WORKLOADS, sparse.MAX_RUNNING, [])
        else:
            failures = serve(args.backends, args.workloads, args.max_running, args.server_flags)
    finally:  # what was measured before an error or an interrupt counts, too
        measured.flush()
    shown = {"decode": ["time_us"], "sparse": ["time_us", "tpot_ms", "step_ms"], "prefill": ["tflops"]}
    for metric in shown.get(args.what, list(e2e.METRICS)):
        results.show(measured.rows, metric)
    for failure in failures:
        print(f"failed: {failure}", file=sys.stderr)
    return int(bool(failures))
