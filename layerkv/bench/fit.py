"""From timed steps to a `CostProfile`: robust least squares with coefficients that are never negative.

Pure functions, any process. Residuals are relative to the measured time, so that a step of 5 ms matters as much as
one of 500 ms, and Huber's weights keep the steps that something else on the machine disturbed from mattering.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from statistics import median

import msgspec
import numpy as np
import numpy.typing as npt

from layerkv.core.cost import CostProfile, CostView, Curve, StepWork

Array = npt.NDArray[np.float64]
Sample = tuple[StepWork, float]

HUBER_SIGMAS = 1.345
HUBER_ROUNDS = 25
TOKEN_KNOTS = tuple(2.0**n for n in range(2, 16))
CONTEXT_KNOTS = tuple(4.0**n for n in range(4, 12))
# Fewer shapes than these between two knots do not fix a slope of their own.
SHAPES_PER_SEGMENT = 6


class FitError(msgspec.Struct, frozen=True, kw_only=True):
    """How far predictions are off, as shares of the measured times; all 0 without samples."""

    num_shapes: int
    median: float
    p90: float


def fit_profile(
    samples: Sequence[Sample],
    *,
    name: str = "measured",
    store: Curve | None = None,
    load: Curve | None = None,
    kv_bytes_per_token: int = 0,
    made: Mapping[str, str] | None = None,
) -> CostProfile:
    """The profile that explains `samples`: each what one step did, and the seconds it took.

    Samples of equal work count as one, with their median. `store` and `load` are measured on their own
    (`fit_copies`): a layered step's time does not tell copying from waiting.
    """
    shapes = shape_medians(samples)
    resident = [(work, seconds) for work, seconds in shapes.items() if not work.is_layered]
    compute = _fit_compute(resident)
    profile = CostProfile(
        name=name,
        step_s=compute.step_s,
        request_s=compute.request_s,
        tokens=compute.tokens,
        decode_context=compute.decode_context,
        pair_s=compute.pair_s,
        store=store or Curve([]),
        load=load or Curve([]),
        kv_bytes_per_token=kv_bytes_per_token,
        made=made or {},
    )
    layered_step_s, exposed_share = _fit_layered(profile, shapes)
    return dataclasses.replace(profile, layered_step_s=layered_step_s, exposed_share=exposed_share)


def fit_copies(samples: Sequence[tuple[int, float]]) -> Curve:
    """The curve of copies, from (bytes, seconds) of each: medians by size, straight between, falling nowhere."""
    by_size: dict[int, list[float]] = {}
    for num_bytes, seconds in samples:
        by_size.setdefault(num_bytes, []).append(seconds)
    sizes = sorted(by_size)
    seconds_of = np.maximum.accumulate([median(by_size[size]) for size in sizes])
    return Curve(list(zip(sizes, seconds_of.tolist(), strict=True)))


def prediction_error(profile: CostProfile, samples: Sequence[Sample]) -> FitError:
    """How well the profile predicts `samples`; those of equal work count as one, with their median."""
    view = CostView(profile)
    errors = [abs(view.step_s(work) / seconds - 1) for work, seconds in shape_medians(samples).items()]
    if not errors:
        return FitError(num_shapes=0, median=0.0, p90=0.0)
    middle, high = np.percentile(errors, (50, 90))
    return FitError(num_shapes=len(errors), median=float(middle), p90=float(high))


def shape_medians(samples: Sequence[Sample]) -> dict[StepWork, float]:
    """The median time of each work that occurs."""
    times: dict[StepWork, list[float]] = {}
    for work, seconds in samples:
        times.setdefault(work, []).append(seconds)
    return {work: median(of_work) for work, of_work in times.items()}


class _Compute(msgspec.Struct, frozen=True):
    step_s: float
    request_s: float
    tokens: Curve
    decode_context: Curve
    pair_s: float


def _fit_compute(samples: Sequence[Sample]) -> _Compute:
    """The terms of steps that copy nothing."""
    works = [work for work, _ in samples]
    tokens = np.array([work.num_decodes + work.prefill_tokens for work in works], dtype=float)
    context = np.array([work.decode_context for work in works], dtype=float)
    requests = np.array([work.num_decodes + work.num_prefills for work in works], dtype=float)
    pairs = np.array([work.prefill_pairs for work in works], dtype=float)
    token_knots, context_knots = _knots(tokens, TOKEN_KNOTS), _knots(context, CONTEXT_KNOTS)
    token_part, context_part = _segments(tokens, token_knots), _segments(context, context_knots)
    columns = np.column_stack([np.ones(len(works)), requests, pairs, token_part, context_part])
    found = robust_nnls(columns, np.array([seconds for _, seconds in samples]))
    step_s, request_s, pair_s = (float(value) for value in found[:3])
    slopes = found[3:]
    return _Compute(
        step_s=step_s,
        request_s=request_s,
        tokens=_curve(token_knots, slopes[: token_part.shape[1]], float(tokens.max(initial=1.0))),
        decode_context=_curve(context_knots, slopes[token_part.shape[1] :], float(context.max(initial=1.0))),
        pair_s=pair_s,
    )


def _fit_layered(profile: CostProfile, shapes: Mapping[StepWork, float]) -> tuple[float, float]:
    """`layered_step_s` and `exposed_share`, from what layered steps take beyond their compute.

    Compute is the time measured for the same step without layers where there is one, else predicted.
    """
    view = CostView(profile)
    rows: list[tuple[float, float, float]] = []
    for work, seconds in shapes.items():
        if not work.is_layered:
            continue
        resident = work._replace(stored_bytes=0, loaded_bytes=0, is_layered=False)
        compute_s = shapes.get(resident, view.step_s(resident))
        copy_s = max(profile.store(work.stored_bytes), profile.load(work.loaded_bytes))
        rows.append((min(copy_s, compute_s), seconds - compute_s - max(copy_s - compute_s, 0.0), seconds))
    if not rows:
        return 0.0, 0.0
    hidden, added, total = (np.array(column) for column in zip(*rows, strict=True))
    fixed = np.ones(len(rows))
    layered_step_s, exposed_share = robust_nnls(np.column_stack([fixed, hidden]), added, relative_to=total)
    if exposed_share > 1:
        exposed_share = 1.0
        (layered_step_s,) = robust_nnls(fixed[:, None], added - hidden, relative_to=total)
    return float(layered_step_s), float(exposed_share)


def robust_nnls(columns: Array, values: Array, *, relative_to: Array | None = None) -> Array:
    """Coefficients of at least 0 so that `columns @ coefficients` is near `values`, outliers notwithstanding.

    What is made small is the difference as a share of `relative_to` (`values` themselves by default).
    """
    scale = 1 / (values if relative_to is None else relative_to)
    rows, target = columns * scale[:, None], values * scale
    weights = np.ones(len(values))
    found = np.zeros(columns.shape[1])
    for _ in range(HUBER_ROUNDS):
        before, found = found, _nnls(rows * weights[:, None], target * weights)
        if np.allclose(found, before, rtol=1e-6, atol=0.0):
            break
        off = np.abs(rows @ found - target)
        limit = HUBER_SIGMAS * max(1.4826 * float(np.median(off)), 1e-6)
        weights = np.sqrt(limit / np.maximum(off, limit))
    return found


def _nnls(rows: Array, target: Array) -> Array:
    """Least squares without negative coefficients (Lawson and Hanson's active set method)."""
    norms = np.linalg.norm(rows, axis=0)
    norms[norms == 0] = 1.0
    unit = rows / norms
    count = unit.shape[1]
    found, active = np.zeros(count), np.zeros(count, dtype=bool)
    tolerance = 1e-10 * max(float(np.linalg.norm(target)), 1e-300)
    for _ in range(10 * count):
        pull = np.where(active, -np.inf, unit.T @ (target - unit @ found))
        if active.all() or pull.max() <= tolerance:
            break
        active[int(pull.argmax())] = True
        found = _solve_active(unit, target, found, active)
    return found / norms


def _solve_active(unit: Array, target: Array, found: Array, active: npt.NDArray[np.bool_]) -> Array:
    """Least squares over `active` alone, dropping from it what would become negative."""
    while active.any():
        free = np.zeros(len(found))
        free[active] = np.linalg.lstsq(unit[:, active], target, rcond=None)[0]
        blocking = active & (free <= 0)
        if not blocking.any():
            return free
        step = float((found[blocking] / (found[blocking] - free[blocking] + 1e-300)).min())
        found = found + step * (free - found)
        active &= ~(blocking & (found <= 1e-12))
        found = np.where(active, found, 0.0)
    return found


def _knots(x: Array, candidates: Sequence[float]) -> list[float]:
    """0 and those candidates that leave enough distinct values on either side."""
    values = np.unique(x[x > 0])
    knots = [0.0]
    for knot in candidates:
        between = int(((values > knots[-1]) & (values <= knot)).sum())
        if between >= SHAPES_PER_SEGMENT and int((values > knot).sum()) >= SHAPES_PER_SEGMENT:
            knots.append(knot)
    return knots


def _segments(x: Array, knots: Sequence[float]) -> Array:
    """How much of `x` lies between each knot and the next; the last segment has no end."""
    ends = [*knots[1:], np.inf]
    return np.column_stack([np.clip(x - low, 0, high - low) for low, high in zip(knots, ends, strict=True)])


def _curve(knots: Sequence[float], slopes: Array, most: float) -> Curve:
    """The curve through the origin that has `slopes` between `knots`, drawn as far as `most`."""
    xs = [*knots, max(most, knots[-1] + 1)]
    ys = np.concatenate([[0.0], np.cumsum(np.diff(xs) * slopes)])
    return Curve(list(zip(xs, ys.tolist(), strict=True)))
