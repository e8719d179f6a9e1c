"""Programmatic dependent launch: a kernel starts while the launches before it still run (compute capability 9.0).

A kernel compiled with PDL

1. with `fresh` waits (griddepcontrol.wait) for the launches before it;
2. reads what no launch of a graph writes: planes, scales, zero offsets and exponents of its weight;
3. waits, after which the launches before it are complete and what they wrote is visible;
4. only then reads anything else and writes.

It lets the next launch start (griddepcontrol.launch_dependents) between 1 and 2, or, in `warpgroup`, once it has asked
for its last tile: programs of the next launch would crowd on multiprocessors with room for one more.

Every program waits, so that a launch is complete only after those before it are: one wait is enough for all of them.
A weight may be packed and multiplied by at once, so that 2 is only right where it is a constant: in a captured graph,
which must not write the weights that it multiplies by. Everywhere else `fresh` is set. One compiled kernel serves both,
so that results are the same.
"""

import os
from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]

PDL_CAPABILITY = (9, 0)


def dependent_launch(device: torch.device) -> dict[str, Any]:
    """Keyword arguments `PDL` and `fresh` of a kernel, and the launch option, for the current stream of a device."""
    if (
        os.environ.get("BBB_AO_PDL") == "off"
        or device.type != "cuda"
        or triton.knobs.runtime.interpret  # pyright: ignore[reportAttributeAccessIssue]
        or torch.cuda.get_device_capability(device) < PDL_CAPABILITY
    ):
        return {"PDL": False, "fresh": 0}
    return {"PDL": True, "fresh": int(not torch.cuda.is_current_stream_capturing()), "launch_pdl": True}
