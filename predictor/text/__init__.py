"""Text in, text deltas out: tokenizer, detokenizer, stop strings, banned strings. No HTTP, no wire formats."""
