"""Regular expressions for layer names that cannot run away.

Python's matcher backtracks, so that `(a+)+b` takes 2**n steps on a name of n letters. A pattern is accepted only where
the number of ways in which it can be laid over a name of 128 characters, an upper bound on the matcher's work, is at
most 129**3 (three open-ended quantifiers in a row):

    ways(ab) = ways(a) ways(b)
    ways(a|b) = ways(a) + ways(b)
    ways(a{m,n}) = sum over k = m .. min(n, 128) of ways(a)**k

Groups are plain: `(...)` or `(?:...)`; back references, look-around and inline flags are refused.
"""

import re

from bbb_ao.errors import RecipeError

NAME_LENGTH = 128
MOST_WAYS = (NAME_LENGTH + 1) ** 3
MOST_CHARACTERS = 256
QUANTIFIER = re.compile(r"[*+?]|\{(\d*)(,?)(\d*)\}")


def check_pattern(pattern: str, field: str) -> None:
    """Refuse a pattern that is no regular expression or that could take exponential time.

    Raises:
        RecipeError: the message starts with `field`.
    """
    fix = "fix: use literal names, .* and (a|b), for example .*\\.mlp\\.(up|down)_proj"
    if not isinstance(pattern, str) or not 0 < len(pattern) <= MOST_CHARACTERS:
        raise RecipeError(
            f"{field}: expected a pattern of 1 to {MOST_CHARACTERS} characters, got {pattern!r:.60}; {fix}"
        )
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise RecipeError(f"{field}: expected a regular expression, got {pattern!r:.80} ({error}); {fix}") from None
    if re.search(r"\(\?(?!:)|\\[1-9]", pattern):
        raise RecipeError(
            f"{field}: expected plain groups only, got {pattern!r:.80} (look-around, flag or back reference); {fix}"
        )
    if _ways(pattern) > MOST_WAYS:
        raise RecipeError(
            f"{field}: expected a pattern that cannot backtrack without bound, got {pattern!r:.80} "
            f"(repeated quantifiers or alternatives); {fix}"
        )


def _ways(pattern: str) -> int:
    """The count of the module's docstring, capped above MOST_WAYS; `pattern` is valid and has plain groups only."""
    # One frame a group: [ways of finished alternatives, of the current one without its last atom, of its last atom].
    frames = [[0, 1, 1]]
    position = 0
    while position < len(pattern):
        character = pattern[position]
        total, product, last = frames[-1]
        if match := QUANTIFIER.match(pattern, position):
            frames[-1][2] = _repeat(last, match)
            # A trailing ? or + makes the quantifier lazy or possessive: the same ways, or fewer.
            following = pattern[match.end() : match.end() + 1]
            position = match.end() + (following in ("?", "+") and following != "")
            continue
        if character == "|":
            frames[-1] = [total + product * last, 1, 1]
        elif character == "(":
            frames[-1] = [total, product * last, 1]
            frames.append([0, 1, 1])
            position += 2 if pattern.startswith("(?:", position) else 0
        elif character == ")":
            frames.pop()
            frames[-1][2] = min(total + product * last, MOST_WAYS + 1)
        else:
            frames[-1] = [total, min(product * last, MOST_WAYS + 1), 1]
            position = _end_of_atom(pattern, position) - 1
        position += 1
    total, product, last = frames[0]
    return total + product * last


def _repeat(ways: int, quantifier: re.Match[str]) -> int:
    text = quantifier.group()
    if text in ("*", "+", "?"):
        low, high = {"*": (0, NAME_LENGTH), "+": (1, NAME_LENGTH), "?": (0, 1)}[text]
    else:
        low = min(int(quantifier[1] or 0), NAME_LENGTH)
        high = min(int(quantifier[3] or NAME_LENGTH), NAME_LENGTH) if quantifier[2] else low
    return min(sum(min(ways, MOST_WAYS) ** times for times in range(low, high + 1)), MOST_WAYS + 1)


def _end_of_atom(pattern: str, start: int) -> int:
    """Position after the escape, character class or single character at `start`."""
    if pattern[start] == "\\":
        return start + 2
    if pattern[start] != "[":
        return start + 1
    # In a class, a first `]` (also after ^) is a literal.
    position = start + 1 + (pattern[start + 1] == "^")
    position += pattern[position] == "]"
    while pattern[position] != "]":
        position += 2 if pattern[position] == "\\" else 1
    return position + 1
