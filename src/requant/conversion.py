"""The doors: ``plan`` and ``convert``. Start reading here; the road is steps 1 to 6 in order.

What a caller says is checked here and handed down; the steps themselves do the work.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from requant.blueprint import Plan
from requant.budget_measurements import measured_of
from requant.budgets import settle
from requant.checkpoint import Checkpoint
from requant.consuming import most_with_consume_source
from requant.errors import CheckpointError, OutputError, Problem, UsageError, count_are
from requant.execute import Progress, run_plan
from requant.findings import Finding, Outcome
from requant.hub import Repository, find_repository, reach
from requant.memory import make_budget
from requant.planner import make_plan
from requant.recipes import toml_of
from requant.report import Report, recorded_errors
from requant.schema import Quantization
from requant.sink import Nowhere, Sink
from requant.source_folder import is_gguf
from requant.specs import Spec
from requant.staging import (
    bytes_on_disk,
    downloads_of,
    spent_on,
    spoiled_before,
    staging_of,
    twins_of,
)
from requant.wishes import Wishes
from requant.writer import OutputFolder, check_output

Source = str | os.PathLike[str]


def plan(
    source: Source,
    quantization: Quantization | None = None,
    *,
    bits: int | None = None,
    group_size: int | None = None,
    mode: str | None = None,
    dequantize: bool = False,
    dtype: str | None = None,
    overrides: Iterable[str | tuple[str, Spec | str]] = (),
    only: Sequence[str] = (),
    recipe: Source | None = None,
    layout: str = "auto",
    keep_extra: bool = False,
    act_order: str = "requantize",
    fold_rotation: bool = False,
    search: str = "off",
    statistics: Source | None = None,
    gptq: bool = False,
    config_from: Source | None = None,
    budget: str | float | None = None,
    shard_size: int = 5 << 30,
    revision: str | None = None,
    save_recipe: Source | None = None,
    max_memory: int | None = None,
    threads: int | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Plan:
    """Lay out a conversion without doing it; only headers and JSON are read.

    The wishes are those of ``convert``. A ``budget`` is the exception: the source is read, and
    each layer's error measured, with ``threads``, ``max_memory`` and ``progress`` as there.
    ``save_recipe`` names a file for what was chosen.

    Returns:
        Layers with what becomes of each, the tensors to read and to write with their places,
        sizes in bytes and bits per weight; ``to_dict`` is what ``requant plan --json`` prints.

    Raises:
        CheckpointError: Everything that is wrong with the source.
        HubError: A repository is not reached, or refuses.
        UsageError: Wishes that contradict each other or name no layer.
        OutOfRangeError, UnknownValueError: A wish has a value that there is not.

    Example:
        >>> made = plan("Llama-3.2-1B", bits=4, group_size=32)  # doctest: +SKIP
        >>> made.bits_per_weight, made.bytes_out  # doctest: +SKIP
    """
    wishes = Wishes.build(
        quantization,
        bits=bits,
        group_size=group_size,
        mode=mode,
        dequantize=dequantize,
        dtype=dtype,
        overrides=overrides,
        only=only,
        recipe=recipe,
        layout=layout,
        keep_extra=keep_extra,
        act_order=act_order,
        fold_rotation=fold_rotation,
        search=search,
        statistics=statistics,
        gptq=gptq,
        config_from=config_from,
        max_shard_bytes=shard_size,
        budget=budget,
    )
    check_saving(save_recipe, wishes)
    remote = find_repository(source, revision)
    if wishes.budget is not None:
        wishes = settle(
            reach(source, remote, wishes.config_from),
            wishes,
            threads=threads,
            max_memory=max_memory,
            progress=progress,
        )
        save(save_recipe, wishes)
    if remote is None:
        return make_plan(Path(source), wishes)
    made = make_plan(remote.headers(wishes.config_from), wishes)
    return replace(made, notes=(*made.notes, remote.announcement()))


def check_saving(save_recipe: Source | None, wishes: Wishes) -> None:
    """Refuse a file for a recipe that nothing chooses, before anything is measured.

    Raises:
        UsageError: There is no budget, the file's name is no recipe's, or it is there already.
    """
    if save_recipe is None:
        return
    path = Path(save_recipe)
    if wishes.budget is None:
        raise UsageError("--save-recipe keeps what --budget chooses; give --budget 4 or the like")
    if path.suffix != ".toml":
        raise UsageError(f"--save-recipe {path}: --recipe reads names that end in .toml")
    if path.exists():
        raise UsageError(f"--save-recipe {path} is there already; remove it or name another")
    if not path.parent.is_dir():
        raise UsageError(f"--save-recipe {path}: there is no folder {path.parent}")


def save(save_recipe: Source | None, wishes: Wishes) -> None:
    """Write the recipe that a budget chose.

    Raises:
        OutputError: The disk refuses it.
    """
    if save_recipe is None or wishes.recipe is None:
        return
    try:
        with open(save_recipe, "x", encoding="utf-8") as file:
            file.write(toml_of(wishes.recipe))
    except OSError as error:
        raise OutputError(f"{save_recipe}: {error.strerror or error}") from error


def convert(
    source: Source,
    output: Source,
    quantization: Quantization | None = None,
    *,
    bits: int | None = None,
    group_size: int | None = None,
    mode: str | None = None,
    dequantize: bool = False,
    dtype: str | None = None,
    overrides: Iterable[str | tuple[str, Spec | str]] = (),
    only: Sequence[str] = (),
    recipe: Source | None = None,
    layout: str = "auto",
    keep_extra: bool = False,
    act_order: str = "requantize",
    fold_rotation: bool = False,
    search: str = "off",
    statistics: Source | None = None,
    gptq: bool = False,
    config_from: Source | None = None,
    budget: str | float | None = None,
    shard_size: int = 5 << 30,
    save_recipe: Source | None = None,
    max_memory: int | None = None,
    threads: int | None = None,
    force: bool = False,
    allow_nonfinite: bool = False,
    allow_overflow: bool = False,
    progress: Callable[[Progress], None] | None = None,
    chunk_bytes: int | None = None,
    resume: bool = True,
    consume_source: bool = False,
    yes: bool = False,
    revision: str | None = None,
) -> Report:
    """Convert a checkpoint folder into an MLX folder.

    Args:
        source: Folder with ``config.json`` and safetensors, or ``org/name`` of one on the hub,
            or a GGUF file (``org/name:Q4_K_M`` on the hub); it is never modified.
        output: Folder to write; it appears only when complete.
        quantization: Target of the chosen layers. None keeps a quantized source as it is
            and means affine, 4 bits, group 64 for a dense one.
        bits: With ``group_size`` and ``mode``, another way to give ``quantization``;
            what is not given takes MLX's default for the mode.
        group_size: Inputs that share a scale.
        mode: "affine", "mxfp4", "mxfp8" or "nvfp4".
        dequantize: Write every layer dense.
        dtype: "float16", "bfloat16" or "float32" for floating tensors; cast before they
            are quantized.
        overrides: ``"REGEX=SPEC"`` or ``(regex, spec)`` on layer paths; the last match wins.
        only: Regexes; layers that none matches are left as they are.
        recipe: Name of a recipe ("mixed_3_6", ``requant recipes`` lists them) or path of a
            TOML file: targets by role, name and place. ``bits``, ``group_size`` and ``mode``
            replace its default; ``overrides`` win over its rules.
        layout: "mlx-lm" (names, shapes, choice of layers and config of mlx-lm's converter;
            an error where it cannot be), "keep" (the source's tensor names), or "auto": the
            first where mlx-lm is installed and takes this checkpoint, else the second and a
            note that says why.
        keep_extra: In mlx-lm's layout, keep tensors that its class has no use for (towers for
            images and sound, MTP heads) under their own names instead of dropping them; a
            note says whether mlx-lm still loads the result.
        fold_rotation: Make plain 8-bit layers of those whose inputs are rotated (ParoQuant); else
            the rotation stays beside the codes, and only ``requant.mlx_lm.load`` runs it.
        act_order: GPTQ layers whose inputs are out of order, where that cannot be moved into
            the layer before: "requantize" (8 bits), "dense" or "refuse".
        search: "off" (MLX's rule, bit for bit), "fast" or "best": look for scales and biases
            with a smaller squared error at the same size (docs/quality.md).
        statistics: File of ``calibrate``, or llama.cpp's imatrix: what an error of each input
            counts in the search. Turns ``search`` to "best" where that is "off".
        gptq: Hand the error of each input's codes on to the inputs after it, by the Hessians of
            ``statistics`` (``calibrate(..., hessian=True)``); affine layers only.
        config_from: For GGUF: the folder of the original model, whose config.json and tokenizer
            files are taken instead of what the metadata say.
        budget: 4.5 (bits per weight) or "12GB" (bytes of all tensors): choose bits and group of
            each layer so that the least is lost within it. The source is measured first;
            ``overrides`` and ``only`` win, ``group_size`` holds for all other layers.
        shard_size: Most bytes of one output file.
        save_recipe: File for what ``budget`` chose, to be edited and given as ``recipe``.
        max_memory: Most bytes to hold in memory, mapped pages aside.
        threads: Worker threads; every processor by default.
        force: Replace an existing output folder.
        allow_nonfinite: Leave a layer with NaN or infinity as it is instead of stopping.
        allow_overflow: Let values that a cast to ``dtype`` cannot hold become infinite.
        progress: Called about ten times a second with a ``Progress``.
        chunk_bytes: Bytes of one worker's chunk; the result does not depend on it.
        resume: Go on where the same conversion was stopped before; False starts over.
        consume_source: Delete each weight file of the source once all that needs it is durably
            written; everything is computed and checked once before the first goes. Of a source on
            the hub, a few weight files at a time are on the disk, and none is checked before.
        yes: Must be true with ``consume_source``, but for the hub: nothing can be verified
            against the source afterwards.
        revision: Of a source on the hub: branch, tag or commit.

    Returns:
        What was done, layer by layer.

    Raises:
        CheckpointError: Everything that is wrong with the source; nothing was written.
        OutputError: The output exists, is being written by another process, or cannot be
            written. What was done is kept for the next call; a note of the error says where.
        UsageError: Wishes that contradict each other or name no layer.

    Example:
        >>> report = convert("source", "output", bits=4)  # doctest: +SKIP
        >>> round(report.bits_per_weight, 2)  # doctest: +SKIP
        4.5
    """
    began = time.perf_counter()
    wishes = Wishes.build(
        quantization,
        bits=bits,
        group_size=group_size,
        mode=mode,
        dequantize=dequantize,
        dtype=dtype,
        overrides=overrides,
        only=only,
        recipe=recipe,
        layout=layout,
        keep_extra=keep_extra,
        act_order=act_order,
        fold_rotation=fold_rotation,
        search=search,
        statistics=statistics,
        gptq=gptq,
        config_from=config_from,
        max_shard_bytes=shard_size,
        budget=budget,
    )
    check_saving(save_recipe, wishes)
    if consume_source and budget is not None:
        raise UsageError(
            "--budget measures the source before it is converted: requant plan SOURCE --budget "
            f"{budget} --save-recipe FILE.toml, then --recipe FILE.toml with --consume-source"
        )
    remote = find_repository(source, revision)
    if consume_source:
        _check_consuming(source, remote, yes)
    else:
        _refuse_half_consumed(Path(output))
    only_copy = consume_source and remote is None
    twins = twins_of(Path(output)) if only_copy else None
    begun = twins is not None and twins.is_dir()
    area = downloads_of(Path(output)) if consume_source else None
    place = Path(source) if remote is None else _arriving(remote, wishes, Path(output), force, area)
    if budget is not None:
        wishes = settle(
            place,
            wishes,
            check=lambda first: check_output(first, Path(output), force),
            keep=measured_of(Path(output)) if resume else None,
            threads=threads,
            max_memory=max_memory,
            allow_nonfinite=allow_nonfinite,
            progress=progress,
            chunk_bytes=chunk_bytes,
        )
        save(save_recipe, wishes)
    run = partial(
        carry_out,
        place,
        max_memory=max_memory,
        threads=threads,
        allow_nonfinite=allow_nonfinite,
        allow_overflow=allow_overflow,
        progress=progress,
        chunk_bytes=chunk_bytes,
        twins=twins if begun else None,
    )
    if only_copy and not begun:
        wishes = _checked(run, wishes)
    elif allow_nonfinite and resume:
        wishes = replace(wishes, spoiled=frozenset(spoiled_before(Path(output))))
    made, outcome = run(
        wishes,
        lambda made, wished: OutputFolder(
            made,
            Path(output),
            force,
            resume=resume,
            wishes=wished.to_dict(),
            consume=consume_source,
        ),
        lambda folder, outcome: folder.publish(recorded_errors(folder.plan, outcome)),
    )
    if budget is not None:
        measured_of(Path(output)).unlink(missing_ok=True)
    return Report.build(made, str(output), outcome, time.perf_counter() - began)


def _check_consuming(source: Source, remote: Repository | None, yes: bool) -> None:
    """Refuse to delete what nobody said may be deleted, or what does not go file by file."""
    if remote is None and not yes:
        raise UsageError(
            f"--consume-source deletes the weights in {source}; afterwards nothing can be verified "
            "against them, and no other conversion made of them. --yes says that this is meant"
        )
    if is_gguf(Path(source)):
        raise UsageError("--consume-source is for safetensors; a GGUF file goes as a whole or not")


def _refuse_half_consumed(output: Path) -> None:
    """Say what is missing where a conversion that deletes its source was stopped."""
    if twins_of(output).is_dir():
        raise OutputError(
            f"{output}: a conversion that deletes its source was stopped, and what it made is in "
            f"{staging_of(output)}; go on with --consume-source --yes"
        )


def _checked(run: Callable[..., tuple[Plan, Outcome]], wishes: Wishes) -> Wishes:
    """Read and compute everything once, so that nothing is found after files are gone.

    Returns:
        The wishes, and the layers that they leave as they are.
    """
    tried: list[Wishes] = []

    @contextmanager
    def nowhere(made: Plan, wished: Wishes) -> Iterator[Nowhere]:
        tried.append(wished)
        yield Nowhere()

    run(wishes, nowhere, lambda sink, outcome: None)
    return tried[-1]


AnySink = TypeVar("AnySink", bound=Sink)


def _arriving(
    remote: Repository, wishes: Wishes, output: Path, force: bool, area: Path | None
) -> Checkpoint:
    """A source on the hub, to be downloaded now that its headers hold no problem."""
    checkpoint = remote.headers(wishes.config_from)
    made, spent = make_plan(checkpoint, wishes), spent_on(output)
    if area is None:
        most = sum(shard.nbytes for shard in made.shards) + remote.room_beside(output)
    else:
        spent += bytes_on_disk(area)
        most = most_with_consume_source(made)
    check_output(made, output, force, spent, most)
    return remote.arriving(checkpoint, area)


def carry_out(
    source: Path | Checkpoint,
    wishes: Wishes,
    open_sink: Callable[[Plan, Wishes], AbstractContextManager[AnySink]],
    finish: Callable[[AnySink, Outcome], None],
    *,
    max_memory: int | None = None,
    threads: int | None = None,
    allow_nonfinite: bool = False,
    allow_overflow: bool = False,
    progress: Callable[[Progress], None] | None = None,
    chunk_bytes: int | None = None,
    twins: Path | None = None,
) -> tuple[Plan, Outcome]:
    """Plan, run and check; ``finish`` is called once, with what holds the whole result."""
    made = make_plan(source, wishes, twins)
    supply = made.checkpoint.supply

    def refused_at_once(found: Finding) -> bool:
        return found.is_no_number or bool(found.overflowed and not allow_overflow)

    # What comes and goes is not downloaded to the end for a run that is refused.
    stop_at = refused_at_once if supply and supply.consumed and not allow_nonfinite else None
    while True:
        budget = make_budget(made, threads, max_memory, chunk_bytes)
        with open_sink(made, wishes) as sink:
            outcome = run_plan(made, sink, budget, progress, stop_at)
            found = outcome.findings
            spoiled = {x for x, finding in found.items() if finding.is_no_number} - wishes.spoiled
            problems = _refused(found, wishes.spoiled, allow_overflow)
            if not problems:
                finish(sink, outcome)
                return made, outcome
        # Left without an error: nothing is kept.
        if not spoiled or not allow_nonfinite:
            raise CheckpointError(made.source, problems)
        # The layout of the output changes with a layer that stays dense: plan again.
        wishes = replace(wishes, spoiled=wishes.spoiled.union(spoiled))
        made = make_plan(source, wishes, twins)


def _refused(
    findings: Mapping[str, Finding], spoiled: Collection[str], allow_overflow: bool
) -> list[Problem]:
    """What forbids publishing: values that were no numbers, or would be lost."""
    problems = []
    for layer, found in findings.items():
        if found.is_no_number and layer not in spoiled:
            problems.append(found.nonfinite_problem(layer))
        if found.overflowed and not allow_overflow:
            message = (
                f"{count_are(found.overflowed, 'value')} too large for the dtype asked for and "
                "would become infinite; --dtype bfloat16 holds them, "
                "--allow-overflow takes infinities"
            )
            problems.append(Problem(layer, message))
    return problems
