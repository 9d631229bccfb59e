"""The cost model that learns while the engine runs: a profile, and two factors that observed steps correct."""

from __future__ import annotations

import math
from statistics import median

from layerkv.core.cost import CostProfile, CostView, StepWork

MEASURED_BOUND = 4.0
"""A measured profile is corrected by this factor at most: beyond it, it is of another machine or model. Not measured:
chosen by judgement."""
UNKNOWN_BOUND = 1e5
"""A generic profile says nothing about scale. Not measured: chosen by judgement: no bound that a machine could
reach."""
GAIN = 0.1
"""A step moves a factor by this power of what it was wrong by: the last dozen or so steps count. Not measured: chosen
by judgement."""
OUTLIER = 2.0
"""One step counts as wrong by this factor at most: a stall (a compilation, a page fault) is no cost of the work. Not
measured: chosen by judgement."""


FIRST_SAMPLES = 8
"""Of an unknown scale, the median of so many steps is taken before the running average begins: the first may have
compiled something. Not measured: chosen by judgement."""


class _Factor:
    """Observed over predicted: a median at first, then a running average of the logarithm, each sample clipped."""

    def __init__(self, *, is_measured: bool) -> None:
        self.value = 1.0
        self.is_known = is_measured
        self._bound = MEASURED_BOUND if is_measured else UNKNOWN_BOUND
        self._firsts: list[tuple[float, float, float]] | None = None if is_measured else []

    def observe(self, seconds: float, predicted_s: float, other_s: float = 0.0, other_factor: float = 1.0) -> None:
        """What is predicted to take ``predicted_s`` took so long together with something else, of another factor."""
        if self._firsts is None:
            ratio = (seconds - other_s * other_factor) / predicted_s
            self._set(self.value * min(max(ratio / self.value, 1 / OUTLIER), OUTLIER) ** GAIN)
            return
        self._firsts.append((seconds, predicted_s, other_s))
        # All of them by what is known of the other factor now: that was as uncertain at first.
        ratios = [(took_s - beside_s * other_factor) / told_s for took_s, told_s, beside_s in self._firsts]
        if (ratio := median(ratios)) > 0:
            self._set(ratio)
        if len(self._firsts) == FIRST_SAMPLES:
            self._firsts = None

    def guess(self, value: float) -> None:
        """What is taken until the first step tells of this factor alone."""
        self._set(value)

    def _set(self, value: float) -> None:
        self.value = min(max(value, 1 / self._bound), self._bound)
        self.is_known = True


class OnlineCost:
    """Predictions of a profile, corrected by a robust running average of observed over predicted times.

    Correction costs a few multiplications per step. Not thread-safe.
    """

    def __init__(self, profile: CostProfile, *, is_measured: bool) -> None:
        self._decode = _Factor(is_measured=is_measured)
        self._prefill = _Factor(is_measured=is_measured)
        self.view = CostView(profile)

    def observe(self, work: StepWork, seconds: float, waited_s: float | None = None) -> bool:
        """A step that did ``work`` took so long; returns whether that taught anything.

        Args:
            work: What it did.
            seconds: Its duration. What is none (a clock that jumped) is left out.
            waited_s: How much of it compute waited for copies. None where nobody can tell: then what the profile says
                of them is taken, and a step in which copies took most of the time is left out.
        """
        if not (seconds > 0 and math.isfinite(seconds)):
            return False
        profile = self.view.profile
        computed_s = self._without_copies(work, seconds, waited_s)
        decode_s = profile.decode_part_s(work)
        prefill_s = profile.prefill_part_s(work)
        if computed_s <= 0 or (prefill_s <= 0 and decode_s <= 0):
            return False
        if prefill_s <= 0:
            self._decode.observe(computed_s, decode_s)
        elif self._decode.is_known:
            self._prefill.observe(computed_s, prefill_s, decode_s, self._decode.value)
        else:  # nothing is known of scale: take all terms to be wrong alike
            ratio = computed_s / (decode_s + prefill_s)
            self._prefill.guess(ratio)
            self._decode.guess(ratio)
        self.view = CostView(profile, self._decode.value, self._prefill.value)
        return True

    def _without_copies(self, work: StepWork, seconds: float, waited_s: float | None) -> float:
        """The time that the step computed; 0 or less if that cannot be told."""
        profile = self.view.profile
        if work.is_layered:
            seconds -= profile.layered_step_s
        if waited_s is not None:
            return seconds - waited_s
        held_s = beside_s = 0.0
        if work.parked_bytes:
            held_s += profile.store(work.parked_bytes)
        if work.hit_bytes:
            held_s += profile.load(work.hit_bytes)
        if work.is_layered:
            beside_s = max(profile.store(work.stored_bytes), profile.load(work.loaded_bytes))
        seconds -= held_s + profile.exposed_share * beside_s
        return seconds if seconds > max(held_s, beside_s) else 0.0
