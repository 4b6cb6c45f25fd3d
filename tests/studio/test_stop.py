"""The end of the command `ctf studio`, with every kind of open connection."""

import json
import re
import signal
import socket
import subprocess
import sys

import pytest

BODY = json.dumps({"classes": list(range(8)), "count": 8}).encode()
HEAD = (
    b"POST /v1/generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b"Content-Length: %d\r\n" % len(BODY)
)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_studio_and_its_connections(number: signal.Signals) -> None:
    command = [sys.executable, "-m", "ctf", "studio", "fashion-mnist", "--port", "0"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as process:  # type: ignore[call-overload]
        connections = []
        try:
            port = re.search(r"http://127.0.0.1:(\d+)", process.stdout.readline())
            assert port

            def connect(data: bytes) -> socket.socket:
                connection = socket.create_connection(("127.0.0.1", int(port[1])), timeout=60)
                connections.append(connection)
                connection.sendall(data)
                return connection

            connect(b"")  # silent
            connect(b"GET /heal")  # half of a request
            connect(HEAD + b"\r\n" + BODY[:5])  # half of a body
            idle = connect(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert idle.recv(1000).startswith(b"HTTP/1.1 200")
            waiting = connect(HEAD + b"\r\n" + BODY)
            stream = connect(HEAD + b"Accept: text/event-stream\r\n\r\n" + BODY)
            events = b""
            while b"event: queued" not in events:
                events += stream.recv(1000)
            process.send_signal(number)
            out, err = process.communicate(timeout=60)
            assert (process.returncode, out, err) == (0, "", "")
            assert b"the studio is stopping" in events + read_all(stream)
            assert b"the studio is stopping" in read_all(waiting)
        finally:
            process.kill()
            for connection in connections:
                connection.close()


def read_all(connection: socket.socket) -> bytes:
    data = b""
    while chunk := connection.recv(100_000):
        data += chunk
    return data
