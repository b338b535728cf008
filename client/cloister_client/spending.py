"""What one private study costs this hospital's patients: reserved as a whole, committed before anything leaves."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

from cloister_client.dataset import Dataset
from cloister_client.ledger import Cost, Ledger, Release
from cloister_client.privacy import most_records, plan_cost
from cloister_shared.budget import Event
from cloister_shared.charges import in_patients, training_event
from cloister_shared.plan import StudyPlan
from cloister_shared.wire import Ticket


class Spending:
    """One study's, from a ledger that all of the hospital's studies share.

    Once a study is reserved its charges stay, though patients withdraw: what a draw costs follows from its chance and
    the noise alone, not from how many others there are (Mironov, Talwar and Zhang 2019), so the chance stays too.
    """

    def __init__(self, plan: StudyPlan, dataset: Dataset, ledger: Ledger) -> None:
        self._plan, self._digest, self._dataset, self._ledger = plan, plan.digest, dataset, ledger

    def reserve(self, approved: str) -> None:
        """Set the whole cost aside; ``approved`` is the digest of the quote that was, or "".

        Raises:
            TicketRefused: it was approved, or reserved before, with other charges.
            BudgetExceeded: the hospital's ceiling does not admit it.
        """
        self._ledger.reserve(self.cost, approved=approved)

    def commit(self, ticket: Ticket, event: Event) -> None:
        """Charge what is about to be drawn for a ticket, durably; once, however often the ticket comes.

        Raises:
            BudgetExceeded: it is not reserved.
        """
        paid = in_patients(event, self._plan, self._most_records)
        release = Release(self._digest, ticket.header.run, ticket.header.round, ticket.digest, paid)
        self._ledger.commit(release, epsilon=self.cost.epsilon, delta=self.cost.delta)

    def training(self, units: int) -> Event:
        """What a round of training costs, with so many units to draw from."""
        return training_event(self._priced, units)

    @cached_property
    def cost(self) -> Cost:
        """Of the whole plan."""
        return replace(plan_cost(self._priced, self._dataset, self._most_records), plan=self._digest)

    @cached_property
    def _reserved(self) -> tuple[Event, ...]:
        """The charges that the plan was reserved with before, if it was."""
        return next((one.charges for one in self._ledger.reservations() if one.plan == self._digest), ())

    @cached_property
    def _priced(self) -> StudyPlan:
        """The plan with the chance of a draw as it was reserved."""
        rates = [event.sample_rate for event in self._reserved if event.purpose == "training"]
        if not rates or self._plan.training.sample_rate or self._plan.privacy.unit == "site":
            return self._plan
        training = self._plan.training.model_copy(update={"sample_rate": rates[0]})
        return self._plan.model_copy(update={"training": training})

    @cached_property
    def _most_records(self) -> int:
        """Of one patient; no fewer than were reserved for, though that patient be gone."""
        return max([most_records(self._dataset), *(event.records for event in self._reserved)])
