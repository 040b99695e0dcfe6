"""Benchmarks of quantisation and pruning: networks with trained weights, peers, and what is compared on them.

    python benchmarks/quantization train            # the networks that no package ships (about an hour on two cores)
    python benchmarks/quantization nets             # their validation numbers
    python benchmarks/quantization ptq              # quantize against NNCF, ONNX Runtime and torchao
    python benchmarks/quantization search           # uniform formats and effective bits, net by net
    python benchmarks/quantization four-bits        # the GPT with 4-bit weights, against torchao and GPTQ by the book
    python benchmarks/quantization pruning          # 30 % pruned and trained in 8 bits, against others
    python benchmarks/quantization joint            # channels and bits together, against one after the other
    python benchmarks/quantization exports          # every integer format as an ONNX file with QDQ nodes

Each verb goes on where it stopped, and writes to benchmarks/results what it found.
"""
