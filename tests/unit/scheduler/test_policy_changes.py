"""A policy comes into force while requests are parked."""

from __future__ import annotations

import pytest

from layerkv.scheduler.reasons import Reason
from tests.fakes.tiny_controller import arrive, controller
from tests.fakes.tiny_scheduler import policy


def test_who_was_parked_under_another_policy_has_a_reader_too() -> None:
    """To the fluid policy it never ran dry, so that nobody made room for it."""
    c = controller(policy="slo")
    arrive(c, "a")
    c.admitted("a", layered=False, reason=Reason.FITS, step=1, now_s=10.0)
    c.first_token("a", 10.5)
    c.made_tokens("a", 10.5)
    c.park("a", num_computed=160, num_tokens=161, num_output=1, reason=Reason.POOL_SHORT, now_s=10.5)
    c.set_policy(policy(policy="fluid"))
    assert c.parked.views[0].dry_s == pytest.approx(10.5 + 0.05)
