"""`ray up`, a job, `ray down`, for real: a laptop, a head and a worker as hosts of a network of their own.

What is brought up is deploy/on-premise.yaml with the addresses filled in and without Docker. `ray stop`, which is among
its commands, ends every Ray it can see: a host sees its own only, which is looked at before it is run.
"""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from network_hosts import Host, Hosts, reason_to_skip
from ray_processes import title, wait_for

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow

# A worker gives up on its head after ten seconds; after sixty where nothing is set.
PROFILE = """
export RAY_gcs_rpc_server_reconnect_timeout_s=10
export PATH={bin}:$PATH RAY_AUTH_MODE=token RAY_UP_enable_autoscaler_v2=0
export RAY_USAGE_STATS_ENABLED=0 RAY_BACKEND_LOG_LEVEL=fatal OMP_NUM_THREADS=1 PYTHONPATH={root}
"""
JOB = """
import ray
from protopnet.cluster import connect, survey
from protopnet.config import ComputeSettings

@ray.remote(num_cpus=1)
def where():
    return ray.util.get_node_ip_address()

connect(ComputeSettings())
print("ran on", ray.get(where.remote()))
print("CPUs", sorted(node.cpus for node in survey().nodes))
"""


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    reason = reason_to_skip()
    if reason:
        pytest.skip(reason)
    bin_folder = Path(sys.executable).parent
    found = Hosts(("laptop", "head", "worker"), tmp_path, PROFILE.format(bin=bin_folder, root=ROOT))
    yield found
    found.end()


@pytest.fixture
def bystander() -> Iterator[subprocess.Popen[bytes]]:
    """A process of this machine that `ray stop` would end if it saw it."""
    process = subprocess.Popen(["bash", "-c", "exec -a raylet sleep 600"])
    wait_for(lambda: title(process.pid).startswith("raylet"))
    yield process
    process.kill()
    process.wait()


def cluster_file(head: Host, worker: Host) -> str:
    """deploy/on-premise.yaml for these hosts."""
    config = yaml.safe_load((ROOT / "deploy/on-premise.yaml").read_text())
    del config["docker"]
    config["provider"] |= {"head_ip": head.address, "worker_ips": [worker.address]}
    config["auth"] = {"ssh_user": "root", "ssh_private_key": "~/.ssh/id_ed25519"}
    config["head_start_ray_commands"][-1] += " --object-store-memory=100000000"
    config["worker_start_ray_commands"][-1] += " --object-store-memory=100000000 --num-cpus=1"
    return yaml.safe_dump(config)


def answers(host: Host, address: str) -> str:
    """What a request for the list of jobs gets from this host, without a token: a status, or `refused`."""
    code = (
        "import urllib.request, urllib.error\n"
        f"try: print(urllib.request.urlopen('http://{address}:8265/api/jobs/', timeout=5).status)\n"
        "except urllib.error.HTTPError as error: print(error.code)\n"
        "except OSError: print('refused')"
    )
    return host.run(f'python -c "{code}"').strip()


def test_a_cluster_comes_up_runs_a_job_on_the_second_host_and_goes_down(
    hosts: Hosts, bystander: subprocess.Popen[bytes]
) -> None:
    laptop, head, worker = hosts.hosts
    for host in hosts.hosts:
        assert "raylet" not in host.run("ps ax -o args")  # not the bystander, nor any Ray of this machine
        assert int(host.run("ls -d /proc/[0-9]* | wc -l")) < 10
    (laptop.home / "cluster.yaml").write_text(cluster_file(head, worker))
    (laptop.home / "job").mkdir()
    (laptop.home / "job/where.py").write_text(JOB)

    laptop.run("ray get-auth-token --generate > /dev/null && ray up --yes --no-config-cache cluster.yaml")
    with open(laptop.home / "dashboard.log", "wb") as log:
        tunnel = laptop.start("ray dashboard cluster.yaml", log)
    wait_for(lambda: answers(laptop, "127.0.0.1") != "refused", 30)
    assert answers(laptop, "127.0.0.1") == "401"  # not without the token
    assert answers(worker, head.address) == "refused"  # and only through ssh
    said = laptop.run("ray job submit --address http://127.0.0.1:8265 --working-dir job -- python where.py")
    assert f"ran on {worker.address}" in said
    assert "CPUs [0, 1.0]" in said
    assert "succeeded" in said

    tunnel.terminate()
    laptop.run("ray down --yes cluster.yaml")
    wait_for(lambda: not head.processes("ray"), 30)
    wait_for(lambda: not worker.processes("raylet"), 120)  # notices by itself that its head is gone
    assert bystander.poll() is None
