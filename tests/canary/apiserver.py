"""A stub of the Kubernetes API server: the HTTP side of `objects.py`, on loopback, without authentication.

It speaks what `kubectl get|patch|wait`, the `kubernetes` client and `kserve.KServeClient` need of it: discovery, get,
list, watch, create, replace, delete, and patches as JSON merge patch and JSON patch (and strategic merge patch on core
objects, where it treats lists as a merge patch does, which is wrong for lists with merge keys).
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonpatch
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from tests.canary.objects import EVENTS, RESOURCES, ApiError, Change, Object, ObjectStore, Resource
from tests.processes import free_port

_VERBS = ["create", "delete", "get", "list", "patch", "update", "watch"]


def merge_patch(target: Any, patch: Any) -> Any:
    """RFC 7386: `patch` over `target`; null removes a key."""
    if not isinstance(patch, dict):
        return patch
    merged = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = merge_patch(merged.get(key), value)
    return merged


class ApiServer:
    """The API over `store`, served from a thread of its own."""

    def __init__(self, store: ObjectStore) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._store = store
        self._closing = threading.Event()
        # No graceful end: a watch is a request that lasts as long as its client likes.
        config = uvicorn.Config(
            self._application(),
            host="127.0.0.1",
            port=self.port,
            log_config=None,
            lifespan="off",
            ws="none",
            timeout_graceful_shutdown=1,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, name="apiserver", daemon=True)
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive(), "the API server did not start"
            time.sleep(0.01)

    def write_kubeconfig(self, path: Path, namespace: str) -> None:
        """A KUBECONFIG for this server."""
        context = {"cluster": "stub", "user": "stub", "namespace": namespace}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "stub", "cluster": {"server": self.url}}],
            "users": [{"name": "stub", "user": {}}],
            "contexts": [{"name": "stub", "context": context}],
            "current-context": "stub",
        }
        path.write_text(json.dumps(config))  # JSON is YAML

    def close(self) -> None:
        self._closing.set()
        self._server.should_exit = True
        self._thread.join(30)

    def _application(self) -> Starlette:
        routes = [
            Route("/version", lambda _: JSONResponse({"major": "1", "minor": "34", "gitVersion": "v1.34.0-stub"})),
            Route("/api", lambda _: JSONResponse({"kind": "APIVersions", "versions": ["v1"]})),
            Route("/apis", lambda _: JSONResponse(_groups())),
        ]
        for version in {each.api_version for each in RESOURCES}:
            routes.append(Route(_prefix(version), _discovery(version)))
        for resource in RESOURCES:
            everywhere = f"{_prefix(resource.api_version)}/{resource.plural}"
            collection = f"{_prefix(resource.api_version)}/namespaces/{{namespace}}/{resource.plural}"
            routes += [
                Route(everywhere, self._collection(resource), methods=["GET"]),
                Route(collection, self._collection(resource), methods=["GET", "POST"]),
                Route(collection + "/{name}", self._object(resource), methods=["GET", "PUT", "PATCH", "DELETE"]),
            ]
            if resource.custom:
                status = self._object(resource, status=True)
                routes.append(Route(collection + "/{name}/status", status, methods=["GET", "PUT", "PATCH"]))
        errors: dict[Any, Any] = {ApiError: lambda _, error: JSONResponse(error.body, error.code)}
        return Starlette(routes=routes, exception_handlers=errors)

    def _collection(self, resource: Resource) -> Callable[[Request], Any]:
        async def serve(request: Request) -> Response:
            namespace = request.path_params.get("namespace")
            if request.method == "POST":
                assert namespace is not None
                return JSONResponse(self._store.create(resource, namespace, await request.json()), 201)
            if request.query_params.get("watch") in ("true", "1"):
                return StreamingResponse(self._watch(resource, namespace, request), media_type="application/json")
            version = str(self._store.version)
            items = [each for each in self._store.list(resource, namespace) if _selected(each, request)]
            head = {"kind": f"{resource.kind}List", "apiVersion": resource.api_version}
            return JSONResponse(head | {"metadata": {"resourceVersion": version}, "items": items})

        return serve

    def _object(self, resource: Resource, status: bool = False) -> Callable[[Request], Any]:
        async def serve(request: Request) -> Response:
            where = request.path_params["namespace"], request.path_params["name"]
            if request.method == "GET":
                return JSONResponse(self._store.get(resource, *where))
            if request.method == "DELETE":
                return JSONResponse(self._store.delete(resource, *where))
            body = await request.json()
            change = _replacement(resource, body) if request.method == "PUT" else _patch(resource, request, body)
            # As Kubernetes names a client that does not say who it is.
            agent = request.headers.get("user-agent", "unknown").split("/")[0]
            manager = request.query_params.get("fieldManager", agent)
            return JSONResponse(self._store.change(resource, *where, change, manager=manager, status=status))

        return serve

    def _watch(self, resource: Resource, namespace: str | None, request: Request) -> Iterator[str]:
        """Lines of `{"type", "object"}`, until the client's timeout."""
        seconds = float(request.query_params.get("timeoutSeconds", 1800))
        ends = time.monotonic() + seconds
        version = int(request.query_params.get("resourceVersion") or 0)
        if not version:  # "any": what there is comes first, as ADDED
            version = self._store.version
            for each in self._store.list(resource, namespace):
                if _selected(each, request):
                    yield json.dumps({"type": "ADDED", "object": each}) + "\n"
        while not self._closing.is_set() and time.monotonic() < ends:
            for change in self._store.since(version, wait_s=0.2):
                version = change.version
                if _concerns(change, resource, namespace) and _selected(change.object, request):
                    yield json.dumps({"type": change.type, "object": change.object}) + "\n"


def _prefix(api_version: str) -> str:
    return f"/apis/{api_version}" if "/" in api_version else f"/api/{api_version}"


def _concerns(change: Change, resource: Resource, namespace: str | None) -> bool:
    return change.resource is resource and namespace in (None, change.object["metadata"]["namespace"])


def _selected(item: Object, request: Request) -> bool:
    """Whether a field selector takes it; each term is `a.b=value`."""
    for term in filter(None, request.query_params.get("fieldSelector", "").split(",")):
        path, wanted = term.replace("==", "=").split("=")
        value: Any = item
        for key in path.split("."):
            value = value.get(key, {})
        if value != wanted:
            return False
    return True


def _replacement(resource: Resource, body: Object) -> Callable[[Object], Object]:
    if resource.custom and "resourceVersion" not in body.get("metadata", {}):
        why = "metadata.resourceVersion: Invalid value: 0x0: must be specified for an update"
        raise ApiError(422, "Invalid", why, group=resource.group, kind=resource.kind)
    return lambda current: body


def _patch(resource: Resource, request: Request, body: Any) -> Callable[[Object], Object]:
    kind = request.headers.get("content-type", "").split(";")[0]
    if kind == "application/json-patch+json":

        def apply(current: Object) -> Object:
            try:
                patched: Object = jsonpatch.apply_patch(current, body)
            except jsonpatch.JsonPatchTestFailed as error:
                raise ApiError(422, "Invalid", f"the server rejected our request: {error}") from error
            return patched

        return apply
    if kind == "application/merge-patch+json" or (
        kind == "application/strategic-merge-patch+json" and not resource.custom
    ):
        return lambda current: merge_patch(current, body)
    raise ApiError(415, "UnsupportedMediaType", f"the body of the request was in an unknown format: {kind}")


def _groups() -> Object:
    versions: dict[str, Object] = {}
    for each in RESOURCES:
        if each.group:
            versions[each.group] = {"groupVersion": each.api_version, "version": each.version}
    groups = [{"name": name, "versions": [one], "preferredVersion": one} for name, one in versions.items()]
    return {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}


def _discovery(api_version: str) -> Callable[[Request], Response]:
    resources = []
    for each in RESOURCES:
        if each.api_version == api_version:
            row = {"name": each.plural, "singularName": each.kind.lower(), "namespaced": True, "kind": each.kind}
            resources.append(row | {"verbs": _VERBS, "shortNames": list(each.short_names)})
            if each.custom:
                status = {"name": f"{each.plural}/status", "verbs": ["get", "patch", "update"]}
                resources.append(row | status)
    body = {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": api_version, "resources": resources}
    return lambda _: JSONResponse(body)


def events_of(store: ObjectStore, namespace: str) -> list[Object]:
    """The Kubernetes Events that were posted, oldest first."""
    return store.list(EVENTS, namespace)
