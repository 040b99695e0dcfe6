"""Benchmarks of training: the step against other trainers, on a GPU.

    python benchmarks/training step                 # samples a second and peak memory, against Hugging Face and a loop
    python benchmarks/training step --only bert-32x128

Each verb goes on where it stopped, and writes to benchmarks/results what it found.
"""
