"""play.py as a user calls it."""

import http.client
import json
import re
import signal
import socket
import subprocess
import sys

import pytest
from conftest import ROOT, Run, call_main, environment

import play
from nanogpt.errors import InputError
from nanogpt.text.chat import PLAIN_TEMPLATE
from nanogpt.text.tokenizer import Tokenizer


def test_play_reports_what_is_missing(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(InputError, match="nowhere"):
        call_main(play.main, "--out_dir=nowhere", "--port=0")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(InputError, match=f"--port={port}: address already in use"):
            call_main(play.main, f"--port={port}")
    monkeypatch.delitem(sys.modules, "nanogpt.playground.server", raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(InputError, match=r'uvicorn.*pip install -e "\.\[play\]"'):
        call_main(play.main)


def test_play_chats_where_a_template_works(capsys: pytest.CaptureFixture[str]):
    tokenizer = Tokenizer.bytes()
    assert play.load_chat(tokenizer, []) is None
    tokenizer.template = PLAIN_TEMPLATE
    chat = play.load_chat(tokenizer, [5])
    assert chat
    assert chat.stop_ids == {5, 256}
    assert capsys.readouterr().err == ""
    for template, problem in (("{% for %}", "is broken"), ("{{ messages[0].content }}", "leaves the answers out")):
        tokenizer.template = template
        assert play.load_chat(tokenizer, []) is None
        assert re.search(problem, capsys.readouterr().err)


def test_play_stops_on_ctrl_c(run: Run):
    run(out_dir="out", max_iters=2, eval_interval=2)
    command = [sys.executable, ROOT / "play.py", "--out_dir=out", "--port=0", "--device=cpu"]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stderr
    address = re.search(r"http://127\.0\.0\.1:(\d+)", process.stdout.readline())
    assert address
    connection = http.client.HTTPConnection("127.0.0.1", int(address[1]))
    connection.request("POST", "/api/generate", json.dumps({"prompt": "ab", "max_new_tokens": 10_000}))
    assert b"prompt_ids" in connection.getresponse().readline()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    lines = process.stderr.read().splitlines()
    assert (lines[0], lines[-1]) == ("playing with out/ckpt/step-000002", "interrupted")
    assert "Traceback" not in "".join(lines)
    assert process.stdout.read() == ""
    connection.close()
