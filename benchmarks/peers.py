"""Compares this project with other libraries on the workloads: training, inference, memory, the limit.

    make bench
    .venv-bench/bin/python benchmarks/peers.py [--workload=W1] [--library=norse_box] [--rounds=2]

Libraries take turns, each in a process of its own, on the same weights, images, optimizer and threads:
once with everything in float32, once in each one's best setting. Figures are medians over rounds of a
process's medians. The tables give ratios to this project, and the limit: see `limit.py`.
"""

import dataclasses
import statistics
import sys
from collections.abc import Iterator
from typing import Any

from absl import app, flags

import measure
import worker
from workloads import WORKLOADS

FLAGS = flags.FLAGS
FLOAT32, BEST = SETTINGS = ("float32", "best")
PRECISIONS = {FLOAT32: "float32", BEST: "bfloat16"}
OURS = "ours"
# Others are compiled; their best setting adds autocast and channels last. The fastest of them also goes
# without the one or the other, since neither helps on every processor; `--variant` tries others. Ours
# comes a second time as on a machine without a compiler.
VARIANTS = {
    FLOAT32: {
        OURS: ("precision=float32", "lif=fused+precision=float32"),
        "spikingjelly_multistep": ("compile",),
        "torch_plain": ("compile",),
        "snntorch_leaky": ("compile",),
        "norse_box": ("compile",),
    },
    BEST: {
        OURS: ("auto", "lif=fused"),
        "spikingjelly_multistep": (
            "compile+bfloat16+channels_last",
            "compile+bfloat16",
            "compile+channels_last",
        ),
        "torch_plain": ("compile+bfloat16+channels_last",),
        "snntorch_leaky": ("compile+bfloat16+channels_last",),
        "norse_box": ("compile+bfloat16+channels_last",),
    },
}
OTHER_NEURONS = {
    "spikingjelly_multistep": "fires at u ≥ v_th",
    "snntorch_leaky": "resets one step later",
}
PHASES = {"train": "training", "infer": "inference"}
_LOGITS_TOLERANCE = 1e-3

Result = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Row:
    """A library's variant and what its rounds found.

    Attributes:
      library, variant: as for `worker.run`.
      results: of the rounds that came to an end.
      error: what the last of the others said; empty if there were none.
    """

    library: str
    variant: str
    results: list[Result]
    error: str

    def figure(self, phase: str, name: str) -> float:
        """Median of a figure of a phase; nan without results."""
        return statistics.median([result[phase][name] for result in self.results] or [float("nan")])


def define_flags() -> None:
    """What is run: flags of this program and of others that run the same libraries."""
    libraries = list(VARIANTS[BEST])
    flags.DEFINE_multi_enum("workload", list(WORKLOADS), list(WORKLOADS), "Workloads.")
    flags.DEFINE_multi_enum("setting", list(SETTINGS), list(SETTINGS), "Settings.")
    flags.DEFINE_multi_enum("library", libraries, libraries, "Libraries; ours is always one.")
    flags.DEFINE_multi_string("variant", None, "Variants of the others, instead of the usual ones.")
    flags.DEFINE_float("seconds", 6.0, "Of timed steps per process and phase.", lower_bound=0.0)
    flags.DEFINE_float("timeout", 1800.0, "Seconds after which a process is stopped.", lower_bound=1.0)


def entrants(setting: str) -> Iterator[tuple[str, str]]:
    """Libraries and variants of a setting, ours first."""
    for library, variants in VARIANTS[setting].items():
        if library == OURS:
            yield from ((library, variant) for variant in variants)
        elif library in FLAGS.library:
            yield from ((library, variant) for variant in FLAGS.variant or variants)


def run(workload: str, setting: str) -> list[Row]:
    """Rounds in which every entrant runs once."""
    found: dict[tuple[str, str], list[Result]] = {entrant: [] for entrant in entrants(setting)}
    for number in range(FLAGS.rounds):
        for library, variant in found:
            result = worker.run(library, variant, workload, FLAGS.timeout, seconds=FLAGS.seconds)
            found[library, variant].append(result)
            said = result.get("error") or ", ".join(f"{p} {result[p]['cpu']:.3f} CPU s" for p in PHASES)
            print(
                f"{workload}, {setting}, round {number + 1}, {library}, {variant}: {said}",
                file=sys.stderr,
            )
    rows = []
    for (library, variant), results in found.items():
        errors = [result["error"] for result in results if "error" in result]
        rows.append(
            Row(library, variant, [r for r in results if "error" not in r], (errors or [""])[-1])
        )
    return rows


def table(workload: str, setting: str, rows: list[Row]) -> str:
    """Every entrant's figures and their ratios to ours, which is the first."""
    header = ["library", "variant", "runs"]
    for phase in PHASES.values():
        header += [f"{phase}, CPU s", "× ours", "wall s", "× ours", "peak MiB"]
    header += ["first step, s", *(["first image's logits"] if setting == FLOAT32 else [])]
    lines = []
    for row in rows:
        line: list[object] = [row.library, row.variant, len(row.results)]
        for phase in PHASES:
            for unit in ("cpu", "wall"):
                seconds = row.figure(phase, unit)
                line += [seconds, seconds / rows[0].figure(phase, unit)]
            line.append(row.figure(phase, "peak_mib"))
        line.append(row.figure("train", "first"))
        lines.append([*line, *([_logits(workload, row)] if setting == FLOAT32 else [])])
    return measure.table(header, lines)


def _logits(workload: str, row: Row) -> str:
    """The first image's logits and whether they are the published ones."""
    if not row.results:
        return f"failed: {row.error}"
    found, published = row.results[0]["logits"], WORKLOADS[workload].logits
    same = all(abs(a - b) <= _LOGITS_TOLERANCE for a, b in zip(found, published, strict=True))
    verdict = "as published" if same else OTHER_NEURONS.get(row.library, "NOT AS PUBLISHED")
    return f"{found[0]:.4f}, {found[1]:.4f}: {verdict}"


def verdicts(rows: list[Row]) -> Iterator[str]:
    """In a line per phase: the fastest of the others, by CPU seconds, against ours."""
    others = [row for row in rows if row.library != OURS and row.results]
    for phase, words in PHASES.items() if others else ():
        fastest = min(others, key=lambda row: row.figure(phase, "cpu"))
        for ours in (row for row in rows if row.library == OURS):
            cpu, wall, memory = (
                fastest.figure(phase, name) / ours.figure(phase, name)
                for name in ("cpu", "wall", "peak_mib")
            )
            yield (
                f"- {words}, {OURS} ({ours.variant}) against {fastest.library} ({fastest.variant}): "
                f"{cpu:.2f}× in CPU seconds, {wall:.2f}× in wall, {memory:.2f}× in memory"
            )


def limit_table(ours: Row, limit: Result) -> str:
    """The limit in the same precision, and its share of our seconds."""
    if "error" in limit:
        return f"The limit: {limit['error']}"
    rows = []
    for phase, words in PHASES.items():
        rows.append([words])
        for unit, seconds in limit[phase].items():
            rows[-1] += [seconds, f"{seconds / ours.figure(phase, unit):.0%}"]
    header = ("limit", "CPU s", "share of ours", "wall s", "share of ours")
    peak = f"A single product reaches {limit['peak_gflops']:.0f} GFLOP/s."
    return f"{measure.table(header, rows)}\n\n{peak}"


def main(argv: list[str]) -> None:
    del argv
    for workload in FLAGS.workload:
        for setting in FLAGS.setting:
            started = measure.load()
            rows = run(workload, setting)
            limit = measure.run_program(
                "limit.py", FLAGS.timeout, workload=workload, precision=PRECISIONS[setting], json=True
            )
            title = (
                f"Other libraries, {workload}, {'float32' if setting == FLOAT32 else 'best settings'}"
            )
            measure.record(
                title,
                limit.get("device", "unknown device"),
                started,
                table(workload, setting, rows),
                "\n".join(verdicts(rows)),
                limit_table(rows[0], limit),
                *(f"{row.library} ({row.variant}): {row.error}" for row in rows if row.error),
            )


if __name__ == "__main__":
    define_flags()
    flags.DEFINE_integer("rounds", 2, "Processes of each variant.", lower_bound=1)
    app.run(main)
