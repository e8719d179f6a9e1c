"""Documents and sequences: seeds, order, and what is read. Bad files are in tests/cli/test_data_errors.py."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bbb_ao.errors import DataError
from bbb_ao.recipes import textfiles
from bbb_ao.recipes.data import calibration_sequences, evaluation_windows, load_documents, pack_sequences
from bbb_ao.recipes.textfiles import index_file


class Bytes:
    """A tokenizer of UTF-8 bytes; the beginning token is 256."""

    bos_token_id: int | None = 256

    def __init__(self) -> None:
        self.read = 0

    def __call__(self, texts: list[str], **_: object) -> "Bytes":
        self.input_ids = [list(text.encode()) for text in texts]
        self.read += sum(map(len, self.input_ids))
        return self


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "corpus.jsonl", [f"document {i:03} " * 8 for i in range(200)])


@given(tokens=st.integers(1, 300), length=st.integers(1, 40), share=st.floats(0, 1), seed=st.integers(0, 2**63 - 1))
def test_packed_sequences_are_distinct_windows(tokens: int, length: int, share: float, seed: int) -> None:
    available = tokens // length
    count = max(1, int(share * available))
    ids = torch.arange(tokens, dtype=torch.int32)
    if not available:
        with pytest.raises(DataError, match=f"expected {count} of {length} tokens, got 0"):
            pack_sequences(ids, length, count, seed)
        return
    packed = pack_sequences(ids, length, count, seed)
    assert packed.shape == (count, length)
    assert packed.dtype == torch.int64
    starts = packed[:, 0]
    assert torch.equal(packed, starts[:, None] + torch.arange(length))
    assert bool((starts % length == 0).all())
    assert starts.unique().numel() == count
    assert torch.equal(packed, pack_sequences(ids.tolist(), length, count, seed))


def test_fewer_sequences_than_asked_says_how_many() -> None:
    expected = r"expected 8 of 10 tokens, got 5 \(57 tokens\); fix: .*sequences to at most 5"
    with pytest.raises(DataError, match=expected):
        pack_sequences(torch.arange(57), 10, 8, 0)
    with pytest.raises(DataError, match=r"give more text, or set sequence_length to at most 7$"):
        pack_sequences(torch.arange(57), 100, 8, 0)
    assert pack_sequences(torch.arange(57), 7, 8, 0).shape == (8, 7)
    with pytest.raises(DataError, match=r"give more text$"):
        pack_sequences(torch.arange(15), 100, 8, 0)
    with pytest.raises(DataError, match="no token"):
        pack_sequences([], 10, 8, 0)


def test_one_seed_gives_the_same_sequences_and_another_others(corpus: Path) -> None:
    first, again, other = (calibration_sequences(Bytes(), corpus, 8, 64, seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_only_a_part_of_a_large_file_is_tokenized(corpus: Path) -> None:
    tokenizer = Bytes()
    calibration_sequences(tokenizer, corpus, 2, 64, 0)
    assert 0 < tokenizer.read < corpus.stat().st_size / 2


def test_documents_are_permuted_across_files(tmp_path: Path) -> None:
    paths = [write_jsonl(tmp_path / f"{name}.jsonl", [f"{name}{i}" for i in range(50)]) for name in "ab"]
    drawn = [document.text for document in load_documents(paths, seed=3)]
    in_order = [document.text for document in load_documents(paths)]
    assert in_order == [f"{name}{i}" for name in "ab" for i in range(50)]
    assert sorted(drawn) == sorted(in_order)
    assert drawn != in_order
    assert {text[0] for text in drawn[:20]} == {"a", "b"}


def test_folder_is_its_files_in_order(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write_jsonl(tmp_path / "sub" / "z.jsonl", ["third"])
    write_jsonl(tmp_path / "b.jsonl", ["second"])
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "readme.md").write_text("no")
    assert [d.text for d in load_documents(tmp_path)] == ["first", "second", "third"]


def test_parquet_streams_with_a_seed(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    texts = [f"row {i}" for i in range(30)]
    parquet.write_table(arrow.table({"text": texts}), tmp_path / "d.parquet")
    assert [d.text for d in load_documents(tmp_path / "d.parquet")] == texts
    drawn = [[d.text for d in load_documents(tmp_path / "d.parquet", seed=s)] for s in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert sorted(drawn[0]) == sorted(texts)


def test_windows_follow_the_protocol(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", ["abc", "", "defg"])
    expected = [256, *b"abc", 256, 256, *b"defg"]
    assert evaluation_windows(Bytes(), path, 5).tolist() == [expected[:5], expected[5:]]
    assert evaluation_windows(Bytes(), path, 5, limit=1).tolist() == [expected[:5]]
    (tmp_path / "d.txt").write_bytes(b"abc\r\ndef\rgh")
    assert evaluation_windows(Bytes(), tmp_path / "d.txt", 4).tolist() == [list(b"abc\n"), list(b"def\n")]


def test_tokenizer_without_beginning_token_adds_none(tmp_path: Path) -> None:
    tokenizer = Bytes()
    tokenizer.bos_token_id = None
    path = write_jsonl(tmp_path / "d.jsonl", ["ab", "cd"])
    assert evaluation_windows(tokenizer, path, 4).tolist() == [list(b"abcd")]


@pytest.mark.parametrize("text", ["ä€😀" * 50, "word " * 99, "line\n" * 99, "x" * 333, "\r\n" * 80, "a\r\n😀" * 60])
def test_pieces_of_a_text_join_to_the_whole(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(textfiles, "PIECE_BYTES", 16)
    (tmp_path / "d.txt").write_bytes(text.encode())
    index = index_file(tmp_path / "d.txt")
    assert len(index) > 5
    whole = (tmp_path / "d.txt").read_text()
    assert "".join(index.read(i).text for i in range(len(index))) == whole
    assert [d.text for d in load_documents(tmp_path / "d.txt")] == [whole]


def test_lines_longer_than_the_limit_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(textfiles, "MOST_LINE_BYTES", 64)
    path = write_jsonl(tmp_path / "d.jsonl", ["short", "long " * 50])
    with pytest.raises(DataError, match="line 2: expected at most 64 bytes"):
        index_file(path)


def test_bad_line_is_named_when_drawn(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", ["good"] * 9)
    with path.open("a") as file:
        file.write('{"text": nonsense}\n')
    with pytest.raises(DataError, match=r"d\.jsonl: line 10: expected a JSON object"):
        list(load_documents(path, seed=0))
