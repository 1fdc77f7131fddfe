"""One clip's frames over several processes: the same frames, and the evaluations add up."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from split_worker import cases, request

from t2vz.errors import UnexpectedError
from t2vz.modes import generate
from t2vz.modes.split import leading
from t2vz.spec import JobSpec, t0_t1

WORKER = Path(__file__).with_name("split_worker.py")
LEADER = Path(__file__).with_name("split_leader.py")
STEPS = 6


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_frames_do_not_depend_on_the_number_of_processes(tiny_model, tiny_controlnets, tmp_path, processes):
    # `accelerate launch --cpu` starts several processes through MPI only; on GPUs it does what this does.
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    arguments = [WORKER, tiny_model, tiny_controlnets[0], tmp_path]
    done = subprocess.run([*launch, *map(str, arguments)], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for name, (columns, beside) in cases(str(tiny_controlnets[0])).items():
        whole = generate(*request(str(tiny_model), columns, beside))
        for rank in range(processes):
            split = torch.load(tmp_path / f"{name}-{rank}.pt", weights_only=True)
            assert (split["latents"] - whole.latents).abs().max() <= 1e-4
            assert split["evaluations"] == whole.evaluations + extra(name, columns, processes)


def test_a_leader_has_followers_make_their_parts(tiny_model, tiny_controlnets, tmp_path):
    arguments = [LEADER, tiny_model, tiny_controlnets[0], tmp_path, 2]
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for name, (columns, beside) in cases(str(tiny_controlnets[0])).items():
        whole = generate(*request(str(tiny_model), columns, beside))
        led = torch.load(tmp_path / f"{name}-0.pt", weights_only=True)
        assert (led["latents"] - whole.latents).abs().max() <= 1e-4
        assert led["evaluations"] == whole.evaluations + extra(name, columns, 2)
    assert "first_previous" in (tmp_path / "error.txt").read_text()
    whole = generate(*request(str(tiny_model), {}, {}))
    after = torch.load(tmp_path / "after.pt", weights_only=True)
    assert (after - whole.latents).abs().max() <= 1e-4
    assert not list(tmp_path.glob("*.npy"))  # what the processes shared is gone


def test_a_follower_whose_leader_is_gone_says_so_and_ends(tmp_path):
    """The leader begins, is killed before it tells of a clip, and cannot kill what it did not start."""
    code = "from types import SimpleNamespace; from t2vz.modes import split; import torch.distributed as dist\n"
    code += "dist.init_process_group('gloo'); split._join = lambda device: SimpleNamespace(device='cpu')\n"
    code += "split._group()\n"
    leader = code + "import os; os._exit(9)"
    follower = code + "split.main('cpu')"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", each],
            env={**os.environ, **group, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, each in enumerate((leader, follower))
    ]
    _, log = processes[1].communicate(timeout=120)
    processes[0].communicate(timeout=120)
    assert processes[1].returncode == 1
    assert "Traceback" not in log
    assert "process 1 of a split clip ends: a process that makes a part of each clip has ended" in log.splitlines()


def test_more_processes_than_gpus_are_refused_at_once(monkeypatch):
    """Else the leader would wait for those that died of it."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UnexpectedError, match="4 processes, but 2 GPUs"), leading(4, "auto"):
        pass


def test_processes_share_the_cores_and_say_nothing_of_it():
    code = "import os, torch; torch.set_num_threads(8); from t2vz.modes.split import leading\n"
    code += "with leading(2, 'cpu'): print(torch.get_num_threads(), flush=True)\nos._exit(0)"
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False, env=environment
    )
    assert done.stdout == "4\n", done.stderr[-3000:]
    assert "OMP_NUM_THREADS" not in done.stderr


def extra(name, columns, processes):
    """Evaluations of anchors by the processes that don't own them; in text mode alone up to t0, then beside its own."""
    if name == "scenes":  # 0–2 and 3–4: only the second process, which owns 2 3 4 or 1 2, needs an anchor of another's
        return min(processes - 1, 1) * STEPS
    if name == "control":
        return (processes - 1) * STEPS
    t0, t1 = t0_t1(JobSpec(prompt="x", num_inference_steps=STEPS, **columns))
    return (processes - 1) * ((STEPS - 1 - t0) + (t1 + 1))
