"""A real Redis for tests, with its log on disk; it may be killed and started again."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import redis

from tests.conftest import left_out
from tests.processes import free_port


class RedisServer:
    """redis-server on a loopback port, as the component `jobs` configures it, or with another `appendfsync`."""

    def __init__(self, folder: Path, fsync: str = "always") -> None:
        self._folder, self._fsync, self.port = folder, fsync, free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.client = redis.Redis(port=self.port, decode_responses=True)
        self.start()

    def start(self) -> None:
        where = ["--bind", "127.0.0.1", "--port", str(self.port), "--dir", str(self._folder)]
        kept = ["--appendonly", "yes", "--appendfsync", self._fsync, "--save", ""]
        with (self._folder / "redis.log").open("a") as log:
            self.process = subprocess.Popen(["redis-server", *where, *kept], stdout=log, stderr=log)
        end = time.monotonic() + 30
        while True:
            try:
                self.client.ping()
                return
            except redis.ConnectionError:
                assert self.process.poll() is None, "Redis ended"
                assert time.monotonic() < end, "Redis did not start"
                time.sleep(0.05)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(30)

    def close(self) -> None:
        self.client.close()
        if self.process.poll() is None:
            self.kill()


@contextmanager
def running_redis(folder: Path, fsync: str = "always") -> Iterator[RedisServer]:
    if shutil.which("redis-server") is None:
        left_out("redis-server is not installed")
    server = RedisServer(folder, fsync)
    try:
        yield server
    finally:
        server.close()
