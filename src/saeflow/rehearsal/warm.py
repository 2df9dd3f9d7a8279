"""Commands without the wait for imports: a process that has imported everything, and forks for each command.

A job of a rehearsal works for a fraction of a second, and would spend five importing torch and transformers. The
jobs stay the workflow's own: Snakemake calls `python -m saeflow ...`, and finds a `python` that hands its arguments,
environment and standard streams to this process, whose child runs them. Snakemake itself is started in the same way.
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

IMPORTED = (
    "torch", "transformers.modeling_utils", "transformers.tokenization_utils_tokenizers", "datasets", "jsonschema", "pandas", "sklearn.linear_model",
    "matplotlib.figure", "saeflow.cli", "saeflow.complexity.probe", "saeflow.complexity.scorers", "saeflow.evaluation",
    "saeflow.evaluation.interpret", "saeflow.evaluation.stability", "saeflow.evaluation.sweeps", "saeflow.figures.report", "saeflow.tables.collect", "saeflow.sources.text",
    "saeflow.sources.vision", "saeflow.sources.models", "saeflow.stores", "saeflow.training", "saeflow.failures", "saeflow.preflight", "snakemake.cli",
    "snakemake.executors.local", "snakemake.report.html_reporter",
)  # fmt: skip
PROGRAMS: Mapping[str, str | None] = {
    "python": None,
    "snakemake": "snakemake",
    "saeflow": "saeflow",
}
"""The module that each program runs; `python` runs those that its arguments name."""
_READY = b"ready\n"
_MOST = 1 << 23
"""Bytes of a job's arguments and environment at most."""

CLIENT = """#!{python} -IS
import json, os, signal, socket, sys

module, arguments = {module!r}, sys.argv[1:]
if module is None:
    if len(arguments) < 2 or arguments[0] != "-m" or arguments[1] not in {modules!r}:
        os.execv({python!r}, [{python!r}, *arguments])
    module, arguments = arguments[1], arguments[2:]
job = {{"module": module, "arguments": arguments, "folder": os.getcwd(), "environment": dict(os.environ)}}
message = json.dumps(job).encode()
received, sent = os.pipe()
for number in (signal.SIGINT, signal.SIGTERM):
    if signal.getsignal(number) is not signal.SIG_IGN:
        signal.signal(number, lambda number, frame: os.write(sent, bytes([number])))
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    socket.send_fds(server, [len(message).to_bytes(8, "big")], [0, 1, 2, received])
    server.sendall(message)
    code = server.recv(1)
if not code:
    sys.exit("error: the job ended without an exit code: it was killed")
sys.exit(code[0])
"""


@contextmanager
def warm_python(environment: Mapping[str, str]) -> Iterator[Path]:
    """While the context is open, a folder with `python`, `snakemake` and `saeflow`, whose commands need no imports.

    Args:
        environment: of the process that imports; libraries read parts of it when they are imported.
    """
    with tempfile.TemporaryDirectory(prefix="saeflow-") as folder:
        address, programs = Path(folder, "jobs"), Path(folder, "bin")
        programs.mkdir()
        modules = tuple(module for module in PROGRAMS.values() if module)
        for name, module in PROGRAMS.items():
            client = programs / name
            client.write_text(
                CLIENT.format(
                    python=sys.executable, address=str(address), module=module, modules=modules
                )
            )
            client.chmod(0o755)
        code = "import sys; from saeflow.rehearsal.warm import serve; serve(sys.argv[1])"
        command = [sys.executable, "-c", code, str(address)]
        with subprocess.Popen(
            command,
            env=dict(environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C reaches jobs through their clients
        ) as server:
            try:
                assert server.stdout is not None
                if server.stdout.readline() != _READY:
                    raise RuntimeError("the process that runs jobs did not start")
                yield programs
            finally:
                server.terminate()


def serve(address: str) -> None:
    """Import what jobs need, then run each job that is asked for in a child, until standard input is closed."""
    for name in IMPORTED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # what is imported stays: no collection in a child touches, and so copies, its memory
    # A job gets the signals that its client passes on, whatever the process that serves it was started with.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    jobs: dict[int, int] = {}  # process of each job, by the pipe that its client holds open
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(address)
        listening.listen(64)
        sys.stdout.buffer.write(_READY)
        sys.stdout.flush()
        while True:
            ready, _, _ = select.select([listening.fileno(), sys.stdin.fileno(), *jobs], [], [])
            if sys.stdin.fileno() in ready:
                return
            for pipe in jobs.keys() & ready:
                _follow(jobs, pipe)
            if listening.fileno() in ready:
                connection, _ = listening.accept()
                head, streams, _, _ = socket.recv_fds(connection, 8, 4)
                if len(streams) == 4:  # else its client has gone
                    *streams, pipe = streams
                    if (process := os.fork()) == 0:
                        listening.close()
                        _run(connection, int.from_bytes(head, "big"), streams)
                    _lead(process)
                    jobs[pipe] = process
                for stream in streams:
                    os.close(stream)
                connection.close()


def _lead(process: int) -> None:
    """Make a child the leader of a process group, to which the processes that it starts belong."""
    with contextlib.suppress(OSError):  # the other of parent and child did it, or it has ended
        os.setpgid(process, process)


def _follow(jobs: dict[int, int], pipe: int) -> None:
    """Give a job, and what it started, the signal that its client got; where the client has gone, end them."""
    number = os.read(pipe, 1)
    with contextlib.suppress(ProcessLookupError):  # all of them have ended
        os.killpg(jobs[pipe], number[0] if number else signal.SIGKILL)
    if not number:
        os.waitpid(jobs.pop(pipe), 0)
        os.close(pipe)


def _run(connection: socket.socket, length: int, streams: list[int]) -> None:
    """Be the job of a client whose message has `length` bytes, and tell it the exit code."""
    code, message = 1, b""
    _lead(os.getpid())
    atexit._clear()  # what the parent registered is its own to run
    try:
        while len(message) < length <= _MOST and (part := connection.recv(length - len(message))):
            message += part
        job = json.loads(message)
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        os.chdir(job["folder"])
        os.environ.clear()
        os.environ.update(job["environment"])
        sys.argv = [job["module"], *job["arguments"]]
        runpy.run_module(job["module"], run_name="__main__", alter_sys=True)  # python -m saeflow
        code = 0
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException:  # as Python itself does at the end of a program
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        for output in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                output.flush()
        with contextlib.suppress(OSError):
            connection.sendall(bytes([code]))
        os._exit(code)
