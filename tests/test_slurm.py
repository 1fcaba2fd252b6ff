"""A SLURM of two nodes on this machine: the script in config/slurm, srun alone, and a job's own process."""

import contextlib
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

import pytest

from tests.conftest import ARB, ROOT, SHORT, assert_same_run, log_of
from tests.scripts import forked_scripts, free_port, kill_all, wait_for  # noqa: F401

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
    assert "error (rank 0): " in cluster.output(job)


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
