#!/usr/bin/env -S python3 -IS
"""An interpreter whose imports are done: hands its arguments to the server of fork_server.py named in FORK_SERVER, and
becomes as good as the fork: it passes signals on and ends with its exit code."""

import json
import os
import signal
import socket
import sys

arguments = [argument for argument in sys.argv[1:] if argument != "-u"]
server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
server.connect("\0" + os.environ["FORK_SERVER"])
job = {"argv": arguments, "cwd": os.getcwd(), "environment": dict(os.environ)}
socket.send_fds(server, [json.dumps(job).encode()], [0, 1, 2])
pid = int(server.recv(64))
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: os.kill(pid, number))
sys.exit(int(server.recv(64)) % 256)
