# An image with the packages of requirements.txt, CUDA included. The code, datasets and runs stay in the checkout:
#   docker build -t gpt2 .
#   docker run --gpus all --ipc host -v "$PWD:/gpt2" -it gpt2
# --ipc host gives NCCL the shared memory of the host. `nvidia-smi` in the container lists the GPUs.
FROM python:3.11-slim

# torch.compile calls a C compiler. A run stores the commit of the code, which git reads from the checkout.
RUN apt-get update && apt-get install -y --no-install-recommends build-essential git && rm -rf /var/lib/apt/lists/*
RUN git config --system --add safe.directory /gpt2

WORKDIR /gpt2
COPY requirements.txt .
RUN pip install --no-cache-dir -r requirements.txt

CMD ["bash"]
