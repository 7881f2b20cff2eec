"""A KServe custom predictor for GPT-2. Start at docs/architecture.md; the commands are in cli.py."""

__version__ = "0.1.0"
