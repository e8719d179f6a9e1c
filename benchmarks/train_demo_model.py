"""Train the small language model that the package ships for `make demo`, on the text of Python's standard library.

    python benchmarks/train_demo_model.py OUTPUT_DIR REPORT.json [--stdlib DIR]... [--steps N] [--time-limit SECONDS]

A byte-level BPE tokenizer and a Llama-architecture model (tied embeddings, grouped-query attention) are trained on the
training side of the split in `bbb_ao/demo/stdlib_corpus.py`; the held-out modules choose the checkpoint and give the
reported perplexity. Needs torch, transformers, tokenizers and safetensors; bbb_ao itself is not imported, so the
script runs on a machine without torchao. Reads the standard library of the interpreter that runs it and of every
folder given with `--stdlib` (other Python versions: more text, the same split).
"""

import argparse
import copy
import hashlib
import json
import math
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import tokenizers
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

# By its folder: `import bbb_ao` would need torchao.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bbb_ao" / "demo"))
import stdlib_corpus  # pyright: ignore[reportMissingImports]

DOCUMENT_TOKEN = "<|endoftext|>"
DOCUMENT_TOKEN_ID = 0
SIZE_LIMIT_BYTES = 6_000_000
EVALUATIONS = 20
EVALUATION_BATCH = 64


@dataclass(frozen=True)
class Settings:
    """What one run does; every field is a command-line option. The defaults are those of the shipped model."""

    vocabulary: int = 2048
    hidden: int = 256
    blocks: int = 5
    heads: int = 8
    key_value_heads: int = 2
    intermediate: int = 384
    context: int = 512
    batch: int = 32
    steps: int = 5_000
    learning_rate: float = 3e-3
    warmup: float = 0.02
    weight_decay: float = 0.5
    dropout: float = 0.2
    seed: int = 0
    time_limit: float = 360.0


def main() -> int:
    """Train, save, reload, evaluate, report."""
    settings, args = parse_arguments()
    started = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(settings.seed)

    own = stdlib_corpus.find_documents()
    others = [document for root in args.stdlib for document in stdlib_corpus.find_documents(root)]
    # One text once: files that did not change between Python versions add nothing.
    train_texts = list(dict.fromkeys(document.text for document in own + others if document.split == "train"))
    held_out_texts = [document.text for document in own if document.split == "held_out"]
    tokenizer = train_tokenizer(train_texts, settings.vocabulary)
    train_ids = encode(tokenizer, train_texts).to(device)
    held_out = windows(encode(tokenizer, held_out_texts), settings.context).to(device)
    print(f"{len(train_texts)} files, {len(train_ids)} tokens; held out: {held_out.numel()} tokens", flush=True)

    model = build_model(settings)
    model.to(device)  # pyright: ignore[reportArgumentType]
    result = train(model, train_ids, held_out, settings, device)
    save(model, tokenizer, settings, args.output)

    shipped = AutoModelForCausalLM.from_pretrained(args.output, dtype=torch.float32)
    shipped.to(device)  # pyright: ignore[reportArgumentType]
    sample = windows(train_ids, settings.context)[:: max(1, len(train_ids) // held_out.numel())]
    size = sum(path.stat().st_size for path in args.output.iterdir())
    report = {
        "perplexity": {
            "held_out": round(math.exp(mean_loss(shipped, held_out, device, autocast=False)), 4),
            "train_sample": round(math.exp(mean_loss(shipped, sample, device, autocast=False)), 4),
            "window": settings.context,
            "held_out_tokens": held_out.numel(),
        },
        "held_out_characters_per_token": round(sum(map(len, held_out_texts)) / held_out.numel(), 4),
        "parameters": sum(parameter.numel() for parameter in shipped.parameters()),
        "bytes": size,
        "train_files": len(train_texts),
        "train_tokens": len(train_ids),
        **result,
        "seconds_total": round(time.monotonic() - started, 1),
        "settings": asdict(settings),
        "other_libraries": len(args.stdlib),
        "environment": describe_environment(device),
    }
    args.report.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({key: value for key, value in report.items() if key != "curve"}), flush=True)
    if size > SIZE_LIMIT_BYTES:
        print(f"{args.output}: expected at most {SIZE_LIMIT_BYTES} bytes, got {size}", file=sys.stderr)
        return 1
    return 0


def parse_arguments() -> tuple[Settings, argparse.Namespace]:
    """The settings, and what is about files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("output", type=Path, help="folder for the Hugging Face model")
    parser.add_argument("report", type=Path, help="JSON file for the figures")
    parser.add_argument(
        "--stdlib", type=Path, action="append", default=[], help="another version's library, for training"
    )
    for name, default in asdict(Settings()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    args = parser.parse_args()
    return Settings(**{name: getattr(args, name) for name in asdict(Settings())}), args


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> tokenizers.Tokenizer:
    """Byte-level BPE without normalization: every text comes back as it was. Id 0 starts and ends a document."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[DOCUMENT_TOKEN],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: tokenizers.Tokenizer, texts: list[str]) -> Tensor:
    """All documents in a row, each after the document token: int64, [tokens]."""
    ids = [id_ for item in tokenizer.encode_batch(texts) for id_ in (DOCUMENT_TOKEN_ID, *item.ids)]
    return torch.tensor(ids, dtype=torch.int64)


def windows(ids: Tensor, context: int) -> Tensor:
    """Non-overlapping windows, [count, context]; the remainder is dropped."""
    count = len(ids) // context
    return ids[: count * context].view(count, context)


def build_model(settings: Settings) -> LlamaForCausalLM:
    """A Llama-architecture model in float32, with dropout on what each sublayer adds to the residual stream."""
    config = LlamaConfig(
        vocab_size=settings.vocabulary,
        hidden_size=settings.hidden,
        intermediate_size=settings.intermediate,
        num_hidden_layers=settings.blocks,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.key_value_heads,
        max_position_embeddings=settings.context,
        tie_word_embeddings=True,
        bos_token_id=DOCUMENT_TOKEN_ID,
        eos_token_id=DOCUMENT_TOKEN_ID,
    )
    model = LlamaForCausalLM(config)
    if settings.dropout > 0:
        for name, module in model.named_modules():
            if name.endswith(("embed_tokens", "o_proj", "down_proj")):
                module.register_forward_hook(
                    lambda module, _, output: functional.dropout(output, settings.dropout, module.training)
                )
    # Sublayers that write to the residual stream start smaller, so that its variance does not grow with depth.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.mul_((2 * settings.blocks) ** -0.5)
    return model


def next_token_loss(model: nn.Module, ids: Tensor) -> Tensor:
    """Mean cross-entropy of tokens 2.. of every row, in float32; ids is [rows, context]."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())


def autocast_loss(loss_of: Callable[..., Tensor], model: nn.Module, ids: Tensor, device: torch.device) -> Tensor:
    """A loss whose matrix products run in bfloat16."""
    with torch.autocast(device.type, dtype=torch.bfloat16):
        return loss_of(model, ids)


@torch.no_grad()
def mean_loss(model: nn.Module, rows: Tensor, device: torch.device, autocast: bool = True) -> float:
    """`next_token_loss` over all rows of [count, context], in evaluation mode."""
    was_training = model.training
    model.eval()
    total = 0.0
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
        for batch in rows.split(EVALUATION_BATCH):
            total += next_token_loss(model, batch).item() * len(batch)
    model.train(was_training)
    return total / len(rows)


def random_batches(ids: Tensor, settings: Settings) -> Iterator[Tensor]:
    """Rows of [batch, context] that start anywhere in ids, without end."""
    offsets = torch.arange(settings.context, device=ids.device)
    generator = torch.Generator(ids.device).manual_seed(settings.seed)
    while True:
        starts = torch.randint(len(ids) - settings.context, (settings.batch, 1), generator=generator, device=ids.device)
        yield ids[starts + offsets]


def make_optimizer(model: nn.Module, settings: Settings, device: torch.device) -> torch.optim.AdamW:
    """AdamW on float32 masters; matrices decay, norm weights do not."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.95), fused=device.type == "cuda")


def schedule(progress: float, settings: Settings) -> float:
    """Learning rate at a share 0..1 of the run: a linear warm-up, then a cosine down to zero."""
    if progress < settings.warmup:
        return settings.learning_rate * progress / settings.warmup
    rest = (progress - settings.warmup) / (1 - settings.warmup)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, rest)))


def train(model: nn.Module, ids: Tensor, held_out: Tensor, settings: Settings, device: torch.device) -> dict:
    """Train in bfloat16 autocast; leave the model with the weights of the lowest held-out loss.

    Progress is the larger of steps done and time spent, so that a slow machine ends its schedule within the limit.
    """
    optimizer = make_optimizer(model, settings, device)
    loss_of = torch.compile(next_token_loss) if device.type == "cuda" else next_token_loss
    model.train()
    batches = random_batches(ids, settings)
    # Compilation takes longer than the warm-up of the learning rate and must not count as progress.
    autocast_loss(loss_of, model, next(batches), device).backward()
    optimizer.zero_grad(set_to_none=True)
    best_loss, best_state = math.inf, copy.deepcopy(model.state_dict())
    curve: list[dict[str, float]] = []
    started = time.monotonic()
    step, progress, best_step = 0, 0.0, 0
    while progress < 1.0:
        learning_rate = schedule(progress, settings)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        loss = autocast_loss(loss_of, model, next(batches), device)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        progress = max(step / settings.steps, (time.monotonic() - started) / settings.time_limit)
        if progress >= min(1.0, (len(curve) + 1) / EVALUATIONS):
            held_out_loss = mean_loss(model, held_out, device)
            seconds = time.monotonic() - started
            curve.append({"step": step, "train": round(loss.item(), 4), "held_out": round(held_out_loss, 4)})
            print(
                f"{seconds:6.1f} s  step {step:6d}  train {loss.item():.4f}  held out {held_out_loss:.4f}", flush=True
            )
            if held_out_loss < best_loss:
                best_loss, best_step, best_state = held_out_loss, step, copy.deepcopy(model.state_dict())
    model.load_state_dict(best_state)
    return {
        "steps": step,
        "best_step": best_step,
        "tokens_seen": step * settings.batch * settings.context,
        "seconds_training": round(time.monotonic() - started, 1),
        "curve": curve,
    }


def save(model: LlamaForCausalLM, tokenizer: tokenizers.Tokenizer, settings: Settings, output: Path) -> None:
    """Write a Hugging Face directory in bfloat16; tokenizer.json goes in without indentation, at half the size."""
    model.to(torch.bfloat16)  # pyright: ignore[reportArgumentType]
    model.save_pretrained(output)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=DOCUMENT_TOKEN,
        eos_token=DOCUMENT_TOKEN,
        model_max_length=settings.context,
    ).save_pretrained(output)
    path = output / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(content, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")


def describe_environment(device: torch.device) -> dict[str, str | None]:
    """Device, versions, commit, and the digests of the two source files that decide the result."""
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    script = Path(__file__).resolve()
    sources = (script, script.parent.parent / "bbb_ao" / "demo" / "stdlib_corpus.py")
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
        "commit": commit.stdout.strip() if commit.returncode == 0 else None,
        **{f"sha256 of {path.name}": hashlib.sha256(path.read_bytes()).hexdigest() for path in sources},
    }


if __name__ == "__main__":
    sys.exit(main())
