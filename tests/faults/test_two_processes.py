"""Two processes in one run folder: the second stops at once; a killed holder leaves no lock behind."""

import subprocess
import sys

import pytest
from shortened import ROOT, Run, settings_of

pytestmark = pytest.mark.slow


def test_second_process_stops_in_one_line_and_a_killed_holder_holds_nothing(tmp_path):
    first = Run(tmp_path / "run", settings_of(0))
    first.start()
    assert first.end_in("train_ann", 0.5, 0) == "train_ann"
    holder = first.process.pid
    flags = [f"--{name}={value}" for name, value in first.settings.items()]
    command = [sys.executable, "train.py", f"--run_dir={first.run_dir}", *flags]
    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert second.returncode == 1 and second.stdout == ""
    assert second.stderr.startswith(
        f"train.py: --run_dir={first.run_dir}: in use by process {holder} on "
    )
    assert second.stderr.count("\n") == 1
    assert first.process.is_alive()
    first.process.kill()
    first.finish()
    third = Run(tmp_path / "run", first.settings).whole()
    assert "in use" not in third.said()
