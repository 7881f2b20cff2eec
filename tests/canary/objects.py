"""A stub of what stands behind the Kubernetes API: objects with versions, and the history that a watch reads.

Kept to Kubernetes' letter: `resourceVersion` moves with every real change and with no other; an update that carries a
stale one is refused (409); `generation` moves with the spec alone; `status` is changed through its subresource alone.
`managedFields` says who changed an object and when, to the second, but not which fields. Left out: admission, schemas,
defaults, server-side apply, deletion with finalizers.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

Object = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Resource:
    """One kind of object."""

    group: str  # "" is the core group
    version: str
    plural: str
    kind: str
    short_names: tuple[str, ...] = ()
    custom: bool = False  # of a CRD, with a status subresource: `generation` is kept, strategic merge is refused

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}" if self.group else self.version

    @property
    def qualified(self) -> str:
        return f"{self.plural}.{self.group}" if self.group else self.plural


INFERENCE_SERVICES = Resource(
    "serving.kserve.io", "v1beta1", "inferenceservices", "InferenceService", ("isvc",), custom=True
)
EVENTS = Resource("", "v1", "events", "Event", ("ev",))
CONFIG_MAPS = Resource("", "v1", "configmaps", "ConfigMap", ("cm",))
RESOURCES = (INFERENCE_SERVICES, EVENTS, CONFIG_MAPS)


class ApiError(Exception):
    """An error as Kubernetes answers it: `metav1.Status`."""

    def __init__(self, code: int, reason: str, message: str, **details: Any) -> None:
        super().__init__(message)
        self.code = code
        self.body = {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": message,
            "reason": reason,
            "details": details,
            "code": code,
        }


@dataclass(frozen=True, slots=True)
class Change:
    """One line of the history."""

    version: int
    type: str  # ADDED | MODIFIED | DELETED
    resource: Resource
    object: Object


class ObjectStore:
    """All objects. Every method may be called from any thread; objects go in and out as copies."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._objects: dict[tuple[Resource, str, str], Object] = {}
        self._version = 0
        self._history: list[Change] = []

    @property
    def version(self) -> int:
        return self._version

    def get(self, resource: Resource, namespace: str, name: str) -> Object:
        with self._changed:
            return deepcopy(self._find(resource, namespace, name))

    def list(self, resource: Resource, namespace: str | None = None) -> list[Object]:
        with self._changed:
            found = [
                value for key, value in self._objects.items() if key[0] is resource and namespace in (None, key[1])
            ]
            return deepcopy(found)

    def create(self, resource: Resource, namespace: str, new: Object) -> Object:
        with self._changed:
            metadata = new.setdefault("metadata", {})
            if "name" not in metadata and "generateName" in metadata:
                metadata["name"] = metadata["generateName"] + uuid.uuid4().hex[:5]
            if "name" not in metadata:
                raise _invalid(resource, "", "metadata.name: Required value: name or generateName is required")
            name = metadata["name"]
            involved = new.get("involvedObject", {}).get("namespace", "")
            if resource is EVENTS and (involved or "default") != namespace:
                why = f'involvedObject.namespace: Invalid value: "{involved}": does not match event.namespace'
                raise _invalid(resource, name, why)
            if (resource, namespace, name) in self._objects:
                message = f'{resource.qualified} "{name}" already exists'
                raise ApiError(409, "AlreadyExists", message, name=name, group=resource.group, kind=resource.plural)
            metadata |= {"namespace": namespace, "uid": str(uuid.uuid4()), "creationTimestamp": now()}
            new |= {"apiVersion": resource.api_version, "kind": resource.kind}
            if resource.custom:
                metadata["generation"] = 1
                new.pop("status", None)
            return self._keep("ADDED", resource, new)

    def change(
        self,
        resource: Resource,
        namespace: str,
        name: str,
        change: Callable[[Object], Object],
        *,
        manager: str,
        status: bool = False,
    ) -> Object:
        """Replace an object by `change` of a copy of it; with `status`, of its status alone, else all but that.

        Raises `ApiError` 409 when the result carries another resourceVersion than the object's.
        """
        with self._changed:
            current = self._find(resource, namespace, name)
            new = change(deepcopy(current))
            given = new.get("metadata", {}).get("resourceVersion")
            if given is not None and given != current["metadata"]["resourceVersion"]:
                message = (
                    f'Operation cannot be fulfilled on {resource.qualified} "{name}": the object has been modified; '
                    "please apply your changes to the latest version and try again"
                )
                raise ApiError(409, "Conflict", message, name=name, group=resource.group, kind=resource.plural)
            if status:
                new = deepcopy(current) | {"status": new.get("status", {})}
            elif resource.custom:
                new.pop("status", None)
                new |= {"status": deepcopy(current["status"])} if "status" in current else {}
            kept = ("name", "namespace", "uid", "creationTimestamp", "generation", "resourceVersion", "managedFields")
            new["metadata"] |= {key: current["metadata"][key] for key in kept if key in current["metadata"]}
            new |= {"apiVersion": resource.api_version, "kind": resource.kind}
            if new == current:
                return deepcopy(current)
            if resource.custom and new.get("spec") != current.get("spec"):
                new["metadata"]["generation"] += 1
            _note_manager(new["metadata"], resource, manager, status)
            return self._keep("MODIFIED", resource, new)

    def delete(self, resource: Resource, namespace: str, name: str) -> Object:
        with self._changed:
            gone = deepcopy(self._find(resource, namespace, name))
            del self._objects[resource, namespace, name]
            return self._note("DELETED", resource, gone)

    def since(self, version: int, wait_s: float = 0) -> list[Change]:
        """What happened after `version`; waits until something has, at most `wait_s`."""
        with self._changed:
            self._changed.wait_for(lambda: self._version > version, wait_s)
            return [change for change in self._history if change.version > version]

    def _find(self, resource: Resource, namespace: str, name: str) -> Object:
        found = self._objects.get((resource, namespace, name))
        if found is None:
            message = f'{resource.qualified} "{name}" not found'
            raise ApiError(404, "NotFound", message, name=name, group=resource.group, kind=resource.plural)
        return found

    def _keep(self, kind: str, resource: Resource, new: Object) -> Object:
        metadata = new["metadata"]
        new = self._note(kind, resource, new)
        self._objects[resource, metadata["namespace"], metadata["name"]] = new
        return deepcopy(new)

    def _note(self, kind: str, resource: Resource, new: Object) -> Object:
        self._version += 1
        new["metadata"]["resourceVersion"] = str(self._version)
        self._history.append(Change(self._version, kind, resource, deepcopy(new)))
        self._changed.notify_all()
        return new


def now() -> str:
    """The time as Kubernetes writes it, to the second."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def _note_manager(metadata: Object, resource: Resource, manager: str, status: bool) -> None:
    """An entry per manager; its time is that of its last change of a value."""
    entry = {"manager": manager, "operation": "Update", "apiVersion": resource.api_version, "time": now()}
    if status:
        entry["subresource"] = "status"
    others = [
        each
        for each in metadata.get("managedFields", [])
        if (each["manager"], each.get("subresource")) != (manager, entry.get("subresource"))
    ]
    metadata["managedFields"] = [*others, entry]


def _invalid(resource: Resource, name: str, why: str) -> ApiError:
    message = f'{resource.kind} "{name}" is invalid: {why}'
    return ApiError(422, "Invalid", message, name=name, group=resource.group, kind=resource.kind)
