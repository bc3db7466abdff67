"""Turn any model checkpoint into Apple MLX's quantized formats and back.

From the weight map alone: no model class, no GPU, memory that does not grow with the model.
``convert`` is the main door; ``quantize_weights`` and its neighbours work on weights that
are in memory already.
"""

from __future__ import annotations

from requant.awq_weights import AwqLoadConfig, transform_awq_weights, unpack_awq_weights
from requant.blueprint import Plan
from requant.calibration import Calibration, calibrate
from requant.comparison import Comparison, compare
from requant.conversion import convert, plan
from requant.errors import (
    BackendError,
    CheckpointError,
    DivisibilityError,
    HubError,
    InvariantError,
    KeyCollisionError,
    LengthMismatchError,
    MissingKeyError,
    OutOfRangeError,
    OutputError,
    ParseError,
    Problem,
    RankMismatchError,
    RequantError,
    ShapeMismatchError,
    UnknownValueError,
    UnsupportedDtypeError,
    UsageError,
)
from requant.figures import Figures, read_figures
from requant.inspection import Inspection, inspect
from requant.publishing import upload
from requant.report import Report
from requant.schema import (
    SKIP,
    PerLayerQuantization,
    Quantization,
    QuantMode,
    parse_quantization,
)
from requant.transform import transform_weights
from requant.verification import Verification, verify
from requant.weights import default_eligible, dequantize_weights, quantize_weights

__version__ = "0.1.0"

__all__ = [
    "SKIP",
    "AwqLoadConfig",
    "BackendError",
    "Calibration",
    "CheckpointError",
    "Comparison",
    "DivisibilityError",
    "Figures",
    "HubError",
    "Inspection",
    "InvariantError",
    "KeyCollisionError",
    "LengthMismatchError",
    "MissingKeyError",
    "OutOfRangeError",
    "OutputError",
    "ParseError",
    "PerLayerQuantization",
    "Plan",
    "Problem",
    "QuantMode",
    "Quantization",
    "RankMismatchError",
    "Report",
    "RequantError",
    "ShapeMismatchError",
    "UnknownValueError",
    "UnsupportedDtypeError",
    "UsageError",
    "Verification",
    "calibrate",
    "compare",
    "convert",
    "default_eligible",
    "dequantize_weights",
    "inspect",
    "parse_quantization",
    "plan",
    "quantize_weights",
    "read_figures",
    "transform_awq_weights",
    "transform_weights",
    "unpack_awq_weights",
    "upload",
    "verify",
]
