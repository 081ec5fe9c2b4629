"""The process that runs a model: what it may do, how it is heard, how it ends. All are real."""

from __future__ import annotations

import os
import platform
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from projaudit.behaviour import sandbox
from projaudit.behaviour.reasons import CouldNotProbe

FILTERED = sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64")
linux = pytest.mark.skipif(sys.platform != "linux", reason="Linux only")
filtered = pytest.mark.skipif(not FILTERED, reason="needs seccomp")

OPEN = """
import json, os, sys, time
told = json.load(sys.stdin)
request = told["request"]
def say(**message):
    print(json.dumps(message), flush=True)
def tried(action):
    try:
        return str(action())
    except OSError as error:
        return type(error).__name__
"""
CONFINED = f"""{OPEN}
from projaudit.behaviour import confinement
fenced = confinement.fence(told["parent"], told["gpu"])
confined = confinement.confine(told["memory"], told["gpu"])
"""


def run(code: str, request: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    options = {"seconds": 60.0, "memory": 1 << 30, "gpu": False, **options}
    return sandbox.run(request or {}, child=("-c", code), **options)


def refusal(code: str, **options: Any) -> str:
    with pytest.raises(CouldNotProbe) as caught:
        run(code, **options)
    assert caught.value.reason == str(caught.value)
    assert caught.value.reason.isprintable()
    return caught.value.reason


# ------------------------------------------------------------------ what it may do


@pytest.fixture
def port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@filtered
def test_no_network_programs_or_processes(port: int) -> None:
    code = """
import ctypes, signal, socket, subprocess, threading
def connect():
    with socket.create_connection(("127.0.0.1", request["port"]), 5):
        return "done"
def fork():
    child = os.fork()
    if not child:
        os._exit(0)
    os.waitpid(child, 0)
    return "done"
def ran(action):
    thread = threading.Thread(target=action)  # a new one, which must still start
    thread.start()
    thread.join()
    return "done"
libc = ctypes.CDLL(None, use_errno=True)
say(result={
    "connect": tried(connect),
    "unix": tried(lambda: socket.socket(socket.AF_UNIX).close()),
    "program": tried(lambda: subprocess.run([sys.executable, "-c", ""]).returncode),
    "spawn": tried(lambda: os.posix_spawn(sys.executable, [sys.executable, "-c", ""], {}) > 0),
    "fork": tried(fork),
    "exec": tried(lambda: os.execv("/nowhere", ["nowhere"])),
    "kill": tried(lambda: os.kill(os.getppid(), 0)),
    "own": tried(lambda: os.kill(os.getpid(), 0)),
    "thread": tried(lambda: ran(lambda: None)),
    "trace": (libc.ptrace(16, 0, 0, 0), ctypes.get_errno()),  # attach, to nobody
})
"""
    free, held = run(OPEN + code, {"port": port}), run(CONFINED + code, {"port": port})
    assert free == {
        "connect": "done", "unix": "None", "program": "0", "spawn": "True", "fork": "done",
        "exec": "FileNotFoundError", "kill": "None", "own": "None", "thread": "done",
        "trace": [-1, 3],
    }  # fmt: skip
    refused = dict.fromkeys(("connect", "unix", "program", "spawn", "fork", "exec", "kill"))
    assert held == {
        **dict.fromkeys(refused, "PermissionError"),
        "own": "None", "thread": "done", "trace": [-1, 13],
    }  # fmt: skip


@filtered
def test_threads_that_were_there_before_are_held_too(port: int) -> None:
    code = """
import socket, threading
from projaudit.behaviour import confinement
ready, heard = threading.Event(), []
def late():
    ready.wait()
    heard.append(tried(lambda: socket.create_connection(("127.0.0.1", request["port"]), 5)))
thread = threading.Thread(target=late)
thread.start()
confinement.confine(told["memory"], told["gpu"])
ready.set()
thread.join()
say(result={"heard": heard})
"""
    assert run(OPEN + code, {"port": port}) == {"heard": ["PermissionError"]}


@filtered
@pytest.mark.skipif(platform.machine() != "x86_64", reason="x32 is a mode of x86_64")
def test_the_other_way_into_the_kernel_kills() -> None:
    code = "import ctypes; ctypes.CDLL(None).syscall(0x40000000 + 39); say(result={})"
    assert run(f"{OPEN}{code}") == {}
    assert "signal 31 (SIGSYS)" in refusal(f"{CONFINED}{code}")


@filtered
def test_with_a_gpu_its_driver_may_talk_to_its_own() -> None:
    code = """
import socket
say(result={str(int(f)): tried(lambda: socket.socket(f).close())
            for f in (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK)})
"""
    answer = run(CONFINED + code, gpu=True)
    assert answer.pop(str(int(socket.AF_UNIX))) == "None"
    assert set(answer.values()) == {"PermissionError"}


def test_without_seccomp_python_code_is_refused(port: int) -> None:
    code = """
import socket, subprocess
from projaudit.behaviour import confinement
confinement.refuse_in_python()
say(result={
    "connect": tried(lambda: socket.create_connection(("127.0.0.1", request["port"]), 5)),
    "program": tried(lambda: subprocess.run([sys.executable, "-c", ""])),
    "system": tried(lambda: os.system("true")),
    "fork": tried(os.fork),
    "exec": tried(lambda: os.execv("/nowhere", ["nowhere"])),
})
"""
    assert set(run(OPEN + code, {"port": port}).values()) == {"PermissionError"}


@linux
def test_writes_stay_in_its_own_folder(tmp_path: Path) -> None:
    code = """
import tempfile
def write(path, count=1):
    with open(path, "wb") as out:
        out.write(bytes(count))
    return "done"
own = os.path.join(tempfile.gettempdir(), "file")
say(result={
    "outside": tried(lambda: write(request["outside"])),
    "change": tried(lambda: write(request["there"])),
    "remove": tried(lambda: os.unlink(request["there"])),
    "null": tried(lambda: write("/dev/null")),
    "own": tried(lambda: write(own)),
    "large": tried(lambda: write(own, 32 << 20)),
    "enforced": fenced[0],
})
"""
    there = tmp_path / "there"
    there.write_text("kept")
    answer = run(CONFINED + code, {"outside": str(tmp_path / "new"), "there": str(there)})
    assert answer["own"] == answer["null"] == "done"
    assert answer["large"] == "OSError"
    if not answer["enforced"]:
        pytest.skip("this kernel has no Landlock")
    assert answer["outside"] == answer["change"] == answer["remove"] == "PermissionError"
    assert there.read_text() == "kept"
    assert not (tmp_path / "new").exists()


@linux
def test_what_is_enforced_is_said() -> None:
    code = "say(result={'confined': confined})"
    enforced, missing = run(CONFINED + code, memory=3 << 29)["confined"]
    assert enforced[0] == "memory <= 1.5 GiB"
    assert enforced[1:] == [
        "no network (seccomp)", "no new programs (seccomp)", "no new processes (seccomp)",
    ]  # fmt: skip
    assert missing == []
    enforced, missing = run(CONFINED + code, gpu=True)["confined"]
    assert len(enforced) == 3
    assert missing == ["memory <= 1.0 GiB (on a GPU)"]


@linux
def test_memory_is_limited() -> None:
    code = "say(result={'length': len(bytearray(500 << 20))})"
    assert run(f"{CONFINED}{code}") == {"length": 500 << 20}
    assert refusal(f"{CONFINED}{code}", memory=400 << 20).endswith("ran out of memory")


def test_the_environment_holds_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "hf_secret")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    monkeypatch.setenv("LD_LIBRARY_PATH", "/nowhere")
    code = "say(result={'environment': dict(os.environ), 'cwd': os.getcwd(), 'path': sys.path})"
    answer = run(OPEN + code)
    told = answer["environment"]
    assert "hf_secret" not in str(told)
    assert told["HF_HUB_OFFLINE"] == told["TRANSFORMERS_OFFLINE"] == told["OMP_NUM_THREADS"] == "1"
    assert told["HOME"] == told["TMPDIR"] == answer["cwd"] != os.environ.get("HOME")
    assert told["CUDA_VISIBLE_DEVICES"] == ""
    assert told["GOMP_SPINCOUNT"] == "1000"  # beside other work an audit is not many times slower
    assert "LD_LIBRARY_PATH" not in told
    assert answer["cwd"] not in answer["path"]
    assert not Path(answer["cwd"]).exists()
    told = run(OPEN + code, gpu=True)["environment"]
    assert (told["CUDA_VISIBLE_DEVICES"], told["LD_LIBRARY_PATH"]) == ("7", "/nowhere")


# ------------------------------------------------------------------ how it is heard


def test_progress_and_an_answer_arrive() -> None:
    heard: list[tuple[str, int, int]] = []
    code = """
say(progress=["images\\x1b[31m", 1, 2])
say(progress=["images", 2, 2])
print("noise" * 100_000, file=sys.stderr)
say(result={"echo": request, "long": "x" * 300_000})
"""
    answer = run(OPEN + code, {"a": [1, None]}, progress=lambda *told: heard.append(told))
    assert answer == {"echo": {"a": [1, None]}, "long": "x" * 300_000}
    assert heard == [("images\\u001b[31m", 1, 2), ("images", 2, 2)]


def test_a_refusal_is_its_reason_made_inert() -> None:
    assert refusal(f"{OPEN}say(refused='no \\x1b[31m tower')") == "no \\u001b[31m tower"


@pytest.mark.parametrize(
    "code",
    [
        "",
        "print('hello')",
        "say(result=[])",
        "say(result={}); say(result={})",
        "say(result={}); say(progress=['late', 1, 1])",
        "say(result={}, more=1)",
        "say(refused=1)",
        "say(progress=['what', 1])",
        "say(other={})",
        'print(\'{"result": {"x": NaN}}\')',
        'print(\'{"result": {}, "result": {"a": 1}}\')',
        "print('{\"result\": ' + '[' * 200_000)",
        "sys.stdout.write(json.dumps({'result': {}}))",
        "sys.stdout.buffer.write(b'\\xff\\n')",
        "say(result={}); sys.stdout.write('more')",
    ],
)
def test_anything_else_is_no_answer(code: str) -> None:
    assert refusal(OPEN + code) == "the process that runs it gave no proper answer"


def test_output_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "LINE_LIMIT", 100_000)
    assert "proper answer" in refusal(f"{OPEN}say(result={{'x': 'y' * 100_000}})")
    assert "proper answer" in refusal(f"{OPEN}\nwhile True: sys.stdout.write('y' * 10_000)")
    monkeypatch.setattr(sandbox, "TOTAL_LIMIT", 100_000)
    assert "proper answer" in refusal(f"{OPEN}\nwhile True: say(progress=['on', 1, 2])")


# ------------------------------------------------------------------ how it ends


def is_gone(pid: int) -> bool:
    """Whether a process has ended, or does within seconds; nobody may have waited for it."""
    for _ in range(200):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
            os.kill(pid, 0)
        except (OSError, IndexError):
            return not Path("/proc/self").exists() or not Path(f"/proc/{pid}").exists()
        time.sleep(0.02)
    return False


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("os.kill(os.getpid(), 9)", "was stopped by signal 9 (SIGKILL, as where memory runs out)"),
        ("os.kill(os.getpid(), 11)", "was stopped by signal 11 (SIGSEGV)"),
        ("sys.exit('\\x1b[31mboom')", "stopped with status 1 (\\u001b[31mboom)"),
        ("say(result={}); sys.exit(3)", "stopped with status 3"),
        ("1 / 0", "stopped with status 1 (ZeroDivisionError: division by zero)"),
        ("raise MemoryError", "ran out of memory"),
        (
            "print('memory allocation of 9 bytes failed', file=sys.stderr); os.abort()",
            "ran out of memory",
        ),
    ],
)
def test_a_crash_is_one_line(code: str, expected: str) -> None:
    assert refusal(OPEN + code) == f"the process that runs it {expected}"


STARTS = """
import subprocess
other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
say(progress=["pids", os.getpid(), other.pid])
"""


def pids_of(action: Callable[[sandbox.Progress], object]) -> Sequence[int]:
    heard: list[int] = []
    action(lambda what, one, other: heard.extend((one, other)))
    return heard


@linux
def test_a_time_out_ends_what_the_child_started() -> None:
    def late(progress: sandbox.Progress) -> None:
        says = refusal(f"{OPEN}{STARTS}time.sleep(600)", seconds=1.5, progress=progress)
        assert says == "the process that runs it exceeded its 1.5 s"

    assert all(map(is_gone, pids_of(late)))


@linux
def test_what_it_leaves_behind_delays_nothing_and_ends() -> None:
    def quick(progress: sandbox.Progress) -> None:
        start = time.monotonic()
        assert run(f"{OPEN}{STARTS}say(result={{}})", progress=progress) == {}
        assert time.monotonic() - start < 20

    assert all(map(is_gone, pids_of(quick)))


@linux
def test_an_error_of_the_caller_ends_it() -> None:
    heard: list[int] = []

    def fail(what: str, one: int, other: int) -> None:
        heard.extend((one, other))
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        run(f"{OPEN}{STARTS}time.sleep(600)", progress=fail)
    assert len(heard) == 2
    assert all(map(is_gone, heard))


@linux
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_nothing_outlives_the_parent(sent: signal.Signals) -> None:
    # After a SIGKILL nobody is left to end the others, so the child sees to itself.
    inner = f"{CONFINED}say(progress=['pids', os.getpid(), os.getpid()]); time.sleep(600)"
    if sent == signal.SIGINT:
        inner = f"{OPEN}{STARTS}time.sleep(600)"
    outer = f"""
from projaudit.behaviour import sandbox
sandbox.run({{}}, seconds=600, memory=1 << 30, gpu=False, child=("-c", {inner!r}),
            progress=lambda *told: print(*told[1:], flush=True))
"""
    with subprocess.Popen(
        [sys.executable, "-c", outer],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as parent:
        assert parent.stdout is not None
        pids = [int(word) for word in parent.stdout.readline().split()]
        assert len(pids) == 2
        parent.send_signal(sent)
        _, complaints = parent.communicate(timeout=30)
    assert ("KeyboardInterrupt" in complaints) == (sent == signal.SIGINT)
    assert all(map(is_gone, pids))


# ------------------------------------------------------------------ the child itself


def child(probe: str) -> str:
    """The real child with another probe, and without the heavy modules."""
    return f"""
import sys, types
sys.modules["torch"] = sys.modules["transformers"] = types.ModuleType("stub")
stub = types.ModuleType("projaudit.behaviour.probe")
exec({probe!r}, stub.__dict__)
sys.modules[stub.__name__] = stub
from projaudit.behaviour.child import _probing, main
main(_probing)
"""


def test_the_child_answers_and_says_what_it_may_not_do() -> None:
    heard: list[tuple[str, int, int]] = []
    code = """
import os
def probe(request, tell):
    print("from Python")
    os.write(1, b"from C\\n")
    tell("images", 1, 1)
    return {"twice": request["n"] * 2}
"""
    answer = run(child(code), {"n": 4}, progress=lambda *told: heard.append(told))
    held = answer.pop("sandbox")
    assert answer == {"twice": 8}
    assert heard == [("images", 1, 1)]
    assert set(held) == {"enforced", "missing"}
    if FILTERED:
        assert "no network (seccomp)" in held["enforced"]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("from projaudit.behaviour.reasons import CouldNotProbe; raise CouldNotProbe('x\\ny')",
         "x\\u000ay"),
        ("raise MemoryError", "the process that runs it ran out of memory"),
        ("raise RuntimeError('DefaultCPUAllocator: can\\'t allocate memory: you tried')",
         "the process that runs it ran out of memory"),
        ("class OutOfMemoryError(RuntimeError): pass\n  raise OutOfMemoryError('CUDA')",
         "the process that runs it ran out of memory"),
        ("raise OSError(12, 'Cannot')", "the process that runs it ran out of memory"),
        ("raise KeyError('a\\x1b')", "KeyError: 'a\\x1b'"),
        ("raise ValueError", "ValueError"),
        ("raise ValueError('first\\nsecond')", "ValueError: first"),
        ("import transformers.nothing", "ModuleNotFoundError: No module named"),
        ("return {'x': float('nan')}", "ValueError: Out of range float values"),
    ],
)  # fmt: skip
def test_the_child_turns_errors_into_reasons(body: str, expected: str) -> None:
    assert refusal(child(f"def probe(request, tell):\n  {body}")).startswith(expected)


def test_the_child_that_exits_gave_no_answer() -> None:
    code = "import sys\ndef probe(request, tell):\n  sys.exit(0)"
    assert refusal(child(code)) == "the process that runs it gave no proper answer"


def test_it_runs_from_any_thread() -> None:
    answers: list[dict[str, Any]] = []
    thread = threading.Thread(target=lambda: answers.append(run(f"{OPEN}say(result={{}})")))
    thread.start()
    thread.join()
    assert answers == [{}]
