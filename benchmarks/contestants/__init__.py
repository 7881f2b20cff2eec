"""What `benchmarks/peers.py` is made of: who takes part, each one's engine, its process, and the figures.

An engine module imports its library and nothing of the others, so that each runs in its own environment; `contest`,
`figures` and `report` know no engine.
"""
