"""`python -m predictor`: the same commands as the console script `gpt2-predictor`."""

from predictor.cli import main

if __name__ == "__main__":
    main()
