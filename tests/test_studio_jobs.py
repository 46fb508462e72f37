"""Jobs and their runner, with real processes: order, chains, cancelling, who outlives whom."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dreamloom.studio import runner as runner_module
from dreamloom.studio.jobs import Job, JobFolder, is_alive, own_identity, share_device
from dreamloom.studio.runner import KILL_AFTER_SECONDS, Runner, run_queue

# A job's words are Python here: the runner takes what is told them as an argument.
PYTHON = (sys.executable, "-c")
STUBBORN = """
import signal, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
print("deaf", flush=True)
time.sleep(60)
"""
POLITE = """
import time
try:
    print("ready", flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    print("a checkpoint is kept", flush=True)
    raise SystemExit(130)
"""
MARKING = """
import time
with open("told", "a") as file:
    file.write("{0}+")
    file.flush()
    time.sleep(0.15)
    file.write("{0}-")
"""
WAITING = """
import pathlib, time
print("on", flush=True)
while not pathlib.Path("go").exists():
    time.sleep(0.05)
"""
SOURCE = Path(__file__).parents[1] / "src"


@pytest.fixture
def jobs(tmp_path):
    return JobFolder(tmp_path / "jobs")


def work(runner: Runner, until, seconds: float = 20) -> None:
    """Let a runner work until something holds."""
    end = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < end, [(job.id, job.outcome) for job in runner.jobs]
        runner.tick()
        time.sleep(0.02)


def wait(until, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < end
        time.sleep(0.02)


def has_ended(*some: Job):
    return lambda: all(job.became.outcome not in {"queued", "running"} for job in some)


def test_a_job_runs_a_real_command_and_keeps_what_it_said(jobs, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(SOURCE))
    job = jobs.add("settings", ["settings", "--json"])
    work(Runner(jobs, tmp_path), has_ended(job), 60)
    assert (job.outcome, job.became.exit_code) == ("done", 0)
    assert "train.steps" in job.read_log()
    assert job.became.started_at <= job.became.ended_at


def test_one_that_fails_says_why(jobs, tmp_path):
    job = jobs.add("x", ["print('first'); raise SystemExit('the reason')"])
    work(Runner(jobs, tmp_path, PYTHON), has_ended(job))
    assert (job.outcome, job.became.exit_code) == ("failed", 1)
    assert job.last_line() == "the reason"


def test_the_queue_is_worked_off_in_its_order_one_at_a_time(jobs, tmp_path):
    told = tmp_path / "told"
    first, second, third = (jobs.add("x", [MARKING.format(name)]) for name in "abc")
    jobs.move(third, -1)
    jobs.move(third, -1)
    jobs.move(third, -1)  # nothing stands before it
    jobs.move(second, 1)  # nor behind this
    assert [job.id for job in jobs.waiting()] == [third.id, first.id, second.id]
    work(Runner(jobs, tmp_path, PYTHON), has_ended(first, second, third))
    assert told.read_text() == "c+c-a+a-b+b-"


def test_what_follows_a_job_waits_for_it_and_is_skipped_where_it_fails(jobs, tmp_path):
    good = jobs.add("x", ["print('made')"])
    after_good = jobs.add("x", ["print('used')"], after=good.id)
    bad = jobs.add("x", ["raise SystemExit(3)"])
    after_bad = jobs.add("x", ["print('never')"], after=bad.id)
    last = jobs.add("x", ["print('never')"], after=after_bad.id)
    free = jobs.add("x", ["print('free')"])
    jobs.move(after_good, -1)  # its place in the queue does not let it go first
    everything = (good, after_good, bad, after_bad, last, free)
    work(Runner(jobs, tmp_path, PYTHON), has_ended(*everything))
    outcomes = [job.outcome for job in everything]
    assert outcomes == ["done", "done", "failed", "skipped", "skipped", "done"]
    assert after_bad.read_log() == ""
    assert after_good.became.started_at >= good.became.ended_at - 0.1


def test_a_waiting_job_that_is_cancelled_never_starts(jobs, tmp_path):
    job = jobs.add("x", ["print('never')"])
    follower = jobs.add("x", ["print('never')"], after=job.id)
    job.cancel()
    work(Runner(jobs, tmp_path, PYTHON), has_ended(job, follower))
    assert (job.outcome, follower.outcome) == ("cancelled", "skipped")
    assert job.read_log() == follower.read_log() == ""


def test_a_running_job_is_asked_to_end_and_may_keep_a_checkpoint(jobs, tmp_path):
    job = jobs.add("x", [POLITE])
    runner = Runner(jobs, tmp_path, PYTHON)
    work(runner, lambda: "ready" in job.read_log())
    job.cancel()
    began = time.monotonic()
    work(runner, has_ended(job))
    assert time.monotonic() - began < 4
    assert (job.outcome, job.last_line()) == ("cancelled", "a checkpoint is kept")


def test_a_job_of_a_studio_in_the_background_of_a_script_can_be_asked_to_end(jobs, tmp_path):
    """A shell without job control lets what stands before & ignore Ctrl-C, and all it starts."""
    job = jobs.add("x", [POLITE])
    earlier = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        runner = Runner(jobs, tmp_path, PYTHON)
        work(runner, lambda: "ready" in job.read_log())
    finally:
        signal.signal(signal.SIGINT, earlier)
    job.cancel()
    work(runner, has_ended(job))
    assert (job.outcome, job.last_line()) == ("cancelled", "a checkpoint is kept")


def test_one_that_does_not_listen_is_killed_within_five_seconds(jobs, tmp_path, monkeypatch):
    assert KILL_AFTER_SECONDS + 2 * runner_module._TICK_SECONDS < 5
    monkeypatch.setattr(runner_module, "KILL_AFTER_SECONDS", 0.5)
    job = jobs.add("x", [STUBBORN])
    runner = Runner(jobs, tmp_path, PYTHON)
    work(runner, lambda: "deaf" in job.read_log())
    pid, started = job.became.pid, job.became.pid_started
    job.cancel()
    began = time.monotonic()
    work(runner, has_ended(job))
    assert 0.4 < time.monotonic() - began < 4
    assert (job.outcome, job.became.exit_code) == ("cancelled", -signal.SIGKILL)
    assert not is_alive(pid, started)


RUN_QUEUE = """
import sys
from pathlib import Path
from dreamloom.studio.runner import run_queue
run_queue(Path(sys.argv[1]), Path(sys.argv[1]), (sys.executable, "-c"))
"""


def start_runner(folder: Path) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-c", RUN_QUEUE, str(folder)],
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
        start_new_session=True,
    )


def test_a_job_outlives_its_runner_and_the_next_one_watches_it(jobs, tmp_path):
    job = jobs.add("x", [f"{WAITING}\nprint('my last line', flush=True)"])
    waiting = jobs.add("x", ["print('next')"])
    first = start_runner(tmp_path)
    wait(lambda: "on" in job.read_log())
    first.kill()
    first.wait()
    assert job.outcome == "running"
    assert is_alive(job.became.pid, job.became.pid_started)
    second = Runner(jobs, tmp_path, PYTHON)
    for _ in range(5):
        assert second.tick()
    assert (job.outcome, waiting.outcome) == ("running", "queued")
    (tmp_path / "go").touch()
    work(second, has_ended(job, waiting))
    # It ended well, but nobody who was its parent saw it.
    assert (job.outcome, job.became.exit_code) == ("vanished", None)
    assert job.last_line() == "my last line"
    assert waiting.outcome == "done"


def test_a_job_that_was_killed_unseen_has_vanished_before_any_runner_says_so(jobs, tmp_path):
    job = jobs.add("x", ["import time; print('alive', flush=True); time.sleep(60)"])
    first = start_runner(tmp_path)
    wait(lambda: "alive" in job.read_log())
    first.kill()
    first.wait()
    os.kill(job.became.pid, signal.SIGKILL)
    wait(lambda: job.outcome == "vanished", 5)
    assert jobs.running() == []
    assert not Runner(jobs, tmp_path, PYTHON).tick()
    assert job.became.outcome == "vanished"
    assert job.last_line() == "alive"


def test_an_adopted_job_can_be_cancelled(jobs, tmp_path):
    job = jobs.add("x", [POLITE])
    first = start_runner(tmp_path)
    wait(lambda: "ready" in job.read_log())
    first.kill()
    first.wait()
    job.cancel()
    work(Runner(jobs, tmp_path, PYTHON), has_ended(job))
    assert (job.outcome, job.last_line()) == ("cancelled", "a checkpoint is kept")


def test_what_ends_between_two_looks_has_not_vanished(jobs, tmp_path):
    job = jobs.add("x", ["print('short')"])
    follower = jobs.add("x", ["print('next')"], after=job.id)
    runner = Runner(jobs, tmp_path, PYTHON)
    runner.tick()
    wait(lambda: not is_alive(job.became.pid, job.became.pid_started))
    assert job.outcome == "running"  # the runner lives, and will say
    assert not runner._decide(follower)
    assert follower.outcome == "queued"
    work(runner, has_ended(job, follower))
    assert (job.outcome, follower.outcome) == ("done", "done")


def test_there_is_one_runner_and_it_ends_when_nothing_waits(jobs, tmp_path, monkeypatch):
    job = jobs.add("x", ["import time; print('on', flush=True); time.sleep(1)"])
    first = start_runner(tmp_path)
    wait(lambda: "on" in job.read_log())
    assert not run_queue(tmp_path, tmp_path, PYTHON)
    assert first.wait(20) == 0
    assert job.outcome == "done"


def test_a_job_begins_not_before_its_time(jobs, tmp_path):
    later = jobs.add("x", ["print('later')"], not_before=time.time() + 3600)
    now = jobs.add("x", ["print('now')"])
    runner = Runner(jobs, tmp_path, PYTHON)
    work(runner, has_ended(now))
    assert later.outcome == "queued"
    assert runner.tick()  # the runner stays for it
    later.write_asked(later.asked.model_copy(update={"not_before": time.time() - 1}))
    work(runner, has_ended(later))


def test_jobs_of_different_devices_run_side_by_side(jobs, tmp_path):
    first = jobs.add("x", [WAITING], device="cuda:0")
    second = jobs.add("x", [WAITING], device="cuda:1")
    third = jobs.add("x", [WAITING], device="auto")
    runner = Runner(jobs, tmp_path, PYTHON)
    work(runner, lambda: "on" in first.read_log() and "on" in second.read_log())
    runner.tick()
    assert (len(jobs.running()), third.outcome) == (2, "queued")
    (tmp_path / "go").touch()
    work(runner, has_ended(first, second, third))
    assert share_device("auto", "cuda:1")
    assert not share_device("cpu", "cuda")


@pytest.mark.parametrize("word", ["print('a')\0", "#" * 200_000], ids=["NUL", "long"])
def test_a_job_that_no_system_can_start_fails_and_holds_up_nobody(jobs, tmp_path, word):
    job, behind = jobs.add("x", [word]), jobs.add("x", ["print('behind')"])
    work(Runner(jobs, tmp_path, PYTHON), has_ended(job, behind))
    assert (job.outcome, behind.outcome) == ("failed", "done")
    assert job.last_line()


def test_a_number_that_another_process_got_is_not_taken_for_the_job(jobs):
    pid, started = own_identity()
    assert is_alive(pid, started)
    assert not is_alive(pid, started - 100)
    assert not is_alive(2**30, started)
    assert not is_alive(-1, started)


def test_a_log_is_read_as_a_terminal_would_show_it(jobs):
    job = jobs.add("x", ["x"])
    job.log_file.write_bytes(b"start\n1 %\r50 %\r100 %\n\xff\n" + b"x" * 100_000 + b"\nlast\n\n")
    assert job.last_line() == "last"
    assert len(job.read_log()) <= 64_100
    job.log_file.write_bytes(b"1 %\r50 %\r100 %\r\n")
    assert job.read_log() == "100 %\n"


def test_only_what_has_ended_can_be_forgotten(jobs, tmp_path):
    job = jobs.add("x", ["print()"])
    assert not jobs.forget(job)
    work(Runner(jobs, tmp_path, PYTHON), has_ended(job))
    assert jobs.forget(job)
    assert list(jobs) == []


def test_a_damaged_state_is_that_of_a_job_that_waits(jobs):
    job = jobs.add("x", ["x"])
    (job.folder / "state.json").write_text('{"outcome": "dancing"}')
    assert job.outcome == "queued"
