"""Importance of a layer's inputs: statistics files of ``calibrate`` and llama.cpp's imatrix."""
