# All of requirements.txt and requirements-cuda.txt, Mamba-1's CUDA kernels included. `./mamba-container.sh build`
# builds it for the GPUs of this machine; by hand:
#
#   docker build --build-arg TORCH_CUDA_ARCH_LIST="8.6;9.0" --tag sirs-mamba .
#
# Without a GPU and without these kernels: docker build --target cpu --tag sirs-cpu .
#
# The base must have nvcc of the CUDA version that its torch was built with.
ARG BASE_IMAGE=docker.io/pytorch/pytorch:2.11.0-cuda13.0-cudnn9-devel
FROM docker.io/library/python:3.12-slim AS cpu
# The project is mounted over WORKDIR; what pip installs of it are its requirements.
ENV PIP_ROOT_USER_ACTION=ignore PYTHON=python3 PYTHONPATH=/workspace/sirs
WORKDIR /opt/sirs
COPY pyproject.toml dereflect.py README.md LICENSE requirements.txt ./
COPY util/wheel.py util/
# The first of them from PyTorch's index of builds without CUDA, which are smaller.
RUN python3 -m pip install --no-cache-dir --index-url https://download.pytorch.org/whl/cpu \
        $(sed -n 's/^ *"\(torch[a-z]*[<>=][^"]*\)".*/\1/p' pyproject.toml) && \
    python3 -m pip install --no-cache-dir -r requirements.txt
WORKDIR /workspace/sirs
CMD ["bash"]

FROM ${BASE_IMAGE} AS cuda

# The base's Python is the system's own, which Ubuntu has pip refuse to install into. Here it has no other use.
ENV PIP_BREAK_SYSTEM_PACKAGES=1 \
    PIP_ROOT_USER_ACTION=ignore \
    PYTHON=python3 \
    PYTHONPATH=/workspace/sirs

WORKDIR /opt/sirs
COPY pyproject.toml dereflect.py README.md LICENSE requirements.txt requirements-cuda.txt ./
COPY util/wheel.py util/
RUN python3 -m pip install --no-cache-dir -r requirements.txt

# The GPUs to build for, and compilers at once: each wants some 4 GB of memory, and without ninja there is only one.
ARG TORCH_CUDA_ARCH_LIST="8.0;8.6;8.9;9.0"
ARG MAX_JOBS=4
# Without these variables recent versions leave Mamba-1's kernels out, or take some that another torch was built with.
# The last line fails where they were left out nevertheless; loading them would take a GPU's driver.
RUN python3 -m pip install --no-cache-dir "ninja>=1.11" "packaging>=21" "setuptools>=61" "wheel>=0.37" "hatchling>=1.27" && \
    CAUSAL_CONV1D_FORCE_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE MAMBA_KEEP_CUDA_BUILD=TRUE \
    TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST}" MAX_JOBS="${MAX_JOBS}" \
    python3 -m pip install --no-cache-dir --no-build-isolation -r requirements-cuda.txt && \
    python3 -c "from importlib.util import find_spec as f; assert f('selective_scan_cuda') and f('causal_conv1d_cuda')"

WORKDIR /workspace/sirs
CMD ["bash"]
