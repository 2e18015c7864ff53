"""The `appliance` program: parsing only. Each command lives in a module of appliance.commands, imported when it runs, so that --help is instant."""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from collections.abc import Sequence
from typing import Final

from appliance import __version__

# Friendly flag -> (setting, metavar, help). Every other setting has `--section.key VALUE`.
ALIASES: Final = {
    "--model": ("model.path", "MODEL", "embedded, a Hugging Face folder, a GGUF file, dummy:FOLDER or a hub id"),
    "--served-name": ("model.served_name", "NAME", "the model's name in the API"),
    "--dtype": ("model.dtype", "TYPE", "auto, float32, bfloat16 or float16"),
    "--quantization": ("model.quantization", "FORM", "auto, none, int8, int4 or fp8"),
    "--context-length": ("model.context_length", "TOKENS", "longest prompt plus output of one sequence"),
    "--host": ("server.host", "ADDRESS", "address to bind; others than loopback need an API key"),
    "--port": ("server.port", "PORT", "TCP port; 0 takes a free one"),
    "--api-keys-file": ("server.api_keys_file", "FILE", "one name:key a line"),
    "--max-model-len": ("model.context_length", "TOKENS", "the same, by vLLM's name"),
    "--kv-cache-dtype": ("engine.kv_cache_dtype", "TYPE", "auto or fp8"),
    "--device": ("engine.device", "DEVICE", "auto, cpu or cuda"),
    "--max-num-seqs": ("engine.max_num_seqs", "COUNT", "most sequences in one step"),
    "--num-threads": ("engine.num_threads", "COUNT", "CPU compute threads"),
    "--state-dir": ("state_dir", "FOLDER", "folder of the model, the database, caches and the spool"),
    "--compat-metrics": ("metrics.compat", "NAMES", "serve metrics under vllm's or otel's names too, separated by commas"),
    "--scaling-mode": ("scaling.mode", "MODE", "off, advise, approve or act"),
    "--log-level": ("log.level", "LEVEL", "debug, info, warning or error"),
    "--log-format": ("log.format", "FORMAT", "auto, console or json"),
}
_DOTTED = re.compile(r"--([a-z_]+\.[a-z_.]+)(?:=(.*))?", re.DOTALL)


class _Override(argparse.Action):
    """Append (key, value, flag as typed) to `overrides`, in the order of the command line."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: object, option_string: str | None = None) -> None:
        flag, text = option_string or "", str(values)
        if flag == "--set":
            key, found, text = text.partition("=")
            if not found:
                parser.error(f"--set takes KEY=VALUE, not {key!r}")
            if key.startswith("--"):  # made from `--section.key VALUE`
                flag, key = key, key.removeprefix("--")
        else:
            key = ALIASES[flag][0]
        namespace.overrides = [*(getattr(namespace, "overrides", None) or []), (key, text, flag)]


def build_parser() -> argparse.ArgumentParser:
    """The whole command line. A namespace has `command`, and for commands with settings `config` and `overrides`."""
    parser = argparse.ArgumentParser(
        prog="appliance",
        description="Serve a large language model on this machine behind the OpenAI API, and measure everything it does.",
        epilog="`appliance COMMAND --help` tells a command's flags; docs/settings.md lists every setting.",
    )
    parser.add_argument("--version", action="version", version=f"appliance {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    settings = _settings_parser()

    commands.add_parser(
        "serve",
        parents=[settings],
        help="serve a model (the embedded one, unless told otherwise)",
        description="Fetch the model if need be, migrate the database, and serve until SIGINT or SIGTERM; then drain and leave with 0.",
    )
    config = commands.add_parser(
        "config",
        parents=[settings],
        help="print the settings in effect and where each came from",
        description="Print the settings in effect as TOML that can be loaded again, each with its source; secrets are masked.",
    )
    config.add_argument("--check", action="store_true", help="print nothing but problems; exit status 2 if there are any")
    config.add_argument("--markdown", action="store_true", help="print every setting with type, range and default (docs/settings.md)")
    plan = commands.add_parser(
        "plan",
        parents=[settings],
        help="tell whether a model fits, which context lengths and how many sequences, before loading it",
        description="Predict what a model takes of the device's memory from its config.json or GGUF header alone; no weight is read. Exit status 0 "
        "if it fits, 3 if `serve` would refuse it, with what to change.",
    )
    plan.add_argument("model_name", nargs="?", metavar="MODEL", help="as --model takes it; a folder needs no more than a config.json")
    plan.add_argument("--gpu-memory", metavar="BYTES", help="plan for an empty GPU of this memory (80GiB, 80GB, 80e9) instead of this machine's")
    plan.add_argument("--json", action="store_true", help="print the plan as JSON")
    _add_models(commands, settings)
    _add_db(commands, settings)
    _add_bench(commands)
    _add_top(commands)
    _add_report(commands, settings)
    commands.add_parser("version", help="print the versions of the appliance and what it stands on", description="Print versions, for bug reports.")
    return parser


def _settings_parser() -> argparse.ArgumentParser:
    """Flags of the commands that read the settings."""
    parser = argparse.ArgumentParser(add_help=False, argument_default=None)
    group = parser.add_argument_group("settings", "override the environment, which overrides the file; any setting: --section.key VALUE")
    group.add_argument("--config", metavar="FILE", help="TOML file; default: $APPLIANCE_CONFIG, if set")
    for flag, (_, metavar, text) in ALIASES.items():
        group.add_argument(flag, action=_Override, metavar=metavar, help=text, dest="overrides")
    group.add_argument("--set", action=_Override, metavar="KEY=VALUE", help="any setting by its key, such as engine.block_size=32", dest="overrides")
    return parser


def _add_models(commands: argparse._SubParsersAction[argparse.ArgumentParser], settings: argparse.ArgumentParser) -> None:
    models = commands.add_parser("models", help="list or fetch models of the state folder", description="The models kept in the state folder.")
    actions = models.add_subparsers(dest="action", metavar="ACTION", required=True, help="what to do")
    actions.add_parser("list", parents=[settings], help="models that are here", description="List the models in the state folder, with sizes.")
    actions.add_parser(
        "fetch",
        parents=[settings],
        help="fetch a model ahead of serving",
        description="Fetch the model that --model names (the embedded one by default) and print its path.",
    )


def _add_db(commands: argparse._SubParsersAction[argparse.ArgumentParser], settings: argparse.ArgumentParser) -> None:
    db = commands.add_parser(
        "db", help="upgrade, downgrade, check, vacuum or export the database", description="The SQL database of the ledger, samples and decisions."
    )
    actions = db.add_subparsers(dest="action", metavar="ACTION", required=True, help="what to do")
    actions.add_parser("upgrade", parents=[settings], help="bring the schema up to date", description="Run the migrations (`serve` does so itself).")
    downgrade = actions.add_parser(
        "downgrade",
        parents=[settings],
        help="take the schema back, for an older version",
        description="Undo migrations down to a revision. Stop every appliance of the database first. What the newer schema added is lost.",
    )
    downgrade.add_argument("revision", metavar="REVISION", help="such as 0001; `base` drops everything")
    actions.add_parser(
        "check",
        parents=[settings],
        help="tell whether the schema is current and the data sound",
        description="Exit status 0 if the schema is current and the database sound, 1 if it is not. Reads the whole of a SQLite file.",
    )
    actions.add_parser(
        "vacuum",
        parents=[settings],
        help="give back the space of purged rows",
        description="SQLite rewrites its file and needs as much free disk again; a server that writes meanwhile spools. PostgreSQL serves on.",
    )
    export = actions.add_parser(
        "export",
        parents=[settings],
        help="write a table or named query as CSV or Parquet",
        description="Tables: requests (the ledger), samples, samples_rollup, usage_rollup, usage_totals, scale_decisions, outbox, deliveries, "
        "engine_events. Queries: usage_by_key (with cost), usage_by_hour, slo_by_hour, busiest_hours, slowest_requests.",
    )
    export.add_argument("source", metavar="NAME", help="table or named query")
    export.add_argument("--format", choices=("csv", "parquet"), help="default: by the name of the file, else csv; parquet needs the extra `parquet`")
    export.add_argument("--output", metavar="FILE", help="default: standard output")
    export.add_argument("--since", metavar="TIME", help="24h or 7d ago, an ISO date or time (UTC), or Unix seconds; default: everything")
    export.add_argument("--until", metavar="TIME", help="the same; default: now")
    export.add_argument("--limit", metavar="ROWS", type=_at_least_one, help="most rows to write")


def _at_least_one(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
    return number


def _add_bench(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    from appliance.bench.options import add_options

    bench = commands.add_parser(
        "bench",
        help="measure an OpenAI-compatible server",
        description="Send bounded load to an OpenAI-compatible server and report throughput, TTFT, TPOT, ITL and end-to-end latency.",
    )
    add_options(bench)


def _add_top(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    from appliance.top.options import add_options

    top = commands.add_parser(
        "top",
        help="watch an appliance in the terminal",
        description="A live view of an appliance from its /metrics: throughput, latency, queue, KV cache, hardware, goodput, energy, last requests.",
    )
    add_options(top)


def _add_report(commands: argparse._SubParsersAction[argparse.ArgumentParser], settings: argparse.ArgumentParser) -> None:
    from appliance.report.options import add_options

    report = commands.add_parser(
        "report",
        parents=[settings],
        help="write what happened as one HTML file",
        description="Traffic, SLO, latency, incidents, capacity left, energy, usage and cost by key, slowest requests, scale decisions in one HTML "
        "file that works offline. Reads the database alone: no server needs to run.",
    )
    add_options(report)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The namespace of `argv`. Leaves through SystemExit on --help, --version and mistakes (status 2)."""
    return build_parser().parse_args(_with_dotted_flags(argv))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit status. 2 for a command line or settings that are wrong, 1 for what else went wrong, 130 for Ctrl-C."""
    arguments = parse(sys.argv[1:] if argv is None else argv)
    module = importlib.import_module(f"appliance.commands.{arguments.command}")
    from appliance.errors import ConfigError, ListenError, ModelError

    try:
        return int(module.run(arguments))
    except ConfigError as error:
        print(f"{len(error.problems)} problem{'s' if len(error.problems) > 1 else ''} in the settings; nothing was started:", file=sys.stderr)
        for problem in error.problems:
            print(f"  {problem.key} = {problem.value}  (from {problem.source})\n      allowed: {problem.allowed}", file=sys.stderr)
        return 2
    except (ModelError, ListenError) as error:
        print(f"appliance: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output has enough, as in `appliance config | head`
        sys.stderr.close()
        return 0


def _with_dotted_flags(argv: Sequence[str]) -> list[str]:
    """`--section.key VALUE` and `--section.key=VALUE` as `--set --section.key=VALUE`, which argparse can take without knowing every setting."""
    result: list[str] = []
    rest = iter(argv)
    for word in rest:
        match = _DOTTED.fullmatch(word)
        if match is None:
            result.append(word)
            continue
        value = match[2] if match[2] is not None else next(rest, None)
        if value is None:
            print(f"appliance: {word} takes a value", file=sys.stderr)
            raise SystemExit(2)
        result.append(f"--set=--{match[1]}={value}")
    return result


if __name__ == "__main__":
    sys.exit(main())
