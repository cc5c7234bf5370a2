# docker build -t pymcip .
# docker run --rm -v "$PWD:/data" pymcip demo --smoke
#
# For NVIDIA GPUs, with the compiled CUDA kernels (docker run --gpus all):
# docker build -t pymcip --build-arg BASE=nvidia/cuda:12.9.1-devel-ubuntu24.04 \
#   --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu129 .
ARG BASE=ubuntu:24.04
FROM $BASE
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN apt-get update \
  && apt-get install -y --no-install-recommends ca-certificates g++ python3-dev python3-venv \
  && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/pymcip
ENV PATH=/opt/pymcip/bin:$PATH
RUN pip install --no-cache-dir --index-url $TORCH_INDEX torch torchvision
COPY . /src
RUN cd /src && pip install --no-cache-dir ".[demo,faiss,serve]"
WORKDIR /data
ENTRYPOINT ["pymcip"]
CMD ["--help"]
