"""The directive `command-line`: every command of a typer application, with its arguments, options and defaults.

    {command-line} bbb_ao.cli.commands:app
    :program: bbb-ao

Read from the functions behind the commands, which is what typer itself does.
"""

import importlib
import inspect
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any

import typer
from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

VALUES = {int: "INTEGER", float: "FLOAT", str: "TEXT", bool: ""}


def commands(app: typer.Typer) -> dict[str, Callable[..., Any]]:
    """Name -> function; "" for the options of all commands, or for the only command of a program without names."""
    found: dict[str, Callable[..., Any]] = {}
    common = app.registered_callback
    if common and common.callback:
        found[""] = common.callback
    for info in app.registered_commands:
        assert info.callback is not None, "registered by a decorator"
        name = info.name or info.callback.__name__.replace("_", "-")
        found[name if common or len(app.registered_commands) > 1 else ""] = info.callback
    return found


def parameters(function: Callable[..., Any]) -> Iterator[tuple[str, str, str]]:
    """(how it is written, required or its default, help) of each argument and option."""
    hints = typing.get_type_hints(function, include_extras=True)
    for name, parameter in inspect.signature(function).parameters.items():
        hint, info = typing.get_args(hints[name])
        required = parameter.default is inspect.Parameter.empty
        note = "required" if required else "optional"
        if parameter.default not in (None, False, "", inspect.Parameter.empty):
            # Control characters stand as in Python.
            note = f"default {str(parameter.default).encode('unicode_escape').decode()}"
        if isinstance(info, typer.models.ArgumentInfo):
            yield info.metavar or name.upper(), note, info.help or ""
            continue
        flag = f"--{name.replace('_', '-')}"
        value = info.metavar if info.metavar is not None else VALUES[scalar(hint)]
        plain = f"{flag}, --no-{flag[2:]}" if scalar(hint) is bool else flag
        # Behind Annotated, the first name that is given stands where the default would.
        given = [decl for decl in (info.default, *(info.param_decls or ())) if isinstance(decl, str)]
        yield f"{', '.join(given) or plain} {value}".strip(), note, info.help or ""


def scalar(hint: Any) -> type:
    """The type of one value: of `list[int] | None` int."""
    arguments = [each for each in typing.get_args(hint) if each is not types.NoneType]
    return scalar(arguments[0]) if arguments else hint


class CommandLine(SphinxDirective):
    required_arguments = 1
    option_spec = {"program": directives.unchanged_required}

    def run(self) -> list[nodes.Node]:
        module, _, attribute = self.arguments[0].partition(":")
        home = importlib.import_module(module)
        self.env.note_dependency(inspect.getfile(home))
        return [self._section(name, function) for name, function in commands(getattr(home, attribute)).items()]

    def _section(self, name: str, function: Callable[..., Any]) -> nodes.Node:
        title = f"{self.options['program']} {name}".strip()
        section = nodes.section(ids=[nodes.make_id(title)], names=[title])
        section += nodes.title("", "", nodes.literal(title, title))
        section += nodes.paragraph("", " ".join((inspect.getdoc(function) or "").split()))
        listing = nodes.definition_list(classes=["keys"])
        for written, note, text in parameters(function):
            term = nodes.term("", "", nodes.literal(written, written), nodes.Text(f"  {note}"))
            listing += nodes.definition_list_item("", term, nodes.definition("", nodes.paragraph("", text)))
        section += listing
        return section


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("command-line", CommandLine)
    return {"parallel_read_safe": True}
