"""SIGTERM: it unwinds the process that asked for it, once, and its children die of it as usual."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from textwrap import dedent

from cluster.termination import Terminated, raise_on_sigterm


def run(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", dedent(script)], capture_output=True, text=True, timeout=60
    )


def test_sigterm_unwinds_and_a_second_one_does_not_break_that_off() -> None:
    done = run(
        """
        import os, signal, time
        from cluster.termination import Terminated, raise_on_sigterm
        raise_on_sigterm()
        try:
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(30)
            finally:
                os.kill(os.getpid(), signal.SIGTERM)
                print("given back", flush=True)
        except KeyboardInterrupt as error:
            print(type(error).__name__)
        """
    )
    assert (done.returncode, done.stdout.split("\n")) == (0, ["given back", "Terminated", ""])


def test_a_forked_child_ends_instead_of_running_its_parents_code() -> None:
    done = run(
        """
        import os, signal, time
        from cluster.termination import raise_on_sigterm
        raise_on_sigterm()
        listen, speak = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.write(speak, b"!")
                time.sleep(30)
            except BaseException:
                print("the child unwound", flush=True)
            os._exit(9)
        os.read(listen, 1)  # a signal that comes before the child is set up is lost
        os.kill(child, signal.SIGTERM)
        _, status = os.waitpid(child, 0)
        print(os.WTERMSIG(status) == signal.SIGTERM)
        """
    )
    assert done.stdout == "True\n"


def test_outside_the_main_thread_nothing_is_installed() -> None:
    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=raise_on_sigterm)
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGTERM) is before
    assert issubclass(Terminated, KeyboardInterrupt)
