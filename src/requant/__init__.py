"""Turn any model checkpoint into Apple MLX's quantized formats and back.

From the weight map alone: no model class, no GPU, memory that does not grow with the model.
``convert`` is the main function; ``quantize_weights`` and its neighbours work on weights that
are in memory already.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from requant.api.compare import Comparison, compare
    from requant.api.compare_outputs import OutputScores, compare_outputs
    from requant.api.convert import convert, plan
    from requant.api.export import export
    from requant.api.inspect import Inspection, inspect
    from requant.api.join import join
    from requant.api.upload import upload
    from requant.api.verify import Verification, verify
    from requant.calibration.block_run import Calibration, calibrate
    from requant.errors import (
        BackendError,
        CheckpointError,
        ClusterError,
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
    from requant.planning.plan import Plan
    from requant.quantization.config import (
        SKIP,
        PerLayerQuantization,
        Quantization,
        QuantMode,
        parse_quantization,
    )
    from requant.reports.record_summary import Figures, read_figures
    from requant.reports.report import Report
    from requant.weights.awq import AwqLoadConfig, transform_awq_weights, unpack_awq_weights
    from requant.weights.quantize import default_eligible, dequantize_weights, quantize_weights
    from requant.weights.transform import transform_weights

__version__ = "0.1.0"

__all__ = [
    "SKIP",
    "AwqLoadConfig",
    "BackendError",
    "Calibration",
    "CheckpointError",
    "ClusterError",
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
    "OutputScores",
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
    "compare_outputs",
    "convert",
    "default_eligible",
    "dequantize_weights",
    "export",
    "inspect",
    "join",
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

# Module -> the names that it defines; it is imported when one of them is used.
_DEFINED_IN = {
    "api.compare": (
        "Comparison",
        "compare",
    ),
    "api.compare_outputs": (
        "OutputScores",
        "compare_outputs",
    ),
    "api.convert": (
        "convert",
        "plan",
    ),
    "api.export": ("export",),
    "api.inspect": (
        "Inspection",
        "inspect",
    ),
    "api.join": ("join",),
    "api.upload": ("upload",),
    "api.verify": (
        "Verification",
        "verify",
    ),
    "calibration.block_run": (
        "Calibration",
        "calibrate",
    ),
    "errors": (
        "BackendError",
        "CheckpointError",
        "ClusterError",
        "DivisibilityError",
        "HubError",
        "InvariantError",
        "KeyCollisionError",
        "LengthMismatchError",
        "MissingKeyError",
        "OutOfRangeError",
        "OutputError",
        "ParseError",
        "Problem",
        "RankMismatchError",
        "RequantError",
        "ShapeMismatchError",
        "UnknownValueError",
        "UnsupportedDtypeError",
        "UsageError",
    ),
    "planning.plan": ("Plan",),
    "quantization.config": (
        "SKIP",
        "PerLayerQuantization",
        "Quantization",
        "QuantMode",
        "parse_quantization",
    ),
    "reports.record_summary": (
        "Figures",
        "read_figures",
    ),
    "reports.report": ("Report",),
    "weights.awq": (
        "AwqLoadConfig",
        "transform_awq_weights",
        "unpack_awq_weights",
    ),
    "weights.quantize": (
        "default_eligible",
        "dequantize_weights",
        "quantize_weights",
    ),
    "weights.transform": ("transform_weights",),
}
_MODULE_OF = {name: module for module, names in _DEFINED_IN.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import a public name, or a submodule, when it is used."""
    if name in _MODULE_OF:
        value = getattr(import_module(f"requant.{_MODULE_OF[name]}"), name)
        globals()[name] = value
        return value
    submodule = f"{__name__}.{name}"
    try:
        return import_module(submodule)
    except ModuleNotFoundError as error:
        if error.name != submodule:
            raise
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
