"""Ended at random moments over all stages, by SIGKILL and by SIGTERM, then run on: the same bits."""

import functools
import itertools
import random
import signal
import time
from collections import Counter

import pytest
from shortened import Run, differences, durations, settings_of

# How often one run is ended while each stage is under way.
PER_RUN = {"train_ann": 5, "compress": 6, "convert": 2, "train_snn": 4, "evaluate": 2, "export": 1}
START = 1.5  # seconds until a process works on its stage
LONGEST = 10.0  # seconds from SIGTERM to the end, once the step under way is done
A_CALL = 2.0  # seconds

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Finished runs by seed, each made once."""

    @functools.cache
    def made(seed: int) -> Run:
        return Run(tmp_path_factory.mktemp("undisturbed") / f"seed-{seed}", settings_of(seed)).whole()

    return made


def ended_and_finished(run: Run, seconds: dict, number: signal.Signals, most: int, rng) -> Counter:
    """Ends a run up to `most` times, then lets it finish. Returns how often in which stage."""
    hits: Counter = Counter()
    for stage in itertools.islice(Counter(PER_RUN).elements(), most):
        run.start()
        hit = run.end_in(stage, rng.uniform(0.0, START + 0.6 * seconds[stage]), number)
        sent = time.perf_counter()
        code = run.finish()
        if not hit:
            break
        if number == signal.SIGTERM and code != 0:
            assert code == 75, run.said()[-2000:]
            assert time.perf_counter() - sent < LONGEST + A_CALL
        hits[hit] += 1
        print(f"{number.name} {run.run_dir.name}: {dict(hits)}", flush=True)
    run.whole()
    return hits


@pytest.mark.parametrize(
    "number, ends",
    [(signal.SIGKILL, 100), (signal.SIGTERM, 40)],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_run_ended_at_random_moments_ends_bit_for_bit_the_same(tmp_path, undisturbed, number, ends):
    hits: Counter = Counter()
    for seed in itertools.count():
        if hits.total() >= ends:
            break
        whole = undisturbed(seed)
        disturbed = Run(tmp_path / f"seed-{seed}", whole.settings)
        rng = random.Random(f"{number.name} {seed}")
        hits += ended_and_finished(disturbed, durations(whole), number, ends - hits.total(), rng)
        assert differences(whole.run_dir, disturbed.run_dir) == []
        assert "Traceback" not in disturbed.said()
        print(f"{number.name}: {hits.total()} of {ends} survived, {seed + 1} seeds equal: {dict(hits)}")
