# DreamLoom for a machine with an NVIDIA GPU: docker build -t dreamloom .
# docs/container.md says how to run it. The wheel is built in a stage of its own, so that neither
# the sources nor what builds them are in the image.

FROM nvidia/cuda:13.0.1-runtime-ubuntu24.04 AS wheel
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /build
COPY constraints.txt ./
RUN python3 -m venv tools && tools/bin/pip install --no-cache-dir hatchling -c constraints.txt
COPY LICENSE README.md pyproject.toml ./
COPY examples ./examples
COPY src ./src
RUN tools/bin/python -m hatchling build -t wheel -d dist

FROM nvidia/cuda:13.0.1-runtime-ubuntu24.04
# The compiler is for train.compile: torch builds kernels for the GPU that it finds.
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
# Torch goes first and alone: it is most of the image and changes least. On Linux pip brings the
# build for CUDA.
COPY constraints.txt /opt/
RUN python3 -m venv /opt/dreamloom \
    && /opt/dreamloom/bin/pip install --no-cache-dir torch==2.13.0 -c /opt/constraints.txt
COPY --from=wheel /build/dist /opt/dist
RUN for wheel in /opt/dist/*.whl; do /opt/dreamloom/bin/pip install --no-cache-dir \
    "$wheel[faces,heic,optimizers,studio]" -c /opt/constraints.txt || exit 1; done

# Ubuntu's own user has the number 1000, which most people's files have: it is given to ours.
RUN userdel --remove ubuntu; useradd --create-home --uid 1000 loom \
    && mkdir -p /runs /cache \
    && chown loom:loom /runs /cache
ENV PATH=/opt/dreamloom/bin:$PATH \
    HF_HOME=/cache/huggingface \
    DREAMLOOM_MODELS=/cache/models \
    TORCH_EXTENSIONS_DIR=/cache/torch_extensions \
    TORCHINDUCTOR_CACHE_DIR=/cache/inductor \
    TRITON_CACHE_DIR=/cache/triton
VOLUME ["/runs", "/cache"]
# What a command writes to its default, runs/, lies in the volume.
WORKDIR /
USER loom
EXPOSE 8787
ENTRYPOINT ["dreamloom"]
# The password comes from DREAMLOOM_PASSWORD: on a command line every process could read it.
CMD ["studio", "--listen", "0.0.0.0", "--root", "/runs"]
