"""Peak memory of training and inference by library, beyond what importing it takes, and against T.

    .venv-bench/bin/python benchmarks/memory.py [--workload=W1] [--setting=best] [--timesteps=1,8]

Every figure comes from a process of its own; on a GPU it is the GPU's memory. The last columns say what
a further time step adds. See `scaling.py` for the plot.
"""

import math
from typing import Any

from absl import app, flags

import measure
import peers
import worker
from snn_tf import runs
from workloads import WORKLOADS

FLAGS = flags.FLAGS


def peak_mib(result: dict[str, Any], phase: str) -> float:
    """A phase's peak in what `worker.run` found; nan if it failed."""
    if "error" in result:
        return math.nan
    return result[phase]["device_peak_mib"] or result[phase]["peak_mib"]


def row(workload: str, library: str, variant: str, timesteps: list[int]) -> list[object]:
    """Peaks at every T, and their slope, of training and of inference."""
    results = [
        worker.run(library, variant, workload, FLAGS.timeout, seconds=FLAGS.seconds, timesteps=steps)
        for steps in timesteps
    ]
    line: list[object] = [library, variant]
    for phase in peers.PHASES:
        peaks = [peak_mib(result, phase) for result in results]
        line += [*peaks, (peaks[-1] - peaks[0]) / max(1, timesteps[-1] - timesteps[0])]
    return line


def main(argv: list[str]) -> None:
    del argv
    for workload in FLAGS.workload:
        timesteps = sorted(map(int, FLAGS.timesteps or [1, WORKLOADS[workload].timesteps]))
        header = ["library", "variant"]
        for words in peers.PHASES.values():
            header += [f"{words}, T = {steps}, MiB" for steps in timesteps]
            header.append("MiB a step")
        for setting in FLAGS.setting:
            started = measure.load()
            rows = [row(workload, *entrant, timesteps) for entrant in peers.entrants(setting)]
            title = f"Peak memory, {workload}, {setting}"
            measure.record(title, runs.device(), started, measure.table(header, rows))


if __name__ == "__main__":
    peers.define_flags()
    flags.DEFINE_list("timesteps", None, "T; without it, 1 and the workload's own.")
    flags.FLAGS.set_default("seconds", 0.0)
    app.run(main)
