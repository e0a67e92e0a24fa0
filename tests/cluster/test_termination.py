"""SIGTERM: it unwinds the process that asked for it, once, and its children die of it as usual."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from textwrap import dedent

import pytest

from cluster.termination import (
    Terminated,
    call_heard,
    end_on_sigterm,
    handler_kept,
    raise_on_sigterm,
)


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
    before, done = signal.getsignal(signal.SIGTERM), list[int]()

    def act() -> None:
        raise_on_sigterm()
        end_on_sigterm("stopped")
        with handler_kept():
            done.append(call_heard(lambda: 7))

    thread = threading.Thread(target=act)
    thread.start()
    thread.join()
    assert done == [7]
    assert signal.getsignal(signal.SIGTERM) is before
    assert issubclass(Terminated, KeyboardInterrupt)


HANDLERS = {
    "none": "",
    "ours": "raise_on_sigterm()",
    "another": "signal.signal(signal.SIGTERM, answer)",
}


@pytest.mark.parametrize("before", HANDLERS)
@pytest.mark.parametrize("moment", ["within", "after", "after an error"])
def test_whatever_handler_is_set_within_sigterm_is_answered_by_the_one_before(
    before: str, moment: str
) -> None:
    """As `ray.init` sets one, in the first place."""
    done = run(
        f"""
        import os, signal
        from cluster.termination import Terminated, handler_kept, raise_on_sigterm

        def answer(number, frame):
            print("another")
            raise Terminated

        def end(number, frame):
            raise SystemExit(number)

        {HANDLERS[before]}
        try:
            try:
                with handler_kept():
                    signal.signal(signal.SIGTERM, end)
                    if {moment == "within"}:
                        os.kill(os.getpid(), signal.SIGTERM)
                    elif {moment == "after an error"}:
                        raise ValueError
            except ValueError:
                pass
            os.kill(os.getpid(), signal.SIGTERM)
        except Terminated:
            print("Terminated")
        """
    )
    answered = "another\n" if before == "another" else ""
    assert (done.returncode, done.stdout) == (0, f"{answered}Terminated\n"), done.stderr


def test_an_end_that_no_signal_asked_for_stays_one() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended, handler_kept():
        sys.exit(7)
    assert ended.value.code == 7
    signal.signal(signal.SIGTERM, before)


RESETS = """
    import ctypes, os, signal, time
    from cluster.termination import Terminated, call_heard, raise_on_sigterm

    def work():
        nothing = ctypes.create_string_buffer(256)
        ctypes.CDLL(None).sigaction(signal.SIGTERM, nothing, None)  # the default, below Python
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.3)
        ctypes.CDLL(None).sigaction(signal.SIGTERM, nothing, None)
        print("finished", flush=True)
        return 7

    raise_on_sigterm()
"""


def test_sigterm_is_heard_while_a_library_sets_the_default_and_what_was_begun_is_finished() -> None:
    done = run(
        RESETS
        + """
    try:
        call_heard(work)
    except Terminated:
        os.kill(os.getpid(), signal.SIGTERM)
        print("Terminated")
    """
    )
    assert (done.returncode, done.stdout) == (0, "finished\nTerminated\n"), done.stderr


def test_work_that_is_done_elsewhere_has_its_result_and_its_errors_here() -> None:
    def fail() -> None:
        raise ValueError("x")

    assert call_heard(lambda: 7) == 7
    with pytest.raises(ValueError, match="x"):
        call_heard(fail)


def test_a_signal_is_known_of_whatever_becomes_of_its_exception() -> None:
    done = run(
        """
        import os, signal
        from cluster.termination import raise_on_sigterm, was_terminated
        raise_on_sigterm()
        assert not was_terminated()
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except KeyboardInterrupt:
            print(was_terminated())
        raise_on_sigterm()
        print(was_terminated())
        """
    )
    assert done.stdout == "True\nFalse\n"


def test_where_nothing_is_left_to_give_back_sigterm_ends_the_process_with_a_line() -> None:
    done = run(
        """
        import atexit, os, signal, time
        from cluster.termination import end_on_sigterm, raise_on_sigterm

        def late():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(30)

        atexit.register(late)
        raise_on_sigterm()
        end_on_sigterm("stopped: caf\\udce9")
        """
    )
    assert (done.returncode, done.stderr) == (143, "stopped: caf\\udce9\n")
