"""The file of a study: it opens with all its rows, or says what is missing, whatever was done to it."""

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import warnings
from contextlib import closing

import pytest

from graphopt.errors import GraphoptWarning, StoreError
from graphopt.exploration.lock import Lock
from graphopt.exploration.store import Store
from graphopt.exploration.study_file import Event, read_study


def filled(path, count, close=True):
    """A store with so many transactions of two rows each."""
    store = Store(path)
    for i in range(count):
        store.add([Event("model", i, {"point": [i], "text": "x" * 60}, f"key{i}"), Event("start", i, {"worker": 0})])
    if close:
        store.close()
    return store


def left_open(path, count):
    """As after kill -9 of the process: with its log, which SQLite removes when it closes."""
    store = filled(path.with_name(f"live-{path.name}"), count, close=False)
    for suffix in ("", "-wal"):
        shutil.copy(f"{store.path}{suffix}", f"{path}{suffix}")
    shutil.copy(f"{store.path}.lock", f"{path}.lock")
    store.close()


def opened(path, **options):
    """Rows and what was said of them."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        store = Store(path, **options)
    try:
        return len(store.events), [str(w.message) for w in said if w.category is GraphoptWarning]
    finally:
        store.close()


def test_rows_come_back_as_they_were(tmp_path):
    path = tmp_path / "folder" / "s.db"
    body = {"number": 0.1 + 0.2, "list": [1, "zwölf", None, True], "nested": {"a": 1e-300}}
    store = Store(path)
    store.add([Event("end", 3, body)], {"study": {"x": 1}})
    store.close()
    again = Store(path)
    assert again.events == [Event("end", 3, body)] and again.meta["study"] == {"x": 1}
    assert (store.epoch, again.epoch) == (1, 2)
    again.close()
    again.close()


def test_a_transaction_is_whole_or_not_at_all(tmp_path):
    store = filled(tmp_path / "s.db", 3, close=False)
    with pytest.raises(StoreError, match="tried twice"):
        store.add([Event("start", 7, {}), Event("model", 9, {}, "key1")])
    store.add([Event("start", 8, {})])
    store.close()
    assert opened(tmp_path / "s.db") == (7, [])


@pytest.mark.parametrize("cut", [1, 7, 60, 200, 4000])
def test_a_torn_tail_costs_the_last_transaction_and_is_told(tmp_path, cut):
    """F3. Torn, and garbled."""
    for how in ("torn", "garbled"):
        path = tmp_path / f"{how}.db"
        left_open(path, 30)
        with open(f"{path}-wal", "r+b") as log:
            size = log.seek(0, os.SEEK_END)
            if how == "torn":
                log.truncate(size - cut)
            else:
                log.seek(size - cut)
                log.write(os.urandom(cut))
        rows, said = opened(path)
        assert rows == 58 and "lost 2 of 60 rows" in said[0]
        assert opened(path) == (58, [])  # told once; it stays usable
        filled_again = Store(path)
        filled_again.add([Event("start", 1, {})])
        filled_again.close()
        assert opened(path) == (59, [])


@pytest.mark.parametrize("where", [0.1, 0.5, 0.9])
def test_damage_in_the_middle_of_the_log_is_refused(tmp_path, where):
    """F4. SQLite itself opens such a file without a word, with fewer rows."""
    path = tmp_path / "s.db"
    left_open(path, 30)
    with open(f"{path}-wal", "r+b") as log:
        log.seek(int(where * log.seek(0, os.SEEK_END)))
        log.write(os.urandom(50))
    for copy in ("accepted.db", "s.db"):
        for suffix in ("", "-wal", ".lock"):
            if copy != "s.db":
                shutil.copy(f"{path}{suffix}", tmp_path / f"{copy}{suffix}")
    with pytest.raises(StoreError, match=r"lost \d+ of 60 rows.*resume='accept'"):
        Store(path)
    rows, said = opened(tmp_path / "accepted.db", damaged="accept")
    assert rows < 60 and "lost" in said[0]


def test_damage_in_the_middle_of_the_file_is_refused_and_a_backup_helps(tmp_path):
    """F4. Pages that SQLite notices, and rows that only their hash tells of."""
    store = filled(tmp_path / "s.db", 400, close=False)
    backup = store.back_up()
    store.add([Event("start", 1, {})])
    store.close()
    path = tmp_path / "s.db"
    whole = path.read_bytes()
    for at, what in ((len(whole) // 2, os.urandom(3000)), (0, b"no database at all " * 200), (None, b"")):
        path.write_bytes(what if at is None else whole[:at] + what + whole[at + len(what) :])
        with pytest.raises(StoreError, match=r"801 rows.*resume='backup'"):
            Store(path)
    path.write_bytes(whole)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("UPDATE event SET body = replace(body, '[7]', '[8]') WHERE number = 7")
        connection.commit()
    with pytest.raises(StoreError, match="rows from 15 on are not those that were written"):
        Store(path)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("DELETE FROM event WHERE seq = 100")
        connection.commit()
    with pytest.raises(StoreError, match="not those that were written"):
        Store(path)
    rows, said = opened(path, damaged="backup")
    assert rows == 801 and "backup" in said[0] and backup.exists()
    assert len(list(tmp_path.glob("s.db.damaged-*"))) >= 1  # nothing is thrown away


@pytest.mark.parametrize("how", ["row", "pages", "gone", "no database", "empty"])
def test_what_can_be_read_of_a_damaged_file_is_accepted(tmp_path, how):
    """It goes on with the rows before the first bad one, says so, and the file as it was is put aside."""
    path = tmp_path / "s.db"
    store = Store(path)
    store.add([], {"study": "kept"})
    store.close()
    filled(path, 400)
    whole = path.read_bytes()
    if how in ("row", "gone"):
        statement = {"row": "UPDATE event SET body = '{}' WHERE seq = 15", "gone": "DELETE FROM event WHERE seq = 15"}
        with closing(sqlite3.connect(path)) as connection:
            connection.execute(statement[how])
            connection.commit()
    else:
        middle = len(whole) // 2
        damaged = whole[:middle] + b"x" * 8192 + whole[middle + 8192 :]
        path.write_bytes({"pages": damaged, "no database": b"nothing " * 900, "empty": b""}[how])
    with pytest.raises(StoreError, match="resume='accept'"):
        Store(path)
    with pytest.warns(GraphoptWarning, match=r"going on with \d+ of 800 rows.*damaged-"):
        store = Store(path, damaged="accept")
    kept = len(store.events)
    assert kept == 14 if how in ("row", "gone") else 14 < kept < 800 if how == "pages" else kept == 0
    assert how in ("no database", "empty") or store.meta["study"] == "kept"
    store.add([Event("start", 1, {})])
    store.close()
    assert opened(path) == (kept + 1, []) and list(tmp_path.glob("s.db.damaged-*"))


def test_a_file_that_never_was_a_study_is_not_put_aside(tmp_path):
    (tmp_path / "notes.txt").write_text("mine " * 1000)
    with pytest.raises(StoreError, match="nothing in it can be read"):
        Store(tmp_path / "notes.txt", damaged="accept")
    assert (tmp_path / "notes.txt").read_text() == "mine " * 1000


def test_a_backup_is_made_at_the_end(tmp_path):
    filled(tmp_path / "s.db", 5)
    assert len(read_study(tmp_path / "s.db.backup-0")[0]) == 10
    opened(tmp_path / "s.db")  # nothing was added
    assert not (tmp_path / "s.db.backup-1").exists()


def test_backups_are_made_in_turn(tmp_path):
    store = filled(tmp_path / "s.db", 2, close=False)
    paths = []
    for i in range(4):
        paths.append(store.back_up())
        os.utime(paths[-1], (i + 1, i + 1))
    store.close()
    assert paths[0] == paths[2] != paths[1] == paths[3]


def test_a_full_disk_is_told_and_nothing_is_half_written(tmp_path):
    """F4. SQLite is told that the file may not grow, which it answers as it does a full disk."""
    store = filled(tmp_path / "s.db", 5, close=False)
    (pages,) = store._connection.execute("PRAGMA page_count").fetchone()
    store._connection.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(StoreError, match="the disk is full"):
        for _ in range(100):
            store.add([Event("start", 0, {"text": "x" * 5000})])
    rows = store._seq
    store.close()
    assert opened(tmp_path / "s.db") == (rows, [])


def test_a_file_deleted_while_in_use_is_saved_elsewhere(tmp_path):
    """F4. SQLite would go on writing to a file that has no name any more."""
    store = filled(tmp_path / "s.db", 5, close=False)
    (tmp_path / "s.db").unlink()
    with pytest.raises(StoreError, match=r"its 10 rows were saved to .*rescued"):
        store.add([Event("start", 0, {})])
    store.close()
    with pytest.raises(StoreError, match="it held 10 rows"):
        Store(tmp_path / "s.db")  # not silently a new one
    for leftover in tmp_path.glob("s.db-*"):
        leftover.unlink()
    (tmp_path / "s.db.rescued").rename(tmp_path / "s.db")
    assert opened(tmp_path / "s.db") == (10, [])


def test_where_one_may_not_write_is_told(tmp_path):
    with pytest.raises(StoreError, match=r"is a folder"):
        Store(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="can be written to"):
        Store(tmp_path / "file" / "s.db")
    filled(tmp_path / "s.db", 1)
    if os.geteuid() == 0:  # root may write anywhere: as nobody, then
        os.chmod(tmp_path, 0o755)
        for parent in tmp_path.parents:
            if parent.stat().st_uid == 0 and str(parent) not in ("/", "/tmp"):
                os.chmod(parent, 0o755)
        os.seteuid(65534)
    else:
        os.chmod(tmp_path / "s.db.lock", 0o444)
    try:
        with pytest.raises(StoreError, match="can be written to"):
            Store(tmp_path / "s.db")
        assert len(read_study(tmp_path / "s.db")[0]) == 2  # it can still be looked at
    finally:
        if os.getuid() == 0:
            os.seteuid(0)


def test_other_files_are_left_alone(tmp_path):
    with closing(sqlite3.connect(tmp_path / "other.db")) as connection:
        connection.execute("CREATE TABLE mine (x)")
        connection.commit()
    before = (tmp_path / "other.db").read_bytes()
    with pytest.raises(StoreError, match="no study"):
        Store(tmp_path / "other.db")
    assert (tmp_path / "other.db").read_bytes() == before
    filled(tmp_path / "new.db", 1)
    with closing(sqlite3.connect(tmp_path / "new.db")) as connection:
        connection.execute("PRAGMA user_version = 99")
    with pytest.raises(StoreError, match="newer graphopt"):
        Store(tmp_path / "new.db")


def test_two_masters(tmp_path):
    """F5. The second is refused at once, with the number of the first."""
    store = filled(tmp_path / "s.db", 3, close=False)
    start = time.perf_counter()
    with pytest.raises(StoreError, match=rf"in use by process {os.getpid()} on"):
        Store(tmp_path / "s.db")
    assert time.perf_counter() - start < 0.05
    store.close()
    assert opened(tmp_path / "s.db") == (6, [])


def test_a_master_that_was_replaced_cannot_write(tmp_path):
    """F5. Its lock file was removed, so that another one could begin."""
    old = filled(tmp_path / "s.db", 3, close=False)
    (tmp_path / "s.db.lock").unlink()
    new = Store(tmp_path / "s.db")
    new.add([Event("start", 1, {})])
    with pytest.raises(StoreError, match="another master has taken over"):
        old.add([Event("start", 2, {})])
    new.add([Event("start", 3, {})])
    old.close()
    new.close()
    assert opened(tmp_path / "s.db") == (8, [])


def test_the_lock_of_a_killed_master_is_free_at_once(tmp_path):
    """F5. Also of one that was stopped; until then others wait."""
    code = (
        "import sys, time; from pathlib import Path; from graphopt.exploration.lock import Lock\n"
        "lock = Lock(Path(sys.argv[1])); lock.tell(rows=0); print('held', flush=True); time.sleep(60)"
    )
    path = tmp_path / "s.db.lock"
    holder = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, cwd=os.getcwd())
    try:
        assert holder.stdout.readline() == b"held\n"
        holder.send_signal(signal.SIGSTOP)
        with pytest.raises(StoreError, match=f"process {holder.pid}"):
            Lock(path)
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    start = time.perf_counter()
    Lock(path).release()
    assert time.perf_counter() - start < 0.05


def test_a_study_can_be_read_while_it_is_written(tmp_path):
    store = filled(tmp_path / "s.db", 3, close=False)
    events, _, holder = read_study(tmp_path / "s.db")
    assert len(events) == 6 and holder["pid"] == os.getpid() and holder["rows"] == 6
    store.close()
    with pytest.raises(StoreError, match="no study of this name"):
        read_study(tmp_path / "none.db")


def test_a_row_takes_few_bytes(tmp_path):
    store = Store(tmp_path / "s.db")
    for i in range(2000):
        store.add([Event("end", i, {"state": "done", "metrics": {"accuracy": 0.123456789}, "seconds": 1.23456})])
    store.close()
    assert (tmp_path / "s.db").stat().st_size / 2000 < 250
    assert json.loads((tmp_path / "s.db.lock").read_text())["rows"] == 2000
