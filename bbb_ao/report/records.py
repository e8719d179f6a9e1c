"""What a run left behind, read and checked: its log, its checkpoint's recipe and its evaluations."""

import json
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bbb_ao.errors import ModelError
from bbb_ao.modeldir import CONFIG, QUANT_METHOD, read_json
from bbb_ao.report.fields import Fields

LOG_SUFFIX = ".log.jsonl"
RECIPE, EVALUATIONS = "recipe.yaml", "evaluations.jsonl"
MOST_BYTES = 256 * 2**20


@dataclass(frozen=True)
class BlockFit:
    """A block in a stage: the loss over the first and the last tenth of its steps; number 0 in an end-to-end stage."""

    number: int
    name: str
    first_loss: float
    last_loss: float
    steps: int


@dataclass
class StageLog:
    """A stage that began: its name, how many blocks it trains, and those that are done, by number."""

    name: str
    blocks: int
    fits: dict[int, BlockFit] = field(default_factory=dict)

    @property
    def end_to_end(self) -> bool:
        return self.name.endswith(" model")


@dataclass(frozen=True)
class Phase:
    """Preparation, a stage, or packing: wall time, and the most memory of the process up to its end, bytes."""

    name: str
    seconds: float
    host_peak_bytes: float
    device_peak_bytes: float | None


@dataclass(frozen=True)
class Site:
    """Input channels that some layers share; see `recipes.statistics.SiteChannels`."""

    block: int
    layers: tuple[str, ...]
    metric: str
    channels: int
    split: int
    outliers_before: int
    outliers_after: int
    ranks: tuple[float, ...]
    before: tuple[float, ...]
    after: tuple[float, ...]


@dataclass(frozen=True)
class Evaluation:
    """A perplexity; see `recipes.evaluations.perplexity_row`. `bits` is None in full precision."""

    of: str
    bits: str | None
    bits_per_weight: float | None
    ppl: float
    data: str
    windows: int
    window: int
    batch: int
    backend: str
    device: str
    versions: dict[str, str]


@dataclass(frozen=True)
class TaskResult:
    """A metric of a task of lm-eval."""

    bits: str | None
    task: str
    metric: str
    value: float
    stderr: float | None
    samples: int
    batch: int
    backend: str


@dataclass
class Run:
    """Everything that a report shows; what is not known is empty or None.

    Attributes:
        name: of the output directory.
        directory, log: where things were found.
        sequences: of calibration text, (count, tokens in each).
        sites: by block and first layer; errors: full layer name -> relative error, "before" and "after" training.
        saved: the checkpoint is there.
    """

    name: str
    directory: Path
    log: Path | None = None
    command: str | None = None
    model: str | None = None
    recipe: str | None = None
    sequences: tuple[int, int] | None = None
    device: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    stages: dict[int, StageLog] = field(default_factory=dict)
    phases: dict[str, Phase] = field(default_factory=dict)
    sites: dict[tuple[int, str], Site] = field(default_factory=dict)
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    bits_per_weight: float | None = None
    saved: bool = False
    evaluations: list[Evaluation] = field(default_factory=list)
    tasks: list[TaskResult] = field(default_factory=list)


def read_run(directory: str | Path, log: str | Path | None = None) -> Run:
    """Read the run whose output directory is `directory`; an unfinished run has only its log.

    Args:
        log: None takes `<directory>.log.jsonl`, where `bbb-ao train` puts it, if it is there.
    Raises:
        ModelError: neither a checkpoint nor a log is there, or one of the files is damaged (file, line, field).
    """
    path = Path(directory)
    beside = Path(f"{str(directory).rstrip('/')}{LOG_SUFFIX}")
    run = Run(path.resolve().name, path, Path(log) if log else beside if beside.exists() else None)
    if (path / CONFIG).exists():
        config = read_json(path, CONFIG)
        quantization = config.get("quantization_config") if isinstance(config, dict) else None
        run.saved = isinstance(quantization, dict) and quantization.get("quant_method") == QUANT_METHOD
    if not run.saved and run.log is None:
        raise ModelError(
            f"{directory}: run: expected a directory that bbb-ao train wrote, or {beside.name} beside it, got neither; "
            "fix: give the --output of the run, or its --log"
        )
    if run.log is not None:
        # A log that several runs share: the last one counts.
        for fields in _lines(run.log):
            if fields.text("event") == "run" and not fields.flag("resumed"):
                run = Run(run.name, run.directory, run.log, saved=run.saved)
            _take(run, fields)
    if run.saved and (path / RECIPE).exists():
        run.recipe = _read(path / RECIPE)
    if run.saved and (path / EVALUATIONS).exists():
        _take_evaluations(run, path / EVALUATIONS)
    return run


def _read(path: Path) -> str:
    """The text of a regular file of bounded size; no link, which could lead anywhere."""
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > MOST_BYTES:
            raise ModelError(f"{path}: file: expected a regular one of at most 256 MiB, got another; fix: restore it")
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ModelError(f"{path}: content: expected UTF-8, got byte {error.start}; fix: restore the file") from None
    except OSError as error:
        raise ModelError(f"{path}: file: expected it readable, got {error.strerror}; fix: check the path") from None


def _lines(path: Path) -> Iterator[Fields]:
    text = _read(path)
    for number, line in enumerate(text.splitlines(), start=1):
        where = f"{path}: line {number}"
        try:
            record: Any = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict):
            fix = "remove that line" if number == text.count("\n") + 1 else "restore the file"
            raise ModelError(f"{where}: content: expected a JSON object, got a cut or foreign line; fix: {fix}")
        yield Fields(record, where)


def _take(run: Run, fields: Fields) -> None:
    """Take one line of the log into the run; events that a report does not show are passed over."""
    event = fields.text("event")
    if event == "run":
        run.command, run.model, run.recipe = map(fields.optional_text, ("command", "model", "recipe"))
        count, tokens = fields.integers("sequences", 2)
        run.sequences, run.device, run.versions = (count, tokens), fields.text("device"), fields.texts("versions")
    elif event == "channels":
        ranks, before, after = map(fields.numbers, ("ranks", "before", "after"))
        if not ranks or not len(ranks) == len(before) == len(after):
            raise fields.error("ranks", "as many as in before and after, at least one", ranks)
        counts = map(fields.integer, ("channels", "split", "outliers_before", "outliers_after"))
        layers, metric = fields.text_list("layers"), fields.text("metric")
        site = Site(fields.integer("block"), layers, metric, *counts, ranks=ranks, before=before, after=after)
        run.sites[site.block, site.layers[0]] = site
    elif event == "layers":
        run.errors[fields.text("when")] = fields.number_map("errors")
    elif event == "stage":
        run.stages.setdefault(fields.integer("stage"), StageLog(fields.text("name"), fields.integer("blocks")))
    elif event == "block":
        if not run.stages:
            raise fields.error("event", "a stage before its blocks", "block")
        numbers = (fields.number("first_loss"), fields.number("last_loss"), fields.integer("steps"))
        fit = BlockFit(fields.integer("block"), fields.text("name"), *numbers)
        run.stages[max(run.stages)].fits[fit.number] = fit
    elif event in ("prepared", "stage_done", "saved"):
        _take_phase(run, fields, event)


def _take_phase(run: Run, fields: Fields, event: str) -> None:
    name = {"prepared": "preparing", "saved": "packing"}.get(event, "")
    if event == "stage_done":
        number = fields.integer("stage")
        # A stage of no epochs only sets widths.
        if number not in run.stages:
            return
        name = f"{number + 1}: {run.stages[number].name}"
    if event == "saved":
        run.bits_per_weight = fields.number("bits_per_weight")
    numbers = fields.number("phase_seconds"), fields.number("host_peak_bytes")
    run.phases[name] = Phase(name, *numbers, fields.optional_number("device_peak_bytes"))


def _take_evaluations(run: Run, path: Path) -> None:
    """The last figure of each kind, in the order in which the kinds came."""
    found: dict[tuple[Any, ...], Evaluation | TaskResult] = {}
    for fields in _lines(path):
        bits = None if fields.values.get("bits") is None else str(fields.values["bits"])[:16]
        shared = {"bits": bits, "batch": fields.integer("batch"), "backend": fields.text("backend")}
        if "task" in fields.values:
            texts = {key: fields.text(key) for key in ("task", "metric")}
            value, stderr = fields.number("value"), fields.optional_number("stderr")
            row = TaskResult(value=value, stderr=stderr, samples=fields.integer("samples"), **texts, **shared)
            found[bits, row.task, row.metric] = row
            continue
        texts = {key: fields.text(key) for key in ("of", "data", "device")}
        counts = {key: fields.integer(key) for key in ("windows", "window")}
        read, ppl = fields.optional_number("bits_per_weight"), fields.number("ppl")
        row = Evaluation(bits_per_weight=read, ppl=ppl, versions=fields.texts("versions"), **texts, **counts, **shared)
        found[row.of, bits, row.data, row.windows, row.window] = row
    run.evaluations = [row for row in found.values() if isinstance(row, Evaluation)]
    run.tasks = [row for row in found.values() if isinstance(row, TaskResult)]
