"""How every benchmark measures and records: times, memory, what the machine is, tables, RESULTS.md.

Times are CPU seconds of the whole process (all its threads) and wall seconds, medians over calls after a
warm-up. CPU seconds are the ones to trust where the machine is shared. No framework is loaded here.
"""

import contextlib
import dataclasses
import datetime
import gc
import importlib.metadata
import json
import os
import pathlib
import platform
import resource
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import psutil

RESULTS = pathlib.Path(__file__).with_name("RESULTS.md")
_PACKAGES = ("tensorflow", "tf_keras", "torch", "spikingjelly", "snntorch", "norse", "numpy", "snn_tf")

Call = Callable[[], object]


@dataclasses.dataclass(frozen=True)
class Seconds:
    """Seconds that one call takes, or several calls one after the other.

    Attributes:
      cpu: of all threads.
      wall: on the clock.
    """

    cpu: float
    wall: float


def limit_threads(count: int) -> None:
    """Has TensorFlow, PyTorch and their libraries compute on `count` threads; call first of all.

    One of TensorFlow's operations runs at a time, as in `train.py`; OpenMP's threads sleep where they
    wait, so that waiting is not counted as CPU time. OpenMP reads this when it is loaded.
    """
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(count)
    os.environ["TF_NUM_INTRAOP_THREADS"] = str(count)
    os.environ["TF_NUM_INTEROP_THREADS"] = "1"
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def once(call: Call) -> Seconds:
    """Times a single call, which must not return before its work is done."""
    cpu, wall = time.process_time(), time.perf_counter()
    call()
    return Seconds(time.process_time() - cpu, time.perf_counter() - wall)


def median(rows: Iterable[Seconds]) -> Seconds:
    """CPU and wall, each its own median."""
    rows = list(rows)
    return Seconds(
        statistics.median(row.cpu for row in rows), statistics.median(row.wall for row in rows)
    )


def take_turns(
    calls: Mapping[str, Call], budget: float, least: int = 3, most: int = 30, warm_up: int = 2
) -> dict[str, Seconds]:
    """Median time of every call, the calls taking turns.

    Args:
      calls: by name; none returns before its work is done.
      budget: seconds after which no further round begins, once there are `least`.
      least, most: number of timed rounds.
      warm_up: rounds before them.
    """
    for call in list(calls.values()) * warm_up:
        call()
    rows: dict[str, list[Seconds]] = {name: [] for name in calls}
    started = time.perf_counter()
    for done in range(most):
        if done >= least and time.perf_counter() - started > budget:
            break
        for name, call in calls.items():
            rows[name].append(once(call))
    return {name: median(found) for name, found in rows.items()}


def resident_mib() -> float:
    """Memory that this process holds now."""
    return psutil.Process().memory_info().rss / 2**20


@contextlib.contextmanager
def peak_memory() -> Iterator[Callable[[], float]]:
    """Gives a function that says the most memory, in MiB, held since the block began.

    Linux alone can begin anew; elsewhere it is the most since the process began.
    """
    gc.collect()
    with contextlib.suppress(OSError):
        pathlib.Path("/proc/self/clear_refs").write_text("5")
    yield _most_resident_mib


def _most_resident_mib() -> float:
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # bytes, on a Mac


def run_program(name: str, limit: float, **settings: Any) -> dict[str, Any]:
    """Runs another program of this folder, in a process of its own, that prints JSON as its last line.

    Args:
      name: file name of the program.
      limit: seconds.
      settings: its flags; None leaves one out, a list gives it several times.

    Returns:
      What it printed; {"error": its last line} if it fails or takes too long.
    """
    words = [
        f"--{flag}={value}"
        for flag, values in settings.items()
        for value in (values if isinstance(values, list) else [values])
        if value is not None
    ]
    folder = pathlib.Path(__file__).parent
    command = [sys.executable, "-W", "ignore", str(folder / name), *words]
    environment = {**os.environ, "PYTHONPATH": str(folder.parent)}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, env=environment)
    except subprocess.TimeoutExpired:
        return {"error": f"longer than {limit:.0f} s"}
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def load() -> float:
    """Processes that were running or waiting, on average over the last minute."""
    return os.getloadavg()[0]


def versions() -> str:
    """Python, and whichever frameworks and libraries are installed."""
    found = [f"Python {platform.python_version()}"]
    for package in _PACKAGES:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; numbers with three significant digits."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3f}" if abs(value) < 1 else f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def record(title: str, device: str, started_load: float, *blocks: str) -> None:
    """Prints a result and appends it to RESULTS.md, with date, command, device, versions and load."""
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    program = pathlib.Path(sys.argv[0]).name
    command = shlex.join(["python", f"benchmarks/{program}", *sys.argv[1:]])
    facts = [
        f"`{command}`",
        f"{device}; {psutil.virtual_memory().total / 2**30:.0f} GiB; {versions()}",
        f"load {started_load:.1f} at the start, {load():.1f} at the end",
    ]
    text = "\n\n".join([f"## {title}, {now}", "  \n".join(facts), *blocks])
    print(text)
    with RESULTS.open("a") as file:
        file.write(f"\n{text}\n")
