"""The mechanism audited as code: canaries in the real optimiser, and a lower bound on epsilon from what it releases.

``mechanism`` is the only file that knows how the client makes its gradient, and holds the bugs that can be planted;
``canaries`` runs it, ``bounds`` and ``conformance`` judge what it released, ``gate`` gives the verdict.
"""
