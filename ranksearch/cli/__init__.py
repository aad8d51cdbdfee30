"""The command line, the only part that prints: each command calls the Python API and shows what it returns.

Exit codes: 0 done, 1 the search or check failed, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated

import typer

from ranksearch.cli import checking, comparing, finetuning, jobs, networks, searching, studies, watching
from ranksearch.cli.options import complain
from ranksearch.errors import BudgetError, ExportError, RanksearchError, RebuildError

app = typer.Typer(
    name="ranksearch",
    help="Find the best per-layer ranks for low-rank compression of a pretrained CNN: accuracy against GMACs.",
    epilog="Example: ranksearch search search_spaces/quickstart.yaml",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(version("ranksearch"))
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


_EXAMPLES: dict[Callable[..., None], str] = {
    searching.inspect: "inspect search_spaces/quickstart.yaml",
    searching.latency: "latency search_spaces/quickstart.yaml -o latencies.json --set latency.runtime=onnxruntime",
    searching.search: "search search_spaces/quickstart.yaml --set budget.trials=40 --study first",
    searching.resume: "resume first --trials 100",
    comparing.compare: "compare search_spaces/quickstart.yaml --strategies uniform,knapsack,optuna:tpe --seeds 2",
    studies.trials: "trials first --json",
    studies.front: "front first --html front.html",
    studies.export: "export first --max-macs-ratio 0.5 -o rank_map.json --save-weights compressed.safetensors",
    studies.publish: "publish first --knee --alias champion",
    networks.decompose: "decompose --model resnet20 --weights dense.safetensors --layer layer3.0.conv2 --plot e.png",
    networks.apply: "apply rank_map.json --to onnx -o compressed.onnx",
    networks.evaluate: "evaluate rank_map.json",
    networks.report: "report rank_map.json -o report.html",
    finetuning.finetune: "finetune rank_map.json --epochs 60 --baseline -o finetuned.json --workers 4",
    watching.dashboard: "dashboard first",
    studies.ui: "ui first --port 5001",
    jobs.submit: "submit search_spaces/quickstart.yaml --address http://127.0.0.1:8265 --follow",
    jobs.jobs: "jobs --address http://127.0.0.1:8265",
    jobs.status: "status ranksearch-quickstart-1a2b3c",
    jobs.logs: "logs -f ranksearch-quickstart-1a2b3c",
    jobs.stop: "stop ranksearch-quickstart-1a2b3c",
    checking.doctor: "doctor search_spaces/quickstart.yaml --address auto",
    searching.schema: "schema > space.schema.json",
}
for _command, _example in _EXAMPLES.items():
    app.command(epilog=f"Example: ranksearch {_example}")(_command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; always ends in ``SystemExit``.

    Args:
        arguments: instead of those of the process.
    """
    try:
        app(arguments, prog_name="ranksearch")
    except RanksearchError as error:
        complain(error)
        raise SystemExit(1 if isinstance(error, BudgetError | ExportError | RebuildError) else 2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except (OSError, FloatingPointError) as error:
        complain(error)
        raise SystemExit(1) from None
