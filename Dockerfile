# dvit_infer for CPUs, with OpenVINO and the server, from the wheel that `make dist` leaves in dist/:
#
#     make dist && docker build -t dvit-infer .
#     docker run --rm -p 127.0.0.1:8000:8000 -v "$PWD/models:/models:ro" dvit-infer /models/model.safetensors
#     docker run --rm -v "$PWD:/work" -w /work --entrypoint dvit-bench dvit-infer --environment
FROM python:3.12-slim

# PyTorch's builds for CPUs: those of PyPI bring CUDA along, several gigabytes.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

COPY constraints.txt dist/*.whl /tmp/dist/
RUN set -- /tmp/dist/*.whl \
    && python -m pip install --no-cache-dir --extra-index-url "$TORCH_INDEX" -c /tmp/dist/constraints.txt "${1}[cpu,serve]" \
    && rm -r /tmp/dist \
    && useradd --uid 10001 --create-home dvit

USER 10001
WORKDIR /home/dvit
EXPOSE 8000
HEALTHCHECK --start-period=60s CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/v2/health/ready')"]

# A container's own address is where its port is published from; whoever can reach that may use the server.
ENTRYPOINT ["dvit-serve", "--host", "0.0.0.0"]
CMD ["--help"]
