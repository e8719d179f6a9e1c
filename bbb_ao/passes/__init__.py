"""Graph passes: capture a decoder block, plan its rewriting, rewrite the graph and the live modules, verify both."""

from bbb_ao.passes.blocks import block_linears, find_blocks, unsupported_weights
from bbb_ao.passes.capture import CapturedBlock, bind, capture_block, capture_model
from bbb_ao.passes.convert_graph import convert_graph
from bbb_ao.passes.fuse_projections import FusionReport, fuse_projections, shared_inputs, unfuse_projections
from bbb_ao.passes.outliers import ScalePair, find_pairs, make_outliers, scale_pair
from bbb_ao.passes.plan import RewritePlan, SplitSite, plan_block, plan_graph
from bbb_ao.passes.rewrite_graph import duplicate_channels, insert_fake_quantize
from bbb_ao.passes.rewrite_model import apply_plan, choose_indices, undo_plan
from bbb_ao.passes.verify import Verification, block_error, float64_casts, verified_plan, verify_block

__all__ = [
    "CapturedBlock",
    "FusionReport",
    "RewritePlan",
    "ScalePair",
    "SplitSite",
    "Verification",
    "apply_plan",
    "bind",
    "block_error",
    "block_linears",
    "capture_block",
    "capture_model",
    "choose_indices",
    "convert_graph",
    "duplicate_channels",
    "find_blocks",
    "find_pairs",
    "float64_casts",
    "fuse_projections",
    "insert_fake_quantize",
    "make_outliers",
    "plan_block",
    "plan_graph",
    "scale_pair",
    "shared_inputs",
    "undo_plan",
    "unfuse_projections",
    "unsupported_weights",
    "verified_plan",
    "verify_block",
]
