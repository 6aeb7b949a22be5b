"""Signals: raised at once, or where the code asks; and a run folder's lock."""

import os
import signal
import subprocess
import sys
import time

import pytest

from snn_tf import interruption
from snn_tf.errors import Interrupted, UserError
from snn_tf.lock import locked

SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", SIGNALS)
def test_signal_raises_at_once(number):
    with pytest.raises(Interrupted) as caught, interruption.handled():
        send(number)
        pytest.fail("went on")
    assert str(caught.value).startswith(f"stopped by {number.name}; ")
    assert caught.value.exit_code == 75 and not isinstance(caught.value, Exception)


@pytest.mark.parametrize("number", SIGNALS)
def test_deferred_signal_waits_for_check(number):
    went_on = False
    with pytest.raises(Interrupted), interruption.handled(), interruption.deferred():
        send(number)
        went_on = True
        interruption.check()
    assert went_on


def test_immediate_raises_for_a_signal_that_came_before_and_for_one_that_comes():
    for early in (True, False):
        with pytest.raises(Interrupted), interruption.handled(), interruption.deferred():
            if early:
                send(signal.SIGTERM)
            with interruption.immediate():
                assert not early
                send(signal.SIGTERM)
            pytest.fail("went on")


class Signalled:
    """Sends a signal while it is destroyed, where Python passes no exception on."""

    def __init__(self, number: signal.Signals):
        self.number = number

    def __del__(self):
        send(self.number)


@pytest.mark.parametrize("number", SIGNALS)
def test_signal_that_comes_in_a_destructor_is_not_lost_and_leaves_no_traceback(number, capsys):
    kept = [Signalled(number)]
    with pytest.raises(Interrupted, match=number.name), interruption.handled():
        kept.clear()
        time.sleep(5)
        pytest.fail("went on")
    assert capsys.readouterr().err == ""


def test_signal_in_a_destructor_waits_where_others_do():
    kept = [Signalled(signal.SIGTERM)]
    with pytest.raises(Interrupted), interruption.handled(), interruption.deferred():
        kept.clear()
        time.sleep(0.1)
        went_on = True
        interruption.check()
    assert went_on


def test_what_else_a_destructor_raises_is_said_as_ever(monkeypatch):
    said = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: said.append(unraisable.exc_value))
    failing = type("Failing", (), {"__del__": lambda self: 1 // 0})
    with interruption.handled():
        failing()
    assert [type(error) for error in said] == [ZeroDivisionError]


def test_after_the_block_everything_is_as_before():
    watched = [*SIGNALS, signal.SIGALRM]
    before = [sys.unraisablehook, *map(signal.getsignal, watched)]
    with interruption.handled(), interruption.deferred():
        send(signal.SIGTERM)
    interruption.check()
    assert [sys.unraisablehook, *map(signal.getsignal, watched)] == before


@pytest.mark.parametrize("number", SIGNALS)
def test_ignored_signal_stays_ignored(number):
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with interruption.handled():
            send(number)
            interruption.check()
    finally:
        signal.signal(number, before)


def test_second_sigint_ends_the_process():
    program = (
        "import os, signal\nfrom snn_tf import interruption\n"
        "with interruption.handled(), interruption.deferred():\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n    print('went on', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n    print('not here')\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == -signal.SIGINT and result.stdout == "went on\n"


# --- the lock


HOLD = "import sys, time\nfrom snn_tf.lock import locked\nwith locked(sys.argv[1]):\n"


def test_locked_folder_is_refused_with_its_holder_and_free_after_a_kill(tmp_path):
    program = f"{HOLD}    print('held', flush=True)\n    time.sleep(60)\n"
    holder = subprocess.Popen(
        [sys.executable, "-c", program, tmp_path], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError) as caught, locked(str(tmp_path)):
            pytest.fail("two at once")
        line = str(caught.value)
        assert line.startswith(f"--run_dir={tmp_path}: in use by process {holder.pid} on ")
        assert "\n" not in line and caught.value.exit_code == 1
    finally:
        holder.kill()
        holder.communicate()
    with locked(str(tmp_path)):
        assert f"process {os.getpid()} " in (tmp_path / "lock").read_text()


def test_programs_that_were_started_hold_no_lock(tmp_path):
    with locked(str(tmp_path)):
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        with locked(str(tmp_path)):
            assert child.poll() is None
    finally:
        child.communicate(b"\n")


def test_lock_makes_the_folder_and_names_one_that_cannot_be(tmp_path):
    with locked(str(tmp_path / "deep" / "run")):
        assert (tmp_path / "deep" / "run" / "lock").exists()
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match="file/lock: could not be written: "),
        locked(str(tmp_path / "file")),
    ):
        pass
