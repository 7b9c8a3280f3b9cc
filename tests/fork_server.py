"""Processes that start with the packages already imported: the seconds that each command would spend on that, saved.

A server imports them once and then forks: each fork becomes one command, with arguments, folder, environment, streams,
signals and exit code of its own. It imports this repository itself, so that a missing import still shows.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

PACKAGES = (
    "torch", "torch._inductor.compile_fx", "torch.distributed.checkpoint", "torch.distributed.fsdp",
    "lightning.pytorch", "hydra", "wandb", "tokenizers", "einops", "matplotlib.pyplot", "plotly.graph_objects", "rich",
)  # fmt: skip
# Read while packages are imported: a process with other values is started the ordinary way.
AT_IMPORT = ("PYTHON", "OMP_", "KMP_", "MKL_", "GOMP_", "OPENBLAS_", "CUDA_", "LD_", "TORCH_", "HF_", "MPL")
SERVER = os.getpid()
SHARED_FOLDERS: list[tempfile.TemporaryDirectory] = []  # made by packages as they are imported (wandb makes two)
SUBREAPER = 36  # prctl: whose grandchildren, once orphaned, become its children


def decisive(environment: dict[str, str]) -> dict[str, str]:
    return {key: value for key, value in environment.items() if key.startswith(AT_IMPORT)}


class ForkedPopen(subprocess.Popen):
    """`subprocess.Popen`, except that `python script.py ...` is forked by `line`'s other end where that can be."""

    line: socket.socket | None = None
    environment: dict[str, str]
    reusable = True

    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest) -> None:
        line, environment = ForkedPopen.line, dict(os.environ if env is None else env)
        ordinary = isinstance(args, str) or len(args) < 2 or args[0] != sys.executable or not args[1].endswith(".py")
        if line is None or ordinary or decisive(environment) != ForkedPopen.environment:
            super()._execute_child(args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest)
            return
        pipes = rest[3:9]
        streams = [own if own >= 0 else number for number, own in enumerate((pipes[0], pipes[3], pipes[5]))]
        job = json.dumps({"argv": [*map(str, args[1:])], "cwd": str(cwd or Path.cwd()), "environment": environment})
        socket.send_fds(line, [job.encode()], streams)
        self.pid = int(line.recv(64))
        self._child_created = True
        self._close_pipe_fds(*pipes)
        if not ForkedPopen.reusable:
            line.close()
            ForkedPopen.line = None


def connect(environment: dict[str, str]) -> type[subprocess.Popen]:
    """`ForkedPopen`, with its server started; `subprocess.Popen` where the system cannot hand on children."""
    if sys.platform != "linux":
        return subprocess.Popen
    if ForkedPopen.line is None:
        import ctypes

        ctypes.CDLL(None).prctl(SUBREAPER, 1, 0, 0, 0)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, __file__, str(theirs.fileno())]
        subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment, stdin=subprocess.DEVNULL)
        theirs.close()
        ForkedPopen.line, ForkedPopen.environment = ours, decisive(environment)
    return ForkedPopen


def receive(line: socket.socket) -> tuple[dict, list[int]]:
    """The next job and its streams. Ends the process where none can come any more."""
    message, streams, *_ = socket.recv_fds(line, 2**20, 3)
    if not message:
        if os.getpid() == SERVER:
            for folder in SHARED_FOLDERS:
                folder.cleanup()
        os._exit(0)
    return json.loads(message), streams


def serve(line: socket.socket) -> dict:
    """Fork for each job. Returns in the forks."""
    while True:
        job, streams = receive(line)
        reader, writer = os.pipe()
        between = os.fork()
        if between == 0:
            fork = os.fork()
            if fork == 0:
                os.close(reader)
                os.close(writer)
                line.close()
                become(job, streams)
                second(job)
                return job
            os.write(writer, str(fork).encode())
            os._exit(0)
        os.close(writer)
        pid = os.read(reader, 64)
        os.waitpid(between, 0)  # only then is the fork a child of the one who asked
        os.close(reader)
        for stream in streams:
            os.close(stream)
        line.send(pid)


def become(job: dict, streams: list[int]) -> None:
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    for stream in streams:
        os.close(stream)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(job["cwd"])
    os.environ.clear()
    os.environ.update(job["environment"])
    sys.argv = job["argv"]
    sys.path[0] = str(Path(job["argv"][0]).resolve().parent)
    from lightning.fabric.utilities import rank_zero

    rank_zero.rank_zero_only.rank = rank_zero._get_rank() or 0  # as on import


def second(job: dict) -> None:
    """Fork once more, before there are threads, for the process that Lightning starts beside the first."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if pid == 0:
        ours.close()
        idle = os.open(os.devnull, os.O_RDWR)
        for number in range(3):
            os.dup2(idle, number)
        os.close(idle)
        other, streams = receive(theirs)
        theirs.send(str(os.getpid()).encode())
        theirs.close()
        become(other, streams)
        job |= other
        return
    theirs.close()
    ForkedPopen.line, ForkedPopen.environment = ours, decisive(job["environment"])
    ForkedPopen.reusable = False
    subprocess.Popen = ForkedPopen


if __name__ == "__main__":
    for package in PACKAGES:
        importlib.import_module(package)
    SHARED_FOLDERS += [item for item in gc.get_objects() if isinstance(item, tempfile.TemporaryDirectory)]
    for folder in SHARED_FOLDERS:
        folder._finalizer.atexit = False  # or the fork that ends first deletes it for all
        atexit.unregister(folder.cleanup)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal: it is for the tests, at whose end this ends too
    gc.freeze()
    job = serve(socket.socket(fileno=int(sys.argv[1])))
    runpy.run_path(job["argv"][0], run_name="__main__")
