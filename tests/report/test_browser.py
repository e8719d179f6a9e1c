"""The page in a real browser: nothing complains, nothing is asked for, and nothing overlaps, in any window."""

from pathlib import Path

import pytest
from chromium import Browser
from written_runs import evaluation_lines, log_lines

from bbb_ao.report import write_report

WINDOWS = [(1200, False), (1200, True), (390, False), (390, True)]

# Boxes of every text that shows: of the pictures, and of what stands in the page.
TEXTS = """
(() => {
  const shown = [...document.querySelectorAll("svg text")].filter(e => e.getClientRects().length);
  return shown.map(e => {
    const b = e.getBoundingClientRect(), s = e.ownerSVGElement.getBoundingClientRect();
    const id = e.ownerSVGElement.getAttribute("aria-labelledby");
    return {text: e.textContent, picture: id, box: [b.left, b.top, b.right, b.bottom],
            inside: b.left >= s.left - 1 && b.right <= s.right + 1 && b.top >= s.top - 1 && b.bottom <= s.bottom + 1,
            size: parseFloat(getComputedStyle(e).fontSize) * s.width / e.ownerSVGElement.viewBox.baseVal.width};
  });
})()
"""


@pytest.fixture(scope="module", params=["finished", "large"])
def report(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a small run with evaluations, and of one of 80 blocks without."""
    from written_runs import write_lines

    folder = tmp_path_factory.mktemp("report")
    small = request.param == "finished"
    write_lines(folder / "out.log.jsonl", log_lines(3 if small else 80))
    if small:
        (folder / "out").mkdir()
        config = '{"model_type": "llama", "quantization_config": {"quant_method": "bitbybit"}}'
        (folder / "out" / "config.json").write_text(config)
        write_lines(folder / "out" / "evaluations.jsonl", evaluation_lines())
    return write_report(folder / "out")


@pytest.mark.parametrize(("width", "dark"), WINDOWS)
def test_page_renders_without_complaint(width: int, dark: bool, report: Path, browser: Browser, tmp_path: Path) -> None:
    browser.open(report, width, dark)
    assert browser.complaints == []
    assert browser.requests == [report.resolve().as_uri()]
    # No scrolling to the side.
    assert browser.evaluate("document.documentElement.scrollWidth") == width
    ground = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == ("rgb(18, 22, 26)" if dark else "rgb(255, 255, 255)")
    browser.picture(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 20_000


@pytest.mark.parametrize("width", [1200, 390])
def test_words_of_charts_are_legible_and_apart(width: int, report: Path, browser: Browser) -> None:
    browser.open(report, width)
    texts = browser.evaluate(TEXTS)
    assert len(texts) > 50
    for text in texts:
        assert text["inside"], text
        assert text["size"] >= 11, text
    for number, first in enumerate(texts):
        for second in texts[number + 1 :]:
            if first["picture"] == second["picture"]:
                a, b = first["box"], second["box"]
                # Boxes are higher than their letters.
                across, high = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
                assert across <= 0 or high <= 4, (first, second)


def test_charts_and_tables_have_names(report: Path, browser: Browser) -> None:
    browser.open(report)
    browser.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
    nodes = browser.call("Accessibility.getFullAXTree")["nodes"]
    named = [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in nodes if not node["ignored"]]
    for role in ("image", "table", "region", "heading"):
        names = [name for kind, name in named if kind == role]
        assert names, role
        assert all(names), role


def test_a_request_and_an_error_would_be_seen(browser: Browser, tmp_path: Path) -> None:
    """What the tests above rely on."""
    bad = tmp_path / "bad.html"
    bad.write_text("<img src='http://127.0.0.1:9/x.png'><script>throw new Error('seen')</script>")
    browser.open(bad)
    assert "http://127.0.0.1:9/x.png" in browser.requests
    assert any("seen" in each for each in browser.complaints)
