"""SNELL: sparse fine-tuning with low-rank factors, at about the cost of LoRA."""

from importlib.metadata import version

from snell import backends, functional, reference
from snell.competition import refresh_thresholds
from snell.linear import SnellLinear

__version__ = version("snell")

__all__ = ["SnellLinear", "backends", "functional", "reference", "refresh_thresholds"]
