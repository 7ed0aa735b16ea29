"""What `--device` and `--part` leave out: tests of the CPU alone, and those of other parts."""

import zlib

# Modules that are of the CPU alone, by reason; a single test says so by the marker `cpu`.
CPU_ALONE = {
    "the compiled engine": "16_bits architectures core cuts_of_engine functions threads",
    "bits that the CPU engine promises": "invariance",
    "the fast path past torch's dispatcher": "fast_path",
    "NumPy": "math numpy numpy_input stream",
    "packed weights, which are the CPU's": "freeze freeze_hostile freeze_int8 stream_torch",
    "ONNX Runtime": "onnx onnx_node",
    "the package, its commands and documents": "bench documents init main report",
    "no operator of torch's runs, which is cuDNN's way": "torchs_operators",
    "they choose their devices themselves": (
        "bench_gpu cuda_compiler cuda_decisions cuda_fast cuda_kept cuda_kernels cuda_launch "
        "cuda_layer cuda_report cuda_trial gpu"
    ),
}
REASONS = {f"test_{name}": why for why, names in CPU_ALONE.items() for name in names.split()}


def is_in_part(name, part):
    """Whether a test of this name is of a part such as "2/5"; equal names are of equal parts."""
    number, parts = map(int, part.split("/"))
    return zlib.crc32(name.encode()) % parts == number - 1
