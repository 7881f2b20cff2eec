"""Asynchronous requests: where jobs are kept (SQLite or Redis), and the worker that runs them. No HTTP server here."""
