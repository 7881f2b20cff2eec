"""The Kubernetes API, as far as a rollout needs it: read a service, patch it, post Events."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import cast

import kubernetes
import urllib3.exceptions

from predictor.errors import ConfigurationError, PredictorError
from predictor.rollout.rules import one_line
from predictor.rollout.service import MANAGER, Json, Service, now

_TIMEOUT_S = 10


class ClusterError(PredictorError):
    """The Kubernetes API refused or could not be reached; it may work the next time."""

    code = "cluster"


class Conflict(ClusterError):
    """Somebody else changed the service since it was read."""


class Cluster:
    """One InferenceService of a cluster: that of KUBECONFIG, or the one this process runs in."""

    def __init__(self, name: str, namespace: str) -> None:
        self.name, self.namespace = name, namespace
        self._path = "serving.kserve.io", "v1beta1", namespace, "inferenceservices", name
        _load_config()
        configuration = kubernetes.client.Configuration.get_default_copy()
        configuration.retries = 0  # the next look comes soon; a Retry-After of minutes would make the watcher deaf
        client = kubernetes.client.ApiClient(configuration)
        self._services = kubernetes.client.CustomObjectsApi(client)
        self._core = kubernetes.client.CoreV1Api(client)

    def read(self) -> Service:
        """The service as it is; raises `ClusterError`."""
        with self._errors("read"):
            found = self._services.get_namespaced_custom_object(*self._path, _request_timeout=_TIMEOUT_S)
            return Service(cast(Json, found))

    def patch(self, patch: Json) -> None:
        """Apply a merge patch; raises `Conflict` where the resourceVersion in it is an old one, or `ClusterError`."""
        with self._errors("patch"):
            self._services.patch_namespaced_custom_object(
                *self._path,
                patch,
                field_manager=MANAGER,
                _content_type="application/merge-patch+json",
                _request_timeout=_TIMEOUT_S,
            )

    def tell(self, service: Service, kind: str, message: str, *, warning: bool) -> None:
        """Post an Event about the service, which `kubectl describe` shows; raises `ClusterError`."""
        time = now()
        event = kubernetes.client.CoreV1Event(
            metadata=kubernetes.client.V1ObjectMeta(generate_name=f"{self.name}-rollout-", namespace=self.namespace),
            involved_object=kubernetes.client.V1ObjectReference(**service.reference),
            type="Warning" if warning else "Normal",
            reason=f"Rollout{kind}",
            message=message[:1024],  # the API's limit
            first_timestamp=time,
            last_timestamp=time,
            count=1,
            source=kubernetes.client.V1EventSource(component=MANAGER),
        )
        with self._errors("create events for"):
            self._core.create_namespaced_event(self.namespace, event, _request_timeout=_TIMEOUT_S)

    def told(self) -> list[tuple[datetime, str]]:
        """What was told about the service, oldest first; the cluster forgets after an hour, as a rule."""
        about = f"involvedObject.kind=InferenceService,involvedObject.name={self.name}"
        with self._errors("list events of"):
            events = self._core.list_namespaced_event(
                self.namespace, field_selector=about, _request_timeout=_TIMEOUT_S
            ).items
        ours = [each for each in events if each.source is not None and each.source.component == MANAGER]
        return sorted((each.last_timestamp, each.message or "") for each in ours if each.last_timestamp is not None)

    @contextmanager
    def _errors(self, verb: str) -> Iterator[None]:
        what = f"the InferenceService {self.name} in the namespace {self.namespace}"
        try:
            yield
        except kubernetes.client.ApiException as error:
            if error.status == 409:
                raise Conflict(f"{what} was changed by somebody else meanwhile") from error
            hint = {
                401: "; the credentials in KUBECONFIG are not accepted",
                403: f"; this account needs the right to {verb} it",
                404: "; see `kubectl get inferenceservices --all-namespaces`",
            }.get(error.status, "")
            raise ClusterError(f"cannot {verb} {what}: {_reason(error)}{hint}") from error
        except (TypeError, ValueError, LookupError, AttributeError) as error:  # the client's, and ours on reading it
            text = one_line(f"{type(error).__name__}: {error}")
            raise ClusterError(f"cannot {verb} {what}: the Kubernetes API's answer makes no sense: {text}") from error
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise ClusterError(
                f"cannot {verb} {what}: the Kubernetes API cannot be reached: {one_line(str(error))}"
            ) from error


def _load_config() -> None:
    tried = []
    for load in (kubernetes.config.load_kube_config, kubernetes.config.load_incluster_config):
        try:
            load()
            return
        except Exception as error:  # a damaged file raises whatever its parser, or a missing key, raises
            tried.append(one_line(str(error)))
    raise ConfigurationError(f"no cluster is configured: KUBECONFIG: {tried[0]}; as in a pod: {tried[1]}")


def _reason(error: kubernetes.client.ApiException) -> str:
    """What the API said, one line."""
    try:
        return one_line(str(json.loads(error.body or "")["message"]))
    except (TypeError, ValueError, KeyError):
        return f"{error.status} {error.reason}"
