"""The report of a conversion: treatment, size and error of each layer.

It is made from a plan and the findings of its run, without reading files.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from math import prod, sqrt
from typing import Any, NamedTuple

from requant.execution.layer_stats import RunResult
from requant.libraries.load_check import LoadCheck
from requant.packings.base import Exactness
from requant.planning.plan import LayerPlan, Plan, Treatment
from requant.quantization.part import Part


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Layers with the same treatment, source, target and exactness."""

    treatment: str
    source: str
    target: str
    exactness: str
    layers: int
    parameters: int
    nbytes: int


def group_layers(layers: Iterable[Any]) -> list[LayerGroup]:
    """Group ``LayerPlan`` or ``LayerSummary`` by all that LayerGroup names, largest group first."""
    alike: dict[tuple[str, str, str, str], list[Any]] = defaultdict(list)
    for layer in layers:
        alike[layer.treatment, layer.source, layer.target, layer.exactness].append(layer)
    groups = [
        LayerGroup(*key, len(xs), sum(prod(x.shape) for x in xs), sum(x.nbytes for x in xs))
        for key, xs in alike.items()
    ]
    return sorted(groups, key=lambda group: -group.nbytes)


def quantizable_but_dense(layers: Iterable[LayerPlan]) -> list[LayerPlan]:
    """Layers that could have been quantized by their rank but stay dense, largest first."""
    dense = [x for x in layers if x.treatment is Treatment.DENSE and x.reason and len(x.shape) > 1]
    return sorted(dense, key=lambda layer: -layer.nbytes)


class LayerError(NamedTuple):
    """The quantization error of a layer."""

    relative_rms: float  # root of the summed squared error over the summed squared values
    max_steps: float  # largest error in units of its group's step
    # As relative_rms, squares weighted as the search of scales weights them; None without a search.
    weighted_rms: float | None = None


def layer_errors(plan: Plan, outcome: RunResult) -> dict[str, LayerError]:
    """The measured error of each layer that was re-encoded."""
    errors = {}
    for layer in plan.layers:
        stats = outcome.findings.get(layer.layer)
        if stats is not None and layer.exactness == Exactness.REENCODED:
            rms = sqrt(stats.squared_error / stats.squared_values) if stats.squared_values else 0.0
            weighted = None
            if stats.weighted_values:
                weighted = sqrt(stats.weighted_error / stats.weighted_values)
            errors[layer.layer] = LayerError(rms, stats.max_error_steps, weighted)
    return errors


def rounding_errors(plan: Plan, outcome: RunResult) -> dict[str, float]:
    """The measured error of each layer with rounded scales: relative, root mean square."""
    errors = {}
    for layer in plan.layers:
        stats = outcome.findings.get(layer.layer)
        if layer.exactness == Exactness.ROUNDED and stats is not None and stats.squared_values:
            errors[layer.layer] = sqrt(stats.squared_error / stats.squared_values)
    return errors


_COUNTS = ("damaged", "nonfinite", "overflowed", "flushed_groups")


@dataclass(frozen=True, slots=True)
class Report:
    """The result of a conversion.

    Attributes:
        plan: The plan that was executed.
        output: Path of the folder written.
        elapsed_s: Wall-clock seconds from the first step to the published folder.
        findings: Layer to the counts of damaged, non-finite, overflowed or flushed values, if any.
        errors: Layer to its quantization error, for each that was re-encoded.
        bytes_downloaded: Downloaded bytes of weight files of a source on the hub.
        load: How the output's library loads it; None without ``verify_load``.
        part: The part of the plan that was run, and of which the plan is; None for the whole.
        rounding: Layer to the relative RMS error of rounding its scales, for each that keeps its
            codes; measured in every 16th row.
        unmeasured: With a ``budget`` and a ``part``: layers that other parts have yet to measure.
            Until they have, nothing is converted; give the same command again then.
        unchecked: With ``consume_source`` and a ``part``: parts that are yet to be computed once
            before a file of the source is deleted; the same then.
    """

    plan: Plan
    output: str
    elapsed_s: float
    findings: Mapping[str, Mapping[str, int]]
    errors: Mapping[str, LayerError]
    bytes_downloaded: int = 0
    load: LoadCheck | None = None
    part: Part | None = None
    rounding: Mapping[str, float] = field(default_factory=dict)
    unmeasured: int = 0
    unchecked: int = 0

    @staticmethod
    def build(plan: Plan, output: str, outcome: RunResult, elapsed_s: float) -> Report:
        """Make the report of a plan and the result of its run."""
        found = outcome.findings
        counts = {
            x.layer: {key: n for key in _COUNTS if (n := getattr(found[x.layer], key))}
            for x in plan.layers
            if x.layer in found
        }
        counts = {layer: counted for layer, counted in counts.items() if counted}
        errors = layer_errors(plan, outcome)
        return Report(
            plan,
            output,
            elapsed_s,
            counts,
            errors,
            bytes_downloaded=outcome.bytes_downloaded,
            rounding=rounding_errors(plan, outcome),
        )

    @property
    def groups(self) -> list[LayerGroup]:
        """Layers by treatment."""
        return group_layers(self.plan.layers)

    @property
    def bits_per_weight(self) -> float:
        """Bits of the output per logical weight."""
        return self.plan.bits_per_weight

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON data."""
        plan = self.plan
        return {
            "source": plan.source,
            "output": self.output,
            "format": plan.format,
            "layout": plan.layout,
            "loads": plan.loads,
            "plan_hash": plan.hash if self.part is None else "",
            "parameters": plan.parameters,
            "bytes_in": plan.bytes_in,
            "bytes_out": plan.bytes_out,
            "bits_per_weight": plan.bits_per_weight,
            "elapsed_s": self.elapsed_s,
            "bytes_downloaded": self.bytes_downloaded,
            "groups": [asdict(group) for group in self.groups],
            "layers": [self._layer_dict(layer) for layer in plan.layers],
            "findings": {layer: dict(counts) for layer, counts in self.findings.items()},
            "side_files": list(plan.side_files),
            "left_out": [list(pair) for pair in plan.left_out],
            "dropped": [list(pair) for pair in plan.dropped],
            "notes": [note.text for note in plan.notes],
            "part": None if self.part is None else str(self.part),
            "unmeasured": self.unmeasured,
            "unchecked": self.unchecked,
            "load": None if self.load is None else self.load.to_dict(),
        }

    def _layer_dict(self, layer: LayerPlan) -> dict[str, Any]:
        error = self.errors.get(layer.layer)
        rounding = self.rounding.get(layer.layer)
        return layer.to_dict() | {"error": error and error._asdict(), "rounding": rounding}
