"""The hospital's door to Flower: a message is read, its site answers, and whatever went wrong is a sentence."""

from __future__ import annotations

import logging
from collections.abc import Callable

from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp

from cloister_client.sandbox import out_of_memory
from cloister_client.site import Site
from cloister_shared.errors import CloisterError, TicketRefused
from cloister_shared.wire import (
    FAILED,
    REFUSED,
    Reply,
    ReplyHeader,
    Ticket,
    pack,
    pack_vectors,
    unpack_ticket,
    unpack_unmask,
)

log = logging.getLogger("cloister.site")


def client_app(open_records: Callable[[Context], Site]) -> ClientApp:
    """A Flower ClientApp around whichever hospital a context means."""
    app = ClientApp()

    def guarded(message: Message, work: Callable[[], ReplyHeader | Reply]) -> Message:
        try:
            said = work()
            said = Reply(said) if isinstance(said, ReplyHeader) else said
            return Message(pack(said.header, pack_vectors(said.vectors, said.octets)), reply_to=message)
        except CloisterError as refusal:
            log.warning("refused: %s", refusal)
            return Message(Error(code=REFUSED, reason=refusal.abroad or str(refusal)), reply_to=message)
        except Exception as fault:
            # The details stay here: an exception's text may quote a row.
            log.exception("the request could not be answered")
            reason = out_of_memory(fault) or f"{type(fault).__name__} at the hospital; its log says more"
            return Message(Error(code=FAILED, reason=reason), reply_to=message)

    def answer(message: Message, context: Context, ask: Callable[[Site, Ticket], Reply]) -> Message:
        def work() -> Reply:
            site, ticket = open_records(context), unpack_ticket(message.content)
            site.check(ticket, ask.__name__)
            return ask(site, ticket)

        return guarded(message, work)

    @app.query("enrol")
    def enrol(message: Message, context: Context) -> Message:
        def work() -> ReplyHeader:
            site, asked = open_records(context), unpack_ticket(message.content).header.plan
            if asked != site.plan.digest:
                raise TicketRefused(f"{site.name} is asked for plan {asked[:12]}.", mend="Correct the coordinator.")
            return site.enrol()

        return guarded(message, work)

    @app.query("advertise")
    def advertise(message: Message, context: Context) -> Message:
        return answer(message, context, Site.advertise)

    @app.query("unmask")
    def unmask(message: Message, context: Context) -> Message:
        return guarded(message, lambda: open_records(context).unmask(unpack_unmask(message.content)))

    @app.query("readiness")
    def readiness(message: Message, context: Context) -> Message:
        return answer(message, context, Site.readiness)

    @app.query("statistics")
    def statistics(message: Message, context: Context) -> Message:
        return answer(message, context, Site.statistics)

    @app.train()
    def train_(message: Message, context: Context) -> Message:
        return answer(message, context, Site.train)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return answer(message, context, Site.evaluate)

    return app
