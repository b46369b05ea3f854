# The server, with torch for the CPU:  docker build -t optserve .
#   --build-arg TORCH=cuda          torch for CUDA, which is several GB
#   --build-arg TORCH_INDEX=<url>   torch from this index (pip's --index-url)
#   --build-arg BASE=<image>        another image with Python 3.11 or later and its venv
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_PROGRESS_BAR=off PIP_ROOT_USER_ACTION=ignore
RUN python3 -m venv /opt/optserve
WORKDIR /src
ARG TORCH=cpu
ARG TORCH_INDEX=""
COPY scripts/image-torch scripts/
COPY constraints.txt ./
# First and in a layer of its own: it is the largest part and changes least.
RUN sh scripts/image-torch /opt/optserve/bin/python "$TORCH" "$TORCH_INDEX"
COPY client client
COPY service service
RUN /opt/optserve/bin/python -m pip install --quiet -c constraints.txt ./client "./service[postgres]" \
    && /opt/optserve/bin/python -m pip uninstall --quiet --yes pip setuptools \
    && find /opt/optserve -type d \( -path '*/torch/include' -o -path '*/torch/share' -o -path '*/torch/test' \) \
       -prune -exec rm -r {} + \
    && /opt/optserve/bin/python -c "import optserve.api.app"

FROM ${BASE}
RUN useradd --system --no-create-home --uid 10001 optserve && mkdir /data && chown optserve /data
COPY --from=build /opt/optserve /opt/optserve
# Settings of the container are variables, so that the health check has them, too. Inside of it every
# interface is the container's own: publish the port on loopback only. What a server on PostgreSQL keeps for a while
# goes to the volume as well: /tmp may be memory.
ENV PATH=/opt/optserve/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    OPTSERVE_HOST=0.0.0.0 OPTSERVE_PORT=8000 OPTSERVE_DATA_DIR=/data TMPDIR=/data
USER optserve
VOLUME /data
EXPOSE 8000
HEALTHCHECK --interval=5s --timeout=15s --start-period=60s --retries=3 CMD ["optserve", "health"]
ENTRYPOINT ["optserve"]
CMD ["serve"]
