"""The coordinator's pages for people: read-only, over the registry and the audit log, without a script."""
