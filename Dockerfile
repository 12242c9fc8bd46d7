# megatron_amd for NVIDIA GPUs, with Transformer Engine and Apex.
#
#   docker build -t megatron_amd .
#   docker run --rm --gpus all --ipc=host --ulimit memlock=-1 -v "$PWD/runs:/workspace/runs" megatron_amd \
#       torchrun --nproc-per-node 8 -m megatron_amd.train --config /opt/megatron_amd/examples/gpt/llama_amm.yaml
#
# Nothing needs root at run time: add --user "$(id -u):$(id -g)" -e HOME=/tmp, or use Enroot or Apptainer.
#
# NVIDIA's PyTorch image has a PyTorch, CUDA, NCCL and Transformer Engine that were built and tested together, and it
# is what Megatron-LM's own tests run on. Compiling the same from nvidia/cuda takes an hour and matches less well.
ARG BASE_IMAGE=nvcr.io/nvidia/pytorch:26.08-py3
FROM ${BASE_IMAGE}

ARG MEGATRON_CORE=0.19.2
# Apex (NVIDIA's, from source: `apex` on PyPI is an unrelated package) for its fused optimizer kernels.
ARG APEX_COMMIT=10417aceddd7d5d05d7cbf7b0fc2daad1105f8b4
ARG MAX_JOBS=8

SHELL ["/bin/bash", "-euo", "pipefail", "-c"]

# Only where the base image comes without Apex. amp_C is its compiled part, the one that matters.
RUN python -c "import torch, amp_C" 2>/dev/null \
    || APEX_CPP_EXT=1 APEX_CUDA_EXT=1 MAX_JOBS="${MAX_JOBS}" NVCC_APPEND_FLAGS="--threads 4" \
       python -m pip install --no-cache-dir --no-build-isolation \
           "apex @ git+https://github.com/NVIDIA/apex.git@${APEX_COMMIT}"

COPY . /opt/megatron_amd

# The base pins every package that it was built with in PIP_CONSTRAINT, older ones than ours among them. Only its
# PyTorch must stay: a constraint of our own keeps the very build, and the last line fails the build otherwise.
RUN python -c "import torch; print('torch==' + torch.__version__)" > /tmp/constraint.txt \
    && PIP_CONSTRAINT=/tmp/constraint.txt python -m pip install --no-cache-dir \
        "megatron-core==${MEGATRON_CORE}" "/opt/megatron_amd[demo]" \
    && rm /tmp/constraint.txt \
    && python -c "import torch, amp_C, transformer_engine.pytorch, megatron.core, megatron_amd; assert torch.version.cuda"

WORKDIR /workspace
CMD ["python", "-m", "megatron_amd.train", "--help"]
