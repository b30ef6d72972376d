"""Where data lives: arrays on CPUs and GPUs, NCCL's own memory, and how much memory is free."""
