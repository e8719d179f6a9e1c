"""What a training run will do and need, before anything is loaded: layers, bytes, memory and time."""

from bbb_ao.planning.limits import Limits, check_limits, read_limits
from bbb_ao.planning.plan import LayerPlan, Plan, make_plan

__all__ = ["LayerPlan", "Limits", "Plan", "check_limits", "make_plan", "read_limits"]
