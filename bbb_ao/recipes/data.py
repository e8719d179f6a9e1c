"""Calibration and evaluation text: files, folders or hub datasets, as token sequences of one length.

Protocol: each document of a .jsonl, a .parquet file or a hub dataset is BOS + text; a .txt file is one document without
BOS; a tokenizer without a BOS token adds none. All ids are concatenated and cut into windows that do not overlap.
"""

import random
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bbb_ao.errors import DataError
from bbb_ao.recipes.sources import HUB_NAME, Sources, resolve_sources
from bbb_ao.recipes.textfiles import Document, TextFile, document_of_row, index_file, read_whole

# Sequences are drawn from this many times as many tokens as they hold, where there are as many.
OVERSAMPLE = 4
SHUFFLE_BUFFER = 1000  # documents
TOKENIZER_BATCH = 32  # documents


def calibration_sequences(
    tokenizer: Any, sources: Sources, count: int, length: int, seed: int, vocab_size: int | None = None
) -> Tensor:
    """Draw token sequences for training; one seed always gives the same ones.

    Documents are read in a seeded random order until they hold OVERSAMPLE * count * length tokens or the text ends, and
    windows are drawn from these, so that a file of many gigabytes is scanned but never held.

    Args:
        tokenizer: a Hugging Face tokenizer.
        sources: see `load_documents`.
        vocab_size: ids must be smaller; None does not check.
    Returns:
        int64 [count, length].
    Raises:
        DataError: see `load_documents`, `tokenize` and `pack_sequences`.
    """
    wanted = OVERSAMPLE * count * length
    pieces: list[Tensor] = []
    total = 0
    for ids in tokenize(tokenizer, load_documents(sources, seed), vocab_size):
        pieces.append(ids)
        total += ids.numel()
        if total >= wanted:
            break
    return pack_sequences(_concatenate(pieces), length, count, seed)


def evaluation_windows(
    tokenizer: Any, sources: Sources, window: int = 1024, limit: int | None = None, vocab_size: int | None = None
) -> Tensor:
    """All text in its own order, cut into windows; the remainder is dropped.

    Args:
        window: tokens in each.
        limit: keep at most the first so many windows.
    Returns:
        int64 [windows, window].
    Raises:
        DataError: see `load_documents` and `tokenize`; or less text than one window.
    """
    documents = load_documents(sources)
    pieces: list[Tensor] = []
    total = 0
    for ids in tokenize(tokenizer, documents, vocab_size):
        pieces.append(ids)
        total += ids.numel()
        if limit and total >= limit * window:
            break
    ids = _concatenate(pieces)
    count = ids.numel() // window
    if not count:
        raise DataError(f"data: tokens: expected at least one window of {window}, got {total}; fix: give more text")
    count = min(count, limit or count)
    return ids[: count * window].view(count, window).long()


def pack_sequences(ids: Tensor | Sequence[int], length: int, count: int, seed: int) -> Tensor:
    """Cut ids into sequences that do not overlap and draw some of them, shuffled.

    Args:
        ids: token ids, [tokens], an integer dtype.
        length: tokens in a sequence.
        count: sequences to draw.
        seed: of the draw.
    Returns:
        int64 [count, length].
    Raises:
        DataError: no token, or fewer sequences than asked.
    """
    ids = torch.as_tensor(ids)
    if not ids.numel():
        raise DataError("data: tokens: expected text, got no token; fix: give a file with text")
    available = ids.numel() // length
    if available < count:
        fix = "give more text"
        if available:
            fix += f", or set sequences to at most {available}"
        elif (shorter := ids.numel() // count) > 1:
            fix += f", or set sequence_length to at most {shorter}"
        raise DataError(
            f"data: sequences: expected {count} of {length} tokens, got {available} ({ids.numel()} tokens); fix: {fix}"
        )
    order = torch.randperm(available, generator=torch.Generator().manual_seed(seed))[:count]
    return ids[: available * length].view(available, length)[order].long()


def tokenize(tokenizer: Any, documents: Iterable[Document], vocab_size: int | None = None) -> Iterator[Tensor]:
    """Token ids of each document, int32 [tokens], with the BOS token where the document has one.

    Raises:
        DataError: text that the tokenizer cannot read, or an id of vocab_size or more.
    """
    documents = iter(documents)
    while batch := list(islice(documents, TOKENIZER_BATCH)):
        for document in batch:
            if not document.text.isascii() and re.search("[\ud800-\udfff]", document.text):
                raise DataError(
                    f"{document.source}: text: expected characters, got half of a surrogate pair; fix: drop it"
                )
        encoded = tokenizer([document.text for document in batch], add_special_tokens=False, verbose=False).input_ids
        for document, ids in zip(batch, encoded, strict=True):
            bos = document.starts_with_bos and tokenizer.bos_token_id is not None
            tensor = torch.tensor([tokenizer.bos_token_id, *ids] if bos else ids, dtype=torch.int32)
            if vocab_size is not None and tensor.numel() and int(tensor.max()) >= vocab_size:
                raise DataError(
                    f"{document.source}: token id: expected below {vocab_size}, the model's vocabulary, "
                    f"got {int(tensor.max())}; fix: use the model's own tokenizer"
                )
            yield tensor


def load_documents(sources: Sources, seed: int | None = None) -> Iterator[Document]:
    """Documents of all sources: in their order, or, with a seed, in a random one.

    Random order: documents of all .jsonl files and pieces of all .txt files are permuted together; .parquet files and
    hub datasets are streamed through a shuffle buffer of SHUFFLE_BUFFER documents; and one document is taken in turn
    from each of these until all are at their end.

    Args:
        sources: one or several of: a .jsonl, .txt or .parquet file; a folder of these (searched in depth, by name); a
            hub dataset as owner/name, owner/name:config or owner/name:config:split (split "train" unless given).
    Raises:
        DataError: missing, empty, malformed (with the line), no text column, or a hub name while offline.
    """
    resolved = resolve_sources(sources)
    if seed is None:
        return (document for item in resolved for document in _in_order(item))
    texts = [index_file(item) for item in resolved if isinstance(item, Path) and item.suffix != ".parquet"]
    streams = [_stream(item, seed) for item in resolved if isinstance(item, str) or item.suffix == ".parquet"]
    if texts:
        streams.insert(0, _permuted(texts, seed))
    return _in_turn(streams)


def _in_order(item: Path | str) -> Iterator[Document]:
    if isinstance(item, Path) and item.suffix != ".parquet":
        return read_whole(item)
    return _stream(item, None)


def _permuted(texts: list[TextFile], seed: int) -> Iterator[Document]:
    # 8 bytes a piece; a list of pairs would take 100.
    owners = torch.repeat_interleave(torch.arange(len(texts)), torch.tensor([len(text) for text in texts]))
    positions = torch.cat([torch.arange(len(text)) for text in texts])
    order = torch.randperm(owners.numel(), generator=torch.Generator().manual_seed(seed))
    return (texts[int(owners[i])].read(int(positions[i])) for i in order)


def _in_turn(streams: list[Iterator[Document]]) -> Iterator[Document]:
    while streams:
        for stream in list(streams):
            document = next(stream, None)
            if document is None:
                streams.remove(stream)
            else:
                yield document


def _stream(item: Path | str, seed: int | None) -> Iterator[Document]:
    """Rows of a parquet file or a hub dataset, through `datasets` and without its cache on disk."""
    import datasets

    # Its log would come before our one line, with a traceback's worth of detail.
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    count = 0
    try:
        rows = _open(datasets, item)
        if seed is not None:
            rows = rows.shuffle(seed=random.Random(seed).getrandbits(32), buffer_size=SHUFFLE_BUFFER)
        for count, row in enumerate(rows, start=1):
            yield document_of_row(row, f"{item}: row {count}" if seed is None else str(item))
    except DataError:
        raise
    except Exception as error:  # datasets, pyarrow and the network each raise their own
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(
            f"{item}: rows: expected a readable dataset, got: {reason}; fix: check the name or file"
        ) from error
    if not count:
        raise DataError(f"{item}: rows: expected text, got an empty dataset; fix: give one with text")


def _open(datasets: Any, item: Path | str) -> Any:
    if isinstance(item, Path):
        return datasets.load_dataset("parquet", data_files=[str(item)], split="train", streaming=True)
    match = HUB_NAME.fullmatch(item)
    name, config, split = match.groups() if match else (item, None, None)
    return datasets.load_dataset(name, config or None, split=split or "train", streaming=True)


def _concatenate(pieces: list[Tensor]) -> Tensor:
    ids = torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int32)
    if not ids.numel():
        raise DataError("data: tokens: expected text, got no token; fix: give a file with text")
    return ids
