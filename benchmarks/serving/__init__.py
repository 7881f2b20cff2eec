"""What `benchmarks/server.py` is made of: what is asked, who answers it with and without HTTP, and the figures.

`workload`, `load` and `figures` are pure; `client` and `alone` answer; `processes` are both seen from outside.
"""
