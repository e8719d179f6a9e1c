"""Save a variant of a model that computes the same and has outliers, to test what splitting is worth on such models.

python benchmarks/outliers.py --model DIR --output DIR --where weights --share 0.01 --strength 16
"""

import argparse
import copy
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bbb_ao.errors import NumericsError
from bbb_ao.outputs import check_output_directory
from bbb_ao.passes import block_linears, find_blocks, float64_casts, make_outliers

TOLERANCE = 1e-10


def logits(model: Any) -> torch.Tensor:
    """Float64 logits of fixed random ids, [2, 32, vocabulary]."""
    count = model.get_input_embeddings().num_embeddings
    ids = torch.randint(count, (2, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), float64_casts():
        return copy.deepcopy(model).double()(ids, use_cache=False).logits


def tails(model: Any) -> dict[str, float]:
    """For each kind of Linear the mean over blocks of a column's largest weight, the largest against the median."""
    sums: dict[str, list[float]] = {}
    for _, block in find_blocks(model):
        for name in block_linears(block):
            columns = block.get_parameter(f"{name}.weight").detach().float().abs().amax(0)
            sums.setdefault(name, []).append((columns.max() / columns.median()).item())
    return {name: sum(values) / len(values) for name, values in sums.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--where", choices=("weights", "activations"), default="weights")
    parser.add_argument("--share", type=float, default=0.01, help="of the channels")
    parser.add_argument("--strength", type=float, default=16.0, help="largest factor")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="auto", help="float64 for norms that multiply by 1 + weight")
    arguments = parser.parse_args()
    check_output_directory(arguments.output, arguments.model)
    model: Any = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=arguments.dtype).eval()
    before, reference = tails(model), logits(model)
    found = make_outliers(model, arguments.share, arguments.strength, arguments.where, arguments.seed)
    after, changed = tails(model), logits(model)
    error = ((changed - reference).abs().max() / reference.abs().max()).item()
    if not error <= TOLERANCE:
        raise NumericsError(f"logits: expected a relative error of at most {TOLERANCE:g} in float64, got {error:.3g}")
    for pair in next(iter(found.values())):
        print(f"{pair.producer} -> {', '.join(pair.consumers)}")
    print("largest column against the median, before and after:")
    for name, value in before.items():
        print(f"  {name:24} {value:8.2f} {after[name]:8.2f}")
    model.save_pretrained(arguments.output)
    AutoTokenizer.from_pretrained(arguments.model).save_pretrained(arguments.output)
    print(f"{arguments.output}: the same function, relative error of the logits {error:.1e} in float64")


if __name__ == "__main__":
    main()
