"""The cost model that learns while the engine runs: a profile, and two factors that observed steps correct."""

from __future__ import annotations

import math

from layerkv.core.cost import CostProfile, CostView, StepWork

MEASURED_BOUND = 4.0
"""A measured profile is corrected by this factor at most: beyond it, it is of another machine or model."""
UNKNOWN_BOUND = 1e5
"""A generic profile says nothing about scale."""
GAIN = 0.1
"""A step moves a factor by this power of what it was wrong by: the last dozen or so steps count."""
OUTLIER = 2.0
"""One step counts as wrong by this factor at most: a stall (a compilation, a page fault) is no cost of the work."""


class OnlineCost:
    """Predictions of a profile, corrected by a robust running average of observed over predicted times.

    Correction costs a few multiplications per step. Not thread-safe.
    """

    def __init__(self, profile: CostProfile, *, is_measured: bool) -> None:
        self._bound = MEASURED_BOUND if is_measured else UNKNOWN_BOUND
        self._has_decoded = self._has_prefilled = is_measured
        self.view = CostView(profile)

    def observe(self, work: StepWork, seconds: float) -> bool:
        """A step that did ``work`` took so long; returns whether that taught anything.

        What is no duration (a clock that jumped) is left out, and so is a step in which copies took the time.
        """
        if not (seconds > 0 and math.isfinite(seconds)):
            return False
        view, profile = self.view, self.view.profile
        if work.is_layered:
            copy_s = max(profile.store(work.stored_bytes), profile.load(work.loaded_bytes))
            seconds -= profile.layered_step_s + profile.exposed_share * copy_s
            if seconds <= copy_s:
                return False
        decode_s = profile.decode_part_s(work)
        prefill_s = profile.prefill_part_s(work)
        if prefill_s <= 0 and decode_s <= 0:
            return False
        if prefill_s <= 0:
            factor = self._moved(view.decode_factor, seconds / decode_s, is_first=not self._has_decoded)
            self._has_decoded = True
            self.view = view._replace(decode_factor=factor)
        elif not self._has_decoded:  # nothing is known of scale: take all terms to be wrong alike
            factor = self._moved(view.prefill_factor, seconds / (decode_s + prefill_s), is_first=True)
            self.view = view._replace(decode_factor=factor, prefill_factor=factor)
            self._has_decoded = self._has_prefilled = True
        else:
            rest_s = seconds - decode_s * view.decode_factor
            factor = self._moved(view.prefill_factor, max(rest_s, 0.0) / prefill_s, is_first=not self._has_prefilled)
            self._has_prefilled = True
            self.view = view._replace(prefill_factor=factor)
        return True

    def _moved(self, factor: float, ratio: float, *, is_first: bool) -> float:
        if is_first:
            moved = ratio if ratio > 0 else factor
        else:
            wrong_by = min(max(ratio / factor, 1 / OUTLIER), OUTLIER)
            moved = factor * wrong_by**GAIN
        return min(max(moved, 1 / self._bound), self._bound)
