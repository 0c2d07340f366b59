"""The `flashcore` command: argument parsing and tables. Each subcommand imports what it needs when it runs."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flashcore_sglang.variants import Device


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand and returns its exit status; a user's mistake is one line on stderr and status 2."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["bench"]:  # it has a parser of its own
        from flashcore_sglang import bench

        return bench.main(arguments[1:])
    if arguments[:1] == ["eval"]:  # and so has this
        options = argparse.Namespace(command="eval", run=_eval, arguments=arguments[1:])
    else:
        options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except (ValueError, ImportError) as error:  # ConfigError, UnsupportedError, a missing dependency
        print(f"flashcore {options.command}: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    from flashcore_sglang import __version__

    parser = argparse.ArgumentParser(prog="flashcore", description="Attention over paged KV caches, for SGLang.")
    parser.add_argument("--version", action="version", version=f"flashcore-sglang {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    doctor = commands.add_parser("doctor", help="check this machine; exit status 1 when something is broken")
    doctor.set_defaults(run=_doctor)

    variants = commands.add_parser("variants", help="what each kernel can compute, and which one a shape gets")
    variants.add_argument(
        "--shape", metavar="b16,h32,kv8,d128,page64,bf16[,prefill][,causal]", help="choose for this shape"
    )
    variants.add_argument("--variant", metavar="NAME", help="force one, as FLASHCORE_VARIANT does")
    variants.add_argument("--sm", metavar="9.0", help="for a GPU of this compute capability, instead of this machine")
    variants.set_defaults(run=_variants)

    config = commands.add_parser("config", help="the configuration in force")
    show = config.add_subparsers(dest="action", required=True).add_parser("show", help="every value and its source")
    show.set_defaults(run=_config_show)

    for command in (doctor, variants, show):
        command.add_argument("--json", action="store_true", help="print JSON")
    commands.add_parser("bench", help="time the kernels and a server beside their peers", add_help=False)
    commands.add_parser("eval", help="long-context tasks through a server: accuracy and KV read", add_help=False)
    return parser


def _doctor(options: argparse.Namespace) -> int:
    from flashcore_sglang import doctor

    return doctor.main(as_json=options.json)


def _eval(options: argparse.Namespace) -> int:
    from flashcore_sglang.eval import runner

    return runner.main(options.arguments)


def _config_show(options: argparse.Namespace) -> int:
    from flashcore_sglang import config

    loaded, sources = config.load(), config.sources()
    fields = {
        name: {"value": getattr(loaded, name), "source": sources[name], "description": field.description}
        for name, field in config.Config.model_fields.items()
    }
    if options.json:
        print(json.dumps(fields, indent=2))
    else:
        rows = [[name, *(_word(part) for part in field.values())] for name, field in fields.items()]
        _print_table(["field", "value", "source", "meaning"], rows)
    return 0


def _variants(options: argparse.Namespace) -> int:
    from flashcore_sglang import config
    from flashcore_sglang.variants import FEATURES, PHASES, VARIANTS, choose, describe, parse_shape, unavailable

    device, library_error = (_gpu(options.sm), "") if options.sm else _this_device()
    here = {variant.name: unavailable(variant, device) for variant in VARIANTS}
    report: dict[str, Any] = {
        "device": str(device),
        "variants": [{**asdict(variant), "unavailable": here[variant.name]} for variant in VARIANTS],
    }
    choice = None
    if options.shape:
        if library_error:
            raise ImportError(f"{library_error} (--sm 9.0 chooses for a GPU that is not here)")
        shape = parse_shape(options.shape)
        choice = choose(shape, device, options.variant or config.load().variant)
        report["choice"] = {"shape": describe(shape), **asdict(choice), "variant": choice.variant.name}
    if options.json:
        print(json.dumps(report, indent=2))
        return 0
    columns = ["variant", "device", "dtypes", "pages", "group", "decode d", "prefill d", "not for", f"on {device}"]
    rows = []
    for variant in VARIANTS:
        sm = f" {_sm(variant.min_sm)}..{_sm(variant.max_sm)}" if variant.min_sm else ""
        missing = [feature for feature in FEATURES if feature not in variant.features]
        heads = [_join(variant.tilings(phase)) or "-" for phase in PHASES]
        limits = [_join(variant.dtypes), _join(variant.page_sizes or ("any",)), f"1..{variant.max_group}"]
        row = [variant.name, variant.device + sm, *limits, *heads, _join(missing) or "-"]
        rows.append([*row, here[variant.name] or "available"])
    _print_table(columns, rows)
    if library_error:
        print(library_error)
    if choice:
        tiling = f"{choice.tiling.rows_per_tile} packed queries a tile, {choice.tiling.ctas_per_sm} CTAs on each SM"
        print(f"{describe(shape)} on {device}: {choice.variant.name} ({tiling})")
        print(f"  {choice.why}")
        for name, reason in choice.reasons:
            print(f"  not {name}: {reason}")
    return 0


def _gpu(sm: str) -> Device:
    """A GPU that is not here, with a library that holds every variant."""
    from flashcore_sglang.variants import BY_NAME, Device

    found = re.fullmatch(r"(\d+)\.?(\d)", sm)
    if not found:
        raise ValueError(f"--sm: expected a compute capability as in 9.0, got {sm!r}")
    return Device("cuda", frozenset(BY_NAME), sm=(int(found[1]), int(found[2])))


def _this_device() -> tuple[Device, str]:
    """The machine at hand; where torch or the library is missing a CPU without variants, and the reason."""
    from flashcore_sglang.variants import Device, device_of

    try:
        import torch

        return device_of("cuda" if torch.cuda.is_available() else "cpu"), ""
    except ImportError as error:  # LibraryError is one, too
        return Device("cpu", frozenset()), str(error)


def _print_table(columns: list[str], rows: list[list[str]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*row)
    console = Console() if sys.stdout.isatty() else Console(width=200)
    console.print(table)


def _word(value: object) -> str:
    """As a configuration file spells it."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _join(values: Iterable[object]) -> str:
    return " ".join(map(str, values))


def _sm(sm: tuple[int, int] | None) -> str:
    return f"{sm[0]}.{sm[1]}" if sm else ""
