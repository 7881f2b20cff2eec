"""Token ids in, token ids out: scheduling, KV memory, sampling. No text, no HTTP, no files."""
