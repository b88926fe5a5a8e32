# topd_ray with every package of requirements/cpu.txt or gpu.txt. `make docker` builds it; docs/docker.md tells the rest.
#
#   DEVICE                cpu or gpu: which lock is installed, and on which base
#   CPU_BASE, GPU_BASE    a Debian or Ubuntu with Python 3.11 or 3.12, or whose own packages have one
#   secrets pip.conf, ca  pip's configuration and the certificates that it trusts; they stay out of the image
ARG DEVICE=cpu
ARG CPU_BASE=python:3.11.14-slim-bookworm@sha256:65a93d69fa75478d554f4ad27c85c1e69fa184956261b4301ebaf6dbb0a3543d
# The smallest flavour: torch's CUDA libraries are in gpu.txt. Kernels that are compiled at run time need a -devel- one.
ARG GPU_BASE=nvidia/cuda:13.0.3-base-ubuntu24.04@sha256:7c7413a56200486f71f181cad9310f6fd31b6bb21816ade15fc9c1e1e927a5c1

FROM ${CPU_BASE} AS base-cpu
FROM ${GPU_BASE} AS base-gpu

# What never changes with the code or the lock.
FROM base-${DEVICE} AS system
# torch.compile and Triton call g++ with Python's headers while a run goes on. libnuma1 is linked into vLLM's CPU build.
# tini hands signals on and reaps what dead Ray workers leave behind. KubeRay before 1.6 calls wget in its probes.
RUN set -eu; \
    packages="ca-certificates g++ libnuma1 tini wget"; \
    python3 -c 'import ensurepip, os, sysconfig, venv; os.stat(sysconfig.get_path("include") + "/Python.h")' \
        2> /dev/null || packages="$packages python3-dev python3-venv"; \
    apt-get update; \
    DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends $packages; \
    apt-get clean; \
    rm -rf /var/lib/apt/lists/* /var/log/apt /var/log/dpkg.log
# Whoever starts the container may name another user, who needs a home and a run folder too: both are open, as /tmp is.
# Login shells, which KubeRay starts, set PATH anew from /etc/profile.
RUN useradd --uid 10001 --no-create-home --home-dir /home/topd --shell /bin/bash topd && \
    mkdir -m 1777 /home/topd && mkdir /opt/topd && mkdir -m 1777 /opt/topd/runs && \
    echo 'export PATH=/opt/topd/.venv/bin:$PATH' > /etc/profile.d/topd.sh
WORKDIR /opt/topd

FROM system AS packages
ARG DEVICE
COPY requirements/setup.sh requirements/installed.py requirements/${DEVICE}.txt requirements/
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    --mount=type=secret,id=ca \
    --mount=type=cache,target=/root/.cache/pip \
    if [ -s /run/secrets/ca ]; then export PIP_CERT=/run/secrets/ca; fi; \
    bash requirements/setup.sh packages || { tail -n 40 build/setup-step.log; exit 1; }

FROM system
ENV PATH=/opt/topd/.venv/bin:$PATH \
    HOME=/home/topd \
    USER=topd \
    PYTHONUNBUFFERED=1 \
    DO_NOT_TRACK=1 \
    RAY_USAGE_STATS_ENABLED=0 \
    RAY_AUTH_MODE=token
COPY --from=packages /opt/topd/.venv .venv
# A checkout made under a strict umask is still readable to every user of the image.
COPY --chmod=0755 . .
RUN python -m pip install --no-deps --no-index --no-build-isolation --root-user-action=ignore --editable . && \
    python -m compileall -q topd_ray
ARG REVISION
LABEL org.opencontainers.image.licenses=Apache-2.0 org.opencontainers.image.revision=$REVISION
USER 10001:10001
# Broken packages, a missing library, a GPU that the container lost: what a process that still runs does not tell.
HEALTHCHECK --interval=60s --timeout=30s --start-period=30s --retries=3 CMD ["topd", "doctor"]
ENTRYPOINT ["tini", "--", "topd"]
CMD ["doctor"]
