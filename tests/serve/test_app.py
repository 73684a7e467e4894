"""The server as clients see it: OpenAI's client, many at once, impossible requests, and clients that go away."""

import concurrent.futures
import http.client
import json
import signal
import socket
import sys
from argparse import Namespace
from types import SimpleNamespace

import psutil
import pytest
import torch

from generation import generate_text

LONG = {"prompt": "a", "max_tokens": 4096, "sliding": True, "logprobs": 1, "stream": True}


@pytest.fixture
def openai(server):
    """The official client, connected to the server."""
    module = pytest.importorskip("openai", reason="openai is not installed")
    with module.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        client.errors = module
        yield client


def post(server, body, kind="application/json", path="/v1/completions", method="POST", host=None):
    """Send a request; return its status and the content of its answer."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    headers = {"Content-Type": kind} | ({"Host": host} if host else {})
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    content = response.read()
    connection.close()
    return response.status, content


def message(content):
    return json.loads(content)["error"]["message"]


def test_openais_client_gets_the_texts_of_generate_text(server, openai):
    assert [model.id for model in openai.models.list()] == ["tiny"]
    assert openai.models.retrieve("tiny").id == "tiny"
    prompts = ["Hello", "世 é"]
    expected = generate_text(server.model, server.tokenizer, prompts, max_new_tokens=20)
    answer = openai.completions.create(model="tiny", prompt=prompts, max_tokens=20, temperature=0)
    assert [choice.text for choice in answer.choices] == [completion.text for completion in expected]
    assert [choice.finish_reason for choice in answer.choices] == [one.finish_reason for one in expected]
    assert answer.usage.prompt_tokens == 8
    beams = generate_text(server.model, server.tokenizer, ["Hello"], max_new_tokens=9, num_beams=3)
    answer = openai.completions.create(
        model="tiny", prompt="Hello", max_tokens=9, logprobs=0, extra_body={"num_beams": 3}
    )
    assert answer.choices[0].text == beams[0].text
    assert answer.choices[0].logprobs.token_logprobs == pytest.approx(beams[0].logprobs, abs=1e-5)


def test_a_stream_has_the_same_text_and_the_logprobs_of_the_model(server, openai):
    request = {"model": "tiny", "prompt": "Hello", "max_tokens": 30, "seed": 5, "n": 2}
    whole = openai.completions.create(**request)
    texts, tokens, logprobs, tops = ["", ""], [], [], []
    for part in openai.completions.create(**request, stream=True, logprobs=3, stream_options={"include_usage": True}):
        for choice in part.choices:
            texts[choice.index] += choice.text
            if choice.index == 0:
                tokens += choice.logprobs.tokens
                logprobs += choice.logprobs.token_logprobs
                tops += choice.logprobs.top_logprobs
    assert texts == [choice.text for choice in whole.choices]
    assert texts[0] != texts[1]
    assert part.usage == whole.usage
    assert "".join(tokens) == texts[0]
    ids = server.tokenizer.encode("Hello" + texts[0])
    expected = server.model(torch.tensor([ids])).logits[0, 4:-1].log_softmax(dim=-1)
    chosen = expected.gather(1, torch.tensor(ids)[5:, None])[:, 0]
    assert logprobs == pytest.approx(chosen.tolist(), abs=1e-4)
    for top, row in zip(tops, expected, strict=False):
        values, best = row.topk(3)
        assert list(top) == [server.tokenizer.decode([token]) for token in best.tolist()]
        assert list(top.values()) == pytest.approx(values.tolist(), abs=1e-4)


def test_a_completion_ends_before_a_stop_string_and_may_begin_with_the_prompt(server, openai):
    whole = generate_text(server.model, server.tokenizer, ["Hello"], max_new_tokens=20)[0].text
    stop = whole[5:7]
    cut = whole[: whole.index(stop)]
    request = {"model": "tiny", "prompt": "Hello", "max_tokens": 20, "temperature": 0, "stop": [stop, "\0"]}
    answer = openai.completions.create(**request, echo=True)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (f"Hello{cut}", "stop")
    parts = [part.choices[0].text for part in openai.completions.create(**request, stream=True)]
    assert "".join(parts) == cut


def test_impossible_requests_get_a_4xx_with_a_sentence(server, openai):
    with pytest.raises(openai.errors.BadRequestError, match="64 new > block_size 64"):
        openai.completions.create(model="tiny", prompt="Hello", max_tokens=64)
    with pytest.raises(openai.errors.BadRequestError, match="64 new > block_size 64"):
        openai.completions.create(model="tiny", prompt="Hello", max_tokens=64, stream=True)
    with pytest.raises(openai.errors.NotFoundError, match="there is no model 'gpt-4' here, only 'tiny'"):
        openai.completions.create(model="gpt-4", prompt="Hello")
    with pytest.raises(openai.errors.NotFoundError, match="POST /v1/chat/completions does not exist"):
        openai.chat.completions.create(model="tiny", messages=[])
    status, content = post(server, json.dumps({"prompt": "Ω"}))
    assert (status, "Ω" in message(content)) == (400, True)
    status, content = post(server, json.dumps({"prompt": [5000]}))
    assert (status, "outside 0..98" in message(content)) == (400, True)
    status, content = post(server, json.dumps({"prompt": "a", "\ud800b": 1}))
    assert (status, message(content)) == (400, r"unknown field \ud800b: omit it, or correct its name")
    status, content = post(server, "{}", kind="text/plain")
    assert (status, message(content)) == (415, "the content type is 'text/plain', expected application/json")
    assert post(server, "{")[0] == 400
    assert post(server, "", method="GET")[0] == 405
    assert post(server, "", method="GET", path="/etc/passwd")[0] == 404
    assert post(server, "{}", host="evil.example")[0] == 400


@pytest.mark.parametrize("changes", [{"echo": True, "prompt": "a"}, {"prompt": ["a", "b" * 60]}], ids=str)
def test_an_impossible_request_is_refused_before_its_stream_begins(server, changes):
    """The first part could be the prompt, or a completion of an earlier prompt."""
    tokens = 10 if isinstance(changes["prompt"], list) else 65
    status, content = post(server, json.dumps({"stream": True, "max_tokens": tokens} | changes))
    assert (status, "block_size 64" in message(content)) == (400, True)


def test_a_prompt_of_10_mb_is_refused(server, openai):
    with pytest.raises(openai.errors.APIStatusError, match="more than 1,048,576 bytes: shorten the prompt") as error:
        openai.completions.create(model="tiny", prompt="x" * 10_000_000)
    assert error.value.status_code == 413


def test_50_clients_at_once_lose_nothing(server):
    alone = {i: post(server, json.dumps({"prompt": f"{i}", "seed": i, "max_tokens": 20}))[1] for i in range(5)}

    def ask(i):
        status, content = post(server, json.dumps({"prompt": f"{i % 5}", "seed": i % 5, "max_tokens": 20}))
        return i, status, json.loads(content)

    with concurrent.futures.ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(ask, range(100)))
    assert {status for _, status, _ in answers} == {200}
    for i, _, answer in answers:
        assert answer["choices"] == json.loads(alone[i % 5])["choices"]
    server.wait_until_idle()


def raw_request(body, length=None):
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {length or len(body)}\r\n\r\n".encode() + body


def cut_off(server, request):
    """Send a request, read the beginning of the answer if it is a stream, and close the connection."""
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(raw_request(json.dumps(request).encode()))
        if request.get("stream"):
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
        else:
            connection.settimeout(0.2)  # the server works on it, and has not answered
            with pytest.raises(TimeoutError):
                connection.recv(1000)


@pytest.mark.parametrize("changes", [{}, {"stream": False}, {"stream": False, "num_beams": 16}], ids=str)
def test_a_client_that_goes_away_frees_its_place(server, changes):
    for _ in range(3):
        cut_off(server, LONG | {"n": 16} | changes)
    server.wait_until_idle()  # 16 times 4,096 tokens would take minutes


def test_a_full_queue_refuses_a_request(server, monkeypatch):
    monkeypatch.setattr("serve.engine.MAX_WAITING", 0)
    status, content = post(server, json.dumps({"prompt": "a"}))
    assert (status, message(content)) == (429, "0 requests are waiting already: try again later")


def test_a_slow_request_is_refused_in_time(server, monkeypatch):
    monkeypatch.setattr("serve.app.BODY_SECONDS", 0.2)
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(raw_request(b"{", length=9))
        assert connection.recv(1000).startswith(b"HTTP/1.1 408")


@pytest.fixture
def command(tmp_path, tiny_model, launch):
    """`command(port)`: a process of `sample.py --serve`."""
    model, tokenizer = tiny_model
    model.save_pretrained(tmp_path, eos_token_id=tokenizer.eot)
    tokenizer.save(tmp_path)
    return lambda port: launch(sys.executable, "sample.py", "--model", tmp_path, "--serve", "--port", port)


def read_address(process):
    """Read the two lines that the command prints. Return the second one's port as `post` expects it."""
    assert "5,920 parameters" in process.stdout.readline()
    return SimpleNamespace(port=int(process.stdout.readline().split("127.0.0.1:")[1].split("/")[0]))


def test_the_command_ends_on_ctrl_c_and_names_a_port_that_is_in_use(server, command, tmp_path):
    refused = command(server.port)
    process = command(0)
    address = read_address(process)
    assert post(address, json.dumps({"prompt": "a", "temperature": 0}))[0] == 200
    page = post(address, None, path="/", method="GET")[1].decode()
    assert f"<h1>{str(tmp_path).replace('/', '/<wbr>')}</h1>" in page
    assert page.count(str(tmp_path)) == 1  # the title
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == 0
    assert process.stdout.read() == ""
    assert refused.wait(timeout=60) == 2
    assert "choose another port" in refused.stdout.read()


@pytest.mark.slow
def test_memory_stays_bounded_over_2000_requests(command):
    """Whole answers, streams, clients that go away, malformed bodies and prompts that are too large.

    The server has a process of its own: the memory of 20 threads that send requests is not its memory.
    """
    process = command(0)
    address = read_address(process)

    def one(i):
        kind = i % 10
        if kind == 7:
            cut_off(address, LONG)
        elif kind == 8:
            assert post(address, "{" * (i % 50))[0] == 400
        elif kind == 9:
            assert post(address, b"x" * (10_000_000 if i % 100 == 99 else 1_100_000))[0] == 413
        else:
            request = {"prompt": "abc", "max_tokens": 16, "seed": i, "logprobs": 5, "stream": kind < 4}
            assert post(address, json.dumps(request))[0] == 200

    memory = []
    with concurrent.futures.ThreadPoolExecutor(20) as pool:
        for first in range(0, 2000, 250):
            list(pool.map(one, range(first, first + 250)))
            memory.append(psutil.Process(process.pid).memory_info().rss)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == 0
    assert process.stdout.read() == ""
    assert memory[-1] - memory[1] < 16 * 2**20, [round(m / 2**20) for m in memory]


def test_a_model_is_served_under_its_whole_name(tiny_model, tmp_path, monkeypatch, capsys):
    """Also if the name has a colon, as the printed line has after it."""
    app = pytest.importorskip("serve.app", reason="starlette or uvicorn is not installed")
    model, tokenizer = tiny_model
    directory = tmp_path / "try: 2"
    model.save_pretrained(directory, eos_token_id=tokenizer.eot)
    tokenizer.save(directory)
    served = []
    monkeypatch.setattr(app, "make_app", lambda engine, name, description, local: served.append((name, description)))
    server = SimpleNamespace(run=lambda sockets: sockets[0].close())
    monkeypatch.setattr(app.uvicorn, "Server", lambda config: server)
    options = {"host": "127.0.0.1", "port": 0, "device": "cpu", "dtype": "float32", "checkpoint": None}
    app.run(Namespace(model=str(directory), **options))
    size = f"{model.num_parameters():,} parameters, sees up to 64 tokens"
    assert served == [(str(directory), size)]
    assert capsys.readouterr().out.startswith(f"{directory}: {size}\n")
