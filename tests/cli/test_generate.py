"""`bbb-ao generate`: what it prints is what the model says, at every width, and its errors are one line."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bbb_ao.cli import completion
from bbb_ao.packed_linear import set_bits

PROMPT = "a prompt"
NEW = ("--max-new-tokens", 12)


def expected(directory: Path, bits: int, prompt: str = PROMPT) -> str:
    """Greedy decoding by transformers alone."""
    model = set_bits(AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval(), bits)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    done = model.generate(ids, max_new_tokens=12, do_sample=False)
    return tokenizer.decode(done[0, ids.shape[1] :], skip_special_tokens=True) + "\n"


def test_text_is_the_models_own_at_each_width(run, packed_model: Path) -> None:
    texts = {bits: expected(packed_model, bits) for bits in (2, 8)}
    assert texts[2] != texts[8]
    for bits, text in texts.items():
        result = run("generate", packed_model, PROMPT, "--bits", bits, *NEW)
        assert (result.code, result.out) == (0, text)
        assert result.err.startswith("12 tokens, ")
    assert run("generate", packed_model, PROMPT, *NEW).out == texts[2]
    assert run("generate", packed_model, PROMPT, "--budget-gb", 1, *NEW).out == texts[8]


def test_drafts_change_the_speed_only(run, packed_model: Path) -> None:
    for options, bits in ((("--draft-bits", 4), 8), (("--bits", 4, "--draft-bits", 2, "--draft-tokens", 2), 4)):
        result = run("generate", packed_model, PROMPT, *options, *NEW)
        assert result.out == expected(packed_model, bits)
        assert "drafted tokens (" in result.err


def test_chat_goes_through_the_template(run, packed_model: Path) -> None:
    result = run("generate", packed_model, PROMPT, "--chat", *NEW)
    assert result.out == expected(packed_model, 2, f"[{PROMPT}]")


def test_a_seed_decides_the_samples(run, packed_model: Path) -> None:
    texts = [run("generate", packed_model, PROMPT, "--temperature", 1, "--seed", seed, *NEW).out for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_plain_models_are_continued_too(run, model: Path) -> None:
    assert run("generate", model, PROMPT, *NEW).out == expected_plain(model)


def expected_plain(directory: Path) -> str:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    return tokenizer.decode(model.generate(ids, max_new_tokens=12)[0, ids.shape[1] :], skip_special_tokens=True) + "\n"


def test_text_comes_piece_by_piece(packed_model: Path) -> None:
    writer = completion.Writer.open(str(packed_model), "cpu", None)
    pieces: list[tuple[str, int]] = []
    passes = 0

    def count(*arguments: object) -> None:
        nonlocal passes
        passes += 1

    space = writer.tokenizer(" ").input_ids[0]

    # Streaming waits for the end of a word.
    def favour_spaces(module: object, args: object, output: Any) -> None:
        output.logits[..., space] += 5.0 * (passes % 3)

    writer.model.register_forward_pre_hook(count)
    writer.model.register_forward_hook(favour_spaces)
    done = writer.write(completion.Request(PROMPT, max_new_tokens=12), lambda text: pieces.append((text, passes)))
    assert "".join(text for text, _ in pieces) == done.text
    assert len({step for _, step in pieces}) > 1


@pytest.mark.parametrize(
    ("code", "arguments", "words"),
    [
        (2, ("--bits", 9), "--bits"),
        (2, ("--bits", 2, "--budget-gb", 1), "got both"),
        (2, ("--draft-bits", 8), "expected fewer than 8"),
        (2, ("--draft-bits", 4, "--bits", 4), "expected fewer than 4"),
        (2, ("--draft-bits", 2, "--temperature", 1), "temperature: expected 0 with draft_bits"),
        (2, ("--draft-tokens", 0), "draft-tokens"),
        (2, ("--temperature", "nan"), "temperature"),
        (2, ("--temperature", 1e-9), "temperature"),
        (2, ("--max-new-tokens", 57), "room for its 8 tokens and 57 more, got a context of 64"),
        (2, ("--seed", -1), "seed"),
        (2, ("--budget-gb", -1), "--budget-gb: expected a positive number"),
        (2, ("--budget-gb", "nan"), "--budget-gb: expected a positive number"),
        (5, ("--budget-gb", 1e-5), "budget_gb: expected at least"),
        (5, ("--device", "tpu"), "device"),
    ],
)
def test_bad_requests_are_refused(refused, packed_model: Path, code: int, arguments: tuple, words: str) -> None:
    assert words in refused(code, "generate", packed_model, PROMPT, *arguments)


def test_a_single_width_cannot_draft(refused, packed_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bbb_ao.checkpoint.openable_widths", lambda directory: [2])
    line = refused(2, "generate", packed_model, PROMPT, "--draft-bits", 2)
    assert "expected a checkpoint of several widths, got 2 bits alone" in line


def test_bad_prompts_are_refused(refused, packed_model: Path, model: Path) -> None:
    assert "at least one token" in refused(2, "generate", packed_model, "")
    assert "lone surrogate" in refused(2, "generate", packed_model, "\udc80")
    assert "room for its 65 tokens" in refused(2, "generate", packed_model, "x" * 65)
    assert "chat template" in refused(2, "generate", model, PROMPT, "--chat")
    assert "not packed" in refused(2, "generate", model, PROMPT, "--bits", 4)
    assert "bbb_ao checkpoint" in refused(2, "generate", model, PROMPT, "--budget-gb", 1)
    assert "expected a directory" in refused(3, "generate", model / "config.json", PROMPT)
