"""The `layerkv` command: reads arguments, calls the module that does the work, turns errors into one line.

Runs in its own process, once. Everything heavy is imported only by the command that needs it, so that
`layerkv --help` is quick. Exit status: 0 all right, 1 the command failed or found a problem, 2 wrong input.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from layerkv import __version__
from layerkv.errors import ConfigError, LayerKVError

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status; `argv` defaults to the arguments of the process."""
    arguments = _parser().parse_args(argv)
    try:
        status: int | None = arguments.run(arguments)
    except ConfigError as error:
        return _fail(error, status=2)
    except LayerKVError as error:
        return _fail(error, status=1)
    except ModuleNotFoundError as error:
        if (error.name or "layerkv").partition(".")[0] == "layerkv":
            raise  # a mistake of ours, not a missing extra
        return _fail(f"{error.name} is not installed; from layerkv's folder: pip install '.[cpu,bench]'", status=1)
    except KeyboardInterrupt:
        return _fail("interrupted", status=130)
    return status or 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="layerkv", description="First tokens without waiting for KV-cache memory, on vLLM."
    )
    parser.add_argument("--version", action="version", version=f"layerkv {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser(
        "demo",
        help="run stock vLLM, layerkv and the oracle under the same load",
        description="Make a tiny random model, run the same open-loop load through stock vLLM, layerkv and "
        "the oracle (stock with KV memory for everything), and write result.json and report.html.",
    )
    demo.add_argument(
        "--out", type=Path, default=Path("out/demo"), metavar="DIR", help="where results go (%(default)s)"
    )
    demo.add_argument("--seed", type=int, default=0, help="of prompts, arrivals and weights (%(default)s)")
    demo.add_argument("--quick", action="store_true", help="a small load, for a first look")
    demo.set_defaults(run=_demo)

    doctor = commands.add_parser(
        "doctor",
        help="say what is installed, what is supported here, and why not",
        description="Check this machine, the installed vLLM and, with --policy, an SLO policy file. With --model, say "
        "what a checkpoint's configuration means here, before a start: groups of layers, blocks, KV bytes, whether "
        "layerkv serves it, and with --kv-memory the division into pool and lane zone. Reads no weights and asks no "
        "network. Exit status 0 means that everything is all right.",
    )
    doctor.add_argument("--policy", metavar="FILE", help="an SLO policy file to check as well")
    doctor.add_argument("--model", metavar="PATH", help="the folder of a checkpoint, of which config.json is enough")
    doctor.add_argument("--kv-memory", metavar="SIZE", help="KV memory to divide, such as 8GiB")
    doctor.add_argument("--max-model-len", type=int, metavar="N", help="longest request (the checkpoint's own)")
    doctor.add_argument(
        "--engine-args",
        metavar="JSON",
        help='what else vLLM would be started with, such as {"dtype": "bfloat16", "block_size": 32}',
    )
    doctor.add_argument("--json", action="store_true", help="print JSON")
    doctor.set_defaults(run=_doctor)

    profile = commands.add_parser(
        "profile",
        help="measure what steps and copies cost here",
        description="Measure what steps and copies of an engine cost on this machine, and write a cost profile: the "
        "file that kv_connector_extra_config.cost_profile names. Takes a few minutes for the tiny model. "
        "On CPU, set OMP_NUM_THREADS as for the engine that will use the profile (1 by default).",
    )
    profile.add_argument("--model", metavar="MODEL", help="as for vLLM; without it, the demo's tiny random model")
    profile.add_argument(
        "--out", type=Path, default=Path("profile.json"), metavar="FILE", help="where the profile goes (%(default)s)"
    )
    profile.add_argument(
        "--engine-args", metavar="JSON", help='vLLM engine arguments, such as \'{"dtype": "bfloat16"}\''
    )
    profile.add_argument("--quick", action="store_true", help="fewer steps, for a first look")
    profile.set_defaults(run=_profile)

    simulation = commands.add_parser(
        "simulate",
        help="compare policies on a virtual clock, without an engine",
        description="Run the production scheduler on a virtual clock over a cost profile, beside stock vLLM's "
        "scheduling, under the loads that a file describes (configs/sim has some); or several models on one device.",
    )
    simulation.add_argument("config", type=Path, metavar="CONFIG.yaml", help="what to simulate")
    simulation.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    simulation.add_argument("--plots", type=Path, metavar="DIR", help="draw plots there")
    simulation.add_argument(
        "--log", type=Path, metavar="FILE", help="write the decisions of the first layerkv run, for `layerkv explain`"
    )
    simulation.add_argument("--exact", action="store_true", help="decide before every step, not every few (slower)")
    simulation.add_argument(
        "--capacity",
        action="store_true",
        help="search the highest rate at which 90 %% of requests are fluid, for stock, layerkv (also with policy slo), "
        "and the oracle",
    )
    simulation.add_argument(
        "--offline", action="store_true", help="say as well what could be fluid if all requests were known beforehand"
    )
    simulation.set_defaults(run=_simulate)

    explanation = commands.add_parser(
        "explain",
        help="say why a request waited, was parked or refused",
        description="Tell one request's history from a decision log, or, without a request, who had to wait most "
        "and why. The log is written by an engine with decision_log in kv_connector_extra_config, or by "
        "`layerkv simulate --log`.",
    )
    explanation.add_argument("log", type=Path, metavar="LOG", help="the decision log")
    explanation.add_argument("request", nargs="?", metavar="REQUEST", help="a request's id, or a part of it")
    explanation.add_argument("--json", action="store_true", help="print JSON")
    explanation.set_defaults(run=_explain)

    policy = commands.add_parser("policy", help="check a policy file, or have running engines read theirs again")
    policies = policy.add_subparsers(required=True, metavar="ACTION")
    check = policies.add_parser("check", help="check an SLO policy file and say what it promises")
    check.add_argument("file", type=Path, metavar="FILE", help="the policy file")
    check.set_defaults(run=_policy_check)
    again = policies.add_parser(
        "reload",
        help="have running engines read their policy files again",
        description="Check the policy files of all of this user's running engines and tell those to read them again "
        "(only one of them with --pid). New objectives hold "
        "for requests that come from then on. An invalid file is refused and the old policy stays.",
    )
    again.add_argument("--pid", type=int, metavar="PID", help="only this engine (the process of `vllm serve`)")
    again.set_defaults(run=_policy_reload)

    broker = commands.add_parser(
        "broker",
        help="divide one memory between the engines of this user",
        description="Say how much memory each engine may hold, until it is ended. One per device. Without it, "
        "engines keep what they have.",
    )
    broker.add_argument(
        "--socket",
        type=Path,
        metavar="PATH",
        help="where engines find it ($XDG_RUNTIME_DIR/layerkv/broker.sock, without that /tmp/layerkv-UID/broker.sock)",
    )
    broker.add_argument("--capacity", required=True, metavar="SIZE", help="device memory for KV in all, such as 4GiB")
    broker.add_argument(
        "--host-capacity", metavar="SIZE", help="host memory for KV in all; without it, it is not shared"
    )
    broker.set_defaults(run=_broker)

    top = commands.add_parser(
        "top",
        help="show engines, their memory and their requests, live",
        description="Show each engine: what it holds, needs and may hold (from the broker), where its requests' KV is, "
        "what they wait for and how fast KV is copied (from servers' /metrics). Refreshed each second in a terminal, "
        "until Ctrl-C; else one table. Where neither is named, the broker at its usual place is asked.",
    )
    top.add_argument("--socket", type=Path, metavar="PATH", help="the broker's (as of `broker`)")
    top.add_argument(
        "--url", action="append", default=[], metavar="URL", help="a server, such as http://localhost:8000; repeatable"
    )
    top.add_argument("--once", action="store_true", help="one table, after a second where there are servers")
    top.add_argument("--json", action="store_true", help="JSON (docs/monitoring.md); without --once a line each second")
    top.set_defaults(run=_top)

    placing = commands.add_parser(
        "place",
        help="say which models of a fleet stand on which devices",
        description="Place models on devices: in falling order of KV pressure, each where pressure over shared KV "
        "memory is lowest with it and its weights and floor fit, shards of one model on different devices.",
    )
    placing.add_argument("fleet", type=Path, metavar="FLEET.yaml", help="such as configs/fleet/example.yaml")
    placing.add_argument("--json", type=Path, metavar="FILE", help="write the placement there as well")
    placing.add_argument(
        "--emit",
        choices=("shell", "ray"),
        help="print its commands, or an application for Ray Serve LLM (on GPUs a sketch to read), instead",
    )
    placing.set_defaults(run=_place)

    bench = commands.add_parser("bench", help="the benchmark suite on real servers, and micro-benchmarks")
    benchmarks = bench.add_subparsers(required=True, metavar="BENCHMARK")
    _add_suite(benchmarks)
    overhead = benchmarks.add_parser(
        "overhead",
        help="what a step costs beside stock vLLM, at full speed",
        description="Run stock vLLM and layerkv side by side on the CPU, at full speed: a closed loop of 1 to 256 "
        "requests with KV memory for all, a load that saturates a small pool, and one that fills all slots. Says "
        "tokens per second against stock's, and the host time of a step by stage.",
    )
    overhead.add_argument("--only", choices=("closed_loop", "saturated", "slots"), help="this part alone")
    overhead.add_argument("--model", choices=("demo", "test"), help="this tiny model alone (test has 6 layers)")
    overhead.add_argument("--rounds", type=int, default=3, metavar="N", help="how often (%(default)s)")
    overhead.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    overhead.set_defaults(run=_overhead)
    sharing = benchmarks.add_parser(
        "sharing",
        help="engines that share their KV memory, beside engines with a part each",
        description="Engines that share their KV memory, on the CPU: bursts that come to one after the other, beside "
        "stock vLLM and layerkv with a part each; an engine full of live decodes that gives memory, in four ways; an "
        "idle one; what a step costs, and how fast memory comes and goes. Exit status 1: tokens differ.",
    )
    sharing.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="PART,..",
        help="these parts alone: bursts, give, idle, constant, resize; repeatable",
    )
    sharing.add_argument("--engines", type=int, default=2, metavar="N", help="how many (%(default)s)")
    sharing.add_argument("--burst", type=int, default=12, metavar="N", help="requests of a burst (%(default)s)")
    sharing.add_argument(
        "--period",
        type=float,
        default=5.0,
        metavar="S",
        help="seconds from one engine's burst to the next one's (%(default)s)",
    )
    sharing.add_argument("--seeds", type=int, default=3, metavar="N", help="how often (%(default)s)")
    sharing.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    sharing.set_defaults(run=_sharing)
    fidelity = benchmarks.add_parser(
        "fidelity",
        help="the same load on the real CPU engine and in the simulator",
        description="Run a simulation file's load on the real CPU engine with the demo's tiny model, and in the "
        "simulator, and print both side by side.",
    )
    fidelity.add_argument("config", type=Path, metavar="CONFIG.yaml", help="such as configs/sim/cpu_two_classes.yaml")
    fidelity.add_argument("--profile", type=Path, metavar="FILE", help="a cost profile in place of the file's own")
    fidelity.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    fidelity.set_defaults(run=_fidelity)
    decision = benchmarks.add_parser(
        "decide",
        help="time of one scheduling decision with many requests",
        description="Measure how long one decision takes with 1,000 requests waiting and 256 running.",
    )
    decision.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    decision.set_defaults(run=_decide)
    transfer = benchmarks.add_parser(
        "transfer",
        help="speed of copies, and how much of them compute hides",
        description="Measure copies between device and host beside plain memcpy, by direction and fragment size, and "
        "the share of a layered prefill's copies that compute hides. On the GPU where there is one.",
    )
    transfer.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    transfer.add_argument("--quick", action="store_true", help="few sizes, for a first look")
    transfer.set_defaults(run=_transfer)
    return parser


def _add_suite(benchmarks: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    run = benchmarks.add_parser(
        "run",
        help="a case: the same load through several real servers",
        description="Start each engine of a case as a real OpenAI-compatible server (`vllm serve`), drive the case's "
        "load through it, seed by seed, and compare. A suite file (benchmarks/cases/all.yaml) names several "
        "cases; --json and --html are then folders. Exit status 1: an engine failed, or tokens differ.",
    )
    run.add_argument("case", type=Path, metavar="CASE.yaml", help="such as benchmarks/cases/rate_sweep.yaml")
    run.add_argument("--size", choices=("ci", "full"), default="full", help="how much of it (%(default)s)")
    run.add_argument("--seeds", type=int, metavar="N", help="how many seeds, in place of the case's")
    run.add_argument("--engines", metavar="A,B,..", help="only these of the engines")
    run.add_argument("--json", type=Path, metavar="FILE", help="where the figures go (OUT/CASE/result.json)")
    run.add_argument("--html", type=Path, metavar="FILE", help="where the report goes (OUT/CASE/report.html)")
    run.add_argument(
        "--out", type=Path, default=Path("out/bench"), metavar="DIR", help="logs and records go there (%(default)s)"
    )
    run.add_argument("--port", type=int, metavar="PORT", help="of the servers; without it, any free one")
    run.add_argument("--trace", type=Path, metavar="FILE", help="a trace in place of the case's own")
    run.add_argument(
        "--stretch",
        type=float,
        default=1.0,
        metavar="F",
        help="all times of the case F times longer (arrivals slower; objectives, lags and thinking longer), for a "
        "machine F times slower than the one it was sized on; points keep their names (1)",
    )
    run.add_argument(
        "--lmcache-python",
        type=Path,
        metavar="PYTHON",
        help="the Python of an environment with LMCache, for the engine lmcache; without it, and without "
        "LAYERKV_LMCACHE_PYTHON, that engine is skipped",
    )
    run.set_defaults(run=_bench_run)
    comparison = benchmarks.add_parser(
        "compare",
        help="tell regressions from noise between two results of a case",
        description="Compare two results of the same case, figure by figure, as ratios to stock vLLM in the same run. "
        "Exit status 1: something is worse by more than the seeds differ.",
    )
    comparison.add_argument("before", type=Path, metavar="A.json", help="the earlier result")
    comparison.add_argument("after", type=Path, metavar="B.json", help="the later result")
    comparison.add_argument("--json", type=Path, metavar="FILE", help="write the comparison there as well")
    comparison.set_defaults(run=_bench_compare)
    figures = benchmarks.add_parser(
        "figures",
        help="compute a result again from the records of its runs",
        description="Compute result.json and report.html again from the records that `layerkv bench run` or `layerkv "
        "demo` has left in a folder.",
    )
    figures.add_argument("folder", type=Path, metavar="FOLDER", help="such as out/bench/rate_sweep, or the demo's")
    figures.add_argument("--json", type=Path, metavar="FILE", help="where the figures go (FOLDER/result.json)")
    figures.add_argument("--html", type=Path, metavar="FILE", help="where the report goes (FOLDER/report.html)")
    figures.set_defaults(run=_bench_figures)
    punctuality = benchmarks.add_parser(
        "generator",
        help="how punctual the load generator is",
        description="Measure how late requests arrive at a server at 50 requests per second, for half a minute.",
    )
    punctuality.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    punctuality.set_defaults(run=_bench_generator)


def _bench_run(arguments: argparse.Namespace) -> int:
    import signal

    from layerkv.bench.suite.lmcache_peer import PYTHON_VARIABLE, find_lmcache
    from layerkv.bench.suite.run import RunOptions, run_suite

    lmcache_python = arguments.lmcache_python or os.environ.get(PYTHON_VARIABLE)
    # As Ctrl-C: servers have sessions of their own, and would outlive this process.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    options = RunOptions(
        size=arguments.size,
        num_seeds=arguments.seeds,
        engines=tuple(arguments.engines.split(",")) if arguments.engines else None,
        json_path=arguments.json,
        html_path=arguments.html,
        out_dir=arguments.out,
        port=arguments.port,
        trace_path=arguments.trace,
        stretch=arguments.stretch,
        lmcache=find_lmcache(Path(lmcache_python)) if lmcache_python else None,
    )
    return run_suite(arguments.case, options)


def _bench_generator(arguments: argparse.Namespace) -> int:
    from layerkv.bench.suite.generator_check import run_generator_check

    return run_generator_check(arguments.json)


def _bench_figures(arguments: argparse.Namespace) -> int:
    from layerkv.bench.suite.kept import run_figures

    return run_figures(arguments.folder, json_path=arguments.json, html_path=arguments.html)


def _bench_compare(arguments: argparse.Namespace) -> int:
    from layerkv.bench.suite.compare import run_compare

    return run_compare(arguments.before, arguments.after, json_path=arguments.json)


def _demo(arguments: argparse.Namespace) -> int | None:
    from layerkv.bench.demo import run_demo

    return run_demo(arguments.out, seed=arguments.seed, quick=arguments.quick)


def _doctor(arguments: argparse.Namespace) -> int:
    from layerkv.bench.engine_args import parse_engine_args
    from layerkv.doctor import run_doctor
    from layerkv.doctor_facts import read_question

    if arguments.model is None:
        for name in ("kv_memory", "max_model_len", "engine_args"):
            if getattr(arguments, name) is not None:
                flag = f"--{name.replace('_', '-')}"
                raise ConfigError(f"{flag}: found without --model; expected a checkpoint to ask about; set --model")
        return run_doctor(arguments.policy, as_json=arguments.json)
    question = read_question(
        arguments.model,
        kv_memory=arguments.kv_memory,
        max_model_len=arguments.max_model_len,
        engine_args=parse_engine_args(arguments.engine_args),
    )
    return run_doctor(arguments.policy, question=question, as_json=arguments.json)


def _profile(arguments: argparse.Namespace) -> int | None:
    from layerkv.bench.profile import run_profile

    return run_profile(arguments.model, arguments.out, engine_args=arguments.engine_args, quick=arguments.quick)


def _policy_check(arguments: argparse.Namespace) -> int | None:
    from layerkv.policy_cli import run_check

    return run_check(arguments.file)


def _policy_reload(arguments: argparse.Namespace) -> int | None:
    from layerkv.policy_cli import run_reload

    return run_reload(arguments.pid)


def _broker(arguments: argparse.Namespace) -> int | None:
    from layerkv.broker_cli import run_broker

    return run_broker(arguments.socket, arguments.capacity, arguments.host_capacity)


def _top(arguments: argparse.Namespace) -> int:
    from layerkv.top.command import run_top

    return run_top(arguments.socket, arguments.url, once=arguments.once, as_json=arguments.json)


def _place(arguments: argparse.Namespace) -> int:
    from layerkv.place_cli import run_place

    return run_place(arguments.fleet, json_path=arguments.json, emit=arguments.emit)


def _explain(arguments: argparse.Namespace) -> int | None:
    from layerkv.explain import run_explain

    return run_explain(arguments.log, arguments.request, as_json=arguments.json)


def _simulate(arguments: argparse.Namespace) -> int | None:
    from layerkv.bench.simulate import run_simulate

    return run_simulate(
        arguments.config,
        json_path=arguments.json,
        plots_dir=arguments.plots,
        log_path=arguments.log,
        exact=arguments.exact,
        capacity=arguments.capacity,
        with_offline=arguments.offline,
    )


def _fidelity(arguments: argparse.Namespace) -> int | None:
    from layerkv.bench.fidelity import run_fidelity

    return run_fidelity(arguments.config, arguments.json, profile_path=arguments.profile)


def _decide(arguments: argparse.Namespace) -> int | None:
    from layerkv.bench.decide import run_decide

    return run_decide(arguments.json)


def _transfer(arguments: argparse.Namespace) -> int:
    from layerkv.bench.transfer import run_transfer

    return run_transfer(arguments.json, quick=arguments.quick)


def _overhead(arguments: argparse.Namespace) -> int | None:
    from layerkv.bench.overhead import run_overhead

    return run_overhead(arguments.json, rounds=arguments.rounds, only=arguments.only, model=arguments.model)


def _sharing(arguments: argparse.Namespace) -> int:
    from layerkv.bench.sharing import run_sharing

    return run_sharing(
        arguments.json,
        num_engines=arguments.engines,
        burst_requests=arguments.burst,
        period_s=arguments.period,
        num_seeds=arguments.seeds,
        only=arguments.only,
    )


def _fail(reason: object, *, status: int) -> int:
    print(f"layerkv: {reason}", file=sys.stderr)
    return status
