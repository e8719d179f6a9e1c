"""Other libraries' 2-bit quantization on the data of `quality.py`, measured by its perplexity, as rows of its form.

    python benchmarks/peer_quality.py --peer auto-round --model DIR --tokens FILE --seeds 0 1 2 --output FILE
    python benchmarks/peer_quality.py --peer hqq hqq/group_size=64 parq/lr=1e-3/epochs=4 --model DIR --tokens FILE

None is a dependency: auto-round and hqq come from PyPI, PARQ is part of torchao. A peer is a line: its name, then
settings, all parted by slashes, under the names that the library gives them. What a line leaves out is in `PEERS`: what
the authors advise for 2 bits, where they do, at groups of 32. Every Linear of the decoder blocks is quantized, and
nothing else.

Sequences are those of `quality.draw`: a seed gives a peer what it gives our recipes; one that takes none runs once.
`bits_per_weight` counts what the peer's own format stores; that no group holds more than four values is checked before
anything is measured. Give seeds that run side by side an output each. The model's directory must have its tokenizer,
which auto-round asks for.
"""

import argparse
import copy
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from environment import environment, package_version
from quality import RESULTS, default_device, draw, load_model, measure, pending_runs, read_rows, write_rows
from safetensors.torch import load_file
from torch import Tensor, nn

from bbb_ao.passes import block_linears, find_blocks
from bbb_ao.recipes import strict_yaml

Settings = dict[str, Any]
BITS = 2


@dataclass(frozen=True)
class Peer:
    """A library that quantizes to 2 bits.

    Attributes:
        package: its distribution, whose version the rows carry.
        settings: the defaults of its lines.
        quantize: changes the weights of a model on its device, given int64 sequences [sequences, tokens] and a seed.
        group_bits: what its format stores for a group besides the codes, in bits.
        data: the settings that say how many sequences of how many tokens it takes; () if it takes none.
    """

    package: str
    settings: Settings
    quantize: Callable[[Any, Tensor, int, Settings], None]
    group_bits: Callable[[Settings], int]
    data: tuple[str, ...] = ()


def linears(model: Any) -> list[nn.Linear]:
    """Those of the decoder blocks, in module order."""
    return [block.get_submodule(name) for _, block in find_blocks(model) for name in block_linears(block)]  # type: ignore


def auto_round(model: Any, sequences: Tensor, seed: int, settings: Settings) -> None:
    """Intel's AutoRound: rounding and ranges by signed gradient descent, block by block, the weights frozen.

    The defaults are those of `auto-round-best` (1,000 iterations, 8 x 2,048 tokens each, 2**20 tokens of text), in
    sequences of 1,024 tokens, with `enable_alg_ext`, which its README recommends for W2A16 and which acts on symmetric
    grids. Scales are float16; with sym=false each group has a zero point of 2 bits.
    """
    from auto_round import AutoRound  # pyright: ignore[reportMissingImports]
    from transformers import AutoTokenizer

    device = str(model.device)
    # It takes a model as from_pretrained leaves it and moves what it works on.
    AutoRound(
        model.cpu(),
        AutoTokenizer.from_pretrained(model.name_or_path),
        scheme="W2A16",
        dataset=list(sequences.split(settings["batch_size"])),
        seed=seed,
        device_map=device,
        enable_torch_compile=False,
        **settings,
    ).quantize()


def hqq(model: Any, sequences: Tensor, seed: int, settings: Settings) -> None:
    """Half-quadratic quantization: zero points fitted to the weights alone, float16 scales and zero points."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear  # pyright: ignore[reportMissingImports]

    config = BaseQuantizeConfig(nbits=BITS, **settings)
    for linear in linears(model):
        quantized = HQQLinear(linear, config, del_orig=False, compute_dtype=torch.float16, device=str(model.device))
        linear.weight.data.copy_(quantized.dequantize())


def parq(model: Any, sequences: Tensor, seed: int, settings: Settings) -> None:
    """torchao's PARQ: the blocks trained end to end on the next token; a proximal map pulls weights to four values.

    The map hardens over the first 95 % of the steps, as in its authors' example, on the grid that torchao takes for 2
    bits: -1.5, -0.5, 0.5 and 1.5 scales. Its steepness is the largest that its README names. The rate falls linearly to
    zero; neither it nor the epochs have advice for language models. Embedding, head and final norm stay as they are.
    """
    from torchao.prototype.parq.optim import ProxPARQ, QuantOptimizer
    from torchao.prototype.parq.quant import StretchedUnifTorchaoQuantizer

    model.requires_grad_(False)
    trained = [p.requires_grad_() for _, block in find_blocks(model) for p in block.parameters()]
    weights = [linear.weight for linear in linears(model)]
    others = [p for p in trained if all(p is not weight for weight in weights)]
    groups = [
        {"params": weights, "quant_bits": BITS, "quant_block_size": settings["group_size"]},
        {"params": others, "weight_decay": 0.0},
    ]
    base = torch.optim.AdamW(groups, lr=settings["lr"], weight_decay=settings["weight_decay"])
    per_epoch = len(sequences) // settings["batch_size"]
    steps = settings["epochs"] * per_epoch
    proximal = ProxPARQ(anneal_start=0, anneal_end=int(0.95 * steps), steepness=settings["steepness"])
    quantizer = StretchedUnifTorchaoQuantizer(b=BITS)
    optimizer = QuantOptimizer(base, quantizer, proximal, quant_period=1, quant_per_channel=True)
    schedule = torch.optim.lr_scheduler.LinearLR(base, 1.0, 0.0, steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(settings["epochs"]):
        order = torch.randperm(len(sequences), generator=generator)[: per_epoch * settings["batch_size"]]
        for rows in order.split(settings["batch_size"]):
            batch = sequences[rows].to(model.device)
            with torch.autocast(model.device.type, torch.bfloat16):
                loss = model(batch, labels=batch, use_cache=False).loss
            loss.backward()
            optimizer.step()
            schedule.step()
            base.zero_grad()
    # It keeps scales in float32, which would be 3 bits per weight; float16 ones change a weight by its last bit.
    for weight in weights:
        weight.data.copy_(weight.half())


PEERS = {
    "auto-round": Peer(
        "auto-round",
        {
            "iters": 1000,
            "nsamples": 1024,
            "seqlen": 1024,
            "batch_size": 16,
            "group_size": 32,
            "sym": True,
            "lr": None,
            "enable_alg_ext": True,
            "enable_neuqi": False,
            "amp": True,
        },
        auto_round,
        lambda settings: 16 if settings["sym"] else 16 + BITS,
        ("nsamples", "seqlen"),
    ),
    "hqq": Peer("hqq", {"group_size": 32, "axis": 1}, hqq, lambda settings: 16 + 16),
    "parq": Peer(
        "torchao",
        {
            "sequences": 1024,
            "sequence_length": 1024,
            "epochs": 8,
            "batch_size": 16,
            "lr": 5e-4,
            "weight_decay": 0.0,
            "steepness": 20,
            "group_size": 32,
        },
        parq,
        lambda settings: 16,
        ("sequences", "sequence_length"),
    ),
}


def parse_line(line: str) -> tuple[str, Settings]:
    """The peer that a line names, and all its settings.

    Raises:
        ValueError: another peer, or a setting that it does not have.
    """
    name, *parts = line.split("/")
    if name not in PEERS:
        raise ValueError(f"{line}: peer: expected {', '.join(PEERS)}, got {name!r}")
    settings = dict(PEERS[name].settings)
    for part in parts:
        key, _, value = part.partition("=")
        if key not in settings:
            raise ValueError(f"{line}: expected settings among {', '.join(settings)}, got {part!r}")
        settings[key] = strict_yaml.parse(value, line)
    return name, settings


def full_line(line: str) -> str:
    """`line` with every setting written out: the `recipe` of a row, of which `parse_line` makes the same again."""
    name, settings = parse_line(line)
    return "/".join([name, *(f"{key}={json.dumps(value)}" for key, value in settings.items())])


def most_values(weight: Tensor, group_size: int, axis: int = 1) -> int:
    """The most different values in a group of `weight`.

    Groups are along the rows; with axis 0 they are hqq's: a column of the weight reshaped to [group_size, ...].
    """
    groups = weight.reshape(-1, group_size) if axis else weight.reshape(group_size, -1).T
    changes = groups.sort(dim=-1).values.diff(dim=-1) != 0
    return int(changes.sum(dim=-1).max()) + 1


def run_peer(line: str, seed: int, model: Any, tokens: dict[str, Tensor]) -> dict[str, Any]:
    """Quantize a copy of `model` as `line` says, and measure it.

    Raises:
        RuntimeError: a group of a quantized weight holds more values than 2 bits can tell apart.
    """
    name, settings = parse_line(line)
    peer, device = PEERS[name], default_device()
    count, length = [settings[key] for key in peer.data] or (0, 1)
    sequences = draw(tokens["calibration"], count, length, seed)
    student = copy.deepcopy(model).to(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(seed)
    start = time.perf_counter()
    peer.quantize(student, sequences, seed, settings)
    seconds = time.perf_counter() - start
    peak_bytes = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    student.float().to(device)
    for linear in linears(student):
        if (values := most_values(linear.weight.data, settings["group_size"], settings.get("axis", 1))) > 2**BITS:
            raise RuntimeError(f"{line}: expected at most {2**BITS} values in a group, got {values}")
    return {
        "method": name,
        "recipe": full_line(line),
        "weight_bits": BITS,
        "act_bits": None,
        **measure(student, tokens, device),
        "bits_per_weight": BITS + peer.group_bits(settings) / settings["group_size"],
        "calibration_tokens": sequences.numel(),
        "generated_tokens": 0,
        "seconds": seconds,
        "peak_bytes": peak_bytes,
        **environment(seed),
        "version": package_version(peer.package),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--peer", nargs="+", type=full_line, required=True, help=f"lines: {', '.join(PEERS)}/settings")
    parser.add_argument("--model", required=True)
    parser.add_argument("--tokens", required=True, help="the file that `quality.py tokens` wrote")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--output", default=RESULTS)
    arguments = parser.parse_args()
    model, tokens = load_model(arguments.model), load_file(arguments.tokens)
    label, output = Path(arguments.tokens).name, Path(arguments.output)
    rows = read_rows(output)
    for line, seed in pending_runs(rows, arguments.peer, arguments.seeds, label):
        if seed != arguments.seeds[0] and not PEERS[parse_line(line)[0]].data:
            continue
        row = run_peer(line, seed, model, tokens) | {"tokens": label}
        figures = " ".join(f"{key} {value:.3f}" for key, value in row.items() if key.endswith("_ppl"))
        print(f"{line} seed {seed} {figures} {row['seconds']:.0f} s", flush=True)
        rows = write_rows(output, rows, [row])


if __name__ == "__main__":
    main()
