"""Text from one loaded checkpoint, at the width that each request asks for."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList, TextStreamer

from bbb_ao.errors import RecipeError
from bbb_ao.packed_linear import common_widths
from bbb_ao.recipes.loading import choose_device, load_model, load_tokenizer
from bbb_ao.speculation import at_bits, speculate

NEW_TOKENS = 128  # where nothing is said


@dataclass(frozen=True)
class Request:
    """What to write.

    Attributes:
        prompt: text, or messages for the tokenizer's chat template, each {"role": ..., "content": ...}.
        bits: width of the weights; None: as the checkpoint opens, or the widest where `draft_bits` is given.
        draft_bits: width that drafts tokens for `bits` to verify, greedily; draft_tokens: how many at a time.
        max_new_tokens: None: 128, or what the context has room for.
        temperature: 0 for the most likely token each time; seed: of the samples.
    """

    prompt: str | list[dict[str, str]]
    bits: int | None = None
    draft_bits: int | None = None
    draft_tokens: int = 4
    max_new_tokens: int | None = None
    temperature: float = 0.0
    seed: int = 0


def check_widths(request: Request, widths: Sequence[int]) -> None:
    """Refuse widths that are not stored, and drafts that are no narrower than what verifies them, or sampled.

    Args:
        widths: stored ones; none for a model that is not packed.
    Raises:
        RecipeError: names the field.
    """
    for name, width in (("bits", request.bits), ("draft_bits", request.draft_bits)):
        if width is not None and width not in widths:
            have = f"one of {', '.join(map(str, widths))}" if widths else "none for a model that is not packed"
            raise RecipeError(f"{name}: expected {have}, got {width}; fix: ask for a stored width")
    if request.draft_bits is None:
        return
    if len(widths) == 1:
        raise RecipeError(
            f"draft_bits: expected a checkpoint of several widths, got {widths[0]} bits alone; fix: leave it out"
        )
    if request.draft_bits >= (wide := request.bits or max(widths)):
        raise RecipeError(f"draft_bits: expected fewer than {wide}, got {request.draft_bits}; fix: lower it")
    if request.temperature:
        raise RecipeError(f"temperature: expected 0 with draft_bits, got {request.temperature:g}; fix: leave one out")


@dataclass(frozen=True)
class Completion:
    """What was written: `finish` is "stop" at the end of the text, else "length"; `summary` says how fast."""

    text: str
    prompt_tokens: int
    tokens: int
    finish: str
    summary: str


class Writer:
    """A model that is loaded once and runs at any width; the trees of other widths share its tensors.

    Attributes:
        widths: that can be asked for; empty for a model that is not packed.
        closing: once set, whatever is being written ends with the next token.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.widths = common_widths(model)
        self.closing = threading.Event()
        self._trees: dict[int, Any] = {}

    @classmethod
    def open(cls, directory: str, device: str | None, budget_gb: float | None) -> "Writer":
        """Load a directory that `check_opening` passed: in float32 on a CPU, else in the type that it is stored in.

        Raises:
            BitByBitError: the directory, the device or the budget cannot be used.
        """
        place, tokenizer = choose_device(device), load_tokenizer(directory)
        model = load_model(directory, "float32" if place.type == "cpu" else "auto", budget_gb)
        return cls(model.to(place), tokenizer)

    def prepare(self, request: Request) -> tuple[Tensor, int]:
        """Check a request before anything is computed.

        Returns:
            (the prompt's ids, int64 [1, tokens]; the most tokens to write).
        Raises:
            RecipeError: names the field.
        """
        check_widths(request, self.widths)
        if request.temperature and not 0.01 <= request.temperature <= 100:
            raise RecipeError(f"temperature: expected 0, or 0.01 to 100, got {request.temperature:g}; fix: change it")
        ids = self._encode(request.prompt)
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        room = (context or 2**31) - ids.shape[1]
        wanted = request.max_new_tokens or 1
        if room < wanted:
            raise RecipeError(
                f"prompt: expected room for its {ids.shape[1]} tokens and {wanted} more, got a context of {context}; "
                "fix: shorten it, or ask for fewer"
            )
        return ids.to(self.model.device), request.max_new_tokens or min(NEW_TOKENS, room)

    def write(self, request: Request, show: Callable[[str], Any]) -> Completion:
        """Continue a prompt; `show` receives the text piece by piece as it comes. One call at a time.

        Raises:
            RecipeError: see `prepare`; and whatever `show` raises, which ends the writing.
        """
        ids, limit = self.prepare(request)
        torch.manual_seed(request.seed)
        settings: dict[str, Any] = {
            "max_new_tokens": limit,
            "attention_mask": torch.ones_like(ids),
            "streamer": _Stream(self.tokenizer, show),
            "stopping_criteria": StoppingCriteriaList([_Closing(self.closing)]),
        }
        start = time.perf_counter()
        if request.draft_bits is not None:
            model = self._tree(request.bits or max(self.widths))
            found = speculate(model, self._tree(request.draft_bits), ids, request.draft_tokens, **settings)
            sequences, summary = found.sequences, str(found)
        else:
            sample = {"temperature": request.temperature} if request.temperature else {}
            with torch.no_grad():
                sequences = self._tree(request.bits).generate(ids, do_sample=bool(sample), **sample, **settings)
            tokens = sequences.shape[1] - ids.shape[1]
            summary = f"{tokens} tokens, {tokens / (time.perf_counter() - start):.1f} tokens/s"
        written = sequences[0, ids.shape[1] :].tolist()
        ends = self.model.generation_config.eos_token_id
        finish = "stop" if written[-1] in (ends if isinstance(ends, list) else [ends]) else "length"
        text = self.tokenizer.decode(written, skip_special_tokens=True)
        return Completion(text, ids.shape[1], len(written), finish, summary)

    def _encode(self, prompt: str | list[dict[str, str]]) -> Tensor:
        parts = [prompt] if isinstance(prompt, str) else [text for message in prompt for text in message.values()]
        try:
            for part in parts:
                part.encode()
        except UnicodeEncodeError:
            raise RecipeError("prompt: expected text in Unicode, got a lone surrogate; fix: encode it") from None
        if isinstance(prompt, str):
            ids = self.tokenizer(prompt, return_tensors="pt").input_ids
        elif not self.tokenizer.chat_template:
            raise RecipeError("messages: expected a tokenizer with a chat template, got none; fix: give a prompt")
        else:
            options: dict[str, Any] = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
            try:
                ids = self.tokenizer.apply_chat_template(prompt, **options).input_ids
            except Exception as error:  # a template raises what it likes
                raise RecipeError(
                    f"messages: expected some that fit the chat template, got: {error}; fix: change their roles"
                ) from error
        if not ids.shape[1]:
            raise RecipeError("prompt: expected at least one token, got none; fix: give some text")
        return ids.long()

    def _tree(self, bits: int | None) -> Any:
        if bits is None:
            return self.model
        if bits not in self._trees:
            self._trees[bits] = at_bits(self.model, bits)
        return self._trees[bits]


class _Stream(TextStreamer):
    """Hands over text as soon as whole words are there."""

    def __init__(self, tokenizer: Any, show: Callable[[str], Any]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.show = show

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self.show(text)


class _Closing(StoppingCriteria):
    def __init__(self, closing: threading.Event) -> None:
        self.closing = closing

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        return torch.full((input_ids.shape[0],), self.closing.is_set(), device=input_ids.device)
