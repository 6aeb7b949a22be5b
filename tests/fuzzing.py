"""Seeded streams of broken input: flagfiles, JSON files of a run, folders of images.

Each stream makes a good input worse in a few places, so that it gets past the first check. An input is
judged by what comes of it: a result, or a `UserError` of one line, within a time limit.
"""

import contextlib
import io
import json
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

from PIL import Image

from snn_tf import files, results
from snn_tf.config import STAGES, Config
from snn_tf.errors import UserError
from snn_tf.runs import StageFolder

SECONDS = 20
_WORDS = (
    *("--density=", "--flagfile=", "--", "-", "=", "#", "//", "nan", "inf", "-1", "1e999", "0x10", "９"),
    *("\0", "\n", "\r\n", "\t", "\x1b[31m", "\ud800", "é", "𝟙", "' ", '"', "\\", "$(x)", "%s", "{0}"),
    *("99999999999999999999", "true", "[]", "{}", "null", "None", ",", ",,", " ", "a" * 300, "../"),
)


class Hang(Exception):
    """An input took longer than `SECONDS`."""


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Raises `Hang` in the block when its time is up."""

    def stop(number, frame):
        raise Hang(f"longer than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def fate(attempt: Callable[[], object]) -> str:
    """ "accepted" or "refused"; everything else is raised.

    Raises:
      AssertionError: a refusal has no text, or more than one line.
      Exception: what a user would see as a traceback.
    """
    try:
        with limited():
            attempt()
    except UserError as error:
        assert str(error).strip() and "\n" not in str(error), repr(str(error))
        return "refused"
    return "accepted"


def mangled(content: bytes, rng: random.Random) -> bytes:
    """A copy that is cut, has bytes changed, parts doubled, or words put in."""
    found = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(found) + 1)
        kind = rng.randrange(5)
        if kind == 0:
            del found[at:]
        elif kind == 1 and at < len(found):
            found[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            del found[at : at + rng.randrange(20)]
        elif kind == 3:
            found[at:at] = found[rng.randrange(len(found) + 1) :][: rng.randrange(200)]
        else:
            found[at:at] = rng.choice(_WORDS).encode("utf-8", "surrogatepass")
    return bytes(found)


def flagfile(rng: random.Random, folder: Path) -> list[str]:
    """A command line with a flagfile that may include itself, others and what is none."""
    path = folder / "fuzz.flags"
    lines = [_flag(rng, folder) for _ in range(rng.randrange(12))]
    content = "\n".join(lines).encode("utf-8", "surrogatepass")
    path.write_bytes(mangled(content, rng) if rng.random() < 0.5 else content)
    after = [_flag(rng, folder)] if rng.random() < 0.2 else []
    return [f"--flagfile={path}", *(word.replace("\0", "") for word in after)]


def _flag(rng: random.Random, folder: Path) -> str:
    if rng.random() < 0.05:
        return f"--flagfile={rng.choice((folder / 'fuzz.flags', folder, folder / 'none', ''))}"
    name = rng.choice(tuple(Config.__dataclass_fields__))
    value = getattr(Config, name)
    text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
    kind = rng.random()
    if kind < 0.15:
        text = rng.choice(_WORDS)
    elif kind < 0.25:
        text = str(
            rng.choice((rng.uniform(-2, 2), rng.randrange(-5, 10**6), 10.0 ** rng.randrange(-300, 300)))
        )
    elif kind < 0.3:
        text += rng.choice(_WORDS)
    return f"--{name}={text}"


def damaged_json(content: bytes, rng: random.Random) -> bytes:
    """JSON with values replaced or dropped at any depth, or mangled as text."""
    if rng.random() < 0.3:
        return mangled(content, rng)
    value = json.loads(content)
    for _ in range(rng.choice((1, 1, 2, 4))):
        value = _changed(value, rng)
    return json.dumps(value).encode()


def _changed(value, rng: random.Random):
    strange = (
        None,
        [],
        {},
        0,
        -1,
        1e308,
        "",
        "x",
        True,
        [[]],
        {"a": None},
        2**70,
        float("nan"),
        "\ud800",
    )
    if not isinstance(value, dict | list) or not value or rng.random() < 0.15:
        return rng.choice(strange)
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = rng.choice(keys)
    changed = dict(value) if isinstance(value, dict) else list(value)
    if rng.random() < 0.2:
        del changed[key]
    else:
        changed[key] = _changed(value[key], rng)
    return changed


class RunFolder:
    """A finished run of two stages, of which one file is broken at a time."""

    def __init__(self, folder: Path, record: dict):
        self.config = Config(run_dir=str(folder / "run"), dataset="digits")
        self.stages = [StageFolder(folder / "run", stage) for stage in STAGES[:2]]
        for number, stage in enumerate(self.stages):
            stage.open(self.config, self.stages[:number][::-1])
            stage.finish(self.config, "abc", 1.0, record)
        self.files = sorted((folder / "run").glob("*/*.json"))
        self.whole = {path: path.read_bytes() for path in self.files}

    def broken(self, rng: random.Random) -> Callable[[], object]:
        """Breaks one file of a whole run; the attempt reads the run as its later stages do.

        In half the cases there is no manifest, so that what is broken is not found by its SHA-256.
        """
        for file, content in self.whole.items():
            file.write_bytes(content)
        path = rng.choice(self.files)
        path.write_bytes(damaged_json(self.whole[path], rng))
        if rng.random() < 0.5:
            for file in self.files:
                if file.name == files.MANIFEST and file != path:
                    file.unlink()

        def attempt():
            first, second = self.stages
            with contextlib.redirect_stdout(io.StringIO()):
                second.open(self.config, [first])
            return [(stage.record(), stage.fingerprint()) for stage in self.stages]

        return attempt


def results_row(rng: random.Random, folder: Path, record: bytes) -> Callable[[], object]:
    """A folder of results with one broken record."""
    row = folder / "results" / "row"
    row.mkdir(parents=True, exist_ok=True)
    (row / "record.json").write_bytes(damaged_json(record, rng))
    return lambda: results.read(row.parent)


def image_folder(rng: random.Random, folder: Path) -> Config:
    """A folder of a few images; in half of them some are broken, of other sizes, kinds and channels."""
    root = folder / "images"
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    harm = rng.choice((0.0, 0.2))
    layouts = (("a", "b"), ("a", "b"), ("train/a", "train/b", "test/a"), ("a",), ())
    for name in layouts[min(rng.randrange(10), 4)] if harm else ("a", "b"):
        (root / name).mkdir(parents=True)
        for number in range(rng.choice((4, 3, 1, 0)) if rng.random() < harm else 4):
            suffix = rng.choice(("png", "png", "jpg", "gif", "bmp", "txt" if harm else "png"))
            _image(rng, root / name / f"{number}.{suffix}", harm)
    size, gib = rng.choice((0, 0, 4)), rng.choice((1.0, 0.0))
    return Config(dataset=f"folder:{root}", image_size=size, cache_gib=gib)


def _image(rng: random.Random, path: Path, harm: float) -> None:
    kind = {".jpg": "jpeg", ".gif": "gif", ".bmp": "bmp"}.get(path.suffix, "png")
    modes, size = ("RGB", "L"), (6, 6)
    if rng.random() < harm / 2:
        modes = ("L", "CMYK") if kind == "jpeg" else ("RGBA", "P", "1")
    if rng.random() < harm / 2:
        size = rng.choice(((1, 1), (7, 5), (300, 1)))
    image = Image.frombytes("RGB", size, rng.randbytes(3 * size[0] * size[1]))
    image.convert(rng.choice(modes)).save(path, kind)
    if rng.random() < harm / 2:
        path.write_bytes(mangled(path.read_bytes(), rng))
