"""`python -m predictor`, and the console script `gpt2-predictor`."""

import signal
import sys

# In a container this process is PID 1, and the kernel drops SIGTERM for it until a handler stands. The imports below
# take a second; the server installs its own handlers later. A server that is stopped has done its work (0); any other
# command has not (143 = 128 + SIGTERM).
_EXIT_CODE = 0 if sys.argv[1:2] == ["serve"] else 143
signal.signal(signal.SIGTERM, lambda *_: sys.exit(_EXIT_CODE))

from predictor.cli import main  # noqa: E402 - after the handler, on purpose

if __name__ == "__main__":
    main()
