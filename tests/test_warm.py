"""warm.py: a warm launch is, for the program and for who started it, what a cold one is."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import warm

pytestmark = pytest.mark.skipif(warm.HAS_GPU, reason="all launches are cold where there is a GPU")
SHOW = """
import json, os, sys, threading
print(json.dumps({
    "argv": sys.argv, "path": sys.path[0], "folder": os.getcwd(), "name": __name__, "spec": __spec__ and __spec__.name,
    "main": sys.modules["__main__"].__dict__ is globals(), "file": globals().get("__file__"), "doc": __doc__, "SIGINT": __import__("signal").getsignal(2).__name__,
    "environment": {key: value for key, value in os.environ.items() if key != "LC_CTYPE"},
    "umask": os.umask(0), "cores": sorted(os.sched_getaffinity(0)), "threads": threading.active_count(),
    "files": sorted(int(name) for name in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{name}")),
}, sort_keys=True, indent=1))
"""


def both(*words, **settings) -> list[subprocess.CompletedProcess]:
    """The same launch, cold and warm."""
    settings = {"capture_output": True, "text": True, "timeout": 60} | settings
    return [subprocess.run([python, *map(str, words)], **settings) for python in (sys.executable, warm.python())]


def alike(*words, **settings) -> subprocess.CompletedProcess:
    cold, warmed = both(*words, **settings)
    printed = warmed.stderr.replace(warm.python(), sys.executable)
    assert (warmed.returncode, warmed.stdout, printed) == (cold.returncode, cold.stdout, cold.stderr)
    return cold


@pytest.fixture
def script(tmp_path):
    """A script and a package in a folder, and another folder."""
    (tmp_path / "kit" / "part").mkdir(parents=True)
    (tmp_path / "else").mkdir()
    (tmp_path / "kit" / "part" / "__init__.py").touch()
    for path in ("show.py", "part/show.py", "part/__main__.py"):
        (tmp_path / "kit" / path).write_text(SHOW)
    return tmp_path / "kit" / "show.py"


def test_it_is_warm_and_calls_itself_so():
    done = subprocess.run([warm.python(), "-c", "import sys; print(sys.executable, 'torch' in sys.modules, 'finetune' in sys.modules)"], capture_output=True, text=True)
    assert done.stdout == f"{warm.python()} True False\n", done.stderr


@pytest.mark.parametrize("words", [("show.py", "a  b", "-c", "ä"), ("-u", "show.py"), ("-m", "part.show", "-x"), ("-m", "part"), ("-c", SHOW, "1")])
def test_a_program_finds_itself_where_a_cold_one_does(script, words):
    environment = os.environ | {"PYTHONPATH": "/no/such/folder", "OWN": "1", "TZ": "Asia/Tokyo"}
    alike(*words, cwd=script.parent, env=environment)
    link = script.parent.parent / "else" / "link.py"
    link.symlink_to(script)
    alike(link, cwd=script.parent, env=environment)


def test_standard_input_and_a_closed_output():
    code = "import sys; print(sys.stdin.read().upper(), end='')"
    assert alike("-c", code, input="ab\nc").stdout == "AB\nC"
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as closed:
        done = both("-c", "print(1)", capture_output=False, stdout=closed, stderr=subprocess.PIPE)
    assert done[0].returncode == done[1].returncode and all("BrokenPipeError" in each.stderr for each in done)


@pytest.mark.parametrize("code", [
    "import sys; sys.exit(3)", "import sys; sys.exit('a reason')", "raise SystemExit", "import os; os._exit(9)", "1/0", "def f(): 1/0\nf()", "import sys; sys.exit(-1)",
    "raise KeyboardInterrupt", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "import os; os.abort()", "a b",
    "import atexit; atexit.register(print, 'the end'); 1/0",
    "import threading, time; threading.Thread(target=lambda: (time.sleep(0.3), print('late'))).start()",
    "import sys; sys.excepthook = lambda *error: print(error[1]); 1/0",
])  # fmt: skip
def test_it_ends_as_a_cold_one(code, tmp_path):
    alike("-c", code, cwd=tmp_path)
    (tmp_path / "program.py").write_text(code)
    alike("program.py", cwd=tmp_path)


def test_a_program_that_is_not_there(tmp_path):
    assert alike("nowhere.py", cwd=tmp_path).returncode == 2
    assert alike("-m", "nowhere", cwd=tmp_path).stderr.endswith("No module named nowhere\n")


WAIT = """
import os, signal, sys, time
if sys.argv[1] == "tells":
    signal.signal(int(sys.argv[2]), lambda number, frame: (print("got", number), sys.exit(5)))
print(os.getpid(), flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
@pytest.mark.parametrize("how", ["tells", "default"])
def test_signals_reach_it(number, how):
    found = []
    for python in (sys.executable, warm.python()):
        with subprocess.Popen([python, "-c", WAIT, how, str(int(number))], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            pid = int(process.stdout.readline())
            process.send_signal(number)
            found.append((process.communicate(timeout=30)[0], process.returncode))
            gone(pid)
    assert found[0] == found[1]


def is_alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return False


def gone(pid: int) -> None:
    deadline = time.monotonic() + 10
    while is_alive(pid):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_killed_or_out_of_time_it_is_gone():
    process = subprocess.Popen([warm.python(), "-c", WAIT, ""], stdout=subprocess.PIPE, text=True, start_new_session=True)
    pid = int(process.stdout.readline())
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    gone(pid)
    with pytest.raises(subprocess.TimeoutExpired) as raised:
        subprocess.run([warm.python(), "-c", WAIT, ""], stdout=subprocess.PIPE, timeout=2)
    gone(int(raised.value.stdout))


@pytest.mark.parametrize("change", [{"HF_HOME": "/elsewhere"}, {"TRITON_INTERPRET": "1"}, {"PYTHONUTF8": "0"}, {"HOME": "/"}])
def test_what_imports_have_read_makes_a_launch_cold(change):
    code = "import sys; print('torch' in sys.modules)"
    done = subprocess.run([warm.python(), "-c", code], env=os.environ | change, capture_output=True, text=True)
    assert done.stdout == "False\n"


def test_open_files_and_flags_make_a_launch_cold():
    reader, writer = os.pipe()
    code = f"import os, sys; os.write({writer}, b'x'); print('torch' in sys.modules)"
    done = subprocess.run([warm.python(), "-c", code], pass_fds=[writer], capture_output=True, text=True)
    assert done.stdout == "False\n" and os.read(reader, 2) == b"x"
    os.close(reader)
    os.close(writer)
    done = subprocess.run([warm.python(), "-S", "-c", "import sys; print('torch' in sys.modules)"], capture_output=True, text=True)
    assert done.stdout == "False\n"


def test_threads_of_torch_and_numbers_at_random():
    code = "import torch, numpy, random; print(torch.get_num_threads(), numpy.random.rand(), random.random(), torch.rand(1).item())"
    found = [
        subprocess.run([warm.python(), "-c", code], env=os.environ | {"OMP_NUM_THREADS": count}, capture_output=True, text=True).stdout.split()
        for count in "123"
    ]
    assert [words[0] for words in found] == ["1", "2", "3"]
    assert len({words[1] for words in found}) == len({words[2] for words in found}) == 3
    assert len({words[3] for words in found}) == 1  # torch begins with the same seed in every process


def test_one_that_has_ended_is_cold(tmp_path):
    """A path that a test has kept."""
    import warm_server

    folder = tmp_path / "it's gone"
    folder.mkdir()
    warm_server.write_program(folder)
    assert subprocess.run([folder / "python", "-c", "print(1)"], capture_output=True, text=True).stdout == "1\n"


def test_a_script_and_its_workers_are_warm(tmp_path):
    """As launch.sh, which replaces itself by Python, which starts Python again."""
    (tmp_path / "launch.sh").write_text('"$FINETUNE_PYTHON" -c "print(0)"\nexec "$FINETUNE_PYTHON" outer.py "$@"\n')
    (tmp_path / "outer.py").write_text("import subprocess, sys\nsys.exit(subprocess.run([sys.executable, '-u', 'inner.py', *sys.argv[1:]]).returncode)\n")
    (tmp_path / "inner.py").write_text("import sys\nprint('torch' in sys.modules, *sys.argv[1:])\nsys.exit(7)\n")
    done = subprocess.run(["bash", "launch.sh", "a b"], cwd=tmp_path, env=os.environ | {"FINETUNE_PYTHON": warm.python()}, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (7, "0\nTrue a b\n"), done.stderr


def test_a_signal_to_a_program_that_has_just_ended_is_nobodys():
    """It comes while the end is on its way: the exit code is the program's, and nothing is printed."""
    code = "import os, sys; print(os.getpid(), flush=True); sys.stdin.read(); sys.exit(75)"
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen([warm.python(), "-c", code], **pipes, text=True) as front:
        fork = int(front.stdout.readline())
        front.send_signal(signal.SIGSTOP)
        front.stdin.close()
        while Path(f"/proc/{fork}").exists():
            time.sleep(0.02)
        time.sleep(0.3)  # the server closes its end
        front.send_signal(signal.SIGTERM)
        front.send_signal(signal.SIGCONT)
        assert front.wait(timeout=30) == 75 and front.stderr.read() == ""
