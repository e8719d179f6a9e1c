"""The book's settings: `python -m sphinx -W docs build/docs`. Nothing is fetched, when it is built or read."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "_ext"), str(HERE.parent)]

import bbb_ao  # noqa: E402

project = "bbb_ao"
author = "the bbb_ao authors"
project_copyright = author
version = release = bbb_ao.__version__

extensions = ["myst_parser", "mathml", "recipe_keys", "command_line"]
exclude_patterns = ["_ext"]
myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 3
nitpicky = True

smartquotes = False

html_theme = "alabaster"
html_theme_options = {
    "description": "Language models at 8, 4 and 2 bits from one checkpoint",
    "show_powered_by": False,
    "page_width": "1080px",
}
html_math_renderer = "mathml"
html_copy_source = False
html_show_sourcelink = False
html_show_copyright = False
