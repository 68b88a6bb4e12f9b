"""Compile constant fan-in sparse PyTorch models to fast CPU kernels."""
