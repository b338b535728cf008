"""The training process: it answers from an approved study, without a network, within its memory and its time."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.common.serde import message_from_proto
from flwr.proto.message_pb2 import Message as MessageProto

from cloister_client.objects import contents, inflated
from cloister_shared.errors import ConsentRefused, TrainingLost
from cloister_shared.parcel import Parcel
from cloister_shared.wire import FAILED, REFUSED, unpack_reply

from .letters import asked, message, parts


def reply_of(trainer, parcel: Parcel) -> Message:
    reply = trainer.ask(parcel.message, parcel.root, parcel.objects.items())
    assert contents(reply).answers == parcel.root
    proto = MessageProto.FromString(reply.message)
    return message_from_proto(proto) if proto.HasField("error") else inflated(reply.root, reply.objects)


def error_of(trainer, parcel: Parcel) -> tuple[int, str]:
    reply = reply_of(trainer, parcel)
    assert reply.has_error()
    return reply.error.code, reply.error.reason or ""


pytestmark = pytest.mark.slow

MODEL = np.zeros(4, np.float32)


def test_it_trains(warm):
    reply = unpack_reply(reply_of(warm.trainer, asked(warm.plan, warm.hospital.name, model=MODEL)).content)
    assert reply.header.site == warm.hospital.name
    assert np.abs(reply.vectors["update"]).sum() > 0


def test_one_process_answers_all_messages(warm):
    first = warm.trainer.ask(*parts(asked(warm.plan, warm.hospital.name, model=MODEL)))
    pid = warm.trainer._running.process.pid
    last = warm.trainer.ask(*parts(asked(warm.plan, warm.hospital.name, "evaluate", 4, model=MODEL)))
    assert warm.trainer._running.process.pid == pid
    assert contents(first).vectors == (("update", "float32", 4),)
    assert any(key.startswith("estimates.final.") for key in contents(last).header)


def test_it_has_one_socket_and_no_other(warm):
    warm.trainer.ask(*parts(asked(warm.plan, warm.hospital.name, model=MODEL)))
    own = Path(f"/proc/{warm.trainer._running.process.pid}/fd")
    try:
        opened = [os.readlink(entry) for entry in own.iterdir()]
    except PermissionError:
        pytest.skip("only root can look into it, which is as it should be")
    assert [end.partition(":")[0] for end in opened].count("socket") == 1


# --- what it refuses ---------------------------------------------------------------------------------------
def test_a_ticket_for_another_plan_is_refused(warm):
    other = warm.plan.model_copy(update={"rounds": 9})
    code, reason = error_of(warm.trainer, asked(other, warm.hospital.name, model=MODEL))
    assert code == REFUSED
    assert "approved" in reason


def test_a_message_with_other_parts_is_refused(warm):
    content = RecordDict({"vectors": ArrayRecord(), "header": ConfigRecord({"json": "{}"}), "more": ConfigRecord()})
    code, reason = error_of(warm.trainer, message(content))
    assert (code, "no ticket" in reason) == (REFUSED, True)


def test_an_array_in_numpys_own_format_is_refused(warm):
    """A file of numpy's may hold a pickled object; no array of a ticket is one."""
    odd = Array(dtype="float32", shape=(4,), stype="numpy.ndarray", data=bytes(16))
    content = RecordDict({"vectors": ArrayRecord({"model": odd}), "header": ConfigRecord({"json": "{}"})})
    code, reason = error_of(warm.trainer, message(content))
    assert (code, "cannot be read" in reason) == (REFUSED, True)


def test_a_kind_of_message_that_nobody_answers_is_no_crash(warm):
    code, _ = error_of(warm.trainer, asked(warm.plan, warm.hospital.name, "query.shell"))
    assert code == FAILED
    again = warm.trainer.ask(*parts(asked(warm.plan, warm.hospital.name, model=MODEL)))
    assert contents(again).error is None


def test_a_study_that_was_revoked_is_not_opened(trainer, plan, hospital):
    hospital.revokes(plan.digest)
    code, reason = error_of(trainer(), asked(plan, hospital.name, model=MODEL))
    assert (code, "revoked" in reason) == (REFUSED, True)


def test_a_table_that_does_not_meet_the_plan_is_refused_until_it_does(trainer, plan, hospital):
    table = hospital.folder / "table.csv"
    good = table.read_text()
    table.write_text(good.replace("outcome", "other"))
    process, ticket = trainer(), asked(plan, hospital.name, model=MODEL)
    code, reason = error_of(process, ticket)
    assert code == REFUSED
    assert "outcome" not in reason, "what is wrong with the table stays here"
    table.write_text(good)
    assert contents(process.ask(*parts(ticket))).error is None


def test_a_package_that_is_missing_is_named_with_its_extra(trainer, plan, hospital, monkeypatch):
    (hospital.folder / "lacking.py").write_text(LACKING)
    monkeypatch.setenv("PYTHONPATH", f"{hospital.folder}:{os.environ.get('PYTHONPATH', '')}")
    code, reason = error_of(trainer(program="lacking"), asked(plan, hospital.name, model=MODEL))
    assert code == REFUSED
    assert reason == "This needs rdkit, which is not installed. Run pip install 'cloister[molecules]'."


LACKING = """
import sys
from pathlib import Path
from cloister_client.child import main

def opened(folder, digest):
    sys.modules["rdkit"] = None
    import rdkit.Chem

main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], opened)
"""
"""A training process whose records are molecules, where nobody installed RDKit."""


@pytest.mark.parametrize(
    "says",
    [
        'send(end, "reply", b"{}")',
        'send(end, "reply", b"{}", arrays=[("update", "no type", "s", 0)])',
        'send(end, "reply", b"{}", arrays=[("update", "uint8", "s", 9)]); send(end, "chunk", b"12345678")',
        'send(end, "reply", b"{}", arrays=[7])',
        'send(end, "reply", bytes([255]), arrays=[])',
        'send(end, "error", b"")',
    ],
)
def test_what_is_no_reply_ends_the_process_and_no_more(trainer, plan, hospital, monkeypatch, says):
    (hospital.folder / "strange.py").write_text(STRANGE.replace("SAYS", says))
    monkeypatch.setenv("PYTHONPATH", f"{hospital.folder}:{os.environ.get('PYTHONPATH', '')}")
    process = trainer(program="strange")
    with pytest.raises(ValueError, match="it is none"):
        process.ask(*parts(asked(plan, hospital.name, model=MODEL)))
    assert process._running is None


STRANGE = """
import sys
from cloister_client.channel import receive, send

end = int(sys.argv[1])
send(end, "ready")
while receive(end).kind != "answer":
    pass
SAYS
receive(end)
"""
"""A training process that answers with something else."""


# --- its limits --------------------------------------------------------------------------------------------
def test_a_machine_without_a_filter_trains_nothing(trainer, plan, hospital, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"{_without_a_filter(hospital.folder)}:{os.environ.get('PYTHONPATH', '')}")
    with pytest.raises(ConsentRefused, match="sandbox: off"):
        trainer().ask(*parts(asked(plan, hospital.name, model=MODEL)))
    hospital.policy(sandbox="off")
    reply = trainer().ask(*parts(asked(plan, hospital.name, model=MODEL)))
    assert contents(reply).error is None


def _without_a_filter(folder: Path) -> Path:
    """A module path under which this machine's processor is one that the sandbox has no rule for."""
    (folder / "path").mkdir()
    (folder / "path/sitecustomize.py").write_text("import platform; platform.machine = lambda: 'riscv64'\n")
    return folder / "path"


def test_the_limit_of_memory_ends_in_a_sentence(trainer, plan, hospital):
    hospital.policy(memory_gb=0.5)
    # The ticket is taken in whole; the model of it, several times.
    size = 30_000_000
    code, reason = error_of(trainer(), asked(plan, hospital.name, model=np.zeros(size, np.float32)))
    assert code == FAILED
    assert "memory_gb" in reason


def test_the_limit_of_time_ends_in_a_sentence(trainer, plan, hospital):
    process = trainer(hours=0.001)
    process.ask(*parts(asked(plan, hospital.name, model=MODEL)))  # begun in its own time
    os.kill(process._running.process.pid, signal.SIGSTOP)
    with pytest.raises(TrainingLost, match=r"within 0\.001 hours") as lost:
        process.ask(*parts(asked(plan, hospital.name, model=MODEL)))
    assert not lost.value.again


def test_a_killed_process_is_told_and_the_next_message_begins_another(trainer, plan, hospital):
    process, ticket = trainer(), asked(plan, hospital.name, model=MODEL)
    process.ask(*parts(ticket))
    pid = process._running.process.pid
    os.kill(pid, signal.SIGSTOP)  # so that it is killed in the middle of its work
    threading.Timer(0.3, os.kill, (pid, signal.SIGKILL)).start()
    with pytest.raises(TrainingLost, match="was killed"):
        process.ask(*parts(ticket))
    assert contents(process.ask(*parts(ticket))).error is None
    assert process._running.process.pid != pid


AGENT = """
import sys, threading, time
from pathlib import Path
import numpy as np
from cloister_client.offers import study_of
from cloister_client.trainer import Trainer
folder, digest, when, tests = Path(sys.argv[1]), *sys.argv[2:]
sys.path.insert(0, tests)
from letters import asked, parts
trainer = Trainer(folder, digest, hours=1.0)
running = trainer.begin()
if when == "working":
    ticket = asked(study_of(folder / "agent", digest).plan, "St Mary's", model=np.zeros(4, np.float32))
    threading.Thread(target=trainer.ask, args=parts(ticket), daemon=True).start()
    while not running.ready:
        time.sleep(0.1)
    time.sleep(2)
print(running.process.pid, flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("when", ["starting", "working"])
def test_it_ends_with_the_agent(consortium, hospital, when):
    """After kill -9 nobody ends it, and the work that it has would take it hours."""
    plan = consortium.offers(training="{learning_rate: 0.001, batch_size: 60, local_steps: 10000000}")
    hospital.approves(plan.digest)
    command = [sys.executable, "-c", AGENT, str(hospital.folder), plan.digest, when, str(Path(__file__).parent)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as agent:
        assert agent.stdout is not None
        pid = int(agent.stdout.readline())
        assert Path(f"/proc/{pid}").exists()
        agent.kill()
    until = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and "State:\tZ" not in Path(f"/proc/{pid}/status").read_text():
        assert time.monotonic() < until, "it lives on"
        time.sleep(0.05)
