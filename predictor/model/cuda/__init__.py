"""The CUDA path of a decode step: our kernels, their build, the graphs that replay them, sampling on the device."""
