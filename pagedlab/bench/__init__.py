"""What is measured: `cache` (bookkeeping), `engine` (tokens a second on a real model), `kernel` (attention, with
`kernel_grid` for the CPU, `kernel_gpu` and `kernel_gpu_prefill` for GPUs), `kernel_resources` (registers and spills of
the Triton kernels, without a GPU), `layouts` (block tables without a kernel), `replay` (one cache, a stream of
accesses), `simulate` (the engine on a virtual clock). `figures` draws some of it.

Each module has a ``main(json)`` that the command line calls. Contenders run side by side in one process, alternating;
medians and ratios are reported.
"""

ONE_BYTE = ("int8", "fp8")
"""Dtypes of `kernel_grid`'s rows over caches of one byte a channel."""
