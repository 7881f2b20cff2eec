"""`python -m predictor`, and the console script `gpt2-predictor`."""

import signal
import sys

# In a container this process is PID 1, and the kernel drops SIGTERM for it until a handler stands. The imports below
# take a second; the server installs its own handlers later.
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))

from predictor.cli import main  # noqa: E402 - after the handler, on purpose

if __name__ == "__main__":
    main()
