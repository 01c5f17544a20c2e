# The stock image of vLLM with this plugin in it.
ARG VLLM=v0.32.0
FROM vllm/vllm-openai:${VLLM}
COPY . /opt/vllm-cosmos3
RUN pip install --no-cache-dir /opt/vllm-cosmos3
EXPOSE 8000
# Healthy when work can be taken: weights take minutes to load, and longer to be downloaded first.
HEALTHCHECK --start-period=30m --start-interval=10s --interval=15s --timeout=5s --retries=4 \
    CMD ["python3", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/health/ready', timeout=4)"]
ENTRYPOINT ["vllm-cosmos3", "serve"]
CMD ["nvidia/Cosmos3-Nano"]
