"""What the engine of workers does when processes answer, or are gone: on processes that a test lets speak."""

from collections import deque

import pytest

from graphopt.errors import ExplorationError
from graphopt.exploration.engines import Answered, Died, Ended, Ready, Reported
from graphopt.exploration.engines.workers import Lost, WorkersEngine
from graphopt.exploration.outcome import Outcome
from graphopt.exploration.proposers import Answer
from graphopt.exploration.sieve import Request
from graphopt.exploration.trainer import Task

REQUEST = Request(0, 2, 0, 0)


class Scripted:
    """Processes called trainer-0.0, trainer-0.1 (the one after it) ...; what they were told, and what is heard next."""

    def __init__(self):
        self.spawned, self.told, self.heard = [], {}, deque()
        self.closed = 0

    def spawn(self, kind, slot):
        name = f"{kind}-{slot}"
        process = f"{name}.{sum(other.startswith(name) for other in self.spawned)}"
        self.spawned.append(process)
        self.told[process] = []
        return process

    def send(self, process, messages):
        self.told[process] += messages

    def wait(self, seconds):
        return [self.heard.popleft()] if self.heard else []

    def kill(self, process):
        self.told[process].append("killed")

    def close(self):
        self.closed += 1


def engine_of(workers=2):
    processes = Scripted()
    return WorkersEngine(processes, workers=workers), processes


def hear(engine, processes, *said):
    """What the engine makes of all that is heard."""
    processes.heard.extend(said)
    found = []
    while processes.heard:
        found += engine.wait(0)
    return found


def answer(request):
    return ("answer", Answer(request, [], [], None))


def test_a_request_waits_for_the_first_generator_that_is_ready():
    """Others may never be: they wait for a machine."""
    engine, processes = engine_of()
    engine.feed(["row"])
    engine.ask(REQUEST)
    assert not any(processes.told.values())
    hear(engine, processes, ("generator-1.0", ("ready",)), ("generator-0.0", ("ready",)))
    assert processes.told["generator-1.0"] == [("rows", ["row"]), ("ask", REQUEST)]
    assert processes.told["generator-0.0"] == []
    assert isinstance(hear(engine, processes, ("generator-1.0", answer(REQUEST)))[0], Answered)


def test_rows_are_sent_once_and_only_with_a_request():
    engine, processes = engine_of(1)
    hear(engine, processes, ("generator-0.0", ("ready",)))
    for number, rows in enumerate((["a", "b"], [], ["c"])):
        engine.feed(rows)
        request = Request(number, 2, 0, 0)
        engine.ask(request)
        hear(engine, processes, ("generator-0.0", answer(request)))
    assert [told[1] for told in processes.told["generator-0.0"] if told[0] == "rows"] == [["a", "b"], ["c"]]


def test_the_request_of_a_generator_that_is_gone_is_placed_with_another_which_has_all_rows():
    engine, processes = engine_of()
    hear(engine, processes, ("generator-0.0", ("ready",)), ("generator-1.0", ("ready",)))
    engine.feed(["row"])
    engine.ask(REQUEST)
    assert processes.told["generator-0.0"][-1] == ("ask", REQUEST)
    hear(engine, processes, ("generator-0.0", Lost("SIGKILL", True)))
    assert processes.told["generator-1.0"] == [("rows", ["row"]), ("ask", REQUEST)]
    assert "generator-0.1" in processes.spawned


def test_a_trainer_that_is_gone_is_replaced_and_its_trial_told():
    engine, processes = engine_of(1)
    assert hear(engine, processes, ("trainer-0.0", ("ready",))) == [Ready(0)]
    engine.start(0, Task(7, (0,), 1))
    found = hear(engine, processes, ("trainer-0.0", ("report", 7, 1, 0.5, None)), ("trainer-0.0", Lost("why", False)))
    assert found == [Reported(0, 7, 1, 0.5, None), Died(0, 7, "why", False)]
    assert processes.spawned[-1] == "trainer-0.1"
    late = ("trainer-0.0", ("ended", 7, Outcome("done")))
    assert hear(engine, processes, late, ("trainer-0.1", ("ready",))) == [Ready(0)]


def test_a_trainer_out_of_memory_is_replaced_before_it_is_ready_again():
    engine, processes = engine_of(1)
    hear(engine, processes, ("trainer-0.0", ("ready",)))
    engine.start(0, Task(0, (0,), 1))
    outcome = Outcome("failed", out_of_memory=True)
    assert hear(engine, processes, ("trainer-0.0", ("ended", 0, outcome))) == [Ended(0, 0, outcome)]
    assert processes.told["trainer-0.0"][-1] == "killed" and processes.spawned[-1] == "trainer-0.1"


def test_a_trial_that_is_stopped_is_not_heard_of_again():
    engine, processes = engine_of(1)
    hear(engine, processes, ("trainer-0.0", ("ready",)))
    engine.start(0, Task(0, (0,), 1))
    engine.stop(0)
    assert processes.told["trainer-0.0"][-1] == "killed"
    late = [("trainer-0.0", ("ended", 0, Outcome("done"))), ("trainer-0.0", Lost("", True))]
    assert hear(engine, processes, *late, ("trainer-0.1", ("ready",))) == [Ready(0)]


@pytest.mark.parametrize("killed, times", [(False, 4), (True, 9)])
@pytest.mark.parametrize("kind", ["trainer", "generator"])
def test_a_process_that_never_does_anything_ends_the_search(kind, killed, times):
    engine, processes = engine_of(1)
    for count in range(times):
        lost = (f"{kind}-0.{count}", Lost("the reason", killed))
        if count < times - 1:
            hear(engine, processes, lost)
        else:
            with pytest.raises(ExplorationError, match=rf"the {kind} of worker 0 ended {times} times.*the reason"):
                hear(engine, processes, lost)


def test_trials_that_kill_their_trainer_do_not_count_as_its_starts():
    engine, processes = engine_of(1)
    for count in range(20):
        hear(engine, processes, (f"trainer-0.{count}", ("ready",)))
        engine.start(0, Task(count, (0,), 1))
        found = hear(engine, processes, (f"trainer-0.{count}", Lost("SIGSEGV", False)))
        assert found == [Died(0, count, "SIGSEGV", False)]


def test_what_cannot_be_used_is_told():
    engine, processes = engine_of(1)
    with pytest.raises(ExplorationError, match=r"a trainer cannot go on:\nNameError"):
        hear(engine, processes, ("trainer-0.0", ("unusable", "NameError")))
    engine.close()
    assert processes.closed == 1
