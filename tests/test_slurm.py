"""A SLURM of two nodes on this machine: the script in config/slurm, srun alone, a job's own process, and sweeps."""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.conftest import ARB, ROOT, SHORT, assert_same_run, log_of
from tests.scripts import ended, forked_scripts, free_port, kill_all, processes_of, started, wait_for  # noqa: F401
from tests.test_sweep import folder_of
from tests.test_sweep_plan import ARMS, LATE, OPTIONS, written

BINARIES = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"], "/usr/sbin"])
NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun")
MISSING = [name for name in NEEDED if not shutil.which(name, path=BINARIES)]
LONG = 40  # epochs: more than pass between a line of the metrics and a signal

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(
        bool(MISSING) or os.geteuid() != 0,
        reason=f"needs root, and Debian's slurmctld, slurmd, slurm-client and munge (missing: {MISSING})",
    ),
]

# The first node has the machine's name, by which the others find it. cred_expire: a requeued job waits so many seconds;
# for less than 5, SLURM takes its default of two minutes.
CONFIG = """
ClusterName=test
SlurmctldHost={name}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthInfo=socket={folder}/munge,cred_expire=5
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
NodeName={name} NodeHostname={name} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4
NodeName={name}-2 NodeHostname={name} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4
PartitionName=all Nodes=ALL Default=YES
"""


class Cluster:
    """``folder`` holds the daemons' files and the output of jobs."""

    def __init__(self, folder: Path):
        self.folder = folder
        # Jobs inherit it: one thread per process, as the runs that they are compared with.
        self.environment = {**os.environ, "PATH": BINARIES, "SLURM_CONF": str(folder / "slurm.conf")}

    def start(self, *command: str) -> subprocess.Popen:
        log = (self.folder / f"{'_'.join(command[:3])}.log").open("w")
        return subprocess.Popen(command, env=self.environment, stdout=log, stderr=subprocess.STDOUT)

    def call(self, *command: object) -> str:
        """Run a command to its end, and return its output."""
        words = [str(word) for word in command]
        done = subprocess.run(words, env=self.environment, cwd=ROOT, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def submit(self, *words: object) -> str:
        """Returns the job's number. On one node or two there are no GPUs."""
        return self.call("sbatch", "--parsable", f"--output={self.folder}/%j.out", *words).strip()

    def job(self, number: str) -> dict[str, str]:
        words = self.call("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def state(self, number: str) -> str:
        return self.job(number)["JobState"]

    def output(self, number: str) -> str:
        return (self.folder / f"{number}.out").read_text()

    def wait(self, number: str, condition: Callable[[], object], seconds: float = 400) -> None:
        """Wait until ``condition`` holds; it looks every half second. Fails if the job ends before."""
        end = time.monotonic() + seconds
        while not condition():
            over = self.state(number) in ("FAILED", "COMPLETED", "CANCELLED", "TIMEOUT") and not condition()
            assert not over and time.monotonic() < end, self.output(number)
            time.sleep(0.5)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    name = socket.gethostname().split(".")[0]
    folder = Path(tempfile.mkdtemp(prefix="slurm"))  # a short path: sockets have no long names
    cluster = Cluster(folder)
    (folder / "state").mkdir()
    (folder / "slurm.conf").write_text(CONFIG.format(name=name, folder=folder, ports=[free_port() for _ in range(3)]))
    (folder / "key").write_bytes(os.urandom(128))
    (folder / "key").chmod(0o600)
    files = [f"--{option}={folder}/{name}" for option, name in {"key-file": "key", "socket": "munge"}.items()]
    files += [f"--{option}={folder}/{option}" for option in ("pid-file", "log-file", "seed-file")]
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        stack.callback(kill_all, folder)  # the daemons, their children and jobs write there
        cluster.start("munged", "--foreground", "--force", *files)
        wait_for((folder / "munge").exists, seconds=20)
        cluster.start("slurmctld", "-D", "-c")
        for node in (name, f"{name}-2"):
            cluster.start("slurmd", "-D", "-N", node)
        wait_for(lambda: cluster.call("sinfo", "-h", "-N", "-o", "%T").split() == ["idle", "idle"], seconds=60)
        yield cluster
        cluster.call("scancel", "--user=root", "--full", "--signal=KILL")


def words(save_dir: Path, *overrides: object) -> list[object]:
    return ["--cfg", ARB, *SHORT, "device", "cpu", "save_dir", save_dir, *overrides]


def rows(save_dir: Path) -> int:
    return sum(len(path.read_text().splitlines()) for path in save_dir.glob("*/metrics.jsonl"))


TWO_NODES = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--gpus-per-node=0")
SCRIPT = "config/slurm/train.sbatch"


def test_a_job_that_is_requeued_twice_trains_the_run_that_nothing_has_stopped(cluster, scripts, tmp_path):
    saved = tmp_path / "saved"
    job = cluster.submit(*TWO_NODES, SCRIPT, *words(saved, "num_epochs", LONG))
    for restarts, epochs in enumerate((2, 12)):
        cluster.wait(job, lambda epochs=epochs: rows(saved) >= epochs)
        cluster.call("scancel", "--signal=USR1", job)  # as SLURM itself, two minutes before the limit
        cluster.wait(job, lambda restarts=restarts: cluster.job(job)["Restarts"] == str(restarts + 1))
    cluster.wait(job, lambda: cluster.state(job) == "COMPLETED")
    assert (cluster.job(job)["Restarts"], cluster.job(job)["ExitCode"]) == ("2", "0:0")
    stops = re.findall(r"^stopped by SIGUSR1: .* is saved; submit the same script again .*$", cluster.output(job), re.M)
    assert len(stops) == 2, cluster.output(job)
    undisturbed = tmp_path / "undisturbed"
    with scripts.group(2, tmp_path, "train_stage1.py", *words(undisturbed, "num_epochs", LONG)) as ranks:
        assert [rank.process.wait() for rank in ranks] == [0, 0], ranks[0].err()
    (run,), (other) = saved.iterdir(), next(undisturbed.iterdir())
    assert_same_run(run, other)
    assert "2 processes" in log_of(run)


def test_the_time_limit_stops_a_job_with_a_checkpoint_and_starts_it_again(cluster, tmp_path):
    """SLURM sends the signal up to a minute too early."""
    saved = tmp_path / "saved"
    job = cluster.submit(*TWO_NODES, "--time=4", SCRIPT, *words(saved, "num_epochs", 100_000, "eval_every", 100_000))
    cluster.wait(job, lambda: cluster.job(job)["Restarts"] == "1")
    assert "stopped by SIGUSR1: epoch " in cluster.output(job)
    assert [path.name for path in saved.glob("*/ckps/*")] == ["current.pth.tar"]
    cluster.call("scancel", job)  # and is not started again
    cluster.wait(job, lambda: cluster.state(job) == "CANCELLED")


def test_a_job_that_fails_is_not_started_again(cluster, tmp_path):
    job = cluster.submit(*TWO_NODES, SCRIPT, *words(tmp_path, "lr", -1))
    cluster.wait(job, lambda: cluster.state(job) == "FAILED")
    assert cluster.job(job)["Restarts"] == "0"
    assert "lr: -1 must be a number > 0" in cluster.output(job)


def test_srun_alone_starts_one_run(cluster, tmp_path):
    """Three tasks: two on one node, one on the other."""
    command = ["python", "train_stage1.py", *words(tmp_path / "saved", "num_epochs", 1)]
    said = cluster.call("srun", "--nodes=2", "--ntasks=3", *command)
    assert said.count("3 processes: ") == 1
    (run,) = (tmp_path / "saved").iterdir()
    said = cluster.call(
        "srun", "--ntasks=2", "python", "eval.py", *words(tmp_path, "resume", run / "ckps/current.pth.tar")
    )
    assert said.count("* Acc@1") == 1


def test_a_batch_script_that_forgets_srun_is_refused(cluster, tmp_path):
    command = "python " + " ".join(map(str, ["train_stage1.py", *words(tmp_path / "saved")]))
    job = cluster.submit("--ntasks=3", f"--wrap={command}")
    cluster.wait(job, lambda: cluster.state(job) == "FAILED")
    assert cluster.output(job) == (
        "error: a batch script's own process in a SLURM job for 3 tasks; add srun, or use --ntasks=1\n"
    )
    assert not (tmp_path / "saved").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Sweeps

ON_SLURM = ("--cluster", "slurm", "--slurm", "cpus-per-task=2", "time=1:00:00")  # two jobs per node


class Swept:
    """A sweep in a folder of its own, and what its command does."""

    def __init__(self, cluster: Cluster, folder: Path, **changes: object):
        self.cluster, self.path = cluster, written(folder, **changes)
        self.said = folder / "said"  # of the command alone: what writes there does not outlive it
        self.said.mkdir()
        self.home = folder / "saved/tiny"
        self.command = ("-m", "utils.sweep", self.path, "--save_dir", self.home.parent)

    def run(self, *words: object) -> SimpleNamespace:
        with started(self.said, *self.command, *words, **self.cluster.environment) as run:
            return ended(run, 1200)

    def call(self, *words: object) -> str:
        done = self.run(*words)
        assert done.code == 0, done.err
        return done.out

    def jobs(self) -> dict[str, str]:
        """Run -> job."""
        return json.loads((self.home / "jobs/ids.json").read_text())

    def epochs(self) -> dict[str, int]:
        """Run -> epochs, of runs that have ended one."""
        paths = self.home.glob("*/metrics.jsonl")
        return {path.parent.name.rsplit("_", 1)[0]: len(path.read_text().splitlines()) for path in paths}

    def wait_for_epochs(self, least: int, runs: int) -> None:
        wait_for(lambda: sum(epochs >= least for epochs in self.epochs().values()) == runs, seconds=200)

    def results(self) -> list[dict]:
        """Rows of results.json."""
        return json.loads((self.home / "results.json").read_text())["runs"]


def assert_same_results(one: Swept, other: Swept) -> None:
    rows = one.results(), other.results()
    same = ("run", "hash", "options", "data", "epochs", "last", "cross_fitted", "best")
    assert [[row[key] for key in same] for row in rows[0]] == [[row[key] for key in same] for row in rows[1]]
    for row in rows[0]:
        assert_same_run(folder_of(one.home, row["run"]), folder_of(other.home, row["run"]))


def test_a_sweep_over_a_node_that_fails_and_jobs_that_are_stopped_has_the_numbers_of_one_here(cluster, tmp_path):
    options = OPTIONS | {"num_epochs": 3 * LONG}
    here, there = (Swept(cluster, tmp_path / name, options=options) for name in ("here", "there"))
    assert there.call(*ON_SLURM).count(" submit ") == 4
    jobs = there.jobs()
    assert there.call(*ON_SLURM).splitlines()[0] == "4 runs, 0 finished, 4 queued or running, 0 new"
    assert there.jobs() == jobs
    said = there.call("--jobs", 4)
    assert "4 runs are queued or running on a cluster, and left to it" in said and " start " not in said
    there.wait_for_epochs(2, runs=4)
    second = f"{socket.gethostname().split('.')[0]}-2"
    on_second = [job for job in jobs.values() if cluster.job(job)["NodeList"] == second]
    limited, preempted = (job for job in jobs.values() if job not in on_second)
    cluster.call("scontrol", "update", f"nodename={second}", "state=down", "reason=test")
    cluster.call("scancel", "--signal=USR1", limited)  # as before the time limit
    cluster.call("scancel", "--signal=TERM", preempted)  # as at the beginning of the time before preemption
    for job in jobs.values():
        cluster.wait(job, lambda job=job: cluster.job(job)["Restarts"] == "1")
    wait_for(lambda: not [*cluster.folder.glob(f"spool.{second}/{second}_*")])  # its steps have ended
    time.sleep(15)  # slurmd looks for that every few seconds, and would refuse a job that it takes for running
    cluster.call("scontrol", "update", f"nodename={second}", "state=resume")
    said = there.call(*ON_SLURM, "--wait")
    assert said.count(" done ") == 4 and " submit " not in said and "4 of 4 runs are finished" in said
    assert len(on_second) == 2 and [len(row["starts"]) for row in there.results()] == [2, 2, 2, 2]
    here.call("--jobs", 1)
    assert_same_results(here, there)


def test_forks_wait_for_their_parents_and_what_fails_stops_no_other(cluster, tmp_path):
    away = {"dataset": "folder", "data_path": str(tmp_path / "nowhere"), "imb_factor": None}
    lost = {"fork": {"arm": "away", "epoch": 1}, "lr_steps": [8, 9]}
    sweep = Swept(cluster, tmp_path, arms=ARMS | {"away": away} | LATE | {"lost": lost}, seeds=[0])
    done = sweep.run(*ON_SLURM, "--per_gpu", 2, "--wait")
    assert done.code == 1
    jobs = sweep.jobs()
    assert jobs["plain_seed0"] == jobs["arb_seed0"] != jobs["away_seed0"]
    assert jobs["late_seed0"] == jobs["lost_seed0"]
    assert [row["run"] for row in sweep.results()] == ["plain_seed0", "arb_seed0", "late_seed0"]
    first, second = done.err.splitlines()
    assert first.startswith("failed: away_seed0: ") and str(tmp_path / "nowhere") in first
    assert second == "failed: lost_seed0: away_seed0, whose checkpoint it begins with, has not come so far"
    assert [cluster.state(jobs[f"{arm}_seed0"]) for arm in ("plain", "away")] == ["COMPLETED", "FAILED"]


def test_a_sweep_begun_here_goes_on_on_the_cluster_and_ends_here(cluster, tmp_path):
    options = {"options": OPTIONS | {"num_epochs": 3 * LONG}, "seeds": [0]}
    moved, whole = (Swept(cluster, tmp_path / name, **options) for name in ("moved", "whole"))
    with started(moved.said, *moved.command, "--jobs", 2, **cluster.environment) as run:
        moved.wait_for_epochs(2, runs=2)
        run.process.kill()
        run.process.wait(10)
        wait_for(lambda: not processes_of(moved.home))  # its runs end with it
    moved.call(*ON_SLURM)
    moved.wait_for_epochs(max(moved.epochs().values()) + 2, runs=2)
    cluster.call("scancel", *moved.jobs().values())
    for job in moved.jobs().values():
        cluster.wait(job, lambda job=job: "CANCELLED" in cluster.state(job))
    said = moved.call("--jobs", 2)
    assert said.count(" done ") == 2
    assert [len(row["starts"]) for row in moved.results()] == [3, 3]
    whole.call("--jobs", 2)
    assert_same_results(moved, whole)
