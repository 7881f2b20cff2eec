"""`python -m predictor`, and the console script `gpt2-predictor`."""

import os
import signal
import sys

# In a container this process is PID 1, and the kernel drops SIGTERM for it until a handler stands. The imports below
# take a second; the server installs its own handlers later. A server or a worker that is stopped has done its work (0),
# and has nothing to clean up yet: it leaves at once, as an exception may come out of a library's callback as another
# one. Any other command cleans up, and has not done its work (143 = 128 + SIGTERM).
_SERVES = sys.argv[1:2] in (["serve"], ["worker"])
signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if _SERVES else sys.exit(143))

from predictor.cli import main  # noqa: E402 - after the handler, on purpose

if __name__ == "__main__":
    main()
