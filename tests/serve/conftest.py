"""A running server with a tiny model."""

import threading
import time

import pytest
import torch

from data.tokenizer import CharacterTokenizer
from model import GPT, GPTConfig

CHARACTERS = "".join(chr(code) for code in range(32, 127)) + "\né世"


class Running:
    """A server in a thread of this process."""

    def __init__(self, model, tokenizer):
        import uvicorn

        from serve.app import make_app
        from serve.engine import Engine

        self.model, self.tokenizer, self.engine = model, tokenizer, Engine(model, tokenizer)
        app = make_app(self.engine, "tiny", "tiny: a model")
        config = uvicorn.Config(app, port=0, log_level="warning", timeout_graceful_shutdown=2)
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def wait_until_idle(self):
        deadline = time.monotonic() + 20
        while self.engine.n_active:
            assert time.monotonic() < deadline, "a request did not free its place"
            time.sleep(0.01)

    def close(self):
        self.server.should_exit = True
        self.thread.join()


@pytest.fixture(scope="session")
def tiny_model():
    """A model that writes varied text without an end, and its tokenizer of single characters."""
    torch.manual_seed(0)
    tokenizer = CharacterTokenizer(CHARACTERS)
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, block_size=64, n_layer=1, n_head=2, n_embd=16)).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.6)
    with torch.no_grad():  # the logit of end-of-text is always low
        model.transformer.ln_f.bias.fill_(1.0)
        model.transformer.wte.weight[tokenizer.eot] = -10.0
    return model, tokenizer


@pytest.fixture(scope="session")
def server(tiny_model):
    for package in ("starlette", "uvicorn"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    running = Running(*tiny_model)
    yield running
    running.close()
