"""A canary on one machine: what is real, and what stands for a cluster.

Real: the predictors (`predictor serve` processes, one per revision), the proxy that splits the traffic (Envoy), the
monitoring (Prometheus), the controller under test (`predictor rollout`), the clients' HTTP.
A stub: the Kubernetes API (`apiserver.py`) and what KServe and Knative do with an InferenceService
(`kserve_controller.py`), as far as a rollout sees them.

    load.py -> envoy.py -> predictors (revisions.py, faulty.py) <- prometheus.py <- predictor rollout
                  ^              ^                                                        |
                  +--------------+---- kserve_controller.py <-> apiserver.py <------------+

`cluster.py` puts them together. Everything listens on 127.0.0.1, on free ports.
"""
