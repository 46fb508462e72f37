"""The studio as a process: how soon it answers, what it loads and takes, and how it ends."""

import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

pytest.importorskip("uvicorn", reason="the studio needs the extra 'studio'")

SOURCE = Path(__file__).parents[1] / "src"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(SOURCE), "PYTHONUNBUFFERED": "1"}
HEAVY = ("torch", "diffusers", "transformers", "peft", "accelerate")
MOST_MB = 120
# Three seconds on an idle machine; tests share theirs.
MOST_SECONDS = 20


@contextmanager
def served(root: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], int, str]]:
    """Start the command; give its process, port and token."""
    argv = [sys.executable, "-m", "dreamloom", "studio", "--port", "0", "--root", str(root)]
    process = subprocess.Popen(
        [*argv, *options],
        env=ENVIRONMENT,
        cwd=root.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:(\d+)/(?:\?token=(\S+))?", line)
        assert found, line + process.communicate(timeout=20)[1]
        yield process, int(found[1]), found[2] or ""
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def get(port: int, path: str, **headers: str) -> tuple[int, str, dict[str, str]]:
    end = time.monotonic() + MOST_SECONDS
    while True:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=MOST_SECONDS)
        try:
            connection.request("GET", path, headers=headers)
            answer = connection.getresponse()
            return answer.status, answer.read().decode(), dict(answer.getheaders())
        except ConnectionRefusedError:
            assert time.monotonic() < end
        finally:
            connection.close()


def test_it_answers_soon_takes_little_and_ends_cleanly(tmp_path):
    began = time.monotonic()
    with served(tmp_path / "runs") as (process, port, token):
        status, _, headers = get(port, f"/?token={token}")
        seconds = time.monotonic() - began
        assert status == 303
        cookie = headers["set-cookie"].partition(";")[0]
        assert get(port, "/", Cookie=cookie)[0] == 200
        assert get(port, "/")[0] == 401
        megabytes = psutil.Process(process.pid).memory_info().rss / 1e6
        assert seconds < MOST_SECONDS
        assert megabytes < MOST_MB
        assert "server" not in {name.lower() for name in headers}
        process.send_signal(signal.SIGINT)
        said, wrong = process.communicate(timeout=10)
    assert process.returncode == 0
    assert "Traceback" not in said + wrong
    assert wrong == ""


def test_it_ends_cleanly_while_a_page_listens(tmp_path):
    run = tmp_path / "runs" / "me"
    (run / "records").mkdir(parents=True)
    with served(tmp_path / "runs") as (process, port, token):
        cookie = get(port, f"/?token={token}")[2]["set-cookie"].partition(";")[0]
        page = get(port, "/", Cookie=cookie)[1]
        place = re.search(r"/runs/[0-9a-f]{12}", page)
        assert place
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        connection.request("GET", f"{place[0]}/events", headers={"Cookie": cookie})
        stream = connection.getresponse()
        assert stream.readline().startswith(b"retry:")
        process.send_signal(signal.SIGINT)
        said, wrong = process.communicate(timeout=10)
        connection.close()
    assert "Traceback" not in said + wrong
    assert process.returncode == 0, wrong


def test_importing_it_loads_nothing_heavy():
    code = "import sys, dreamloom.studio.serve; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=True
    )
    assert not set(HEAVY) & set(done.stdout.split())


def test_a_port_that_is_taken_is_one_sentence(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = run_studio("--port", port, "--root", str(tmp_path / "runs"))
    assert done.returncode == 1
    assert f"port {port}" in done.stderr
    assert "--port" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_address_that_is_not_this_machines_is_one_sentence(tmp_path):
    options = ("--listen", "203.0.113.7", "--password", "x", "--port", "0")
    done = run_studio(*options, "--root", str(tmp_path / "runs"))
    assert done.returncode == 1
    assert "203.0.113.7" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("library", ["uvicorn", "starlette"])
def test_without_the_extra_it_says_how_it_comes(tmp_path, library):
    code = (
        f"import sys; sys.modules[{library!r}] = None\n"
        "from dreamloom.cli.main import main\n"
        f"sys.argv = ['dreamloom', 'studio', '--root', {str(tmp_path / 'runs')!r}]\n"
        "main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert f"The studio needs {library}" in done.stderr
    assert "pip install 'dreamloom[studio]'" in done.stderr
    assert "Traceback" not in done.stderr


def run_studio(*options: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "dreamloom", "studio", *options],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
