"""Prometheus, scraping each revision once a second, as the PodMonitor of manifests/ would make it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import httpx

from tests.canary.child import Child, answers
from tests.conftest import left_out
from tests.processes import free_port


class Prometheus:
    """A Prometheus process; its targets are a file that is replaced as revisions come and go."""

    def __init__(self, folder: Path, scrape_interval_s: int = 1) -> None:
        found = shutil.which("prometheus")
        if found is None:
            left_out("prometheus is not installed (apt-get install prometheus)")
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._targets = folder / "targets.json"
        self._command = [found, f"--config.file={folder / 'config.json'}", f"--storage.tsdb.path={folder / 'data'}"]
        self._command += [f"--web.listen-address=127.0.0.1:{self.port}", "--log.level=warn"]
        self._log = folder / "log"
        folder.mkdir(parents=True)
        self.scrape({})
        every = f"{scrape_interval_s}s"
        discovery = [{"files": [str(self._targets)], "refresh_interval": "1s"}]
        job = {"job_name": "default/aitextgen", "file_sd_configs": discovery}
        config = {"global": {"scrape_interval": every, "scrape_timeout": every}, "scrape_configs": [job]}
        (folder / "config.json").write_text(json.dumps(config))  # JSON is YAML
        self.start()

    def start(self) -> None:
        """Start it, or start it again after `stop`, on the same port and with the same data."""
        self.child = Child(self._command, self._log)
        self.child.wait_until(lambda: answers(f"{self.url}/-/ready"), "Prometheus is ready")

    def stop(self) -> None:
        """An outage: connections are refused until `start`."""
        if self.child.exit_code is None:
            self.child.terminate()
            self.child.process.wait(30)

    close = stop

    def scrape(self, ports: dict[str, int]) -> None:
        """Scrape these pods from now on: port by pod name."""
        targets = [
            {"targets": [f"127.0.0.1:{port}"], "labels": {"namespace": "default", "pod": name}}
            for name, port in sorted(ports.items())
        ]
        new = self._targets.with_suffix(".new")
        new.write_text(json.dumps(targets))
        os.replace(new, self._targets.with_suffix(".json"))

    def query(self, expression: str) -> list[dict[str, Any]]:
        """An instant query's vector: `{"metric": labels, "value": [time, "number"]}` each."""
        answer = httpx.get(f"{self.url}/api/v1/query", params={"query": expression}, timeout=5).json()
        assert answer["status"] == "success", answer
        result: list[dict[str, Any]] = answer["data"]["result"]
        return result
