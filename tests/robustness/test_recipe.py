"""Every bad recipe of the robustness list: exit code 2, one line, nothing written."""

from pathlib import Path

import pytest

VALID = "schema: 1\nname: x\nstages: [{weight_bits: 2, lr: 1e-3}]\n"
DEEP = "name: " + "[" * 500 + "]" * 500
BOMB = "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n"
FILES = {
    "unknown key": (VALID + "sequnces: 3\n", "did you mean sequences?"),
    "unknown key in a stage": ("name: x\nstages: [{weight_bit: 2}]\n", "did you mean weight_bits?"),
    "unknown key in the grid": (VALID + "grid: {group: 32}\n", "grid.group: expected a known key"),
    "duplicate key": (VALID + "name: y\n", "'name' twice"),
    "duplicate key inside": ("name: x\nstages: [{lr: 1, lr: 2}]\n", "'lr' twice"),
    "python object": ("name: !!python/object/apply:os.getcwd []\n", "python/object"),
    "any explicit tag": ("name: !!binary aGk=\n", "the tag"),
    "alias bomb": (BOMB, "anchor or alias"),
    "over 1 MB": (VALID + "# " + "x" * 2**20, "at most 65536 bytes"),
    "as long as may be": ("name: [" + "[], " * 16_000 + "]\n", "expected"),
    "deeply nested": (DEEP, "levels"),
    "empty": ("", "an empty file"),
    "only a comment": ("# nothing\n", "an empty file"),
    "a list": ("- 1\n", "expected a mapping"),
    "broken": ("name: [x\n", "line 2"),
    "two documents": ("name: x\n---\nname: y\n", "line 2"),
    "binary": (b"\x00\x01\x02\x03", "printable text"),
    "not UTF-8": (b"name: \xff\xfe\n", "UTF-8"),
    "byte-order mark": (b"\xef\xbb\xbf" + VALID.encode(), "byte-order mark"),
    "UTF-16": (VALID.encode("utf-16"), "byte-order mark"),
    "newer schema": (VALID.replace("schema: 1", "schema: 2") + "new_key: 1\n", "schema: expected 1 or lower, got 2"),
    "no stages": ("name: x\nstages: []\n", "at least one stage"),
    "stages missing": ("name: x\n", "stages: expected a value, got nothing"),
    "a key that is no text": (VALID + "3: 4\n", "a key that is not text"),
}
SETTINGS = {
    "stages.0.weight_bits=3.5": "a whole number",
    'stages.0.weight_bits="2"': "a whole number",
    "stages.0.weight_bits=true": "a whole number",
    "stages.0.weight_bits=0": "from 2 to 8",
    "stages.0.weight_bits=9": "from 2 to 8",
    "stages.0.weight_bits=[4, 8]": "widths that fall",
    "stages.0.weight_bits=[8, 8]": "widths that fall",
    "stages.0.weight_bits=[]": "from 2 to 8",
    "stages.0.act_bits=1.5": "a whole number",
    "stages.0.act_bits=9": "from 2 to 8",
    "stages.2.weight_bits=8": "stages.2.weight_bits: expected at most 4",
    "stages.0.act_bits=8": "stages.1.act_bits: expected at most 8",
    "stages.0.scope=model": "stages.1.scope: expected model",
    "stages.0.lr=.nan": "a finite number > 0",
    "stages.0.lr=.inf": "a finite number > 0",
    "stages.0.lr=1e999": "a finite number > 0",
    "stages.0.lr=nan": "a number",
    "stages.0.lr=-1e-4": "a finite number > 0",
    "stages.0.lr=0": "a finite number > 0",
    "stages.0.epochs=-1": "a finite number >= 0",
    "stages.0.objective=kl": "forward_kl, reverse_kl, mixed_kl or next_token",
    "stages.0.objective=mixed_kl": "none in a block stage",
    "stages.0.train=weights": "all or scales",
    "stages.0.text=both": "without generated sequences",
    "clip.lowest=0": "a finite number > 0",
    "clip.metric=outputs": "weight or activation",
    "clip.low=0.5": "did you mean lowest?",
    "lr=1e-4": "did you mean stages.*.lr?",
    "ratio_max=0.1": "did you mean split.ratio_max?",
    "average=2": "<= 1",
    "generated=-1": "from 0 to",
    "logits=-1": "a finite number >= 0",
    "logits=0.5": "logits: expected 0 without lookahead, got 0.5; fix: set lookahead",
    "stages.0.batch_size=0": "from 1 to",
    "stages.0.loss_weights=[1, 1]": "1 finite numbers",
    "grid.group_size=0": "a multiple of 32",
    "grid.group_size=48": "a multiple of 32",
    "grid.kind=integer": "zero_point_bits",
    "split.ratio_max=1.5": "<= 1",
    "schema=2": "schema",
    "sequences=1000000000000000000000000000000": "sequences",
    "default_bits=4": "as the last stage trains",
    "head_bits=1": "head_bits: expected a whole number from 2 to 8, or null, got 1",
    "head_bits=16": "head_bits: expected a whole number from 2 to 8, or null, got 16",
    'head_bits="8"': "head_bits: expected a whole number",
    "targets=[]": "at least one pattern",
    "targets=['(a+)+b']": "cannot backtrack",
    "skip=['(a|a)*b']": "cannot backtrack",
    "skip=['(a?){40}a{40}']": "cannot backtrack",
    "skip=['(.*)\\1']": "plain groups",
    "targets=['[']": "a regular expression",
    "cache=gpu": "memory or disk",
    "stages.9.lr=1": "got '9'",
    "stages.3=1": "got '3'",
    "lr": "expected key=value",
    "name=!!python/name:os.system": "the tag",
}


def train(refused, recipe: object, tmp_path: Path, *more: str) -> str:
    return refused(2, "train", tmp_path, "--data", "x.txt", "--recipe", recipe, "--output", tmp_path / "out", *more)


@pytest.mark.parametrize("name", FILES)
def test_bad_recipe_file_is_refused(name: str, refused, tmp_path: Path) -> None:
    content, expected = FILES[name]
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    message = train(refused, path, tmp_path)
    assert expected in message
    assert str(path) in message
    assert "; fix: " in message


@pytest.mark.parametrize("setting", SETTINGS)
def test_bad_setting_is_refused(setting: str, refused, tmp_path: Path) -> None:
    message = train(refused, "smoke", tmp_path, "--set", setting)
    assert SETTINGS[setting] in message
    assert "; fix: " in message


@pytest.mark.parametrize(
    "recipe", ["w2a61", "missing.yaml", "a/b", "../smoke", "/", "", f"{'x' * 300}.yaml", "x\0.yaml", "/dev/zero"]
)
def test_unknown_recipe_is_refused(recipe: str, refused, tmp_path: Path) -> None:
    line = train(refused, recipe, tmp_path)
    assert ("got a folder or device" if recipe in ("/", "/dev/zero") else "recipe") in line


def test_a_near_name_is_suggested(refused, tmp_path: Path) -> None:
    assert "did you mean w2a16?" in train(refused, "w2a61", tmp_path)


def test_control_characters_are_escaped(refused, tmp_path: Path) -> None:
    message = train(refused, "bad\x1b[2J\n\u202ename.yaml", tmp_path)
    assert "\\x1b[2J\\n\\u202e" in message
