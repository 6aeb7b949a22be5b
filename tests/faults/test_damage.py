"""Checkpoints truncated or with bytes flipped, at random: refused, and the newest good one used."""

import random
import shutil

import pytest
from test_training import assert_same_bits, state, trainer_of

CASES = 200

pytestmark = pytest.mark.slow


def damage(path, rng: random.Random) -> None:
    """Truncates a file, or flips bits in one to eight of its bytes."""
    content = bytearray(path.read_bytes())
    if rng.random() < 0.5:
        del content[rng.randrange(len(content)) :]
    else:
        for position in rng.sample(range(len(content)), rng.randint(1, 8)):
            content[position] ^= rng.randint(1, 255)
    path.write_bytes(content)


@pytest.mark.parametrize("kind", ["irregular", "snn"])
def test_damaged_checkpoints_are_refused_and_the_newest_good_one_is_used(tmp_path, kind, capsys):
    trainer = trainer_of(kind, tmp_path / "run", keep_checkpoints=3)
    trainer.run()
    checkpoints, whole = trainer.checkpoints, tmp_path / "run"
    whole = checkpoints.folder
    steps = [int(path.name.removeprefix("step-")) for path in checkpoints._all()]
    states = {}
    for step in steps:
        checkpoints._read(whole / f"step-{step}")
        states[step] = state(trainer)
    rng = random.Random(kind)
    refused = 0
    for case in range(CASES // 2):
        checkpoints._read(whole / f"step-{steps[0]}")
        checkpoints.folder = tmp_path / f"case-{case}"
        shutil.copytree(whole, checkpoints.folder)
        bad = rng.choice([steps[:1], steps[:1], steps[:1], steps[:2]])
        capsys.readouterr()
        for step in bad:
            damage(rng.choice(sorted((checkpoints.folder / f"step-{step}").iterdir())), rng)
        good = steps[len(bad)]
        assert checkpoints.restore() == good
        assert_same_bits(state(trainer), states[good])
        said = capsys.readouterr().out.splitlines()
        assert [line.partition(":")[0] for line in said[:-1]] == [
            f"checkpoint not used, now refused-step-{step}" for step in bad
        ]
        assert said[-1] == f"continues from {checkpoints.folder}/step-{good}"
        refused += 1
        shutil.rmtree(checkpoints.folder)
    with capsys.disabled():
        print(f"\n{kind}: {refused} of {CASES // 2} refused")
