"""Which of how many processes this is: environments as SLURM 22.05, Open MPI 4.1 and MPICH 4.0 make them."""

import os
import socket

import pytest

import train_stage1
from tests.conftest import ARB, failure
from utils import launcher
from utils.errors import InputError

# Task 5 of 8, on the second of two nodes; localhost is a host that every machine knows.
STEP = {
    **{"SLURM_JOB_ID": "21", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "8"},
    **{"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_GTIDS": "4,5,6,7"},
    **{"SLURM_STEP_TASKS_PER_NODE": "4(x2)", "SLURM_STEP_NODELIST": "localhost,gpu[07-08]"},
}
BATCH = {"SLURM_JOB_ID": "21", "SLURM_NTASKS": "3", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
BATCH |= {"SLURM_GTIDS": "0"}
OPEN_MPI = {
    **{"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", "PMIX_NAMESPACE": "1443168257"},
    **{"OMPI_COMM_WORLD_LOCAL_RANK": "3", "OMPI_COMM_WORLD_LOCAL_SIZE": "4"},
}
MPICH = {"PMI_SIZE": "4", "PMI_RANK": "3", "MPI_LOCALRANKID": "3", "MPI_LOCALNRANKS": "4"}
TORCHRUN = {
    **{"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"},
    **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"},
}


@pytest.fixture(name="joined")
def joined_in(monkeypatch):
    """Calls :func:`launcher.join` in an environment, and returns what it has added."""
    monkeypatch.setattr(os, "isatty", lambda file: False)

    def join(*parts: dict[str, str], **more: str) -> dict[str, str]:
        before = {name: value for part in (*parts, more) for name, value in part.items()}
        monkeypatch.setattr(os, "environ", dict(before))
        launcher.join()
        return {name: value for name, value in os.environ.items() if before.get(name) != value}

    return join


def place(added: dict[str, str]) -> tuple[str, ...]:
    return tuple(added[name] for name in launcher.TORCH)


def test_a_task_of_srun_finds_its_place(joined):
    added = joined(STEP)
    assert place(added) == ("8", "5", "1", "4")
    assert added["MASTER_ADDR"] == "localhost"
    assert added.keys() == TORCHRUN.keys()


def test_tasks_on_one_node_meet_on_the_loopback(joined):
    one_node = {"SLURM_STEP_TASKS_PER_NODE": "8", "SLURM_NODEID": "0", "SLURM_GTIDS": "0,1,2,3,4,5,6,7"}
    added = joined(STEP, one_node, SLURM_STEP_NODELIST="unknown.invalid", SLURM_LOCALID="5")
    assert (place(added), added["MASTER_ADDR"]) == (("8", "5", "5", "8"), "127.0.0.1")


@pytest.mark.parametrize("text, tasks", [("4(x2),3", [4, 4, 3]), ("1", [1]), ("2,1", [2, 1]), ("12(x3)", [12] * 3)])
def test_tasks_per_node(text, tasks):
    assert launcher._tasks_per_node(text) == tasks


@pytest.mark.parametrize(
    "nodes, host",
    [
        ("gpu[03-05,09],login1", "gpu03"),
        ("node1", "node1"),
        ("vm,vm-2", "vm"),
        ("rack[2-3]n[08-11]", "rack2n08"),
        ("a[1,3]-ib,b7", "a1-ib"),
    ],
)
def test_first_host(nodes, host):
    assert launcher._first_host(nodes) == host


@pytest.mark.parametrize("environment", [STEP, OPEN_MPI, MPICH], ids=["SLURM", "Open MPI", "MPICH"])
def test_all_ranks_derive_the_same_port_and_another_job_another_one(joined, monkeypatch, environment):
    monkeypatch.setattr(os, "getppid", lambda: 100)  # MPICH's daemon, one for each job and node
    others = {name: "0" for name in environment if name in ("SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK")}
    ports = [joined(environment)["MASTER_PORT"], joined(environment, others)["MASTER_PORT"]]
    monkeypatch.setattr(os, "getppid", lambda: 101)
    again = {"SLURM_STEP_ID": "1", "PMIX_NAMESPACE": "7"}
    ports.append(joined(environment, {name: again[name] for name in again if name in environment})["MASTER_PORT"])
    assert ports[0] == ports[1] != ports[2]
    assert all(20_000 <= int(port) < 32_000 for port in ports)


@pytest.mark.parametrize("environment", [OPEN_MPI, MPICH], ids=["Open MPI", "MPICH"])
def test_a_process_of_mpirun_finds_its_place_also_within_slurm(joined, environment):
    """There, daemons of mpirun are the tasks, if anything is."""
    for around in ({}, BATCH, STEP):
        added = joined(around, environment)
        assert (place(added), added["MASTER_ADDR"]) == (("4", "3", "3", "4"), "127.0.0.1")


def test_mpirun_on_several_nodes_needs_an_address(joined):
    several = {**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
    with pytest.raises(InputError, match=r"^mpirun on several nodes: set MASTER_ADDR .* and MASTER_PORT$"):
        joined(several)
    with pytest.raises(InputError, match="MASTER_PORT is not set"):
        joined(several, MASTER_ADDR="node1")
    assert place(joined(several, MASTER_ADDR="node1", MASTER_PORT="29500")) == ("4", "3", "1", "2")


@pytest.mark.parametrize("around", [{}, STEP, BATCH, OPEN_MPI], ids=["shell", "srun", "batch", "mpirun"])
def test_what_a_launcher_has_set_stays(joined, around):
    assert joined(around, TORCHRUN) == {}


def test_what_a_script_of_ones_own_leaves_out_is_added(joined):
    """Without LOCAL_RANK all processes would use the first GPU."""
    own = {"WORLD_SIZE": "8", "RANK": "5", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    assert joined(STEP, own) == {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}


@pytest.mark.parametrize(
    "around", [{}, {"RANK": "3", "LOCAL_RANK": "3"}, {"SLURM_NTASKS": "4"}, BATCH | {"SLURM_NTASKS": "1"}]
)
def test_a_process_without_a_launcher_is_alone(joined, around):
    """``salloc`` sets SLURM_NTASKS in a shell of the login node."""
    assert joined(around) == {}
    assert (launcher.launched(), launcher.local_rank(), launcher.speaks(), launcher.who()) == (False, 0, True, "")


@pytest.mark.parametrize("size", ["2", "3", "1"])
def test_a_batch_script_s_own_process_is_refused(joined, monkeypatch, size):
    """Also if the job was submitted from within a step, whose variables it has inherited."""
    stale = {**STEP, **BATCH, "SLURM_STEP_NUM_TASKS": size, "SLURM_STEP_TASKS_PER_NODE": size}
    for environment in (BATCH, stale):
        with pytest.raises(InputError, match=r"SLURM job for 3 tasks; add srun, or use --ntasks=1$"):
            joined(environment)
        assert joined(environment, WORLD_SIZE="1") == {}  # a child of a sweep
    monkeypatch.setattr(os, "isatty", lambda file: True)  # the shell that salloc opens on a node
    assert joined(BATCH) == {}


def test_a_shell_of_srun_with_several_tasks_is_refused(joined, monkeypatch):
    monkeypatch.setattr(os, "isatty", lambda file: True)
    with pytest.raises(InputError, match=r"^srun --pty: only the first of 8 tasks "):
        joined(STEP, SLURM_PTY_PORT="34461")
    monkeypatch.setattr(os, "isatty", lambda file: False)  # steps that are started there inherit the variable
    assert place(joined(STEP, SLURM_PTY_PORT="34461")) == ("8", "5", "1", "4")


def test_a_first_node_without_an_address_is_named(joined):
    with pytest.raises(InputError, match=r"^gpu1\.invalid, .* has no address here; set MASTER_ADDR$"):
        joined(STEP, SLURM_STEP_NODELIST="gpu1.invalid,gpu2.invalid")
    assert joined(STEP, SLURM_STEP_NODELIST="gpu1.invalid,gpu2.invalid", WORLD_SIZE="1") == {}


WRONG = {
    "WORLD_SIZE is ''": {"WORLD_SIZE": ""},
    "WORLD_SIZE is 'auto'": {"WORLD_SIZE": "auto"},
    "WORLD_SIZE is '0'": {"WORLD_SIZE": "0"},
    "WORLD_SIZE is 2, but RANK is not set": {"WORLD_SIZE": "2"},
    "WORLD_SIZE is 2, but MASTER_ADDR is not set": {"WORLD_SIZE": "2", "RANK": "0"},
    "RANK is '3'; with WORLD_SIZE 1 ": {"WORLD_SIZE": "1", "RANK": "3"},
    "RANK is '2'; with WORLD_SIZE 2 ": {**TORCHRUN, "RANK": "2"},
    "RANK is '-1'": {**TORCHRUN, "RANK": "-1"},
    "LOCAL_RANK is 'a'": {**TORCHRUN, "LOCAL_RANK": "a"},
    "LOCAL_WORLD_SIZE is '4'": {**TORCHRUN, "LOCAL_WORLD_SIZE": "4"},
    "MASTER_PORT is '80000'": {**TORCHRUN, "MASTER_PORT": "80000"},
    "PMI_SIZE is 4, but MPI_LOCALRANKID is not set": {"PMI_SIZE": "4", "PMI_RANK": "1"},
}


@pytest.mark.parametrize("says", WRONG)
def test_a_wrong_environment_is_one_line(monkeypatch, capsys, says):
    for name, value in WRONG[says].items():
        monkeypatch.setenv(name, value)
    end = failure(capsys, train_stage1.main, "--cfg", ARB)
    assert (end.code, len(end.lines)) == (2, 1)
    assert says in end.said


def test_a_port_in_use_is_one_line(monkeypatch, capsys):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        for name, value in {**TORCHRUN, "RANK": "0", "MASTER_PORT": str(other.getsockname()[1])}.items():
            monkeypatch.setenv(name, value)
        end = failure(capsys, train_stage1.main, "--cfg", ARB, "device", "cpu")
    assert (end.code, len(end.lines)) == (2, 1)
    assert "is in use on this machine" in end.said


@pytest.mark.parametrize(
    "parts, said",
    [
        ([{}], "resume with: python x"),
        ([TORCHRUN], "resume with: torchrun --standalone --nproc_per_node 2 x"),
        (
            [TORCHRUN, {"LOCAL_WORLD_SIZE": "1"}],
            "resume with: torchrun --nnodes 2 --nproc_per_node 1 [--rdzv_... as before] x",
        ),
        ([OPEN_MPI], "resume with: mpirun -n 4 python x"),
        ([STEP], "submit the same script again (with resume auto), or resume with: srun -n 8 python x"),
        (
            [STEP, TORCHRUN, {"TORCHELASTIC_RUN_ID": "run1"}],
            "submit the same script again (with resume auto), or resume with: torchrun --standalone "
            "--nproc_per_node 2 x",
        ),
    ],
)
def test_how_to_resume_names_what_has_started_the_processes(joined, parts, said):
    joined(*parts)
    assert launcher.how_to_resume("x") == said
