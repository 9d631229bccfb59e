"""A failed copy costs its requests and not the engine: what the ranks report, and what becomes of a hopeless case.

That tokens stay exact while copies fail is among the settings of `test_exact.py`.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from layerkv.bench.tiny_model import make_tiny_model
from tests.vllm.forked import Forks
from tests.vllm.mix import make_mix
from tests.vllm.test_exact import MIXES, engine_args, run_engine

pytestmark = pytest.mark.vllm


def test_what_fails_on_one_rank_reaches_the_scheduler() -> None:
    from vllm.distributed.kv_transfer.kv_connector.utils import KVOutputAggregator
    from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput

    from layerkv.vllm_plugin.failed_copies import FailedCopies

    def output(meta: FailedCopies | None) -> ModelRunnerOutput:
        connector = KVConnectorOutput(kv_connector_worker_meta=meta)
        return ModelRunnerOutput(req_ids=[], req_id_to_index={}, kv_connector_output=connector)

    reports = [None, FailedCopies(unstored=frozenset({3})), FailedCopies(frozenset({4}), unloaded=frozenset({7}))]
    together = KVOutputAggregator(3).aggregate([output(meta) for meta in reports])
    assert together is not None
    assert together.kv_connector_output is not None
    assert together.kv_connector_output.kv_connector_worker_meta == FailedCopies(frozenset({3, 4}), frozenset({7}))


@pytest.mark.slow
def test_where_every_copy_fails_requests_end_with_an_error_and_the_engine_goes_on(forks: Forks, tmp_path: Path) -> None:
    """What needs no copy is served, and every block comes back."""
    connector = {
        "kv_connector": "LayerKVConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"zone_tokens": 320, "host_memory": "64MiB"},
    }
    args = {**engine_args(make_tiny_model("test", tmp_path / "model")), "kv_transfer_config": connector}
    results = run_engine(forks, tmp_path, {"engine_args": args, "mixes": MIXES[:2], "fail_copies_every": 1})
    for mix, result in zip(MIXES[:2], results, strict=True):
        lengths = [
            (len(tokens), request.max_tokens) for tokens, request in zip(result["tokens"], make_mix(**mix), strict=True)
        ]
        assert any(made == wanted for made, wanted in lengths), lengths
        assert any(made < wanted for made, wanted in lengths), "some have been ended"
        books = result["books"]
        assert books.pop("moves")["recomputes"] > 0
        assert all(books[name] for name in ("pool_all_free", "host_all_free", "zone_all_free", "no_requests"))
