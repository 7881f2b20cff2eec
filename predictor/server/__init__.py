"""HTTP: the KServe model, our routes, the error map. The only room, with the CLI's serve, that knows KServe."""
