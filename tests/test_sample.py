"""Test sample.py as a user runs it."""

import contextlib
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import torch

import sample
from command import CommandParser
from data.tokenizer import CharacterTokenizer, load_tokenizer
from generation import generate
from generation.interactive import HELP, SETTINGS, Session
from generation.terminal import SEPARATOR, read_prompts
from model import GPT, GPTConfig
from pretrained import load_model

ROOT = Path(__file__).parent.parent
CHARACTERS = "".join(chr(code) for code in range(32, 127)) + "éü世"


def make_checkpoint(directory, tokenizer, vocab_size=None):
    torch.manual_seed(0)
    vocab_size = vocab_size or tokenizer.vocab_size
    model = GPT(GPTConfig(vocab_size=vocab_size, block_size=64, n_layer=2, n_head=2, n_embd=32))
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.4)  # large enough for varied text
    model.save_pretrained(directory, eos_token_id=tokenizer.eot)
    tokenizer.save(directory)
    return directory


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("model"), CharacterTokenizer(CHARACTERS))


@pytest.fixture
def run(checkpoint, capsys):
    """`run("--prompt", "x")`: run sample.py on the checkpoint; returns (exit code, standard output, standard error)."""

    def call(*arguments, model=checkpoint):
        code = 0
        try:
            sample.main(["--model", str(model), "--dtype", "float32", "--max-new-tokens", "12", *map(str, arguments)])
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return call


def test_greedy_text_equals_that_of_generate(run, checkpoint):
    tokenizer = load_tokenizer(checkpoint)
    prompt = tokenizer.encode("Hello")
    ids = generate(GPT.from_pretrained(checkpoint), [prompt], max_new_tokens=12, eos_token_id=tokenizer.eot)
    expected = [token for token in ids[0].tolist() if token != tokenizer.eot]
    assert run("--prompt", "Hello", "--greedy") == (0, f"{tokenizer.decode(expected)}\n", "")
    assert run("--prompt", "Hello", "--greedy", "--stream")[:2] == run("--prompt", "Hello", "--greedy")[:2]


def read_json(out):
    return [json.loads(line) for line in out.splitlines()]


def test_json_prints_one_object_per_sample(run, checkpoint):
    code, out, _ = run("--prompt", "Hello", "--json", "--num-samples", 5, "--batch-size", 2, "--seed", 3)
    assert code == 0
    objects = read_json(out)
    assert len(objects) == 5
    assert len({entry["text"] for entry in objects}) == 5
    tokenizer = load_tokenizer(checkpoint)
    model = GPT.from_pretrained(checkpoint)
    for entry in objects:
        assert list(entry) == ["prompt", "text", "tokens", "logprobs", "finish_reason"]
        assert entry["prompt"] == "Hello"
        assert entry["text"] == tokenizer.decode(entry["tokens"])
        assert entry["finish_reason"] == ("length" if len(entry["tokens"]) == 12 else "stop")
        ids = torch.tensor([tokenizer.encode("Hello") + entry["tokens"]])
        logprobs = model(ids).logits[0, 4:-1].log_softmax(dim=-1).gather(1, ids[0, 5:, None])[:, 0]
        assert entry["logprobs"] == pytest.approx(logprobs.tolist(), abs=1e-3)


def test_a_seed_gives_the_same_text_for_any_batch_size(run):
    arguments = ("--prompt", "ab", "--num-samples", 4, "--json", "--temperature", 1.5)
    texts = [
        [entry["text"] for entry in read_json(run(*arguments, "--seed", seed, "--batch-size", size)[1])]
        for seed, size in ((1, 1), (1, 3), (2, 4))
    ]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]
    assert texts[0][1:] == texts[2][:3]  # sample i of seed s is sample 0 of seed s + i
    streamed = run("--prompt", "ab", "--num-samples", 4, "--temperature", 1.5, "--seed", 1, "--stream")[1]
    assert streamed == "".join(f"ab{text}\n{SEPARATOR}\n" for text in texts[0])


def test_without_a_seed_texts_differ(run):
    assert run("--prompt", "ab")[1] != run("--prompt", "ab")[1]


def test_without_a_prompt_the_text_starts_after_end_of_text(run, checkpoint):
    tokenizer = load_tokenizer(checkpoint)
    (entry,) = read_json(run("--greedy", "--json")[1])
    ids = generate(GPT.from_pretrained(checkpoint), [[tokenizer.eot]], max_new_tokens=12, eos_token_id=tokenizer.eot)
    assert entry["prompt"] == ""
    assert entry["tokens"] == [token for token in ids[0, 1:].tolist() if token != tokenizer.eot]


def test_a_file_of_prompts_is_continued_in_order(run, tmp_path):
    prompts = ["the longest prompt of all", "a", "some words", "世 é"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts[:2]) + "\n\n" + "\n".join(prompts[2:]), encoding="utf-8")
    lines = [json.dumps({"prompt": prompt, "other": 1}) for prompt in prompts]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    options = ("--batch-size", 2, "--num-samples", 2, "--seed", 0)
    code, out, _ = run("--file", tmp_path / "prompts.txt", "--json", *options)
    assert code == 0
    assert [entry["prompt"] for entry in read_json(out)] == [prompt for prompt in prompts for _ in range(2)]
    assert run("--file", tmp_path / "prompts.jsonl", "--json", *options)[1] == out
    texts = [entry["prompt"] + entry["text"] for entry in read_json(out)]
    plain = run("--file", tmp_path / "prompts.txt", *options)[1]
    assert plain == "".join(f"{text}\n{SEPARATOR}\n" for text in texts)


def test_beam_search_equals_generate(run, checkpoint):
    tokenizer = load_tokenizer(checkpoint)
    objects = read_json(run("--prompt", "Hello", "--num-beams", 4, "--num-samples", 2, "--json")[1])
    ids = generate(
        GPT.from_pretrained(checkpoint), [tokenizer.encode("Hello")], max_new_tokens=12, num_beams=4,
        num_return_sequences=2, eos_token_id=tokenizer.eot,
    )  # fmt: skip
    expected = [[token for token in row if token != tokenizer.eot] for row in ids[:, 5:].tolist()]
    assert [entry["tokens"] for entry in objects] == expected


def test_show_probs_prints_the_most_probable_tokens(run, checkpoint):
    tokenizer = load_tokenizer(checkpoint)
    logits = GPT.from_pretrained(checkpoint)(torch.tensor([tokenizer.encode("Hello")])).logits[0, -1]
    probabilities, tokens = logits.softmax(dim=-1).topk(3)
    code, out, _ = run("--prompt", "Hello", "--show-probs", 3)
    rows = [line.split(maxsplit=2) for line in out.splitlines()[1:4]]
    assert code == 0
    assert [(int(token), text) for _, token, text in rows] == [
        (token, repr(tokenizer.decode([token]))) for token in tokens.tolist()
    ]
    assert [float(row[0]) for row in rows] == pytest.approx(probabilities.tolist(), abs=6e-5)


def test_shown_probabilities_are_accurate_in_bfloat16(run, checkpoint, tmp_path):
    """GPT-2's logits have a large common offset, with which many of them would be equal in bfloat16."""
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    model = GPT.from_pretrained(checkpoint)
    with torch.no_grad():
        model.transformer.wte.weight.mul_(0.05).sub_(80 / (4.0 * model.config.n_embd))
        model.transformer.ln_f.bias.fill_(4.0)
    model.bfloat16().save_pretrained(tmp_path)
    logits = GPT.from_pretrained(tmp_path).float()(torch.tensor([load_tokenizer(tmp_path).encode("Hello")])).logits
    assert logits[0, -1].max() < -70
    expected = logits[0, -1].softmax(dim=-1).topk(3).values.tolist()
    _, out, _ = run("--prompt", "Hello", "--show-probs", 3, "--dtype", "bfloat16", model=tmp_path)
    assert [float(line.split()[0]) for line in out.splitlines()[1:4]] == pytest.approx(expected, rel=0.03)


def test_by_default_only_as_many_tokens_are_generated_as_fit(checkpoint, capsys):
    sample.main(["--model", str(checkpoint), "--prompt", "x" * 60, "--json", "--seed", "1"])
    (entry,) = read_json(capsys.readouterr().out)
    assert 1 <= len(entry["tokens"]) <= 5  # block_size is 64, and the last token is not read


def test_without_a_model_and_without_runs_the_error_says_so(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        sample.main([])
    assert stop.value.code == 2
    assert "no run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temperature", "0"], "temperature must be above 0"),
        (["--temperature", "-1"], "temperature must be above 0"),
        (["--top-p", "0"], "--top-p must be above 0 and at most 1, got 0.0"),
        (["--top-p", "1.5"], "--top-p must be above 0 and at most 1, got 1.5"),
        (["--top-p", "nan"], "--top-p must be above 0 and at most 1, got nan"),
        (["--top-k", "-1"], "--top-k must be at least 1, or 0 for all tokens, got -1"),
        (["--host", "127.0.0.1"], "--host and --port are the address of the server: add --serve"),
        (["--interactive", "--port", "8000"], "--host and --port are the address of the server: add --serve"),
        (["--seed", str(2**64)], "--seed must be in 0..2^63 - 1"),
        (["--num-beams", "2", "--num-samples", "3"], "at least --num-samples 3"),
        (["--prompt", "x" * 60], "60 prompt tokens + 12 new > block_size 64"),
        (["--prompt", "Ω"], "'Ω'"),
        (["--stop", ""], "--stop needs a text that is not empty"),
        (["--temperature", "0", "--show-probs", "3"], "temperature must be above 0"),
        (["--temperature", "0", "--stream"], "temperature must be above 0"),
        (["--file", "missing.txt"], "sample.py: missing.txt: No such file or directory"),
        (["--num-samples", "0"], "--num-samples must be at least 1, got 0"),
        (["--greedy", "--temperature", "1"], "omit them with --greedy"),
        (["--greedy", "--num-samples", "2"], "--greedy has one result"),
        (["--num-beams", "2", "--stream"], "cannot be combined with --stream"),
        (["--json", "--stream"], "--json cannot be used with --stream"),
        (["--show-probs", "200"], "more than the vocabulary of 99"),
        (["--device", "nowhere"], "--device nowhere cannot be used"),
        (["--prompt", "a", "--interactive"], "not allowed with argument"),
        (["--serve", "--top-k", "5"], "--serve cannot be combined with --max-new-tokens, --top-k"),
    ],
    ids=str,
)
def test_bad_input_ends_with_status_2_and_a_message(run, arguments, message):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("line", "why"), [("{broken", "Expecting"), ('{"text": "x"}', "prompt"), ('{"prompt": 3}', "prompt"), ("[1]", "")]
)
def test_malformed_jsonl_is_refused_with_its_line_number(run, tmp_path, line, why):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "fine"}\n\n' + line + "\n", encoding="utf-8")
    code, out, err = run("--file", path)
    assert (code, out) == (2, "")
    assert f"{path}, line 3: " in err
    assert why in err


def test_nothing_is_printed_if_a_later_prompt_does_not_fit(run, tmp_path):
    (tmp_path / "prompts.txt").write_text("fits\n" + "x" * 60)
    code, out, err = run("--file", tmp_path / "prompts.txt", "--stream")
    assert (code, out) == (2, "")
    assert "block_size 64" in err


def test_only_line_feeds_separate_prompts(tmp_path):
    prompts = [f"one{separator}prompt" for separator in "\u2028\u2029\x85\x0b\x0c"]
    (tmp_path / "prompts.txt").write_bytes("\r\n\n".join(prompts).encode())
    assert read_prompts(tmp_path / "prompts.txt") == prompts
    lines = [json.dumps({"prompt": prompt}, ensure_ascii=False) for prompt in prompts]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert read_prompts(tmp_path / "prompts.jsonl") == prompts


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xff\xfe"])
def test_empty_and_binary_prompt_files_are_refused(run, tmp_path, content):
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    code, out, err = run("--file", path)
    assert (code, out) == (2, "")
    assert str(path) in err


def test_directories_without_a_model_are_refused(run, tmp_path):
    assert run(model=tmp_path / "nothing")[0] == 2
    code, out, err = run(model=tmp_path)
    assert (code, out) == (2, "")
    assert "config.json" in err or "tokenizer.json" in err


def test_a_tokenizer_of_another_size_is_refused(run, tmp_path):
    make_checkpoint(tmp_path, CharacterTokenizer(CHARACTERS), vocab_size=99 + 128)
    code, out, err = run(model=tmp_path)
    assert (code, out) == (2, "")
    assert "has 99 tokens, but the model has 227" in err


def test_a_padded_vocabulary_is_loaded_and_gives_no_other_text(run, checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "padded")
    model = GPT.from_pretrained(checkpoint)
    model.resize_token_embeddings(99 + 20)
    with torch.no_grad():
        model.transformer.wte.weight[99:] = 5 * model.transformer.wte.weight[:20]
    model.save_pretrained(tmp_path / "padded", eos_token_id=load_tokenizer(checkpoint).eot)
    for options in (("--greedy",), ("--seed", 3), ("--num-beams", 3), ("--stream", "--greedy"), ("--show-probs", 99)):
        found = run("--prompt", "Hello", *options, model=tmp_path / "padded")
        assert found[0] == 0, found
        if "--show-probs" not in options:
            assert found == run("--prompt", "Hello", *options)


def test_a_hub_name_without_a_network_prints_one_line():
    result = subprocess.run(
        [sys.executable, "sample.py", "--model", "gpt2", "--prompt", "x"],
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": "/nonexistent"},
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("sample.py: 'gpt2'")
    assert result.stderr.count("\n") == 1


def test_help_does_not_import_torch():
    code = "import sys, sample\ntry: sample.main(['--help'])\nfinally: assert 'torch' not in sys.modules"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "bfloat16 where it is faster" in " ".join(result.stdout.split())


@pytest.mark.parametrize("options", [("--greedy",), ("--seed", 4, "--num-samples", 3), ("--num-beams", 2)], ids=str)
def test_a_sample_ends_after_a_stop_text(run, options):
    whole = [entry["text"] for entry in read_json(run("--prompt", "Hello", "--json", *options)[1])]
    stops = [whole[0][3:5], "not in the text"]
    flags = [flag for stop in stops for flag in ("--stop", stop)]
    code, out, _ = run("--prompt", "Hello", "--json", *options, *flags)
    assert code == 0
    for entry, text in zip(read_json(out), whole, strict=True):
        place = text.find(stops[0])
        if options[0] != "--num-beams":  # beams that have ended compete with others
            assert entry["text"] == (text if place < 0 else text[: place + 2])
        assert entry["finish_reason"] == "stop" or stops[0] not in entry["text"]
    if options == ("--greedy",):
        streamed = run("--prompt", "Hello", *options, "--stream", *flags)[1]
        assert streamed == f"Hello{whole[0][:5]}\n"


def test_a_stop_text_may_be_a_line_break(tmp_path, run):
    model = make_checkpoint(tmp_path / "model", CharacterTokenizer("ab\n"))
    for seed in range(4):
        (entry,) = read_json(run("--prompt", "a", "--json", "--stop", r"\n", "--seed", seed, model=model)[1])
        assert "\n" not in entry["text"][:-1]


def test_sliding_allows_more_tokens_than_block_size(run, checkpoint, capsys):
    prompt = "x" * 60
    assert run("--prompt", prompt)[0] == 2
    (entry,) = read_json(run("--prompt", prompt, "--greedy", "--sliding", "--json")[1])
    tokenizer = load_tokenizer(checkpoint)
    ids = generate(
        GPT.from_pretrained(checkpoint), [tokenizer.encode(prompt)], max_new_tokens=12, sliding=True,
        eos_token_id=tokenizer.eot,
    )  # fmt: skip
    assert entry["tokens"] == [token for token in ids[0, 60:].tolist() if token != tokenizer.eot]
    sample.main(["--model", str(checkpoint), "--prompt", prompt, "--sliding", "--seed", "1", "--max-new-tokens", "90"])
    assert len(capsys.readouterr().out) > 60


@pytest.mark.parametrize(
    "options",
    [(), *(pytest.param(o, marks=pytest.mark.slow) for o in (("--stream",), ("--show-probs", "99")))],
    ids=str,
)
def test_characters_that_the_output_cannot_encode_are_escaped(run, checkpoint, python, options):
    arguments = ("sample.py", "--model", checkpoint, "--prompt", "é世", "--greedy", "--max-new-tokens", "12", *options)
    result = python(*arguments, "--dtype", "float32", PYTHONIOENCODING="ascii")
    assert "\\xe9\\u4e16" in result.stdout or options == ("--show-probs", "99")
    expected = run("--prompt", "é世", "--greedy", *options)[1].encode("ascii", errors="backslashreplace").decode()
    assert result.stdout == expected


def test_control_characters_are_escaped_on_a_terminal_only(run, checkpoint, tmp_path, monkeypatch):
    """The prompt is printed as the text of the model is. JSON has escapes of its own."""
    model = make_checkpoint(tmp_path / "model", CharacterTokenizer("ab\t\n\r\x1b\x7f\x9bé"))
    prompt = "a\t\x1b\r\x7f\x9bé\nb"
    for options in ((), ("--stream",)):
        arguments = ("--prompt", prompt, "--seed", 1, *options)
        monkeypatch.setattr(sys.stdout, "isatty", lambda: False, raising=False)
        piped = run(*arguments, model=model)[1]
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
        shown = run(*arguments, model=model)[1]
        assert prompt in piped
        assert shown.startswith("a\t\\x1b\\r\\x7f\\x9bé\nb")
        assert not set("\x1b\r\x7f\x9b") & set(shown)
        for character, escape in (("\x1b", "\\x1b"), ("\r", "\\r"), ("\x7f", "\\x7f"), ("\x9b", "\\x9b")):
            piped = piped.replace(character, escape)
        assert shown == piped


# ---------------------------------------------------------------------------------------------------------------------
# Interactive use, through a pseudo-terminal


class Terminal:
    """A user who types into `sample.py --interactive`."""

    def __init__(self, *arguments):
        self.pid, self.descriptor = pty.fork()
        if self.pid == 0:
            os.chdir(ROOT)
            os.environ |= {"OMP_NUM_THREADS": "1", "TERM": "dumb"}
            os.execv(sys.executable, [sys.executable, "sample.py", "--interactive", *map(str, arguments)])
        self.seen = ""

    def type(self, keys):
        os.write(self.descriptor, keys.encode())

    def expect(self, text, timeout=60):
        """Read until `text` appears, and return the output before it."""
        deadline = time.monotonic() + timeout
        while text not in self.seen:
            ready, _, _ = select.select([self.descriptor], [], [], max(0, deadline - time.monotonic()))
            try:
                read = os.read(self.descriptor, 4096).decode() if ready else ""
            except OSError:  # Linux raises it when the other side is closed
                read = ""
            assert read, f"expected {text!r}, saw {self.seen!r}"
            self.seen += read.replace("\r", "")
        before, _, self.seen = self.seen.partition(text)
        return before

    def exit_code(self):
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            if select.select([self.descriptor], [], [], 0.05)[0]:  # the process cannot end while its output is unread
                with contextlib.suppress(OSError):
                    self.seen += os.read(self.descriptor, 4096).decode()
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        pytest.fail("the process did not end")


def test_interactive_prompts_have_line_editing_and_a_history(checkpoint, run):
    arguments = ("--model", checkpoint, "--dtype", "float32", "--greedy", "--max-new-tokens", 12)
    expected = {
        prompt: run("--prompt", prompt, "--greedy")[1].removesuffix("\n").removeprefix(prompt)
        for prompt in ("Hello", "world")
    }
    terminal = Terminal(*arguments)
    terminal.expect("> ")
    terminal.type("Hello\n")
    terminal.expect("Hello\n")  # the echo
    assert terminal.expect("\n> ") == expected["Hello"]
    terminal.type("\n")  # an empty line asks again
    assert terminal.expect("> ") == "\n"
    terminal.type("worlx\x7fd\n")  # line editing: backspace
    terminal.expect("\n")
    assert terminal.expect("\n> ") == expected["world"]
    terminal.type("\x1b[A\x1b[A\n")  # history: two lines up
    terminal.expect("\n")
    assert terminal.expect("\n> ") == expected["Hello"]
    terminal.type("x" * 80 + "\n")  # does not fit: prints the error and asks again
    terminal.expect("block_size 64")
    terminal.expect("> ")
    terminal.type("\x04")
    assert terminal.exit_code() == 0


def test_interactive_ends_without_a_traceback_on_ctrl_c(checkpoint):
    terminal = Terminal("--model", checkpoint)
    terminal.expect("> ")
    time.sleep(0.5)  # readline prints its prompt shortly before it handles signals
    terminal.type("\x03")
    assert terminal.exit_code() == 130
    assert "Traceback" not in terminal.seen


def test_ctrl_c_ends_an_answer_and_commands_change_settings(checkpoint, run):
    terminal = Terminal("--model", checkpoint, "--dtype", "float32", "--num-samples", 100_000, "--seed", 3)
    assert f"{checkpoint}: 30,688 parameters, sees up to 64 tokens" in terminal.expect("> ")
    terminal.type("Hello\n")
    terminal.expect("Hello\n")
    terminal.expect("\n")  # the first sample was streamed
    terminal.type("\x03")
    terminal.expect("\n> ")
    for line, shown in (
        (":help", ":temperature 0.7"),
        (":temperature warm", ":temperature warm: expected a number, at least 0; :help has an example"),
        (":joke", ":joke is not a command: :help lists them"),
    ):
        terminal.type(f"{line}\n")
        terminal.expect(f"{line}\n")
        assert shown in terminal.expect("\n> ")
    for line in (":num-samples 1", ":temperature 0", ":top-k 9", ":max-new-tokens 12"):  # 0 means greedy
        terminal.type(f"{line}\n")
        terminal.expect("> ")
    greedy = run("--prompt", "Hello", "--greedy")[1].removesuffix("\n").removeprefix("Hello")
    terminal.type("Hello\n")
    terminal.expect("Hello\n")
    assert terminal.expect("\n> ") == greedy
    more = run("--prompt", f"Hello{greedy}", "--greedy")[1].removesuffix("\n").removeprefix(f"Hello{greedy}")
    terminal.type(":more\n")
    terminal.expect(":more\n")
    assert terminal.expect("\n> ") == more
    terminal.type(":quit\n")
    assert terminal.exit_code() == 0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("temperature -1", "expected a number, at least 0; :help has an example"),
        ("temperature nan", "expected a number, at least 0; :help has an example"),
        ("temperature inf", "expected a number, at least 0; :help has an example"),
        ("temperature", "expected a number, at least 0; :help has an example"),
        ("temperature 0.7 0.8", "expected a number, at least 0; :help has an example"),
        ("top-k 1.5", "expected a whole number, at least 0; :help has an example"),
        ("top-k -1", "expected a whole number, at least 0; :help has an example"),
        ("top-p 0", "expected a number above 0 and at most 1; :help has an example"),
        ("top-p 2", "expected a number above 0 and at most 1; :help has an example"),
        ("max-new-tokens 0", "expected a whole number, at least 1; :help has an example"),
        ("num-samples few", "expected a whole number, at least 1; :help has an example"),
        ("show-probs -1", "expected a whole number, at least 0; :help has an example"),
        ("show-probs 100", "the vocabulary has only 99 tokens"),
    ],
)
def test_an_impossible_setting_changes_nothing_and_is_answered_with_what_is_possible(checkpoint, line, message):
    args = sample.parse_arguments(CommandParser(), ["--interactive"])
    before, (model, tokenizer, _) = dict(vars(args)), load_model(str(checkpoint))
    with pytest.raises(ValueError, match=re.escape(f":{line}: {message}")):
        Session(args, model, tokenizer).command(*line.split())
    assert vars(args) == before


def test_the_settings_that_the_help_shows_are_possible(checkpoint):
    args = sample.parse_arguments(CommandParser(), ["--interactive", "--sliding"])
    model, tokenizer, _ = load_model(str(checkpoint))
    examples = [line.split()[:2] for line in HELP.splitlines() if re.match(r" +:[a-z-]+ [\d.]+ ", line)]
    assert {name.lstrip(":").replace("-", "_") for name, _ in examples} == set(SETTINGS)
    for name, value in examples:
        Session(args, model, tokenizer).command(name.lstrip(":"), value)
        assert getattr(args, name.lstrip(":").replace("-", "_")) == float(value)


def test_a_server_without_its_packages_is_refused_by_their_names(run, monkeypatch, capsys, checkpoint):
    monkeypatch.delitem(sys.modules, "serve.app", raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.setitem(sys.modules, "starlette", None)
    with pytest.raises(SystemExit) as stop:
        sample.main(["--model", str(checkpoint), "--serve"])
    assert stop.value.code == 2
    assert "--serve needs uvicorn: pip install starlette uvicorn" in capsys.readouterr().err


def test_a_prompt_is_read_from_a_pipe(checkpoint, run):
    command = ["sample.py", "--model", checkpoint, "--dtype", "float32", "--greedy", "--max-new-tokens", "12"]
    result = subprocess.run(
        [sys.executable, *command], input="Hello\n", cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout == run("--prompt", "Hello", "--greedy")[1]


def test_several_batches_have_a_progress_bar_on_a_terminal(checkpoint):
    primary, secondary = pty.openpty()
    termios.tcsetwinsize(secondary, (24, 80))
    process = subprocess.Popen(
        [sys.executable, "sample.py", "--model", checkpoint, "--num-samples", "6", "--batch-size", "2"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=secondary,
    )
    assert process.wait(timeout=60) == 0
    assert select.select([primary], [], [], 5)[0], "no progress bar was printed"
    assert "/6 [" in os.read(primary, 65536).decode()
    os.close(secondary)
    os.close(primary)
