import math
from pathlib import Path

import msgspec
import pytest

from layerkv.bench.policy_file import write_policy
from layerkv.config import SloClass, SloPolicy, load_policy

CHAT = SloClass(name="chat", ttft_s=1.5, tpot_s=0.08)


@pytest.mark.parametrize(
    "slo",
    [
        CHAT,
        msgspec.structs.replace(CHAT, weight=3.0, overload="reject", max_stall_s=0.4),
        msgspec.structs.replace(CHAT, max_lag_s=0.0),
        msgspec.structs.replace(CHAT, max_lag_s=2.5),
        msgspec.structs.replace(CHAT, stream=False),
        msgspec.structs.replace(CHAT, tpot_s=math.inf),
    ],
)
def test_an_engine_reads_the_policy_that_was_written_for_it(slo: SloClass, tmp_path: Path) -> None:
    policy = SloPolicy(classes={"chat": slo}, default_class="chat")
    assert load_policy(write_policy(policy, tmp_path / "slo.yaml")) == policy
