"""The folder in which a run keeps what it needs to go on after it was stopped. No tensor is touched here.

    lock                 held by the process at work
    manifest.json        size and SHA-256 of every file below; replacing it is the moment at which a state becomes valid
    run-N.json           what the run is of (recipe, hashes of its model and data) and how far it got
    *.safetensors        blocks, and the loop of the block or model at work; see `keeper`
    1-w8a16/, ...        a loadable checkpoint of each finished stage but the last

No file changes once it is there: a state is written under other names, then the manifest is replaced, then what it no
longer names is removed.
"""

import glob
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bbb_ao.durable import Lock, write_durably
from bbb_ao.errors import ModelError, RecipeError, ResourceError, ResumeError
from bbb_ao.manifest import MANIFEST, FileRecord, check_manifest, file_digest, manifest_text, read_manifest

FORMAT_VERSION = 1
SAVE_STEPS = 200
LOCK = "lock"
AFRESH = "or begin afresh with --restart"


class RunFolder:
    """The state of one run on disk; a context manager, which holds the folder's lock.

    A folder in which nothing was saved is removed again at the end.

    Args:
        output: the directory that the run is to make; the folder is its sibling, with `.run` at the end.
        save_steps: optimizer steps after which the loop at work is saved.
        restart: forget an earlier state.
        amend: go on although settings of stages that are not finished have changed; see `identity.AMENDABLE`.
        keep_stages: leave the checkpoints of the stages there when the run is done.
    Attributes:
        record: what `run-N.json` holds; empty where the run has not begun.
    Raises:
        ResourceError: another process is at work in it, or it cannot be written (on entry).
        ResumeError: the state is damaged, or of another version of this package (on entry).
        RecipeError: there is something else under this name (on entry).
    """

    def __init__(
        self,
        output: str | Path,
        *,
        save_steps: int = SAVE_STEPS,
        restart: bool = False,
        amend: bool = False,
        keep_stages: bool = False,
    ) -> None:
        self.output = Path(output).resolve()
        self.folder = self.output.with_name(f"{self.output.name}.run")
        self.save_steps, self.restart, self.amend, self.keep_stages = save_steps, restart, amend, keep_stages
        self.record: dict[str, Any] = {}
        self._files: dict[str, FileRecord] = {}
        self._lock = Lock(self.folder / LOCK)
        self._made: list[Path] = []

    def __enter__(self) -> Self:
        self._refuse_others()
        try:
            self._made = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock.take()
        except OSError as error:
            raise ResourceError(
                f"{self.folder}: state: expected a writable folder, got {error.strerror}; fix: choose another output"
            ) from None
        try:
            if self.restart:
                self._forget(stages=True)
            self._read()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        stopped = error is not None and not isinstance(error, Exception)
        if error is not None and (stopped or (self.record and isinstance(error, ResourceError))):
            begun = f"the same command goes on from {self.position}" if self.record else "nothing was saved"
            error.add_note(begun)
        if not self.record and self.folder.exists():
            self._remove_leftovers()
            self._remove_folder()
        self._lock.release()

    @property
    def position(self) -> str:
        """How far the run got, for people."""
        record, names = self.record, self.record["names"]
        if record["stage"] == len(names):
            return "the end of its last stage"
        stage, block = f"stage {record['stage'] + 1}/{len(names)} {names[record['stage']]}", record["block"]
        if record["loop"]:
            return f"{stage}{f', block {block + 1}' if block else ''}, step {record['loop']['step']}"
        # Not the number of the next one: there may be none.
        return f"{stage}, block {block} done" if block else stage

    @property
    def bytes(self) -> int:
        """What lies in the folder, but for the lock."""
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file() and path.name != LOCK)

    def path(self, name: str) -> Path:
        return self.folder / name

    def commit(self, add: Mapping[str, Callable[[Path], Any]], keep: set[str], **changes: Any) -> None:
        """Make a state valid.

        Args:
            add: files to write: name -> function of the path to write to.
            keep: names of the earlier files that the state still needs.
            changes: to the record.
        Raises:
            ResourceError: a file cannot be written; the state before is still there.
        """
        record = self.record | changes | {"serial": self.record.get("serial", 0) + 1}
        text = json.dumps(record, indent=1) + "\n"
        own = f"run-{record['serial']}.json"
        files = {name: held for name, held in self._files.items() if name in keep}
        for name, write in {**add, own: lambda path: path.write_text(text, encoding="utf-8")}.items():
            write_durably(self.path(name), write)
            files[name] = FileRecord(self.path(name).stat().st_size, file_digest(self.path(name)))
        write_durably(self.path(MANIFEST), lambda path: path.write_text(manifest_text(files), encoding="utf-8"))
        unused = self._files.keys() - files.keys()
        self.record, self._files = record, files
        for name in unused:
            self.path(name).unlink()

    def is_done(self, recipe_text: str) -> bool:
        """Whether the run only has to be cleared away: the output is there, made by the recipe of a finished run."""
        try:
            written = (self.output / "recipe.yaml").read_text(encoding="utf-8")
        except OSError:
            return False
        return bool(self.record) and self.record["stage"] == len(self.record["names"]) and written == recipe_text

    def finish(self) -> None:
        """Remove the state once the output is there."""
        self._forget(stages=not self.keep_stages)
        self._remove_folder()

    def _refuse_others(self) -> None:
        if self.folder.exists() and not self.folder.is_dir():
            raise RecipeError(f"{self.folder}: state: expected a folder, got a file; fix: choose another output")
        if self.folder.is_dir() and any(self.folder.iterdir()) and not self.path(LOCK).is_file():
            raise RecipeError(
                f"{self.folder}: state: expected a run's, got other files; fix: choose another output or move them"
            )

    def _read(self) -> None:
        try:
            manifest = read_manifest(self.folder)
            self._files = manifest.files if manifest else {}
            self._remove_leftovers()
            if not check_manifest(self.folder):
                return
            (own,) = [name for name in self._files if name.startswith("run-")]
            self.record = json.loads(self.path(own).read_text(encoding="utf-8"))
        except (ModelError, ValueError) as error:
            what = str(error).partition("; fix:")[0]
            raise ResumeError(f"{what}; fix: restore it, {AFRESH}") from None
        version = self.record.get("format_version")
        if version != FORMAT_VERSION:
            raise ResumeError(
                f"{self.folder}: format_version: expected {FORMAT_VERSION}, got {version!r:.20}; "
                f"fix: go on with the bbb_ao that wrote it, {AFRESH}"
            )

    def _forget(self, stages: bool) -> None:
        """Remove the stages' checkpoints, if asked, and the state, the manifest first."""
        for path in list(self.folder.iterdir()) if stages else ():
            if path.is_dir():
                # A checkpoint that is half removed must not look like a whole one.
                shutil.rmtree(path.rename(path.with_name(f".{path.name}.removed")))
        self.path(MANIFEST).unlink(missing_ok=True)
        self.record, self._files = {}, {}
        self._remove_leftovers()

    def _remove_leftovers(self) -> None:
        """What a killed process left: temporary files, and files that the manifest does not name."""
        for path in self.folder.iterdir():
            if path.is_dir() and path.name.startswith("."):
                shutil.rmtree(path)
            elif not path.is_dir() and path.name not in {LOCK, MANIFEST, *self._files}:
                path.unlink()
        for path in self.output.parent.glob(f".{glob.escape(self.output.name)}.partial-*"):
            shutil.rmtree(path)

    def _remove_folder(self) -> None:
        """Remove what this process made and left empty."""
        self.path(LOCK).unlink(missing_ok=True)
        for path in self._made or [self.folder]:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
