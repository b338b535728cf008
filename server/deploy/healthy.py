"""Succeeds where every named port of this machine answers a TLS greeting: ``python healthy.py 8443 8445``.

A process that hangs still has its port open, so an open port is not enough. Who answers is not asked: the container
talks to itself, and a hospital's certificate, which the public ports want afterwards, is not to be had here. The
control port, 8444, is of the admin port's process, and would write a line to its log each time.
"""

import socket
import ssl
import sys

context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
context.check_hostname = False
context.verify_mode = ssl.CERT_NONE
context.set_alpn_protocols(["h2", "http/1.1"])

for port in sys.argv[1:]:
    try:
        with socket.create_connection(("127.0.0.1", int(port)), timeout=4) as plain, context.wrap_socket(plain):
            pass
    except OSError as broken:
        sys.exit(f"Port {port} does not answer: {broken}")
