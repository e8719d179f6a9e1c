"""The commands. torch, transformers and datasets are imported inside them, after what can be refused without."""

import json
import os
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from bbb_ao.cli.doctor import doctor
from bbb_ao.cli.generate import generate
from bbb_ao.cli.plan import check_plan, plan_command
from bbb_ao.cli.report import report
from bbb_ao.cli.serve import serve
from bbb_ao.cli.spread import SpreadCommand
from bbb_ao.cli.tables import print_table
from bbb_ao.cli.verify import verify
from bbb_ao.errors import RecipeError

WINDOW = 1024  # tokens; the protocol's, unless the model's context is shorter

app = typer.Typer(
    help="Compress language models to 2 bits per weight, evaluate and inspect them.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

DataOption = Annotated[
    list[str],
    typer.Option("--data", metavar="FILE...", help=".jsonl, .txt, .parquet, folder or hub dataset; several allowed."),
]
WindowOption = Annotated[
    int | None, typer.Option(metavar="N", min=2, help="Tokens in a window [1024, or the model's context].")
]
BatchOption = Annotated[int, typer.Option(metavar="N", min=1, help="Windows in a forward pass.")]
WidthsOption = Annotated[list[int] | None, typer.Option(metavar="N...", min=2, max=8, help="Weight widths to run at.")]
LimitOption = Annotated[
    int | None,
    typer.Option(metavar="N", min=1, help="Evaluate the first so many windows, and documents of a task."),
]
BaselineOption = Annotated[
    str | None,
    typer.Option(metavar="MODEL", help="Also this full-precision model, and it rounded to nearest by DIR's recipe."),
]
DeviceOption = Annotated[str | None, typer.Option(metavar="NAME", help="cpu or cuda [cuda where there is one].")]


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            typer.echo(f"bbb-ao {version('bbb_ao')}")
        except PackageNotFoundError:
            typer.echo("bbb-ao (not installed)")
        raise typer.Exit


@app.callback()
def common(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and library messages.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Options of all commands. `entry.main` takes --debug out, wherever it stands, before they are parsed."""


@app.command(cls=SpreadCommand, short_help="Compress MODEL by a recipe, or go on with a stopped run.")
def train(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model directory or hub id.")],
    data: DataOption,
    recipe: Annotated[str, typer.Option(metavar="NAME|FILE", help="Shipped recipe or YAML file.")],
    output: Annotated[str, typer.Option(metavar="DIR", help="Where the result goes; empty or not there yet.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE...", help="Change the recipe, e.g. stages.0.lr=1e-4."),
    ] = None,
    device: DeviceOption = None,
    log: Annotated[str | None, typer.Option(metavar="FILE", help="JSON lines [DIR.log.jsonl].")] = None,
    save_steps: Annotated[int, typer.Option(metavar="N", min=1, help="Save the state every N steps.")] = 200,
    restart: Annotated[bool, typer.Option("--restart", help="Forget what a stopped run left in DIR.run.")] = False,
    amend: Annotated[bool, typer.Option("--amend", help="Go on with changed settings of unfinished stages.")] = False,
    keep_stages: Annotated[
        bool, typer.Option("--keep-stages", help="Leave each stage's checkpoint in DIR.run at the end.")
    ] = False,
) -> None:
    """Compress MODEL by a recipe, and save a directory that transformers loads; a run that was stopped goes on."""
    from bbb_ao.modeldir import CONFIG, check_model_directory, fetch_model
    from bbb_ao.outputs import check_log, check_output_directory
    from bbb_ao.recipes.identity import check_recipe
    from bbb_ao.recipes.loader import load_recipe
    from bbb_ao.recipes.run_folder import RunFolder
    from bbb_ao.recipes.sources import resolve_sources

    settings = load_recipe(recipe, overrides or [])
    resolve_sources(data)
    target = check_output_directory(output, model, may_hold_files=True)
    folder = RunFolder(target, save_steps=save_steps, restart=restart, amend=amend, keep_stages=keep_stages)
    if not folder.folder.exists():
        # With a state, this may be its result, which `compress` knows.
        check_output_directory(output, model)
    # Of a model of the hub no more than the plan needs, before what may be refused.
    directory = fetch_model(model, (CONFIG,))
    if os.path.isdir(model):
        check_model_directory(directory)
    record = Path(log) if log is not None else target.with_name(f"{target.name}.log.jsonl")
    check_log(record, output, [model, *data])
    with folder as run:
        check_recipe(run.record, settings, amend)
        from bbb_ao.recipes.compress import compress
        from bbb_ao.recipes.loading import choose_device
        from bbb_ao.recipes.progress import Progress

        place = choose_device(device)
        check_plan(directory, settings, place, output)
        directory = fetch_model(model)
        command = _train_command(model, data, recipe, output, overrides or [], device, log)
        with Progress(len(settings.stages), record) as progress:
            result = compress(
                directory, settings, data, output, device=place, report=progress, run=run, command=command
            )
    for plan in result.prepared.plans:
        for name, reason in plan.unsupported:
            typer.echo(f"left as it is in {plan.kind}: {name}: {reason}")
    typer.echo(f"{output}: {result.bits_per_weight:.3f} bits per weight, {result.seconds:.0f} s, log in {record}")


def _train_command(
    model: str, data: list[str], recipe: str, output: str, overrides: list[str], device: str | None, log: str | None
) -> str:
    """The command line of a run, for its log."""
    words = ["bbb-ao", "train", model, "--data", *data, "--recipe", recipe, "--output", output]
    for option, values in (("--set", overrides), ("--device", [device]), ("--log", [log])):
        given = [value for value in values if value is not None]
        words += [option, *given] if given else []
    return shlex.join(words)


app.command("plan", cls=SpreadCommand, short_help="Layers, size, memory, disk and time of a run.")(plan_command)


@app.command("eval", cls=SpreadCommand, short_help="Perplexity on text, and tasks of lm-eval.")
def evaluate(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="Model or checkpoint directory.")],
    data: Annotated[
        list[str] | None, typer.Option("--data", metavar="FILE...", help="Text for perplexity, as in train.")
    ] = None,
    bits: WidthsOption = None,
    tasks: Annotated[list[str] | None, typer.Option(metavar="NAME...", help="Tasks of lm-eval to run.")] = None,
    task_dir: Annotated[str, typer.Option(metavar="DIR", help="Folder of their YAML files; trust it like code.")] = ".",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
    window: WindowOption = None,
    batch: BatchOption = 4,
    limit: LimitOption = None,
    device: DeviceOption = None,
    baseline: BaselineOption = None,
) -> None:
    """Perplexity on DATA (windows that do not overlap, mean cross-entropy in float32), and tasks of lm-eval.

    What is found of a bbb_ao checkpoint is also appended to DIR/evaluations.jsonl, for the report.
    """
    from bbb_ao.modeldir import check_model_directory
    from bbb_ao.recipes.sources import resolve_sources

    if not data and not tasks:
        raise RecipeError("--data: expected text, or --tasks, got neither; fix: give one of them")
    if data:
        resolve_sources(data)
    config = check_model_directory(directory, allow_bitbybit=True)
    packed = "quantization_config" in config
    widths = _widths(directory, config, bits)
    recipe = None if baseline is None else _baseline_recipe(directory, packed, data, baseline)
    tokens = _window(directory, config, window)
    if tasks:
        from bbb_ao.recipes.harness import check_harness

        check_harness(task_dir)
    from bbb_ao.recipes.loading import choose_device, load_model, load_tokenizer

    place, tokenizer = choose_device(device), load_tokenizer(directory)
    from bbb_ao.packed_linear import set_bits
    from bbb_ao.recipes.data import evaluation_windows
    from bbb_ao.recipes.evaluations import Text, baseline_rows, perplexity_row
    from bbb_ao.recipes.harness import evaluate_tasks

    text, show = None, _row_printer(directory, packed, as_json)
    if data:
        windows = evaluation_windows(tokenizer, data, tokens, limit, config.get("vocab_size"))
        name = ", ".join(item.rstrip("/").rsplit("/", 1)[-1] for item in data)
        text = Text(windows, name, batch, place)
    model = load_model(directory, "float32").to(place)
    for width in widths:
        if bits and isinstance(width, int):
            set_bits(model, width)
        if text is not None:
            show(perplexity_row(model, "checkpoint" if packed else "full_precision", width, text))
        for row in evaluate_tasks(model, tokenizer, tasks, task_dir, batch, limit, place) if tasks else ():
            show({"bits": width, **row})
    del model
    for row in baseline_rows(baseline, recipe, widths, text) if baseline and recipe and text else ():
        show(row)


def _row_printer(directory: str, packed: bool, as_json: bool) -> Callable[[dict[str, Any]], None]:
    """What prints a row, and appends it to what is known of a bbb_ao checkpoint."""
    from bbb_ao.recipes.evaluations import check_store, store_row

    kept = packed and check_store(directory)
    if packed and not kept:
        typer.echo(f"{directory}: not writable: the results are shown, and not kept for the report", err=True)

    def show(row: dict[str, Any]) -> None:
        if kept:
            store_row(directory, row)
        typer.echo(json.dumps(row) if as_json else _sentence(row))

    return show


def _baseline_recipe(directory: str, packed: bool, data: list[str] | None, baseline: str) -> Any:
    """The recipe of a checkpoint, for rounding the model `baseline` on its grid; refuses what has no baseline."""
    from bbb_ao.modeldir import check_model_directory
    from bbb_ao.recipes.loader import load_recipe

    if not packed or not data:
        got = "no --data" if packed else "a plain model"
        raise RecipeError(f"--baseline: expected a bbb_ao checkpoint and --data, got {got}; fix: leave it out")
    check_model_directory(baseline)
    return load_recipe(Path(directory) / "recipe.yaml")


@app.command(cls=SpreadCommand, short_help="Give each layer of DIR a width of its own.")
def assign(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="Checkpoint with several widths.")],
    data: DataOption,
    output: Annotated[str, typer.Option(metavar="DIR", help="Where the result goes; empty or not there yet.")],
    budget: Annotated[
        float | None, typer.Option(metavar="BITS", min=2, max=16, help="Bits per weight, all told.")
    ] = None,
    size: Annotated[int | None, typer.Option("--bytes", metavar="N", min=1, help="Instead of --budget.")] = None,
    bits: Annotated[
        list[int] | None, typer.Option(metavar="N...", min=2, max=8, help="Widths to choose from [2 4 8, as stored].")
    ] = None,
    metric: Annotated[str, typer.Option(metavar="kl|loss", help="What a layer's width must not cost.")] = "kl",
    drop: Annotated[bool, typer.Option("--drop-planes", help="Store no bits beyond each layer's width.")] = False,
    window: WindowOption = None,
    batch: BatchOption = 4,
    limit: Annotated[int, typer.Option(metavar="N", min=1, help="Measure on the first so many windows.")] = 16,
    device: DeviceOption = None,
) -> None:
    """Give each layer of DIR a width of its own, by what it costs on DATA, without training."""
    from bbb_ao.modeldir import check_checkpoint
    from bbb_ao.outputs import check_output_directory
    from bbb_ao.recipes.sources import resolve_sources

    if (budget is None) == (size is None):
        raise RecipeError("--budget: expected either it or --bytes, got both or none; fix: give one")
    if metric not in ("kl", "loss"):
        raise RecipeError(f"--metric: expected kl or loss, got {metric!r}; fix: give one of them")
    resolve_sources(data)
    config = check_checkpoint(directory)
    check_output_directory(output, directory)
    tokens = _window(directory, config, window)
    from bbb_ao.checkpoint import openable_widths

    widths = _widths(directory, config, bits) if bits else {2, 4, 8}.intersection(openable_widths(directory))
    from bbb_ao.recipes.allocation import assign_checkpoint
    from bbb_ao.recipes.data import evaluation_windows
    from bbb_ao.recipes.loading import choose_device, load_tokenizer

    place = choose_device(device)
    windows = evaluation_windows(load_tokenizer(directory), data, tokens, limit, config.get("vocab_size"))
    found = assign_checkpoint(
        directory,
        output,
        windows,
        sorted(int(width or 0) for width in widths),
        metric,
        batch,
        drop,
        place,
        bits_per_weight=budget,
        size=size,
    )
    print_table([("layer", "bits"), *found.widths.items()])
    typer.echo(f"{output}: {found.bits_per_weight:.3f} bits per weight read, {found.stored_bits:.3f} stored")


app.command(short_help="Continue a prompt at one of DIR's widths.")(generate)
app.command(short_help="Answer completion requests over HTTP.")(serve)


@app.command(short_help="Widths, bits per weight and bytes of each layer.")
def inspect(directory: Annotated[str, typer.Argument(metavar="DIR", help="Checkpoint directory.")]) -> None:
    """A line per layer: widths, the one it opens at, bits per weight, split channels, bytes."""
    from bbb_ao.modeldir import check_checkpoint

    check_checkpoint(directory)
    from bbb_ao.checkpoint import describe

    layers = describe(directory)
    rows: list[tuple[Any, ...]] = [
        (
            row.name,
            "-".join(map(str, dict.fromkeys((row.widths[0], row.widths[-1])))),
            row.bits or row.widths[-1],
            row.act_bits or 16,
            row.bits_per_weight,
            row.split_channels,
            row.bytes,
        )
        for row in layers
    ]
    size, count = sum(row.bytes for row in layers), sum(row.in_features * row.out_features for row in layers)
    rows.append(("total", "", "", "", 8 * size / max(count, 1), sum(row.split_channels for row in layers), size))
    heads = ("layer", "widths", "bits", "act_bits", "bits_per_weight", "split_channels", "bytes")
    print_table([heads, *rows])


app.command(short_help="Check files and hashes, then layers against float64.")(verify)
app.command(short_help="Versions, GPU, and which kernels run here.")(doctor)
app.command(short_help="Write one HTML file about a run.")(report)


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Show this recipe's YAML.")] = None,
) -> None:
    """List the shipped recipes."""
    from bbb_ao.recipes.loader import dump_recipe, load_recipe, shipped_recipes

    if name is not None:
        typer.echo(dump_recipe(load_recipe(name)), nl=False)
        return
    for shipped in shipped_recipes():
        recipe = load_recipe(shipped)
        schedule = " > ".join(stage.name for stage in recipe.stages)
        typer.echo(
            f"{shipped:20} {recipe.description} [{schedule}; {recipe.sequences} x {recipe.sequence_length} tokens]"
        )


def _widths(directory: str, config: dict[str, Any], bits: list[int] | None) -> Sequence[int | str | None]:
    """The widths to evaluate: None is full precision, "mixed" a width for each layer. Refuses what is not stored."""
    quantization = config.get("quantization_config")
    if quantization is None and bits:
        raise RecipeError(f"{directory}: bits: expected a bbb_ao checkpoint, got a plain model; fix: leave out --bits")
    if quantization is None:
        return [None]
    if not bits:
        return [config.get("bits") or "mixed"]
    from bbb_ao.checkpoint import openable_widths

    stored = openable_widths(directory)
    for width in bits:
        if width not in stored:
            have = ", ".join(map(str, stored))
            raise RecipeError(f"{directory}: bits: expected one of {have}, as stored, got {width}; fix: change --bits")
    return bits


def _window(directory: str, config: dict[str, Any], window: int | None) -> int:
    context = config.get("max_position_embeddings")
    if not isinstance(context, int):
        return window or WINDOW
    if window is not None and window > context:
        raise RecipeError(
            f"--window: expected at most {context}, the context of {directory}, got {window}; fix: lower it"
        )
    return window or min(WINDOW, context)


def _sentence(row: dict[str, Any]) -> str:
    width = {None: "full precision", "mixed": "mixed widths"}.get(row["bits"], f"{row['bits']} bits")
    if "task" in row:
        error = "" if row["stderr"] is None else f" +- {row['stderr']:.4f}"
        return f"{width}: {row['task']} {row['metric']} {row['value']:.4f}{error} ({row['samples']} samples)"
    of = "round to nearest, " if row["of"] == "round_to_nearest" else ""
    return f"{of}{width}: perplexity {row['ppl']:.4f} ({row['windows']} windows, {row['tokens']} tokens, {row['data']})"
