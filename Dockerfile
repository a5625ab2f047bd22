# qwenlora over CUDA, with the versions of constraints.txt:
#   make dist && docker build -t qwenlora .
#   docker run --rm --gpus all --ipc host -v "$PWD:/work" qwenlora train my.yaml
# apptainer.def is the same for Apptainer. The base has the CUDA of torch's wheels on PyPI (drivers from 580 on), and a
# compiler, with which Triton and DeepSpeed build kernels when they are first used.
FROM nvidia/cuda:13.0.2-devel-ubuntu24.04

# Ubuntu keeps no older versions of its packages, so they cannot be pinned
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3.12-venv python3.12-dev gcc g++ openssh-client \
    && rm -rf /var/lib/apt/lists/*

COPY constraints.txt /opt/
COPY dist/*.whl /opt/dist/
RUN python3.12 -m venv /opt/qwenlora \
    && /opt/qwenlora/bin/pip install --no-cache-dir --constraint /opt/constraints.txt setuptools wheel torch \
    && /opt/qwenlora/bin/pip install --no-cache-dir --constraint /opt/constraints.txt /opt/dist/*.whl
ENV PATH=/opt/qwenlora/bin:$PATH

WORKDIR /work
# it trains without a network
RUN --network=none export CUDA_VISIBLE_DEVICES='' && qwenlora init demo \
    && qwenlora train demo.yaml train.max_steps=2 && rm -rf demo.yaml runs

ENTRYPOINT ["qwenlora"]
