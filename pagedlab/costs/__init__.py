"""What a step costs on hardware that need not be here: cost models, and the catalogue that they read."""

from pagedlab.costs.base import CostModel, StepWork
from pagedlab.costs.calibrated import Calibrated
from pagedlab.costs.catalogue import (
    Hardware,
    ModelShape,
    add_hardware,
    add_model,
    find_hardware,
    find_model,
    pool_blocks,
)
from pagedlab.costs.fitting import FitReport, fit_steps
from pagedlab.costs.linear import LinearCost
from pagedlab.costs.roofline import Roofline
from pagedlab.costs.vllm_log import VllmRun

__all__ = [
    "Calibrated",
    "CostModel",
    "FitReport",
    "Hardware",
    "LinearCost",
    "ModelShape",
    "Roofline",
    "StepWork",
    "VllmRun",
    "add_hardware",
    "add_model",
    "find_hardware",
    "find_model",
    "fit_steps",
    "pool_blocks",
]
