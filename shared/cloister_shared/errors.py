"""Every error a user can meet. A refusal is the platform working as intended; a fault is something broken.

    CloisterError
    + Refusal                                        + Fault
      + PlanRefused       the plan cannot be run       + QuorumLost        too few hospitals answered
      + DataRefused       the table fails the schema   + ReplyRejected     one hospital's reply is odd
      + ConsentRefused    against a hospital's policy  + CheckpointBroken  saved state cannot be read
      + CohortTooSmall    fewer than the minimum       + KeyBroken         a key or roster cannot be used
      + TicketRefused     not what was approved        + LedgerBroken      the budget's record is not whole
      + EnvelopeRefused   signed by another, or not    + AuditBroken       the audit log is not as written
      + UpdateRefused     may not leave the hospital   + WeightsBroken     public weights are missing, or are others
      + BudgetExceeded    epsilon would pass its cap   + LinkLost          the other side cannot be reached
      + EnrolmentRefused  no member, or no longer      + TrainingLost      the process that trains ended
      + AccessRefused     the account may not do it    + RegistryBroken    the coordinator's records fail
      + StudyRefused      unknown, or in another state + PackageMissing    an extra is not installed
      + VersionRefused    one side must be upgraded    + LineageBroken     who was in which study cannot be read
      + AlreadyRunning    one process to a folder

Each message is a whole sentence that says what was wrong and where, then the mend. None ever holds a value
from a patient's row.
"""


class CloisterError(Exception):
    """Root of the tree. ``mend`` is what the reader can do about it; it is part of the message."""

    mend = ""
    abroad = ""
    """What may be said of it outside the hospital, where the whole sentence says too much."""

    def __init__(self, said: str, *, mend: str | None = None) -> None:
        self.said = said
        if mend is not None:
            self.mend = mend
        super().__init__(f"{said} {self.mend}".strip())


class Refusal(CloisterError):
    """The platform said no, and was right to."""


class Fault(CloisterError):
    """Something broke; nothing that was durable is lost."""


class PlanRefused(Refusal):
    """The study plan is malformed or asks for something impossible."""


class DataRefused(Refusal):
    """A hospital's table does not meet the plan's schema."""

    abroad = "The hospital's table does not meet the plan; its own log says in what."


class ConsentRefused(Refusal):
    """The hospital's own policy does not allow what the plan asks for."""


class CohortTooSmall(Refusal):
    """Fewer patients or hospitals than the plan's minimum."""

    abroad = "The hospital has fewer patients than the plan's minimum."


class TicketRefused(Refusal):
    """A coordinator's ticket does not fit the plan that this hospital approved."""


class EnvelopeRefused(Refusal):
    """A statement is not signed by whom it should be, or for another purpose."""

    mend = "Ask whoever sent it; if a hospital changed its key, every other hospital must pin the new one."


class UpdateRefused(Refusal):
    """The update may not leave: it would weigh more than the plan allows."""

    mend = "Raise cohort.max_rows and have the plan approved again."


class BudgetExceeded(Refusal):
    """The mechanism asked for would take epsilon past what the plan, or the hospital's own ceiling, allows."""

    mend = "Lower rounds, local_steps or batch_size, or raise the plan's epsilon and have it approved again."
    abroad = "The hospital cannot stay within its privacy budget; its own log says why."


class QuorumLost(Fault):
    """Fewer valid replies than ``cohort.min_sites`` before the deadline; the model is unchanged."""

    mend = "Run the same command with --resume once the hospitals are back."


class ReplyRejected(Fault):
    """One hospital's reply failed a check; the round goes on without it."""


class CheckpointBroken(Fault):
    """A checkpoint or an answer on disk cannot be read."""


class KeyBroken(Fault):
    """A signing key or a roster of pinned keys is missing, damaged, or open to others."""

    abroad = "A key at the hospital cannot be used; its own log says which."


class WeightsBroken(Fault):
    """The public weights that a plan begins from are missing, or are not those that it names."""

    abroad = "The public weights that the plan begins from cannot be used at the hospital; its own log says why."


class LedgerBroken(Fault):
    """The privacy ledger cannot be read, or is not the one that the audit log speaks of."""

    mend = "Restore ledger.sqlite and the audit log beside it from the same backup."
    abroad = "The hospital's privacy ledger cannot be used; its own log says why."


class LineageBroken(Fault):
    """The record of whose rows were in which study cannot be read, or is not the one that the audit log speaks of."""

    abroad = "The hospital's record of whose rows its studies saw cannot be used; its own log says why."


class AuditBroken(Fault):
    """The audit log was changed, or ends in what was never appended."""

    abroad = "The hospital's audit log cannot be used; its own log says why."


class EnrolmentRefused(Refusal):
    """An invite, a certificate request or a certificate is not valid, or is no longer."""


class AccessRefused(Refusal):
    """An account's role does not allow what it asks, or there is no such account."""


class TokenRefused(AccessRefused):
    """A caller shows no token, or one that no account has."""

    mend = "Give the token of your account in $CLOISTER_TOKEN or with --token-file."


class RateRefused(AccessRefused):
    """A caller asks more often than it may."""


class StudyRefused(Refusal):
    """There is no such study, or its state does not allow what is asked."""


class StudyHeld(StudyRefused):
    """The plan has a person read what the hospitals hold before they train."""

    mend = "Read it: cloister-coordinator study readiness NAME. Then type study resume NAME, or leave it stopped."


class VersionRefused(Refusal):
    """The two sides speak versions of the protocol that do not fit together; one must be upgraded."""


class LinkLost(Fault):
    """The coordinator cannot be reached, or the connection to it was cut."""

    mend = "Run cloister-site doctor: it tries each part of the way and says what to do."


class AlreadyRunning(Refusal):
    """A second process would work in the folder of the first."""

    mend = "Stop the other one first, or leave it be."


class TrainingLost(Fault):
    """The process that trains at a hospital ended before it answered."""

    mend = "The log of the agent says what it wrote last."
    abroad = "The training process at the hospital ended before it answered; its own log says why."
    again = True
    """Whether a second try could end otherwise."""


class RegistryBroken(Fault):
    """The coordinator's records of hospitals and studies cannot be read or written."""


class PackageMissing(Fault):
    """A package that not everybody installs is needed here."""
