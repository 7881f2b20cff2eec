"""A side room: how near a number format comes to float32 on a text. Only the command line imports it."""
