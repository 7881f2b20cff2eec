"""Who may ask, how often, and for what: API keys, rate limits, banned prompts and strikes. Knows no HTTP."""
