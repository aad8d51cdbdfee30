"""Commands that read a study: trials, front, export, ui."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ranksearch.cli.options import AsCsv, AsJson, Storage, StudyName, console, say
from ranksearch.cli.progress import Reporter
from ranksearch.cli.tables import front_table, percent, records, trials_table
from ranksearch.errors import TrackingError

if TYPE_CHECKING:
    import pandas as pd


def trials(name: StudyName, as_json: AsJson = False, as_csv: AsCsv = False, storage: Storage = None) -> None:
    """Show every trial with its state and reason."""
    from ranksearch.launch import open_study

    _one_of("--json", as_json, "--csv", as_csv)
    study = open_study(name, storage=storage)
    if not _exported(study.trials_frame(), as_json, as_csv):
        console().print(trials_table(study))


def front(
    name: StudyName,
    as_json: AsJson = False,
    as_csv: AsCsv = False,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write an interactive page.")] = None,
    storage: Storage = None,
) -> None:
    """Show the Pareto front: accuracy on the report images with its 95 % interval, MACs, parameters."""
    from ranksearch.launch import open_study

    _one_of("--json", as_json, "--csv", as_csv, "--html", html is not None)
    study = open_study(name, storage=storage)
    if html is not None:
        from ranksearch.plots import front_html

        title = f"{study.name}: {study.setting.model.name}"
        page = front_html(study.trials_frame(), study.front(), dense=study.setting.dense, title=title)
        _write(html, page)
        say(f"Written: {html}")
    elif not _exported(study.front(), as_json, as_csv):
        console().print(front_table(study))


MaxMacsRatio = Annotated[
    float | None, typer.Option(min=0, max=1, help="The most accurate with at most this share of the MACs.")
]
MaxGmacs = Annotated[float | None, typer.Option(min=0, help="The same with at most so many GMACs.")]
MaxLatencyRatio = Annotated[
    float | None, typer.Option(min=0, max=1, help="The same with at most this share of the predicted latency.")
]
MaxDrop = Annotated[
    float | None, typer.Option(min=0, metavar="PP", help="The cheapest that loses at most so many points.")
]
Knee = Annotated[bool, typer.Option("--knee", help="The knee of the front.")]
TrialNumber = Annotated[int | None, typer.Option(min=0, metavar="N", help="The trial of this number.")]


def export(
    name: StudyName,
    max_macs_ratio: MaxMacsRatio = None,
    max_gmacs: MaxGmacs = None,
    max_latency_ratio: MaxLatencyRatio = None,
    max_drop: MaxDrop = None,
    knee: Knee = False,
    trial: TrialNumber = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The rank map to write.")] = Path("rank_map.json"),
    save_weights: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the compressed weights too (safetensors).")
    ] = None,
    storage: Storage = None,
) -> None:
    """Write the rank map of the trial that a rule picks, with its weights if asked to."""
    rule = _exactly_one(
        max_macs_ratio=max_macs_ratio,
        max_gmacs=max_gmacs,
        max_latency_ratio=max_latency_ratio,
        max_drop=max_drop,
        knee_point=knee,
        trial=trial,
    )
    from ranksearch.export import choose
    from ranksearch.handover import export_trial
    from ranksearch.storage import Store

    store = Store(storage)
    study = store.open(name)
    chosen = choose(study, **rule)
    with Reporter() as reporter:
        rank_map = export_trial(study, chosen, store, output, weights=save_weights, notify=reporter.notify)
    accuracy = rank_map.metrics.get("accuracy")
    shown = f"accuracy {percent(accuracy)} % (report images)" if accuracy is not None else "no report accuracy"
    latency = rank_map.metrics.get("latency_ms")
    timed = f", {latency:.3g} ms predicted" if latency is not None else ""
    say(
        f"Trial {chosen.number}: {shown}, {percent(rank_map.macs_ratio, 1)} % of the MACs, {rank_map.params:,} params"
        f"{timed}"
    )
    say(f"Written: {output}{f' and {save_weights}' if save_weights else ''}")


def _exactly_one(**rules: Any) -> dict[str, Any]:
    """The one rule that was given, as :func:`ranksearch.export.choose` takes it."""
    given = {name: value for name, value in rules.items() if value is not None and value is not False}
    if len(given) != 1:
        shown = {name: f"--{name.removesuffix('_point').replace('_', '-')}" for name in rules}
        found = ", ".join(shown[name] for name in given) or "none"
        raise typer.BadParameter(f"exactly one rule of {', '.join(shown.values())} must be given, found {found}")
    return given


def publish(
    name: StudyName,
    alias: Annotated[str, typer.Option(metavar="ALIAS", help="What the version is known as.")] = "champion",
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="The registered model; that of the network by default.")
    ] = None,
    max_macs_ratio: MaxMacsRatio = None,
    max_gmacs: MaxGmacs = None,
    max_latency_ratio: MaxLatencyRatio = None,
    max_drop: MaxDrop = None,
    knee: Knee = False,
    trial: TrialNumber = None,
    storage: Storage = None,
) -> None:
    """Register the compressed network that a rule picks, the knee by default, in MLflow's Model Registry."""
    limits = (max_macs_ratio, max_gmacs, max_latency_ratio, max_drop, trial)
    rule = _exactly_one(
        max_macs_ratio=max_macs_ratio,
        max_gmacs=max_gmacs,
        max_latency_ratio=max_latency_ratio,
        max_drop=max_drop,
        knee_point=knee or all(limit is None for limit in limits),
        trial=trial,
    )
    from ranksearch.export import choose
    from ranksearch.publishing import publish as register
    from ranksearch.storage import Store

    store = Store(storage)
    study = store.open(name)
    chosen = choose(study, **rule)
    with Reporter() as reporter:
        found = register(study, chosen, store, alias=alias, model=model, notify=reporter.notify)
    say(f"Trial {chosen.number} is version {found.version} of {found.model}, alias {alias}. Serve it with:")
    say(f"  MLFLOW_TRACKING_URI={found.uri} mlflow models serve -m models:/{found.model}@{alias} --env-manager local")


def ui(
    name: StudyName,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port on this machine.")] = 5000,
    storage: Storage = None,
) -> None:
    """Open the MLflow UI on the store of this study; Ctrl-C ends it."""
    from ranksearch.storage import Store

    store = Store(storage)
    study = store.open(name)
    spec = study.space.tracking
    if not spec.enabled:
        raise TrackingError(f"the study {name} was not tracked (tracking.enabled: false): MLflow has nothing of it.")
    from ranksearch.tracking.store import shown, store_uri, ui_command
    from ranksearch.tracking.story import front_page

    command, environment = ui_command(spec, folder=store.folder, port=port)
    if not command:
        say(f"MLflow: {shown(store_uri(spec, store.folder))}  experiment: {spec.experiment}  run: {name}")
        return
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            raise TrackingError(f"port {port} must be free, something answers there. Give another with --port.")
    front_of_study = front_page(spec, store.folder, name)
    say(
        f"MLflow: http://127.0.0.1:{port}{front_of_study}  experiment: {spec.experiment}  run: {name}  (Ctrl-C ends it)"
    )
    sys.stdout.flush()
    raise typer.Exit(_serve(command, environment))


def _serve(command: list[str], environment: dict[str, str]) -> int:
    """Run a server until it or we are ended; its processes are a group, so that all of them go with it."""

    def ended(signum: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, ended)
    process = subprocess.Popen(command, env={**os.environ, **environment}, start_new_session=True)
    try:
        return 1 if process.wait() else 0
    except KeyboardInterrupt:
        return 0
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait()
        signal.signal(signal.SIGTERM, before)


def _one_of(*options: str | bool) -> None:
    given = [str(name) for name, present in zip(options[::2], options[1::2], strict=True) if present]
    if len(given) > 1:
        raise typer.BadParameter(f"only one of {', '.join(given)} can be given")


def _exported(frame: pd.DataFrame, as_json: bool, as_csv: bool) -> bool:
    if as_json:
        typer.echo(json.dumps(records(frame), indent=2, allow_nan=False))
    elif as_csv:
        typer.echo(frame.to_csv(index=False), nl=False)
    return as_json or as_csv


def _write(file: Path, text: str) -> None:
    """Whole or not at all."""
    unfinished = file.with_name(f".{file.name}.part")
    try:
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)
