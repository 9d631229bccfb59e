"""Which line of a log says why a process ended."""

from pathlib import Path

from layerkv.bench.log_cause import cause_of
from layerkv.bench.supervise import LOG_TAIL_LINES, ended_badly

CORE = "(EngineCore pid=11) ERROR 11-28 22:41:31 [core.py:1173] "
API = "(APIServer pid=10) "
TOO_LITTLE = (
    "ValueError: To serve at least one request with the model's max seq len (2560), (0.03 GiB KV cache is needed, "
    "which is larger than the available KV cache memory (0.02 GiB). Based on the available memory, the estimated "
    "maximum model length is 1536. Try increasing `gpu_memory_utilization` (which also controls CPU memory on the CPU "
    "backend) or decreasing `max_model_len` when initializing the engine."
)
ELSEWHERE = "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}"
STACK = [f"{API}  File 'launcher.py', line {i}, in run" for i in range(40)]
FAILED_START = [
    "(EngineCore pid=11) INFO 11-28 22:41:30 [core.py:114] Initializing a V1 LLM engine",
    f"{CORE}EngineCore failed to start.",
    f"{CORE}Traceback (most recent call last):",
    f"{CORE}    raise ValueError(",
    f"{CORE}{TOO_LITTLE}",
    f"{API}Traceback (most recent call last):",
    *STACK,
    f"{API}{ELSEWHERE}",
    "/usr/lib/python3.11/multiprocessing/resource_tracker.py:254: UserWarning: leaked shared_memory objects",
    "KeyError: '/psm_1234'",
]


def cause(lines: list[str]) -> str | None:
    return cause_of(lines, num_last=LOG_TAIL_LINES)


def test_the_error_that_the_last_line_points_to_is_the_cause() -> None:
    assert cause(FAILED_START) == TOO_LITTLE


def test_a_failure_says_the_cause_in_its_reason_and_in_front_of_the_logs_last_lines(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("\n".join(FAILED_START))
    failure = ended_badly(1, log)
    assert failure.reason.startswith("ended with exit status 1 (ValueError: To serve at least one request with the")
    assert "larger than the available KV cache memory (0.02 GiB)" in failure.reason
    assert failure.reason.endswith(" ...)")
    assert "\n" not in failure.reason
    assert failure.log_tail[0].startswith(TOO_LITTLE[:300])
    assert len(failure.log_tail) == LOG_TAIL_LINES + 2


def test_a_workers_error_is_the_cause_of_the_engine_cores() -> None:
    lines = [
        "(Worker pid=12) ERROR 11-28 22:41:31 [multiproc_executor.py:900] OSError: no such model: nobody/nothing",
        f"{CORE}Exception: WorkerProc initialization failed due to an exception in a background process. "
        "See stack trace for root cause.",
        f"{API}{ELSEWHERE}",
    ]
    assert cause(lines) == "OSError: no such model: nobody/nothing"


def test_an_error_in_mid_run_that_points_to_a_stack_trace_above_is_not_the_cause() -> None:
    lines = [
        f"{CORE}torch.OutOfMemoryError: no memory for 2 GiB",
        f"{API}vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue. See stack trace (above) for "
        "the root cause.",
    ]
    assert cause(lines) == "torch.OutOfMemoryError: no memory for 2 GiB"


def test_a_cause_that_another_process_prints_later_is_found_too() -> None:
    assert cause([f"{API}{ELSEWHERE}", f"{CORE}{TOO_LITTLE}"]) == TOO_LITTLE


def test_what_a_validation_error_found_is_part_of_it() -> None:
    lines = [
        f"{API}pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig",
        f"{API}  Value error, found no such dtype: float31 [type=value_error]",
        f"{API}    For further information visit https://errors.pydantic.dev/2.12/v/value_error",
    ]
    found = cause(lines)
    assert found is not None
    assert found.endswith("for ModelConfig: Value error, found no such dtype: float31 [type=value_error]")


def test_a_refused_option_is_the_cause() -> None:
    lines = ["usage: vllm serve [model_tag] [options]", "vllm: error: unrecognized arguments: --no-such"]
    assert cause(lines) == "vllm: error: unrecognized arguments: --no-such"


def test_an_error_that_was_survived_is_not_the_cause_of_an_end_much_later() -> None:
    assert cause(["ValueError: tried and caught", *STACK]) is None


def test_a_log_without_an_error_has_no_cause(tmp_path: Path) -> None:
    assert cause([]) is None
    log = tmp_path / "log"
    log.write_text("loading layerkv\nno KV memory\n")
    assert ended_badly(7, log).reason == "ended with exit status 7"


def test_who_was_killed_has_no_error_to_blame(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("ValueError: caught\n")
    assert ended_badly(-9, log).reason == "was killed by SIGKILL"
