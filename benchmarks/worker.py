"""Runs one library's variant on one workload in a process of its own, and prints a JSON line.

    python benchmarks/worker.py --library=spikingjelly_multistep --variant=compile --workload=W1

`run` does so from another program. It is what `peers.py`, `memory.py` and `scaling.py` are made of.
"""

import dataclasses
import importlib
import json
from typing import Any

from absl import app, flags

import measure
from workloads import WORKLOADS

FLAGS = flags.FLAGS


def define_flags() -> None:
    """The flags of the program; they stay out of the way of programs that import `run`."""
    flags.DEFINE_string("library", None, "Module of benchmarks/libraries.", required=True)
    flags.DEFINE_string("variant", "auto", "How the library runs; see its module.")
    flags.DEFINE_enum("workload", "W1", list(WORKLOADS), "Workload.")
    flags.DEFINE_integer("timesteps", None, "T, if not the workload's own.", lower_bound=1)
    flags.DEFINE_multi_enum("phase", ["infer", "train"], ["infer", "train"], "What is run.")
    flags.DEFINE_float("seconds", 6.0, "Seconds of timed steps per phase.", lower_bound=0.0)
    flags.DEFINE_integer("threads", 2, "Threads.", lower_bound=1)


def run(library: str, variant: str, workload: str, limit: float, **settings: Any) -> dict[str, Any]:
    """Runs the program and returns what it found; see `measure.run_program`; settings: more flags."""
    facts = {"library": library, "variant": variant, "workload": workload}
    return {**facts, **measure.run_program("worker.py", limit, **facts, **settings)}


def main(argv: list[str]) -> None:
    del argv
    measure.limit_threads(FLAGS.threads)
    workload = WORKLOADS[FLAGS.workload]
    if FLAGS.timesteps:
        workload = dataclasses.replace(workload, timesteps=FLAGS.timesteps)
    module = importlib.import_module(f"libraries.{FLAGS.library}")
    imported = measure.resident_mib()
    entrant = module.entrant(workload, FLAGS.variant)
    found: dict[str, Any] = {"load": measure.load(), "device": entrant.device}
    calls = {"infer": entrant.infer, "train": entrant.train_step}
    if "infer" in FLAGS.phase:
        found["logits"] = entrant.infer()[0, :2].astype(float).tolist()
    for phase in FLAGS.phase:
        with measure.peak_memory() as peak_mib:
            first = measure.once(calls[phase])
            times = measure.take_turns({phase: calls[phase]}, FLAGS.seconds)[phase]
            found[phase] = {
                **dataclasses.asdict(times),
                "first": first.wall,
                "peak_mib": peak_mib() - imported,
                "device_peak_mib": entrant.device_peak_mib(),
            }
    print(json.dumps(found))


if __name__ == "__main__":
    define_flags()
    app.run(main)
