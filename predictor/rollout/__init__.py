"""Canary rollouts: rules and evidence in, one decision out, and a thin shell that patches the InferenceService."""
