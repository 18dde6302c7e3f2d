"""A MongoDB server for tests: the one that LSD_TEST_MONGODB_URI names, or secantusdb in a process of its own.

secantusdb speaks MongoDB's wire protocol over a socket and keeps data on MongoDB's storage engine, so pymongo works
with it as with a real server. It can be stopped and started again on the same data.
"""

import os
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

# Set: tests run on this server, and those that stop the server or need accounts on it are skipped.
TEST_URI = os.environ.get("LSD_TEST_MONGODB_URI")
STARTING_SECONDS = 30


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Server:
    """A secantusdb server on a port of its own that keeps its data in a folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.port = free_port()
        self.uri = f"mongodb://127.0.0.1:{self.port}"
        self._process = None

    def start(self, *options: str) -> None:
        """Start the server, the first time or again, and wait until it takes connections."""
        self.folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "secantus", "--host", "127.0.0.1", "--port", str(self.port)]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [*command, "--storage-path", str(self.folder / "data"), *options], stdout=log, stderr=log
            )
        deadline = time.monotonic() + STARTING_SECONDS
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return
            except OSError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    self.stop()
                    raise RuntimeError(f"secantusdb did not start:\n{(self.folder / 'log').read_text()}") from None
                time.sleep(0.1)

    def stop(self) -> None:
        """End the server; its data stay."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()


@contextmanager
def own_server(folder: Path, *options: str):
    """A running `Server`, stopped at the end; skips the test where secantusdb is not installed."""
    pytest.importorskip("secantus", reason="needs secantusdb: pip install secantusdb")
    server = Server(folder)
    server.start(*options)
    try:
        yield server
    finally:
        server.stop()


@contextmanager
def mongodb(folder: Path):
    """The URI of a server: the one that LSD_TEST_MONGODB_URI names, or one that lives as long as the context."""
    if TEST_URI:
        yield TEST_URI
        return
    with own_server(folder) as server:
        yield server.uri
