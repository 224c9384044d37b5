"""The functions of `grid.py`, fused: one file per backend."""
