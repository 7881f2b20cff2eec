"""GPT-2's step on CPU in C++: packed weights, one parallel region, attention in place. See kernels.cpp."""
