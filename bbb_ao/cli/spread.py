"""Options that take several values in a row: `--bits 8 4 2` as well as `--bits 8 --bits 4 --bits 2`."""

from collections.abc import Collection, Sequence
from typing import Any

from typer.core import TyperCommand


class SpreadCommand(TyperCommand):
    """A command whose repeatable options each take all values up to the next option.

    Where no positional argument stands elsewhere, it is the last of the values after the first such option that has
    several: `eval --bits 8 4 2 DIR`.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        options: list[Any] = [p for p in self.params if p.param_type_name == "option"]
        repeatable = {name for p in options if p.multiple for name in p.opts}
        single = {name for p in options if not p.multiple and not p.is_flag for name in p.opts}
        return super().parse_args(ctx, spread(args, repeatable, single))


def spread(arguments: Sequence[str], repeatable: Collection[str], single: Collection[str]) -> list[str]:
    """Repeat an option's name before each of its values.

    Args:
        arguments: a command's arguments.
        repeatable: names of options that may take several values.
        single: names of options that take exactly one.
    Returns:
        arguments that a parser of one value an option understands.
    """
    end = arguments.index("--") if "--" in arguments else len(arguments)
    result: list[str] = []
    tails: list[list[int]] = []  # positions in `result` of the values after each repeatable option
    positional = end < len(arguments)
    option, taken = "", 0
    for argument in arguments[:end]:
        if argument.startswith("-") and argument != "-":
            name, equals, _ = argument.partition("=")
            option, taken = name, int(bool(equals))
            result.append(argument)
            if name in repeatable:
                tails.append([])
        elif option in repeatable:
            if taken:
                result.append(option)
            tails[-1].append(len(result))
            result.append(argument)
            taken += 1
        else:
            positional = positional or not (option in single and not taken)
            result.append(argument)
            taken += 1
    if not positional:
        last = next((tail[-1] for tail in tails if len(tail) > 1), None)
        if last is not None:
            # Without the option's name before it, a value is positional.
            del result[last - 1]
    return [*result, *arguments[end:]]
