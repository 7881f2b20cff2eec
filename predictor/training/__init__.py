"""A side room: text files in, a Hugging Face folder of a GPT-2 out. Only the command line imports it.

It trains transformers' own GPT-2 module: our forward (`predictor.model`) is for inference, without backward.
"""
