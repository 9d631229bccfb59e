"""What workers do about segments in steps, with and without tokens, and what of it reaches the scheduler."""

from __future__ import annotations

import ctypes
import pickle
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from layerkv.core.geometry import KVGeometry
from layerkv.core.segments import SegmentLayout, SegmentMoves, SegmentPlan, SegmentState, SegmentTable
from layerkv.core.transfer import BlockRun, StepPlan
from layerkv.device import libc
from layerkv.device.base import Direction, Event
from layerkv.device.copy_event import CopyEvent
from layerkv.device.mechanism import Mechanism, make_mechanism
from layerkv.errors import LostCopyError
from layerkv.vllm_plugin.layer_places import LayerPlaces

if TYPE_CHECKING:
    from layerkv.vllm_plugin.connector_worker import WorkerSide

pytestmark = pytest.mark.vllm

PLAN = SegmentPlan(SegmentLayout(segment_blocks=4, num_segments=4), num_mapped=2)
GEOMETRY = KVGeometry(num_layers=3, page_bytes=1024, block_tokens=4, pool_blocks=16, zone_blocks=4, lanes=1)
LAYERS = [f"layer.{layer}" for layer in range(3)]


def make_worker(rank: int = 0, plan: SegmentPlan = PLAN) -> tuple[WorkerSide, Mechanism]:
    from layerkv.vllm_plugin.connector_worker import WorkerSide

    mechanism = make_mechanism("cpu", GEOMETRY, 8, plan, guards=True)
    return WorkerSide(GEOMETRY, LayerPlaces([LAYERS]), mechanism, rank=rank), mechanism


def answers_of_step(worker: WorkerSide, plan: StepPlan) -> list[tuple[int, int, bool]]:
    """A step as vLLM takes a worker through it, and those after it until something is answered."""
    for _ in range(200):
        worker.begin_step(plan)
        worker.end_step()
        worker.finished_fetches()
        if answers := worker.take_answers():
            return [tuple(answer) for answer in answers]
        plan = StepPlan()
    return []


def moves(*, maps: Sequence[int] = (), unmaps: Sequence[int] = (), **others: Any) -> StepPlan:
    return StepPlan(moves=SegmentMoves(tuple(maps), tuple(unmaps)), **others)


def pool_of(mechanism: Mechanism) -> Any:
    g = GEOMETRY
    return mechanism.arena.tensor().view(g.num_layers, g.total_blocks, g.page_bytes)[:, : g.pool_blocks]


def test_steps_without_tokens_carry_moves_out_and_answer_them() -> None:
    worker, mechanism = make_worker(rank=3)
    assert answers_of_step(worker, moves(maps=[2])) == [(2, 3, False)]
    pool_of(mechanism)[:, 8:12] = 7
    assert answers_of_step(worker, moves(unmaps=[2])) == [(2, 3, False)]
    assert answers_of_step(worker, moves(maps=[2])) == [(2, 3, False)]
    assert not pool_of(mechanism)[:, 8:12].any(), "nobody's old KV"
    worker.shutdown()


def test_memory_that_comes_by_the_first_touch_is_there_for_the_copies_of_the_step_that_names_it() -> None:
    """A process that copies into other memory is killed here."""
    worker, mechanism = make_worker(plan=replace(PLAN, by_touch=True))
    pool_of(mechanism)[:, 4:8] = 7
    load = (BlockRun(8, 0, 2),)
    worker.begin_step(moves(maps=[2], parks=(BlockRun(4, 0, 2),), hits=load))
    worker.end_step()
    worker.finished_fetches()
    assert worker.take_answers() == [], "nobody waits for that"
    assert (pool_of(mechanism)[:, 8:10] == 7).all()
    assert answers_of_step(worker, moves(unmaps=[2], parks=(BlockRun(8, 4, 1),))) == [(2, 0, False)]
    assert answers_of_step(worker, moves(maps=[2, 3], unmaps=[1])) == [(1, 0, False)]
    assert not pool_of(mechanism)[:, 8:].any(), "nobody's old KV"
    worker.shutdown()


def test_what_is_still_being_given_back_is_not_put_into_service(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be wiped under whoever uses it."""
    worker, mechanism = make_worker(plan=replace(PLAN, by_touch=True))
    given_back = CopyEvent()
    assert mechanism.touched_arena is not None
    monkeypatch.setattr(mechanism.touched_arena, "unmap", lambda segments, after: given_back)
    worker.begin_step(moves(unmaps=[1]))
    worker.end_step()
    with pytest.raises(AssertionError, match="still being given back"):
        worker.begin_step(moves(maps=[1]))
    given_back.end()
    assert [tuple(answer) for answer in worker.take_answers()] == [(1, 0, False)]
    worker.begin_step(moves(maps=[1]))
    worker.end_step()
    worker.shutdown()


def test_stores_that_a_step_begins_with_come_before_the_unmap_of_what_they_read() -> None:
    worker, mechanism = make_worker()
    pool_of(mechanism)[:, 4:8] = 7
    plan = moves(unmaps=[1], parks=(BlockRun(4, 0, 2),), ahead=(BlockRun(6, 2, 2),))
    assert answers_of_step(worker, plan) == [(1, 0, False)]
    host = mechanism.host
    addresses = [host.address(layer, block) for layer in range(3) for block in range(4)]
    stored = [ctypes.string_at(address, GEOMETRY.page_bytes) for address in addresses]
    assert stored == [bytes([7]) * GEOMETRY.page_bytes] * 12
    worker.shutdown()


def test_host_memory_is_put_into_service_before_a_steps_copies_and_given_back_after_them() -> None:
    from layerkv.vllm_plugin.connector_worker import WorkerSide

    layout = SegmentLayout(segment_blocks=4, num_segments=3)
    mechanism = make_mechanism("cpu", GEOMETRY, 12, PLAN, host_layout=layout, guards=True)
    worker = WorkerSide(GEOMETRY, LayerPlaces([LAYERS]), mechanism, rank=3)
    host = mechanism.host

    def first_bytes(block: int) -> set[bytes]:
        return {ctypes.string_at(host.address(layer, block), 4) for layer in range(3)}

    pool_of(mechanism)[:, 4:8] = 7
    worker.begin_step(StepPlan(parks=(BlockRun(4, 8, 2),), host_moves=SegmentMoves(maps=(1, 2))))
    worker.end_step()
    assert worker.take_host_answers() == [], "nobody waits for that"
    assert first_bytes(8) == {b"\x07" * 4}
    plan = StepPlan(ahead=(BlockRun(6, 9, 1),), host_moves=SegmentMoves(unmaps=(2,)))
    answers = []
    while not answers:
        worker.begin_step(plan)
        worker.end_step()
        worker.finished_fetches()
        assert worker.take_answers() == []
        answers, plan = worker.take_host_answers(), StepPlan()
    assert [tuple(answer) for answer in answers] == [(2, 3, False)]
    worker.begin_step(StepPlan(host_moves=SegmentMoves(maps=(2,))))
    worker.end_step()
    assert first_bytes(8) == first_bytes(9) == {bytes(4)}
    worker.shutdown()


def test_host_memory_is_not_given_back_under_a_store_that_has_not_begun() -> None:
    from layerkv.vllm_plugin.connector_worker import WorkerSide

    layout = SegmentLayout(segment_blocks=4, num_segments=3)
    mechanism = make_mechanism("cpu", GEOMETRY, 12, PLAN, host_layout=layout)
    worker, gate, submit = WorkerSide(GEOMETRY, LayerPlaces([LAYERS]), mechanism), CopyEvent(), mechanism.engine.submit

    def later(direction: Direction, *copies: Any, after: Sequence[Event] = (), **how: Any) -> Event:
        return submit(direction, *copies, after=[*after, gate], **how)

    def step(**plan: Any) -> list[Any]:
        worker.begin_step(StepPlan(**plan))
        worker.end_step()
        worker.finished_fetches()
        return worker.take_host_answers()

    pool_of(mechanism)[:, 4:8] = 7
    mechanism.engine.submit = later  # type: ignore[method-assign]
    step(ahead=(BlockRun(4, 8, 2),), host_moves=SegmentMoves(maps=(1, 2)))
    mechanism.engine.submit = submit  # type: ignore[method-assign]
    assert step(host_moves=SegmentMoves(unmaps=(2,))) == []
    assert not any(step() for _ in range(10))
    gate.end()
    while not (answers := step()):
        pass
    assert [tuple(answer) for answer in answers] == [(2, 0, False)]
    addresses = [mechanism.host.address(layer, block) for layer in range(3) for block in range(8, 12)]
    assert {ctypes.string_at(address, GEOMETRY.page_bytes) for address in addresses} == {bytes(GEOMETRY.page_bytes)}
    worker.shutdown()


def refuse(segments: Sequence[int]) -> Event:
    """In the place of an arena's `prepare_map`."""
    event = CopyEvent()
    event.end(MemoryError("no memory"))
    return event


def test_where_one_rank_finds_no_memory_all_give_the_segment_back(monkeypatch: pytest.MonkeyPatch) -> None:
    table = SegmentTable(4, num_ranks=2, num_mapped=2)
    table.limit = 3
    workers = [make_worker(rank) for rank in range(2)]
    monkeypatch.setattr(workers[1][1].elastic_arena, "prepare_map", refuse)
    table.arrive(1)
    states = []
    while table.num_held > 2:
        plan = StepPlan(moves=table.take_moves())
        assert plan.moves, "a move is begun only when every rank has answered the one before"
        for worker, _ in workers:
            for segment, rank, has_failed in answers_of_step(worker, plan):
                states.append(table.answer(segment, rank, has_failed=has_failed))
                table.check()
    assert states == [SegmentState.ARRIVING, SegmentState.RELEASING, SegmentState.RELEASING, SegmentState.UNMAPPED]
    for worker, _ in workers:
        worker.shutdown()


def test_what_cannot_be_mapped_is_answered_as_failed_and_can_be_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    worker, mechanism = make_worker()
    with monkeypatch.context() as patch:
        patch.setattr(mechanism.elastic_arena, "prepare_map", refuse)
        assert answers_of_step(worker, moves(maps=[3])) == [(3, 0, True)]
    assert answers_of_step(worker, moves(unmaps=[3])) == [(3, 0, False)], "another rank had it"
    assert answers_of_step(worker, moves(maps=[3])) == [(3, 0, False)]
    worker.shutdown()


def test_an_unmap_behind_a_lost_copy_ends_the_step() -> None:
    worker, mechanism = make_worker()
    lost = CopyEvent()
    submit = mechanism.engine.submit

    def lose(direction: Direction, layers: Sequence[int], runs: Sequence[BlockRun], **how: Any) -> Event:
        submit(direction, layers, runs, **how)
        return lost

    mechanism.engine.submit = lose  # type: ignore[method-assign]
    worker.begin_step(moves(unmaps=[1], ahead=(BlockRun(4, 0, 2),)))
    worker.end_step()
    assert worker.take_answers() == []
    lost.end(LostCopyError("it did not end"))
    with pytest.raises(LostCopyError, match="segment 1 is not given back"):
        answers_of_step(worker, StepPlan(num_tokens=1))


def test_memory_that_the_kernel_does_not_take_back_ends_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    from layerkv.errors import TransferError

    def refuse(address: int, num_bytes: int) -> None:
        raise MemoryError("locked")

    worker, _ = make_worker()
    monkeypatch.setattr(libc, "give_back", refuse)
    with pytest.raises(TransferError, match="segment 1 is not given back: locked"):
        answers_of_step(worker, moves(unmaps=[1]))


def test_answers_of_two_ranks_reach_the_table_together_with_failed_copies() -> None:
    from vllm.distributed.kv_transfer.kv_connector.utils import KVOutputAggregator
    from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput

    from layerkv.vllm_plugin.failed_copies import FailedCopies
    from layerkv.vllm_plugin.segment_answers import SegmentAnswer, SegmentAnswers, failed_copies_in, worker_report

    def received(*reports: Any) -> Any:
        """What the scheduler sees of a step in which these ranks report so, each from a process of its own."""
        outputs = [
            ModelRunnerOutput.with_kv_conn_output_only(KVConnectorOutput(kv_connector_worker_meta=report))
            for report in reports
        ]
        together = KVOutputAggregator(len(reports)).aggregate(pickle.loads(pickle.dumps(outputs)))
        assert together is not None
        assert together.kv_connector_output is not None
        return together.kv_connector_output.kv_connector_worker_meta

    table = SegmentTable(4, num_ranks=2, num_mapped=2)
    table.limit = 4
    table.arrive(2)
    plan = StepPlan(moves=table.take_moves())
    workers = [make_worker(rank)[0] for rank in range(2)]
    reports = []
    for rank, worker in enumerate(workers):
        worker.begin_step(plan)
        worker.end_step()
        worker.finished_fetches()
        answers = worker.take_answers()
        while len(answers) < 2:
            worker.begin_step(StepPlan())
            worker.end_step()
            worker.finished_fetches()
            answers += worker.take_answers()
        failed = FailedCopies(unstored=frozenset({5})) if rank else None
        reports.append(worker_report(failed, answers))
    meta = received(*reports)
    assert isinstance(meta, SegmentAnswers)
    for answer in meta.answers:
        table.answer(answer.segment, answer.rank, has_failed=answer.has_failed)
        table.check()
    assert table.all_in(SegmentState.MAPPED) == [0, 1, 2, 3]
    assert failed_copies_in(meta) == FailedCopies(unstored=frozenset({5}))
    # whatever one has to tell, and whichever rank is asked first
    copies = FailedCopies(unloaded=frozenset({1}))
    of_host = worker_report(None, [], [SegmentAnswer(1, rank) for rank in range(2)])
    both = received(of_host, reports[1])
    assert (len(both.answers), both.host_answers) == (2, (SegmentAnswer(1, 0), SegmentAnswer(1, 1)))
    for pair in ((copies, reports[1]), (reports[1], copies)):
        both = received(*pair)
        assert failed_copies_in(both) == FailedCopies(frozenset({5}), frozenset({1}))
        assert len(both.answers) == 2
    assert received(None, copies) == copies
    assert received(None, None) is None
    assert worker_report(None, []) is None
    for worker in workers:
        worker.shutdown()


def test_segments_travel_with_the_spec() -> None:
    import torch
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    from layerkv.vllm_plugin.host_memory import WorkerMemory
    from layerkv.vllm_plugin.spec import LayerKVSpec, ours

    plain = FullAttentionSpec(block_size=32, num_kv_heads=2, head_size=64, dtype=torch.float32)
    spec = replace(ours(plain, WorkerMemory.here()), segments=PLAN)
    assert LayerKVSpec.merge([spec, pickle.loads(pickle.dumps(spec))]).segments == PLAN
    assert ours(plain, WorkerMemory.here()).segments is None
