"""The contract with vLLM, setting by setting: no token lost or wrong, every block back, and what was to happen did."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.contract.mixes import SETTINGS, run_mix

pytestmark = pytest.mark.vllm

SEEDS = range(3)


@pytest.mark.parametrize("name", SETTINGS)
def test_every_answer_is_right_and_the_setting_did_what_it_is_there_for(tiny_model: Path, name: str) -> None:
    setting = SETTINGS[name]
    seen: Counter[str] = Counter()
    for seed in SEEDS:
        seen.update(run_mix(tiny_model, setting, seed))
    assert not {what: seen[what] for what, least in setting.least.items() if seen[what] < least}, dict(seen)
