"""Processes that start with the packages already imported: the seconds that each command would spend on that, saved.

A server imports them once and then forks: each fork becomes one command, with arguments, folder, environment, streams,
signals and exit code of its own. Programs that are no tests get forks by `forked_python.py` in the place of their
interpreter; so do the workers of pytest, each with a server of its own forked beside it. What a command imports when
nothing is there yet, tests of new interpreters see (`fresh`).
"""

import atexit
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
import threading
from pathlib import Path
from typing import Any

PACKAGES = (
    "pytest", "execnet", "torch", "torch._inductor.compile_fx", "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "lightning.pytorch", "hydra", "wandb", "wandb.sdk.launch", "tokenizers", "einops", "matplotlib.pyplot",
    "plotly.graph_objects", "pandas", "rich",
    "train.training", "train.pretrain", "train.export", "eval.plots.pareto",
)  # fmt: skip
# Read while packages are imported: a process with other values is started the ordinary way.
AT_IMPORT = ("PYTHON", "OMP_", "KMP_", "MKL_", "GOMP_", "OPENBLAS_", "CUDA_", "LD_", "TORCH_", "HF_", "MPL")
MODULES = "HF_MODULES_CACHE"  # each worker has a folder of its own
BLANK = "BLANK_PICTURES"  # of runs, whose pictures take as long as their training; "" draws them
SERVER = os.getpid()
SHARED_FOLDERS: list[tempfile.TemporaryDirectory] = []  # made by packages as they are imported (wandb makes two)
SUBREAPER = 36  # prctl: whose grandchildren, once orphaned, become its children


def decisive(environment: dict[str, str]) -> dict[str, str]:
    return {key: value for key, value in environment.items() if key.startswith(AT_IMPORT) and key != MODULES}


def place_modules() -> None:
    """Let transformers, where it is imported already, copy the code of exported models to where it would look now."""
    for name in ("transformers.utils.hub", "transformers.utils", "transformers.dynamic_module_utils"):
        if name in sys.modules and MODULES in os.environ:
            sys.modules[name].HF_MODULES_CACHE = os.environ[MODULES]


def blank(*arguments: Any, **options: Any) -> None:
    """A picture of one point, at the path among the arguments."""
    from PIL import Image

    (path,) = (value for value in (*arguments, *options.values()) if isinstance(value, Path))
    Image.new("RGB", (1, 1)).save(path, format="png")


class ForkedPopen(subprocess.Popen):
    """`subprocess.Popen`, except that `python script.py ...` is forked by `line`'s other end where that can be."""

    line: socket.socket | None = None
    environment: dict[str, str]
    address = ""  # of the server, for programs
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
        theirs, listener = open_ends(environment)
        ends = [theirs.fileno(), listener.fileno()]
        command = [sys.executable, __file__, *map(str, ends)]
        subprocess.Popen(command, pass_fds=ends, env=environment, stdin=subprocess.DEVNULL)
        theirs.close()
        listener.close()
    return ForkedPopen


def open_ends(environment: dict[str, str]) -> tuple[socket.socket, socket.socket]:
    """Keep this process' end of a line to a server of `environment`; return the two that the server reads."""
    import ctypes

    ctypes.CDLL(None).prctl(SUBREAPER, 1, 0, 0, 0)
    ForkedPopen.line, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ForkedPopen.environment = decisive(environment)
    ForkedPopen.address = f"kvfrontier-tests-{os.getpid()}"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind("\0" + ForkedPopen.address)
    listener.listen()
    return theirs, listener


def receive(line: socket.socket) -> tuple[dict, list[int]]:
    """The next job and its streams. Ends the process where none can come any more."""
    message, streams, *_ = socket.recv_fds(line, 2**20, 3)
    if not message:
        if os.getpid() == SERVER:
            for folder in SHARED_FOLDERS:
                folder.cleanup()
        os._exit(0)
    return json.loads(message), streams


def serve(line: socket.socket, listener: socket.socket) -> dict:
    """Fork for each job, of a test over `line` or of a program that connects. Returns in the forks."""
    while True:
        of_test = line in select.select([line, listener], [], [])[0]
        connection = line if of_test else listener.accept()[0]
        job, streams = receive(connection)
        reader, writer = os.pipe()
        between = os.fork()
        if between == 0:
            fork = os.fork()
            if fork == 0:
                for end in (reader, writer):
                    os.close(end)
                for end in {line, listener, connection}:
                    end.close()
                become(job, streams)
                if job["argv"][0] != "-c":
                    second(job)
                elif (of_worker := beside(job)) is not None:
                    line, listener = of_worker
                    continue
                return job
            if of_test:
                os.write(writer, str(fork).encode())
            else:  # whose parent cannot become that of the fork
                connection.send(str(fork).encode())
                connection.send(str(os.waitstatus_to_exitcode(os.waitpid(fork, 0)[1])).encode())
            os._exit(0)
        os.close(writer)
        if of_test:
            pid = os.read(reader, 64)
            os.waitpid(between, 0)  # only then is the fork a child of the one who asked
            line.send(pid)
        else:
            connection.close()
        os.close(reader)
        for stream in streams:
            os.close(stream)


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
    place_modules()
    from lightning.fabric.utilities import rank_zero

    rank_zero.rank_zero_only.rank = rank_zero._get_rank() or 0  # as on import
    if os.environ.get(BLANK) and sys.argv[0].endswith("train/pretrain.py"):
        pictures = sys.modules["eval.plots.pareto"]
        pictures.draw_panels = pictures.plot_pareto_html = blank


def beside(job: dict) -> tuple[socket.socket, socket.socket] | None:
    """Fork the server of a worker, which imports nothing again. Returns its ends there, and None in the worker."""
    environment = {key: value for key, value in job["environment"].items() if key != "PYTHONPATH"}
    ends = open_ends(environment)
    if os.fork() == 0:
        ForkedPopen.line.close()
        ForkedPopen.line = None
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        idle = os.open(os.devnull, os.O_RDWR)
        for number in range(3):
            os.dup2(idle, number)
        os.close(idle)
        return ends
    for end in ends:
        end.close()
    return None


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


def compile_without_timing() -> None:
    """Leave out a figure of torch's logs: after each compilation it empties the processor's caches to time the guards
    once, a fifth of the compilation of a small block."""
    import torch

    torch._dynamo.guards.profile_guard_manager = lambda *arguments: 0.0


def warm_up() -> None:
    """Compose a configuration: what Hydra's parsers keep of a first command line, every fork has then."""
    from hydra import compose, initialize_config_dir
    from hydra.core.config_store import ConfigStore

    from arch.named import CONFIGS
    from train.schema import PretrainConfig

    ConfigStore.instance().store(name="pretrain_schema", node=PretrainConfig)
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        compose("pretrain", ["+arch=cla2", "+size=tiny", "tokens=640", "data.path=/x/y_1", "logger=csv"])


def main(ends: list[str]) -> None:
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    for package in PACKAGES:
        importlib.import_module(package)
    SHARED_FOLDERS.extend(item for item in gc.get_objects() if type(item) is tempfile.TemporaryDirectory)
    for folder in SHARED_FOLDERS:
        folder._finalizer.atexit = False  # or the fork that ends first deletes it for all
        atexit.unregister(folder.cleanup)
    compile_without_timing()
    warm_up()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal: it is for the tests, at whose end this ends too
    gc.freeze()
    arguments = serve(*(socket.socket(fileno=int(end)) for end in ends))["argv"]
    status = 0
    try:
        if arguments[0] == "-c":
            exec(arguments[1], {"__name__": "__main__"})
        elif arguments[0] == "-m":
            sys.argv, sys.path[0] = arguments[1:], os.getcwd()
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as ended:
        status = exit_status(ended)
    finish(status)


def exit_status(ended: SystemExit) -> int:
    if isinstance(ended.code, str):
        print(ended.code, file=sys.stderr)
    return ended.code & 255 if isinstance(ended.code, int) else int(ended.code is not None)


def finish(status: int) -> None:
    """End as an interpreter does, but leave the modules as they are: to take them apart copies what a fork shares."""
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    from fork_server import main as serve_commands  # the module that workers import again

    serve_commands(sys.argv[1:])
