"""Files in and out: where a checkpoint is, what is in it, its tokenizer. No code from a checkpoint ever runs."""
