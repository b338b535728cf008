"""How a hospital leaves its consortium: what to do, what is deleted, and what has to stay."""

from __future__ import annotations

import shutil
from pathlib import Path
from textwrap import fill

from cloister_client.approvals import Approvals
from cloister_client.decisions import account, stop
from cloister_client.liaison import tell_decision
from cloister_client.lineage_book import FILE, KEY
from cloister_client.membership import calling, consortium_of, running, tell
from cloister_shared.errors import CloisterError, ConsentRefused

_PAGE = """\
{site} leaves {consortium}. Nothing is deleted yet.

1. Stop the agent, and take its service away:
     systemctl --user disable --now cloister-agent
     rm ~/.config/systemd/user/cloister-agent.service
2. Type cloister-site leave --yes. It
     revokes {studies},
     tells the coordinator if it can be reached, and
     deletes {agent}: keys, certificate, pinned peers, plans, answers, egress log.
   Nobody can make the keys again. To come back needs a new invite, and every other hospital must
   pin the new key. Keep a copy of egress.jsonl first, if you must be able to show what left.
3. Tell {consortium} to expel {site}. Then its certificate is revoked too.
4. Uninstall: delete the Python environment, or pip uninstall cloister.

What stays, and why:
  {ledger}  what your patients' privacy has cost
  {audit}   what was decided, and by whom
  {officers}  who may set a ceiling or approve
  {lineage}  whose rows which study used
  {key}  its key, for a patient who withdraws later
A model that was trained stays trained: what it cost your patients counts in any later study, in any
consortium. Without the ledger nobody could know, and without the lineage nobody whose rows it saw.
Keep these as long as you keep the records.
site.yaml, your table and the officers' keys are yours and are not touched.
What was sent before stays with the coordinator, as sums and models; ask it what it keeps."""


def page(agent: Path) -> str:
    """What to do, in at most 100 columns.

    Raises:
        EnrolmentRefused: this hospital is not enrolled.
    """
    known, approved = consortium_of(agent), len(Approvals(agent).approved())
    names = [agent.parent / name for name in ("ledger.sqlite", "audit.jsonl", "officers.json", FILE, KEY)]
    width = max(len(str(name)) for name in names)
    ledger, audit, officers, lineage, key = (f"{name!s:<{width}}" for name in names)
    return _PAGE.format(
        site=known.site,
        consortium=known.consortium,
        studies={0: "nothing, for no study is approved", 1: "the study that is approved"}.get(
            approved, f"the {approved} studies that are approved"
        ),
        agent=agent,
        ledger=ledger,
        audit=audit,
        officers=officers,
        lineage=lineage,
        key=key,
    )


def left(agent: Path) -> str:
    """Revoke what is approved, tell the coordinator if it can be reached, and delete the agent's folder.

    Raises:
        EnrolmentRefused: this hospital is not enrolled.
        ConsentRefused: the agent still runs.
        AuditBroken: the log cannot be told; nothing is deleted.
    """
    known, said = consortium_of(agent), list[str]()
    if running(agent):
        raise ConsentRefused(
            "The agent still runs.", mend="Stop it first: systemctl --user disable --now cloister-agent."
        )
    for digest in Approvals(agent).approved():
        stop(agent, digest, "revoked", "the hospital leaves the consortium", account())
        try:
            with calling(agent) as control:
                tell_decision(agent, control, digest)
            said.append(f"Study {digest[:12]} is revoked, and the coordinator knows.")
        except CloisterError as error:
            said.append(f"Study {digest[:12]} is revoked here; the coordinator could not be told: {error.said}")
    tell(agent, "left", {"consortium": known.consortium, "site": known.site, "lineage": "kept"})
    shutil.rmtree(agent)
    said.append(
        f"{agent} is deleted; ledger, lineage and audit log stay. Tell {known.consortium} to expel {known.site}."
    )
    return "\n".join(fill(line, 100) for line in said)
