"""A tiny model folder, and an OpenAI-compatible server of our own that says what a test tells it to."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from rich.console import Console

from mapo_jax.config import RolloutConfig
from mapo_jax.model.qwen import QwenConfig, init_params
from mapo_jax.rollout.rows import ChatFormat
from mapo_jax.running.model_folder import write_model_folder
from mapo_jax.running.policy import Policy
from mapo_jax.tokenizer import load_tokenizer, train_tokenizer, write_tokenizer

TEXTS = ["I keep thinking about the night shifts.", "You sound tired. Which feeling is it: joy or anger?"]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A random model of two layers in a Hugging Face folder."""
    source = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(source, train_tokenizer(TEXTS * 4, 300, max_tokens=96))
    tokenizer = load_tokenizer(source)
    config = QwenConfig(
        vocab_size=304,
        hidden_size=16,
        intermediate_size=24,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        max_position_embeddings=512,
    )
    folder = tmp_path_factory.mktemp("models") / "tiny"
    folder.mkdir()
    policy = Policy(config, tokenizer, ChatFormat(tokenizer))
    write_model_folder(folder, policy, init_params(config, 0), RolloutConfig())
    return folder


@pytest.fixture
def console():
    return Console(width=200, force_terminal=False)


class Server:
    """Answers chat completions by `reply`, a function of the request: text or another content, a mapping (a
    message), or a status to fail with. `models` is what /models says; bytes are sent as HTML."""

    def __init__(self):
        self.requests, self.headers, self.complaint = [], [], "told to fail"
        self.reply = lambda request: "fine"
        self.models = {"object": "list", "data": [{"id": "house-model", "object": "model"}]}
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.send(server.models)

            def do_POST(self):
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.requests.append(request)
                server.headers.append(self.headers)
                said = server.reply(request)
                if isinstance(said, int):
                    self.send({"error": {"message": server.complaint}}, said)
                    return
                message = {"role": "assistant", **(said if isinstance(said, dict) else {"content": said})}
                choice = {"index": 0, "message": message, "finish_reason": "stop"}
                self.send(
                    {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
                )

            def send(self, content, status=200):
                html = isinstance(content, bytes)
                body = content if html else json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "text/html" if html else "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *arguments):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def close(self):
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def server():
    server = Server()
    yield server
    server.close()
