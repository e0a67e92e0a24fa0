"""Every command ends with an exit code and a line for people, whatever ends it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent, indent
from typing import Any

import pyarrow as pa
import pytest
from ray.exceptions import RayTaskError, WorkerCrashedError

from cluster.errors import RunError, StoreError, UsageError
from jobs import (
    answer_vqa,
    api_key,
    benchmark,
    caption_corpus,
    evaluate,
    labelling_cli,
    make_corpus,
    report,
    retry_errors,
    train_tiny,
    tune,
)
from jobs.boundary import run_command

REPOSITORY = Path(__file__).parents[2]

# Each command, with arguments that suffice, and the function that does its work.
COMMANDS: dict[str, tuple[Callable[[list[str]], int], list[str], Any, str]] = {
    "caption_corpus": (caption_corpus.main, [], labelling_cli, "_run_job"),
    "answer_vqa": (answer_vqa.main, [], labelling_cli, "_run_job"),
    "retry_errors": (retry_errors.main, ["out"], retry_errors, "_retry"),
    "report": (report.main, ["out"], report, "_report"),
    "make_corpus": (
        make_corpus.main,
        ["--kind", "vqa", "--rows", "1", "--output", "out"],
        make_corpus,
        "_make",
    ),
    "benchmark": (benchmark.main, ["--suite", "scale"], benchmark, "_benchmark"),
    "evaluate": (evaluate.main, [], evaluate, "_evaluate"),
    "tune": (tune.main, [], tune, "_tune"),
    "api_key": (api_key.main, ["name"], api_key, "_make"),
    "train_tiny": (train_tiny.main, ["--output", "out"], train_tiny, "_train"),
}

Ended = Callable[[BaseException], tuple[int, list[str]]]


def test_every_command_is_here() -> None:
    files = {p.stem: p.read_text() for p in (REPOSITORY / "jobs").glob("*.py")}
    commands = {name for name, text in files.items() if "__main__" in text}
    assert commands == COMMANDS.keys()
    assert all(files[name].endswith("    end_with(main)\n") for name in commands)


@pytest.fixture(params=COMMANDS)
def ended(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Ended:
    """The exit code of a command whose work raises, and its lines on stderr."""
    main, arguments, module, work = COMMANDS[request.param]

    def end(error: BaseException) -> tuple[int, list[str]]:
        def fail(*_: object) -> int:
            raise error

        monkeypatch.setattr(module, work, fail)
        code = main(arguments)
        printed = capsys.readouterr()
        assert printed.out == ""
        return code, printed.err.splitlines()

    return end


@pytest.mark.parametrize(
    "error", [StoreError("gone: mend it"), UsageError("no"), *RunError.__subclasses__()]
)
def test_an_error_of_ours_is_its_code_its_message_and_its_exit_code(
    ended: Ended, error: RunError | type[RunError]
) -> None:
    raised = error("x y") if isinstance(error, type) else error
    for given in (raised, RayTaskError("f", "Traceback\n…", raised).as_instanceof_cause()):
        code, lines = ended(given)
        assert code == raised.exit_code
        assert [line.startswith(f"{raised.code}: {raised}") for line in lines] == [True]


@pytest.mark.parametrize(
    "error",
    [
        pa.ArrowInvalid("no footer"),
        RayTaskError("f", "Traceback\n…", pa.ArrowInvalid("no footer")).as_instanceof_cause(),
        WorkerCrashedError(),
        KeyError("row"),
        OSError(5, "Input/output error", "/x"),
        UnicodeEncodeError("utf-8", "\udce9", 0, 1, "surrogates not allowed"),
        MemoryError(),
        RecursionError("too deep"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_any_other_error_is_one_line_and_no_traceback(ended: Ended, error: Exception) -> None:
    code, lines = ended(error)
    assert code == 1
    *logged, told = lines
    assert told.startswith("unexpected: ")
    cause = getattr(error, "cause", None) or error
    assert type(cause).__name__ in told
    assert all("event=unexpected_error" in line for line in logged)
    assert "Traceback" not in "".join(lines)


# A flag of each command that takes a text, or none for a place of its own.
TEXTS = {
    "caption_corpus": "--prompt",
    "answer_vqa": "--input",
    "retry_errors": "--codes",
    "report": "--overlay",
    "make_corpus": "--output",
    "benchmark": "--json",
    "evaluate": "--data",
    "tune": "--json",
    "api_key": "--file",
    "train_tiny": "--work",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_an_argument_that_is_not_utf8_is_a_usage_error_before_anything_is_done(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main, arguments, module, work = COMMANDS[name]
    monkeypatch.setattr(module, work, lambda *_: pytest.fail("it began"))
    flag, bad = TEXTS[name], os.fsdecode(b"caf\xe9")
    message = rf"{flag} caf\xe9: it is not UTF-8, and Ray takes nothing else"
    assert main([*arguments, flag, bad]) == 2
    assert f"usage: {message}" in capsys.readouterr().err


def test_ctrl_c_is_a_line(ended: Ended) -> None:
    code, lines = ended(KeyboardInterrupt())
    assert code == 130
    assert [line.startswith("stopped") for line in lines] == [True]


def test_what_stays_is_said_where_an_error_does_not_say_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def end(error: BaseException) -> str:
        def fail() -> int:
            raise error

        run_command(fail, left="units stay")
        return capsys.readouterr().err.splitlines()[-1]

    assert end(ValueError("x")).endswith("; units stay")
    assert end(KeyboardInterrupt()) == "stopped: units stay"
    assert end(StoreError("gone: mend it")) == "store: gone: mend it"


def run(script: str, **options: Any) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(
        [sys.executable, "-c", script], env=environment, text=True, timeout=60, check=False,
        stderr=subprocess.PIPE, **options,
    )  # fmt: skip


PRINTS = """
import sys
from jobs.boundary import run_command

def work():
    print("x" * %d)
    return 0

sys.exit(run_command(work))
"""


@pytest.mark.parametrize("characters", [10, 10_000_000])
def test_a_reader_that_went_away_is_a_line_and_no_second_error_at_the_end(characters: int) -> None:
    """`report.py | head`, also where all that was printed is in the buffer yet."""
    ending, other = os.pipe()
    os.close(ending)
    try:
        done = run(PRINTS % characters, stdout=other)
    finally:
        os.close(other)
    assert done.returncode == 1
    assert done.stderr == "stdout was closed before everything was printed\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is full")
@pytest.mark.parametrize("characters", [10, 10_000_000])
def test_what_cannot_be_printed_for_want_of_room_is_no_success(characters: int) -> None:
    with Path("/dev/full").open("w") as full:
        done = run(PRINTS % characters, stdout=full)
    assert done.returncode == 1
    assert "unexpected: OSError: [Errno 28] No space left" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


TOLD = """
import atexit, os, signal, sys, time
from jobs.boundary import end_with, run_command

def told():
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.01)

def work():
{work}

class Late:
    def __del__(self):  # called when Python takes its modules down
        os.kill(os.getpid(), signal.SIGTERM)

end_with(lambda: run_command(work, left="units stay"))
"""

MOMENTS = {
    "while it works": "told(); time.sleep(30)",
    "where Ray waits, which raises Ctrl-C in its place": """
        try:
            told()
        except KeyboardInterrupt:
            raise KeyboardInterrupt from None""",
    "where another error follows": """
        try:
            told()
        finally:
            raise ValueError("of the clean-up")""",
    "where nobody hears its exception": """
        class Thing:
            def __del__(self):
                told()
        Thing()
        return 0""",
    "where a process ends with it": """
        try:
            told()
        finally:
            raise SystemExit(15)""",
    "while Python ends": "atexit.register(told); return 0",
    "while Python ends, after an error": "atexit.register(told); raise ValueError",
    "twice": """
        try:
            told()
        finally:
            told()""",
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_command_that_is_told_to_end_at_any_moment_says_so_and_has_one_exit_code(
    moment: str,
) -> None:
    lines = MOMENTS[moment].strip("\n")
    done = run(TOLD.format(work=indent(dedent(lines), "    ")), stdout=subprocess.PIPE)
    assert done.returncode == 143, done.stderr
    told = [line for line in done.stderr.splitlines() if line == "stopped: units stay"]
    assert told == ["stopped: units stay"]
    if "nobody hears" not in moment:  # which Python prints, as of any __del__
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("code", [0, 3])
def test_the_end_of_a_command_is_not_the_end_of_python(code: int) -> None:
    """Which may take seconds, and in which no handler of Python's answers a signal."""
    lines = f"""
        global late
        late = Late()
        atexit.register(print, "registered")
        sys.stdout.write("printed ")
        return {code}
    """
    done = run(TOLD.format(work=indent(dedent(lines), "    ")), stdout=subprocess.PIPE)
    assert (done.returncode, done.stdout, done.stderr) == (code, "printed registered\n", "")


def test_a_usage_error_of_the_command_line_ends_as_ever() -> None:
    script = "from jobs import report; from jobs.boundary import end_with; end_with(report.main)"
    done = run(script, stdout=subprocess.PIPE)
    assert done.returncode == 2
    assert "the following arguments are required: output" in done.stderr


@pytest.mark.parametrize("where", ["argument", "folder", "gone"])
def test_a_command_as_it_is_typed_refuses_bytes_that_are_not_utf8(
    where: str, tmp_path: Path
) -> None:
    """Ray would raise them as an error of its own, behind the plan."""
    folder = os.fsencode(tmp_path) + (b"/caf\xe9" if where == "folder" else b"/ascii")
    os.mkdir(folder)
    words: list[bytes] = [b"--prompt", b"caf\xe9" if where == "argument" else b"x"]
    script = os.fsencode(REPOSITORY / "jobs/caption_corpus.py")
    places = [b"--input", b"in", b"--output", os.fsencode(tmp_path / "out")]
    command = [os.fsencode(sys.executable), script, *places, *words]
    if where == "gone":
        command = [b"sh", b"-c", b'rmdir "$PWD"; exec "$@"', b"sh", *command]
    done = subprocess.run(
        command, cwd=folder, env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True, timeout=60, check=False,
    )  # fmt: skip
    named = {
        "argument": rb"usage: --prompt caf\xe9: it is not UTF-8",
        "folder": rb"/caf\xe9: it is not UTF-8",
        "gone": rb"usage: the working directory is gone",
    }
    assert done.returncode == 2, done.stderr
    assert named[where] in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()
