"""The `retrikt` command: the whole run, each stage, status, prediction and serving.

An error that a user can cause ends with one screen that names the culprit and exit code 1; `--debug` shows the traceback as well.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import click

import retrikt_ray
from retrikt_ray.store_cli import store

DEFAULT_RUN = "runs/quickstart"


class Retrikt(click.Group):
    """Click's group, with a command for each stage of the pipeline, and one place for the errors of all commands."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        from retrikt_ray.pipeline import STAGES

        return [stage.name for stage in STAGES] + super().list_commands(ctx)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        found = super().get_command(ctx, cmd_name)
        if found is None:
            from retrikt_ray.pipeline import STAGES

            numbers = {stage.name: i for i, stage in enumerate(STAGES, 1)}
            if cmd_name in numbers:
                found = stage_command(cmd_name, f"{numbers[cmd_name]}. {STAGES[numbers[cmd_name] - 1].title}")
        return found

    def invoke(self, ctx: click.Context) -> Any:
        from retrikt_ray.runtime.folders import ArtifactError
        from retrikt_ray.runtime.settings import ConfigError
        from retrikt_ray.task.texts import DataError

        try:
            return super().invoke(ctx)
        except (click.exceptions.Exit, click.Abort):  # click's own, which are RuntimeErrors
            raise
        except (ConfigError, DataError, ArtifactError, RuntimeError, OSError) as error:
            if ctx.params.get("debug"):
                raise
            click.secho("error: ", fg="red", bold=True, err=True, nl=False)
            cause = getattr(error, "cause", None) or error  # of a Ray task's error, what the task raised
            kind = "" if isinstance(cause, ValueError | OSError) else f"{type(cause).__name__}: "
            click.echo(f"{kind}{cause}", err=True)
            sys.exit(1)
        except KeyboardInterrupt:
            click.echo("interrupted; what is complete stays, the same command goes on from there", err=True)
            sys.exit(130)


@click.group(cls=Retrikt, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(retrikt_ray.__version__)
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def main(debug: bool) -> None:
    """Take a large language model and a few hundred labelled rows, get a tiny student that retrieves."""


def finish(run: Any) -> None:
    """The summary of a finished run: the table, the report, and what to do next."""
    from rich.markup import escape

    from retrikt_ray.estimate.estimate import afterwards
    from retrikt_ray.report.table import as_table
    from retrikt_ray.runtime.progress import console

    store = run.report["store"]
    console.print(as_table(run.report))
    console.print(f"store: {store['kept']:,} rows kept of {store['by_source']}, rejected {store['rejected'] or 'none'}")
    for advice in run.report["advice"]:
        console.print(f"[yellow]note[/yellow]   {escape(advice['text'])}")
    if told := afterwards(run):
        console.print(told)
    console.print(f"report: {run.artifact('report')}/report.html")
    console.print(f"serve:  retrikt serve {run.folder}")


def split_arguments(arguments: tuple[str, ...]) -> tuple[str | None, list[str]]:
    """[CONFIG] [key=value ...] -> (config, overrides)."""
    from retrikt_ray.runtime.settings import ConfigError

    files = [a for a in arguments if "=" not in a]
    if len(files) > 1:
        raise ConfigError(f"expected one config file, found {' and '.join(files)}; overrides are written key=value")
    return (files[0] if files else None), [a for a in arguments if "=" in a]


def default_out(config: str | None) -> str:
    return DEFAULT_RUN if config is None else f"runs/{os.path.splitext(os.path.basename(config))[0]}"


@main.command()
@click.argument("arguments", nargs=-1, metavar="[CONFIG] [key=value]...")
@click.option("--out", help="Run directory or URI. Default: runs/<name of the config>.")
def run(arguments: tuple[str, ...], out: str | None) -> None:
    """Run all stages; what is done is skipped."""
    from retrikt_ray import pipeline

    path, overrides = split_arguments(arguments)
    finish(pipeline.run(path, out or default_out(path), overrides))


@main.command()
@click.argument("overrides", nargs=-1, metavar="[key=value]...")
@click.option("--out", default=DEFAULT_RUN, show_default=True, help="Run directory.")
def quickstart(overrides: tuple[str, ...], out: str) -> None:
    """The packaged task and language model, offline, in a few minutes."""
    from retrikt_ray import pipeline

    finish(pipeline.run(None, out, overrides))


@main.command("estimate")
@click.argument("arguments", nargs=-1, metavar="[CONFIG] [key=value]...")
@click.option("--out", help="Run directory or URI. Default: runs/<name of the config>.")
def estimate_command(arguments: tuple[str, ...], out: str | None) -> None:
    """Tell time, tokens and money of a run, from a small run of its stages."""
    from retrikt_ray import config
    from retrikt_ray.estimate.estimate import estimate, show

    path, overrides = split_arguments(arguments)
    show(estimate(config.load(path, overrides), out or default_out(path)))


@main.command()
@click.argument("config")
@click.argument("overrides", nargs=-1, metavar="[key=value]...")
@click.option("--out", default="runs/bench", show_default=True, help="Directory or URI of the runs and cells.")
def bench(config: str, overrides: tuple[str, ...], out: str) -> None:
    """Compare systems over tasks and seeds; what is measured is not measured again."""
    from retrikt_ray.bench import settings
    from retrikt_ray.bench.bench import bench as run_bench
    from retrikt_ray.bench.plots import plots
    from retrikt_ray.bench.table import markdown_all
    from retrikt_ray.runtime.folders import Folder

    cells = run_bench(settings.load(config, overrides), out)
    text = markdown_all(cells)
    Folder.at(out).write_bytes("bench.md", text.encode())
    for name, plot in plots(cells).items():
        (Folder.at(out) / "plots").write_bytes(f"{name}.svg", plot.encode())
    click.echo(text)


@main.command()
@click.argument("run_uri", metavar="RUN")
@click.argument("out", metavar="DIR")
def export(run_uri: str, out: str) -> None:
    """Write a folder that answers with numpy, tokenizers and faiss alone."""
    from retrikt_ray.export.export import export as write
    from retrikt_ray.runtime import cluster
    from retrikt_ray.runtime.progress import console

    cluster.quiet(None)
    made = write(run_uri, out)
    console.print(f"{out}: {made['rows']:,} rows, {made['bytes'] / 1e6:.1f} MB: {', '.join(made['files'])}")


def stage_command(name: str, summary: str) -> click.Command:
    """The command of a stage: `retrikt generate RUN [key=value ...]`."""

    @click.command(name, help=summary)
    @click.argument("run_uri", metavar="RUN")
    @click.argument("arguments", nargs=-1, metavar="[CONFIG] [key=value]...")
    @click.option("--force", is_flag=True, help="Run even if it is done.")
    def command(run_uri: str, arguments: tuple[str, ...], force: bool) -> None:
        import yaml

        from retrikt_ray import config, pipeline
        from retrikt_ray.runtime.folders import Folder
        from retrikt_ray.runtime.settings import ConfigError

        path, overrides = split_arguments(arguments)
        folder = Folder.at(run_uri)
        if path is None and folder.exists("config.yaml"):
            before = pipeline.load_config(folder)
            opened_config = config.parse(yaml.safe_dump(before.model_dump(mode="json")), f"{folder}/config.yaml", overrides)
        elif path is None and name != "prepare":
            raise ConfigError(f"{folder} is not a run directory: it has no config.yaml; begin with `retrikt prepare {run_uri} CONFIG`")
        else:
            opened_config = config.load(path, overrides)
        pipeline.run_all(pipeline.open_run(run_uri, opened_config), only=name, force=force)

    return command


@main.command()
@click.argument("run_uri", metavar="RUN")
def status(run_uri: str) -> None:
    """What is done, stale, missing or damaged, and how long it took."""
    from rich.table import Table

    from retrikt_ray import pipeline
    from retrikt_ray.runtime import artifacts
    from retrikt_ray.runtime.progress import console

    opened = pipeline.load_run(run_uri)
    table = Table(title=str(opened.folder))
    for name in ("stage", "state", "seconds", "rows", "figures"):
        table.add_column(name, justify="right" if name == "seconds" else "left")
    for stage in opened.stages:
        manifest, state = artifacts.read_manifest(opened.artifact(stage.outputs[0])), str(opened.status(stage))
        if manifest is not None:
            try:
                for name in stage.outputs:
                    artifacts.check(opened.artifact(name))
            except artifacts.ArtifactError as error:
                state = f"damaged: {error}"
            rows = ", ".join(f"{k} {v:,}" for k, v in manifest.rows.items())
            table.add_row(stage.name, state, f"{manifest.seconds:.1f}", rows, pipeline.sentence(manifest.summary))
        else:
            table.add_row(stage.name, state, "", "", "")
    console.print(table)


@main.command()
@click.argument("runs", metavar="RUN...", nargs=-1, required=True)
@click.option("--out", required=True, help="Folder for report.json and report.html.")
def merge(runs: tuple[str, ...], out: str) -> None:
    """One report of several runs of a task that differ in their seed: mean and 95 % interval over the seeds."""
    from retrikt_ray import pipeline
    from retrikt_ray.report import page
    from retrikt_ray.runtime.folders import Folder
    from retrikt_ray.runtime.progress import console
    from retrikt_ray.runtime.settings import ConfigError

    try:
        merged = page.merge([pipeline.load_run(uri).artifact("report").read_json("report.json") for uri in runs])
    except ValueError as error:
        raise ConfigError(f"these runs cannot be merged: {error}") from None
    folder = Folder.at(out)
    folder.write_json("report.json", merged)
    folder.write_bytes("report.html", page.render(merged).encode())
    score = merged["systems"]["retrikt"]["score"]
    console.print(
        f"{merged['task']}: retrikt {score['mean']:.3f} ± {score['ci95']:.3f} over seeds {merged['seeds']}; report: {folder}/report.html"
    )


@main.command()
@click.argument("run_uri", metavar="RUN")
@click.argument("texts", nargs=-1, required=True)
@click.option("-k", "--neighbours", default=3, show_default=True, help="Neighbours of either kind to show.")
def predict(run_uri: str, texts: tuple[str, ...], neighbours: int) -> None:
    """Answer texts, with the evidence. In pair tasks write TEXT ||| SECOND TEXT."""
    from rich.markup import escape

    from retrikt_ray.predictor import Predictor
    from retrikt_ray.runtime import cluster
    from retrikt_ray.runtime.progress import console
    from retrikt_ray.task.texts import read_typed, shown

    cluster.quiet(None)
    predictor = Predictor.open(run_uri)
    found = predictor.answer([read_typed(text, predictor.task.pair) for text in texts])
    near, alike = found.neighbours, found.lexical_neighbours
    for i, (label, score) in enumerate(zip(found.labels, found.scores, strict=True)):
        console.print(f"[bold]{escape(label)}[/bold] {score:.2f}  {escape(texts[i])}")
        rows = [("similarity", n.similarity, n) for n in near[i][:neighbours]] + [("words", n.bm25, n) for n in alike[i][:neighbours]]
        for name, value, n in rows:
            text = shown((n.text, n.text_pair))
            console.print(f"    {name} {value:5.2f}  {n.label} ({n.source} {n.id}): {text}", markup=False)


main.add_command(store)


@main.command()
@click.argument("run_uri", metavar="RUN")
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", default=8000, show_default=True)
@click.option("--reload", is_flag=True, help="Watch RUN, and answer from it anew when its stages have made it anew.")
@click.argument("arguments", nargs=-1, metavar="[key=value]...")
def serve(run_uri: str, host: str, port: int, reload: bool, arguments: tuple[str, ...]) -> None:
    """Serve student and retrieval over HTTP, with a page to try it."""
    from retrikt_ray.config import override
    from retrikt_ray.serving.server import serve_run

    args: dict[str, Any] = {"reload": True} if reload else {}
    for item in arguments:
        override(args, item)
    serve_run(run_uri, host, port, args)
