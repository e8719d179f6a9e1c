"""The page is whole, harmless and readable: text from elsewhere is only text, and charts have words and tables."""

import re
import shlex
from collections.abc import Callable
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from written_runs import Lines, evaluation_lines, log_lines

from bbb_ao.report.markup import shell
from bbb_ao.report.page import page
from bbb_ao.report.records import read_run

EMPTY = {"meta", "br"}
HOSTILE = "<script>alert(1)</script>\"'><img src=http://x.test/ onerror=alert(2)>&amp;\ud800\x1b]0;\u202e\x00"


class Outline(HTMLParser):
    """Elements with their attributes, the text, and whether every element that opens is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text: list[str] = []
        self._stack: list[str] = []
        self.feed(text)
        self.close()
        assert self._stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in EMPTY:
            self._stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._stack.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def all(self, name: str) -> list[dict[str, str]]:
        return [attributes for tag, attributes in self.elements if tag == name]


def poison(value: Any) -> Any:
    """The same JSON with hostile text in every string but those that choose what a line means."""
    if isinstance(value, dict):
        fixed = ("event", "when", "of", "metric")
        return {
            k if k in fixed or not k.startswith("model.") else k + HOSTILE: v if k in fixed else poison(v)
            for k, v in value.items()
        }
    if isinstance(value, list):
        return [poison(item) for item in value]
    return value + HOSTILE if isinstance(value, str) else value


def make(write_run: Callable[..., Path], log: Lines | None, evaluations: Lines | None, name: str = "out") -> str:
    return page(read_run(write_run(log, evaluations, name)))


def test_text_from_elsewhere_is_only_text(write_run) -> None:
    name = HOSTILE.replace("/", "_").replace("\x00", "").replace("\ud800", "")
    directory = write_run(poison(log_lines()), poison(evaluation_lines()), name)
    (directory / "recipe.yaml").write_text(f"name: {HOSTILE}".replace("\ud800", ""))
    text = page(read_run(directory))
    outline = Outline(text)
    text.encode("utf-8")
    harmless = Outline(make(write_run, log_lines(), evaluation_lines()))
    assert {tag for tag, _ in outline.elements} == {tag for tag, _ in harmless.elements}
    names = {name for _, attributes in outline.elements for name in attributes}
    assert names == {name for _, attributes in harmless.elements for name in attributes}
    assert "alert(1)" in "".join(outline.text)
    assert all(c.isprintable() or c == "\n" for c in text)


def test_nothing_is_asked_of_the_network(write_run) -> None:
    text = make(write_run, log_lines(), evaluation_lines())
    outline = Outline(text)
    assert not {"script", "link", "img", "iframe", "object", "base", "form", "a"} & {tag for tag, _ in outline.elements}
    assert "url(" not in text
    assert "@import" not in text
    assert "//" not in re.sub(r"--data \S+", "", text)
    (policy,) = [each["content"] for each in outline.all("meta") if "http-equiv" in each]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_the_same_run_gives_the_same_page(write_run) -> None:
    directory = write_run(log_lines(), evaluation_lines())
    assert page(read_run(directory)) == page(read_run(directory))


def test_every_chart_has_words_and_a_table(write_run) -> None:
    text = make(write_run, log_lines(), evaluation_lines())
    outline = Outline(text)
    identities = [attributes["id"] for _, attributes in outline.elements if "id" in attributes]
    assert len(identities) == len(set(identities))
    for picture in outline.all("svg"):
        assert picture["role"] == "img"
        assert set(picture["aria-labelledby"].split()) <= set(identities)
    for part in outline.all("section"):
        assert part["aria-labelledby"] in identities
    captions = re.findall(r"<caption>(.*?)</caption>", text)
    assert captions == [
        "Perplexity on held_out.jsonl",
        "Tasks",
        "Loss by block and stage",
        "Relative squared error of every layer",
        "Channels of every input",
        "Time and memory by phase",
        "What the run depends on",
    ]


def test_tables_hold_the_figures(write_run) -> None:
    text = make(write_run, log_lines(), evaluation_lines())
    cells = set(re.findall(r"<td>(.*?)</td>", text))
    assert {"55.5000", "10.2500", "2.375", "0.7500", "0.03", "0.005", "61.0", "1.00", "2.13.0"} <= cells
    assert "Splitting shared 24 of 384 channels" in text
    assert "18 channels were above 3 times the median, after it 6," in text
    assert "loss 0.2 over the first tenth of 4 steps, 0.1 over the last" in text
    assert "3 min 13 s" in text
    assert "bbb-ao train model \\\n  --data text.jsonl \\\n  --recipe smoke" in text


def test_losses_that_are_no_numbers_stand_in_the_table_alone(write_run) -> None:
    lines = log_lines()
    blocks = [line for line in lines if line["event"] == "block"]
    blocks[0] |= {"first_loss": "inf", "last_loss": "nan"}
    blocks[1] |= {"first_loss": 0.0, "last_loss": -1.0}
    text = make(write_run, lines, None)
    assert {"inf", "nan", "-1"} <= set(re.findall(r"<td>(.*?)</td>", text))
    assert not re.findall(r'="-?(?:nan|inf)"', text)
    for numbers in (0.0, "nan", 1e308, 1e-308):
        for block in blocks:
            block |= {"first_loss": numbers, "last_loss": numbers}
        directory = write_run(lines, None, f"all-{numbers}")
        assert not re.findall(r'="-?(?:nan|inf)"', page(read_run(directory)))


def test_what_is_missing_is_named_with_the_command_that_adds_it(write_run) -> None:
    text = make(write_run, log_lines(), None)
    assert "Not measured yet" in text
    assert re.search(r"bbb-ao eval \S+/out \\\n  --data FILE \\\n  --baseline model", text)
    own = [line for line in evaluation_lines() if line.get("of") == "checkpoint"]
    assert "Full precision or round to nearest is not measured" in make(write_run, None, own, "second")
    alone = make(write_run, None, None, "third")
    assert re.search(r"bbb-ao report \S+/third \\\n  --log FILE", alone)
    assert "sequences: 16" in alone


def test_a_command_keeps_its_words() -> None:
    words = ["bbb-ao", "train", "a --b", "--data", "it's", "--set", "x=[1, 2]"]
    shown = "".join(Outline(shell(shlex.join(words))).text)
    assert len(shown.splitlines()) == 3
    assert shlex.split(shown.replace("\\\n", "")) == words
    assert "it&#x27;s broken" in shell("it's broken")


def test_a_run_without_splitting_says_so(write_run) -> None:
    text = make(write_run, log_lines(splits=False), None)
    assert "This run splits no channel; 18 of 384 are above 3 times the median" in text
    assert "after splitting" not in text


def test_an_unfinished_run_says_how_far_it_is(tmp_path: Path, write_run) -> None:
    lines = log_lines()
    cut = next(n for n, line in enumerate(lines) if line.get("stage") == 1) + 2
    directory = write_run(lines[:cut], None)
    (directory / "config.json").unlink()
    text = page(read_run(directory))
    assert "Not finished: stage 2, w2a16, has done 1 of 3 blocks." in text
    assert "Not to be measured before the run is finished" in text


def test_experts_share_a_panel(write_run) -> None:
    lines = log_lines(1)
    layers = [line for line in lines if line["event"] == "layers"]
    for line in layers:
        line["errors"] = {f"model.layers.0.mlp.experts.{n}.w1": n / 100 for n in range(1, 40)}
    text = make(write_run, lines, None)
    assert text.count("<h3>mlp.experts.*.w1</h3>") == 1
    assert "mlp.experts.39.w1" in text


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_stand_out(scheme: str) -> None:
    """WCAG 2.2, AA: 4.5 to 1 for text, 3 to 1 for what a chart is made of."""
    style = (files("bbb_ao.report") / "page.css").read_text(encoding="utf-8")
    light, dark = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    colours = dict(re.findall(r"--(\w+): (#\w{6})", light if scheme == "light" else dark))
    for names, least in ((("ink", "soft", "main", "other", "muted"), 4.5), (("edge",), 3.0)):
        for name in names:
            for ground in ("page", "panel") if name == "ink" else ("page",):
                high, low = sorted((luminance(colours[name]), luminance(colours[ground])), reverse=True)
                assert (high + 0.05) / (low + 0.05) >= least, f"{name} on {ground}"
