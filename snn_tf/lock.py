"""One process at a time in a run folder.

The lock is the operating system's (flock): it ends with the process that holds it, however that ends,
so the file `<run_dir>/lock` may stay and needs no cleaning.
"""

import contextlib
import datetime
import fcntl
import os
import pathlib
import platform
from collections.abc import Iterator

from snn_tf.errors import UserError


@contextlib.contextmanager
def locked(run_dir: str) -> Iterator[None]:
    """Holds the run folder, which is made if need be, for the length of the block.

    Raises:
      UserError: another process holds it, or it cannot be written.
    """
    path = pathlib.Path(run_dir) / "lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(f"{path}: could not be written: {error.strerror}") from error
    try:
        _lock(descriptor, run_dir)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, run_dir: str) -> None:
    try:
        # Python closes the descriptor in programs that this one starts, so they hold nothing.
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(descriptor, 200).decode(errors="replace").strip() or "another process"
        raise UserError(f"--run_dir={run_dir}: in use by {holder}; wait, or give another") from None
    except OSError as error:
        print(f"--run_dir={run_dir}: cannot be locked ({error.strerror}); let no other process use it")
        return
    now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    with contextlib.suppress(OSError):  # the disk is full: who holds the lock is a courtesy
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {platform.node()} since {now}\n".encode())
