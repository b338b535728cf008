"""The SuperLink embedded: Flower 1.41.0 carries the rounds, and everything private of it that the server uses is here.

Three kinds of process open the same folder: those that serve hospitals (``serve``), one round worker for each study
(``state``, ``grid``), and the control service, which registers hospitals (``state``).
"""

from cloister_server.link import quiet as quiet
from cloister_server.link.serve import serve_rounds
from cloister_server.link.state import Link, open_link

__all__ = ["Link", "open_link", "serve_rounds"]
