"""A contestant's process: loads one model, then answers JSON lines on stdin with JSON lines on stdout.

Its first line is {"ready": true, "import_s", "load_s", "imported_bytes", "versions"} or {"error"}. Then

    {"op": "generate", "prompts": [[ids], ...], "new_tokens": N}  ->  {"seconds", "tokens", "ids": [[ids], ...]}

or {"error"}, after which it still answers. It ends with its stdin. Run in the engine's environment, so this imports
only the standard library until it knows which engine.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib
import importlib.metadata
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from benchmarks.contestants.engine import Engine, EngineModule, Sizes


def resident_bytes(key: str = "VmRSS", process: int | str = "self") -> int:
    """What Linux says of a process: VmRSS is now, VmHWM the most so far."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(status.split(f"{key}:")[1].split()[0]) * 1024


def answer(engine: Engine, request: dict[str, Any]) -> dict[str, Any]:
    if request.get("op") != "generate":
        return {"error": f"unknown op {request.get('op')!r}: only generate is known"}
    prompts, new_tokens = request["prompts"], request["new_tokens"]
    began = time.perf_counter()
    ids = engine.generate(prompts, new_tokens)
    seconds = time.perf_counter() - began
    counts = sorted({len(each) for each in ids})
    if len(ids) != len(prompts) or counts != [new_tokens]:
        return {"error": f"asked {len(prompts)} prompts for {new_tokens} tokens each, got {len(ids)} with {counts}"}
    return {"seconds": seconds, "tokens": len(ids) * new_tokens, "ids": ids}


def serve(module_name: str, model: Path, settings: dict[str, Any], sizes: Sizes, out: TextIO) -> None:
    def say(line: dict[str, Any]) -> None:
        print(json.dumps(line), file=out, flush=True)

    began = time.perf_counter()
    try:
        module = _module(module_name)
        imported, imported_bytes = time.perf_counter(), resident_bytes()
        engine = module.load(model, settings, sizes)
    except Exception as error:  # a library raises what it likes; the reader decides
        say({"error": _reason(error)})
        raise
    versions = {package: importlib.metadata.version(package) for package in module.PACKAGES}
    times = {"import_s": imported - began, "load_s": time.perf_counter() - imported}
    say({"ready": True, **times, "imported_bytes": imported_bytes, "versions": versions})
    for line in sys.stdin:
        try:
            say(answer(engine, json.loads(line)))
        except Exception as error:
            say({"error": _reason(error)})
    os._exit(0)  # nothing to save, and threads of some libraries would hold up an orderly end


def _module(name: str) -> EngineModule:
    return importlib.import_module(f"benchmarks.contestants.{name}")


def _reason(error: Exception) -> str:
    first_line = str(error).strip().splitlines()[:1]
    return f"{type(error).__name__}: {first_line[0] if first_line else 'no message'}"


def private_stdout() -> TextIO:
    """Stdout for this module alone; what libraries print there goes to stderr from now on."""
    mine = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return mine


def end_with_parent() -> None:
    """Ask Linux to end this process when its parent ends, so that no model stays behind computing."""
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def main() -> None:
    end_with_parent()
    parser = argparse.ArgumentParser(description="Run one contestant; benchmarks/peers.py starts this.")
    parser.add_argument("action", choices=["convert", "serve"])
    parser.add_argument("engine", help="a module of benchmarks.contestants")
    parser.add_argument("--model", type=Path, help="what the engine loads, or converts from")
    parser.add_argument("--out", type=Path, help="convert: the folder to write")
    parser.add_argument("--conversion", help="convert: what to write")
    parser.add_argument("--settings", type=json.loads, default={}, help="serve: the engine's settings, JSON")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--most-sequences", type=int, default=1)
    parser.add_argument("--most-tokens", type=int, default=1024)
    given = parser.parse_args()
    out = private_stdout()
    if given.action == "convert":
        _module(given.engine).convert(given.model, given.out, given.conversion)
        return
    sizes = Sizes(given.threads, given.most_sequences, given.most_tokens)
    with contextlib.suppress(BrokenPipeError):  # the reader has gone
        serve(given.engine, given.model, given.settings, sizes, out)


if __name__ == "__main__":
    main()
