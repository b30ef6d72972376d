"""What the GPU transports share: streams, GPU ownership, NVML, NCCL's log and row kernels."""
