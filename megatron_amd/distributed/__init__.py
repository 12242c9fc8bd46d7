"""Process groups, layouts and pipeline passes. The only package that touches process-wide state.

Importing it makes `megatron.core` importable on a machine without a GPU and keeps the terminal quiet; every module
that imports `megatron.core` imports this package first.
"""

import logging
import os
import warnings

from megatron_amd.distributed import cpu

# Kernels then start in the order in which they are queued, on which Megatron-Core's overlap of tensor-parallel
# communication relies. CUDA reads it once, when it starts.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")

# Memory that NCCL registers while a CUDA graph is recorded must not be moved afterwards, as PyTorch's allocator may do
# with expandable segments: Megatron-Core asks for this where it records graphs.
os.environ.setdefault("NCCL_GRAPH_REGISTER", "0")

cpu.install_where_cuda_is_absent()

# A build of torch with CUDA, on a machine without a GPU, says so when Megatron-Core imports this.
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
with warnings.catch_warnings():  # both warn at import that Transformer Engine or Apex is missing, which we know
    warnings.simplefilter("ignore")
    import megatron.core.models.gpt.gpt_layer_specs
    import megatron.core.optimizer
    import megatron.core.transformer.transformer_block  # noqa: F401

cpu.map_rng_state_of_megatron()
logging.getLogger("megatron.core").setLevel(logging.ERROR)
