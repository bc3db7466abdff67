"""The typed Python face of the C++ kernels, and the array-library back ends."""
