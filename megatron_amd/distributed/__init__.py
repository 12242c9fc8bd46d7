"""Process groups, layouts and pipeline passes. The only package that touches process-wide state.

Importing it makes `megatron.core` importable on a machine without a GPU and keeps the terminal quiet; every module
that imports `megatron.core` imports this package first.
"""

import logging
import warnings

from megatron_amd.distributed import cpu

cpu.install_where_cuda_is_absent()

with warnings.catch_warnings():  # both warn at import that Transformer Engine or Apex is missing, which we know
    warnings.simplefilter("ignore")
    import megatron.core.models.gpt.gpt_layer_specs
    import megatron.core.optimizer
    import megatron.core.transformer.transformer_block  # noqa: F401

cpu.map_rng_state_of_megatron()
logging.getLogger("megatron.core").setLevel(logging.ERROR)
