"""How many replicas, and why: capacity of a GPU, Knative's autoscaler, a queue that it scales, and what it costs.

`python -m benchmarks.scaling --help`; the results are explained in docs/scaling.md.
"""
