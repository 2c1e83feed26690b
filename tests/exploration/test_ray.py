"""The engine on Ray: two nodes on one machine. Same results as elsewhere; machines and processes that die or come late.

One cluster for the module. It costs some seconds, and a worker begins in one; so each test looks at much.
"""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from graphopt.errors import ExplorationError, GraphoptWarning
from graphopt.exploration import ASHA, choice, explore
from tests.exploration.searches import BOWL, Meanwhile, alive, ended, halfway, halves, troubled, wait_for

ray = pytest.importorskip("ray")
ROOT = Path(__file__).resolve().parents[2]
SMALL = {"object_store_memory": 80 * 2**20, "include_dashboard": False, "dashboard_agent_listen_port": 0}


@pytest.fixture(scope="module")
def cluster():
    """A head with room for one worker. Tests add the other node."""
    from ray.cluster_utils import Cluster

    before = {name: os.environ.get(name) for name in ("RAY_USAGE_STATS_ENABLED", "PYTHONPATH")}
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), before["PYTHONPATH"]]))
    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, **SMALL})
    try:
        ray.init(address=found.address, log_to_driver=False, logging_level="warning")
        yield found
    finally:
        ray.shutdown()
        found.shutdown()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


def on_ray(kind="worker"):
    """Numbers of processes that hosts on Ray have started and that still run."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                told = (folder / "cmdline").read_bytes().decode().split("\0")
            except OSError:
                continue  # it has just ended
            if "graphopt.exploration.worker" in told and told[told.index("--payload") + 1].startswith("/proc/"):
                if kind in ("worker", told[told.index("--kind") + 1]) and alive(int(folder.name)):
                    found.append(int(folder.name))
    return found


def parent_of(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.mark.skipif(not os.environ.get("GRAPHOPT_SOAK"), reason="takes minutes: make soak")
def test_soak_a_cluster_of_its_own_is_begun_and_ended(tmp_path):
    """Where none runs on this machine: before the one of this module is begun."""
    code = (
        "import ray\n"
        "from graphopt.exploration import explore\n"
        "from tests.exploration.searches import BOWL, bowl\n"
        "study = explore(None, bowl, hyper_parameters=BOWL, trials=20, workers=3, on='ray', progress=False)\n"
        "print(study.counts(), ray.is_initialized())\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment | {"PYTHONPATH": str(ROOT)},
                         capture_output=True, text=True, timeout=120)  # fmt: skip
    assert run.stdout.strip() == "{'done': 20} False", run.stderr
    assert not on_ray()


def test_a_search_is_the_same_though_its_host_a_node_and_a_generator_die_and_a_node_comes_late(cluster, tmp_path):
    """F1 and F10. One of two workers waits for its node from the beginning."""
    store, known, seen = tmp_path / "s.db", {}, {}

    def go_on(count=2):
        """So many more trials end; none that had ended is lost."""
        wait_for(lambda: len(ended(store)) >= len(known) + count)
        now = ended(store)
        assert known.items() <= now.items()
        known.update(now)

    def trouble():
        go_on()
        assert len(on_ray("trainer")) == 1  # the other one waits
        joined = time.monotonic()
        second = cluster.add_node(num_cpus=1, **SMALL)
        wait_for(lambda: len(on_ray("trainer")) == 2)
        seen["late"] = time.monotonic() - joined
        go_on()
        os.kill(on_ray("generator")[0], signal.SIGKILL)
        go_on()
        os.kill(parent_of(on_ray("trainer")[0]), signal.SIGKILL)  # a host
        go_on()
        before = set(on_ray())
        cluster.remove_node(second, allow_graceful=False)
        wait_for(lambda: before - set(on_ray()), 10.0)  # what ran there ends
        go_on()
        cluster.add_node(num_cpus=1, **SMALL)
        wait_for(
            lambda: len(on_ray("trainer")) == 2, 90.0
        )  # Ray may take half a minute to give a lost host a new place
        Path(f"{store}.d", "hurry").touch()

    options = {"hyper_parameters": BOWL, "trials": 300, "reproducible": True, "window": 6, "progress": False,
               "proposer": "evolve", "stop": ASHA(first=1, eta=3, last=2)}  # fmt: skip
    expected = explore(None, partial(halfway, seconds=0.0), on="inline", **options)
    search = Meanwhile(lambda: explore(None, halfway, on="ray", workers=2, store=store, **options))
    trouble()  # Ray adds nodes in the main thread alone
    study = search.end()
    assert known.items() <= ended(store).items()
    for found, wanted in zip(study.trials(), expected.trials(), strict=True):
        assert (found.key, found.state, found.scores) == (wanted.key, wanted.state, wanted.scores), (found, wanted)
    assert seen["late"] < 15  # the bar is 5, on a machine with nothing else to do
    assert 300 < sum(t.attempts for t in study.trials()) <= 300 + 4
    # Half a trial is repeated at most: each goes on from its checkpoint.
    assert len(halves(Path(f"{store}.d"))) <= sum(2 - (t.state == "pruned") for t in study.trials()) + 4
    wait_for(lambda: not on_ray(), 3.0)


def test_trouble_is_recorded_as_it_is_elsewhere(cluster):
    """F6 to F9: a worker is not lost with a trial that crashes, and its last words are known."""
    kinds = ("nan", "memory", "die", "exit", "hang", "once", "well")
    study = explore(
        None, troubled, hyper_parameters={"do": choice(*kinds)}, trials=len(kinds), workers=2, on="ray",
        generation="master", proposer="random", first_seconds=4.0, progress=False,
    )  # fmt: skip
    by_kind = {trial.hyper_parameters["do"]: trial for trial in study.trials()}
    assert {kind: trial.state for kind, trial in by_kind.items()} == {
        "nan": "invalid", "memory": "failed", "die": "failed", "exit": "failed", "hang": "failed", "once": "done",
        "well": "done",
    }  # fmt: skip
    assert "out of memory" in by_kind["memory"].cause and "it hung" in by_kind["hang"].cause
    assert "SIGSEGV" in by_kind["die"].cause and by_kind["die"].attempts == 2
    assert "exit code 7" in by_kind["exit"].cause and "the last words" in by_kind["exit"].cause
    assert by_kind["once"].metrics == {"score": 1.5} and by_kind["once"].attempts == 2
    wait_for(lambda: not on_ray(), 3.0)


def test_what_a_script_defines_travels_and_its_workers_end_with_it(cluster, tmp_path):
    """F10: the driver is killed. Its functions are code of no module."""
    store = tmp_path / "s.db"
    code = (
        "import sys, time\n"
        "from graphopt.exploration import explore, linear\n"
        "def search(trials):\n"
        "    def trial(net, hp, context):\n"
        "        time.sleep(0.05)\n"
        "        return -hp['x']\n"
        "    space = {'x': linear(0, 1)}\n"
        f"    return explore(None, trial, hyper_parameters=space, trials=trials, store={str(store)!r}, on='ray',\n"
        "                   workers=1, progress=False)\n"
        "print(search(int(sys.argv[1])).counts(), flush=True)\n"
    )

    def script(trials):
        environment = os.environ | {"RAY_ADDRESS": cluster.address}
        return subprocess.Popen([sys.executable, "-c", code, str(trials)], cwd=ROOT, env=environment,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip

    driver = script(500)
    try:
        wait_for(lambda: len(ended(store)) >= 3)
        workers, known = on_ray(), ended(store)
        driver.kill()
        killed = time.monotonic()
        wait_for(lambda: not any(map(alive, workers)), 10.0)
        assert workers and time.monotonic() - killed < 10.0
    finally:
        driver.kill()
        driver.communicate()
    assert known.items() <= ended(store).items()
    again = script(len(ended(store)) + 4)
    out, error = again.communicate(timeout=60)
    assert again.returncode == 0, error
    assert out.strip() == f"{{'done': {len(ended(store))}}}" and known.items() <= ended(store).items()


def test_a_token_that_the_cluster_does_not_know_is_told(cluster):
    """F10. This cluster has none. Ray lets such a driver in, and then its actors never begin."""
    code = (
        "from graphopt.exploration import explore\n"
        "from tests.exploration.searches import BOWL, bowl\n"
        "explore(None, bowl, hyper_parameters=BOWL, trials=2, workers=1, on='ray', progress=False)\n"
    )
    environment = os.environ | {"RAY_ADDRESS": cluster.address, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a" * 64}
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True,
                         timeout=120)  # fmt: skip
    assert run.returncode == 1 and "ExplorationError" in run.stderr, run.stderr
    assert "RAY_AUTH_MODE=token and the same RAY_AUTH_TOKEN" in run.stderr


def test_workers_that_find_no_place_are_told(cluster, monkeypatch):
    from graphopt.exploration.engines import ray as engine

    monkeypatch.setattr(engine, "_SAY_AFTER", 0.5)
    with pytest.warns(GraphoptWarning, match=r"1 of 1 workers wait.*'no such machine': 1.*resources="):
        study = explore(None, troubled, hyper_parameters={"do": choice("a", "b")}, time=1.5, workers=1, on="ray",
                        resources={"no such machine": 1}, progress=False)  # fmt: skip
    assert not study.counts().get("done")


def test_a_cluster_that_cannot_be_joined_is_told(monkeypatch):
    from graphopt.exploration.engines import joining

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    for raised, told in (
        (ConnectionError("no answer"), "10.0.0.1:6379.*no answer$"),
        (RuntimeError("InvalidAuthToken: the token does not match"), "RAY_AUTH_MODE=token and the same RAY_AUTH_TOKEN"),
    ):

        def init(*_, raised=raised, **__):
            raise raised

        monkeypatch.setattr(ray, "init", init)
        with pytest.raises(ExplorationError, match=told):
            joining.join(1, 1.0)


def test_without_ray_it_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    for name in ("joining", "ray"):
        monkeypatch.delitem(sys.modules, f"graphopt.exploration.engines.{name}", raising=False)
    with pytest.raises(ExplorationError, match=r"pip install 'graphopt\[ray\]'"):
        explore(None, troubled, hyper_parameters={"do": choice("a", "b")}, trials=1, on="ray", progress=False)
