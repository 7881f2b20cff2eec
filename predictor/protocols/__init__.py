"""One module per wire format: dictionaries to our types and back. Pure functions: no FastAPI, no KServe, no torch."""
