"""The profile store: what goes in comes out, and nothing is lost whatever happens to the file."""

import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import textwrap
import threading
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphopt import CostModelError, GraphoptWarning
from graphopt.cost_model import store as store_module
from graphopt.cost_model.cache import cache_dir
from graphopt.cost_model.measured import Measurement
from graphopt.cost_model.store import LARGEST_SIZE, ProfileStore

MACHINE = "cpu, 2 threads"


def taking(seconds):
    return Measurement(seconds, seconds * 0.99, seconds * 1.01, runs=9)


def add(store, batch, seconds=0.01, **key):
    key = {"graph": "g", "scheme": "flat", "machine": MACHINE, **key}
    return store.add_step(sizes={"batch": batch}, measurement=taking(seconds), **key)


def batches(store, **where):
    return [row.sizes["batch"] for row in store.steps(machine=MACHINE, **where)]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cache" / "profiles.sqlite"


@pytest.fixture
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error", GraphoptWarning)
        yield


# -- what goes in comes out -----------------------------------------------------------------------------------------


def test_a_row_carries_what_was_measured(path, no_warnings):
    measured = Measurement(0.5, 0.4, 0.7, runs=11)
    assert ProfileStore(path).add_step("g", "flat", {"batch": 8, "seq": 64}, MACHINE, measured, facts={"flops": 1e9})
    row = ProfileStore(path).latest_step("g", "flat", {"seq": 64, "batch": 8}, MACHINE)  # sizes have no order
    assert row.measurement == measured
    assert (row.graph, row.scheme, row.sizes, row.machine) == ("g", "flat", {"batch": 8, "seq": 64}, MACHINE)
    assert row.facts == {"flops": 1e9} and row.torch == torch.__version__ and row.measured_at > 1.7e9


def test_the_latest_row_wins_and_the_others_stay(path, no_warnings):
    store = ProfileStore(path)
    for seconds in (0.3, 0.1, 0.2):
        add(store, 8, seconds)
    add(store, 16, 0.4)
    assert store.latest_step("g", "flat", {"batch": 8}, MACHINE).measurement.seconds == 0.2
    assert [row.measurement.seconds for row in store.steps(machine=MACHINE)] == [0.3, 0.1, 0.2, 0.4]
    assert [row.measurement.seconds for row in store.steps(machine=MACHINE, latest=True)] == [0.2, 0.4]


@pytest.mark.parametrize("other", [{"graph": "h"}, {"scheme": "eager"}, {"machine": "another"}])
def test_each_part_of_the_key_counts(path, no_warnings, other):
    store = ProfileStore(path)
    add(store, 8, **other)
    assert store.latest_step("g", "flat", {"batch": 8}, MACHINE) is None
    assert store.steps(machine=MACHINE, graph="g", scheme="flat") == []
    assert store.latest_step("g", "flat", {"batch": 9}, MACHINE) is None


def test_all_sizes_of_a_graph_and_all_rows_of_a_machine(path, no_warnings):
    store = ProfileStore(path)
    for batch in (32, 1, 8):
        add(store, batch)
    add(store, 4, graph="h")
    add(store, 2, scheme="eager")
    add(store, 3, machine="another")
    assert batches(store, graph="g", scheme="flat") == [32, 1, 8]
    assert batches(store) == [32, 1, 8, 4, 2]


def test_operators(path, no_warnings):
    store = ProfileStore(path)
    assert store.add_operators(MACHINE, {"mm 2x3 3x4": taking(1e-5), "relu 2x4": taking(1e-6)}) == 2
    store.add_operators(MACHINE, {"mm 2x3 3x4": taking(2e-5)})
    store.add_operators("another", {"mm 2x3 3x4": taking(5e-5)})
    assert {s: r.measurement.seconds for s, r in store.operators(MACHINE).items()} == {
        "mm 2x3 3x4": 2e-5,
        "relu 2x4": 1e-6,
    }
    assert list(store.operators(MACHINE, signature="relu 2x4")) == ["relu 2x4"]
    assert store.operators(MACHINE, signature="tanh") == {}


TEXT = st.text(st.characters(codec="utf-8"), min_size=1)
POSITIVE = st.floats(1e-9, 1e6)


@given(
    key=st.tuples(TEXT, TEXT, st.dictionaries(TEXT, st.integers(1, LARGEST_SIZE), max_size=3), TEXT),
    times=st.lists(POSITIVE, min_size=3, max_size=3).map(sorted),
    runs=st.integers(1, 10**6),
    facts=st.dictionaries(TEXT, st.floats(allow_nan=False, allow_infinity=False), max_size=3),
)
def test_any_row_comes_back_as_it_was(key, times, runs, facts):
    low, middle, high = times
    measured = Measurement(middle, low, high, runs)
    with tempfile.TemporaryDirectory() as folder:
        ProfileStore(Path(folder) / "p").add_step(*key, measured, facts)
        row = ProfileStore(Path(folder) / "p").latest_step(*key)
    assert ((row.graph, row.scheme, row.sizes, row.machine), row.measurement, row.facts) == (key, measured, facts)


# -- what is refused ------------------------------------------------------------------------------------------------


def test_noisy_measurements_are_not_kept_and_the_first_is_warned_of(path):
    store = ProfileStore(path)
    noisy = Measurement(0.01, 0.005, 0.03, runs=9, noisy="the machine was busy")
    with pytest.warns(GraphoptWarning, match=r"'flat' at \{'batch': 8\} was not kept: the machine was busy"):
        assert not store.add_step("g", "flat", {"batch": 8}, MACHINE, noisy)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not store.add_step("g", "flat", {"batch": 9}, MACHINE, noisy)
        assert store.add_operators(MACHINE, {"mm": noisy, "relu": taking(1e-6)}) == 1
    assert batches(store) == [] and list(store.operators(MACHINE)) == ["relu"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"graph": ""}, "add_step: graph=''; expected a non-empty string"),
        ({"scheme": None}, "scheme=None"),
        ({"machine": ""}, "machine=''"),
        ({"sizes": {"batch": 0}}, "'batch' is 0; expected"),
        ({"sizes": {"batch": -3}}, "'batch' is -3"),
        ({"sizes": {"batch": LARGEST_SIZE + 1}}, "ints from 1 to"),
        ({"sizes": {"batch": 2.0}}, "'batch' is 2.0"),
        ({"sizes": {"batch": True}}, "'batch' is True"),
        ({"facts": {"flops": float("nan")}}, "'flops' is nan"),
        ({"facts": {"flops": "many"}}, "'flops' is 'many'"),
    ],
)
def test_bad_rows(path, wrong, message):
    store = ProfileStore(path)
    row = {"graph": "g", "scheme": "flat", "sizes": {"batch": 8}, "machine": MACHINE, "measurement": taking(1.0)}
    with pytest.raises(CostModelError, match=message):
        store.add_step(**{**row, **wrong})
    assert store.steps(machine=MACHINE) == []


def test_a_bad_name_among_operators_keeps_none(path):
    store = ProfileStore(path)
    with pytest.raises(CostModelError, match="signature=''"):
        store.add_operators(MACHINE, {"mm": taking(1.0), "": taking(1.0)})
    assert store.operators(MACHINE) == {}


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(CostModelError, match="is a folder"):
        ProfileStore(tmp_path)


# -- where it lies --------------------------------------------------------------------------------------------------


def test_the_cache_folder(monkeypatch, tmp_path, no_warnings):
    monkeypatch.setenv("GRAPHOPT_CACHE_DIR", str(tmp_path / "mine"))
    assert cache_dir() == tmp_path / "mine"
    store = ProfileStore()
    assert store.path == tmp_path / "mine" / "profiles.sqlite"
    add(store, 8)
    assert store.path.is_file()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("GRAPHOPT_CACHE_DIR")
    assert cache_dir().name == "graphopt" and not cache_dir().exists()


# -- several at once ------------------------------------------------------------------------------------------------


def test_several_threads_lose_nothing(path, no_warnings):
    stores = [ProfileStore(path) for _ in range(2)]
    threads = [
        threading.Thread(target=lambda k=k: [add(stores[k % 2], 10 * k + i) for i in range(1, 6)]) for k in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(batches(ProfileStore(path))) == sorted(10 * k + i for k in range(4) for i in range(1, 6))


PRELUDE = """
import os, random, signal, sys, warnings
from graphopt import GraphoptWarning
from graphopt.cost_model.measured import Measurement
from graphopt.cost_model.store import ProfileStore
warnings.simplefilter("error", GraphoptWarning)
path = sys.argv[1]
measured = Measurement(0.01, 0.009, 0.011, runs=9)
def add(store, batch, scheme="flat"):
    store.add_step("g", scheme, {"batch": batch}, "cpu, 2 threads", measured)
"""


def python(code, path):
    """Run code in a process of its own, whose children start by forking: importing torch takes long."""
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(code), str(path)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")


@forks
def test_several_processes_begin_a_store_and_lose_nothing(path, no_warnings):
    python(
        """
        children = []
        for child in range(6):
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    store = ProfileStore(path)
                    for batch in range(1, 16):
                        add(store, batch, f"scheme {child}")
                    code = 0
                finally:
                    os._exit(code)
            children.append(pid)
        assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0] * 6

        store = ProfileStore(path)  # and one store on both sides of a fork
        add(store, 1, "before")
        pid = os.fork()
        if pid == 0:
            add(store, 2, "child")
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        add(store, 3, "parent")
        """,
        path,
    )
    store = ProfileStore(path)
    for child in range(6):
        assert batches(store, scheme=f"scheme {child}") == list(range(1, 16))
    assert [batches(store, scheme=name) for name in ("before", "child", "parent")] == [[1], [2], [3]]


@forks
def test_a_kill_at_any_moment_loses_no_acknowledged_row(path, no_warnings):
    """Twelve writers one after another, each killed after some rows; what it had said is written must be there."""
    acknowledged = python(
        """
        rng = random.Random(0)
        for turn in range(12):
            get, put = os.pipe()
            pid = os.fork()
            if pid == 0:
                store = ProfileStore(path)
                for batch in range(1, 10_000):
                    add(store, batch, f"scheme {turn}")
                    os.write(put, b"x")
            for _ in range(rng.randrange(1, 6)):
                os.read(get, 1)
            for _ in range(rng.randrange(0, 60_000)):  # somewhere in the middle of the next
                pass
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            os.close(put)
            count = 0
            while rest := os.read(get, 100):
                count += len(rest)
            print(turn, count)
        """,
        path,
    )
    store = ProfileStore(path)
    turns = [tuple(map(int, line.split())) for line in acknowledged.splitlines()]
    assert len(turns) == 12
    for turn, unread in turns:
        found = batches(store, scheme=f"scheme {turn}")
        assert found == list(range(1, len(found) + 1)) and len(found) >= max(1, unread)
    assert add(store, 8) and not list(path.parent.glob("*damaged*"))


# -- damage ---------------------------------------------------------------------------------------------------------


def filled(path, rows=300):
    store = ProfileStore(path)
    store.add_operators(MACHINE, {f"operator {i} of a long name {'x' * 50}": taking(1e-5) for i in range(rows)})
    add(store, 8)
    return path.read_bytes()


def torn(content):
    return content[: len(content) // 2 + 100]


def overwritten(content):
    return content[:4096] + b"\x5a" * (len(content) - 4096)


def no_database(content):
    return b"this was never a database" * 400


def headless(content):
    return b"\0" * 100 + content[100:]


@pytest.mark.parametrize("damage", [torn, overwritten, no_database, headless])
def test_a_damaged_file_is_moved_aside_and_a_new_one_begun(path, damage):
    content = damage(filled(path))
    path.write_bytes(content)
    with pytest.warns(GraphoptWarning, match=r"is damaged .* it was moved to .*damaged-") as warned:
        store = ProfileStore(path)
    assert len(warned) == 1 and not store.in_memory
    assert add(store, 16) and batches(ProfileStore(path)) == [16]
    (aside,) = path.parent.glob("profiles.sqlite.damaged-*")
    assert aside.read_bytes() == content


def test_the_log_goes_aside_with_the_file_it_belongs_to(path, tmp_path):
    """A killed process left a log behind. It must not be taken for the log of the new file, and not be lost."""
    filled(path)
    alive = sqlite3.connect(path)
    alive.execute("SELECT count(*) FROM steps").fetchone()  # while one is open, the log stays
    assert add(ProfileStore(path), 16)
    torn_path = tmp_path / "killed" / "profiles.sqlite"
    torn_path.parent.mkdir()
    torn_path.write_bytes(no_database(path.read_bytes()))
    log = Path(f"{path}-wal").read_bytes()
    assert log
    Path(f"{torn_path}-wal").write_bytes(log)
    alive.close()
    with pytest.warns(GraphoptWarning, match="is damaged"):
        assert batches(ProfileStore(torn_path)) == []
    assert [Path(f).read_bytes() for f in torn_path.parent.glob("*damaged*-wal")] == [log]


def test_damage_while_a_store_is_in_use(path):
    filled(path)
    store = ProfileStore(path)
    path.write_bytes(overwritten(path.read_bytes()))
    with pytest.warns(GraphoptWarning, match="is damaged"):
        assert add(store, 16)
    assert batches(store) == [16]


def test_a_second_process_leaves_the_new_file_alone(path, monkeypatch):
    """Two see the damage; the one that comes second finds a sound file, and must not move that one."""
    filled(path)
    path.write_bytes(overwritten(path.read_bytes()))
    with pytest.warns(GraphoptWarning, match="is damaged"):
        add(ProfileStore(path), 16)
    second = ProfileStore(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second._file._set_aside(sqlite3.DatabaseError("seen before the first moved it"))
    assert batches(second) == [16] and len(list(path.parent.glob("*damaged*"))) == 1


def test_an_empty_file_is_a_new_store(path, no_warnings):
    path.parent.mkdir()
    path.touch()
    assert add(ProfileStore(path), 8)


def test_a_row_of_flipped_bits_is_left_out(path):
    store = ProfileStore(path)
    add(store, 8)
    add(store, 16)
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA ignore_check_constraints = 1")
        connection.execute("UPDATE steps SET seconds = -1 WHERE sizes LIKE '%8%'")
    connection.close()
    with pytest.warns(GraphoptWarning, match="is left out"):
        assert batches(store) == [16]


# -- folders that cannot be written to ------------------------------------------------------------------------------


@pytest.fixture
def read_only_folder():
    """A folder that this process may read and not write, even when it is run by root."""
    folder = Path(tempfile.mkdtemp())
    (folder / "cache").mkdir()
    root = hasattr(os, "geteuid") and os.geteuid() == 0

    def close():
        folder.chmod(0o755)
        (folder / "cache").chmod(0o555)
        for file in (folder / "cache").iterdir():
            file.chmod(0o444)
        if root:
            os.seteuid(65534)

    yield folder / "cache", close
    if root:
        os.seteuid(0)
    (folder / "cache").chmod(0o755)
    shutil.rmtree(folder)


@pytest.mark.skipif(os.name == "nt", reason="permissions of folders are others on Windows")
@pytest.mark.parametrize("begun", [False, True])
def test_a_read_only_folder(read_only_folder, begun):
    folder, close = read_only_folder
    path = folder / "profiles.sqlite"
    if begun:
        add(ProfileStore(path), 8)
    content = path.read_bytes() if begun else None
    close()
    with pytest.warns(GraphoptWarning, match=r"cannot be used .* Set GRAPHOPT_CACHE_DIR") as warned:
        store = ProfileStore(path)
        assert add(store, 16)
        assert batches(store) == ([8, 16] if begun else [16])  # what could be read is read
    assert len(warned) == 1 and store.in_memory and "in memory" in repr(store)
    assert not begun or path.read_bytes() == content


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.warns(GraphoptWarning, match="cannot be used") as warned:
        store = ProfileStore(tmp_path / "file" / "cache" / "profiles.sqlite")
        assert add(store, 16) and batches(store) == [16]
    assert len(warned) == 1


def test_a_stopped_process_that_holds_the_file_stops_nobody(path, monkeypatch):
    add(ProfileStore(path), 8)
    store = ProfileStore(path)
    store._file._timeout = 0.05
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    with pytest.warns(GraphoptWarning, match="locked"):
        assert add(store, 16)
    assert batches(store) == [8, 16]
    holder.close()


def test_readers_wait_for_nobody(path, no_warnings):
    store = ProfileStore(path)
    add(store, 8)
    store._file._timeout = 0.05
    holder = sqlite3.connect(path, isolation_level=None)
    assert holder.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    holder.execute("BEGIN EXCLUSIVE")
    assert batches(store) == [8] and not store.in_memory
    holder.close()


# -- versions -------------------------------------------------------------------------------------------------------


def test_a_newer_version_is_left_as_it_is(path):
    filled(path)
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    content = path.read_bytes()
    with pytest.raises(
        CostModelError, match=r"newer graphopt \(version 99 .* Upgrade graphopt, or set GRAPHOPT_CACHE_DIR"
    ):
        ProfileStore(path)
    assert path.read_bytes() == content and os.listdir(path.parent) == ["profiles.sqlite"]


def test_an_older_version_keeps_its_rows(path, monkeypatch, no_warnings):
    add(ProfileStore(path), 8)
    monkeypatch.setattr(
        store_module, "VERSIONS", (*store_module.VERSIONS, ("ALTER TABLE steps ADD COLUMN launcher TEXT",))
    )
    store = ProfileStore(path)
    assert add(store, 16) and batches(ProfileStore(path)) == [8, 16]
    monkeypatch.undo()
    with pytest.raises(CostModelError, match="newer"):
        ProfileStore(path)


def test_a_failed_migration_changes_nothing(path, monkeypatch):
    add(ProfileStore(path), 8)
    broken = ("ALTER TABLE steps ADD COLUMN launcher TEXT", "ALTER TABLE nowhere ADD COLUMN launcher TEXT")
    monkeypatch.setattr(store_module, "VERSIONS", (*store_module.VERSIONS, broken))
    with pytest.raises(sqlite3.OperationalError, match="nowhere"):
        ProfileStore(path)
    monkeypatch.undo()
    assert batches(ProfileStore(path)) == [8]


@pytest.mark.parametrize("pragma", ["user_version = 3", "application_id = 7"])
def test_the_database_of_another_program_is_left_as_it_is(path, pragma):
    path.parent.mkdir()
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE bookmarks (url)")
        connection.execute(f"PRAGMA {pragma}")
    connection.close()
    content = path.read_bytes()
    with pytest.raises(CostModelError, match="not a profile store"):
        ProfileStore(path)
    assert path.read_bytes() == content
