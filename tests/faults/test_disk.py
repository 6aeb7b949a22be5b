"""A disk that fills up while a run writes, and one that is read-only: one line, and nothing lost."""

import contextlib
import subprocess

import pytest
from shortened import Run, differences, settings_of

pytestmark = pytest.mark.slow


@contextlib.contextmanager
def tmpfs(folder, options: str):
    """A file system in memory at `folder`; skips the test where mounting is not allowed."""
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        pytest.skip(f"mounting is not allowed here: {result.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def remount(folder, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


def last_line(run: Run) -> str:
    return run.said().strip().splitlines()[-1]


def test_disk_that_fills_up_ends_the_run_in_one_line_and_space_lets_it_go_on(tmp_path):
    settings = settings_of(0)
    undisturbed = Run(tmp_path / "undisturbed", settings).whole()
    disk = tmp_path / "disk"
    with tmpfs(disk, "size=64k"):
        run = Run(disk / "run", settings)
        run.log = tmp_path / "run.log"
        stopped_at = []
        # Full in the first checkpoint, in the second, in the model; then in every later stage.
        for size in ("64k", "3m", "8m", "11m", "16m", "20m", "24m", "28m", "32m"):
            remount(disk, f"size={size}")
            run.start()
            if run.finish() == 0:
                break
            assert run.process.exitcode == 1 and "Traceback" not in run.said(), run.said()[-2000:]
            assert last_line(run).startswith(
                f"train.py: {disk}"
            ) and "could not be written" in last_line(run)
            stopped_at.append(run.begun())
        remount(disk, "size=200m")
        run.whole()
        assert differences(undisturbed.run_dir, run.run_dir) == []
        print(f"\ndisk full: stopped in {stopped_at}, then finished equal")
        assert len(set(stopped_at)) > 1


def test_run_folder_on_a_read_only_disk_is_one_line(tmp_path):
    disk = tmp_path / "disk"
    with tmpfs(disk, "size=1m,ro"):
        run = Run(disk / "run", settings_of(0))
        run.log = tmp_path / "run.log"
        run.start()
        assert run.finish() == 1
        assert last_line(run).startswith(f"train.py: {disk}/run/lock: could not be written: ")
        assert len(run.said().strip().splitlines()) == 1
