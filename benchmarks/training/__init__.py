"""Benchmarks of training: the step against other trainers and loops, and what feeds it.

    python benchmarks/training step                 # samples a second and peak memory, against Hugging Face and others
    python benchmarks/training step --only bert-32x128
    python benchmarks/training gpt                  # a GPT of 12 M parameters on a CPU, against a loop by hand
    python benchmarks/training lora                 # adapters, against Hugging Face with PEFT
    python benchmarks/training loss                 # do the defaults learn what fp32 learns?
    python benchmarks/training memory               # limits of memory: kept, and at what cost?
    python benchmarks/training packing              # fill, planning time and padding on lengths by Zipf's law
    python benchmarks/training all --budget-seconds 420    # what is missing of these, in the order of importance

Each verb goes on where it stopped or begins anew, and writes to benchmarks/results what it found.
"""
